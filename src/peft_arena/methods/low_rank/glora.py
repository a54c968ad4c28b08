"""GLoRA: a low-rank change of every weight and a low-rank factor on it.

W = W0 + W0 * (A_B A_A) + (B_B B_A), products of rank ``rank`` whose left matrices are zero at the start; * is entry by
entry. With ``rank: null`` both are one trained number for each output. The paths that change biases (C, D and E) are
left out: ``peft`` makes them for layers with a bias only, which most models here have few of or none.

In training the change of every target is kept as a dense matrix for the backward pass, in float32 about as large
as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig, check_rank

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class GloraConfig(AdaptedConfig):
    """Settings of GLoRA."""

    rank: Annotated[int, Field(ge=1)] | None = 8
    """Inner dimension of both products, at most the smaller side of every target; None: a number for each output."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": None}


class Glora(PeftMethod):
    """GLoRA: a trained addition to, and a trained factor on, every entry of a weight."""

    Config: ClassVar[type[MethodConfig]] = GloraConfig
    config: GloraConfig
    size: ClassVar[str | None] = "rank"
    card: ClassVar[MethodCard] = MethodCard(
        name="glora",
        title="GLoRA",
        family="weight-dependent",
        paper="Chavan et al., 2023, One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning",
        url="https://arxiv.org/abs/2306.07967",
        capabilities=WEIGHT_ADAPTER,
        parameters="2 * rank * sum over targets of (in + out); with rank null 2 * sum over targets of out",
        learning_rate=1e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "no paths for biases (C, D, E), which peft drops without a word on layers that have none",
            "the factor is applied entry by entry, as in the authors' code and peft; the paper writes a matrix product",
            "no search for the form of each layer's paths: all layers have the same",
            "on a bfloat16 base the change is added to the layer's output, where peft rounds the changed weight, so "
            "that small changes would vanish",
        ),
        description="Adds to each target weight W a low-rank matrix and W times another one, entry by entry.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a rank above the smaller side of one."""
        layers = super().linears(model)
        if self.config.rank is not None:
            check_rank(self.config.rank, layers)
        return layers

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers, rank = self.linears(model).values(), self.config.rank
        if rank is None:
            return 2 * sum(layer.out_features for layer in layers)
        return 2 * rank * sum(layer.in_features + layer.out_features for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's GLoRA configuration."""
        import peft

        rank = self.config.rank
        return peft.GloraConfig(
            task_type=TASK,
            r=1 if rank is None else rank,
            config_A_B="vector" if rank is None else "lora",
            config_C="none",
            config_D_E="none",
            target_modules=patterns,
            bias="none",
        )

    def finish(self, model: PeftModel) -> None:
        """Let layers with a rounded weight add the change to their own output."""
        from peft_arena.methods.layers import use_changes

        use_changes(model)
