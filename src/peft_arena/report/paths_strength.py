"""How strongly every transformer block is changed, in the tuned model and at the chosen point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from peft_arena.analyze.path_study import TargetPaths
from peft_arena.report.figures import INK, Drawn, settle, shorten
from peft_arena.report.numbers import plain
from peft_arena.report.paths_plane import grid_of, path_look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM = 20.0
"""Ratio of the largest to the smallest strength above which the scale is logarithmic."""


def strength_figure(paths: TargetPaths, named: set[str], name: str) -> Drawn | None:
    """Draw the strength of every block, one panel per named arm; None where no point was chosen."""
    labels = [label for label in paths.labels if label in named and any(arm.strengths() for arm in paths.of(label))]
    if not labels:
        return None
    canvas, axes = grid_of(len(labels), height=2.6)
    values = [
        value
        for label in labels
        for arm in paths.of(label)
        for _, *both in arm.strengths()
        for value in both
        if value > 0
    ]
    log = bool(values) and max(values) > _LOG_FROM * min(values)
    hovers: dict[str, str] = {}
    shown = {}
    for number, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        axis.set_title(shorten(label), fontsize=10, color=INK, loc="left")
        axis.grid(True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axis.set_yscale("log")
        for place, arm in enumerate(paths.of(label)):
            found = arm.strengths()
            if not found:
                continue
            shown[arm.words] = arm
            look = path_look(paths, arm)
            blocks = [block for block, _, _ in found]
            if place == 0 or not axis.lines:
                axis.plot(blocks, [_drawn(tuned, log) for _, tuned, _ in found], color=INK, linewidth=1.6, zorder=3)
            axis.plot(blocks, [_drawn(after, log) for _, _, after in found], color=look["color"], linewidth=1.2,
                      linestyle=(0, (4, 2)), zorder=3)  # fmt: skip
            for block, before, after in found:
                (mark,) = axis.plot(
                    block, _drawn(after, log), **look, markersize=4.5, markerfacecolor="white", zorder=4
                )
                key = f"{name}-{number}-{place}-{block}"
                mark.set_gid(key)
                hovers[key] = f"{label}, {arm.words}, block {block}: {_short(before)} tuned, {_short(after)} chosen"
    _limit(axes, values, log)
    canvas.supxlabel("transformer block", fontsize=10, color=INK)
    canvas.supylabel(f"strength ‖D‖ / ‖W0‖{' (log scale)' if log else ''}", fontsize=10, color=INK)
    handles = [Line2D([], [], color=INK, linewidth=1.6, label="tuned model")]
    handles += [
        Line2D([], [], **path_look(paths, arm), markersize=4.5, markerfacecolor="white", linestyle=(0, (4, 2)),
               label=f"chosen, {words}")
        for words, arm in shown.items()
    ]  # fmt: skip
    canvas.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 3), frameon=False, fontsize=9)
    settle(canvas)
    told = "; ".join(
        f"{label}, {arm.words}: {_short(min(b))} to {_short(max(b))} tuned, {_short(min(a))} to {_short(max(a))} chosen"
        for label in labels
        for arm in paths.of(label)
        if (found := arm.strengths())
        for _, b, a in [zip(*found, strict=True)]
    )
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Strength of the change by transformer block, least to most over blocks. {told}.",
        caption=(
            "Strength of a block: root mean square over its linear layers of ‖D‖ / ‖W0‖ (Frobenius), D being the "
            "change. Solid: in the tuned model; dashed with open marks: at the chosen point. Means over the seeds that "
            "have one; common axes."
        ),
        hovers=hovers,
    )


def _drawn(value: float, log: bool) -> float:
    """Return a value as it can be drawn: a block that is not changed has no place on a logarithmic scale."""
    return float("nan") if log and value <= 0 else value


def _limit(axes: Sequence[Axes], values: list[float], log: bool) -> None:
    if not values:
        return
    low, high = (min(values) / 1.5, max(values) * 1.5) if log else (0.0, max(values) * 1.08)
    for axis in axes:
        axis.set_ylim(low, high)


def _short(value: float) -> str:
    return plain(value, 4) if value < 0.1 else plain(value, 2)
