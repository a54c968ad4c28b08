"""What a plan knows of a study's data: of tasks at hand the items themselves, of all others nothing.

A task is at hand if its items can be had at once and without any network (:attr:`peft_arena.tasks.base.Task.at_hand`):
the user's own files, and generators that are fast. Nothing is fetched for a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from peft_arena.core.specs import EvalSpec, TaskSpec
from peft_arena.tasks.base import Item, Split, Task, split_items
from peft_arena.tasks.foreign import is_foreign
from peft_arena.tasks.registry import made_task


class Note(NamedTuple):
    """What a plan assumes, leaves out, or takes less of than a default says."""

    about: str
    """A task or an arm."""
    text: str


class Planned(NamedTuple):
    """What an evaluation will ask."""

    items: int
    units: int
    """Independent ones among them: groups of items that share a passage or a template, else items."""
    alike: float
    """As many units of equal size weigh as much: the squared number of items over the sum of squared sizes."""


def task_at_hand(spec: TaskSpec) -> Task | None:
    """Return the task of a spec if its items are at hand; else None.

    Raises:
        UserError: the task's code or data is not of the version that the spec names.
    """
    if is_foreign(spec.name):
        return None
    task = made_task(spec)
    return task if task.at_hand else None


def known_items(spec: TaskSpec, split: Split) -> Sequence[Item] | None:
    """Return the items of a split, none where there is no such split; None where they are not at hand.

    Raises:
        UserError: the data cannot be used.
    """
    task = task_at_hand(spec)
    return None if task is None else split_items(task, split) or ()


def planned(spec: EvalSpec) -> Planned | None:
    """Return how many items an evaluation will ask, and how many units they are; None where the data is not at hand."""
    items = known_items(spec.task, spec.split)
    if items is None:
        return None
    asked = items[: spec.items]
    sizes = Counter(item.group or item.id for item in asked)
    squares = sum(size**2 for size in sizes.values())
    return Planned(len(asked), len(sizes), len(asked) ** 2 / squares if squares else 0.0)
