"""The command that measures what using a point costs. Argument parsing, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("runs")


def cost(
    point: Annotated[str, typer.Argument(metavar="POINT", help="RUN, RUN@STEP, or a model name for the base model.")],
    runs: Annotated[Path, typer.Option("--runs", help="Runs directory.", envvar="PEFT_ARENA_RUNS")] = RUNS,
    prompt_lengths: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = "16,128,512",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after each.")] = 32,
    repeats: Annotated[int, typer.Option(min=2, help="Counted generations of each model at each length.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for a model name.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")] = False,
) -> None:
    """Measure what using a point costs: FLOPs, parameters, bytes, and generation times, unmerged and merged."""
    from peft_arena.cli import console
    from peft_arena.commands.cost_command import cost_summary, lengths_of, measure_cost, size_rows, time_rows

    settings = {
        "prompt_lengths": lengths_of(prompt_lengths),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "batch_size": batch_size,
    }
    with console.bar("cost", quiet=as_json) as progress:
        record = measure_cost(point, runs, settings, dtype=dtype, progress=progress)
    if as_json:
        console.show_json(cost_summary(record))
        return
    console.show_table(size_rows(record), False, title=f"{record.run_id}, step {record.step}")
    machine = f"{record.settings['device']}, threads {record.settings['threads'] or 'none'}"
    console.show_table(time_rows(record), False, title=f"generation: medians, {machine}")
