"""The learning rate as a function of the step, and the steps at which something is kept. Never torch."""

from __future__ import annotations

import math

from peft_arena.core.specs import TrainBase


def rate_factor(spec: TrainBase, step: int, total: int) -> float:
    """Return the learning rate of one step as a fraction of ``spec.learning_rate``.

    The warm-up rises linearly and its first step is not zero; afterwards the rate falls to just above zero at the
    last step (cosine, linear), or stays.

    Args:
        spec: schedule and warm-up fraction.
        step: steps already done, from 0.
        total: steps of the whole training.
    """
    warmup = round(spec.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if spec.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if spec.lr_schedule == "linear":
        return max(1 - done, 0.0)
    return 1.0


def save_steps(spec: TrainBase, total: int) -> tuple[int, ...]:
    """Return the steps with a checkpoint, ascending; the last is the last step."""
    return tuple(sorted({max(1, round(fraction * total)) for fraction in spec.save_points}))


def validation_steps(spec: TrainBase, total: int) -> frozenset[int]:
    """Return the steps after which the held-out loss is taken: 0, every fraction, and the last."""
    if spec.validation_items == 0:
        return frozenset()
    count = math.floor(1 / spec.validate_every + 1e-9)
    return frozenset({0, total, *(round(index * spec.validate_every * total) for index in range(1, count + 1))})
