"""The report's section on PSCP: the score of each arm, and what its constants leave open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from peft_arena.analyze.costs import PEAK_MEMORY, TRAINABLE
from peft_arena.analyze.pscp import FLOPS, PERCENT, ArmPscp, PscpPair, PscpScore, PublishedPscp, TargetPscp
from peft_arena.cost.pscp import Operations
from peft_arena.cost.pscp_band import EXPONENTS, SCALES
from peft_arena.report.figures import FAINT, INK, MANY, Drawn, ends_of, look, settle, shorten
from peft_arena.report.markup import Markup, cell, join, table, tag
from peft_arena.report.numbers import NONE, listed, p_text, plain, quantity, signed
from peft_arena.report.words import about_runs, cell_kind, resolution, sentence, subject, word_text

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.analyze.costs import Cost
    from peft_arena.analyze.estimate import Estimate

PSCP = "pscp-"
"""Begins the name of every figure of the section."""
MOST_PAIRS = 6
"""Most pairs that a sentence names."""


def pscp_figure(found: TargetPscp, name: str) -> Drawn | None:
    """Draw each arm's score with its interval and its band, and its rank with its range; None without a score.

    Args:
        found: of a target.
        name: of the figure.
    """
    ranked = found.ranked
    if not ranked:
        return None
    height = max(2.6, (0.32 if len(ranked) <= MANY else 0.2) * len(ranked) + 1.2)
    canvas = Canvas(figsize=(10.0, height), layout="constrained")
    FigureCanvasAgg(canvas)
    left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    hovers: dict[str, str] = {}
    for row, (arm, band, score) in enumerate(reversed(ranked)):
        colour, marker = look(arm.place)
        mark: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 7.5, "linestyle": "none", "zorder": 4}
        left.hlines(row, band.low, band.high, color=FAINT, linewidth=5, alpha=0.45, zorder=2)
        left.hlines(row, *ends_of(score), color=INK, linewidth=1.3, zorder=3)
        (dot,) = left.plot(band.score, row, **mark)
        right.hlines(row, band.first, band.last, color=FAINT, linewidth=5, alpha=0.45, zorder=2)
        right.plot(band.rank, row, **mark)
        dot.set_gid(f"{name}-{arm.place}")
        hovers[f"{name}-{arm.place}"] = (
            f"{arm.label}: {_score_text(score, found.unit)}; over the constants "
            f"{_ends(band.low, band.high, found.unit)}, rank {band.ranks}"
        )
    left.set_yticks(range(len(ranked)), [shorten(arm.label, 22) for arm, _, _ in reversed(ranked)])
    unit = f" ({found.unit})" if found.unit else ""
    left.set_xlabel(f"PSCP with {found.choice.operations.value} FLOPs{unit}")
    right.set_xlabel("rank")
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.set_xlim(0.5, len(ranked) + 0.5)
    for axis in (left, right):
        axis.grid(True, axis="x")
        axis.tick_params(axis="y", length=0)
    settle(canvas)
    told = "; ".join(f"{arm.label} {_number(band.score, found.unit)}, rank {band.ranks}" for arm, band, _ in ranked)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"PSCP of {len(ranked)} arms with its range over {found.points} choices of the constants. {told}.",
        caption=(
            "Marks: PSCP and rank at the study's constants. Black lines: 95 % intervals over seeds and items, of the "
            f"performance alone. Grey bands: the range over {found.points} choices of the constants."
        ),
        hovers=hovers,
    )


def pscp_section(found: TargetPscp, images: Sequence[tuple[Drawn, Markup]]) -> Markup:
    """Return the section of one target: what the score is, what holds, the figure, the tables."""
    from peft_arena.report.svg import captioned

    constants = found.choice.constants
    explained = join(
        [
            "PSCP is the performance on the target, discounted by what it cost: ",
            *_formula(),
            ", with trained parameters M",
            tag("sub", "p"),
            ", forward FLOPs of 1 × 512 tokens M",
            tag("sub", "f"),
            " and peak training memory M",
            tag("sub", "m"),
            f", here with C = {quantity(constants.parameters, 'parameters')} parameters, "
            f"{quantity(constants.flops, 'FLOPs')} and {quantity(constants.memory, 'B')}, and exponents "
            f"{constants.beta_parameters:g}, {constants.beta_flops:g} and {constants.beta_memory:g}. Nothing measured "
            f"fixes these constants, so ranks are given over a grid of them: each C times {_factors(SCALES)}, each "
            f"exponent times {_factors(EXPONENTS)}.",
        ]
    )
    parts: list[object] = [tag("p", explained), tag("ul", *(tag("li", text) for text in pscp_sentences(found)))]
    parts += [captioned(figure, image) for figure, image in images]
    parts.append(pscp_table(found))
    if found.pairs:
        parts.append(tag("details", tag("summary", f"All {len(found.pairs)} pairs"), pairs_table(found)))
    return join(parts)


def pscp_sentences(found: TargetPscp) -> list[str]:
    """Return what holds whatever the constants are, and what does not, in a few sentences."""
    ranked = found.ranked
    without = [arm.label for arm in found.arms if not any(arm is one for one, _, _ in ranked)]
    told = [f"No PSCP: {listed(without)}; the table says what is missing."] if without else []
    if not ranked:
        return told
    arm, band, _ = ranked[0]
    level = [other.label for other, same, _ in ranked if same.score == band.score]
    if len(level) > 1:
        tied = f"{listed(level)} share the highest PSCP, {_number(band.score, found.unit)}{_unit(found.unit)}."
        return [tied, *_pair_sentences(found), *told]
    mine = [pair for pair in found.pairs if arm.label in (pair.left, pair.right)]
    who = sentence(subject([arm.label], about_runs([pair.judged for pair in mine])))
    first = f"{who} has the highest PSCP, {_number(band.score, found.unit)}{_unit(found.unit)}"
    if len(ranked) == 1:
        return [f"{first}.", *told]
    depends = f"its rank depends on the constants: {band.ranks} of {len(ranked)}"
    first += f"; {f'it is first at all {found.points} choices of the constants' if band.last == 1 else depends}."
    for word, to in (("undecided", "against"), ("not comparable", "with")):
        near = [pair for pair in mine if pair.judged.word == word]
        if near:
            names = [pair.right if pair.left == arm.label else pair.left for pair in near]
            size = resolution([pair.judged for pair in near])
            first += f" {word.capitalize()} {to} it at the study's constants: {listed(names)}{size}."
    return [first, *_pair_sentences(found), *told]


def _apart(pair: PscpPair) -> bool:
    return pair.judged.has("better") or pair.judged.has("worse")


def _formula() -> list[object]:
    """Return the formula of the score as parts of a line."""
    parts: list[object] = ["P"]
    for name in "pfm":
        power = tag("sup", "−β", tag("sub", name))
        parts += [" (1 + M", tag("sub", name), "/C", tag("sub", name), ")", power]
    return parts


def _pair_sentences(found: TargetPscp) -> list[str]:
    robust, depends = found.of("robust"), found.of("depends")
    apart = sum(map(_apart, robust))
    text = (
        f"{len(robust)} of {len(found.pairs)} pairs are ordered robustly: one arm is above the other at all "
        f"{found.points} choices of the constants."
    )
    if robust:
        text += f" In {apart} of these one is better at the study's constants."
    told = [text]
    if depends:
        named = [f"{pair.left} and {pair.right}" for pair in depends[:MOST_PAIRS]]
        more = f"; and {len(depends) - MOST_PAIRS} more" if len(depends) > MOST_PAIRS else ""
        told.append(f"Of these pairs the order depends on the constants: {'; '.join(named)}{more}.")
    return told


def pscp_table(found: TargetPscp) -> Markup:
    """Return performance, inputs and both scores of every arm, with the range over the constants."""
    chosen = found.choice.operations
    other = next(kind for kind in Operations if kind is not chosen)
    unit = f" ({found.unit})" if found.unit else ""
    head = [
        "arm", f"performance P{unit}", "trained parameters", "extra FLOPs", "total FLOPs", "peak training memory",
        f"PSCP, {chosen.value} FLOPs", "over the constants", "rank", f"PSCP, {other.value} FLOPs", "rank",
    ]  # fmt: skip
    known = [arm for arm, _, _ in found.ranked]
    rest = [arm for arm in found.arms if not any(arm is one for one in known)]
    rows = [
        [
            join([arm.label]),
            _estimate_cell(arm.performance, found.unit),
            *(
                _cost_cell(arm.inputs[metric])
                for metric in (TRAINABLE, FLOPS[Operations.EXTRA], FLOPS[Operations.TOTAL], PEAK_MEMORY)
            ),
            *_score_cells(arm.by[chosen], found.unit, whole=True),
            *_score_cells(arm.by[other], found.unit, whole=False),
        ]
        for arm in (*known, *rest)
    ]
    note = (
        f"P: {found.metric} on {found.label}, mean over seeds. FLOPs: one forward pass of 1 × 512 tokens; extra: above "
        "the base model's (the paper's definition of the score), total: all. Both scores go by the same name "
        "elsewhere and are not comparable. Peak training memory as measured, which on a CPU is memory of the process "
        f"and not of an accelerator: {_hows(found)}. Brackets: 95 % intervals, costs taken as exact. Ranks are at "
        "the study's constants, in brackets over the grid, among the arms that have a score."
    )
    missing = [
        tag("li", f"{arm.label}: {reason}")
        for arm in found.arms
        if (reason := " / ".join(dict.fromkeys(one.missing for one in arm.by.values() if one.missing)))
    ]
    return join([table("PSCP", head, rows, "pairs", note), tag("ul", *missing, class_="note") if missing else ""])


def pairs_table(found: TargetPscp) -> Markup:
    """Return every pair: the difference at the study's constants, and what the constants do to the order."""
    unit = f" ({found.unit})" if found.unit else ""
    rows = [[join([f"{pair.left} − {pair.right}"]), *_pair_cells(pair, found.unit)] for pair in found.pairs]
    note = (
        "Differences of the scores, paired by seed and item; p-values are Holm-corrected over all comparisons of the "
        "study, and brackets say the same as the words. The order is "
        f"robust if it is the same at all {found.points} choices of the constants, at the measured performances."
    )
    head = ["pair", f"difference{unit}", "p (Holm)", "left against right", "order over the constants"]
    return table("PSCP, pair by pair", head, rows, "pairs", note, text=(3, 4))


