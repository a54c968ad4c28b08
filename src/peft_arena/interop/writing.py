"""Writing what an import makes: a file that must not exist yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_arena.core.errors import UserError


def write_new(path: Path, text: str) -> None:
    """Write a text file that must not exist yet.

    Raises:
        UserError: it exists, or the disk refused.
    """
    try:
        with path.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists; nothing is ever replaced") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def json_text(value: Any) -> str:
    """Return JSON as our files have it: keys in order, one space of indent."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
