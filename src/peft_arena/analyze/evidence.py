"""Everything a study's records say, read once: scores on common items, training, costs, and what is not there.

A run that is missing, failed or damaged gives a :class:`Gap` with its reason and no numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from peft_arena.analyze.paired import Scores
from peft_arena.analyze.view import Arm, StudyView
from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec, RunSpec
from peft_arena.core.stage import TRAIN, StageId, evaluation_stage, failures
from peft_arena.store.records import CostRecord, EvaluationRecord, ItemRecord, RunRecord, TrainingRecord
from peft_arena.store.store import RunDirectory, Store
from peft_arena.tasks.recorded import check_task
from peft_arena.tasks.registry import display_name

R = TypeVar("R")
GapKind = Literal["failed", "missing", "running", "damaged", "refused", "unscored", "dropped", "fewer", "notice"]
STAGES = ("training", "inference")
ROUNDING = "in bfloat16 another batch size rounds differently, and an answer near a tie may flip"


@dataclass(frozen=True)
class Gap:
    """Something that is not in the numbers, and why; a notice is about numbers that are."""

    who: str
    """Label of the arm and seed, or ``base``."""
    what: str
    """``training`` or another record, or the name of the evaluation."""
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
    units: int
    """Units among them: groups of items that share a passage or a template, else items."""
    card: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Id of the evaluation, which scores are kept under."""
        return self.spec.id

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
    """The readable records of one run."""

    who: str
    spec: RunSpec
    record: RunRecord | None
    """What the run is; None if it was never created."""
    training: TrainingRecord | None
    costs: Mapping[str, CostRecord]
    """By stage."""
    evaluations: Mapping[str, EvaluationRecord]
    """Of the point the run is judged by, by evaluation id."""
    along: Mapping[int, Mapping[str, EvaluationRecord]]
    """Of the save points before it: step to evaluation id; only steps with an evaluation of the study."""

    @property
    def created(self) -> str | None:
        """When the run was created, UTC; None if it never was."""
        return None if self.record is None else self.record.created

    @property
    def every_evaluation(self) -> tuple[EvaluationRecord, ...]:
        """Evaluations of all points, the one the run is judged by first."""
        return (*self.evaluations.values(), *(record for found in self.along.values() for record in found.values()))

    @property
    def provenance(self) -> tuple[Mapping[str, Any], ...]:
        """Where each of the records comes from."""
        records = (self.record, self.training, *self.costs.values(), *self.every_evaluation)
        return tuple(record.provenance for record in records if record is not None)


@dataclass(frozen=True, eq=False)
class SavePoint:
    """An arm before the end of its training."""

    step: float
    """Mean over the runs that were evaluated there."""
    scores: Mapping[str, Scores]
    """Like :attr:`ArmEvidence.scores`."""


@dataclass(frozen=True, eq=False)
class ArmEvidence:
    """The records of an arm's runs, and its scores on every task of the study."""

    arm: Arm
    runs: tuple[RunEvidence, ...]
    scores: Mapping[str, Scores]
    """By evaluation id; only seeds that answered, and no entry where none did."""
    along: tuple[SavePoint, ...] = ()
    """Evaluated save points before the last, in order."""

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
    """By evaluation id, greedy ones only; no entry for an evaluation that no run has."""
    labels: Mapping[str, str]
    """What a reader calls each evaluation of the study, by its id; unique."""
    gaps: tuple[Gap, ...]

    @property
    def runs(self) -> tuple[RunEvidence, ...]:
        """The base run and every arm's runs."""
        return (self.base, *(run for arm in self.arms for run in arm.runs))


