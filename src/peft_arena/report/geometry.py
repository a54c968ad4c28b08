"""The report's section on geometry, its tables, and the same for checkpoints that belong to no study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.analyze.correlate import FEWEST_JUDGED, Correlation
from peft_arena.analyze.family import ALPHA
from peft_arena.analyze.geometry import MAIN, NOT_APPLICABLE, ArmGeometry, TargetGeometry, make_run, metric_name
from peft_arena.core.errors import UserError
from peft_arena.report.geometry_html import PAGE
from peft_arena.report.markup import Markup, cell, join, table, tag
from peft_arena.report.numbers import MINUS, NONE, p_text, plain, span_of
from peft_arena.report.whole import written_whole

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.analyze.study import StudyResult, TargetResult
    from peft_arena.report.figures import Drawn
    from peft_arena.store.records import GeometryRecord

GEOMETRY = "geometry-"
"""Begins the name of every figure of the section."""
INTRODUCTION = (
    "What the methods did to the model, as a hint at why some forget more. D is the change of a weight, tuned minus "
    "pretrained. A method that has no weights of its own, such as prompts, has no D: it is marked n/a, not zero."
)
READING = (
    (
        "Size and shape of the change",
        "The relative L2 norm says how large D is next to the weight. The ranks say over how many directions it is "
        "spread: 1 is a single direction. The mean deviation says how much of what the pretrained weight did in its "
        "own singular directions is no longer so, the mean adaptation how much was added to them.",
    ),
    (
        "What prompts see of it",
        "Drift is what D does to the inputs that general prompts (what the model could before) and target prompts "
        "(what it was tuned for) cause in a layer. General ÷ target below 1: the change acts more on the target.",
    ),
    (
        "What became of the activations",
        "The Procrustes residual is what is left of the difference once the tuned activations are turned as well as "
        "possible; Gram distortion compares the angles among tokens; CKA is 1 where both models' activations carry the "
        "same linear structure; KL is the change of the model's own predictions.",
    ),
)
_MOST_CORRELATIONS = 12
_DETAILS = {"geometry-entropy": "Entropy rank over depth", "geometry-grid": "Every profile, method by method"}


def geometry_figures(geometry: TargetGeometry, named: set[str], end: str = "") -> list[Drawn]:
    """Draw every figure of geometry there are numbers for.

    Args:
        geometry: of the arms of a target, or of checkpoints.
        named: labels to name and colour.
        end: of the figures' names, to tell targets apart.
    """
    from peft_arena.report.figures import style
    from peft_arena.report.geometry_composite import composite_figure
    from peft_arena.report.geometry_lines import depth_figure, grid_figure, profile_figure
    from peft_arena.report.geometry_points import correlation_figure, drift_figure, kl_figure

    with style():
        drawn = (
            correlation_figure(geometry, named, f"geometry-against{end}"),
            composite_figure(geometry, named, f"geometry-overview{end}"),
            profile_figure(geometry, named, f"geometry-profiles{end}"),
            grid_figure(geometry, named, f"geometry-grid{end}"),
            depth_figure(geometry, named, f"geometry-rank{end}", "stable_rank"),
            depth_figure(geometry, named, f"geometry-entropy{end}", "entropy_rank"),
            drift_figure(geometry, named, f"geometry-drift{end}"),
            kl_figure(geometry, named, f"geometry-kl{end}"),
        )
    return [figure for figure in drawn if figure is not None]


def geometry_section(target: TargetResult, images: Sequence[tuple[Drawn, Markup]]) -> Markup:
    """Return the section of one target: how to read it, the tables, the figures, the link to the interactive page."""
    geometry = target.geometry
    assert geometry is not None, "the page asks only where there is geometry"
    link = tag("a", "the interactive page", href=PAGE)
    reading = tag("dl", *(part for name, text in READING for part in (tag("dt", name), tag("dd", text))))
    parts: list[object] = [
        tag("p", INTRODUCTION),
        tag("p", "Every module and every quantity: ", link, " and tables/geometry.csv."),
        reading,
        *_figures(images, first=True),
        correlation_table(geometry),
        geometry_table(geometry),
        *_figures(images, first=False),
    ]
    return join(parts)


def _figures(images: Sequence[tuple[Drawn, Markup]], *, first: bool) -> list[Markup]:
    """Return the figure against forgetting, which comes first, or all others; some are folded."""
    from peft_arena.report.svg import captioned

    found = []
    for drawn, image in images:
        if drawn.name.startswith("geometry-against") != first:
            continue
        stem = next((stem for stem in _DETAILS if drawn.name.startswith(stem)), None)
        shown = captioned(drawn, image)
        found.append(shown if stem is None else tag("details", tag("summary", _DETAILS[stem]), shown))
    return found


def value_text(value: float | None, digits: int = 3) -> str:
    """Render a quantity with some significant digits, very small and large ones as a power of ten."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 100_000:
        text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
        return text.replace("-", MINUS)
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)


