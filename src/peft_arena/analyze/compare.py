"""Arm against arm on the same target: who is better at what, and which trade is the better one.

Every pair is compared twice, on the gain and on the mean retention, and every arm with the pretrained model. All of
them are questions to one family (:mod:`peft_arena.analyze.family`), which gives the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

from peft_arena.analyze.effects import ArmEffects, Spreads, oriented, retention_contrast, unit_of
from peft_arena.analyze.estimate import Estimate, estimate
from peft_arena.analyze.evidence import Evidence
from peft_arena.analyze.family import Family, Judgement, judge_alone

Axis = Literal["gain", "retention"]
AXES: tuple[Axis, ...] = ("gain", "retention")
ROUNDING = 1e-9
"""Relative difference of two values that are the same but for rounding."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two arms of one target, left minus right."""

    left: str
    right: str
    gain: Judgement
    retention: Judgement

    def on(self, axis: Axis) -> Judgement:
        """Return the pair on one axis."""
        return self.gain if axis == "gain" else self.retention

    def turned(self) -> Comparison:
        """Return the comparison with the sides swapped."""
        return Comparison(self.right, self.left, self.gain.turned(), self.retention.turned())


class AgainstBase(NamedTuple):
    """One arm against the pretrained model."""

    gain: Judgement
    retention: Judgement
    """Of the mean; *no worse* is what "retained" means."""

    def on(self, axis: Axis) -> Judgement:
        """Return the arm on one axis."""
        return self.gain if axis == "gain" else self.retention


class Rank(NamedTuple):
    """The places an arm may hold: ``first`` - 1 arms are better, and all after ``last`` worse."""

    first: int
    last: int

    def __str__(self) -> str:
        """Render as ``2`` or ``1–3``."""
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"


class Standing(NamedTuple):
    """The arms of a target sorted by what is said of them against the highest; each list in the order of the study."""

    highest: list[str]
    """Those with exactly the highest estimate."""
    best: list[str]
    """Those that are not worse than any of the highest, the highest among them."""
    worse: list[str]
    """Those that are."""
    unclear: list[str]
    """Cannot be placed: no common seed, answer or interval with one of the highest."""
    alike: bool
    """Whether none of the best is better than another of them."""


@dataclass(frozen=True, eq=False)
class TradeOff:
    """``keeps`` forgets less than ``forgets`` (*better* on mean retention) and is *no worse* in gain."""

    keeps: str
    forgets: str
    retention: Judgement
    """Mean retention of ``keeps`` minus that of ``forgets``, in points."""
    gain: Judgement


def compare_arms(
    evidence: Evidence, arms: Sequence[ArmEffects], spreads: Spreads, family: Family
) -> tuple[Comparison, ...]:
    """Compare every pair of arms of one target, matched by seed and item.

    Args:
        evidence: of the study.
        arms: of one target.
        spreads: of the same arms.
        family: that the comparisons are corrected in.
    """
    view = evidence.view
    steps = {frozenset(pair): step for step, pair in reversed(list(enumerate(view.primary)))}
    found = []
    for left, right in combinations(arms, 2):
        step = steps.get(frozenset((left.label, right.label)))
        gain = _gain(evidence, left, right, spreads)
        retention = _retention(evidence, left, right, spreads)
        margin = None if gain is None else view.margin.on_target(gain.unit)
        found.append(
            Comparison(
                left.label,
                right.label,
                family.ask(gain, margin=margin, step=step),
                family.ask(retention, margin=view.margin.retention, step=step),
            )
        )
    return tuple(found)


def compare_with_base(evidence: Evidence, arms: Sequence[ArmEffects], family: Family) -> dict[str, AgainstBase]:
    """Compare every arm of one target with the pretrained model."""
    margin = evidence.view.margin
    found = {}
    for arm in arms:
        gain = arm.gain.delta if arm.gain is not None else None
        on_target = None if gain is None else margin.on_target(gain.unit)
        found[arm.label] = AgainstBase(
            family.ask(gain, margin=on_target, against_base=True),
            family.ask(arm.mean, margin=margin.retention, against_base=True),
        )
    return found


