"""Supervised fine-tuning of one run: one path for every method.

The same spec and seed give the same trained weights bit for bit (on one machine with one thread count), whether or not
the process was killed and started again in between.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.provenance import provenance
from peft_arena.core.specs import TrainSpec
from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.models.modes import context_length, virtual_tokens
from peft_arena.store.records import TrainingRecord
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.base import Task
from peft_arena.tasks.registry import check_version
from peft_arena.train.data import Example, Examples, read_examples
from peft_arena.train.meter import meter
from peft_arena.train.outcome import OnStep, TrainOutcome
from peft_arena.train.plan import Plan, make_plan
from peft_arena.train.state import drop_states

if TYPE_CHECKING:
    from peft_arena.train.session import Session


def train_sft(
    run: RunDirectory,
    loaded: Loaded,
    attached: Attached,
    task: Task,
    *,
    resume_every: int | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> TrainOutcome:
    """Train an attached method on a task and write its checkpoints.

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

    Raises:
        UserError: the objects are not those of the spec, an example is too long or none is left, the method has nothing
            to train, or the disk refused a write.
        TrainingFailed: the loss became infinite or not a number.
    """
    from peft_arena.train.quiet import random_kept
    from peft_arena.train.session import Session

    spec = _checked(run, loaded, attached, task, resume_every)
    data = _read(spec, run, loaded, attached, task)
    with random_kept(), contextlib.ExitStack() as stack:
        session = Session(run, loaded, attached, data)
        if session.counters.step:
            run.event("training_resumed", step=session.counters.step)
        resumed_at = session.counters.step or None
        total = len(data.plan.steps)
        show = stack.enter_context(meter(progress, run.run_id, total, session.counters.step, session.counters.tokens))
        session.train([show] if on_step is None else [show, on_step], resume_every)
    counters = session.counters
    record = _record(run, data, session, resumed_at)
    return TrainOutcome(record, counters.seconds, counters.cpu_seconds, counters.rows)


def _record(run: RunDirectory, data: TrainData, session: Session, resumed_at: int | None) -> TrainingRecord:
    counters = session.counters
    return TrainingRecord(
        run_id=run.run_id,
        steps=counters.step,
        tokens=counters.tokens,
        padded_tokens=counters.padded_tokens,
        examples=len(data.train.kept),
        dropped=data.train.dropped,
        log=tuple(counters.log),
        save_points=session.save_at,
        resumed_at=resumed_at,
        provenance=provenance(),
    )


def finish(run: RunDirectory, record: TrainingRecord) -> None:
    """Write the training record of a finished training and remove its resume states.

    Raises:
        UserError: the disk refused the write; the resume states are still there.
        FileExistsError: the run is already trained.
    """
    run.write_training(record)
    drop_states(run)


@dataclass(frozen=True)
class TrainData:
    """Everything a training reads, fixed before its first step."""

    spec: TrainSpec
    train: Examples
    validation: list[Example]
    plan: Plan
    limit: int
    """Longest row in tokens."""


def _checked(run: RunDirectory, loaded: Loaded, attached: Attached, task: Task, resume_every: int | None) -> TrainSpec:
    """Refuse objects that are not what the run's spec says they are."""
    spec = run.spec.train
    if spec is None:
        raise UserError(f"run {run.run_id} is the base model: there is nothing to train")
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
    if spec.packing and virtual_tokens(attached.model):
        raise UserError(
            f"packing cannot be used with method {run.spec.method.name}: its vectors stand before the row, "
            "where only the row's first example would see them; set packing = false"
        )
    return spec


def _read(spec: TrainSpec, run: RunDirectory, loaded: Loaded, attached: Attached, task: Task) -> TrainData:
    """Tokenize the data and fix its order."""
    room = context_length(attached.model)
    limit = spec.max_length if room is None else min(spec.max_length, room)
    train = read_examples(task, "train", spec.examples, loaded.tokenizer, spec, limit)
    held_out: list[Example] = []
    if spec.validation_items:
        held_out = read_examples(task, "validation", spec.validation_items, loaded.tokenizer, spec, limit).kept
    plan = make_plan([len(example.ids) for example in train.kept], spec, run.spec.seed)
    return TrainData(spec, train, held_out, plan, limit)
