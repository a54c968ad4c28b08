"""The prompts of reinforcement learning and their order, fixed before training from the run's seed. Never torch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id, seed_for
from peft_arena.core.specs import RLSpec
from peft_arena.models.render import encode_text, render
from peft_arena.tasks.base import Item, Kind, Split, Task
from peft_arena.train.data import first_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt(NamedTuple):
    """One item of a task as the model is asked it."""

    item: Item
    text: str
    ids: list[int]


class Prompts(NamedTuple):
    """The prompts of one split that leave room for an answer, in the task's order."""

    kept: list[Prompt]
    dropped: int
    """Prompts left out because prompt and longest answer do not fit."""

    @property
    def id(self) -> str:
        """Content id over every token and every item."""
        return content_id([[prompt.item.id, prompt.ids] for prompt in self.kept])


def answer_limit(spec: RLSpec, task: Task) -> int:
    """Return the most tokens of a completion."""
    return spec.max_new_tokens or task.generation.max_new_tokens


def prompt_room(spec: RLSpec, task: Task, room: int) -> int:
    """Return the most tokens of a prompt, where prompt and answer may have ``room`` tokens together.

    Raises:
        UserError: the longest answer leaves no token for a prompt.
    """
    longest = answer_limit(spec, task)
    if room <= longest:
        raise UserError(
            f"max_new_tokens {longest} leaves no room for a prompt: prompt and answer of task {task.card.name} may "
            f"have {room} tokens together, by max_length or the model's context"
        )
    return room - longest


def read_prompts(
    task: Task, split: Split, count: int | None, tokenizer: PreTrainedTokenizerBase, spec: RLSpec, room: int
) -> Prompts:
    """Tokenize the prompts of the first ``count`` items of a split; validation items as many as there are.

    Args:
        task: gives items and prompts.
        split: which items.
        count: use the first so many; None for all.
        tokenizer: the model's.
        spec: says what happens to prompts that are too long.
        room: most tokens of a prompt and its answer together.

    Raises:
        UserError: the task does not generate, has no training item or too few, none of them fits, or one does not where
            that is an error.
    """
    name = task.card.name
    if task.card.kind is not Kind.GENERATE:
        raise UserError(f"task {name} is of kind {task.card.kind}: only completions of kind generate can be rewarded")
    items = first_items(task, split, count)
    limit = prompt_room(spec, task, room)
    kept: list[Prompt] = []
    shortest = math.inf
    for number, item in enumerate(items):
        try:
            text = render(tokenizer, task.prompt(item))
            ids = encode_text(tokenizer, text)
        except UserError as error:
            raise UserError(f"task {name}, {split} item {number} ({task.place_of(item)}): {error}") from None
        if 0 < len(ids) <= limit:
            kept.append(Prompt(item, text, ids))
            continue
        shortest = min(shortest, len(ids))
        if spec.overlong == "error" or not ids:
            raise UserError(
                f"task {name}, {split} item {number} ({task.place_of(item)}): its prompt has {len(ids)} tokens, and 1 "
                f"to {limit} are allowed ({room} by max_length or the model's context, less {room - limit} for the "
                "answer)"
            )
    if split == "train" and not kept:
        raise UserError(
            f"no {split} prompt of task {name} is left: the shortest has {shortest} tokens, and {limit} are allowed "
            f"({room} by max_length or the model's context, less {room - limit} for the answer)"
        )
    return Prompts(kept, len(items) - len(kept))


@dataclass(frozen=True)
class RolloutPlan:
    """Which prompts are answered in each rollout, by their index, and how many optimizer steps there are."""

    rollouts: tuple[tuple[int, ...], ...]
    steps: int
    steps_per_rollout: int

    @property
    def id(self) -> str:
        """Content id: equal plans have equal ids."""
        return content_id([self.rollouts, self.steps, self.steps_per_rollout])

    def rollout_of(self, step: int) -> int:
        """Return the rollout that a step, counted from 0, trains on."""
        return step // self.steps_per_rollout


def plan_rollouts(available: int, spec: RLSpec, seed: int) -> RolloutPlan:
    """Lay out the whole training: each prompt once per epoch, in an order drawn from the run's seed.

    Args:
        available: number of prompts.
        spec: schedule and sizes; a schedule in epochs is rounded up to whole rollouts.
        seed: the run's seed.
    """
    prompts = spec.rollout_size // spec.group_size
    if spec.schedule.steps is not None:
        steps = spec.schedule.steps
        count = math.ceil(steps / spec.steps_per_rollout)
    else:
        assert spec.schedule.epochs is not None, "a schedule in tokens is refused by the spec"
        count = max(math.ceil(spec.schedule.epochs * available / prompts), 1)
        steps = count * spec.steps_per_rollout
    stream = _epochs(available, random.Random(seed_for(seed, "prompts")))
    rollouts = tuple(tuple(next(stream) for _ in range(prompts)) for _ in range(count))
    return RolloutPlan(rollouts, steps, spec.steps_per_rollout)


def _epochs(count: int, rng: random.Random) -> Iterator[int]:
    while True:
        order = list(range(count))
        rng.shuffle(order)
        yield from order
