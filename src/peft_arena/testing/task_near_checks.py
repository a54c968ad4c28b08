"""Checks of a scorer by answers that are near the right one: other numbers, and the question given back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal

from peft_arena.tasks.base import FRACTION, Item
from peft_arena.testing.task_answer_checks import MOST, NONSENSE
from peft_arena.testing.task_likelihood_checks import OVER
from peft_arena.testing.task_trial import (
    NEARLY,
    TURN,
    NotTestedError,
    TaskTrial,
    enough,
    flat,
    shown,
    spread,
)

ECHOED = 40
"""Items of the test split whose own question is tried as an answer."""
LABELS = 4
"""No more different numbers than that are labels."""
SIGNED = 10
"""From this number on the other sign is tried: a smaller one may be a label behind a dash."""
OTHER_SIGN = "with the other sign"
"""Not tried where other signs around the number are overlooked: such a scorer takes a dash for one of them."""
FORMS = ("({:f})", "${:f}")
_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d{0,14}|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d+)?")


def _reversed(number: Decimal) -> Decimal:
    """Return a whole number with its digits in reverse, and any other as it is."""
    if number != number.to_integral_value():
        return number
    return int(str(abs(int(number)))[::-1]) * Decimal(1).copy_sign(number)


NEAR: Mapping[str, Callable[[Decimal], Decimal]] = {
    "plus 1": lambda number: number + 1,
    "minus 1": lambda number: number - 1,
    "plus 5": lambda number: number + 5,
    "minus 5": lambda number: number - 5,
    "times 10": lambda number: number * 10,
    "with its digits in reverse": _reversed,
    OTHER_SIGN: lambda number: -number if abs(number) >= SIGNED else number,
}
"""Numbers that are nearly right, by what was done to the right one."""


def check_numbers(trial: TaskTrial) -> None:
    """Where the answers are numbers, others near by lose: a few off, ten times, digits in reverse, the other sign."""
    items = trial.needs_answers()
    numbers = [(item, _number(trial.decisive(item))) for item in items]
    held = [(item, number) for item, number in numbers if number is not None and _judged(trial, item)]
    if len(held) * 2 < len(items) or len({number for _, number in held}) <= min(LABELS, len(held) - 1):
        raise NotTestedError(f"the answers are no different numbers in {len(items) - len(held)} of {len(items)} items")
    for kind, change in NEAR.items():
        tried = [(item, number, change(number)) for item, number in held if change(number) != number]
        if kind == OTHER_SIGN:
            tried = [one for one in tried if not any(_wins(trial, one[0], form.format(one[1])) for form in FORMS)]
        won = [f"{near} for {number}" for item, number, near in tried if _wins(trial, item, f"{near:f}")]
        assert len(won) <= max(MOST * len(tried), min(len(tried) - 1, 1)), (
            f"the number, {kind}, is right in {len(won)} of {len(tried)} items: {shown(won)}"
        )


def _number(text: str) -> Decimal | None:
    found = _NUMBER.fullmatch(text.strip())
    return Decimal(found[0].replace(",", "")) if found else None


def _judged(trial: TaskTrial, item: Item) -> bool:
    """Say whether the place of the number in the answer is what is judged: without it the answer loses."""
    return not trial.right(item, trial.reworded(item, NONSENSE))


def _wins(trial: TaskTrial, item: Item, part: str) -> bool:
    alone = trial.right(item, trial.decisive(item)) and trial.right(item, part)
    return alone or trial.right(item, trial.reworded(item, part))


def check_echo(trial: TaskTrial) -> None:
    """The question, or the prompt, given back as the answer wins no more often than a guess."""
    trial.needs_text()
    card, items = trial.task.card, spread(trial.found["test"], ECHOED)
    enough(len(items))
    chance = card.chance if card.headline.unit == FRACTION else None
    bound = NEARLY if chance is None else min(NEARLY, chance + OVER + 1 / len(items) ** 0.5)
    won: Counter[str] = Counter()
    for item in items:
        prompt = flat(trial.task.prompt(item))
        texts = {"question": item.question, "prompt": prompt.replace(TURN, "\n"), "last turn": prompt.split(TURN)[-1]}
        won.update(kind for kind, text in texts.items() if text.strip() and trial.right(item, text))
    for kind, hits in won.items():
        assert hits < bound * len(items) or hits <= 1, (
            f"the {kind}, given back as the answer, is right in {hits} of {len(items)} items"
        )
