"""Retention skills on letters: sorting, position, following a format instruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from string import ascii_lowercase
from typing import ClassVar

from peft_arena.tasks.base import Role, Split
from peft_arena.tasks.micro.base import Candidate, MicroTask, draw, micro_card, pick, stream

FORMATS: Mapping[str, Callable[[list[str]], str]] = {
    "in capitals": lambda letters: " ".join(letters).upper(),
    "in brackets": lambda letters: f"[{' '.join(letters)}]",
    "twice": lambda letters: " ".join(letters + letters),
    "with commas": lambda letters: ", ".join(letters),
    "with dashes": lambda letters: "-".join(letters),
}
"""Instruction to what must be written for some letters."""

POSITIONS = ("first", "second", "third", "fourth", "last")


class Sort(MicroTask):
    """Four different letters to be put in alphabetical order. A set of letters is in one split, in any order."""

    card = micro_card(
        "micro-sort",
        "Sorting letters",
        Role.RETENTION,
        1 / 24,
        "Put four different letters in alphabetical order, separated by spaces; chance is a random order.",
    )
    sizes: ClassVar[Mapping[Split, int]] = {"train": 8000, "validation": 256, "test": 256}

    def candidates(self) -> Iterator[Candidate]:
        """Yield random sets of letters in random order, without end."""
        rng = stream(self.card.name)
        while True:
            letters = draw(rng, ascii_lowercase, 4)
            answer = " ".join(sorted(letters))
            yield Candidate(f"Sort the letters: {' '.join(letters)}", answer, key=answer)


class Position(MicroTask):
    """The letter at a named position of five. A sequence of letters is in one split, whatever is asked of it."""

    card = micro_card(
        "micro-position",
        "Letter at a position",
        Role.RETENTION,
        1 / 5,
        "Name the first, second, third, fourth or last of five letters; chance is one of the five letters.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random letters and positions, without end."""
        rng = stream(self.card.name)
        while True:
            letters = draw(rng, ascii_lowercase, 5)
            place = pick(rng, range(5))
            shown = " ".join(letters)
            yield Candidate(f"Give the {POSITIONS[place]} of the letters: {shown}", letters[place], key=shown)


class Format(MicroTask):
    """Three letters to be written as an instruction says. A sequence of letters is in one split, in every format."""

    card = micro_card(
        "micro-format",
        "Following a format instruction",
        Role.RETENTION,
        1 / 5,
        "Write three letters in capitals, in brackets, twice, with commas or with dashes; chance is a random format.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield random letters and instructions, without end."""
        rng = stream(self.card.name)
        names = tuple(FORMATS)
        while True:
            letters = draw(rng, ascii_lowercase, 3)
            name = pick(rng, names)
            shown = " ".join(letters)
            yield Candidate(f"Write the letters {name}: {shown}", FORMATS[name](letters), key=shown)
