"""Over the targets of a study: what an arm reaches on average, and what a further target may bring.

An arm is the same label on every target. It has a mean only if it has a value on every target and all of them are
fractions or correlations, both better when higher: a mean over whatever is there changes its meaning with what is
missing. A correlation counts as a share of 1, times 100, as in the means of GLUE and PEFT-Bench.

The score is the plain mean, as benchmarks of many data sets are summed up. Gains are put together as random effects,
and so is mean retention, which is of the same items after every training (:mod:`peft_arena.analyze.random_effects`).
Arms are compared target by target. The rank of an arm is that of its mean drawn effect, and its range holds 95 % of the
joint draws of seeds and items, over these targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from peft_arena.analyze.compare import AXES, Comparison, Rank, both_ways
from peft_arena.analyze.costs import PEAK_MEMORY, TRAINABLE, Cost
from peft_arena.analyze.effects import ArmEffects, TaskEffect, estimate_summary, retention_contrast
from peft_arena.analyze.estimate import LEVEL, Estimate
from peft_arena.analyze.evidence import Evidence, TaskInfo
from peft_arena.analyze.family import Family, Judgement
from peft_arena.analyze.pscp import FLOPS
from peft_arena.analyze.random_effects import FEWEST, OverEffects, over_independent, over_shared_items
from peft_arena.analyze.resamples import Resamples
from peft_arena.core.measure import POINTS
from peft_arena.core.text import few
from peft_arena.cost.pscp import PscpChoice
from peft_arena.cost.pscp_band import Band, PscpBands, PscpInputs, pscp_bands

CORRELATION = "correlation"
"""Unit of tasks whose headline is a correlation."""


class TargetEffects(NamedTuple):
    """What is needed of one target."""

    label: str
    task: TaskInfo | None
    arms: Sequence[ArmEffects]
    comparisons: Sequence[Comparison]
    costs: Mapping[str, Mapping[str, Cost]]
    """Arm label to metric to cost."""


@dataclass(frozen=True, eq=False)
class ArmOverTargets:
    """One arm over all targets."""

    label: str
    score: float | None
    """Mean of the tuned scores, per cent."""
    gain: OverEffects | None
    """Gain, points."""
    retention: OverEffects | None
    """Mean retention, points."""
    judged: Judgement
    """Mean retention against the pretrained model."""
    rank: Rank | None
    """Of the gain, over these targets; None without draws of all arms."""
    costs: Mapping[str, float | None]
    """Mean over targets of trained parameters, both forward FLOPs and peak training memory, by their measure."""
    missing: str
    """Why there is no mean gain; empty where there is one."""
    band: Band | None = None
    """PSCP of the mean score at the mean costs; None where the study does not ask for it or an input is missing."""


@dataclass(frozen=True, eq=False)
class OverTargets:
    """All arms over all targets."""

    targets: tuple[str, ...]
    base: float | None
    """Mean of the pretrained model's scores, per cent."""
    arms: tuple[ArmOverTargets, ...]
    comparisons: tuple[Comparison, ...]
    """Of every two arms that have means, over all targets."""
    choice: PscpChoice | None
    bands: PscpBands | None

    def summary(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "targets": list(self.targets),
            "base": self.base,
            "arms": [
                {
                    "label": arm.label,
                    "score": arm.score,
                    "gain": _effects_summary(arm.gain),
                    "gain_rank": None if arm.rank is None else {"first": arm.rank.first, "last": arm.rank.last},
                    "retention_mean": {**(_effects_summary(arm.retention) or {}), **arm.judged.summary()},
                    "costs": dict(arm.costs),
                    "missing": arm.missing or None,
                    "pscp": None if arm.band is None else arm.band._asdict(),
                }
                for arm in self.arms
            ],
            "comparisons": [
                {
                    "left": pair.left,
                    "right": pair.right,
                    **{
                        axis: {"difference": estimate_summary(pair.on(axis).estimate), **pair.on(axis).summary()}
                        for axis in AXES
                    },
                }
                for pair in self.comparisons
            ],
        }


