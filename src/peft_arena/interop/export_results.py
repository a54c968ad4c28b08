"""A run of ours in the form of the PEFT library's result files, so that it can stand beside theirs.

What was not measured is null. A file is only made where it says what was run: see :func:`hf_record`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec, MethodSpec, RunSpec, TrainSpec
from peft_arena.interop.experiments import ADAPTER, RETENTION, TARGET
from peft_arena.interop.peft_methods import TABLE, WEIGHTS
from peft_arena.interop.results_schema import ALONG, AT_END, PACKAGES, SYSTEM
from peft_arena.interop.training import GENERATION
from peft_arena.interop.translate import method_named, plain_table
from peft_arena.interop.translation import Translation
from peft_arena.methods.registry import BASE, method_of
from peft_arena.store.files import write_once
from peft_arena.store.records import EvaluationRecord, TrainingRecord
from peft_arena.store.store import RunDirectory, Store
from peft_arena.tasks.benchmarks.library import QUERY_TEMPLATE
from peft_arena.tasks.registry import display_name

COMMIT = re.compile(r"[0-9a-f]{40}")
MEMORY = "peak_reserved_memory_training"
"""Our measure of what they call the most memory; there is none on a CPU."""


@dataclass(frozen=True)
class HfExport:
    """A record in the library's form, and what a reader must know of it."""

    record: Mapping[str, Any]
    notes: tuple[str, ...]


def export_hf(name: str, runs: Path, out: Path) -> HfExport:
    """Write a run's record in the form of the PEFT library's result files.

    Args:
        name: run id, its beginning or its hash.
        runs: runs directory.
        out: the file to make.

    Raises:
        UserError: no such run, one that the form has no place for, or the file exists.
    """
    store = Store(runs)
    found = hf_record(store, store.find(name))
    try:
        write_once(out, found.record)
    except FileExistsError:
        raise UserError(f"{out} exists; nothing is ever replaced") from None
    return found


def hf_record(store: Store, run: RunDirectory) -> HfExport:
    """Return a run's record in the form of the PEFT library's result files.

    Raises:
        UserError: the run is no finished supervised fine-tuning, it was not evaluated on all test items of its task,
            or its method is none that the form can name.
    """
    train, training = run.spec.train, run.training()
    if not isinstance(train, TrainSpec):
        what = "the base model" if train is None else f"trained by {train.objective}"
        raise UserError(f"run {run.run_id} is {what}: the library's form is of supervised fine-tuning")
    if training is None:
        raise UserError(f"run {run.run_id} has not finished its training")
    target = _target(run, train, training)
    accuracy = target.metrics[0]
    if accuracy.value is None or accuracy.unit != "fraction":
        raise UserError(f"run {run.run_id} has no score between 0 and 1 on {display_name(train.task)}: {accuracy.how}")
    entry = _entry(run.spec)
    config = None if entry is WEIGHTS else _peft_config(run, training, entry)
    if method_named(config, entry.optimizer) != run.spec.method.name:
        said = method_named(config, entry.optimizer)
        raise UserError(f"method '{run.spec.method.name}' cannot be told in the library's form: it would say {said}")
    forgetting, why = _forgetting(store, run, training)
    notes = [why] if why else []
    if train.task.name != TARGET:
        notes.append(
            f"the task is {display_name(train.task)}, not {TARGET}: not to be put beside the library's own results"
        )
    if accuracy.unscored:
        notes.append(f"{accuracy.unscored} of the target's items could not be scored")
    created = run.record()
    record = {
        "run_info": {
            "created_at": None if created is None else created.created,
            "total_time": None,
            "experiment_name": f"{run.spec.method.name}/{run.run_id}",
            "peft_branch": None,
            "train_config": _train_config(run.spec, train, training, target, entry),
            "peft_config": config,
            "error_msg": "",
        },
        "train_info": {
            **_costs(run),
            "status": "success",
            "metrics": _metrics(train, training, accuracy.value, forgetting),
        },
        "meta_info": _meta(run.spec, training.provenance),
    }
    return HfExport(record, tuple(notes))


def _target(run: RunDirectory, train: TrainSpec, training: TrainingRecord) -> EvaluationRecord:
    wanted = EvalSpec(task=train.task)
    found = run.evaluation(run.point(training.steps), wanted)
    if found is None:
        other = [one.spec for one in run.evaluations() if one.spec.task == train.task and one.spec.split == "test"]
        part = " on all of its test items with greedy answers, only otherwise" if other else ""
        raise UserError(f"run {run.run_id} was not evaluated on its target {display_name(train.task)}{part}")
    return found


def _entry(spec: RunSpec) -> Translation:
    """Return the translation that our method is the result of.

    Raises:
        UserError: there is none: the form cannot name the method.
    """
    if spec.method.name == WEIGHTS.method:
        return WEIGHTS
    for entries in TABLE.values():
        for entry in entries:
            if entry.method == spec.method.name:
                return entry
    raise UserError(f"method '{spec.method.name}' is none of the PEFT library's: its form cannot say it")


