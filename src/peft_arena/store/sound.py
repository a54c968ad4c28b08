"""What the fields of a record must say together, and where the record of a run has to lie.

The schema (:mod:`peft_arena.store.records`) holds each field to its type and range. A record whose fields are each
possible can still be of another run, or state a mean that its items do not have; no number may come from such a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from peft_arena.core.errors import first_problem
from peft_arena.core.geometry import What
from peft_arena.core.measure import Better, Measure
from peft_arena.core.text import shown
from peft_arena.store.records import (
    CostRecord,
    EvaluationRecord,
    GeometryRecord,
    Record,
    TrainingRecord,
)
from peft_arena.store.sound_evaluation import FRACTION, ROUNDING, of_evaluation

_AT_LEAST_NOTHING = frozenset(["bytes", "seconds", "seconds/token", "tokens", "tokens/second", "parameters"])
"""Units of which less than nothing cannot be measured."""
_UNITS = {
    "attach_time": "seconds",
    "checkpoint_bytes": "bytes",
    "generated_tokens": "tokens",
    "peak_memory_evaluation": "bytes",
    "peak_memory_training": "bytes",
    "rollout_flops": "FLOPs",
    "rollout_speed": "tokens/second",
    "rollout_time": "seconds",
    "scoring_time": "seconds",
    "time_per_token": "seconds/token",
    "time_to_first_token": "seconds",
    "total_parameters": "parameters",
    "trained_parameters": "parameters",
    "trained_share": "fraction",
    "training_flops": "FLOPs",
    "training_flops_per_token": "FLOPs/token",
    "training_speed": "tokens/second",
    "training_time": "seconds",
    "update_time": "seconds",
}
"""Units of what every training or use costs, none of which can be less than nothing; others are free."""


class _Free(BaseModel):
    """Base of what is checked of a table whose other keys are free."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Provenance(_Free):
    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: dict[str, str] = {}
    threads: int | None = None


class _Engine(_Free):
    dtype: str | None = None
    batch_size: int | None = None


class _CardMetric(_Free):
    name: str
    unit: str
    better: Better


class _Card(_Free):
    name: str | None = None
    title: str | None = None
    chance: float | None = None
    metrics: list[_CardMetric] = []


class _Measured(_Free):
    what: What


class _Generation(_Free):
    prompt_lengths: list[int]
    batch_size: int
    device: str
    threads: int | None


def doubt(record: Record) -> str:
    """Say what of a record contradicts itself, with the field's name; empty if nothing does."""
    return _of_tables(record) or _of_kind(record)


def _of_tables(record: Record) -> str:
    """Say what is wrong inside the fields that hold tables."""
    tables: list[tuple[str, type[_Free]]] = [("provenance", _Provenance)]
    if isinstance(record, EvaluationRecord):
        tables += [("engine", _Engine), ("card", _Card)]
    if isinstance(record, CostRecord) and record.step is not None:
        tables.append(("settings", _Generation))
    if isinstance(record, GeometryRecord):
        tables.append(("spec", _Measured))
    try:
        for field, kind in tables:
            kind.model_validate(getattr(record, field))
    except ValidationError as error:
        return first_problem(error, within=field)
    return ""


def _of_kind(record: Record) -> str:
    if isinstance(record, EvaluationRecord):
        return of_evaluation(record)
    if isinstance(record, TrainingRecord):
        return _of_training(record)
    if isinstance(record, CostRecord):
        return _of_costs(record.measures)
    if isinstance(record, GeometryRecord) and (record.arrays is None) != (record.arrays_sha256 is None):
        return "arrays: must be given with arrays_sha256, or neither"
    if isinstance(record, GeometryRecord) and record.arrays is not None and Path(record.arrays).name != record.arrays:
        return f"arrays: must be the name of a file beside the record, got '{shown(record.arrays)}'"
    return ""


def _of_training(record: TrainingRecord) -> str:
    points, steps = record.save_points, record.steps
    if list(points) != sorted(set(points)) or (points and points[-1] > steps):
        return f"save_points: must ascend to at most the {steps} steps, got {list(points)[:8]}"
    logged = [entry.step for entry in record.log]
    if logged != sorted(logged) or (logged and logged[-1] > steps):
        return f"log: its steps must ascend to at most the {steps} steps"
    if record.tokens > record.padded_tokens:
        return f"tokens: must be at most padded_tokens {record.padded_tokens}, got {record.tokens}"
    for place, entry in enumerate(record.log):
        losses = {"validation_loss": entry.validation_loss}
        if record.rollouts is None and entry.rollout is None:  # that of reinforcement learning may have any sign
            losses["loss"] = entry.loss
        for field, loss in losses.items():
            if loss is not None and loss < 0:
                return f"log.{place}.{field}: must be at least 0 nats per token, got {loss}"
    return ""


def _of_costs(measures: Sequence[Measure]) -> str:
    """Say what is wrong with the measures of a cost record, each and together."""
    if not measures:
        return "measures: must hold at least one, got none"
    found: dict[str, float] = {}
    names: set[str] = set()
    for place, measure in enumerate(measures):
        if measure.metric in names:
            return f"measures.{place}.metric: '{shown(measure.metric)}' is there twice"
        if why := _of_cost(place, measure):
            return why
        names.add(measure.metric)
        if measure.value is not None:
            found[measure.metric] = measure.value
    trained, total, share = (found.get(name) for name in ("trained_parameters", "total_parameters", "trained_share"))
    if trained is None or not total:
        return ""
    if trained > total:
        return f"measures: trained_parameters must be at most total_parameters {total:.0f}, got {trained:.0f}"
    if share is not None and abs(share - trained / total) > ROUNDING:
        return f"measures: trained_share must be trained over total parameters, {trained / total:.9g}, got {share:.9g}"
    return ""


def _of_cost(place: int, measure: Measure) -> str:
    unit = _UNITS.get(measure.metric, measure.unit)
    if measure.unit != unit:
        return f"measures.{place}.unit: must be '{unit}' for {measure.metric}, got '{shown(measure.unit)}'"
    if measure.value is None:
        return ""
    if measure.unit == FRACTION and not 0 <= measure.value <= 1:
        return f"measures.{place}.value: must be a fraction from 0 to 1, got {measure.value}"
    counted = measure.unit in _AT_LEAST_NOTHING or measure.metric in _UNITS
    if counted and measure.value < 0:
        return f"measures.{place}.value: must be at least 0 {measure.unit}, got {measure.value}"
    return ""
