"""The plane of gain and retention: arms as marks with intervals, or their way there through the save points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from peft_arena.analyze.estimate import Estimate
from peft_arena.core.measure import POINTS
from peft_arena.report.figures import DOT, FAINT, INK, MANY, Drawn, ends_of, look, prominent, shorten, text_sizes
from peft_arena.report.labels import Box, place_labels
from peft_arena.report.numbers import digits_of, estimate_text, plain, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from peft_arena.analyze.study import TargetResult

_MARK, _SMALLEST = 8.5, 3.5
"""Sizes of the mark of an arm and of that of its first save point."""
OBJECTIVE_MARKERS = {"sft": "o", "grpo": "^", "rloo": "s"}
"""Mark of a way of training, where a figure has several."""
_OTHER = "D"
_TWINS: dict[str, Any] = {"color": FAINT, "linestyle": (0, (1, 1.5)), "linewidth": 1.6, "zorder": 2.2}


class _Step(NamedTuple):
    step: float
    gain: float
    kept: float
    unit: str
    """Of the gain."""

    def __str__(self) -> str:
        gain = signed(self.gain, digits_of(self.unit))
        return f"step {plain(self.step, 0)}: gain {gain} {self.unit}, mean retention {signed(self.kept)} points"


class _Point(NamedTuple):
    label: str
    place: int
    gain: Estimate
    kept: Estimate
    named: bool = True
    """Whether the arm's name and intervals are drawn; otherwise it is a dot."""
    path: tuple[_Step, ...] = ()
    """Earlier save points; where there are some, they are drawn instead of the intervals."""
    objective: str = ""
    """How the arm was trained; empty where all arms were trained in the same way."""

    @property
    def marker(self) -> str:
        """The arm's own mark, or that of how it was trained."""
        return OBJECTIVE_MARKERS.get(self.objective, _OTHER) if self.objective else look(self.place)[1]

    @property
    def way(self) -> list[tuple[float, float]]:
        """Gain and retention from the base model to the arm."""
        return [(0.0, 0.0), *((step.gain, step.kept) for step in self.path), (self.gain.value, self.kept.value)]

    @property
    def across(self) -> tuple[float, float]:
        """Least and greatest gain of what is drawn."""
        gains = [gain for gain, _ in self.way]
        if not self.named:
            return (self.gain.value, self.gain.value)
        return (min(gains), max(gains)) if self.path else ends_of(self.gain)

    @property
    def up(self) -> tuple[float, float]:
        """Least and greatest retention of what is drawn."""
        kept = [kept for _, kept in self.way]
        if not self.named:
            return (self.kept.value, self.kept.value)
        return (min(kept), max(kept)) if self.path else ends_of(self.kept)


def trade_figure(target: TargetResult, name: str) -> Drawn | None:
    """Draw what is gained against what is kept, with both intervals; None without an arm that has both."""
    named = prominent(target)
    ways = _objectives(target)
    points = [
        _Point(arm.label, index, arm.gain.delta, arm.mean, arm.label in named, objective=ways[index])
        for index, arm in enumerate(target.arms)
        if arm.gain and arm.gain.delta and arm.mean
    ]
    if not points:
        return None
    pairs = () if target.rl is None else target.rl.pairs
    twins = [(pair.comparison.left, pair.comparison.right) for pair in pairs]
    canvas, hovers = _plane(target, points, name, twins)
    listed = "; ".join(f"{p.label}: gain {estimate_text(p.gain)}, retention {estimate_text(p.kept)}" for p in points)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Gain on {target.label} against mean retention for {len(points)} arms. {listed}.",
        caption=(
            "Each mark is an arm: right is more learned, up is less forgotten; the base model is the cross at (0, 0). "
            "Bars are 95 % intervals. Filled marks joined by the dashed line are the Pareto front of the estimates."
            + (
                ""
                if all(p.named for p in points)
                else " Dots are arms unlikely to be on it; point at one for its name."
            )
            + _marks_text(points)
            + (" Dotted lines join arms of the same method and settings." if twins else "")
        ),
        hovers=hovers,
    )


