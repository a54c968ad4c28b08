"""Reading a record, with every doubt raised as a user error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from peft_arena.core.errors import UserError, first_problem
from peft_arena.core.text import half_character, shown
from peft_arena.store.files import parsed_json
from peft_arena.store.records import SCHEMA, Record
from peft_arena.store.sound import doubt

R = TypeVar("R", bound=Record)
WRITTEN = frozenset(["answer", "extracted", "output", "outputs", "prompt", "reason", "text"])
"""Fields of what models and users wrote, where half of a character may stand; pydantic's reader of JSON takes none."""


def read_record(kind: type[R], path: Path) -> R:
    """Read one record: the only way from a file to the numbers in it.

    Raises:
        UserError: the file is missing, no regular file, too long, damaged, of another schema or kind, or says what
            cannot be; the message names the file, the field and what is allowed.
    """
    content, found = parsed_json(path)
    try:
        halves = _halves(found) if b"\\ud" in content.lower() else []
        if wrong := next((place for place in halves if not WRITTEN & set(place.split("."))), ""):
            raise UserError(f"{shown(path)} is damaged: {shown(wrong)} holds half of a character")
        if halves:
            record = kind.model_validate(_tuples(found), strict=True)
        else:
            record = kind.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise UserError(
            f"{shown(path)} is not a {kind.__name__} of schema {SCHEMA}: {first_problem(error)}{_newer(found)}"
        ) from None
    if why := doubt(record):
        raise UserError(f"{shown(path)} contradicts itself: {why}; move it away to have it made anew")
    return record


def _halves(value: Any, place: str = "") -> list[str]:
    """Return the places of all texts with half of a character, which only a model writes."""
    if isinstance(value, str):
        return [] if half_character(value) is None else [place]
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [one for key, held in pairs for one in _halves(held, f"{place}.{key}" if place else str(key))]
    keys = [key for key in value if half_character(key) is not None] if isinstance(value, dict) else []
    return [*found, *(f"{place}.{key}" for key in keys)]


def _tuples(value: Any) -> Any:
    """Return a JSON value with tuples for lists, which pydantic's strict reader wants of Python values."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(held) for key, held in value.items()} if isinstance(value, dict) else value


def _newer(found: Any) -> str:
    """Say that a newer version wrote a record, if it says so itself."""
    version = found.get("schema_version", SCHEMA) if isinstance(found, dict) else SCHEMA
    newer = isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA
    return "; a newer peft-arena wrote it" if newer else ""
