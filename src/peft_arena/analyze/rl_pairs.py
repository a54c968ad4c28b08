"""One method with one configuration, trained in two ways: what supervised and reinforcement learning do apart.

The comparisons are those of :mod:`peft_arena.analyze.compare`, with the same corrected p-values: both are relative to
the same pretrained model, paired by seed and item. Arms that began at another run are in no pair: they were trained
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from peft_arena.analyze.compare import AXES, Comparison, both_ways
from peft_arena.analyze.effects import ArmEffects, estimate_summary
from peft_arena.core.specs import RLSpec

_SFT = "sft"


@dataclass(frozen=True, eq=False)
class ObjectivePair:
    """Two arms that differ in how they were trained; left is the one of reinforcement learning."""

    method: str
    comparison: Comparison
    """Left minus right."""
    objectives: tuple[str, str]
    rates: tuple[float | None, float | None]
    """Learning rates of left and right."""

    def summary(self) -> dict[str, Any]:
        """Return the pair as JSON values."""
        pair = self.comparison
        return {
            "method": self.method,
            "left": pair.left,
            "right": pair.right,
            "objectives": list(self.objectives),
            "learning_rates": list(self.rates),
            **{
                axis: {"difference": estimate_summary(pair.on(axis).estimate), **pair.on(axis).summary()}
                for axis in AXES
            },
        }


def objective_pairs(arms: Sequence[ArmEffects], comparisons: Sequence[Comparison]) -> tuple[ObjectivePair, ...]:
    """Return every pair of arms with the same method and configuration but another objective.

    Arms that began at another run's weights are left out.

    Args:
        arms: of one target.
        comparisons: of every pair of them.
    """
    table = both_ways(comparisons)
    found = [sides for one, other in combinations(arms, 2) if (sides := _sides(one, other)) is not None]
    return tuple(
        ObjectivePair(
            method=left.evidence.arm.method,
            comparison=table[left.label, right.label],
            objectives=(left.evidence.arm.objective, right.evidence.arm.objective),
            rates=(left.evidence.arm.learning_rate, right.evidence.arm.learning_rate),
        )
        for left, right in found
    )


def _sides(one: ArmEffects, other: ArmEffects) -> tuple[ArmEffects, ArmEffects] | None:
    """Return two arms with supervised fine-tuning on the right; None if they do not belong together."""
    first, second = one.evidence.arm, other.evidence.arm
    if first.runs[0].method != second.runs[0].method or first.objective == second.objective:
        return None
    if any(isinstance(run.train, RLSpec) and run.train.init_from for run in (*first.runs, *second.runs)):
        return None
    return (other, one) if first.objective == _SFT else (one, other)
