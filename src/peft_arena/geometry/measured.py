"""What a measurement gives, before it is written down as a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.core.measure import Measure
    from peft_arena.store.records import GeometryRow

Progress = Callable[[float, str], None]
"""Called with the fraction that is done and what is being done."""


@dataclass(frozen=True)
class Measured:
    """The geometry of one point against the pretrained model."""

    rows: tuple[GeometryRow, ...]
    summary: tuple[Measure, ...]
    arrays: pl.DataFrame | None = None
    """Profiles, a row for each singular direction of each module; None where there are none."""
