"""What a chosen point is worth, judged on test items that had no part in choosing it.

For every arm and path, the chosen point of each seed is compared with the same seed's tuned model on the same items,
and the differences are put together over seeds and items as everywhere (:mod:`peft_arena.analyze.paired`). The p-values
of all claims of a target are Holm-corrected together, those of the target and those of the retention each for
themselves. The final checkpoint overshot its target if the chosen point keeps significantly more after correction,
and its target is not worse in two senses: the interval of the difference does not lie below zero (the uncorrected one,
as correcting it would make it harder to see that the target is worse), and the difference itself is not below minus the
scan's tolerance, since few items make wide intervals. Neither proves an equal target: the lower end of the interval
says by how much it may be worse at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from peft_arena.analyze.compare import ALPHA, holm
from peft_arena.analyze.effects import POINTS, oriented, unit_of
from peft_arena.analyze.evidence import TaskInfo
from peft_arena.analyze.paired import LEVEL, Contrast, Estimate, Resamples, Scores, estimate, mean_of
from peft_arena.analyze.path_reading import Evaluations, Items, RunScan, common_items
from peft_arena.core.paths import ScanSpec

Verdict = Literal["overshoot", "target worse", "no overshoot shown", "unknown"]


@dataclass(frozen=True, eq=False)
class Difference:
    """One side minus another, paired by seed and item, positive where the first is better."""

    target: Estimate | None
    retention: Estimate | None
    """Mean over the retention tasks that are fractions, in points."""
    tasks: tuple[tuple[TaskInfo, Estimate], ...] = ()
    """Every task that could be compared, the target first."""


def compare_sides(
    items: Items, left: Mapping[str, Scores], right: Mapping[str, Scores], resamples: Resamples, *, each: bool = False
) -> Difference:
    """Compare two sides on every task.

    Args:
        items: the tasks.
        left: scores by evaluation id.
        right: scores of the other side, or of the pretrained model.
        resamples: where the draws come from.
        each: whether to estimate the difference on every single task as well.
    """
    target, averaged = items.target, () if items.why_no_mean else items.fractions
    wanted = items.tasks if each else (*items.tasks[:1], *averaged)
    contrasts = {task.spec.id: _contrast(task, left, right, resamples) for task in wanted}
    first = None if target is None else contrasts[target.spec.id]
    parts = [contrasts[task.spec.id] for task in averaged]
    mean = _mean(averaged, parts, left, right, resamples)
    singles = tuple(
        (task, estimate(found, resamples, unit_of(task)))
        for task in (items.tasks if each else ())
        if (found := contrasts[task.spec.id]) is not None
    )
    return Difference(
        None if first is None or target is None else estimate(first, resamples, unit_of(target)),
        None if mean is None else estimate(mean, resamples, POINTS),
        singles,
    )


def _contrast(
    task: TaskInfo, left: Mapping[str, Scores], right: Mapping[str, Scores], resamples: Resamples
) -> Contrast | None:
    key = task.spec.id
    return oriented(task, left[key], right[key], resamples) if key in left and key in right else None


def _mean(
    tasks: Sequence[TaskInfo],
    parts: Sequence[Contrast | None],
    left: Mapping[str, Scores],
    right: Mapping[str, Scores],
    resamples: Resamples,
) -> Contrast | None:
    """Return the mean of the contrasts on some tasks, from the seeds that have all of them on both sides."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    if len({part.seeds for part in known}) == 1:
        return mean_of(known)
    seeds = [seed for seed in known[0].seeds if seed is not None and all(seed in part.seeds for part in known)]
    again = [
        oriented(task, _only(left[task.spec.id], seeds), _only(right[task.spec.id], seeds), resamples)
        for task in tasks
        if seeds
    ]
    return mean_of([part for part in again if part is not None]) if again and None not in again else None


def _only(scores: Scores, seeds: Sequence[int]) -> Scores:
    return scores if scores.seeds == (None,) or list(scores.seeds) == list(seeds) else scores.take(seeds)


