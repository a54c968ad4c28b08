"""A record of an evaluation against the task that is registered under its name, where that is the same version."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.specs import TaskSpec
from peft_arena.core.text import shown
from peft_arena.tasks.base import FRACTION, Task
from peft_arena.tasks.registry import TASKS, check_version, make_task

if TYPE_CHECKING:
    from peft_arena.store.records import EvaluationRecord


def check_task(record: EvaluationRecord, path: Path) -> None:
    """Refuse a record that the registered task contradicts.

    Tasks of other versions, of the user's files and of packages that are not installed are not compared.

    Raises:
        UserError: the two contradict each other; the message names the file and the field.
    """
    if why := _doubt(record):
        raise UserError(f"{shown(path)} contradicts its task: {why}; move it away to have it made anew")


def _doubt(record: EvaluationRecord) -> str:
    task = _known(record.spec.task.canonical())
    card, found = (None if task is None else task.card), record.card
    if task is None or card is None or found.get("version") != card.version:
        return ""
    if found.get("name") != card.name:
        return f"card.name: must be '{card.name}', got '{shown(str(found.get('name')), 60)}'"
    if found.get("chance") != card.chance:
        return f"card.chance: must be {card.chance} for task {card.name}, got {found.get('chance')}"
    for place, (metric, measure) in enumerate(zip(card.metrics, record.metrics, strict=False)):
        stated, given = (metric.name, metric.unit, metric.better), (measure.metric, measure.unit, measure.better)
        if stated != given:
            return f"metrics.{place}: must be {', '.join(stated)} for task {card.name}, got {shown(', '.join(given))}"
    return _doubt_of_items(record, task)


def _doubt_of_items(record: EvaluationRecord, task: Task) -> str:
    """Say which item is there twice, or has a value that the task cannot give."""
    if "duplicates" not in task.card.waived:
        name, count = Counter(item.id for item in record.items).most_common(1)[0]
        if count > 1:
            return f"items: each must be there once, and '{shown(name, 60)}' is there {count} times"
    if task.card.headline.unit != FRACTION or type(task).settle is not Task.settle:
        return ""  # what a task settles may lie outside: only its mean is a fraction
    for place, item in enumerate(record.items):
        if item.value is not None and not 0 <= item.value <= 1:
            return f"items.{place}.value: must be from 0 to 1 for task {task.card.name}, got {item.value}"
    return ""


@lru_cache(maxsize=256)
def _known(canonical: str) -> Task | None:
    """Return the task of a spec; None where it is not at hand in that version, or its data is a file of the user's."""
    spec = TaskSpec.model_validate_json(canonical)
    if spec.name not in TASKS or spec.plugin is not None or spec.config.get("path") is not None:
        return None
    try:
        task = make_task(spec.name, spec.config)
        check_version(task, spec)
    except UserError:
        return None
    return task
