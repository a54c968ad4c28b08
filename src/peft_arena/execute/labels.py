"""What arms are called in reports: labels that say how an arm was trained where that is not the same for all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_arena.execute.study import Arm


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