def read_evidence(store: Store, view: StudyView) -> Evidence:
    """Read every record of a study from the store; records of other studies in the same runs are not touched."""
    targets, retention = _by_id(view.targets), _by_id(view.retention)
    sampled = _by_id([arm.sampled for arm in view.arms if arm.sampled])
    base = _Reader(store.run(view.base), {**targets, **retention, **sampled})
    arms = [
        (arm, [_Reader(store.run(run), {**_by_id(_asked(arm)), **retention}) for run in arm.runs]) for arm in view.arms
    ]
    records: dict[str, list[EvaluationRecord]] = {}
    for reader in (base, *(reader for _, readers in arms for reader in readers)):
        for found in reader.found.values():
            for key, record in found.items():
                records.setdefault(key, []).append(record)
    labels = _labels({**targets, **retention}, records, view.labels)
    labels |= {arm.sampled.id: f"{labels[arm.target.id]}, sampled" for arm in view.arms if arm.sampled}
    gaps = [Gap(refusal.label, "run", "refused", refusal.reason) for refusal in view.refused]
    read_base = base.finish("base", view, labels, gaps)
    read_arms = []
    for arm, readers in arms:
        prefix = f"{arm.label} on {labels[arm.target.id]}" if len(view.targets) > 1 else arm.label
        runs = [reader.finish(f"{prefix}, seed {reader.spec.seed}", view, labels, gaps) for reader in readers]
        read_arms.append((arm, tuple(runs)))
    columns = {key: columns_of(records[key]) for key in {**targets, **retention} if key in records}
    specs = {**targets, **retention}
    everything = (read_base, *(run for _, runs in read_arms for run in runs))
    gaps += _rounded_differently(everything, labels) + asked_fewer(everything, labels)
    return Evidence(
        view=view,
        base=read_base,
        base_scores=all_scores([(None, read_base.evaluations)], columns),
        arms=tuple(
            ArmEvidence(
                arm=arm,
                runs=runs,
                scores=all_scores([(run.spec.seed, run.evaluations) for run in runs], columns),
                along=_save_points(runs, columns),
            )
            for arm, runs in read_arms
        ),
        tasks={key: task_info(specs[key], labels[key], records[key][0], columns[key]) for key in columns},
        labels=labels,
        gaps=tuple(gaps),
    )


def _labels(
    specs: Mapping[str, EvalSpec], records: Mapping[str, Sequence[EvaluationRecord]], stated: Mapping[str, str]
) -> dict[str, str]:
    """Name every evaluation: as the study or else the card in its records does, with digits of the id where two share.

    Args:
        specs: by id.
        records: of each, by id.
        stated: what the study calls its tasks, by the evaluation's id.
    """
    called = {key: found[0].called for key, found in records.items()}
    names = {key: stated.get(key) or called.get(key) or display_name(spec.task) for key, spec in specs.items()}
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{name} ({key[:4]})" for key, name in names.items()}


def _asked(arm: Arm) -> list[EvalSpec]:
    """Return what an arm is asked of its target."""
    return [arm.target, *([arm.sampled] if arm.sampled else [])]


def _by_id(specs: Iterable[EvalSpec]) -> dict[str, EvalSpec]:
    return {spec.id: spec for spec in specs}


