"""Whether the tasks of a study have the items it asks for."""

from __future__ import annotations

from peft_arena.core.errors import UserError
from peft_arena.core.specs import TaskSpec
from peft_arena.execute.study import Study
from peft_arena.methods.registry import method_of
from peft_arena.tasks.base import Task
from peft_arena.tasks.foreign import is_foreign
from peft_arena.tasks.registry import task_of


def check_items(study: Study) -> None:
    """Check that every task has the items that the study and its methods ask for; reads or makes them for all tasks.

    Raises:
        UserError: a task has fewer items, or lacks a split.
    """
    wanted: dict[tuple[str, str], list[tuple[str, int, TaskSpec]]] = {}
    for evaluation in (*study.targets, *study.retention):
        if not is_foreign(evaluation.task.name):
            entry = ("items", evaluation.items or 1, evaluation.task)
            wanted.setdefault((evaluation.task.id, evaluation.split), []).append(entry)
    for arm in study.arms:
        train = arm.runs[0].train
        if train is not None and not arm.refused:
            wanted.setdefault((train.task.id, "train"), []).append(("train.examples", train.examples or 1, train.task))
            if train.validation_items:
                entry = ("train.validation_items", train.validation_items, train.task)
                wanted.setdefault((train.task.id, "validation"), []).append(entry)
            needed = method_of(arm.runs[0].method).calibration_examples
            if train.examples is not None and needed > train.examples:
                raise UserError(f"calibration_examples of {arm.label} is {needed}, and train.examples {train.examples}")
            entry = (f"calibration_examples of {arm.label}", needed, train.task)
            wanted[train.task.id, "train"].append(entry)
    tasks: dict[str, Task] = {}
    for (task_id, split), entries in wanted.items():
        task = tasks.setdefault(task_id, task_of(entries[0][2]))
        try:
            found = len(task.items(split))  # type: ignore[arg-type]
        except UserError as error:
            if split != "validation":
                raise
            cure = "give the task one, or set train.validation_items to 0"
            raise UserError(f"{error}; the held-out loss or reward needs a validation split: {cure}") from None
        for key, count, spec in entries:
            if count > found:
                raise UserError(f"{key} is {count}, and task {spec.name} has {found} items in its {split} split")
