"""Study files: the only input of a comparison. Reading one gives every run it stands for, or one line of complaint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from peft_arena.core.build import Locate, build
from peft_arena.core.errors import UserError, unknown
from peft_arena.core.geometry import GeometrySpec
from peft_arena.core.paths import ScanSpec
from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, Name, RunSpec, Spec, Table, TaskSpec, TrainSpec
from peft_arena.core.yamlfile import KeyPath, YamlFile, parse_scalar
from peft_arena.execute.budget import Budget, Sizer, Spent
from peft_arena.execute.geometry_entry import GeometryEntry, GeometryPlan
from peft_arena.execute.path_entry import PathsEntry, PathsPlan
from peft_arena.methods.base import Capability, Method, has_weights
from peft_arena.methods.registry import BASE, METHODS, make_method, method_of
from peft_arena.models.load import PACKAGED as PACKAGED_MODELS
from peft_arena.models.load import pin
from peft_arena.tasks.base import Role, Task
from peft_arena.tasks.foreign import PREFIX, ForeignSettings, foreign_spec, is_foreign, packaged_file
from peft_arena.tasks.registry import TASKS, make_task, task_of

PACKAGED = (Path(__file__).parents[1] / "studies", Path(__file__).parents[3] / "studies")
"""Where shipped studies are: beside the installed package, or in the source tree it runs from."""


class TargetEntry(Spec):
    """A task that every arm is trained on, and judged by."""

    task: Name
    config: Table = Field(default_factory=dict)
    train: Table = Field(default_factory=dict)
    """Training settings for this target, over those of the study."""
    items: int | None = Field(default=None, ge=1)


class RetentionEntry(Spec):
    """A task that is only evaluated, to see what was forgotten."""

    task: Name
    config: Table = Field(default_factory=dict)
    items: int | None = Field(default=None, ge=1)


class ArmEntry(Spec):
    """A method with its settings, one competitor of the comparison."""

    method: Name
    label: str | None = None
    """Name in tables and figures; the method's name unless given."""
    config: Table = Field(default_factory=dict)
    train: Table = Field(default_factory=dict)
    """Training settings of this arm, over those of the study and the target."""
    budget: Budget | None = None
    """Parameters to train, over what the study says; null for none."""