def along_figure(target: TargetResult, name: str) -> Drawn | None:
    """Draw the way of every arm from the base model through its save points; None without one."""
    points = []
    named = prominent(target)
    trained = _objectives(target)
    for index, arm in enumerate(target.arms):
        if arm.label not in named:
            continue
        path = tuple(
            _Step(point.step, gain.delta.value, point.effects.mean.value, gain.delta.unit)
            for point in target.along.get(arm.label, ())
            if (gain := point.effects.gain) and gain.delta and point.effects.mean and point.effects is not arm
        )
        if path and arm.gain and arm.gain.delta and arm.mean:
            points.append(_Point(arm.label, index, arm.gain.delta, arm.mean, path=path, objective=trained[index]))
    if not points:
        return None
    canvas, hovers = _plane(target, points, name)
    left_out = len(target.arms) - len(points)
    ways = ". ".join(
        f"{p.label}, {'; '.join(map(str, p.path))}; at the end: gain {estimate_text(p.gain)}, "
        f"mean retention {estimate_text(p.kept)}"
        for p in points
    )
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Gain on {target.label} against mean retention along the training of {len(points)} arms. {ways}.",
        caption=(
            "One line per arm from the base model, the cross at (0, 0), through its save points to the end of its "
            "training; marks grow with the step, and the last is the arm's mark in the first figure. Means over seeds."
            + (f" {left_out} of {len(target.arms)} arms {_why(target)}." if left_out else "")
            + _marks_text(points)
        ),
        hovers=hovers,
    )


def _objectives(target: TargetResult) -> list[str]:
    """Return how each arm was trained; nothing of any arm where that is the same for all."""
    found = [arm.evidence.arm.objective for arm in target.arms]
    return found if len(set(found)) > 1 else [""] * len(found)


def _marks_text(points: Sequence[_Point]) -> str:
    shown = dict.fromkeys(point.objective for point in points if point.objective)
    return f" The shape of a mark says how an arm was trained ({', '.join(shown)})." if shown else ""


def _legend(canvas: Canvas, points: Sequence[_Point], twins: bool) -> None:
    """Say above the panels which mark stands for which way of training, where there are several."""
    shown = {point.objective: point.marker for point in points if point.objective}
    if not shown:
        return
    marks = [Line2D([], [], linestyle="none", marker=mark, color=INK, markersize=7) for mark in shown.values()]
    names = list(shown)
    if twins:
        marks.append(Line2D([], [], **_TWINS))
        names.append("same method and settings")
    canvas.legend(marks, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=9.5)


def _draw_twins(axis: Axes, points: Sequence[_Point], twins: Sequence[tuple[str, str]]) -> bool:
    """Join arms that differ only in how they were trained; return whether there were any."""
    at = {point.label: (point.gain.value, point.kept.value) for point in points if point.named}
    lines = [(at[left], at[right]) for left, right in twins if left in at and right in at]
    for line in lines:
        axis.plot(*zip(*line, strict=True), **_TWINS)
    return bool(lines)


def _why(target: TargetResult) -> str:
    few = len(target.arms) <= MANY
    return "have nothing to draw here" if few else "have nothing to draw or are unlikely to be on the Pareto front"


