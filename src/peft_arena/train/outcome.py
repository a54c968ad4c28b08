"""What training gives back, what it tells while it runs, and how it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.store.records import TrainingRecord


class TrainingFailed(UserError):  # noqa: N818
    """Training stopped because the loss is no longer a number; nothing was recorded as trained."""


class StepInfo(NamedTuple):
    """One finished optimizer step, as told to a watcher."""

    step: int
    """Steps done so far; the first is 1."""
    total: int
    said: str
    """Loss or reward of this step, in words."""
    tokens: int
    """Real input tokens trained on so far."""


class TrainOutcome(NamedTuple):
    """The record of a finished training and what it took."""

    record: TrainingRecord
    seconds: float
    """Wall time of the optimizer steps, without start-up, held-out losses, checkpoints and resume states."""
    cpu_seconds: float
    """Processor time of the same steps, all threads."""
    rows: int
    """Rows that went through the model, each ``padded_tokens / rows`` long in the mean."""


OnStep = Callable[[StepInfo], None]
