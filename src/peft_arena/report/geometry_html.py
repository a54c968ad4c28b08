"""The interactive page of geometry: plotly.js beside it in a file of its own, and nothing from the network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path

from peft_arena.analyze.geometry import TargetGeometry
from peft_arena.report.geometry_charts import Chart, every_chart
from peft_arena.report.markup import Markup, join, tag

PAGE = "geometry.html"
PLOTLY = "plotly.min.js"
_STYLE = (
    ".plot{min-width:640px}.chart{overflow-x:auto;margin-bottom:1.5rem}label{font-size:.9rem}"
    "select{font:inherit;max-width:100%;margin:.3rem 0}"
)


def write_interactive(
    targets: Mapping[str, TargetGeometry], out: Path, *, title: str, named: Mapping[str, set[str]], home: str = ""
) -> list[Path]:
    """Write ``geometry.html`` and the ``plotly.min.js`` it reads.

    Args:
        targets: name of the target to its geometry; the name is empty where there is only one set of checkpoints.
        out: directory to write to.
        title: of the page.
        named: by the same names, the labels that are shown at first.
        home: page to link back to; none if empty.

    Returns:
        The two files.
    """
    parts: list[Markup] = []
    charts: list[Chart] = []
    for number, (name, geometry) in enumerate(targets.items(), start=1):
        found = every_chart(geometry, named[name], f"t{number}-")
        charts += found
        if name and len(targets) > 1:
            parts.append(tag("h2", f"On {name}"))
        parts += [chart_place(chart) for chart in found]
    script = write_plotly(out)
    page = out / PAGE
    page.write_text(charts_page(title, parts, charts, home), encoding="utf-8")
    return [page, script]


def write_plotly(out: Path) -> Path:
    """Write the ``plotly.min.js`` that interactive pages in a directory read."""
    from plotly.offline import get_plotlyjs

    script = out / PLOTLY
    script.write_text(get_plotlyjs(), encoding="utf-8")
    return script


def chart_place(chart: Chart) -> Markup:
    """Return where a chart is drawn, with its title, its menu and how to read it."""
    menu = Markup("")
    if len(chart.choices) > 1:
        options = [tag("option", choice.name, value=str(place)) for place, choice in enumerate(chart.choices)]
        menu = tag("label", f"{chart.menu}: ", tag("select", *options))
    text = tag("p", chart.text, class_="note")
    return tag("section", tag("h3", chart.title), menu, tag("div", class_="plot"), text, id=chart.id, class_="chart")


def charts_page(title: str, parts: Sequence[Markup], charts: Sequence[Chart], home: str) -> str:
    """Return a page of charts that reads plotly.js from the file beside it."""
    files = resources.files("peft_arena.report")
    css, code = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "geometry.js"))
    text = json.dumps([asdict(chart) for chart in charts], separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    data = Markup(text.replace("<", "\\u003c"))
    back = tag("p", tag("a", "back to the report", href=home)) if home else ""
    nothing = "" if charts else tag("p", "Nothing that a chart could show was measured.")
    body = tag("main", tag("h1", title), back, nothing, join(parts))
    scripts = (
        tag("script", data, type="application/json", id="charts"),
        tag("script", "", src=PLOTLY),
        tag("script", Markup(code)),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(css + _STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body, *scripts), lang='en')}\n"
