"""Study files: the only input of a comparison. Reading one gives every run it stands for, or one line of complaint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_arena.analyze.view import Margin
from peft_arena.core.bounded import user_path
from peft_arena.core.build import Locate, build
from peft_arena.core.errors import UserError, unknown
from peft_arena.core.measure import POINTS
from peft_arena.core.plain import check_plain
from peft_arena.core.specs import (
    EvalSpec,
    InitFrom,
    MethodSpec,
    ModelSpec,
    RunSpec,
    TaskSpec,
)
from peft_arena.core.yamlfile import YamlFile
from peft_arena.evaluate.metrics import sampling_refusal
from peft_arena.methods.base import Capability, Method
from peft_arena.methods.registry import BASE, METHODS, make_method
from peft_arena.models.load import pin
from peft_arena.store.published import find_tables
from peft_arena.study.attachable import Attachable
from peft_arena.study.budget import Sizer
from peft_arena.study.geometry_entry import GeometryPlan
from peft_arena.study.labels import shown_labels
from peft_arena.study.model import Arm, Study
from peft_arena.study.overrides import override
from peft_arena.study.path_entry import PathsPlan
from peft_arena.study.study_file import StudyFile
from peft_arena.study.train_entry import SFT, Layer, Settings, gather, start_at, train_spec, training_refusal
from peft_arena.tasks.base import Role
from peft_arena.tasks.foreign import PREFIX, ForeignSettings, foreign_spec, is_foreign, packaged_file
from peft_arena.tasks.groups import group_members
from peft_arena.tasks.registry import TASKS, difference_unit, display_name, make_task, registered, task_of

PACKAGED = (Path(__file__).parents[1] / "studies", Path(__file__).parents[3] / "studies")
"""Where shipped studies are: beside the installed package, or in the source tree it runs from."""


def find_study(name: str) -> Path:
    """Return the path of a study given as a file or by the name of a shipped one.

    Raises:
        UserError: neither a file nor a shipped study.
    """
    path = user_path(name)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if not path.exists():
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
        override(yaml_file.data, text)
    return study_from(yaml_file.data, path, yaml_file.locate)


def study_from(
    data: Mapping[str, Any],
    path: Path | None = None,
    locate: Locate | None = None,
    find_run: Callable[[str], RunSpec] | None = None,
) -> Study:
    """Expand the content of a study file into runs.

    Args:
        data: what a study file holds.
        path: the file, where there is one.
        locate: gives the place of a key in the file.
        find_run: finds runs that training may begin at by their names; None: only arms can be begun at.

    Raises:
        UserError: anything unknown, missing or contradictory.
    """
    check_plain(data, locate)
    file = build(StudyFile, data, where="study", locate=locate)
    reader = _Reader(file, locate or (lambda keys: "study"), find_run)
    for index, name in enumerate(file.published):
        find_tables(name, reader.locate(("published", index)))
    model = pin(file.model)
    reader.sizer = Sizer(model)
    base = RunSpec(model=model, method=MethodSpec(name=BASE))
    targets = tuple(reader.target(index) for index in range(len(file.targets)))
    retention = tuple(spec for index in range(len(file.retention)) for spec in reader.retention(index))
    arms = tuple(
        reader.arm(model, arm, target, targets[target])
        for target in range(len(file.targets))
        for arm in range(len(file.arms))
    )
    _refuse_twins(arms, str(path or "study"))
    reader.check_rl(arms)
    reader.check_primary()
    asked = [spec.task.id for spec in (*targets, *retention)]
    for spec in (*targets, *retention):
        if asked.count(spec.task.id) > 1:
            raise UserError(
                f"task '{display_name(spec.task)}' is asked for twice, as target or retention (in {path or 'study'})"
            )
    geometry = None
    if file.geometry is not None:
        geometry = GeometryPlan(file.geometry, retention, task_spec, reader.locate)
        for spec in targets:
            geometry.specs(spec.task)
    units = [difference_unit(spec.task) for spec in targets]
    margin = Margin(file.margin.target, file.margin.retention, POINTS if POINTS in units else units[0])
    paths = None if file.paths is None else PathsPlan(file.paths, reader.locate, margin)
    found = [(spec.id, reader.sampled(index, spec)) for index, spec in enumerate(targets)]
    sampled = {key: spec for key, spec in found if spec is not None}
    study = Study(
        file, base, arms, targets, retention, margin, geometry, paths, sampled, _labels(file, targets, retention)
    )
    for arm in arms:
        study.scans(arm.runs[0])
    return study


def _labels(file: StudyFile, targets: Sequence[EvalSpec], retention: Sequence[EvalSpec]) -> dict[str, str]:
    """Return what the study calls its tasks, by the ids of their evaluations."""
    named = [entry.label for entry in file.targets]
    for entry in file.retention:
        named += [entry.label] if entry.group is None else [None] * len(group_members(entry.group, "retention"))
    return {spec.id: name for spec, name in zip((*targets, *retention), named, strict=True) if name is not None}


def task_spec(name: str, config: Mapping[str, Any], where: str) -> TaskSpec:
    """Return a task's spec with its settings checked and its defaults written out.

    Raises:
        UserError: unknown task or setting.
    """
    name, config = registered(name, config)
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


def method_spec(name: str, method: Method) -> MethodSpec:
    """Return what a run's spec says of a method: its registered name and every setting written out."""
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

    def __init__(self, file: StudyFile, locate: Locate, find_run: Callable[[str], RunSpec] | None) -> None:
        self.file = file
        self.locate = locate
        self.find_run = find_run
        self.sizer = Sizer(file.model)
        self._attachable: Attachable | None = None
        self.made: dict[tuple[int, int], Arm] = {}
        """Arms by target and place."""
        self.making: list[int] = []
        """Arms that are being made, each of which the next one begins at."""

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
        if entry.judged_by == "greedy":
            return EvalSpec(task=spec, items=entry.items)
        if self.file.evaluate_at != "final":
            raise UserError(
                f"evaluate_at '{self.file.evaluate_at}' cannot be used with a target judged by samples (in "
                f"{self.locate(('targets', index, 'judged_by'))}): samples are asked for at the final point only"
            )
        return self._with_samples(index, EvalSpec(task=spec, items=entry.items))

    def sampled(self, index: int, greedy: EvalSpec) -> EvalSpec | None:
        """Return a target's evaluation with sampled answers, where the study asks for one."""
        if self.file.targets[index].sampling is None or greedy.sampling is not None:
            return None
        return self._with_samples(index, greedy)

    def _with_samples(self, index: int, greedy: EvalSpec) -> EvalSpec:
        task = task_of(greedy.task)
        judged = self.file.targets[index].judged_by == "samples"
        if why := sampling_refusal(task.card) or (task.samples_refused if judged else ""):
            where = self.locate(("targets", index, "sampling"))
            raise UserError(f"sampling cannot be asked of target '{display_name(greedy.task)}' (in {where}): {why}")
        return greedy.model_copy(update={"sampling": self.file.targets[index].sampling})

    def retention(self, index: int) -> list[EvalSpec]:
        entry = self.file.retention[index]
        where = self.locate(("retention", index, "task" if entry.group is None else "group"))
        names = (entry.task or "",) if entry.group is None else group_members(entry.group, where)
        shared = {key: value for key, value in entry.config.items() if entry.group is None or key not in names}
        configs = {name: {**shared, **(entry.config.get(name, {}) if entry.group else {})} for name in names}
        return [EvalSpec(task=task_spec(name, configs[name], where), items=entry.items) for name in names]

    def arm(self, model: ModelSpec, index: int, target: int, evaluation: EvalSpec) -> Arm:
        if (target, index) not in self.made:
            self.making.append(index)
            self.made[target, index] = self._arm(model, index, target, evaluation)
            self.making.pop()
        return self.made[target, index]

    def _arm(self, model: ModelSpec, index: int, target: int, evaluation: EvalSpec) -> Arm:
        entry = self.file.arms[index]
        where = self.locate(("arms", index, "method"))
        METHODS.get(entry.method, where)
        method = make_method(entry.method, entry.config, self.locate(("arms", index, "config")))
        settings = self._settings(index, target)
        starts, barred = self._starts(settings, model, target, evaluation)
        refused, spent = _refusal(method) or training_refusal(method, settings, model) or barred, None
        budget = entry.budget if "budget" in entry.model_fields_set else self.file.budget
        if budget is not None and not refused:
            try:
                method, spent = self.sizer.fit(method, budget, method.size in entry.config, where)
            except UserError as error:
                refused = str(error)
        spec = method_spec(entry.method, method)
        refused = refused or self.attachable(model).refusal(method, spec)
        runs = []
        for seed, start in zip(self.seeds(index), starts, strict=True):
            train = train_spec(settings, evaluation.task, method, self.file.model, start)
            runs.append(RunSpec(model=model, method=spec, train=train, seed=seed))
        return Arm(self.label(index), entry.method, evaluation, tuple(runs), refused, spent)

    def attachable(self, model: ModelSpec) -> Attachable:
        """Return what tries methods on the study's model, the same each time."""
        if self._attachable is None:
            self._attachable = Attachable(model)
        return self._attachable

    def seeds(self, index: int) -> tuple[int, ...]:
        return self.file.arms[index].seeds or self.file.seeds

    def label(self, index: int) -> str:
        return self.file.arms[index].label or self.file.arms[index].method

    def _settings(self, index: int, target: int) -> Settings:
        """Return the training settings of an arm from all places that state them."""
        of, arm = self.file.targets[target], self.file.arms[index]
        layers: list[Layer] = [
            (("train",), self.file.train),
            (("targets", target, "train"), of.train),
            (("arms", index, "train"), arm.train),
        ]
        rl: list[Layer] = [(("rl",), self.file.rl), (("targets", target, "rl"), of.rl)]
        return gather(layers, rl, ("arms", index), self.label(index), self.locate)

    def _starts(
        self, settings: Settings, model: ModelSpec, target: int, evaluation: EvalSpec
    ) -> tuple[tuple[InitFrom | None, ...], str]:
        """Return where each run of an arm begins, and why it cannot: its source is a refused arm; empty if it can."""
        entry = settings.start
        if entry is None:
            return tuple(None for _ in self.seeds(self.making[-1])), ""
        where = settings.locate(("init_from",))
        if entry.run is not None:
            if self.find_run is None:
                raise UserError(
                    f"init_from.run is for a single run (train grpo --set train.init_from.run=RUN --out DIR); in a "
                    f"study, init_from names an arm: {{arm: LABEL}} (in {where})"
                )
            found = self.find_run(entry.run)
            start = start_at(settings, entry, found, model, f"run {found.run_id}")
            return tuple(start for _ in self.seeds(self.making[-1])), ""
        assert entry.arm is not None, "exactly one is given"
        labels = [self.label(index) for index in range(len(self.file.arms))]
        if entry.arm not in labels:
            raise unknown("arm", entry.arm, labels, where)
        index = labels.index(entry.arm)
        if index == self.making[-1]:
            raise UserError(f"arm '{settings.label}' cannot begin at itself (in {where})")
        if index in self.making:
            circle = [*self.making[self.making.index(index) :], index]
            raise UserError(f"arms begin at each other: {' at '.join(labels[one] for one in circle)} (in {where})")
        source = self.arm(model, index, target, evaluation)
        by_seed = {run.seed: run for run in source.runs}
        lacking = [seed for seed in self.seeds(self.making[-1]) if seed not in by_seed]
        if lacking:
            raise UserError(
                f"arm '{settings.label}' begins at arm '{entry.arm}' with the same seed, and that has no seed "
                f"{', '.join(map(str, lacking))}, only {', '.join(map(str, by_seed))} (in {where})"
            )
        runs = [by_seed[seed] for seed in self.seeds(self.making[-1])]
        if source.refused:
            barred = f"begins at arm '{entry.arm}', which is refused: {source.refused}"
            return tuple(InitFrom(run=run, step=entry.step) for run in runs), barred
        return tuple(start_at(settings, entry, run, model, f"arm '{entry.arm}'") for run in runs), ""

    def check_primary(self) -> None:
        """Refuse pairs that are none."""
        labels = [self.label(index) for index in range(len(self.file.arms))]
        for place, pair in enumerate(self.file.primary):
            where = self.locate(("primary", place))
            for label in pair:
                if label not in labels:
                    raise unknown("arm", label, labels, where)
            if len(set(pair)) < len(pair):
                raise UserError(f"primary compares two different arms, got '{pair[0]}' twice (in {where})")
            left, right = (self.file.arms[labels.index(label)].seeds or self.file.seeds for label in pair)
            if not set(left) & set(right):
                raise UserError(
                    f"primary pairs '{pair[0]}' with '{pair[1]}', which have no seed in common (in {where})"
                )
            if any(set(pair) == set(other) for other in self.file.primary[:place]):
                raise UserError(f"primary names the pair of '{pair[0]}' and '{pair[1]}' twice (in {where})")

    def check_rl(self, arms: Sequence[Arm]) -> None:
        """Refuse settings of reinforcement learning where no arm is trained by it: they would do nothing."""
        places: list[Layer] = [(("rl",), self.file.rl)]
        places += [(("targets", index, "rl"), entry.rl) for index, entry in enumerate(self.file.targets)]
        if any(run.train is not None and run.train.objective != SFT for arm in arms for run in arm.runs):
            return
        for path, table in places:
            if table:
                raise UserError(f"rl is given (in {self.locate(path)}), and no arm has objective grpo or rloo")


