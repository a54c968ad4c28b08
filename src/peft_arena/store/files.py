"""Writing files so that a reader sees all of one or nothing, and one that is refused is never replaced."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.core.parts import unfinished


def write_once(path: Path, value: Any) -> None:
    """Write a JSON file that must not exist yet; a crash or a full disk leaves nothing behind.

    Raises:
        FileExistsError: the file exists; nothing is ever replaced.
        UserError: the disk refused the write; the message names the file and the reason.
    """
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path) as part:
            with part.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.link(part, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was written") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, truncated or not JSON; the message says where it breaks.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is damaged: not UTF-8 text at byte {error.start}; move it away to have it made anew"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is damaged: {error.msg} at line {error.lineno}; move it away to have it made anew"
        ) from None


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line to a log that several processes may write; after a line cut short it starts a new one.

    Raises:
        UserError: the disk refused the write.
    """
    line = (json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_RDWR, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            whole = b"\n" + line if cut else line
            written = os.write(descriptor, whole)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"cannot append to {path}: {error.strerror or error}") from error
    if written < len(whole):
        raise UserError(
            f"cannot append to {path}: only {written} of {len(whole)} bytes were written; is the disk full?"
        )


def read_lines(path: Path) -> list[Any]:
    """Read a JSON-lines log; a line cut short by a crash is left out."""
    if not path.exists():
        return []
    values = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return values
