"""Writing a report: one self-contained page, the tables as CSV, the figures as PNG and SVG, and a summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.analyze.compare import AXES
from peft_arena.analyze.study import DRAWS, StudyResult, analyze_study
from peft_arena.analyze.view import StudyView
from peft_arena.core.errors import UserError
from peft_arena.report.whole import written_whole
from peft_arena.store.store import Store

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.analyze.effects import ArmEffects
    from peft_arena.analyze.estimate import Estimate
    from peft_arena.analyze.family import Judgement
    from peft_arena.report.figures import Drawn
    from peft_arena.store.tables import RunRecords


def build_report(store: Store, view: StudyView, out: Path, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """Analyse a study and write its report; works with whatever part of the study is done.

    Writes ``index.html``, ``summary.json``, ``tables/*.csv`` and ``figures/*.{svg,png}``, and, if there is geometry,
    ``geometry.html``, or reinforcement learning, ``rl.html``, with their ``plotly.min.js``. All of it is there or
    nothing changed; files of an earlier report are gone, other files stay (:mod:`peft_arena.report.whole`).

    Args:
        store: where the records are.
        view: which runs and evaluations belong to the study.
        out: directory to write to; made if it does not exist.
        seed: seeds the joint draws.
        draws: how many there are.

    Returns:
        What ``summary.json`` says.

    Raises:
        UserError: the directory cannot be written.
    """
    from peft_arena.report.page import render_page
    from peft_arena.report.svg import save_figure

    result = analyze_study(store, view, seed=seed, draws=draws)
    summary = {**result.summary(), "headline": _headline(result)}
    try:
        with written_whole(out) as part:
            for directory in (part / "tables", part / "figures"):
                directory.mkdir()
            figures = draw_figures(result)
            images = {
                label: [(figure, save_figure(figure, part / "figures")) for figure in found]
                for label, found in figures.items()
            }
            for name, frame in report_tables(result).items():
                frame.write_csv(part / "tables" / f"{name}.csv")
            _write_geometry(result, part)
            _write_rl(result, part)
            (part / "index.html").write_text(render_page(result, images), encoding="utf-8")
            text = json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
            (part / "summary.json").write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror or error}") from error
    return summary


def _headline(result: StudyResult) -> list[str]:
    from peft_arena.report.headline import caveats, headline

    return [*headline(result), *caveats(result)]


def draw_figures(result: StudyResult) -> dict[str, list[Drawn]]:
    """Draw every figure there are numbers for, by target label; names are unique over targets."""
    from peft_arena.report.figures import cost_figure, curves_figure, prominent, style
    from peft_arena.report.geometry import geometry_figures
    from peft_arena.report.passk import PASSK, passk_figure
    from peft_arena.report.paths import path_figures
    from peft_arena.report.plane import along_figure, trade_figure
    from peft_arena.report.pscp import PSCP, pscp_figure
    from peft_arena.report.rl import RL
    from peft_arena.report.rl_figures import rl_figure

    figures: dict[str, list[Drawn]] = {}
    with style():
        for number, target in enumerate(result.targets, start=1):
            drawn = (
                trade_figure(target, f"tradeoff-{number}"),
                along_figure(target, f"along-{number}"),
                cost_figure(target, f"costs-{number}"),
                curves_figure(target, f"curves-{number}"),
                None if target.rl is None else rl_figure(target.rl, prominent(target), f"{RL}{number}"),
                None if target.pscp is None else pscp_figure(target.pscp, f"{PSCP}{number}"),
            )
            figures[target.label] = [figure for figure in drawn if figure is not None]
            if target.passk is not None and (
                sampled := passk_figure(target.passk, prominent(target), f"{PASSK}{number}")
            ):
                figures[target.label].append(sampled)
            if target.geometry is not None:
                figures[target.label] += geometry_figures(target.geometry, prominent(target), f"-{number}")
            if target.paths is not None:
                figures[target.label] += path_figures(target.paths, target.label, prominent(target), f"-{number}")
    return figures


def _write_geometry(result: StudyResult, out: Path) -> None:
    """Write the interactive page, if the study has any geometry."""
    from peft_arena.report.figures import prominent
    from peft_arena.report.geometry_html import write_interactive

    found = {target.label: target.geometry for target in result.targets if target.geometry is not None}
    if found:
        named = {target.label: prominent(target) for target in result.targets}
        title = f"Geometry of {result.view.title or result.view.name}"
        write_interactive(found, out, title=title, named=named, home="index.html")


def _write_rl(result: StudyResult, out: Path) -> None:
    """Write the interactive page of reinforcement learning, if the study has any."""
    found = {target.label: target.rl for target in result.targets if target.rl is not None}
    if found:
        from peft_arena.report.figures import prominent
        from peft_arena.report.rl_figures import write_rl_page

        named = {target.label: prominent(target) for target in result.targets}
        write_rl_page(
            found, out, title=f"Reinforcement learning of {result.view.title or result.view.name}", named=named
        )


def report_tables(result: StudyResult) -> dict[str, pl.DataFrame]:
    """Return the tables of a report by name: the records' own, and effects, save points, comparisons and gaps."""
    import polars as pl

    from peft_arena.report.geometry import geometry_tables
    from peft_arena.report.over_targets import over_targets_frame
    from peft_arena.report.passk import passk_frame
    from peft_arena.report.paths import path_tables
    from peft_arena.report.pscp import pscp_tables
    from peft_arena.report.published import published_frame
    from peft_arena.store.tables import all_tables

    tables = all_tables(_records(result))
    labels = result.evidence.labels
    arms = [
        (run.spec.run_id, arm.arm.label, labels[arm.arm.target.id]) for arm in result.evidence.arms for run in arm.runs
    ]
    known = pl.DataFrame(arms, schema=dict.fromkeys(("run_id", "arm", "target"), pl.String), orient="row")
    tables["runs"] = tables["runs"].join(known.unique("run_id"), on="run_id", how="left")
    tables["effects"] = _effects(result)
    tables["along"] = _along(result)
    tables["comparisons"] = _comparisons(result)
    gaps = [(gap.who, gap.what, gap.kind, gap.reason) for gap in result.evidence.gaps]
    columns = dict.fromkeys(("who", "what", "kind", "reason"), pl.String)
    tables["gaps"] = pl.DataFrame(gaps, schema=columns, orient="row")
    if result.over is not None:
        tables["over_targets"] = over_targets_frame(result.over)
    sampled = {target.label: target.passk for target in result.targets if target.passk is not None}
    if sampled:
        tables["passk"] = passk_frame(sampled)
    discounted = {target.label: target.pscp for target in result.targets if target.pscp is not None}
    if discounted:
        tables |= pscp_tables(discounted)
    if result.view.published:
        tables["published"] = published_frame(result.view.published)
    paths = {target.label: target.paths for target in result.targets if target.paths is not None}
    return {**tables, **geometry_tables(result), **(path_tables(paths) if paths else {})}


def _records(result: StudyResult) -> list[RunRecords]:
    """Return what the analysis has read of every run, each run once."""
    from peft_arena.store.tables import RunRecords

    found: dict[str, RunRecords] = {}
    for run in result.evidence.runs:
        known = found.get(run.spec.run_id)
        evaluations = {
            (record.step, record.spec.id): record
            for record in (*(known.evaluations if known else ()), *run.every_evaluation)
        }
        found[run.spec.run_id] = RunRecords(
            run.spec, run.record, run.training, tuple(run.costs.values()), tuple(evaluations.values())
        )
    return list(found.values())


def _effects(result: StudyResult) -> pl.DataFrame:
    import polars as pl

    rows = []
    for target in result.targets:
        for arm in target.arms:
            judged = target.against_base[arm.label]
            said = {"target": _words(judged.gain), "mean retention": _words(judged.retention)}
            rows += [{**row, **said.get(row["role"], {})} for row in _effect_rows(target.label, arm)]
    return pl.DataFrame(rows, schema={**_effect_schema(), **_word_schema()}, orient="row")


def _along(result: StudyResult) -> pl.DataFrame:
    import polars as pl

    rows = [
        {"step": point.step, **row}
        for target in result.targets
        for points in target.along.values()
        for point in points
        for row in _effect_rows(target.label, point.effects)
    ]
    return pl.DataFrame(rows, schema={"step": pl.Float64, **_effect_schema()}, orient="row")


def _effect_rows(target: str, arm: ArmEffects) -> list[dict[str, Any]]:
    start = {"target": target, "arm": arm.label}
    rows = []
    for role, effect in (("target", arm.gain), *(("retention", found) for found in arm.retention)):
        if effect is None:
            continue
        scores = {"task": effect.task.label, "role": role, "base": effect.base, "tuned": effect.tuned}
        kept = _only(_columns(effect.kept, "kept_"), "kept_value", "kept_low", "kept_high")
        rows.append({**start, **scores, **_columns(effect.delta), **kept})
    if arm.mean is not None:
        rows.append({**start, "task": "", "role": "mean retention", **_columns(arm.mean)})
    return rows


def _effect_schema() -> dict[str, Any]:
    import polars as pl

    text = dict.fromkeys(("target", "arm", "task", "role"), pl.String)
    scores = dict.fromkeys(("base", "tuned"), pl.Float64)
    return {**text, **scores, **_schema(), **dict.fromkeys(("kept_value", "kept_low", "kept_high"), pl.Float64)}


def _comparisons(result: StudyResult) -> pl.DataFrame:
    import polars as pl

    rows = [
        {
            "target": target.label,
            "left": pair.left,
            "right": pair.right,
            "axis": axis,
            **_columns(pair.on(axis).estimate),
            **_words(pair.on(axis)),
            "turned": ", ".join(pair.on(axis).turned().words),
        }
        for target in result.targets
        for pair in target.comparisons
        for axis in AXES
    ]
    text = dict.fromkeys(("target", "left", "right", "axis"), pl.String)
    return pl.DataFrame(rows, schema={**text, **_schema(), **_word_schema(), "turned": pl.String}, orient="row")


def _words(judged: Judgement) -> dict[str, Any]:
    """Return what is said of a comparison: the words and the interval at their own level."""
    said = judged.summary()
    return {**{name: said[name] for name in _SAID}, "verdict": said["verdict"], "words": ", ".join(said["words"])}


def _word_schema() -> dict[str, Any]:
    import polars as pl

    return {**dict.fromkeys(_SAID, pl.Float64), **dict.fromkeys(("about", "verdict", "words"), pl.String)}


_SAID = ("p_corrected", "p_no_worse", "margin", "level", "low_corrected", "high_corrected", "detectable", "about")


def _schema() -> dict[str, Any]:
    import polars as pl

    floats = dict.fromkeys(("value", "low", "high", "stderr", "p"), pl.Float64)
    counts = dict.fromkeys(("seeds", "items", "groups", "left_out"), pl.Int64)
    return {**floats, "unit": pl.String, **counts, "unscored_share": pl.Float64, "covers": pl.String}


def _columns(found: Estimate | None, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{name}": getattr(found, attribute, None) for name, attribute in _NAMES.items()}


_SAME = ("value", "low", "high", "stderr", "p", "unit", "seeds", "items", "left_out", "covers")
_NAMES = {**{name: name for name in _SAME}, "groups": "units", "unscored_share": "unscored"}
"""Columns of an estimate and its attributes; the columns have the names of the JSON."""


def _only(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}
