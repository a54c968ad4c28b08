"""Tuning of the normalisation layers alone.

``peft`` trains a copy of each normalisation layer beside the original. It leaves the copy in the base's type; here it
is float32 on every base, and its output is brought back to the type of its input.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.targets import Suffixes, norm_layers, select

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class LNTuningConfig(MethodConfig):
    """Settings of norm tuning."""

    targets: Literal["all-norms"] | Suffixes = "all-norms"
    """Normalisation layers to train: ``all-norms``, or module names or last parts of them."""

    alternatives: ClassVar[Mapping[str, Any]] = {"targets": ("input_layernorm",)}


class LNTuningAttached(PeftAttached):
    """Norm tuning in place on a model."""

    def merged(self) -> PreTrainedModel:
        """Return the plain model with the tuned norms in the base's type."""
        for layer in tuner_layers(self.model).values():
            tuned = layer.ln_tuning_layers[ADAPTER]
            tuned._forward_hooks.clear()
            tuned._forward_pre_hooks.clear()
        return super().merged()


class LNTuning(PeftMethod):
    """Norm tuning: only the normalisation layers train."""

    Config: ClassVar[type[MethodConfig]] = LNTuningConfig
    config: LNTuningConfig
    trains_vectors: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="ln_tuning",
        title="LayerNorm tuning",
        family="selective",
        paper="Zhao et al., 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
        url="https://arxiv.org/abs/2312.11420",
        capabilities=WEIGHT_ADAPTER - {Capability.LINEAR_DELTA},
        parameters="sum over targeted norms of their weights and biases",
        learning_rate=1e-3,
        micro_learning_rate=0.1,
        random_init=False,
        deviations=(
            "all norms including the last one, where the paper tunes those in the attention blocks",
            "the trained norms are float32 on every base, where peft keeps the base's type",
        ),
        description="Trains the weights of the normalisation layers and nothing else; no linear weight changes.",
    )

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the norms to train.

        Raises:
            UserError: a pattern matches no norm, or the model has none.
        """
        norms = norm_layers(model)
        if self.config.targets == "all-norms":
            if not norms:
                raise UserError(f"targets: {type(model).__name__} has no normalisation layers with weights")
            return norms
        return select(norms, self.config.targets, "norm")

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(p.numel() for layer in self.layers(model).values() for p in layer.parameters())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's norm tuning configuration."""
        import peft

        return peft.LNTuningConfig(task_type=TASK, target_modules=patterns)

    def finish(self, model: PeftModel) -> None:
        """Make the trained copies float32; on another base type let them take and give that type."""
        import torch

        for layer in tuner_layers(model).values():
            tuned = layer.ln_tuning_layers[ADAPTER]
            if all(p.dtype == torch.float32 for p in tuned.parameters()):
                continue
            tuned.float()
            tuned.register_forward_hook(functools.partial(_give, layer.get_base_layer()))
            if isinstance(tuned, torch.nn.LayerNorm):
                tuned.register_forward_pre_hook(_take_float32)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that cleans up when merged."""
        return LNTuningAttached(self, model, base)


def _give(base: nn.Module, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """Bring a norm's output to the type that the frozen weights around it have now."""
    return output.to(next(base.parameters()).dtype)


def _take_float32(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give torch's LayerNorm, which refuses mixed types, a float32 input."""
    return (arguments[0].float(), *arguments[1:])
