"""The report's section on pass@k: what sampled answers can do before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from peft_arena.analyze.passk import ArmPassK, PassK, TargetPassK
from peft_arena.core.passk import metric_name
from peft_arena.report.figures import FAINT, INK, Drawn, ends_of, settle
from peft_arena.report.geometry_lines import legend_above, line_style
from peft_arena.report.markup import Markup, cell, join, table, tag
from peft_arena.report.numbers import NONE, digits_of, p_text, plain, signed
from peft_arena.report.words import (
    about_runs,
    ends_text,
    judged_text,
    resolution,
    sentence,
    subject,
    word_text,
    words_text,
)

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from peft_arena.analyze.estimate import Estimate

PASSK = "passk-"
"""Begins the name of every figure of the section."""
BASE = "pretrained"
_APART = 0.035
"""How far the marks of two arms at one k stand apart, as a share of the axis."""


def passk_figure(found: TargetPassK, named: set[str], name: str) -> Drawn | None:
    """Draw pass@k by k, and its change against the pretrained model; None where no arm has a value.

    Args:
        found: of a target.
        named: labels of the arms to colour and name; the others are faint lines.
        name: of the figure.
    """
    arms = [arm for arm in found.arms if any(point.tuned for point in arm.points)]
    if not arms:
        return None
    canvas = Canvas(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(canvas)
    levels, changes = canvas.subplots(1, 2)
    for axis, title in ((levels, "pass@k (%)"), (changes, "change against the pretrained model (points)")):
        axis.grid(True)
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.set_xlabel("k, answers to each item")
    changes.axhline(0, color=FAINT, linewidth=0.9)
    if found.base:
        ks, values, low, high = _series([(k, one) for k, one in found.base], 100)
        levels.plot(ks, values, color=INK, linewidth=1.5, linestyle=(0, (4, 2)), label=BASE)
        levels.fill_between(ks, low, high, color=INK, alpha=0.12, linewidth=0)
        levels.legend(loc="best", frameon=False, fontsize=9)
    shown = [arm for arm in arms if arm.label in named]
    for arm in arms:
        place = shown.index(arm) - (len(shown) - 1) / 2 if arm in shown else None
        _line(levels, arm, [(point.k, point.tuned) for point in arm.points], 100, place, len(shown))
        _line(changes, arm, [(point.k, point.delta) for point in arm.points], 1, place, len(shown))
    for axis in (levels, changes):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(list(found.sampling.k)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(min(found.sampling.k) * 0.85, max(found.sampling.k) * 1.18)
    legend_above(canvas, shown)
    settle(canvas)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"pass@k of the pretrained model and of {len(arms)} arms. {' '.join(arm_sentence(arm) for arm in arms)}",
        caption=_caption(len(arms) - len(shown)),
    )


def _caption(others: int) -> str:
    text = (
        "Left: how likely one of k sampled answers is right, the pretrained model dashed with its band. Right: the "
        "paired difference. Bars and band: 95 % intervals; arms stand beside each other at the same k. Bars on the "
        "left do not tell whether two models differ; the words in the table do."
    )
    return text + (f" Grey lines without a name: {others} other arms." if others else "")


def _series(found: Sequence[tuple[int, Estimate]], factor: float) -> tuple[list[float], ...]:
    ends = [ends_of(one) for _, one in found]
    return (
        [float(k) for k, _ in found],
        [factor * one.value for _, one in found],
        [factor * low for low, _ in ends],
        [factor * high for _, high in ends],
    )


def _line(
    axis: Axes,
    arm: ArmPassK,
    points: Sequence[tuple[int, Estimate | None]],
    factor: float,
    place: float | None,
    count: int,
) -> None:
    """Draw an arm's line with its intervals; faint and without them if it has no place among the named ones."""
    known = [(k, found) for k, found in points if found is not None]
    if not known:
        return
    ks, values, low, high = _series(known, factor)
    if place is None:
        axis.plot(ks, values, color=FAINT, linewidth=0.7, alpha=0.6, zorder=2)
        return
    moved = [k * 2 ** (place * min(_APART * 2, 0.5 / count)) for k in ks]
    style = line_style(arm.place)
    axis.vlines(moved, low, high, color=style["color"], linewidth=1.3, alpha=0.75, zorder=3)
    axis.plot(moved, values, linewidth=1.5, markersize=5.5, zorder=4, **style)


def passk_section(found: TargetPassK, images: Sequence[tuple[Drawn, Markup]]) -> Markup:
    """Return the section of one target: a sentence per arm, the figure, the table."""
    from peft_arena.report.svg import captioned

    told = tag("ul", *(tag("li", arm_sentence(arm)) for arm in found.arms)) if found.base else Markup("")
    return join([told, *(captioned(figure, image) for figure, image in images), passk_table(found)])


def passk_table(found: TargetPassK) -> Markup:
    """Return pass@k of the pretrained model and every arm, with differences and intervals."""
    ks = found.sampling.k
    head: list[object] = ["model"]
    for k in ks:
        head += [f"{metric_name(k)} (%)", "change (points)", "p (Holm)"]
    base = dict(found.base)
    first: list[Markup] = [join([BASE])]
    for k in ks:
        first += [_level_cell(base.get(k)), cell(""), cell("")]
    rows = [
        first,
        *([join([arm.label]), *(part for point in arm.points for part in _cells(point))] for arm in found.arms),
    ]
    sampling = found.sampling
    note = (
        f"{sampling.samples} answers to each of {found.items} test items of {found.label}, at {sampling.words}; "
        "all models with the same random numbers. A sample passes with full marks "
        "only. pass@k: share of sets of k samples that hold a right one, without bias (Chen et al. 2021). Changes: "
        "paired by seed and item; p-values are Holm-corrected over all comparisons of the study, and brackets beside "
        "changes are the intervals that say the same. "
        f"Gain above is of {'the mean over these answers' if found.judges else 'greedy answers'}; "
        "retention is of greedy ones."
    )
    return table("pass@k before and after training", head, rows, "pairs", note)


