"""Which modules of a model a method adapts, and the refusals that protect the choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field

from peft_arena.core.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

M = TypeVar("M")
Suffix = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
Suffixes = Annotated[tuple[Suffix, ...], Field(min_length=1)]
LinearTargets = Literal["all-linear"] | Suffixes
"""``all-linear`` (every linear layer but the output layer) or module names, each a whole name or its last parts."""


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return every linear layer by name, except the output layer over the vocabulary."""
    from torch import nn

    output = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output
    }


def norm_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every normalisation layer with a weight, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    }


def linear_targets(model: PreTrainedModel, targets: LinearTargets) -> dict[str, nn.Linear]:
    """Return the linear layers that a setting names.

    Raises:
        UserError: a pattern matches no linear layer, or only the output layer.
    """
    layers = linear_layers(model)
    if targets == "all-linear":
        if not layers:
            raise UserError(f"targets: {type(model).__name__} has no torch linear layers to adapt")
        return layers
    return select(layers, targets, "linear layer")


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
