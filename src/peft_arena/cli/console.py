"""What commands print: a table or lines for people, one JSON value with ``--json``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from peft_arena.cli.console_plan import plan_footer, plan_rows, plan_totals

if TYPE_CHECKING:
    from peft_arena.store.records import GeometryRecord, PathRecord
    from peft_arena.study.known_data import Note
    from peft_arena.study.model import Study
    from peft_arena.study.reach import Reach
    from peft_arena.study.study_cost import StudyEstimate
    from peft_arena.work.plan import RunPlan
    from peft_arena.work.run_study import StudyOutcome

Row = Mapping[str, Any]
WIDE = 160
"""Columns of a table that is not written to a terminal."""
ONLY_JSON = {"capabilities", "deviations", "paper", "url", "protocol"}
"""Columns too long for a terminal."""
STYLES = {"done": "green", "failed": "red", "running": "yellow", "refused": "magenta", "ok": "green"}


def show_json(value: Any) -> None:
    """Print one JSON value on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str))  # noqa: T201


def show_table(rows: Sequence[Row], as_json: bool, title: str = "") -> None:
    """Print rows of the same keys as a table, or as a JSON list."""
    if as_json:
        show_json(list(rows))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    if not rows:
        console.print(f"{title}: none")
        return
    table = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    rows = [{key: row[key] for key in row if key not in ONLY_JSON} for row in rows]
    for key in rows[0]:
        numeric = all(isinstance(row[key], int | float) for row in rows)
        table.add_column(key.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def show_tasks(rows: Sequence[Row], as_json: bool) -> None:
    """Print the list of tasks; where data is from and by what protocol it is asked is shown of one at a time."""
    if as_json:
        show_json(list(rows))
        return
    show_table([{key: row[key] for key in row if key != "source"} for row in rows], as_json, title="tasks")
    print("\nSource, citation and protocol of one: peft-arena ls tasks NAME")  # noqa: T201


METHOD_COLUMNS = {
    "name": "name",
    "family": "family",
    "parameters": "trained parameters",
    "merges": "merge",
    "identity": "start",
    "calibration": "calib",
    "quantised": "quant",
    "grpo": "GRPO",
    "serves": "serve",
    "learning_rate": "rate",
}
METHOD_KEY = (
    "Σ: sum over targets; merge: can be written as plain weights; start: changes no output before training; "
    "calib: needs examples to attach; quant: takes a quantised base; GRPO: takes online reinforcement learning; "
    "serve: LoRA servers load its adapter; "
    "rate: where a search of the learning rate may start on a model of billions of parameters"
)


def show_methods(rows: Sequence[Row], as_json: bool, width: int | None = None) -> None:
    """Print the list of methods: what each can do, plug-ins, and what is refused and why.

    Args:
        rows: of :func:`peft_arena.cli.catalogue.listing`.
        as_json: print everything as JSON.
        width: columns; None: those of the terminal, or enough where there is none.
    """
    if as_json:
        show_json(list(rows))
        return
    console = Console(width=width or (None if sys.stdout.isatty() else WIDE), highlight=False)
    table = Table(
        title="methods", title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for key, header in METHOD_COLUMNS.items():
        fixed = key not in {"family", "parameters"}
        justify: Any = "right" if key == "learning_rate" else "left"
        table.add_column(header, justify=justify, no_wrap=fixed, overflow="fold")
    for row in rows:
        if row["family"] is not None:
            short = {**row, "parameters": row["parameters"].replace("sum over targets of ", "Σ ")}
            table.add_row(*(_mark(short[key]) for key in METHOD_COLUMNS))
    console.print(table)
    console.print(METHOD_KEY, style="dim", markup=False)
    for title, key in (("from plug-ins (peft-arena ls methods NAME shows one)", "plugin"), ("not offered", "refused")):
        found = [row for row in rows if row["family"] is None and row[key]]
        if found:
            console.print(f"\n{title}:", markup=False)
        for row in found:
            console.print(f"  {row['name']}: {row[key]}", markup=False)


def _mark(value: Any) -> str:
    return {True: "yes", False: "–"}[value] if isinstance(value, bool) else _cell(value)


def show_value(value: Mapping[str, Any], as_json: bool) -> None:
    """Print a mapping as indented lines, or as JSON."""
    if as_json:
        show_json(value)
        return
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(value, 0):
        console.print(line, markup=False)


@contextmanager
def bar(title: str, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """Show a progress bar on standard error while the block works; it gives what moves the bar.

    Args:
        title: what is being done.
        quiet: show nothing.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task(title, total=1.0, what="")
        yield lambda done, what: progress.update(task, completed=done, what=what)


def show_geometry(records: Sequence[GeometryRecord], out: Path, as_json: bool) -> None:
    """Print what was measured of some checkpoints, a line for each quantity."""
    if as_json:
        show_json([record.model_dump(mode="json") for record in records])
        return
    for record in records:
        at = "" if record.step is None else f" at step {record.step}"
        rows = [
            {
                "quantity": measure.metric,
                "value": measure.value,
                "stderr": measure.stderr,
                "n": measure.n,
                "unit": measure.unit,
            }
            for measure in record.summary
        ]
        Console(highlight=False, soft_wrap=True).print(
            f"\n{record.subject}{at}, factor {record.factor:g}", markup=False, style="bold"
        )
        show_table(rows, as_json=False)
        absent = [f"{measure.metric}: {measure.how}" for measure in record.summary if measure.value is None]
        for line in absent:
            Console(highlight=False).print(line, markup=False)
    Console(highlight=False).print(f"records and figures: {out}; open {out / 'geometry.html'}", markup=False)


def show_scan(record: PathRecord, summary: Mapping[str, Any], out: Path | None, as_json: bool) -> None:
    """Print what a scan of a path found: a line for each factor, the choice, and what test items say of it."""
    if as_json:
        show_json({**summary, "record": record.model_dump(mode="json")})
        return
    rows = [
        {
            "factor": row.factor,
            "target": row.target,
            "target change": _interval(row.target_change),
            "retention change": _interval(row.retention_change),
            "may be chosen": "yes" if row.allowed else row.why,
        }
        for row in record.rows
    ]
    show_table(rows, as_json=False, title=f"{record.run_id}: on validation items, against the tuned model")
    console = Console(highlight=False, soft_wrap=True)
    console.print(record.reason, markup=False)
    for sentence in summary.get("headline", ()):
        console.print(sentence, markup=False)
    console.print(f"points are evaluated, and the chosen one is written, as {record.expressed}", markup=False)
    if out is not None:
        console.print(f"figures and tables: {out}; open {out / 'paths.html'}", markup=False)


def _interval(found: tuple[float, float | None, float | None] | None) -> str:
    if found is None:
        return "–"
    value, low, high = found
    return f"{value:+.1f}" if low is None or high is None else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def show_plan(
    study: Study,
    plans: Sequence[RunPlan],
    as_json: bool,
    estimates: StudyEstimate | None = None,
    every_run: bool = False,
    reach: Sequence[Reach] = (),
    notes: Sequence[Note] = (),
) -> None:
    """Print what a study would do: a line for each arm with the states of its runs and what one of them costs.

    Args:
        study: read and expanded.
        plans: of all its runs.
        as_json: print everything as JSON, every run with its stages.
        estimates: what the arms cost; None leaves that out.
        every_run: also print a line for each run.
        reach: what the planned items can show.
        notes: notes for the reader, of data and of defaults that take less than they say.
    """
    rows = [
        {
            "arm": item.label,
            "seed": item.run.seed if item.run.train else "",
            "run": item.run.run_id,
            "state": item.state,
            "done": f"{sum(stage.state == 'done' for stage in item.stages)}/{len(item.stages)}",
            "reason": item.reason,
        }
        for item in plans
    ]
    budgets = {arm.label: arm.spent for arm in study.arms if arm.spent is not None}
    arms = plan_rows(plans, estimates)
    totals = plan_totals(plans, estimates, arms)
    if as_json:
        stages = [[{"what": s.what, "state": s.state, "reason": s.reason} for s in item.stages] for item in plans]
        runs = [{**row, "stages": list(parts)} for row, parts in zip(rows, stages, strict=True)]
        chosen = {label: {**asdict(spent), "said": str(spent)} for label, spent in budgets.items()}
        said: dict[str, Any] = {"study": study.file.name, "budgets": chosen, "runs": runs}
        said["margins"] = [one.summary() for one in reach]
        said["notes"] = [f"{note.about}: {note.text}" for note in notes]
        if estimates is not None:
            said["estimates"] = {
                "gpu": estimates.gpu,
                "utilisation": estimates.utilisation,
                "note": estimates.note,
                "totals": totals,
                "arms": [arm.table() for arm in estimates.arms],
            }
        show_json(said)
        return
    title = f"{study.file.name}: {study.file.title}"
    if every_run:
        show_table(rows, False, title=title)
    show_table([row.cells(many=len(study.targets) > 1) for row in arms], False, title="" if every_run else title)
    console = Console(highlight=False, soft_wrap=True)
    for label, spent in budgets.items():
        console.print(f"budget of {label}: {spent}", markup=False)
    console.print(_count(plans))
    for line in plan_footer(estimates, totals):
        console.print(line, markup=False)
    for note in notes:
        console.print(f"{note.about}: {note.text}", markup=False)
    for one in reach:
        if one.is_short:
            console.print(str(one), markup=False)


def show_status(study: Study, plans: Sequence[RunPlan], as_json: bool) -> None:
    """Print how many runs are in which state, and every failure with its reason."""
    if as_json:
        show_plan(study, plans, as_json)
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{study.file.name}: {_count(plans)}")
    for item in plans:
        if item.state in {"failed", "refused", "running"} or item.reason:
            console.print(f"  {item.state} {item.label} {item.run.run_id}: {item.reason}", markup=False)


def show_outcome(study: Study, outcome: StudyOutcome, runs: Path, as_json: bool, scores: Sequence[Row] = ()) -> None:
    """Print what a command on a study did, and scores where there are any to show."""
    if as_json:
        states = {item.run.run_id: item.state for item in outcome.plans}
        said: dict[str, Any] = {"study": study.file.name, "worked": outcome.worked}
        said |= {"failed": outcome.failed, "runs": states}
        said["notes"] = [f"{note.about}: {note.text}" for note in outcome.notes]
        show_json({**said, "scores": list(scores)} if scores else said)
        return
    console = Console(highlight=False, soft_wrap=True)
    if outcome.worked == 0:
        console.print(f"{study.file.name}: nothing to do. {_count(outcome.plans)}, in {runs}")
    else:
        console.print(f"{study.file.name}: worked on {outcome.worked} runs. {_count(outcome.plans)}, in {runs}")
    for note in outcome.notes:
        console.print(f"  {note.about}: {note.text}", markup=False)
    for run_id, reason in outcome.failed.items():
        console.print(f"  failed {run_id}: {reason}", style="red", markup=False)
    if scores:
        show_table(scores, False)


def show_report(summary: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """Print where a report is and what it says first."""
    if as_json:
        show_json({**summary, "report": str(out / "index.html")})
        return
    console = Console(highlight=False, soft_wrap=True)
    for sentence in summary.get("headline", ()):
        console.print(sentence, markup=False)
    console.print(f"report: {out / 'index.html'}")


def _count(plans: Sequence[RunPlan]) -> str:
    counts = Counter(item.state for item in plans)
    return ", ".join(
        f"{counts[state]} {state}" for state in ("done", "missing", "running", "failed", "refused") if counts[state]
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    text = str(value).replace("[", "\\[")
    return f"[{STYLES[text]}]{text}[/]" if text in STYLES else text


def _lines(value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    lines: list[str] = []
    for key, part in value.items():
        if isinstance(part, Mapping) and part:
            lines += [f"{pad}{key}:", *_lines(part, depth + 1)]
        elif isinstance(part, list | tuple) and part and isinstance(part[0], Mapping):
            lines.append(f"{pad}{key}:")
            lines += [f"{pad}  - " + ", ".join(f"{k} {v}" for k, v in row.items()) for row in part]
        else:
            shown = ", ".join(map(str, part)) if isinstance(part, list | tuple) else part
            lines.append(f"{pad}{key}: {shown}")
    return lines