def _peft_config(run: RunDirectory, training: TrainingRecord, entry: Translation) -> dict[str, Any]:
    """Return the adapter configuration of what was trained, which is not always that of the checkpoint."""
    path = run.checkpoint(training.steps) / ADAPTER
    if not path.is_file():
        raise UserError(f"{path} is missing: without it a reader would take the run for full fine-tuning")
    stored = read_table(path)
    method: Any = method_of(run.spec.method)
    trained = plain_table(method.peft_config(list(stored.get("target_modules") or ()), run.spec.seed))
    config = stored if stored.get("peft_type") == trained.get("peft_type") else trained
    own = {key: values[0] for key, values in entry.when.items() if key in entry.carried and len(values) == 1}
    return {**config, **own, "base_model_name_or_path": run.spec.model.name}


def _train_config(
    spec: RunSpec, train: TrainSpec, training: TrainingRecord, target: EvaluationRecord, entry: Translation
) -> dict[str, Any]:
    theirs = train.task.name == TARGET
    settings: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    config = spec.method.config
    settings |= {name: config[ours] for name, ours in entry.optimizer_fields.items()}
    settings |= {
        name: config[entry.fields[field]] for name, field in entry.optimizer_repeats.items() if field in entry.fields
    }
    return {
        "model_id": spec.model.name,
        "dtype": spec.model.dtype,
        "max_seq_length": train.max_length,
        "batch_size": train.batch_size,
        "batch_size_eval": target.engine.get("batch_size"),
        "max_steps": training.steps,
        "eval_steps": max(1, round(train.validate_every * training.steps)),
        "compile": False,
        "use_gc": False,
        "query_template": QUERY_TEMPLATE if theirs else None,
        "seed": spec.seed,
        "grad_norm_clip": train.max_grad_norm,
        "optimizer_type": entry.optimizer,
        "optimizer_kwargs": settings,
        "lr_scheduler": train.lr_schedule,
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": GENERATION if theirs else None,
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _costs(run: RunDirectory) -> dict[str, Any]:
    """Return what training cost, as far as it was measured; memory only of an accelerator."""
    cost = run.cost("training")
    measures = {} if cost is None else {one.metric: one for one in cost.measures}

    def value(metric: str, whole: bool = False) -> float | int | None:
        found = measures.get(metric)
        if found is None or found.value is None:
            return None
        return int(found.value) if whole else found.value

    return {
        "accelerator_memory_reserved_avg": None,
        "accelerator_memory_max": value(MEMORY, whole=True),
        "accelerator_memory_reserved_99th": None,
        "train_time": value("training_time"),
        "file_size": value("checkpoint_bytes", whole=True),
        "num_trainable_params": value("trained_parameters", whole=True),
        "num_total_params": value("total_parameters", whole=True),
    }


def _metrics(
    train: TrainSpec, training: TrainingRecord, accuracy: float, forgetting: float | None
) -> list[dict[str, Any]]:
    def samples(step: int) -> int | None:
        return step * train.batch_size if train.schedule.steps is not None else None

    entries: list[dict[str, Any]] = []
    for one in training.log:
        if one.validation_loss is not None:
            known = {"step": one.step, "train loss": one.loss, "train samples": samples(one.step)}
            entries.append({key: known.get(key) for key in ALONG})
    last = {
        "step": training.steps,
        "test accuracy": accuracy,
        "train loss": next((one.loss for one in reversed(training.log) if one.loss is not None), None),
        "train samples": samples(training.steps),
        "train total tokens": training.tokens,
        "forgetting": forgetting,
    }
    return [*entries, {key: last[key] for key in AT_END}]


def _forgetting(store: Store, run: RunDirectory, training: TrainingRecord) -> tuple[float | None, str]:
    """Return cross-entropy on the library's retention text, tuned minus pretrained; and why there is none."""
    found = [one for one in run.evaluations() if one.spec.task.name == RETENTION and _final(one, training)]
    if not found:
        return None, f"forgetting is null: the run was not evaluated on {RETENTION}"
    tuned = found[0]
    base = store.run(RunSpec(model=run.spec.model, method=MethodSpec(name=BASE)))
    before = base.evaluation(base.point(0), tuned.spec)
    values = [None if one is None else _of_tokens(one) for one in (tuned, before)]
    if values[0] is None or values[1] is None:
        return None, f"forgetting is null: the base model or the run has no value on {RETENTION}"
    return values[0] - values[1], ""


def _of_tokens(record: EvaluationRecord) -> float | None:
    return next((one.value for one in record.metrics if one.unit == "nats/token"), None)


def _final(record: EvaluationRecord, training: TrainingRecord) -> bool:
    whole = record.spec.items is None and record.spec.split == "test" and record.spec.sampling is None
    return whole and record.step == training.steps and record.factor == 1.0


def _meta(spec: RunSpec, provenance: Mapping[str, Any]) -> dict[str, Any]:
    packages = provenance.get("packages") or {}
    revision = spec.model.revision or ""
    system = str(provenance.get("platform") or "").partition("-")[0] or None
    known = {"system": system, "processor": provenance.get("processor")}
    return {
        "model_info": {"sha": revision if COMMIT.fullmatch(revision) else None, "created_at": None},
        "dataset_info": {name: {"sha": None, "created_at": None} for name in ("metamath", "gsm8k")},
        "package_info": dict(_versions(packages, PACKAGES)),
        "system_info": {key: known.get(key) for key in SYSTEM},
        "pytorch_info": None,
    }


def _versions(packages: Mapping[str, str], names: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    for name in names:
        yield f"{name}-version", packages.get(name)
        yield f"{name}-commit-hash", None
