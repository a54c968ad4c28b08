"""Blocks of the docs that come from kept tables of benchmarks, each a function from the sources to Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.sources import Sources
from scripts.study_blocks import Block, rows

BLOCKS: dict[str, Block] = {}
Cell = dict[str, Any]


def block(function: Block) -> Block:
    """Make a block of a function, by its name."""
    BLOCKS[function.__name__.replace("_", "-")] = function
    return function


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _by_seeds(cells: Sequence[Cell], rates: Sequence[str]) -> str:
    """Return a table with a row for each kind and number of items, and a column for each number of seeds."""
    seeds = sorted({cell["seeds"] for cell in cells})
    found = {(cell["kind"], cell["items"], cell["seeds"]): cell for cell in cells}
    body = []
    for kind, items in dict.fromkeys((cell["kind"], cell["items"]) for cell in cells):
        shown = [" / ".join(_shown(found[kind, items, count], rate) for rate in rates) for count in seeds]
        body.append([kind, str(items), *shown])
    return rows(["items are", "number", *(f"{count} seed{'s' if count > 1 else ''}" for count in seeds)], body)


def _shown(cell: Cell, rate: str) -> str:
    text = _percent(cell[rate])
    return f"**{text}**" if rate in cell["outside"] else text


def _studies(cells: Sequence[Cell]) -> int:
    (count,) = {cell["studies"] for cell in cells}
    return int(count)


@block
def coverage(sources: Sources) -> str:
    """Coverage of gain, pair and retention."""
    cells = sources.table("coverage")["equal"]
    error = 100 * (0.95 * 0.05 / _studies(cells)) ** 0.5
    table = _by_seeds(cells, ("gain", "pair", "retention"))
    return (
        f"{table}\n\nIn per cent, gain / arm against its twin / retention; {_studies(cells):,} studies a cell, Monte "
        f"Carlo error {error:.1f}. Bold: the 99 % Monte Carlo interval lies wholly outside 93 to 98 %."
    )


@block
def alarms(sources: Sources) -> str:
    """False alarms of a twin, and of a whole family."""
    cells = sources.table("coverage")["equal"]
    return (
        f"{_by_seeds(cells, ('twin', 'family'))}\n\nIn per cent: two equal arms, uncorrected p below 0.05 / five equal "
        "arms, any of 25 true equalities called different. Bold: wholly above 5 %."
    )


@block
def coverage_outside(sources: Sources) -> str:
    """The cells outside of what is promised, over all tables."""
    tables = sources.table("coverage")
    told = []
    for name, cells in tables.items():
        bad = [cell for cell in cells if cell["outside"]]
        kinds = sorted({cell["kind"] for cell in bad if "kind" in cell})
        if bad:
            where = f" ({', '.join(kinds)})" if kinds else ""
            told.append(f"{len(bad)} of {len(cells)} cells of “{name}”{where}")
    total = sum(map(len, tables.values()))
    return f"Of {total} cells, outside the promise are: {'; '.join(told) if told else 'none'}."


def _plain(sources: Sources, name: str, head: Sequence[str], axes: Sequence[str], rates: Sequence[str]) -> str:
    """Return the cells of a table, a row each."""
    cells = sources.table("coverage")[name]
    body = [[*(str(cell[axis]) for axis in axes), *(_shown(cell, rate) for rate in rates)] for cell in cells]
    return rows(head, body)


@block
def coverage_spread(sources: Sources) -> str:
    """Other spreads between seeds, and other numbers of arms."""
    head = ["seeds", "sd between seeds", "gain", "pair", "retention", "twin", "family"]
    tables = sources.table("coverage")
    rates = ("gain", "pair", "retention", "twin", "family")
    body = [
        [str(cell["seeds"]), f"{100 * cell['sd']:g} points", *(_shown(cell, rate) for rate in rates)]
        for cell in tables["spread"]
    ]
    more = [
        [str(cell["seeds"]), f"2 points, {cell['arms']} arms", *(_shown(cell, rate) for rate in rates)]
        for cell in tables["arms"]
    ]
    declared = []
    for cell in tables["declared"]:
        known = "exactly" if cell["runs"] is None else f"from {cell['runs']} runs"
        what = f"2 points, declared {known}, {cell['items']} items"
        declared.append(["1", what, *(_shown(cell, rate) for rate in rates)])
    return rows(head, [*body, *more, *declared], 2)


@block
def coverage_wild(sources: Sources) -> str:
    """One arm of ten times the spread."""
    head = ["seeds", "any pair, gain alone", "any of 25, whole family", "the arm is named", "another is named"]
    return _plain(sources, "wild", head, ("seeds",), ("gain pairs", "family", "is named", "another is named"))


@block
def power(sources: Sources) -> str:
    """How often a better arm is found."""
    cells = sources.table("coverage")["power"]
    seeds = sorted({cell["seeds"] for cell in cells})
    found = {(cell["better by"], cell["items"], cell["seeds"]): cell for cell in cells}
    body = []
    for better, items in dict.fromkeys((cell["better by"], cell["items"]) for cell in cells):
        row = [found[better, items, count] for count in seeds]
        shown = [f"{_percent(cell['one pair'])} / {_percent(cell['all pairs'])}" for cell in row]
        body.append([f"{100 * better:g} points", str(items), *shown])
    return rows(["better by", "items", *(f"{n} seed{'s' if n > 1 else ''}" for n in seeds)], body)


@block
def margins(sources: Sources) -> str:
    """Which words a true difference gets against a margin of two points."""
    cells = sources.table("coverage")["margin"]
    words = ("no worse", "equivalent", "better", "worse")
    body = [
        [f"{100 * cell['truth']:+g}", str(cell["seeds"]), str(cell["items"]), *(_shown(cell, word) for word in words)]
        for cell in cells
    ]
    return rows(["true difference, points", "seeds", "items", *words], body)


@block
def coverage_paths(sources: Sources) -> str:
    """How often a point of a path is called an overshoot."""
    cells = sources.table("coverage")["paths"]
    body = [
        [f"{-100 * cell['target lost']:g}", str(cell["seeds"]), str(cell["items"]), _shown(cell, "overshoot")]
        for cell in cells
    ]
    return rows(["target at the chosen point, points", "seeds", "items", "called overshoot"], body)


@block
def coverage_more(sources: Sources) -> str:
    """Means over tasks and parts, passages, unscored answers, correlations, targets."""
    tables = sources.table("coverage")
    body = []
    for cell in tables["tasks"]:
        what = f"mean over 4 tasks of {cell['items']} items, {cell['seeds']} seeds: retention / pair"
        body.append([what, f"{_shown(cell, 'retention')} / {_shown(cell, 'pair')}"])
    for cell in tables["parts"]:
        body.append([f"mean over {cell['parts']} parts of {cell['items of each']} items", _shown(cell, "mean")])
    for cell in tables["groups"]:
        what = f"{cell['passages']} passages of 5 items, {cell['seeds']} seeds: passages / items as units"
        body.append([what, f"{_shown(cell, 'gain')} / {_percent(cell['gain, items as units'])}"])
    for cell in tables["unscored"]:
        what = f"{cell['unscored']} of {cell['items']} answers unscored, all wrong, {cell['seeds']} seeds"
        body.append(
            [f"{what}: coverage / called better", f"{_percent(cell['gain'])} / {_shown(cell, 'called better')}"]
        )
    for cell in tables["correlations"]:
        body.append([f"Spearman over {cell['arms']} arms, r = {cell['correlation']:g}", _shown(cell, "coefficient")])
    for cell in tables["targets"]:
        what = f"{cell['targets']} targets whose effects have sd {cell['sd over targets']:g}"
        body.append([f"{what}: mean / further target", f"{_shown(cell, 'mean')} / {_shown(cell, 'further target')}"])
    return rows(["", "holds the truth, %"], body)
