"""The form of one entry of the table of translations: from an adapter configuration of ``peft`` to a method of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from peft_arena.interop.shapes import Shape

ADAMW = "AdamW"


class Theirs(NamedTuple):
    """What a translation is made of."""

    config: Mapping[str, Any]
    """Every field of the adapter configuration, peft's defaults where the file has none."""
    shape: Shape
    steps: int
    """Optimizer steps of the training."""


Reader = Callable[[Theirs], Any]


class Harmless(NamedTuple):
    """Why a field may differ from what ours would be."""

    reason: str
    """Said to the reader; empty for what is not worth a word."""
    when: Callable[[Theirs], bool] = lambda theirs: True
    """Whether the reason holds."""


@dataclass(frozen=True)
class Translation:
    """How adapter configurations of one kind become a method of ours.

    What is neither read nor harmless must be equal in the configuration that our method makes, or the experiment is
    refused: see :func:`peft_arena.interop.translate.translate`.
    """

    method: str
    """Of ours."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields that choose this entry: each must have one of these values."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Their field to our setting, the value as it is."""
    read: Mapping[str, Reader] = field(default_factory=dict)
    """Our setting to what reads its value; a reader refuses by raising ``UserError``."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ours that stand for what peft always does."""
    carried: frozenset[str] = frozenset()
    """Fields that a reader has used up, or that our method has without showing it in its configuration."""
    harmless: Mapping[str, Harmless] = field(default_factory=dict)
    """Fields that may differ, and why."""
    targets: Literal["linear", "none"] = "linear"
    """Whether our method has the setting ``targets``."""
    optimizer: str = ADAMW
    """Type of optimizer of the training that chooses this entry."""
    optimizer_fields: Mapping[str, str] = field(default_factory=dict)
    """Their setting of the optimizer to our setting of the method."""
    optimizer_repeats: Mapping[str, str] = field(default_factory=dict)
    """Their setting of the optimizer to the field of the adapter configuration that it must equal."""
    notes: tuple[str, ...] = ()
    """What a reader must know, where the configurations are equal and the arithmetic is not."""
