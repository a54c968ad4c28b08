"""Sampling a token from logits, one uniform number per token, from a random stream of the row's own.

The usual way (``torch.multinomial``) takes as many numbers from one stream as the batch has rows and tokens, so a row's
sample depends on its batch. Here the number is given, and the token is the inverse of the cumulative distribution at
it: the first token, in the order of the vocabulary, whose cumulative probability exceeds the number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""Tokens whose probabilities are added up first: most of the vocabulary is then passed over in whole blocks."""
FIRST_SORTED = 256
"""Largest probabilities that are sorted first to find those of ``top_p``."""


class Sampler(NamedTuple):
    """How tokens are sampled: the settings act in this order, as those of transformers do."""

    temperature: float = 1.0
    """Logits are divided by it; above 0."""
    top_k: int = 0
    """Keep so many most likely tokens, and those as likely as the last of them; 0: all."""
    top_p: float = 1.0
    """Keep the most likely tokens up to and with the one that brings their probability to this, and those as likely as
    that one; in (0, 1]."""


def streams(seeds: Sequence[int], length: int) -> Tensor:
    """Return uniform numbers in [0, 1), shape (rows, length), float64: the first of the Philox stream of each seed.

    A longer row begins with the same numbers.
    """
    import numpy as np

    known: dict[int, np.ndarray] = {}
    for seed in seeds:
        if seed not in known:
            known[seed] = np.random.Generator(np.random.Philox(seed)).random(length)
    return torch.from_numpy(np.stack([known[seed] for seed in seeds]))


def probabilities(logits: Tensor, sampler: Sampler) -> Tensor:
    """Return what a token is drawn from: shape (rows, vocabulary), float32, rows sum to 1 up to what was cut off.

    The largest logit is taken off first, so that a temperature near 0 gives the most likely token and not NaN.

    Args:
        logits: shape (rows, vocabulary), any floating-point type; computed in float32.
        sampler: temperature, then top_k, then top_p.
    """
    scores = logits.float()
    if sampler.temperature != 1.0:
        smallest = torch.finfo(torch.float32).tiny
        scores = (scores - scores.amax(-1, keepdim=True)) / max(sampler.temperature, smallest)
    if 0 < sampler.top_k < scores.shape[-1]:
        last = scores.topk(sampler.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < last, -torch.inf)
    found = scores.softmax(-1)
    if sampler.top_p < 1.0:
        found = found.masked_fill(found < _least(found, sampler.top_p)[:, None], 0.0)
    return found


def _least(found: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability that is kept in each row, shape (rows,): of the token that reaches ``top_p``.

    Only as many of the largest are sorted as a row needs, which most often is few; the number depends on the row alone.
    """
    least = torch.empty(len(found), device=found.device)
    left = torch.arange(len(found), device=found.device)
    count = FIRST_SORTED
    while len(left):
        count = min(count, found.shape[-1])
        sizes = found[left].topk(count).values
        kept = (sizes.double().cumsum(-1) - sizes < top_p).sum(-1)
        least[left] = sizes.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
        left = left[kept == count] if count < found.shape[-1] else left[:0]
        count *= 16
    return least


def draw(logits: Tensor, sampler: Sampler, uniforms: Tensor) -> Tensor:
    """Return a token for each row, shape (rows,); one that means nothing where the logits are not finite.

    Args:
        logits: shape (rows, vocabulary).
        sampler: how to sample.
        uniforms: a number in [0, 1) for each row, shape (rows,), float64.
    """
    found = probabilities(logits, sampler)
    rows, size = found.shape
    blocks = torch.nn.functional.pad(found, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    block = _first_above(ends, uniforms * ends[:, -1])
    inside = blocks[torch.arange(rows, device=found.device), block].double().cumsum(-1)
    # the block's own sum is the last of `inside`; `ends` may differ from it in the last digit
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    token = block * BLOCK + _first_above(inside, uniforms * ends[:, -1] - start)
    return token.clamp(max=size - 1)


def _first_above(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """Return the first place of each row whose cumulative sum exceeds what is wanted; shape (rows,).

    A number that rounding has put at or beyond the row's total gives the last place that adds anything.
    """
    total = cumulative[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulative, torch.minimum(wanted, below)[:, None], right=True)[:, 0].clamp(
        max=cumulative.shape[1] - 1
    )
