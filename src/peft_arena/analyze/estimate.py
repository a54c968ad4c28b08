"""From a contrast to an estimate: value, interval and p-value of one test, so that they can never disagree.

An interval is the set of values that the test does not reject: value ∓ t · error. What goes into the error:

* **Items.** The variance of the linearised mean over units: the sum of squared pulls, each over 1 - 2 a + A, with a
  the unit's share of the weight and A the sum of squared shares, and as many degrees of freedom as that sum has if all
  units vary alike (the CR2 estimate of Bell and McCaffrey 2002, Survey Methodology 28, for a mean). For n units of the
  same share that is n / (n - 1) times the sum, with n - 1.
* **Pseudo-items.** Differences of fractions get two more items, split between "only left right", "only right right" and
  neither (Agresti and Min 2005, Biometrics 61): value · n / (n + 2), variance · (n / (n + 2))² + 1 / (n + 2)². A mean
  of fractions gets four, half of them right (Agresti and Coull 1998, The American Statistician 52). So no interval has
  width 0 because all answers agree, and near 0 and 1 it is wide enough. n is the number of independent answers with the
  same variance: that of items with one seed, more where seeds answer differently, fewer where items share a passage,
  and never more than the side with fewer answers gave: the base model answers each item once.
* **Seeds.** The spread between trainings that all arms show (:mod:`peft_arena.analyze.seed_spread`), the noise of
  single answers included. That noise is then taken out of the variance of items, so that it counts once; never more of
  it than the spread has, which with few seeds may come out as nothing by chance.
* **Unscored answers.** Where more than one in a hundred could not be scored, the interval runs from the lower end with
  all of them wrong to the upper end with all of them right (Manski 1989, Journal of Human Resources 24), so that a
  claim holds at the worse bound. Where it is not known what they could have been worth (F1, means over parts, nats)
  there is no interval.

With one seed nothing is known of the spread between trainings, unless other arms or the study say it: the estimate is
then of this run, and :attr:`Estimate.about_runs` says so. Below six units, or where
they weigh as unequally as fewer than six (1 / A), there is no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from peft_arena.analyze.paired import MANY_UNSCORED, Array, Contrast, Part
from peft_arena.analyze.seed_spread import SeedSpread
from peft_arena.core.measure import FEWEST_UNITS, too_few_units

LEVEL = 0.95
"""Coverage of an interval that stands beside no word."""
_NORMAL = 1e6
"""Degrees of freedom from which on Student's t is taken to be normal."""
_LEAST = 1e-15
"""Least p-value that is told from zero where a variance has several terms."""
Covers = Literal[
    "items only", "seeds and items", "items, and the seed spread of other arms", "items, and seed_sd", "targets"
]


class Term(NamedTuple):
    """One independent part of a variance."""

    share: float
    """Of the whole variance."""
    df: float
    """Degrees of freedom it was estimated with."""


class Pivot(NamedTuple):
    """One test of a quantity: (centre - truth) / error.

    Each term of the variance has a half-width of its own, its Student's t times its error, and the half-width of the
    whole is the root of the sum of their squares (Howe 1974, Journal of the American Statistical Association 69). One
    number of degrees of freedom for the whole (Satterthwaite 1946) is wrong where a term with one or two of them
    happens to come out small.
    """

    centre: float
    error: float
    terms: tuple[Term, ...]

    def quantile(self, tail: float) -> float:
        """Return the value that is exceeded with the probability ``tail``."""
        return float(np.sqrt(sum(term.share * _quantile(tail, term.df) ** 2 for term in self.terms)))

    def tail(self, statistic: float) -> float:
        """Return the probability that a value of (centre - truth) / error is exceeded."""
        if len(self.terms) == 1:
            return _tail(statistic, self.terms[0].df)
        if statistic <= 0:
            return 1.0 - self.tail(-statistic) if statistic else 0.5
        ends = [max(_tail(statistic, term.df), _LEAST) for term in self.terms]
        low, high = np.log(min(ends)), np.log(max(ends))
        if self.quantile(np.exp(low)) <= statistic:  # below the least p-value, or all terms alike
            return float(np.exp(low))
        if self.quantile(np.exp(high)) >= statistic:
            return float(np.exp(high))
        return float(np.exp(brentq(lambda log: self.quantile(np.exp(log)) - statistic, low, high)))

    def above(self, threshold: float) -> float:
        """Return the one-sided p-value of "the truth is above the threshold"."""
        return self.tail((self.centre - threshold) / self.error)

    def below(self, threshold: float) -> float:
        """Return the one-sided p-value of "the truth is below the threshold"."""
        return self.tail((threshold - self.centre) / self.error)

    def half(self, level: float) -> float:
        """Return half the width of the interval at a level."""
        return self.quantile((1 - level) / 2) * self.error

    def times(self, factor: float) -> Pivot:
        """Return the test of the quantity times a number."""
        return Pivot(self.centre * factor, self.error * abs(factor), self.terms)


