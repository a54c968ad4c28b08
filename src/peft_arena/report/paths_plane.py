"""Paths on the plane of gain and retention: one panel per arm, the way of its training beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from peft_arena.analyze.path_study import ArmPath, PathPoint, TargetPaths
from peft_arena.core.paths import TUNED
from peft_arena.report.figures import COLOURS, FAINT, INK, MANY, MARKERS, Drawn, settle, shorten
from peft_arena.report.labels import Box, place_labels
from peft_arena.report.numbers import estimate_text
from peft_arena.report.plane import along_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[float, float]
TRAJECTORY, BEYOND = "#59636e", (0, (3, 2))
_RING: dict[str, Any] = {
    "marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.7,
}  # fmt: skip
_FINAL: dict[str, Any] = {"marker": "*", "markersize": 12, "color": INK, "markeredgecolor": "white"}
_BASE: dict[str, Any] = {"marker": "+", "markersize": 12, "markeredgewidth": 1.8, "color": INK}
_GAP, _LEAST_SPREAD = 1.6, 5.0
"""Arms that spread so many times as far as the next smaller one, or as so many points, have axes of their own."""
_TOGETHER = 2
"""Paths that one panel can show."""
_LABEL_GAP = 26.0
"""Least distance of two marks with a printed factor, pixels."""


class _Panel(NamedTuple):
    label: str
    """Unique; the arm's, and a line for the path where a panel shows one of many."""
    arms: tuple[ArmPath, ...]
    """Of one arm, one per path."""

    @property
    def places(self) -> list[Place]:
        """Everything that is drawn, the base model included."""
        points = [point for arm in self.arms for point in (*arm.points, *arm.along, *_of(arm.tuned))]
        return [(0.0, 0.0), *(_place(point) for point in points if point.placed)]

    @property
    def spread(self) -> tuple[float, float]:
        """Extent across and up."""
        across, up = zip(*self.places, strict=True)
        return max(across) - min(across), max(up) - min(up)


def _of(point: PathPoint | None) -> tuple[PathPoint, ...]:
    return () if point is None else (point,)


def _place(point: PathPoint) -> Place:
    assert point.gain is not None and point.kept is not None, "only placed points are drawn"
    return point.gain.value, point.kept.value


