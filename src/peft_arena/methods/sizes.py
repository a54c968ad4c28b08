"""Sizes that a budget may choose from, where a method's size is a whole number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_arena.methods.adaptable import linear_layers
from peft_arena.methods.card import MethodConfig
from peft_arena.methods.targets import TargetConfig, linear_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def whole_numbers(config: MethodConfig, size: str, model: PreTrainedModel) -> Sequence[int]:
    """Return the whole numbers that the setting ``size`` may have, up to the smaller side of every target.

    Targets are the linear layers that a :class:`TargetConfig` names, all of them for other settings. The bounds and
    steps of the setting are those of its pydantic field (``ge``, ``gt``, ``le``, ``lt``, ``multiple_of``).
    """
    limits = {
        name: getattr(entry, name) for entry in _constraints(config, size) for name in _BOUNDS if hasattr(entry, name)
    }
    step = int(limits.get("multiple_of", 1))
    first = int(limits.get("ge", limits.get("gt", 0) + 1))
    first += -first % step
    if isinstance(config, TargetConfig):
        layers = linear_targets(model, config.targets, config.layers)
    else:
        layers = linear_layers(model)
    last = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    last = min(last, int(limits.get("le", last)), int(limits.get("lt", last + 1)) - 1)
    return range(first, last + 1, step)


_BOUNDS = ("ge", "gt", "le", "lt", "multiple_of")


def _constraints(config: MethodConfig, size: str) -> list[Any]:
    return list(type(config).model_fields[size].metadata)
