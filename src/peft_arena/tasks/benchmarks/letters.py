"""Multiple choice by letters: questions with lettered options, answered shots before them, one letter as the answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, cast

from peft_arena.tasks.base import (
    Generation,
    Item,
    Kind,
    Message,
    Metric,
    Prompt,
    Role,
    Score,
    Split,
    TaskCard,
)
from peft_arena.tasks.benchmarks.base import HubSplit, pins
from peft_arena.tasks.benchmarks.forms import LETTERS, TwoForms, lettered, options_of
from peft_arena.tasks.letter_answers import given_letter
from peft_arena.tasks.splits import Keyed

LETTER_TOKENS = 32
SHOTS: Split = cast(Split, "shots")
"""Key of the splits in ``Benchmark.data`` that shots are taken from; never evaluated."""


def first_letter(text: str, count: int, options: Sequence[str] = ()) -> str:
    """Return the letter a short answer gives, or an empty text (:func:`peft_arena.tasks.letter_answers.given_letter`).

    Args:
        text: what a model wrote; only the beginning of a long text is read.
        count: number of options; letters beyond them are no answer.
        options: texts of the options, where they are known.
    """
    return given_letter(text, count, options, first=True)


def retention_card(
    *,
    name: str,
    title: str,
    kind: Kind,
    metrics: tuple[Metric, ...],
    splits: Sequence[HubSplit],
    chance: float | None,
    licence: str,
    citation: str,
    description: str,
    version: int = 1,
) -> TaskCard:
    """Return the card of a benchmark that is only evaluated, with its data on the hub."""
    return TaskCard(
        name=name,
        title=title,
        version=version,
        role=Role.RETENTION,
        kind=kind,
        metrics=metrics,
        chance=chance,
        source="; ".join(map(str, splits)) if len(splits) <= 4 else f"{splits[0]} and {len(splits) - 1} more",
        revision=pins(splits),
        licence=licence,
        citation=citation,
        description=description,
    )


FORMS = (
    f"Form 'generate': turns of the model's chat template, greedy, at most {LETTER_TOKENS} new tokens, no stop string; "
    "the answer is the letter of an option, or the text of one, that is said to be the answer, else the only letter "
    "that "
    "is named and not rejected; none, or several, is wrong. Form 'likelihood': the same as plain text; the letter with "
    "the highest log-likelihood."
)
"""How these benchmarks are answered, for their cards."""
LETTER_DIFFERS = (
    "the wording of the request is ours, and the letter is looked for by rules of our own instead of the original's "
    "patterns. The likelihood form is not in the original."
)
UNVERIFIED = "The hub was not reached where this was written: columns are as public code reads them."


class LetterBenchmark(TwoForms):
    """Questions answered with a letter. Subclasses read rows with :meth:`keyed`, and may word the request."""

    generation = Generation(max_new_tokens=LETTER_TOKENS, stop=())
    shots: ClassVar[int] = 0
    """Answered questions shown before each."""

    def keyed(self, question: str, options: Sequence[str], gold: int, part: str = "") -> Keyed | None:
        """Make an item of question and options; a row whose right option is none of at least two is left out."""
        if not 0 <= gold < len(options) or len(options) < 2:
            return None
        letters = tuple(LETTERS[: len(options)])
        shown = lettered(question.strip(), [str(option).strip() for option in options])
        return Keyed(f"{part}\n{shown}", Item(shown, letters[gold], letters, gold, {"part": part} if part else {}))

    def request(self, item: Item) -> str:
        """Return what is asked before question and options."""
        return f"Reply with one letter, {', '.join(item.choices[:-1])} or {item.choices[-1]}."

    def shown_before(self, item: Item) -> tuple[Item, ...]:
        """Return the shots of an item: the first of its part by the hash of their content, never the item itself."""
        found = [shot for shot in self._pool.get(self.stratum(item), ()) if shot.question != item.question]
        return tuple(found[: self.shots])

    def prompt(self, item: Item) -> Prompt:
        """Return the shots and the question, as turns of a conversation or as plain text."""
        shots = self.shown_before(item)
        if self.compares:
            blocks = [f"{shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots]
            return f"{self.request(item)}\n\n{''.join(blocks)}{item.question}\nAnswer:"
        turns: list[Message] = []
        for shot in shots:
            turns += [Message("user", self._asked(shot)), Message("assistant", shot.answer)]
        return (*turns, Message("user", self._asked(item)))

    def score(self, item: Item, completion: str) -> Score:
        """Compare the letter given with the right one."""
        if self.compares:
            return super().score(item, completion)
        said = first_letter(completion, len(item.choices), options_of(item.question, len(item.choices)))
        return self.judged(said, said == item.answer)

    def _asked(self, item: Item) -> str:
        return f"{self.request(item)}\n{item.question}\nAnswer:"

    @cached_property
    def _pool(self) -> dict[str, list[Item]]:
        """The possible shots of each part."""
        pool: dict[str, list[Item]] = {}
        for shot in self.items(SHOTS) if self.shots else ():
            pool.setdefault(self.stratum(shot), []).append(shot)
        return pool
