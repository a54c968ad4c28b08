"""The five words in sentences and cells, always beside the interval at their own level."""

from __future__ import annotations

from collections.abc import Sequence

from peft_arena.analyze.estimate import Estimate
from peft_arena.analyze.family import Judgement
from peft_arena.report.numbers import digits_of, in_unit, listed, plain

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


def sentence(text: str) -> str:
    """Return text with a capital first letter, which labels keep as they are."""
    starts = ("this run", "these runs", "no ", "none ", "one ", "best ", "of ", "only ")
    return f"{text[:1].upper()}{text[1:]}" if text.startswith(starts) else text


def about_runs(judged: Sequence[Judgement]) -> bool:
    """Say whether some of the comparisons are of runs only."""
    return any(one.estimate is not None and one.estimate.about_runs for one in judged)


def ends_text(ends: tuple[float, float] | None, unit: str) -> str:
    """Render an interval; says so where there is none."""
    return "[no interval]" if ends is None else f"[{in_unit(ends[0], unit)}, {in_unit(ends[1], unit)}]"


def judged_text(judged: Judgement, unit: bool = True) -> str:
    """Render the difference with the interval that says the same as its word, for example ``+3.1 points [+1, +5]``."""
    found = judged.estimate
    if found is None:
        return "no difference known"
    return (
        f"{in_unit(found.value, found.unit)}{' ' + found.unit if unit else ''} {ends_text(judged.interval, found.unit)}"
    )


def detectable_text(judged: Judgement) -> str:
    """Say which difference would have been found; empty where that is not known."""
    size, found = judged.detectable, judged.estimate
    if size is None or found is None:
        return ""
    low, high = found.limits
    if size > max(-low, high):
        return "no possible difference would be found"
    return f"{plain(size, digits_of(found.unit))} would be found"


def words_text(judged: Judgement) -> str:
    """Return the words of left against right."""
    words = judged.words
    return words[0] if len(words) == 1 else f"{words[0]}, yet {words[1]} by the margin"


def word_text(judged: Judgement) -> str:
    """Return the words of left against right, with what would have been found beside *undecided*."""
    more = detectable_text(judged) if judged.word == "undecided" else ""
    return f"{words_text(judged)}; {more}" if more else words_text(judged)


def stated_text(judged: Judgement, where: str) -> str:
    """Return words, where they hold, and the numbers, for example ``undecided in gain (+1.0 points [−2, +4]; ...)``."""
    more = detectable_text(judged) if judged.word == "undecided" else ""
    return f"{words_text(judged)} {where} ({judged_text(judged)}{f'; {more}' if more else ''})"


def pair_text(judged: Judgement, left: str, right: str) -> str:
    """Return who is what, for example ``lora better`` or ``undecided; 7.9 would be found``."""
    word = judged.word
    if word == "better":
        return f"{left} better" + (", yet equivalent by the margin" if judged.has("equivalent") else "")
    if word == "worse":
        return f"{right} better" + (f", {left} no worse by the margin" if judged.has("no worse") else "")
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


def level_note(found: Estimate | None) -> str:
    """Say what an interval covers."""
    return "" if found is None else f"covers {found.covers}"
