"""Geometry as lines: profiles over singular directions, and ranks over the depth of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from peft_arena.analyze.geometry import ArmGeometry, TargetGeometry, metric_name
from peft_arena.analyze.profiles import MISALIGNMENT, Profile, short_names, window_of
from peft_arena.report.figures import FAINT, INK, Drawn, Placed, look, settle, shorten, text_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)), (0, (9, 2)))
COLUMN_TITLES = {
    "deviation": r"retention deviation $|u_i^T W_1 v_i - s_i|$",
    "adaptation": r"adaptation $\Vert D v_i \Vert$",
    "change_singular_value": r"singular values of $D$",
    MISALIGNMENT: r"misalignment $1 - |\cos(v_i, v_i^1)|$",
}
"""Column of the profiles to the title of its axis."""
DEFINED = (
    "W0 = U S Vᵀ is the pretrained weight, W1 the tuned one and D = W1 − W0; direction 0 belongs to the largest "
    "singular value."
)
_FEW_LINES = 6
_MOST_ROWS = 12
_TALLEST_PANELS = 12


def line_style(place: int) -> dict[str, Any]:
    """Return colour, marker and dash of the arm at a position: told apart in grey as well."""
    colour, marker = look(place)
    return {"color": colour, "marker": marker, "linestyle": DASHES[place % len(DASHES)]}


def main_kind(geometry: TargetGeometry) -> str | None:
    """Return the kind of module that most arms have profiles of, the model's first of several; None without any."""
    kinds = geometry.kinds
    counts = {kind: sum(any(kind in run.kinds for run in arm.runs) for arm in geometry.arms) for kind in kinds}
    return max(kinds, key=lambda kind: counts[kind], default=None)


def profile_figure(geometry: TargetGeometry, named: set[str], name: str, kind: str | None = None) -> Drawn | None:
    """Draw how far every arm moves each singular direction, and what it adds there; None without profiles.

    Args:
        geometry: of the arms.
        named: labels of the arms to colour and name; the others are faint lines.
        name: of the figure.
        kind: of module; the one most arms have if None.
    """
    kind = kind or main_kind(geometry)
    shown = _with_profiles(geometry, kind)
    if kind is None or not shown:
        return None
    canvas = Canvas(figsize=(10.4, 4.3), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(1, 2)
    for axis, column in zip(axes, ("deviation", "adaptation"), strict=True):
        ends = draw_profiles(axis, shown, named, column)
        axis.set_title(COLUMN_TITLES[column], fontsize=10, color=INK, loc="left")
        axis.set_xlabel(f"singular direction of {short_names(geometry.kinds)[kind]}")
        label_ends(axis, ends)
    settle(canvas)
    first = shown[0][1]
    several = f"mean over {_most_modules(geometry, kind)} modules called {kind} and over the runs of an arm"
    listed = "; ".join(
        f"{arm.label}: {np.mean(profile.values['deviation']):.3g} and {np.mean(profile.values['adaptation']):.3g}"
        for arm, profile in shown
    )
    others = sum(arm.label not in named for arm, _ in shown)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Retention deviation and adaptation over singular directions, log scale, {len(shown)} arms. "
        f"Means over the directions, {listed}.",
        caption=(
            f"Left: how far the tuned weight moved what the pretrained one does in each of its own singular "
            f"directions; right: how much the change adds there. {DEFINED} Lines: moving average over "
            f"{window_of(first.directions)} directions; {several}, n = {len(shown)} arms; the scale is logarithmic. A "
            "method whose line is high on the left of a panel rewrites what the pretrained weight does most."
            + (f" Grey lines without a name: {others} other arms." if others else "")
        ),
    )


def _with_profiles(geometry: TargetGeometry, kind: str | None) -> list[tuple[ArmGeometry, Profile]]:
    if kind is None:
        return []
    return [(arm, found) for arm in geometry.arms if (found := arm.profile(kind)) is not None]


def _most_modules(geometry: TargetGeometry, kind: str) -> int:
    return max(run.kinds[kind].modules for run in geometry.runs if kind in run.kinds)


