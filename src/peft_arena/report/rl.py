"""The report's section on reinforcement learning: against fine-tuning, curves, a table, warnings, sample rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from peft_arena.analyze.rl import TargetRL
from peft_arena.analyze.rl_curves import BY_NAME, TENTH, Change, RLArm
from peft_arena.analyze.rl_pairs import ObjectivePair
from peft_arena.report.markup import Markup, cell, join, table, tag
from peft_arena.report.numbers import NONE, plain, rate, signed
from peft_arena.report.page_tables import cost_cell, pair_cells
from peft_arena.report.rl_figures import PAGE, panels_of
from peft_arena.report.rl_samples import samples_section
from peft_arena.report.rl_text import pair_sentence

if TYPE_CHECKING:
    from peft_arena.analyze.costs import Cost
    from peft_arena.analyze.study import TargetResult
    from peft_arena.report.figures import Drawn

RL = "rl-"
"""Begins the name of every figure of the section."""
COSTS = (
    ("generated_tokens", "generated tokens"),
    ("rollout_time", "rollout time"),
    ("scoring_time", "of it scoring"),
    ("update_time", "update time"),
)
"""Measure of the cost records to the title of its column."""
_SHARES = ("ended", "zero_variance")
_OTHERS = ("length", *_SHARES, "entropy", "kl")


def rl_section(target: TargetResult, images: Sequence[tuple[Drawn, Markup]]) -> Markup:
    """Return the section of one target: fine-tuning against it, warnings, the figure, the table, sample rollouts."""
    from peft_arena.report.svg import captioned

    rl = target.rl
    assert rl is not None, "the page asks only where there is reinforcement learning"
    parts: list[object] = []
    if rl.pairs:
        parts.append(pairs_table(rl.pairs))
        told = tag("ul", *(tag("li", pair_sentence(pair)) for pair in rl.pairs))
        parts.append(tag("details", tag("summary", "The same in sentences"), told))
    parts += [_origins(rl.arms), warnings_list(rl)]
    if panels_of(rl):
        link = tag("a", "the interactive page", href=PAGE)
        parts.append(tag("p", "Arm by arm and run by run: ", link, "; every number: tables/rl.csv."))
    parts += [captioned(figure, image) for figure, image in images]
    parts.append(rl_table(rl, target.costs))
    samples = samples_section(rl.arms)
    return join([*parts, *([] if samples is None else [samples])])


def _origins(arms: Sequence[RLArm]) -> Markup:
    """Say which arms did not begin at the pretrained model."""
    found = [arm for arm in arms if arm.origin]
    if not found:
        return Markup("")
    items = (tag("li", f"{arm.label} began at: {arm.origin}.") for arm in found)
    note = "Gain and retention are against the pretrained model in any case, not against that start."
    return join([tag("ul", *items), tag("p", note, class_="note")])


def warnings_list(rl: TargetRL) -> Markup:
    """Return what a researcher would look at, with the numbers; says so where there is nothing."""
    if not rl.trained:
        return Markup("")
    if not rl.warnings:
        return tag("p", "No warning: no measured quantity passed the threshold of a check.", class_="note")
    items = (
        tag(
            "li",
            tag("b", f"{found.arm}: "),
            f"{found.found}. {found.numbers}.",
            tag("small", found.meaning),
        )
        for found in rl.warnings
    )
    return join([tag("h3", "Worth a look"), tag("ul", *items)])


def pairs_table(pairs: Sequence[ObjectivePair]) -> Markup:
    """Return the same method trained in two ways, on the gain and on the mean retention."""
    unit = next((found.unit for pair in pairs if (found := pair.comparison.gain.estimate)), "points")
    head: list[object] = ["arms", f"gain, difference ({unit})", "p (Holm)", "gain"]
    head += ["retention, difference (points)", "p (Holm)", "retention"]
    rows = []
    for pair in pairs:
        both = pair.comparison
        told = " against ".join(
            f"{objective}, lr {rate(lr)}" for objective, lr in zip(pair.objectives, pair.rates, strict=True)
        )
        first = join([both.left, Markup(' <span class="none">against</span> '), both.right])
        first = join([first, tag("small", told)])
        rows.append([first, *pair_cells(both.gain, both), *pair_cells(both.retention, both)])
    note = (
        "The same method with the same configuration, trained in two ways; left minus right, paired by seed and item, "
        "both against the same pretrained model. p-values are those of the table of all pairs, corrected over the "
        "study, and brackets say the same as the words. Steps, tokens and learning rates may differ too: a difference "
        "is one between two trainings as they were run. Arms that began at another run are not in this table."
    )
    return table("The same method trained in two ways", head, rows, "pairs", note, text=(3, 6))


def rl_table(rl: TargetRL, costs: Mapping[str, Mapping[str, Cost]]) -> Markup:
    """Return what every arm's training did from start to end, and what its rollouts cost."""
    shown = [(metric, title) for metric, title in COSTS if any(metric in costs[arm.label] for arm in rl.arms)]
    head: list[object] = ["arm", "reward, start → end", "validation reward, start → end"]
    head += [join([BY_NAME[name].title, tag("small", _unit(name))]) for name in _OTHERS]
    head += [title for _, title in shown]
    rows = [_row(arm, costs[arm.label], [metric for metric, _ in shown]) for arm in rl.arms]
    note = (
        f"Start and end: means over the first and the last {100 * TENTH:.0f} % of the log entries, and over seeds. "
        "Brackets: 95 % intervals of end minus start by Student's t over seeds, paired within runs; with one seed "
        "there is none, and with two it is wide. What was gained on test items is in the first table."
    )
    return table("Reinforcement learning, start → end", head, rows, "main", note)


def _unit(name: str) -> str:
    return "%" if name in _SHARES else BY_NAME[name].unit


def _row(arm: RLArm, costs: Mapping[str, Cost], metrics: Sequence[str]) -> list[Markup]:
    done = f"{len(arm.runs)}" if len(arm.runs) == arm.planned else f"{len(arm.runs)} of {arm.planned}"
    seeds = f"{done} seed{'s' if arm.planned > 1 else ''}"
    spec = arm.runs[0].spec if arm.runs else None
    settings = "" if spec is None else f", groups of {spec.group_size}, KL weight {spec.kl:g}"
    first = join([arm.label, tag("small", f"{arm.objective}{settings}, {seeds}")])
    cells = [change_cell(arm.change(name), 3, interval=True) for name in ("reward", "validation_reward")]
    for name in _OTHERS:
        cells.append(change_cell(arm.change(name), 1 if name in (*_SHARES, "length") else 3, share=name in _SHARES))
    return [first, *cells, *(cost_cell(costs.get(metric)) for metric in metrics)]


def change_cell(found: Change | None, digits: int, *, share: bool = False, interval: bool = False) -> Markup:
    """Return a cell with start and end, shares in per cent, and with the interval of the change if asked."""
    if found is None:
        return cell(tag("span", NONE, class_="none"), title="not measured")
    by = 100 if share else 1
    both = f"{plain(by * found.start, digits)} → {plain(by * found.end, digits)}"
    change = signed(by * found.value, digits)
    if found.low is None or found.high is None:
        around, seeds = "1 seed: no interval", ""
    else:
        around = f"[{signed(by * found.low, digits)}, {signed(by * found.high, digits)}]"
        seeds = f", {found.seeds} seeds"
    title = f"change {change}{' ' if seeds else ', '}{around}{seeds}"
    return cell(join([both, *([tag("small", f"{change} {around}")] if interval else [])]), title=title)
