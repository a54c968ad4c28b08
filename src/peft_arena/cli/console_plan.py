"""The plan of a study in a line for each arm: states of its runs, what one of them costs, and the sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.text import few

if TYPE_CHECKING:
    from peft_arena.study.study_cost import ArmEstimate, StudyEstimate
    from peft_arena.work.plan import RunPlan, State

STATES: tuple[State, ...] = ("done", "missing", "running", "failed", "refused")
FEW = 6
"""So many tasks or arms are named in a note."""
PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Part(NamedTuple):
    """An arm on one target: its runs that are not refused, and what one of them costs."""

    runs: int
    missing: int
    """Of these, runs whose work is still to be done."""
    estimate: ArmEstimate


@dataclass(frozen=True)
class PlanRow:
    """One arm, all its targets and seeds together."""

    arm: str
    states: Mapping[State, int]
    """State to number of runs, those that occur."""
    targets: int
    reason: str
    """Of the first run that has one."""
    parts: tuple[Part, ...]
    """Of each target with an estimate."""

    @property
    def timed(self) -> list[Part]:
        """The parts whose hours are known."""
        return [part for part in self.parts if part.estimate.hours is not None]

    @property
    def hours(self) -> float | None:
        """GPU hours of all runs but the refused, done or not; None if none is known."""
        return sum(part.runs * (part.estimate.hours or 0.0) for part in self.timed) if self.timed else None

    def cells(self, many: bool) -> dict[str, Any]:
        """Return the row as it is printed; what differs between targets as the mean over runs, memory as the largest.

        Args:
            many: whether the study has several targets, whose number is then shown.
        """
        row: dict[str, Any] = {"arm": self.arm}
        if many:
            row["targets"] = self.targets or ""
        row["runs"] = ", ".join(f"{count} {state}" for state, count in self.states.items())
        runs = sum(part.runs for part in self.timed)
        trained = max((part.estimate.trained or 0 for part in self.parts), default=0)
        peaks = [part.estimate.peak for part in self.parts if part.estimate.peak is not None]
        row["trained"] = short(trained) if trained else ""
        row["training FLOPs"] = short(self.flops / runs) if trained and runs else ""
        row["peak memory"] = short(max(peaks), "B") if peaks else ""
        row["GPU h each"] = hours(self.hours / runs) if self.hours is not None and runs else ""
        row["GPU h all"] = hours(self.hours) if self.hours is not None else ""
        row["reason"] = self.reason
        return row

    @property
    def flops(self) -> float:
        """Training operations of all runs whose costs are known."""
        return sum(part.runs * part.estimate.training.flops for part in self.timed if part.estimate.training)


def plan_rows(plans: Sequence[RunPlan], estimates: StudyEstimate | None) -> list[PlanRow]:
    """Return a row for every arm, in the order of the plan."""
    known = {} if estimates is None else {(one.label, one.target): one for one in estimates.arms}
    grouped: dict[str, dict[str, list[RunPlan]]] = {}
    for item in plans:
        target = item.run.train.task.id if item.run.train is not None else ""
        grouped.setdefault(item.label, {}).setdefault(target, []).append(item)
    rows = []
    for label, targets in grouped.items():
        items = [item for runs in targets.values() for item in runs]
        counts = Counter(item.state for item in items)
        states = {state: counts[state] for state in STATES if counts[state]}
        reason = next((item.reason for item in items if item.reason), "")
        parts = []
        for target, runs in targets.items():
            found = known.get((label, target))
            wanted = [run for run in runs if run.state != "refused"]
            if found is not None and wanted:
                parts.append(Part(len(wanted), sum(run.state != "done" for run in wanted), found))
        rows.append(PlanRow(label, states, len(targets) - ("" in targets), reason, tuple(parts)))
    return rows


def plan_totals(
    plans: Sequence[RunPlan], estimates: StudyEstimate | None, rows: Sequence[PlanRow]
) -> dict[str, float | int]:
    """Return what all runs cost together, refused ones left out, and how many of them that counts."""
    if estimates is None or estimates.note:
        return {}
    parts = [part for row in rows for part in row.timed]
    return {
        "gpu_hours": sum(row.hours or 0.0 for row in rows),
        "gpu_hours_missing": sum(part.missing * (part.estimate.hours or 0.0) for part in parts),
        "training_flops": sum(row.flops for row in rows),
        "runs": sum(item.state != "refused" for item in plans),
        "runs_estimated": sum(part.runs for part in parts),
    }


def plan_footer(estimates: StudyEstimate | None, totals: Mapping[str, float | int]) -> list[str]:
    """Return the lines below the table: the sum, what it assumes, and what is not in it."""
    if estimates is None:
        return []
    if estimates.note:
        return [estimates.note]
    lines = [
        f"estimated: {hours(totals['gpu_hours'])} GPU hours on {estimates.gpu} for {totals['runs_estimated']} of "
        f"{totals['runs']} runs, {hours(totals['gpu_hours_missing'])} of them still to do; "
        f"{short(totals['training_flops'])} training FLOPs",
        f"assumed: {estimates.utilisation:.0%} of the GPU's peak, one GPU for a run; formulas and checks are in "
        "docs/estimates.md; --gpu NAME takes another, execution.estimate of the study says what is known better",
    ]
    for text, about in estimates.notes.items():
        lines.append(f"  {text}: {few(about, FEW)}")
    return lines


def short(value: float | None, unit: str = "") -> str:
    """Return a number in three digits with a prefix, for example ``7.62 G``; a dash for None."""
    if value is None:
        return "–"
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def hours(value: float) -> str:
    """Return hours as a reader takes them in: none below a thousandth, whole numbers above a hundred."""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
