"""One training of one run, whatever its objective: what is checked before, recorded after, and written down at the end.

The same spec and seed give the same trained weights bit for bit (on one machine with one thread count), whether or not
the process was killed and started again in between.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.store.records import Start, TrainingRecord
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.base import Task
from peft_arena.train.outcome import OnStep, TrainOutcome
from peft_arena.train.state import drop_states

if TYPE_CHECKING:
    from peft_arena.train.proof import Proof


def train_run(
    run: RunDirectory,
    loaded: Loaded,
    attached: Attached,
    task: Task,
    *,
    resume_every: int | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    start: Start | None = None,
    recompute: bool = False,
    proof: Proof | None = None,
) -> TrainOutcome:
    """Train an attached method on a task by the run's objective, and write its checkpoints.

    The training record is returned, not written: the caller writes what belongs to the training (its cost) and then
    calls :func:`finish`, from where on the run counts as trained. If an earlier process died before that, its newest
    resume state is continued. The caller holds the run's lock.

    Args:
        run: where to write; its spec says what to train and how.
        loaded: the model the method was attached to, with its tokenizer.
        attached: the method in place, freshly attached with the run's seed.
        task: the spec's task.
        resume_every: write a resume state at least every so many steps; None for only at the save points.
        progress: show a progress bar if stderr is a terminal.
        on_step: called after each step, when everything the step writes is written.
        start: what ``loaded`` is, if not the pretrained model.
        recompute: compute activations again in the backward pass instead of keeping them.
        proof: made before the method was attached; reads the first checkpoint back.

    Raises:
        UserError: the objects are not those of the spec, an example is too long or none is left, the method has nothing
            to train, or the disk refused a write.
        TrainingFailed: the loss or a gradient became infinite or not a number.
    """
    from peft_arena.train.recompute import activations_recomputed
    from peft_arena.train.rl import train_rl
    from peft_arena.train.sft import train_sft

    spec = run.spec.train
    with activations_recomputed(attached.model) if recompute else contextlib.nullcontext():
        if spec is None or spec.objective == "sft":
            return train_sft(
                run, loaded, attached, task, resume_every=resume_every, progress=progress, on_step=on_step, proof=proof
            )
        return train_rl(
            run,
            loaded,
            attached,
            task,
            resume_every=resume_every,
            progress=progress,
            on_step=on_step,
            start=start,
            proof=proof,
        )


def finish(run: RunDirectory, record: TrainingRecord) -> None:
    """Write the training record of a finished training and remove its resume states.

    Raises:
        UserError: the disk refused the write; the resume states are still there.
        FileExistsError: the run is already trained.
    """
    run.write_training(record)
    drop_states(run)
