"""Tidy tables of the records: one row per observation, typed columns, the same schema when there are no rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from peft_arena.core.ids import canonical_json
from peft_arena.core.measure import Measure
from peft_arena.core.specs import RLSpec, RunSpec
from peft_arena.store.records import CostRecord, EvaluationRecord, LogEntry, RunRecord, TrainingRecord

if TYPE_CHECKING:
    from polars.datatypes import DataTypeClass

Schema = Mapping[str, "DataTypeClass"]

RUNS: Schema = {
    "run_id": pl.String,
    "model": pl.String,
    "model_revision": pl.String,
    "dtype": pl.String,
    "method": pl.String,
    "method_config": pl.String,
    "task": pl.String,
    "objective": pl.String,
    "seed": pl.Int64,
    "learning_rate": pl.Float64,
    "batch_size": pl.Int64,
    "trained": pl.Boolean,
    "steps": pl.Int64,
    "tokens": pl.Int64,
    "padded_tokens": pl.Int64,
    "examples": pl.Int64,
    "dropped": pl.Int64,
    "resumed_at": pl.Int64,
    "created": pl.String,
    "git_commit": pl.String,
    "git_dirty": pl.Boolean,
}
"""One row per run; ``method_config`` is canonical JSON, training columns are null until training has finished."""

_POINT: Schema = {
    "run_id": pl.String,
    "step": pl.Int64,
    "factor": pl.Float64,
    "task": pl.String,
    "task_version": pl.Int64,
    "split": pl.String,
    "eval_id": pl.String,
    "samples": pl.Int64,
}
"""``samples`` is how many answers to each item were sampled; null for one greedy answer or a likelihood."""

ITEMS: Schema = {
    **_POINT,
    "item_id": pl.String,
    "metric": pl.String,
    "headline": pl.Boolean,
    "value": pl.Float64,
    "weight": pl.Float64,
    "extracted": pl.String,
    "reason": pl.String,
}
"""One row per item and metric; ``value`` is null where the item could not be scored."""

_MEASURE: Schema = {
    "metric": pl.String,
    "value": pl.Float64,
    "unit": pl.String,
    "better": pl.String,
    "stderr": pl.Float64,
    "n": pl.Int64,
    "unscored": pl.Int64,
    "how": pl.String,
}

_WRITTEN: Schema = {"answers": pl.Int64, "met_limit": pl.Int64}

METRICS: Schema = {**_POINT, "headline": pl.Boolean, **_MEASURE, **_WRITTEN}
"""One row per evaluation and metric; ``answers`` were written, and ``met_limit`` of them went on until the limit of new
tokens: null where nothing is written, and in older records."""

COSTS: Schema = {"run_id": pl.String, "stage": pl.String, **_MEASURE}
"""One row per run, stage and cost measure."""

CURVES: Schema = {
    "run_id": pl.String,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "loss": pl.Float64,
    "validation_loss": pl.Float64,
    "learning_rate": pl.Float64,
    "grad_norm": pl.Float64,
}
"""One row per entry of the log of a supervised fine-tuning; losses in nats per answer token."""

RL: Schema = {
    "run_id": pl.String,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "policy_loss": pl.Float64,
    "learning_rate": pl.Float64,
    "grad_norm": pl.Float64,
    "validation_reward": pl.Float64,
    "reward": pl.Float64,
    "reward_std": pl.Float64,
    "rewards": pl.String,
    "unscored": pl.Float64,
    "length": pl.Float64,
    "ended": pl.Float64,
    "zero_variance": pl.Float64,
    "entropy": pl.Float64,
    "clip_low": pl.Float64,
    "clip_high": pl.Float64,
    "kl": pl.Float64,
    "completions": pl.Int64,
    "generated_tokens": pl.Int64,
    "rollout_seconds": pl.Float64,
    "update_seconds": pl.Float64,
}
"""One row per entry of the log of a reinforcement learning; ``rewards`` is canonical JSON. Columns of the rollouts are
null in an entry without one, those of completions also where no new rollout was made;
``policy_loss`` is no cross-entropy: its level says nothing."""


_OF_COMPLETIONS = ("reward", "reward_std", "rewards", "unscored", "length", "ended", "zero_variance")
"""Columns that an entry without a new rollout repeats from the one before."""


class RunRecords(NamedTuple):
    """The records that were read of one run."""

    spec: RunSpec
    run: RunRecord | None
    training: TrainingRecord | None
    costs: tuple[CostRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]


def runs_table(runs: Iterable[RunRecords]) -> pl.DataFrame:
    """Return one row per run of which there is a record."""
    return _frame((_run_row(run) for run in runs if any(run[1:])), RUNS)


def items_table(runs: Iterable[RunRecords]) -> pl.DataFrame:
    """Return one row per item and metric of every evaluation of the runs."""
    return _frame((row for run in runs for record in run.evaluations for row in _item_rows(record)), ITEMS)


def metrics_table(runs: Iterable[RunRecords]) -> pl.DataFrame:
    """Return one row per metric of every evaluation of the runs."""
    rows = (
        {**_point(record), "headline": place == 0, **_measure(measure), **_written(record)}
        for run in runs
        for record in run.evaluations
        for place, measure in enumerate(record.metrics)
    )
    return _frame(rows, METRICS)


def costs_table(runs: Iterable[RunRecords]) -> pl.DataFrame:
    """Return one row per cost measure of the runs."""
    rows = (
        {"run_id": run.spec.run_id, "stage": record.stage, **_measure(measure)}
        for run in runs
        for record in run.costs
        for measure in record.measures
    )
    return _frame(rows, COSTS)


def curves_table(runs: Iterable[RunRecords]) -> pl.DataFrame:
    """Return one row per logged point of every finished supervised fine-tuning."""
    rows = (
        {"run_id": run.spec.run_id, **{name: getattr(entry, name) for name in CURVES if name != "run_id"}}
        for run in runs
        if run.training is not None and not _is_rl(run.spec)
        for entry in run.training.log
    )
    return _frame(rows, CURVES)


def rl_table(runs: Iterable[RunRecords]) -> pl.DataFrame:
    """Return one row per logged point of every finished reinforcement learning."""
    rows = (
        _rl_row(run.spec, entry)
        for run in runs
        if run.training is not None and _is_rl(run.spec)
        for entry in run.training.log
    )
    return _frame(rows, RL)


def all_tables(runs: Iterable[RunRecords]) -> dict[str, pl.DataFrame]:
    """Return every table by name: runs, items, metrics, costs, curves, rl."""
    listed = list(runs)
    return {
        "runs": runs_table(listed),
        "items": items_table(listed),
        "metrics": metrics_table(listed),
        "costs": costs_table(listed),
        "curves": curves_table(listed),
        "rl": rl_table(listed),
    }


def _is_rl(spec: RunSpec) -> bool:
    return isinstance(spec.train, RLSpec)


def _rl_row(spec: RunSpec, entry: LogEntry) -> dict[str, Any]:
    found = {} if entry.rollout is None else entry.rollout.model_dump(mode="json")
    rewards: dict[str, Any] = {"rewards": canonical_json(found["rewards"])} if found else {}
    if found and not found["completions"]:
        rewards = dict.fromkeys(_OF_COMPLETIONS)
    own = {name: getattr(entry, name) for name in ("step", "tokens", "learning_rate", "grad_norm", "validation_reward")}
    return {"run_id": spec.run_id, **own, "policy_loss": entry.loss, **found, **rewards}


def _frame(rows: Iterable[Mapping[str, Any]], schema: Schema) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=dict(schema), orient="row")


def _run_row(records: RunRecords) -> dict[str, Any]:
    spec, run, training = records.spec, records.run, records.training
    return {
        "run_id": spec.run_id,
        "model": spec.model.name,
        "model_revision": spec.model.revision,
        "dtype": spec.model.dtype,
        "method": spec.method.name,
        "method_config": json.dumps(spec.method.config, sort_keys=True, separators=(",", ":")),
        "task": _trained_on(records),
        "objective": spec.train.objective if spec.train else None,
        "seed": spec.seed if spec.train else None,
        "learning_rate": spec.train.learning_rate if spec.train else None,
        "batch_size": spec.train.batch_size if spec.train else None,
        "trained": training is not None,
        "steps": training.steps if training else None,
        "tokens": training.tokens if training else None,
        "padded_tokens": training.padded_tokens if training else None,
        "examples": training.examples if training else None,
        "dropped": training.dropped if training else None,
        "resumed_at": training.resumed_at if training else None,
        "created": run.created if run else None,
        "git_commit": run.provenance.get("git_commit") if run else None,
        "git_dirty": run.provenance.get("git_dirty") if run else None,
    }


def _trained_on(records: RunRecords) -> str | None:
    """Return what people call the task a run was trained on; None for the base model."""
    if records.spec.train is None:
        return None
    task = records.spec.train.task
    return next((record.called for record in records.evaluations if record.spec.task == task), task.name)


def _point(record: EvaluationRecord) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "step": record.step,
        "factor": record.factor,
        "task": record.called,
        "task_version": record.spec.task.version,
        "split": record.spec.split,
        "eval_id": record.spec.id,
        "samples": record.spec.sampling.samples if record.spec.sampling else None,
    }


def _measure(measure: Measure) -> dict[str, Any]:
    return {name: getattr(measure, name) for name in _MEASURE}


def _written(record: EvaluationRecord) -> dict[str, int | None]:
    return {name: getattr(record.written, name, None) for name in _WRITTEN}


def _item_rows(record: EvaluationRecord) -> Iterator[dict[str, Any]]:
    point = _point(record)
    headline = record.metrics[0].metric if record.metrics else "value"
    for item in record.items:
        common = {**point, "item_id": item.id, "extracted": item.extracted, "reason": item.reason}
        yield {**common, "metric": headline, "headline": True, "value": item.value, "weight": item.weight}
        for name, (value, weight) in item.others.items():
            yield {**common, "metric": name, "headline": False, "value": value, "weight": weight}
