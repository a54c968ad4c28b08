"""RoAd: outputs of every target are rotated and scaled in pairs.

y = R (W0 x + b) with R made of 2 x 2 blocks a [[cos t, -sin t], [sin t, cos t]], angles t zero and scales a one at the
start. Outputs are paired within groups: each of the first half of a group with the one half a group further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig, PathKind
from peft_arena.methods.divisors import check_divides
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

Variant = Literal["road_1", "road_2", "road_4"]
PER_OUTPUT: dict[Variant, int] = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Trained numbers for each output of a layer."""


class RoadConfig(AdaptedConfig):
    """Settings of RoAd."""

    variant: Variant = "road_1"
    """One angle and scale for each pair of outputs, for each output, or two of both for each output."""
    group_size: int = Field(default=32, ge=2, multiple_of=2)
    """Outputs in a group, an even number that divides the output size of every target; pairs are half a group apart."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "variant": "road_2", "group_size": 8}


class Road(PeftMethod):
    """RoAd: trained planar rotations behind every target weight."""

    Config: ClassVar[type[MethodConfig]] = RoadConfig
    config: RoadConfig
    size: ClassVar[str | None] = "variant"
    trains_vectors: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="road",
        title="RoAd",
        family="orthogonal",
        paper=(
            "Liao and Monz, 2024, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and "
            "Composability"
        ),
        url="https://arxiv.org/abs/2409.00119",
        capabilities=WEIGHT_ADAPTER,
        path=PathKind.MULTIPLICATIVE,
        parameters="sum over targets of out (road_1), 2 * out (road_2), 4 * out (road_4)",
        learning_rate=1e-3,
        micro_learning_rate=3e-2,
        random_init=False,
        deviations=(
            "pairs are half a group apart, as peft has it, where the paper pairs neighbours",
            "a target with a bias has its bias rotated too, a change that the weights alone do not show",
            "no weight decay: it would pull the scales from one to zero",
        ),
        description="Rotates and scales the outputs of each target in pairs; angles and scales train.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a group size that does not divide an output size."""
        layers = super().linears(model)
        check_divides("group_size", self.config.group_size, layers, "output")
        return layers

    def sizes(self, model: PreTrainedModel) -> list[Variant]:
        """Return the variants, from the smallest."""
        return list(PER_OUTPUT)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return PER_OUTPUT[self.config.variant] * sum(layer.out_features for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's RoAd configuration."""
        import peft

        return peft.RoadConfig(
            task_type=TASK,
            variant=self.config.variant,
            group_size=self.config.group_size,
            init_weights=True,
            target_modules=patterns,
        )
