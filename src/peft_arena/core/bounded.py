"""Reading files that somebody else wrote: nothing here waits for ever, fills the memory, or ends in a traceback.

A path may name a device, a pipe or an endless file, and a file may hold anything. What is read is a regular file of
bounded size; what is wrong with it is one line.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.core.text import shown

MIB = 1 << 20
SETTINGS_BYTES = 64 * MIB
"""Most bytes of a JSON file with settings; tokenizers' tables are the longest of them."""
RECORD_BYTES = 512 * MIB
"""Most bytes of a record of ours."""
DATA_BYTES = 4096 * MIB
"""Most bytes of a file of data."""
WEIGHTS_BYTES = 256 * 1024 * MIB
"""Most bytes of a file of weights."""
DEEPEST = 100
"""Most levels of lists and objects inside each other in a file of settings."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4000
_DIGITS = 40
"""Most digits of a whole number: tokenizers state lengths of 31."""
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def present(path: Path) -> bool:
    """Say whether anything has this name, be it a link that leads nowhere; a name that nothing can have has nothing.

    Raises:
        UserError: the place cannot be looked at.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        raise UserError(f"cannot look at {shown(path)}: {error.strerror or error}") from None
    return True


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file to read bytes; a link is followed.

    Raises:
        UserError: nothing is there, it is not a regular file, or it cannot be read, also while it is open.
    """
    try:
        # a pipe without a writer would be waited for
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(_regular(descriptor, path), "rb") as handle:
            yield handle
    except FileNotFoundError:
        raise UserError(f"no file {shown(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}") from None


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: of the file; a link is followed.
        limit: most bytes.

    Raises:
        UserError: nothing is there, it is not a regular file, it is longer, or it cannot be read.
    """
    with opened(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        content = b"" if size > limit else _read(handle, limit)
    if size > limit or len(content) > limit:
        held = f"holds {size} bytes" if size > limit else "has no end"
        raise UserError(f"cannot read {shown(path)}: it {held}, and at most {limit} are read")
    return content


def _read(handle: BufferedReader, limit: int) -> bytes:
    """Return what is left of a file, at most one byte more than the limit."""
    parts: list[bytes] = []
    room = limit + 1
    while room > 0 and (part := handle.read(min(room, MIB))):  # a large request would take its memory at once
        parts.append(part)
        room -= len(part)
    return b"".join(parts)


def _regular(descriptor: int, path: Path) -> int:
    """Return the descriptor; close it where it is of no regular file.

    Raises:
        UserError: it is of something else.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = next((name for fits, name in _KINDS if fits(mode)), "no regular file")
    raise UserError(f"{shown(path)} is {kind}, not a file")


def read_text(path: Path, limit: int, *, mark: bool = False) -> str:
    """Return the text of a UTF-8 file.

    Args:
        path: of the file.
        limit: most bytes.
        mark: take away the mark of byte order that some programs write in front.

    Raises:
        UserError: as :func:`read_bytes`, or it is no UTF-8 text.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig" if mark else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)} is not UTF-8 text: byte {error.start} cannot be read") from None


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Return what JSON text holds.

    Args:
        text: the text.
        finite: refuse NaN and infinity, which are not JSON and which Python's reader lets through.

    Raises:
        ValueError: it is no JSON, nested too deep, states a key of an object twice, or holds a number out of all
            bounds; the message is one line.
    """
    given: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite_float} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_once, parse_int=_whole, **given)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path, limit: int = SETTINGS_BYTES, deepest: int = DEEPEST) -> Any:
    """Return what a JSON file of settings holds.

    Raises:
        UserError: as :func:`read_text`, it is no JSON, or nested too deep.
    """
    try:
        found = parse_json(read_text(path, limit), finite=False)  # models state infinite limits
    except ValueError as error:
        raise UserError(f"{shown(path)} is damaged: it is not JSON: {error}") from None
    if deeper(found, deepest):
        raise UserError(f"{shown(path)} is damaged: lists and objects are nested more than {deepest} deep")
    return found


def read_table(path: Path, limit: int = SETTINGS_BYTES) -> dict[str, Any]:
    """Return the object that a JSON file of settings holds.

    Raises:
        UserError: as :func:`read_json`, or it holds something else.
    """
    found = read_json(path, limit)
    if not isinstance(found, dict):
        raise UserError(f"{shown(path)} is damaged: it must hold an object of keys and values, got {_named(found)}")
    return found


def deeper(value: Any, limit: int) -> bool:
    """Say whether lists and objects are nested more than so many deep."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for held in level
            if isinstance(held, dict | list)
            for child in (held.values() if isinstance(held, dict) else held)
        ]
        if not level:
            return False
    return any(isinstance(held, dict | list) for held in level)


def _named(value: object) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a single value")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key '{shown(twice)}' is stated twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number that JSON has")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits is too large")
    return int(text)


def user_path(text: str | Path) -> Path:
    """Return the path that a user wrote, ``~`` for the home directory.

    Raises:
        UserError: no file can have this name: it is too long, holds a null character, or names nobody's home.
    """
    name = str(text)
    parts = name.encode("utf-8", "surrogatepass").split(b"/")
    if "\0" in name or len(name) > _LONGEST_PATH or max(map(len, parts)) > _LONGEST_NAME:
        raise UserError(
            f"'{shown(name)}' cannot be the name of a file: at most {_LONGEST_NAME} bytes between slashes and "
            f"{_LONGEST_PATH} in all, none of them null"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"'{shown(name)}' cannot be the name of a file: {error}") from None
