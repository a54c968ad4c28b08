"""The report's tables as markup: arms, retention per task, comparisons, costs, gaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_arena.analyze.compare import Comparison
from peft_arena.analyze.costs import MAIN_COSTS, TRAINABLE, Cost
from peft_arena.analyze.effects import ArmEffects, TaskEffect, unit_of
from peft_arena.analyze.estimate import Estimate
from peft_arena.analyze.evidence import ROUNDING, Evidence, Gap, TaskInfo
from peft_arena.analyze.family import Judgement
from peft_arena.analyze.study import StudyResult, TargetResult
from peft_arena.report.limits import limit_small, limit_title
from peft_arena.report.markup import Markup, cell, escape, join, table, tag
from peft_arena.report.numbers import (
    NONE,
    digits_of,
    estimate_text,
    interval,
    listed,
    p_text,
    plain,
    quantity,
    rate,
    score,
    signed,
)
from peft_arena.report.words import cell_kind, ends_text, pair_interval, pair_text, word_text

_BLUE, _ORANGE = (33, 113, 181), (217, 95, 14)
_FULL_COLOUR_POINTS = 30.0
_MOST_PAIRS = 400
_LOST_ITEMS = ("unscored", "dropped")


def main_table(target: TargetResult) -> Markup:
    """Return the table of arms: what each gained, kept and cost."""
    shown = [
        column
        for column in MAIN_COSTS
        if any((cost := costs.get(column.metric)) and cost.value is not None for costs in target.costs.values())
    ]
    hidden = [column.title for column in MAIN_COSTS if column.always and column not in shown]
    unit = unit_of(target.task) if target.task else "points"
    scale = "%" if target.task is None or target.task.unit == "fraction" else target.task.unit
    metric = target.task.metric if target.task else "score"
    head: list[object] = ["arm", f"{metric}, base → tuned ({scale})", f"gain ({unit})", "gain rank"]
    head += ["mean retention (points)", "ret. rank", "worst task (points)", "Pareto front"]
    head += [column.title for column in shown]
    several = len({arm.evidence.arm.objective for arm in target.arms}) > 1
    rows = [_main_row(target, arm, [column.metric for column in shown], several) for arm in _ordered(target)]
    note = (
        "Words are against the pretrained model, and square brackets are the intervals that say the same: at 95 % "
        "after the correction for all comparisons of the study; 95 % intervals of each number alone are in "
        "effects.csv. “No worse” in mean retention is what is called retained. Ranks are the places an arm may hold: "
        "arms with overlapping ranks are not told apart. Pareto front: share of joint draws in which no other arm is "
        "at least as good on both. The order of the rows is that of the estimates."
    )
    if hidden:
        note += f" Not measured in any run: {', '.join(hidden)}."
    return table(f"Arms on {target.label}, highest gain first", head, rows, "main", note)


def _ordered(target: TargetResult) -> list[ArmEffects]:
    """Return the arms by gain, those without one last."""
    return sorted(target.arms, key=lambda arm: -arm.gain.delta.value if arm.gain and arm.gain.delta else float("inf"))


def _main_row(target: TargetResult, arm: ArmEffects, metrics: Sequence[str], several: bool) -> list[Markup]:
    source = arm.evidence.arm
    trained, planned = len(arm.evidence.trained_seeds), len(arm.evidence.runs)
    count = f"{planned}" if trained == planned else f"{trained} of {planned}"
    seeds = f"{count} seed{'s' if planned > 1 else ''}".replace(" ", "\N{NO-BREAK SPACE}")
    way = f", {source.objective}" if several else ""
    first = join([arm.label, tag("small", f"{source.method}{way}, lr {rate(source.learning_rate)}, {seeds}")])
    gain = arm.gain
    scores = NONE
    if gain is not None and (gain.base is not None or gain.tuned is not None):
        scores = f"{score(gain.base, gain.task.unit)} → {score(gain.tuned, gain.task.unit)}"
    worst = arm.worst
    costs = target.costs[arm.label]
    return [
        first,
        cell(
            join([scores, tag("small", at_limit)]) if (at_limit := limit_small(target, arm.label)) else scores,
            title=None if target.task is None else limit_title(target, arm.label, target.task) or None,
        ),
        judged_cell(target.against_base[arm.label].gain, "not evaluated", planned),
        cell(target.ranks["gain"].get(arm.label, NONE)),
        judged_cell(target.against_base[arm.label].retention, arm.mean_missing, planned),
        cell(target.ranks["retention"].get(arm.label, NONE)),
        _worst_cell(worst),
        _pareto_cell(target, arm.label),
        *(cost_cell(costs.get(metric)) for metric in metrics),
    ]


def estimate_cell(found: Estimate | None, missing: str, planned: int | None = None) -> Markup:
    """Return a cell with a number and its 95 % interval; ``missing``: why there is none."""
    if found is None:
        return cell(tag("span", NONE, class_="none", title=missing or None), title=missing or None)
    value = signed(found.value, digits_of(found.unit))
    ends = interval(found) if found.known else f"[no interval: {found.missing}]"
    return cell(join([value, tag("small", ends), _seeds_small(found, planned)]), title=_about(found))


def judged_cell(judged: Judgement, missing: str, planned: int | None = None) -> Markup:
    """Return a cell with a difference, the interval that says the same as its word, and the word.

    Args:
        judged: the comparison.
        missing: why there is none, where there is none.
        planned: seeds that were planned; fewer are shown.
    """
    found = judged.estimate
    if found is None or not found.known:
        return estimate_cell(found, missing, planned)
    return cell(
        join(
            [
                signed(found.value, digits_of(found.unit)),
                tag("small", ends_text(judged.interval, found.unit)),
                tag("small", word_text(judged)),
                _seeds_small(found, planned),
            ]
        ),
        title=_about(found),
    )


def _seeds_small(found: Estimate, planned: int | None) -> Markup:
    few = "1 seed: this run" if found.about_runs else f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
    shown = found.about_runs or (planned is not None and found.seeds < planned)
    return tag("small", few) if shown else Markup("")


def _about(found: Estimate) -> str:
    """Say what an interval rests on."""
    units = f" in {found.units} groups" if found.units < found.items else ""
    out = f"; {found.left_out} answers left out" if found.left_out else ""
    bounded = ", the interval holds for whatever they were worth" if found.bounded else ""
    return f"interval covers {found.covers}; {found.items} items{units}{out}{bounded}"


def _worst_cell(worst: TaskEffect | None) -> Markup:
    if worst is None or worst.delta is None:
        return cell(NONE)
    return cell(
        join([signed(worst.delta.value, digits_of(worst.delta.unit)), tag("small", worst.task.label)]),
        title=f"{worst.task.label}: {estimate_text(worst.delta)}",
    )


def _pareto_cell(target: TargetResult, label: str) -> Markup:
    standing = target.pareto.get(label)
    if standing is None:
        return cell(NONE)
    share = NONE if standing.probability is None else f"{100 * standing.probability:.0f} %"
    if standing.dominated_by:
        others = listed(list(standing.dominated_by))
        by = others if len(standing.dominated_by) == 1 else f"{len(standing.dominated_by)} arms"
        return cell(join([share, tag("small", f"dominated by {by}", class_="narrow")]), title=f"dominated by {others}")
    return cell(join([share, tag("small", "on the front" if standing.on_front else "not dominated")]))


def cost_cell(cost: Cost | None) -> Markup:
    """Return a cell with a cost, its range over runs on hover."""
    if cost is None or cost.value is None:
        return cell(tag("span", NONE, class_="none"), title=cost.how if cost else "not measured")
    span = f"{quantity(cost.low, cost.unit)} to {quantity(cost.high, cost.unit)}"
    many = "" if cost.runs == 1 else f"; {cost.runs} runs, {span}"
    text = _sized(cost)
    return cell(text, title=f"{cost.how}{many}")


def _sized(cost: Cost) -> str:
    if cost.metric == TRAINABLE and cost.value is not None:
        return f"{cost.value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return quantity(cost.value, cost.unit)


def heat_table(evidence: Evidence, target: TargetResult) -> Markup:
    """Return retention per task: a cell per arm and task, coloured by the change; tasks of other units at the end."""
    tasks = [evidence.tasks[spec.id] for spec in evidence.view.retention if spec.id in evidence.tasks]
    tasks = [task for task in tasks if task.is_fraction] + [task for task in tasks if not task.is_fraction]
    head: list[object] = ["arm", "mean (points)"]
    head += [join([task.label, tag("small", f"{task.metric}, {unit_of(task)}")]) for task in tasks]
    base: list[Markup] = [Markup(join(["base model", tag("small", "score (fractions in %)")])), cell("")]
    for task in tasks:
        found = evidence.base_scores.get(task.key)
        value = None if found is None else float(found.means()[0])
        base.append(cell(score(value if value == value else None, task.unit)))
    rows = [base] + [_heat_row(target, arm, tasks) for arm in _ordered(target)]
    apart = [task.label for task in tasks if not task.is_fraction]
    note = (
        "Change from the base model, turned so that positive is better, with 95 % intervals of each number alone. Blue "
        "is up, orange down, full colour at 30 points. Bold: better or worse, the mean corrected over the study as "
        "everywhere, single tasks over all cells of this table."
    )
    if apart:
        note += f" In another unit and not in the mean: {', '.join(apart)} (coloured where bold)."
    return table("Change on every retention task", head, rows, "heat", note)


def _heat_row(target: TargetResult, arm: ArmEffects, tasks: Sequence[TaskInfo]) -> list[Markup]:
    effects = {effect.task.key: effect for effect in arm.retention}
    cells = [_heat_cell(arm.mean, None, arm.mean_missing, _is_shown(target.against_base[arm.label].retention))]
    for task in tasks:
        effect, judged = effects.get(task.key), target.per_task.get((arm.label, task.key))
        shown = judged is not None and _is_shown(judged)
        at_limit = limit_title(target, arm.label, task)
        cells.append(_heat_cell(effect.delta if effect else None, effect, "not evaluated", shown, at_limit))
    return [Markup(join([arm.label])), *cells]


def _is_shown(judged: Judgement) -> bool:
    return judged.has("better") or judged.has("worse")


def _heat_cell(
    found: Estimate | None, effect: TaskEffect | None, missing: str, sure: bool, at_limit: str = ""
) -> Markup:
    if found is None:
        return cell(NONE, kind="heat none", title=missing)
    in_points = found.unit == "points"
    strength = min(abs(found.value) / _FULL_COLOUR_POINTS, 1.0) if in_points else 0.25 * sure
    colour = _BLUE if found.value > 0 else _ORANGE
    told = (
        []
        if effect is None
        else [f"{effect.task.label}: {score(effect.base, effect.task.unit)} → {score(effect.tuned, effect.task.unit)}"]
    )
    if effect is not None and effect.kept is not None:
        told.append(f"share of the base score above chance kept: {estimate_text(effect.kept, unit=False)}")
    told += [at_limit] if at_limit else []
    told.append(_about(found))
    return cell(
        join([signed(found.value, digits_of(found.unit)), tag("small", interval(found))]),
        kind="heat sure" if sure else "heat",
        title="; ".join(told),
        style=f"background:rgba({colour[0]},{colour[1]},{colour[2]},{0.75 * strength:.2f})",
    )


def pairs_table(target: TargetResult) -> Markup:
    """Return every pair of arms, on the gain and on the mean retention."""
    gain_unit = unit_of(target.task) if target.task else "points"
    head: list[object] = ["arms", f"gain, difference ({gain_unit})", "p (Holm)", "gain"]
    head += ["retention, difference (points)", "p (Holm)", "retention"]
    order = sorted(target.comparisons, key=_surprise)
    rows = [
        [pair_name(pair), *pair_cells(pair.gain, pair), *pair_cells(pair.retention, pair)]
        for pair in order[:_MOST_PAIRS]
    ]
    note = (
        "Pairs are matched by seed and item. p-values are Holm-corrected over all comparisons of the study, and each "
        "bracket is the interval that says the same as the word beside it. Undecided says nothing of how large a "
        "difference may be: beside it stands the one that would have been found in four of five repetitions."
    )
    if len(order) > _MOST_PAIRS:
        note += f" The {_MOST_PAIRS} pairs with the smallest p-values of {len(order)}; all are in comparisons.csv."
    return table("Left minus right, the clearest difference first", head, rows, "pairs", note, text=(3, 6))


def _surprise(pair: Comparison) -> float:
    return min(one.p_corrected if one.p_corrected is not None else 2.0 for one in (pair.gain, pair.retention))


def pair_name(pair: Comparison) -> Markup:
    """Return both arms of a pair."""
    return join([pair.left, Markup(' <span class="none">against</span> '), pair.right])


def pair_cells(judged: Judgement, pair: Comparison) -> list[Markup]:
    """Return the difference of a pair on one axis, its p-value and its words."""
    if judged.estimate is None:
        return [cell(NONE), cell(NONE), cell(judged.word, "txt none")]
    if not judged.estimate.known:
        return [estimate_cell(judged.estimate, ""), cell(NONE), cell(judged.word, "txt none")]
    found = judged.estimate
    ends = ends_text(pair_interval(judged), found.unit)
    value = join([signed(found.value, digits_of(found.unit)), tag("small", ends)])
    return [
        cell(value, title=_about(found)),
        cell(p_text(judged.p_corrected)),
        cell(pair_text(judged, pair.left, pair.right), cell_kind(judged)),
    ]


def along_table(target: TargetResult) -> Markup:
    """Return what every arm had gained and kept at each of its evaluated save points."""
    rows = []
    for label, points in target.along.items():
        for point in points:
            gain, kept = point.effects.gain, point.effects.mean
            rows.append(
                [
                    join([label]),
                    cell(plain(point.step, 0)),
                    estimate_cell(gain.delta if gain else None, "not evaluated"),
                    estimate_cell(kept, point.effects.mean_missing),
                ]
            )
    head = ["arm", "step", f"gain ({unit_of(target.task) if target.task else 'points'})", "mean retention (points)"]
    note = "Square brackets: 95 % intervals of each number alone. Every task at every save point is in along.csv."
    return table("Save points, mean over seeds", head, rows, "along", note)


def cost_table(target: TargetResult) -> Markup | None:
    """Return every measure of the cost records, with how it was obtained; None where there is no cost record."""
    names = list(dict.fromkeys(name for costs in target.costs.values() for name in costs))
    if not names:
        return None
    head: list[object] = ["measure", *(arm.label for arm in target.arms), "how"]
    rows = []
    for name in names:
        found = [target.costs[arm.label].get(name) for arm in target.arms]
        known = sorted((cost for cost in found if cost is not None), key=lambda cost: cost.value is None)
        how = known[0].how if known else ""
        rows.append([join([name.replace("_", " ")]), *(cost_cell(cost) for cost in found), cell(how, "txt")])
    return table(
        "All costs, mean over seeds",
        head,
        rows,
        "costs",
        "Hover over a number for its range over runs.",
        text=(len(head) - 1,),
    )


def budget_table(target: TargetResult) -> Markup | None:
    """Return which size each arm's parameter budget led to; None if no arm has one."""
    found = [(arm.evidence.arm.label, arm.evidence.arm.budget) for arm in target.arms]
    if not any(text for _, text in found):
        return None
    rows = [[escape(label), tag("td", text or "no budget", class_="txt")] for label, text in found]
    return table("Parameter budget", ["arm", "size chosen: parameters for what was asked"], rows, "budget", text=(1,))


