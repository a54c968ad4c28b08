"""Whether the study's model can write the gold answers of the user's own data: checked before any work.

Where the model's tokenizer is at hand, each item's own answer is tokenized, cut at the limit, decoded and scored
(:mod:`peft_arena.evaluate.gold`). An item that cannot be won is wrong for every model: it is refused, or counted where
the task's settings say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec, TaskSpec
from peft_arena.study.known_data import Note, task_at_hand
from peft_arena.study.labels import task_labels
from peft_arena.study.model import Study
from peft_arena.study.token_lengths import kept_table
from peft_arena.tasks.base import Split, Task, split_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 3
"""Raised when what is checked changes."""


class Unwinnable(NamedTuple):
    """Items that the model cannot win by their own answers."""

    items: int
    first: str
    """Place and reason of the first; empty if there is none."""
    barred: str = ""
    """Place and reason of the first that cannot even be asked; empty if all can."""


def check_written(study: Study) -> list[Note]:
    """Refuse or count the items of the user's data whose own answer the study's model cannot write so that it wins.

    Returns:
        What is counted.

    Raises:
        UserError: there is such an item, and its task does not say that they are counted; with file and row.
    """
    notes, model, labels = [], study.base.model, task_labels(study)
    for spec in {one.task.id: one.task for one in (*study.targets, *study.retention)}.values():
        task = task_at_hand(spec)
        if task is None or not task.reads_files:
            continue
        found = unwinnable(model, spec, task)
        if not found.items:
            continue
        name = labels[spec.id]
        if found.barred:
            raise UserError(f"task {name}: {found.barred}; use another model or template, or mend the row")
        if task.unusable == "refuse":
            others = f"; nor can {found.items - 1:,} more items" if found.items > 1 else ""
            raise UserError(
                f"task {name}: {found.first}{others}; mend the rows, raise max_new_tokens where an answer is too "
                "long, or say unusable: count to keep and count them"
            )
        items = f"{found.items:,} item{'s' if found.items > 1 else ''}"
        notes.append(Note(name, f"{items} that cannot be won: {found.first}"))
    return notes


def unwinnable(model: ModelSpec, spec: TaskSpec, task: Task) -> Unwinnable:
    """Return how many items the model cannot win by their own answers; none where its tokenizer is not at hand."""

    def measure(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        found = [] if tokenizer is None else _problems(task, tokenizer)
        lost, barred = ([text for text, asked in found if asked is side] for side in (True, False))
        return {"items": len(found), "first": next(iter(lost), ""), "barred": next(iter(barred), "")}

    return Unwinnable(**kept_table(["written", VERSION, spec.id], model, measure))


def _problems(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return place and reason of every item that cannot be won, and whether it can be asked, in the rows' order."""
    from peft_arena.evaluate.gold import unwritten

    items = [item for split in get_args(Split) for item in split_items(task, split) or ()]
    found = []
    for item, why, asked in task.in_order(unwritten(task, items, tokenizer), key=lambda one: one.item):
        what = f"cannot be won by its own answer {task.target(item)[:60]!r}" if asked else "cannot be asked"
        found.append((f"{task.place_of(item)} {what}: {why}", asked))
    return found
