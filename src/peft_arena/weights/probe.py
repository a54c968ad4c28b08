"""Whether two models are the same function, by their logits on a fixed batch of tokens.

Weights may be held in a 16-bit type; the arithmetic is float32 whatever they are held in, so that what is seen is the
difference of the weights and not the rounding of sums. One block of a model at a time is brought to float32. The
weights of a point can take the place of a model's own while a block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_arena.core.ids import seed_for
from peft_arena.models.render import encode_prompt
from peft_arena.tasks.base import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = ("The capital of France is", "def add(a, b):\n    return", "2 + 2 =")
QUESTION = (Message("user", "Name three colours."),)
RANDOM_ROWS = 3
LENGTH = 16
"""Most tokens of a row."""
EXACT = 1e-3
"""Largest difference relative to the change, for weights of which nothing is rounded."""
ROUNDED = 0.25
"""The same where weights are rounded to 16 bits: beyond, the change is lost."""
NEGLIGIBLE = 1e-4
"""Difference of logits, which are about ten, that float32 sums in another order make."""
AT_ONCE = 2**22
"""Entries of a weight over the vocabulary that are in float32 at the same time."""
HALVES = (torch.bfloat16, torch.float16)


class Probe(NamedTuple):
    """A batch of tokens, padded on the right."""

    ids: Tensor
    """Shape (rows, tokens)."""
    mask: Tensor
    """1 for real tokens, of the same shape."""


class Distance(NamedTuple):
    """How far a model is from the tuned one, beside how far that is from the pretrained one, in logits."""

    rms_change: float
    """RMS of tuned minus pretrained logits."""
    rms_difference: float
    """RMS of this model's minus the tuned one's logits."""
    max_difference: float
    """Largest absolute value of these."""
    max_change: float
    """Largest absolute value of tuned minus pretrained logits."""
    tokens: int
    """Real tokens of the batch."""

    @property
    def ratio(self) -> float | None:
        """RMS of the difference over that of the change; None if nothing changed."""
        return self.rms_difference / self.rms_change if self.rms_change else None

    def within(self, limit: float) -> bool:
        """Say whether the difference is at most a limit times the change (RMS), or no logit differs by over 1e-4."""
        return (self.ratio is not None and self.ratio <= limit) or self.max_difference <= NEGLIGIBLE


def limit_of(dtype: torch.dtype) -> float:
    """Return what the logits of weights written in a type may differ, relative to the change."""
    return ROUNDED if dtype in HALVES else EXACT


def distance(base: Tensor, tuned: Tensor, other: Tensor) -> Distance:
    """Return the distance of a model from the tuned one; all logits have shape (tokens, vocabulary)."""
    change, difference = (tuned - base).abs_(), (other - tuned).abs_()
    return Distance(_rms(change), _rms(difference), float(difference.max()), float(change.max()), len(base))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def probe_batch(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> Probe:
    """Return a few short prompts and some rows of random tokens, the same for the same tokenizer.

    Args:
        tokenizer: renders the prompts; a conversation is among them if it has a chat template. None: random tokens
            alone.
        vocabulary: number of tokens the model knows.
    """
    rows: list[list[int]] = []
    if tokenizer is not None:
        prompts: list[Any] = [*TEXTS, *([QUESTION] if tokenizer.chat_template is not None else [])]
        rows = [encode_prompt(tokenizer, prompt)[-LENGTH:] for prompt in prompts]
    generator = torch.Generator().manual_seed(seed_for(0, "probe"))
    rows += torch.randint(vocabulary, (RANDOM_ROWS, LENGTH), generator=generator).tolist()
    rows = [row for row in rows if row and max(row) < vocabulary]
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return Probe(ids, mask)


Values = Callable[[str], Tensor | None]
"""Returns the float32 values of a parameter, by the first of its names, that take the place of the model's own."""


def probe_logits(model: nn.Module, probe: Probe, values: Values | None = None) -> Tensor:
    """Return the logits of the real tokens in float32 arithmetic, shape (tokens, vocabulary), on the CPU.

    Args:
        model: is put into evaluation mode; its weights are its own again at the end.
        probe: the batch.
        values: asked for each parameter while its block runs; None, or where it returns None: the model's own.
    """
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), _in_float32(model, values):
        found = model(input_ids=probe.ids.to(device), attention_mask=probe.mask.to(device), use_cache=False).logits
    return found[probe.mask.bool().to(device)].float().cpu()


@contextmanager
def _in_float32(model: nn.Module, values: Values | None) -> Iterator[None]:
    """Let every block of a model compute in float32 inside the ``with`` block, whatever its weights are held in.

    The largest matrices, those over the vocabulary, are never in float32 as a whole unless other values take their
    place.
    """
    names = {id(p): name for name, p in model.named_parameters()} if values is not None else {}
    hooks = []
    replaced = []
    for unit in _units(model):
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
