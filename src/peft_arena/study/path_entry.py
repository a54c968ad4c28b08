"""The section ``paths`` of a study file: which paths of every run are walked back, and how a point is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from peft_arena.analyze.view import Margin
from peft_arena.core.build import Locate, build
from peft_arena.core.errors import UserError
from peft_arena.core.paths import ScanSpec, read_grid
from peft_arena.core.specs import EvalSpec, Name, PathSpec, Spec, Table, TaskSpec, Way
from peft_arena.methods.base import MethodCard
from peft_arena.paths.fit import path_refusal
from peft_arena.paths.rules import rule_spec
from peft_arena.tasks.foreign import is_foreign
from peft_arena.tasks.registry import difference_unit, made_task

GRID = "0.1:1.0:0.1"
ITEMS = 100


class PathEntry(Spec):
    """One path: a rule, and the way from the pretrained to the tuned weights."""

    rule: Name = "uniform"
    config: Table = Field(default_factory=dict)
    """Settings of the rule."""
    way: Way = "own"


class PathsEntry(Spec):
    """The section as it is written."""

    grid: tuple[float, ...] = read_grid(GRID)
    """Factors, or text such as ``0.1:1.2:0.1``."""
    paths: Annotated[tuple[PathEntry, ...], Field(min_length=1)] = (PathEntry(),)
    items: int = Field(default=ITEMS, ge=2)
    """Validation items of each task at most, by which a point is chosen."""
    save_points: bool = False
    """Also evaluate the save points on the validation items."""

    @model_validator(mode="before")
    @classmethod
    def _no_tolerance(cls, value: object) -> object:
        if isinstance(value, Mapping) and "tolerance" in value:
            raise ValueError("'tolerance' is the study's margin now: margin: {target: POINTS}, beside paths")
        return value

    @field_validator("grid", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        return read_grid(value) if isinstance(value, str) else value


class PathsPlan:
    """From the section of a study file to what is scanned of a run."""

    def __init__(self, entry: PathsEntry, locate: Locate, margin: Margin) -> None:
        """Check everything that does not depend on the run.

        Args:
            entry: the section.
            locate: gives the place of a key in the study file.
            margin: of the study.

        Raises:
            UserError: an unknown rule or setting, a path that is asked for twice, or a grid that does not ascend.
        """
        self.entry = entry
        self.margin = margin
        self._locate = locate
        self.paths = tuple(
            path_of(found.rule, found.config, found.way, locate(("paths", "paths", place)))
            for place, found in enumerate(entry.paths)
        )
        if len({path.id for path in self.paths}) < len(self.paths):
            raise UserError(f"paths asks for the same path twice (in {locate(('paths', 'paths'))})")

    def scans(self, evaluations: Sequence[EvalSpec], card: MethodCard) -> tuple[ScanSpec, ...]:
        """Return what is scanned of a run: every path its method has.

        Args:
            evaluations: of the run's final weights, its target first.
            card: of the run's method.

        Raises:
            UserError: a setting is out of bounds, or a task has no validation items.
        """
        paths = [path for path in self.paths if not path_refusal(card, path)]
        if not paths:
            return ()
        return tuple(
            scan_spec(
                path,
                self.entry.grid,
                evaluations,
                items=self.entry.items,
                margin=self.margin,
                save_points=self.entry.save_points,
                locate=self._locate,
            )
            for path in paths
        )


def path_of(rule: str, config: Table, way: str, where: str) -> PathSpec:
    """Return the spec of a path, its rule's settings checked and written out.

    Raises:
        UserError: an unknown rule, setting or way.
    """
    return build(PathSpec, {"way": way, "rule": rule_spec(rule, config, where).model_dump()}, where=where)


def scan_spec(
    path: PathSpec,
    grid: Sequence[float],
    evaluations: Sequence[EvalSpec],
    *,
    items: int,
    margin: Margin,
    save_points: bool,
    locate: Locate = lambda keys: "path scan",
) -> ScanSpec:
    """Return the spec of a scan; tasks of lm-eval take no part in it, as they have test items only.

    Args:
        path: which path.
        grid: factors.
        evaluations: on test items, the target first.
        items: validation items of each task at most.
        margin: most that the target of a chosen point may lie below the tuned model's on validation items; nothing
            where it has none for the target's unit.
        save_points: whether save points are evaluated as well.
        locate: gives the place of a key in the study file.

    Raises:
        UserError: a setting is out of bounds, or a task has no validation items.
    """
    pairs = [
        (EvalSpec(task=spec.task, split="validation", items=min(items, found)), spec)
        for spec in evaluations
        if (found := validation_items(spec.task))
    ]
    table = {
        "path": path.model_dump(),
        "grid": list(grid),
        "choose_on": [choose.model_dump() for choose, _ in pairs],
        "claim_on": [claim.model_dump() for _, claim in pairs],
        "tolerance": margin.on_target(difference_unit(evaluations[0].task)) or 0.0,
        "save_points": save_points,
    }
    return build(ScanSpec, table, where="paths", locate=lambda keys: locate(("paths", *keys)))


def validation_items(task: TaskSpec) -> int:
    """Return how many validation items a task has; 0 for those of lm-eval, which are evaluated on test items only.

    Raises:
        UserError: a task of ours has none, or its data cannot be found.
    """
    return 0 if is_foreign(task.name) else len(made_task(task).items("validation"))
