"""MiLoRA: low-rank adaptation that starts from the smallest singular components of each weight.

W0 = U S V^T is split into s B0 A0 (the smallest ``rank`` components) and the principal rest, which is frozen, see
:mod:`split`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peft_arena.methods.base import MethodCard
from peft_arena.methods.low_rank.split import SPLIT, SPLIT_DEVIATIONS, Factors, SplitMethod, balanced, smallest

if TYPE_CHECKING:
    from torch import Tensor


class Milora(SplitMethod):
    """MiLoRA: LoRA that trains the minor part of each weight and freezes the principal one."""

    card: ClassVar[MethodCard] = MethodCard(
        name="milora",
        title="MiLoRA",
        family="low-rank",
        paper="Wang et al., 2024, MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
        url="https://arxiv.org/abs/2406.09044",
        capabilities=SPLIT,
        parameters="rank * sum over targets of (in + out)",
        equation="R + alpha / rank * lora_B @ lora_A",
        learning_rate=3e-4,
        micro_learning_rate=3e-3,
        deviations=(
            "no dropout: it would drop components of the pretrained weight",
            "the product of the factors is scaled by alpha / rank, and they start so that it is the minor part exactly",
            *SPLIT_DEVIATIONS,
        ),
        description=(
            "Splits each target weight into its smallest singular components, which train as B A, and a frozen rest. "
            "Components whose singular value is exactly zero have no gradient and never train."
        ),
    )

    def start(self, weight: Tensor) -> Factors:
        """Return the minor part of a weight as two factors of equal norm."""
        return balanced(*smallest(weight, self.config.rank), self.scale)
