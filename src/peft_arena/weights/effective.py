"""The weights of a tuned model and their distance from the pretrained ones, one parameter at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.base import Capability, Method, has_weights
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Change
from peft_arena.weights.forms import CONFIG, INDEX, SETTINGS, SINGLE, Changes, closed_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pair(NamedTuple):
    """A pretrained parameter and what became of it."""

    base: Tensor
    """W0, float32 on the CPU, shape (out, in), or that of a vector; it may be a view of a file: never write to it."""
    change: Change | None
    """None where the tuned parameter is the pretrained one."""


class EffectiveWeights:
    """Pretrained weights and their change at one point, one parameter at a time, mostly by memory map.

    The point may lie anywhere on the path of :meth:`interpolated`.
    """

    def __init__(self, base: BaseWeights, changes: Changes, factor: float = 1.0) -> None:
        """Hold both; use :func:`effective_weights` to read a checkpoint.

        Args:
            base: the pretrained weights.
            changes: of the tuned model.
            factor: where on the path.
        """
        self.base_weights = base
        self.changes = changes
        self.factor = factor

    def modules(self) -> tuple[str, ...]:
        """Return the names of every linear layer but the output layer, in the model's order."""
        return self.base_weights.linears

    def parameters(self) -> tuple[str, ...]:
        """Return the names of all parameters, tied ones once, and of those that the tuned model adds (biases)."""
        return (*self.base_weights.shapes, *self.changes.added)

    def pair(self, module: str) -> Pair:
        """Return the weight of a linear layer.

        Raises:
            UserError: the model has no such linear layer.
        """
        known = (*self.base_weights.linears, *filter(None, [self.base_weights.output]))
        if module not in known:
            raise unknown("linear module", module, known)
        return self.parameter(f"{module}.weight")

    def parameter(self, name: str) -> Pair:
        """Return any parameter, under any of the names it has; one that is added is zero before.

        Raises:
            UserError: the model has no such parameter.
        """
        shape = self.changes.added.get(name)
        if shape is None:
            name = self.base_weights.canonical(name)
        base = self.base_weights.tensor(name) if shape is None else torch.zeros(shape)
        maker = self.changes.makers.get(name)
        change = None if maker is None else maker()
        if change is not None and self.factor != 1.0:
            change = change.scaled(self.factor)
        return Pair(base, change)

    def base_hash(self, name: str) -> str:
        """Return what identifies the content of a pretrained parameter; see :meth:`BaseWeights.content_hash`."""
        return self.base_weights.content_hash(name)

    def interpolated(self, factor: float) -> EffectiveWeights:
        """Return the point at a factor of the way to this one: 0 the pretrained weights, 1 this point, above 1 beyond.

        The way is the method's own where its form is known: additive methods are linear, rotations scale their
        generator, scalings and DoRA go by their own parameters. What only a merge gives (see
        :mod:`peft_arena.weights.merging`) is taken straight from W0 to W1, also for methods, such as BOFT, HRA or
        RoAd, whose own parameters would lead another way; ``Change`` is then ``Dense``.
        """
        return EffectiveWeights(self.base_weights, self.changes, self.factor * factor)

    def load_into(self, model: PreTrainedModel) -> None:
        """Put the weights of this point into a model of the pretrained architecture, in its type, in place.

        Every parameter that the checkpoint changes is written, whatever the factor, so that one model can be moved
        from point to point of one checkpoint. Biases it adds are put into layers that have none.

        Raises:
            UserError: the model lacks a parameter, or has another shape for it.
        """
        held = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name in self.changes.makers:
                base, change = self.parameter(name)
                if change is None:
                    continue
                tuned = base + change.dense(base)
                if name not in held and name in self.changes.added:
                    _add_bias(model, name, tuned)
                    continue
                target = held.get(name)
                if target is None or target.shape != tuned.shape:
                    found = "has none" if target is None else f"has {tuple(target.shape)}"
                    raise UserError(f"cannot put {name} of shape {tuple(tuned.shape)} into the model, which {found}")
                target.copy_(tuned)


def _add_bias(model: PreTrainedModel, name: str, values: Tensor) -> None:
    layer = model.get_submodule(name.removesuffix(".bias"))
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.bias = torch.nn.Parameter(values.to(weight.device, weight.dtype), requires_grad=False)


def effective_weights(base: BaseWeights, directory: Path | None, method: Method | None = None) -> EffectiveWeights:
    """Return the weights of a checkpoint.

    Args:
        base: the pretrained weights.
        directory: the checkpoint; None for the pretrained model itself.
        method: what made it; None for a PEFT adapter or a model directory of anybody's.

    Raises:
        UserError: the checkpoint has no weights of its own (prompts), is missing or damaged, or does not fit the base.
    """
    if directory is None:
        return EffectiveWeights(base, Changes())
    if method is not None:
        reason = no_weights(method)
        if reason:
            raise UserError(f"method {method.card.name} has no weights to look at: {reason}")
    if not directory.is_dir():
        raise UserError(f"no checkpoint {directory}: there is no such directory")
    changes = closed_form(base, directory)
    if changes is None:
        from peft_arena.weights.merging import foreign_merge, foreign_model, own_merge

        if (directory / SETTINGS).exists() and method is None:
            changes = foreign_merge(base, directory)
        elif any((directory / name).exists() for name in (CONFIG, SINGLE, INDEX)):
            changes = foreign_model(base, directory)
        elif method is not None:
            changes = own_merge(base, directory, method)
        else:
            raise UserError(
                f"{directory} is no checkpoint: it has neither an adapter ({SETTINGS}) nor a model ({CONFIG}, {SINGLE})"
            )
    return EffectiveWeights(base, changes)


def no_weights(method: Method) -> str:
    """Return why a method's tuned model cannot be said in weights, by its capabilities; empty if it can."""
    able = method.card.capabilities
    if Capability.NEEDS_QUANTIZED_BASE in able:
        return "its pretrained weights are quantised"
    if has_weights(method.card):
        return ""
    if Capability.VIRTUAL_TOKENS in able:
        return "it puts trained vectors into the input and changes no weight"
    return "its card declares neither a change of linear weights nor merging: it adds layers, or depends on the input"
