"""Which modules of a model are measured: by patterns, by block, or the preset of two depths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.targets import block_of, matches

if TYPE_CHECKING:
    from torch import nn

    from peft_arena.core.geometry import Modules

FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "wqkv", "qkv", "W_pack", "att_proj", "in_proj_qkv")
"""Names of one layer that gives queries, keys and values."""
ROLES: Mapping[str, tuple[str, ...]] = {
    "query": ("q_proj", "q_b_proj", "q_lin", "wq", "query", *FUSED),
    "key": ("k_proj", "kv_b_proj", "k_lin", "wk", "key", *FUSED),
    "value": ("v_proj", "kv_b_proj", "v_lin", "wv", "value", *FUSED),
    "down": (
        *(
            "down_proj",
            "mlp.c_proj",
            "dense_4h_to_h",
            "fc2",
            "fc_out",
            "mlp.wo",
            "DenseReluDense.wo",
            "feed_forward.w2",
        ),
        *("mlp.w2", "ffn.w2", "ff_out", "mlp.dense_2"),
    ),
}
"""What the layers of a transformer block are called in known architectures: the last parts of their names."""
PAPER_BLOCKS, PAPER_DEPTH = (9, 18), 28
"""Blocks measured in Liu et al., PEFT-Arena, and the number of blocks of their model."""


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer by name in the model's order, except the output layer over the vocabulary.

    Counted are modules that tell their input and output features, quantised or not, and the transposed linear layers
    of GPT-2 and its kin.
    """
    from transformers.pytorch_utils import Conv1D

    wrapped: Any = model
    output = wrapped.get_output_embeddings()

    def linear(module: nn.Module) -> bool:
        sides = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
        return sides or isinstance(module, Conv1D)

    return {name: found for name, found in model.named_modules() if found is not output and linear(found)}


def choose(names: Iterable[str], modules: Modules, layers: Sequence[int] | None) -> tuple[str, ...]:
    """Return the modules that a spec names, in the order given.

    Args:
        names: all linear modules.
        modules: ``all-linear``, or whole names or last parts of names.
        layers: only in these transformer blocks; None for all.

    Raises:
        UserError: a pattern matches nothing, or a block holds none of the modules.
    """
    every = tuple(names)
    patterns = () if isinstance(modules, str) else modules
    for pattern in patterns:
        if not any(matches(name, pattern) for name in every):
            raise unknown("module", pattern, {name.rsplit(".", 1)[-1] for name in every}, "modules")
    chosen = tuple(name for name in every if not patterns or any(matches(name, pattern) for pattern in patterns))
    if not chosen:
        raise UserError("modules: the model has no linear layers to measure")
    if layers is None:
        return chosen
    blocks = {block for name in chosen if (block := block_of(name)) is not None}
    for layer in layers:
        if layer not in blocks:
            allowed = f"{min(blocks)} to {max(blocks)}" if blocks else "none, as no module is inside a numbered block"
            raise UserError(f"layers: {layer} holds none of the modules; allowed: {allowed}")
    return tuple(name for name in chosen if block_of(name) in set(layers))


def paper_blocks(count: int) -> tuple[int, ...]:
    """Return the blocks at the depths of the paper's, 9 and 18 of 28, in a model of another number of blocks.

    The second is 18/28 of the number, rounded half up, at most the last; the first 9/28 of it, below the second. A
    model of one block has only that.
    """
    if count == 1:
        return (0,)
    first, second = (math.floor(block / PAPER_DEPTH * count + 0.5) for block in PAPER_BLOCKS)
    second = min(second, count - 1)
    return (min(first, second - 1), second)


def paper_modules(names: Iterable[str], model: str) -> tuple[str, ...]:
    """Return the query, key, value and down projections at two depths; a layer that is several of them once.

    Args:
        names: all linear modules.
        model: what the model is called in messages.

    Raises:
        UserError: a block does not hold exactly one layer for each role.
    """
    blocks: dict[int, list[str]] = {}
    for name in names:
        block = block_of(name)
        if block is not None:
            blocks.setdefault(block, []).append(name)
    advice = "set preset to none and name the modules"
    if not blocks:
        raise UserError(f"preset paper8: {model} has no linear layers in numbered blocks; {advice}")
    wanted: set[str] = set()
    for place in paper_blocks(len(blocks)):
        block = sorted(blocks)[place]
        for role, known in ROLES.items():
            found = [name for name in blocks[block] if any(matches(name, pattern) for pattern in known)]
            if len(found) != 1:
                what = f"{len(found)} layers" if found else "no layer"
                raise UserError(
                    f"preset paper8 finds {what} for the {role} projection in block {block} of {model}, which has "
                    f"{', '.join(blocks[block])}; {advice}"
                )
            wanted.add(found[0])
    return tuple(name for held in blocks.values() for name in held if name in wanted)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module that stands where the pretrained model has one of that name.

    Tuners put wrappers in the place of layers; those around the layer itself are what is returned, those around a part
    of the model that holds it are passed through.

    Raises:
        UserError: there is no such module.
    """
    found: Any = model
    for part in name.split("."):
        while part not in dict(found.named_children()):
            inner = next((child for way in WRAPPED if isinstance(child := getattr(found, way, None), _module())), None)
            if inner is None:
                raise UserError(f"module {name} of the pretrained model is not in the tuned {type(model).__name__}")
            found = inner
        found = getattr(found, part)
    module: nn.Module = found
    return module


WRAPPED = ("base_layer", "model", "original_module", "module")
"""What wrappers call the part of the model they are around."""


def _module() -> type:
    from torch import nn

    return nn.Module
