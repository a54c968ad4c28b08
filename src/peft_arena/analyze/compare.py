"""Arm against arm on the same target: who is better at what, who is tied, and which trade is the better one.

Every pair is compared twice, on the gain and on the mean retention. The p-values of all pairs on one of the two are
corrected together (Holm, 1979, Scandinavian Journal of Statistics 6(2)), so that the chance of any false "better" among
them is at most 5 %. Two arms are tied unless the corrected p-value is below 0.05; a tie is not proof of equality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

from peft_arena.analyze.effects import ArmEffects, oriented, retention_contrast, unit_of
from peft_arena.analyze.evidence import Evidence
from peft_arena.analyze.paired import LEVEL, Estimate, Resamples, estimate

ALPHA = 1 - LEVEL
Verdict = Literal["better", "worse", "tied", "unknown"]
Axis = Literal["gain", "retention"]
AXES: tuple[Axis, ...] = ("gain", "retention")


@dataclass(frozen=True, eq=False)
class Versus:
    """One pair on one axis: left minus right, positive where left is better."""

    estimate: Estimate | None
    p_corrected: float | None
    """Holm-corrected over all pairs of the target on this axis."""

    @property
    def verdict(self) -> Verdict:
        """Whether left is better or worse than right after correction; ``unknown`` where they cannot be compared."""
        if self.estimate is None or self.p_corrected is None:
            return "unknown"
        if self.p_corrected >= ALPHA:
            return "tied"
        return "better" if self.estimate.value > 0 else "worse"

    @property
    def maybe_worse(self) -> bool:
        """Whether left may be worse: lower by more than one standard error, or the two cannot be compared.

        Much stricter than "not significantly worse", which a difference of ten points passes if its error is large.
        """
        if self.estimate is None or self.estimate.stderr is None:
            return True
        return self.estimate.value < -self.estimate.stderr

    def turned(self) -> Versus:
        """Return right minus left."""
        return Versus(None if self.estimate is None else self.estimate.scaled(-1, self.estimate.unit), self.p_corrected)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two arms of one target."""

    left: str
    right: str
    gain: Versus
    retention: Versus

    def on(self, axis: Axis) -> Versus:
        """Return the pair on one axis."""
        return self.gain if axis == "gain" else self.retention

    def turned(self) -> Comparison:
        """Return the comparison with the sides swapped."""
        return Comparison(self.right, self.left, self.gain.turned(), self.retention.turned())


class Rank(NamedTuple):
    """The places an arm may hold: ``first`` - 1 arms are significantly better, and all after ``last`` worse."""

    first: int
    last: int

    def __str__(self) -> str:
        """Render as ``2`` or ``1–3``."""
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"


class Standing(NamedTuple):
    """How the arms of a target compare with the one that has the highest estimate; each list the highest first."""

    first: str
    tied: list[str]
    """Not significantly different from the first."""
    worse: list[str]
    """Significantly worse than the first."""
    unclear: list[str]
    """Cannot be placed: no common seed, answer or interval, or better than the first on the seeds they share."""
    alike: bool
    """Whether the first and those tied with it are also tied with each other."""

    @property
    def group(self) -> list[str]:
        """The first and those tied with it."""
        return [self.first, *self.tied]


@dataclass(frozen=True, eq=False)
class TradeOff:
    """``keeps`` forgets significantly less than ``forgets``, at no lower gain within the error."""

    keeps: str
    forgets: str
    retention: Versus
    """Mean retention of ``keeps`` minus that of ``forgets``, in points."""
    gain: Versus

    @property
    def sentence(self) -> str:
        """The finding in one sentence, with numbers and intervals."""
        kept, gained = self.retention.estimate, self.gain.estimate
        if kept is None or gained is None:
            return ""
        how = "at a significantly higher gain" if self.gain.verdict == "better" else "at no lower gain within the error"
        return (
            f"{self.keeps} forgets {_amount(kept)} less than {self.forgets} {how} "
            f"(difference of the gains {told(gained)})."
        )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down corrected p-values, in the given order; None stays None and is not counted."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for done, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - done) * p))
        corrected[place] = highest
    return corrected


