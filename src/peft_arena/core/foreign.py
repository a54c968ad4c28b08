"""Calls into libraries that read what somebody else wrote: whatever they raise becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft_arena.core.errors import UserError, first_line, is_of_machine
from peft_arena.core.text import one_line, shown

LONGEST = 500
"""Characters of a library's words that are shown."""
_BARE = (LookupError, AttributeError)
"""Errors whose text is a name and says little without their type."""


def words_of(error: BaseException) -> str:
    """Return what a library says in an error, as one line of bounded length that can be printed."""
    text = first_line(error)
    return shown(one_line(f"{type(error).__name__}: {text}" if isinstance(error, _BARE) else text), LONGEST)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what a library raises about a file into a user error, panics of libraries written in Rust among it.

    What the machine refuses (memory, disk, open files) says nothing of the file and is passed on.

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
        if is_of_machine(error):
            raise
        # a panic is no Exception, and its class cannot be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {words_of(error)}") from error
