"""The paths of a target's arms: curves on validation items, the training beside them, and claims on test items.

Curves show what was seen while a point was chosen; no claim rests on them. All are gains and losses against the
pretrained model on the same items. Claims are those of :mod:`peft_arena.analyze.path_claims`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peft_arena.analyze.effects import estimate_summary
from peft_arena.analyze.estimate import Estimate
from peft_arena.analyze.evidence import ArmEvidence, Evidence, Gap, TaskInfo
from peft_arena.analyze.family import Family
from peft_arena.analyze.path_claims import Claim, Walked, claims_of, compare_sides
from peft_arena.analyze.path_reading import Evaluations, RunScan, ScanReader, common_items, path_words
from peft_arena.analyze.paths import Ends, path_ends
from peft_arena.core.errors import UserError
from peft_arena.core.paths import TUNED, ScanSpec
from peft_arena.store.store import Store


@dataclass(frozen=True, eq=False)
class PathPoint:
    """One point on validation items against the pretrained model, over the seeds that have it."""

    at: float
    """Factor of a point of the path, mean step of a save point."""
    gain: Estimate | None
    kept: Estimate | None
    """Mean retention, in points."""

    @property
    def placed(self) -> bool:
        """Whether it has a place on the plane of gain and retention."""
        return self.gain is not None and self.kept is not None


@dataclass(frozen=True, eq=False)
class ArmPath:
    """One arm along one path."""

    label: str
    place: int
    """Among the arms of the target: what it looks like in figures."""
    scan: ScanSpec
    words: str
    """The path in words; unique among those of the arm."""
    runs: tuple[RunScan, ...]
    """One per seed, without their evaluations."""
    points: tuple[PathPoint, ...]
    """Of every factor of the grid that was evaluated."""
    tuned: PathPoint | None
    along: tuple[PathPoint, ...]
    """Save points of the training before the last."""
    claim: Claim
    validation: tuple[TaskInfo, ...]
    """What the points were chosen by, the target first; empty where nothing was evaluated."""

    @property
    def ends(self) -> Ends:
        """What factors 0 and 1 are."""
        return path_ends(self.scan.path)

    @property
    def found(self) -> tuple[RunScan, ...]:
        """Runs that were scanned."""
        return tuple(run for run in self.runs if run.record is not None)

    @property
    def chosen(self) -> dict[float, int]:
        """Every chosen factor with the number of seeds that chose it, ascending."""
        factors = [factor for factor in self.claim.chosen.values() if factor is not None]
        return {factor: factors.count(factor) for factor in sorted(set(factors))}

    @property
    def gained(self) -> bool:
        """Whether the tuned model's interval of the gain on validation items lies above zero."""
        gain = None if self.tuned is None else self.tuned.gain
        return gain is not None and gain.low is not None and gain.low > 0

    @property
    def orthogonality(self) -> float | None:
        """Largest departure of a rotation from orthogonality at any point of any seed; None without rotations."""
        found = [run.record.orthogonality for run in self.found if run.record is not None]
        return max((value for value in found if value is not None), default=None)

    def strengths(self) -> list[tuple[int, float, float]]:
        """Return block, strength in the tuned model and at the chosen point, mean over the seeds that chose one."""
        found: dict[int, list[tuple[float, float]]] = {}
        for run in self.found:
            for one in run.record.strengths if run.record else ():
                found.setdefault(one.block, []).append((one.tuned, one.chosen))
        return [
            (block, float(np.mean([tuned for tuned, _ in pairs])), float(np.mean([chosen for _, chosen in pairs])))
            for block, pairs in sorted(found.items())
        ]


@dataclass(frozen=True, eq=False)
class TargetPaths:
    """Every arm of a target along every path that was scanned."""

    arms: tuple[ArmPath, ...]
    """One per arm and path."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Arms, each once."""
        return tuple(dict.fromkeys(arm.label for arm in self.arms))

    @property
    def words(self) -> tuple[str, ...]:
        """Paths, each once."""
        return tuple(dict.fromkeys(arm.words for arm in self.arms))

    @property
    def overshoots(self) -> tuple[ArmPath, ...]:
        """Confirmed ones: those whose tuned model gained first, then by the change of the retention."""
        found = [arm for arm in self.arms if arm.claim.verdict == "overshoot"]
        return tuple(sorted(found, key=lambda arm: (not arm.gained, -_value(arm.claim.retention.estimate))))

    def of(self, label: str) -> tuple[ArmPath, ...]:
        """Return every path of an arm."""
        return tuple(arm for arm in self.arms if arm.label == label)

    def summary(self) -> list[dict[str, Any]]:
        """Return JSON values: for every arm and path what was chosen, what it is worth, and the curve."""
        return [_arm_summary(arm) for arm in self.arms]


def _value(found: Estimate | None) -> float:
    return 0.0 if found is None else found.value


