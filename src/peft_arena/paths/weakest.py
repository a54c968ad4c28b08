"""Min: every transformer block as far from the pretrained model as the one that is nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from peft_arena.methods.base import Capability
from peft_arena.paths.base import PRETRAINED, RuleCard
from peft_arena.paths.match import MatchRule


class Weakest(MatchRule):
    """Scale every block down to the strength of the weakest one.

    A block of zero strength, which the method did not touch, is not the weakest.
    """

    card: ClassVar[RuleCard] = RuleCard(
        name="min",
        title="Min",
        paper="PEFT-Arena, 2026, layer-wise rewinding of OFT: match the minimum over layers",
        url="https://arxiv.org/abs/2605.28819",
        description="All blocks are scaled down to the strength of the weakest one.",
        zero=PRETRAINED,
        one="the tuned model with every block as strong as its weakest",
        needs=frozenset({Capability.LINEAR_DELTA}),
        deviations=(
            "The paper leaves strength undefined: it is a setting here.",
            "The paper has OFT alone: here every method that changes weights, along its own way.",
        ),
    )

    def target(self, strengths: Sequence[float]) -> float:
        """Return the smallest strength; see :meth:`MatchRule.target`."""
        return min(strengths)
