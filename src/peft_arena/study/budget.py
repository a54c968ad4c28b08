"""Parameter budgets of a study: each method's size is chosen so that all train about the same number of parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.specs import MethodSpec, ModelSpec, Spec
from peft_arena.cost.counts import shipped_size
from peft_arena.methods.base import Method
from peft_arena.methods.registry import METHODS
from peft_arena.models.load import config_at_hand

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def _count(value: Any) -> Any:
    """Read a count such as ``2M``, ``500k`` or ``1.5B``."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmb]?)", str(value).strip().lower())
    if found is None:
        raise ValueError("give a number, or one with a unit, such as 500k, 2M, 1.5B")
    return round(float(found[1]) * _UNITS[found[2]])


class Budget(Spec):
    """How many parameters to train."""

    parameters: Annotated[int, BeforeValidator(_count), Field(ge=1)] | None = None
    """A number, or one with a unit: ``500k``, ``2M``, ``1.5B``."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Of the model's parameters."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.parameters is None) == (self.fraction is None):
            raise ValueError("give exactly one of parameters and fraction")
        return self


@dataclass(frozen=True)
class Spent:
    """What became of an arm's budget."""

    wanted: int
    """Parameters asked for."""
    setting: str
    value: Any
    """Chosen for the setting."""
    count: int
    """Parameters that train, exactly."""

    def __str__(self) -> str:
        """Say it in one line."""
        off = self.count / self.wanted - 1
        near = "" if abs(off) <= TOLERANCE else ", the nearest there is"
        return f"{self.setting} {self.value}: {self.count:,} parameters for {self.wanted:,} ({off:+.1%}{near})"


TOLERANCE = 0.05
"""A count this near to the budget, relative to it, has met it."""


class Sizer:
    """Sizes methods on one model, whose architecture is built, without weights, when it is first needed."""

    def __init__(self, model: ModelSpec) -> None:
        """Refer to a model."""
        self.spec = model

    @cached_property
    def model(self) -> PreTrainedModel:
        """The architecture on the meta device."""
        from peft_arena.models.load import skeleton

        return skeleton(self.spec)

    def fit(self, method: Method, budget: Budget, given: bool, where: str) -> tuple[Method, Spent]:
        """Return a method sized for a budget, and what became of it.

        Args:
            method: with its other settings.
            budget: what it may train.
            given: whether the study sets the method's size itself.
            where: the arm's place in the file, for messages.

        Raises:
            UserError: the size is set twice, or no size comes near.
        """
        from peft_arena.methods.size_to_budget import fit

        if given:
            raise UserError(
                f"{method.size} is set by the budget; leave it out of config or give budget: null ({where})"
            )
        wanted = budget.parameters
        if wanted is None:
            total = sum(parameter.numel() for parameter in self.model.parameters())
            wanted = max(1, round(total * float(budget.fraction or 0)))
        known = self._shipped(method, wanted)
        if known is not None and method.size is not None:
            value, trained = known
            settings = {**method.config.model_dump(), method.size: value}
            sized = type(method)(build(type(method.config), settings, where=where))
            return sized, Spent(wanted, method.size, value, trained)
        found = fit(method, self.model, wanted)
        return found.method, Spent(wanted, found.setting, found.value, found.trained)

    def _shipped(self, method: Method, wanted: int) -> tuple[Any, int] | None:
        """Return what is packaged of a shipped study's arm, so that reading the study needs no torch."""
        name = method.card.name
        spec = MethodSpec(name=name, config=method.config.model_dump(mode="json"), plugin=METHODS.plugin(name))
        try:
            config = config_at_hand(self.spec)
            return None if config is None else shipped_size(config, spec, wanted)
        except UserError:
            return None  # shapes that are not understood: sized on the model itself
