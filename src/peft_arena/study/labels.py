"""What arms are called in reports: labels that say how an arm was trained where that is not the same for all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_arena.core.specs import TaskSpec
from peft_arena.study.assumptions import TaskSizes
from peft_arena.tasks.registry import display_name

if TYPE_CHECKING:
    from peft_arena.study.model import Arm, Study


def task_labels(study: Study) -> dict[str, str]:
    """Return what a reader calls each task of a study, by the task's id: the study's label for it, or its name.

    As in reports, where two share one a few digits of the evaluation's id are added then.
    """
    evaluations = {spec.task.id: spec for spec in (*study.targets, *study.retention)}
    names = {key: study.labels.get(spec.id) or display_name(spec.task) for key, spec in evaluations.items()}
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{name} ({evaluations[key].id[:4]})" for key, name in names.items()}


def stated_sizes(study: Study, task: TaskSpec) -> TaskSizes:
    """Return what a study says of the sizes of a task, by what it is called or by its registered name."""
    stated = study.file.execution.estimate.tasks
    return stated.get(display_name(task)) or stated.get(task.name) or TaskSizes()


def shown_labels(arms: Sequence[Arm]) -> list[str]:
    """Return the label of every arm as reports show it.

    Where arms are trained in several ways, labels that do not say in which get it added: ``lora (grpo)``.
    """
    objectives = [_objective(arm) for arm in arms]
    several = len(set(objectives)) > 1
    return [
        _shown(arm.label, objective) if several else arm.label for arm, objective in zip(arms, objectives, strict=True)
    ]


def _objective(arm: Arm) -> str:
    train = arm.runs[0].train
    return "" if train is None else train.objective


def _shown(label: str, objective: str) -> str:
    said = objective in re.findall(r"[a-z0-9]+", label.lower())
    return label if said or not objective else f"{label} ({objective})"
