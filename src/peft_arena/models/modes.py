"""How much a model can read, what is inside an adapter wrapper, and the mode in which a model is measured."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1_000_000_000
"""Tokenizers say "no limit" with larger numbers than this."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients inside the block, and leave it exactly as it was.

    Every floating-point parameter has ``requires_grad`` inside: with frozen weights, decoding in bfloat16 on a CPU is
    four to seven times slower (measured; without effect on the numbers).
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in modes:
            module.training = training


def context_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Return the number of tokens a prompt and its answer may have together; None if no limit is known.

    Virtual tokens of the active adapter take their room from it.

    Args:
        model: its configuration gives the limit.
        tokenizer: gives the limit where the configuration does not.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit - virtual_tokens(model)
    limit = tokenizer.model_max_length if tokenizer is not None else None
    return limit - virtual_tokens(model) if limit is not None and limit < UNLIMITED else None


def virtual_tokens(model: nn.Module) -> int:
    """Return how many trained vectors the active adapter puts before the input tokens."""
    config: Any = getattr(model, "active_peft_config", None)
    if config is None or not getattr(config, "is_prompt_learning", False):
        return 0
    return int(getattr(config, "num_virtual_tokens", 0) or 0)


def base_of(model: nn.Module) -> Any:
    """Return the pretrained architecture inside an adapter wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def accepts(model: nn.Module, argument: str) -> bool:
    """Say whether the model's forward pass takes an argument of that name."""
    return argument in inspect.signature(base_of(model).forward).parameters


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's weights."""
    return next(model.parameters()).device
