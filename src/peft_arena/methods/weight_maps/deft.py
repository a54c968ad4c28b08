"""DEFT and PaRa: a trained subspace of every target's outputs is emptied, and with DEFT filled anew.

DEFT: W = (I - Q q^T) W0 + s Q R with trained P (out, rank) and R (rank, in). Q and q come from P: ``relu``: Q = P and
q = max(P, 0); ``qr``: Q = q = the orthonormal factor of P. R starts as q^T W0 / s, so that nothing changes at first.
PaRa (``peft``'s ``para``): W = (I - Q Q^T) W0, so a random subspace is missing from the first step on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


class DeftConfig(RankConfig):
    """Settings of DEFT. ``alpha`` scales what is injected. There is no dropout: it would drop parts of W0."""

    decomposition: Literal["relu", "qr"] = "relu"
    """How the removed subspace follows from P: by its positive part, or by orthonormal columns."""

    alternatives: ClassVar[Mapping[str, Any]] = {**RankConfig.alternatives, "decomposition": "qr"}


class Deft(PeftMethod):
    """DEFT: a trained subspace of the outputs gets new content."""

    Config: ClassVar[type[MethodConfig]] = DeftConfig
    config: DeftConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="deft",
        title="DEFT",
        family="weight-dependent",
        paper="Kumar et al., 2025, DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models",
        url="https://arxiv.org/abs/2509.22793",
        capabilities=WEIGHT_ADAPTER,
        parameters="rank * sum over targets of (in + out)",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "R starts so that the model is unchanged (peft's default), where the paper starts it at random",
            "no dropout: it would drop parts of the pretrained weight",
            "weight decay pulls R, which holds a part of the pretrained weight, to zero",
            "on a bfloat16 base the change is computed from the weights in float32; peft computes it from the layer's "
            "rounded output, and the untrained model is not the pretrained one",
            "with decomposition 'qr' R belongs to the signs of Q, which are those of LAPACK's Householder QR",
        ),
        description="Removes a trained subspace from the outputs of each target weight and injects a trained matrix.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.rank * (layer.in_features + layer.out_features) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's DEFT configuration."""
        import peft

        return peft.DeftConfig(
            task_type=TASK,
            r=self.config.rank,
            alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            decomposition_method=self.config.decomposition,
            para=False,
            init_weights=True,
            target_modules=patterns,
            bias="none",
        )

    def finish(self, model: PeftModel) -> None:
        """Let layers with a rounded weight compute the change from it in float32, and start at nothing."""
        import torch

        from peft_arena.methods.layers import LowRankDeft

        for layer in tuner_layers(model).values():
            if layer.get_base_layer().weight.dtype != torch.float32:
                layer.__class__ = LowRankDeft
                layer.settle()


class ParaConfig(AdaptedConfig):
    """Settings of PaRa."""

    rank: int = Field(default=8, ge=1)
    """Dimensions removed from the outputs; at most the smaller side of every target."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": 4}


class DeftPara(PeftMethod):
    """PaRa: a trained subspace of the outputs is removed."""

    Config: ClassVar[type[MethodConfig]] = ParaConfig
    config: ParaConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="deft_para",
        title="PaRa",
        family="weight-dependent",
        paper="Chen et al., 2024, PaRa: Personalizing Text-to-Image Diffusion via Parameter Rank Reduction",
        url="https://arxiv.org/abs/2406.05641",
        capabilities=WEIGHT_ADAPTER - {Capability.IDENTITY_AT_INIT},
        parameters="rank * sum over targets of out",
        learning_rate=1e-4,
        micro_learning_rate=1e-3,
        random_init=True,
        deviations=("peft's DEFT without injection; always with orthonormal columns, as in the paper",),
        description=(
            "Removes a trained subspace from the outputs of each target weight. It starts at random, so the model is "
            "damaged before the first step."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(self.config.rank * layer.out_features for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's DEFT configuration without injection."""
        import peft

        return peft.DeftConfig(
            task_type=TASK,
            r=self.config.rank,
            decomposition_method="qr",
            para=True,
            target_modules=patterns,
            bias="none",
        )
