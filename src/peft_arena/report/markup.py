"""Building HTML so that text is always escaped: only what :func:`tag` made passes unescaped."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

_VOID = frozenset({"meta", "br", "img"})


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Return a value as HTML text; markup stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def tag(name: str, /, *children: object, **attributes: str | None) -> Markup:
    """Return an element; children and attribute values are escaped.

    Args:
        name: the element's name.
        children: text or markup.
        attributes: ``_`` after a name is dropped and ``_`` inside becomes ``-``; None leaves the attribute out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{''.join(escape(child) for child in children)}</{name}>")


def join(parts: Iterable[object], separator: str = "") -> Markup:
    """Return parts one after the other, each escaped."""
    return Markup(escape(separator).join(escape(part) for part in parts))


def cell(content: object, kind: str = "num", title: str | None = None, style: str | None = None) -> Markup:
    """Return a table cell; ``kind`` is its class: ``num`` (right-aligned), ``txt`` or others of the style sheet."""
    return tag("td", content, class_=kind, title=title, style=style)


def table(
    caption: object,
    head: Sequence[object],
    rows: Iterable[Sequence[Markup]],
    name: str,
    note: object = "",
    text: Collection[int] = (),
) -> Markup:
    """Return a table that scrolls on narrow screens.

    Args:
        caption: what the table shows.
        head: column headings.
        rows: each starts with the row's heading (anything), then ``td`` markup.
        name: class of the table.
        note: smaller text below.
        text: columns whose headings stand on the left, like their text.
    """
    heads = [tag("th", title, scope="col", class_="txt" if place in text else None) for place, title in enumerate(head)]
    header = tag("thead", tag("tr", *heads))
    body = tag("tbody", *(tag("tr", tag("th", row[0], scope="row"), *row[1:]) for row in rows))
    whole = tag("table", tag("caption", caption), header, body, class_=name)
    below = tag("p", note, class_="note") if note else ""
    return join([tag("div", whole, class_="scroll", tabindex="0"), below])
