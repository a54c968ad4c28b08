"""What an arm gained on its target and what it kept of the base model: oriented, paired, with intervals.

Differences are tuned minus base, turned so that positive is better; fractions are given in points (1 point = 0.01).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peft_arena.analyze.estimate import Estimate, estimate
from peft_arena.analyze.evidence import ArmEvidence, Evidence, TaskInfo
from peft_arena.analyze.paired import Contrast, Scores, difference, mean_of, share_kept
from peft_arena.analyze.seed_spread import Pooled, SeedSpread, pooled
from peft_arena.core.measure import POINTS
from peft_arena.core.specs import EvalSpec, RunSpec

SHARE = "share"


@dataclass(frozen=True, eq=False)
class TaskEffect:
    """One arm on one task."""

    task: TaskInfo
    base: float | None
    """Base score in the task's own unit, over the answers that are compared."""
    tuned: float | None
    """Mean over seeds of the arm's score, over the same answers."""
    delta: Estimate | None
    """Oriented difference, in points for fractions and in the task's own unit otherwise."""
    kept: Estimate | None
    """Share of the base score above chance that is left; None where that has no meaning."""
    contrast: Contrast | None = None
    """What ``delta`` was estimated from."""


@dataclass(frozen=True, eq=False)
class ArmEffects:
    """One arm on its target and on every retention task."""

    evidence: ArmEvidence
    gain: TaskEffect | None
    retention: tuple[TaskEffect, ...]
    """Retention tasks that could be compared, in the study's order."""
    mean: Estimate | None
    """Mean oriented difference over all retention tasks that are fractions, each with the same weight, in points."""
    mean_missing: str
    """Why there is no mean; empty where there is one."""
    mean_contrast: Contrast | None = None
    """What ``mean`` was estimated from."""

    @property
    def label(self) -> str:
        """The arm's label."""
        return self.evidence.arm.label

    @property
    def worst(self) -> TaskEffect | None:
        """The fraction task with the largest loss."""
        known = [effect for effect in self.retention if effect.task.is_fraction and effect.delta is not None]
        return min(known, key=lambda effect: effect.delta.value if effect.delta else 0.0, default=None)


def unit_of(task: TaskInfo) -> str:
    """Return the unit differences on a task are given in."""
    return POINTS if task.is_fraction else task.unit


def _turn(task: TaskInfo) -> float:
    """Return what a difference of scores is multiplied with, to be in its unit and positive where left is better."""
    return task.sign * (100.0 if task.is_fraction else 1.0)


def oriented(task: TaskInfo, left: Scores, right: Scores) -> Contrast | None:
    """Return left minus right on a task, positive where left is better, in :func:`unit_of` the task."""
    found = difference(left, right, task.key, fraction=task.is_fraction)
    return None if found is None else found.times(_turn(task))


