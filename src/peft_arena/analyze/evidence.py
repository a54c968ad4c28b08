"""Everything a study's records say, read once: scores on common items, training, costs, and what is not there.

A run that is missing, failed or damaged gives a :class:`Gap` with its reason and no numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from peft_arena.analyze.paired import Scores
from peft_arena.analyze.view import Arm, StudyView
from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec, RunSpec
from peft_arena.store.records import CostRecord, EvaluationRecord, ItemRecord, RunRecord, TrainingRecord
from peft_arena.store.store import RunDirectory, Store, read_record

GapKind = Literal["failed", "missing", "running", "damaged", "refused", "unscored", "dropped"]
STAGES = ("training", "inference")
TRAINING_STAGE = "train"
"""Stage of the events of training; those of an evaluation contain its id."""


@dataclass(frozen=True)
class Gap:
    """Something that is not in the numbers, and why."""

    who: str
    """Label of the arm and seed, or ``base``."""
    what: str
    """``training``, or the name of the evaluation."""
    kind: GapKind
    reason: str


@dataclass(frozen=True)
class TaskInfo:
    """What a reader must know about an evaluation, from the card in its records."""

    spec: EvalSpec
    label: str
    title: str
    metric: str
    unit: str
    better: str
    chance: float | None
    items: int
    """Different items asked of any run."""
    card: Mapping[str, Any]

    @property
    def is_fraction(self) -> bool:
        """Whether the headline is a fraction, so that differences are given in points and may be averaged."""
        return self.unit == "fraction" and self.better != "neither"

    @property
    def sign(self) -> float:
        """Return what to multiply a difference with, so that positive is better."""
        return -1.0 if self.better == "lower" else 1.0


@dataclass(frozen=True, eq=False)
class RunEvidence:
    """The records of one run."""

    who: str
    spec: RunSpec
    directory: RunDirectory
    training: TrainingRecord | None
    costs: Mapping[str, CostRecord]
    """By stage."""
    evaluations: Mapping[str, EvaluationRecord]
    """By evaluation id."""
    provenance: tuple[Mapping[str, Any], ...]
    created: str | None
    """When the run was created, UTC; None if it never was."""


@dataclass(frozen=True, eq=False)
class ArmEvidence:
    """The records of an arm's runs, and its scores on every task of the study."""

    arm: Arm
    runs: tuple[RunEvidence, ...]
    scores: Mapping[str, Scores]
    """By evaluation id; only seeds that answered, and no entry where none did."""

    @property
    def trained_seeds(self) -> tuple[int, ...]:
        """Seeds whose training has finished."""
        return tuple(run.spec.seed for run in self.runs if run.training is not None)


@dataclass(frozen=True, eq=False)
class Evidence:
    """All records of a study."""

    view: StudyView
    base: RunEvidence
    base_scores: Mapping[str, Scores]
    arms: tuple[ArmEvidence, ...]
    tasks: Mapping[str, TaskInfo]
    """By evaluation id; no entry for an evaluation that no run has."""
    gaps: tuple[Gap, ...]

    @property
    def runs(self) -> tuple[RunEvidence, ...]:
        """The base run and every arm's runs."""
        return (self.base, *(run for arm in self.arms for run in arm.runs))


def read_evidence(store: Store, view: StudyView) -> Evidence:
    """Read every record of a study from the store."""
    gaps: list[Gap] = [Gap(refusal.label, "run", "refused", refusal.reason) for refusal in view.refused]
    names = task_labels((*view.targets, *view.retention))
    base = _read_run(store, view.base, "base", {**_by_id(view.targets), **_by_id(view.retention)}, names, gaps)
    read = []
    for arm in view.arms:
        wanted = {**_by_id([arm.target]), **_by_id(view.retention)}
        prefix = f"{arm.label} on {names[arm.target.id]}" if len(view.targets) > 1 else arm.label
        read.append(
            (arm, tuple(_read_run(store, run, f"{prefix}, seed {run.seed}", wanted, names, gaps) for run in arm.runs))
        )
    everything = [base, *(run for _, runs in read for run in runs)]
    tasks, columns = {}, {}
    for key, spec in {**_by_id(view.targets), **_by_id(view.retention)}.items():
        found = [run.evaluations[key] for run in everything if key in run.evaluations]
        if found:
            columns[key] = _columns(found)
            tasks[key] = _task_info(spec, names[key], found[0], len(columns[key]))
    return Evidence(
        view=view,
        base=base,
        base_scores={key: _scores([(None, base.evaluations[key])], columns[key]) for key in base.evaluations},
        arms=tuple(
            ArmEvidence(
                arm,
                runs,
                {
                    key: _scores(answered, columns[key])
                    for key in columns
                    if (answered := [(run.spec.seed, run.evaluations[key]) for run in runs if key in run.evaluations])
                },
            )
            for arm, runs in read
        ),
        tasks=tasks,
        gaps=tuple(gaps),
    )


def task_labels(specs: Iterable[EvalSpec]) -> dict[str, str]:
    """Return a name for every evaluation, by id: the task's, with a few digits of the id where two share it."""
    by_id = _by_id(specs)
    counts = Counter(spec.task.name for spec in by_id.values())
    return {
        key: spec.task.name if counts[spec.task.name] == 1 else f"{spec.task.name} ({key[:4]})"
        for key, spec in by_id.items()
    }


