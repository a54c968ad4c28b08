"""Prompt tuning: trained vectors in front of the input; and what all methods with virtual tokens share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import TASK, PeftMethod
from peft_arena.methods.base import Capability, MethodCard, MethodConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


VIRTUAL = frozenset({Capability.TRAINS, Capability.ONLINE_RL, Capability.VIRTUAL_TOKENS, Capability.PEFT_ADAPTER})
"""What methods with vectors before the input can: they neither start at nothing nor can be merged."""
FREE_TOKENS = 2
"""Positions of the context that virtual tokens must leave: a prompt's token and an answer's."""


class VirtualTokens(PeftMethod):
    """A method of the peft library that puts vectors before the input, or keys and values before each layer's."""

    size: ClassVar[str | None] = "num_virtual_tokens"
    derived_settings: ClassVar[frozenset[str]] = frozenset(
        {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
    )

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return nothing, as no module is replaced; check that the context has room.

        Raises:
            UserError: the virtual tokens leave no room for a prompt and an answer.
        """
        settings: Any = self.config
        limit = self.room(model)
        if limit is not None and settings.num_virtual_tokens > limit:
            raise UserError(
                f"num_virtual_tokens: {settings.num_virtual_tokens} leave no room in the context of "
                f"{limit + FREE_TOKENS} tokens of {type(model).__name__}; allowed: 1 to {limit}"
            )
        return {}

    def room(self, model: PreTrainedModel) -> int | None:
        """Return how many virtual tokens a model's context can take; None if no limit is known."""
        from peft_arena.models.modes import context_length

        limit = context_length(model)
        return None if limit is None else limit - FREE_TOKENS

    def sizes(self, model: PreTrainedModel) -> Sequence[int]:
        """Return the numbers of virtual tokens that leave at least half of the context, at most 4096."""
        limit = self.room(model)
        first = next(entry.ge for entry in type(self.config).model_fields[str(self.size)].metadata)
        return range(first, min(4096, 4096 if limit is None else max(limit // 2, first)) + 1)


def hidden_size(model: PreTrainedModel) -> int:
    """Return the width of a model's input embeddings."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.embedding_dim)


class PromptTuningConfig(MethodConfig):
    """Settings of prompt tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Trained vectors in front of every input; the context has room for as many tokens less."""
    init: Literal["sample_vocab", "random"] = "sample_vocab"
    """Start from embeddings of randomly drawn vocabulary tokens, or from a standard normal distribution."""

    alternatives: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 5, "init": "random"}


class PromptTuning(VirtualTokens):
    """Prompt tuning: only vectors in front of the embedded input train."""

    Config: ClassVar[type[MethodConfig]] = PromptTuningConfig
    config: PromptTuningConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="prompt_tuning",
        title="Prompt tuning",
        family="prompt",
        paper="Lester et al., 2021, The Power of Scale for Parameter-Efficient Prompt Tuning",
        url="https://arxiv.org/abs/2104.08691",
        capabilities=VIRTUAL,
        parameters="num_virtual_tokens * hidden size",
        learning_rate=1e-2,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "vocabulary tokens are drawn from all of the vocabulary, where the paper takes the 5000 most frequent",
            "init='random' is a standard normal distribution, far wider than most models' embeddings",
            "initialisation from a text or from class labels is not offered",
        ),
        description="Puts trained vectors in front of every input; the model itself is unchanged but starts elsewhere.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        self.layers(model)
        return self.config.num_virtual_tokens * hidden_size(model)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's prompt tuning configuration."""
        import peft

        return peft.PromptTuningConfig(
            task_type=TASK,
            num_virtual_tokens=self.config.num_virtual_tokens,
            prompt_tuning_init=self.config.init.upper(),
        )
