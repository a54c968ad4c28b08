"""What a record must say of the run that it is of: steps and tokens of its training, arithmetic of its evaluations."""

from __future__ import annotations

from pathlib import Path

from peft_arena.core.errors import UserError
from peft_arena.core.specs import RunSpec, TrainSpec
from peft_arena.core.text import shown
from peft_arena.store.records import EvaluationRecord, Record, TrainingRecord


def check_spec(record: Record, path: Path, spec: RunSpec) -> None:
    """Refuse a record that says what the run's spec excludes.

    Args:
        record: what was read.
        path: of the file, for the message.
        spec: of the run that the record is of.

    Raises:
        UserError: the two contradict each other.
    """
    why = ""
    if isinstance(record, TrainingRecord):
        why = _of_training(record, spec)
    if isinstance(record, EvaluationRecord):
        dtype = record.engine.get("dtype")
        if dtype is not None and dtype != spec.model.dtype:
            why = f"engine.dtype: must be {spec.model.dtype} as the model's, got '{shown(str(dtype), 60)}'"
    if why:
        raise UserError(f"{path} contradicts the run's spec: {why}; move it away to have it made anew")


def _of_training(record: TrainingRecord, spec: RunSpec) -> str:
    train = spec.train
    if train is None:
        return "the pretrained model has no training"
    if train.schedule.steps is not None and record.steps != train.schedule.steps:
        return f"steps: must be the {train.schedule.steps} of the schedule, got {record.steps}"
    if isinstance(train, TrainSpec):  # reinforcement learning also reads rows for its reference
        most = record.steps * train.batch_size * train.max_length
        if record.tokens > most:
            return f"tokens: must be at most steps, batch_size and max_length together, {most}, got {record.tokens}"
    return ""
