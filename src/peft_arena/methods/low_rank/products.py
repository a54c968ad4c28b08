"""Changes that are products other than a low-rank one: LoHa, LoKr and HiRA.

LoHa: W0 + s (B1 A1) * (B2 A2), elementwise, with A2 zero at the start.
LoKr: W0 + s W1 (x) (B A), a Kronecker product, with W1 zero at the start.
HiRA: W0 + W0 * (B A), elementwise, with B zero at the start; there is no scale.
Left out: peft's ``module_dropout`` (it skips whole layers in training and corrects for that nowhere).

In training the change of every target is kept as a dense matrix for the backward pass, in float32 about as large
as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


class LohaConfig(RankConfig):
    """Settings of LoHa."""

    rank_dropout: float = Field(default=0.0, ge=0, le=0.5)
    """Probability with which a row of the change (one output) is zeroed in training; the others grow to make up."""

    alternatives: ClassVar[Mapping[str, Any]] = {**RankConfig.alternatives, "rank_dropout": 0.5}


class LokrConfig(LohaConfig):
    """Settings of LoKr."""

    rank: int = Field(default=8, ge=1)
    """Inner dimension of the second factor (with ``decompose_both`` of both); less than half its longer side."""
    decompose_factor: int | None = Field(default=None, ge=2)
    """Sides of the first factor; must divide every side of the targets. None: each side is split near its root."""
    decompose_both: bool = False
    """Make the first factor a low-rank product too."""
    init: Literal["default", "lycoris"] = "default"
    """What is zero at the start: the first factor, or (as in the LyCORIS library) the second."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **LohaConfig.alternatives,
        "rank": 2,
        "decompose_factor": 2,
        "decompose_both": True,
        "init": "lycoris",
    }


class HiraConfig(AdaptedConfig):
    """Settings of HiRA."""

    rank: int = Field(default=32, ge=1)
    """Inner dimension of B A; at most the smaller side of every target."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the change is zeroed in training."""
    init: Literal["default", "gaussian"] = "default"
    """Distribution of A at the start: Kaiming-uniform, or normal with standard deviation 1 / rank."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 4,
        "dropout": 0.5,
        "init": "gaussian",
    }


class Loha(PeftMethod):
    """LoHa: the elementwise product of two trained low-rank matrices beside every target weight."""

    Config: ClassVar[type[MethodConfig]] = LohaConfig
    config: LohaConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="loha",
        title="LoHa",
        family="product",
        paper=(
            "Hyeon-Woo et al., 2021, FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"
        ),
        url="https://arxiv.org/abs/2108.06098",
        capabilities=WEIGHT_ADAPTER,
        parameters="2 * rank * sum over targets of (in + out)",
        equation="W + alpha / rank * (hada_w1_a @ hada_w1_b) * (hada_w2_a @ hada_w2_b)",
        learning_rate=1e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "a change beside a pretrained weight, scaled by alpha / rank (the LyCORIS form), where the paper trains "
            "the whole weight as such a product",
            "one of the four factors starts at zero, so that training starts from the pretrained model; gradients "
            "pass through three other factors, which makes the start slow",
        ),
        description="Adds alpha / rank * (B1 A1) * (B2 A2), elementwise, to each target weight; the factors train.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(2 * self.config.rank * (layer.in_features + layer.out_features) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's LoHa configuration."""
        import peft

        return peft.LoHaConfig(
            task_type=TASK,
            r=self.config.rank,
            alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            rank_dropout=self.config.rank_dropout,
            target_modules=patterns,
        )


class Split(NamedTuple):
    """How LoKr factors one weight: (first_out x first_in) times, by Kronecker, (second_out x second_in)."""

    first_out: int
    first_in: int
    second_out: int
    second_in: int

    @property
    def largest_rank(self) -> int:
        """Return the largest rank for which peft still makes the second factor a product; 0 if there is none."""
        return (max(self.second_out, self.second_in) - 1) // 2

    @property
    def largest_first_rank(self) -> int:
        """Return the same of the first factor."""
        return (max(self.first_out, self.first_in) - 1) // 2


