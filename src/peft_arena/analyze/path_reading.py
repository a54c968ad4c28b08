"""The records of a scan: its points, the tuned model, the save points of training, and what is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from peft_arena.analyze.evidence import (
    Columns,
    Gap,
    RunEvidence,
    TaskInfo,
    all_scores,
    columns_of,
    task_info,
)
from peft_arena.analyze.paired import Scores
from peft_arena.analyze.paths import PRETRAINED, path_ends
from peft_arena.core.errors import UserError
from peft_arena.core.paths import ScanSpec
from peft_arena.core.specs import OWN, EvalSpec, PathSpec, Point
from peft_arena.core.stage import StageId, failures
from peft_arena.core.text import few
from peft_arena.store.records import EvaluationRecord, PathRecord
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.registry import display_name

R = TypeVar("R")
Evaluations = Mapping[str, EvaluationRecord]
"""By evaluation id."""
WAYS = {
    "own": "own parameters",
    "sqrt": "own parameters, rotations by the square root of the factor",
    "linear": "straight line",
}
NOT_SCANNED = "not scanned yet"
NOT_TRAINED = "not trained"
NOT_ASKED = "the study asks for no scan of this run along this path"


def path_words(path: PathSpec) -> str:
    """Return a path in words: its way, and its rule where not every layer gets the same factor."""
    rule = "" if path.rule == OWN.rule else f", rule {path_ends(path).title}"
    return f"{WAYS[path.way]}{rule}"


@dataclass(frozen=True, eq=False)
class RunScan:
    """What is known of one run along one path."""

    who: str
    run_id: str
    seed: int
    trained: bool
    record: PathRecord | None
    absent: str = ""
    """Why there is no record; empty where there is one."""
    points: Mapping[float, Evaluations] = field(default_factory=dict)
    """Factor of the grid to the evaluations on validation items."""
    tuned: Evaluations = field(default_factory=dict)
    """Of the tuned model, on validation and on test items."""
    chosen: Evaluations = field(default_factory=dict)
    """Of the chosen point on test items; the tuned model's where none was chosen."""
    along: tuple[tuple[int, Evaluations], ...] = ()
    """Earlier save points with their steps, on validation items."""


