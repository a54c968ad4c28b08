"""What a chosen point is worth, judged on test items that had no part in choosing it.

For every arm and path, the chosen point of each seed is compared with the same seed's tuned model on the same items,
and the differences are put together over seeds and items as everywhere. All claims are questions to the family of the
study (:mod:`peft_arena.analyze.family`). The final checkpoint *overshot* its target if the chosen point is *better* on
mean retention and *no worse* on the target, both by corrected tests: a small loss of the target that few items cannot
see is not taken for none, and one that is shown to be within the margin is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from peft_arena.analyze.effects import oriented, unit_of
from peft_arena.analyze.estimate import Estimate, estimate
from peft_arena.analyze.evidence import TaskInfo
from peft_arena.analyze.family import Family, Judgement
from peft_arena.analyze.paired import Contrast, Scores, mean_of
from peft_arena.analyze.path_reading import Evaluations, Items, RunScan, common_items
from peft_arena.analyze.seed_spread import Pooled, SeedSpread, pooled
from peft_arena.analyze.view import Margin
from peft_arena.core.measure import POINTS
from peft_arena.core.paths import ScanSpec
from peft_arena.tasks.registry import display_name

Verdict = Literal["overshoot", "target worse", "retention worse", "undecided", "no point chosen", "unknown"]


@dataclass(frozen=True, eq=False)
class Difference:
    """One side minus another, paired by seed and item, positive where the first is better."""

    items: Items
    target: Contrast | None = None
    retention: Contrast | None = None
    """Mean over the retention tasks that are fractions, in points."""
    tasks: tuple[tuple[TaskInfo, Estimate], ...] = ()
    """Every task that could be compared, the target first."""

    def on_target(self, spread: Sequence[SeedSpread] = ()) -> Estimate | None:
        """Return the estimate on the target, with a spread between trainings that is known from elsewhere."""
        task = self.items.target
        return None if task is None or self.target is None else estimate(self.target, unit_of(task), spread=spread)

    def in_retention(self, spread: Sequence[SeedSpread] = ()) -> Estimate | None:
        """Return the estimate of mean retention, in points."""
        return None if self.retention is None else estimate(self.retention, POINTS, spread=spread)


def compare_sides(
    items: Items, left: Mapping[str, Scores], right: Mapping[str, Scores], *, each: bool = False
) -> Difference:
    """Compare two sides on every task.

    Args:
        items: the tasks.
        left: scores by evaluation id.
        right: scores of the other side, or of the pretrained model.
        each: whether to estimate the difference on every single task as well.
    """
    target, averaged = items.target, () if items.why_no_mean else items.fractions
    wanted = items.tasks if each else (*items.tasks[:1], *averaged)
    contrasts = {task.key: _contrast(task, left, right) for task in wanted}
    singles = tuple(
        (task, estimate(found, unit_of(task)))
        for task in (items.tasks if each else ())
        if (found := contrasts[task.key]) is not None
    )
    return Difference(
        items=items,
        target=None if target is None else contrasts[target.key],
        retention=_mean(averaged, [contrasts[task.key] for task in averaged], left, right),
        tasks=singles,
    )


def _contrast(task: TaskInfo, left: Mapping[str, Scores], right: Mapping[str, Scores]) -> Contrast | None:
    key = task.key
    return oriented(task, left[key], right[key]) if key in left and key in right else None


def _mean(
    tasks: Sequence[TaskInfo],
    parts: Sequence[Contrast | None],
    left: Mapping[str, Scores],
    right: Mapping[str, Scores],
) -> Contrast | None:
    """Return the mean of the contrasts on some tasks, from the seeds that have all of them on both sides."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    if len({part.seeds for part in known}) == 1:
        return mean_of(known)
    seeds = [seed for seed in known[0].seeds if seed is not None and all(seed in part.seeds for part in known)]
    again = [oriented(task, _only(left[task.key], seeds), _only(right[task.key], seeds)) for task in tasks if seeds]
    return mean_of([part for part in again if part is not None]) if again and None not in again else None


def _only(scores: Scores, seeds: Sequence[int]) -> Scores:
    return scores if scores.seeds == (None,) or list(scores.seeds) == list(seeds) else scores.take(seeds)


@dataclass(frozen=True, eq=False)
class Claim:
    """Chosen points minus tuned models of one arm along one path, on test items."""

    target: Judgement
    """The chosen points on the target."""
    retention: Judgement
    """The chosen points on mean retention."""
    loss: Judgement
    """Mean retention of the tuned models minus the pretrained one's on the same items."""
    chosen: Mapping[int, float | None] = field(default_factory=dict)
    """Seed to the chosen factor; None: the seed keeps its tuned model, so its difference is zero."""
    tasks: tuple[tuple[TaskInfo, Estimate], ...] = ()
    """Every task that could be compared, the target first."""
    missing: str = ""
    """Why nothing can be claimed; empty if something can."""

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
            return "no point chosen"
        if self.missing or self.target.word == "not comparable":
            return "unknown"
        if self.target.has("worse") and not self.target.has("no worse"):
            return "target worse"
        if self.retention.word == "not comparable":
            return "unknown"
        if self.retention.has("worse"):
            return "retention worse"
        return "undecided" if self.why_not else "overshoot"

    @property
    def why_not(self) -> str:
        """Say what an overshoot lacks where both differences are known; empty if nothing."""
        if "not comparable" in (self.target.word, self.retention.word):
            return ""
        reasons = [] if self.retention.has("better") else [f"retention {self.retention.word}"]
        if not self.target.has("no worse"):
            margin = self.target.margin
            allowed = "no margin for its unit" if margin is None else f"not shown no worse within {margin:g}"
            reasons.append(f"target {'worse' if self.target.has('worse') else allowed}")
        return ", ".join(reasons)

    @property
    def at_most_worse(self) -> float | None:
        """By how much the target is worse at most: minus the lower end of the interval beside its word, at least 0."""
        found = self.target.interval
        return None if found is None else max(0.0, -found[0])

    @property
    def recovered(self) -> float | None:
        """Share of the lost mean retention that the chosen point has again; None where no loss is shown.

        (chosen - tuned) / (pretrained - tuned); above 1 where it keeps more than the pretrained model.
        """
        kept, loss = self.retention.estimate, self.loss.estimate
        return None if kept is None or loss is None or not self.loss.has("worse") else kept.value / -loss.value


