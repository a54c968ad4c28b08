"""Retention skills of a little reasoning: comparing numbers, Boolean expressions, order in the calendar."""

from __future__ import annotations

from collections.abc import Iterator

from peft_arena.tasks.base import Role
from peft_arena.tasks.micro.base import Candidate, MicroTask, draw, micro_card, pick, stream

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


class Compare(MicroTask):
    """The larger or smaller of two numbers. A pair of numbers is in one split, in either order and question."""

    card = micro_card(
        "micro-compare",
        "Comparing numbers",
        Role.RETENTION,
        1 / 2,
        "Name the larger or the smaller of two different numbers of two digits; chance is one of the two.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random pairs of numbers, without end."""
        rng = stream(self.card.name)
        while True:
            numbers = draw(rng, range(10, 100), 2)
            word = pick(rng, ("larger", "smaller"))
            answer = max(numbers) if word == "larger" else min(numbers)
            key = f"{min(numbers)} {max(numbers)}"
            yield Candidate(f"Which is {word}: {numbers[0]} or {numbers[1]}?", str(answer), key)


class Boolean(MicroTask):
    """The value of a Boolean expression of two brackets.

    An expression is in one split; its mirror image may be in another.
    """

    card = micro_card(
        "micro-boolean",
        "Boolean expressions",
        Role.RETENTION,
        1 / 2,
        "Say true or false for two bracketed pairs of possibly negated constants joined by and/or; chance is a coin.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random expressions; so many are drawn that nearly all of the 2048 occur."""
        rng = stream(self.card.name)
        atoms = {"true": True, "false": False, "not true": False, "not false": True}
        operators = ("and", "or")
        for _ in range(20_000):
            names = [pick(rng, tuple(atoms)) for _ in range(4)]
            signs = [pick(rng, operators) for _ in range(3)]
            left, right = (
                _apply(sign, atoms[one], atoms[other])
                for one, sign, other in ((names[0], signs[0], names[1]), (names[2], signs[2], names[3]))
            )
            text = f"({names[0]} {signs[0]} {names[1]}) {signs[1]} ({names[2]} {signs[2]} {names[3]})"
            yield Candidate(f"Evaluate: {text}", str(_apply(signs[1], left, right)).lower(), key=text)


class Calendar(MicroTask):
    """The earliest or latest of three days or months. A set of three is in one split for each of the two questions."""

    card = micro_card(
        "micro-calendar",
        "Order in the calendar",
        Role.RETENTION,
        1 / 3,
        "Name the earliest or the latest of three months of the year or days of the week (which starts on Monday); "
        "chance is one of the three.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random threes; so many are drawn that nearly all of the 3060 in any order and question occur."""
        rng = stream(self.card.name)
        for _ in range(20_000):
            order = pick(rng, (DAYS, MONTHS, MONTHS, MONTHS))
            names = draw(rng, order, 3)
            word = pick(rng, ("earliest", "latest"))
            ranked = sorted(names, key=order.index)
            answer = ranked[0] if word == "earliest" else ranked[-1]
            question = f"Which is the {word}: {names[0]}, {names[1]} or {names[2]}?"
            yield Candidate(question, answer, key=f"{word} {' '.join(ranked)}")


def _apply(operator: str, one: bool, other: bool) -> bool:
    return (one and other) if operator == "and" else (one or other)
