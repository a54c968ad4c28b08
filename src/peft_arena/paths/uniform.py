"""The same factor everywhere: the method's own path as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peft_arena.paths.base import PRETRAINED, TUNED, Plan, Progress, Rule, RuleCard

if TYPE_CHECKING:
    from peft_arena.weights.effective import EffectiveWeights


class Uniform(Rule):
    """Every parameter at the same factor."""

    card: ClassVar[RuleCard] = RuleCard(
        name="uniform",
        title="Uniform",
        paper="Wortsman et al., 2022, Robust fine-tuning of zero-shot models (WiSE-FT), for the straight way",
        url="https://arxiv.org/abs/2109.01903",
        description="The same factor everywhere.",
        zero=PRETRAINED,
        one=TUNED,
    )

    def plan(self, weights: EffectiveWeights, progress: Progress) -> Plan:
        """Measure nothing."""
        return weights.interpolated
