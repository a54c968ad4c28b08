"""Reading a record, with every doubt raised as a user error."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from peft_arena.core.errors import UserError
from peft_arena.store.files import read_json
from peft_arena.store.records import Record

R = TypeVar("R", bound=Record)


def read_record(kind: type[R], path: Path) -> R:
    """Read one record.

    Raises:
        UserError: the file is missing, damaged or of another schema.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is not a {kind.__name__} of schema 1: {place}: {first['msg']}") from None