class Spreads:
    """How far trainings of a target's arms lie apart, on each task and on mean retention."""

    def __init__(self, evidence: Evidence, arms: Sequence[ArmEvidence]) -> None:
        """Refer to the arms of one target."""
        self._evidence = evidence
        self._arms = arms
        self._made = {arm.arm.label: _without_seed(arm.arm.runs[0]) for arm in arms}
        self._known: dict[str, Pooled] = {}
        """By evaluation id; under the empty name that of mean retention."""

    def runs_on(self, task: TaskInfo) -> dict[str, dict[int, float]]:
        """Return the value of each run on a task by arm and seed, in the unit of its differences."""
        found = {arm.arm.label: arm.scores.get(task.key) for arm in self._arms}
        return {label: scores.times(_turn(task)).by_seed() for label, scores in found.items() if scores is not None}

    def retention_runs(self) -> dict[str, dict[int, float]]:
        """Return the mean over the retention tasks that are fractions of each run, by arm and seed, in points."""
        by_task = [self.runs_on(task) for task in _averaged(self._evidence)]
        found = {}
        for arm in self._arms:
            each = [runs.get(arm.arm.label, {}) for runs in by_task]
            seeds = complete_seeds(self._evidence, arm)
            if each and seeds:
                means = {seed: float(np.mean([one[seed] for one in each if seed in one])) for seed in seeds}
                found[arm.arm.label] = {seed: value for seed, value in means.items() if np.isfinite(value)}
        return found

    def of_task(self, task: TaskInfo) -> Pooled:
        """Return the spread of all arms on a task."""
        if task.key not in self._known:
            self._known[task.key] = self._pooled(self.runs_on(task))
        return self._known[task.key]

    def of_retention(self) -> Pooled:
        """Return the spread of all arms in mean retention."""
        if "" not in self._known:
            self._known[""] = self._pooled(self.retention_runs())
        return self._known[""]

    def _pooled(self, runs: dict[str, dict[int, float]]) -> Pooled:
        """Pool the spread; arms that differ in their seeds only (an A/A pair) are one arm under several labels."""
        first = {label: next(one for one in runs if self._made[one] == self._made[label]) for label in runs}
        merged: dict[str, dict[int, float]] = {}
        for label, found in runs.items():
            merged.setdefault(first[label], {}).update(found)
        known = pooled(merged)
        if len(merged) == len(runs):
            return known
        each = {label: known.each[first[label]] for label in runs if first[label] in known.each}
        return replace(known, each=each)

    def declared(self, axis: str, unit: str, sides: int) -> SeedSpread | None:
        """Return what the study declares of an axis, for one run or a difference of two; None where it says nothing."""
        seed_sd = self._evidence.view.seed_sd
        if seed_sd is None or (axis == "gain" and unit != seed_sd.unit):
            return None
        sd = seed_sd.target if axis == "gain" else seed_sd.retention
        return SeedSpread(sides * sd**2, np.inf if seed_sd.runs is None else float(seed_sd.runs - 1))


def _without_seed(run: RunSpec) -> str:
    """Return what a run is, whatever its seed."""
    return run.model_copy(update={"seed": 0}).id


def estimate_summary(found: Estimate | None) -> dict[str, Any] | None:
    """Return an estimate as JSON values; None stays None."""
    if found is None:
        return None
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "stderr": found.stderr,
        "p": found.p,
        "unit": found.unit,
        "seeds": found.seeds,
        "items": found.items,
        "groups": found.units,
        "left_out": found.left_out,
        "unscored_share": found.unscored,
        "holds_for_any_unscored": found.bounded,
        "covers": found.covers,
        "no_interval": found.missing or None,
    }


def arm_effects(evidence: Evidence, arm: ArmEvidence, spreads: Spreads) -> ArmEffects:
    """Return the gain and the retention of one arm."""
    retention = [
        effect
        for spec in evidence.view.retention
        if (effect := _task_effect(evidence, arm, spec, spreads, "")) is not None
    ]
    contrast, missing = _mean_contrast(evidence, arm)
    mean = None
    if contrast is not None:
        declared = spreads.declared("retention", POINTS, 1)
        mean = estimate(contrast, POINTS, spread=spreads.of_retention().of_run(arm.arm.label), declared=declared)
    return ArmEffects(
        evidence=arm,
        gain=_task_effect(evidence, arm, arm.arm.target, spreads, "gain"),
        retention=tuple(retention),
        mean=mean,
        mean_missing=missing,
        mean_contrast=contrast,
    )


def _averaged(evidence: Evidence) -> list[TaskInfo]:
    """Return the retention tasks that go into the mean."""
    found = (evidence.tasks.get(spec.id) for spec in evidence.view.retention)
    return [task for task in found if task is not None and task.is_fraction]


def complete_seeds(evidence: Evidence, arm: ArmEvidence) -> tuple[int, ...]:
    """Return the seeds of an arm that answered every fraction task of the retention set."""
    scores = [arm.scores.get(task.key) for task in _averaged(evidence)]
    return tuple(
        seed for seed in arm.arm.seeds if scores and all(score is not None and seed in score.seeds for score in scores)
    )