def gaps_table(gaps: Sequence[Gap]) -> Markup:
    """Return what is missing, failed, refused, dropped or unscored, with reasons; lost items are folded away."""
    if not gaps:
        return tag("p", "Nothing: every planned run is trained and evaluated, and every item was scored.")
    items = [gap for gap in gaps if gap.kind in _LOST_ITEMS]
    notices = [gap for gap in gaps if gap.kind == "notice"]
    fewer = [gap for gap in gaps if gap.kind == "fewer"]
    runs = [gap for gap in gaps if gap.kind not in (*_LOST_ITEMS, "fewer", "notice")]
    parts: list[Markup] = []
    if runs:
        parts.append(_gap_rows(runs, "None of these is replaced by a number."))
    else:
        parts.append(tag("p", "Every planned run is trained and evaluated."))
    if notices:
        count = len({gap.who for gap in notices})
        runs_were = "run was" if count == 1 else "runs were"
        title = f"{count} {runs_were} evaluated at another batch size than the base model: {ROUNDING}"
        parts.append(tag("details", tag("summary", title), _gap_rows(notices, "The numbers are used as they are.")))
    if fewer:
        count = len({gap.who for gap in fewer})
        title = f"{count} training{' was' if count == 1 else 's were'} shown fewer items than a default takes"
        parts.append(tag("details", tag("summary", title), _gap_rows(fewer, "There were no more.")))
    if items:
        unscored = sum(gap.kind == "unscored" for gap in items)
        title = f"{unscored} evaluations have unscored items, {len(items) - unscored} trainings dropped examples"
        parts.append(tag("details", tag("summary", title), _gap_rows(items, "Left out on both sides, never zero.")))
    return join(parts)


