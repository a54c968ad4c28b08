"""Values of one row by name, each finite or with the reason why there is none; and their means over rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_arena.core.measure import Measure


@dataclass
class Values:
    """What was measured in one place."""

    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a value is None, for each that is."""

    def put(self, name: str, value: float) -> None:
        """Enter a value; one that is not finite becomes None with that as the reason."""
        if math.isfinite(value):
            self.values[name] = float(value)
        else:
            self.absent(name, reason="the value is not finite")

    def absent(self, *names: str, reason: str) -> None:
        """Enter that there are no such values, and why."""
        for name in names:
            self.values[name] = None
            self.reasons[name] = reason


def mean_measure(metric: str, values: Sequence[float | None], *, unit: str, how: str) -> Measure:
    """Return the mean of a quantity over modules; those without a value are left out and counted.

    Args:
        metric: what the mean is called.
        values: one for each module.
        unit: of the values.
        how: how each was obtained; begins with what the mean is over.
    """
    from peft_arena.core.measure import Measure

    known = [value for value in values if value is not None]
    count = len(known)
    mean = math.fsum(known) / count if known else None
    stderr = None
    if mean is not None and count > 1:
        stderr = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (count - 1) / count)
    return Measure(
        metric=metric,
        value=mean,
        unit=unit,
        better="neither",
        how=how if known else f"no module has a value; {how}",
        n=count,
        stderr=stderr,
        unscored=len(values) - count,
    )


def ratios(general: Mapping[str, float | None], target: Mapping[str, float | None]) -> Values:
    """Return each value on general prompts over that on target prompts."""
    found = Values()
    for name, above in general.items():
        below = target[name]
        if above is None or below is None:
            found.absent(name, reason=f"there is no value on {'general' if above is None else 'target'} prompts")
        elif below == 0:
            found.absent(name, reason="the value on target prompts is zero")
        else:
            found.put(name, above / below)
    return found
