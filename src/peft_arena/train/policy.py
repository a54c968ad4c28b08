"""Log-probabilities of given completions under a model: one layout and one output layer for every method.

The rows of a rollout come padded on the left (prompts) and on the right (completions). They are shifted so that every
row begins with its prompt and only the right is padded: the layout of supervised training, which needs no mask and
suits every method. The output layer sees the positions that predict a completion token and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached
from peft_arena.methods.state import swapped
from peft_arena.models.rope import forget_lengths, hangs_on_length
from peft_arena.train.batch import IGNORED, Batch
from peft_arena.train.loss import TokenLoss
from peft_arena.train.quiet import model_kept

MOVED = 0.02
"""Standard deviation of how far weights are moved to see what they could do."""

ENTROPY_ROWS = 1024
"""Tokens whose entropy is computed at once, so that not all probabilities are in memory a second time."""


class Scores(NamedTuple):
    """What a model says of given completions."""

    log_probs: Tensor
    """Shape (rows, completion tokens), nats; 0 at masked places."""
    entropy: Tensor
    """Shape (rows, completion tokens), nats, without gradient; 0 at masked places."""
    extra: Tensor | None
    """What the model or method adds to its loss, a scalar."""
    padded_tokens: int
    """Tokens that went through the model, padding included."""


def to_batch(ids: Tensor, mask: Tensor, width: int) -> Batch:
    """Shift rows to the left and label their completions.

    Args:
        ids: token ids of prompts and completions, shape (rows, prompt + completion places).
        mask: 1 at real tokens, 0 at padding, same shape; in each row the ones are contiguous.
        width: places of the completion.
    """
    length = ids.shape[1]
    real = mask.bool()
    start = real.int().argmax(1)
    places = torch.arange(length, device=ids.device)
    source = (places + start[:, None]).clamp(max=length - 1)
    count = real.sum(1)
    longest = max(int(count.max()), 1)
    shifted = ids.gather(1, source)[:, :longest]
    inside = places[:longest] < count[:, None]
    prompt = real[:, : length - width].sum(1)
    labelled = inside & (places[:longest] >= prompt[:, None])
    shifted = shifted.masked_fill(~inside, 0)
    labels = shifted.masked_fill(~labelled, IGNORED)
    where = labelled.flatten().nonzero().flatten()
    return Batch(shifted, labels, None, where - 1, shifted.flatten()[where], int(count.sum()))


def scores(loss: TokenLoss, ids: Tensor, mask: Tensor, width: int, temperature: float) -> Scores:
    """Score completions by the model that ``loss`` is entered for, with gradients where they are on.

    Args:
        loss: entered.
        ids: token ids of prompts and completions, shape (rows, prompt + completion places).
        mask: 1 at real tokens, same shape.
        width: places of the completion; a row's completion may be masked as a whole.
        temperature: that logits are divided by.

    Raises:
        UserError: the model's output layer is not where the logits come from.
    """
    if len(ids) > 1 and hangs_on_length(loss.model, int(mask.sum(1).max())):
        return _alone(loss, ids, mask, width, temperature)
    forget_lengths(loss.model)
    batch = to_batch(ids, mask, width)
    target = mask[:, -width:].bool()
    if not len(batch.targets):
        nothing = torch.zeros(target.shape, device=ids.device)
        return Scores(nothing + _of_graph(loss), nothing, None, batch.padded_tokens)
    logits, extra = loss.logits(batch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1:
        logits = logits / temperature
    found = -functional.cross_entropy(logits, batch.targets.to(logits.device), reduction="none")
    spread = torch.cat([_entropy(part) for part in logits.detach().split(ENTROPY_ROWS)])
    empty = torch.zeros(target.shape, dtype=logits.dtype, device=ids.device)
    return Scores(empty.masked_scatter(target, found), empty.masked_scatter(target, spread), extra, batch.padded_tokens)


def _alone(loss: TokenLoss, ids: Tensor, mask: Tensor, width: int, temperature: float) -> Scores:
    """Score each row by itself: its length changes what it says, and so would that of another."""
    parts = [scores(loss, ids[row, None], mask[row, None], width, temperature) for row in range(len(ids))]
    extras = [part.extra for part in parts if part.extra is not None]
    return Scores(
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.entropy for part in parts]),
        torch.stack(extras).mean() if extras else None,
        sum(part.padded_tokens for part in parts),
    )


def _entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row, nats."""
    normalised = logits.log_softmax(-1)
    return -(normalised.exp() * normalised.nan_to_num(neginf=0.0)).sum(-1)


@contextmanager
def pretrained(attached: Attached, autocast: bool) -> Iterator[TokenLoss]:
    """Give the loss under the pretrained model inside the block, the method being switched off; see :class:`TokenLoss`.

    Raises:
        UserError: the method cannot be switched off.
    """
    with model_kept(attached.model), attached.disabled() as model:
        model.eval()
        with TokenLoss(model, autocast) as loss:
            yield loss


def check_rows(loss: TokenLoss, attached: Attached) -> None:
    """Check on two rows that the first is not influenced by the second, as completions of a rollout must not be.

    The trained weights are moved for this, and put back: many methods change nothing before they are trained.

    Args:
        loss: of the attached model, entered.
        attached: what is to be trained.

    Raises:
        UserError: what a row says depends on the other rows of its batch.
    """
    generator = torch.Generator().manual_seed(0)
    trained = attached.trained()
    moved = {name: p.detach() + MOVED * torch.randn(p.shape, generator=generator).to(p) for name, p in trained.items()}
    with model_kept(loss.model), swapped(trained, moved), torch.no_grad():
        loss.model.eval()
        gap = float((_first_row(loss, 9) - _first_row(loss, 17)).abs().max())
    if gap > 1e-4:
        raise UserError(
            "reinforcement learning cannot be used with this method and its settings: what it says of a completion "
            f"depends on the other completions of its batch (logits differ by {gap:.2g})"
        )


def _first_row(loss: TokenLoss, start: int) -> Tensor:
    """Return the logits of a row beside one that begins with token ``start``, shape (8, vocabulary)."""
    ids = torch.stack([torch.arange(1, 9), torch.arange(start, start + 8)])
    batch = Batch(ids, torch.full_like(ids, IGNORED), None, torch.arange(8), ids[0], ids.numel())
    return loss.logits(batch)[0]


def _of_graph(loss: TokenLoss) -> Tensor:
    """Return a zero that depends on the trained parameters, so that a batch without labels has zero gradients."""
    return torch.stack([p.sum() * 0.0 for p in loss.model.parameters() if p.requires_grad] or [torch.zeros(())]).sum()
