"""What is wrong with a text before anything reads it."""

from __future__ import annotations

import re

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
