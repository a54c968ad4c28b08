"""What is refused of a study before any work: the same for a plan and for a run, in the same words."""

from __future__ import annotations

import os
from pathlib import Path

from peft_arena.core.errors import UserError
from peft_arena.execute.items import check_items
from peft_arena.execute.known import Note
from peft_arena.execute.lengths import context_at_hand, training_lengths
from peft_arena.execute.study import Study
from peft_arena.execute.written import check_written


def check_study(study: Study, *, at_hand_only: bool = False) -> list[Note]:
    """Check what can be known of a study without the model's weights.

    Args:
        study: read and expanded.
        at_hand_only: look at no data that would have to be fetched, as a plan does.

    Returns:
        Notes for the reader of a plan: what data is read as and what is odd in it, what a default takes less of than
        it says, what is counted.

    Raises:
        UserError: there is nothing to run, or data and settings do not fit each other.
    """
    check_arms(study)
    notes = check_items(study, at_hand_only=at_hand_only)
    notes += check_written(study)
    for arm in study.arms:
        run = arm.runs[0]
        if run.train is not None and not arm.refused:
            training_lengths(run.model, run.train, context_at_hand(run.model, run.method))
    return notes


def check_arms(study: Study) -> None:
    """Refuse a study of which every arm is refused.

    Raises:
        UserError: with every reason.
    """
    if all(arm.refused for arm in study.arms):
        raise UserError(f"nothing can be run: {'; '.join(dict.fromkeys(arm.refused for arm in study.arms))}")


def check_place(root: Path) -> None:
    """Refuse a runs directory that a run could not write to, without making it.

    Raises:
        UserError: it, or the nearest directory above it that exists, cannot be written to, or is none.
    """
    found = next(path for path in (root.resolve(), *root.resolve().parents) if path.exists())
    if not found.is_dir():
        raise UserError(f"cannot write to {root}: {found} is a file")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {root}: Permission denied")
