"""Scores over seeds × items, and what can be asked of them: differences and levels, linearised unit by unit.

The design. An arm has one run per seed, and every run answers the same items; the base model has one run that answers
those items too. Seeds and items are both samples of something larger, and they are crossed, not nested: the same items
return under every seed. Items that share a passage or a template are one *unit*: they are not independent evidence, so
every error is computed over units (Owen 2007, Annals of Applied Statistics 1(2); Miller 2024, arXiv 2411.00640).

An estimate is the plain one: for each seed the difference of two weighted means over the pairs both sides scored, and
the mean of these over seeds. A weighted mean is a ratio, sum(weight * value) / sum(weight), so that cross-entropy per
token and instruction-level accuracies are right. Its linearisation (Cochran 1977, Sampling Techniques, section 6.4)
says what each unit adds to it about its mean, its *pull*: pulls sum to zero, and their squares give the variance. Means
over tasks, shares and differences of differences are linear in pulls, so that one way of computing errors
(:mod:`peft_arena.analyze.estimate`) serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
MANY_UNSCORED = 0.01
"""Share of answers without a score above which bounds are computed: all of them wrong, all of them right."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What one arm answered on one task: one row per seed, one column per item.

    All scores of a task share their columns; an item a run was never asked has weight 0.
    """

    seeds: tuple[int | None, ...]
    """Seed of each row; (None,) for the base model, whose one row is paired with every seed."""
    values: Array
    """Shape (seeds, items), in the task's unit; NaN where an answer could not be scored."""
    weights: Array
    """Shape (seeds, items), weight of each value; 0 where the item was not asked."""
    units: NDArray[np.intp] | None = None
    """Shape (items,): number of the unit each item belongs to; None: each item is a unit of its own."""

    @cached_property
    def scored(self) -> Mask:
        """Where there is a value to use, shape (seeds, items)."""
        return np.asarray(np.isfinite(self.values) & (self.weights > 0), dtype=np.bool_)

    def take(self, seeds: Sequence[int]) -> Scores:
        """Return the rows of some seeds, in that order; the base model's row is repeated."""
        if tuple(seeds) == self.seeds:
            return self
        rows = [0 if self.seeds == (None,) else self.seeds.index(seed) for seed in seeds]
        return Scores(tuple(seeds), self.values[rows], self.weights[rows], self.units)

    def times(self, factor: float) -> Scores:
        """Return the scores times a number."""
        return replace(self, values=self.values * factor)

    def means(self, mask: Mask | None = None) -> Array:
        """Return the weighted mean of each row over its scored items, shape (seeds,); NaN where there are none."""
        used = self.scored if mask is None else mask & self.scored
        weights = np.where(used, self.weights, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((weights * np.nan_to_num(self.values)).sum(axis=1) / weights.sum(axis=1))

    def by_seed(self) -> dict[int, float]:
        """Return the mean of each run over its scored items, by seed; runs without one are left out."""
        return _finite_by_seed(self.seeds, self.means())


def _finite_by_seed(seeds: Sequence[int | None], values: Array) -> dict[int, float]:
    pairs = zip(seeds, values, strict=True)
    return {seed: float(value) for seed, value in pairs if seed is not None and np.isfinite(value)}


class Pulls(NamedTuple):
    """The weighted mean of each row over some items, and what each item adds to it."""

    means: Array
    """Shape (seeds,)."""
    items: Array
    """Shape (seeds, items): weight * (value - mean) / sum of weights; rows sum to zero."""


def pulls_of(scores: Scores, used: Mask) -> Pulls:
    """Linearise the weighted means of the used items; each row needs at least one."""
    weights = np.where(used, scores.weights, 0.0)
    values = np.where(used, scores.values, 0.0)
    totals = weights.sum(axis=1, keepdims=True)
    means = (weights * values).sum(axis=1, keepdims=True) / totals
    return Pulls(means[:, 0], weights * np.where(used, values - means, 0.0) / totals)


@dataclass(frozen=True, eq=False)
class Part:
    """What one task contributes to a contrast, for each seed."""

    task: str
    """Id of the evaluation; the same units return in every part of the same task."""
    per_seed: Array
    """Shape (seeds,)."""
    pulls: Array
    """Shape (seeds, units of the task): what each unit adds to ``per_seed``; 0 for units that were not used."""
    shares: Array
    """Shape (units of the task,): share of the weight, mean over seeds; sums to 1."""
    answer_variance: float
    """Variance of the mean over seeds if all answers were independent: beside that over units it says how alike the
    items of a unit, and the answers of all seeds to an item, are."""
    units: int
    """Units used in at least one seed."""
    items: int
    """Items used in at least one seed."""
    answers: int
    """Answers (seed × item) used."""
    fewest: int
    """Answers of the side that has fewer: the base model's one run answers each item once, whatever the seeds."""
    kind: Literal["difference", "level", "other"] = "other"
    """A difference of two means of fractions, one such mean, or anything else."""
    scale: float = 1.0
    """What a difference of 1 is worth, so that the bounds of fractions are known."""
    low: float = -np.inf
    """Least that is possible."""
    high: float = np.inf
    """Most that is possible."""

    def times(self, factor: float) -> Part:
        """Return the part times a number; a negative one turns it over."""
        ends = sorted((self.low * factor, self.high * factor))
        return replace(
            self,
            per_seed=self.per_seed * factor,
            pulls=self.pulls * factor,
            answer_variance=self.answer_variance * factor**2,
            scale=self.scale * abs(factor),
            low=ends[0],
            high=ends[1],
        )

    @cached_property
    def alike(self) -> float:
        """How many units of the same share would weigh as unequally: 1 over the sum of squared shares."""
        return 1.0 / float((self.shares**2).sum())

    @cached_property
    def pull(self) -> Array:
        """Pull of each unit on the mean over seeds, shape (units of the task,)."""
        return np.asarray(self.pulls.mean(axis=0))


class Bounds(NamedTuple):
    """A contrast with every answer that could not be scored counted against the left side, and for it."""

    low: Contrast
    high: Contrast


@dataclass(frozen=True, eq=False)
class Contrast:
    """A quantity of the runs of some seeds, a sum of parts over tasks that share no item."""

    seeds: tuple[int | None, ...]
    parts: tuple[Part, ...]
    left_out: int = 0
    """Answers (seed × item) left out because one side was not asked or could not be scored."""
    unscored: float = 0.0
    """Largest share, over tasks, of asked answers that one side could not be scored on."""
    bounds: Bounds | None = None
    """Where more than :data:`MANY_UNSCORED` are unscored, and what the answers could have been worth is known."""

    @cached_property
    def per_seed(self) -> Array:
        """The quantity by seed, shape (seeds,)."""
        return np.asarray(sum(part.per_seed for part in self.parts))

    def by_seed(self) -> dict[int, float]:
        """Return the quantity by seed."""
        return _finite_by_seed(self.seeds, self.per_seed)

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return float(self.per_seed.mean())

    @property
    def items(self) -> int:
        """Items used, summed over tasks."""
        return sum(part.items for part in self.parts)

    @property
    def units(self) -> int:
        """Units used, summed over tasks."""
        return sum(part.units for part in self.parts)

    def times(self, factor: float) -> Contrast:
        """Return the contrast times a number; a negative one turns it over."""
        bounds = None
        if self.bounds is not None:
            ends = [end.times(factor) for end in self.bounds]
            bounds = Bounds(*(ends if factor > 0 else reversed(ends)))
        return replace(self, parts=tuple(part.times(factor) for part in self.parts), bounds=bounds)


def difference(
    left: Scores, right: Scores, task: str, *, fraction: bool = False, most: tuple[float, float] = (1.0, 1.0)
) -> Contrast | None:
    """Return left minus right on one task, paired by seed and item.

    Args:
        left: scores of an arm.
        right: scores of another arm, or of the base model; same columns as ``left``.
        task: id of the evaluation.
        fraction: whether the scores are means of values from 0 to ``most``, so that their bounds are known.
        most: greatest value of the left and of the right side.

    Returns:
        None where the two share no seed, or some shared seed has no pair that both sides scored.
    """
    seeds = [seed for seed in left.seeds if seed is not None and (right.seeds == (None,) or seed in right.seeds)]
    if not seeds:
        return None
    one, other = left.take(seeds), right.take(seeds)
    used = one.scored & other.scored
    if not used.any(axis=1).all():
        return None
    either, both = (one.weights > 0) | (other.weights > 0), (one.weights > 0) & (other.weights > 0)
    lost = both & ~used
    share = float(lost.sum() / max(both.sum(), 1))
    is_from_base = right.seeds == (None,)
    part = _difference_part(one, other, used, task, most if fraction else None, is_from_base)
    if fraction and is_from_base:
        low, high = _range_of(other, used)
        part = replace(part, low=-high, high=1.0 - low)
    bounds = None
    if share > MANY_UNSCORED and fraction and _are_plain(one, most[0]) and _are_plain(other, most[1]):
        ends = [
            _difference_part(_filled(one, lost, mine), _filled(other, lost, its), used | lost, task, most, is_from_base)
            for mine, its in ((0.0, most[1]), (most[0], 0.0))
        ]
        bounds = Bounds(*(Contrast(tuple(seeds), (end,)) for end in ends))
    return Contrast(tuple(seeds), (part,), int((either & ~used).sum()), share, bounds)


def _difference_part(
    left: Scores, right: Scores, used: Mask, task: str, most: tuple[float, float] | None, is_from_base: bool
) -> Part:
    one, other = pulls_of(left, used), pulls_of(right, used)
    kind: Literal["difference", "other"] = "other" if most is None else "difference"
    part = _part(task, one.means - other.means, one.items - other.items, left, used, kind)
    if most is not None:
        part = replace(part, scale=max(most), low=-most[1], high=most[0])
    return replace(part, fewest=part.items) if is_from_base else part


def _part(
    task: str,
    per_seed: Array,
    pulls: Array,
    scores: Scores,
    used: Mask,
    kind: Literal["difference", "level", "other"],
) -> Part:
    """Collapse the pulls of items, and their shares of the weight of some scores, to those of their units."""
    weights = np.where(used, scores.weights, 0.0)
    shares = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    units = scores.units
    touched = used.any(axis=0)
    items, answers = int(touched.sum()), int(used.sum())
    alone = float((pulls**2).sum()) / len(pulls) ** 2 * items / max(items - 1, 1)
    if units is None:
        return Part(task, per_seed, pulls, shares, alone, items, items, answers, answers, kind)
    count = int(units.max()) + 1
    together = np.array([np.bincount(units, weights=row, minlength=count) for row in pulls], dtype=np.float64)
    held = int(np.unique(units[touched]).size)
    held_shares = np.asarray(np.bincount(units, weights=shares, minlength=count), dtype=np.float64)
    return Part(task, per_seed, together, held_shares, alone, held, items, answers, answers, kind)


def _are_plain(scores: Scores, most: float) -> bool:
    """Say whether every value lies in [0, most]: F1, correlations and means over parts have other values of items."""
    values = scores.values[scores.scored]
    return bool(np.all((values >= 0) & (values <= most)))


def _filled(scores: Scores, lost: Mask, value: float) -> Scores:
    """Return the scores with a value where there was none."""
    empty = lost & ~np.isfinite(scores.values)
    return replace(scores, values=np.where(empty, value, scores.values))


def _range_of(scores: Scores, used: Mask) -> tuple[float, float]:
    """Return how low and how high a fraction may be in truth: Wilson's score interval at 99 %.

    A difference from it lies between minus the upper and one minus the lower end. The measured value itself will not
    do as a bound: it has an error, and near 0 and 1 the truth is often beyond it.
    """
    values = scores.means(used)
    count = int(np.unique(scores.units[used.any(axis=0)]).size) if scores.units is not None else int(used.any(0).sum())
    z2 = 2.5758**2 / count
    lows, highs = [], []
    for p in np.clip(values, 0.0, 1.0):
        middle, half = (p + z2 / 2) / (1 + z2), np.sqrt(z2 * p * (1 - p) + z2**2 / 4) / (1 + z2)
        lows.append(max(0.0, middle - half))
        highs.append(min(1.0, middle + half))
    return float(np.mean(lows)), float(np.mean(highs))


def level(scores: Scores, task: str, *, fraction: bool = False) -> Contrast | None:
    """Return the mean over seeds and items of one arm; None where a seed has no scored item.

    Args:
        scores: of the arm, or of the base model.
        task: id of the evaluation.
        fraction: whether the score is a mean of values from 0 to 1.
    """
    used = scores.scored
    if not used.any(axis=1).all():
        return None
    asked = scores.weights > 0
    lost = asked & ~used
    share = float(lost.sum() / max(asked.sum(), 1))
    seeds = tuple(0 if seed is None else seed for seed in scores.seeds)
    bounds = None
    if share > MANY_UNSCORED and fraction and _are_plain(scores, 1.0):
        ends = [_level_part(_filled(scores, lost, value), asked, task, fraction) for value in (0.0, 1.0)]
        bounds = Bounds(*(Contrast(seeds, (end,)) for end in ends))
    part = _level_part(scores, used, task, fraction)
    return Contrast(seeds, (part,), int((~used).sum()), share, bounds)


def _level_part(scores: Scores, used: Mask, task: str, fraction: bool) -> Part:
    found = pulls_of(scores, used)
    part = _part(task, found.means, found.items, scores, used, "level" if fraction else "other")
    return replace(part, low=0.0, high=1.0) if fraction else part


def share_kept(scores: Scores, base: Scores, chance: float, task: str) -> Contrast | None:
    """Return (tuned - chance) / (base - chance); None unless the base is above chance by two standard errors.

    Args:
        scores: of an arm.
        base: of the base model.
        chance: expected value of guessing.
        task: id of the evaluation.
    """
    seeds = [seed for seed in scores.seeds if seed is not None]
    tuned, paired = scores.take(seeds), base.take(seeds)
    used = tuned.scored & paired.scored
    if not used.any(axis=1).all():
        return None
    new, old = pulls_of(tuned, used), pulls_of(paired, used)
    above = old.means - chance
    if np.any(above <= 2 * np.sqrt((old.items**2).sum(axis=1))) or np.any(above <= 0):
        return None
    share = (new.means - chance) / above
    pulls = new.items / above[:, None] - share[:, None] * old.items / above[:, None]
    return Contrast(tuple(seeds), (_part(task, share, pulls, tuned, used, "other"),))


def mean_of(contrasts: Sequence[Contrast]) -> Contrast | None:
    """Return the plain mean of contrasts on several tasks, seed by seed; None unless all have the same seeds."""
    if not contrasts or len({contrast.seeds for contrast in contrasts}) > 1:
        return None
    share = 1.0 / len(contrasts)
    bounds = None
    unbounded = any(one.unscored > MANY_UNSCORED and one.bounds is None for one in contrasts)
    if not unbounded and any(contrast.bounds is not None for contrast in contrasts):
        sides = [(one.bounds or Bounds(one, one)) for one in contrasts]
        ends = [mean_of([replace(side[place], bounds=None, unscored=0.0) for side in sides]) for place in (0, 1)]
        bounds = Bounds(*(end for end in ends if end is not None))
    return Contrast(
        seeds=contrasts[0].seeds,
        parts=tuple(part.times(share) for contrast in contrasts for part in contrast.parts),
        left_out=sum(contrast.left_out for contrast in contrasts),
        unscored=max(contrast.unscored for contrast in contrasts),
        bounds=bounds,
    )
