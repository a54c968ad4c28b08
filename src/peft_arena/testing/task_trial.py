"""A task under test: its splits, a second instance of it, and what its scorer said, each looked up once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, get_args

from peft_arena.core.errors import UnknownNameError, UserError
from peft_arena.tasks.base import Item, Kind, Prompt, Role, Score, Split, Task
from peft_arena.tasks.gold import FULL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN = "\x02"
"""Stands between the turns of a conversation that is read as one text."""
POOL = 500
"""So many items of each split are looked at for what marks their answers."""
FEWEST = 8
"""With fewer items no pattern is told from chance."""
ALL = 20
"""With fewer items a pattern must hold in all of them."""
NEARLY = 0.9
"""With more it must hold in this share of them."""
JUDGED = 10
"""Items of the test split that wrong answers are tried on."""


class NotTestedError(Exception):
    """A check has nothing to try; the text says why."""


class TaskTrial:
    """One task under test."""

    def __init__(self, task: Task, sample: int = 40, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Take the task; nothing is loaded before a check asks for it."""
        self.task = task
        self.sample = sample
        self.tokenizer = tokenizer
        self._judged: dict[tuple[str, str], Score] = {}

    @property
    def name(self) -> str:
        """The task's name, as on its card."""
        return self.task.card.name

    @cached_property
    def found(self) -> dict[Split, tuple[Item, ...]]:
        """The splits the task has.

        Raises:
            AssertionError: a split that its role needs is not there.
        """
        found: dict[Split, tuple[Item, ...]] = {}
        for split in get_args(Split):
            try:
                found[split] = tuple(self.task.items(split))
            except UserError as error:
                role = self.task.card.role
                needed = split == "test" or (split == "train" and role is Role.TARGET)
                assert not needed, f"a {role} task needs a split '{split}': {error}"
                said = isinstance(error, UnknownNameError) and error.kind == "split"
                assert said, f"a split that is not there is an unknown split, not: {error}"
        return found

    @cached_property
    def again(self) -> Task:
        """The same task, made a second time."""
        return type(self.task)(self.task.config)

    @cached_property
    def pool(self) -> list[Item]:
        """The first items of each split."""
        return [item for items in self.found.values() for item in items[:POOL]]

    @cached_property
    def judged(self) -> list[Item]:
        """Items of the test split, evenly spread over it, that answers are tried on."""
        items = self.found["test"]
        return list(items[:: max(len(items) // JUDGED, 1)][:JUDGED])

    def needs_text(self) -> None:
        """Leave a check that is about what a model writes, where it writes nothing.

        Raises:
            NotTestedError: it writes nothing.
        """
        if self.task.card.kind is not Kind.GENERATE:
            raise NotTestedError(f"a task of kind {self.task.card.kind} judges no text that a model writes")

    def needs_answers(self) -> list[Item]:
        """Return the items to try answers on that have an answer of their own.

        Raises:
            NotTestedError: there are none, or the model writes nothing.
        """
        self.needs_text()
        held = [item for item in self.judged if self.task.target(item).strip()]
        if not held:
            raise NotTestedError("the items have no answer of their own")
        return held

    def score(self, item: Item, text: str) -> Score:
        """Return the score of an answer, cut at the stop strings, asked for once.

        Raises:
            AssertionError: the scorer raised.
        """
        said = self.task.generation.cut(text)
        key = (item.id, said)
        if key not in self._judged:
            self._judged[key] = judge(self.task, item, said)
        return self._judged[key]

    def right(self, item: Item, text: str) -> bool:
        """Say whether an answer gets the full score."""
        return self.score(item, text).value == FULL

    def decisive(self, item: Item) -> str:
        """Return the part of an item's own answer that is judged, as it stands in the answer."""
        target = self.task.target(item).strip()
        read = self.score(item, self.task.target(item)).extracted
        read = read.strip() if isinstance(read, str) else ""
        return read if read and read in target else target

    def reworded(self, item: Item, part: str) -> str:
        """Return an item's own answer with another text in the place of what is judged in it."""
        before, _, after = self.task.target(item).rpartition(self.decisive(item))
        return f"{before}{part}{after}"


def judge(task: Task, item: Item, said: str) -> Score:
    """Return a task's score of a text.

    Raises:
        AssertionError: the scorer raised, or gave something else.
    """
    try:
        score = task.score(item, said)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"the scorer raised {type(error).__name__} on {said[:40]!r}: {error}") from error
    assert isinstance(score, Score), f"the scorer gave {type(score).__name__} instead of a Score"
    return score


def flat(prompt: Prompt) -> str:
    """Return a prompt as one text, its turns apart."""
    return prompt if isinstance(prompt, str) else TURN.join(turn.content for turn in prompt)


def holds(hits: int, count: int) -> bool:
    """Say whether a pattern that so many of the items have is no chance."""
    return count >= FEWEST and hits >= (count if count < ALL else NEARLY * count)


def enough(count: int, what: str = "items") -> None:
    """Leave a check of patterns where there are too few items for one.

    Raises:
        NotTestedError: there are.
    """
    if count < FEWEST:
        raise NotTestedError(f"{count} {what} are too few to tell a pattern from chance")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most so many of the items, evenly spread over them."""
    return list(items[:: max(len(items) // count, 1)][:count])


def shown(texts: Sequence[str]) -> str:
    """Return the first of some texts for a message."""
    return "; ".join(repr(text[:60]) for text in texts[:3])


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Put Python's global random numbers in a state, and back in the end.

    Raises:
        AssertionError: they were drawn from or seeded in between.
    """
    before = random.getstate()
    random.seed(seed)
    state = random.getstate()
    try:
        yield
        assert random.getstate() == state, "it draws from, or seeds, the random numbers that the whole process shares"
    finally:
        random.setstate(before)


def all_items(found: dict[Split, tuple[Item, ...]]) -> Iterator[tuple[Split, Item]]:
    """Yield every item with its split."""
    return chain.from_iterable(((split, item) for item in items) for split, items in found.items())
