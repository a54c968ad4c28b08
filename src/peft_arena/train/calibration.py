"""Calibration data: training examples given to a method that chooses its start by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_arena.core.ids import seed_for
from peft_arena.core.specs import RunSpec
from peft_arena.models.modes import context_length, device_of
from peft_arena.train.data import draw_examples

if TYPE_CHECKING:
    from peft_arena.methods.base import Calibration, Method
    from peft_arena.models.load import Loaded
    from peft_arena.tasks.base import Task

ROWS = 8
"""Examples in one batch."""


def calibration_for(run: RunSpec, method: Method, loaded: Loaded, task: Task) -> Calibration | None:
    """Return the examples a method asks for, drawn with the run's seed from what the run trains on; None for none.

    Raises:
        UserError: the task has fewer training examples that fit.
    """
    count = method.calibration_examples
    if not count or run.train is None:
        return None
    from peft_arena.methods.base import Calibration
    from peft_arena.train.batch import collate

    room = context_length(loaded.model)
    limit = run.train.max_length if room is None else min(run.train.max_length, room)
    drawn = draw_examples(task, count, seed_for(run.seed, "calibration"), loaded.tokenizer, run.train, limit)
    drawn.sort(key=lambda example: len(example.ids))
    device = device_of(loaded.model)
    batches = []
    for start in range(0, len(drawn), ROWS):
        rows = drawn[start : start + ROWS]
        batch = collate(rows, packing=False, limit=limit, pad=int(loaded.tokenizer.pad_token_id or 0)).to(device)
        lengths = [len(example.ids) for example in rows]
        mask = batch.input_ids.new_zeros(batch.input_ids.shape)
        for row, length in zip(mask, lengths, strict=True):
            row[:length] = 1
        batches.append({"input_ids": batch.input_ids, "attention_mask": mask, "labels": batch.labels})
    return Calibration(batches)
