"""C3A: every block of a weight's change is a circulant matrix.

W = W0 + C / in with C made of (out / b) x (in / b) circulant blocks of side b, each given by one trained vector, zero
at the start. The forward pass uses Fourier transforms and never builds C.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


class C3aConfig(AdaptedConfig):
    """Settings of C3A."""

    block_size: int = Field(default=64, ge=2)
    """Side of a circulant block; must divide both sides of every target. A larger one trains fewer parameters."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "block_size": 16}


class C3a(PeftMethod):
    """C3A: a trained block-circulant change beside every target weight."""

    Config: ClassVar[type[MethodConfig]] = C3aConfig
    config: C3aConfig
    size: ClassVar[str | None] = "block_size"
    card: ClassVar[MethodCard] = MethodCard(
        name="c3a",
        title="C3A",
        family="circulant",
        paper="Chen et al., 2024, Parameter-Efficient Fine-Tuning via Circular Convolution",
        url="https://arxiv.org/abs/2407.19342",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of in * out / block_size",
        learning_rate=0.3,
        micro_learning_rate=1.0,
        random_init=False,
        deviations=(
            "kernels start at zero, so that training starts from the pretrained model; peft's default draws them "
            "Xavier-uniform, which moves the model",
            "the change is divided by the input size, which is why learning rates are large",
        ),
        description="Adds a matrix of circulant blocks, divided by the input size, to each target weight.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a block size that does not divide a side."""
        layers = super().linears(model)
        size = self.config.block_size
        for name, layer in layers.items():
            if layer.in_features % size or layer.out_features % size:
                shape = f"{layer.out_features} x {layer.in_features}"
                allowed = ", ".join(map(str, reversed(self.sizes(model)))) or "none for these targets"
                raise UserError(f"block_size: {size} does not divide the sides of {name} ({shape}); allowed: {allowed}")
        return layers

    def sizes(self, model: PreTrainedModel) -> list[int]:
        """Return the block sizes, falling, that divide both sides of every target."""
        layers = super().linears(model).values()
        common = gcd(*(side for layer in layers for side in (layer.in_features, layer.out_features)))
        return [size for size in range(common, 1, -1) if common % size == 0]

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        size = self.config.block_size
        return sum(layer.in_features * layer.out_features // size for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's C3A configuration."""
        import peft

        return peft.C3AConfig(
            task_type=TASK,
            block_size=self.config.block_size,
            init_weights=True,
            target_modules=patterns,
            bias="none",
        )
