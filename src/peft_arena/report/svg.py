"""A matplotlib figure as one SVG element inside a page: unique ids, titles on hover, an accessible name."""

from __future__ import annotations

import io
import re
from pathlib import Path

from peft_arena.report.figures import Drawn, style
from peft_arena.report.markup import Markup, escape, tag

_NO_DATE = {"Date": None, "Creator": None, "Format": None, "Type": None}


def save_figure(drawn: Drawn, directory: Path) -> Markup:
    """Write a figure as ``NAME.svg`` and ``NAME.png`` (150 dots per inch), and return it for a page."""
    text = svg_text(drawn)
    (directory / f"{drawn.name}.svg").write_text(text, encoding="utf-8")
    with style():
        drawn.canvas.savefig(directory / f"{drawn.name}.png", dpi=150)
    return inline_svg(drawn, text)


def inline_svg(drawn: Drawn, text: str) -> Markup:
    """Return the figure as an ``svg`` element that fits its column, from its :func:`svg_text`."""
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    head = re.sub(r'\s(width|height|xmlns:xlink)="[^"]*"', "", head)
    head += f' role="img" aria-label="{escape(drawn.alt)}" class="figure"'
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{drawn.name}_', body)
    body = body.replace("url(#", f"url(#{drawn.name}_")
    body = re.sub(r'xlink:href="#', f'href="#{drawn.name}_', body)
    return Markup(f"{head}>{body.strip()}")


def captioned(drawn: Drawn, image: Markup) -> Markup:
    """Return a figure for a page with its caption below, as wide as it was drawn."""
    wide = "single" if drawn.canvas.get_figwidth() < 9 else "wide"
    return tag("figure", image, tag("figcaption", drawn.caption), class_=wide)


def svg_text(drawn: Drawn) -> str:
    """Return the figure's SVG document, with a title for every element that has a text to show."""
    buffer = io.StringIO()
    with style():
        drawn.canvas.savefig(buffer, format="svg", metadata=_NO_DATE)
    text = buffer.getvalue()
    for key, hover in drawn.hovers.items():
        text = text.replace(f'<g id="{key}">', f'<g id="{key}"><title>{escape(hover)}</title>', 1)
    return text
