"""What an arm cost: every measure of its cost records, averaged over seeds, with the range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peft_arena.analyze.evidence import ArmEvidence
from peft_arena.core.measure import Measure


class CostColumn(NamedTuple):
    """A cost shown in the main table."""

    metric: str
    """Name of the measure in the cost records."""
    title: str
    always: bool = True
    """Whether every training has it; if not, nothing is missing where no arm does."""


TRAINABLE = "trained_parameters"
PEAK_MEMORY = "peak_memory_training"
LATENCY = "latency_ratio"
"""Derived: ``time_per_token`` over ``time_per_token_base``, both measured in the same process."""
MAIN_COSTS: tuple[CostColumn, ...] = (
    CostColumn(TRAINABLE, "trained parameters"),
    CostColumn(PEAK_MEMORY, "peak training memory"),
    CostColumn("training_speed", "training speed"),
    CostColumn("training_flops", "training FLOPs"),
    CostColumn("rollout_flops", "rollout FLOPs", always=False),
    CostColumn(LATENCY, "time per token ÷ base"),
    CostColumn("checkpoint_bytes", "adapter size"),
)
"""What the main table shows; every other measure of the records is in the cost table."""


@dataclass(frozen=True)
class Cost:
    """One cost of one arm over its seeds."""

    metric: str
    stage: str
    value: float | None
    """Mean over the runs that have it."""
    low: float | None
    high: float | None
    unit: str
    better: str
    how: str
    runs: int
    """Runs with a value."""


def arm_costs(arm: ArmEvidence) -> dict[str, Cost]:
    """Return every cost of an arm by metric; one measured in two stages is there twice, as ``metric (stage)``."""
    found: dict[tuple[str, str], list[Measure]] = {}
    for run in arm.runs:
        measured = [(stage, measure) for stage, record in run.costs.items() for measure in record.measures]
        for stage, measure in (*measured, *_derived({measure.metric: measure for _, measure in measured})):
            found.setdefault((measure.metric, stage), []).append(measure)
    stages = Counter(metric for metric, _ in found)
    return {
        metric if stages[metric] == 1 else f"{metric} ({stage})": _cost(metric, stage, measures)
        for (metric, stage), measures in found.items()
    }


def _derived(measured: Mapping[str, Measure]) -> list[tuple[str, Measure]]:
    """Return the ratio of latencies of a run."""
    mine, base = measured.get("time_per_token"), measured.get("time_per_token_base")
    if mine is None or mine.value is None:
        return []
    known = base is not None and base.value
    ratio = mine.value / base.value if base is not None and base.value else None
    how = f"time per token over that without the adapter; {mine.how}" if known else "no base latency in the record"
    return [("inference", Measure(metric=LATENCY, value=ratio, unit="ratio", better="lower", how=how, n=mine.n))]


def _cost(metric: str, stage: str, measures: Sequence[Measure]) -> Cost:
    values = [measure.value for measure in measures if measure.value is not None]
    ways = list(dict.fromkeys(measure.how for measure in measures))
    return Cost(
        metric=metric,
        stage=stage,
        value=sum(values) / len(values) if values else None,
        low=min(values, default=None),
        high=max(values, default=None),
        unit=measures[0].unit,
        better=measures[0].better,
        how="; ".join(ways[:3]),
        runs=len(values),
    )
