"""The order of the training data, fixed before training from the run's seed. Never torch.

Epochs follow each other without a gap: an optimizer step always has ``batch_size`` examples (the last of an epoch
schedule may have fewer), and a step may hold the end of one epoch and the beginning of the next.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id, seed_for
from peft_arena.core.specs import TrainSpec

MEGA_BATCHES = 32
"""So many random batches are sorted by length together: enough for tight batches, few enough to stay random."""


@dataclass(frozen=True)
class Plan:
    """Which examples are trained on at each optimizer step, by their index."""

    steps: tuple[tuple[int, ...], ...]
    micro_batch_size: int

    @property
    def id(self) -> str:
        """Content id: equal plans have equal ids."""
        return content_id([self.steps, self.micro_batch_size])

    def micro_batches(self, step: int) -> list[tuple[int, ...]]:
        """Return the forward passes of a step, counted from 0."""
        batch, size = self.steps[step], self.micro_batch_size
        return [batch[start : start + size] for start in range(0, len(batch), size)]


def make_plan(lengths: Sequence[int], spec: TrainSpec, seed: int) -> Plan:
    """Lay out the whole training.

    Args:
        lengths: tokens of each example.
        spec: batch size, grouping and schedule.
        seed: the run's seed.

    Raises:
        UserError: the schedule asks for less than one example.
    """
    rng = random.Random(seed_for(seed, "data"))
    micro = spec.micro_batch_size or spec.batch_size
    steps: list[tuple[int, ...]] = []
    left = examples_wanted(len(lengths), spec)
    tokens = 0
    for batch in _batches(_stream(lengths, spec, rng), spec.batch_size):
        batch = batch if left is None else batch[:left]
        if spec.group_by_length:
            batch = sorted(batch, key=lambda index: (lengths[index], index))
        steps.append(tuple(batch))
        tokens += sum(lengths[index] for index in batch)
        if left is not None:
            left -= len(batch)
        if left == 0 or (spec.schedule.tokens is not None and tokens >= spec.schedule.tokens):
            break
    return Plan(tuple(steps), micro)


def examples_wanted(available: int, spec: TrainSpec) -> int | None:
    """Return how many examples are shown in all; None where the tokens decide.

    Raises:
        UserError: the schedule asks for less than one example.
    """
    if spec.schedule.steps is not None:
        return spec.schedule.steps * spec.batch_size
    if spec.schedule.epochs is None:
        return None
    wanted = round(spec.schedule.epochs * available)
    if wanted < 1:
        raise UserError(
            f"schedule.epochs {spec.schedule.epochs:g} of {available} examples is less than one example; raise it"
        )
    return wanted


def _stream(lengths: Sequence[int], spec: TrainSpec, rng: random.Random) -> Iterator[int]:
    """Yield example indices forever, each once per epoch, batches of similar length together if asked."""
    offset = 0
    while True:
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        if spec.group_by_length:
            epoch = _grouped(epoch, lengths, spec.batch_size, (-offset) % spec.batch_size, rng)
        yield from epoch
        offset = (offset + len(epoch)) % spec.batch_size


def _grouped(order: list[int], lengths: Sequence[int], size: int, head: int, rng: random.Random) -> list[int]:
    """Sort a random order by length in parts, and shuffle the resulting batches.

    Args:
        order: one epoch.
        lengths: tokens of each example.
        size: examples in a batch.
        head: the first so many complete the last batch of the epoch before.
        rng: shuffles the batches.
    """
    ordered = order[:head]
    tail = len(order) - (len(order) - head) % size if len(order) > head else len(order)
    for start in range(head, tail, size * MEGA_BATCHES):
        part = order[start : min(start + size * MEGA_BATCHES, tail)]
        part.sort(key=lambda index: (lengths[index], index))
        batches = [part[first : first + size] for first in range(0, len(part), size)]
        rng.shuffle(batches)
        ordered += [index for batch in batches for index in batch]
    return ordered + order[max(tail, head) :]


def _batches(stream: Iterator[int], size: int) -> Iterator[list[int]]:
    while True:
        yield [next(stream) for _ in range(size)]
