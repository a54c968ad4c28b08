"""PiSSA: low-rank adaptation that starts from the principal singular components of each weight.

W0 = U S V^T is split into s B0 A0 (the largest ``rank`` components) and a residual, see :mod:`split`. The split is
ours, because peft's rounds the factors to the base's type and draws its fast SVD without a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.low_rank.split import SPLIT, SPLIT_DEVIATIONS, Factors, SplitMethod, balanced, principal

if TYPE_CHECKING:
    from torch import Tensor


class PissaConfig(RankConfig):
    """Settings of PiSSA. There is no dropout: it would drop principal components of the pretrained weight."""

    svd_iterations: int | None = Field(default=None, ge=1)
    """Power iterations of a fast randomised SVD; None computes the exact one, which takes minutes on large models."""

    alternatives: ClassVar[Mapping[str, Any]] = {**RankConfig.alternatives, "svd_iterations": 2}


class Pissa(SplitMethod):
    """PiSSA: LoRA that trains the principal part of each weight and freezes the rest."""

    Config: ClassVar[type[MethodConfig]] = PissaConfig
    config: PissaConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="pissa",
        title="PiSSA",
        family="low-rank",
        paper="Meng et al., 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation",
        url="https://arxiv.org/abs/2404.02948",
        capabilities=SPLIT,
        parameters="rank * sum over targets of (in + out)",
        equation="R + alpha / rank * lora_B @ lora_A",
        learning_rate=5e-5,
        micro_learning_rate=1e-3,
        random_init=False,
        deviations=(
            "no dropout: it would drop principal components of the pretrained weight",
            "exact SVD unless svd_iterations is given; then the seed draws the randomised one",
            *SPLIT_DEVIATIONS,
        ),
        description=(
            "Splits each target weight into its largest singular components, which train as B A, and a frozen residual."
        ),
    )

    def start(self, weight: Tensor) -> Factors:
        """Return the principal part of a weight as two factors of equal norm."""
        return balanced(*principal(weight, self.config.rank, self.config.svd_iterations), self.scale)
