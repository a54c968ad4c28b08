"""How far trainings of one arm with different seeds lie apart, by what all arms of a target show.

Two or three seeds say little about one arm's spread, and those of all arms together say more. With m the value of a
run, by arm and seed:

* *of one run*: the mean square within arms, for an arm against the base model;
* *of a difference*: twice the mean square that is left when arm and seed are taken out, for two arms with the same
  seeds. What a seed does to every arm alike, such as the order of the data, is not in it.

Both hold the noise of single answers as well. Where seeds move all arms together (Fisher's F at 10 %), many arms are no
more than one: the first then has two parts, of the seeds and of the rest, each with its own degrees of freedom. Where
all runs of each arm end alike, nothing is known: runs at the end of a scale say nothing of others.

Pooling is right where the arms' spreads are alike. Bartlett's test (1937) says whether they may be, at 10 % so that it
is not blind with few seeds. Where they are not, each arm has a variance of its own that is moderated by the pooled one
(as in Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3): d degrees of freedom of its own and
three of the pool, (3 pooled + d own) / (3 + d) with 3 + d; a difference has those of both arms. An arm that is named as
wilder than the others has no part in their pool and, from three seeds on, its own variance alone. The three are a
choice: more find more and are more often wrong of an arm that is wilder and not named; ``benchmarks/coverage.py``
counts how often with three. Of two arms neither is the wilder: each has its own, and their difference what the pairs by
seed show. Why benchmarks need the spread of seeds: Bouthillier et al. 2021 (arXiv 2103.03098).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import chdtrc, fdtrc

from peft_arena.analyze.holm import holm

UNLIKE = 0.1
"""p-value below which arms are not alike (Bartlett's test), and above which seeds do not move all arms together."""
SMALL = 1e-12
"""Share of a sum of squares that is rounding."""
PRIOR = 3.0
"""Degrees of freedom that the pooled variance has in an arm's own."""
OWN = 2.0
"""Degrees of freedom from which an arm that is named as wilder has its own variance alone."""
NAMED = 0.05
"""Corrected p-value below which an arm is named as wilder than the others."""


class SeedSpread(NamedTuple):
    """A variance between trainings, and the degrees of freedom it is known with."""

    variance: float
    df: float


@dataclass(frozen=True)
class Pooled:
    """The spread of a target's arms on one quantity; nothing is known where no arm has two seeds."""

    run: tuple[SeedSpread, ...] = ()
    """Parts of that of one run, the same for all arms."""
    difference: SeedSpread | None = None
    """Of two runs with the same seed."""
    each: Mapping[str, SeedSpread] = field(default_factory=dict)
    """Of one run of each arm, where arms are not alike; empty where they are."""

    def of_run(self, label: str, factor: float = 1.0) -> tuple[SeedSpread, ...]:
        """Return the spread of a run of an arm, times a number; empty where nothing is known."""
        return _times(self._own(label) if self.each else self.run, factor)

    def of_difference(self, left: str, right: str, factor: float = 1.0) -> tuple[SeedSpread, ...]:
        """Return the parts of the spread of a difference of two arms' runs; empty where nothing is known."""
        if self.difference is None:
            return ()
        several = len(self.each) > 2
        return _times((*self._own(left), *self._own(right)) if several else (self.difference,), factor)

    def _own(self, label: str) -> tuple[SeedSpread, ...]:
        own = self.each.get(label)
        return (SeedSpread(sum(one.variance for one in self.run), PRIOR) if own is None else own,)


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
    if within <= SMALL * float((values**2).sum()) or within <= SMALL**2:  # all runs of each arm end alike
        return Pooled()
    df_seed = df_within - df_rest
    shared = (within - rest) / df_seed if df_seed else 0.0
    own = rest / df_rest if df_rest else 0.0
    variance = within / df_within
    run: tuple[SeedSpread, ...] = (SeedSpread(variance, float(df_within)),)
    if df_seed and df_rest and shared > own and (own <= 0 or fdtrc(df_seed, df_rest, shared / own) < UNLIKE):
        parts = ((shared, df_seed), (own, df_rest))
        run = tuple(SeedSpread(one * df / df_within, float(df)) for one, df in parts if one > 0)
    difference = SeedSpread(2 * own, float(df_rest)) if df_rest else SeedSpread(2 * variance, float(df_within))
    alone = {label: (float(np.var(list(found.values()), ddof=1)), len(found) - 1.0) for label, found in several.items()}
    wild = {one.label for one in wild_arms(runs)}
    if not wild and _alike(list(alone.values())):
        return Pooled(run, difference)
    common = _common([one for label, one in alone.items() if label not in wild] or list(alone.values()))
    each = {}
    for label, (own_variance, df) in alone.items():
        is_own = label in wild and df >= OWN
        prior = 0.0 if is_own or len(several) < 3 else PRIOR
        middle = variance if label in wild else common.variance
        each[label] = SeedSpread((prior * middle + df * own_variance) / (prior + df), prior + df)
    return Pooled((common,), difference, each)


def _common(alone: Sequence[tuple[float, float]]) -> SeedSpread:
    total = sum(df for _, df in alone)
    return SeedSpread(sum(variance * df for variance, df in alone) / total, total)


def _alike(own: Sequence[tuple[float, float]]) -> bool:
    """Say whether the variances of some arms, with their degrees of freedom, may be the same, by Bartlett's test."""
    variances, df = np.array(own).T
    mean = float((df * variances).sum() / df.sum())
    if len(own) < 2 or mean <= 0:
        return True
    if np.any(variances <= 0):
        return False
    scale = 1 + ((1 / df).sum() - 1 / df.sum()) / (3 * (len(own) - 1))
    statistic = (df.sum() * np.log(mean) - (df * np.log(variances)).sum()) / scale
    return bool(chdtrc(len(own) - 1, statistic) >= UNLIKE)


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
