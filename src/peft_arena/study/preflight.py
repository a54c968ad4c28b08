"""What is refused of a study before any work: the same for a plan and for a run, in the same words."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from peft_arena import __version__
from peft_arena.assets.wheel_files import cache_root, keep, kept
from peft_arena.core.bounded import user_path
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id
from peft_arena.core.specs import ModelSpec
from peft_arena.study.item_checks import check_items
from peft_arena.study.known_data import Note
from peft_arena.study.model import Study
from peft_arena.study.token_lengths import context_at_hand, training_lengths
from peft_arena.study.writable_gold import check_written


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
    check_model(study.base.model, weights=not at_hand_only)
    notes = check_items(study, at_hand_only=at_hand_only)
    notes += check_written(study)
    for arm in study.arms:
        run = arm.runs[0]
        if run.train is not None and not arm.refused:
            training_lengths(run.model, run.train, context_at_hand(run.model, run.method))
    return notes


def check_model(model: ModelSpec, *, weights: bool) -> None:
    """Refuse a model of a directory whose files are not all of it; those of other models are checked as they are made.

    What is sound is kept on disk, so that a directory is looked at once and not for each plan.

    Args:
        model: pinned.
        weights: whether it must have weights; for a plan a configuration alone will do.

    Raises:
        UserError: a file or a tensor is missing, damaged, or of another model.
    """
    from peft_arena.models.load import PACKAGED, skeleton
    from peft_arena.models.stored import check_weight_files, is_bare

    directory = user_path(model.name)
    if model.name in PACKAGED or model.new_tokens or not directory.is_dir():
        return
    if is_bare(directory):
        if weights:
            check_weight_files(directory)
        return
    key = content_id([model.revision, model.dtype, version("transformers")])
    file = cache_root() / "sound" / __version__ / f"{key}.json"
    if kept(file).get("sound") is True:
        return
    skeleton(model)
    keep(file, {"sound": True})


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