def read_paths(
    store: Store, evidence: Evidence, arms: Sequence[ArmEvidence], family: Family
) -> tuple[TargetPaths | None, tuple[Gap, ...]]:
    """Read and judge the paths of all arms of one target.

    Args:
        store: where the records are.
        evidence: everything else that is known of the study.
        arms: of one target.
        family: that claims are corrected in.

    Returns:
        None where the study asks for no scan of these arms; and what is missing.

    Raises:
        UserError: the scans of these arms do not all use the same items, or not their target's.
    """
    asked = {arm.arm.label: _asked(evidence, arm) for arm in arms}
    scans = [scan for found in asked.values() for scan in found]
    if not scans:
        return None, ()
    _check_items(evidence, arms[0], scans)
    gaps: list[Gap] = []
    reader = ScanReader(store.run(evidence.view.base), gaps)
    base = reader.of_base((*scans[0].choose_on, *scans[0].claim_on))
    walked = []
    for arm in arms:
        for scan in asked[arm.arm.label]:
            runs = [
                reader.read(store.run(run.spec), run, scan, scan in evidence.view.paths.get(run.spec.run_id, ()))
                for run in arm.runs
            ]
            walked.append(Walked(arm.arm.label, _unique_words(scan, asked[arm.arm.label]), scan, runs))
    claims = claims_of(walked, base, family, evidence.view.margin)
    places = {arm.arm.label: place for place, arm in enumerate(arms)}
    found = [_arm_path(one, places[one.label], base, claim) for one, claim in zip(walked, claims, strict=True)]
    return TargetPaths(tuple(found)), tuple(gaps)


def _asked(evidence: Evidence, arm: ArmEvidence) -> tuple[ScanSpec, ...]:
    """Return every scan that the study asks of some run of an arm, each once."""
    wanted = evidence.view.paths
    return tuple({scan.id: scan for run in arm.runs for scan in wanted.get(run.spec.run_id, ())}.values())


def _unique_words(scan: ScanSpec, all_of_arm: Sequence[ScanSpec]) -> str:
    words = path_words(scan.path)
    alike = [other for other in all_of_arm if path_words(other.path) == words]
    return words if len(alike) == 1 else f"{words} ({scan.id[:4]})"


def _check_items(evidence: Evidence, arm: ArmEvidence, scans: Sequence[ScanSpec]) -> None:
    study = evidence.view.name
    for name in ("choose_on", "claim_on"):
        sets = {tuple(spec.id for spec in getattr(scan, name)) for scan in scans}
        if len(sets) > 1:
            raise UserError(
                f"paths of {study}: {len(sets)} different sets of {name} for the same target; all scans of a target "
                "must use the same items, or their differences cannot be corrected together"
            )
    first, target = scans[0].choose_on[0].task, arm.arm.target.task
    if first != target:
        raise UserError(f"paths of {study}: the first task of a scan is its target, {target.name}, got {first.name}")


def _arm_path(walked: Walked, place: int, base: Evaluations, claim: Claim) -> ArmPath:
    scan = walked.scan
    found = [run for run in walked.runs if run.record is not None]
    everything = [answers for run in found for answers in (run.tuned, *run.points.values())]
    everything += [answers for run in found for _, answers in run.along]
    items = common_items(scan.choose_on, [base, *everything])
    old = items.scores([(None, base)])

    def point(at: float, answered: Sequence[tuple[int | None, Evaluations]]) -> PathPoint:
        one = compare_sides(items, items.scores(answered), old)
        return PathPoint(at, one.on_target(), one.in_retention())

    points = tuple(
        point(factor, answered)
        for factor in scan.grid
        if (answered := [(run.seed, run.points[factor]) for run in found if run.points.get(factor)])
    )
    tuned = point(TUNED, [(run.seed, run.tuned) for run in found]) if found else None
    return ArmPath(
        label=walked.label,
        place=place,
        scan=scan,
        words=walked.words,
        runs=tuple(replace(run, points={}, tuned={}, chosen={}, along=()) for run in walked.runs),
        points=points,
        tuned=tuned,
        along=tuple(point(step, answered) for step, answered in _save_points(found)),
        claim=claim,
        validation=items.tasks,
    )


def _save_points(runs: Sequence[RunScan]) -> list[tuple[float, list[tuple[int | None, Evaluations]]]]:
    """Put the first save points of all seeds together, the second, and so on; the step is the mean over seeds."""
    places: dict[int, list[tuple[int, RunScan, Evaluations]]] = {}
    for run in runs:
        for place, (step, answers) in enumerate(run.along):
            if answers:
                places.setdefault(place, []).append((step, run, answers))
    return [
        (sum(step for step, _, _ in found) / len(found), [(run.seed, answers) for _, run, answers in found])
        for _, found in sorted(places.items())
    ]


def _arm_summary(arm: ArmPath) -> dict[str, Any]:
    claim = arm.claim
    return {
        "arm": arm.label,
        "path": arm.scan.path.model_dump(mode="json"),
        "scan": arm.scan.id,
        "words": arm.words,
        "margin": claim.target.margin,
        "chosen": {str(seed): factor for seed, factor in claim.chosen.items()},
        "reasons": {str(run.seed): run.record.reason if run.record else run.absent for run in arm.runs},
        "verdict": claim.verdict,
        "why_not": claim.why_not or None,
        "missing": claim.missing or None,
        "target": estimate_summary(claim.target.estimate),
        "target_judged": claim.target.summary(),
        "target_at_most_worse": claim.at_most_worse,
        "retention": estimate_summary(claim.retention.estimate),
        "retention_judged": claim.retention.summary(),
        "recovered": claim.recovered,
        "lost": estimate_summary(claim.loss.estimate),
        "tasks": {task.label: estimate_summary(found) for task, found in claim.tasks},
        "orthogonality": arm.orthogonality,
        "expressed": sorted({run.record.expressed for run in arm.found if run.record}),
        "points": [_point(point, "factor") for point in arm.points],
        "tuned": None if arm.tuned is None else _point(arm.tuned, "factor"),
        "along": [_point(point, "step") for point in arm.along],
    }


def _point(point: PathPoint, name: str) -> dict[str, Any]:
    return {name: point.at, "gain": estimate_summary(point.gain), "retention_mean": estimate_summary(point.kept)}