class Lokr(PeftMethod):
    """LoKr: the Kronecker product of two trained matrices beside every target weight."""

    Config: ClassVar[type[MethodConfig]] = LokrConfig
    config: LokrConfig
    size: ClassVar[str | None] = "rank"
    card: ClassVar[MethodCard] = MethodCard(
        name="lokr",
        title="LoKr",
        family="product",
        paper="Yeh et al., 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        url="https://arxiv.org/abs/2309.14859",
        capabilities=WEIGHT_ADAPTER,
        parameters=(
            "sum over targets of (a * c + rank * (b + d)), out = a * b, in = c * d split by decompose_factor; "
            "rank * (a + c) for a * c with decompose_both"
        ),
        learning_rate=3e-3,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "a factor that does not divide a layer's sides, and a rank at which peft would train the full second "
            "factor instead, are refused; peft changes both silently",
            "the first factor starts at zero unless init is 'lycoris', which zeroes the second as the authors do",
            "rows kept by rank_dropout are scaled up, which peft leaves off by default",
        ),
        description="Adds alpha / rank * W1 (x) (B A), a Kronecker product, to each target weight.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a factor or a rank that peft would replace silently."""
        layers = super().linears(model)
        rank, factor = self.config.rank, self.config.decompose_factor
        for name, layer in layers.items():
            shape = f"{layer.out_features} x {layer.in_features}"
            if factor is not None and gcd(layer.out_features, layer.in_features) % factor:
                common = gcd(*(side for other in layers.values() for side in (other.in_features, other.out_features)))
                allowed = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0)
                raise UserError(
                    f"decompose_factor: {factor} does not divide {name} ({shape}); allowed: {allowed or '-'}"
                )
            split = self.split(layer)
            limit = split.largest_rank
            if self.config.decompose_both:
                limit = min(limit, split.largest_first_rank)
            if rank > limit:
                parts = f"factors {split.first_out} x {split.first_in} and {split.second_out} x {split.second_in}"
                allowed = f"1 to {limit}" if limit else "none with these factors"
                raise UserError(
                    f"rank: {rank} makes no low-rank factor on {name} ({shape}, {parts}); allowed: {allowed}"
                )
        return layers

    def split(self, layer: nn.Linear) -> Split:
        """Return the shapes of a layer's two factors."""
        factor = self.config.decompose_factor
        first_out, first_in = (
            root_divisor(side) if factor is None else factor for side in (layer.out_features, layer.in_features)
        )
        return Split(first_out, first_in, layer.out_features // first_out, layer.in_features // first_in)

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the ranks at which every factor that is to be a product is one."""
        splits = [self.split(layer) for layer in super().linears(model).values()]
        limits = [split.largest_rank for split in splits]
        if self.config.decompose_both:
            limits += [split.largest_first_rank for split in splits]
        return range(1, min(limits) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        total, rank = 0, self.config.rank
        for split in map(self.split, self.linears(model).values()):
            both = self.config.decompose_both
            total += rank * (split.first_out + split.first_in) if both else split.first_out * split.first_in
            total += rank * (split.second_out + split.second_in)
        return total

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's LoKr configuration."""
        import peft

        factor = self.config.decompose_factor
        return peft.LoKrConfig(
            task_type=TASK,
            r=self.config.rank,
            alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            rank_dropout=self.config.rank_dropout,
            rank_dropout_scale=True,
            decompose_factor=-1 if factor is None else factor,
            decompose_both=self.config.decompose_both,
            init_weights=True if self.config.init == "default" else "lycoris",
            target_modules=patterns,
        )


class Hira(PeftMethod):
    """HiRA: every target weight times one plus a trained low-rank matrix, elementwise."""

    Config: ClassVar[type[MethodConfig]] = HiraConfig
    config: HiraConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="hira",
        title="HiRA",
        family="product",
        paper="Huang et al., 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
        url="https://openreview.net/forum?id=TwJrTz9cRS",
        capabilities=WEIGHT_ADAPTER,
        parameters="rank * sum over targets of (in + out)",
        equation="W + W * (hira_B @ hira_A)",
        learning_rate=4.5e-3,
        micro_learning_rate=3e-2,
        random_init=True,
        deviations=("A starts Kaiming-uniform (a = sqrt 5) unless init is 'gaussian'",),
        description=(
            "Adds W0 * (B A), elementwise, to each target weight W0; A and B train. Weights are small numbers, "
            "so it needs a higher learning rate than LoRA."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.rank * (layer.in_features + layer.out_features) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's HiRA configuration."""
        import peft

        return peft.HiraConfig(
            task_type=TASK,
            r=self.config.rank,
            hira_dropout=self.config.dropout,
            init_weights=True if self.config.init == "default" else "gaussian",
            target_modules=patterns,
        )


def root_divisor(side: int) -> int:
    """Return the divisor of a number nearest below its square root, or the root itself."""
    return max(n for n in range(1, int(side**0.5) + 1) if side % n == 0)
