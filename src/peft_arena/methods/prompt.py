"""Prompt tuning: trained vectors in front of the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.methods.adapter import TASK, PeftMethod
from peft_arena.methods.base import Capability, MethodCard, MethodConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


class PromptTuningConfig(MethodConfig):
    """Settings of prompt tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Trained vectors in front of every input; the context has room for as many tokens less."""
    init: Literal["sample_vocab", "random"] = "sample_vocab"
    """Start from embeddings of randomly drawn vocabulary tokens, or from a standard normal distribution."""

    alternatives: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 5, "init": "random"}


class PromptTuning(PeftMethod):
    """Prompt tuning: only vectors in front of the embedded input train."""

    Config: ClassVar[type[MethodConfig]] = PromptTuningConfig
    config: PromptTuningConfig
    size: ClassVar[str | None] = "num_virtual_tokens"
    derived_settings: ClassVar[frozenset[str]] = frozenset(
        {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="prompt_tuning",
        title="Prompt tuning",
        family="prompt",
        paper="Lester et al., 2021, The Power of Scale for Parameter-Efficient Prompt Tuning",
        url="https://arxiv.org/abs/2104.08691",
        capabilities=frozenset(
            {Capability.TRAINS, Capability.ONLINE_RL, Capability.VIRTUAL_TOKENS, Capability.PEFT_ADAPTER}
        ),
        parameters="num_virtual_tokens * hidden size",
        learning_rate=1e-2,
        random_init=True,
        deviations=(
            "vocabulary tokens are drawn from all of the vocabulary, where the paper takes the 5000 most frequent",
            "init='random' is a standard normal distribution, far wider than most models' embeddings",
            "initialisation from a text or from class labels is not offered",
        ),
        description="Puts trained vectors in front of every input; the model itself is unchanged but starts elsewhere.",
    )

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return nothing: no module is replaced."""
        return {}

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        embedding: Any = model.get_input_embeddings()
        return self.config.num_virtual_tokens * int(embedding.embedding_dim)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's prompt tuning configuration."""
        import peft

        return peft.PromptTuningConfig(
            task_type=TASK,
            num_virtual_tokens=self.config.num_virtual_tokens,
            prompt_tuning_init=self.config.init.upper(),
        )
