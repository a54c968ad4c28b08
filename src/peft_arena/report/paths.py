"""The report's section on rewinding: what the chosen points are worth, their tables, and a page for a single run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.analyze.effects import unit_of
from peft_arena.analyze.path_claims import Verdict
from peft_arena.analyze.path_study import ArmPath, PathPoint, TargetPaths, read_paths
from peft_arena.core.errors import UserError
from peft_arena.report.markup import Markup, cell, join, table, tag
from peft_arena.report.numbers import NONE, digits_of, p_text, plain
from peft_arena.report.page_tables import estimate_cell, judged_cell
from peft_arena.report.paths_text import claim_sentence, factors_text, share_text
from peft_arena.report.whole import written_whole

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.analyze.estimate import Estimate
    from peft_arena.analyze.evidence import Evidence, Gap
    from peft_arena.analyze.view import StudyView
    from peft_arena.report.figures import Drawn
    from peft_arena.store.store import Store

PATHS = "paths-"
"""Begins the name of every figure of the section."""
PAGE = "paths.html"
INTRODUCTION = (
    "A path leads from the pretrained model, factor 0, to the tuned one, factor 1. If a point before its end does as "
    "well on the target and keeps more of everything else, training went further than it needed to: it overshot."
)
READING = (
    (
        "How a point is chosen",
        "Per seed, on validation items. A factor may be chosen if it lies between the pretrained and the tuned model "
        "and nothing speaks against its target: the paired 95 % interval of its difference from the tuned model does "
        "not lie below zero, the difference is not below minus the margin, and the interval of its difference from the "
        "best point of the grid does not lie below zero. It must also keep more than the tuned model, by the estimate "
        "of mean retention. The smallest such factor is chosen. Factors above 1 are shown and never chosen. Where no "
        "factor may be chosen the seed keeps its tuned model, and its difference is zero.",
    ),
    (
        "What is claimed",
        "The chosen point against the tuned model on test items, which had no part in the choice, paired by seed and "
        "item. p-values are Holm-corrected over all that is asked together: every comparison of a study, or every "
        "path of the one run that was scanned by itself. Brackets say the same as the words. "
        "Overshoot: the chosen point is better in mean retention and no worse on the target within the margin, both "
        "corrected. “At most worse” is minus the lower end of the target's bracket.",
    ),
    (
        "Regained",
        "(chosen − tuned) / (pretrained − tuned) in mean retention on test items; only where the tuned model is worse "
        "than the pretrained one.",
    ),
)
_WORDS: dict[Verdict, tuple[str, str]] = {
    "overshoot": ("overshoot", "txt better"),
    "target worse": ("target worse", "txt worse"),
    "retention worse": ("retention worse", "txt worse"),
    "undecided": ("undecided", "txt none"),
    "no point chosen": ("no point chosen", "txt none"),
    "unknown": ("nothing claimed", "txt none"),
}


def path_figures(paths: TargetPaths, target: str, named: set[str], end: str = "") -> list[Drawn]:
    """Draw the figures of the section that there are numbers for.

    Args:
        paths: of the arms of a target.
        target: its label.
        named: labels of the arms to draw.
        end: of the figures' names, to tell targets apart.
    """
    from peft_arena.report.figures import style
    from peft_arena.report.paths_plane import plane_figure
    from peft_arena.report.paths_strength import strength_figure

    with style():
        drawn = (
            plane_figure(paths, target, named, f"{PATHS}plane{end}"),
            strength_figure(paths, named, f"{PATHS}strength{end}"),
        )
    return [figure for figure in drawn if figure is not None]


def paths_section(paths: TargetPaths, images: Sequence[tuple[Drawn, Markup]]) -> Markup:
    """Return the section of one target: claims first, then the figures, and what they rest on."""
    from peft_arena.report.svg import captioned

    reading = tag("dl", *(part for name, text in READING for part in (tag("dt", name), tag("dd", text))))
    parts: list[object] = [
        tag("p", INTRODUCTION),
        claims_table(paths),
        *(captioned(figure, image) for figure, image in images),
        tag("details", tag("summary", "How a point is chosen and what is claimed"), reading),
        tag("details", tag("summary", "Every factor in numbers"), points_table(paths)),
    ]
    single = _tasks_table(paths)
    if single is not None:
        parts.append(tag("details", tag("summary", "Every task on test items"), single))
    return join(parts)


def claims_table(paths: TargetPaths) -> Markup:
    """Return what the chosen points are worth on test items, confirmed overshoots first."""
    unit = next((found.unit for arm in paths.arms if (found := arm.claim.target.estimate)), "points")
    head: list[object] = ["arm", "path", "chosen factor", f"target, change ({unit})", "p (Holm)"]
    head += ["mean retention, change (points)", "p (Holm)", "verdict", f"at most worse ({unit})", "regained"]
    order = {label: place for place, label in enumerate(dict.fromkeys(arm.label for arm in paths.overshoots))}
    rows = [_claim_row(arm) for arm in sorted(paths.arms, key=lambda arm: order.get(arm.label, len(order)))]
    note = (
        f"{_items_note(paths)} Brackets say the same as the words; with one seed they cover items only. Undecided does "
        "not mean that there is no overshoot."
    )
    caption = "Chosen points against the tuned models, on test items"
    return table(caption, head, rows, "pairs", note, text=(1, 2, 7))


def _items_note(paths: TargetPaths) -> str:
    known = next((arm for arm in paths.arms if arm.validation), None)
    if known is None:
        return ""
    chosen = ", ".join(f"{task.label} {task.items}" for task in known.validation)
    tasks = next((arm.claim.tasks for arm in paths.arms if arm.claim.tasks), ())
    judged = ", ".join(f"{task.label} {task.items}" for task, _ in tasks)
    margins = sorted({arm.claim.target.margin for arm in paths.arms if arm.claim.target.margin is not None})
    unit = unit_of(known.validation[0])
    allowed = f"Margin: {' or '.join(f'{value:g}' for value in margins)} {unit}." if margins else ""
    return f"Validation items: {chosen}. {allowed}" + (f" Test items: {judged}." if judged else "")


def _claim_row(arm: ArmPath) -> list[Markup]:
    claim = arm.claim
    word, kind = _WORDS[claim.verdict]
    why = claim.missing or ("no point may be chosen" if claim.none_chosen else claim.why_not)
    worse = claim.at_most_worse
    digits = digits_of(claim.target.estimate.unit) if claim.target.estimate else 1
    reasons = "; ".join(f"seed {run.seed}: {run.record.reason if run.record else run.absent}" for run in arm.runs)
    return [
        join([arm.label]),
        cell(join([arm.words, _small(_points_as(arm))]), "txt", style="min-width:9rem"),
        cell(factors_text(arm), "txt", title=reasons or None),
        judged_cell(claim.target, why),
        cell(p_text(claim.target.p_corrected)),
        judged_cell(claim.retention, why),
        cell(p_text(claim.retention.p_corrected)),
        cell(join([word, _small(why)]), kind, style="min-width:7rem"),
        cell(NONE if worse is None else plain(worse, digits)),
        cell(share_text(claim.recovered)),
    ]


def _small(text: str) -> Markup:
    return tag("small", text) if text else Markup("")


def _points_as(arm: ArmPath) -> str:
    """Say as what points are written, and how orthogonal their rotations are."""
    records = [run.record for run in arm.found if run.record is not None]
    as_what = " or ".join(sorted({"an adapter" if one.expressed == "adapter" else "merged weights" for one in records}))
    bent = "" if arm.orthogonality is None else f"; ‖RᵀR − I‖ at most {arm.orthogonality:.1e}"
    return f"written as {as_what}{bent}" if as_what else ""


def points_table(paths: TargetPaths) -> Markup:
    """Return every factor and save point on validation items against the base model."""
    rows = []
    for arm in paths.arms:
        allowed = [row for run in arm.found if run.record for row in run.record.rows]
        for kind, point in _all_points(arm):
            mine = [row for row in allowed if kind == "path" and row.factor == point.at]
            seeds = sum(row.allowed for row in mine)
            why = "; ".join(dict.fromkeys(row.why for row in mine if row.why))
            may = NONE if not mine else f"{seeds} of {len(mine)}"
            rows.append(
                [
                    join([arm.label]),
                    cell(arm.words, "txt"),
                    cell(_at_text(kind, point), "txt"),
                    estimate_cell(point.gain, "not evaluated"),
                    estimate_cell(point.kept, "not evaluated"),
                    cell(may, title=why or None),
                    cell(arm.chosen.get(point.at, "") if kind == "path" else ""),
                ]
            )
    head = ["arm", "path", "point", "gain", "mean retention (points)", "may be chosen, seeds", "chosen by, seeds"]
    note = "Against the base model, on validation items. Point at a count for why a factor may not be chosen."
    return table("Points of the paths", head, rows, "along", note, text=(1, 2))


def _all_points(arm: ArmPath) -> list[tuple[str, PathPoint]]:
    tuned = [("tuned", arm.tuned)] if arm.tuned is not None else []
    return [*(("path", point) for point in arm.points), *tuned, *(("save point", point) for point in arm.along)]


def _at_text(kind: str, point: PathPoint) -> str:
    if kind == "tuned":
        return "the tuned model"
    return f"factor {point.at:g}" if kind == "path" else f"step {point.at:g} of the training"


def _tasks_table(paths: TargetPaths) -> Markup | None:
    rows = [
        [
            join([arm.label]),
            cell(arm.words, "txt"),
            cell(task.label, "txt"),
            cell(found.unit, "txt"),
            estimate_cell(found, ""),
        ]
        for arm in paths.arms
        for task, found in (() if arm.claim.none_chosen else arm.claim.tasks)
    ]
    if not rows:
        return None
    head = ["arm", "path", "task", "unit", "change"]
    return table("Chosen point minus tuned model", head, rows, "along", "Not corrected.", text=(1, 2, 3))


def path_tables(found: Mapping[str, TargetPaths]) -> dict[str, pl.DataFrame]:
    """Return ``paths`` (a row per arm, path and point) and ``rewinds`` (a row per claim) for the CSV files.

    Args:
        found: label of each target to its paths.
    """
    import polars as pl

    points, claims = [], []
    for target, paths in found.items():
        for arm in paths.arms:
            start = {"target": target, "arm": arm.label, "way": arm.scan.path.way, "rule": arm.scan.path.rule.name}
            start |= {"rule_config": json.dumps(arm.scan.path.rule.config, sort_keys=True), "scan": arm.scan.id}
            points += [start | _point_columns(arm, kind, point) for kind, point in _all_points(arm)]
            claims.append(start | _claim_columns(arm))
    text = dict.fromkeys(("target", "arm", "way", "rule", "rule_config", "scan"), pl.String)
    numbers = {**_estimate_schema("gain"), **_estimate_schema("retention")}
    middle = {"point": pl.String, "factor": pl.Float64, "step": pl.Float64, "chosen_by": pl.Int64}
    counts = dict.fromkeys(("trained", "kept_tuned"), pl.Int64)
    judged = {**_estimate_schema("target"), "target_p_corrected": pl.Float64, "target_at_most_worse": pl.Float64}
    judged |= {**_estimate_schema("retention"), "retention_p_corrected": pl.Float64, "recovered": pl.Float64}
    end = dict.fromkeys(("target_words", "retention_words", "verdict", "missing"), pl.String)
    return {
        "paths": pl.DataFrame(points, schema={**text, **middle, **numbers}, orient="row"),
        "rewinds": pl.DataFrame(claims, schema={**text, "chosen": pl.String, **counts, **judged, **end}, orient="row"),
    }


def _point_columns(arm: ArmPath, kind: str, point: PathPoint) -> dict[str, Any]:
    return {
        "point": kind,
        "factor": None if kind == "save point" else point.at,
        "step": point.at if kind == "save point" else None,
        "chosen_by": arm.chosen.get(point.at, 0) if kind == "path" else 0,
        **_estimate_columns(point.gain, "gain"),
        **_estimate_columns(point.kept, "retention"),
    }


def _claim_columns(arm: ArmPath) -> dict[str, Any]:
    claim = arm.claim
    return {
        "chosen": "; ".join(f"seed {seed}: {NONE if at is None else f'{at:g}'}" for seed, at in claim.chosen.items()),
        "trained": sum(run.trained for run in arm.runs),
        "kept_tuned": len(claim.kept_tuned),
        **_estimate_columns(claim.target.estimate, "target"),
        "target_p_corrected": claim.target.p_corrected,
        "target_words": ", ".join(claim.target.words),
        "target_at_most_worse": claim.at_most_worse,
        **_estimate_columns(claim.retention.estimate, "retention"),
        "retention_p_corrected": claim.retention.p_corrected,
        "retention_words": ", ".join(claim.retention.words),
        "recovered": claim.recovered,
        "verdict": claim.verdict,
        "missing": claim.missing,
    }


_NUMBERS = ("value", "low", "high", "p")


def _estimate_schema(name: str) -> dict[str, Any]:
    import polars as pl

    return {**{f"{name}_{part}": pl.Float64 for part in _NUMBERS}, f"{name}_unit": pl.String, f"{name}_seeds": pl.Int64}


def _estimate_columns(found: Estimate | None, name: str) -> dict[str, Any]:
    return {f"{name}_{part}": getattr(found, part, None) for part in (*_NUMBERS, "unit", "seeds")}


def write_paths(store: Store, view: StudyView, out: Path | None) -> dict[str, Any]:
    """Analyse the paths of a study, or of a single run given as one, and write figures, tables and a page.

    Writes ``paths.html``, ``paths.csv``, ``rewinds.csv``, ``summary.json`` and ``figures/*.{svg,png}``; files of the
    same names are replaced.

    Args:
        store: where the records are.
        view: which runs and scans.
        out: directory to write to, made if it does not exist; None: only return the summary.

    Returns:
        What ``summary.json`` says.

    Raises:
        UserError: the view asks for no scan, its scans use different items, or the directory cannot be written.
    """
    from peft_arena.analyze.evidence import read_evidence
    from peft_arena.analyze.family import Family

    evidence, family = read_evidence(store, view), Family()
    found: dict[str, TargetPaths] = {}
    gaps: list[Gap] = []
    for spec in view.targets:
        arms = [arm for arm in evidence.arms if arm.arm.target.id == spec.id]
        paths, missing = read_paths(store, evidence, arms, family)
        gaps += missing
        if paths is not None:
            found[evidence.labels[spec.id]] = paths
    if not found:
        raise UserError(f"{view.name} asks for no scan of a path")
    summary = {
        "study": view.name,
        "base": view.base.run_id,
        "headline": _sentences(found),
        "targets": [{"target": label, "paths": paths.summary()} for label, paths in found.items()],
        "gaps": [asdict(gap) for gap in gaps],
    }
    if out is not None:
        _write(evidence, found, gaps, summary, out)
    return summary


def _sentences(found: Mapping[str, TargetPaths]) -> list[str]:
    return [claim_sentence(arm, label) for label, paths in found.items() for arm in paths.arms]


def _write(
    evidence: Evidence, found: Mapping[str, TargetPaths], gaps: Sequence[Gap], summary: Mapping[str, Any], out: Path
) -> None:
    from peft_arena.report.figures import MANY
    from peft_arena.report.page_tables import gaps_table
    from peft_arena.report.svg import save_figure

    title = evidence.view.title or f"Paths of {evidence.view.name}"
    parts = [tag("h1", title), tag("p", f"study {evidence.view.name}", class_="meta")]
    told = (tag("p", text) for text in _sentences(found))
    parts.append(tag("div", *told, class_="findings", role="note", aria_label="findings"))
    try:
        with written_whole(out) as part:
            (part / "figures").mkdir()
            for number, (label, paths) in enumerate(found.items(), start=1):
                named = set(paths.labels[:MANY])
                drawn = path_figures(paths, label, named, f"-{number}")
                images = [(figure, save_figure(figure, part / "figures")) for figure in drawn]
                parts.append(tag("section", tag("h2", f"Rewinding on {label}"), paths_section(paths, images)))
            if gaps:
                parts.append(tag("section", tag("h2", "Missing"), gaps_table(gaps)))
            for name, frame in path_tables(found).items():
                frame.write_csv(part / f"{name}.csv")
            (part / PAGE).write_text(_page(title, parts), encoding="utf-8")
            text = json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
            (part / "summary.json").write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror or error}") from error


def _page(title: str, parts: Sequence[Markup]) -> str:
    css = resources.files("peft_arena.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title}: peft-arena"),
        tag("style", Markup(css)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', tag('main', *parts)), lang='en')}\n"
