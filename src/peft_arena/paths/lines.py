"""LiNeS: the factor grows linearly with depth.

Differences from the paper are on the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from peft_arena.methods.targets import block_of
from peft_arena.paths.base import PRETRAINED, LayerRule, Progress, RuleCard, RuleConfig

if TYPE_CHECKING:
    from peft_arena.weights.effective import EffectiveWeights


class LinesConfig(RuleConfig):
    """Settings of the rule."""

    first: float = Field(default=0.0, ge=0, le=1)
    """Factor of the first block; the last has 1."""


class Lines(LayerRule):
    """Block l of L, from 0, gets first + (1 - first) l / (L - 1), times the global factor.

    This is Wang et al., 2024, lambda_l = alpha + beta (l - 1) / (L - 1) for l from 1, divided by alpha + beta, which
    is the global factor. The only block of a model of one has 1.

    All parameters of a block have its factor. Those outside blocks go by their place in the model's order: before the
    first block (embeddings) with the first, after it (final norm, output layer) with the last. An output layer that is
    tied to the embeddings is one with them.
    """

    Config: ClassVar[type[RuleConfig]] = LinesConfig
    config: LinesConfig
    card: ClassVar[RuleCard] = RuleCard(
        name="lines",
        title="LiNeS",
        paper="Wang et al., 2024, LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging",
        url="https://arxiv.org/abs/2410.17146",
        description="The factor grows linearly with depth, from `first` at the first block to 1 at the last.",
        zero=PRETRAINED,
        one="the tuned model with changes from `first` of theirs at the first block to all of it at the last",
        deviations=(
            "Parameters after the blocks have the factor of the last one; the authors' code gives the first one's to "
            "everything outside blocks.",
            "The factor goes along the method's own way; the paper's is the straight one.",
        ),
    )

    def refuses(self, weights: EffectiveWeights) -> str:
        """Return why there is no depth; empty if there is."""
        numbered = any(block_of(name) is not None for name in weights.parameters())
        return "" if numbered else "no parameter of the model is inside a numbered transformer block"

    def factors(self, weights: EffectiveWeights, progress: Progress) -> Mapping[str, float]:
        """Return the factor of every parameter; nothing is measured."""
        blocks = {name: block_of(name) for name in weights.parameters()}
        order = sorted({block for block in blocks.values() if block is not None})
        start, last = self.config.first, len(order) - 1
        depth = {block: place / last if last else 1.0 for place, block in enumerate(order)}
        found: dict[str, float] = {}
        here = 0.0  # depth of parameters outside blocks, as far as the model's order has come
        for name, block in blocks.items():
            if block is not None:
                here = 1.0
            found[name] = start + (1 - start) * (here if block is None else depth[block])
        return found
