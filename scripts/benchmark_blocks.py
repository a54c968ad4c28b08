"""Blocks of the docs that come from kept tables of benchmarks, each a function from the sources to Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_arena.analyze.pscp import published_pscp
from peft_arena.cost.pscp import PscpChoice
from peft_arena.report.numbers import quantity, signed
from peft_arena.store.published import find_tables
from scripts.sources import Sources
from scripts.study_blocks import Block, rows

BLOCKS: dict[str, Block] = {}
Cell = dict[str, Any]


def block(function: Block) -> Block:
    """Make a block of a function, by its name."""
    BLOCKS[function.__name__.replace("_", "-")] = function
    return function


def made(about: Cell) -> str:
    """Say which version measured, on what machine and when."""
    version = f"peft-arena {about['peft_arena']} (commit {about['git_commit'][:7]})"
    note = f" {about['note']}" if "note" in about else ""
    return f"Measured with {version} on {about['cores']} cores of {about['processor']}, {about['date']}.{note}"


def _coverage(sources: Sources) -> dict[str, list[Cell]]:
    """Return the cells of every table of the simulation."""
    tables: dict[str, list[Cell]] = {}
    for cell in sources.measured("coverage")[1]:
        tables.setdefault(cell["table"], []).append(cell)
    return tables


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _by_seeds(cells: Sequence[Cell], rates: Sequence[str]) -> str:
    """Return a table with a row for each kind and number of items, and a column for each number of seeds."""
    seeds = sorted({cell["seeds"] for cell in cells})
    found = {(cell["kind"], cell["items"], cell["seeds"]): cell for cell in cells}
    body = []
    for kind, items in dict.fromkeys((cell["kind"], cell["items"]) for cell in cells):
        shown = [" / ".join(_shown(found[kind, items, count], rate) for rate in rates) for count in seeds]
        body.append([kind, str(items), *shown])
    return rows(["items are", "number", *map(_seeds, seeds)], body)


def _shown(cell: Cell, rate: str) -> str:
    text = _percent(cell[rate])
    return f"**{text}**" if rate in cell["outside"] else text


def _studies(cells: Sequence[Cell]) -> int:
    (count,) = {cell["studies"] for cell in cells}
    return int(count)


@block
def coverage(sources: Sources) -> str:
    """Coverage of gain, pair and retention."""
    cells = _coverage(sources)["equal"]
    error = 100 * (0.95 * 0.05 / _studies(cells)) ** 0.5
    table = _by_seeds(cells, ("gain", "pair", "retention"))
    return (
        f"{table}\n\nIn per cent, gain / arm against its twin / retention; {_studies(cells):,} studies a cell, Monte "
        f"Carlo error {error:.1f}. Bold: the 99 % Monte Carlo interval lies wholly outside 93 to 98 %."
    )


@block
def alarms(sources: Sources) -> str:
    """False alarms of a twin, and of a whole family."""
    cells = _coverage(sources)["equal"]
    return (
        f"{_by_seeds(cells, ('twin', 'family'))}\n\nIn per cent: two equal arms, uncorrected p below 0.05 / five equal "
        "arms, any of 25 true equalities called different. Bold: wholly above 5 %."
    )


@block
def coverage_outside(sources: Sources) -> str:
    """The cells outside of what is promised, over all tables."""
    tables = _coverage(sources)
    told = []
    for name, cells in tables.items():
        bad = [cell for cell in cells if cell["outside"]]
        kinds = sorted({cell["kind"] for cell in bad if "kind" in cell})
        if bad:
            where = f" ({', '.join(kinds)})" if kinds else ""
            told.append(f"{len(bad)} of {len(cells)} cells of “{name}”{where}")
    total = sum(map(len, tables.values()))
    about, _ = sources.measured("coverage")
    return f"Of {total} cells, outside the promise are: {'; '.join(told) if told else 'none'}. {made(about)}"


def _plain(sources: Sources, name: str, head: Sequence[str], axes: Sequence[str], rates: Sequence[str]) -> str:
    """Return the cells of a table, a row each."""
    cells = _coverage(sources)[name]
    body = [[*(str(cell[axis]) for axis in axes), *(_shown(cell, rate) for rate in rates)] for cell in cells]
    return rows(head, body)


@block
def coverage_spread(sources: Sources) -> str:
    """Other spreads between seeds, and other numbers of arms."""
    head = ["seeds", "sd between seeds", "gain", "pair", "retention", "twin", "family"]
    tables = _coverage(sources)
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
    """One arm of several times the spread."""
    head = [
        "times",
        "seeds",
        "items",
        "its gain",
        "its pair",
        "any pair, gain",
        "whole family",
        "named",
        "another named",
    ]
    rates = ("its gain", "its pair", "gain pairs", "family", "is named", "another is named")
    return _plain(sources, "wild", head, ("times", "seeds", "items"), rates)


@block
def coverage_borrowed(sources: Sources) -> str:
    """One arm with several seeds, whose spread stands for all."""
    head = ["seeds of the one arm", "items", "gain", "pair", "family", "12 points found"]
    return _plain(sources, "borrowed", head, ("seeds", "items"), ("gain", "pair", "family", "12 points found"))


@block
def power(sources: Sources) -> str:
    """How often a better arm is found."""
    cells = _coverage(sources)["power"]
    seeds = sorted({cell["seeds"] for cell in cells})
    found = {(cell["better by"], cell["items"], cell["seeds"]): cell for cell in cells}
    body = []
    for better, items in dict.fromkeys((cell["better by"], cell["items"]) for cell in cells):
        row = [found[better, items, count] for count in seeds]
        shown = [f"{_percent(cell['one pair'])} / {_percent(cell['all pairs'])}" for cell in row]
        body.append([f"{100 * better:g} points", str(items), *shown])
    return rows(["better by", "items", *map(_seeds, seeds)], body)


@block
def power_found(sources: Sources) -> str:
    """What three and five seeds find."""
    cells = _coverage(sources)["power"]
    found = {(cell["better by"], cell["items"], cell["seeds"]): f"{100 * cell['one pair']:.0f} %" for cell in cells}
    return (
        f"- **To tell methods apart**: three seeds and 200 items find 12 points in {found[0.12, 200, 3]} of the "
        f"studies, five seeds and 1000 items find 8 in {found[0.08, 1000, 5]}. Two seeds say little (12 points of 200 "
        f"items: {found[0.12, 200, 2]}): buy the third before more items."
    )


@block
def margin_found(sources: Sources) -> str:
    """What seeds add to the items that a margin takes."""
    found = {(cell["truth"], cell["seeds"], cell["items"]): cell for cell in _coverage(sources)["margin"]}
    told = [f"{100 * found[0.0, seeds, 4000]['no worse']:.0f} % at {_seeds(seeds)}" for seeds in (1, 3, 10)]
    return (
        "  an arm that lost nothing is called no worse within 2 points over 4000 items in "
        f"{told[0]} (this run only), {told[1]} and {told[2]}, where trainings lie 2 points apart."
    )


@block
def margins(sources: Sources) -> str:
    """Which words a true difference gets against a margin of two points."""
    cells = _coverage(sources)["margin"]
    words = ("no worse", "equivalent", "better", "worse")
    body = []
    for cell in cells:
        about = [signed(100 * cell["truth"], 0), str(cell["seeds"]), str(cell["items"])]
        body.append([*about, *(_shown(cell, word) for word in words)])
    return rows(["true difference, points", "seeds", "items", *words], body)


@block
def coverage_paths(sources: Sources) -> str:
    """How often a point of a path is called an overshoot."""
    cells = _coverage(sources)["paths"]
    body = [
        [signed(-100 * cell["target lost"], 0), str(cell["seeds"]), str(cell["items"]), _shown(cell, "overshoot")]
        for cell in cells
    ]
    return rows(["target at the chosen point, points", "seeds", "items", "called overshoot"], body)


@block
def coverage_more(sources: Sources) -> str:
    """Means over tasks and parts, passages, unscored answers, correlations, targets."""
    tables = _coverage(sources)
    body = []
    for cell in tables["tasks"]:
        what = f"mean over 4 tasks of {cell['items']} items, {_seeds(cell['seeds'])}: retention / pair"
        body.append([what, f"{_shown(cell, 'retention')} / {_shown(cell, 'pair')}"])
    for cell in tables["parts"]:
        body.append([f"mean over {cell['parts']} parts of {cell['items of each']} items", _shown(cell, "mean")])
    for cell in tables["groups"]:
        (large, items), (small, few) = cell["large"], cell["small"]
        passages = f"{large} passages of {items}" + (f" and {small} of {few} items" if small else " items")
        what = f"{passages}, {_seeds(cell['seeds'])}: passages / items as units"
        body.append([what, f"{_shown(cell, 'gain')} / {_percent(cell['gain, items as units'])}"])
    for cell in tables["tokens"]:
        lengths = f"{cell['documents']} documents, log lengths of sd {cell['sd of log length']:g}"
        body.append(
            [f"{lengths}: nats per token / no interval", f"{_shown(cell, 'change')} / {_percent(cell['no interval'])}"]
        )
    for cell in tables["unscored"]:
        what = f"{cell['unscored']} of {cell['items']} answers unscored, all wrong, {_seeds(cell['seeds'])}"
        body.append(
            [f"{what}: coverage / called better", f"{_percent(cell['gain'])} / {_shown(cell, 'called better')}"]
        )
    for cell in tables["correlations"]:
        body.append([f"Spearman over {cell['arms']} arms, r = {cell['correlation']:g}", _shown(cell, "coefficient")])
    for cell in tables["targets"]:
        what = f"{cell['targets']} targets whose effects have sd {cell['sd over targets']:g}"
        body.append([f"{what}: mean / further target", f"{_shown(cell, 'mean')} / {_shown(cell, 'further target')}"])
    return rows(["", "holds the truth, %"], body)


def _versus(sources: Sources, benchmark: str) -> str:
    """Return time and memory of ours and of the plain way, a row for each case."""
    about, found = sources.measured(benchmark)
    body = []
    for one in found:
        times = [f"{one[f'{side}_s']:.1f} s" for side in ("ours", "reference")]
        memory = [quantity(one[f"{side}_peak_bytes"], "bytes") for side in ("ours", "reference")]
        body.append([f"`{one['name']}`", *times, f"{one['ratio']:.1f}", *memory])
    head = ["case", "time, ours", "time, plain", "plain / ours", "peak memory, ours", "peak memory, plain"]
    return f"{rows(head, body)}\n\n{made(about)}"


@block
def speed_merge(sources: Sources) -> str:
    """Merging against the plain way."""
    return _versus(sources, "merge")


@block
def speed_geometry(sources: Sources) -> str:
    """Spectra, activations and drift against plain formulas."""
    return _versus(sources, "geometry")


@block
def speed_paths(sources: Sources) -> str:
    """Walking a path against merging at every factor."""
    about, (one,) = sources.measured("paths")
    body = [
        ["all", f"{one['ours_s']:.0f} s", f"{one['reference_s']:.0f} s", f"{one['ratio']:.1f}"],
        ["without starting processes", "", "", f"{one['ratio_without_starts']:.1f}"],
        ["loading", f"{one['loading_s']:.1f} s", "", ""],
        ["placing the model at twelve factors", f"{one['placing_s']:.1f} s", "", ""],
        ["evaluation", f"{one['evaluating_s']:.0f} s", f"{one['reference_evaluating_s']:.0f} s", ""],
    ]
    return f"{rows(['', 'ours', 'plain', 'plain / ours'], body)}\n\n{made(about)}"


@block
def speed_analysis(sources: Sources) -> str:
    """Time and memory of an analysis of many item records."""
    about, found = sources.measured("analyze")
    told = [
        f"{one['study']}: {one['item_records']:,} item records, reading included, {one['seconds']:.1f} s and "
        f"{one['memory_mib']:.0f} MiB"
        for one in found
    ]
    return f"{'; '.join(told)}, on one core. {made(about)}"


@block
def pscp_published(sources: Sources) -> str:
    """PSCP of a published table, and what the constants do to its ranks."""
    (table,) = find_tables("peft-bench/pscp-llama-3-8b")
    found = published_pscp(table, PscpChoice())
    assert found is not None, "the table has the four inputs"
    body = [
        [band.label, f"{band.score:.2f}", f"{band.low:.1f} to {band.high:.1f}", f"{band.rank} [{band.ranks}]"]
        for band in found.ranked
    ]
    bands = found.bands
    pairs = f"{len(bands.of('robust'))} of {len(bands.pairs)} pairs are ordered robustly."
    return f"{rows(['method', 'PSCP', 'over the grid', 'rank [over the grid]'], body)}\n\n{pairs}"
