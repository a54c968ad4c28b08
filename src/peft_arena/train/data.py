"""Training examples as tokens: what is trained on, what is too long, how much a batch is padded. Never torch."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.core.specs import RLSpec, TrainSpec
from peft_arena.models.render import Span, encode_example, encode_turns
from peft_arena.tasks.base import Item, Kind, Split, Task, split_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """One example as tokens."""

    ids: list[int]
    first_label: int
    """The loss is taken on ``ids[first_label:]``; at least 1, because nothing predicts the first token."""
    skipped: tuple[Span, ...] = ()
    """But not on these parts of it: what stands between the turns that are trained on."""

    @property
    def labels(self) -> int:
        """Number of tokens the loss is taken on."""
        return len(self.ids) - self.first_label - sum(end - begin for begin, end in self.skipped)


class Examples(NamedTuple):
    """The examples of one split that fit, in the task's order."""

    kept: list[Example]
    dropped: int
    """Examples left out because they were too long."""

    @property
    def id(self) -> str:
        """Content id over every token and where the loss begins."""
        digest = hashlib.sha256()
        for example in self.kept:
            digest.update(array("q", [example.first_label, len(example.ids), *example.ids]).tobytes())
            if example.skipped:
                digest.update(array("q", [place for span in example.skipped for place in span]).tobytes())
        return digest.hexdigest()[:12]


def read_examples(
    task: Task, split: Split, count: int | None, tokenizer: PreTrainedTokenizerBase, spec: TrainSpec, limit: int
) -> Examples:
    """Tokenize the first ``count`` items of a split as training examples.

    Validation items are as many as there are, at most ``count``, and none where the task has no such split: whether
    that is what was asked for is checked when a study is planned.

    Args:
        task: gives the items, their prompts and their targets.
        split: which items.
        count: use the first so many; None for all.
        tokenizer: the model's.
        spec: says what the loss is taken on and what happens to overlong examples.
        limit: longest example in tokens.

    Raises:
        UserError: no training item, none that fits, too few, an item without a target, or an overlong one where that is
            an error.
    """
    items = first_items(task, split, count)
    kept: list[Example] = []
    lengths: list[int] = []
    for number, item in enumerate(items):
        example = _example(task, split, number, item, tokenizer, spec)
        size = len(example.ids)
        if size <= limit:
            kept.append(example)
            continue
        lengths.append(size)
        if spec.overlong == "error":
            raise UserError(
                f"task {task.card.name}, {split} item {number} ({task.place_of(item)}) has {size} tokens and at most "
                f"{limit} are allowed (by max_length or the model's context); set overlong = drop to leave such "
                "examples out"
            )
    if split == "train" and not any(example.labels for example in kept):
        raise UserError(
            f"no {split} example of task {task.card.name} is left: all {len(items)} have more than {limit} tokens "
            f"(the shortest {min(lengths, default=0)}); max_length or the model's context is too short"
        )
    return Examples(kept, len(lengths))


def first_items(task: Task, split: Split, count: int | None) -> Sequence[Item]:
    """Return the first ``count`` items of a split that is trained on or held out.

    Raises:
        UserError: there is no training item, or fewer than ``count``.
    """
    if split != "train":
        return (split_items(task, split) or ())[:count]
    items = task.items(split)
    if not items:
        raise UserError(f"task {task.card.name} has no {split} items")
    if count is not None and count > len(items):
        raise UserError(f"train.examples is {count}, and task {task.card.name} has {len(items)} {split} items")
    return items[:count]


def draw_examples(
    task: Task, count: int, seed: int, tokenizer: PreTrainedTokenizerBase, spec: TrainSpec | RLSpec, limit: int
) -> list[Example]:
    """Draw training examples that fit, at random and without replacement, from those a run trains on.

    Args:
        task: gives the items, their prompts and their targets.
        count: how many; fewer are drawn where fewer fit.
        seed: decides which.
        tokenizer: the model's.
        spec: says which items the run trains on and what the loss is taken on.
        limit: longest example in tokens.

    Raises:
        UserError: none of them fits, or one has no target.
    """
    items = list(enumerate(task.items("train")[: spec.examples]))
    random.Random(seed).shuffle(items)
    drawn: list[Example] = []
    for number, item in items:
        if len(drawn) == count:
            break
        example = _example(task, "train", number, item, tokenizer, spec)
        if len(example.ids) <= limit:
            drawn.append(example)
    if count and not drawn:
        raise UserError(f"calibration_examples is {count}, and task {task.card.name} has no training example that fits")
    return drawn


def _example(
    task: Task, split: Split, number: int, item: Item, tokenizer: PreTrainedTokenizerBase, spec: TrainSpec | RLSpec
) -> Example:
    """Tokenize one item, the given number of its split.

    Raises:
        UserError: the item has no target, or text that cannot be tokenized; says which item.
    """
    every, as_option = spec.loss_on == "every", task.card.kind is Kind.CHOICE
    turns: list[Span] = []
    try:
        prompt, target = task.prompt(item), task.target(item)
        if every:
            encoded, turns = encode_turns(tokenizer, prompt, target, as_option=as_option)
        else:
            encoded = encode_example(tokenizer, prompt, target, as_option=as_option)
    except UserError as error:
        raise UserError(f"task {task.card.name}, {split} item {number} ({task.place_of(item)}): {error}") from None
    if spec.loss_on == "all":
        return Example(encoded.ids, 1)
    starts = [begin for begin, _ in turns] + [encoded.prompt_length]
    skipped = [(end, begin) for (_, end), begin in zip(turns, starts[1:], strict=True) if end < begin]
    return Example(encoded.ids, max(starts[0], 1), tuple(skipped))


def packing_refusal(method: str) -> str:
    """Say why examples cannot be packed for a method with vectors before the input."""
    return (
        f"packing cannot be used with method {method}: its vectors stand before the row, where only the row's first "
        "example would see them; set packing = false"
    )


def layout(examples: Sequence[Example], packing: bool, limit: int) -> list[list[Example]]:
    """Arrange the examples of one forward pass in rows.

    Without packing each example is a row. With packing each example, longest first, goes into the first row that has
    room for it (first-fit decreasing); rows keep the order in which they were opened.

    Args:
        examples: the examples of one forward pass.
        packing: whether rows may hold several examples.
        limit: most tokens in a row.
    """
    if not packing:
        return [[example] for example in examples]
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda one: -len(one.ids)):
        size = len(example.ids)
        place = next((index for index, free in enumerate(room) if free >= size), None)
        if place is None:
            rows.append([example])
            room.append(limit - size)
        else:
            rows[place].append(example)
            room[place] -= size
    return rows