class _Reader:
    """Reads what a run has of a study, each record on its own: one that is damaged takes no other with it."""

    def __init__(self, directory: RunDirectory, wanted: Mapping[str, EvalSpec]) -> None:
        self.spec = directory.spec
        self.directory = directory
        self.wanted = wanted
        self.damaged: dict[tuple[str, int | None], str] = {}
        """Evaluation id and step, or another record's name and None, to what is wrong with it."""
        self.record = self._try("run", None, directory.record)
        self.events = self._try("events", None, directory.event_log) or []
        self.training = self._try("training", None, directory.training)
        costs = {stage: self._try(f"cost of {stage}", None, partial(directory.cost, stage)) for stage in STAGES}
        self.costs = {stage: cost for stage, cost in costs.items() if cost is not None}
        self.final, self.steps = self._steps()
        self.found: dict[int, dict[str, EvaluationRecord]] = {}
        """Step to evaluation id."""
        for step in self.steps:
            for key, spec in wanted.items():
                record = self._try(key, step, partial(self._evaluation, step, spec))
                if record is not None:
                    self.found.setdefault(step, {})[key] = record

    def _try(self, what: str, step: int | None, read: Callable[[], R | None]) -> R | None:
        try:
            return read()
        except UserError as error:
            self.damaged[what, step] = str(error)
            return None

    def _evaluation(self, step: int, spec: EvalSpec) -> EvaluationRecord | None:
        """Return an evaluation that the registered task does not contradict; None if it is not done."""
        point = self.directory.point(step)
        record = self.directory.evaluation(point, spec)
        if record is not None:
            check_task(record, self.directory.record_path(point, f"eval-{spec.key}"))
        return record

    def _steps(self) -> tuple[int, tuple[int, ...]]:
        """Return the step the run is judged by, and all steps that may have been evaluated."""
        if self.training is None:
            return 0, (0,) if self.spec.is_base else ()
        return self.training.steps, tuple(sorted({*self.training.save_points, self.training.steps}))

    def finish(self, who: str, view: StudyView, labels: Mapping[str, str], gaps: list[Gap]) -> RunEvidence:
        """Return the evidence, and add a gap for everything the run lacks."""
        gaps += [Gap(who, what, "damaged", why) for (what, step), why in self.damaged.items() if step is None]
        if self.training is None and not self.spec.is_base and ("training", None) not in self.damaged:
            gaps.append(self._why_untrained(who))
        if self.training is not None and self.training.dropped:
            total = self.training.examples + self.training.dropped
            reason = f"{self.training.dropped} of {total} training examples were longer than allowed and left out"
            gaps.append(Gap(who, "training", "dropped", reason))
        gaps += [Gap(who, "training", "fewer", reason) for reason in _fewer(self.spec, self.training)]
        failed = failures(self.events)
        for key, spec in self.wanted.items():
            for step in self.steps:
                what = labels[key] if step == self.final else f"{labels[key]} at step {step}"
                asked = step == self.final or (view.every_save_point and spec.sampling is None)
                gaps += self._why_unknown(failed, spec, step, who, what, asked=asked)
        return RunEvidence(
            who=who,
            spec=self.spec,
            record=self.record,
            training=self.training,
            costs=self.costs,
            evaluations=self.found.get(self.final, {}),
            along={step: found for step, found in self.found.items() if step != self.final},
        )

    def _why_unknown(
        self, failed: Mapping[StageId, str], spec: EvalSpec, step: int, who: str, what: str, *, asked: bool
    ) -> list[Gap]:
        """Say what an evaluation lacks; ``asked``: whether the study wants it, so that having none is a gap."""
        record = self.found.get(step, {}).get(spec.id)
        if (spec.id, step) in self.damaged:
            return [Gap(who, what, "damaged", self.damaged[spec.id, step])]
        if record is None:
            failure = failed.get(evaluation_stage(spec, step))
            if failure:
                return [Gap(who, what, "failed", failure)]
            return [Gap(who, what, "missing", "not evaluated yet")] if asked else []
        reasons = Counter(item.reason or "no reason given" for item in record.items if item.value is None)
        if not reasons:
            return []
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        return [Gap(who, what, "unscored", f"{reasons.total()} of {len(record.items)} items: {listed}")]

    def _why_untrained(self, who: str) -> Gap:
        if self.record is None and ("run", None) not in self.damaged:
            return Gap(who, "training", "missing", "not started")
        failure = failures(self.events).get(TRAIN)
        if failure:
            return Gap(who, "training", "failed", failure)
        if self.directory.is_locked():
            return Gap(who, "training", "running", "a process is working on it now")
        return Gap(who, "training", "missing", "started, not finished")


def _fewer(spec: RunSpec, training: TrainingRecord | None) -> list[str]:
    """Say what a training used less of than its settings say, because there was no more."""
    if training is None or spec.train is None:
        return []
    held_out, shown = training.validation_items, training.calibration_examples
    asked = spec.method.config.get("calibration_examples")
    found = []
    if held_out is not None and held_out < spec.train.validation_items:
        found.append(f"held out {held_out} validation items, all there are: {spec.train.validation_items} at most")
    if shown is not None and isinstance(asked, int) and shown < asked:
        found.append(f"its start was chosen by {shown} examples, all there are: {asked} at most")
    return found


def _rounded_differently(runs: Sequence[RunEvidence], labels: Mapping[str, str]) -> list[Gap]:
    """Name the bfloat16 evaluations at another batch size than the base model's, or than most where there is none."""
    sizes: dict[str, list[tuple[RunEvidence, object]]] = {}
    for run in runs:
        for record in run.every_evaluation:
            if record.engine.get("dtype") == "bfloat16" and record.engine.get("batch_size") is not None:
                sizes.setdefault(record.spec.id, []).append((run, record.engine["batch_size"]))
    found: dict[tuple[str, str], list[str]] = {}
    for key, asked in sizes.items():
        of_base = [size for run, size in asked if run.spec.is_base]
        usual = of_base[0] if of_base else Counter(size for _, size in asked).most_common(1)[0][0]
        other = "the base model" if of_base else "most runs"
        for run, size in asked:
            if size != usual:
                why = f"evaluated at batch size {size}, {other} at {usual}: {ROUNDING}"
                what = found.setdefault((run.who, why), [])
                if labels[key] not in what:
                    what.append(labels[key])
    return [Gap(who, what, "notice", why) for (who, why), whats in found.items() for what in whats]


def asked_fewer(runs: Sequence[RunEvidence], labels: Mapping[str, str]) -> list[Gap]:
    """Name the evaluations of fewer items than other runs were asked in the same one."""
    counts = [(run.who, record.spec.id, len(record.items)) for run in runs for record in run.every_evaluation]
    most = {key: max(count for _, other, count in counts if other == key) for key in {key for _, key, _ in counts}}
    why = "it was asked {} items, other runs {}"
    found = [Gap(who, labels[key], "unscored", why.format(n, most[key])) for who, key, n in counts if n < most[key]]
    return list(dict.fromkeys(found))