def _gap_rows(gaps: Sequence[Gap], note: str) -> Markup:
    """Return one row per run, state and reason, the failed ones first."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for gap in gaps:
        grouped.setdefault((gap.kind, gap.who, gap.reason), []).append(gap.what)
    order = {kind: place for place, kind in enumerate(("failed", "damaged", "refused", "missing", "running"))}
    rows = [
        [
            join([who]),
            cell(kind, "txt worse" if order.get(kind, 9) < 3 else "txt"),
            cell(", ".join(whats), "txt"),
            cell(why, "txt"),
        ]
        for (kind, who, why), whats in sorted(grouped.items(), key=lambda entry: order.get(entry[0][0], 9))
    ]
    caption = ", ".join(f"{count} {kind}" for kind, count in Counter(gap.kind for gap in gaps).most_common())
    return table(caption, ["who", "state", "what", "reason"], rows, "gaps", note, text=(1, 2, 3))


def tasks_table(result: StudyResult) -> Markup:
    """Return the tasks with items, metric, chance level and the source of their data."""
    evidence = result.evidence
    rows = []
    wanted = {spec.id: spec for spec in (*evidence.view.targets, *evidence.view.retention)}
    for spec in wanted.values():
        task = evidence.tasks.get(spec.id)
        role = "target" if spec in evidence.view.targets else "retention"
        if task is None:
            rows.append(
                [join([evidence.labels[spec.id]]), cell(role, "txt"), *[cell(NONE)] * 2, cell("no record yet", "txt")]
            )
            continue
        chance = NONE if task.chance is None else score(task.chance, task.unit)
        source = ", ".join(str(task.card[key]) for key in ("source", "revision", "licence") if task.card.get(key))
        what = f"{task.title}: {task.metric}, {task.unit}, {task.better} is better. {source}"
        rows.append(
            [
                join([task.label]),
                cell(role, "txt"),
                cell(task.items if task.units == task.items else f"{task.items} in {task.units} groups"),
                cell(chance),
                cell(what, "txt"),
            ]
        )
    head = ["task", "role", "items", "chance", "metric and data"]
    return table("What was asked", head, rows, "tasks", text=(1, 4))
