"""The shapes of a decoder, from its configuration alone. Never imports torch.

Understood are decoders of the Llama kind: blocks of grouped-query attention and a gated feed-forward layer, two norms
in each, one norm at the end. What the families differ in is in :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft_arena.core.errors import UserError


class Family(NamedTuple):
    """What sets a family of decoders apart; None: its configuration says."""

    attention_bias: bool | None
    """Of queries, keys and values."""
    output_bias: bool | None
    """Of the attention's output."""
    head_norms: bool = False
    """Whether queries and keys are normalised head by head."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(None, None),
    "mistral": Family(False, False),
    "qwen2": Family(True, False),
    "qwen3": Family(None, None, head_norms=True),
}
"""By ``model_type``."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shapes of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """Whether the output layer is the input embedding."""
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool

    @property
    def attention_width(self) -> int:
        """Heads times head size."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Heads of keys (or values) times head size."""
        return self.kv_heads * self.head_size

    @property
    def block_matrices(self) -> int:
        """Weights of the linear layers of one block, without biases."""
        attention = 2 * self.hidden * (self.attention_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def output_matrix(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    @property
    def matrix_parameters(self) -> int:
        """Weights that multiply every token: all linear layers and the output layer, not the input embedding."""
        return self.layers * self.block_matrices + self.output_matrix

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        block = self.block_matrices + 2 * self.hidden
        block += self.attention_bias * (self.attention_width + 2 * self.kv_width)
        block += self.output_bias * self.hidden
        block += self.mlp_bias * (2 * self.intermediate + self.hidden)
        block += self.head_norms * 2 * self.head_size
        embeddings = self.output_matrix * (1 if self.tied else 2)
        return self.layers * block + self.hidden + embeddings


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the shapes that a model's configuration states.

    Args:
        config: content of ``config.json``; ``head_dim`` and ``num_key_value_heads`` may be left out, as there.

    Raises:
        UserError: a family of models that is not understood here, or a configuration without a shape.
    """
    kind = str(config.get("model_type"))
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(f"the shapes of model_type '{kind}' are not understood; understood: {', '.join(FAMILIES)}")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        stated = bool(config.get("attention_bias", False))
        return Architecture(
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=stated if family.attention_bias is None else family.attention_bias,
            output_bias=stated if family.output_bias is None else family.output_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            head_norms=family.head_norms,
        )
    except KeyError as error:
        raise UserError(f"the configuration of model_type '{kind}' states no {error}") from None
