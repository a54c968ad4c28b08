"""Whether arms that forget more have another geometry: rank correlations over arms, with intervals and p-values.

Runs of one arm differ only in their seed, so they are not independent evidence of what a method does: each arm counts
once, with the mean of its runs. Quantities are skewed and their relation is rarely a straight line, so only ranks are
compared: Spearman's coefficient r over K arms. Its interval is Fisher's z = atanh(r) with the variance
(1 + r² / 2) / (K - 3) of Bonett and Wright (2000, Psychometrika 65), and the p-value is that of the same test against
zero. Below eight arms there is the value alone: nothing can be said with five.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from peft_arena.analyze.estimate import LEVEL
from peft_arena.analyze.holm import holm
from peft_arena.analyze.paired import Array

Outcome = Literal["forgetting", "gain"]
OUTCOMES: tuple[Outcome, ...] = ("forgetting", "gain")
FEWEST_ARMS = 4
"""Arms below which there is no coefficient."""
FEWEST_JUDGED = 8
"""Arms below which there is no interval, and nothing is said of the coefficient."""


@dataclass(frozen=True)
class Correlation:
    """One quantity against one outcome over arms."""

    metric: str
    outcome: Outcome
    value: float | None
    """Spearman's coefficient; None where there is none."""
    low: float | None
    """Lower end of the 95 % interval; None below eight arms."""
    high: float | None
    p: float | None
    """Two-sided, from the test that gives the interval."""
    arms: int
    """Arms that have both numbers."""
    left_out: int
    """Arms that lack one of the two."""
    reason: str = ""
    """Why there is no coefficient; empty where there is one."""
    p_corrected: float | None = None
    """Holm-corrected over all quantities that were looked at against the same outcome."""


@dataclass(frozen=True)
class Point:
    """One run as a correlation sees it."""

    arm: str
    values: Mapping[str, float]
    """Quantities that are known of the run."""
    forgetting: float | None
    gain: float | None


def correlate(points: Sequence[Point], metrics: Sequence[str]) -> tuple[Correlation, ...]:
    """Correlate every quantity with forgetting and with the gain, over arms.

    Args:
        points: the runs.
        metrics: quantities to look at.
    """
    found: list[Correlation] = []
    for outcome in OUTCOMES:
        raw = [_one(points, metric, outcome) for metric in metrics]
        corrected = holm([one.p for one in raw])
        found += [replace(one, p_corrected=p) for one, p in zip(raw, corrected, strict=True)]
    return tuple(found)


def _one(points: Sequence[Point], metric: str, outcome: Outcome) -> Correlation:
    by_arm: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        value = getattr(point, outcome)
        if value is not None and metric in point.values:
            by_arm.setdefault(point.arm, []).append((point.values[metric], value))
    left_out = len({point.arm for point in points}) - len(by_arm)
    x, y = (np.array([np.mean([pair[side] for pair in pairs]) for pairs in by_arm.values()]) for side in (0, 1))
    reason = _why_not(x, y, outcome)
    if reason:
        return Correlation(metric, outcome, None, None, None, None, len(x), left_out, reason)
    value = spearman(x, y)
    if len(x) < FEWEST_JUDGED:
        return Correlation(metric, outcome, value, None, None, None, len(x), left_out)
    low, high, p = fisher_test(value, len(x))
    return Correlation(metric, outcome, value, low, high, p, len(x), left_out)


def _why_not(x: Array, y: Array, outcome: Outcome) -> str:
    if len(x) < FEWEST_ARMS:
        have = "1 arm has" if len(x) == 1 else f"{len(x)} arms have"
        return f"{have} both numbers; a correlation needs {FEWEST_ARMS}"
    if _constant(x):
        return "the quantity is the same in all arms"
    return f"the {outcome} is the same in all arms" if _constant(y) else ""


def _constant(values: Array) -> bool:
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def spearman(x: Array, y: Array) -> float:
    """Return Spearman's rank correlation, equal values sharing the mean of their ranks.

    Args:
        x: shape (arms,), not constant.
        y: shape (arms,), not constant.
    """
    one, other = (rankdata(side) - (len(side) + 1) / 2 for side in (x, y))
    return float(np.clip(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)), -1.0, 1.0))


def fisher_test(value: float, count: int) -> tuple[float, float, float]:
    """Return the ends of the 95 % interval of a rank correlation and its two-sided p-value against zero.

    A perfect order has no finite z; it is taken to lie half-way between itself and the next best order.

    Args:
        value: Spearman's coefficient.
        count: arms it was computed over, at least 4.
    """
    most = 1.0 - 6.0 / (count**3 - count)
    r = float(np.clip(value, -most, most))
    z, error = float(np.arctanh(r)), float(np.sqrt((1 + r * r / 2) / (count - 3)))
    half = -float(ndtri((1 - LEVEL) / 2)) * error
    low, high = float(np.tanh(z - half)), float(np.tanh(z + half))
    return min(low, value), max(high, value), 2 * float(ndtr(-abs(z) / error))
