"""What an arm gained on its target and what it kept of the base model: oriented, paired, with intervals.

Differences are tuned minus base, turned so that positive is better; fractions are given in points (1 point = 0.01).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_arena.analyze.evidence import ArmEvidence, Evidence, TaskInfo
from peft_arena.analyze.paired import Contrast, Estimate, Resamples, Scores, difference, estimate, mean_of
from peft_arena.core.specs import EvalSpec

POINTS, SHARE = "points", "share"


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


def oriented(task: TaskInfo, left: Scores, right: Scores, resamples: Resamples) -> Contrast | None:
    """Return left minus right on a task, positive where left is better, in :func:`unit_of` the task."""
    found = difference(left, right, resamples, task.spec.id)
    return None if found is None else found.turned(task.sign * (100.0 if task.is_fraction else 1.0))


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
        "left_out": found.left_out,
        "covers": "items only" if found.seeds == 1 else "seeds and items",
    }


def arm_effects(evidence: Evidence, arm: ArmEvidence, resamples: Resamples) -> ArmEffects:
    """Return the gain and the retention of one arm."""
    retention = [
        effect
        for spec in evidence.view.retention
        if (effect := _task_effect(evidence, arm, spec, resamples)) is not None
    ]
    contrast, missing = _mean_contrast(evidence, arm, resamples)
    return ArmEffects(
        evidence=arm,
        gain=_task_effect(evidence, arm, arm.arm.target, resamples),
        retention=tuple(retention),
        mean=None if contrast is None else estimate(contrast, resamples, POINTS),
        mean_missing=missing,
    )


def complete_seeds(evidence: Evidence, arm: ArmEvidence) -> tuple[int, ...]:
    """Return the seeds of an arm that answered every fraction task of the retention set."""
    tasks = [task for spec in evidence.view.retention if (task := evidence.tasks.get(spec.id)) and task.is_fraction]
    scores = [arm.scores.get(task.spec.id) for task in tasks]
    return tuple(
        seed for seed in arm.arm.seeds if tasks and all(score is not None and seed in score.seeds for score in scores)
    )


def retention_contrast(
    evidence: Evidence, left: ArmEvidence, right: ArmEvidence | None, resamples: Resamples
) -> Contrast | None:
    """Return the mean over the retention tasks that are fractions of left minus right (None: minus base), in points.

    Only seeds with every task are used, so that all tasks of the mean have the same seeds.
    """
    seeds = [
        seed for seed in complete_seeds(evidence, left) if right is None or seed in complete_seeds(evidence, right)
    ]
    parts = []
    for spec in evidence.view.retention:
        task = evidence.tasks.get(spec.id)
        if task is None or not task.is_fraction:
            continue
        other = evidence.base_scores.get(spec.id) if right is None else right.scores.get(spec.id)
        if not seeds or other is None:
            return None
        mine = left.scores[spec.id]
        part = oriented(task, _only(mine, seeds), other if right is None else _only(other, seeds), resamples)
        if part is None or part.seeds != tuple(seeds):
            return None
        parts.append(part)
    return mean_of(parts)


def _only(scores: Scores, seeds: list[int]) -> Scores:
    return scores if list(scores.seeds) == seeds else scores.take(seeds)


def _mean_contrast(evidence: Evidence, arm: ArmEvidence, resamples: Resamples) -> tuple[Contrast | None, str]:
    """Return the mean retention of an arm, or why there is none."""
    retention = evidence.view.retention
    unknown = [evidence.labels[spec.id] for spec in retention if spec.id not in evidence.tasks]
    if unknown:
        return None, f"no run was evaluated on {', '.join(unknown)}"
    tasks = [evidence.tasks[spec.id] for spec in retention if evidence.tasks[spec.id].is_fraction]
    if not tasks:
        return None, "no retention task is a fraction"
    without = [task.label for task in tasks if task.spec.id not in evidence.base_scores]
    if without:
        return None, f"the base model was not evaluated on {', '.join(without)}"
    lacking = [task.label for task in tasks if task.spec.id not in arm.scores]
    if lacking:
        return None, f"not evaluated on {', '.join(lacking)}"
    if not complete_seeds(evidence, arm):
        return None, "no seed was evaluated on every retention task"
    found = retention_contrast(evidence, arm, None, resamples)
    return found, "" if found is not None else "a task has no answer that both models' runs scored"


def _task_effect(evidence: Evidence, arm: ArmEvidence, spec: EvalSpec, resamples: Resamples) -> TaskEffect | None:
    task = evidence.tasks.get(spec.id)
    if task is None:
        return None
    mine, base = arm.scores.get(spec.id), evidence.base_scores.get(spec.id)
    if mine is None:
        return TaskEffect(task, None if base is None else _finite(base.means()), None, None, None)
    if base is None:
        return TaskEffect(task, None, _finite(mine.means()), None, None)
    found = oriented(task, mine, base, resamples)
    if found is None:
        return TaskEffect(task, _finite(base.means()), _finite(mine.means()), None, None)
    paired = base.take(list(found.seeds))  # type: ignore[arg-type]
    used = mine.scored & paired.scored
    return TaskEffect(
        task=task,
        base=_finite(paired.means(used)),
        tuned=_finite(mine.means(used)),
        delta=estimate(found, resamples, unit_of(task)),
        kept=_kept(task, mine, base, resamples),
    )


def _finite(means: np.ndarray) -> float | None:
    value = float(means.mean())
    return value if np.isfinite(value) else None


def _kept(task: TaskInfo, mine: Scores, base: Scores, resamples: Resamples) -> Estimate | None:
    """Share of the base score above chance that is left: (tuned - chance) / (base - chance).

    Defined for fractions where higher is better, with a chance level that the base beats by more than two standard
    errors: below that the denominator is noise.
    """
    if not task.is_fraction or task.better != "higher" or task.chance is None:
        return None
    seeds = [seed for seed in mine.seeds if seed is not None]
    paired = base.take(seeds)
    used = mine.scored & paired.scored
    old = resamples.means(base, seeds, used, task.spec.id) - task.chance
    above = paired.means(used) - task.chance
    if np.any(above <= 2 * np.nanstd(old, axis=0)) or np.any(above <= 0):
        return None
    new = resamples.means(mine, seeds, used, task.spec.id) - task.chance
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.where(old > 0, new / old, np.nan)
    contrast = Contrast(
        seeds=tuple(seeds),
        per_seed=(mine.means(used) - task.chance) / above,
        matrix=matrix,
        items=int(used.any(axis=0).sum()),
        left_out=0,
    )
    return estimate(contrast, resamples, SHARE)
