"""Everything that a training reads, fixed before its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_arena.core.specs import RLSpec, TrainSpec
from peft_arena.train.data import Example, Examples
from peft_arena.train.plan import Plan
from peft_arena.train.prompts import Prompt, Prompts, RolloutPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainData:
    """What supervised fine-tuning reads."""

    spec: TrainSpec
    train: Examples
    validation: list[Example]
    plan: Plan
    limit: int
    """Longest row in tokens."""


@dataclass(frozen=True)
class RLData:
    """What reinforcement learning reads."""

    spec: RLSpec
    train: Prompts
    validation: list[Prompt]
    plan: RolloutPlan
    limit: int
    """Most tokens of a completion."""
    stop: tuple[str, ...]
    pretrained: Callable[[], PreTrainedModel] | None
    """Loads the reference model where it is not the one the method is attached to."""
