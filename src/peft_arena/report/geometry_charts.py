"""The charts of the interactive page, as data for plotly.js: profiles, quantities by depth, drift, KL, correlations."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peft_arena.analyze.geometry import MAIN, ArmGeometry, TargetGeometry, metric_name
from peft_arena.analyze.profiles import MISALIGNMENT, Profile, window_of
from peft_arena.core.quantities import QUANTITIES
from peft_arena.report.figures import Placed, look
from peft_arena.report.geometry_points import coefficient_text, mean_text

SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    "<": "triangle-left", ">": "triangle-right", "p": "pentagon", "h": "hexagon", "*": "star",
}  # fmt: skip
"""A mark of the static figures to the same of plotly."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
PANELS = ("deviation", "adaptation", "change_singular_value", MISALIGNMENT)
_TITLES = {
    "deviation": "retention deviation",
    "adaptation": "adaptation",
    "change_singular_value": "singular values of D",
    MISALIGNMENT: "1 - singular-vector alignment",
}
MOST_VALUES = 500_000
"""Most numbers of the profiles in a page: about 2.7 MB of text."""
MAIN_QUANTITIES = tuple(dict.fromkeys(metric_name(metric).quantity for metric in MAIN))
_FEWEST_POINTS = 25
_AXIS = {"showgrid": True, "gridcolor": "#d8dee4", "zeroline": False, "ticks": "outside", "linecolor": "#8c959f"}


@dataclass(frozen=True)
class Choice:
    """What is drawn when one entry of a chart's menu is chosen."""

    name: str
    data: list[dict[str, Any]]
    """Traces; each goes on top of the style of the chart that its ``style`` names."""
    layout: dict[str, Any] = field(default_factory=dict)
    places: list[dict[str, str]] = field(default_factory=list)
    """Packed places on the first axis that traces share: an ``x`` that is a number names one."""


@dataclass(frozen=True)
class Chart:
    """One chart of the page."""

    id: str
    title: str
    text: str
    """How to read it."""
    choices: list[Choice]
    layout: dict[str, Any]
    styles: list[dict[str, Any]]
    """What traces have in common, so that it stands in the page once."""
    menu: str = ""
    """What the menu chooses."""


def every_chart(geometry: TargetGeometry, named: set[str], prefix: str) -> list[Chart]:
    """Return the charts there are numbers for; arms that are not named are there but hidden at first."""
    charts = (
        against_chart(geometry, named, f"{prefix}against"),
        profile_chart(geometry, named, f"{prefix}profiles"),
        depth_chart(geometry, named, f"{prefix}depth"),
        plane_chart(geometry, named, f"{prefix}drift"),
    )
    return [chart for chart in charts if chart is not None]


def packed(values: Sequence[float] | np.ndarray, kind: str = "f4") -> dict[str, str]:
    """Return numbers as plotly.js reads them from base64; ``kind`` is a numpy type such as ``f4`` or ``u2``."""
    return {"dtype": kind, "bdata": base64.b64encode(np.asarray(values, dtype=f"<{kind}").tobytes()).decode()}


def arm_style(arm: Placed, named: set[str], *, lines: bool, hover: str, legend: bool = True) -> dict[str, Any]:
    """Return what all traces of an arm in a chart have in common."""
    colour, marker = look(arm.place)
    found: dict[str, Any] = {
        "type": "scatter",
        "name": html.escape(arm.label),
        "legendgroup": str(arm.place),
        "showlegend": legend,
        "mode": "lines+markers" if lines else "markers",
        "marker": {"symbol": SYMBOLS[marker], "color": colour, "size": 7 if lines else 10},
        "visible": True if arm.label in named else "legendonly",
        "hovertemplate": hover,
    }
    if lines:
        found["line"] = {"color": colour, "dash": DASHES[arm.place % len(DASHES)], "width": 1.8}
    return found


