"""The form of a study file: what may be written in it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from peft_arena.core.paths import DEFAULT_MARGIN
from peft_arena.core.specs import ModelSpec, Name, Sampling, Spec, Table
from peft_arena.study.assumptions import Assumptions
from peft_arena.study.budget import Budget
from peft_arena.study.geometry_entry import GeometryEntry
from peft_arena.study.path_entry import PathsEntry
from peft_arena.study.pscp_entry import PscpEntry

Seed = Annotated[int, Field(ge=0)]


TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$|.\.(csv|jsonl?|parquet)$")]
"""A registered name, one of lm-eval's, or a data file; whether there is such a task is seen when it is made."""


class TargetEntry(Spec):
    """A task that every arm is trained on, and judged by."""

    task: TaskName
    label: str | None = Field(default=None, min_length=1)
    """Name in tables and figures; the task's own, or its file's, unless given. No part of a run's identity."""
    config: Table = Field(default_factory=dict)
    train: Table = Field(default_factory=dict)
    """Training settings for this target, over those of the study."""
    rl: Table = Field(default_factory=dict)
    """Those of reinforcement learning alone, over the study's ``rl``."""
    items: int | None = Field(default=None, ge=1)
    sampling: Sampling | None = None
    """Ask the pretrained and the final models for several sampled answers to each item."""
    judged_by: Literal["greedy", "samples"] = "greedy"
    """Which answers the target's score is of: ``greedy``, and sampled ones are asked for beside them; or ``samples``,
    the mean over which is the score, and no greedy answer is asked for."""

    @model_validator(mode="after")
    def _sampled(self) -> TargetEntry:
        if self.judged_by == "samples" and self.sampling is None:
            raise ValueError("judged_by 'samples' needs sampling: how many answers, and at which temperature")
        return self


class RetentionEntry(Spec):
    """A task, or a named group of tasks, that is only evaluated, to see what was forgotten."""

    task: TaskName | None = None
    label: str | None = Field(default=None, min_length=1)
    """Name of the task in tables and figures; its own, or its file's, unless given."""
    group: Name | None = None
    """Stands for all its tasks."""
    config: Table = Field(default_factory=dict)
    """Settings of the task. Of a group: of all its tasks, and under the name of one those of that one only."""
    items: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> RetentionEntry:
        if (self.task is None) == (self.group is None):
            raise ValueError("give exactly one of task and group")
        if self.group is not None and self.label is not None:
            raise ValueError("a group has no label: each of its tasks has its own name")
        return self


class MarginEntry(Spec):
    """What counts as no difference; one number stands for both."""

    target: float | None = Field(default=None, gt=0, le=100, allow_inf_nan=False, strict=True)
    """Points where a target of the study is a fraction, else the targets' own unit; 2 points unless given, and nothing
    for targets in another unit."""
    retention: float = Field(default=DEFAULT_MARGIN, gt=0, le=100, allow_inf_nan=False, strict=True)
    """Points of mean retention."""

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: object) -> object:
        return _for_both(value)


class SeedSdEntry(Spec):
    """Standard deviation between trainings with different seeds, measured elsewhere; one number stands for both."""

    target: float = Field(gt=0, le=100, allow_inf_nan=False, strict=True)
    """Of the target's score, in the unit of the margin."""
    retention: float = Field(gt=0, le=100, allow_inf_nan=False, strict=True)
    """Of mean retention, points."""
    runs: int | None = Field(default=None, ge=2)
    """Runs it was measured on; taken as exact if left out."""
    source: str = ""
    """Where it was measured; the report says so."""

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: object) -> object:
        return _for_both(value)


def _for_both(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"target": value, "retention": value} if number else value


class ArmEntry(Spec):
    """A method with its settings, one competitor of the comparison."""

    method: Name
    label: str | None = None
    """Name in tables and figures; the method's name unless given."""
    config: Table = Field(default_factory=dict)
    train: Table = Field(default_factory=dict)
    """Training settings of this arm, over those of the study and the target; ``objective`` and ``init_from`` too."""
    budget: Budget | None = None
    """Parameters to train, over what the study says; null for none."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    """Seeds of this arm, over those of the study: two of one arm say how far trainings lie apart."""


class Execution(Spec):
    """How the work is done. Nothing here may change a result, so nothing here is part of a run's identity."""

    jobs: int = Field(default=1, ge=1)
    """Runs worked on at once."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each run; None: the machine's cores divided by jobs."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    resume_every: int | None = Field(default=None, ge=1)
    """Steps between two states a killed run can continue from; save points always are."""
    recompute_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, longer steps, the same
    results. Methods that put keys and values into the cache keep theirs."""
    latency_repeats: int = Field(default=5, ge=2)
    estimate: Assumptions = Assumptions()
    """What the plan's estimates of operations, memory and time assume."""


class StudyFile(Spec):
    """The content of a study file."""

    name: Name
    title: str
    description: str = ""
    model: ModelSpec
    targets: tuple[TargetEntry, ...] = Field(min_length=1)
    retention: tuple[RetentionEntry, ...] = ()
    train: Table
    rl: Table = Field(default_factory=dict)
    """Training settings that only arms of reinforcement learning get, over those of ``train``."""
    budget: Budget | None = None
    """Parameters that every arm trains, by choosing each method's size; an arm may say otherwise."""
    arms: tuple[ArmEntry, ...] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)
    margin: MarginEntry = MarginEntry()
    """What counts as no difference: behind *no worse*, *equivalent*, *retained*, and the choice of a path's point."""
    seed_sd: SeedSdEntry | None = None
    """How far trainings lie apart, where the study has one seed."""
    primary: tuple[Annotated[tuple[str, ...], Field(min_length=2, max_length=2)], ...] = ()
    """Pairs of arms, by label, that the study is about: compared one after the other before everything else, which is
    only compared as far as all of them were decided."""
    evaluate_at: Literal["final", "save_points"] = "final"
    geometry: GeometryEntry | None = None
    """What is measured of the geometry of every run's final weights."""
    paths: PathsEntry | None = None
    """Which paths of every run are walked back from its final weights."""
    pscp: PscpEntry | None = None
    """Show PSCP in reports, with these constants."""
    published: tuple[Name, ...] = ()
    """Ids of published tables, or of all of a source, that the report shows beside the study's own numbers."""
    execution: Execution = Execution()