def _effects_summary(found: OverEffects | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        **(estimate_summary(found.estimate) or {}),
        "tau": found.tau,
        "further_target": None if found.prediction is None else list(found.prediction),
        "shrunk": list(found.shrunk),
    }


def over_targets(
    evidence: Evidence, targets: Sequence[TargetEffects], family: Family, resamples: Resamples
) -> OverTargets | None:
    """Return what is said over targets; None for a study of one target.

    Args:
        evidence: of the study.
        targets: all of the study.
        family: that comparisons over targets are corrected in.
        resamples: where joint draws come from.
    """
    if len(targets) < FEWEST:
        return None
    choice = evidence.view.pscp
    labels = list(dict.fromkeys(arm.label for target in targets for arm in target.arms))
    by_label = [{arm.label: arm for arm in target.arms} for target in targets]
    found = {label: [one.get(label) for one in by_label] for label in labels}
    places = _ranks({label: arms for label, arms in found.items() if not _why_no_mean(targets, arms)}, resamples)
    arms = [_arm(label, targets, arms, evidence, family, places.get(label)) for label, arms in found.items()]
    whole = [arm.label for arm in arms if not arm.missing]
    comparisons = tuple(_pair(left, right, found, targets, evidence, family) for left, right in combinations(whole, 2))
    bands = None
    if choice is not None:
        names = (TRAINABLE, FLOPS[choice.operations], PEAK_MEMORY)
        known = [one for arm in arms if (one := _inputs(arm, names)) is not None]
        bands = pscp_bands(known, choice.constants)
        rows = {band.label: band for band in bands.rows}
        arms = [replace(arm, band=rows.get(arm.label)) for arm in arms]
    bases = [_base(target) for target in targets]
    base = None if None in bases else fmean(value for value in bases if value is not None)
    return OverTargets(tuple(target.label for target in targets), base, tuple(arms), comparisons, choice, bands)


def _why_no_mean(targets: Sequence[TargetEffects], found: Sequence[ArmEffects | None]) -> str:
    """Say why an arm has no mean gain; empty if it has one."""
    gains = [None if arm is None else arm.gain for arm in found]
    without = [
        target.label
        for target, gain in zip(targets, gains, strict=True)
        if gain is None or gain.delta is None or gain.tuned is None
    ]
    if without:
        return f"nothing on {few(without)}"
    odd = [target.label for target in targets if target.task is not None and not _averaged(target.task)]
    return f"no fraction or correlation that is better when higher: {few(odd)}" if odd else ""


def _arm(
    label: str,
    targets: Sequence[TargetEffects],
    found: Sequence[ArmEffects | None],
    evidence: Evidence,
    family: Family,
    rank: Rank | None,
) -> ArmOverTargets:
    missing = _why_no_mean(targets, found)
    arms = [arm for arm in found if arm is not None]
    gains = [arm.gain for arm in arms if arm.gain is not None]
    costs = [target.costs.get(label, {}) for target in targets]
    gain = None if missing else over_independent([one for effect in gains if (one := _in_points(effect)) is not None])
    kept = [(arm.mean, arm.mean_contrast) for arm in arms if arm.mean is not None and arm.mean_contrast is not None]
    retention = None
    if len(kept) == len(targets):
        retention = over_shared_items([one for one, _ in kept], [contrast for _, contrast in kept])
    return ArmOverTargets(
        label=label,
        score=None if missing else 100.0 * fmean(effect.tuned for effect in gains if effect.tuned is not None),
        gain=gain,
        retention=retention,
        judged=family.ask(
            None if retention is None else retention.estimate,
            margin=evidence.view.margin.retention,
            against_base=True,
        ),
        rank=rank,
        costs={
            name: _mean_cost([one.get(name) for one in costs]) for name in (TRAINABLE, *FLOPS.values(), PEAK_MEMORY)
        },
        missing=missing,
    )


