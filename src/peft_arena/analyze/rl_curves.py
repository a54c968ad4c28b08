"""What the log of a reinforcement learning says of one run and of the runs of an arm: curves, and what changed.

Start and end of a quantity are its means over the first and the last tenth of the log entries that have it. The
interval of the change is Student's t over seeds, paired within each run; one seed gives none. Curves are means over the
steps that every run of the arm has logged, with the range over runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np

from peft_arena.analyze.estimate import LEVEL
from peft_arena.core.specs import RLSpec
from peft_arena.store.records import LogEntry, RolloutEntry, TrainingRecord

TENTH = 0.1
"""Share of the log entries that the start and the end of a quantity are means over."""


class Quantity(NamedTuple):
    """Something that is followed step by step."""

    name: str
    title: str
    unit: str
    read: Callable[[LogEntry], float | None]


def _of_rollout(read: Callable[[RolloutEntry], float | None]) -> Callable[[LogEntry], float | None]:
    return lambda entry: None if entry.rollout is None else read(entry.rollout)


def _of_new(read: Callable[[RolloutEntry], float]) -> Callable[[LogEntry], float | None]:
    """Read what is said of completions: None where there was no new rollout, since the entry repeats the last one's."""
    return _of_rollout(lambda found: read(found) if found.completions else None)


def _clipped(found: RolloutEntry) -> float | None:
    return None if found.clip_low is None or found.clip_high is None else found.clip_low + found.clip_high


QUANTITIES = (
    Quantity("reward", "reward", "weighted sum of the rewards", _of_new(lambda found: found.reward)),
    Quantity("validation_reward", "validation reward", "mean task score", lambda entry: entry.validation_reward),
    Quantity("length", "length", "tokens per completion", _of_new(lambda found: found.length)),
    Quantity("ended", "ended before the limit", "fraction of completions", _of_new(lambda found: found.ended)),
    Quantity("entropy", "entropy", "nats per token", _of_rollout(lambda found: found.entropy)),
    Quantity("clipped", "clipped", "fraction", _of_rollout(_clipped)),
    Quantity("kl", "KL from the reference", "nats per token", _of_rollout(lambda found: found.kl)),
    Quantity("zero_variance", "groups of equal reward", "fraction of groups", _of_new(lambda f: f.zero_variance)),
)
"""What is followed, in the order it is shown; ``clipped`` is the lower and the upper clip fraction together."""
BY_NAME: Mapping[str, Quantity] = {quantity.name: quantity for quantity in QUANTITIES}


def ends_of(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the means over the first and the last tenth of some values; None without any."""
    share = ceil(TENTH * len(values))
    return (float(np.mean(values[:share])), float(np.mean(values[-share:]))) if values else None


@dataclass(frozen=True, eq=False)
class RLRun:
    """One finished run."""

    seed: int
    run_id: str
    spec: RLSpec
    training: TrainingRecord

    def series(self, name: str) -> dict[int, float]:
        """Return a quantity by step; empty where it was never logged."""
        read = BY_NAME[name].read
        return {entry.step: value for entry in self.training.log if (value := read(entry)) is not None}

    def ends(self, name: str) -> tuple[float, float] | None:
        """Return the start and the end of a quantity; None where it was never logged."""
        return ends_of(list(self.series(name).values()))

    def rollouts(self) -> list[RolloutEntry]:
        """Return what was logged of new rollouts, in order."""
        return [found for entry in self.training.log if (found := entry.rollout) is not None and found.completions]


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps that every run has logged; all of the same length."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    """Least over the runs."""
    high: tuple[float, ...]
    runs: int


@dataclass(frozen=True)
class Change:
    """A quantity at the start and at the end, as means over runs."""

    start: float
    end: float
    low: float | None
    """Lower end of the 95 % interval of end minus start, paired over seeds; None with one seed."""
    high: float | None
    seeds: int

    @property
    def value(self) -> float:
        """End minus start."""
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class RLArm:
    """One arm that was trained by reinforcement learning."""

    label: str
    place: int
    """Among all arms of the target; gives the arm its colour and mark."""
    objective: str
    planned: int
    runs: tuple[RLRun, ...]
    """The finished ones."""
    origin: str
    """Which runs training began at, in words; empty where that is the pretrained model."""

    def curve(self, name: str) -> Curve | None:
        """Return the mean and range of a quantity over the runs that logged it; None where there is none."""
        series = [found for run in self.runs if (found := run.series(name))]
        steps = sorted(set.intersection(*(set(found) for found in series))) if series else []
        if not steps:
            return None
        values = np.array([[found[step] for step in steps] for found in series])
        columns = (values.mean(axis=0), values.min(axis=0), values.max(axis=0))
        mean, low, high = (tuple(map(float, column)) for column in columns)
        return Curve(tuple(steps), mean, low, high, len(series))

    def change(self, name: str) -> Change | None:
        """Return start and end of a quantity over the runs that logged it; None where there is none."""
        ends = np.array([found for run in self.runs if (found := run.ends(name)) is not None])
        if not len(ends):
            return None
        start, end = (float(value) for value in ends.mean(axis=0))
        low, high = _interval(ends[:, 1] - ends[:, 0])
        return Change(start, end, low, high, len(ends))


def _interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a mean over seeds by Student's t; none for one seed."""
    from scipy import stats

    if len(values) < 2:
        return None, None
    error = float(values.std(ddof=1)) / sqrt(len(values))
    half = float(stats.t.isf((1 - LEVEL) / 2, len(values) - 1)) * error
    return float(values.mean()) - half, float(values.mean()) + half