def _refusal(method: Method) -> str:
    if Capability.TRAINS not in method.card.capabilities:
        return f"{method.card.name} trains nothing; the base model is always part of a study"
    if Capability.NEEDS_QUANTIZED_BASE in method.card.capabilities:
        return f"{method.card.name} needs a quantised base model, and models are loaded in float32 or bfloat16 here"
    return ""


def _refuse_twins(arms: Sequence[Arm], path: str) -> None:
    seen: dict[str, str] = {}
    labels: set[tuple[str, str]] = set()
    names: dict[tuple[str, str], str] = {}
    for arm, shown in zip(arms, shown_labels(arms), strict=True):
        if (arm.target.id, arm.label) in labels:
            raise UserError(f"two arms are labelled '{arm.label}' (in {path}); give one of them another label")
        labels.add((arm.target.id, arm.label))
        other = names.setdefault((arm.target.id, shown), arm.label)
        if other != arm.label:
            raise UserError(
                f"arms '{other}' and '{arm.label}' are both called '{shown}' in the report, where labels say how an "
                f"arm is trained (in {path}); give one of them another label"
            )
        for run in () if arm.refused else arm.runs:
            if run.id in seen:
                raise UserError(f"arms '{seen[run.id]}' and '{arm.label}' are the same run {run.run_id} (in {path})")
            seen[run.id] = arm.label