class ScanReader:
    """Reads scans; what is not there or damaged becomes a gap."""

    def __init__(self, base: RunDirectory, gaps: list[Gap]) -> None:
        """Refer to the pretrained model's run and to the list that gaps are added to."""
        self.base = base
        self.gaps = gaps
        self._known: dict[tuple[str, str, str], EvaluationRecord | None] = {}
        """What was read of the base and of the run being read, by run, point and evaluation; None: not there."""
        self._lacking: list[str] = []

    def of_base(self, specs: Sequence[EvalSpec]) -> dict[str, EvaluationRecord]:
        """Return the pretrained model's evaluations."""
        found = self._evaluations(self.base, self.base.point(0), specs, "base", "the pretrained model")
        self._tell("base", "paths")
        return found

    def read(self, directory: RunDirectory, run: RunEvidence, scan: ScanSpec, asked: bool) -> RunScan:
        """Return what is known of a run along a path.

        Args:
            directory: of the run.
            run: what is known of it otherwise.
            scan: of the path.
            asked: whether the study asks for it.
        """
        keep = (self.base.run_id, directory.run_id)
        self._known = {key: record for key, record in self._known.items() if key[0] in keep}
        start = partial(RunScan, run.who, run.spec.run_id, run.spec.seed, run.training is not None)
        if run.training is None:
            return start(None, NOT_TRAINED)
        if not asked:
            return start(None, NOT_ASKED)
        what = f"path: {path_words(scan.path)}"
        final = directory.point(run.training.steps)
        record = self._try(run.who, what, lambda: directory.scan(final, scan))
        if isinstance(record, str):
            return start(None, record)
        if record is None:
            failure = failures(directory.events()).get(StageId("scan", scan.key))
            self.gaps.append(Gap(run.who, what, "failed" if failure else "missing", failure or NOT_SCANNED))
            return start(None, failure or NOT_SCANNED)
        points = {factor: self._point(directory, final, run.who, scan, factor) for factor in scan.grid}
        both = (*scan.choose_on, *scan.claim_on)
        tuned = self._evaluations(directory, final, both, run.who, "the tuned model")
        chosen: Evaluations = {key: tuned[key] for key in (spec.id for spec in scan.claim_on) if key in tuned}
        if record.chosen is not None:
            at = directory.point(final.step, record.chosen, scan.path)
            chosen = self._evaluations(directory, at, scan.claim_on, run.who, f"the chosen factor {record.chosen:g}")
        earlier = [step for step in run.training.save_points if step != final.step] if scan.save_points else []
        along = [
            (step, self._evaluations(directory, directory.point(step), scan.choose_on, run.who, f"step {step}"))
            for step in earlier
        ]
        self._tell(run.who, what)
        return start(record, "", points, tuned, chosen, tuple(along))

    def _point(
        self, directory: RunDirectory, final: Point, who: str, scan: ScanSpec, factor: float
    ) -> dict[str, EvaluationRecord]:
        """Return the evaluations of a factor; at the pretrained model those of its own run."""
        at = directory.point(final.step, factor, scan.path)
        own = any(directory.record_path(at, f"eval-{spec.key}").exists() for spec in scan.choose_on)
        if factor == PRETRAINED and path_ends(scan.path).from_base and not own:
            return self._evaluations(self.base, self.base.point(0), scan.choose_on, who, "factor 0")
        return self._evaluations(directory, at, scan.choose_on, who, f"factor {factor:g}")

    def _evaluations(
        self, directory: RunDirectory, at: Point, specs: Sequence[EvalSpec], who: str, where: str
    ) -> dict[str, EvaluationRecord]:
        found = {}
        for spec in specs:
            key = (directory.run_id, at.key, spec.id)
            if key not in self._known:
                record = self._try(who, where, partial(directory.evaluation, at, spec))
                self._known[key] = None if isinstance(record, str) else record
                if record is None:
                    self._lacking.append(f"{where} on {display_name(spec.task)} ({spec.split})")
            record = self._known[key]
            if record is not None:
                found[spec.id] = record
        return found

    def _try(self, who: str, what: str, read: Callable[[], R]) -> R | str:
        """Return what is read, or what is wrong with it."""
        try:
            return read()
        except UserError as error:
            self.gaps.append(Gap(who, what, "damaged", str(error)))
            return str(error)

    def _tell(self, who: str, what: str) -> None:
        """Turn the evaluations that lack into one gap."""
        if self._lacking:
            self.gaps.append(Gap(who, what, "missing", f"not evaluated: {few(self._lacking)}"))
        self._lacking = []


@dataclass(frozen=True, eq=False)
class Items:
    """The tasks of some evaluations, and the scores of everything that answered them on common columns."""

    tasks: tuple[TaskInfo, ...]
    """The target first; only those that anything was evaluated on."""
    columns: Mapping[str, Columns]
    unknown: tuple[str, ...] = ()
    """Names of tasks that nothing was evaluated on."""

    def scores(self, answered: Sequence[tuple[int | None, Evaluations]]) -> dict[str, Scores]:
        """Return the scores of some seeds by evaluation id; (None, ...) is the pretrained model."""
        return all_scores(answered, self.columns)

    @property
    def why_no_mean(self) -> str:
        """Say why there is no mean over the retention tasks; empty if there can be one."""
        if self.unknown:
            return f"nothing was evaluated on {', '.join(self.unknown)}"
        return "" if self.fractions else "no retention task is a fraction"

    @property
    def target(self) -> TaskInfo | None:
        """The target; None where nothing was evaluated on it."""
        return self.tasks[0] if self.tasks else None

    @property
    def fractions(self) -> tuple[TaskInfo, ...]:
        """Retention tasks that go into the mean."""
        return tuple(task for task in self.tasks[1:] if task.is_fraction)


def common_items(specs: Sequence[EvalSpec], everything: Sequence[Evaluations]) -> Items:
    """Put the items of some evaluations together; no task at all where the target has no record."""
    records = {spec.id: [found[spec.id] for found in everything if spec.id in found] for spec in specs}
    if not records[specs[0].id]:
        return Items((), {}, tuple(display_name(spec.task) for spec in specs))
    columns = {key: columns_of(found) for key, found in records.items() if found}
    tasks = tuple(
        task_info(spec, found[0].called, found[0], columns[spec.id]) for spec in specs if (found := records[spec.id])
    )
    return Items(tasks, columns, tuple(display_name(spec.task) for spec in specs if spec.id not in columns))
