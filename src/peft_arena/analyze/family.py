"""The words that a comparison earns, and the family of comparisons in which it is corrected.

Five words, defined here and used everywhere:

* *better*, *worse*: the two-sided p-value, corrected, is below 0.05;
* *no worse*: the truth is above minus the margin, by a one-sided test, corrected;
* *equivalent*: the truth is above minus and below plus the margin, by both one-sided tests (Schuirmann 1987; Lakens
  2017), corrected;
* *undecided*: none of these.

A real loss within the margin is *worse* and *no worse*, and both are said. What is better is no worse. *Undecided* says
nothing of how large a difference may be; beside it stands the difference that would have been found in four of five
repetitions, (t(1 - α / 2m) + t(0.8)) · error for m comparisons.

All differences that a study calls better or worse are one family, corrected together by Holm's procedure, so that the
chance of any false one among equal arms is at most 5 %. What is *no worse*, with both its sides, is a family of its own
against the pretrained model, and another between trained models. The interval beside a word is at the level that the
correction leaves for that word: beside *better*, *worse* and *undecided* it says where zero is, beside *no worse* and
*equivalent* where the margin is, and may lie on one side of zero although the difference is not shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft_arena.analyze.estimate import LEVEL, Estimate
from peft_arena.analyze.holm import Corrected, correct

ALPHA = 1 - LEVEL
POWER = 0.8
"""Chance of being found that a detectable difference has."""
Word = Literal["better", "worse", "equivalent", "no worse", "undecided", "not comparable"]
"""The five, and that there is no common seed, answer or interval."""
LAST = 10**6
"""Step of comparisons that are not primary."""
Side = Literal["lower", "upper"]


@dataclass(eq=False)
class _Asked:
    estimate: Estimate | None
    margin: float | None
    against_base: bool
    step: int

    @property
    def is_known(self) -> bool:
        return self.estimate is not None and self.estimate.known


class Family:
    """Comparisons that are corrected together; closed by the first word that is read of any of them."""

    def __init__(self) -> None:
        """Start without comparisons."""
        self._asked: list[_Asked] = []
        self._differences: list[Corrected | None] | None = None
        self._margins: dict[Side, list[Corrected | None]] = {}
        self._sizes: Counter[int] = Counter()

    def ask(
        self,
        estimate: Estimate | None,
        *,
        margin: float | None = None,
        against_base: bool = False,
        step: int | None = None,
    ) -> Judgement:
        """Add a comparison and return what will be said of it.

        Args:
            estimate: left minus right, positive where left is better; None where the two cannot be compared.
            margin: what counts as nothing, in the estimate's unit; None where the study names none for it.
            against_base: whether right is the pretrained model.
            step: number of a primary comparison, which is tested before all others; None for the others.

        Raises:
            RuntimeError: a word of the family was read before, so that another comparison would change it.
        """
        if self._differences is not None:
            raise RuntimeError("a comparison was added to a family whose words are already in use")
        self._asked.append(_Asked(estimate, margin, against_base, LAST if step is None else step))
        return Judgement(estimate, margin, self, len(self._asked) - 1)

    @property
    def size(self) -> int:
        """How many comparisons have a p-value."""
        return sum(one.is_known for one in self._asked)

    def size_with(self, place: int) -> int:
        """Return how many comparisons with a p-value are tested in the same step as one."""
        if self._differences is None:
            self._close()
        return self._sizes[self._asked[place].step]

    def difference(self, place: int) -> Corrected | None:
        """Return what became of the two-sided p-value of a comparison."""
        if self._differences is None:
            self._close()
        assert self._differences is not None
        return self._differences[place]

    def margin(self, place: int, side: Side) -> Corrected | None:
        """Return what became of a one-sided p-value: the truth is above minus (``lower``) or below plus the margin."""
        if self._differences is None:
            self._close()
        return self._margins[side][place]

    def _close(self) -> None:
        asked = self._asked
        self._sizes = Counter(one.step for one in asked if one.is_known)
        self._differences = correct(
            [None if one.estimate is None else one.estimate.p for one in asked], [one.step for one in asked], ALPHA
        )
        self._margins = {"lower": [None] * len(asked), "upper": [None] * len(asked)}
        for against_base in (True, False):
            places = [place for place, one in enumerate(asked) if one.against_base == against_base]
            sides: list[tuple[int, Side]] = [(place, side) for place in places for side in ("lower", "upper")]
            found = correct([_beyond_margin(asked[place], side) for place, side in sides])
            for (place, side), one in zip(sides, found, strict=True):
                self._margins[side][place] = one


def _beyond_margin(asked: _Asked, side: Side) -> float | None:
    found, margin = asked.estimate, asked.margin
    if found is None or margin is None:
        return None
    return found.p_above(-margin) if side == "lower" else found.p_below(margin)


@dataclass(frozen=True, eq=False)
class Judgement:
    """One comparison, left minus right, positive where left is better, and the words it earns."""

    estimate: Estimate | None
    margin: float | None
    family: Family
    place: int
    """In the family."""
    is_turned: bool = False
    """Whether left and right were swapped after it was asked."""

    @property
    def p_corrected(self) -> float | None:
        """Two-sided p-value, corrected over the family; None where there is no interval."""
        found = self.family.difference(self.place)
        return None if found is None else found.p

    def _margin_p(self, side: Side) -> Corrected | None:
        if self.is_turned:
            side = "upper" if side == "lower" else "lower"
        return self.family.margin(self.place, side)

    @property
    def p_no_worse(self) -> float | None:
        """One-sided p-value of "no worse than the margin allows", corrected; None without a margin."""
        found = self._margin_p("lower")
        return None if found is None else found.p

    @property
    def is_tested(self) -> bool:
        """Whether it was tested: not where a comparison that goes before it is undecided."""
        found = self.family.difference(self.place)
        return found is None or found.is_tested

    @property
    def words(self) -> tuple[Word, ...]:
        """What is said of left against right, the first word the most."""
        p, found = self.p_corrected, self.estimate
        if found is None or p is None:
            return ("not comparable",)
        if not self.is_tested:
            return ("undecided",)
        low, high = self._within()
        if p < ALPHA and (found.p_above(0.0) or 0.0) < (found.p_below(0.0) or 0.0):
            return ("better", "equivalent") if low and high else ("better",)
        if p < ALPHA:
            return ("worse", "no worse") if low else ("worse",)
        if low:
            return ("equivalent",) if high else ("no worse",)
        return ("undecided",)

    def _within(self) -> tuple[bool, bool]:
        """Return whether the truth is above minus, and below plus, the margin."""
        lower, upper = (self._margin_p(side) for side in ("lower", "upper"))
        return lower is not None and lower.p < ALPHA, upper is not None and upper.p < ALPHA

    @property
    def word(self) -> Word:
        """The first of :attr:`words`."""
        return self.words[0]

    def has(self, word: Word) -> bool:
        """Say whether a word holds: what is better or equivalent is no worse, a loss within the margin equivalent."""
        words = self.words
        if word == "equivalent" and words == ("worse", "no worse"):
            return all(self._within())
        return word in words or (word == "no worse" and ("better" in words or "equivalent" in words))

    @property
    def level(self) -> float | None:
        """Coverage of the interval that says the same as :attr:`word`; None without one, or if nothing was tested."""
        found = self.family.difference(self.place)
        if not self.is_tested:
            return None
        if self.word in ("equivalent", "no worse"):
            sides = ("lower", "upper") if self.word == "equivalent" else ("lower",)
            tested = [one for side in sides if (one := self._margin_p(side)) is not None]  # type: ignore[arg-type]
            return 1 - 2 * ALPHA / max(tested, key=lambda one: one.p / one.times).times
        return None if found is None else 1 - ALPHA / found.times

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval at :attr:`level`.

        Excludes zero where left is better or worse, holds it where the two are undecided, and lies above minus (of an
        equivalent pair also below plus) the margin where left is no worse.
        """
        level = self.level
        return None if self.estimate is None or level is None else self.estimate.interval(level)

    @property
    def detectable(self) -> float | None:
        """Least true difference that would have been found in four of five repetitions.

        At the level that is left for the least p-value of the step. Unscored answers add what they leave open. None
        without an interval, and where nothing was tested.
        """
        found = self.estimate
        if found is None or found.lower is None or found.upper is None or not self.is_tested:
            return None
        pivot = max(found.lower, found.upper, key=lambda one: one.half(LEVEL))
        tail = ALPHA / (2 * max(self.family.size_with(self.place), 1))
        gap = max(found.value - found.lower.centre, found.upper.centre - found.value) if found.bounded else 0.0
        return (pivot.quantile(tail) + pivot.quantile(1 - POWER)) * pivot.error + gap

    def turned(self) -> Judgement:
        """Return right against left."""
        found = None if self.estimate is None else self.estimate.times(-1, self.estimate.unit)
        return Judgement(found, self.margin, self.family, self.place, not self.is_turned)

    def summary(self) -> dict[str, Any]:
        """Return what is said as JSON values; the estimate's own are not in it."""
        ends = self.interval
        undecided = self.word == "undecided"
        return {
            "words": list(self.words),
            "turned": list(self.turned().words),
            "verdict": self.word,
            "is_tested": self.is_tested,
            "about": None if self.estimate is None else "this run" if self.estimate.about_runs else "the method",
            "p_corrected": self.p_corrected,
            "p_no_worse": self.p_no_worse,
            "margin": self.margin,
            "level": self.level,
            "low_corrected": None if ends is None else ends[0],
            "high_corrected": None if ends is None else ends[1],
            "detectable": self.detectable if undecided else None,
        }


def judge_alone(estimates: Sequence[Estimate | None], margin: float | None = None) -> list[Judgement]:
    """Return the judgements of comparisons that are a family of their own."""
    family = Family()
    return [family.ask(one, margin=margin) for one in estimates]
