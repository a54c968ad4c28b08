"""A number that says what it is: value, unit, direction, error, count and how it was obtained."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Better = Literal["higher", "lower", "neither"]
FEWEST_UNITS = 6
"""Units (items, or groups of items that belong together) below which an estimate has no interval."""
POINTS = "points"
"""Unit of differences of fractions: one point is 0.01."""


class Measure(BaseModel):
    """One reported quantity. ``value`` is None when it could not be measured, and then ``how`` says why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    """Name of the quantity, for example ``peak_memory_training``."""
    value: float | None
    unit: str
    """For example ``fraction``, ``bytes``, ``FLOPs``, ``seconds``, ``nats/token``."""
    better: Better
    how: str
    """How the value was obtained, or why there is none."""
    n: int = Field(ge=0, le=2**63 - 1)
    """Number of observations behind the value."""
    stderr: float | None = None
    """Standard error; None where one observation gives none."""
    unscored: int = Field(default=0, ge=0, le=2**63 - 1)
    """Observations left out because they could not be scored."""

    @model_validator(mode="after")
    def _finite(self) -> Measure:
        for name in ("value", "stderr"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{self.metric}: {name} must be finite or None, got {number}")
        if self.stderr is not None and self.stderr < 0:
            raise ValueError(f"{self.metric}: stderr must be at least 0, got {self.stderr}")
        return self


def too_few_units(items: int, units: int, alike: float) -> str:
    """Say how few independent units some items are; empty if they are enough for an interval.

    Args:
        items: that were asked.
        units: groups of items that belong together, or items that stand alone.
        alike: as many units of equal size weigh as much.
    """
    if alike > FEWEST_UNITS - 1e-6:
        return ""
    kind = "item" if units == items else "group"
    text = f"{units} {kind}{'' if units == 1 else 's'}"
    return text + (f" with the weight of {alike:.1f} equal ones" if units >= FEWEST_UNITS else "")
