"""Holm's step-down correction for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Corrected(NamedTuple):
    """A p-value of a family and what it became."""

    p: float
    """Corrected."""
    times: float
    """What the p-value was multiplied by in its step, not capped: p-value and interval are corrected by the same."""
    is_tested: bool = True
    """Whether everything of the steps before was found; nothing can be said of what is not tested."""


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return corrected p-values (Holm 1979, Scandinavian Journal of Statistics 6(2)), in the given order.

    None stays None and is not counted.
    """
    return [None if found is None else found.p for found in correct(p_values)]


def correct(
    p_values: Sequence[float | None], steps: Sequence[int] | None = None, alpha: float = 0.05
) -> list[Corrected | None]:
    """Return what Holm's procedure makes of a family, tested in steps.

    Without steps all p-values are corrected together. With them the first step is tested at the full level, and a
    later one only if everything of the steps before it was found: a corrected p-value is at least the largest corrected
    one of the steps before. That keeps the chance of any false finding at the level (a fixed sequence of families).

    Args:
        p_values: of the family; None stays None and is not counted.
        steps: number of the step of each; None: one step.
        alpha: the level.
    """
    found: list[Corrected | None] = [None] * len(p_values)
    order = [0] * len(p_values) if steps is None else list(steps)
    before = 0.0
    for step in sorted(set(order)):
        known = sorted((p, place) for place, p in enumerate(p_values) if p is not None and order[place] == step)
        highest = 0.0
        for done, (p, place) in enumerate(known):
            left = len(known) - done
            times = highest / p if highest > left * p else float(left)
            highest = max(highest, left * p)
            found[place] = Corrected(min(1.0, max(before, highest)), times, before < alpha)
        before = max(before, highest)
    return found
