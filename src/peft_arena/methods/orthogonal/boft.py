"""BOFT: orthogonal fine-tuning by small rotation blocks, and a trained factor for each output.

W = diag(s) W0 R^T with R block-diagonal orthogonal, R = (I - Q)(I + Q)^-1 (Cayley) of the skew-symmetric part Q of
trained square blocks, zero at the start; s starts at ones. The paper multiplies several such factors, permuted like a
butterfly. ``peft`` does that only with a CUDA extension that it compiles at first use, and elsewhere falls back to one
factor without an error. Here there is one factor everywhere, so that a label means the same on every machine; the
extension is never built while a model is wrapped, and no more factors have been tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig, PathKind
from peft_arena.methods.divisors import check_divides, common_divisors
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class BoftConfig(AdaptedConfig):
    """Settings of BOFT."""

    block_size: int = Field(default=4, ge=2)
    """Side of each rotation block; must divide the input size of every target."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's blocks that a training step replaces by the identity; must come to one block at least."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "block_size": 16, "dropout": 0.5}


class BoftAttached(PeftAttached):
    """BOFT in place on a model."""

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the rotations, which decay to the identity, and the factors, which start at one and do not decay."""
        trained = self.trained()
        factors = [p for name, p in trained.items() if ".boft_s." in name]
        rotations = [p for name, p in trained.items() if ".boft_s." not in name]
        return [
            {"params": rotations, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": factors, "lr": learning_rate, "weight_decay": 0.0},
        ]


class Boft(PeftMethod):
    """BOFT with one butterfly factor: rotation blocks in front of a weight, factors behind it."""

    Config: ClassVar[type[MethodConfig]] = BoftConfig
    config: BoftConfig
    size: ClassVar[str | None] = "block_size"
    card: ClassVar[MethodCard] = MethodCard(
        name="boft",
        title="BOFT",
        family="orthogonal",
        paper="Liu et al., 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
        url="https://arxiv.org/abs/2311.06243",
        capabilities=WEIGHT_ADAPTER,
        path=PathKind.CAYLEY,
        parameters="sum over targets of (in * block_size + out)",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=False,
        deviations=(
            "one butterfly factor: peft multiplies more of them only with a CUDA extension, and silently not elsewhere",
            "a factor for each output trains too, as in peft",
            "whole square blocks are trained and counted, though only their skew-symmetric part does anything",
            "turns the input block by block, where peft builds (in, in) matrices in each forward pass; merging "
            "still does, and attaching takes an (in, in) float32 matrix for each layer and keeps one for each size",
            "on a bfloat16 base the rotation is rounded to bfloat16 in each forward pass",
            "not verified on a GPU",
        ),
        description=(
            "Multiplies each target weight by a block-diagonal rotation of its input and a factor for each output."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a block size that does not divide and a dropout that drops no block."""
        layers = super().linears(model)
        check_divides("block_size", self.config.block_size, layers, "input")
        dropout = self.config.dropout
        for name, layer in layers.items():
            blocks = layer.in_features // self.config.block_size
            if dropout > 0 and int(dropout * blocks) == 0:
                raise UserError(
                    f"dropout: {dropout} of the {blocks} blocks of {name} is less than one block, so nothing would be "
                    f"dropped; allowed: 0, or from {1 / blocks:g}"
                )
        return layers

    def sizes(self, model: PreTrainedModel) -> list[int]:
        """Return the block sizes that divide the input size of every target."""
        return common_divisors(super().linears(model), "input")

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(layer.in_features * self.config.block_size + layer.out_features for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's BOFT configuration."""
        import peft

        return peft.BOFTConfig(
            task_type=TASK,
            boft_block_size=self.config.block_size,
            boft_block_num=0,
            boft_n_butterfly_factor=1,
            boft_dropout=self.config.dropout,
            target_modules=patterns,
            bias="none",
        )

    def finish(self, model: PeftModel) -> None:
        """Let layers turn their input block by block, and those of one input size share peft's (in, in) identity."""
        from peft_arena.methods.layers import BlockBoft

        shared: dict[int, Any] = {}
        for layer in tuner_layers(model).values():
            assert layer.boft_R[ADAPTER].shape[0] == 1, "peft made more than one butterfly factor"
            layer.boft_P = shared.setdefault(layer.in_features, layer.boft_P)
            layer.__class__ = BlockBoft

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment whose factors do not decay."""
        return BoftAttached(self, model, base)

    def _wrap(self, model: PreTrainedModel, config: PeftConfig, seed: int, wanted: set[str]) -> PeftModel:
        from unittest.mock import patch

        from peft.tuners.boft import layer

        with patch.object(layer, "get_fbd_cuda", lambda: None):
            return super()._wrap(model, config, seed, wanted)
