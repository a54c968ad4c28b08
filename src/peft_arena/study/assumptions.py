"""What a study may say about sizes that are not known before data is loaded, for the estimates of its plan."""

from __future__ import annotations

from pydantic import Field

from peft_arena.core.specs import Name, Spec
from peft_arena.cost.estimate import DEFAULT_GPU, UTILISATION


class TaskSizes(Spec):
    """Sizes of one task's data, of which only estimates are made; leaving one out gives a bound or no estimate."""

    train_items: int | None = Field(default=None, ge=1)
    """Training items; needed where a schedule counts epochs and ``examples`` is not given."""
    example_tokens: float | None = Field(default=None, gt=0)
    """Mean tokens of a training example, padding included; None: max_length, an upper bound."""
    items: int | None = Field(default=None, ge=1)
    """Test items, where the study asks for all."""
    prompt_tokens: float | None = Field(default=None, gt=0)
    """Mean tokens of a prompt; None: 512."""
    answer_tokens: float | None = Field(default=None, gt=0)
    """Mean tokens of an answer that is generated; None: as many as the task allows, an upper bound."""


class Assumptions(Spec):
    """Assumptions behind the estimates of a plan; none of them changes a run."""

    gpu: str = DEFAULT_GPU
    """One of the table in ``docs/estimates.md``."""
    utilisation: float = Field(default=UTILISATION, gt=0, le=1)
    """Share of the GPU's peak operations that training reaches."""
    tasks: dict[Name, TaskSizes] = Field(default_factory=dict)
    """By the name of a task."""
