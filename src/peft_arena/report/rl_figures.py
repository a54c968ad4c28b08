"""Reinforcement learning by step: small multiples, as a figure for paper and as a chart for the interactive page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from peft_arena.analyze.rl import TargetRL
from peft_arena.analyze.rl_curves import QUANTITIES, Quantity, RLArm
from peft_arena.report.figures import FAINT, INK, Drawn, settle
from peft_arena.report.geometry_charts import Chart, Choice, arm_style, chart_axis, chart_layout, text_above
from peft_arena.report.geometry_html import chart_place, charts_page, write_plotly
from peft_arena.report.geometry_lines import legend_above, line_style
from peft_arena.report.markup import tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from peft_arena.analyze.rl_curves import Curve

PAGE = "rl.html"
_COLUMNS = 3
_WHOLE = frozenset({"ended", "zero_variance"})
"""Fractions that are shown from 0 to 1."""
_MARKS = 6
"""About how many marks a line has."""


def panels_of(rl: TargetRL) -> list[Quantity]:
    """Return the quantities that some run has logged."""
    return [quantity for quantity in QUANTITIES if any(arm.curve(quantity.name) for arm in rl.arms)]


def rl_figure(rl: TargetRL, named: set[str], name: str) -> Drawn | None:
    """Draw every quantity by step, a line for each arm with the range over its runs; None without a log entry.

    Args:
        rl: of a target.
        named: labels of the arms to colour and name; the others are faint lines.
        name: of the figure.
    """
    panels = panels_of(rl)
    if not panels:
        return None
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    canvas = Canvas(figsize=(10.4, 0.7 + 2.25 * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = list(canvas.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for place, (axis, quantity) in enumerate(zip(grid, panels, strict=False)):
        _panel(axis, rl, quantity, named)
        axis.tick_params(labelbottom=place + columns >= len(panels))
    for axis in grid[len(panels) :]:
        axis.set_visible(False)
    shown = [arm for arm in rl.trained if any(arm.curve(quantity.name) for quantity in panels)]
    legend_above(canvas, [arm for arm in shown if arm.label in named])
    canvas.supxlabel("optimizer step", fontsize=10, color=INK)
    settle(canvas)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"{', '.join(quantity.title for quantity in panels)} by optimizer step for {len(shown)} arms of "
        f"reinforcement learning. Start and end: {'; '.join(_ends(arm) for arm in shown)}.",
        caption=_caption(rl, panels, shown, named),
    )


def _panel(axis: Axes, rl: TargetRL, quantity: Quantity, named: set[str]) -> None:
    axis.grid(True)
    axis.set_title(quantity.title, fontsize=10, color=INK, loc="left")
    axis.set_ylabel(quantity.unit, fontsize=8.5)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for number, arm in enumerate(rl.arms):
        curve = arm.curve(quantity.name)
        if curve is None:
            continue
        if arm.label not in named:
            axis.plot(curve.steps, curve.mean, color=FAINT, linewidth=0.7, alpha=0.6, zorder=2)
            continue
        style = line_style(arm.place)
        if curve.runs > 1:
            axis.fill_between(curve.steps, curve.low, curve.high, color=style["color"], alpha=0.14, linewidth=0)
        every = max(1, len(curve.steps) // _MARKS)
        start = number * every // max(len(rl.arms), 1)
        axis.plot(curve.steps, curve.mean, linewidth=1.5, markersize=4.2, markevery=(start, every), zorder=3, **style)
    if quantity.name in _WHOLE:
        axis.set_ylim(-0.04, 1.04)


def _ends(arm: RLArm) -> str:
    told = []
    for quantity in QUANTITIES:
        found = arm.change(quantity.name)
        if found is not None:
            told.append(f"{quantity.title} {found.start:.3g} to {found.end:.3g}")
    return f"{arm.label}: {', '.join(told)}"


def _caption(rl: TargetRL, panels: Sequence[Quantity], shown: Sequence[RLArm], named: set[str]) -> str:
    runs = {len(arm.runs) for arm in shown}
    text = "One run per arm." if runs == {1} else "Lines: mean over the runs of an arm; bands: range over its runs."
    text += (
        " Reward: of the sampled completions that were trained on. Validation reward: of greedy answers to held-out "
        "items. Clipped: tokens whose probability ratio met a bound, low and high together (rloo: completions)."
    )
    absent = [quantity.title for quantity in QUANTITIES if quantity not in panels]
    text += f" Not measured in any run: {', '.join(absent)}." if absent else ""
    others = sum(arm.label not in named for arm in shown)
    return text + (f" Grey lines without a name: {others} other arms." if others else "")


def rl_chart(rl: TargetRL, named: set[str], key: str) -> Chart | None:
    """Return the same as a chart: means with the range over runs, or every run on its own; None without a log entry."""
    panels = panels_of(rl)
    if not panels:
        return None
    rows = -(-len(panels) // _COLUMNS)
    layout = chart_layout(90 + 250 * rows, annotations=[], hoverdistance=30)
    for number, quantity in enumerate(panels):
        end = str(number + 1) if number else ""
        left, top = (number % _COLUMNS) / _COLUMNS, 1 - (number // _COLUMNS) / rows
        across = [left + 0.02 * (number % _COLUMNS > 0), left + 1 / _COLUMNS - 0.03]
        up = [max(0.0, top - 1 / rows + 0.06), top - 0.035]
        whole = {"range": [-0.04, 1.04]} if quantity.name in _WHOLE else {}
        layout[f"xaxis{end}"] = chart_axis("step" if number + _COLUMNS >= len(panels) else "", domain=across)
        layout[f"xaxis{end}"] |= {"anchor": f"y{end}", "matches": "x"}
        layout[f"yaxis{end}"] = chart_axis("", domain=up, anchor=f"x{end}", tickfont={"size": 10}, **whole)
        layout["annotations"].append(text_above(f"{quantity.title} ({quantity.unit})", across[0], up[1]))
    styles = []
    for number, quantity in enumerate(panels):
        end = str(number + 1) if number else ""
        for arm in rl.arms:
            own = arm_style(
                arm, named, lines=True, hover="step %{x}<br>%{y:.4g}", legend=_first(arm, panels) == quantity
            )
            own["marker"] |= {"size": 6, "maxdisplayed": _MARKS}
            styles.append({**own, "xaxis": f"x{end}", "yaxis": f"y{end}"})
    text = "A click on a name hides or shows an arm, a double click shows it alone. All panels zoom together."
    choices = [
        Choice("mean over runs, band: range over runs", _mean_traces(rl, panels)),
        Choice("every run", _run_traces(rl, panels)),
    ]
    return Chart(key, "Reinforcement learning by step", text, choices, layout, styles, "lines")


def _first(arm: RLArm, panels: Sequence[Quantity]) -> Quantity | None:
    """Return the panel that brings the arm into the legend."""
    return next((quantity for quantity in panels if arm.curve(quantity.name) is not None), None)


def _mean_traces(rl: TargetRL, panels: Sequence[Quantity]) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    for number, quantity in enumerate(panels):
        for place, arm in enumerate(rl.arms):
            curve = arm.curve(quantity.name)
            if curve is not None:
                style = number * len(rl.arms) + place
                traces += _band(curve, style, str(line_style(arm.place)["color"]))
                traces.append({"style": style, "x": list(curve.steps), "y": list(curve.mean)})
    return traces


def _band(curve: Curve, style: int, colour: str) -> list[dict[str, Any]]:
    if curve.runs < 2:
        return []
    channels = ",".join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))
    around = {"x": [*curve.steps, *reversed(curve.steps)], "y": [*curve.high, *reversed(curve.low)]}
    look = {"fill": "toself", "fillcolor": f"rgba({channels},0.14)", "line": {"width": 0}, "mode": "lines"}
    return [{"style": style, **around, **look, "hoverinfo": "skip", "hovertemplate": None, "showlegend": False}]


def _run_traces(rl: TargetRL, panels: Sequence[Quantity]) -> list[dict[str, Any]]:
    traces = []
    for number, quantity in enumerate(panels):
        for place, arm in enumerate(rl.arms):
            found = [(run.seed, series) for run in arm.runs if (series := run.series(quantity.name))]
            for which, (seed, series) in enumerate(found):
                trace: dict[str, Any] = {"style": number * len(rl.arms) + place, "x": list(series)}
                trace |= {"y": list(series.values()), "hovertemplate": f"seed {seed}, step %{{x}}<br>%{{y:.4g}}"}
                traces.append(trace if which == 0 else {**trace, "showlegend": False})
    return traces


def write_rl_page(targets: Mapping[str, TargetRL], out: Path, *, title: str, named: Mapping[str, set[str]]) -> None:
    """Write ``rl.html`` and the ``plotly.min.js`` it reads, if there is anything to draw.

    Args:
        targets: label of each target to what its records say.
        out: directory to write to.
        title: of the page.
        named: by the same labels, the arms that are shown at first.
    """
    found = [
        (label, chart)
        for number, (label, rl) in enumerate(targets.items(), start=1)
        if (chart := rl_chart(rl, named[label], f"t{number}-rl")) is not None
    ]
    if not found:
        return
    parts = []
    for label, chart in found:
        parts += [*([tag("h2", f"On {label}")] if len(targets) > 1 else []), chart_place(chart)]
    write_plotly(out)
    text = charts_page(title, parts, [chart for _, chart in found], "index.html")
    (out / PAGE).write_text(text, encoding="utf-8")
