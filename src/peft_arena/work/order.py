"""The work of one run: train, measure its cost, evaluate; each stage is skipped if its record is on disk."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from peft_arena.core.errors import UserError, first_line
from peft_arena.core.geometry import GeometrySpec
from peft_arena.core.measure import Measure
from peft_arena.core.paths import ScanSpec
from peft_arena.core.specs import EvalSpec, RunSpec
from peft_arena.core.stage import COST_OF_INFERENCE, TRAIN, StageId, evaluation_stage
from peft_arena.store.checkpoint import verify_checkpoint
from peft_arena.store.records import EvaluationRecord, TrainingRecord
from peft_arena.store.store import RunDirectory, Store
from peft_arena.tasks.registry import display_name, made_task
from peft_arena.work.plan import evaluation_name, geometry_name, path_name

if TYPE_CHECKING:
    from peft_arena.methods.base import Attached
    from peft_arena.models.load import Loaded
    from peft_arena.paths.scan import EvaluateAt
    from peft_arena.train.outcome import StepInfo

Report = Callable[[str, float, str], None]
"""Called with a stage, the fraction of it that is done, and a detail worth seeing meanwhile."""
TRACE_LENGTH = 4000


def hush() -> None:
    """Keep the libraries' own bars and notes off a terminal that shows ours."""
    import warnings

    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


@dataclass(frozen=True)
class Order:
    """What one worker is asked to do."""

    root: Path
    run: RunSpec
    evaluations: tuple[EvalSpec, ...]
    geometry: tuple[GeometrySpec, ...]
    """What is measured of the final weights' geometry."""
    scans: tuple[ScanSpec, ...]
    """Which paths back from the final weights are walked."""
    at_save_points: bool
    """Evaluate every save point, not only the last."""
    eval_batch_size: int | None
    resume_every: int | None
    recompute: bool
    """Compute activations again in the backward pass, where the method allows."""
    latency_repeats: int
    threads: int
    train_only: bool = False
    """Leave everything after the training: only another run, which begins at this one, is asked for."""


class BusyError(Exception):
    """Another process works on this run."""


def do(order: Order, report: Report = lambda stage, fraction, detail: None) -> bool:
    """Do the next part of what is missing of a run, under its lock: training, or everything after it.

    The two parts are left to two processes, so that the memory of each is measured from a clean start.

    Returns:
        Whether something is still missing.

    Raises:
        BusyError: another process holds the run.
        UserError: a stage failed; it is in the event log, and what was finished stays.
    """
    run = Store(order.root).run(order.run)
    try:
        with run.held(0):
            run.create()
            worker = _Worker(order, run, report)
            try:
                return worker.go()
            except UserError as error:
                if not worker.told:
                    run.event("failed", stage="read records", reason=str(error))
                raise
    except Timeout:
        raise BusyError(run.run_id) from None


def evaluate_run(
    run: RunDirectory, step: int, specs: Sequence[EvalSpec], batch_size: int | None = None, progress: bool = True
) -> list[EvaluationRecord]:
    """Return the evaluations of one point, doing those that are not on disk.

    Raises:
        UserError: the checkpoint is damaged, a task is unknown, or another process holds the run for too long.
    """
    hush()
    with run.waited_for():
        run.create()
        point = _Point(run, step)
        for spec in specs:
            point.evaluate(spec, batch_size, progress=progress)
    return [record for spec in specs if (record := run.evaluation(run.point(step), spec)) is not None]


def weights_at(run: RunDirectory, step: int) -> tuple[Loaded, Attached]:
    """Return a freshly loaded model with the weights of a step of a run.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """
    return _Point(run, step).weights


def evaluator(held: RunDirectory, batch_size: int | None) -> EvaluateAt:
    """Return what evaluates steps of runs as they were trained, doing what is not on disk.

    Args:
        held: the run whose lock the caller holds; those of other runs are taken for the time of an evaluation.
        batch_size: items at once.
    """

    def at(run: RunDirectory, step: int, specs: Sequence[EvalSpec]) -> list[EvaluationRecord]:
        if run.run_id != held.run_id:
            return evaluate_run(run, step, specs, batch_size, progress=False)
        point = _Point(run, step)
        for spec in specs:
            point.evaluate(spec, batch_size, progress=False)
        return [record for spec in specs if (record := run.evaluation(run.point(step), spec)) is not None]

    return at


