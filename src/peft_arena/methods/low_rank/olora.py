"""OLoRA: low-rank adaptation that starts from the QR decomposition of each weight.

W0 = Q R; B starts as the first ``rank`` columns of Q and A as the first rows of R, and s B0 A0 is taken out of the
frozen weight, see :mod:`split`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peft_arena.methods.base import MethodCard
from peft_arena.methods.low_rank.split import SPLIT, SPLIT_DEVIATIONS, Factors, SplitMethod

if TYPE_CHECKING:
    from torch import Tensor


class Olora(SplitMethod):
    """OLoRA: LoRA whose B starts orthonormal."""

    card: ClassVar[MethodCard] = MethodCard(
        name="olora",
        title="OLoRA",
        family="low-rank",
        paper="Büyükakyüz, 2024, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
        url="https://arxiv.org/abs/2406.01775",
        capabilities=SPLIT,
        parameters="rank * sum over targets of (in + out)",
        equation="R + alpha / rank * lora_B @ lora_A",
        learning_rate=1e-4,
        micro_learning_rate=1e-3,
        deviations=(
            "no dropout: it would drop a part of the pretrained weight",
            "s B0 A0 is taken out of the weight, as in peft: s = alpha / rank times the first part of Q R",
            *SPLIT_DEVIATIONS,
        ),
        description=(
            "Starts B and A from the first columns of Q and rows of R of each target weight Q R, and freezes the rest."
        ),
    )

    def start(self, weight: Tensor) -> Factors:
        """Return the first rows of R and columns of Q."""
        import torch

        q, r = torch.linalg.qr(weight)
        return Factors(r[: self.config.rank].clone(), q[:, : self.config.rank].clone())
