"""A study as the analysis sees it: which runs belong to which arm, and on what they are judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft_arena.core.errors import UserError
from peft_arena.core.measure import POINTS
from peft_arena.core.paths import DEFAULT_MARGIN, ScanSpec
from peft_arena.core.specs import EvalSpec, RLSpec, RunSpec
from peft_arena.cost.pscp import PscpChoice
from peft_arena.store.published import PublishedTable


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: a method with its settings, run once per seed."""

    label: str
    """Shown to the reader, for example ``lora`` or ``full lr=1e-3``; unique among the arms of a target."""
    runs: tuple[RunSpec, ...]
    """One per seed; they differ in nothing else."""
    target: EvalSpec
    """The task the arm was trained on, on its test items."""
    budget: str = ""
    """What became of the arm's parameter budget, in one line; empty without one."""
    sampled: EvalSpec | None = None
    """The target with several sampled answers to each item; None where the study asks for none."""

    def __post_init__(self) -> None:
        """Require at least one run, no seed twice, and the same method and objective in all runs."""
        if not self.runs:
            raise UserError(f"arm '{self.label}' has no runs")
        twice = [str(seed) for seed, count in Counter(self.seeds).items() if count > 1]
        if twice:
            raise UserError(f"arm '{self.label}' has more than one run with seed {', '.join(twice)}")
        methods = sorted({run.method.name for run in self.runs})
        if len(methods) > 1:
            raise UserError(f"arm '{self.label}' mixes methods: {', '.join(methods)}")
        ways = sorted({run.train.objective if run.train else "no training" for run in self.runs})
        if len(ways) > 1:
            raise UserError(f"arm '{self.label}' mixes objectives: {', '.join(ways)}")

    @property
    def method(self) -> str:
        """Name of the arm's method."""
        return self.runs[0].method.name

    @property
    def objective(self) -> str:
        """How the arm was trained: ``sft`` or the algorithm of reinforcement learning; empty for the base model."""
        train = self.runs[0].train
        return "" if train is None else train.objective

    @property
    def is_rl(self) -> bool:
        """Whether the arm was trained by reinforcement learning."""
        return isinstance(self.runs[0].train, RLSpec)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of every run."""
        return tuple(run.seed for run in self.runs)

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the arm; None for the base model."""
        train = self.runs[0].train
        return None if train is None else train.learning_rate


@dataclass(frozen=True)
class Refusal:
    """Something the study asked for that the planner refused to run."""

    label: str
    """What was asked for, for example the arm's label."""
    reason: str


@dataclass(frozen=True)
class Margin:
    """What a study counts as no difference: the only tolerance there is."""

    target: float | None = None
    """In :attr:`unit`; None: not said."""
    retention: float = DEFAULT_MARGIN
    """Points of mean retention."""
    unit: str = POINTS
    """What the study's number for targets is in: points if one of them is a fraction, else their own unit."""

    def on_target(self, unit: str) -> float | None:
        """Return the margin of differences in a unit: the study's, 2 points where it says none, None elsewhere."""
        if self.target is not None and unit == self.unit:
            return self.target
        return DEFAULT_MARGIN if unit == POINTS else None


@dataclass(frozen=True)
class SeedSd:
    """How far trainings with different seeds lie apart, measured elsewhere and declared by the study."""

    target: float
    """Standard deviation of one run's target score, in :attr:`unit`."""
    retention: float
    """That of its mean retention, in points."""
    runs: int | None = None
    """Runs it was measured on; None: taken as exact."""
    source: str = ""
    """Where it was measured."""
    unit: str = POINTS
    """As that of a margin; of targets in another unit nothing is declared."""


@dataclass(frozen=True)
class StudyView:
    """Everything the analysis and the report need to know about a study; the numbers come from the store."""

    name: str
    base: RunSpec
    """The pretrained model's run; it has one run and answers every task of the study."""
    arms: tuple[Arm, ...]
    retention: tuple[EvalSpec, ...]
    """What is only evaluated, to see what was forgotten."""
    title: str = ""
    description: str = ""
    refused: tuple[Refusal, ...] = ()
    every_save_point: bool = False
    """Whether the study evaluates every save point, so that having no evaluation of one is a gap."""
    geometry: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Run id to the keys of the geometry records that the study asks of its final weights."""
    paths: Mapping[str, tuple[ScanSpec, ...]] = field(default_factory=dict)
    """Run id to the scans that the study asks of its final weights."""
    pscp: PscpChoice | None = None
    """How PSCP is computed; None where the study does not ask for it."""
    published: tuple[PublishedTable, ...] = ()
    """Tables of others that the report shows beside the study's own numbers; nothing is computed from them."""
    margin: Margin = Margin()
    """What counts as no difference."""
    seed_sd: SeedSd | None = None
    """Spread between trainings that the study declares; None where it declares none."""
    primary: tuple[tuple[str, str], ...] = ()
    """Pairs of arms, by label, that are compared before all others, at the full level."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Id of an evaluation to what the study calls its task; only where it does."""

    def __post_init__(self) -> None:
        """Require a base model and labels that are unique among the arms of a target."""
        if not self.base.is_base:
            raise UserError(f"study '{self.name}': the base run {self.base.run_id} is a trained run")
        counts = Counter((arm.target.id, arm.label) for arm in self.arms)
        twice = sorted({label for (_, label), count in counts.items() if count > 1})
        if twice:
            raise UserError(f"study '{self.name}': more than one arm is called {', '.join(map(repr, twice))}")

    @property
    def targets(self) -> tuple[EvalSpec, ...]:
        """Every target evaluation once, in the order of the arms."""
        return tuple({arm.target.id: arm.target for arm in self.arms}.values())

    @property
    def objectives(self) -> tuple[str, ...]:
        """Every way of training among the arms once, in their order."""
        return tuple(dict.fromkeys(arm.objective for arm in self.arms))
