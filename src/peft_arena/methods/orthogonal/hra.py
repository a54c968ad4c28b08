"""HRA: every target's input is mirrored at a few trained hyperplanes.

W = W0 H_1 ... H_r with Householder reflections H_i = I - 2 u_i u_i^T / |u_i|^2. At the start the u are equal in pairs,
so that the reflections cancel; hence the even rank. ``peft``'s ``apply_GS`` (Gram-Schmidt on the u) is left out: equal
vectors have no orthonormal basis, and the model is not a number from the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class HraConfig(AdaptedConfig):
    """Settings of HRA."""

    rank: int = Field(default=8, ge=2, multiple_of=2)
    """How many reflections, an even number, at most the input size of every target."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": 4}


class Hra(PeftMethod):
    """HRA: a trained chain of reflections in front of every target weight."""

    Config: ClassVar[type[MethodConfig]] = HraConfig
    config: HraConfig
    size: ClassVar[str | None] = "rank"
    card: ClassVar[MethodCard] = MethodCard(
        name="hra",
        title="HRA",
        family="orthogonal",
        paper=(
            "Yuan et al., 2024, Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection "
            "Adaptation"
        ),
        url="https://arxiv.org/abs/2405.17484",
        capabilities=WEIGHT_ADAPTER,
        parameters="rank * sum over targets of in",
        equation="W @ reflections(hra_u)",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "no orthogonality of the reflection planes, neither as a penalty nor by Gram-Schmidt: peft has no penalty, "
            "and its Gram-Schmidt is not a number at the start",
            "the chain is computed in float32 as a change of low rank beside the layer's own output; peft builds the "
            "(in, in) matrix of the whole chain in each forward pass, here only merging does",
            "its path is straight from W0 to W1: scaling the vectors changes no reflection, so its own parameters lead "
            "nowhere, and points on the way are no rotations of W0",
        ),
        description="Multiplies each target weight by a chain of trained Householder reflections of its input.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing more reflections than a layer has inputs."""
        layers = super().linears(model)
        for name, layer in layers.items():
            if self.config.rank > layer.in_features:
                raise UserError(
                    f"rank: {self.config.rank} reflections are more than the {layer.in_features} inputs of {name}; "
                    f"allowed: even numbers from 2 to {layer.in_features}"
                )
        return layers

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the even numbers up to the smallest input size."""
        layers = super().linears(model).values()
        return range(2, min(layer.in_features for layer in layers) + 1, 2)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(self.config.rank * layer.in_features for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's HRA configuration."""
        import peft

        return peft.HRAConfig(
            task_type=TASK, r=self.config.rank, apply_GS=False, init_weights=True, target_modules=patterns, bias="none"
        )

    def finish(self, model: PeftModel) -> None:
        """Let the layers compute the reflections as a low-rank change."""
        from peft_arena.methods.layers import LowRankHra

        for layer in tuner_layers(model).values():
            layer.__class__ = LowRankHra
