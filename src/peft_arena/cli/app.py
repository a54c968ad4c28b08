"""The command line: parses arguments, calls one function, prints what it returns. Nothing else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_arena.cli.app_cost import cost
from peft_arena.cli.app_data import columns_of, data
from peft_arena.cli.app_import import export_hf, import_app
from peft_arena.cli.app_weights import export, merge, path_app
from peft_arena.cli.endings import Commands, guarded
from peft_arena.core.errors import UserError

app = typer.Typer(
    name="peft-arena",
    cls=Commands,
    help="Which fine-tuning method fits your model, task and budget, and what general capability it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train one run without a study file.", no_args_is_help=True)
app.add_typer(train_app, name="train")
geometry_app = typer.Typer(
    help="Compare checkpoints with their pretrained model: why a method forgets.", no_args_is_help=True
)
app.add_typer(geometry_app, name="geometry")
app.add_typer(path_app, name="path")
app.command("merge")(merge)
app.command("export")(export)
app.command("cost")(cost)
app.command("data")(data)
app.add_typer(import_app, name="import")
app.command("export-hf")(export_hf)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Runs = Annotated[Path, typer.Option("--runs", help="Runs directory.", envvar="PEFT_ARENA_RUNS")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the study: key.path=value.")]
StudyName = Annotated[str, typer.Argument(help="A study file, or the name of a shipped study.")]
RUNS = Path("runs")
Tuned = Annotated[
    list[str], typer.Option("--tuned", help="RUN, RUN@STEP, or a directory with an adapter or a model; repeatable.")
]
Base = Annotated[str | None, typer.Option("--base", help="The pretrained model; needed for directories.")]
GeometryOut = Annotated[Path, typer.Option("--out", help="Directory for records and figures, outside runs.")]
Modules = Annotated[str | None, typer.Option(help="Module names or last parts of them, separated by commas.")]
Layers = Annotated[str | None, typer.Option(help="Only these blocks, from 0: 0,5,9 or 4-7.")]
Factor = Annotated[float, typer.Option(help="How far along the method's path: 0 pretrained, 1 trained.")]
DType = Annotated[str | None, typer.Option(help="float32 or bfloat16: type of the model that directories belong to.")]
General = Annotated[list[str], typer.Option("--general", help="A task or a txt, jsonl or json file; repeatable.")]
Target = Annotated[list[str], typer.Option("--target", help="The same, of what was trained for.")]
Prompts = Annotated[int | None, typer.Option(min=1, help="Most prompts of each set.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Longest prompt in tokens; longer ones are cut and counted.")
]


class What(StrEnum):
    """What ``ls`` can list."""

    METHODS = "methods"
    TASKS = "tasks"
    STUDIES = "studies"
    MODELS = "models"
    RULES = "rules"
    REWARDS = "rewards"
    GROUPS = "groups"
    PUBLISHED = "published"


class Executor(StrEnum):
    """Where runs are worked on."""

    LOCAL = "local"


@app.command("ls")
def list_command(
    what: What,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="All there is to say of one method or task.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List methods, tasks, studies, models, rules of paths, or rewards."""
    from peft_arena.cli import catalogue, console

    if name is not None:
        shown = {What.METHODS: catalogue.method_row, What.TASKS: catalogue.task_row}
        if what not in shown:
            raise UserError(f"only methods and tasks can be shown by name, not {what.value}")
        row = shown[what](name)
        console.show_value(row if as_json else catalogue.stated(row), as_json)
    elif what is What.METHODS:
        console.show_methods(catalogue.listing(what.value), as_json)
    elif what is What.TASKS:
        console.show_tasks(catalogue.listing(what.value), as_json)
    else:
        console.show_table(catalogue.listing(what.value), as_json, title=what.value)


