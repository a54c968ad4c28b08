"""One run or one evaluation without a study file, on the same code path and into the same records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.analyze.limits import at_limit
from peft_arena.commands.find_point import find_point
from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec
from peft_arena.core.yamlfile import parse_scalar
from peft_arena.store.store import Store
from peft_arena.study.model import Study
from peft_arena.study.overrides import override
from peft_arena.study.read_study import study_from, task_spec
from peft_arena.tasks.base import Kind
from peft_arena.tasks.custom_config import LIKELIHOOD
from peft_arena.tasks.groups import GROUPS, Member, group_mean
from peft_arena.tasks.registry import is_file, registered
from peft_arena.tasks.scorers import SCORERS
from peft_arena.work.run_study import StudyOutcome, run_study

if TYPE_CHECKING:
    from peft_arena.analyze.study import TargetResult

SECTIONS = ("config", "train", "task", "model", "seed")
RUN = "train.init_from.run"
"""The setting that names a run of the runs directory; a name may look like a number."""


def train_one(
    model: str,
    method: str,
    task: str,
    settings: Sequence[str],
    out: Path,
    quiet: bool = False,
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
        UserError: an unknown name or key, a key inside a single value, or a required setting is missing.
    """
    tables: dict[str, Any] = {section: {} for section in SECTIONS if section != "seed"}
    tables["seed"] = 0
    for text in settings:
        key, equals, _ = text.partition("=")
        section, dot, _ = key.partition(".")
        if not equals or section not in SECTIONS or bool(dot) == (section == "seed"):
            raise UserError(
                f"--set takes SECTION.KEY=value with SECTION in {', '.join(SECTIONS[:-1])}, or seed=N; got '{text}'"
            )
        override(tables, text, str if key == RUN else parse_scalar)
    tables["train"].setdefault("schedule", {"epochs": 1})
    if is_file(task):
        _need_scorer(f"--task {task}", tables["task"])
    name, settings_of_task = registered(task, tables["task"])
    data = {
        "name": "single",
        "title": f"{method} on {task}",
        "model": {"name": model, **tables["model"]},
        "targets": [{"task": name, "config": settings_of_task}],
        "train": tables["train"],
        "arms": [{"method": method, "config": tables["config"]}],
        "seeds": [tables["seed"]],
    }
    study = study_from(data, find_run=lambda name: Store(out).find(name).spec)
    return run_study(study, out, quiet=quiet), study


def _need_scorer(what: str, settings: Mapping[str, Any]) -> None:
    """Refuse a file whose answers nothing was named to judge.

    Raises:
        UserError: no scorer was named; says which there are.
    """
    if "scorer" not in settings:
        known = ", ".join([*SCORERS.names(), LIKELIHOOD])
        raise UserError(f"{what} needs --scorer: one of {known}, or FILE.py:FUNCTION of your own")


def scores(study: Study, out: Path) -> list[dict[str, Any]]:
    """Return the target score of the base and of every trained run, the paired gain with its interval, and its word."""
    from peft_arena.analyze.study import analyze_study
    from peft_arena.study.study_view import view_of

    rows = []
    for target in analyze_study(Store(out), view_of(study)).targets:
        for arm in target.arms:
            if arm.gain is not None and arm.gain.delta is not None:
                gain, said = arm.gain.delta, target.against_base[arm.label].gain.summary()
                rows.append(
                    {
                        "task": target.label,
                        "method": arm.evidence.arm.label,
                        "base": arm.gain.base,
                        "tuned": arm.gain.tuned,
                        "gain": gain.value,
                        "unit": gain.unit,
                        **_at_limit(target, arm.label),
                        **({"unscored": f"{gain.unscored:.0%}"} if gain.unscored else {}),
                        **{name: said[name] for name in ("low_corrected", "high_corrected", "verdict", "detectable")},
                        "about": said["about"],
                    }
                )
    return rows


def _at_limit(target: TargetResult, label: str) -> dict[str, str]:
    """Return which shares of base and tuned answers met the limit of new tokens; empty where none is written."""
    if target.task is None or target.task.card.get("kind") != Kind.GENERATE:
        return {}
    found = {"base": target.limits.base.get(target.spec.id), "tuned": target.limits.of(label, target.spec.id)}
    return {f"{side} at limit": "not recorded" if one is None else one.text for side, one in found.items()}


def evaluate_point(
    point: str,
    tasks: Sequence[str],
    runs: Path,
    *,
    items: int | None,
    split: str,
    dtype: str,
    batch_size: int | None,
    sampling: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a checkpoint or a base model; what is already on disk is read, not done again.

    Args:
        point: ``RUN``, ``RUN@STEP`` or the name of a model.
        tasks: names of tasks, of groups of tasks, which also get the mean over their tasks, or of files.
        runs: the runs directory.
        items: only the first so many items.
        split: ``validation`` or ``test``.
        dtype: type of a base model's weights.
        batch_size: items at once; changes no result.
        sampling: ask for several sampled answers to each item: fields of ``Sampling``.
        own: settings of the task of a file, such as its scorer.

    Returns:
        One row per task and metric.

    Raises:
        UserError: no such run, step, model or task.
    """
    if not tasks:
        raise UserError("--tasks names no task")
    asked = {"items": items, "split": split, "sampling": sampling}
    names = dict.fromkeys(name for task in tasks for name in GROUPS.get(task, (task,)))
    files = [name for name in names if is_file(name)]
    if own and not files:
        raise UserError(f"{', '.join(f'--{key}' for key in own)} is for a file of your own, and --tasks names none")
    tables = {name: dict(own or {}) if name in files else {} for name in names}
    if files:
        _need_scorer(f"--tasks {files[0]}", own or {})
    specs = [
        build(EvalSpec, {"task": task_spec(name, table, "--tasks"), **asked}, where="eval")
        for name, table in tables.items()
    ]
    run, step = find_point(point, runs, dtype)
    from peft_arena.work.order import evaluate_run

    records = evaluate_run(run, step, specs, batch_size)
    rows = [(record.called, measure, at_limit([record])) for record in records for measure in record.metrics]
    headlines = [Member(record.spec.task.name, record.metrics[0]) for record in records]
    rows += [(f"group {name}", group_mean(name, headlines), None) for name in tasks if name in GROUPS]
    return [
        {"task": name, **measure.model_dump(include=set(_SHOWN)), "at limit": "" if limit is None else limit.text}
        for name, measure, limit in rows
    ]


_SHOWN = ("metric", "value", "unit", "stderr", "n", "unscored")
