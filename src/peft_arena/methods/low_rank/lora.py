"""Low-rank adaptation: LoRA, rsLoRA, DoRA and LoRA+.

All four are ``peft``'s LoRA layer: W0 x + s B A x with A (rank, in) random and B (out, rank) zero at the start.
Deviations: peft draws A from Kaiming-uniform (a = sqrt 5) where the paper has a Gaussian; ``init="gaussian"`` has
standard deviation 1/rank. DoRA treats the norm in the denominator as a constant, as its authors suggest in 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig, PathKind
from peft_arena.methods.targets import AdaptedConfig, TargetConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


class BareRankConfig(TargetConfig):
    """Settings of a low-rank update and nothing else."""

    rank: int = Field(default=8, ge=1)
    """Inner dimension of the update; at most the smaller side of every target."""
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""

    alternatives: ClassVar[Mapping[str, Any]] = {**TargetConfig.alternatives, "rank": 4, "alpha": 4.0}


class RankConfig(BareRankConfig, AdaptedConfig):
    """Settings of a low-rank update, beside which modules can train as a whole."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, **BareRankConfig.alternatives}


class LoraConfig(RankConfig):
    """Settings of LoRA, rsLoRA and DoRA."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of A is zeroed in training."""
    init: Literal["default", "gaussian"] = "default"
    """Distribution of A at the start: Kaiming-uniform, or normal with standard deviation 1 / rank."""

    alternatives: ClassVar[Mapping[str, Any]] = {**RankConfig.alternatives, "dropout": 0.5, "init": "gaussian"}


class LoraPlusConfig(LoraConfig):
    """Settings of LoRA+."""

    lr_ratio: float = Field(default=16.0, gt=1, allow_inf_nan=False)
    """Learning rate of B over that of A; 1 would be LoRA and is refused."""

    alternatives: ClassVar[Mapping[str, Any]] = {**LoraConfig.alternatives, "lr_ratio": 4.0}


class Lora(PeftMethod):
    """LoRA: a trained low-rank change beside every target weight."""

    Config: ClassVar[type[MethodConfig]] = LoraConfig
    config: LoraConfig
    size: ClassVar[str | None] = "rank"
    rank_stabilized: ClassVar[bool] = False
    decomposed: ClassVar[bool] = False
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="lora",
        title="LoRA",
        family="low-rank",
        paper="Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models",
        url="https://arxiv.org/abs/2106.09685",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="rank * sum over targets of (in + out)",
        equation="W + alpha / rank * lora_B @ lora_A",
        learning_rate=2e-4,
        micro_learning_rate=3e-3,
        micro_rl_learning_rate=1e-3,
        random_init=True,
        deviations=("A starts Kaiming-uniform (a = sqrt 5) instead of Gaussian unless init is 'gaussian'",),
        description="Adds alpha / rank * B A to each target weight; only A and B train, and B starts at zero.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.rank * (layer.in_features + layer.out_features) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's LoRA configuration."""
        import peft

        return peft.LoraConfig(
            task_type=TASK,
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            lora_dropout=self.config.dropout,
            init_lora_weights=True if self.config.init == "default" else self.config.init,
            target_modules=patterns,
            use_rslora=self.rank_stabilized,
            use_dora=self.decomposed,
            bias="none",
        )


class RsLora(Lora):
    """Rank-stabilised LoRA: LoRA scaled so that the update does not shrink as the rank grows."""

    rank_stabilized: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="rslora",
        title="rsLoRA",
        family="low-rank",
        paper="Kalajdzievski, 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        url="https://arxiv.org/abs/2312.03732",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="rank * sum over targets of (in + out)",
        equation="W + alpha / sqrt(rank) * lora_B @ lora_A",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=("A starts Kaiming-uniform (a = sqrt 5) instead of Gaussian unless init is 'gaussian'",),
        description="Adds alpha / sqrt(rank) * B A to each target weight; otherwise LoRA.",
    )


class Dora(Lora):
    """DoRA: LoRA on the direction of each weight row, with a trained length beside it."""

    decomposed: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="dora",
        title="DoRA",
        family="low-rank",
        paper="Liu et al., 2024, DoRA: Weight-Decomposed Low-Rank Adaptation",
        url="https://arxiv.org/abs/2402.09353",
        capabilities=WEIGHT_ADAPTER,
        path=PathKind.MULTIPLICATIVE,
        parameters="sum over targets of (rank * (in + out) + out)",
        equation="V = W + alpha / rank * lora_B @ lora_A; column(lora_magnitude_vector) * V / row_norms(V)",
        learning_rate=2e-4,
        micro_learning_rate=3e-3,
        micro_rl_learning_rate=1e-3,
        random_init=True,
        other_gradients="the norm of the changed weight is a constant in the backward pass",
        deviations=(
            "the norm of the changed weight is treated as a constant in the gradient (section 4.3 of the paper)",
            "A starts Kaiming-uniform (a = sqrt 5) unless init is 'gaussian'",
            "the starting lengths are computed in float32 on every base type, where peft rounds them to the base's",
        ),
        description=(
            "Gives each output row of a target weight a trained length and a direction changed by LoRA. "
            "The change of weights has full rank."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return super().count(model) + sum(layer.out_features for layer in layers)

    def finish(self, model: PeftModel) -> None:
        """Compute the starting lengths in float32: peft rounds them to the base's type, and the model would change."""
        import torch

        for layer in tuner_layers(model).values():
            weight = layer.get_base_layer().weight.detach().float()
            layer.lora_magnitude_vector[ADAPTER].weight.data = torch.linalg.norm(weight, dim=1)


class LoraPlusAttached(PeftAttached):
    """LoRA+ in place on a model."""

    method: LoraPlus

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return two groups: A at the learning rate, B at ``lr_ratio`` times it; both are matrices and decay."""
        trained = self.trained()
        first = [p for name, p in trained.items() if ".lora_B." not in name]
        second = [p for name, p in trained.items() if ".lora_B." in name]
        faster = learning_rate * self.method.config.lr_ratio
        return [
            {"params": first, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": second, "lr": faster, "weight_decay": weight_decay},
        ]


class LoraPlus(Lora):
    """LoRA+: LoRA whose B learns faster than A."""

    Config: ClassVar[type[MethodConfig]] = LoraPlusConfig
    config: LoraPlusConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="lora_plus",
        title="LoRA+",
        family="low-rank",
        paper="Hayou et al., 2024, LoRA+: Efficient Low Rank Adaptation of Large Models",
        url="https://arxiv.org/abs/2402.12354",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="rank * sum over targets of (in + out)",
        equation="W + alpha / rank * lora_B @ lora_A",
        learning_rate=5e-5,
        micro_learning_rate=1e-3,
        random_init=True,
        deviations=(
            "A starts Kaiming-uniform (a = sqrt 5) unless init is 'gaussian'",
            "no separate rate for embeddings: they are never adapted",
        ),
        description="LoRA with the learning rate of B lr_ratio times that of A, which is the rate of the run.",
    )

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment with two learning rates."""
        return LoraPlusAttached(self, model, base)