def path_look(paths: TargetPaths, arm: ArmPath) -> dict[str, Any]:
    """Return colour and marker of a path: the same in all panels."""
    index = paths.words.index(arm.words)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def grid_of(count: int, height: float = 3.1) -> tuple[Canvas, list[Axes]]:
    """Return a figure of so many panels and their axes; surplus panels are hidden."""
    columns = count if count <= 3 else 2 if count == 4 else 3 if count <= 12 else 4
    rows = -(-count // columns)
    width = {1: 6.6, 2: 8.8}.get(columns, 10.4)
    canvas = Canvas(figsize=(width, (4.6 if count == 1 else height * rows) + 0.6), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return canvas, axes[:count]


def plane_figure(paths: TargetPaths, target: str, named: set[str], name: str) -> Drawn | None:
    """Draw the paths of every named arm; None where nothing can be placed."""
    panels = [panel for panel in _panels(paths, named) if len(panel.places) > 1]
    if not panels:
        return None
    canvas, axes = grid_of(len(panels))
    far = _far(panels)
    shared = [panel for panel in panels if panel.label not in far]
    hovers: dict[str, str] = {}
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        _limits(axis, [panel] if panel.label in far else shared)
        axis.set_title(_title(panel, panel.label in far), fontsize=10, color=INK, loc="left")
        _draw(axis, paths, panel, f"{name}-{number}", hovers)
    unit = next(
        point.gain.unit
        for panel in panels
        for arm in panel.arms
        for point in (*arm.points, *_of(arm.tuned))
        if point.gain
    )
    canvas.supxlabel(
        f"gain on {shorten(target)} over the base model, validation items ({unit})", fontsize=10, color=INK
    )
    canvas.supylabel("mean retention, change from the base model (points)", fontsize=10, color=INK)
    _legend(canvas, paths, panels)
    settle(canvas)
    for axis, panel in zip(axes, panels, strict=True):
        _print_factors(axis, paths, panel)
    shown = len({arm.label for panel in panels for arm in panel.arms})
    left_out = len(paths.labels) - shown
    each = "arm" if all(panel.label in named for panel in panels) else "arm and path"
    fewer = any(0 < len(panel.arms) < len(paths.of(panel.label)) for panel in panels if panel.label in paths.labels)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Gain on {target} against mean retention on validation items along the paths of {shown} arms. "
        + ". ".join(_told(arm) for panel in panels for arm in panel.arms)
        + ".",
        caption=(
            f"One panel per {each}. The solid line is the path from the base model (cross) towards the tuned model "
            "(star), a mark for each factor tried, a few of them printed; beyond the tuned model it is dashed, with "
            "open marks. Rings: the points chosen. All on validation items, means over seeds; what is claimed of "
            "the rings is judged on test items, in the table."
            + (" The dotted line with × is the training, through its save points." if _trained(panels) else "")
            + (" Of more than two paths of an arm: the first, and the one that regains most." if fewer else "")
            + (f" {left_out} of {len(paths.labels)} arms have nothing to draw or are not named." if left_out else "")
        ),
        hovers=hovers,
    )


def _panels(paths: TargetPaths, named: set[str]) -> list[_Panel]:
    """Return a panel per arm; one per path where an arm has too many for one panel and there is room for all."""
    arms = {label: paths.of(label) for label in paths.labels if label in named}
    most, total = max(map(len, arms.values()), default=0), sum(map(len, arms.values()))
    if most > _TOGETHER and total <= MANY:
        return [_Panel(f"{label}\n{arm.words}", (arm,)) for label, found in arms.items() for arm in found]
    return [_Panel(label, _few(paths, found)) for label, found in arms.items()]


def _title(panel: _Panel, alone: bool) -> str:
    own = " (own axes)" if alone else ""
    first, *rest = panel.label.split("\n")
    return "\n".join([f"{shorten(first, 28 - len(own))}{own}", *(shorten(line, 34) for line in rest)])


def _few(paths: TargetPaths, found: tuple[ArmPath, ...]) -> tuple[ArmPath, ...]:
    """Return the paths that a panel shows: of many the first, and the one of the others that regains most."""
    if len(found) <= _TOGETHER:
        return found
    best = next((arm for arm in paths.overshoots if arm in found[1:]), found[1])
    return found[0], best


def _far(panels: Sequence[_Panel]) -> set[str]:
    """Return the panels whose paths spread so much further than the others that common axes would hide the others."""
    far: set[str] = set()
    for side in range(2):
        order = sorted(panels, key=lambda panel: panel.spread[side])
        spreads = [max(panel.spread[side], _LEAST_SPREAD if side else 0.0) for panel in order]
        for keep in range(len(order) - 1, max(1, 3 * len(order) // 4 - 1), -1):
            if spreads[keep] > _GAP * spreads[keep - 1]:
                far |= {panel.label for panel in order[keep:]}
                break
    return far


def _limits(axis: Axes, panels: Sequence[_Panel]) -> None:
    places = [place for panel in panels for place in panel.places]
    (left, right), (bottom, top) = (_widened(values) for values in zip(*places, strict=True))
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)


def _widened(values: Sequence[float]) -> tuple[float, float]:
    room = 0.12 * (max(values) - min(values) or 1.0)
    return min(values) - room, max(values) + room


def _draw(axis: Axes, paths: TargetPaths, panel: _Panel, prefix: str, hovers: dict[str, str]) -> None:
    axis.axhline(0, color=FAINT, linewidth=0.9, zorder=1)
    axis.axvline(0, color=FAINT, linewidth=0.9, zorder=1)
    axis.grid(True)
    _draw_training(axis, panel.arms, prefix, hovers)
    for number, arm in enumerate(panel.arms):
        look = path_look(paths, arm)
        inside, beyond = _line(arm)
        axis.plot(*zip(*inside, strict=True), color=look["color"], linewidth=1.6, zorder=3)
        if len(beyond) > 1:
            axis.plot(*zip(*beyond, strict=True), color=look["color"], linewidth=1.3, linestyle=BEYOND, zorder=3)
        for point in arm.points:
            if not point.placed or _is_end(arm, point.at):
                continue
            (mark,) = axis.plot(
                *_place(point), **look, markersize=4.5, markerfacecolor="white" if point.at > TUNED else look["color"],
                zorder=4,
            )  # fmt: skip
            key = f"{prefix}-{number}-{point.at:g}"
            mark.set_gid(key)
            hovers[key] = _hover(arm, point, f"factor {point.at:g}")
        for factor in arm.chosen:
            place = next((_place(point) for point in arm.points if point.at == factor and point.placed), None)
            if place is not None:
                axis.plot(*place, linestyle="none", **_RING, zorder=6)
    axis.plot(0, 0, linestyle="none", **_BASE, zorder=5)
    first = panel.arms[0]
    if first.tuned is not None and first.tuned.placed:
        (mark,) = axis.plot(*_place(first.tuned), linestyle="none", **_FINAL, zorder=5)
        mark.set_gid(f"{prefix}-tuned")
        hovers[f"{prefix}-tuned"] = _hover(first, first.tuned, "the tuned model")


def _is_end(arm: ArmPath, factor: float) -> bool:
    """Say whether a factor is the base or the tuned model, which have marks of their own."""
    return (factor == 0 and arm.ends.from_base) or (factor == TUNED and arm.ends.to_tuned)


def _line(arm: ArmPath) -> tuple[list[Place], list[Place]]:
    """Return the corners of the path up to factor 1 and from there on."""
    places = {point.at: _place(point) for point in arm.points if point.placed}
    if arm.ends.from_base:
        places[0.0] = (0.0, 0.0)
    if arm.ends.to_tuned and arm.tuned is not None and arm.tuned.placed:
        places[TUNED] = _place(arm.tuned)
    order = sorted(places)
    inside = [places[at] for at in order if at <= TUNED]
    beyond = [places[at] for at in order if at > TUNED]
    return inside or beyond, [*inside[-1:], *beyond]


def _draw_training(axis: Axes, arms: Sequence[ArmPath], prefix: str, hovers: dict[str, str]) -> None:
    """Draw the save points of the training once, whichever path they were evaluated for."""
    arm = next((arm for arm in arms if any(point.placed for point in arm.along)), None)
    if arm is None:
        return
    points = [point for point in arm.along if point.placed]
    end = [_place(arm.tuned)] if arm.tuned is not None and arm.tuned.placed else []
    way = [(0.0, 0.0), *(_place(point) for point in points), *end]
    axis.plot(*zip(*way, strict=True), color=TRAJECTORY, linewidth=1.2, linestyle=":", zorder=2)
    for point in points:
        (mark,) = axis.plot(*_place(point), marker="x", markersize=5.5, color=TRAJECTORY, linestyle="none", zorder=3)
        mark.set_gid(f"{prefix}-step-{point.at:g}")
        hovers[f"{prefix}-step-{point.at:g}"] = _hover(arm, point, f"step {point.at:g} of the training")


def _trained(panels: Sequence[_Panel]) -> bool:
    """Say whether the way of any training is drawn."""
    return any(point.placed for panel in panels for arm in panel.arms for point in arm.along)


def _legend(canvas: Canvas, paths: TargetPaths, panels: Sequence[_Panel]) -> None:
    arms = [arm for panel in panels for arm in panel.arms]
    shown = {arm.words: arm for arm in arms}
    handles = [Line2D([], [], **path_look(paths, arm), markersize=4.5, label=words) for words, arm in shown.items()]
    if any(point.at > TUNED for arm in arms for point in arm.points):
        handles.append(
            Line2D([], [], color=INK, linestyle=BEYOND, marker="o", markersize=4.5, markerfacecolor="white",
                   label="beyond the tuned model")
        )  # fmt: skip
    if _trained(panels):
        handles.append(Line2D([], [], color=TRAJECTORY, linestyle=":", marker="x", markersize=5.5, label="training"))
    if any(arm.chosen for arm in arms):
        handles.append(Line2D([], [], linestyle="none", **_RING, label="chosen"))
    handles.append(Line2D([], [], linestyle="none", **_FINAL, label="tuned model"))
    handles.append(Line2D([], [], linestyle="none", **_BASE, label="base model"))
    canvas.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), frameon=False, fontsize=9)


