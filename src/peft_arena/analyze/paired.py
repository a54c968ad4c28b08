"""Paired differences of scores over seeds × items, with intervals from a crossed bootstrap.

The design. An arm has one run per seed, and every run answers the same items; the base model has one run that answers
those items too. Seeds and items are both samples of something larger, and they are crossed, not nested: the same items
return under every seed. Each draw therefore takes seeds with replacement and, independently, items with replacement,
the same items for every seed (the "pigeonhole" bootstrap: Owen, 2007, Annals of Applied Statistics 1(2)).

The estimate is the plain one: for each seed the difference of two weighted means over the pairs both sides scored, and
the mean of these over seeds. A weighted mean is a ratio, sum(weight * value) / sum(weight), so that cross-entropy per
token and instruction-level accuracies are right.

The interval is the percentile interval of the draws, scaled about the estimate in two ways, because with two to five
seeds the raw one is wrong in both directions (the table is the share of 95 % intervals that held the truth, and their
width over the ideal width; 3 seeds, 200 items, 400 to 500 simulated studies):

======================  ============  ============
what varies             raw           as here
======================  ============  ============
mostly seeds            0.79, 0.75    0.92, 1.61
seeds and items         0.95, 1.00    0.94, 1.01
mostly items            0.97, 1.02    0.95, 1.00
noise per seed × item   0.99, 1.50    0.96, 1.26
======================  ============  ============

With two seeds and mostly variance between seeds the share is 0.87, with five 0.92: few seeds stay few.

1. *Width.* Resampling S seeds loses the factor (S-1)/S of their variance, and crossing counts the noise of a single
   answer three times. The draws are scaled to the variance of the two-way random-effects decomposition.
2. *Few seeds.* The scale is multiplied by t/z with Satterthwaite's (1946) degrees of freedom.

With one seed both scales are next to one and the interval is the plain percentile bootstrap over items: it then says
nothing about the spread over seeds, and :attr:`Estimate.seeds` is 1 so that a report can say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from peft_arena.core.ids import seed_for

Array = NDArray[np.float64]
LEVEL = 0.95
"""Coverage every interval aims at."""
_CHUNK = 4_000_000


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
    """Shape (seeds, items), units behind each value; 0 where the item was not asked."""

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Where there is a value to use, shape (seeds, items)."""
        return np.asarray(np.isfinite(self.values) & (self.weights > 0), dtype=np.bool_)

    def take(self, seeds: Sequence[int]) -> Scores:
        """Return the rows of some seeds, in that order; the base model's row is repeated."""
        rows = [0 if self.seeds == (None,) else self.seeds.index(seed) for seed in seeds]
        return Scores(tuple(seeds), self.values[rows], self.weights[rows])

    def means(self, mask: NDArray[np.bool_] | None = None) -> Array:
        """Return the weighted mean of each row over its scored items, shape (seeds,); NaN where there are none."""
        used = self.scored if mask is None else mask & self.scored
        weights = np.where(used, self.weights, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((weights * np.nan_to_num(self.values)).sum(axis=1) / weights.sum(axis=1))


@dataclass(frozen=True, eq=False)
class Estimate:
    """A difference (or another contrast) with its interval, and what it was computed from."""

    value: float
    low: float | None
    """Lower end of the 95 % interval; None where fewer than two items give no interval."""
    high: float | None
    stderr: float | None
    p: float | None
    """Two-sided p-value against zero, from Student's t with the interval's degrees of freedom."""
    unit: str
    seeds: int
    """Seeds used; with 1 the interval covers items only."""
    items: int
    """Items used in at least one seed, summed over tasks."""
    left_out: int = 0
    """Answers (seed × item) left out because one side was not asked or could not be scored."""
    draws: Array = field(default_factory=lambda: np.empty(0), repr=False)
    """Bootstrap draws scaled like the interval (without t/z), shape (draws,); joint statements are made from these."""

    def scaled(self, factor: float, unit: str) -> Estimate:
        """Return the estimate times a number, for example 100 for points; a negative one turns it over."""
        ends = [end * factor for end in (self.low, self.high) if end is not None]
        return replace(
            self,
            value=self.value * factor,
            low=min(ends) if ends else None,
            high=max(ends) if ends else None,
            stderr=None if self.stderr is None else self.stderr * abs(factor),
            unit=unit,
            draws=self.draws * factor,
        )

    @property
    def excludes_zero(self) -> bool:
        """Whether the uncorrected interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class Resamples:
    """The draws of seeds and items, shared by every contrast of a study so that they can be combined draw by draw."""

    def __init__(self, rng: np.random.Generator, draws: int = 4000) -> None:
        """Prepare ``draws`` resamples; all randomness comes from ``rng``, one named stream per task and seed set."""
        self.draws = draws
        self._root = int(rng.integers(2**31))
        self._items: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._seeds: dict[tuple[int | None, ...], Array] = {}
        self._own: dict[tuple[str, int], tuple[Scores, Array]] = {}

    def items(self, task: str, count: int) -> NDArray[np.uint8]:
        """Return how often each item of a task is in each draw, shape (draws, count)."""
        if (task, count) not in self._items:
            rng = np.random.default_rng(seed_for(self._root, "items", task))
            self._items[task, count] = _counts(rng, self.draws, count)
        return self._items[task, count]

    def seeds(self, seeds: tuple[int | None, ...]) -> Array:
        """Return the share of each seed in each draw, shape (draws, seeds); equal seeds get equal draws."""
        if seeds not in self._seeds:
            rng = np.random.default_rng(seed_for(self._root, "seeds", *(str(seed) for seed in seeds)))
            self._seeds[seeds] = _counts(rng, self.draws, len(seeds)) / len(seeds)
        return self._seeds[seeds]

    def means(self, scores: Scores, seeds: Sequence[int], used: NDArray[np.bool_], task: str) -> Array:
        """Return the mean of some seeds over the used answers in each draw of items, shape (draws, seeds).

        Means over all that an arm has scored are kept, since every comparison of the arm needs them.
        """
        if not np.array_equal(used, scores.take(seeds).scored):
            return ratio_draws(scores.take(seeds), used, self, task)
        key = (task, id(scores))
        if key not in self._own:
            self._own[key] = (scores, ratio_draws(scores, scores.scored, self, task))
        rows = [0 if scores.seeds == (None,) else scores.seeds.index(seed) for seed in seeds]
        return self._own[key][1][:, rows]


def _counts(rng: np.random.Generator, draws: int, count: int) -> NDArray[np.uint8]:
    """Draw ``count`` of ``count`` with replacement, ``draws`` times, as counts of shape (draws, count)."""
    found = np.empty((draws, count), dtype=np.uint8)
    step = max(1, _CHUNK // max(count, 1))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        picked = rng.integers(0, count, size=(rows, count)) + np.arange(rows)[:, None] * count
        found[start : start + rows] = np.bincount(picked.ravel(), minlength=rows * count).reshape(rows, count)
    return found


def ratio_draws(scores: Scores, mask: NDArray[np.bool_], resamples: Resamples, task: str) -> Array:
    """Return the weighted mean of each seed in each draw of items, shape (draws, seeds); NaN for an empty draw."""
    counts = resamples.items(task, scores.values.shape[1])
    weights = np.where(mask, scores.weights, 0.0)
    both = np.concatenate([weights * np.where(mask, np.nan_to_num(scores.values), 0.0), weights]).T
    sums = np.empty((counts.shape[0], both.shape[1]))
    step = max(1, _CHUNK // max(counts.shape[1], 1))
    for start in range(0, counts.shape[0], step):
        sums[start : start + step] = counts[start : start + step].astype(np.float64) @ both
    seeds = len(scores.seeds)
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, :seeds] / sums[:, seeds:]


@dataclass(frozen=True, eq=False)
class Contrast:
    """A quantity per seed, and the same quantity in every draw of items: what an interval is made from."""

    seeds: tuple[int | None, ...]
    per_seed: Array
    """Shape (seeds,)."""
    matrix: Array
    """Shape (draws, seeds)."""
    items: int
    left_out: int

    def turned(self, factor: float) -> Contrast:
        """Return the contrast times a number."""
        return replace(self, per_seed=self.per_seed * factor, matrix=self.matrix * factor)


def difference(left: Scores, right: Scores, resamples: Resamples, task: str) -> Contrast | None:
    """Return left minus right on one task, paired by seed and item.

    Args:
        left: scores of an arm.
        right: scores of another arm, or of the base model; same columns as ``left``.
        resamples: where the draws of items come from.
        task: names the stream of items; the same for all contrasts of the task.

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
    asked = (one.weights > 0) | (other.weights > 0)
    return Contrast(
        seeds=tuple(seeds),
        per_seed=one.means(used) - other.means(used),
        matrix=resamples.means(left, seeds, used, task) - resamples.means(right, seeds, used, task),
        items=int(used.any(axis=0).sum()),
        left_out=int((asked & ~used).sum()),
    )


def mean_of(contrasts: Sequence[Contrast]) -> Contrast | None:
    """Return the plain mean of contrasts on several tasks, seed by seed; None unless all have the same seeds."""
    if not contrasts or len({contrast.seeds for contrast in contrasts}) > 1:
        return None
    return Contrast(
        seeds=contrasts[0].seeds,
        per_seed=np.mean([contrast.per_seed for contrast in contrasts], axis=0),
        matrix=np.mean([contrast.matrix for contrast in contrasts], axis=0),
        items=sum(contrast.items for contrast in contrasts),
        left_out=sum(contrast.left_out for contrast in contrasts),
    )


class _Spread(NamedTuple):
    variance: float
    df: float


def estimate(contrast: Contrast, resamples: Resamples, unit: str) -> Estimate:
    """Return the mean over seeds with its interval, standard error and p-value (see the module's text)."""
    from scipy import stats

    value = float(contrast.per_seed.mean())
    shares = resamples.seeds(contrast.seeds)
    whole = np.asarray(np.isfinite(contrast.matrix).all(axis=1))
    if contrast.items < 2 or whole.sum() < 2:
        return Estimate(value, None, None, None, None, unit, len(contrast.seeds), contrast.items, contrast.left_out)
    matrix = contrast.matrix[whole]
    draws = (shares[whole] * matrix).sum(axis=1)
    spread = _spread(contrast, matrix)
    crossed = float(draws.var(ddof=1))
    scale = float(np.sqrt(spread.variance / crossed)) if crossed > 0 and len(contrast.seeds) > 1 else 1.0
    scaled = np.full(len(whole), np.nan)
    scaled[whole] = value + scale * (draws - value)
    tail = (1 - LEVEL) / 2
    widening = float(stats.t.isf(tail, spread.df) / stats.norm.isf(tail))
    low, high = value + widening * (np.percentile(scaled[whole], [100 * tail, 100 * (1 - tail)]) - value)
    stderr = float(np.sqrt(spread.variance))
    without_spread = 1.0 if value == 0 else min(1.0, 2 * 0.5**contrast.items)  # all items moved alike: a sign test
    return Estimate(
        value=value,
        low=float(low),
        high=float(high),
        stderr=stderr,
        p=float(2 * stats.t.sf(abs(value) / stderr, spread.df)) if stderr > 0 else without_spread,
        unit=unit,
        seeds=len(contrast.seeds),
        items=contrast.items,
        left_out=contrast.left_out,
        draws=scaled,
    )


def _spread(contrast: Contrast, matrix: Array) -> _Spread:
    """Variance of the mean over seeds: items, plus what seeds add beyond the noise of single answers; with its df."""
    over_items = matrix.mean(axis=1)
    items = float(over_items.var(ddof=1))
    count = len(contrast.seeds)
    if count == 1:
        return _Spread(items, contrast.items - 1)
    noise = float((matrix - over_items[:, None]).var(axis=0, ddof=1).mean()) / (count - 1)
    seeds = max(float(contrast.per_seed.var(ddof=1)) / count - noise, 0.0)
    total = items + seeds
    if total <= 0:
        return _Spread(0.0, contrast.items - 1)
    return _Spread(total, total**2 / (items**2 / (contrast.items - 1) + seeds**2 / (count - 1)))
