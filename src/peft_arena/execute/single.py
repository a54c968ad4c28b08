"""One run or one evaluation without a study file, on the same code path and into the same records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, RunSpec
from peft_arena.core.yamlfile import parse_scalar
from peft_arena.execute.run import StudyOutcome, run_study
from peft_arena.execute.study import Study, study_from, task_spec
from peft_arena.methods.registry import BASE
from peft_arena.models.load import PACKAGED, pin
from peft_arena.store.store import RunDirectory, Store

SECTIONS = ("config", "train", "task", "model", "seed")


def train_one(
    model: str, method: str, task: str, settings: Sequence[str], out: Path, quiet: bool = False
) -> tuple[StudyOutcome, Study]:
    """Train one run and evaluate it and its base on the task.

    Args:
        model: name of the model.
        method: name of the method.
        task: name of the target task.
        settings: ``config.rank=8``, ``train.learning_rate=1e-3``, ``task.digits=2``, ``model.dtype=bfloat16``,
            ``seed=1``.
        out: the runs directory.
        quiet: show nothing while working.

    Raises:
        UserError: an unknown name or key, or a required setting is missing.
    """
    tables: dict[str, Any] = {section: {} for section in SECTIONS if section != "seed"}
    tables["seed"] = 0
    for text in settings:
        key, equals, value = text.partition("=")
        section, dot, rest = key.partition(".")
        if not equals or section not in SECTIONS or bool(dot) == (section == "seed"):
            raise UserError(
                f"--set takes SECTION.KEY=value with SECTION in {', '.join(SECTIONS[:-1])}, or seed=N; got '{text}'"
            )
        if section == "seed":
            tables["seed"] = parse_scalar(value)
        else:
            tables[section][rest] = parse_scalar(value)
    train = _nested(tables["train"])
    train.setdefault("schedule", {"epochs": 1})
    data = {
        "name": "single",
        "title": f"{method} on {task}",
        "model": {"name": model, **tables["model"]},
        "targets": [{"task": task, "config": _nested(tables["task"])}],
        "train": train,
        "arms": [{"method": method, "config": _nested(tables["config"])}],
        "seeds": [tables["seed"]],
    }
    study = study_from(data)
    return run_study(study, out, quiet=quiet), study


def scores(study: Study, out: Path) -> list[dict[str, Any]]:
    """Return the target score of the base and of every trained run, with the paired gain and its 95 % interval."""
    from peft_arena.analyze.study import analyze_study
    from peft_arena.execute.view import view_of

    rows = []
    for target in analyze_study(Store(out), view_of(study)).targets:
        for arm in target.arms:
            if arm.gain is not None and arm.gain.delta is not None:
                gain = arm.gain.delta
                rows.append(
                    {
                        "task": target.label,
                        "method": arm.evidence.arm.label,
                        "base": arm.gain.base,
                        "tuned": arm.gain.tuned,
                        "gain": gain.value,
                        "low": gain.low,
                        "high": gain.high,
                        "unit": gain.unit,
                    }
                )
    return rows


def evaluate_point(
    point: str,
    tasks: Sequence[str],
    runs: Path,
    *,
    items: int | None,
    split: str,
    dtype: str,
    batch_size: int | None,
) -> list[dict[str, Any]]:
    """Evaluate a checkpoint or a base model; what is already on disk is read, not done again.

    Args:
        point: ``RUN``, ``RUN@STEP`` or the name of a model.
        tasks: task names.
        runs: the runs directory.
        items: only the first so many items.
        split: ``validation`` or ``test``.
        dtype: type of a base model's weights.
        batch_size: items at once; changes no result.

    Returns:
        One row per task and metric.

    Raises:
        UserError: no such run, step, model or task.
    """
    if not tasks:
        raise UserError("--tasks names no task")
    specs = [
        build(EvalSpec, {"task": task_spec(name, {}, "--tasks"), "items": items, "split": split}, where="eval")
        for name in tasks
    ]
    run, step = _find(point, runs, dtype)
    from peft_arena.execute.work import evaluate_run

    records = evaluate_run(run, step, specs, batch_size)
    return [
        {"task": record.spec.task.name, **measure.model_dump(include=set(_SHOWN))}
        for record in records
        for measure in record.metrics
    ]


_SHOWN = ("metric", "value", "unit", "stderr", "n", "unscored")


def _find(point: str, runs: Path, dtype: str) -> tuple[RunDirectory, int]:
    name, _, step_text = point.partition("@")
    store = Store(runs)
    if name in PACKAGED or "/" in name:
        if step_text:
            raise UserError(f"'{point}' names a step, and a base model has none")
        spec = RunSpec(model=pin(build(ModelSpec, {"name": name, "dtype": dtype})), method=MethodSpec(name=BASE))
        return store.run(spec), 0
    run = store.find(name)
    if run.spec.is_base:
        if step_text not in {"", "0"}:
            raise UserError(f"run {run.run_id} is a base model: it has no step {step_text}")
        return run, 0
    steps = run.steps()
    training = run.training()
    if not step_text:
        if training is None:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"run {run.run_id} is not trained to its end; name a step: {run.run_id}@STEP. Known: {known}"
            )
        return run, training.steps
    if not step_text.isdigit() or int(step_text) not in steps:
        raise UserError(f"run {run.run_id} has no step '{step_text}'. Known: {', '.join(map(str, steps)) or 'none'}")
    return run, int(step_text)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        current = nested
        *parents, last = key.split(".")
        for parent in parents:
            current = current.setdefault(parent, {})
        current[last] = value
    return nested
