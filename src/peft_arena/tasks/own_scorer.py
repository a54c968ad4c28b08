"""A scorer of the user's own: a function in a Python file, named as ``my.py:function``.

Naming the file is asking for it: its code runs in every command that reads the study or scores by it, in the same
process. Nothing else names one. The file stands alone: it may import installed packages, not files beside it, so that
its text is all of it.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from copy import deepcopy
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, NamedTuple

from peft_arena.core.bounded import user_path
from peft_arena.core.errors import UserError, first_line, unknown
from peft_arena.tasks.base import Score
from peft_arena.tasks.data_files import short

_NAME = re.compile(r"(?P<path>.+\.py):(?P<function>[A-Za-z_][A-Za-z0-9_]*)")


def is_own(scorer: str) -> bool:
    """Say whether the name of a scorer is a file and a function."""
    return _NAME.fullmatch(scorer) is not None


class OwnScorer(NamedTuple):
    """A function of the user's own: from answer and row to a score."""

    name: str
    """As the user wrote it."""
    sha256: str
    """Of the file's text: other text is another scorer."""
    function: Callable[[str, Mapping[str, Any]], object]

    def score(self, answer: str, row: Mapping[str, Any], place: str) -> Score:
        """Judge an answer: True or 1 is right, False or 0 wrong, numbers between in part, None not scored.

        What the function raises, or gives besides these, is an unscored answer whose reason names the row.

        Args:
            answer: what the model wrote.
            row: the user's row, with every column.
            place: file and row, for the reason.
        """
        try:
            with redirect_stdout(sys.stderr):
                found = self.function(answer, deepcopy(dict(row)))
            value = None if found is None or isinstance(found, str | bytes) else float(found)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the user's code raises anything; the other items go on
            return Score(None, reason=f"{self.name} raised {_told(error)}{_line(error, self.name)} ({place})")
        if found is None:
            return Score(None, reason=f"{self.name} gave no score ({place})")
        if value is None or not 0.0 <= value <= 1.0:
            given = f"{short(repr(found))}: True, False, None or a number from 0 to 1 is allowed"
            return Score(None, reason=f"{self.name} gave {given} ({place})")
        return Score(value, extracted=answer.strip())


def own_scorer(name: str) -> OwnScorer:
    """Load the function that a name says.

    Raises:
        UserError: there is no such file or function, the file cannot be run, or the function does not take two
            arguments.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(f"a scorer of your own is named FILE.py:FUNCTION, got '{name}'")
    path = user_path(found["path"])
    if not path.is_file():
        raise UserError(f"scorer '{name}': no file {path}{'' if path.is_absolute() else f' in {Path.cwd()}'}")
    return _loaded(name, str(path.resolve()), found["function"], path.read_bytes())


@lru_cache(maxsize=16)
def _loaded(name: str, path: str, function: str, code: bytes) -> OwnScorer:
    sha256 = hashlib.sha256(code).hexdigest()
    module_name = f"peft_arena_scorer_{sha256[:16]}"
    spec = spec_from_loader(module_name, loader=None, origin=path)
    assert spec is not None, "a spec without a loader can always be made"
    module = module_from_spec(spec)
    module.__file__ = path
    sys.modules[module_name] = module  # data classes of the file look their module up
    try:
        with redirect_stdout(sys.stderr):
            exec(compile(code, path, "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[module_name]
        raise UserError(f"scorer '{name}': the file cannot be run: {_told(error)}{_line(error, name)}") from error
    functions = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
    if function not in functions:
        raise unknown("function", function, functions, where=f"scorer {name}")
    judge = getattr(module, function)
    try:
        inspect.signature(judge).bind("answer", {})
    except TypeError as error:
        raise UserError(f"scorer '{name}' must take an answer and a row") from error
    return OwnScorer(name, sha256, judge)


def _told(error: BaseException) -> str:
    """Return type and first line of an error, which may fail to say what it is."""
    try:
        said = first_line(error)
    except BaseException:  # noqa: BLE001 - the user's own exception class
        said = "it cannot be shown"
    return f"{type(error).__name__}: {short(said)}"


def _line(error: BaseException, name: str) -> str:
    """Return where in the user's file an error was raised."""
    file = Path(name.partition(".py:")[0] + ".py").name
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == file]
    if frames:
        return f" in line {frames[-1].lineno}"
    return f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
