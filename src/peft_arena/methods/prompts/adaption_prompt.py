"""LLaMA-Adapter: trained prompts that the attention of the top layers reads through a gate that starts closed.

out = attention(x) + gate * W_o softmax(q k'^T / sqrt(head size)) v', with k' = W_k p and v' = W_v p from a trained
prompt p (adapter_len, hidden); q are the layer's own rotated queries, gate is one trained number per layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import TASK, PeftMethod
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.prompts.prompt import hidden_size

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILY = "llama"
"""The model family of peft's whose attention modules are wrapped as this method needs it."""


class AdaptionPromptConfig(MethodConfig):
    """Settings of LLaMA-Adapter."""

    adapter_len: int = Field(default=10, ge=1)
    """Vectors in the prompt of each adapted layer. They take no room in the context."""
    top_layers: int | None = Field(default=None, ge=1)
    """Adapt only so many layers, from the top; None for all."""

    alternatives: ClassVar[Mapping[str, Any]] = {"adapter_len": 4, "top_layers": 1}


class AdaptionPrompt(PeftMethod):
    """LLaMA-Adapter: gated prompts in the attention of the top layers."""

    Config: ClassVar[type[MethodConfig]] = AdaptionPromptConfig
    config: AdaptionPromptConfig
    size: ClassVar[str | None] = "adapter_len"
    derived_settings: ClassVar[frozenset[str]] = frozenset({"target_modules", "adapter_layers"})
    card: ClassVar[MethodCard] = MethodCard(
        name="adaption_prompt",
        title="LLaMA-Adapter",
        family="prompt",
        paper="Zhang et al., 2023, LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
        url="https://arxiv.org/abs/2303.16199",
        capabilities=frozenset({Capability.TRAINS, Capability.IDENTITY_AT_INIT, Capability.ONLINE_RL}),
        parameters="adapted layers * (adapter_len * hidden + 1)",
        learning_rate=5e-3,
        micro_learning_rate=0.1,
        random_init=True,
        deviations=(
            "all layers are adapted by default, where the paper leaves the lowest out (30 of 32 in LLaMA-7B)",
            "one gate for each layer, shared by its heads, and no tanh on it, which the authors' code has",
            "a checkpoint has peft's files, but peft itself loads it only on llama and mistral models",
        ),
        description="Lets each layer's attention read a trained prompt through a gate that starts at zero.",
    )

    def attentions(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the attention modules to adapt, by name.

        Raises:
            UserError: the model's attention is of another build, or has fewer layers than the setting asks for.
        """
        from torch import nn

        found = {
            name: module
            for name, module in model.named_modules()
            if all(isinstance(getattr(module, part, None), nn.Linear) for part in PROJECTIONS)
        }
        rotates = all(
            hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb") for module in found.values()
        )
        if not found or not rotates or len({name.rsplit(".", 1)[-1] for name in found}) > 1:
            raise UserError(
                f"method {self.card.name} needs attention with {', '.join(PROJECTIONS)} and rotary positions, "
                f"which {type(model).__name__} does not have"
            )
        wanted = len(found) if self.config.top_layers is None else self.config.top_layers
        if wanted > len(found):
            raise UserError(f"top_layers: {wanted} are more than the model has; allowed: 1 to {len(found)}")
        return dict(list(found.items())[-wanted:])

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return nothing of what peft calls adapter layers; check that the model has the attention needed.

        Raises:
            UserError: a setting does not fit the model.
        """
        self.attentions(model)
        return {}

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the lengths of the prompt up to 4096."""
        return range(1, 4097)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return len(self.attentions(model)) * (self.config.adapter_len * hidden_size(model) + 1)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's configuration; which modules and how many layers follows from the model."""
        import peft

        return peft.AdaptionPromptConfig(task_type=TASK, adapter_len=self.config.adapter_len)

    def _wrap(self, model: PreTrainedModel, config: PeftConfig, seed: int, wanted: set[str]) -> PeftModel:
        chosen = self.attentions(model)
        settings: Any = config
        settings.target_modules = next(iter(chosen)).rsplit(".", 1)[-1]
        settings.adapter_layers = len(chosen)
        with known_to_peft(str(model.config.model_type)):
            return super()._wrap(model, config, seed, wanted)

    def finish(self, model: PeftModel) -> None:
        """Give the adapted layers a forward pass that works for every dtype and model, and float32 parameters."""
        from peft.tuners.adaption_prompt import AdaptedAttention

        tuner: Any = model.base_model
        tuner.forward = lambda *args, **kwargs: tuner.model(*args, **kwargs)
        layers: list[Any] = [module for module in model.modules() if isinstance(module, AdaptedAttention)]
        for layer in layers:
            for parameter in (layer.adaption_prompt, layer.adaption_gate):
                parameter.data = parameter.data.float()
            layer.forward = _Forward(layer)


class _Forward:
    """The forward pass of one adapted attention module."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, hidden_states: Tensor, **given: Any) -> tuple[Any, ...]:
        """Return what the attention returns, with the gated prompt's part added to its first entry."""
        attention = self.layer.model
        output, *rest = attention(hidden_states=hidden_states, **given)
        added = self.read_prompt(hidden_states, *given["position_embeddings"])
        return (output + added.to(output.dtype), *rest)

    def read_prompt(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the prompt's part, shape (rows, tokens, hidden)."""
        import torch
        from torch.nn import functional

        attention: Any = self.layer.model
        prompt = self.layer.adaption_prompt.to(hidden.dtype)
        query, key, value = (self.heads(part, states) for part, states in (("q", hidden), ("k", prompt), ("v", prompt)))
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query, _ = rotate(query, query, cos, sin)
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        scale = getattr(attention, "scaling", query.shape[-1] ** -0.5)
        weights = torch.softmax((query @ key.transpose(2, 3)).float() * scale, dim=-1)
        read = (self.layer.adaption_gate * weights).to(value.dtype) @ value
        return functional.linear(read.transpose(1, 2).flatten(2), attention.o_proj.weight)

    def heads(self, part: str, states: Tensor) -> Tensor:
        """Return queries, keys or values of some states, shape (rows, heads, tokens, head size)."""
        attention: Any = self.layer.model
        found: Tensor = getattr(attention, f"{part}_proj")(states)
        found = found.unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{part}_norm", None)
        return (found if norm is None else norm(found)).transpose(1, 2)


@contextmanager
def known_to_peft(model_type: str) -> Iterator[None]:
    """Let peft wrap the attention of a model family that is not in its table."""
    from peft.tuners.adaption_prompt import config

    table = config.TRANSFORMERS_MODEL_CONFIG
    known = model_type in table
    if not known:
        table[model_type] = table[FAMILY]
    try:
        yield
    finally:
        if not known:
            del table[model_type]
