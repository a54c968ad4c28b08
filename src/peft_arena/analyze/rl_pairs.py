"""One method with one configuration, trained in two ways: what supervised and reinforcement learning do apart.

The differences are those of :mod:`peft_arena.analyze.compare`, paired by seed and item and both relative to the same
pretrained model. Arms that began at another run are in no pair: they were trained twice. The p-values are
Holm-corrected over these pairs alone, on gain and on mean retention each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from peft_arena.analyze.compare import Axis, Comparison, Versus, both_ways, holm, told
from peft_arena.analyze.effects import ArmEffects, estimate_summary
from peft_arena.core.specs import RLSpec

_SFT = "sft"
_WORDS: dict[Axis, tuple[str, str, str, str]] = {
    "gain": ("gains significantly more", "gains significantly less", "no significant difference in gain", "gain"),
    "retention": (
        "keeps significantly more",
        "keeps significantly less",
        "no significant difference in mean retention",
        "mean retention",
    ),
}
"""What is said on each axis where left is better, worse, tied; and what the axis is called."""


@dataclass(frozen=True, eq=False)
class ObjectivePair:
    """Two arms that differ in how they were trained; left is the one of reinforcement learning."""

    method: str
    comparison: Comparison
    """Left minus right, p-values corrected over all such pairs of the target."""
    objectives: tuple[str, str]
    rates: tuple[float | None, float | None]
    """Learning rates of left and right."""

    @property
    def sentence(self) -> str:
        """The pair in one sentence, with differences and intervals."""
        pair = self.comparison
        return f"{pair.left} against {pair.right}: {_said('gain', pair.gain)}; {_said('retention', pair.retention)}."

    def summary(self) -> dict[str, Any]:
        """Return the pair as JSON values."""
        pair = self.comparison
        sides: tuple[tuple[str, Versus], ...] = (("gain", pair.gain), ("retention", pair.retention))
        return {
            "method": self.method,
            "left": pair.left,
            "right": pair.right,
            "objectives": list(self.objectives),
            "learning_rates": list(self.rates),
            **{
                axis: {
                    "difference": estimate_summary(versus.estimate),
                    "p_corrected": versus.p_corrected,
                    "verdict": versus.verdict,
                }
                for axis, versus in sides
            },
            "sentence": self.sentence,
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
    pairs = [table[left.label, right.label] for left, right in found]
    gains = holm([_p(pair.gain) for pair in pairs])
    kept = holm([_p(pair.retention) for pair in pairs])
    return tuple(
        ObjectivePair(
            method=left.evidence.arm.method,
            comparison=Comparison(
                pair.left,
                pair.right,
                Versus(pair.gain.estimate, gains[place]),
                Versus(pair.retention.estimate, kept[place]),
            ),
            objectives=(left.evidence.arm.objective, right.evidence.arm.objective),
            rates=(left.evidence.arm.learning_rate, right.evidence.arm.learning_rate),
        )
        for place, ((left, right), pair) in enumerate(zip(found, pairs, strict=True))
    )


def _sides(one: ArmEffects, other: ArmEffects) -> tuple[ArmEffects, ArmEffects] | None:
    """Return two arms with supervised fine-tuning on the right; None if they do not belong together."""
    first, second = one.evidence.arm, other.evidence.arm
    if first.runs[0].method != second.runs[0].method or first.objective == second.objective:
        return None
    if any(isinstance(run.train, RLSpec) and run.train.init_from for run in (*first.runs, *second.runs)):
        return None
    return (other, one) if first.objective == _SFT else (one, other)


def _p(versus: Versus) -> float | None:
    return None if versus.estimate is None else versus.estimate.p


def _said(axis: Axis, versus: Versus) -> str:
    more, less, tied, name = _WORDS[axis]
    if versus.estimate is None or versus.p_corrected is None:
        return f"{name} cannot be compared"
    words = {"better": more, "worse": less}.get(versus.verdict, tied)
    p = "p < 0.001" if versus.p_corrected < 0.001 else f"p = {versus.p_corrected:.3f}"
    return f"{words} ({told(versus.estimate)}, {p})"
