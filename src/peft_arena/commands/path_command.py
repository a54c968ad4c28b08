"""The commands ``peft-arena path``: look for a better point of a run, and write it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.analyze.paths import choose
from peft_arena.analyze.view import Arm, Margin, StudyView
from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError
from peft_arena.core.measure import POINTS
from peft_arena.core.paths import DEFAULT_MARGIN, ScanSpec, read_grid
from peft_arena.core.specs import EvalSpec, PathSpec, Point
from peft_arena.methods.files import SETTINGS
from peft_arena.paths.fit import path_refusal
from peft_arena.paths.scan import Progress, base_of, scan
from peft_arena.store.records import PathRecord
from peft_arena.store.store import RunDirectory, Store
from peft_arena.study.path_entry import path_of, scan_spec
from peft_arena.study.read_study import task_spec
from peft_arena.tasks.registry import difference_unit
from peft_arena.weights.start import path_card
from peft_arena.work.order import evaluate_run, evaluator, hush

if TYPE_CHECKING:
    from peft_arena.weights.adapter_files import AdapterFiles
    from peft_arena.weights.tuned import Tuned

Bar = Callable[[], AbstractContextManager[Progress]]
AUTO = "auto"


def path_for(run: RunDirectory, rule: str, settings: Sequence[str], way: str) -> PathSpec:
    """Return a path of a run as the command line names it.

    Args:
        run: the run.
        rule: name of the rule.
        settings: its settings, ``key=value``.
        way: ``own``, ``sqrt`` or ``linear``.

    Raises:
        UserError: an unknown name or setting, or a path that the run's method does not have.
    """
    from peft_arena.core.yamlfile import parse_scalar

    config: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes KEY=value, a setting of rule {rule}; got '{text}'")
        config[key] = parse_scalar(value)
    path = path_of(rule, config, way, "--rule")
    if run.spec.is_base:
        raise UserError(f"run {run.run_id} is the pretrained model: a path leads from it to a tuned one")
    reason = path_refusal(path_card(run.spec), path)
    if reason:
        raise UserError(f"run {run.run_id} has no such path: {reason}")
    return path


def scan_run(
    name: str,
    runs: Path,
    *,
    grid: str,
    rule: str,
    settings: Sequence[str],
    way: str,
    tasks: Sequence[str] | None,
    items: int,
    test_items: int | None,
    margin: float | None,
    save_points: bool,
    batch_size: int | None,
    bar: Bar,
) -> tuple[RunDirectory, PathRecord, StudyView]:
    """Scan one path of a run.

    Args:
        name: of the run.
        runs: the runs directory.
        grid: see :func:`peft_arena.core.paths.read_grid`.
        rule: name of the rule.
        settings: of the rule, ``key=value``.
        way: ``own``, ``sqrt`` or ``linear``.
        tasks: retention tasks; None: those on whose test items the run has been evaluated.
        items: validation items of each task at most.
        test_items: test items of each task; None: as the run has been evaluated (of several times the one with the
            most items), else all.
        margin: what counts as no difference, above 0: on the target in its unit and, if that is points, on mean
            retention; None: 2 points, and nothing for a target in another unit.
        save_points: also evaluate the save points on the validation items.
        batch_size: items at once.
        bar: opens a progress bar.

    Returns:
        The run, the scan's record, and the view by which it is analysed.

    Raises:
        UserError: anything unknown or impossible, or another process holds the run.
    """
    hush()
    run = Store(runs).find(name)
    path = path_for(run, rule, settings, way)
    _final(run)
    try:
        factors = read_grid(grid)
    except ValueError as error:
        raise UserError(f"--grid: {error}") from None
    if margin is not None and not 0 < margin < math.inf:
        raise UserError(f"--margin: must be above 0 and finite, got {margin:g}")
    claims = _claims(run, tasks, test_items)
    allowed = _margin(margin, claims[0])
    spec = scan_spec(path, factors, claims, items=items, margin=allowed, save_points=save_points)
    with bar() as progress:
        progress(0.0, "the pretrained model")
        evaluate_run(base_of(run), 0, [*spec.choose_on, *spec.claim_on], batch_size, progress=False)
        with run.waited_for():
            record = scan(
                run,
                spec,
                evaluator(run, batch_size),
                choose=choose,
                batch_size=batch_size,
                progress=progress,
            )
    return run, record, view_of_scan(run, spec)


def _final(run: RunDirectory) -> Point:
    """Return the end of a run, from which a path goes back.

    Raises:
        UserError: it is not trained to its end.
    """
    final = run.final_point()
    if final is None:
        raise UserError(f"run {run.run_id} is not trained to its end: there is no final point to go back from")
    return final


def _claims(run: RunDirectory, tasks: Sequence[str] | None, items: int | None) -> list[EvalSpec]:
    """Return the test evaluations that a scan is judged by, the target first."""
    train = run.spec.train
    final = run.final_point()
    assert train is not None, "the run is trained"
    seen: dict[str, EvalSpec] = {}
    for record in run.evaluations():
        spec, known = record.spec, seen.get(record.spec.task.id)
        if (
            spec.split == "test"
            and spec.sampling is None
            and run.point(record.step, record.factor, record.path) == final
        ):
            seen[spec.task.id] = spec if known is None else max(known, spec, key=lambda one: one.items or math.inf)

    def asked(spec: EvalSpec | None, task: Any) -> EvalSpec:
        if items is not None or spec is None:
            return EvalSpec(task=task, items=items)
        return spec

    target = asked(seen.get(train.task.id), train.task)
    if tasks is None:
        others = [asked(spec, spec.task) for key, spec in sorted(seen.items()) if key != train.task.id]
        if not others:
            raise UserError(f"run {run.run_id} has been evaluated on no retention task: name some with --tasks")
        return [target, *others]
    named = [task_spec(name, {}, "--tasks") for name in tasks]
    if not named:
        raise UserError("--tasks names no task")
    return [target, *(asked(seen.get(task.id), task) for task in named if task.id != train.task.id)]


def view_of_scan(run: RunDirectory, spec: ScanSpec) -> StudyView:
    """Return the view of one run, by which a scan is analysed like a study's.

    Every other scan of the run with the same items is in it, so that p-values are corrected for all of them.
    """
    target, *retention = spec.claim_on
    same = [record.spec for record in run.scans() if (record.spec.choose_on, record.spec.claim_on) == _items(spec)]
    label = run.spec.method.name
    return StudyView(
        name=run.run_id,
        title=f"{label}: {spec.path.rule.name} path",
        base=base_of(run).spec,
        arms=(Arm(label=label, runs=(run.spec,), target=target),),
        retention=tuple(retention),
        paths={run.run_id: (spec, *(one for one in same if one != spec))},
        margin=_margin(spec.tolerance or None, target),
    )


def _margin(value: float | None, target: EvalSpec) -> Margin:
    """Return the margin of a scan: one number for the target and, where that is in points, for mean retention."""
    unit = difference_unit(target.task)
    return Margin(value, value if value is not None and unit == POINTS else DEFAULT_MARGIN, unit)


def _items(spec: ScanSpec) -> tuple[tuple[EvalSpec, ...], tuple[EvalSpec, ...]]:
    return spec.choose_on, spec.claim_on


def rewind(
    name: str,
    out: Path,
    runs: Path,
    *,
    rule: str,
    settings: Sequence[str],
    way: str,
    factor: str,
    weights: bool,
    dtype: str | None,
    shard_size: str,
    verify: bool,
    bar: Bar,
) -> Mapping[str, Any]:
    """Write a point of a run's path: as an adapter where the method can say it exactly, else as merged weights.

    Args:
        name: of the run.
        out: directory to create.
        runs: the runs directory.
        rule: name of the rule.
        settings: of the rule, ``key=value``.
        way: ``own``, ``sqrt`` or ``linear``.
        factor: a number, or ``auto`` for the one that a scan of this path has chosen.
        weights: write merged weights also where an adapter would do.
        dtype: type of merged weights; None: the model's.
        shard_size: of merged weights, such as ``5GB``.
        verify: compare the logits of merged weights with the point's.
        bar: opens a progress bar.

    Returns:
        What ``rewind.json`` beside an adapter, or ``merge.json`` beside merged weights, says of the point.

    Raises:
        UserError: no such run or path, no scan to take the factor from, a directory that exists, a disk that refuses.
    """
    from peft_arena.commands.merge_command import facts_of, restored_from
    from peft_arena.models.load import weight_files
    from peft_arena.paths.placing import Placer
    from peft_arena.weights.adapter_files import write_adapter
    from peft_arena.weights.merge import merge_point
    from peft_arena.weights.start import tuned_run
    from peft_arena.weights.writing import read_size

    hush()
    run = Store(runs).find(name)
    path = path_for(run, rule, settings, way)
    final = _final(run)
    value, record = _asked_factor(run, final, path, settings, factor)
    tuned = tuned_run(run, final.step)
    placer = Placer(tuned, path)
    said = {
        **facts_of(tuned),
        "path": path.model_dump(mode="json"),
        "factor": value,
        "chosen_by": None if record is None else _judged(run, record),
    }
    files = placer.files(value)
    if files is not None and not weights:
        if dtype is not None:
            raise UserError("--dtype is of merged weights, and this point is written as an adapter; add --weights")
        write_adapter(files, out, said)
        return {**said, "written": "adapter", "out": str(out)}
    with bar() as progress:
        merged = merge_point(
            placer.point(value),
            weight_files(tuned.base),
            out,
            dtype=dtype,
            shard_size=read_size(shard_size),
            verify=verify,
            rounded=files is None and dtype in (None, tuned.base.dtype),
            restore=None if files is None else restored_from(_read_by(tuned, files)),
            facts=said,
            progress=progress,
        )
    return {**said, **merged.summary(), "written": "weights"}


def _asked_factor(
    run: RunDirectory, final: Point, path: PathSpec, settings: Sequence[str], factor: str
) -> tuple[float, PathRecord | None]:
    """Return the factor that is asked for, and the scan that chose it; None: it was given as a number."""
    if factor != AUTO:
        return _number(factor), None
    record = _scanned(run, final, path, settings)
    assert record.chosen is not None, "a scan without a choice is refused"
    return record.chosen, record


def _read_by(tuned: Tuned, files: AdapterFiles) -> Tuned:
    """Return what reads a point's adapter: the method, or peft alone where a rule has given it other ranks."""
    assert tuned.directory is not None, "a run has a checkpoint"
    own = read_table(tuned.directory / SETTINGS)
    return tuned if own == files.settings else replace(tuned, method=None)