def _keys(items: Iterable[ItemRecord]) -> list[tuple[str, int]]:
    """Give every item its id and how often that id came before, since a task may ask the same item twice."""
    seen: Counter[str] = Counter()
    keys = []
    for item in items:
        keys.append((item.id, seen[item.id]))
        seen[item.id] += 1
    return keys


@dataclass(frozen=True, eq=False)
class Columns:
    """The different items of some evaluations of one task, and the units they belong to."""

    places: Mapping[tuple[str, int], int]
    """Item to its column."""
    units: NDArray[np.intp] | None
    """Unit of each column; None where no two items share one."""

    def __len__(self) -> int:
        """Return how many items there are."""
        return len(self.places)


def columns_of(records: Iterable[EvaluationRecord]) -> Columns:
    """Number the different items of some evaluations of one task, in the order they were first asked.

    Records made before items knew their groups say nothing of them: one record that does is enough.
    """
    places: dict[tuple[str, int], int] = {}
    groups: dict[tuple[str, int], str] = {}
    for record in records:
        for key, item in zip(_keys(record.items), record.items, strict=True):
            places.setdefault(key, len(places))
            if item.group:
                groups.setdefault(key, item.group)
    if not groups:
        return Columns(places, None)
    names: dict[object, int] = {}
    return Columns(places, np.array([names.setdefault(groups.get(key, key), len(names)) for key in places]))


def scores_of(records: Sequence[tuple[int | None, EvaluationRecord]], columns: Columns, metric: str = "") -> Scores:
    """Return the scores of some evaluations of one task by seed; None stands for the base model's one run.

    Args:
        records: seed and evaluation.
        columns: place of each item.
        metric: one of the items' further metrics; empty: the headline.
    """
    values = np.full((len(records), len(columns)), np.nan)
    weights = np.zeros((len(records), len(columns)))
    for row, (_, record) in enumerate(records):
        places = [columns.places[key] for key in _keys(record.items)]
        parts = [item.others.get(metric, (None, 1.0)) if metric else (item.value, item.weight) for item in record.items]
        values[row, places] = [np.nan if value is None else value for value, _ in parts]
        weights[row, places] = [weight for _, weight in parts]
    return Scores(tuple(seed for seed, _ in records), values, weights, columns.units)


def all_scores(
    runs: Sequence[tuple[int | None, Mapping[str, EvaluationRecord]]],
    columns: Mapping[str, Columns],
) -> dict[str, Scores]:
    """Return the scores of some runs, given by seed, on every task that one of them answered."""
    return {
        key: scores_of(answered, columns[key])
        for key in columns
        if (answered := [(seed, found[key]) for seed, found in runs if key in found])
    }


def _save_points(runs: Sequence[RunEvidence], columns: Mapping[str, Columns]) -> tuple[SavePoint, ...]:
    """Put the evaluations of an arm's save points together: the first of every seed, the second, and so on.

    The seeds of an arm have as many save points each, but their steps may differ where a budget of tokens does.
    """
    places: dict[int, list[tuple[int, RunEvidence]]] = {}
    for run in runs:
        earlier = [step for step in run.training.save_points if step != run.training.steps] if run.training else []
        for place, step in enumerate(earlier):
            if step in run.along:
                places.setdefault(place, []).append((step, run))
    return tuple(
        SavePoint(
            step=sum(step for step, _ in found) / len(found),
            scores=all_scores([(run.spec.seed, run.along[step]) for step, run in found], columns),
        )
        for _, found in sorted(places.items())
    )


def task_info(spec: EvalSpec, label: str, record: EvaluationRecord, columns: Columns) -> TaskInfo:
    """Describe a task from its card; the headline is the card's first metric, or the record's where there is none."""
    card = record.card
    metrics = card.get("metrics") or [
        {"name": measure.metric, "unit": measure.unit, "better": measure.better} for measure in record.metrics
    ]
    headline = metrics[0] if metrics else {"name": "value", "unit": "", "better": "neither"}
    return TaskInfo(
        spec=spec,
        label=label,
        title=str(card.get("title") or record.called),
        metric=headline["name"],
        unit=headline["unit"],
        better=headline["better"],
        chance=card.get("chance"),
        items=len(columns),
        units=len(columns) if columns.units is None else int(columns.units.max()) + 1,
        card=card,
    )
