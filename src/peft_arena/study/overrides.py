"""The option ``--set``: one key of a study file gets another value before the file is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.core.yamlfile import parse_scalar


def override(data: dict[str, Any], text: str, parse: Callable[[str], Any] = parse_scalar) -> None:
    """Put a value into the content of a study file.

    Args:
        data: the content, which is changed.
        text: ``key.path=value``; positions in lists are counted from 0.
        parse: makes the value of its text.

    Raises:
        UserError: no value, a position that a list does not have, or a key inside a single value.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value, got '{text}'")
    current: Any = data
    parts = key.split(".")
    for part in parts[:-1]:
        current = _inside(current, part, text, make=True)
    last = parts[-1]
    if isinstance(current, list):
        _inside(current, last, text, make=False)
        current[int(last)] = parse(value)
    elif isinstance(current, dict):
        current[last] = parse(value)
    else:
        raise UserError(f"--set {text}: '{'.'.join(parts[:-1])}' is a single value and has no keys")


def _inside(current: Any, part: str, text: str, make: bool) -> Any:
    if isinstance(current, list):
        if not part.isdigit() or int(part) >= len(current):
            raise UserError(f"--set {text}: '{part}' is no position in a list of {len(current)} (from 0)")
        return current[int(part)]
    if isinstance(current, dict):
        return current.setdefault(part, {}) if make else current[part]
    raise UserError(f"--set {text}: '{part}' is inside a single value")
