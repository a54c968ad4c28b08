"""Bottleneck adapters: small two-layer networks after, or beside, the sublayers of each transformer block.

A sublayer's output h becomes h + s up(activation(down(h))) (sequential), or its input x adds s up(activation(down(x)))
(parallel). down has shape (bottleneck, hidden), up (hidden, bottleneck), both with biases; up starts at zero. A block
is any module with the submodules ``self_attn`` and ``mlp``, as Llama and its many relatives have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import PeftMethod
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.targets import Blocks, in_blocks

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

ATTENTION = "self_attn"
FEED_FORWARD = "mlp"
CAPABILITIES = frozenset({Capability.TRAINS, Capability.IDENTITY_AT_INIT, Capability.ONLINE_RL})
NORMS_FROZEN = "the normalisation layers stay frozen"
PRE_NORM = "stands before the residual sum of a pre-norm block, where the paper's models normalise after it"
ZERO_START = "up starts at zero, so that nothing changes at the start, instead of near zero"


class BottleneckConfig(MethodConfig):
    """Settings of a sequential bottleneck adapter."""

    bottleneck: int = Field(default=64, ge=1)
    """Inner size of each adapter; at most the model's hidden size."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Function between the two linear maps."""
    scaling: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The adapter's output is multiplied by it."""
    layers: Blocks | None = None
    """Adapt only these transformer blocks, counted from 0; None for all."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        "bottleneck": 4,
        "activation": "tanh",
        "scaling": 0.5,
        "layers": (1,),
    }


class HoulsbyConfig(BottleneckConfig):
    """Settings of Houlsby adapters."""

    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    """Function between the two linear maps."""


class ParallelConfig(BottleneckConfig):
    """Settings of parallel adapters."""

    scaling: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """The adapter's output is multiplied by it."""
    placement: Literal["feed_forward", "attention", "both"] = "feed_forward"
    """Sublayers that get an adapter beside them."""

    alternatives: ClassVar[Mapping[str, Any]] = {**BottleneckConfig.alternatives, "placement": "both"}


class BottleneckMethod(PeftMethod):
    """A network of two linear maps in each of the chosen sublayers."""

    Config: ClassVar[type[MethodConfig]] = BottleneckConfig
    config: BottleneckConfig
    size: ClassVar[str | None] = "bottleneck"
    parallel: ClassVar[bool] = False
    """Whether the adapter reads the sublayer's input instead of its output."""
    width: int | None = None
    """Hidden size of the model that was looked at last."""

    def sublayers(self) -> tuple[str, ...]:
        """Return the names of the sublayers that get an adapter."""
        return (ATTENTION, FEED_FORWARD)

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the sublayers to adapt, by name.

        Raises:
            UserError: the model has no such blocks, or a setting does not fit it.
        """
        blocks = [
            name
            for name, module in model.named_modules()
            if {ATTENTION, FEED_FORWARD} <= {child for child, _ in module.named_children()}
        ]
        if not blocks:
            raise UserError(
                f"{self.card.name} needs transformer blocks with the submodules {ATTENTION} and {FEED_FORWARD}; "
                f"{type(model).__name__} has none"
            )
        self.width = hidden_size(model)
        if self.config.bottleneck > self.width:
            raise UserError(
                f"bottleneck: {self.config.bottleneck} is above the hidden size of {blocks[0]}; "
                f"allowed: 1 to {self.width}"
            )
        names = [f"{block}.{part}" for block in blocks for part in self.sublayers()]
        found = {name: model.get_submodule(name) for name in names}
        return found if self.config.layers is None else in_blocks(found, self.config.layers)

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the sizes from 1 to the hidden size."""
        return range(1, hidden_size(model) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        adapters, inner, width = len(self.layers(model)), self.config.bottleneck, hidden_size(model)
        return adapters * (2 * width * inner + inner + width)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return the configuration of our tuner."""
        from peft_arena.methods.low_rank.own_tuner import BottleneckLayer, own_config

        settings = {
            "bottleneck": self.config.bottleneck,
            "activation": self.config.activation,
            "scaling": self.config.scaling,
            "parallel": self.parallel,
            "width": self.width,
        }
        return own_config(BottleneckLayer, patterns, settings)


class Houlsby(BottleneckMethod):
    """Houlsby adapters: after attention and after the feed-forward sublayer."""

    Config: ClassVar[type[MethodConfig]] = HoulsbyConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="adapter_houlsby",
        title="Houlsby adapters",
        family="bottleneck adapter",
        paper="Houlsby et al., 2019, Parameter-Efficient Transfer Learning for NLP",
        url="https://arxiv.org/abs/1902.00751",
        capabilities=CAPABILITIES,
        parameters="2 * blocks * (2 * hidden * bottleneck + bottleneck + hidden)",
        learning_rate=3e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(ZERO_START, NORMS_FROZEN + ", which the paper trains too", PRE_NORM),
        description="Puts a small trained network with a skip connection after both sublayers of every block.",
    )


class Pfeiffer(BottleneckMethod):
    """Pfeiffer adapters: after the feed-forward sublayer only."""

    card: ClassVar[MethodCard] = MethodCard(
        name="adapter_pfeiffer",
        title="Pfeiffer adapters",
        family="bottleneck adapter",
        paper="Pfeiffer et al., 2020, AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
        url="https://arxiv.org/abs/2005.00247",
        capabilities=CAPABILITIES,
        parameters="blocks * (2 * hidden * bottleneck + bottleneck + hidden)",
        learning_rate=1e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(ZERO_START, PRE_NORM, "only the single adapter: adapters of several tasks are not fused"),
        description="Puts a small trained network with a skip connection after every block's feed-forward sublayer.",
    )

    def sublayers(self) -> tuple[str, ...]:
        """Return the feed-forward sublayer."""
        return (FEED_FORWARD,)


class Parallel(BottleneckMethod):
    """Parallel adapters: beside the sublayers, reading what they read."""

    Config: ClassVar[type[MethodConfig]] = ParallelConfig
    config: ParallelConfig
    parallel: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="adapter_parallel",
        title="Parallel adapters",
        family="bottleneck adapter",
        paper="He et al., 2021, Towards a Unified View of Parameter-Efficient Transfer Learning",
        url="https://arxiv.org/abs/2110.04366",
        capabilities=CAPABILITIES,
        parameters="adapters * (2 * hidden * bottleneck + bottleneck + hidden); one a block, or two with 'both'",
        learning_rate=1e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "the scale is a setting and is not trained",
            "reads the sublayer's normalised input, as blocks that normalise first hand it over",
            NORMS_FROZEN,
        ),
        description="Puts a small trained network beside a sublayer of every block; both read the same input.",
    )

    def sublayers(self) -> tuple[str, ...]:
        """Return the sublayers of the setting ``placement``."""
        chosen = {"attention": (ATTENTION,), "feed_forward": (FEED_FORWARD,), "both": (ATTENTION, FEED_FORWARD)}
        return chosen[self.config.placement]


def hidden_size(model: PreTrainedModel) -> int:
    """Return the width of the model's residual stream.

    Raises:
        UserError: the model's configuration has no hidden size.
    """
    size: Any = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(size, int):
        raise UserError(f"the configuration of {type(model).__name__} has no hidden_size")
    return size
