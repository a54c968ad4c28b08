"""How far trainings of one arm with different seeds lie apart, by what all arms of a target show.

Two or three seeds say little about one arm's spread, and those of all arms together say more. With m the value of a
run, by arm and seed:

* *of one run*: the mean square within arms, for an arm against the base model;
* *of a difference*: twice the mean square that is left when arm and seed are taken out, for two arms with the same
  seeds. What a seed does to every arm alike, such as the order of the data, is not in it.

Both hold the noise of single answers as well. Where a seed moves all arms together, many arms are no more than one: the
degrees of freedom of the first are Satterthwaite's (1946, Biometrics Bulletin 2).

Pooling is right where the arms' spreads are alike. Bartlett's test (1937) says whether they may be, at 10 % so that it
is not blind with few seeds. Where they are not, each arm has a variance of its own that is moderated by the pooled one
(as in Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3): d degrees of freedom of its own and
three of the pool, (3 pooled + d own) / (3 + d) with 3 + d; a difference has those of both arms. The three are a choice:
more find more and are more often wrong of an arm that is wilder than the others; ``benchmarks/coverage.py`` shows how
often. Of two arms neither is the wilder: each has its own, and their difference what the pairs by seed show. Why
benchmarks need the spread of seeds: Bouthillier et al. 2021 (arXiv 2103.03098).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import chdtrc, fdtrc

from peft_arena.analyze.holm import holm

UNLIKE = 0.1
"""p-value of Bartlett's test below which spreads are not taken to be alike."""
PRIOR = 3.0
"""Degrees of freedom that the pooled variance has in an arm's own."""
NAMED = 0.05
"""Corrected p-value below which an arm is named as wilder than the others."""


class SeedSpread(NamedTuple):
    """A variance between trainings, and the degrees of freedom it is known with."""

    variance: float
    df: float


@dataclass(frozen=True)
class Pooled:
    """The spread of a target's arms on one quantity; nothing is known where no arm has two seeds."""

    run: SeedSpread | None = None
    """Of one run, the same for all arms."""
    difference: SeedSpread | None = None
    """Of two runs with the same seed."""
    each: Mapping[str, SeedSpread] = field(default_factory=dict)
    """Of one run of each arm, where arms are not alike; empty where they are."""

    def of_run(self, label: str, factor: float = 1.0) -> tuple[SeedSpread, ...]:
        """Return the spread of a run of an arm, times a number; empty where nothing is known."""
        if self.run is None:
            return ()
        return _times((self._own(label) if self.each else self.run,), factor)

    def of_difference(self, left: str, right: str, factor: float = 1.0) -> tuple[SeedSpread, ...]:
        """Return the parts of the spread of a difference of two arms' runs; empty where nothing is known."""
        if self.run is None or self.difference is None:
            return ()
        several = len(self.each) > 2
        return _times((self._own(left), self._own(right)) if several else (self.difference,), factor)

    def _own(self, label: str) -> SeedSpread:
        assert self.run is not None, "something is known"
        return self.each.get(label, SeedSpread(self.run.variance, PRIOR))


def _times(spreads: tuple[SeedSpread, ...], factor: float) -> tuple[SeedSpread, ...]:
    return tuple(SeedSpread(one.variance * factor**2, one.df) for one in spreads)


class Wild(NamedTuple):
    """An arm whose trainings lie further apart than those of the others."""

    label: str
    sd: float
    """Standard deviation of its runs."""
    others: float
    """That of the others' runs, pooled."""
    p: float
    """Of the ratio of variances, Holm-corrected over arms."""


def pooled(runs: Mapping[str, Mapping[int, float]]) -> Pooled:
    """Return the spread of a quantity over trainings.

    Args:
        runs: for each arm, seed to the value of its run.
    """
    several = {label: found for label, found in runs.items() if len(found) > 1}
    if not several:
        return Pooled()
    arms = {label: place for place, label in enumerate(several)}
    seeds = {
        seed: place for place, seed in enumerate(dict.fromkeys(seed for found in several.values() for seed in found))
    }
    cells = [(arms[label], seeds[seed], value) for label, found in several.items() for seed, value in found.items()]
    values = np.array([value for *_, value in cells])
    values = values - values.mean()
    of_arm, of_seed = np.zeros((len(cells), len(arms))), np.zeros((len(cells), len(seeds)))
    for row, (arm, seed, _) in enumerate(cells):
        of_arm[row, arm] = of_seed[row, seed] = 1.0
    within, df_within = _residual(of_arm, values)
    rest, df_rest = _residual(np.hstack([of_arm, of_seed]), values)
    df_seed = df_within - df_rest
    shared = (within - rest) / df_seed if df_seed else 0.0
    own = rest / df_rest if df_rest else 0.0
    weakness = df_seed * shared**2 + df_rest * own**2
    run = SeedSpread(within / df_within, within**2 / weakness if weakness > 0 else float(df_within))
    difference = SeedSpread(2 * own, float(df_rest)) if df_rest else SeedSpread(2 * run.variance, run.df)
    if _alike([list(found.values()) for found in several.values()]):
        return Pooled(run, difference)
    prior = PRIOR if len(several) > 2 else 0.0
    each = {}
    for label, found in several.items():
        df = len(found) - 1.0
        variance = (prior * run.variance + df * float(np.var(list(found.values()), ddof=1))) / (prior + df)
        each[label] = SeedSpread(variance, prior + df)
    return Pooled(run, difference, each)


def _alike(runs: Sequence[Sequence[float]]) -> bool:
    """Say whether the variances of some arms may be the same, by Bartlett's test."""
    variances = np.array([np.var(values, ddof=1) for values in runs])
    df = np.array([len(values) - 1.0 for values in runs])
    mean = float((df * variances).sum() / df.sum())
    if len(runs) < 2 or mean <= 0:
        return True
    if np.any(variances <= 0):
        return False
    scale = 1 + ((1 / df).sum() - 1 / df.sum()) / (3 * (len(runs) - 1))
    statistic = (df.sum() * np.log(mean) - (df * np.log(variances)).sum()) / scale
    return bool(chdtrc(len(runs) - 1, statistic) >= UNLIKE)


def _residual(design: np.ndarray, values: np.ndarray) -> tuple[float, int]:
    """Return the sum of squares that a design leaves, and its degrees of freedom."""
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(((values - design @ fitted) ** 2).sum()), len(values) - int(rank)


def wild_arms(runs: Mapping[str, Mapping[int, float]]) -> tuple[Wild, ...]:
    """Return the arms whose trainings lie further apart than those of all others together.

    Each arm's variance over the pooled variance of the others is compared with Fisher's F, one-sided, and the p-values
    are Holm-corrected over arms. With two or three seeds only a much wilder arm is seen.

    Args:
        runs: for each arm, seed to the value of its run.
    """
    spread = {
        label: (float(np.var(list(found.values()), ddof=1)), len(found) - 1)
        for label, found in runs.items()
        if len(found) > 1
    }
    rows = []
    for label, (variance, df) in spread.items():
        others = [one for other, one in spread.items() if other != label]
        total = sum(d for _, d in others)
        rest = sum(v * d for v, d in others) / total if total else 0.0
        if rest > 0:
            p = float(fdtrc(df, total, variance / rest))
            rows.append((label, float(np.sqrt(variance)), float(np.sqrt(rest)), p))
    corrected = holm([p for *_, p in rows])
    return tuple(
        Wild(label, sd, others, p)
        for (label, sd, others, _), p in zip(rows, corrected, strict=True)
        if p is not None and p < NAMED
    )
