"""Multitask prompt tuning for one task: a shared prompt times a low-rank factor of the task.

prompt = P * (u v), elementwise, with P (num_virtual_tokens, hidden), u (num_virtual_tokens, rank) and v (rank, hidden),
all trained. A checkpoint holds the product, as a plain prompt tuning adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.methods.adapter import ADAPTER, TASK, PeftAttached
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.files import write_adapter
from peft_arena.methods.prompts.prompt import VIRTUAL, VirtualTokens, hidden_size

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


class MultitaskPromptConfig(MethodConfig):
    """Settings of multitask prompt tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Vectors in front of every input; the context has room for as many tokens less."""
    rank: int = Field(default=1, ge=1)
    """Rank of the task's factor u v."""
    init: Literal["sample_vocab", "random"] = "sample_vocab"
    """Start P from embeddings of randomly drawn vocabulary tokens, or from a standard normal distribution."""

    alternatives: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 5, "rank": 2, "init": "random"}


class MultitaskPromptAttached(PeftAttached):
    """Multitask prompt tuning in place on a model."""

    def save(self, directory: Path) -> None:
        """Write the prompt as an adapter directory of plain prompt tuning."""
        import torch

        config: Any = self.method.stored_config([])
        for setting in self.method.derived_settings:
            setattr(config, setting, getattr(self.model.peft_config[ADAPTER], setting))
        encoder: Any = self.model.prompt_encoder[ADAPTER]
        with torch.no_grad():
            prompt: Tensor = encoder(
                torch.arange(config.num_virtual_tokens, device=encoder.embedding.weight.device)[None]
            )
        write_adapter(directory, config, self.base, {"prompt_embeddings": prompt[0]})


class MultitaskPromptTuning(VirtualTokens):
    """Multitask prompt tuning: a prompt that is a product of a shared one and a low-rank factor."""

    Config: ClassVar[type[MethodConfig]] = MultitaskPromptConfig
    config: MultitaskPromptConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="multitask_prompt_tuning",
        title="Multitask prompt tuning",
        family="prompt",
        paper="Wang et al., 2023, Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning",
        url="https://arxiv.org/abs/2303.02861",
        capabilities=VIRTUAL,
        parameters="num_virtual_tokens * hidden + rank * (num_virtual_tokens + hidden)",
        learning_rate=1e-2,
        micro_learning_rate=3e-2,
        random_init=True,
        deviations=(
            "there is one task only: nothing is shared, P and the factor train together on it",
            "no source training: P is not distilled from the prompts of other tasks, as the paper's first stage does",
            "both sides of the factor start from a normal distribution of standard deviation 0.02, so the prompt "
            "starts near zero",
            "a checkpoint holds the product as a prompt tuning adapter; the factors are only in a resume state",
        ),
        description="Puts vectors in front of every input: a trained prompt times a trained low-rank factor.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        self.layers(model)
        tokens, hidden = self.config.num_virtual_tokens, hidden_size(model)
        return tokens * hidden + self.config.rank * (tokens + hidden)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's multitask prompt tuning configuration, for a single task."""
        import peft

        return peft.MultitaskPromptTuningConfig(
            task_type=TASK,
            num_virtual_tokens=self.config.num_virtual_tokens,
            num_ranks=self.config.rank,
            num_tasks=1,
            prompt_tuning_init=self.config.init.upper(),
        )

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint, which is a plain prompt."""
        import peft

        return peft.PromptTuningConfig(
            task_type=TASK,
            num_virtual_tokens=self.config.num_virtual_tokens,
            prompt_tuning_init="RANDOM",
            inference_mode=True,
        )

    def finish(self, model: PeftModel) -> None:
        """Say which task every input is of, which peft asks for in each forward pass."""
        import torch
        from peft import MultitaskPromptTuningConfig

        if not isinstance(model.peft_config[ADAPTER], MultitaskPromptTuningConfig):
            return
        encoder: Any = model.prompt_encoder[ADAPTER]
        forward = encoder.forward

        def of_the_task(indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
            prompt: Tensor = forward(indices, torch.zeros(len(indices), dtype=torch.long, device=indices.device))
            return prompt

        encoder.forward = of_the_task

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that saves the product."""
        return MultitaskPromptAttached(self, model, base)