class _Worker:
    """Carries out one order."""

    def __init__(self, order: Order, run: RunDirectory, report: Report) -> None:
        self.order = order
        self.run = run
        self.report = report
        self.told = False
        """Whether the event log already says what failed."""

    def go(self) -> bool:
        if not self.order.run.is_base and self.run.training() is None:
            self._stage(TRAIN, "train", self._train)
            return not self.order.train_only
        if self.order.train_only:
            return False
        from peft_arena.cost.memory import PeakMemory

        problems: list[UserError] = []
        evaluated: list[str] = []
        with PeakMemory("evaluation") as memory:
            steps = self._steps()
            for step in steps:
                point = _Point(self.run, step)
                last = step == steps[-1]
                for spec in (one for one in self.order.evaluations if last or one.sampling is None):
                    try:
                        if self._evaluate(point, spec):
                            evaluated.append(display_name(spec.task))
                    except UserError as error:
                        problems.append(error)
        if problems:
            raise problems[0]
        if self.run.cost("inference") is None:
            seen = [_of_tasks(measure, evaluated) for measure in memory.measures]
            self._stage(COST_OF_INFERENCE, "cost of inference", lambda: self._inference_cost(seen))
        for stage in (
            *(partial(self._geometry, part) for part in self.order.geometry),
            *(partial(self._scan, part) for part in self.order.scans),
        ):
            try:
                stage()
            except UserError as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return False

    def _steps(self) -> tuple[int, ...]:
        """Return the steps to evaluate."""
        training = self.run.training()
        if training is None:
            return (0,)
        return training.save_points if self.order.at_save_points else (training.steps,)

    def _stage(self, stage: StageId, name: str, work: Callable[[], None]) -> None:
        """Do one stage and log how it went; whatever goes wrong becomes one line and ends this run only."""
        self.run.event("started", stage=name, **stage.fields(), process=os.getpid())
        self.report(name, 0.0, "")
        try:
            work()
        except UserError as error:
            self._failed(stage, name, str(error), **_trace_of(error.__cause__))
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._failed(stage, name, reason, **_trace_of(error))
            raise UserError(f"{name}: {reason}") from error
        self.run.event("finished", stage=name, **stage.fields())
        self.report(name, 1.0, "")

    def _failed(self, stage: StageId, name: str, reason: str, **more: str) -> None:
        self.run.event("failed", stage=name, **stage.fields(), reason=reason, **more)
        self.told = True

    def _train(self) -> None:
        from peft_arena.cost.memory import PeakMemory
        from peft_arena.cost.record import training_cost
        from peft_arena.methods.adaptable import notice
        from peft_arena.methods.registry import method_of
        from peft_arena.methods.targets import TargetConfig
        from peft_arena.train.calibration import calibration_for
        from peft_arena.train.proof import Proof
        from peft_arena.train.recompute import recomputes
        from peft_arena.train.run import finish, train_run
        from peft_arena.weights.start import load_start, note_start

        spec = self.order.run
        assert spec.train is not None, "the base model is not trained"
        with PeakMemory("training") as memory:
            loaded, start = load_start(self.run)
            note_start(self.run, start)
            task = made_task(spec.train.task)
            method = method_of(spec.method)
            proof = Proof(spec, loaded, task, method, lambda: load_start(self.run)[0].model)
            if isinstance(method.config, TargetConfig) and (left := notice(loaded.model)):
                self.run.event("layers_left_out", reason=left)
            began = time.perf_counter()
            calibration = calibration_for(spec, method, loaded, task)
            attached = method.attach(loaded.model, seed=spec.seed, calibration=calibration)
            attach_seconds = time.perf_counter() - began
            proof.start(attached)
            recompute = self.order.recompute and recomputes(method.card)
            outcome = train_run(
                self.run,
                loaded,
                attached,
                task,
                resume_every=self.order.resume_every,
                progress=False,
                on_step=self._watch(),
                start=start,
                recompute=recompute,
                proof=proof,
            )
        record = outcome.record
        if calibration is not None:
            shown = sum(len(batch["input_ids"]) for batch in calibration.batches)
            record = record.model_copy(update={"calibration_examples": shown})
        if self.run.cost("training") is None:
            cost = training_cost(
                attached,
                run_id=self.run.run_id,
                tokens=record.padded_tokens,
                mean_length=max(1, round(record.padded_tokens / max(outcome.rows, 1))),
                seconds=outcome.seconds,
                attach_seconds=attach_seconds,
                real_tokens=record.tokens,
                memory=[_of_steps(measure, record, recompute) for measure in memory.measures],
                checkpoint=self.run.checkpoint(record.steps),
                rollouts=record.rollouts,
            )
            self.run.write_cost(cost)
        finish(self.run, record)

    def _watch(self) -> Callable[[StepInfo], None]:
        """Return what reports each step: speed since the first one, and the loss."""
        began: list[tuple[float, int]] = []

        def watch(step: StepInfo) -> None:
            now = time.monotonic()
            if not began:
                began.append((now, step.tokens))
            seconds, tokens = now - began[0][0], step.tokens - began[0][1]
            speed = f"{tokens / seconds:,.0f} tokens/s, " if seconds > 0 else ""
            self.report("train", step.step / step.total, f"{speed}{step.said}")

        return watch

    def _evaluate(self, point: _Point, spec: EvalSpec) -> bool:
        """Do one evaluation unless its record is there; say whether there was something to do."""
        stage, name = evaluation_stage(spec, point.step), evaluation_name(spec, point.step)
        try:
            if self.run.evaluation(self.run.point(point.step), spec) is not None:
                return False
        except UserError as error:
            self._failed(stage, name, str(error))
            raise
        self._stage(stage, name, lambda: point.evaluate(spec, self.order.eval_batch_size, progress=False))
        return True

    def _geometry(self, spec: GeometrySpec) -> None:
        """Measure one part of the final weights' geometry unless its record is there."""
        from peft_arena.geometry.measure_run import measure_run

        stage, name = StageId("geometry", spec.key), geometry_name(spec)
        final = self.run.final_point()
        assert final is not None, "the run is trained"
        try:
            if self.run.geometry(final, spec.key) is not None:
                return
        except UserError as error:
            self._failed(stage, name, str(error))
            raise
        self._stage(
            stage, name, lambda: measure_run(self.run, final, spec, lambda done, what: self.report(name, done, what))
        )

    def _scan(self, spec: ScanSpec) -> None:
        """Walk one path back from the final weights unless its record is there."""
        from peft_arena.analyze.paths import choose
        from peft_arena.paths.scan import scan

        stage, name = StageId("scan", spec.key), path_name(spec)
        final = self.run.final_point()
        assert final is not None, "the run is trained"
        try:
            if self.run.scan(final, spec) is not None:
                return
        except UserError as error:
            self._failed(stage, name, str(error))
            raise
        size = self.order.eval_batch_size

        def walk() -> None:
            scan(
                self.run,
                spec,
                evaluator(self.run, size),
                choose=choose,
                batch_size=size,
                progress=partial(self.report, name),
            )

        self._stage(stage, name, walk)

    def _inference_cost(self, memory: Sequence[Measure]) -> None:
        from peft_arena.cost.record import inference_cost
        from peft_arena.models.load import load

        training = self.run.training()
        _, attached = _Point(self.run, 0 if training is None else training.steps).weights
        base = None if training is None else load(self.order.run.model).model
        cost = inference_cost(
            attached, run_id=self.run.run_id, base=base, repeats=self.order.latency_repeats, memory=memory
        )
        self.run.write_cost(cost)