@app.command()
def plan(
    study: StudyName,
    runs: Runs = RUNS,
    overrides: Set = None,
    gpu: Annotated[str | None, typer.Option(help="GPU that hours are estimated for, over the study's own.")] = None,
    every_run: Annotated[bool, typer.Option("--every-run", help="Also list every run.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a study would do and cost: what is done, missing, failed or refused, and why; estimated GPU hours."""
    from peft_arena.cli import console
    from peft_arena.store.store import Store
    from peft_arena.study.preflight import check_arms, check_place, check_study
    from peft_arena.study.reach import reaches
    from peft_arena.study.study_cost import estimate
    from peft_arena.work.plan import plan as make_plan

    loaded = _study(study, overrides)
    plans = make_plan(loaded, Store(runs))
    open_work = any(item.state not in {"done", "refused"} for item in plans)
    runnable = not all(arm.refused for arm in loaded.arms)
    notes = check_study(loaded, at_hand_only=True) if open_work and runnable else []
    if open_work and runnable:
        check_place(runs)
    console.show_plan(loaded, plans, as_json, estimate(loaded, gpu), every_run, reaches(loaded), notes)
    check_arms(loaded)


@app.command()
def run(
    study: StudyName,
    runs: Runs = RUNS,
    overrides: Set = None,
    executor: Annotated[Executor, typer.Option(help="Where to work.")] = Executor.LOCAL,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; over the study's own number.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write the report into this directory.")] = None,
    as_json: Json = False,
) -> None:
    """Work on everything of a study that is missing; finished work is never repeated."""
    from peft_arena.cli import console
    from peft_arena.work.run_study import run_study

    loaded = _study(study, overrides)
    outcome = run_study(loaded, runs, jobs=jobs, quiet=as_json)
    console.show_outcome(loaded, outcome, runs, as_json)
    if report is not None:
        _report(loaded, runs, report, as_json=False, quiet=as_json)
    if outcome.failed or not outcome.complete:
        raise typer.Exit(1)


@app.command()
def status(study: StudyName, runs: Runs = RUNS, overrides: Set = None, as_json: Json = False) -> None:
    """Show the state of every run of a study; exit code 1 if one failed."""
    from peft_arena.cli import console
    from peft_arena.store.store import Store
    from peft_arena.work.plan import plan as make_plan

    loaded = _study(study, overrides)
    plans = make_plan(loaded, Store(runs))
    console.show_status(loaded, plans, as_json)
    if any(item.state == "failed" for item in plans):
        raise typer.Exit(1)


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Run id, its beginning or its hash.")],
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Show one run: its spec, its measures, its events."""
    from peft_arena.cli import catalogue, console
    from peft_arena.store.store import Store

    console.show_value(catalogue.run_summary(Store(runs).find(run_id)), as_json)


@app.command()
def check(path: Path, as_json: Json = False) -> None:
    """Check that a study file, a runs directory, a run, a checkpoint or a record is sound."""
    from peft_arena.cli import console
    from peft_arena.commands.check import check_path

    console.show_value(check_path(path), as_json)


@app.command()
def report(
    study: StudyName,
    out: Annotated[Path, typer.Option(help="Directory for index.html, figures and CSV files.")],
    runs: Runs = RUNS,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write a self-contained HTML report with figures and tables."""
    _report(_study(study, overrides), runs, out, as_json)


TrainModel = Annotated[str, typer.Option("--model", help="micro, a hub id or a directory.")]
TrainMethod = Annotated[str, typer.Option("--method", help="A method of `peft-arena ls methods`.")]
TrainTask = Annotated[str, typer.Option("--task", help="A target task of `peft-arena ls tasks`, or a data file.")]
TrainScorer = Annotated[
    str | None, typer.Option("--scorer", help="Of a file of your own: one of ours, or FILE.py:FUNCTION.")
]
TrainOut = Annotated[Path, typer.Option("--out", help="Runs directory.")]
TrainSet = Annotated[
    list[str] | None, typer.Option("--set", help="config.KEY, train.KEY, task.KEY, model.KEY or seed = value.")
]


@train_app.command("sft")
def train_sft(
    model: TrainModel,
    method: TrainMethod,
    task: TrainTask,
    out: TrainOut,
    scorer: TrainScorer = None,
    settings: TrainSet = None,
    as_json: Json = False,
) -> None:
    """Train one run by supervised fine-tuning, evaluate it and its base on the task, and measure its cost."""
    _train("sft", model, method, task, [*_scored_by(scorer), *(settings or [])], out, as_json)


@train_app.command("grpo")
def train_grpo(
    model: TrainModel,
    method: TrainMethod,
    task: TrainTask,
    out: TrainOut,
    scorer: TrainScorer = None,
    settings: TrainSet = None,
    as_json: Json = False,
) -> None:
    """The same by group relative policy optimization: the task's score is the reward."""
    _train("grpo", model, method, task, [*_scored_by(scorer), *(settings or [])], out, as_json)


@train_app.command("rloo")
def train_rloo(
    model: TrainModel,
    method: TrainMethod,
    task: TrainTask,
    out: TrainOut,
    scorer: TrainScorer = None,
    settings: TrainSet = None,
    as_json: Json = False,
) -> None:
    """The same by REINFORCE with a leave-one-out baseline."""
    _train("rloo", model, method, task, [*_scored_by(scorer), *(settings or [])], out, as_json)


def _scored_by(scorer: str | None) -> list[str]:
    return [] if scorer is None else [f"task.scorer={scorer}"]


def _train(objective: str, model: str, method: str, task: str, settings: list[str], out: Path, as_json: bool) -> None:
    from peft_arena.cli import console
    from peft_arena.commands.single_run import scores, train_one

    for text in settings:
        if text.partition("=")[0] == "train.objective":
            raise UserError(f"--set {text}: the objective is {objective}, the name of the command (train {objective})")
    given = [f"train.objective={objective}", *settings]
    outcome, study = train_one(model, method, task, given, out, quiet=as_json)
    rows = scores(study, out)
    console.show_outcome(study, outcome, out, as_json, scores=rows)
    if outcome.failed:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    point: Annotated[str, typer.Argument(metavar="POINT", help="RUN, RUN@STEP, or a model name for the base model.")],
    tasks: Annotated[str, typer.Option(help="Tasks or data files, separated by commas; lm-eval:NAME for lm-eval's.")],
    scorer: TrainScorer = None,
    columns: Annotated[str | None, typer.Option(help="Of a file: prompt=question,response=reply.")] = None,
    runs: Runs = RUNS,
    items: Annotated[int | None, typer.Option(min=1, help="Only the first so many items.")] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for a model name.")] = "float32",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Items at once; no effect in float32.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Sample so many answers to each item, for pass@k.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the samples; 1 keeps all tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of the samples; 0 keeps all tokens.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
    k: Annotated[str, typer.Option("--k", help="pass@k for these k, separated by commas.")] = "1",
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint or a base model on tasks; records are kept and never made twice."""
    from peft_arena.cli import console
    from peft_arena.commands.single_run import evaluate_point

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    ks = [one.strip() for one in k.split(",")]
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "k": ks}
    sampling = None if samples is None else {"samples": samples, **given}
    if sampling is None and given != {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "k": ["1"]}:
        raise UserError("--temperature, --top-p, --top-k, --seed and --k are of sampled answers: give --samples too")
    own = {key: value for key, value in (("scorer", scorer), ("columns", columns_of(columns))) if value}
    rows = evaluate_point(
        point, names, runs, items=items, split=split, dtype=dtype, batch_size=batch_size, sampling=sampling, own=own
    )
    console.show_table(rows, as_json, title=point)


@geometry_app.command("spectra")
def geometry_spectra(
    tuned: Tuned,
    out: GeometryOut,
    base: Base = None,
    runs: Runs = RUNS,
    modules: Modules = None,
    layers: Layers = None,
    factor: Factor = 1.0,
    dtype: DType = None,
    precision: Annotated[str | None, typer.Option(help="float32 or float64: type of the arithmetic.")] = None,
    alignment: Annotated[str | None, typer.Option(help="free: for rotations; all: by a second SVD for all.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where decompositions are kept; none for nowhere.")] = None,
    as_json: Json = False,
) -> None:
    """Measure weight-space spectra: profiles, ranks, alignment, norms and singular values of the weight changes."""
    settings = {"modules": _names(modules), "layers": _blocks(layers), "precision": precision, "alignment": alignment}
    _geometry("spectra", settings, tuned, out, base, runs, factor, dtype, as_json, cache=cache)


@geometry_app.command("drift")
def geometry_drift(
    tuned: Tuned,
    out: GeometryOut,
    general: General,
    target: Target,
    base: Base = None,
    runs: Runs = RUNS,
    modules: Modules = None,
    layers: Layers = None,
    factor: Factor = 1.0,
    dtype: DType = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    as_json: Json = False,
) -> None:
    """Measure what the weight changes do to the inputs that general and target prompts cause in the base model."""
    settings = {"modules": _names(modules), "layers": _blocks(layers), "prompts": prompts, "max_length": max_length}
    _geometry("drift", settings, tuned, out, base, runs, factor, dtype, as_json, general=general, target=target)


@geometry_app.command("activations")
def geometry_activations(
    tuned: Tuned,
    out: GeometryOut,
    general: General,
    target: Target,
    base: Base = None,
    runs: Runs = RUNS,
    modules: Annotated[str | None, typer.Option(help="Module names; eight of two blocks unless given.")] = None,
    layers: Layers = None,
    factor: Factor = 1.0,
    dtype: DType = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of each set.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how outputs of modules moved (CKA, Procrustes, angles), and the KL divergence from the base model."""
    chosen = {"modules": _names(modules), "layers": _blocks(layers)}
    settings: dict[str, Any] = {**chosen, "prompts": prompts, "max_length": max_length, "tokens": tokens}
    if any(value is not None for value in chosen.values()):
        settings["preset"] = "none"
    _geometry("activations", settings, tuned, out, base, runs, factor, dtype, as_json, general=general, target=target)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: packages, devices, memory, disk, hub, wheels, caches."""
    from peft_arena.cli import catalogue, console

    rows = catalogue.doctor()
    console.show_table(rows, as_json, title="doctor")
    if any(row["state"] == "failed" for row in rows):
        raise typer.Exit(1)


def _study(name: str, overrides: list[str] | None) -> Any:
    from peft_arena.study.read_study import find_study, read_study

    return read_study(find_study(name), overrides or [])


def _geometry(
    what: Any,
    settings: dict[str, Any],
    tuned: list[str],
    out: Path,
    base: str | None,
    runs: Path,
    factor: float,
    dtype: str | None,
    as_json: bool,
    *,
    general: list[str] | None = None,
    target: list[str] | None = None,
    cache: Path | None = None,
) -> None:
    from peft_arena.cli import console
    from peft_arena.commands.geometry_command import geometry_spec, measure_points

    spec = geometry_spec(what, settings, general or (), target or ())
    records = measure_points(
        tuned,
        spec,
        out,
        runs=runs,
        base=base,
        dtype=dtype,
        factor=factor,
        cache=cache,
        bar=lambda: console.bar(f"geometry {what}", quiet=as_json),
    )
    console.show_geometry(records, out, as_json)


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--modules names no module, got '{text}'")
    return names


def _blocks(text: str | None) -> list[int] | None:
    """Read block numbers: ``0,5`` or ``4-7``."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and (not last.isdigit() or int(last) < int(first))):
            raise UserError(f"--layers takes block numbers such as 0,5 or 4-7, got '{text}'")
        found += range(int(first), int(last or first) + 1)
    return found


def _report(study: Any, runs: Path, out: Path, as_json: bool, quiet: bool = False) -> None:
    from peft_arena.cli import console
    from peft_arena.report.build import build_report
    from peft_arena.store.store import Store
    from peft_arena.study.study_view import view_of

    summary = build_report(Store(runs), view_of(study), out)
    if not quiet:
        console.show_report(summary, out, as_json)


def main() -> None:
    """Run the command line; whatever ends it is one line on standard error: :func:`peft_arena.cli.endings.guarded`."""
    guarded(app)
