"""Gain and retention of an arm at the save points of its training, by the same statistics as at its end."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peft_arena.analyze.effects import ArmEffects, Spreads, arm_effects
from peft_arena.analyze.evidence import Evidence


@dataclass(frozen=True, eq=False)
class TrainingPoint:
    """One arm at one save point."""

    step: float
    """Mean over the runs that were evaluated there."""
    effects: ArmEffects


def along_training(evidence: Evidence, arm: ArmEffects, spreads: Spreads) -> tuple[TrainingPoint, ...]:
    """Return the arm at its evaluated save points, the last one included; empty if only the last was evaluated.

    How far trainings lie apart is taken from their ends.
    """
    earlier = arm.evidence.along
    if not earlier:
        return ()
    ends = [run.training.steps for run in arm.evidence.runs if run.training is not None and run.evaluations]
    points = [
        TrainingPoint(point.step, arm_effects(evidence, replace(arm.evidence, scores=point.scores), spreads))
        for point in earlier
    ]
    return (*points, TrainingPoint(sum(ends) / len(ends), arm)) if ends else tuple(points)
