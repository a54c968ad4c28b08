"""From a mapping somebody wrote to a frozen config; every problem becomes one readable line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from peft_arena.core.errors import UserError

M = TypeVar("M", bound=BaseModel)
Locate = Callable[[tuple[str | int, ...]], str]
"""From a path of keys inside the mapping to the place it was written, for example ``study.yaml line 7``."""


def build(kind: type[M], table: Mapping[str, Any], where: str = "", locate: Locate | None = None) -> M:
    """Validate a mapping into a config.

    Args:
        kind: the pydantic model to build.
        table: what the user wrote.
        where: name of the mapping in messages, for example ``method lora``.
        locate: gives the place of a key, where the mapping came from a file.

    Raises:
        UserError: unknown key, wrong type or forbidden value; all problems, joined by ``; ``.
    """
    try:
        return kind.model_validate(dict(table))
    except ValidationError as error:
        problems = [_explain(kind, problem, where, locate) for problem in error.errors(include_url=False)]
        raise UserError("; ".join(problems)) from None


def _explain(kind: type[BaseModel], problem: Any, where: str, locate: Locate | None) -> str:
    path: tuple[str | int, ...] = problem["loc"]
    dotted = ".".join(str(part) for part in path)
    place = locate(path) if locate is not None else ""
    suffix = f" (in {' '.join(part for part in (where, place) if part)})" if where or place else ""
    if problem["type"] == "extra_forbidden":
        allowed = _fields_at(kind, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), allowed, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"unknown key '{dotted}'{suffix}.{hint} Known: {', '.join(sorted(allowed)) or 'none'}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"'{dotted}' is required{suffix}"
    given = "" if problem["type"] == "value_error" and not path else f", got {problem['input']!r}"
    return f"{dotted or 'value'}: {message[:1].lower()}{message[1:]}{given if len(given) < 200 else ''}{suffix}"


def _fields_at(kind: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    current: Any = kind
    for part in path:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return []
        if isinstance(part, int) or part not in current.model_fields:
            continue
        current = _model_inside(current.model_fields[part].annotation)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return [field.alias or name for name, field in current.model_fields.items()]
    return []


def _model_inside(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _model_inside(part)
        if found is not None:
            return found
    return None
