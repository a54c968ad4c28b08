"""Orthogonal fine-tuning: every target's input is rotated block by block.

W = W0 R with R block-diagonal orthogonal, R = (I - Q)(I + Q)^-1 (Cayley) of a trained skew-symmetric Q, zero at the
start. This is the input-side form of Qiu et al., 2025 ("OFTv2"), which ``peft`` implements; the 2023 paper rotates the
output side. By default the inverse is a truncated Neumann series, so R is orthogonal only approximately.
Left out: peft's ``module_dropout`` (accepted there but never applied) and the constrained variant COFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.targets import TargetConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

SAME_AS_NEXT = 3
"""peft 0.21.2 computes the same series for 3 terms as for 4."""


class OftConfig(TargetConfig):
    """Settings of OFT."""

    block_size: int = Field(default=32, ge=2)
    """Side of each rotation block; must divide the input size of every target."""
    neumann_terms: int | None = Field(default=5, ge=2)
    """Terms of the series that replaces the inverse in the Cayley transform; None solves it exactly."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **TargetConfig.alternatives,
        "block_size": 16,
        "neumann_terms": None,
    }

    @field_validator("neumann_terms")
    @classmethod
    def _distinct(cls, terms: int | None) -> int | None:
        if terms == SAME_AS_NEXT:
            raise ValueError("3 terms are computed as 4 by peft; ask for 2, 4 or more, or null for the exact transform")
        return terms


class Oft(PeftMethod):
    """OFT: a trained block-diagonal rotation in front of every target weight."""

    Config: ClassVar[type[MethodConfig]] = OftConfig
    config: OftConfig
    size: ClassVar[str | None] = "block_size"
    card: ClassVar[MethodCard] = MethodCard(
        name="oft",
        title="OFT",
        family="orthogonal",
        paper="Qiu et al., 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning; input-side form of 2025",
        url="https://arxiv.org/abs/2306.07280",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of in * (block_size - 1) / 2",
        learning_rate=5e-4,
        random_init=False,
        deviations=(
            "rotates the input side (OFTv2, arXiv 2506.19847), where the 2023 paper rotates the output side",
            "the Cayley transform is a Neumann series of neumann_terms terms unless neumann_terms is null",
            "no dropout (peft accepts one but never applies it) and no constrained variant",
        ),
        description="Multiplies each target weight by a trained block-diagonal rotation of its input.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a block size that does not divide an input size."""
        layers = super().linears(model)
        size = self.config.block_size
        for name, layer in layers.items():
            if layer.in_features % size:
                allowed = [str(n) for n in range(2, layer.in_features + 1) if layer.in_features % n == 0]
                raise UserError(
                    f"block_size: {size} does not divide the input size {layer.in_features} of {name}; "
                    f"divisors: {', '.join(allowed)}"
                )
        return layers

    def sizes(self, model: PreTrainedModel) -> list[int]:
        """Return the block sizes that divide the input size of every target."""
        from math import gcd

        layers = super().linears(model).values()
        common = gcd(*(layer.in_features for layer in layers))
        return [size for size in range(2, common + 1) if common % size == 0]

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(layer.in_features * (self.config.block_size - 1) // 2 for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's OFT configuration."""
        import peft

        terms = self.config.neumann_terms
        series: dict[str, Any] = {} if terms is None else {"num_cayley_neumann_terms": terms}
        return peft.OFTConfig(
            task_type=TASK,
            r=0,
            oft_block_size=self.config.block_size,
            use_cayley_neumann=terms is not None,
            target_modules=patterns,
            bias="none",
            **series,
        )
