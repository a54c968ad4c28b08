"""MiSS: one small trained matrix repeated over shards of the input.

W = W0 + [D^T D^T ... ] with D (rank, out), zero at the start, repeated along the input; where the rank does not divide
the input size the last copy is cut. This is ``peft``'s default ("balance") form; its ``bat`` and ``mini`` forms are
other methods and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.targets import TargetConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class MissConfig(TargetConfig):
    """Settings of MiSS."""

    rank: int = Field(default=8, ge=2, multiple_of=2)
    """Inputs per shard, an even number; the change of weights has at most this rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the update is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {**TargetConfig.alternatives, "rank": 4, "dropout": 0.5}


class Miss(PeftMethod):
    """MiSS: the input is summed over shards and mapped by one trained matrix."""

    Config: ClassVar[type[MethodConfig]] = MissConfig
    config: MissConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="miss",
        title="MiSS",
        family="low-rank",
        paper="Kang and Yin, 2024, Balancing LoRA Performance and Efficiency with Simple Shard Sharing (MiSS)",
        url="https://arxiv.org/abs/2409.15371",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of rank * out",
        learning_rate=2e-4,
        random_init=False,
        deviations=("an input size that the rank does not divide is padded with zeros",),
        description="Adds one trained matrix, repeated over shards of the input, to each target weight.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.rank * layer.out_features for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's MiSS configuration."""
        import peft

        return peft.MissConfig(
            task_type=TASK,
            r=self.config.rank,
            miss_dropout=self.config.dropout,
            init_weights=True,
            target_modules=patterns,
            bias="none",
        )
