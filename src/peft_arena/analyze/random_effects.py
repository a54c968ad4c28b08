"""One effect over several targets that are a sample of what a method may be trained on.

Each target has an effect y_t with its error s_t, and the true effects differ: by targets, and by the trainings on them.
Their variance tau² is Paule and Mandel's (1982, Journal of Research of the NBS 87), the value at which the weighted sum
of squares has its expectation. The mean has weights 1 / (s_t² + tau²) and the interval of Hartung and Knapp (2001,
Statistics in Medicine 20), Student's t with one degree of freedom less than there are targets, never narrower than the
errors alone give. Where targets have one training each and nothing is known of how far trainings lie apart, s_t lacks
that part, and a target with many items would decide alone: all weights are then equal. On a *further* target the effect
lies in the prediction interval, which is wider (IntHout, Ioannidis
and Borm 2014, BMC Medical Research Methodology 14). Where targets differ by less than their errors that one alone is
too narrow, so it is never narrower than the interval that the next measured effect would lie in, mean ∓ t(T - 1) s
sqrt(1 + 1 / T); ``benchmarks/coverage.py`` counts how often it holds.

Where the same items are asked after every training, as for retention, errors go together. Then the plain mean is used,
and its variance is that of the effects over targets plus what they share: s² / T + c, with c the mean covariance of two
targets' errors over items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from peft_arena.analyze.estimate import LEVEL, Estimate, Pivot, Term
from peft_arena.analyze.paired import Array, Contrast

FEWEST = 2
"""Targets that a mean over targets needs."""


@dataclass(frozen=True, eq=False)
class OverEffects:
    """An effect over several targets."""

    estimate: Estimate
    """Mean over targets; its interval is about targets like these."""
    tau: float
    """Standard deviation of the true effects over targets."""
    prediction: tuple[float, float] | None
    """Interval for the effect on a further target; None below three targets."""
    shrunk: tuple[float, ...]
    """Effect on each target, drawn towards the mean as far as its error asks for."""


def over_independent(found: Sequence[Estimate]) -> OverEffects | None:
    """Return the mean of effects on targets that share no items; None unless all of two or more have an interval."""
    if len(found) < FEWEST or not all(one.known for one in found):
        return None
    values = np.array([one.value for one in found])
    variances = np.array([float(one.stderr or 0.0) ** 2 for one in found])
    tau2 = paule_mandel(values, variances)
    is_known = not any(one.about_runs for one in found)
    weights = 1.0 / (variances + tau2) if is_known else np.ones(len(found))
    weights = weights / weights.sum()
    mean = float(weights @ values)
    error2 = float(weights**2 @ (variances + tau2))
    if not is_known:
        error2 = max(float(values.var(ddof=1)), float(variances.mean())) / len(found)
    pivot = Pivot(mean, float(np.sqrt(error2)), (Term(1.0, len(found) - 1.0),))
    return _result(found, weights, pivot, tau2, error2, values, variances)


def over_shared_items(found: Sequence[Estimate], contrasts: Sequence[Contrast]) -> OverEffects | None:
    """Return the mean of effects that are of the same items on every target; None as for :func:`over_independent`.

    Args:
        found: of each target.
        contrasts: what they were estimated from.
    """
    if len(found) < FEWEST or not all(one.known for one in found):
        return None
    count = len(found)
    values = np.array([one.value for one in found])
    variances = np.array([float(one.stderr or 0.0) ** 2 for one in found])
    shared = max(float(np.mean([covariance(one, other) for one, other in combinations(contrasts, 2)])), 0.0)
    spread = float(values.var(ddof=1))
    # targets can differ by less than their own errors say, by chance; the mean is then as sure as those errors
    between = max(spread, float(variances.mean()) - shared) / count
    error2 = between + shared
    units = min(part.units for contrast in contrasts for part in contrast.parts)
    terms = (Term(between / error2, count - 1.0), Term(shared / error2, max(units - 1.0, 1.0)))
    mean = float(values.mean())
    pivot = Pivot(mean, float(np.sqrt(error2)), tuple(term for term in terms if term.share > 0))
    tau2 = max(spread - float(variances.mean()) + shared, 0.0)
    return _result(found, np.full(count, 1.0 / count), pivot, tau2, error2, values, variances)


def _result(
    found: Sequence[Estimate], weights: Array, pivot: Pivot, tau2: float, error2: float, values: Array, variances: Array
) -> OverEffects:
    count, mean = len(found), pivot.centre
    lower, upper = (
        pivot._replace(centre=mean + float(weights @ np.array([_open(one, side) for one in found]))) for side in (0, 1)
    )
    prediction = None
    if count > FEWEST:
        tail = 1 - (1 - LEVEL) / 2
        true = float(stdtrit(count - 2, tail)) * float(np.sqrt(tau2 + error2))
        measured = float(stdtrit(count - 1, tail)) * float(values.std(ddof=1)) * float(np.sqrt(1 + 1 / count))
        prediction = (lower.centre - max(true, measured), upper.centre + max(true, measured))
    estimate = Estimate(
        value=mean,
        unit=found[0].unit,
        seeds=min(one.seeds for one in found),
        items=sum(one.items for one in found),
        units=sum(one.units for one in found),
        lower=lower,
        upper=upper,
        limits=(float(np.mean([one.limits[0] for one in found])), float(np.mean([one.limits[1] for one in found]))),
        covers="targets",
        left_out=sum(one.left_out for one in found),
        unscored=max(one.unscored for one in found),
        bounded=any(one.bounded for one in found),
    )
    shrunk = mean + tau2 / (tau2 + variances) * (values - mean)
    return OverEffects(estimate, float(np.sqrt(tau2)), prediction, tuple(map(float, shrunk)))


def _open(found: Estimate, side: int) -> float:
    """Return how far the lower (0) or upper (1) end is moved by what unscored answers could have been worth."""
    pivot = (found.lower, found.upper)[side]
    return pivot.centre - found.value if found.bounded and pivot is not None else 0.0


def paule_mandel(values: Array, variances: Array) -> float:
    """Return the variance of true effects at which the weighted sum of squares is the number of effects less one.

    Args:
        values: of the effects, shape (effects,).
        variances: of their errors, shape (effects,), above 0.
    """
    wanted = len(values) - 1.0

    def excess(tau2: float) -> float:
        weights = 1.0 / (variances + tau2)
        mean = (weights * values).sum() / weights.sum()
        return float((weights * (values - mean) ** 2).sum()) - wanted

    if excess(0.0) <= 0:
        return 0.0
    high = float(values.var(ddof=1)) + float(variances.max())
    while excess(high) > 0:
        high *= 2.0
    return float(brentq(excess, 0.0, high, xtol=1e-12 * max(high, 1e-12)))


def covariance(left: Contrast, right: Contrast) -> float:
    """Return the covariance of two means over seeds that comes from items they share."""
    total = 0.0
    for one in left.parts:
        for other in right.parts:
            if one.task == other.task and one.pull.shape == other.pull.shape:
                count = min(one.units, other.units)
                total += count / max(count - 1, 1) * float(one.pull @ other.pull)
    return total
