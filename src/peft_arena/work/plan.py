"""What of a study is done, what is missing, what failed and what is refused. A record on disk decides, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from peft_arena.core.errors import UserError
from peft_arena.core.geometry import GeometrySpec
from peft_arena.core.paths import ScanSpec
from peft_arena.core.specs import EvalSpec, Point, RunSpec
from peft_arena.core.stage import COST_OF_INFERENCE, DESCRIBE, TRAIN, StageId, evaluation_stage, failures
from peft_arena.store.store import RunDirectory, Store
from peft_arena.study.model import Study
from peft_arena.tasks.registry import display_name
from peft_arena.weights.start import init_of

State = Literal["done", "missing", "failed", "running", "refused"]
_Wanted = tuple[StageId, str, bool, str]
SOURCE = "source"
"""Label of runs that are no arm's and that others begin at."""


@dataclass(frozen=True)
class Stage:
    """One piece of work of a run."""

    id: StageId
    what: str
    """In words."""
    state: State
    reason: str = ""


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run."""

    label: str
    run: RunSpec
    stages: tuple[Stage, ...]

    @property
    def state(self) -> State:
        """Return the run's state: that of its worst stage."""
        order: tuple[State, ...] = ("refused", "running", "failed", "missing", "done")
        return min((stage.state for stage in self.stages), key=order.index)

    @property
    def reason(self) -> str:
        """Return the reason of the first stage that has one."""
        return next((stage.reason for stage in self.stages if stage.reason), "")


def evaluation_name(spec: EvalSpec, step: int | None) -> str:
    """Return how people read of an evaluation in a plan and a log; the step is None while it is not known."""
    at = "" if step is None else f" at step {step}"
    how = "" if spec.sampling is None else f" ({spec.sampling.samples} samples)"
    return f"evaluate {display_name(spec.task)}{how} {spec.id}{at}"


def geometry_name(spec: GeometrySpec) -> str:
    """Return how people read of a measurement of the geometry."""
    return f"geometry {spec.key}"


def path_name(spec: ScanSpec) -> str:
    """Return how people read of the scan of a path."""
    return f"scan {spec.key}"


def plan(study: Study, store: Store) -> list[RunPlan]:
    """Return the plan of every run of a study, the base model first, then runs that only are begun at."""
    plans = [RunPlan("base", study.base, _stages(study, store.run(study.base)))]
    plans += [RunPlan(SOURCE, run, _stages(study, store.run(run), train_only=True)) for run in study.sources()]
    for arm in study.arms:
        for run in arm.runs:
            if arm.refused:
                plans.append(RunPlan(arm.label, run, (Stage(TRAIN, "train", "refused", arm.refused),)))
            else:
                plans.append(RunPlan(arm.label, run, _stages(study, store.run(run))))
    return plans


def points_to_evaluate(study: Study, run: RunDirectory) -> list[Point]:
    """Return the points of a trained run that the study evaluates; empty while it is not trained."""
    final = run.final_point()
    if final is None:
        return []
    training = run.training()
    if study.file.evaluate_at == "save_points" and training is not None:
        return [run.point(step) for step in training.save_points]
    return [final]


def waits_for(run: RunDirectory) -> RunDirectory | None:
    """Return the run that a run begins at, while that is not trained; None: there is nothing to wait for."""
    init = init_of(run.spec)
    if init is None:
        return None
    source = run.store.run(init.run)
    try:
        return None if source.training() is not None else source
    except UserError:
        return None  # damaged, which beginning at it will say


def _stages(study: Study, run: RunDirectory, train_only: bool = False) -> tuple[Stage, ...]:
    """Compare what the study wants of a run with what is on disk."""
    wanted: list[_Wanted] = [(DESCRIBE, "describe", *_check(partial(_described, run)))]
    try:
        trained = run.final_point() is not None
        problem = ""
    except UserError as error:
        trained, problem = False, str(error)
    if not run.spec.is_base:
        wanted.append((TRAIN, "train", trained, problem))
    if train_only:
        return _judged(wanted, run)
    points = [] if problem else points_to_evaluate(study, run)
    for spec in study.evaluations(run.spec):
        if not points:
            wanted.append((evaluation_stage(spec, None), evaluation_name(spec, None), False, ""))
        for point in points if spec.sampling is None else points[-1:]:
            found = _check(partial(_evaluated, run, point, spec))
            wanted.append((evaluation_stage(spec, point.step), evaluation_name(spec, point.step), *found))
    wanted.append((COST_OF_INFERENCE, "cost of inference", *_check(lambda: run.cost("inference") is not None)))
    final = None if problem else run.final_point()
    for part in study.geometry(run.spec):
        found = (False, "") if final is None else _check(partial(_measured, run, final, part))
        wanted.append((StageId("geometry", part.key), geometry_name(part), *found))
    for scan in study.scans(run.spec):
        found = (False, "") if final is None else _check(partial(_scanned, run, final, scan))
        wanted.append((StageId("scan", scan.key), path_name(scan), *found))
    return _judged(wanted, run)


def _judged(wanted: Sequence[_Wanted], run: RunDirectory) -> tuple[Stage, ...]:
    """Return the state of every stage.

    Args:
        wanted: what, in words, whether it is done, and what is wrong with it on disk.
        run: whose stages.
    """
    failed = failures(run.events())
    running = run.is_locked()
    source = waits_for(run)
    stages = []
    for stage, what, done, problem in wanted:
        state: State = "done" if done else "failed" if problem else "running" if running else "missing"
        if state == "missing" and stage in failed:
            state, problem = "failed", failed[stage]
        elif state == "missing" and stage == TRAIN and source is not None:
            problem = f"waits for {source.run_id}"
        stages.append(Stage(stage, what, state, problem))
    return tuple(stages)


def _described(run: RunDirectory) -> bool:
    run.event_log()  # without them nothing is known of what failed
    return run.record() is not None


def _measured(run: RunDirectory, point: Point, spec: GeometrySpec) -> bool:
    return run.geometry(point, spec.key) is not None


def _scanned(run: RunDirectory, point: Point, spec: ScanSpec) -> bool:
    return run.scan(point, spec) is not None


def _evaluated(run: RunDirectory, point: Point, spec: EvalSpec) -> bool:
    return run.evaluation(point, spec) is not None


def _check(question: Callable[[], bool]) -> tuple[bool, str]:
    try:
        return question(), ""
    except UserError as error:
        return False, str(error)
