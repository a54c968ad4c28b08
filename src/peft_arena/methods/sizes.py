"""Sizes a budget may choose from, and the one that comes nearest to a number of trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_arena.methods.targets import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_arena.methods.base import Method


def whole_numbers(method: Method, model: PreTrainedModel) -> Sequence[int]:
    """Return the whole numbers that the setting ``method.size`` may have, up to the smaller side of every linear layer.

    The bounds and steps of the setting are those of its pydantic field (``ge``, ``gt``, ``le``, ``multiple_of``).
    """
    assert method.size is not None, f"{method.card.name} has no size"
    limits = {name: getattr(entry, name) for entry in _constraints(method) for name in _BOUNDS if hasattr(entry, name)}
    step = int(limits.get("multiple_of", 1))
    first = int(limits.get("ge", limits.get("gt", 0) + 1))
    first += -first % step
    sides = [min(layer.in_features, layer.out_features) for layer in linear_layers(model).values()]
    last = min(int(limits.get("le", min(sides))), min(sides))
    return range(first, last + 1, step)


_BOUNDS = ("ge", "gt", "le", "multiple_of")


def _constraints(method: Method) -> list[Any]:
    return list(type(method.config).model_fields[str(method.size)].metadata)
