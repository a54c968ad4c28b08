"""Geometry as points: drift and KL divergence of every arm, and quantities against what was forgotten over runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from peft_arena.analyze.correlate import Correlation
from peft_arena.analyze.geometry import ArmGeometry, Mean, TargetGeometry, metric_name
from peft_arena.report.figures import DOT, FAINT, INK, Drawn, look, settle, shorten, text_sizes
from peft_arena.report.geometry_lines import legend_above, wide_scale
from peft_arena.report.labels import Box, place_labels
from peft_arena.report.numbers import plain, span_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AGAINST = (
    "procrustes_residual_general",
    "gram_distortion_general",
    "cka_general",
    "kl_general",
    "drift_relative_general",
    "global_l2_relative",
    "stable_rank",
    "deviation_mean",
)
"""Quantities drawn against forgetting."""
_MOST_BARS = 30


class _Pair(NamedTuple):
    arm: ArmGeometry
    across: Mean
    up: Mean


def mean_text(found: Mean) -> str:
    """Render a mean with the range of its runs."""
    if found.value is None or found.low is None or found.high is None:
        return found.reason
    span = f" ({found.low:.3g} to {found.high:.3g}, {found.runs} runs)" if found.runs > 1 else " (1 run)"
    return f"{found.value:.3g}{span}".replace("e-0", "e-")


def pairs_of(geometry: TargetGeometry, across: str, up: str) -> list[_Pair]:
    """Return the arms that have two metrics, both above zero, as a logarithmic plane can show them."""
    found = [_Pair(arm, arm.mean(across), arm.mean(up)) for arm in geometry.arms]
    return [pair for pair in found if (pair.across.value or 0) > 0 and (pair.up.value or 0) > 0]


def drift_figure(geometry: TargetGeometry, named: set[str], name: str) -> Drawn | None:
    """Draw the drift on general against that on target prompts; None where no arm has both."""
    pairs = pairs_of(geometry, "drift_relative_target", "drift_relative_general")
    if not pairs:
        return None
    canvas = Canvas(figsize=(7.4, 5.2), layout="constrained")
    FigureCanvasAgg(canvas)
    axis = canvas.subplots()
    hovers = draw_drift(axis, pairs, named, name)
    canvas.draw_without_rendering()
    label_points(axis, [pair for pair in pairs if pair.arm.label in named], pairs)
    canvas.set_layout_engine("none")
    listed = "; ".join(f"{pair.arm.label}: {mean_text(pair.up)} and {mean_text(pair.across)}" for pair in pairs)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Relative drift on general and on target prompts, {len(pairs)} arms. {listed}.",
        caption=(
            "Relative drift E||D h||² / E||W0 h||²: how much the weight change D does to the inputs h of a layer that "
            "prompts cause, against what the pretrained weight W0 does; mean over modules and runs, lines span the "
            f"runs of an arm, n = {len(pairs)} arms. Below the dashed diagonal a method changes layers more on what it "
            "was tuned for than on other prompts, above it less; on it the change does not tell the two apart."
        ),
        hovers=hovers,
    )


def draw_drift(axis: Axes, pairs: Sequence[_Pair], named: set[str], prefix: str) -> dict[str, str]:
    """Draw arms in a plane of two logarithmic scales with the diagonal; return the hover texts."""
    hovers = {}
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(True)
    for arm, across, up in pairs:
        colour, marker = look(arm.place)
        (x, left, right), (y, low, high) = across.numbers, up.numbers
        if arm.label in named:
            axis.plot([left, right], [y, y], color=colour, linewidth=1.3, alpha=0.7, zorder=3)
            axis.plot([x, x], [low, high], color=colour, linewidth=1.3, alpha=0.7, zorder=3)
        kind: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 7.5} if arm.label in named else DOT
        (mark,) = axis.plot(x, y, linestyle="none", zorder=4, **kind)
        mark.set_gid(f"{prefix}-{arm.place}")
        hovers[f"{prefix}-{arm.place}"] = f"{arm.label}: general {mean_text(up)}, target {mean_text(across)}"
    values = [value for pair in pairs for found in (pair.across, pair.up) for value in found.numbers if value > 0]
    low, high = min(values), max(values)
    axis.set_xlim(low / 1.6, high * 1.6)
    axis.set_ylim(low / 1.6, high * 1.6)
    ends = [low / 1.6, high * 1.6]
    axis.plot(ends, ends, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    axis.set_xlabel("relative drift, target prompts")
    axis.set_ylabel("relative drift, general prompts")
    return hovers


def label_points(axis: Axes, labelled: Sequence[_Pair], shown: Sequence[_Pair], size: float = 9.0) -> None:
    """Name points of a plane so that no name covers another or a mark; the figure must have been laid out."""
    if not labelled:
        return
    to_pixels = axis.transData.transform

    def pixel(pair: _Pair) -> tuple[float, float]:
        x, y = to_pixels((pair.across.numbers[0], pair.up.numbers[0]))
        return float(x), float(y)

    points = [pixel(pair) for pair in labelled]
    solid = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in map(pixel, shown)]
    frame = Box(*axis.get_window_extent().extents)
    steps = np.linspace(0, 1, 40)
    (x0, x1), (y0, y1) = (frame.left, frame.right), (frame.bottom, frame.top)
    soft = [
        Box(x - 3, y - 3, x + 3, y + 3) for x, y in zip(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0), strict=True)
    ]
    texts = [shorten(pair.arm.label, 22) for pair in labelled]
    sizes = text_sizes(axis, texts)
    for text, place, extent, (x, y) in zip(
        texts, place_labels(points, sizes, frame, solid, soft), sizes, points, strict=True
    ):
        back = axis.transData.inverted().transform
        middle = back((place.x + extent[0] / 2, place.y + extent[1] / 2))
        if place.leader:
            start = back((x, y))
            axis.plot([start[0], middle[0]], [start[1], middle[1]], color=FAINT, linewidth=0.7, zorder=2.5)
        axis.text(
            float(middle[0]), float(middle[1]), text, ha="center", va="center", fontsize=size, color=INK, zorder=6,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip


class Series(NamedTuple):
    """One metric of a figure of dots: its name, and whether its marks are filled."""

    metric: str
    text: str
    filled: bool


def draw_dots(
    axis: Axes, arms: Sequence[ArmGeometry], series: Sequence[Series], prefix: str, size: float = 9.0
) -> dict[str, str]:
    """Draw one row for each arm and a mark for each series in it, sorted by the first series; return hover texts."""
    order = sorted(arms, key=lambda arm: -(arm.mean(series[0].metric).value or 0.0))
    hovers, every = {}, []
    axis.grid(True, axis="x")
    for row, arm in enumerate(order):
        colour, marker = look(arm.place)
        found = [(one, arm.mean(one.metric)) for one in series]
        known = [mean.value for _, mean in found if mean.value is not None]
        if len(known) > 1:
            axis.plot([min(known), max(known)], [row, row], color=colour, linewidth=1.0, alpha=0.5, zorder=2)
        for number, (one, mean) in enumerate(found):
            if mean.value is None:
                continue
            every.append(mean.value)
            (mark,) = axis.plot(
                mean.value, row, marker=marker, markersize=7, linestyle="none", zorder=3 + one.filled,
                markerfacecolor=colour if one.filled else "white", markeredgecolor=colour, markeredgewidth=1.5,
            )  # fmt: skip
            key = f"{prefix}-{number}-{arm.place}"
            mark.set_gid(key)
            hovers[key] = f"{arm.label}, {one.text}: {mean_text(mean)}"
    axis.set_yticks(range(len(order)), [shorten(arm.label, 22) for arm in order], fontsize=size)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_ylim(len(order) - 0.4, -0.6)
    wide_scale(axis, every, along="x")
    axis.margins(x=0.06)
    return hovers


def kl_figure(geometry: TargetGeometry, named: set[str], name: str) -> Drawn | None:
    """Draw the forward KL divergence on general and on target prompts; None where no arm has it."""
    known = [arm for arm in geometry.arms if arm.mean("kl_general").value is not None]
    arms = known if len(known) <= _MOST_BARS else [arm for arm in known if arm.label in named]
    if not arms:
        return None
    canvas = Canvas(figsize=(7.4, 1.3 + 0.3 * len(arms)), layout="constrained")
    FigureCanvasAgg(canvas)
    axis = canvas.subplots()
    series = (Series("kl_general", "general prompts", True), Series("kl_target", "target prompts", False))
    hovers = draw_dots(axis, arms, series, name)
    axis.set_xlabel("forward KL(base || tuned), nats per token; filled: general prompts, open: target prompts")
    settle(canvas)
    listed = "; ".join(
        f"{arm.label}: {mean_text(arm.mean('kl_general'))} and {mean_text(arm.mean('kl_target'))}" for arm in arms
    )
    left = len(known) - len(arms)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Forward KL divergence per token on general and on target prompts, {len(arms)} arms. {listed}.",
        caption=(
            "How far the tuned model's next-token distribution is from the base model's, averaged over the tokens of "
            "the prompts and over runs. To change on target prompts is what a method was tuned for, to change on "
            f"general prompts is not. n = {len(arms)} arms, the highest on general prompts first."
            + (f" {left} more are in the table and the interactive page." if left else "")
        ),
        hovers=hovers,
    )


def coefficient_text(found: Correlation) -> str:
    """Render a rank correlation with its interval, for example ``0.71 [0.30, 0.90]``; without one for few arms."""
    if found.value is None:
        return "not defined"
    if found.low is None or found.high is None:
        return f"{plain(found.value, 2)} ({found.arms} arms: no interval)"
    return f"{plain(found.value, 2)} [{plain(found.low, 2)}, {plain(found.high, 2)}]"


def correlation_figure(geometry: TargetGeometry, named: set[str], name: str) -> Drawn | None:
    """Draw the main quantities against what each run forgot, a panel each; None where no run has both."""
    known = {found.metric: found for found in geometry.correlations if found.outcome == "forgetting"}
    shown = [metric for metric in AGAINST if metric in known and known[metric].value is not None]
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    canvas = Canvas(figsize=(10.4, 0.9 + 2.75 * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(rows, columns, sharey=True, squeeze=False)
    hovers: dict[str, str] = {}
    for place, axis in enumerate(grid.flat):
        if place >= len(shown):
            axis.set_visible(False)
            continue
        _scatter(axis, geometry, known[shown[place]], named, f"{name}-{place}", hovers)
    canvas.supylabel("forgetting (points)", fontsize=10, color=INK)
    legend_above(canvas, [arm for arm in geometry.arms if arm.label in named and any(_known(arm, shown))], lines=False)
    settle(canvas)
    said = "; ".join(f"{metric_name(metric).title}: Spearman {coefficient_text(known[metric])}" for metric in shown)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Geometry against forgetting over {_arms(known, shown)} arms. {said}.",
        caption=(
            "Each mark is a run; forgetting is minus its mean retention. ρ: Spearman's rank correlation over "
            f"{_arms(known, shown)} arms, each with the mean of its runs. A correlation over few arms is not a cause: "
            f"a method that moves more in one sense often moves more in others, and {geometry.looked_at} quantities "
            "were looked at, so some look related by chance."
        ),
        hovers=hovers,
    )


def narrow_log(axis: Axes, values: Sequence[float]) -> None:
    """Make the lower axis of a narrow panel logarithmic, with so few ticks that their labels stay apart."""
    axis.set_xscale("log")
    decades = math.log10(max(values) / min(values))
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if decades < 2.5 else (1.0,), numticks=6))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _known(arm: ArmGeometry, metrics: Sequence[str]) -> list[bool]:
    return [arm.mean(metric).value is not None for metric in metrics]


def _arms(known: Mapping[str, Correlation], shown: Sequence[str]) -> str:
    return span_of([known[metric].arms for metric in shown])


def _scatter(
    axis: Axes, geometry: TargetGeometry, found: Correlation, named: set[str], prefix: str, hovers: dict[str, str]
) -> None:
    axis.grid(True)
    values = []
    for arm in geometry.arms:
        colour, marker = look(arm.place)
        own: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 6, "alpha": 0.85}
        kind = own if arm.label in named else DOT
        for number, run in enumerate(arm.runs):
            measure = run.measures.get(found.metric)
            if measure is None or measure.value is None or run.forgetting is None:
                continue
            values.append(measure.value)
            (mark,) = axis.plot(measure.value, run.forgetting, linestyle="none", zorder=3, **kind)
            key = f"{prefix}-{arm.place}-{number}"
            mark.set_gid(key)
            seed = "" if run.seed is None else f", seed {run.seed}"
            hovers[key] = f"{arm.label}{seed}: {measure.value:.3g}, forgetting {plain(run.forgetting)} points"
    if min(values) > 0 and max(values) >= 30 * min(values):
        narrow_log(axis, values)
    axis.set_title(
        f"ρ = {coefficient_text(found)}",
        fontsize=9,
        color=INK,
        loc="left",
    )
    axis.set_xlabel(metric_name(found.metric).title.replace(" prompts", ""), fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.margins(0.08)