def _pair(
    left: str,
    right: str,
    found: Mapping[str, Sequence[ArmEffects | None]],
    targets: Sequence[TargetEffects],
    evidence: Evidence,
    family: Family,
) -> Comparison:
    """Compare two arms over all targets: their difference on each, put together."""
    pairs = [both_ways(target.comparisons)[left, right] for target in targets]
    gains = [
        one
        for pair, target in zip(pairs, targets, strict=True)
        if pair.gain.estimate is not None and (one := _points_of(pair.gain.estimate, target.task)) is not None
    ]
    gain = over_independent(gains) if len(gains) == len(targets) else None
    kept = []
    for pair, arm, other in zip(pairs, found[left], found[right], strict=True):
        if pair.retention.estimate is not None and arm is not None and other is not None:
            contrast = retention_contrast(evidence, arm.evidence, other.evidence)
            kept += [] if contrast is None else [(pair.retention.estimate, contrast)]
    retention = None
    if len(kept) == len(targets):
        retention = over_shared_items([one for one, _ in kept], [contrast for _, contrast in kept])
    margin = evidence.view.margin
    return Comparison(
        left,
        right,
        family.ask(None if gain is None else gain.estimate, margin=margin.on_target(POINTS)),
        family.ask(None if retention is None else retention.estimate, margin=margin.retention),
    )


def _ranks(found: Mapping[str, Sequence[ArmEffects | None]], resamples: Resamples) -> dict[str, Rank]:
    """Return the places that arms take in 95 % of the joint draws of seeds and items, by their mean gain."""
    drawn = {}
    for label, arms in found.items():
        each = [
            resamples.of(arm.gain.contrast, arm.gain.delta.stderr) * (1.0 if arm.gain.task.is_fraction else 100.0)
            for arm in arms
            if arm is not None and arm.gain is not None and arm.gain.contrast is not None
            if arm.gain.delta is not None and arm.gain.delta.stderr is not None
        ]
        if len(each) < len(arms):
            return {}
        drawn[label] = np.mean(each, axis=0)
    if not drawn:
        return {}
    values = np.stack(list(drawn.values()), axis=-1)
    places = 1 + (values[:, None, :] > values[:, :, None]).sum(axis=-1)
    tail = (1 - LEVEL) / 2
    ends = np.quantile(places, [tail, 1 - tail], axis=0, method="nearest")
    return {label: Rank(int(low), int(high)) for label, low, high in zip(drawn, *ends, strict=True)}


def _averaged(task: TaskInfo) -> bool:
    return task.better == "higher" and (task.is_fraction or task.unit == CORRELATION)


def _in_points(gain: TaskEffect) -> Estimate | None:
    """Return a gain in points; one in correlation times 100."""
    return None if gain.delta is None else _points_of(gain.delta, gain.task)


def _points_of(found: Estimate, task: TaskInfo | None) -> Estimate:
    return found.times(100.0, POINTS) if task is not None and task.unit == CORRELATION else found


def _base(target: TargetEffects) -> float | None:
    gains = [arm.gain for arm in target.arms if arm.gain is not None and _averaged(arm.gain.task)]
    known = [gain.base for gain in gains if gain.base is not None]
    return 100.0 * known[0] if known else None


def _mean_cost(costs: Sequence[Cost | None]) -> float | None:
    values = [cost.value for cost in costs if cost is not None and cost.value is not None]
    return fmean(values) if values and len(values) == len(costs) else None


def _inputs(arm: ArmOverTargets, names: Sequence[str]) -> PscpInputs | None:
    values = [value for name in names if (value := arm.costs[name]) is not None and value >= 0]
    if arm.score is None or arm.score < 0 or len(values) < len(names):
        return None
    return PscpInputs(arm.label, arm.score, *values)
