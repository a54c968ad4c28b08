"""Scanning a path: every point of a grid evaluated in one process, one of them chosen, and judged on other items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from peft_arena.core.errors import UserError
from peft_arena.core.ids import canonical_json
from peft_arena.core.paths import TUNED, ScanSpec
from peft_arena.core.provenance import provenance
from peft_arena.core.specs import EvalSpec, MethodSpec, Point, RunSpec
from peft_arena.methods.registry import BASE
from peft_arena.store.records import EvaluationRecord, PathRecord, PathRow, Strength
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.registry import make_task
from peft_arena.weights.start import tuned_run

if TYPE_CHECKING:
    from peft_arena.paths.placing import Placer
    from peft_arena.tasks.base import Task

Progress = Callable[[float, str], None]
"""Called with the fraction that is done and what is being done."""
EvaluateAt = Callable[[RunDirectory, int, Sequence[EvalSpec]], Sequence[EvaluationRecord]]
"""Evaluates a step of a run as it was trained, reading what is there."""


class Chosen(Protocol):
    """The point that was chosen of a path, and why."""

    @property
    def chosen(self) -> float | None:
        """The factor; None if no point may be chosen."""

    @property
    def reason(self) -> str:
        """In words."""

    @property
    def rows(self) -> tuple[PathRow, ...]:
        """What was found at each factor."""


Choose = Callable[[ScanSpec, Sequence[EvaluationRecord], Mapping[float, Sequence[EvaluationRecord]]], Chosen]
"""Chooses by evaluations of the tuned model and of each factor, each in the order of ``ScanSpec.choose_on``."""


def base_of(run: RunDirectory) -> RunDirectory:
    """Return the run of the pretrained model that a run was trained from."""
    return run.store.run(RunSpec(model=run.spec.model, method=MethodSpec(name=BASE)))


def scan(
    run: RunDirectory,
    spec: ScanSpec,
    evaluate_at: EvaluateAt,
    *,
    choose: Choose,
    batch_size: int | None,
    progress: Progress,
) -> PathRecord:
    """Walk one path of a trained run and write what was found; what is on disk is read, not done again.

    Args:
        run: the run, held by the caller and trained.
        spec: which path, which factors, which items.
        evaluate_at: evaluates the tuned model and the save points, as they were trained.
        choose: chooses the point.
        batch_size: items at once.
        progress: called between evaluations.

    Raises:
        UserError: the run is not trained or has no weights, its checkpoint is damaged, or the path is not for it.
    """
    final = run.final_point()
    if final is None or run.spec.is_base:
        raise UserError(f"run {run.run_id} has no tuned weights: a path leads from the pretrained model to them")
    record = run.scan(final, spec)
    if record is None:
        record = _Scan(run, final, spec, evaluate_at, choose, batch_size, progress).go()
        run.write_scan(final, record)
    return record


class _Scan:
    """One scan at work."""

    def __init__(
        self,
        run: RunDirectory,
        final: Point,
        spec: ScanSpec,
        evaluate_at: EvaluateAt,
        choose: Choose,
        batch_size: int | None,
        progress: Progress,
    ) -> None:
        self.run, self.final, self.spec = run, final, spec
        self.evaluate_at = evaluate_at
        self.choose = choose
        self.batch_size = batch_size
        self.progress = progress
        self.make = kept_tasks()
        self.done = 0

    def go(self) -> PathRecord:
        from peft_arena.paths.placing import Placer

        placer = Placer(tuned_run(self.run, self.final.step), self.spec.path)
        training = self.run.training()
        earlier = training.save_points[:-1] if self.spec.save_points and training is not None else ()
        self.parts = len(self.spec.grid) + len(earlier) + 3
        self._next("the tuned model")
        tuned = self.evaluate_at(self.run, self.final.step, self.spec.choose_on)
        points = {factor: self._at(placer, factor, self.spec.choose_on) for factor in self.spec.grid}
        for step in earlier:
            self._next(f"save point {step}")
            self.evaluate_at(self.run, step, self.spec.choose_on)
        choice = self.choose(self.spec, tuned, points)
        self._next("test items")
        self.evaluate_at(self.run, self.final.step, self.spec.claim_on)
        strengths: tuple[Strength, ...] = ()
        if choice.chosen is not None:
            self._at(placer, choice.chosen, self.spec.claim_on)
            self._next("strength of every block")
            strengths = _strengths(placer, choice.chosen)
        return PathRecord(
            run_id=self.run.run_id,
            step=self.final.step,
            spec=self.spec,
            chosen=choice.chosen,
            reason=choice.reason,
            rows=choice.rows,
            strengths=strengths,
            expressed=placer.expressed(TUNED if choice.chosen is None else choice.chosen),
            orthogonality=placer.orthogonality(self.spec.grid),
            provenance=provenance(),
        )

    def _next(self, what: str) -> None:
        self.progress(min(1.0, self.done / self.parts), what)
        self.done += 1

    def _at(self, placer: Placer, factor: float, specs: Sequence[EvalSpec]) -> Sequence[EvaluationRecord]:
        """Return the evaluations of a point; those of the pretrained and the tuned model are their own runs'."""
        from peft_arena.evaluate.run import evaluate_many

        self._next(f"factor {factor:g}")
        if factor == 0 and placer.from_base:
            return self.evaluate_at(base_of(self.run), 0, specs)
        point = self.run.point(self.final.step, factor, self.spec.path)
        if point == self.final:
            return self.evaluate_at(self.run, self.final.step, specs)
        missing = [spec for spec in specs if self.run.evaluation(point, spec) is None]
        if missing:
            found = evaluate_many(
                *placer.at(factor),
                missing,
                run_id=point.run_id,
                step=point.step,
                factor=point.factor,
                path=point.path,
                batch_size=self.batch_size,
                progress=False,
                make=self.make,
            )
            for new in found:
                self.run.write_evaluation(point, new)
        return [record for spec in specs if (record := self.run.evaluation(point, spec)) is not None]


def kept_tasks() -> Callable[[str, Mapping[str, Any]], Task]:
    """Return what makes tasks and keeps them: every point answers the same items."""

    @cache
    def made(name: str, config: str) -> Task:
        import json

        return make_task(name, json.loads(config))

    return lambda name, config: made(name, canonical_json(dict(config)))


def _strengths(placer: Placer, factor: float) -> tuple[Strength, ...]:
    from peft_arena.paths.strength import block_strengths

    before, after = block_strengths(placer.tuned), block_strengths(placer.point(factor))
    return tuple(
        Strength(block=block, tuned=value, chosen=after.get(block, 0.0)) for block, value in sorted(before.items())
    )
