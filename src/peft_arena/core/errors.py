"""The one exception type for mistakes a user can mend."""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.text import one_line, shown

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """A wrong request: shown as one line, without a traceback, and ends the command with exit code 2."""


class UnknownNameError(UserError):
    """A name that is not in a closed set; ``kind`` says of what, for example ``method`` or ``split``."""

    def __init__(self, message: str, kind: str) -> None:
        """Keep what kind of name it is beside the message."""
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str]]:
        """Pass the error between processes whole."""
        return type(self), (str(self), self.kind)


def unknown(kind: str, given: str, allowed: Iterable[str], where: str = "") -> UnknownNameError:
    """Build the error for a name that is not in a closed set, with the nearest known name.

    Args:
        kind: what was looked up, for example ``method``.
        given: the name the user wrote.
        allowed: every name that would have been accepted.
        where: file and line, or the option, the name was read from.
    """
    names = sorted(allowed)
    place = f" (in {where})" if where else ""
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    near.sort(key=lambda name: sorted(name) != sorted(given))  # swapped letters are the likeliest mistake
    hint = f" Did you mean '{near[0]}'?" if near else ""
    known = ", ".join(names) if names else "none"
    return UnknownNameError(f"unknown {kind} '{given}'{place}.{hint} Known: {known}", kind)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type; the second too where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def first_problem(error: ValidationError, within: str = "") -> str:
    """Return the first problem that pydantic found as one line: the field, what is allowed there, what was given.

    Args:
        error: what pydantic raised.
        within: the field whose value was validated; empty: the whole of what is named elsewhere.
    """
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, [within, *problem["loc"]] if within else problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    scalar = isinstance(given, str | int | float) or given is None
    got = f", got {shown(repr(given), 60)}" if scalar and problem["type"] != "missing" else ""
    return one_line(f"{shown(place)}: {message}{got}" if place else f"{message}{got}")


_OF_THE_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
)


def is_of_machine(error: BaseException) -> bool:
    """Say whether an error is of the machine's state now (memory, disk, open files) and not of what was asked."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE)


def refused_by_machine(error: OSError | MemoryError) -> str:
    """Say in one line what the machine refused, of which file, and where in our code that was met."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if "peft_arena" in Path(frame.filename).parts:
            where = f" (at {Path(frame.filename).name}:{frame.lineno})"
    if isinstance(error, MemoryError):
        return f"out of memory{where}"
    what = f": {shown(error.filename)}" if error.filename is not None else ""
    return f"{error.strerror or first_line(error)}{what}{where}"