def geometry_table(geometry: TargetGeometry) -> Markup:
    """Return the main quantities of every arm, mean over runs with their range."""
    metrics = [metric for metric in MAIN if metric in geometry.metrics]
    head: list[object] = ["arm", "runs", *(_heading(metric) for metric in metrics)]
    rows = [
        [
            join([arm.label]),
            cell(len([run for run in arm.runs if run.records])),
            *(_mean_cell(arm, metric) for metric in metrics),
        ]
        for arm in geometry.arms
    ]
    note = (
        "Mean over runs (seeds); small: least to most. Each run's number is a mean over modules: norms, ranks, "
        "deviation and adaptation over the linear layers that the method changed, so those of a method that leaves "
        "many layers alone look large; drift over all linear layers, an unchanged one counting as 0; activations over "
        "those measured; general ÷ target is the mean of the layers' own ratios, over changed layers; KL is one over "
        f"tokens. n/a: the method has no weights of its own. {NONE}: not there, point at it for the reason. Point at "
        "a number for how it was obtained, at a heading for the formula."
    )
    return table("Geometry of every arm", head, rows, "main", note)


def _heading(metric: str) -> Markup:
    name = metric_name(metric)
    return tag("span", name.title, title=name.known.formula if name.known else None)


def _mean_cell(arm: ArmGeometry, metric: str) -> Markup:
    found = arm.mean(metric)
    if found.value is None:
        text = "n/a" if found.reason == NOT_APPLICABLE else NONE
        return cell(tag("span", text, class_="none"), title=found.reason)
    span = f"{value_text(found.low, 2)}–{value_text(found.high, 2)}" if found.runs > 1 else ""
    how = next(known.how for run in arm.runs if (known := run.measures.get(metric)) and known.value is not None)
    runs = "1 run" if found.runs == 1 else f"{found.runs} runs"
    return cell(join([value_text(found.value), tag("small", span)]), title=f"{runs}; {how}")


def correlation_table(geometry: TargetGeometry) -> Markup:
    """Return the correlations with forgetting and gain of the main quantities, all others folded away."""
    by_metric: dict[str, dict[str, Correlation]] = {}
    for found in geometry.correlations:
        by_metric.setdefault(found.metric, {})[found.outcome] = found
    usable = [name for name, both in by_metric.items() if any(found.value is not None for found in both.values())]
    if not usable:
        reasons = dict.fromkeys(found.reason for found in geometry.correlations if found.reason)
        why = next(iter(reasons), "nothing was measured")
        return tag("p", f"No correlation with forgetting or gain: {why}.", class_="note")
    main = [name for name in MAIN if name in usable] or usable[:_MOST_CORRELATIONS]
    others = [name for name in usable if name not in main]
    parts: list[object] = [
        _correlation_rows(geometry, by_metric, main, "Geometry against forgetting and gain, over arms")
    ]
    if others:
        more = _correlation_rows(geometry, by_metric, others, "The other quantities", note=False)
        parts.append(tag("details", tag("summary", f"{len(others)} more quantities"), more))
    return join(parts)


def _correlation_rows(
    geometry: TargetGeometry,
    by_metric: Mapping[str, Mapping[str, Correlation]],
    metrics: Sequence[str],
    caption: str,
    note: bool = True,
) -> Markup:
    head = ["quantity", "arms", "forgetting: Spearman ρ", "p", "gain: Spearman ρ", "p"]
    rows = []
    for metric in metrics:
        both = by_metric[metric]
        used = [found for found in both.values() if found.value is not None]
        told = "; ".join(
            f"{one.outcome}: {one.arms} arms, {one.left_out} arms left out that lack a number" for one in used
        )
        rows.append(
            [
                _heading(metric),
                cell(span_of([one.arms for one in used]), title=told),
                *(part for name in ("forgetting", "gain") for part in _coefficient_cells(both[name])),
            ]
        )
    text = (
        f"{geometry.looked_at} quantities were looked at. Rank correlations over arms, each with the mean of its runs; "
        "p-values are Holm-corrected over the quantities, each column for itself; brackets: uncorrected 95 % intervals "
        "(Bonett and Wright 2000). Bold: corrected p below 0.05. A correlation over few methods is not a cause: a "
        f"method that changes more of one thing often changes more of everything. With fewer than {FEWEST_JUDGED} arms "
        "there is neither interval nor p-value, and nothing can be said."
    )
    return table(caption, head, rows, "geometry", text if note else "")