def draw_profiles(
    axis: Axes, shown: Sequence[tuple[ArmGeometry, Profile]], named: set[str], column: str
) -> list[tuple[float, int, str]]:
    """Draw the moving average of every profile, and of few the values behind it; return where named lines end."""
    few = sum(arm.label in named for arm, _ in shown) <= _FEW_LINES
    ends = []
    axis.set_yscale("log")
    axis.grid(True)
    for arm, profile in shown:
        if column not in profile.values:
            continue
        smooth = _positive(profile.smoothed(window_of(profile.directions)).values[column])
        if arm.label not in named:
            axis.plot(profile.index, smooth, color=FAINT, linewidth=0.7, alpha=0.6, zorder=2)
            continue
        style = line_style(arm.place)
        if few:
            axis.plot(
                profile.index,
                _positive(profile.values[column]),
                color=style["color"],
                linewidth=0.6,
                alpha=0.28,
                zorder=2,
            )
        step = max(1, len(smooth) // 8)
        axis.plot(
            profile.index,
            smooth,
            linewidth=1.6,
            markersize=4.5,
            markevery=((arm.place * step) // 12, step),
            zorder=3,
            label=arm.label,
            **style,
        )
        known = np.flatnonzero(np.isfinite(smooth))
        if len(known):
            ends.append((float(smooth[known[-1]]), arm.place, arm.label))
    axis.margins(x=0.02)
    return ends


def _positive(values: np.ndarray) -> np.ndarray:
    """Return values with those that a log scale cannot show left out."""
    return np.where(values > 0, values, np.nan)


def label_ends(axis: Axes, ends: Sequence[tuple[float, int, str]], size: float = 9.0) -> None:
    """Write the names of lines to the right of where they end, moved apart so that none covers another.

    Args:
        axis: a panel whose data are drawn.
        ends: height, position of the arm and name of every line.
        size: of the text in points.
    """
    if not ends:
        return
    canvas = axis.get_figure()
    order = sorted(ends)
    texts = [
        axis.annotate(
            shorten(label, 22),
            xy=(1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(14, 0),
            textcoords="offset points",
            fontsize=size,
            color=INK,
            va="center",
            arrowprops={"arrowstyle": "-", "color": look(place)[0], "linewidth": 0.9, "relpos": (0, 0.5), "shrinkA": 1},
        )
        for height, place, label in order
    ]
    canvas.draw_without_rendering()  # type: ignore[union-attr]
    box = axis.get_window_extent()
    dots = canvas.dpi / 72  # type: ignore[union-attr]
    wanted = [float(axis.transData.transform((1.0, height))[1]) for height, _, _ in order]
    gap = min(size * 1.3 * dots, box.height / max(len(order) - 1, 1))
    for text, target, place in zip(texts, wanted, spread(wanted, gap, box.y0, box.y1), strict=True):
        text.xyann = (14, (place - target) / dots)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return ascending places next to the wanted ones, at least ``gap`` apart and between ``low`` and ``high``."""
    groups: list[list[float]] = []  # each: sum of what its members want of its first place, and how many they are
    for place in wanted:
        groups.append([place, 1])
        while len(groups) > 1 and _middle(groups[-2]) + gap * groups[-2][1] > _middle(groups[-1]):
            total, count = groups.pop()
            groups[-1][0] += total - count * gap * groups[-1][1]
            groups[-1][1] += count
    found = [_middle(group) + gap * step for group in groups for step in range(int(group[1]))]
    for step, place in enumerate(found):
        found[step] = max(place, low if not step else found[step - 1] + gap)
    top = high
    for step in range(len(found) - 1, -1, -1):
        found[step] = min(found[step], top)
        top = found[step] - gap
    return found


def _middle(group: Sequence[float]) -> float:
    return group[0] / group[1]


def legend_above(canvas: Canvas, arms: Sequence[Placed], lines: bool = True) -> None:
    """Put the names of arms above all panels of a figure, each with its mark and, if there are lines, its line."""
    if not arms:
        return
    handles = [Line2D([], [], linewidth=1.5, markersize=5, **line_style(arm.place)) for arm in arms]
    if not lines:
        for handle in handles:
            handle.set_linestyle("none")
    names = [shorten(arm.label, 22) for arm in arms]
    widest = max(width for width, _ in text_sizes(canvas.axes[0], names)) * 72 / canvas.dpi
    columns = max(1, min(len(arms), int(canvas.get_figwidth() * 72 / (widest + (58 if lines else 38)))))
    canvas.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3.4 if lines else 1.2,
        columnspacing=1.6,
    )


def depth_figure(
    geometry: TargetGeometry, named: set[str], name: str, quantity: str, prompts: str = "", part: str = "spectra"
) -> Drawn | None:
    """Draw a quantity over the transformer blocks, a panel for each kind of module; None where no run has it."""
    shown = [(arm, depth) for arm in geometry.arms if (depth := arm.depth(quantity, part, prompts))]
    every = list(dict.fromkeys(kind for _, depth in shown for kind in depth))
    kinds, hidden = every[:_TALLEST_PANELS], len(every[_TALLEST_PANELS:])
    if not kinds:
        return None
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    canvas = Canvas(figsize=(10.4, 0.9 + 2.1 * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    short = short_names(kinds)
    for place, axis in enumerate(grid.flat):
        if place >= len(kinds):
            axis.set_visible(False)
            continue
        draw_depth(axis, [(arm, depth.get(kinds[place], {})) for arm, depth in shown], named)
        axis.set_title(shorten(short[kinds[place]]), fontsize=10, color=INK, loc="left")
    wide_scale(grid.flat[0], [value for _, depth in shown for found in depth.values() for value in found.values()])
    title = metric_name(f"{quantity}_{prompts}" if prompts else quantity)
    canvas.supxlabel("transformer block", fontsize=10, color=INK)
    canvas.supylabel(title.title, fontsize=10, color=INK)
    legend_above(canvas, [arm for arm, _ in shown if arm.label in named])
    settle(canvas)
    known = title.known
    means = "; ".join(f"{arm.label} {_mean(depth):.3g}" for arm, depth in shown)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"{title.title} over {len(shown[0][1][kinds[0]])} blocks for {len(kinds)} kinds of module. Means, {means}.",
        caption=(
            f"{title.title[0].upper()}{title.title[1:]}{f', {known.formula},' if known else ''} by transformer block "
            f"and kind of module; D is the change of a weight. Mean over the runs of an arm, n = {len(shown)} arms; "
            "one scale for all panels."
            + (f" {hidden} more kinds are in the interactive page." if hidden else "")
            + _unnamed(shown, named)
        ),
    )


def _mean(depth: dict[str, dict[int, float]]) -> float:
    return float(np.mean([value for found in depth.values() for value in found.values()]))


def _unnamed(shown: Sequence[tuple[ArmGeometry, object]], named: set[str]) -> str:
    others = sum(arm.label not in named for arm, _ in shown)
    return f" Grey lines: {others} other arms." if others else ""


def draw_depth(axis: Axes, shown: Sequence[tuple[ArmGeometry, dict[int, float]]], named: set[str]) -> None:
    """Draw values by block, one line for each arm."""
    axis.grid(True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for arm, found in shown:
        if not found:
            continue
        blocks, values = list(found), list(found.values())
        if arm.label in named:
            every = max(1, len(blocks) // 8)
            axis.plot(blocks, values, linewidth=1.4, markersize=4.5, markevery=every, zorder=3, **line_style(arm.place))
        else:
            axis.plot(blocks, values, color=FAINT, linewidth=0.7, alpha=0.6, zorder=2)


def wide_scale(axis: Axes, values: Sequence[float], along: str = "y") -> bool:
    """Make an axis logarithmic if its values are positive and their largest is ten times their least; say whether."""
    wide = bool(values) and min(values) > 0 and max(values) >= 10 * min(values)
    if wide:
        (axis.set_yscale if along == "y" else axis.set_xscale)("log")
    if wide and max(values) < 1000 * min(values) and min(values) >= 0.01 and max(values) < 1e5:
        ticks = axis.yaxis if along == "y" else axis.xaxis
        ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())
    return wide


def grid_figure(geometry: TargetGeometry, named: set[str], name: str, kind: str | None = None) -> Drawn | None:
    """Draw a row for each named arm and a column for each profile; None without profiles."""
    kind = kind or main_kind(geometry)
    shown = [entry for entry in _with_profiles(geometry, kind) if entry[0].label in named][:_MOST_ROWS]
    columns = [name for name in COLUMN_TITLES if any(name in profile.values for _, profile in shown)]
    if kind is None or not shown:
        return None
    canvas = Canvas(figsize=(10.4, 0.9 + 1.15 * len(shown)), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(len(shown), len(columns), sharex=True, sharey="col", squeeze=False)
    for axes, (arm, profile) in zip(grid, shown, strict=True):
        smooth = profile.smoothed(window_of(profile.directions))
        for axis, column in zip(axes, columns, strict=True):
            axis.grid(True)
            if column not in profile.values:
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color=FAINT)
                continue
            colour = look(arm.place)[0]
            own = column == "change_singular_value"
            axis.plot(
                profile.index,
                _positive(profile.values[column]),
                color=colour if own else FAINT,
                linewidth=1.4 if own else 0.7,
            )
            if not own:
                axis.plot(profile.index, _positive(smooth.values[column]), color=colour, linewidth=1.5)
        end = {"xycoords": "axes fraction", "xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes[-1].annotate(shorten(arm.label, 22), (1.0, 0.5), fontsize=9.5, color=INK, **end)
    for axis, column in zip(grid[0], columns, strict=True):
        every = np.concatenate([profile.values[column] for _, profile in shown if column in profile.values])
        if every[every > 0].size and every.max() > 10 * every[every > 0].min():
            axis.set_yscale("log")
            for one in grid[:, columns.index(column)]:
                one.yaxis.set_minor_locator(NullLocator())
        axis.set_title(COLUMN_TITLES[column], fontsize=9.5, color=INK, loc="left")
    canvas.supxlabel(f"singular direction of {short_names(geometry.kinds)[kind]}", fontsize=10, color=INK)
    settle(canvas)
    left = sum(1 for arm, _ in _with_profiles(geometry, kind)) - len(shown)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Profiles of {len(shown)} arms, a row each: {', '.join(columns).replace('_', ' ')}.",
        caption=(
            "A row for each arm, on one scale per column (logarithmic where values span a decade). Grey: values, mean "
            f"over {_most_modules(geometry, kind)} modules called {kind} and over runs; coloured: their moving average "
            f"over {window_of(shown[0][1].directions)} directions. Singular values of D, unsmoothed, end where its "
            "rank does. " + DEFINED + (f" {left} more arms are in the interactive page." if left else "")
        ),
    )
