"""Trained keys and values before those of the input in every layer: prefix tuning and P-tuning v2.

With L layers and t = key-value heads * head size, the prefix is a matrix (num_virtual_tokens, 2 L t). Prefix tuning
makes it from trained embeddings E by W2 tanh(W1 E + b1) + b2; P-tuning v2 trains it directly. The prefix has the first
positions of the context: the input's begin after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import TASK
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.prompts.prompt import VIRTUAL, VirtualTokens

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class CacheShape(NamedTuple):
    """What keys and values of a model a prefix consists of."""

    layers: int
    width: int
    """Key-value heads times head size."""

    @property
    def row(self) -> int:
        """Numbers in one virtual token: a key and a value in each layer."""
        return 2 * self.layers * self.width


class Prefix(VirtualTokens):
    """A method of the peft library that puts keys and values before those of the input."""

    derived_settings: ClassVar[frozenset[str]] = VirtualTokens.derived_settings | {"encoder_hidden_size"}

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return nothing, as no module is replaced; check that prefixes work with the model.

        Raises:
            UserError: no room in the context, layers of different attention, or gradient checkpointing.
        """
        config: Any = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UserError(
                f"method {self.card.name} needs full attention in every layer; {type(model).__name__} has "
                f"{', '.join(sorted(kinds))}"
            )
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise UserError(f"method {self.card.name} does not work with gradient checkpointing; switch it off")
        return super().layers(model)

    def shape(self, model: PreTrainedModel) -> CacheShape:
        """Return the shape of keys and values as peft takes it from the model's configuration."""
        from peft import PrefixTuningConfig
        from peft.utils.other import _prepare_prompt_learning_config

        found: Any = _prepare_prompt_learning_config(PrefixTuningConfig(), model.config)
        return CacheShape(int(found.num_layers), int(found.token_dim))

    def finish(self, model: PeftModel) -> None:
        """Let ``generate`` always use the cache: the prefix is in it. The text does not depend on this."""
        wrapped: Any = model
        generate = wrapped.generate

        def with_cache(*args: Any, **settings: Any) -> Any:
            return generate(*args, **{**settings, "use_cache": True})

        wrapped.generate = with_cache

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint: the prefix itself, however it was made."""
        config = self.peft_config(patterns, seed=0)
        config.inference_mode = True
        return config


class PTuningV2Config(MethodConfig):
    """Settings of P-tuning v2."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Trained keys and values before those of every input; the context has room for as many tokens less."""
    init: Literal["random", "zero"] = "random"
    """Start from a standard normal distribution, or from zeros (which still take a share of the attention)."""

    alternatives: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 5, "init": "zero"}


class PTuningV2(Prefix):
    """P-tuning v2: keys and values before the input train directly."""

    Config: ClassVar[type[MethodConfig]] = PTuningV2Config
    config: PTuningV2Config
    card: ClassVar[MethodCard] = MethodCard(
        name="p_tuning_v2",
        title="P-tuning v2",
        family="prompt",
        paper="Liu et al., 2021, P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales "
        "and Tasks",
        url="https://arxiv.org/abs/2110.07602",
        capabilities=VIRTUAL | {Capability.KEYS_AND_VALUES},
        parameters="num_virtual_tokens * 2 * layers * key-value heads * head size",
        learning_rate=5e-3,
        micro_learning_rate=0.1,
        random_init=True,
        deviations=(
            "answers come from the language model's own output layer; the paper trains a new classification head",
            "one task at a time: the paper's optional multi-task stage is not offered",
            "no reparameterisation, which the paper makes optional (with it: method prefix_tuning), and no dropout on "
            "the prefix, which the authors' code has",
            "the paper's encoders have absolute positions; with rotary ones, keys are trained as already rotated",
        ),
        description="Puts trained keys and values before those of the input in every layer.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        self.layers(model)
        return self.config.num_virtual_tokens * self.shape(model).row

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's prefix tuning configuration, without projection."""
        import peft

        return peft.PrefixTuningConfig(
            task_type=TASK,
            num_virtual_tokens=self.config.num_virtual_tokens,
            prefix_projection=False,
            init_weights="zero" if self.config.init == "zero" else None,
        )


class PrefixTuningConfig(PTuningV2Config):
    """Settings of prefix tuning."""

    encoder_hidden_size: int = Field(default=512, ge=1)
    """Width of the hidden layer of the network that makes the prefix."""

    alternatives: ClassVar[Mapping[str, Any]] = {**PTuningV2Config.alternatives, "encoder_hidden_size": 24}


class PrefixTuning(Prefix):
    """Prefix tuning: a small network makes keys and values before the input."""

    Config: ClassVar[type[MethodConfig]] = PrefixTuningConfig
    config: PrefixTuningConfig
    size: ClassVar[str | None] = "encoder_hidden_size"
    derived_settings: ClassVar[frozenset[str]] = VirtualTokens.derived_settings
    card: ClassVar[MethodCard] = MethodCard(
        name="prefix_tuning",
        title="Prefix tuning",
        family="prompt",
        paper="Li and Liang, 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        url="https://arxiv.org/abs/2101.00190",
        capabilities=VIRTUAL | {Capability.KEYS_AND_VALUES},
        parameters="t (num_virtual_tokens + w) + w + 2 layers t (w + 1), t = key-value heads * head size, "
        "w = encoder_hidden_size",
        learning_rate=1e-3,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "the embeddings that the network reads are as wide as the keys, where the paper's are as wide as the model",
            "a checkpoint holds the prefix, not the network: it evaluates and serves, but training goes on only from a "
            "resume state",
            "init='zero' starts the network's last layer at zero, which the paper does not use; a start from the "
            "activations of real words is not offered (method cartridge starts so)",
        ),
        description="Puts keys and values before those of the input in every layer; a trained network makes them.",
    )

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the widths of the network up to 4096."""
        self.layers(model)
        return range(1, 4097)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        self.layers(model)
        shape, width = self.shape(model), self.config.encoder_hidden_size
        return shape.width * (self.config.num_virtual_tokens + width) + width + shape.row * (width + 1)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's prefix tuning configuration, with projection."""
        import peft

        return peft.PrefixTuningConfig(
            task_type=TASK,
            num_virtual_tokens=self.config.num_virtual_tokens,
            prefix_projection=True,
            encoder_hidden_size=self.config.encoder_hidden_size,
            init_weights="zero" if self.config.init == "zero" else None,
        )
