"""LoRA with other starts that leave the pretrained weights alone: LoRA-orthogonal and MiCA.

Both are plain LoRA of the same rank in training and in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Attached, Calibration, Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.low_rank.split import smallest
from peft_arena.methods.state import local_random

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


class StartConfig(RankConfig):
    """Settings of a LoRA whose start adds nothing that dropout could drop."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of A is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {**RankConfig.alternatives, "dropout": 0.5}


class StartedLora(PeftMethod):
    """A plain LoRA with a start of its own."""

    Config: ClassVar[type[MethodConfig]] = StartConfig
    config: StartConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.rank * (layer.in_features + layer.out_features) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return the configuration of a plain LoRA."""
        import peft

        return peft.LoraConfig(
            task_type=TASK,
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            lora_dropout=self.config.dropout,
            target_modules=patterns,
            bias="none",
        )

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Wrap the model, then start the factors; see :meth:`Method.attach`."""
        attached: Any = super().attach(model, seed=seed)
        with local_random(seed):
            self.begin_at(attached.model)
        return attached

    def begin_at(self, model: PeftModel) -> None:
        """Put the starting values into the layers of a wrapped model."""
        raise NotImplementedError


class OrthogonalConfig(StartConfig):
    """Settings of LoRA-orthogonal."""

    rank: int = Field(default=8, ge=2, multiple_of=2)
    """Inner dimension of the update, even; at most the smaller side of every target."""


class LoraOrthogonal(StartedLora):
    """LoRA whose A and B both start at random, with product zero."""

    Config: ClassVar[type[MethodConfig]] = OrthogonalConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="lora_orthogonal",
        title="LoRA, orthogonal start",
        family="low-rank",
        paper="none",
        url="https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="rank * sum over targets of (in + out)",
        equation="W + alpha / rank * lora_B @ lora_A",
        learning_rate=2e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "the factors are computed in float64 and kept in float32, where peft rounds them to the base's type",
            "in mixed precision B A x is zero at the start up to the rounding of A x to bfloat16",
        ),
        description=(
            "LoRA whose A and B are both random at the start: B takes half of a random orthogonal basis of the inner "
            "dimension and A the other half, so that B A = 0 and both have a gradient at once."
        ),
    )

    def begin_at(self, model: PeftModel) -> None:
        """Draw A = (G1 Q1)^T / 10 and B = G2 Q2 / 10, with Q1 and Q2 the odd and even rows of an orthogonal Q."""
        import torch

        rank = self.config.rank
        with torch.no_grad():
            for layer in tuner_layers(model).values():
                first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                basis, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))
                a = basis[0::2].T @ torch.randn(rank // 2, first.shape[1], dtype=torch.float64) / 10
                b = torch.randn(second.shape[0], rank // 2, dtype=torch.float64) @ basis[1::2] / 10
                first.copy_(a)
                second.copy_(b)


class MicaAttached(PeftAttached):
    """MiCA in place on a model: B is frozen."""

    def frozen(self) -> dict[str, Tensor]:
        """Return B."""
        layers = tuner_layers(self.model)
        return {f"frozen.{module}.b": layer.lora_B[ADAPTER].weight.detach() for module, layer in layers.items()}


class Mica(StartedLora):
    """MiCA: only A trains, in front of the left singular vectors of the smallest singular values."""

    card: ClassVar[MethodCard] = MethodCard(
        name="mica",
        title="MiCA",
        family="low-rank",
        paper="Rüdiger and Raschka, 2026, MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning",
        url="https://arxiv.org/abs/2604.01694",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="rank * sum over targets of in",
        equation="W + alpha / rank * lora_B @ lora_A",
        learning_rate=1e-4,
        micro_learning_rate=1e-2,
        deviations=(
            "B is computed and kept in float32 on every base type, where peft rounds it to the base's",
            "a checkpoint is a plain LoRA, without peft's mark of MiCA, so that reading it repeats no SVD",
        ),
        description=(
            "Adds alpha / rank * B A to each target weight, where B is frozen: the left singular vectors of the "
            "weight's smallest singular values. Only A trains, from zero."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return self.config.rank * sum(layer.in_features for layer in self.linears(model).values())

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment whose state holds the frozen factor too."""
        return MicaAttached(self, model, base)

    def begin_at(self, model: PeftModel) -> None:
        """Set A to zero and B to minor singular vectors, which are frozen."""
        import torch

        with torch.no_grad():
            for layer in tuner_layers(model).values():
                first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                left, _, _ = smallest(layer.get_base_layer().weight.detach().float(), self.config.rank)
                first.zero_()
                second.copy_(left)
                second.requires_grad_(False)