def _plane(
    target: TargetResult, points: Sequence[_Point], name: str, twins: Sequence[tuple[str, str]] = ()
) -> tuple[Canvas, dict[str, str]]:
    """Draw the points; return the figure and its hover texts.

    Where a few arms lie so far off that the others crowd together, a second panel enlarges the others.
    """
    near = _crowd(points)
    zoomed = 1 < len(near) < len(points)
    ways = any(point.path for point in points)
    taller = 1.6 if len(points) > MANY else 0.0
    canvas = Canvas(figsize=(10.4, 4.9 + taller) if zoomed else (8.6, 5.4 + taller), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(1, 2 if zoomed else 1, squeeze=False)[0]
    hovers: dict[str, str] = {}
    front = {label for label, standing in target.pareto.items() if standing.on_front}
    unit = points[0].gain.unit
    joined = False
    for panel, axis in enumerate(axes):
        _limits(axis, near if panel else points, base=panel == 0 or ways)
        if panel:
            near = _within(axis, points)
        shown = near if panel else points
        _draw_points(axis, shown, points, front, f"{name}-p{panel}", hovers)
        joined |= _draw_twins(axis, shown, twins)
        axis.set_xlabel(f"gain on {target.label} over the base model ({unit})")
    axes[0].set_ylabel("mean retention, change from the base model (points)")
    if zoomed:
        low, high = axes[1].get_xlim(), axes[1].get_ylim()
        axes[0].add_patch(_rectangle(low, high))
        axes[1].set_title("enlarged: the box on the left", fontsize=10, color=INK, loc="left")
    _legend(canvas, points, joined)
    canvas.draw_without_rendering()
    hidden = {point.label for point in near} if zoomed else set()
    named = [point for point in points if point.named]
    _label(axes[0], [point for point in named if point.label not in hidden], points, base=True)
    if zoomed:
        _label(axes[1], [point for point in near if point.named], near, base=ways)
    canvas.set_layout_engine("none")
    return canvas, hovers


def _draw_points(
    axis: Axes, shown: Sequence[_Point], every: Sequence[_Point], front: set[str], prefix: str, hovers: dict[str, str]
) -> None:
    axis.axhline(0, color=FAINT, linewidth=0.9, zorder=1)
    axis.axvline(0, color=FAINT, linewidth=0.9, zorder=1)
    axis.grid(True)
    line = [] if any(p.path for p in every) else sorted((p.gain.value, p.kept.value) for p in every if p.label in front)
    if len(line) > 1:
        axis.plot(*zip(*line, strict=True), linestyle=(0, (4, 3)), color=INK, linewidth=1.0, zorder=2)
    axis.plot(0, 0, marker="+", markersize=12, markeredgewidth=1.8, color=INK, zorder=4)
    for point in shown:
        colour, marker = look(point.place)[0], point.marker
        key = f"{prefix}-{point.place}"
        hovers[key] = f"{point.label}: gain {estimate_text(point.gain)}; mean retention {estimate_text(point.kept)}"
        if not point.named:
            (mark,) = axis.plot(point.gain.value, point.kept.value, linestyle="none", zorder=3, **DOT)
            mark.set_gid(key)
            continue
        if point.path:
            _draw_way(axis, point, key, hovers)
        else:
            (left, right), (low, high) = point.across, point.up
            for x, y in (((left, right), [point.kept.value] * 2), ([point.gain.value] * 2, (low, high))):
                axis.plot(x, y, color=colour, linewidth=1.5, alpha=0.75, zorder=3, solid_capstyle="butt")
        (mark,) = axis.plot(
            point.gain.value,
            point.kept.value,
            marker=marker,
            markersize=_MARK,
            markerfacecolor=colour if point.label in front else "white",
            markeredgecolor=colour,
            markeredgewidth=1.8,
            linestyle="none",
            zorder=5,
        )
        mark.set_gid(key)


def _draw_way(axis: Axes, point: _Point, prefix: str, hovers: dict[str, str]) -> None:
    """Draw the line from the base model to the arm, with a mark for each earlier save point."""
    colour, marker = look(point.place)[0], point.marker
    axis.plot(*zip(*point.way, strict=True), color=colour, linewidth=1.4, alpha=0.75, zorder=3)
    for place, step in enumerate(point.path):
        size = _SMALLEST + (_MARK - _SMALLEST) * place / len(point.path)
        (mark,) = axis.plot(step.gain, step.kept, marker=marker, color=colour, markersize=size, zorder=4)
        mark.set_gid(f"{prefix}-{place}")
        hovers[f"{prefix}-{place}"] = f"{point.label}, {step}"


def _limits(axis: Axes, points: Sequence[_Point], *, base: bool) -> None:
    """Fit the axes to the intervals, and to the base model where it is shown, with room for labels.

    Ends of intervals beyond what a change of a fraction can be, from -100 to 100 points, are not shown.
    """
    for ends, apply in (
        ([point.across for point in points], axis.set_xlim),
        ([point.up for point in points], axis.set_ylim),
    ):
        values = [value for pair in ends for value in pair] + ([0.0] if base else [])
        low, high = min(values), max(values)
        if points[0].gain.unit == POINTS or apply == axis.set_ylim:
            low, high = max(low, -100.0), min(high, 100.0)
        room = 0.09 * (high - low or 1.0)
        apply(low - room, high + room * (1.8 if apply == axis.set_xlim else 1.0))


def _crowd(points: Sequence[_Point]) -> list[_Point]:
    """Return the arms that stay when arms far below the others are set aside; all of them if that gains little."""
    order = sorted(points, key=lambda point: -point.kept.value)
    most = (0.2 if any(point.path for point in points) else 0.4) * _height(order)  # intervals need more room than lines
    for keep in range(len(order) - 1, max(1, len(order) // 2 - 1), -1):
        if _height(order[:keep]) < most:
            kept = {point.label for point in order[:keep]}
            return [point for point in points if point.label in kept]
    return list(points)


def _within(axis: Axes, points: Sequence[_Point]) -> list[_Point]:
    """Return the arms whose marks lie on an axis' panel."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    return [point for point in points if left <= point.gain.value <= right and low <= point.kept.value <= high]


def _height(points: Sequence[_Point]) -> float:
    ends = [value for point in points for value in point.up] + [0.0]
    return max(ends) - min(ends)


def _rectangle(across: tuple[float, float], up: tuple[float, float]) -> object:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (across[0], up[0]), across[1] - across[0], up[1] - up[0], fill=False, edgecolor=FAINT, linewidth=0.9, zorder=1.5
    )


def _label(axis: Axes, labelled: Sequence[_Point], shown: Sequence[_Point], *, base: bool) -> None:
    names = [point.label for point in labelled] + (["base model"] if base else [])
    at = [(point.gain.value, point.kept.value) for point in labelled] + ([(0.0, 0.0)] if base else [])
    to_pixels = axis.transData.transform
    pixels = [(float(x), float(y)) for x, y in to_pixels(np.asarray(at).reshape(-1, 2))]
    frame, origin = Box(*axis.get_window_extent().extents), to_pixels((0.0, 0.0))
    solid = []
    soft = [Box(frame.left, origin[1] - 2, frame.right, origin[1] + 2)]
    soft += [Box(origin[0] - 2, frame.bottom, origin[0] + 2, frame.top)]
    for point in shown:
        x, y = to_pixels((point.gain.value, point.kept.value))
        solid.append(Box(x - 7, y - 7, x + 7, y + 7))
        if point.path:
            soft += along_line([(float(x), float(y)) for x, y in to_pixels(np.asarray(point.way))])
            continue
        (left, right), (low, high) = point.across, point.up
        soft += [Box(to_pixels((left, 0))[0], y - 2, to_pixels((right, 0))[0], y + 2)]
        soft += [Box(x - 2, to_pixels((0, low))[1], x + 2, to_pixels((0, high))[1])]
    texts = [shorten(name) for name in names]
    sizes = text_sizes(axis, texts)
    places = place_labels(pixels, sizes, frame, solid, soft)
    for text, place, size, (x, y) in zip(texts, places, sizes, pixels, strict=True):
        centre = axis.transData.inverted().transform((place.x + size[0] / 2, place.y + size[1] / 2))
        if place.leader:
            start = axis.transData.inverted().transform((x, y))
            axis.plot([start[0], centre[0]], [start[1], centre[1]], color=FAINT, linewidth=0.7, zorder=2.5)
        axis.text(
            float(centre[0]),
            float(centre[1]),
            text,
            ha="center",
            va="center",
            fontsize=9.5,
            color=INK,
            zorder=6,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )


def along_line(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """Return small rectangles that together cover a line through some pixels."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        count = max(2, int(np.hypot(x1 - x0, y1 - y0) / 8))
        for t in np.linspace(0, 1, count):
            x, y = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
            boxes.append(Box(x - 4, y - 4, x + 4, y + 4))
    return boxes
