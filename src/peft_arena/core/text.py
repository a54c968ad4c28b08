"""What is wrong with a text before anything reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable

_HALF = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> int | None:
    """Return the place, from 0, of the first lone surrogate: half of a character that a cut export left.

    None without one. JSON can write it and UTF-8 cannot, so no tokenizer and no file takes it.
    """
    if text.isascii():
        return None
    found = _HALF.search(text)
    return None if found is None else found.start()


def half_words(text: str, place: int) -> str:
    """Say which half of a character stands at a place, counted from 1 for readers."""
    return f"U+{ord(text[place]):04X} at character {place + 1}"


_LONGEST = 200


def shown(value: object, longest: int = _LONGEST) -> str:
    """Return a name or a value for a message: one line of bounded length that can be printed.

    Args:
        value: what was given; a path may hold bytes that are no text, and a name any character.
        longest: most characters; the rest is counted.
    """
    text = str(value)
    if len(text) > longest:
        text = f"{text[: longest // 2]}... ({len(text)} characters)"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def few(names: Iterable[str], most: int = 3) -> str:
    """Return the first of some names for a message, and how many more there are.

    Args:
        names: in the order to be shown.
        most: of them that are shown.
    """
    every = list(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest


def one_line(text: str) -> str:
    """Return a message as one line that can be printed: line feeds are spaces, half characters are written out."""
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
