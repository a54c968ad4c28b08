"""Estimates and judgements that are given, not computed from records."""

from __future__ import annotations

from peft_arena.analyze.compare import Comparison
from peft_arena.analyze.estimate import Estimate, Pivot, Term
from peft_arena.analyze.family import Family, Judgement, judge_alone


def estimate_of(
    value: float, error: float | None, unit: str = "points", *, seeds: int = 3, df: float = 1e9
) -> Estimate:
    """Return an estimate with a known standard error; None: without an interval."""
    if error is None:
        return Estimate(value, unit, seeds, 3, 3, missing="3 items: an interval needs 6")
    pivot = Pivot(value, error, (Term(1.0, df),))
    covers = "items only" if seeds == 1 else "seeds and items"
    return Estimate(value, unit, seeds, 100, 100, pivot, pivot, (-100.0, 100.0), covers)


def judged(value: float, error: float | None, margin: float | None = 2.0, **more: object) -> Judgement:
    """Return a judgement in a family of its own."""
    (found,) = judge_alone([estimate_of(value, error, **more)], margin)  # type: ignore[arg-type]
    return found


def pair(left: str, right: str, value: float, error: float | None, margin: float | None = 2.0) -> Comparison:
    """Return two arms with the same difference on both axes, each in a family of its own."""
    return Comparison(left, right, judged(value, error, margin), judged(value, error, margin))


def unknown() -> Judgement:
    """Return what is said where there is nothing to compare."""
    return Family().ask(None)