def _judged(run: RunDirectory, record: PathRecord) -> dict[str, Any]:
    """Return the scan that chose a factor and what test items say of it.

    Raises:
        UserError: they say that the target, or mean retention, is worse.
    """
    from peft_arena.report.paths import write_paths

    summary = write_paths(run.store, view_of_scan(run, record.spec), None)
    (target,) = summary["targets"]
    judged, said = target["paths"][0], summary["headline"][0]
    if judged["verdict"] in ("target worse", "retention worse"):
        raise UserError(
            f"the scan of run {run.run_id} chose {record.chosen:g}, and test items say {judged['verdict']}: "
            f"{said} To write it all the same, give --factor {record.chosen:g}"
        )
    return {"scan": record.spec.key, "reason": record.reason, "verdict": judged["verdict"], "test": said}


def _scanned(run: RunDirectory, final: Point, path: PathSpec, settings: Sequence[str]) -> PathRecord:
    """Return the scan of a path that has chosen a factor.

    Raises:
        UserError: there is none, none has chosen, or several have chosen differently.
    """
    found = [record for record in run.scans(path) if record.step == final.step]
    options = "".join(f" --set {setting}" for setting in settings) + ("" if path.way == "own" else f" --way {path.way}")
    command = f"peft-arena path scan {run.run_id} --runs {run.path.parent} --rule {path.rule.name}{options}"
    if not found:
        raise UserError(f"--factor auto takes the factor a scan has chosen, and there is none of this path: {command}")
    chosen = {record.chosen for record in found}
    if chosen == {None}:
        raise UserError(f"no point of this path of run {run.run_id} may be chosen: {found[0].reason}")
    if len(chosen) > 1:
        listed = ", ".join(sorted("none" if value is None else f"{value:g}" for value in chosen))
        raise UserError(f"scans of this path of run {run.run_id} have chosen {listed}: name one with --factor")
    return found[0]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise UserError(f"--factor takes a number from 0, or auto; got '{text}'")
    return value
