"""What the translation of an adapter configuration needs to know of a model: sizes, without its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.models.architecture import Architecture, architecture_of
from peft_arena.models.known import known_models


class Shape(NamedTuple):
    """A model whose configuration comes with peft-arena."""

    revision: str
    """Hub commit."""
    model_type: str
    architecture: Architecture

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.architecture.hidden

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return self.architecture.layers

    @property
    def heads(self) -> int:
        """Attention heads of one block."""
        return self.architecture.heads

    @property
    def biased(self) -> bool:
        """Whether a linear layer of a block has a bias."""
        return self.architecture.attention_bias or self.architecture.output_bias or self.architecture.mlp_bias

    @property
    def in_features(self) -> Mapping[str, int]:
        """Last name of each linear layer of a block to its input size."""
        inner = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), self.hidden)
        return {**inner, "o_proj": self.architecture.attention_width, "down_proj": self.architecture.intermediate}

    def inputs(self, targets: Iterable[str]) -> set[int]:
        """Return the input sizes of the named linear layers.

        Raises:
            UserError: a name that is none of them.
        """
        known = self.in_features
        unknown = sorted(set(targets) - set(known))
        if unknown:
            raise UserError(f"target_modules names '{unknown[0]}', none of {', '.join(sorted(known))}")
        return {known[name] for name in targets}


def shape_of(model: str) -> Shape:
    """Return the shape of a model whose configuration comes with peft-arena.

    Raises:
        UserError: the model is not among those known.
    """
    known = known_models()
    if model not in known:
        raise UserError(f"model_id '{model}': its sizes are not known here; known: {', '.join(known)}")
    found = known[model]
    return Shape(found.revision, str(found.config["model_type"]), architecture_of(found.config))
