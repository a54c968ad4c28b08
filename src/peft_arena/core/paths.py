"""Points between the pretrained and the tuned model, and scans over them: frozen, part of a record's key."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from peft_arena.core.specs import EvalSpec, PathSpec, Spec

Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MOST = 1000
"""Most factors of a grid that is written as START:STOP:STEP."""
DEFAULT_MARGIN = 2.0
"""Points that count as no difference where nobody says another number."""
TUNED = 1.0
"""The factor at which a uniform path is at the tuned model."""


class ScanSpec(Spec):
    """A walk along one path: where it stops, what it is chosen by and what it is judged by."""

    path: PathSpec = PathSpec()
    grid: Annotated[tuple[Factor, ...], Field(min_length=1)]
    """Factors, ascending; above 1 is beyond the tuned model."""
    choose_on: Annotated[tuple[EvalSpec, ...], Field(min_length=1)]
    """Validation items: of the target first, then of every retention task."""
    claim_on: Annotated[tuple[EvalSpec, ...], Field(min_length=1)]
    """Test items of the same tasks in the same order; only the chosen point and the tuned one are judged on them."""
    tolerance: float = Field(default=DEFAULT_MARGIN, ge=0, allow_inf_nan=False)
    """The study's margin: most that the chosen point's target may lie below the tuned model's on validation items, in
    points for tasks measured as fractions, else the task's unit."""
    save_points: bool = False
    """Also evaluate the save points of training on the validation items: the other curve."""

    @model_validator(mode="after")
    def _consistent(self) -> ScanSpec:
        if list(self.grid) != sorted(self.grid) or len({f"{factor:.12g}" for factor in self.grid}) < len(self.grid):
            raise ValueError(f"grid must ascend without repetition (to twelve digits), got {list(self.grid)}")
        if [spec.task for spec in self.choose_on] != [spec.task for spec in self.claim_on]:
            raise ValueError("choose_on and claim_on must name the same tasks in the same order")
        if {spec.split for spec in self.choose_on} != {"validation"} or {spec.split for spec in self.claim_on} != {
            "test"
        }:
            raise ValueError("a point is chosen on validation items and judged on test items")
        return self

    @property
    def key(self) -> str:
        """File-name-safe key of the record: way, rule, and a hash of every setting."""
        return f"path-{self.path.readable}-{self.id}"


def read_grid(text: str) -> tuple[float, ...]:
    """Read factors: ``0.2,0.5,1`` or ``START:STOP:STEP``, from START in steps up to STOP.

    Raises:
        ValueError: it is neither, or has no factor, or more than :data:`MOST`.
    """
    parts = text.split(":")
    numbers = r"\d*\.?\d+(e-\d+)?"
    if len(parts) == 3 and all(re.fullmatch(numbers, part.strip()) for part in parts):
        start, stop, step = (float(part) for part in parts)
        if step > 0 and stop >= start:
            count = int((stop - start) / step + 1e-9)
            if count >= MOST:
                raise ValueError(f"a grid has at most {MOST} factors; '{text}' has {count + 1}")
            return tuple(round(start + place * step, 10) for place in range(count + 1))
    elif text.strip() and all(re.fullmatch(numbers, part.strip()) for part in text.split(",")):
        return tuple(sorted({float(part) for part in text.split(",")}))
    raise ValueError(f"a grid is START:STOP:STEP such as 0:1.2:0.1, or factors such as 0.2,0.5,1; got '{text}'")


Expressed = Literal["adapter", "weights"]
"""As what a point is evaluated and written: an adapter of the method's own type, or merged weights."""
