"""Rollouts by vLLM, through TRL: which weights it gets, and which methods can. Not verified on vLLM or a GPU.

TRL merges adapters into the live weights, hands them over and takes the change out again, which in bfloat16 does not
give the same weights back. Here the tuned weights are made one by one beside the live ones, which stay untouched; a
digest of them is compared after every hand-over all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec, RLSpec
from peft_arena.methods.base import Capability, MethodCard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peft_arena.methods.base import Attached

NEEDED = frozenset({Capability.LINEAR_DELTA, Capability.MERGEABLE})


def vllm_refusal(card: MethodCard, model: ModelSpec) -> str:
    """Say why vLLM cannot generate for a method on a model; empty if it can."""
    if model.new_tokens:
        return "vLLM loads the model without model.new_tokens; use rollouts: transformers"
    missing = sorted(NEEDED - card.capabilities)
    if missing:
        return f"vLLM needs the tuned model as plain weights, and {card.name} is not {' and '.join(missing)}"
    if {Capability.CHANGES_BASE, Capability.PEFT_ADAPTER} <= card.capabilities:
        return f"vLLM gets pretrained weights plus a change, and {card.name} has put other weights in their place"
    return ""


def vllm_arguments(spec: RLSpec, stop: Sequence[str]) -> dict[str, Any]:
    """Return TRL's settings for the engine that generates; none for the model itself."""
    if spec.rollouts == "transformers":
        return {}
    return {
        "use_vllm": True,
        "vllm_mode": spec.rollouts.removeprefix("vllm_"),
        "generation_kwargs": {"stop": list(stop)} if stop else None,
    }


def plain_weights(attached: Attached) -> Iterator[tuple[str, Tensor]]:
    """Yield the tuned weights under the names of the pretrained architecture, one at a time, in the model's type.

    The live weights are only read.

    Raises:
        UserError: something other than the weight of a linear layer is trained beside the pretrained parameters.
    """
    import torch
    from torch import nn

    from peft_arena.models.modes import base_of

    base = base_of(attached.model)
    for name, module in base.named_modules():
        inner = getattr(module, "base_layer", getattr(module, "original_module", None))
        odd = inner is not None and not isinstance(inner, nn.Linear)
        if odd and any(parameter.requires_grad for parameter in module.parameters()):
            raise UserError(
                f"vLLM gets linear layers with their change, and {name} ({type(inner).__name__}) is also changed: "
                "use rollouts: transformers"
            )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in type(base)(base.config).named_parameters()}
    linear = {name for name, module in _plain_modules(base).items() if isinstance(_inner(module), nn.Linear)}
    for name, parameter in base.named_parameters():
        plain = _plain(name)
        if plain not in shapes or parameter.shape != shapes[plain]:
            continue
        module, _, kind = plain.rpartition(".")
        value = parameter.detach()
        owner = base.get_submodule(name.rpartition(".")[0])
        if kind == "weight" and module in linear and owner is not _plain_modules(base)[module]:
            delta = attached.delta(module)
            if delta is not None:
                value = value.float() + delta.to(value.device)
        yield plain, value.to(base.dtype)


def digest(model: nn.Module) -> dict[str, int]:
    """Return an exact checksum of every frozen parameter, by name: the sum of its bits read as integers."""
    import torch

    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(p.detach().contiguous().view(sizes[p.element_size()]).sum(dtype=torch.int64))
        for name, p in model.named_parameters()
        if not p.requires_grad
    }


def check_unchanged(before: dict[str, int], model: nn.Module) -> None:
    """Refuse to go on if a frozen weight has changed.

    Raises:
        UserError: one has.
    """
    after = digest(model)
    moved = [name for name, value in before.items() if after.get(name) != value]
    if moved:
        raise UserError(
            f"handing the weights to vLLM changed {len(moved)} frozen parameters of the model, e.g. {moved[0]}: "
            "what is trained would not be what the label says; use rollouts: transformers"
        )


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _plain_modules(base: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that stand where the pretrained architecture has one: wrappers, not what they wrap."""
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        found.setdefault(_plain(name), module)
    return found


def _inner(module: nn.Module) -> nn.Module:
    inner = getattr(module, "base_layer", None)
    return module if inner is None else inner
