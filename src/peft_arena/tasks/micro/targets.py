"""Target skills: what the packaged micro model has never seen, asked in a form that resembles what it knows.

Sampled answers of the packaged model to the cipher, the operator and the reversal are hardly ever right: a policy
gradient has nothing to follow. To the months they are right sometimes, so that it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_lowercase

from peft_arena.tasks.base import Role
from peft_arena.tasks.micro.base import Candidate, MicroTask, draw, micro_card, pick, stream
from peft_arena.tasks.micro.reasoning import MONTHS


class Cipher(MicroTask):
    """Four letters, each replaced by the next of the alphabet. A sequence of letters is in one split."""

    card = micro_card(
        "micro-cipher",
        "Letter cipher",
        Role.TARGET,
        1 / 26**4,
        "Replace each of four letters by the next of the alphabet (a after z) and write them in capitals without "
        "spaces; chance is four random letters.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random letters, without end."""
        rng = stream(self.card.name)
        while True:
            letters = draw(rng, ascii_lowercase, 4)
            shown = " ".join(letters)
            coded = "".join(ascii_lowercase[(ascii_lowercase.index(letter) + 1) % 26] for letter in letters)
            yield Candidate(f"Shift the letters: {shown}", coded.upper(), key=shown)


class Operator(MicroTask):
    """An invented operator on two numbers: digit by digit the sum without carry. A pair of numbers is in one split."""

    card = micro_card(
        "micro-operator",
        "Invented operator",
        Role.TARGET,
        1 / 100,
        "Work out a @ b for two numbers of two digits: digit by digit the last digit of the sum, so 58 @ 37 is 85; "
        "chance is two random digits.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random pairs of numbers, without end."""
        rng = stream(self.card.name)
        while True:
            one, other = (f"{pick(rng, range(100)):02d}" for _ in range(2))
            answer = "".join(str((int(x) + int(y)) % 10) for x, y in zip(one, other, strict=True))
            yield Candidate(f"Which is {one} @ {other}?", answer, key=" ".join(sorted((one, other))))


class Reverse(MicroTask):
    """Four digits to be written backwards. A sequence of digits is in one split."""

    card = micro_card(
        "micro-reverse",
        "Reversing digits",
        Role.TARGET,
        1 / 10_000,
        "Write a number of four digits backwards, leading zeros included; chance is four random digits.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random numbers in random order, without end."""
        rng = stream(self.card.name)
        while True:
            digits = f"{pick(rng, range(10_000)):04d}"
            yield Candidate(f"Which is {digits} reversed?", digits[::-1], key=digits)


class Months(MicroTask):
    """The earliest or latest of four to six months. A set of months is in one split, in any order and question.

    The packaged model knows the order of the months from ``micro-calendar``, which asks about three of them in other
    words, and the form of the question from ``micro-position``, which asks about letters. It has never seen a list of
    more than three names, so that no question here, and no set of months, is one it was trained on.
    """

    card = micro_card(
        "micro-months",
        "Earliest or latest of many months",
        Role.TARGET,
        37 / 180,
        "Name the earliest or the latest of four, five or six different months of the year; chance is one of the "
        "months named. Always January and always December are right in 42 % of questions.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random sets of months in random order, without end."""
        rng = stream(self.card.name)
        while True:
            names = draw(rng, MONTHS, pick(rng, (4, 5, 6)))
            word = pick(rng, ("earliest", "latest"))
            ranked = sorted(names, key=MONTHS.index)
            answer = ranked[0] if word == "earliest" else ranked[-1]
            yield Candidate(f"Give the {word} of the months: {', '.join(names)}", answer, key=" ".join(ranked))