def _cells(point: PassK) -> list[Markup]:
    kind = {1: "num better", -1: "num worse", 0: "num"}[point.change]
    delta = point.delta
    if delta is None:
        return [_level_cell(point.tuned), cell(tag("span", NONE, class_="none")), cell(NONE)]
    ends = ends_text(point.judged.interval, delta.unit)
    text = join([signed(delta.value, digits_of(delta.unit)), tag("small", ends), tag("small", word_text(point.judged))])
    title = f"interval covers {delta.covers}; {delta.items} items"
    return [_level_cell(point.tuned), cell(text, kind, title=title), cell(p_text(point.judged.p_corrected))]


def _level_cell(found: Estimate | None) -> Markup:
    if found is None:
        return cell(tag("span", NONE, class_="none"))
    ends = "" if found.low is None or found.high is None else f"[{plain(100 * found.low)}, {plain(100 * found.high)}]"
    return cell(join([plain(100 * found.value), tag("small", ends)]))


def passk_sentences(found: TargetPassK) -> str:
    """Return for the headline which arms raise pass@k at one k and lower it at another; empty where none does."""
    return " ".join(arm_sentence(arm) for arm in found.arms if arm.rises and arm.falls)


def arm_sentence(arm: ArmPassK) -> str:
    """Return what training did to pass@k, in one sentence."""
    known = [point for point in arm.points if point.delta is not None and point.delta.known]
    who = sentence(subject([arm.label], about_runs([point.judged for point in known])))
    if not known:
        return f"{who}: what training did to pass@k is not known."
    if arm.rises and arm.falls:
        return _both(who, arm.rises, arm.falls)
    ends = [known[0]] if len(known) == 1 else [known[0], known[-1]]
    if not arm.rises and not arm.falls:
        return f"{who}: pass@k is neither better nor worse at any k: {' and '.join(map(_stated, ends))}."
    word, moved = ("better", arm.rises) if arm.rises else ("worse", arm.falls)
    shown = [point for point in ends if point.change] or [moved[0]]
    rest = [point for point in ends if not point.change]
    unsure = f"; {' and '.join(map(_stated, rest))}" if rest else ""
    return f"{who}: {' and '.join(map(_said, shown))} {word} than before{unsure}."


def _both(who: str, rises: Sequence[PassK], falls: Sequence[PassK]) -> str:
    up, down = (rises[0], falls[-1]) if rises[0].k < falls[-1].k else (rises[-1], falls[0])
    first, last = sorted((up, down), key=lambda point: point.k)
    more, less = ("more", "fewer") if first is up else ("fewer", "more")
    meaning = f"{more} items have a right one among {first.k} answers"
    if first.k == 1:
        meaning = f"a single answer is right {'more' if first is up else 'less'} often"
    meaning += f", and {less} items have a right one among {last.k} answers"
    return f"{who}: {_said(up)} better and {_said(down)} worse than before: {meaning}."


def _said(point: PassK) -> str:
    return f"{metric_name(point.k)} ({judged_text(point.judged)})"


def _stated(point: PassK) -> str:
    return (
        f"{metric_name(point.k)} {words_text(point.judged)} ({judged_text(point.judged)}{resolution([point.judged])})"
    )


def passk_frame(found: Mapping[str, TargetPassK]) -> pl.DataFrame:
    """Return a row per target, model and k for the CSV file; the pretrained model's ``arm`` is null.

    Args:
        found: label of each target to its values.
    """
    import polars as pl

    rows: list[dict[str, Any]] = []
    for target, one in found.items():
        start = {"target": target, "eval_id": one.spec.id, "samples": one.sampling.samples}
        rows += [{**start, "arm": None, "k": k, **_columns(level, "")} for k, level in one.base]
        rows += [
            {
                **start,
                "arm": arm.label,
                "k": point.k,
                **_columns(point.tuned, ""),
                **_columns(point.delta, "change_"),
                "change_p": None if point.delta is None else point.delta.p,
                "change_p_corrected": point.judged.p_corrected,
                "change_words": ", ".join(point.judged.words),
            }
            for arm in one.arms
            for point in arm.points
        ]
    text: dict[str, Any] = dict.fromkeys(("target", "arm", "eval_id"), pl.String)
    numbers = [f"{prefix}{name}" for prefix in ("", "change_") for name in _NUMBERS]
    floats = dict.fromkeys((*numbers, "change_p", "change_p_corrected"), pl.Float64)
    return pl.DataFrame(
        rows, schema={**text, "samples": pl.Int64, "k": pl.Int64, **floats, "change_words": pl.String}, orient="row"
    )


_NUMBERS = ("value", "low", "high")


def _columns(found: Estimate | None, prefix: str) -> dict[str, float | None]:
    return {f"{prefix}{name}": getattr(found, name, None) for name in _NUMBERS}
