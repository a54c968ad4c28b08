"""How a command ends when it does not end well: one line on standard error, and a code."""

from __future__ import annotations

import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from peft_arena.core.ending import Ended, ended_by_signals, open_standard_streams, silence_leaks
from peft_arena.core.errors import UserError, first_line, refused_by_machine
from peft_arena.core.text import one_line, shown


class Commands(TyperGroup):
    """Keeps typer from ending a command with no word, or with "Aborted." alone."""

    def invoke(self, ctx: Any) -> Any:
        """Call the command.

        Raises:
            Ended: it was interrupted.
            UserError: something that it read ended too early.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Ended(signal.SIGINT) from None
        except EOFError as error:
            raise UserError(f"something ended before all of it was read: {first_line(error)}") from error


def guarded(app: Callable[[], object]) -> None:
    """Run a command line.

    Exit code 2: a wrong request; 1: the machine refused something, or what no one foresaw, whose traceback is kept in a
    file to be reported; 128 and its number: a signal.
    """
    open_standard_streams()
    silence_leaks()
    try:
        with ended_by_signals():
            app()
    except UserError as error:
        _end(2, str(error))
    except Ended as ended:
        _end(int(ended.code or 0), f"{ended}; what is finished is kept, and the same command goes on from there")
    except (OSError, MemoryError) as error:
        _end(1, refused_by_machine(error))
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the last net: libraries written in Rust raise no Exception
        kind = type(error).__name__
        _end(1, f"this is a bug: {kind}: {shown(first_line(error))}; please report {_kept_traceback()}")


def _kept_traceback() -> str:
    """Write the traceback of the exception that is being handled into a file, and return the file's name."""
    with tempfile.NamedTemporaryFile("w", prefix="peft-arena-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(traceback.format_exc().encode("utf-8", "backslashreplace").decode())
    return file.name


def _end(code: int, text: str) -> NoReturn:
    with suppress(OSError):  # nobody may be left to read it
        typer.echo(f"peft-arena: {one_line(text)}", err=True)
    raise SystemExit(code) from None