def _print_factors(axis: Axes, paths: TargetPaths, panel: _Panel) -> None:
    """Print the chosen factors and a few others where there is room."""
    to_pixels = axis.transData.transform
    frame = Box(*axis.get_window_extent().extents)
    wanted: list[tuple[Place, str, bool]] = []
    colours: list[str] = []
    for arm in panel.arms:
        points = [point for point in arm.points if point.placed]
        order = sorted(points, key=lambda point: (point.at not in arm.chosen, point is not points[-1], point.at))
        for point in order:
            few = len(panel.arms) <= 2 or point.at in arm.chosen
            place = tuple(to_pixels(_place(point)))
            near = [np.hypot(place[0] - other[0], place[1] - other[1]) < _LABEL_GAP for other, _, _ in wanted]
            if few and not _is_end(arm, point.at) and (point.at in arm.chosen or not any(near)):
                wanted.append(((float(place[0]), float(place[1])), f"{point.at:g}", point.at in arm.chosen))
                colours.append(path_look(paths, arm)["color"] if len(panel.arms) > 1 else INK)
    every = [tuple(to_pixels(place)) for place in panel.places]
    solid = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in every]
    solid += [Box(x - 9, y - 9, x + 9, y + 9) for (x, y), _, ring in wanted if ring]
    sizes = [(6.0 * len(text) + 5, 13.0) for _, text, _ in wanted]
    soft = [box for arm in panel.arms for line in _line(arm) for box in along_line([tuple(to_pixels(p)) for p in line])]
    places = place_labels([place for place, _, _ in wanted], sizes, frame, solid, soft)
    for (_, text, ring), at, size, colour in zip(wanted, places, sizes, colours, strict=True):
        x, y = axis.transData.inverted().transform((at.x + size[0] / 2, at.y + size[1] / 2))
        weight = "bold" if ring else "normal"
        axis.text(
            float(x), float(y), text, ha="center", va="center", fontsize=8.5, color=colour, weight=weight, zorder=7
        )


def _hover(arm: ArmPath, point: PathPoint, what: str) -> str:
    assert point.gain is not None and point.kept is not None, "only placed points are drawn"
    numbers = f"gain {estimate_text(point.gain)}, mean retention {estimate_text(point.kept)}"
    return f"{arm.label}, {arm.words}, {what}: {numbers}"


def _told(arm: ArmPath) -> str:
    """Return the ends of a path and its chosen points as text."""
    parts = []
    for point in arm.points:
        if point.at in arm.chosen and point.gain is not None and point.kept is not None:
            numbers = f"gain {estimate_text(point.gain)}, retention {estimate_text(point.kept)}"
            parts.append(f"chosen factor {point.at:g}, {numbers}")
    if arm.tuned is not None and arm.tuned.gain is not None and arm.tuned.kept is not None:
        parts.append(f"tuned, gain {estimate_text(arm.tuned.gain)}, retention {estimate_text(arm.tuned.kept)}")
    return f"{arm.label} ({arm.words}): {'; '.join(parts) or 'nothing evaluated'}"