def compare_tasks(arms: Sequence[ArmEffects]) -> dict[tuple[str, str], Judgement]:
    """Compare every arm with the pretrained model on every single retention task, a family of their own.

    Returns:
        Label and evaluation id to what is said; nothing is said of these in sentences.
    """
    cells = {(arm.label, one.task.key): one.delta for arm in arms for one in arm.retention}
    return dict(zip(cells, judge_alone(list(cells.values())), strict=True))


def _gain(evidence: Evidence, left: ArmEffects, right: ArmEffects, spreads: Spreads) -> Estimate | None:
    key = left.evidence.arm.target.id
    task, one, other = evidence.tasks.get(key), left.evidence.scores.get(key), right.evidence.scores.get(key)
    if task is None or one is None or other is None:
        return None
    found = oriented(task, one, other)
    if found is None:
        return None
    spread = spreads.of_task(task).of_difference(left.label, right.label)
    declared = spreads.declared("gain", unit_of(task), 2)
    return estimate(found, unit_of(task), spread=spread, declared=declared)


def _retention(evidence: Evidence, left: ArmEffects, right: ArmEffects, spreads: Spreads) -> Estimate | None:
    if left.mean is None or right.mean is None:
        return None
    found = retention_contrast(evidence, left.evidence, right.evidence)
    if found is None:
        return None
    spread = spreads.of_retention().of_difference(left.label, right.label)
    declared = spreads.declared("retention", left.mean.unit, 2)
    return estimate(found, left.mean.unit, spread=spread, declared=declared)


def both_ways(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], Comparison]:
    """Return every comparison by (left, right), in both directions."""
    return {(one.left, one.right): one for given in comparisons for one in (given, given.turned())}


def ranks(labels: Sequence[str], comparisons: Sequence[Comparison], axis: Axis) -> dict[str, Rank]:
    """Return the places each arm may hold on one axis; arms that cannot be compared with any other have none."""
    better: dict[str, list[int]] = {label: [] for label in labels}
    for comparison in comparisons:
        judged = comparison.on(axis)
        if judged.word != "not comparable":
            sign = judged.has("better") - judged.has("worse")
            better[comparison.left].append(sign)
            better[comparison.right].append(-sign)
    ranked = {label: found for label, found in better.items() if found}
    return {label: Rank(1 + found.count(-1), len(ranked) - found.count(1)) for label, found in ranked.items()}


def standing(values: Mapping[str, float], comparisons: Sequence[Comparison], axis: Axis) -> Standing:
    """Sort all arms by how they compare with those of the highest value; at least one value is needed.

    Args:
        values: estimate of each arm, in the order of the study.
        comparisons: of every pair of them.
        axis: that the values are of.
    """
    top = max(values.values())
    highest = [label for label, value in values.items() if value >= top - ROUNDING * max(abs(top), 1.0)]
    pairs = {pair: one.on(axis) for pair, one in both_ways(comparisons).items()}
    best, worse, unclear = [], [], []
    for label in values:
        against = [pairs[label, other] for other in highest if other != label]
        if any(judged.has("worse") for judged in against):
            worse.append(label)
        elif label not in highest and any(
            judged.word == "not comparable" or judged.has("better") for judged in against
        ):
            unclear.append(label)
        else:
            best.append(label)
    alike = not any(
        pairs[left, right].has("better")
        or pairs[left, right].has("worse")
        or pairs[left, right].word == "not comparable"
        for left, right in combinations(best, 2)
    )
    return Standing(highest, best, worse, unclear, alike)


def trade_offs(comparisons: Sequence[Comparison]) -> tuple[TradeOff, ...]:
    """Return every pair where one is better on mean retention and no worse in gain, the largest difference first."""
    found = [
        TradeOff(left, right, comparison.retention, comparison.gain)
        for (left, right), comparison in both_ways(comparisons).items()
        if comparison.retention.has("better") and comparison.gain.has("no worse")
    ]
    return tuple(sorted(found, key=lambda pair: -(pair.retention.estimate.value if pair.retention.estimate else 0.0)))
