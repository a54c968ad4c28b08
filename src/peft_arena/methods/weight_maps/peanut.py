"""PEANuT: a small trained network reads the pretrained weight and writes its change.

W = W0 + s f(W0), where f treats each column of W0 (all outputs of one input) as a sample: A down to ``rank``, an
activation, ``depth`` encoder and decoder layers with skips, and B up again, zero at the start. The change is computed
from W0 in each forward pass; it does not depend on the input, so the result is one weight.

In training the change of every target is kept as a dense matrix for the backward pass, in float32 about as large
as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class PeanutConfig(AdaptedConfig):
    """Settings of PEANuT."""

    rank: int = Field(default=8, ge=1)
    """Width of the network; at most the smaller side of every target."""
    depth: int = Field(default=0, ge=0)
    """Hidden layers in its encoder, and as many in its decoder."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """What follows every layer but the last."""
    scaling: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Factor of the change."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 4,
        "depth": 1,
        "activation": "tanh",
        "scaling": 0.5,
    }


class Peanut(PeftMethod):
    """PEANuT: a change of each weight computed from that weight by a trained network."""

    Config: ClassVar[type[MethodConfig]] = PeanutConfig
    config: PeanutConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="peanut",
        title="PEANuT",
        family="weight-dependent",
        paper="Zhong et al., 2024, PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers",
        url="https://arxiv.org/abs/2410.01870",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of (2 * rank * out + 2 * depth * rank^2)",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "the network reads the columns of a weight (all outputs of one input), as peft stores it",
            "four of the activations that peft accepts",
        ),
        description="Adds scaling * f(W) to each target weight W: f is a small network, and only it trains.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        rank, hidden = self.config.rank, 2 * self.config.depth * self.config.rank**2
        return sum(2 * rank * layer.out_features + hidden for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's PEANuT configuration."""
        import peft

        return peft.PeanutConfig(
            task_type=TASK,
            r=self.config.rank,
            depth=self.config.depth,
            act_fn=self.config.activation,
            scaling=self.config.scaling,
            init_weights=True,
            target_modules=patterns,
        )
