"""The boundary to the libraries: what they refuse in their own words becomes one line to the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.core.foreign import words_of

LIBRARY = (ValueError, RuntimeError, LookupError, TypeError, AttributeError)
"""How peft, transformers and torch refuse."""


def is_refusal(error: BaseException) -> bool:
    """Say whether a library refused with an error, rather than memory running out or our own code failing."""
    return isinstance(error, LIBRARY) and type(error).__name__ != "OutOfMemoryError"


@contextmanager
def one_line(method: str, doing: str, model: object) -> Iterator[None]:
    """Turn a library's refusal inside the block into a user's error; its cause is kept.

    Running out of memory and errors of other kinds pass: unlike a reader of files
    (:func:`peft_arena.core.foreign.reading`), the block runs code of ours too, whose bugs are to be seen.

    Args:
        method: the method's name.
        doing: what is done to the model, after "cannot be", for example ``attached to``.
        model: the model; its type is named.

    Raises:
        UserError: METHOD cannot be DOING MODEL TYPE: what the library says.
    """
    try:
        yield
    except LIBRARY as error:
        if not is_refusal(error):
            raise
        raise UserError(f"{method} cannot be {doing} {type_of(model)}: {words_of(error)}") from error


def type_of(model: object) -> str:
    """Return a model's type by its configuration, or the name of its class."""
    config: Any = getattr(model, "config", None)
    return str(getattr(config, "model_type", None) or type(model).__name__)


def guard(kind: type, names: dict[str, str], of: Callable[[Any, tuple[Any, ...]], tuple[str, object]]) -> None:
    """Put :func:`one_line` around methods that a class defines.

    Args:
        kind: the class.
        names: methods, and what each does.
        of: gives the fine-tuning method's name and the model from the object and the arguments of a call.
    """
    for name, doing in names.items():
        if name in kind.__dict__:
            setattr(kind, name, _guarded(kind.__dict__[name], doing, of))


def _guarded(function: Any, doing: str, of: Callable[[Any, tuple[Any, ...]], tuple[str, object]]) -> Any:
    @wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        method, model = of(self, args or tuple(kwargs.values()))
        with one_line(method, doing, model):
            return function(self, *args, **kwargs)

    return call
