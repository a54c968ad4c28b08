"""Safe: no transformer block further from the pretrained model than the first ones are on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from peft_arena.methods.base import Capability
from peft_arena.paths.base import PRETRAINED, RuleCard, RuleConfig
from peft_arena.paths.match import MatchConfig, MatchRule


class SafeConfig(MatchConfig):
    """Settings of the rule."""

    blocks: int = Field(default=5, ge=1)
    """The target is the mean strength of the first so many changed blocks; of all, if there are fewer."""


class Safe(MatchRule):
    """Scale each block that is stronger than the mean of the first few down to that mean; leave the others.

    A block of zero strength, which the method did not touch, is not among the first few.
    """

    Config: ClassVar[type[RuleConfig]] = SafeConfig
    config: SafeConfig
    card: ClassVar[RuleCard] = RuleCard(
        name="safe",
        title="Safe",
        paper="PEFT-Arena, 2026, layer-wise rewinding of OFT: match the average of the first five layers",
        url="https://arxiv.org/abs/2605.28819",
        description="Blocks that are stronger than the first ones are on average are scaled down to that.",
        zero=PRETRAINED,
        one="the tuned model with no block stronger than the first ones are on average",
        needs=frozenset({Capability.LINEAR_DELTA}),
        deviations=(
            "The paper leaves strength undefined: it is a setting here.",
            "The paper has OFT alone: here every method that changes weights, along its own way.",
            "Blocks below the target stay as they are: none is scaled up.",
        ),
    )

    def target(self, strengths: Sequence[float]) -> float:
        """Return the mean of the first; see :meth:`MatchRule.target`."""
        first = strengths[: self.config.blocks]
        return math.fsum(first) / len(first)
