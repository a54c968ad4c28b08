"""The size of a method that comes nearest to a number of trained parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.methods.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR = 2.0
"""A budget is refused where the nearest size trains more than this times as many parameters, or as few."""


class Sized(NamedTuple):
    """A method brought to a number of trained parameters."""

    method: Method
    setting: str
    value: Any
    """Chosen for ``setting``."""
    trained: int
    """Trained parameters at that value, exactly."""


def fit(method: Method, model: PreTrainedModel, wanted: int) -> Sized:
    """Return a method with its size set so that it trains as nearly as possible a number of parameters.

    Args:
        method: every other setting is kept.
        model: its shapes are used, never its weights.
        wanted: trained parameters.

    Raises:
        UserError: the method has no setting for its size, or none comes within a factor of two.
    """
    name = method.card.name
    if method.size is None:
        count = method.trained_count(model)
        fixed = "" if count is None else f" (it trains {count:,} here)"
        raise UserError(
            f"{name} has no setting for its size, so no budget can be set for it{fixed}: give it budget: null"
        )
    values = method.sizes(model)
    if not values:
        raise UserError(f"{name} has no {method.size} that fits this model with its other settings")
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if at(method, values[middle], model).trained < wanted:
            low = middle + 1
        else:
            high = middle
    around = [at(method, values[index], model) for index in (low - 1, low) if index >= 0]
    best = min(around, key=lambda sized: abs(sized.trained - wanted))
    if not wanted / NEAR <= best.trained <= wanted * NEAR:
        raise UserError(
            f"{name} cannot come near {wanted:,} parameters: {best.setting} {best.value} trains {best.trained:,}, and "
            f"allowed is {values[0]} to {values[-1]}; change the budget or the targets, or give it budget: null"
        )
    return best


def at(method: Method, value: Any, model: PreTrainedModel) -> Sized:
    """Return a method with another value of its size, and what it trains then.

    Raises:
        UserError: the value is not allowed, or does not fit the model, or the method does not count.
    """
    assert method.size is not None, f"{method.card.name} has no size"
    settings = {**method.config.model_dump(), method.size: value}
    other = type(method)(build(type(method.config), settings, where=f"method {method.card.name}"))
    count = other.trained_count(model)
    if count is None:
        raise UserError(f"{method.card.name} does not count its parameters, so no budget can be set for it")
    return Sized(other, method.size, value, count)
