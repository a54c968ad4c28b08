"""(IA)^3: trained factors on keys, values and the inside of the feed-forward block.

Every target gets one trained vector, all ones at the start: it multiplies the output, or for ``feedforward`` targets
the input. A bias of a target is part of its output and is scaled with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig, PathKind
from peft_arena.methods.targets import Blocks, Suffix, Suffixes, matches

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class IA3Config(MethodConfig):
    """Settings of (IA)^3."""

    targets: Suffixes = ("k_proj", "v_proj", "down_proj")
    """Linear layers to scale: module names or last parts of them."""
    feedforward: tuple[Suffix, ...] = ("down_proj",)
    """The targets whose input is scaled instead of their output; each must be one of ``targets``."""

    layers: Blocks | None = None
    """Adapt only inside these transformer blocks, counted from 0; None for all."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        "targets": ("q_proj", "down_proj"),
        "feedforward": (),
        "layers": (1,),
    }

    @model_validator(mode="after")
    def _inside(self) -> IA3Config:
        stray = [name for name in self.feedforward if name not in self.targets]
        if stray:
            raise ValueError(f"feedforward names '{stray[0]}', which is not in targets: {', '.join(self.targets)}")
        return self


class IA3(PeftMethod):
    """(IA)^3: a trained factor for each output, or input, of the targets."""

    Config: ClassVar[type[MethodConfig]] = IA3Config
    config: IA3Config
    trains_vectors: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="ia3",
        title="(IA)^3",
        family="scaling",
        paper="Liu et al., 2022, Few-Shot PEFT is Better and Cheaper than In-Context Learning",
        url="https://arxiv.org/abs/2205.05638",
        capabilities=WEIGHT_ADAPTER,
        path=PathKind.MULTIPLICATIVE,
        parameters="sum over targets of out, for feedforward targets of in",
        equation="ia3_l * W",
        learning_rate=5e-3,
        micro_learning_rate=0.1,
        random_init=False,
        deviations=(
            "no extra losses of the T-Few recipe",
            "a target with a bias has its bias scaled too, a change that the weights alone do not show",
            "no weight decay: it would pull the factors from one to zero",
        ),
        description="Multiplies keys, values and inner feed-forward activations by trained vectors, ones at the start.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(
            layer.in_features if any(matches(name, part) for part in self.config.feedforward) else layer.out_features
            for name, layer in self.linears(model).items()
        )

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's (IA)^3 configuration."""
        import peft

        inner = self.config.feedforward
        feedforward: str | list[str] = (
            r"(.*\.)?(" + "|".join(part.replace(".", r"\.") for part in inner) + ")" if inner else []
        )
        return peft.IA3Config(task_type=TASK, target_modules=patterns, feedforward_modules=feedforward)
