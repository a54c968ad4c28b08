"""Two reshaped low-rank changes: GraLoRA and DeLoRA.

GraLoRA cuts each weight into blocks x blocks tiles and adds a product of rank rank / blocks to each. Tiles share no
parameters; together they have as many as a LoRA of the same rank.
DeLoRA adds (lambda / rank) sum_i (b_i / |b_i|) (a_i / |a_i|)^T diag(w), w the column norms of the pretrained weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftMethod, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.frozen import FrozenMethod
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class GraloraConfig(RankConfig):
    """Settings of GraLoRA."""

    rank: int = Field(default=8, ge=2)
    """Sum of the ranks of one row of tiles, a multiple of ``blocks``; at most the smaller side of every target."""
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """The change is scaled by alpha / (rank + hybrid_rank)."""
    blocks: int = Field(default=2, ge=2)
    """Tiles along each side of a weight; must divide both. 1 would be LoRA and is refused."""
    hybrid_rank: int = Field(default=0, ge=0)
    """Rank of a plain LoRA beside the tiles; 0 for none."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the change is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **RankConfig.alternatives,
        "blocks": 4,
        "hybrid_rank": 2,
        "dropout": 0.5,
    }

    @model_validator(mode="after")
    def _whole_tiles(self) -> Self:
        if self.rank % self.blocks:
            raise ValueError(f"rank {self.rank} is not a multiple of blocks {self.blocks}")
        return self


class DeloraConfig(AdaptedConfig):
    """Settings of DeLoRA."""

    rank: int = Field(default=8, ge=1)
    """Number of normalised products; at most the smaller side of every target."""
    bound: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    """Start of the trained lambda: a change is at most lambda / sqrt(in) of a weight's norm if columns are alike."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the change is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": 4, "bound": 2.0, "dropout": 0.5}


class Gralora(PeftMethod):
    """GraLoRA: a low-rank change of its own for every tile of every target weight."""

    Config: ClassVar[type[MethodConfig]] = GraloraConfig
    config: GraloraConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="gralora",
        title="GraLoRA",
        family="low-rank",
        paper="Jung et al., 2025, GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
        url="https://arxiv.org/abs/2505.20355",
        capabilities=WEIGHT_ADAPTER,
        parameters="(rank + hybrid_rank) * sum over targets of (in + out)",
        learning_rate=2e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=("A starts Kaiming-uniform (a = sqrt 5), one draw for each row of tiles",),
        description="Cuts each target weight into blocks x blocks tiles and adds a trained low-rank product to each.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing blocks that do not divide a side and a hybrid rank above it."""
        layers = super().linears(model)
        blocks, hybrid = self.config.blocks, self.config.hybrid_rank
        for name, layer in layers.items():
            shape = f"{layer.out_features} x {layer.in_features}"
            if layer.in_features % blocks or layer.out_features % blocks:
                raise UserError(f"blocks: {blocks} does not divide both sides of {name} ({shape})")
            limit = min(layer.in_features, layer.out_features)
            if hybrid > limit:
                raise UserError(f"hybrid_rank: {hybrid} is above the smaller side of {name} ({shape}); at most {limit}")
        return layers

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the multiples of ``blocks`` up to the smaller side of every linear layer."""
        last = super().sizes(model)[-1]
        return range(self.config.blocks, last + 1, self.config.blocks)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        rank = self.config.rank + self.config.hybrid_rank
        return sum(rank * (layer.in_features + layer.out_features) for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's GraLoRA configuration."""
        import peft

        return peft.GraloraConfig(
            task_type=TASK,
            r=self.config.rank,
            alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            gralora_k=self.config.blocks,
            hybrid_r=self.config.hybrid_rank,
            gralora_dropout=self.config.dropout,
            target_modules=patterns,
            bias="none",
        )


class Delora(FrozenMethod):
    """DeLoRA: a low-rank change whose directions and strength train apart."""

    Config: ClassVar[type[MethodConfig]] = DeloraConfig
    config: DeloraConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="delora",
        title="DeLoRA",
        family="low-rank",
        paper="Bini et al., 2025, Decoupling Angles and Strength in Low-rank Adaptation",
        url="https://arxiv.org/abs/2503.18225",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of (rank * (in + out) + 1)",
        learning_rate=1e-3,
        micro_learning_rate=1e-3,
        random_init=True,
        deviations=(
            "scales by the norm of each column of the pretrained weight, as in peft; the paper's formula has one norm",
            "B starts at zero and its norms count as at least 1e-4: the first step of any usual learning rate takes "
            "each change from nothing to full strength, whatever the rate; a smaller bound softens it",
            "column norms are computed in float32 on every base type, where peft rounds them to the base's",
        ),
        description=(
            "Adds rank products of unit vectors, scaled by a trained strength lambda / rank and by the column norms of "
            "the weight. Set bound by the input size: 15 moves a weight of 4096 inputs by up to a quarter of its norm."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.rank * (layer.in_features + layer.out_features) + 1 for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's DeLoRA configuration."""
        import peft

        return peft.DeloraConfig(
            task_type=TASK,
            r=self.config.rank,
            delora_lambda=self.config.bound,  # type: ignore[arg-type]  # peft computes with floats
            module_dropout=self.config.dropout,
            target_modules=patterns,
            bias="none",
        )

    def finish(self, model: PeftModel) -> None:
        """Compute the column norms in float32; peft rounds them to the base's type."""
        import torch

        for layer in tuner_layers(model).values():
            weight = layer.get_base_layer().weight.detach().float()
            layer.delora_w_norm[ADAPTER] = torch.linalg.norm(weight, dim=0)