def _tail(t: float, df: float) -> float:
    return float(ndtr(-t)) if df > _NORMAL else float(stdtr(df, -t))


def _quantile(tail: float, df: float) -> float:
    return -float(ndtri(tail)) if df > _NORMAL else -float(stdtrit(df, tail))


@dataclass(frozen=True, eq=False)
class Estimate:
    """A quantity with its interval, and what it was computed from."""

    value: float
    unit: str
    seeds: int
    """Seeds used."""
    items: int
    """Items used in at least one seed, summed over tasks."""
    units: int
    """Independent units among them (passages, templates, else items), summed over tasks."""
    lower: Pivot | None = None
    """The test that gives the lower end; None: no interval, and :attr:`missing` says why."""
    upper: Pivot | None = None
    """The test that gives the upper end: the same unless answers are unscored."""
    limits: tuple[float, float] = (-np.inf, np.inf)
    """What is possible at all."""
    covers: Covers = "seeds and items"
    missing: str = ""
    """Why there is no interval; empty where there is one."""
    left_out: int = 0
    """Answers (seed × item) left out because one side was not asked or could not be scored."""
    unscored: float = 0.0
    """Largest share, over tasks, of asked answers that could not be scored."""
    bounded: bool = False
    """Whether the interval holds for whatever the unscored answers were worth."""

    @property
    def about_runs(self) -> bool:
        """Whether nothing is known of the spread between trainings, so that it is about these runs only."""
        return self.covers == "items only"

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return self.lower is not None and self.upper is not None

    @property
    def stderr(self) -> float | None:
        """Standard error, pseudo-items included (of two tests the larger); None without an interval."""
        if self.lower is None or self.upper is None:
            return None
        return max(self.lower.error, self.upper.error)

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Return the interval at a level, inside what is possible; None where there is none."""
        if self.lower is None or self.upper is None:
            return None
        low, high = self.lower.centre - self.lower.half(level), self.upper.centre + self.upper.half(level)
        low, high = max(low, self.limits[0]), min(high, self.limits[1])
        return (low, high) if self.bounded else (min(low, self.value), max(high, self.value))

    @property
    def low(self) -> float | None:
        """Lower end of the 95 % interval."""
        found = self.interval()
        return None if found is None else found[0]

    @property
    def high(self) -> float | None:
        """Upper end of the 95 % interval."""
        found = self.interval()
        return None if found is None else found[1]

    def p_above(self, threshold: float) -> float | None:
        """Return the one-sided p-value of "the truth is above the threshold"; None without an interval."""
        return None if self.lower is None else self.lower.above(threshold)

    def p_below(self, threshold: float) -> float | None:
        """Return the one-sided p-value of "the truth is below the threshold"; None without an interval."""
        return None if self.upper is None else self.upper.below(threshold)

    @property
    def p(self) -> float | None:
        """Two-sided p-value against zero; below 1 - level where the interval at that level excludes zero."""
        up, down = self.p_above(0.0), self.p_below(0.0)
        return None if up is None or down is None else min(1.0, 2 * min(up, down))

    def times(self, factor: float, unit: str) -> Estimate:
        """Return the estimate times a number, for example 100 for points; a negative one turns it over."""
        lower, upper = (None if side is None else side.times(factor) for side in (self.lower, self.upper))
        if factor < 0:
            lower, upper = upper, lower
        ends = sorted(end * factor for end in self.limits)
        return replace(self, value=self.value * factor, unit=unit, lower=lower, upper=upper, limits=(ends[0], ends[1]))


def estimate(
    contrast: Contrast, unit: str, *, spread: Sequence[SeedSpread] = (), declared: SeedSpread | None = None
) -> Estimate:
    """Return the mean over seeds with its tests (see the module's text).

    Args:
        contrast: what is estimated.
        unit: of the contrast.
        spread: variances between trainings of this quantity of one run, whose sum counts (of a difference of two that
            of both), as all arms show them; empty: what the contrast's own runs show, where it has several.
        declared: the same as the study declares it; used where nothing was measured and there is one seed.
    """
    known = tuple(spread)
    if not known and len(contrast.seeds) > 1:
        known = (SeedSpread(float(np.var(contrast.per_seed, ddof=1)), len(contrast.seeds) - 1.0),)
    if not known and declared is not None:
        known = (declared,)
    start = Estimate(
        value=contrast.value,
        unit=unit,
        seeds=len(contrast.seeds),
        items=contrast.items,
        units=contrast.units,
        limits=_limits(contrast.parts),
        covers=_covers(len(contrast.seeds), bool(spread), bool(known)),
        left_out=contrast.left_out,
        unscored=contrast.unscored,
        bounded=contrast.bounds is not None,
    )
    missing = _why_none(contrast)
    if missing:
        return replace(start, missing=missing)
    ends = contrast.bounds or (contrast, contrast)
    lower, upper = (_pivot(end, known) for end in ends)
    if lower.error <= 0 or upper.error <= 0:
        return replace(
            start, missing=f"all {contrast.units} items differ by the same amount: their spread is not known"
        )
    return replace(start, lower=lower, upper=upper)


def _covers(seeds: int, measured: bool, known: bool) -> Covers:
    if seeds > 1:
        return "seeds and items"
    if not known:
        return "items only"
    return "items, and the seed spread of other arms" if measured else "items, and seed_sd"


def _why_none(contrast: Contrast) -> str:
    """Say why there can be no interval; empty if there can."""
    if contrast.unscored > MANY_UNSCORED and contrast.bounds is None:
        return f"{100 * contrast.unscored:.1f} % of the answers are unscored, and their bounds are not known"
    few = min(contrast.parts, key=lambda part: part.alike)
    given = too_few_units(few.items, few.units, few.alike)
    return f"{given}: an interval needs {FEWEST_UNITS}" if given else ""


def _limits(parts: Sequence[Part]) -> tuple[float, float]:
    return sum(part.low for part in parts), sum(part.high for part in parts)


class _Shares(NamedTuple):
    """What a part adds to centre and variance once it has its pseudo-items."""

    centre: float
    shrink: float
    items: float
    """Variance over units, pseudo-items not included."""
    noise: float
    """The part of it that is noise of single answers, not a property of units."""
    pseudo: float
    """Variance that pseudo-items add."""
    df: float


def _shares(part: Part) -> _Shares:
    least = 1 - 2 * part.shares + float((part.shares**2).sum())
    """What is expected of a squared pull, over what it should be."""
    items = float((part.pull**2 / least).sum())
    seeds = len(part.per_seed)
    noise = 0.0
    if seeds > 1:
        squares = float(((part.pulls - part.pull) ** 2 / least).sum())
        noise = min(squares / ((seeds - 1) * seeds), items)
    df = _degrees(part.shares, least)
    value = float(part.per_seed.mean())
    if part.kind == "other":
        return _Shares(value, 1.0, items, noise, 0.0, df)
    n = _independent(part, items)
    if part.kind == "difference":
        shrink, centre = n / (n + 2), value * n / (n + 2)
        pseudo = (part.scale / (n + 2)) ** 2
    else:
        shrink, middle = n / (n + 4), 0.5 * part.scale
        centre = middle + (value - middle) * shrink
        pseudo = (part.scale**2 + 4 * shrink * (value - middle) ** 2) / (n + 4) ** 2
    return _Shares(centre, shrink, shrink**2 * items, shrink**2 * noise, pseudo, df)


def _degrees(shares: Array, least: Array) -> float:
    """Return the degrees of freedom of the variance over units, if all units vary alike (Satterthwaite)."""
    spread = float((shares**2).sum())
    p = shares**2 / least
    p0, p1, p2 = (float((p * shares**power).sum()) for power in (0, 1, 2))
    off = spread**2 * p0**2 + 2 * p2 * p0 - 4 * spread * p1 * p0 + 2 * p1**2
    squares = off - float((p**2 * (spread - 2 * shares) ** 2).sum()) + float((shares**4).sum())
    return spread**2 / squares


def _independent(part: Part, items: float) -> float:
    """Return how many independent answers would give the same variance: at least as many as units that weigh alike."""
    if items <= 0:
        return part.alike
    most = max(part.fewest, part.alike)
    return float(np.clip(part.answers * part.answer_variance / items, part.alike, most))


def _pivot(contrast: Contrast, spread: Sequence[SeedSpread]) -> Pivot:
    """Return the test of a contrast, whose trainings have a known spread; without one it is of these runs."""
    shares = [_shares(part) for part in contrast.parts]
    seeds = len(contrast.seeds)
    noise = min(sum(share.noise for share in shares), sum(one.variance for one in spread) / seeds)
    items = sum(share.items + share.pseudo for share in shares)
    weakness = sum((share.items + share.pseudo) ** 2 / share.df for share in shares)
    df = items**2 / weakness if weakness > 0 else float(min(share.df for share in shares))
    variances = [(max(items - noise, 0.0), df), *((one.variance / seeds, one.df) for one in spread)]
    total = sum(variance for variance, _ in variances)
    terms = tuple(Term(variance / total, df) for variance, df in variances if variance > 0) if total > 0 else ()
    return Pivot(sum(share.centre for share in shares), float(np.sqrt(total)), terms)
