"""Whether an item's own gold answer can win: what the task calls right must get the full score by its own scorer."""

from __future__ import annotations

from peft_arena.tasks.base import Item, Kind, Task

FULL = 1.0
"""The score of a right answer."""


def gold_problem(task: Task, item: Item) -> str:
    """Say why the answer that an item is trained on does not get the full score; empty if it does.

    It is judged as a completion is: cut at the first stop string, then scored. Whether a tokenizer can write it within
    the limit of new tokens is :func:`peft_arena.evaluate.gold.written_problem`.

    Args:
        task: that asks.
        item: one of its items.
    """
    target = task.target(item)
    if task.card.kind is not Kind.GENERATE or not target:
        return ""
    said = task.generation.cut(target)
    if (why := lost(task, item, said)) and said != target and not lost(task, item, target):
        mark = min(filter(None, task.generation.stop), key=lambda text: _place(target, text))
        return f"stop string {mark!r} cuts it to {said[:60]!r}"
    return why


def lost(task: Task, item: Item, said: str) -> str:
    """Say why a text does not get the full score; empty if it does."""
    score = task.score(item, said)
    if score.value == FULL:
        return ""
    if score.value is None:
        return score.reason
    given = f"the scorer gives it {score.value:g}"
    if score.extracted.strip() == said.strip():
        return given
    read = f"reads {score.extracted[:60]!r} in it" if score.extracted.strip() else "finds nothing to judge in it"
    return f"{given}: it {read}"


def _place(text: str, mark: str) -> int:
    found = text.find(mark)
    return found if found >= 0 else len(text)
