"""Calls into libraries that read what somebody else wrote: whatever they raise becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft_arena.core.errors import UserError, first_line
from peft_arena.core.text import one_line, shown


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what a library raises about a file into a user error, panics of libraries written in Rust among it.

    Args:
        what: cannot be done, for example ``cannot load model 'x' from path y``; begins the message.

    Raises:
        UserError: the library raised; one of ours is passed on as it is.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # a panic is no Exception, and its class cannot be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {shown(one_line(first_line(error)), 500)}") from error
