"""Whether two models are the same function, by their logits on a fixed batch of tokens.

Weights may be held in a 16-bit type; the arithmetic is float32 whatever they are held in, so that what is seen is the
difference of the weights and not the rounding of sums. One block of a model at a time is brought to float32. The
weights of a point can take the place of a model's own while a block runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peft_arena.core.ids import seed_for
from peft_arena.models.arithmetic import HALVES, Values, in_float32
from peft_arena.models.render import encode_prompt
from peft_arena.tasks.base import Message

if TYPE_CHECKING:
    from torch import Tensor, nn
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


def probe_logits(model: nn.Module, probe: Probe, values: Values | None = None) -> Tensor:
    """Return the logits of the real tokens in float32 arithmetic, shape (tokens, vocabulary), on the CPU.

    Args:
        model: is put into evaluation mode; its weights are its own again at the end.
        probe: the batch.
        values: asked for each parameter while its block runs; None, or where it returns None: the model's own.
    """
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), in_float32(model, values):
        found = model(input_ids=probe.ids.to(device), attention_mask=probe.mask.to(device), use_cache=False).logits
    return found[probe.mask.bool().to(device)].float().cpu()