def _pair_cells(pair: PscpPair, unit: str) -> list[Markup]:
    words = {"robust": "robust", "depends": "depends on the constants", "equal": "equal"}
    found = pair.judged.estimate
    last = cell(words[pair.order], "txt")
    if found is None:
        return [cell(tag("span", NONE, class_="none")), cell(NONE), cell(pair.judged.word, "txt none"), last]
    kind = {"better": "num better", "worse": "num worse"}.get(pair.judged.word, "num")
    limits = pair.judged.interval
    ends = "" if limits is None else _bracket(*limits, unit, signed)
    shown = join([signed(found.value, _digits(unit)), tag("small", ends)])
    said = cell(word_text(pair.judged), cell_kind(pair.judged))
    return [cell(shown, kind), cell(p_text(pair.judged.p_corrected)), said, last]


def _score_cells(found: PscpScore, unit: str, whole: bool) -> list[Markup]:
    if found.score is None or found.band is None:
        empty = cell(tag("span", NONE, class_="none"), title=found.missing)
        return [empty] * (3 if whole else 2)
    band = found.band
    rank = cell(join([band.rank, tag("small", f"[{band.ranks}]")]))
    over = [cell(_ends(band.low, band.high, unit))] if whole else []
    return [_estimate_cell(found.score, unit), *over, rank]


