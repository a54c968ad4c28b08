"""Commands that move and write weights: paths, merging, export. Argument parsing, and nothing else."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

path_app = typer.Typer(
    help="Go back from a tuned model towards the pretrained one, to a point that forgets less.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Runs = Annotated[Path, typer.Option("--runs", help="Runs directory.", envvar="PEFT_ARENA_RUNS")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="Run id, its beginning or its hash.")]
Rule = Annotated[str, typer.Option(help="How the factor is spread over layers; `peft-arena ls rules` lists them.")]
RuleSet = Annotated[list[str] | None, typer.Option("--set", help="A setting of the rule: KEY=value; repeatable.")]
Base = Annotated[str | None, typer.Option("--base", help="The pretrained model; needed for directories.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own unless given.")]
ShardSize = Annotated[str, typer.Option(help="Most bytes of one file of weights, such as 5GB.")]
RUNS = Path("runs")


class Way(StrEnum):
    """How a factor moves the weights."""

    OWN = "own"
    SQRT = "sqrt"
    LINEAR = "linear"


WayOption = Annotated[
    Way,
    typer.Option(
        "--way",
        help="own: by the method's own parameters; sqrt: a rotation's generator times the square root of the factor; "
        "linear: straight from the pretrained to the tuned weights.",
    ),
]


@path_app.command("scan")
def path_scan(
    run: RunId,
    runs: Runs = RUNS,
    grid: Annotated[str, typer.Option(help="START:STOP:STEP or factors; above 1 is beyond the tuned model.")] = (
        "0:1.2:0.1"
    ),
    rule: Rule = "uniform",
    settings: RuleSet = None,
    way: WayOption = Way.OWN,
    tasks: Annotated[
        str | None, typer.Option(help="Retention tasks, separated by commas; those the run was evaluated on if absent.")
    ] = None,
    items: Annotated[int, typer.Option(min=2, help="Validation items of each task at most, to choose by.")] = 100,
    test_items: Annotated[
        int | None, typer.Option(min=2, help="Test items of each task, to judge by; as evaluated before if absent.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="What counts as no difference, on target and retention; 2 points if absent.")
    ] = None,
    save_points: Annotated[bool, typer.Option(help="Also evaluate the save points of training.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Items at once; no effect in float32.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write page, figures and tables into this directory.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate points along a run's path, choose one on validation items and judge it on test items."""
    from peft_arena.cli import console
    from peft_arena.commands.path_command import scan_run
    from peft_arena.report.paths import write_paths
    from peft_arena.store.store import Store

    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    _, record, view = scan_run(
        run,
        runs,
        grid=grid,
        rule=rule,
        settings=settings or (),
        way=way.value,
        tasks=names,
        items=items,
        test_items=test_items,
        margin=margin,
        save_points=save_points,
        batch_size=batch_size,
        bar=lambda: console.bar("path scan", quiet=as_json),
    )
    summary = write_paths(Store(runs), view, out)
    console.show_scan(record, summary, out, as_json)


@path_app.command("rewind")
def path_rewind(
    run: RunId,
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    runs: Runs = RUNS,
    factor: Annotated[str, typer.Option(help="A number, or auto: what a scan of this path has chosen.")] = "auto",
    rule: Rule = "uniform",
    settings: RuleSet = None,
    way: WayOption = Way.OWN,
    weights: Annotated[bool, typer.Option(help="Write merged weights also where an adapter would do.")] = False,
    dtype: DType = None,
    shard_size: ShardSize = "5GB",
    verify: Annotated[bool, typer.Option(help="Compare the logits of merged weights with the point's.")] = True,
    as_json: Json = False,
) -> None:
    """Write a point of a run's path: an adapter where the method can say it exactly, else merged weights."""
    from peft_arena.cli import console
    from peft_arena.commands.path_command import rewind

    said = rewind(
        run,
        out,
        runs,
        rule=rule,
        settings=settings or (),
        way=way.value,
        factor=factor,
        weights=weights,
        dtype=dtype,
        shard_size=shard_size,
        verify=verify,
        bar=lambda: console.bar("path rewind", quiet=as_json),
    )
    console.show_value(said, as_json)


def merge(
    subject: Annotated[str, typer.Argument(metavar="POINT", help="RUN, RUN@STEP, or a directory with an adapter.")],
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    runs: Runs = RUNS,
    base: Base = None,
    factor: Annotated[float, typer.Option(help="How far along the method's path: 0 pretrained, 1 tuned.")] = 1.0,
    dtype: DType = None,
    shard_size: ShardSize = "5GB",
    verify: Annotated[bool, typer.Option(help="Compare the logits of what was written with the tuned model's.")] = True,
    as_json: Json = False,
) -> None:
    """Write a tuned point as a plain model directory, one parameter at a time."""
    from peft_arena.cli import console
    from peft_arena.commands.merge_command import merge as merge_command

    with console.bar("merge", quiet=as_json) as progress:
        merged = merge_command(
            subject,
            out,
            base=base,
            runs=runs,
            dtype=dtype,
            shard_size=shard_size,
            factor=factor,
            verify=verify,
            progress=progress,
        )
    console.show_value(merged.summary(), as_json)


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(help="RUN, RUN@STEP, or a directory of an adapter, a model, a trainer or shards."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    to: Annotated[str, typer.Option(help="adapter, model, lora (with its error) or gguf.")],
    runs: Runs = RUNS,
    base: Base = None,
    rank: Annotated[str | None, typer.Option(help="Of the LoRA: a number, or the energy to keep: 0.99.")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="adapter_config.json of sharded adapter weights that have none beside them.")
    ] = None,
    dtype: DType = None,
    shard_size: ShardSize = "5GB",
    accept_error: Annotated[
        bool, typer.Option("--accept-error", help="Write a LoRA that is farther from the tuned model than the limits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in a form that other programs read."""
    from peft_arena.cli import console
    from peft_arena.commands.export_command import export as export_command

    with console.bar("export", quiet=as_json) as progress:
        exported = export_command(
            checkpoint,
            out,
            to,
            base=base,
            runs=runs,
            rank=rank,
            settings=settings,
            dtype=dtype,
            shard_size=shard_size,
            accept_error=accept_error,
            progress=progress,
        )
    console.show_value(asdict(exported), as_json)
