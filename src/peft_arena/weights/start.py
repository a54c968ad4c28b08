"""What a run's training began at: the pretrained model, or another run's weights merged into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.specs import InitFrom, RunSpec
from peft_arena.methods.base import Capability, Method, MethodCard, PathKind, has_weights, no_weights
from peft_arena.store.checkpoint import verify_checkpoint
from peft_arena.store.records import Start
from peft_arena.store.store import RunDirectory
from peft_arena.weights.tuned import Tuned, put_start

if TYPE_CHECKING:
    from peft_arena.models.load import Loaded

BEGAN = "began_at"
"""The event that says what a training began at, before there is a training record."""


def load_start(run: RunDirectory) -> tuple[Loaded, Start | None]:
    """Return the model that a run's method is attached to or restored on, freshly loaded, and what it is.

    Returns:
        The pretrained model and None; or, where the run begins at another one, the pretrained model with that run's
        weights merged in.

    Raises:
        UserError: the model cannot be loaded, the other run is not trained or its checkpoint is damaged, or the model
            is another one than the run has begun at before.
    """
    from peft_arena.models.load import load

    source = source_of(run)
    loaded = load(run.spec.model)
    if source is None:
        return loaded, None
    assert source.step is not None, "it is a run"
    sha256 = put_start(source, loaded.model, began_at(run))
    how = f"merged in float32, rounded to {run.spec.model.dtype}"
    return loaded, Start(run_id=source.subject, step=source.step, how=how, sha256=sha256)


def init_of(spec: RunSpec) -> InitFrom | None:
    """Return which other run a run begins at; None: at the pretrained model."""
    return getattr(spec.train, "init_from", None)  # only reinforcement learning has it


def path_card(spec: RunSpec) -> MethodCard:
    """Return the card of a run's method as far as its path is concerned.

    Where training began at another run, the change from the pretrained model is that of two methods, and only the
    straight way leads along both.
    """
    from peft_arena.methods.registry import method_of

    card = method_of(spec.method).card
    straight = init_of(spec) is not None and has_weights(card)
    return card.model_copy(update={"path": PathKind.LINEAR}) if straight else card


def tuned_run(run: RunDirectory, step: int) -> Tuned:
    """Return a point of a run, its checkpoint verified, and those of the runs it began at.

    Raises:
        UserError: a checkpoint is missing or damaged, or a run it began at is not trained.
    """
    if run.spec.is_base:
        raise UserError(f"run {run.run_id} is the pretrained model: geometry compares a tuned model with it")
    directory = run.checkpoint(step)
    verify_checkpoint(directory)
    start = source_of(run)
    return Tuned(
        base=run.spec.model,
        directory=directory,
        method=run.spec.method,
        subject=run.run_id,
        step=step,
        factor=1.0,
        start=start,
        start_sha256=None if start is None else began_at(run),
    )


def source_of(run: RunDirectory) -> Tuned | None:
    """Return the point of another run that a run begins at, from the same runs directory; None: the pretrained model.

    Raises:
        UserError: the other run is not trained, of another model, or without weights, has no such save point, or its
            checkpoint is missing or damaged.
    """
    from peft_arena.methods.registry import method_of

    init = init_of(run.spec)
    if init is None:
        return None
    source = run.store.run(init.run)
    wanted = f"run {run.run_id} begins at run {source.run_id}"
    if init.run.model != run.spec.model:
        raise UserError(f"{wanted}, which is of another model: {init.run.model.words}, not {run.spec.model.words}")
    reason = start_refusal(method_of(init.run.method))
    if reason:
        raise UserError(f"{wanted}, which cannot be begun at: {reason}")
    training = source.training()
    if training is None:
        raise UserError(f"{wanted}, which is not trained in {run.path.parent}")
    step = training.steps if init.step is None else init.step
    if step not in training.save_points:
        known = ", ".join(map(str, training.save_points))
        raise UserError(f"{wanted} at step {step}, which it did not save. Known: {known}")
    return tuned_run(source, step)


def start_refusal(method: Method) -> str:
    """Return why no training can begin at what a method has trained, by its capabilities; empty if one can."""
    reason = no_weights(method)
    if not reason and Capability.MERGEABLE not in method.card.capabilities:
        reason = "its card does not declare merging"
    return f"method {method.card.name} has no weights to merge: {reason}" if reason else ""


def began_at(run: RunDirectory) -> str | None:
    """Return the hash of the model that a run's training began at; None while it has not begun.

    Raises:
        UserError: the run is to begin at another one, and its training record does not say that it did.
    """
    training = run.training()
    if training is None:
        found = next((event.get("sha256") for event in run.events() if event.get("event") == BEGAN), None)
        return None if found is None else str(found)
    if training.start is None:
        raise UserError(f"the training record of run {run.run_id} does not say what it began at, which its spec names")
    return training.start.sha256


def note_start(run: RunDirectory, start: Start | None) -> None:
    """Write into a run's log what its training begins at, so that it is never continued on anything else."""
    if start is not None:
        run.event(BEGAN, **start.model_dump(mode="json"))
