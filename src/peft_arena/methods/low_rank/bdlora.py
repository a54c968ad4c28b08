"""BD-LoRA: LoRA with one block-diagonal factor per layer, made for serving on several devices.

Layers that are cut along their input (``row_parallel``: the last linear layer of a block) have a block-diagonal A, all
others a block-diagonal B; the other factor is LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.adaptable import linear_layers
from peft_arena.methods.adapter import WEIGHT_ADAPTER
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import Lora, RankConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

Leaf = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_]+$")]


class BdLoraConfig(RankConfig):
    """Settings of BD-LoRA."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of A is zeroed in training."""
    blocks: int = Field(default=2, ge=2)
    """Blocks of the block-diagonal factor: devices the model is to be served on. Must divide rank."""
    row_parallel: Annotated[tuple[Leaf, ...], Field(min_length=1)] = ("o_proj", "down_proj")
    """Last parts of names of the layers whose A is block-diagonal; all other targets have a block-diagonal B."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **RankConfig.alternatives,
        "dropout": 0.5,
        "blocks": 4,
        "row_parallel": ("down_proj",),
    }

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.rank % self.blocks:
            raise ValueError(f"rank {self.rank} is not a multiple of blocks {self.blocks}")
        return self


class BdLora(Lora):
    """BD-LoRA: LoRA with a block-diagonal factor."""

    Config: ClassVar[type[MethodConfig]] = BdLoraConfig
    config: BdLoraConfig  # type: ignore[assignment]  # no choice of init: peft draws block-diagonal factors its own way
    card: ClassVar[MethodCard] = MethodCard(
        name="bdlora",
        title="BD-LoRA",
        family="low-rank",
        paper=(
            "Wang et al., 2025, Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA "
            "Serving"
        ),
        url="https://arxiv.org/abs/2510.23346",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of rank * (in + out / blocks), or rank * (in / blocks + out) if row_parallel",
        learning_rate=2e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "A starts Kaiming-uniform, with a = sqrt 5 where it is full and a = 0 where it is block-diagonal",
            "training runs on one device: the blocks bring no speed here",
        ),
        description="LoRA in which A (of row_parallel layers) or B (of all others) is block-diagonal.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing sizes that the blocks do not divide and names that are ambiguous."""
        layers = super().linears(model)
        known = {name.rsplit(".", 1)[-1] for name in linear_layers(model)}
        for leaf in self.config.row_parallel:
            if leaf not in known:
                raise unknown("linear layer", leaf, known, "row_parallel")
        first, second = self._sides([name.rsplit(".", 1)[-1] for name in layers])
        for leaf in (*first, *second):
            if any(part in leaf for part in first) == any(part in leaf for part in second):
                raise UserError(
                    f"row_parallel: {leaf} is on both sides for peft, which looks for parts of names; "
                    "leave one of the like-named layers out of targets"
                )
        for name, layer in layers.items():
            rows = self._row_parallel(name)
            side, size = ("input", layer.in_features) if rows else ("output", layer.out_features)
            if size % self.config.blocks:
                divisors = ", ".join(str(n) for n in range(2, min(size, 64) + 1) if size % n == 0)
                raise UserError(
                    f"blocks: {self.config.blocks} does not divide the {side} size {size} of {name}; "
                    f"divisors: {divisors}"
                )
        return layers

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the multiples of the number of blocks up to the smaller side of every linear layer."""
        sides = [min(layer.in_features, layer.out_features) for layer in linear_layers(model).values()]
        return range(self.config.blocks, min(sides) + 1, self.config.blocks)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        total = 0
        for name, layer in self.linears(model).items():
            full, cut = layer.in_features, layer.out_features
            if self._row_parallel(name):
                full, cut = cut, full
            total += self.config.rank * (full + cut // self.config.blocks)
        return total

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's LoRA configuration with block-diagonal factors."""
        import peft
        from peft.tuners.lora import BdLoraConfig as Blocks

        first, second = self._sides([pattern.rsplit(".", 1)[-1] for pattern in patterns])
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            lora_dropout=self.config.dropout,
            target_modules=patterns,
            use_bdlora=Blocks(target_modules_bd_a=first, target_modules_bd_b=second, nblocks=self.config.blocks),
            bias="none",
        )

    def _row_parallel(self, name: str) -> bool:
        return name.rsplit(".", 1)[-1] in self.config.row_parallel

    def _sides(self, leaves: list[str]) -> tuple[list[str], list[str]]:
        """Return the names of layers with a block-diagonal A, and of those with a block-diagonal B."""
        first = sorted({leaf for leaf in leaves if leaf in self.config.row_parallel})
        return first, sorted(set(leaves) - set(first))