def _trace_of(error: BaseException | None) -> dict[str, str]:
    """Return where an error was raised, for the event log; nothing where there is none but the user's own."""
    if error is None or isinstance(error, UserError):
        return {}
    return {"traceback": "".join(traceback.format_exception(error))[-TRACE_LENGTH:]}


def _of_steps(measure: Measure, record: TrainingRecord, recomputed: bool) -> Measure:
    """Say which steps a memory measure saw, where an earlier process did some of them; none if it saw none."""
    if recomputed:
        measure = measure.model_copy(update={"how": f"{measure.how}; activations recomputed"})
    if record.resumed_at is None:
        return measure
    if record.resumed_at == record.steps:
        return measure.model_copy(update={"value": None, "n": 0, "how": "the process that did the steps was killed"})
    return measure.model_copy(
        update={"how": f"{measure.how}; steps {record.resumed_at + 1} to {record.steps} only, after an interruption"}
    )


def _of_tasks(measure: Measure, tasks: Sequence[str]) -> Measure:
    """Say which evaluations a memory measure saw; none if there was none in this process."""
    if not tasks:
        return measure.model_copy(update={"value": None, "n": 0, "how": "evaluated in an earlier process"})
    return measure.model_copy(update={"how": f"{measure.how}; loading the model and evaluating {', '.join(tasks)}"})


class _Point:
    """A step of a run; its weights are loaded once, when they are first needed."""

    def __init__(self, run: RunDirectory, step: int) -> None:
        self.run = run
        self.step = step

    def evaluate(self, spec: EvalSpec, batch_size: int | None, progress: bool) -> None:
        """Write the evaluation of this point unless it is there."""
        from peft_arena.evaluate.run import evaluate

        point = self.run.point(self.step)
        if self.run.evaluation(point, spec) is not None:
            return
        loaded, attached = self.weights
        record = evaluate(
            loaded,
            attached.model,
            spec,
            run_id=self.run.run_id,
            step=self.step,
            factor=point.factor,
            batch_size=batch_size,
            progress=progress,
            make=lambda *_: made_task(spec.task),
        )
        self.run.write_evaluation(point, record)

    @cached_property
    def weights(self) -> tuple[Loaded, Attached]:
        """The model with the checkpoint's weights; the base run's only point is the model itself."""
        from peft_arena.methods.registry import method_of
        from peft_arena.weights.start import load_start

        spec = self.run.spec
        loaded, _ = load_start(self.run)
        method = method_of(spec.method)
        if spec.is_base:
            return loaded, method.attach(loaded.model, seed=spec.seed)
        path = self.run.checkpoint(self.step)
        verify_checkpoint(path)
        return loaded, method.restore(loaded.model, path)
