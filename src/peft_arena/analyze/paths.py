"""Choosing a point of a path from validation items: the smallest factor whose target may be as good.

A point may be chosen if it lies between the pretrained and the tuned model and nothing on validation items speaks
against its target: the paired 95 % interval of the difference from the tuned model does not lie below zero; the
difference itself is not below minus the margin, since few items make wide intervals; and the interval of the difference
from the best point of the grid (the tuned model included) does not lie below zero. It must also keep more than the
tuned model, by the estimate of mean retention. Of the points that may be chosen, the one with the smallest factor is.
Nothing is claimed here, and none of the five words is used: the chosen point is judged on other items
(:mod:`peft_arena.analyze.path_claims`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from peft_arena.analyze.effects import oriented, unit_of
from peft_arena.analyze.estimate import Estimate, estimate
from peft_arena.analyze.evidence import TaskInfo, columns_of, scores_of, task_info
from peft_arena.analyze.paired import Contrast, Scores, mean_of
from peft_arena.core.errors import UserError
from peft_arena.core.measure import POINTS
from peft_arena.core.paths import TUNED, ScanSpec
from peft_arena.core.specs import EvalSpec, PathSpec
from peft_arena.store.records import EvaluationRecord, PathRow
from peft_arena.tasks.registry import display_name

PRETRAINED = 0.0
_SEED = 0
"""Stands for the one run that is looked at."""
_SLACK = 1e-9

BEYOND = "beyond the tuned model: shown, never chosen"
IS_PRETRAINED = "the pretrained model itself"
IS_TUNED = "the tuned model itself"
NO_SCORE = "not evaluated, or no item that both it and the tuned model answered could be scored"


@dataclass(frozen=True)
class Choice:
    """Which point of a scan was chosen on validation items, and what was seen at every point."""

    chosen: float | None
    """Factor; None where no point may be chosen."""
    reason: str
    """Why this one, or why none; one sentence."""
    rows: tuple[PathRow, ...]
    """One for each factor of the grid, in its order."""


class Ends(NamedTuple):
    """What the ends of a path are, by the card of its rule."""

    title: str
    """Of the rule."""
    from_base: bool
    """Whether factor 0 is the pretrained model."""
    to_tuned: bool
    """Whether factor 1 is the tuned model."""


def path_ends(path: PathSpec) -> Ends:
    """Return what a path begins and ends with; nothing is assumed of a rule whose plug-in cannot be used here."""
    from peft_arena.paths.rules import RULES

    try:
        card = RULES.get(path.rule.name).card
    except UserError:
        return Ends(path.rule.name, False, False)
    return Ends(card.title, card.from_base, card.to_tuned)


def choose(
    spec: ScanSpec,
    tuned: Sequence[EvaluationRecord],
    points: Mapping[float, Sequence[EvaluationRecord]],
) -> Choice:
    """Choose a point of one run's path by the rule in the module's text.

    Args:
        spec: of the scan.
        tuned: of the tuned model, one for each of ``spec.choose_on`` in its order.
        points: factor of the grid to its evaluations, in the same order; a factor that is not there cannot be chosen.

    Returns:
        The choice. Intervals cover items only, as there is one run.

    Raises:
        UserError: the evaluations are not those that the scan asks for.
    """
    for found in (tuned, *points.values()):
        if [record.spec for record in found] != list(spec.choose_on):
            raise UserError(
                f"a point of the path is chosen by {_named(spec.choose_on)}, "
                f"got evaluations of {_named(record.spec for record in found)}"
            )
    seen = _Seen(spec, tuned, points)
    best = seen.best()
    ends = path_ends(spec.path)
    rows = tuple(seen.row(factor, best, _out_of_question(ends, factor)) for factor in spec.grid)
    allowed = [row for row in rows if row.allowed]
    if not allowed:
        return Choice(None, _why_none(rows), rows)
    first = allowed[0]
    among = f"the smallest of {len(allowed)} factors" if len(allowed) > 1 else "the only factor"
    reason = (
        f"{first.factor:g} is {among} whose target on validation items may be as good as the tuned model's: "
        f"difference {_told(first.target_change, seen.unit)}, mean retention {_told(first.retention_change, POINTS)}"
    )
    return Choice(first.factor, reason, rows)


def _named(specs: Iterable[EvalSpec]) -> str:
    return ", ".join(f"{display_name(spec.task)} ({spec.split}, {spec.id})" for spec in specs) or "nothing"


def _out_of_question(ends: Ends, factor: float) -> str:
    """Say why a factor is never chosen, whatever its scores; empty for all others."""
    if factor > TUNED:
        return BEYOND
    if factor == PRETRAINED and ends.from_base:
        return IS_PRETRAINED
    return IS_TUNED if factor == TUNED and ends.to_tuned else ""


def _why_none(rows: Sequence[PathRow]) -> str:
    refused = [row for row in rows if row.why not in (BEYOND, IS_PRETRAINED, IS_TUNED)]
    if not refused:
        return "the grid has no factor between the pretrained and the tuned model"
    return f"no factor may be chosen; the largest that was tried, {refused[-1].factor:g}: {refused[-1].why}"


def _told(change: tuple[float, float | None, float | None] | None, unit: str) -> str:
    """Return a change with its interval as text."""
    if change is None:
        return "unknown"
    value, low, high = change
    digits = 1 if unit == POINTS else 3
    ends = "no interval" if low is None or high is None else f"{low:+.{digits}f}, {high:+.{digits}f}"
    return f"{value:+.{digits}f} {unit} [{ends}]".replace("-", "\N{MINUS SIGN}")


class _Seen:
    """The scores of all points of a scan on common items."""

    def __init__(
        self,
        spec: ScanSpec,
        tuned: Sequence[EvaluationRecord],
        points: Mapping[float, Sequence[EvaluationRecord]],
    ) -> None:
        self.tolerance = spec.tolerance
        self.factors = tuple(factor for factor in spec.grid if factor in points)
        self.tasks: list[TaskInfo] = []
        self.tuned: list[Scores] = []
        self.points: dict[float, list[Scores]] = {factor: [] for factor in self.factors}
        for place, asked in enumerate(spec.choose_on):
            records = [tuned[place], *(points[factor][place] for factor in self.factors)]
            columns = columns_of(records)
            self.tasks.append(task_info(asked, tuned[place].called, tuned[place], columns))
            self.tuned.append(scores_of([(_SEED, tuned[place])], columns))
            for factor in self.factors:
                self.points[factor].append(scores_of([(_SEED, points[factor][place])], columns))
        self.unit = unit_of(self.tasks[0])

    def best(self) -> Scores:
        """Return the target scores of the best point, the tuned model included; of equal ones the tuned model's."""
        candidates = [self.tuned[0], *(self.points[factor][0] for factor in self.factors)]
        sign = self.tasks[0].sign
        return max(candidates, key=lambda scores: float(np.nan_to_num(sign * scores.means()[0], nan=-np.inf)))

    def target(self, left: Scores, right: Scores) -> Estimate | None:
        """Return left minus right on the target, positive where left is better."""
        found = oriented(self.tasks[0], left, right)
        return None if found is None else estimate(found, self.unit)

    def retention(self, factor: float) -> Estimate | None:
        """Return the mean over the retention tasks that are fractions, against the tuned model, in points."""
        parts: list[Contrast] = []
        for task, left, right in zip(self.tasks[1:], self.points[factor][1:], self.tuned[1:], strict=True):
            if task.is_fraction:
                part = oriented(task, left, right)
                if part is None:
                    return None
                parts.append(part)
        found = mean_of(parts)
        return None if found is None else estimate(found, POINTS)

    def row(self, factor: float, best: Scores, never: str) -> PathRow:
        """Return what is known of a factor; ``never``: why it is out of the question, empty if it is not."""
        if factor not in self.points:
            return PathRow(
                factor=factor,
                target=None,
                target_change=None,
                retention_change=None,
                allowed=False,
                why=never or NO_SCORE,
            )
        mine = self.points[factor][0]
        change, kept = self.target(mine, self.tuned[0]), self.retention(factor)
        why = never or self._worse(change, self.target(mine, best)) or _buys_nothing(kept)
        score = float(mine.means()[0])
        return PathRow(
            factor=factor,
            target=score if np.isfinite(score) else None,
            target_change=_ends(change),
            retention_change=_ends(kept),
            allowed=not why,
            why=why,
        )

    def _worse(self, change: Estimate | None, from_best: Estimate | None) -> str:
        """Say what speaks against the target; empty if nothing does."""
        if change is None:
            return NO_SCORE
        if change.high is None:
            return change.missing
        if change.high < 0:
            return f"below the tuned model on the target: {_told(_ends(change), self.unit)}"
        if change.value < -self.tolerance - _SLACK:
            return (
                f"on the target {_told(_ends(change), self.unit)} against the tuned model: "
                f"more than the margin of {self.tolerance:g} below it"
            )
        if from_best is not None and from_best.high is not None and from_best.high < 0:
            return f"below the best point of the grid on the target: {_told(_ends(from_best), self.unit)}"
        return ""


def _buys_nothing(kept: Estimate | None) -> str:
    """Say that a point keeps no more than the tuned model; empty if it does, or if no retention is known."""
    if kept is None or kept.value > _SLACK:
        return ""
    return f"keeps no more than the tuned model: mean retention {_told(_ends(kept), POINTS)}"


def _ends(found: Estimate | None) -> tuple[float, float | None, float | None] | None:
    return None if found is None else (found.value, found.low, found.high)