def _coefficient_cells(found: Correlation) -> list[Markup]:
    if found.value is None:
        return [cell(tag("span", NONE, class_="none"), title=found.reason), cell(NONE)]
    sure = found.p_corrected is not None and found.p_corrected < ALPHA
    value = tag("b", plain(found.value, 2)) if sure else plain(found.value, 2)
    ends = f"{found.arms} arms: no interval"
    if found.low is not None and found.high is not None:
        ends = f"[{plain(found.low, 2)}, {plain(found.high, 2)}]"
    title = f"uncorrected p {p_text(found.p)}"
    return [cell(join([value, tag("small", ends)])), cell(p_text(found.p_corrected), title=title)]


def geometry_tables(result: StudyResult) -> dict[str, pl.DataFrame]:
    """Return ``geometry`` and ``geometry_correlations`` for the CSV files; empty where a study has no geometry."""
    import polars as pl

    found = [(target.label, target.geometry) for target in result.targets if target.geometry is not None]
    if not found:
        return {}
    rows = [row for label, geometry in found for row in _long_rows(label, geometry)]
    correlations = [_flat(label, one) for label, geometry in found for one in geometry.correlations]
    return {
        "geometry": pl.DataFrame(rows, schema=_long_schema(), orient="row"),
        "geometry_correlations": pl.DataFrame(correlations, schema=_flat_schema(), orient="row"),
    }


def _long_schema() -> dict[str, Any]:
    import polars as pl

    text = dict.fromkeys(("target", "run", "arm"), pl.String)
    rest = dict.fromkeys(("prompts", "quantity"), pl.String)
    return {
        **text, "seed": pl.Int64, "what": pl.String, "module": pl.String, "block": pl.Int64, **rest,
        "value": pl.Float64, "reason": pl.String,
    }  # fmt: skip


def _long_rows(label: str, geometry: TargetGeometry) -> list[tuple[Any, ...]]:
    """Return a row for each value and each total of each record, and one for each part a run has no record of."""
    rows: list[tuple[Any, ...]] = []
    for run in (run for arm in geometry.arms for run in arm.runs):
        start = (label, run.run_id, run.label, run.seed)
        for part, record in run.records.items():
            for row in record.rows:
                place = (part, row.module, row.block, row.prompts)
                rows += [(*start, *place, name, value, row.reasons.get(name, "")) for name, value in row.values.items()]
            rows += [
                (*start, part, "", None, "", total.metric, total.value, "" if total.value is not None else total.how)
                for total in record.summary
                if metric_name(total.metric).total
            ]
        rows += [(*start, part, "", None, "", "", None, why) for part, why in run.absent.items()]
    return rows


def _flat_schema() -> dict[str, Any]:
    import polars as pl

    text = dict.fromkeys(("target", "metric", "outcome"), pl.String)
    counts = dict.fromkeys(("arms", "left_out"), pl.Int64)
    numbers = dict.fromkeys(("spearman", "low", "high", "p", "p_corrected"), pl.Float64)
    return {**text, **counts, **numbers, "reason": pl.String}


def _flat(label: str, found: Correlation) -> tuple[Any, ...]:
    numbers = (found.value, found.low, found.high, found.p, found.p_corrected)
    return (label, found.metric, found.outcome, found.arms, found.left_out, *numbers, found.reason)


def write_geometry_page(records: Sequence[tuple[str, GeometryRecord, pl.DataFrame | None]], out: Path) -> list[Path]:
    """Write figures and the interactive page for any checkpoints, without anything known of what they forgot.

    Args:
        records: label of the checkpoint, a record of it, and the profiles that belong to the record. Several records of
            one label are put together.
        out: directory to write to; made if it does not exist.

    Returns:
        Every file that was written: the page first, then ``figures/*.{svg,png}``.

    Raises:
        UserError: the directory cannot be written.
    """
    from peft_arena.report.figures import MANY
    from peft_arena.report.geometry_html import write_interactive
    from peft_arena.report.svg import save_figure

    grouped: dict[str, list[tuple[GeometryRecord, pl.DataFrame | None]]] = {}
    for label, record, arrays in records:
        grouped.setdefault(label, []).append((record, arrays))
    arms = tuple(
        ArmGeometry(label, place, (make_run(label, found[0][0].subject, None, found),))
        for place, (label, found) in enumerate(grouped.items())
    )
    geometry = TargetGeometry(arms)
    labels = list(grouped)
    named = set(labels if len(labels) <= MANY else labels[: MANY // 2])
    try:
        with written_whole(out, swap=False) as part:
            (part / "figures").mkdir()
            written = write_interactive({"": geometry}, part, title="Geometry", named={"": named})
            for drawn in geometry_figures(geometry, named):
                save_figure(drawn, part / "figures")
                written += [part / "figures" / f"{drawn.name}.{end}" for end in ("svg", "png")]
            written = [out / file.relative_to(part) for file in written]
    except OSError as error:
        raise UserError(f"cannot write the figures to {out}: {error.strerror or error}") from error
    return written
