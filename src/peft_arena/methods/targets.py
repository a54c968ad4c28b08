"""Which modules of a model a method adapts, and the refusals that protect the choice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, Field

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.adaptable import left_out, linear_layers, notice
from peft_arena.methods.card import MethodConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

M = TypeVar("M")
Suffix = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
Suffixes = Annotated[tuple[Suffix, ...], Field(min_length=1)]
LinearTargets = Literal["all-linear"] | Suffixes
"""``all-linear`` (every linear layer but the output layer and those no adapter can act on) or module names, each a
whole name or its last parts."""
Blocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
"""Indices of transformer blocks, from 0."""


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a name is given twice")
    return names


class TargetConfig(MethodConfig):
    """Settings of a method that adapts linear layers and nothing else."""

    targets: LinearTargets = "all-linear"
    """Linear layers to adapt: ``all-linear``, or module names or last parts of them."""
    layers: Blocks | None = None
    """Adapt only inside these transformer blocks, counted from 0; None for all."""

    alternatives: ClassVar[Mapping[str, Any]] = {"targets": ("q_proj", "v_proj"), "layers": (1,)}


class AdaptedConfig(TargetConfig):
    """Settings of a method that adapts linear layers, beside which modules can train as a whole."""

    modules_to_save: Annotated[tuple[Suffix, ...], AfterValidator(_distinct)] = Field(
        default=(), exclude_if=lambda names: not names
    )
    """Modules that train with all their weights beside the adapter, such as ``norm`` or ``lm_head``, and are saved and
    merged with it: whole names or last parts of them. None of them may be adapted, or be one weight with another."""

    alternatives: ClassVar[Mapping[str, Any]] = {**TargetConfig.alternatives, "modules_to_save": ("norm",)}


def norm_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every normalisation layer with a weight, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    }


def linear_targets(
    model: PreTrainedModel, targets: LinearTargets, blocks: Sequence[int] | None = None
) -> dict[str, nn.Linear]:
    """Return the linear layers that the settings name; ``all-linear`` leaves out those that no adapter can act on.

    Raises:
        UserError: a pattern matches no linear layer, or only the output layer, or one that no adapter can act on; a
            block that is not there.
    """
    layers = linear_layers(model)
    if not layers:
        raise UserError(f"targets: {type(model).__name__} has no torch linear layers to adapt")
    barred = left_out(model)
    if targets == "all-linear":
        chosen = {name: layer for name, layer in layers.items() if name not in barred}
        if not chosen:
            raise UserError(f"targets: {type(model).__name__} has no linear layers to adapt: {notice(model)}")
    else:
        chosen = select(layers, targets, "linear layer")
    chosen = chosen if blocks is None else in_blocks(chosen, blocks)
    for name in chosen:
        if name in barred:
            raise UserError(
                f"targets: {name} cannot be adapted: {barred[name]}; name other layers, or leave targets at all-linear"
            )
    return chosen


def in_blocks(layers: Mapping[str, M], blocks: Sequence[int]) -> dict[str, M]:
    """Return the layers inside the transformer blocks of the given indices.

    Raises:
        UserError: no layer is in one of the blocks.
    """
    found = {name: block_of(name) for name in layers}
    known = sorted({block for block in found.values() if block is not None})
    for block in blocks:
        if block not in known:
            allowed = f"{known[0]} to {known[-1]}" if known else "none, as no target is inside a numbered block"
            raise UserError(f"layers: {block} holds no target; allowed: {allowed}")
    return {name: layer for name, layer in layers.items() if found[name] in set(blocks)}


def block_of(name: str) -> int | None:
    """Return the index of the transformer block a module is in: the first number in its name."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


def select(layers: Mapping[str, M], patterns: Iterable[str], kind: str) -> dict[str, M]:
    """Return the layers that the patterns name, in the model's order.

    Raises:
        UserError: a pattern matches none of the layers; the message gives the nearest name.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in layers):
            leaves = {name.rsplit(".", 1)[-1] for name in layers}
            raise unknown(f"{kind} to target", pattern, leaves, "targets")
    return {name: layer for name, layer in layers.items() if any(matches(name, pattern) for pattern in patterns)}


def matches(name: str, pattern: str) -> bool:
    """Say whether a module's name is the pattern or ends in it at a dot."""
    return name == pattern or name.endswith(f".{pattern}")


def patterns_for(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return short patterns that match exactly the named modules: last parts where possible, else whole names."""
    wanted = set(names)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    matched = {name for name, _ in model.named_modules() if any(matches(name, leaf) for leaf in leaves)}
    return leaves if matched == wanted else sorted(wanted)


def check_rank(rank: int, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse a rank above the smaller side of a target.

    Raises:
        UserError: names the first layer that is too small.
    """
    for name, layer in layers.items():
        limit = min(layer.in_features, layer.out_features)
        if rank > limit:
            shape = f"{layer.out_features} x {layer.in_features}"
            raise UserError(f"rank: {rank} is above the smaller side of {name} ({shape}); allowed: 1 to {limit}")