def _estimate_cell(found: Estimate | None, unit: str) -> Markup:
    if found is None:
        return cell(tag("span", NONE, class_="none"))
    ends = "" if found.low is None or found.high is None else _bracket(found.low, found.high, unit)
    title = f"interval covers {found.covers}; {found.items} items"
    return cell(join([_number(found.value, unit), tag("small", ends)]), title=title)


def _cost_cell(cost: Cost | None) -> Markup:
    if cost is None:
        return cell(tag("span", NONE, class_="none"), title="not in the records")
    if cost.value is None:
        return cell(tag("span", NONE, class_="none"), title=cost.how)
    return cell(quantity(cost.value, cost.unit), title=f"{cost.value:,.0f} {cost.unit}; {cost.how}; {cost.runs} runs")


def _hows(found: TargetPscp) -> str:
    memories = [cost for arm in found.arms if (cost := arm.inputs[PEAK_MEMORY]) is not None]
    ways = list(dict.fromkeys(cost.how for cost in memories))
    text = "; ".join(ways[:3]) or "not measured"
    return f"{text} (the arms differ)" if len(ways) > 1 else text


def _factors(values: Sequence[float]) -> str:
    return listed([f"{value:g}" for value in values])


def _digits(unit: str) -> int:
    return 1 if unit == PERCENT else 3


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def _number(value: float, unit: str) -> str:
    return plain(value, _digits(unit))


def _ends(low: float, high: float, unit: str) -> str:
    return f"{_number(low, unit)} to {_number(high, unit)}"


def _bracket(low: float, high: float, unit: str, render: Any = plain) -> str:
    return f"[{render(low, _digits(unit))}, {render(high, _digits(unit))}]"


def _score_text(found: Estimate, unit: str) -> str:
    ends = "" if found.low is None or found.high is None else f" {_bracket(found.low, found.high, unit)}"
    return f"{_number(found.value, unit)}{_unit(unit)}{ends}"