def chart_layout(height: int, **axes: Any) -> dict[str, Any]:
    """Return what the layouts of all charts have in common, with some axes."""
    return {
        "height": height,
        "margin": {"l": 80, "r": 20, "t": 40, "b": 60},
        "font": {"family": 'system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif', "color": "#1f2328"},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "hovermode": "closest",
        "legend": {"itemsizing": "trace"},
        **axes,
    }


def chart_axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis with a title."""
    return {**_AXIS, "title": {"text": html.escape(title)}, **more}


def _scale(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic scale if positive values span more than a decade, with ticks at 1, 2, 5 if not of many."""
    low, high = min(values), max(values)
    if low <= 0 or high <= 10 * low:
        return {"type": "linear", "exponentformat": "power"}
    decades = math.log10(high / low)
    steps = {"dtick": "D2"} if decades < 2.5 else {"dtick": math.ceil(decades / 6), "tick0": 0}
    return {"type": "log", "exponentformat": "power", **steps}


def text_above(text: str, x: float = 0.0, y: float = 1.0) -> dict[str, Any]:
    """Return a line of text above a panel that begins at a share of the width and ends at one of the height."""
    place = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": html.escape(text), "showarrow": False, **place}


def profile_chart(geometry: TargetGeometry, named: set[str], key: str) -> Chart | None:
    """Return the profiles over singular directions: every kind's mean and, as far as there is room, every module."""
    panels = [
        name for name in PANELS if any(name in found.values for run in geometry.runs for found in run.kinds.values())
    ]
    if not panels:
        return None
    arms = [arm for arm in geometry.arms if any(run.kinds for run in arm.runs)]
    modules, most, left = _room(geometry, len(arms) * len(panels))
    choices = []
    for kind in geometry.kinds:
        shown = [_shown(arm.profile(kind), most) for arm in arms]
        choices.append(_profile_choice(f"{kind}, mean over modules", shown, panels))
    for module in modules:
        own = [arm.module_profile(module) for arm in arms]
        shown = [None if profile is None else profile.thinned(most) for profile in own]
        choices.append(_profile_choice(module, shown, panels))
    widths = sorted({window_of(one.directions) for run in geometry.runs for one in run.kinds.values()})
    layout = chart_layout(440, annotations=[])
    for number, name in enumerate(panels):
        end, share = str(number + 1) if number else "", 1 / len(panels)
        room = {"domain": [number * share + 0.06 * (number > 0), (number + 1) * share - 0.01], "anchor": f"y{end}"}
        layout[f"xaxis{end}"] = chart_axis("singular direction", **room)
        found = [run.kinds[kind].values.get(name) for run in geometry.runs for kind in run.kinds]
        every = np.concatenate([values for values in found if values is not None])
        scale = _scale(every[every > 0].tolist() or [1.0])
        layout[f"yaxis{end}"] = {**_AXIS, **scale, "anchor": f"x{end}", "tickfont": {"size": 10}}
        layout["annotations"].append(text_above(_TITLES[name], number * share + 0.06 * (number > 0)))
    text = (
        "What the change does in each singular direction of the pretrained weight, 0 the one of its largest singular "
        f"value. Moving averages over {' or '.join(map(str, widths))} directions, mean over runs, at most {most} "
        "points of each; singular values of D are not smoothed in means over modules. A click on a name hides or "
        "shows it, a double click shows it alone."
    )
    if left:
        text += f" To keep the page small, {left} modules are left out: those of blocks between first, middle and last."
    return Chart(
        key, "Profiles over singular directions", text, choices, layout, _profile_styles(arms, panels, named), "module"
    )


def _shown(profile: Profile | None, most: int) -> Profile | None:
    """Return a kind's profile smoothed, but not the singular values of D, and thinned."""
    if profile is None:
        return None
    smooth = profile.smoothed(window_of(profile.directions))
    raw = {name: found for name, found in profile.values.items() if name == "change_singular_value"}
    return Profile(smooth.index, {**smooth.values, **raw}, smooth.modules, smooth.directions).thinned(most)