def _by_id(specs: Iterable[EvalSpec]) -> dict[str, EvalSpec]:
    return {spec.id: spec for spec in specs}


def _read_run(
    store: Store, spec: RunSpec, who: str, wanted: Mapping[str, EvalSpec], names: Mapping[str, str], gaps: list[Gap]
) -> RunEvidence:
    """Read what a run has; add a gap for everything it lacks."""
    directory = store.run(spec)
    created, training = None, None
    costs: dict[str, CostRecord] = {}
    evaluations: dict[str, EvaluationRecord] = {}
    provenance: list[Mapping[str, Any]] = []
    try:
        if (directory.path / "run.json").exists():
            record = read_record(RunRecord, directory.path / "run.json")
            created = record.created
            provenance.append(record.provenance)
        training = directory.training()
        for stage in STAGES:
            if (cost := directory.cost(stage)) is not None:
                costs[stage] = cost
    except UserError as error:
        gaps.append(Gap(who, "records", "damaged", str(error)))
    if training is None and not spec.is_base:
        gaps.append(_why_untrained(directory, who, created))
    else:
        if training is not None and training.dropped:
            total = training.examples + training.dropped
            reason = f"{training.dropped} of {total} training examples were longer than allowed and left out"
            gaps.append(Gap(who, "training", "dropped", reason))
        step = training.steps if training is not None else 0
        for key, wish in wanted.items():
            evaluation = _read_evaluation(directory, step, wish, who, names[key], gaps)
            if evaluation is not None:
                evaluations[key] = evaluation
    provenance += [record.provenance for record in (training, *costs.values(), *evaluations.values()) if record]
    return RunEvidence(who, spec, directory, training, costs, evaluations, tuple(provenance), created)


def _read_evaluation(
    directory: RunDirectory, step: int, spec: EvalSpec, who: str, name: str, gaps: list[Gap]
) -> EvaluationRecord | None:
    try:
        found = directory.evaluation(directory.point(step), spec)
    except UserError as error:
        gaps.append(Gap(who, name, "damaged", str(error)))
        return None
    if found is None:
        failure = _last_failure(directory, spec.id)
        gaps.append(Gap(who, name, "failed" if failure else "missing", failure or "not evaluated yet"))
        return None
    reasons = Counter(item.reason or "no reason given" for item in found.items if item.value is None)
    if reasons:
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        gaps.append(Gap(who, name, "unscored", f"{reasons.total()} of {len(found.items)} items: {listed}"))
    return found


def _why_untrained(directory: RunDirectory, who: str, created: str | None) -> Gap:
    if created is None:
        return Gap(who, "training", "missing", "not started")
    failure = _last_failure(directory, TRAINING_STAGE)
    if failure:
        return Gap(who, "training", "failed", failure)
    if directory.is_locked():
        return Gap(who, "training", "running", "a process is working on it now")
    return Gap(who, "training", "missing", "started, not finished")


def _last_failure(directory: RunDirectory, stage: str) -> str:
    """Return why the last event of a stage (whose name contains ``stage``) was a failure; empty if it was none."""
    events = [event for event in directory.events() if stage in str(event.get("stage", ""))]
    if not events or events[-1].get("event") != "failed":
        return ""
    return str(events[-1].get("reason") or "failed without a reason")


def _keys(items: Iterable[ItemRecord]) -> list[tuple[str, int]]:
    """Give every item its id and how often that id came before, since a task may ask the same item twice."""
    seen: Counter[str] = Counter()
    keys = []
    for item in items:
        keys.append((item.id, seen[item.id]))
        seen[item.id] += 1
    return keys


def _columns(records: Iterable[EvaluationRecord]) -> dict[tuple[str, int], int]:
    """Number the different items of some evaluations of one task, in the order they were first asked."""
    columns: dict[tuple[str, int], int] = {}
    for record in records:
        for key in _keys(record.items):
            columns.setdefault(key, len(columns))
    return columns


def _scores(records: Sequence[tuple[int | None, EvaluationRecord]], columns: Mapping[tuple[str, int], int]) -> Scores:
    values = np.full((len(records), len(columns)), np.nan)
    weights = np.zeros((len(records), len(columns)))
    for row, (_, record) in enumerate(records):
        places = [columns[key] for key in _keys(record.items)]
        values[row, places] = [np.nan if item.value is None else item.value for item in record.items]
        weights[row, places] = [item.weight for item in record.items]
    return Scores(tuple(seed for seed, _ in records), values, weights)


def _task_info(spec: EvalSpec, label: str, record: EvaluationRecord, items: int) -> TaskInfo:
    """Describe a task from its card; the headline is the card's first metric, or the record's where there is none."""
    card = record.card
    metrics = card.get("metrics") or [
        {"name": measure.metric, "unit": measure.unit, "better": measure.better} for measure in record.metrics
    ]
    headline = metrics[0] if metrics else {"name": "value", "unit": "", "better": "neither"}
    return TaskInfo(
        spec=spec,
        label=label,
        title=str(card.get("title") or spec.task.name),
        metric=headline["name"],
        unit=headline["unit"],
        better=headline["better"],
        chance=card.get("chance"),
        items=items,
        card=card,
    )
