"""What all objectives share: the check before a training, its steps, and its record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from peft_arena.core.errors import UserError
from peft_arena.core.provenance import provenance
from peft_arena.core.specs import TrainBase
from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.store.records import TrainingRecord
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.base import Task
from peft_arena.tasks.registry import check_version
from peft_arena.train.meter import meter
from peft_arena.train.outcome import OnStep, TrainOutcome

if TYPE_CHECKING:
    from peft_arena.train.proof import Proof
    from peft_arena.train.session import Session

T = TypeVar("T", bound=TrainBase)
S = TypeVar("S", bound="Session[Any]")


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
        resume_every: see :func:`peft_arena.train.run.train_run`.
        progress: see :func:`peft_arena.train.run.train_run`.
        on_step: see :func:`peft_arena.train.run.train_run`.
        proof: see :func:`peft_arena.train.run.train_run`.
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
