"""Joint draws of seeds and units, for statements about several quantities at once.

How likely an arm is on the Pareto front depends on all arms and both axes together, which no interval says. Each draw
takes seeds with replacement and, independently, units with replacement, the same units for every seed and every arm:
the pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1(2)). A draw moves a quantity by its pulls; what
seeds lose by resampling is given back by scaling to the standard error of the estimate. No interval and no word rests
on draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peft_arena.analyze.paired import Array, Contrast
from peft_arena.core.ids import seed_for

_CHUNK = 4_000_000


class Resamples:
    """The draws, shared by every quantity of a study so that they can be combined draw by draw."""

    def __init__(self, seed: int = 0, draws: int = 4000) -> None:
        """Prepare ``draws`` resamples; each task and set of seeds has its own stream of random numbers."""
        self.draws = draws
        self.seed = seed
        self._units: dict[tuple[str, int], NDArray[np.uint8]] = {}

    def units(self, task: str, count: int) -> NDArray[np.uint8]:
        """Return how often each unit of a task is in each draw, shape (draws, count)."""
        if (task, count) not in self._units:
            rng = np.random.default_rng(seed_for(self.seed, "items", task))
            self._units[task, count] = _counts(rng, self.draws, count)
        return self._units[task, count]

    def seeds(self, seeds: tuple[int | None, ...]) -> Array:
        """Return the share of each seed in each draw, shape (draws, seeds); equal seeds get equal draws."""
        rng = np.random.default_rng(seed_for(self.seed, "seeds", *(str(seed) for seed in seeds)))
        return _counts(rng, self.draws, len(seeds)) / len(seeds)

    def of(self, contrast: Contrast, stderr: float) -> Array:
        """Return draws of the mean over seeds about its value, shape (draws,), with that standard error."""
        by_seed = np.tile(contrast.per_seed, (self.draws, 1))
        for part in contrast.parts:
            by_seed += self._moved(part.task, part.pulls)
        drawn = (self.seeds(contrast.seeds) * by_seed).sum(axis=1)
        spread = float(drawn.std())
        return contrast.value + (drawn - drawn.mean()) * (stderr / spread if spread > 0 else 0.0)

    def _moved(self, task: str, pulls: Array) -> Array:
        """Return by how much each draw of units moves each seed's value, shape (draws, seeds)."""
        counts = self.units(task, pulls.shape[1])
        moved = np.empty((self.draws, len(pulls)))
        step = max(1, _CHUNK // max(counts.shape[1], 1))
        for start in range(0, self.draws, step):
            moved[start : start + step] = counts[start : start + step].astype(np.float64) @ pulls.T
        return moved


def _counts(rng: np.random.Generator, draws: int, count: int) -> NDArray[np.uint8]:
    """Draw ``count`` of ``count`` with replacement, ``draws`` times, as counts of shape (draws, count)."""
    found = np.empty((draws, count), dtype=np.uint8)
    step = max(1, _CHUNK // max(count, 1))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        picked = rng.integers(0, count, size=(rows, count)) + np.arange(rows)[:, None] * count
        found[start : start + rows] = np.bincount(picked.ravel(), minlength=rows * count).reshape(rows, count)
    return found
