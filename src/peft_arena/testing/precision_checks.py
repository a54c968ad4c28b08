"""Checks of a method as it is trained on a bfloat16 base: in mixed precision, through the arena's own loss."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from peft_arena.methods.base import Capability
from peft_arena.methods.state import seed_torch
from peft_arena.testing.subject import ROUNDED, STEPS, difference, logits, tokens
from peft_arena.testing.trial import Trial
from peft_arena.train.recompute import activations_recomputed, recomputes

NOTHING = "the method does not train"

if TYPE_CHECKING:
    from torch import Tensor

    from peft_arena.methods.base import Attached


def check_mixed_precision(trial: Trial) -> str | None:
    """Check that under autocast the start is as declared, and that the loss falls there too."""
    import torch

    life = trial.life("bfloat16")
    subject, ids = life.subject, tokens()
    if not subject.has(Capability.TRAINS):
        return NOTHING
    attached = subject.attach()
    if subject.has(Capability.IDENTITY_AT_INIT):
        with torch.autocast("cpu", torch.bfloat16):
            gap = difference(logits(attached.model, ids), logits(subject.untouched(), ids))
        exact = life.step0 == trial.life("untied").step0 == 0
        assert gap <= (0.0 if exact else ROUNDED), (
            f"under autocast the output moved by {gap} before training, and by {life.step0} without"
        )
    first, last = _train(attached, subject.learning_rate)
    assert last < first, f"loss did not fall in mixed precision: {first} to {last}"
    return None


def check_recompute(trial: Trial) -> str | None:
    """Check that recomputing activations changes no gradient, or that it cannot be done where the card says so."""
    subject = trial.plain
    if not subject.has(Capability.TRAINS):
        return NOTHING
    attached = subject.attach()
    kept = _gradients(attached, recompute=False)
    attached.model.zero_grad(set_to_none=True)
    try:
        again = _gradients(attached, recompute=True)
    except (RuntimeError, ValueError) as error:
        assert not recomputes(subject.method.card), f"activations cannot be recomputed: {error}"
        return None
    same = kept.keys() == again.keys() and all(bool((kept[name] == again[name]).all()) for name in kept)
    if recomputes(subject.method.card):
        wrong = [name for name in kept if name not in again or not bool((kept[name] == again[name]).all())]
        assert same, f"recomputing activations changes gradients, of {', '.join(wrong[:3])}"
    else:
        assert not same, "activations can be recomputed, and the card declares keys_and_values"
    return None


def _gradients(attached: Attached, recompute: bool) -> dict[str, Tensor]:
    """Return the gradients of one training pass by parameter, with the random numbers of dropout fixed."""
    import torch

    ids = tokens()
    attached.begin(STEPS)
    attached.model.train()
    with activations_recomputed(attached.model) if recompute else contextlib.nullcontext(), torch.random.fork_rng():
        seed_torch(3)
        attached.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    return {name: p.grad for name, p in attached.trained().items() if p.grad is not None}


def _train(attached: Attached, learning_rate: float) -> tuple[float, float]:
    """Train some steps through the arena's loss; return the loss in evaluation mode before and after."""
    import torch

    from peft_arena.train.batch import collate
    from peft_arena.train.data import Example
    from peft_arena.train.loss import TokenLoss, held_out_loss

    rows = [Example(row, 1) for row in tokens(seed=3).tolist()]
    batch = collate(rows, packing=False, limit=len(rows[0].ids), pad=0)
    optimizer = attached.optimizer(learning_rate, 0.01)
    attached.begin(STEPS)
    with TokenLoss(attached.model, autocast=True, added=attached.extra_loss) as loss, torch.random.fork_rng():
        first = held_out_loss(loss, [batch])
        attached.model.train()
        for step in range(1, STEPS + 1):
            seed_torch(step)
            parts = loss(batch)
            mean = parts.nats / len(batch.targets)
            (mean if parts.extra is None else mean + parts.extra).backward()
            optimizer.step()
            attached.after_step(step, STEPS)
            optimizer.zero_grad()
        attached.model.eval()
        return first, held_out_loss(loss, [batch])