class Execution(Spec):
    """How the work is done. Nothing here may change a result, so nothing here is part of a run's identity."""

    jobs: int = Field(default=1, ge=1)
    """Runs worked on at once."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each run; None: the machine's cores divided by jobs."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    resume_every: int | None = Field(default=None, ge=1)
    """Steps between two states a killed run can continue from; save points always are."""
    latency_repeats: int = Field(default=5, ge=2)


class StudyFile(Spec):
    """The content of a study file."""

    name: Name
    title: str
    description: str = ""
    model: ModelSpec
    targets: tuple[TargetEntry, ...] = Field(min_length=1)
    retention: tuple[RetentionEntry, ...] = ()
    train: Table
    budget: Budget | None = None
    """Parameters that every arm trains, by choosing each method's size; an arm may say otherwise."""
    arms: tuple[ArmEntry, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    evaluate_at: Literal["final", "save_points"] = "final"
    geometry: GeometryEntry | None = None
    """What is measured of the geometry of every run's final weights."""
    paths: PathsEntry | None = None
    """Which paths of every run are walked back from its final weights."""
    execution: Execution = Execution()


@dataclass(frozen=True)
class Arm:
    """One competitor: a method with its settings on one target, over all seeds."""

    label: str
    method: str
    target: EvalSpec
    runs: tuple[RunSpec, ...]
    refused: str = ""
    """Why this arm cannot run; empty if it can."""
    spent: Spent | None = None
    """What became of the arm's parameter budget, if it has one."""


@dataclass(frozen=True)
class Study:
    """A study file, read, checked and expanded."""

    file: StudyFile
    base: RunSpec
    arms: tuple[Arm, ...]
    targets: tuple[EvalSpec, ...]
    retention: tuple[EvalSpec, ...]
    geometry_plan: GeometryPlan | None = None
    paths_plan: PathsPlan | None = None

    def runs(self) -> list[RunSpec]:
        """Return every run, the base model first, refused arms left out."""
        return [self.base, *(run for arm in self.arms if not arm.refused for run in arm.runs)]

    def evaluations(self, run: RunSpec) -> list[EvalSpec]:
        """Return what is evaluated at a run's points: its own target, then retention.

        For the base all targets, and also the validation items of every path: it is where all of them begin.
        """
        if run.train is None:
            paths = [spec for arm in self.arms for scan in self.scans(arm.runs[0]) for spec in scan.choose_on]
            return list({spec.id: spec for spec in (*self.targets, *self.retention, *paths)}.values())
        own = [spec for spec in self.targets if spec.task == run.train.task]
        return [*own, *self.retention]

    def geometry(self, run: RunSpec) -> list[GeometrySpec]:
        """Return what is measured of the geometry of a run's final weights; nothing for the base.

        What needs weights is left out for methods that have none of their own, such as prompts.
        """
        if run.train is None or self.geometry_plan is None:
            return []
        weights = has_weights(method_of(run.method).card)
        return [spec for spec in self.geometry_plan.specs(run.train.task) if weights or not spec.needs_weights]

    def scans(self, run: RunSpec) -> list[ScanSpec]:
        """Return the paths of a run's final weights that are walked; none for the base, and for methods without."""
        if run.train is None or self.paths_plan is None:
            return []
        return list(self.paths_plan.scans(self.evaluations(run), method_of(run.method).card))


def find_study(name: str) -> Path:
    """Return the path of a study given as a file or by the name of a shipped one.

    Raises:
        UserError: neither a file nor a shipped study.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"no study file {path}")
        return path
    shipped = shipped_studies()
    if name not in shipped:
        raise unknown("study", name, shipped)
    return shipped[name]


def shipped_studies() -> dict[str, Path]:
    """Return name to path of every study that comes with peft-arena."""
    for directory in PACKAGED:
        if directory.is_dir():
            return {path.stem: path for path in sorted(directory.glob("*.yaml"))}
    return {}


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and expand it into runs.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` assignments applied before checking, for example ``train.schedule.steps=5``.

    Raises:
        UserError: anything unknown, missing or contradictory, with the line of the file.
    """
    yaml_file = YamlFile(path)
    for text in overrides:
        _override(yaml_file.data, text)
    return study_from(yaml_file.data, path, yaml_file.locate)


def study_from(data: Mapping[str, Any], path: Path | None = None, locate: Locate | None = None) -> Study:
    """Expand the content of a study file into runs.

    Args:
        data: what a study file holds.
        path: the file, where there is one.
        locate: gives the place of a key in the file.

    Raises:
        UserError: anything unknown, missing or contradictory.
    """
    file = build(StudyFile, data, where="study", locate=locate)
    reader = _Reader(file, locate or (lambda keys: "study"))
    model = pin(file.model)
    reader.sizer = Sizer(model)
    base = RunSpec(model=model, method=MethodSpec(name=BASE))
    targets = tuple(reader.target(index) for index in range(len(file.targets)))
    retention = tuple(reader.retention(index) for index in range(len(file.retention)))
    arms = tuple(
        reader.arm(model, arm, target, targets[target])
        for target in range(len(file.targets))
        for arm in range(len(file.arms))
    )
    _refuse_twins(arms, str(path or "study"))
    asked = [spec.task.id for spec in (*targets, *retention)]
    for spec in (*targets, *retention):
        if asked.count(spec.task.id) > 1:
            raise UserError(
                f"task '{spec.task.name}' is asked for twice, as target or retention (in {path or 'study'})"
            )
    geometry = None
    if file.geometry is not None:
        geometry = GeometryPlan(file.geometry, retention, task_spec, reader.locate)
        for spec in targets:
            geometry.specs(spec.task)
    paths = None if file.paths is None else PathsPlan(file.paths, reader.locate)
    study = Study(file, base, arms, targets, retention, geometry_plan=geometry, paths_plan=paths)
    for arm in arms:
        study.scans(arm.runs[0])
    return study


def task_spec(name: str, config: Mapping[str, Any], where: str) -> TaskSpec:
    """Return a task's spec with its settings checked and its defaults written out.

    Raises:
        UserError: unknown task or setting.
    """
    if is_foreign(name):
        spec = foreign_spec(name, config, where)
        _check_known(spec, where)
        return spec
    task = make_task(name, config, where)
    return TaskSpec(
        name=name,
        version=task.card.version,
        revision=task.card.revision,
        config=task.config.model_dump(mode="json"),
        plugin=TASKS.plugin(name),
    )


def _method_spec(name: str, method: Method) -> MethodSpec:
    return MethodSpec(name=name, config=method.config.model_dump(mode="json"), plugin=METHODS.plugin(name))


def _check_known(spec: TaskSpec, where: str) -> None:
    """Refuse a task that lm-eval does not know; slow only for names that are no file of lm-eval's."""
    name = spec.name.removeprefix(PREFIX)
    settings = ForeignSettings.model_validate(spec.config)
    if settings.include_path is None and packaged_file(name) is not None:
        return
    from peft_arena.evaluate.harness import find

    try:
        find(name, settings)
    except UserError as error:
        raise UserError(f"{error} (in {where})") from None


class _Reader:
    """Turns entries of one study file into specs, keeping the file's lines for complaints."""

    def __init__(self, file: StudyFile, locate: Locate) -> None:
        self.file = file
        self.locate = locate
        self.sizer = Sizer(file.model)

    def target(self, index: int) -> EvalSpec:
        entry = self.file.targets[index]
        where = self.locate(("targets", index, "task"))
        if is_foreign(entry.task):
            raise UserError(
                f"'{entry.task}' cannot be a target (in {where}): tasks of lm-eval are evaluated, not trained on; "
                "use one of ours or task 'custom' with your own data"
            )
        spec = task_spec(entry.task, entry.config, where)
        if make_task(spec.name, spec.config, where).card.role != Role.TARGET:
            raise UserError(f"task '{entry.task}' cannot be a target (in {where}): it has no training items")
        return EvalSpec(task=spec, items=entry.items)

    def retention(self, index: int) -> EvalSpec:
        entry = self.file.retention[index]
        where = self.locate(("retention", index, "task"))
        return EvalSpec(task=task_spec(entry.task, entry.config, where), items=entry.items)

    def arm(self, model: ModelSpec, index: int, target: int, evaluation: EvalSpec) -> Arm:
        entry = self.file.arms[index]
        where = self.locate(("arms", index, "method"))
        METHODS.get(entry.method, where)
        method = make_method(entry.method, entry.config, self.locate(("arms", index, "config")))
        refused, spent = _refusal(method), None
        budget = entry.budget if "budget" in entry.model_fields_set else self.file.budget
        if budget is not None and not refused:
            try:
                method, spent = self.sizer.fit(method, budget, method.size in entry.config, where)
            except UserError as error:
                refused = str(error)
        spec = _method_spec(entry.method, method)
        label = entry.label or entry.method
        train = self._train(index, target, evaluation.task, method)
        runs = tuple(RunSpec(model=model, method=spec, train=train, seed=seed) for seed in self.file.seeds)
        return Arm(label=label, method=entry.method, target=evaluation, runs=runs, refused=refused, spent=spent)

    def _train(self, arm: int, target: int, task: TaskSpec, method: Method) -> TrainSpec:
        layers: list[tuple[KeyPath, Mapping[str, Any]]] = [
            (("train",), self.file.train),
            (("targets", target, "train"), self.file.targets[target].train),
            (("arms", arm, "train"), self.file.arms[arm].train),
        ]
        merged: dict[str, Any] = {}
        origin: dict[str, KeyPath] = {}
        for path, table in layers:
            for key, value in table.items():
                if key == "task":
                    raise UserError(f"'task' is set by targets, not by train (in {self.locate((*path, key))})")
                merged[key] = value
                origin[key] = path
        if "learning_rate" not in merged:
            raise UserError(
                f"train.learning_rate is required (in {self.locate(('arms', arm))}); "
                f"'documented' stands for that of {method.card.name}, {documented_rate(method, self.file.model)}"
            )
        if merged["learning_rate"] == "documented":
            merged["learning_rate"] = documented_rate(method, self.file.model)

        def locate(path: KeyPath) -> str:
            head = origin.get(str(path[0]), ("train",)) if path else ("train",)
            return self.locate((*head, *path))

        return build(TrainSpec, {**merged, "task": task.model_dump()}, where="train", locate=locate)


def documented_rate(method: Method, model: ModelSpec) -> float | None:
    """Return the learning rate that a method's card documents for a model: its own for the packaged micro model."""
    rate = method.card.micro_learning_rate if model.name in PACKAGED_MODELS else None
    return rate or method.card.learning_rate


def check_items(study: Study) -> None:
    """Check that every task has the items that the study and its methods ask for; reads or makes them for all tasks.

    Raises:
        UserError: a task has fewer items, or lacks a split.
    """
    wanted: dict[tuple[str, str], list[tuple[str, int, TaskSpec]]] = {}
    for evaluation in (*study.targets, *study.retention):
        if not is_foreign(evaluation.task.name):
            entry = ("items", evaluation.items or 1, evaluation.task)
            wanted.setdefault((evaluation.task.id, evaluation.split), []).append(entry)
    for arm in study.arms:
        train = arm.runs[0].train
        if train is not None and not arm.refused:
            wanted.setdefault((train.task.id, "train"), []).append(("train.examples", train.examples or 1, train.task))
            if train.validation_items:
                entry = ("train.validation_items", train.validation_items, train.task)
                wanted.setdefault((train.task.id, "validation"), []).append(entry)
            needed = method_of(arm.runs[0].method).calibration_examples
            if train.examples is not None and needed > train.examples:
                raise UserError(f"calibration_examples of {arm.label} is {needed}, and train.examples {train.examples}")
            entry = (f"calibration_examples of {arm.label}", needed, train.task)
            wanted[train.task.id, "train"].append(entry)
    tasks: dict[str, Task] = {}
    for (task_id, split), entries in wanted.items():
        task = tasks.setdefault(task_id, task_of(entries[0][2]))
        try:
            found = len(task.items(split))  # type: ignore[arg-type]
        except UserError as error:
            if split != "validation":
                raise
            cure = "give the task one, or set train.validation_items to 0"
            raise UserError(f"{error}; the held-out loss needs a validation split: {cure}") from None
        for key, count, spec in entries:
            if count > found:
                raise UserError(f"{key} is {count}, and task {spec.name} has {found} items in its {split} split")


def _refusal(method: Method) -> str:
    if Capability.TRAINS not in method.card.capabilities:
        return f"{method.card.name} trains nothing; the base model is always part of a study"
    if Capability.NEEDS_QUANTIZED_BASE in method.card.capabilities:
        return f"{method.card.name} needs a quantised base model, and models are loaded in float32 or bfloat16 here"
    return ""


def _refuse_twins(arms: Sequence[Arm], path: str) -> None:
    seen: dict[str, str] = {}
    labels: set[tuple[str, str]] = set()
    for arm in arms:
        if (arm.target.id, arm.label) in labels:
            raise UserError(f"two arms are labelled '{arm.label}' (in {path}); give one of them another label")
        labels.add((arm.target.id, arm.label))
        for run in () if arm.refused else arm.runs:
            if run.id in seen:
                raise UserError(f"arms '{seen[run.id]}' and '{arm.label}' are the same run {run.run_id} (in {path})")
            seen[run.id] = arm.label


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value, got '{text}'")
    current: Any = data
    parts = key.split(".")
    for part in parts[:-1]:
        current = _inside(current, part, text, make=True)
    last = parts[-1]
    if isinstance(current, list):
        _inside(current, last, text, make=False)
        current[int(last)] = parse_scalar(value)
    elif isinstance(current, dict):
        current[last] = parse_scalar(value)
    else:
        raise UserError(f"--set {text}: '{'.'.join(parts[:-1])}' is a single value and has no keys")


def _inside(current: Any, part: str, text: str, make: bool) -> Any:
    if isinstance(current, list):
        if not part.isdigit() or int(part) >= len(current):
            raise UserError(f"--set {text}: '{part}' is no position in a list of {len(current)} (from 0)")
        return current[int(part)]
    if isinstance(current, dict):
        return current.setdefault(part, {}) if make else current[part]
    raise UserError(f"--set {text}: '{part}' is inside a single value")