@dataclass(frozen=True, eq=False)
class Walked:
    """The runs of one arm along one path."""

    label: str
    words: str
    """The path in words: arms with the same are walked alike."""
    scan: ScanSpec
    runs: Sequence[RunScan]
    """One per seed."""


class _Found(NamedTuple):
    chosen: dict[int, float | None]
    missing: str
    change: Difference | None
    """Chosen points minus tuned models; None where nothing was chosen or something is missing."""
    loss: Difference | None
    """Tuned models minus the pretrained one."""

    @property
    def is_mixed(self) -> bool:
        """Whether some seeds keep their tuned model, whose change is none: how far they lie apart is their own."""
        return None in self.chosen.values()


def claims_of(walked: Sequence[Walked], base: Evaluations, family: Family, margin: Margin) -> list[Claim]:
    """Judge the chosen points of all arms of a target on test items.

    How far seeds lie apart is pooled over the arms that were walked alike, as everywhere.

    Args:
        walked: every arm along every path.
        base: evaluations of the pretrained model.
        family: that claims are corrected in.
        margin: of the study.
    """
    found = [_compare(one, base) for one in walked]
    claims = []
    for one, got in zip(walked, found, strict=True):
        alike = {other.label: had for other, had in zip(walked, found, strict=True) if other.words == one.words}
        changes = {label: had.change for label, had in alike.items() if had.change is not None and not had.is_mixed}
        on_target = _spread({label: change.target for label, change in changes.items()})
        kept = _spread({label: change.retention for label, change in changes.items()})
        lost = _spread({label: had.loss.retention for label, had in alike.items() if had.loss is not None})
        change = got.change
        target = None if change is None else change.on_target(() if got.is_mixed else on_target.of_run(one.label))
        retention = None if change is None else change.in_retention(() if got.is_mixed else kept.of_run(one.label))
        loss = None if got.loss is None else got.loss.in_retention(lost.of_run(one.label))
        claims.append(
            Claim(
                target=family.ask(target, margin=None if target is None else margin.on_target(target.unit)),
                retention=family.ask(retention, margin=margin.retention),
                loss=family.ask(loss, margin=margin.retention, against_base=True),
                chosen=got.chosen,
                tasks=() if change is None else change.tasks,
                missing=got.missing,
            )
        )
    return claims


def _spread(contrasts: Mapping[str, Contrast | None]) -> Pooled:
    """Return how far seeds lie apart in one quantity, by all arms that have it."""
    return pooled({label: found.by_seed() for label, found in contrasts.items() if found is not None})


def _compare(walked: Walked, base: Evaluations) -> _Found:
    """Compare chosen points with tuned models, and these with the pretrained one."""
    trained = [run for run in walked.runs if run.trained]
    chosen = {run.seed: run.record.chosen for run in trained if run.record is not None}
    missing = _lacking(walked.scan, trained)
    if missing:
        return _Found(chosen, missing, None, None)
    everything = [base, *(run.tuned for run in trained), *(run.chosen for run in trained)]
    items = common_items(walked.scan.claim_on, everything)
    before = items.scores([(run.seed, run.tuned) for run in trained])
    after = items.scores([(run.seed, run.chosen) for run in trained])
    loss = compare_sides(items, before, items.scores([(None, base)]))
    if all(factor is None for factor in chosen.values()):
        return _Found(chosen, "", None, loss)
    change = compare_sides(items, after, before, each=True)
    if change.target is None:
        missing = "no test item of the target was scored on both sides"
    elif change.retention is None:
        missing = items.why_no_mean or "no test item of some retention task was scored on both sides"
    return _Found(chosen, missing, change, loss)


def _lacking(scan: ScanSpec, trained: Sequence[RunScan]) -> str:
    """Say which records a claim needs and does not have; empty if it has all."""
    unread = [f"seed {run.seed}: {run.absent}" for run in trained if run.record is None]
    if unread or not trained:
        return "; ".join(unread) or "no run is trained"
    for run in trained:
        absent = [
            display_name(spec.task) for spec in scan.claim_on if spec.id not in run.tuned or spec.id not in run.chosen
        ]
        if absent:
            return f"seed {run.seed}: no evaluation on test items of {', '.join(absent)}"
    return ""
