"""Float32 arithmetic in a model whose weights are held in a 16-bit type, one block of it at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 2**22
"""Entries of a weight over the vocabulary that are in float32 at the same time."""
HALVES = (torch.bfloat16, torch.float16)
Values = Callable[[str], Tensor | None]
"""Returns the float32 values of a parameter, by the first of its names, that take the place of the model's own."""


@contextmanager
def in_float32(model: nn.Module, values: Values | None = None) -> Iterator[None]:
    """Let every block of a model compute in float32 inside the ``with`` block, whatever its weights are held in.

    The largest matrices, those over the vocabulary, are never in float32 as a whole unless other values take their
    place.

    Args:
        model: its weights are its own again at the end.
        values: asked for each parameter while its block runs; None, or where it returns None: the model's own.
    """
    names = {id(p): name for name, p in model.named_parameters()} if values is not None else {}
    hooks = []
    replaced = []
    for unit in dict.fromkeys(_units(model)):  # adapters hold modules of the model a second time
        held = {
            t: names.get(id(t)) for t in (*unit.parameters(), *unit.buffers()) if t.dtype in HALVES or id(t) in names
        }
        forward = FORWARD.get(type(unit))
        if held and forward is not None and any(tensor.dtype in HALVES for tensor in held):
            unit.forward = partial(forward, unit)
            replaced.append(unit)
        if held and (forward is None or values is not None):
            kept: dict[Tensor, Tensor] = {}
            raised = forward is None
            hooks.append(unit.register_forward_pre_hook(_raise(held, kept, values, raised=raised)))
            hooks.append(unit.register_forward_hook(_lower(kept), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for unit in replaced:
            del unit.forward


def _looked_up(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return nn.Embedding.forward(layer, ids).float()


def _multiplied(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return what a linear layer gives in float32, some rows of its weight at a time."""
    rows = max(1, AT_ONCE // layer.in_features)
    found = [inputs.float() @ part.float().T for part in layer.weight.split(rows)]
    outputs = torch.cat(found, dim=-1)
    return outputs if layer.bias is None else outputs + layer.bias.float()


FORWARD: dict[type[nn.Module], Any] = {nn.Embedding: _looked_up, nn.Linear: _multiplied}
"""How modules outside of the blocks compute in float32."""
APART = (nn.ModuleList, nn.Embedding, nn.Linear)
"""Modules, or lists of blocks, that are no part of a unit."""


def _raise(held: dict[Tensor, str | None], kept: dict[Tensor, Tensor], values: Values | None, *, raised: bool) -> Any:
    """Return a hook that gives tensors their other values, and the rest its own in float32 if ``raised``."""

    def before(*_: Any) -> None:
        for tensor, name in held.items():
            other = None if values is None or name is None else values(name)
            if other is not None:
                kept[tensor], tensor.data = tensor.data, other.to(tensor.device)
            elif raised and tensor.dtype in HALVES:
                kept[tensor], tensor.data = tensor.data, tensor.data.float()

    return before


def _lower(kept: dict[Tensor, Tensor]) -> Any:
    def after(*_: Any) -> None:
        for tensor, data in kept.items():
            tensor.data = data
        kept.clear()

    return after


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a model, and what is outside of blocks in units as large as can be without large matrices."""
    for child in module.children():
        own = any(True for _ in child.parameters(recurse=False)) or hasattr(child, "base_layer")  # peft's layers
        if isinstance(child, nn.ModuleList):
            yield from child
        elif own or not any(isinstance(module, APART) for module in child.modules()):
            yield child
        else:
            yield from _units(child)
