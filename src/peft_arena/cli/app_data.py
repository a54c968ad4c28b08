"""The command that looks at a file of the user's own. Argument parsing, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_arena.core.errors import UserError


def data(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .csv, .json, .jsonl or .parquet file.")],
    model: Annotated[str | None, typer.Option(help="Count lengths in this model's tokens, not in characters.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Try the answers with this scorer; FILE.py:FUNCTION for your own.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="What columns hold: prompt=question,response=reply; recognised if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")] = False,
) -> None:
    """Look at a file of your own: form, lengths, duplicates, what would be refused, and the task to paste."""
    from peft_arena.cli import console, console_data
    from peft_arena.commands.data_command import look_at

    with console.bar("data", quiet=as_json) as progress:
        found = look_at(file, model, scorer, columns_of(columns), tell=progress)
    if as_json:
        console.show_json(found.summary())
    else:
        console_data.show_data(found)


def columns_of(text: str | None) -> dict[str, str] | None:
    """Return what an option says of columns: use to column; None where it says nothing.

    Raises:
        UserError: it is no list of USE=COLUMN.
    """
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or not all(use.strip() and equals and column.strip() for use, equals, column in pairs):
        raise UserError(f"--columns takes USE=COLUMN,..., for example prompt=question,response=reply; got '{text}'")
    return {use.strip(): column.strip() for use, _, column in pairs}