def _room(geometry: TargetGeometry, lines: int) -> tuple[list[str], int, int]:
    """Return which modules a page has room for, with how many points, and how many modules are left out."""
    modules = list(dict.fromkeys(module for run in geometry.runs for module in run.modules))
    kinds = len(geometry.kinds)
    most = min(100, max(_FEWEST_POINTS, MOST_VALUES // max(1, (len(modules) + kinds) * lines)))
    if (len(modules) + kinds) * lines * most <= MOST_VALUES:
        return modules, most, 0
    blocks = sorted({block for module in modules if (block := _block(module)) is not None})
    kept = {blocks[0], blocks[len(blocks) // 2], blocks[-1]} if blocks else set()
    some = [module for module in modules if _block(module) in kept]
    most = min(100, max(_FEWEST_POINTS, MOST_VALUES // max(1, (len(some) + kinds) * lines)))
    if (len(some) + kinds) * lines * most > MOST_VALUES:
        some = []
    return some, most, len(modules) - len(some)


def _block(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def _profile_styles(arms: Sequence[ArmGeometry], panels: Sequence[str], named: set[str]) -> list[dict[str, Any]]:
    """Return the style of every arm in the first panel, then in the second, and so on."""
    styles = []
    for number, _ in enumerate(panels):
        end = str(number + 1) if number else ""
        for arm in arms:
            own = arm_style(arm, named, lines=True, hover="direction %{x}<br>%{y:.3g}", legend=number == 0)
            styles.append({**own, "mode": "lines", "xaxis": f"x{end}", "yaxis": f"y{end}"})
    return styles


def _profile_choice(name: str, found: Sequence[Profile | None], panels: Sequence[str]) -> Choice:
    """Return one entry of the menu of profiles, given in the order of the arms."""
    places: list[dict[str, str]] = []
    traces = []
    for number, column in enumerate(panels):
        for arm, profile in enumerate(found):
            if profile is None or column not in profile.values:
                continue
            values = profile.values[column]
            place = packed(profile.index, "u4" if profile.directions > 65_535 else "u2")
            if place not in places:
                places.append(place)
            y = packed(np.where(values > 0, values, np.nan))
            traces.append({"style": number * len(found) + arm, "x": places.index(place), "y": y})
    return Choice(name, traces, places=places)


def depth_chart(geometry: TargetGeometry, named: set[str], key: str) -> Chart | None:
    """Return every quantity of every kind of module over the transformer blocks."""
    choices = []
    names = dict.fromkeys(
        (part, row.prompts, name)
        for run in geometry.runs
        for part, record in run.records.items()
        for row in record.rows
        if row.block is not None
        for name in row.values
    )
    order = {name: place for place, name in enumerate((*MAIN_QUANTITIES, *QUANTITIES))}
    for part, prompts, name in sorted(names, key=lambda entry: order.get(entry[2], len(order))):
        title = metric_name(f"{name}_{prompts}" if prompts else name).title
        depths = [(arm, arm.depth(name, part, prompts)) for arm in geometry.arms]
        for kind in dict.fromkeys(kind for _, depth in depths for kind in depth):
            places: list[dict[str, str]] = []
            data: list[dict[str, Any]] = []
            for arm, depth in depths:
                if kind in depth:
                    place = packed(list(depth[kind]), "u2")
                    if place not in places:
                        places.append(place)
                    y = packed(list(depth[kind].values()))
                    data.append({"style": arm.place, "x": places.index(place), "y": y})
            choices.append(
                Choice(f"{title}: {kind}", data, {"yaxis": chart_axis(title, exponentformat="power")}, places)
            )
    if not choices:
        return None
    styles = [arm_style(arm, named, lines=True, hover="block %{x}<br>%{y:.4g}") for arm in geometry.arms]
    text = "Mean over the runs of an arm, for one kind of module in each transformer block."
    deepest = max(row.block or 0 for run in geometry.runs for record in run.records.values() for row in record.rows)
    steps = {"tick0": 0, "dtick": max(1, deepest // 12)}
    layout = chart_layout(420, xaxis=chart_axis("transformer block", **steps))
    return Chart(
        key, "Quantities over the depth of the model", text, choices, layout, styles, "quantity and kind of module"
    )


def plane_chart(geometry: TargetGeometry, named: set[str], key: str) -> Chart | None:
    """Return quantities on general against the same on target prompts, an arm a mark."""
    choices: list[Choice] = []
    stems = [name.removesuffix("_general") for name in geometry.metrics if name.endswith("_general")]
    for stem in [*(name for name in ("drift_relative", "kl") if name in stems), *stems]:
        across, up = f"{stem}_target", f"{stem}_general"
        known = [(arm, arm.mean(across), arm.mean(up)) for arm in geometry.arms]
        known = [(arm, x, y) for arm, x, y in known if x.value is not None and y.value is not None]
        if not known or any(choice.name == metric_name(stem).title for choice in choices):
            continue
        data, values = [], [value for _, x, y in known for value in (x.value, y.value) if value is not None]
        for arm, x, y in known:
            told = f"{arm.label}<br>general {mean_text(y)}<br>target {mean_text(x)}"
            data.append({"style": arm.place, "x": [x.value], "y": [y.value], "text": [_escaped_lines(told)]})
        ends = [min(values), max(values)]
        grey = {"color": "#8c959f", "dash": "dash", "width": 1}
        diagonal = {"x": ends, "y": ends, "line": grey, "showlegend": False, "hoverinfo": "skip"}
        data.append({"type": "scatter", "mode": "lines", **diagonal})
        title = metric_name(stem).title
        scale = _scale(values)
        axes = {
            "xaxis": chart_axis(f"{title}, target prompts", **scale),
            "yaxis": chart_axis(f"{title}, general prompts", **scale),
        }
        choices.append(Choice(title, data, axes))
    if not choices:
        return None
    styles = [arm_style(arm, named, lines=False, hover="%{text}<extra></extra>") for arm in geometry.arms]
    text = "Means over modules and runs. On the dashed line a quantity is the same on both sets of prompts."
    return Chart(key, "General against target prompts", text, choices, chart_layout(480), styles, "quantity")


def _escaped_lines(text: str) -> str:
    return "<br>".join(html.escape(line) for line in text.split("<br>"))


def against_chart(geometry: TargetGeometry, named: set[str], key: str) -> Chart | None:
    """Return every quantity against forgetting and against the gain, a run a mark."""
    choices = []
    for found in geometry.correlations:
        if found.value is None:
            continue
        data = []
        for arm in geometry.arms:
            points = [
                (measure.value, outcome, "" if run.seed is None else f"seed {run.seed}")
                for run in arm.runs
                if (measure := run.measures.get(found.metric)) and measure.value is not None
                if (outcome := getattr(run, found.outcome)) is not None
            ]
            if points:
                x, y, seeds = (list(column) for column in zip(*points, strict=True))
                data.append({"style": arm.place, "x": x, "y": y, "text": seeds})
        title = metric_name(found.metric).title
        unit = "points" if found.outcome == "forgetting" else geometry.gain_unit
        told = f"Spearman {coefficient_text(found)}, {found.arms} arms"
        axes = {"xaxis": chart_axis(title, exponentformat="power"), "yaxis": chart_axis(f"{found.outcome} ({unit})")}
        choices.append(Choice(f"{found.outcome} against {title}", data, {**axes, "annotations": [text_above(told)]}))
    if not choices:
        return None
    styles = [
        {**arm_style(arm, named, lines=False, hover="%{text}<br>%{x:.4g}<br>%{y:.1f}"), "visible": True}
        for arm in geometry.arms
    ]
    text = (
        "Each mark is a run; forgetting is minus its mean retention. Rank correlations are over arms, with 95 % "
        f"intervals. {geometry.looked_at} quantities were looked at: some look related by chance, and none of this is "
        "a cause."
    )
    return Chart(key, "Geometry against what was forgotten", text, choices, chart_layout(460), styles, "quantity")
