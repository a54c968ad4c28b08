"""Commands that read what other benchmarks ran and found, and write our records in their form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_arena.core.errors import UserError

import_app = typer.Typer(
    help="Read experiments and results of the PEFT library's method comparison.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Runs = Annotated[Path, typer.Option("--runs", help="Runs directory.", envvar="PEFT_ARENA_RUNS")]
RUNS = Path("runs")


@import_app.command("hf-experiment")
def hf_experiment(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="One experiment, or a directory above many.")],
    out: Annotated[Path | None, typer.Option(help="Study file to write; none is written if absent.")] = None,
    name: Annotated[str, typer.Option(help="Name of the study.")] = "hf-experiments",
    as_json: Json = False,
) -> None:
    """Turn experiments into a study file; what cannot run here as it stands is refused, with the reason."""
    from peft_arena.cli import console
    from peft_arena.interop.experiments import import_experiments
    from peft_arena.interop.writing import write_new

    found = import_experiments(directory, name)
    if out is not None and found.text:
        write_new(out, found.text)
    rows = [one.row for one in found.experiments]
    if as_json:
        console.show_json({"study": str(out) if out is not None and found.text else None, "experiments": rows})
    else:
        brief = [{key: row[key] for key in ("experiment", "state", "method", "why")} for row in rows]
        console.show_table(brief, as_json, title=f"{len(found.planned)} of {len(rows)} experiments run here")
    if not found.text:
        raise UserError(f"every experiment in {directory} is refused: no study file")


@import_app.command("hf-results")
def hf_results(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Result files, or directories with them.")],
    out: Annotated[Path | None, typer.Option(help="File of published tables to write.")] = None,
    as_json: Json = False,
) -> None:
    """Read result files into tables of published numbers; runs that failed keep their status and have none."""
    from peft_arena.cli import console
    from peft_arena.interop.results import import_results
    from peft_arena.interop.writing import json_text, write_new

    found = import_results(paths)
    if out is not None:
        write_new(out, json_text(found.model_dump(mode="json")))
    if as_json:
        console.show_json(found.model_dump(mode="json"))
        return
    for table in found.tables:
        rows = [{"run": row.label, "status": row.status, **row.values} for row in table.rows]
        console.show_table(rows, as_json, title=f"{table.id}: {table.title}")


def export_hf(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run id, its beginning or its hash.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Write a run's record in the form of the PEFT library's result files; what was not measured is null."""
    from peft_arena.cli import console
    from peft_arena.interop.export_results import export_hf as write

    found = write(run, runs, out)
    console.show_value({"written": str(out), "notes": list(found.notes)}, as_json)
