"""One training of one run, whatever its objective: what is checked before, recorded after, and written down at the end.

The same spec and seed give the same trained weights bit for bit (on one machine with one thread count), whether or not
the process was killed and started again in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from peft_arena.core.errors import UserError
from peft_arena.core.provenance import provenance
from peft_arena.core.specs import TrainBase
from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.store.records import Start, TrainingRecord
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.base import Task
from peft_arena.tasks.registry import check_version
from peft_arena.train.meter import meter
from peft_arena.train.outcome import OnStep, TrainOutcome
from peft_arena.train.state import drop_states

if TYPE_CHECKING:
    from peft_arena.train.proof import Proof
    from peft_arena.train.session import Session

T = TypeVar("T", bound=TrainBase)
S = TypeVar("S", bound="Session[Any]")


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


def follow(
    begin: Callable[[], S],
    record: Callable[[S, int | None], TrainingRecord],
    resume_every: int | None,
    progress: bool,
    on_step: OnStep | None,
    proof: Proof | None = None,
) -> TrainOutcome:
    """Do all steps of a training that are left.

    Args:
        begin: makes the session, which continues a resume state if there is one.
        record: makes the record of the finished training from the session and the step it was resumed from.
        resume_every: see :func:`train_run`.
        progress: see :func:`train_run`.
        on_step: see :func:`train_run`.
        proof: see :func:`train_run`.
    """
    from peft_arena.train.quiet import random_kept

    with random_kept(), contextlib.ExitStack() as stack:
        session = begin()
        session.proof = proof
        counters, run = session.counters, session.run
        if counters.step:
            run.event("training_resumed", step=counters.step)
        resumed_at = counters.step or None
        show = stack.enter_context(meter(progress, run.run_id, session.total, counters.step, counters.tokens))
        session.train([show] if on_step is None else [show, on_step], resume_every)
    return TrainOutcome(record(session, resumed_at), counters.seconds, counters.cpu_seconds, counters.rows)


def training_record(
    session: Session[Any], resumed_at: int | None, *, task: Task, examples: int, dropped: int, **more: Any
) -> TrainingRecord:
    """Return the record of a finished training.

    Args:
        session: the training.
        resumed_at: step it was resumed from; None if undisturbed.
        task: what was trained on.
        examples: training examples or prompts that were used.
        dropped: those left out for their length.
        more: further fields of the record.
    """
    counters = session.counters
    return TrainingRecord(
        run_id=session.run.run_id,
        steps=counters.step,
        tokens=counters.tokens,
        padded_tokens=counters.padded_tokens,
        examples=examples,
        dropped=dropped,
        validation_items=session.held_out_items,
        data=task.card_as_loaded().revision,
        log=tuple(counters.log),
        save_points=session.save_at,
        resumed_at=resumed_at,
        provenance=provenance(),
        **more,
    )


def finish(run: RunDirectory, record: TrainingRecord) -> None:
    """Write the training record of a finished training and remove its resume states.

    Raises:
        UserError: the disk refused the write; the resume states are still there.
        FileExistsError: the run is already trained.
    """
    run.write_training(record)
    drop_states(run)


def checked(
    run: RunDirectory, loaded: Loaded, attached: Attached, task: Task, kind: type[T], resume_every: int | None
) -> T:
    """Return the run's training spec, after refusing objects that are not what it says they are.

    Raises:
        UserError: the run is trained or is the base, or model, task, method or objective are others.
    """
    spec = run.spec.train
    if spec is None:
        raise UserError(f"run {run.run_id} is the base model: there is nothing to train")
    if not isinstance(spec, kind):
        raise UserError(f"run {run.run_id} has objective {spec.objective}: it cannot be trained as {kind.__name__}")
    if run.training() is not None:
        raise UserError(f"run {run.run_id} is already trained")
    if loaded.spec != run.spec.model:
        raise UserError(f"run {run.run_id} is of model {run.spec.model.name}, and {loaded.spec.name} was loaded")
    check_version(task, spec.task)
    if resume_every is not None and resume_every < 1:
        raise UserError(f"resume_every must be at least 1, got {resume_every}")
    trained = attached.trained()
    if not trained:
        raise UserError(f"method {run.spec.method.name} left no trained parameter on {loaded.spec.name}")
    for name, parameter in trained.items():
        if str(parameter.dtype) != "torch.float32":
            raise UserError(f"trained parameter {name} is {parameter.dtype}; trained parameters must be float32")
    return spec
