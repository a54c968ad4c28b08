"""The five words in sentences and cells, always beside the interval at their own level."""

from __future__ import annotations

from collections.abc import Sequence

from peft_arena.analyze.family import Judgement
from peft_arena.report.numbers import digits_of, in_unit, listed, plain

MUCH_ALIKE = 1.1
"""Ratio of two detectable differences up to which the larger stands for both."""
MOST_NAMED = 8
"""Arms that a sentence names before it counts them."""


def subject(labels: Sequence[str], about_runs: bool, most: int = MOST_NAMED) -> str:
    """Return arms as the subject of a sentence: as runs where nothing is known of the spread between trainings."""
    names = named(labels, most)
    if not about_runs:
        return names
    return f"this run of {names}" if len(labels) == 1 else f"these runs of {names}"


def named(labels: Sequence[str], most: int = MOST_NAMED) -> str:
    """Return the names of some arms, counted where there are many."""
    quoted = [f"“{label}”" if "," in label else label for label in labels]
    if len(quoted) <= most:
        return listed(quoted)
    return f"{len(quoted)} arms ({listed(quoted[:3])} among them)"


def some(labels: Sequence[str], most: int = MOST_NAMED) -> str:
    """Return the names of some arms whose number is said already."""
    quoted = [f"“{label}”" if "," in label else label for label in labels]
    return listed(quoted) if len(quoted) <= most else f"{listed(quoted[:3])} among them"


def sentence(text: str) -> str:
    """Return text with a capital first letter, which labels keep as they are."""
    starts = ("this run", "these runs", "none of ", "best in ", "which arm is ", "of the arms ")
    return f"{text[:1].upper()}{text[1:]}" if text.startswith(starts) else text


def about_runs(judged: Sequence[Judgement]) -> bool:
    """Say whether some of the comparisons are of runs only."""
    return any(one.estimate is not None and one.estimate.about_runs for one in judged)


def ends_text(ends: tuple[float, float] | None, unit: str) -> str:
    """Render an interval, with as many digits as show on which side of zero it lies; says so where there is none."""
    if ends is None:
        return "[no interval]"
    more = 0
    while ends[0] * ends[1] > 0 and more < 3 and 0 in (round(end, digits_of(unit) + more) for end in ends):
        more += 1
    return f"[{in_unit(ends[0], unit, more)}, {in_unit(ends[1], unit, more)}]"


def judged_text(judged: Judgement, unit: bool = True) -> str:
    """Render the difference with the interval that says the same as its word, for example ``+3.1 points [+1, +5]``."""
    found = judged.estimate
    if found is None:
        return "no difference known"
    ends = ends_text(judged.interval, found.unit) if judged.is_tested else "[not tested]"
    return f"{in_unit(found.value, found.unit)}{' ' + found.unit if unit else ''} {ends}"


def detectable_text(judged: Judgement) -> str:
    """Say which difference would have been found; empty where that is not known."""
    size, found = judged.detectable, judged.estimate
    if size is None or found is None:
        return ""
    low, high = found.limits
    if size > max(-low, high):
        return "no possible difference would be found"
    return f"{plain(size, digits_of(found.unit))} would be found"


def resolution(pairs: Sequence[Judgement]) -> str:
    """Say which difference would have been found, from the least to the most over the undecided pairs."""
    known = [(pair.detectable, pair) for pair in pairs if pair.detectable is not None and pair.word == "undecided"]
    if not known:
        return ""
    least, most = min(known, key=lambda one: one[0] or 0.0), max(known, key=lambda one: one[0] or 0.0)
    told = detectable_text(most[1])
    estimate = least[1].estimate
    if estimate is None or not told:
        return ""
    digits = digits_of(estimate.unit)
    low, high = plain(least[0] or 0.0, digits), plain(most[0] or 0.0, digits)
    if told.startswith("no possible"):
        return f"; {told}{'' if detectable_text(least[1]) == told else ' between some'}"
    if (most[0] or 0.0) <= MUCH_ALIKE * (least[0] or 0.0):
        return f"; a difference of {told}"
    return f"; differences of {low} to {high}, depending on the pair, would be found"


def words_text(judged: Judgement) -> str:
    """Return the words of left against right."""
    words = judged.words
    return words[0] if len(words) == 1 else f"{words[0]}, and {words[1]} by the margin"


def word_text(judged: Judgement) -> str:
    """Return the words of left against right, with what would have been found beside *undecided*."""
    if not judged.is_tested:
        return "not tested"
    more = detectable_text(judged) if judged.word == "undecided" else ""
    return f"{words_text(judged)}; {more}" if more else words_text(judged)


def stated_text(judged: Judgement, where: str) -> str:
    """Return words, where they hold, and the numbers, for example ``undecided in gain (+1.0 points [−2, +4]; ...)``."""
    more = detectable_text(judged) if judged.word == "undecided" else ""
    return f"{words_text(judged)} {where} ({judged_text(judged)}{f'; {more}' if more else ''})"


def pair_interval(judged: Judgement) -> tuple[float, float] | None:
    """Return the interval of left minus right that says the same as :func:`pair_text`."""
    turned = judged.turned()
    if judged.word == "undecided" and turned.has("no worse") and turned.interval is not None:
        return -turned.interval[1], -turned.interval[0]
    return judged.interval


def pair_text(judged: Judgement, left: str, right: str) -> str:
    """Return who is what, for example ``lora better`` or ``undecided; 7.9 would be found``."""
    word = judged.word
    if word == "better":
        return f"{left} better" + (", and equivalent by the margin" if judged.has("equivalent") else "")
    if word == "worse":
        return f"{right} better" + (f", and {left} no worse by the margin" if judged.has("no worse") else "")
    if word == "no worse":
        return f"{left} no worse"
    if word == "undecided" and judged.turned().has("no worse"):
        return f"{right} no worse"
    return word_text(judged)


def cell_kind(judged: Judgement) -> str:
    """Return the class of a cell with a word: better and worse stand out."""
    return {"better": "txt better", "worse": "txt worse", "equivalent": "txt", "no worse": "txt"}.get(
        judged.word, "txt none"
    )
