"""Low-rank factors put together from one trained store that all layers share: VB-LoRA and Uni-LoRA.

VB-LoRA cuts A and B into pieces of ``vector_length``; each is a softmax mixture of the ``topk`` vectors of a shared
bank that its own trained logits rank highest. peft's file of the chosen vectors only is not offered: training cannot
go on from it. The bank starts uniform in +-0.02, the logits normal with standard deviation 0.1.
Uni-LoRA: every entry of every A and B is an entry of one trained vector, chosen at random and divided by the root of
how often that entry is used. The vector starts uniform in +-0.02.
Neither is the pretrained model at the start: both factors are small but not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError
from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.frozen import FrozenMethod
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


class VbloraConfig(AdaptedConfig):
    """Settings of VB-LoRA."""

    rank: int = Field(default=4, ge=1)
    """Inner dimension of the update; at most the smaller side of every target."""
    vectors: int = Field(default=256, ge=2)
    """Vectors in the shared bank."""
    vector_length: int = Field(default=256, ge=1)
    """Length of a vector; must divide both sides of every target."""
    topk: int = Field(default=2, ge=2)
    """Vectors mixed into each piece; with 1 no logit would ever have a gradient, so it is refused."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the update is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 2,
        "vectors": 24,
        "vector_length": 8,
        "topk": 3,
        "dropout": 0.5,
    }

    @model_validator(mode="after")
    def _enough_vectors(self) -> Self:
        if self.topk > self.vectors:
            raise ValueError(f"topk {self.topk} is above vectors {self.vectors}")
        return self


class UniloraConfig(AdaptedConfig):
    """Settings of Uni-LoRA."""

    rank: int = Field(default=4, ge=1)
    """Inner dimension of the update; at most the smaller side of every target."""
    theta_length: int = Field(default=524288, ge=1)
    """Length of the trained vector; at most the number of entries of all A and B."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the update is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 2,
        "theta_length": 500,
        "dropout": 0.5,
    }


class Vblora(PeftMethod):
    """VB-LoRA: low-rank factors mixed from a trained bank of vectors."""

    Config: ClassVar[type[MethodConfig]] = VbloraConfig
    config: VbloraConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="vblora",
        title="VB-LoRA",
        family="shared store",
        paper="Li et al., 2024, VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
        url="https://arxiv.org/abs/2405.15179",
        capabilities=WEIGHT_ADAPTER - {Capability.IDENTITY_AT_INIT},
        parameters="vectors * (vector_length + rank * sum over targets of (in + out) / vector_length)",
        learning_rate=5e-4,
        micro_learning_rate=3e-2,
        random_init=True,
        other_gradients="which vectors rank highest is a choice that no gradient sees; the loss jumps where it changes",
        deviations=(
            "logits and bank share one learning rate",
            "all logits are saved, not only the chosen vectors and their weights, so the file is as large as what "
            "trains; the paper counts the smaller file as its number of parameters",
        ),
        description=(
            "LoRA whose factors are cut into pieces, each a mixture of topk vectors of a trained bank. "
            "Not quite the pretrained model at the start."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a vector length that does not divide a side."""
        layers = super().linears(model)
        length = self.config.vector_length
        common = gcd(*(side for layer in layers.values() for side in (layer.in_features, layer.out_features)))
        for name, layer in layers.items():
            if layer.in_features % length or layer.out_features % length:
                shape = f"{layer.out_features} x {layer.in_features}"
                allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                raise UserError(f"vector_length: {length} does not divide both sides of {name} ({shape}); {allowed} do")
        return layers

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        length = self.config.vector_length
        pieces = sum((layer.in_features + layer.out_features) // length for layer in self.linears(model).values())
        return self.config.vectors * (length + self.config.rank * pieces)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's VB-LoRA configuration."""
        import peft

        return peft.VBLoRAConfig(
            task_type=TASK,
            r=self.config.rank,
            num_vectors=self.config.vectors,
            vector_length=self.config.vector_length,
            topk=self.config.topk,
            vblora_dropout=self.config.dropout,
            save_only_topk_weights=False,
            target_modules=patterns,
            bias="none",
        )


class Unilora(FrozenMethod):
    """Uni-LoRA: all low-rank factors of a model from one trained vector."""

    Config: ClassVar[type[MethodConfig]] = UniloraConfig
    config: UniloraConfig
    size: ClassVar[str | None] = "theta_length"
    limited_by_rank: ClassVar[bool] = True
    derived_settings: ClassVar[frozenset[str]] = frozenset({"proj_seed"})
    card: ClassVar[MethodCard] = MethodCard(
        name="unilora",
        title="Uni-LoRA",
        family="shared store",
        paper="Li et al., 2025, Uni-LoRA: One Vector is All You Need",
        url="https://arxiv.org/abs/2506.00799",
        capabilities=WEIGHT_ADAPTER - {Capability.IDENTITY_AT_INIT},
        parameters="theta_length",
        learning_rate=1e-3,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "entries of the vector are used equally often, give or take one, where independent draws would not be",
            "which entry stands where, and its scale, are saved with the adapter: a file about three times as large "
            "as that of a LoRA of the same rank",
            "on a bfloat16 base the frozen scales are rounded to bfloat16",
        ),
        description=(
            "LoRA in which every entry of A and B is a scaled entry of one trained vector, chosen at random. "
            "Not quite the pretrained model at the start."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a vector of which a part would stand nowhere."""
        layers = super().linears(model)
        entries = self._entries(layers)
        if self.config.theta_length > entries:
            given = self.config.theta_length
            raise UserError(
                f"theta_length: {given} is above the {entries} entries of all A and B "
                f"(rank {self.config.rank}, {len(layers)} layers); allowed: 1 to {entries}"
            )
        return layers

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the lengths up to the number of entries of all A and B."""
        return range(1, self._entries(super().linears(model)) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        self.linears(model)
        return self.config.theta_length

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's Uni-LoRA configuration; its own seed is derived from the run's."""
        import peft

        return peft.UniLoraConfig(
            task_type=TASK,
            r=self.config.rank,
            theta_d_length=self.config.theta_length,
            unilora_dropout=self.config.dropout,
            proj_seed=seed_for(seed, "unilora", "indices"),
            save_indices=True,
            target_modules=patterns,
            bias="none",
        )

    def _entries(self, layers: Mapping[str, nn.Linear]) -> int:
        return sum(self.config.rank * (layer.in_features + layer.out_features) for layer in layers.values())