def published_pscp_table(found: PublishedPscp) -> Markup:
    """Return PSCP of a published table: what its own numbers give with the study's constants, and over the grid."""
    rows = [
        [
            join([band.label]),
            cell(plain(band.score, 2)),
            cell(f"{plain(band.low, 1)} to {plain(band.high, 1)}"),
            cell(join([band.rank, tag("small", f"[{band.ranks}]")])),
        ]
        for band in found.ranked
    ]
    depends = [f"{pair.left} and {pair.right}" for pair in found.bands.of("depends")]
    order = f"The order depends on the constants: {'; '.join(depends)}. " if depends else ""
    note = (
        f"Imported, single runs: PSCP of {found.performance} with {found.operations.value} FLOPs at this study's "
        f"constants, computed from the published inputs; in brackets ranks over {found.bands.points} choices of the "
        f"constants. {len(found.bands.of('robust'))} of {len(found.bands.pairs)} pairs are ordered robustly. {order}"
        "There is no interval, and no row is comparable with this study's scores: costs were measured otherwise."
    )
    if found.left_out:
        note += f" Without an input, and so without a score: {listed(list(found.left_out))}."
    head = ["published run", f"PSCP, {found.operations.value} FLOPs", "over the constants", "rank"]
    return table(join([found.title, ": PSCP (imported)"]), head, rows, "published", note)


def pscp_tables(found: Mapping[str, TargetPscp]) -> dict[str, pl.DataFrame]:
    """Return the CSV files: a row per target, arm and definition of M_f, and a row per target and pair.

    Args:
        found: label of each target to its values.
    """
    import polars as pl

    rows = [row for target, one in found.items() for arm in one.arms for row in _arm_rows(target, one, arm)]
    numbers = (
        "performance", "parameters", "flops", "memory", "score", "score_low", "score_high", "band_low", "band_high",
        "c_parameters", "c_flops", "c_memory", "beta_parameters", "beta_flops", "beta_memory",
    )  # fmt: skip
    text = ("target", "arm", "operations", "metric", "unit", "missing")
    schema: dict[str, Any] = {
        **dict.fromkeys(text, pl.String),
        "chosen": pl.Boolean,
        **dict.fromkeys(numbers, pl.Float64),
        **dict.fromkeys(("rank", "rank_first", "rank_last"), pl.Int64),
    }
    pairs = [
        {
            "target": target,
            "left": pair.left,
            "right": pair.right,
            "operations": one.choice.operations.value,
            **{name: getattr(pair.judged.estimate, name, None) for name in ("value", "low", "high", "p")},
            "p_corrected": pair.judged.p_corrected,
            "words": ", ".join(pair.judged.words),
            "order": pair.order,
        }
        for target, one in found.items()
        for pair in one.pairs
    ]
    columns: dict[str, Any] = {
        **dict.fromkeys(("target", "left", "right", "operations"), pl.String),
        **dict.fromkeys(("value", "low", "high", "p", "p_corrected"), pl.Float64),
        "words": pl.String,
        "order": pl.String,
    }
    return {
        "pscp": pl.DataFrame(rows, schema=schema, orient="row"),
        "pscp_pairs": pl.DataFrame(pairs, schema=columns, orient="row"),
    }


def _arm_rows(target: str, found: TargetPscp, arm: ArmPscp) -> list[dict[str, Any]]:
    constants = asdict(found.choice.constants)
    values = {name: None if cost is None else cost.value for name, cost in arm.inputs.items()}
    made = []
    for kind, one in arm.by.items():
        band = one.band
        made.append(
            {
                "target": target,
                "arm": arm.label,
                "operations": kind.value,
                "chosen": kind is found.choice.operations,
                "metric": found.metric,
                "unit": found.unit,
                "missing": one.missing or None,
                "performance": getattr(arm.performance, "value", None),
                "parameters": values[TRAINABLE],
                "flops": values[FLOPS[kind]],
                "memory": values[PEAK_MEMORY],
                "score": getattr(one.score, "value", None),
                "score_low": getattr(one.score, "low", None),
                "score_high": getattr(one.score, "high", None),
                **{
                    column: None if band is None else getattr(band, name)
                    for column, name in (
                        ("band_low", "low"), ("band_high", "high"), ("rank", "rank"), ("rank_first", "first"),
                        ("rank_last", "last"),
                    )
                },
                **{f"c_{name}" if not name.startswith("beta") else name: value for name, value in constants.items()},
            }
        )  # fmt: skip
    return made
