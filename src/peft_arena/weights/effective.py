"""The weights of a tuned model and their distance from the pretrained ones, one parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peft_arena.core.errors import UserError, unknown
from peft_arena.core.specs import Way
from peft_arena.methods.base import Method, PathKind, no_weights
from peft_arena.methods.files import SETTINGS
from peft_arena.models.stored import INDEX, SINGLE
from peft_arena.weights.adapter_directory import CONFIG, Changes
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Change, Dense, LowRank, together
from peft_arena.weights.forms import closed_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pair(NamedTuple):
    """A pretrained parameter and what became of it."""

    base: Tensor
    """W0, float32 on the CPU, shape (out, in), or that of a vector; it may be a view of a file: never write to it."""
    change: Change | None
    """None where the tuned parameter is the pretrained one."""


@dataclass(frozen=True)
class Where:
    """Where a point lies, besides its global factor."""

    factors: Mapping[str, float] = field(default_factory=dict)
    """By parameter, under the first of its names, times the global one; 1 for all others."""
    way: Way = "own"
    """Along what factors count."""
    extra: Mapping[str, LowRank] = field(default_factory=dict)
    """Changes added to what the factors give."""


class EffectiveWeights:
    """Pretrained weights and their change at one point, one parameter at a time, mostly by memory map.

    The point may lie anywhere on a path from the pretrained weights, at another factor for each parameter. Every
    method that moves it returns a new view and leaves this one as it is; a model may be moved from view to view of
    one checkpoint by :meth:`load_into`.
    """

    def __init__(self, base: BaseWeights, changes: Changes, factor: float = 1.0, where: Where | None = None) -> None:
        """Hold both; use :func:`effective_weights` to read a checkpoint.

        Args:
            base: the pretrained weights.
            changes: of the tuned model.
            factor: where on the path.
            where: what else says where the point lies.

        Raises:
            UserError: a factor is no finite number, or negative along ``sqrt``.
        """
        self.base_weights = base
        self.changes = changes
        self.factor = factor
        self.where = Where() if where is None else where
        for given in {factor, *self.where.factors.values()}:
            if not math.isfinite(given) or (given < 0 and self.where.way == "sqrt"):
                allowed = "a factor of 0 or more, whose root there is" if self.where.way == "sqrt" else "finite numbers"
                raise UserError(f"no point of the path has factor {given:g}; allowed: {allowed}")

    @property
    def way(self) -> Way:
        """How factors count, see :meth:`along`."""
        return self.where.way

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
        if change is not None:
            change = self._moved(change, self.factor_of(name), base)
        extra = self.where.extra.get(name)
        if extra is None:
            return Pair(base, change)
        if change is None:
            raise UserError(f"nothing can be added to {name}: the checkpoint leaves it as it is")
        return Pair(base, together(change, extra, base))

    def factor_of(self, name: str) -> float:
        """Return the factor of a parameter, given by the first of its names: the global one times its own."""
        return self.factor * self.where.factors.get(name, 1.0)

    def _moved(self, change: Change, factor: float, base: Tensor) -> Change:
        """Return the tuned change moved to a factor along the way."""
        if factor == 1.0:
            return change
        if self.way == "linear" and not change.straight:
            return Dense(factor * change.dense(base))
        return change.by_root(factor) if self.way == "sqrt" else change.scaled(factor)

    def base_hash(self, name: str) -> str:
        """Return what identifies the content of a pretrained parameter; see :meth:`BaseWeights.content_hash`."""
        return self.base_weights.content_hash(name)

    def interpolated(self, factor: float) -> EffectiveWeights:
        """Return the point at a factor of the way to this one: 0 the pretrained weights, 1 this point, above 1 beyond.

        The way is the method's own where its form is known: additive methods are linear, rotations scale their
        generator, scalings, planar rotations and DoRA go by their own parameters. What only a merge gives (see
        :mod:`peft_arena.weights.merging`) is taken straight from W0 to W1, also for methods, such as HRA, whose own
        parameters would lead another way; ``Change`` is then ``Dense``. What :meth:`plus` added stays as it is.

        Raises:
            UserError: the factor is no finite number, or negative along ``sqrt``.
        """
        return EffectiveWeights(self.base_weights, self.changes, self.factor * factor, self.where)

    def scaled(self, factors: Mapping[str, float]) -> EffectiveWeights:
        """Return the point where each parameter named is a factor of the way further, and the others are as here.

        A bias that goes with a weight's own parameters, as those of IA3 and RoAd do, needs the weight's factor.

        Args:
            factors: by parameter, under any of its names; those that the checkpoint does not change may be among them.

        Raises:
            UserError: the model has no such parameter, or as for :meth:`interpolated`.
        """
        found = dict(self.where.factors)
        for name, factor in factors.items():
            first = name if name in self.changes.added else self.base_weights.canonical(name)
            found[first] = found.get(first, 1.0) * factor
        return self._at(factors=found)

    def along(self, way: Way) -> EffectiveWeights:
        """Return the point at the same factors along a way.

        Args:
            way: ``own``: that of the method, see :meth:`interpolated`. ``sqrt``: the same with the generator of a
                rotation scaled by the square root of the factor. ``linear``: straight from W0 to W1.

        Raises:
            UserError: ``sqrt`` where no change is a rotation, or where a factor is negative.
        """
        if way == "sqrt" and PathKind.CAYLEY not in self.path_kinds():
            kinds = ", ".join(sorted(self.path_kinds())) or "none: nothing is changed"
            raise UserError(f"the way sqrt is for rotations; the paths of these weights: {kinds}; allowed: own, linear")
        return self._at(way=way)

    def plus(self, extra: Mapping[str, LowRank]) -> EffectiveWeights:
        """Return the point with low-rank changes added, whatever its factors are now or become.

        Args:
            extra: by parameter, under any of its names; the checkpoint must change it.

        Raises:
            UserError: it does not, or a change has another shape than its weight.
        """
        found = dict(self.where.extra)
        for name, change in extra.items():
            first = self.base_weights.canonical(name)
            if first not in self.changes.makers:
                raise UserError(f"nothing can be added to {name}: the checkpoint leaves it as it is")
            if change.shape != self.base_weights.shapes[first]:
                wanted = self.base_weights.shapes[first]
                raise UserError(f"a change of shape {change.shape} cannot be added to {name} of shape {wanted}")
            before = found.get(first)
            found[first] = change if before is None else before.joined(change)
        return self._at(extra=found)

    def path_kinds(self) -> frozenset[PathKind]:
        """Return the kinds of the paths of the changed linear weights, by the form of the checkpoint; reads none."""
        return frozenset({self.changes.kind}) if self.changes.makers else frozenset()

    def orthogonality(self) -> float | None:
        """Return the largest ||R^T R - I||_F of all blocks of all rotations at this point, summed in float64.

        Straight ways leave the rotations: there R is (1 - f) I + f R1 with the tuned R1.

        Returns:
            None where no change is a rotation, or none is one times the pretrained weight.
        """
        if PathKind.CAYLEY not in self.path_kinds():
            return None
        found: list[float] = []
        for name, maker in self.changes.makers.items():
            change, factor = maker(), self.factor_of(name)
            if change is None or change.path is not PathKind.CAYLEY:
                continue
            if self.way == "linear":
                measured = change.orthogonality(factor)
            else:
                measured = (change.by_root(factor) if self.way == "sqrt" else change.scaled(factor)).orthogonality()
            found += [] if measured is None else [measured]
        return max(found, default=None)

    def _at(self, **changed: Any) -> EffectiveWeights:
        return EffectiveWeights(self.base_weights, self.changes, self.factor, replace(self.where, **changed))

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
                f"{directory} is not a checkpoint: it has neither an adapter ({SETTINGS}) "
                f"nor a model ({CONFIG}, {SINGLE})"
            )
    return EffectiveWeights(base, changes)