@dataclass(frozen=True, eq=False)
class Claim:
    """Chosen points minus tuned models of one arm along one path, on test items."""

    chosen: Mapping[int, float | None] = field(default_factory=dict)
    """Seed to the chosen factor; None: the seed keeps its tuned model, so its difference is zero."""
    difference: Difference = Difference(None, None)
    loss: Estimate | None = None
    """Mean retention of the tuned model minus the pretrained one's on the same items, in points."""
    missing: str = ""
    """Why nothing can be claimed; empty if something can."""
    tolerance: float = 0.0
    """Most that the target may lie below the tuned model's; that of the scan."""
    target_p: float | None = None
    """Holm-corrected over all claims of the target."""
    retention_p: float | None = None
    """Holm-corrected over all claims of the target."""

    @property
    def kept_tuned(self) -> tuple[int, ...]:
        """Seeds of which no point was chosen."""
        return tuple(seed for seed, factor in self.chosen.items() if factor is None)

    @property
    def none_chosen(self) -> bool:
        """Whether no seed has a chosen point, so that there is nothing to judge."""
        return bool(self.chosen) and len(self.kept_tuned) == len(self.chosen)

    @property
    def verdict(self) -> Verdict:
        """What the test items say; see the module's text."""
        if self.none_chosen and not self.missing:
            return "no overshoot shown"
        target, kept = self.difference.target, self.difference.retention
        if self.missing or target is None or target.high is None:
            return "unknown"
        if target.high < 0:
            return "target worse"
        if kept is None or self.retention_p is None:
            return "unknown"
        return "no overshoot shown" if self.why_not else "overshoot"

    @property
    def why_not(self) -> str:
        """Say what an overshoot lacks where both differences are known; empty if nothing."""
        target, kept = self.difference.target, self.difference.retention
        if target is None or kept is None or self.retention_p is None:
            return ""
        reasons = []
        if self.retention_p >= ALPHA or kept.value <= 0:
            reasons.append("retention not significantly better")
        if target.high is not None and target.high < 0:
            reasons.append("target significantly worse")
        elif target.value < -self.tolerance:
            reasons.append(f"target lower by more than the tolerance of {self.tolerance:g}")
        return ", ".join(reasons)

    @property
    def at_most_worse(self) -> float | None:
        """By how much the target is worse at most: minus the lower end of its interval, at least 0.

        Where all items agree the interval has no width, which is no proof: for fractions the bound is then the share
        of items that could differ with all of n agreeing, 1 - 0.025^(1/n) (the exact binomial bound, Clopper and
        Pearson, 1934), in points; for other units there is none.
        """
        target = self.difference.target
        if target is None or target.low is None or target.high is None:
            return None
        if target.high > target.low:
            return max(0.0, -target.low)
        exact = 100.0 * (1.0 - ((1.0 - LEVEL) / 2) ** (1.0 / target.items))
        return max(exact, -target.low) if target.unit == POINTS else None

    @property
    def recovered(self) -> float | None:
        """Share of the lost mean retention that the chosen point has again; None where no loss is significant.

        (chosen - tuned) / (pretrained - tuned); above 1 where it keeps more than the pretrained model.
        """
        kept, loss = self.difference.retention, self.loss
        if kept is None or loss is None or loss.high is None or loss.high >= 0 or loss.p is None or loss.p >= ALPHA:
            return None
        return kept.value / -loss.value


def claim_of(scan: ScanSpec, runs: Sequence[RunScan], base: Evaluations, resamples: Resamples) -> Claim:
    """Judge the chosen points of an arm on test items; p-values are not corrected yet.

    Args:
        scan: of the path.
        runs: of the arm, one per seed.
        base: evaluations of the pretrained model.
        resamples: where the draws come from.
    """
    trained = [run for run in runs if run.trained]
    chosen = {run.seed: run.record.chosen for run in trained if run.record is not None}
    lacking = [f"seed {run.seed}: {run.absent}" for run in trained if run.record is None]
    if lacking or not trained:
        return Claim(chosen, tolerance=scan.tolerance, missing="; ".join(lacking) or "no run is trained")
    for run in trained:
        absent = [spec.task.name for spec in scan.claim_on if spec.id not in run.tuned or spec.id not in run.chosen]
        if absent:
            return Claim(
                chosen,
                tolerance=scan.tolerance,
                missing=f"seed {run.seed}: no evaluation on test items of {', '.join(absent)}",
            )
    items = common_items(scan.claim_on, [base, *(run.tuned for run in trained), *(run.chosen for run in trained)])
    before = items.scores([(run.seed, run.tuned) for run in trained])
    after = items.scores([(run.seed, run.chosen) for run in trained])
    found = compare_sides(items, after, before, resamples, each=True)
    loss = compare_sides(items, before, items.scores([(None, base)]), resamples).retention
    claim = Claim(chosen, found, loss, tolerance=scan.tolerance)
    if claim.none_chosen:
        return replace(claim, difference=Difference(None, None))
    missing = "" if found.target is not None else "no test item of the target was scored on both sides"
    if not missing and found.retention is None:
        missing = items.why_no_mean or "no test item of some retention task was scored on both sides"
    return replace(claim, missing=missing)


def corrected(claims: Sequence[Claim]) -> list[Claim]:
    """Return claims with their p-values Holm-corrected together; those without a p-value are not counted."""
    targets = holm([None if claim.difference.target is None else claim.difference.target.p for claim in claims])
    kept = holm([None if claim.difference.retention is None else claim.difference.retention.p for claim in claims])
    return [
        replace(claim, target_p=target, retention_p=retention)
        for claim, target, retention in zip(claims, targets, kept, strict=True)
    ]


def without_draws(found: Estimate | None) -> Estimate | None:
    """Return an estimate without the draws, which nothing needs that only shows it."""
    return None if found is None else replace(found, draws=np.empty(0))
