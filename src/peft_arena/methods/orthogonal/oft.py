"""Orthogonal fine-tuning: every target's input is rotated block by block.

W = W0 R with R block-diagonal orthogonal, R = (I - Q)(I + Q)^-1 (Cayley) of a trained skew-symmetric Q, zero at the
start. This is the input-side form of Qiu et al., 2025 ("OFTv2"), which ``peft`` implements; the 2023 paper rotates the
output side. The transform is solved exactly, so R is a rotation however large Q is; ``peft`` by default replaces the
inverse by a truncated Neumann series, which is one only for small Q and costs less time in training.
COFT keeps Q within a ball: in every forward pass a block of Q whose Frobenius norm is above eps / sqrt(blocks) is
shrunk to it. Left out: peft's ``module_dropout`` (accepted there but never applied).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftMethod, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig, PathKind
from peft_arena.methods.divisors import check_divides, common_divisors
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

SAME_AS_NEXT = 3
"""peft 0.21.2 computes the same series for 3 terms as for 4."""


def distinct_terms(terms: int | None) -> int | None:
    """Return a number of terms of peft's Neumann series.

    Raises:
        ValueError: the number gives the same series as another.
    """
    if terms == SAME_AS_NEXT:
        raise ValueError("3 terms are computed as 4 by peft; ask for 2, 4 or more, or null for the exact transform")
    return terms


class OftConfig(AdaptedConfig):
    """Settings of OFT."""

    block_size: int = Field(default=32, ge=2)
    """Side of each rotation block; must divide the input size of every target."""
    neumann_terms: int | None = Field(default=None, ge=2)
    """Terms of the series that replaces the inverse in the Cayley transform; None solves it exactly. A series is good
    enough while Q stays small: with 5 terms R^T R is within 1e-5 of the identity up to about |Q| = 0.05 for each block
    (Frobenius norm), and at |Q| = 1 R is no rotation any more."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "block_size": 16,
        "neumann_terms": 5,
    }

    @field_validator("neumann_terms")
    @classmethod
    def _distinct(cls, terms: int | None) -> int | None:
        return distinct_terms(terms)


class CoftConfig(OftConfig):
    """Settings of COFT."""

    eps: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Largest Frobenius norm of a layer's Q, divided evenly: each of n blocks may have eps / sqrt(n)."""

    alternatives: ClassVar[Mapping[str, Any]] = {**OftConfig.alternatives, "eps": 1e-2}


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
        path=PathKind.CAYLEY,
        parameters="sum over targets of in * (block_size - 1) / 2",
        equation="W @ cayley(oft_R)",
        learning_rate=5e-4,
        micro_learning_rate=3e-3,
        micro_rl_learning_rate=1e-3,
        random_init=False,
        deviations=(
            "rotates the input side (OFTv2, arXiv 2506.19847), where the 2023 paper rotates the output side",
            "with neumann_terms the Cayley transform is a truncated series, and R no exact rotation; peft's default is "
            "5 terms, ours the exact transform",
            "no dropout (peft accepts one but never applies it)",
            "on a bfloat16 base the rotated input is rounded, and rotations below about 1e-3 lose part of their effect",
        ),
        description="Multiplies each target weight by a trained block-diagonal rotation of its input.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a block size that does not divide an input size."""
        layers = super().linears(model)
        check_divides("block_size", self.config.block_size, layers, "input")
        return layers

    def sizes(self, model: PreTrainedModel) -> list[int]:
        """Return the block sizes that divide the input size of every target."""
        return common_divisors(super().linears(model), "input")

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


class Coft(Oft):
    """COFT: OFT whose rotations stay near the identity."""

    Config: ClassVar[type[MethodConfig]] = CoftConfig
    config: CoftConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="coft",
        title="COFT",
        family="orthogonal",
        paper="Qiu et al., 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning; input-side form of 2025",
        url="https://arxiv.org/abs/2306.07280",
        capabilities=WEIGHT_ADAPTER,
        path=PathKind.CAYLEY,
        parameters="sum over targets of in * (block_size - 1) / 2",
        learning_rate=5e-4,
        micro_learning_rate=1e-2,
        random_init=False,
        deviations=(
            "rotates the input side (OFTv2, arXiv 2506.19847), where the 2023 paper rotates the output side",
            "with neumann_terms the Cayley transform is a truncated series, and R no exact rotation; peft's default is "
            "5 terms, ours the exact transform",
            "no dropout (peft accepts one but never applies it)",
            "on a bfloat16 base the rotated input is rounded, and rotations below about 1e-3 lose part of their effect",
            "eps is 0.5 unless given: the 6e-5 that peft has would leave the weights of a language model as they are",
        ),
        description="OFT with the rotation of each target kept within a distance of the identity that eps sets.",
    )

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's OFT configuration with the constraint."""
        config: Any = super().peft_config(patterns, seed)
        config.coft, config.eps = True, self.config.eps
        return config

    def finish(self, model: PeftModel) -> None:
        """Let a second projection change nothing, so that looking at a model does not move it."""
        from peft_arena.methods.layers import FirmRotation

        for layer in tuner_layers(model).values():
            layer.oft_R[ADAPTER].__class__ = FirmRotation
