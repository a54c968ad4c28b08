"""What settings may hold: plain values of bounded size, whoever wrote them and in whatever form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import date, datetime
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.core.text import half_character, shown

KeyPath = tuple[str | int, ...]
DEEPEST = 30
"""Most levels of lists and mappings inside each other."""
MOST = 100_000
"""Most values of one file, each counted as often as an alias repeats it."""
LARGEST = 2**63 - 1
_LONGEST_TEXT = 1_000_000


def check_plain(table: Mapping[str, Any], locate: Callable[[KeyPath], str] | None = None) -> None:
    """Refuse settings that no config can hold: they would be a traceback wherever they are first used.

    Args:
        table: the settings.
        locate: gives the place of a key, where they are from a file.

    Raises:
        UserError: a number that is not finite or has more than 64 bits, a text with half of a character or a null
            character, another type than null, truth value, number, text, date, list and mapping, or too many values.
    """
    waiting: list[tuple[KeyPath, Any]] = [((), table)]
    count = 0
    while waiting:
        path, value = waiting.pop()
        count += 1
        wrong = _wrong(value) or ("lists and mappings are nested too deep" if len(path) > DEEPEST else "")
        if wrong or count > MOST:
            wrong = wrong or f"there are more than {MOST:,} values"
            place = "" if locate is None else f" (in {locate(path)})"
            dotted = shown(".".join(str(part) for part in path))
            raise UserError(f"{dotted + ': ' if dotted else ''}{wrong}{place}")
        if isinstance(value, Mapping):
            waiting += [((*path, str(key)), held) for key, held in reversed(list(value.items()))]
            waiting += [((*path, shown(key)), key) for key in value if not isinstance(key, str) or _wrong(key)]
        elif isinstance(value, list | tuple):
            waiting += [((*path, place), held) for place, held in reversed(list(enumerate(value)))]


def _wrong(value: object) -> str:
    """Say what is wrong with one value; empty if nothing is."""
    if value is None or isinstance(value, bool | Mapping | list | tuple):
        return ""
    if isinstance(value, int):
        bits = value.bit_length()
        return "" if abs(value) <= LARGEST else f"must be a number of at most 64 bits, got one of {bits} bits"
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"must be a finite number, got {value}"
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            return f"must be a text of at most {_LONGEST_TEXT:,} characters, got {len(value):,}"
        if "\0" in value:
            return f"must be a text without null characters, got '{shown(value)}'"
        half = half_character(value)
        return "" if half is None else f"must be a text of whole characters, got '{shown(value)}'"
    if isinstance(value, date) and not isinstance(value, datetime):
        return ""
    return f"must be a number, a text, a list or a mapping, got {type(value).__name__}"
