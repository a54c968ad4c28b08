"""MiSS: one small trained matrix repeated over shards of the input.

W = W0 + [D^T D^T ... ] with D (rank, out), zero at the start, repeated along the input; where the rank does not divide
the input size the last copy is cut. This is ``peft``'s default ("balance") form. ``bat``: D has a square block for
each ``rank`` outputs, and each block of W0 changes by itself times D, plus D. ``mini``: D (rank, mini_rank) is repeated
along the outputs too.

In training ``bat`` keeps the change of every target as a dense matrix for the backward pass, in float32 about as large
as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.divisors import check_divides, common_divisors
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class MissConfig(AdaptedConfig):
    """Settings of MiSS."""

    rank: int = Field(default=8, ge=2, multiple_of=2)
    """Inputs per shard, an even number; the change of weights has at most this rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the update is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": 4, "dropout": 0.5}


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
        micro_learning_rate=3e-3,
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


class MissBatConfig(AdaptedConfig):
    """Settings of MiSS in its "bat" form. peft's dropout is not applied there, so it is no setting."""

    rank: int = Field(default=8, ge=2)
    """Side of the blocks into which each weight is cut; must divide both sides of every target."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": 4}


class MissBat(PeftMethod):
    """MiSS, "bat": every block of a weight is changed by a trained block and by itself times it."""

    Config: ClassVar[type[MethodConfig]] = MissBatConfig
    config: MissBatConfig
    size: ClassVar[str | None] = "rank"
    card: ClassVar[MethodCard] = MethodCard(
        name="miss_bat",
        title="MiSS (bat)",
        family="weight-dependent",
        paper="Kang and Yin, 2024, Balancing LoRA Performance and Efficiency with Simple Shard Sharing (MiSS)",
        url="https://arxiv.org/abs/2409.15371",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of rank * out",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=False,
        deviations=(
            "no dropout: peft does not apply it in this form",
            "on a bfloat16 base the change is added to the layer's output, where peft computes with float32 weights",
        ),
        description="Cuts each target weight into blocks W_ij and adds W_ij D_i + D_i; D_i, one for each row, trains.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a block size that does not divide both sides."""
        layers = super().linears(model)
        check_divides("rank", self.config.rank, layers, "input", "output")
        return layers

    def sizes(self, model: PreTrainedModel) -> list[int]:
        """Return the block sizes that divide both sides of every target."""
        return common_divisors(super().linears(model), "input", "output")

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(self.config.rank * layer.out_features for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's MiSS configuration."""
        import peft

        return peft.MissConfig(
            task_type=TASK, r=self.config.rank, init_weights="bat", target_modules=patterns, bias="none"
        )

    def finish(self, model: PeftModel) -> None:
        """Let layers with a rounded weight add the change to their own output."""
        from peft_arena.methods.layers import use_changes

        use_changes(model)


class MissMiniConfig(MissConfig):
    """Settings of MiSS in its "mini" form."""

    mini_rank: int = Field(default=8, ge=1)
    """Outputs for which one column of D is trained; must divide the output size of every target."""

    alternatives: ClassVar[Mapping[str, Any]] = {**MissConfig.alternatives, "mini_rank": 4}


class MissMini(Miss):
    """MiSS, "mini": the trained matrix is repeated over shards of the output too."""

    Config: ClassVar[type[MethodConfig]] = MissMiniConfig
    config: MissMiniConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="miss_mini",
        title="MiSS (mini)",
        family="low-rank",
        paper="Kang and Yin, 2024, Balancing LoRA Performance and Efficiency with Simple Shard Sharing (MiSS)",
        url="https://arxiv.org/abs/2409.15371",
        capabilities=WEIGHT_ADAPTER,
        parameters="targets * rank * mini_rank",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=False,
        deviations=("an input size that the rank does not divide is padded with zeros",),
        description="Adds one small trained matrix, repeated over shards of input and output, to each target weight.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a mini_rank that does not divide an output size."""
        layers = super().linears(model)
        check_divides("mini_rank", self.config.mini_rank, layers, "output")
        return layers

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return len(self.linears(model)) * self.config.rank * self.config.mini_rank

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's MiSS configuration."""
        config: Any = super().peft_config(patterns, seed)
        config.init_weights, config.mini_r = "mini", self.config.mini_rank
        return config
