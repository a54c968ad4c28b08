"""One model that is moved from point to point of a path, in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peft_arena.core.errors import UserError
from peft_arena.core.paths import Expressed
from peft_arena.core.specs import PathSpec
from peft_arena.paths.rules import make_rule
from peft_arena.weights.adapter_files import AdapterFiles, express
from peft_arena.weights.effective import EffectiveWeights
from peft_arena.weights.tuned import Tuned

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peft_arena.models.load import Loaded


class Placed(NamedTuple):
    """A model at a point, moved on when the next point is asked for."""

    loaded: Loaded
    """Tokenizer and description."""
    model: nn.Module
    """In evaluation mode; the loaded model, or an adapter around it."""


class Placer:
    """A model at any point of one path of one tuned model.

    A point is evaluated as what it can be written as. Where the method's own adapter can express it exactly, the
    adapter is put on a model once and its tensors are moved, so that the pretrained weights are never rounded; else
    merged weights are put into another model, in its type. In float32, where merging loses nothing that counts, merged
    weights are put in for both, as a forward pass is faster without an adapter.
    """

    def __init__(self, tuned: Tuned, path: PathSpec) -> None:
        """Read the tuned weights; no model is loaded yet.

        Args:
            tuned: the tuned model, at factor 1.
            path: way and rule.

        Raises:
            UserError: the method has no weights, the files are damaged, or the rule or the way is not for it.
        """
        self._origin = tuned
        self.tuned: EffectiveWeights = tuned.weights().along(path.way)
        """The tuned weights, on the way that leads to them."""
        self._rule = make_rule(path.rule)
        reason = self._rule.refuses(self.tuned)
        if reason:
            raise UserError(f"rule {path.rule.name} is not for {tuned.subject}: {reason}")

    @property
    def from_base(self) -> bool:
        """Whether factor 0 is the pretrained model."""
        return self._rule.card.from_base

    def point(self, factor: float) -> EffectiveWeights:
        """Return the weights at a factor."""
        return self._rule.apply(self.tuned, factor)

    def files(self, factor: float) -> AdapterFiles | None:
        """Return the adapter that is the point at a factor; None where none expresses it exactly."""
        return None if self._origin.method is None else express(self.point(factor))

    def expressed(self, factor: float) -> Expressed:
        """Return as what the point at a factor can be written."""
        return "weights" if self.files(factor) is None else "adapter"

    def orthogonality(self, grid: Sequence[float]) -> float | None:
        """Return the largest ||R^T R - I||_F of a block of a rotation, tuned or at any factor of a grid."""
        points = (self.tuned, *(self.point(factor) for factor in grid))
        found = [value for point in points if (value := point.orthogonality()) is not None]
        return max(found, default=None)

    @cached_property
    def _merged(self) -> Loaded:
        """The model that merged weights are put into."""
        from peft_arena.models.load import load

        return load(self._origin.base)

    @cached_property
    def _adapted(self) -> tuple[Placed, dict[str, Tensor]]:
        """The model with its adapter, and what is moved by the names in the adapter's file."""
        from peft_arena.methods.adapter import stored_tensors
        from peft_arena.models.load import load

        loaded = load(self._origin.base)
        model: Any = self._origin.model(loaded)
        held = {(p.data_ptr(), p.shape, p.stride()): p for p in (*model.parameters(), *model.buffers())}
        places = {
            name: held.get((stored.data_ptr(), stored.shape, stored.stride()))
            for name, stored in stored_tensors(model).items()
        }
        return Placed(loaded, model), {name: tensor for name, tensor in places.items() if tensor is not None}

    def at(self, factor: float) -> Placed:
        """Return the model at a factor, in evaluation mode: the same object each time for points of the same kind."""
        files = None if self._origin.base.dtype == "float32" else self.files(factor)
        if files is None:
            self.point(factor).load_into(self._merged.model)
            return Placed(self._merged, self._merged.model.eval())
        placed, held = self._adapted
        with torch.no_grad():
            for name, tensor in files.tensors.items():
                target = held.get(name)
                if target is None:
                    raise UserError(
                        f"{self._origin.subject} has no place for {name} in memory: it cannot be moved there"
                    )
                if target.shape == tensor.shape:
                    target.copy_(tensor)
                else:  # a rule that changes ranks
                    target.data = tensor.to(target.device, target.dtype)
        return placed