def compare_arms(evidence: Evidence, arms: Sequence[ArmEffects], resamples: Resamples) -> tuple[Comparison, ...]:
    """Compare every pair of arms of one target, matched by seed and item."""
    pairs = list(combinations(arms, 2))
    gains = [_gain(evidence, left, right, resamples) for left, right in pairs]
    kept = [_retention(evidence, left, right, resamples) for left, right in pairs]
    gain_p = holm([None if found is None else found.p for found in gains])
    kept_p = holm([None if found is None else found.p for found in kept])
    return tuple(
        Comparison(left.label, right.label, Versus(gains[i], gain_p[i]), Versus(kept[i], kept_p[i]))
        for i, (left, right) in enumerate(pairs)
    )


def _gain(evidence: Evidence, left: ArmEffects, right: ArmEffects, resamples: Resamples) -> Estimate | None:
    key = left.evidence.arm.target.id
    task, one, other = evidence.tasks.get(key), left.evidence.scores.get(key), right.evidence.scores.get(key)
    if task is None or one is None or other is None:
        return None
    found = oriented(task, one, other, resamples)
    return None if found is None else estimate(found, resamples, unit_of(task))


def _retention(evidence: Evidence, left: ArmEffects, right: ArmEffects, resamples: Resamples) -> Estimate | None:
    if left.mean is None or right.mean is None:
        return None
    found = retention_contrast(evidence, left.evidence, right.evidence, resamples)
    return None if found is None else estimate(found, resamples, left.mean.unit)


def both_ways(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], Comparison]:
    """Return every comparison by (left, right), in both directions."""
    return {(one.left, one.right): one for given in comparisons for one in (given, given.turned())}


def ranks(labels: Sequence[str], comparisons: Sequence[Comparison], axis: Axis) -> dict[str, Rank]:
    """Return the places each arm may hold on one axis; arms that cannot be compared with any other have none."""
    verdicts: dict[str, list[Verdict]] = {label: [] for label in labels}
    for (left, _), comparison in both_ways(comparisons).items():
        if (verdict := comparison.on(axis).verdict) != "unknown":
            verdicts[left].append(verdict)
    ranked = {label: found for label, found in verdicts.items() if found}
    return {
        label: Rank(1 + found.count("worse"), len(ranked) - found.count("better")) for label, found in ranked.items()
    }


def standing(values: Mapping[str, float], comparisons: Sequence[Comparison], axis: Axis) -> Standing:
    """Sort all arms by how they compare with the one that has the highest value; at least one value is needed."""
    first, *others = sorted(values, key=lambda label: -values[label])
    table = both_ways(comparisons)
    verdicts = {label: table[label, first].on(axis).verdict for label in others}
    tied = [label for label in others if verdicts[label] == "tied"]
    worse = [label for label in others if verdicts[label] == "worse"]
    unclear = [label for label in others if verdicts[label] not in ("tied", "worse")]
    alike = all(table[pair].on(axis).verdict == "tied" for pair in combinations([first, *tied], 2))
    return Standing(first, tied, worse, unclear, alike)


def trade_offs(comparisons: Sequence[Comparison]) -> tuple[TradeOff, ...]:
    """Return every pair where one forgets significantly less at no lower gain, the largest difference first.

    "Significantly less" is after correction. "No lower gain" means that the gain is not lower by more than one standard
    error of the difference, so that an uncertain loss is not passed off as none.
    """
    found = [
        TradeOff(left, right, comparison.retention, comparison.gain)
        for (left, right), comparison in both_ways(comparisons).items()
        if comparison.retention.verdict == "better" and not comparison.gain.maybe_worse
    ]
    return tuple(sorted(found, key=lambda pair: -(pair.retention.estimate.value if pair.retention.estimate else 0.0)))


def _amount(found: Estimate) -> str:
    return _minus(f"{found.value:.1f} {found.unit} [{found.low:.1f}, {found.high:.1f}]")


def told(found: Estimate) -> str:
    """Render a difference that has an interval, for example ``+3.1 points [+1.0, +5.2]``."""
    digits = 1 if found.unit == "points" else 3
    value, *ends = (_signed(number, digits) for number in (found.value, found.low, found.high))
    return f"{value} {found.unit} [{', '.join(ends)}]"


def _signed(number: float | None, digits: int) -> str:
    """Render a number with its sign; a rounded zero has none."""
    text = f"{number:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else _minus(text)


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
