"""Rotary positions whose frequencies hang on the length of the row: what such a row says depends on its batch.

A type of rotary positions may turn all tokens of a forward pass by other frequencies once one of them is far enough
(transformers' ``dynamic`` and ``longrope``). A row beside a longer one is then read otherwise than alone, and a cache
keeps keys that were turned by the frequencies of a shorter row. The truth is each row alone, by full forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peft_arena.models.modes import base_of, virtual_tokens

if TYPE_CHECKING:
    from torch import nn

PARAMETERS = ("rope_parameters", "rope_scaling")
ORIGINAL = "original_max_position_embeddings"
FIRST = "original_inv_freq"


def steady_length(model: nn.Module) -> int | None:
    """Return the most tokens of a row that is read the same in every batch; None: the length changes nothing."""
    config: Any = getattr(base_of(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [
        length
        for name in PARAMETERS
        for length in _lengths(getattr(config, name, None), config)
        if isinstance(length, int) and length > 0
    ]
    return min(found) - virtual_tokens(model) if found else None


def _lengths(given: object, config: object) -> Iterator[object]:
    """Yield the lengths above which frequencies change, of all types of layers."""
    if not isinstance(given, Mapping):
        return
    kind = str(given.get("rope_type") or given.get("type") or "")
    longest = getattr(config, "max_position_embeddings", None)
    if "dynamic" in kind:
        yield longest
    elif kind == "longrope":
        yield given.get(ORIGINAL) or getattr(config, ORIGINAL, None) or longest
    for part in given.values():
        yield from _lengths(part, config)


def hangs_on_length(model: nn.Module, tokens: int) -> bool:
    """Say whether a row of so many tokens must be read alone and without a cache."""
    steady = steady_length(model)
    return steady is not None and tokens > steady


def why_alone(model: nn.Module) -> str:
    """Say why long rows are read alone."""
    return f"rows of more than {steady_length(model)} tokens, whose rotary frequencies depend on the row's length"


def forget_lengths(model: nn.Module) -> None:
    """Let rotary positions begin with their first frequencies, whatever was read before.

    Some keep the frequencies of the longest row so far, until a row comes that is clearly shorter.
    """
    if steady_length(model) is None:
        return
    for module in base_of(model).modules():
        original = getattr(module, "original_max_seq_len", None)
        grown = [name for name in vars(module) if name.endswith("max_seq_len_cached")]
        if original is None or all(int(getattr(module, name)) == original for name in grown):
            continue
        for name in grown:
            setattr(module, name, original)
        for name, now in list(module.named_buffers(recurse=False)):
            first = getattr(module, name.replace("inv_freq", FIRST), None)
            if name.endswith("inv_freq") and not name.endswith(FIRST) and first is not None:
                module.register_buffer(name, first.to(now.device), persistent=False)
