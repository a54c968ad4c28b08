"""What a run's training began at: the pretrained model, or another run's weights merged into it.

The other run's weights are read as :mod:`peft_arena.weights.effective` reads them, added up in float32 and rounded to
the model's type, in one thread, so that the sums do not depend on how many there are. A hash over the result is in the
training record, and whatever puts the run's own weights on that model checks it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.specs import InitFrom, RunSpec
from peft_arena.methods.base import Capability, Method, MethodCard, PathKind, has_weights
from peft_arena.store.checkpoint import verify_checkpoint
from peft_arena.store.records import Start
from peft_arena.store.store import RunDirectory, Store
from peft_arena.weights.tuned import Tuned

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_arena.models.load import Loaded
    from peft_arena.weights.base import BaseWeights
    from peft_arena.weights.change import Change
    from peft_arena.weights.effective import EffectiveWeights

BEGAN = "began_at"
"""The event that says what a training began at, before there is a training record."""
OwnWeights = Callable[["BaseWeights"], "EffectiveWeights"]
"""From the weights that training began at to those it led to."""


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
    source = Store(run.path.parent).run(init.run)
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
    from peft_arena.weights.effective import no_weights

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


def put_start(source: Tuned, model: PreTrainedModel, wanted: str | None) -> str:
    """Merge a point into a model, in place.

    Args:
        source: the point.
        model: the pretrained model, freshly loaded; it is then named after the point.
        wanted: the hash it must have after that; None: not known yet.

    Returns:
        Its hash.

    Raises:
        UserError: the point has no weights or adds parameters, its files are missing or damaged, or the hash is
            another one.
    """
    merged = Merged(source)
    merged.put_into(model)
    tensors = ((name, tensor.detach().cpu()) for name, tensor in _of_model(model))
    found = _hash(tensors, merged.base.dtype)
    _check(source, found, wanted)
    return found


def name_of(source: Tuned) -> str:
    """Return what a model begun at a point is called, also in the checkpoints of what is trained on it."""
    return f"{source.subject}@{source.step}"


class Merged:
    """A point as if it were a pretrained model: one parameter at a time, or loaded."""

    def __init__(self, source: Tuned) -> None:
        """Open the files of a point.

        Raises:
            UserError: it has no weights, its files are missing or damaged, or it adds parameters to the architecture.
        """
        from peft_arena.weights.base import BaseWeights

        with one_thread():
            weights = source.weights()
        if weights.changes.added:
            raise UserError(
                f"no training can begin at {name_of(source)}: it adds {len(weights.changes.added)} parameters to the "
                f"model, e.g. {next(iter(weights.changes.added))}"
            )
        before = weights.base_weights
        self.changed = tuple(weights.changes.makers)
        """Every parameter that the point may change."""
        self.base = BaseWeights(
            before.architecture, before.dtype, partial(_tuned, weights), lambda: self.put_into(before.load())
        )
        """Its parameters, rounded to the model's type."""
        self._name = name_of(source)

    def put_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a pretrained model with the values of the point, in place, and named after it."""
        import torch

        held = dict(model.named_parameters())
        with torch.no_grad():
            for name in self.changed:
                held[name].copy_(self.base.tensor(name))
        model.name_or_path = model.config.name_or_path = self._name
        return model


def _tuned(weights: EffectiveWeights, name: str) -> Tensor:
    with one_thread():
        before, change = weights.parameter(name)
        return before if change is None else before + change.dense(before)


def weights_from(base: BaseWeights, source: Tuned, wanted: str | None, own: OwnWeights) -> EffectiveWeights:
    """Return the weights of a point whose training began at another one, as a change of the pretrained weights.

    The change is W1 - W0 in total: what the other run did, and on top of it what this one did. It is a matrix without
    a structure, and its path the straight one.

    Args:
        base: the pretrained weights.
        source: the point that training began at.
        wanted: the hash of the model it began at; None: not known.
        own: reads the point's own checkpoint on the weights that training began at.

    Raises:
        UserError: files of either are missing or damaged, or the hash is another one.
    """
    from peft_arena.weights.effective import EffectiveWeights
    from peft_arena.weights.forms import Changes, Maker, changed

    merged = Merged(source)
    if wanted is not None:
        _check(source, _hash(_of_base(merged.base), merged.base.dtype), wanted)
    last = own(merged.base).changes

    def total(name: str) -> Change | None:
        after, change = merged.base.tensor(name), last.makers.get(name, lambda: None)()
        return changed(after if change is None else after + change.dense(after), base.tensor(name))

    names = [name for name in base.shapes if name in last.makers or name in merged.changed]
    makers: dict[str, Maker] = {name: partial(total, name) for name in names}
    makers |= {name: last.makers[name] for name in last.added}
    return EffectiveWeights(base, Changes(makers, last.added))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread inside the block."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _of_model(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a model, tied ones once, and every buffer that belongs to its files, by name."""
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    yield from sorted({**dict(model.named_parameters()), **buffers}.items())


def _of_base(base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
    """Yield the same of weights that are read one at a time."""
    names = set(base.architecture.state_dict()) - set(base.aliases)
    buffers = {name: tensor for name, tensor in base.load().state_dict().items() if name in names} if names else {}
    for name in sorted({*base.shapes, *buffers}):
        yield name, buffers[name] if name in buffers else base.tensor(name)


def _hash(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """Return the SHA-256 over name, shape and values, floating-point ones in one type."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        held = tensor.to(dtype) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(held.shape)} {held.dtype}\n".encode())
        digest.update(held.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check(source: Tuned, found: str, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        raise UserError(
            f"{name_of(source)} is no longer what training began at: merged into its base it has sha256 {found[:12]}, "
            f"and the training record says {wanted[:12]}; its checkpoint was made anew, or this machine adds up to "
            "other bits; a run that began at it must be moved away and trained anew"
        )
