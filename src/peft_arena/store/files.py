"""Writing files so that a reader sees all of one or nothing, and one that is refused is never replaced."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from peft_arena.core.bounded import RECORD_BYTES, parse_json, present, read_bytes
from peft_arena.core.errors import UserError
from peft_arena.core.parts import unfinished
from peft_arena.core.text import shown


def write_once(path: Path, value: Any) -> None:
    """Write a JSON file that must not exist yet; a crash or a full disk leaves nothing behind.

    Raises:
        FileExistsError: the file exists; nothing is ever replaced.
        UserError: the disk refused the write; the message names the file and the reason.
    """
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    if len(text) > RECORD_BYTES // 4 and len(text.encode()) > RECORD_BYTES:
        raise UserError(f"cannot write {path}: it would hold more than {RECORD_BYTES} bytes; ask for fewer items")
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
        UserError: the file is missing, no regular file, too long, truncated or not JSON (NaN and infinity are not); the
            message says where it breaks.
    """
    return parsed_json(path)[1]


def parsed_json(path: Path) -> tuple[bytes, Any]:
    """Read a JSON file; return its bytes and what they hold.

    Raises:
        UserError: as :func:`read_json`.
    """
    content = read_bytes(path, RECORD_BYTES)
    try:
        return content, parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        why = f"not UTF-8 text at byte {error.start}"
    except json.JSONDecodeError as error:
        why = f"{error.msg} at line {error.lineno}"
    except ValueError as error:
        why = str(error)
    raise UserError(f"{shown(path)} is damaged: {why}; move it away to have it made anew")


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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines log; a line cut short by a crash, or that holds no object, is left out.

    Raises:
        UserError: something else than a file has its name, or it is too long.
    """
    if not present(path):
        return []
    values = []
    for line in read_bytes(path, RECORD_BYTES).split(b"\n"):
        with contextlib.suppress(ValueError):
            value = parse_json(line.decode("utf-8"))
            if isinstance(value, dict):
                values.append(value)
    return values


def broken_lines(path: Path) -> list[int]:
    """Return the numbers of the lines of a JSON-lines log that hold no object and were not cut short by a crash.

    A writer that is killed leaves the beginning of an object, after which the next one starts a new line.

    Raises:
        UserError: as :func:`read_lines`.
    """
    if not present(path):
        return []
    lines = enumerate(read_bytes(path, RECORD_BYTES).split(b"\n"), start=1)
    return [number for number, line in lines if line.strip() and not _is_object(line) and not _is_cut(line)]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line.decode("utf-8")), dict)
    except ValueError:
        return False


def _is_cut(line: bytes) -> bool:
    """Say whether a line may be the beginning of an object."""
    ended = line.rstrip().endswith(b"}") and line.count(b"}") >= line.count(b"{")
    return line.startswith(b"{") and line[1:2] in (b"", b'"') and not ended
