"""What a study stands for once its file is read: its arms, their runs, and what is asked of each run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peft_arena.analyze.view import Margin
from peft_arena.core.geometry import GeometrySpec
from peft_arena.core.paths import ScanSpec
from peft_arena.core.specs import EvalSpec, RunSpec
from peft_arena.methods.base import has_weights
from peft_arena.methods.registry import method_of
from peft_arena.study.budget import Spent
from peft_arena.study.geometry_entry import GeometryPlan
from peft_arena.study.path_entry import PathsPlan
from peft_arena.study.study_file import StudyFile
from peft_arena.weights.start import init_of, path_card


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
    margin: Margin = field(default_factory=Margin)
    geometry_plan: GeometryPlan | None = None
    paths_plan: PathsPlan | None = None
    sampled: Mapping[str, EvalSpec] = field(default_factory=dict)
    """Id of a target's evaluation to the same with sampled answers; only targets with ``sampling``."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Id of an evaluation to what the study calls its task; only where it does."""

    def runs(self) -> list[RunSpec]:
        """Return every run, the base model first, refused arms left out."""
        return [self.base, *(run for arm in self.arms if not arm.refused for run in arm.runs)]

    def sources(self) -> list[RunSpec]:
        """Return the runs that others begin at and that are none of the study's own, in the order of training."""
        own = {run.id for run in self.runs()}
        found: dict[str, RunSpec] = {}
        for run in self.runs():
            chain = []
            init = init_of(run)
            while init is not None:
                chain.append(init.run)
                init = init_of(init.run)
            found |= {source.id: source for source in reversed(chain) if source.id not in own}
        return list(found.values())

    def evaluations(self, run: RunSpec) -> list[EvalSpec]:
        """Return what is evaluated at a run's points: its own target, then retention, then what is sampled.

        For the base all targets, and also the validation items of every path: it is where all of them begin. What is
        sampled is asked at the final point only.
        """
        greedy = self._greedy(run)
        sampled = [self.sampled[spec.id] for spec in greedy if spec.id in self.sampled]
        if run.train is None:
            paths = [spec for arm in self.arms for scan in self.scans(arm.runs[0]) for spec in scan.choose_on]
            return list({spec.id: spec for spec in (*greedy, *paths, *sampled)}.values())
        return [*greedy, *sampled]

    def _greedy(self, run: RunSpec) -> list[EvalSpec]:
        """Return what a run is judged by: its own target (the base: all), then retention."""
        own = [spec for spec in self.targets if run.train is None or spec.task == run.train.task]
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
        return list(self.paths_plan.scans(self._greedy(run), path_card(run)))
