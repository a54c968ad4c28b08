"""A forward pass of a model without weights: shapes go through it as they would, and values are imagined.

On the meta device tensors have shapes and no values. Code that asks for one (is all of the mask true? which experts
were chosen?) ends in an error there. Inside :func:`imagined` such a question is answered: yes, 1, and the first place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = ("_attn_implementation_internal", "_experts_implementation_internal")
"""Entries of a configuration that choose kernels; the plain ones run without values."""


class Imagined(TorchDispatchMode):
    """Answers what hangs on values of tensors on the meta device."""

    answered = 0
    """Questions so far; whoever asks may set it back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args[0] if args else None
        if isinstance(given, torch.Tensor) and given.device.type == "meta":
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                self.answered += 1
            if func is torch.ops.aten._local_scalar_dense.default:
                return torch.ones((), dtype=given.dtype).item()
            if func is torch.ops.aten.nonzero.default:
                return torch.empty(1, given.ndim, dtype=torch.long, device="meta")
        return func(*args, **(kwargs or {}))


@contextmanager
def imagined(model: PreTrainedModel) -> Iterator[Imagined]:
    """Let a model on the meta device run inside the block; for a model with weights nothing is done."""
    mode = Imagined()
    if next(model.parameters()).device.type != "meta":
        yield mode
        return
    held = {name: model.config.__dict__[name] for name in PLAIN if name in model.config.__dict__}
    try:
        for name in held:
            model.config.__dict__[name] = "eager"
        with mode:
            yield mode
    finally:
        model.config.__dict__.update(held)