def retention_contrast(evidence: Evidence, left: ArmEvidence, right: ArmEvidence | None) -> Contrast | None:
    """Return the mean over the retention tasks that are fractions of left minus right (None: minus base), in points.

    Only seeds with every task are used, so that all tasks of the mean have the same seeds.
    """
    seeds = [
        seed for seed in complete_seeds(evidence, left) if right is None or seed in complete_seeds(evidence, right)
    ]
    parts = []
    for task in _averaged(evidence):
        key = task.key
        other = evidence.base_scores.get(key) if right is None else right.scores.get(key)
        if not seeds or other is None:
            return None
        part = oriented(task, left.scores[key].take(seeds), other if right is None else other.take(seeds))
        if part is None or part.seeds != tuple(seeds):
            return None
        parts.append(part)
    return mean_of(parts)


def _mean_contrast(evidence: Evidence, arm: ArmEvidence) -> tuple[Contrast | None, str]:
    """Return the mean retention of an arm, or why there is none."""
    retention = evidence.view.retention
    unknown = [evidence.labels[spec.id] for spec in retention if spec.id not in evidence.tasks]
    if unknown:
        return None, f"no run was evaluated on {', '.join(unknown)}"
    tasks = _averaged(evidence)
    if not tasks:
        return None, "no retention task is a fraction"
    without = [task.label for task in tasks if task.key not in evidence.base_scores]
    if without:
        return None, f"the base model was not evaluated on {', '.join(without)}"
    lacking = [task.label for task in tasks if task.key not in arm.scores]
    if lacking:
        return None, f"not evaluated on {', '.join(lacking)}"
    if not complete_seeds(evidence, arm):
        return None, "no seed was evaluated on every retention task"
    found = retention_contrast(evidence, arm, None)
    return found, "" if found is not None else "a task has no answer that both models' runs scored"


def _task_effect(
    evidence: Evidence, arm: ArmEvidence, spec: EvalSpec, spreads: Spreads, axis: str
) -> TaskEffect | None:
    """Return an arm's effect on a task; ``axis``: for which of the study's axes it is declared how runs spread."""
    task = evidence.tasks.get(spec.id)
    if task is None:
        return None
    mine, base = arm.scores.get(spec.id), evidence.base_scores.get(spec.id)
    if mine is None:
        return TaskEffect(task, None if base is None else _finite(base.means()), None, None, None)
    if base is None:
        return TaskEffect(task, None, _finite(mine.means()), None, None)
    found = oriented(task, mine, base)
    if found is None:
        return TaskEffect(task, _finite(base.means()), _finite(mine.means()), None, None)
    paired = base.take([seed for seed in found.seeds if seed is not None])
    used = mine.scored & paired.scored
    declared = spreads.declared(axis, unit_of(task), 1) if axis else None
    return TaskEffect(
        task=task,
        base=_finite(paired.means(used)),
        tuned=_finite(mine.means(used)),
        delta=estimate(found, unit_of(task), spread=spreads.of_task(task).of_run(arm.arm.label), declared=declared),
        kept=_kept(task, mine, base),
        contrast=found,
    )


def _finite(means: np.ndarray) -> float | None:
    value = float(means.mean())
    return value if np.isfinite(value) else None


def _kept(task: TaskInfo, mine: Scores, base: Scores) -> Estimate | None:
    """Share of the base score above chance that is left: (tuned - chance) / (base - chance).

    Defined for fractions where higher is better, with a chance level that the base beats by more than two standard
    errors: below that the denominator is noise.
    """
    if not task.is_fraction or task.better != "higher" or task.chance is None:
        return None
    found = share_kept(mine, base, task.chance, task.key)
    return None if found is None else estimate(found, SHARE)
