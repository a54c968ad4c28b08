"""The report's page: what an engineer needs to decide first, and everything it rests on below."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from peft_arena.analyze.compare import TradeOff
from peft_arena.analyze.study import StudyResult, TargetResult
from peft_arena.report.figures import MANY, Drawn
from peft_arena.report.geometry import GEOMETRY, geometry_section
from peft_arena.report.headline import caveats, headline, trade_sentence, uncompared
from peft_arena.report.markup import Markup, escape, join, table, tag
from peft_arena.report.over_targets import over_targets_section
from peft_arena.report.page_tables import (
    along_table,
    budget_table,
    cost_table,
    gaps_table,
    heat_table,
    main_table,
    pairs_table,
    tasks_table,
)
from peft_arena.report.passk import PASSK, passk_section
from peft_arena.report.paths import PATHS, paths_section
from peft_arena.report.pscp import PSCP, pscp_section
from peft_arena.report.published import published_section
from peft_arena.report.rl import RL, rl_section
from peft_arena.report.svg import captioned
from peft_arena.report.words import some
from peft_arena.store.records import DECODING, READING

_MOST_TRADES = 8
NOTES = (
    (
        "Gain",
        "Score of the tuned model on its target's test items minus the base model's, turned so that positive is "
        "better. One point is 0.01 of a fraction.",
    ),
    (
        "Mean retention",
        "The same difference on each retention task, averaged with equal weight over all tasks whose unit is a "
        "fraction. It exists only for seeds that have every one of these tasks; cross-entropies stay apart in "
        "their own unit.",
    ),
    (
        "Share kept",
        "(tuned − chance) / (base − chance), shown on hover in the retention table. Defined only where the base "
        "is above chance by more than two standard errors.",
    ),
    (
        "Intervals",
        "Set of the values that the test behind the p-value does not reject, so that interval and p-value never "
        "disagree. They cover items (groups of items that share a passage or a template count once) and, with two or "
        "more seeds, trainings: the spread between trainings is pooled over the arms. Fractions get pseudo-items "
        "(Agresti and Min 2005), so that no interval has width 0. What simulated studies with known truth say of them, "
        "seeds by items, is in docs/coverage.md.",
    ),
    (
        "One seed",
        "Nothing is known of the spread between trainings, unless other arms have more seeds or the study declares it: "
        "every sentence is then of this run, and not of its method.",
    ),
    (
        "Pairs",
        "Items are matched by id, arms by seed. An answer that either side lacks or that could not be scored is "
        "left out of both and counted. Where more than 1 % could not be scored, the interval runs from all of them "
        "wrong to all of them right; where it is not known what they could have been worth there is none.",
    ),
    (
        "At the limit",
        "Share of the answers that went on until the limit of new tokens, of the base model and of the tuned one. Such "
        "an answer was cut, and its score is partly that of the limit. Earlier versions did not record it.",
    ),
    (
        "Better, worse",
        "The p-value, Holm-corrected over all comparisons of the study, is below 0.05.",
    ),
    (
        "No worse, equivalent, undecided",
        "No worse: not lower by the margin, by a one-sided test, corrected; “retained” is no worse than the pretrained "
        "model. Equivalent: neither lower nor higher by the margin. Undecided: none of these; beside it stands the "
        "difference that would have been found in four of five repetitions. The margin is the study's.",
    ),
    (
        "Pareto front",
        "An arm is dominated if another is better on gain or retention and no worse on the other. The percentage is "
        "the share of joint draws of seeds and items in which the arm is on the front.",
    ),
    (
        "Costs",
        "Means over seeds as recorded, with their range on hover and no error; how each was measured or counted stands "
        "in the cost table.",
    ),
)
"""How every number was obtained."""


def render_page(result: StudyResult, figures: Mapping[str, Sequence[tuple[Drawn, Markup]]]) -> str:
    """Return the page as one HTML document that refers to nothing outside itself.

    Args:
        result: the analysed study.
        figures: by target label, each drawn figure with its ``svg`` element.
    """
    view = result.view
    title = view.title or view.name
    css = resources.files("peft_arena.report").joinpath("page.css").read_text(encoding="utf-8")
    sections: list[tuple[str, str, Markup]] = []
    if result.over is not None:
        sections.append(("over", "Over all targets", over_targets_section(result.over)))
    for target in result.targets:
        suffix = f" on {target.label}" if len(result.targets) > 1 else ""
        sections += _target_sections(result, target, figures.get(target.label, ()), suffix)
    if view.published:
        sections.append(("published", "Published numbers", published_section(result)))
    sections += [
        ("gaps", "Missing, failed, refused, unscored", gaps_table(result.evidence.gaps)),
        ("tasks", "Tasks", tasks_table(result)),
        ("provenance", "Provenance", _provenance(result)),
        ("notes", "How to read this", _notes()),
    ]
    body = tag(
        "main",
        tag("header", tag("h1", title), _meta(result), tag("p", view.description) if view.description else ""),
        _findings(result),
        tag("nav", *(tag("a", name, href=f"#{key}") for key, name, _ in sections), aria_label="sections"),
        *(tag("section", tag("h2", name, id=key), content) for key, name, content in sections),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title}: peft-arena"),
        tag("style", Markup(css)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _findings(result: StudyResult) -> Markup:
    notes = caveats(result)
    return tag(
        "div",
        *(tag("p", sentence) for sentence in headline(result)),
        *(tag("p", sentence, class_="caveat") for sentence in notes),
        class_="findings",
        role="note",
        aria_label="findings",
    )


def _meta(result: StudyResult) -> Markup:
    runs = [run for arm in result.evidence.arms for run in arm.runs]
    done = sum(run.training is not None for run in runs)
    seeds = sorted({run.spec.seed for run in runs})
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    model = result.view.base.model
    parts = [
        f"study {result.view.name}",
        f"model {model.words}",
        f"{len({arm.label for arm in result.view.arms})} arms, {done} of {len(runs)} runs trained",
        f"seeds {', '.join(map(str, seeds)) or 'none'}",
        f"report of {today}",
    ]
    return tag("p", " · ".join(parts), class_="meta")


def _target_sections(
    result: StudyResult, target: TargetResult, drawn: Sequence[tuple[Drawn, Markup]], suffix: str
) -> list[tuple[str, str, Markup]]:
    number = result.targets.index(target) + 1
    shown = {figure.name.split("-", 1)[0]: captioned(figure, image) for figure, image in drawn}
    empty = Markup("")
    arms = join([shown.get("tradeoff", empty), main_table(target), _trades(target)])
    sections = [(f"arms-{number}", f"Gain and retention{suffix}", arms)]
    if any(arm.retention for arm in target.arms):
        sections.append((f"tasks-{number}", f"Retention per task{suffix}", heat_table(result.evidence, target)))
    if target.rl is not None:
        images = [(figure, image) for figure, image in drawn if figure.name.startswith(RL)]
        sections.append((f"rl-{number}", f"Reinforcement learning{suffix}", rl_section(target, images)))
    if target.passk is not None:
        images = [(figure, image) for figure, image in drawn if figure.name.startswith(PASSK)]
        sections.append((f"passk-{number}", f"Sampled answers: pass@k{suffix}", passk_section(target.passk, images)))
    if target.along:
        content = along_table(target)
        if "along" in shown:
            content = join([shown["along"], tag("details", tag("summary", "Every save point in numbers"), content)])
        sections.append((f"along-{number}", f"Along the training{suffix}", content))
    if target.paths is not None:
        images = [(figure, image) for figure, image in drawn if figure.name.startswith(PATHS)]
        sections.append((f"paths-{number}", f"Rewinding{suffix}", paths_section(target.paths, images)))
    costs = cost_table(target)
    if "costs" in shown or costs is not None:
        whole = tag("details", tag("summary", "All costs and how they were obtained"), costs) if costs else empty
        sized = budget_table(target)
        budget = (
            tag("details", tag("summary", "Parameter budget and the sizes chosen for it"), sized) if sized else empty
        )
        sections.append((f"costs-{number}", f"Cost{suffix}", join([shown.get("costs", empty), budget, whole])))
    if target.pscp is not None:
        images = [(figure, image) for figure, image in drawn if figure.name.startswith(PSCP)]
        sections.append((f"pscp-{number}", f"PSCP{suffix}", pscp_section(target.pscp, images)))
    if "curves" in shown:
        few = len(target.arms) <= MANY
        curves = shown["curves"] if few else tag("details", tag("summary", "Every arm's curve"), shown["curves"])
        sections.append((f"curves-{number}", f"Learning curves{suffix}", curves))
    if target.geometry is not None:
        images = [(figure, image) for figure, image in drawn if figure.name.startswith(GEOMETRY)]
        sections.append((f"geometry-{number}", f"Why: geometry{suffix}", geometry_section(target, images)))
    if target.comparisons:
        sections.append((f"pairs-{number}", f"Arm against arm{suffix}", _pairs(target)))
    return sections


def _trades(target: TargetResult) -> Markup:
    """List, for every arm that forgets more than it needs to, the arm that keeps most and gains no less."""
    if not target.trade_offs:
        return tag("p", "No arm is better in mean retention than another and no worse in gain.", class_="note")
    by_loser: dict[str, list[TradeOff]] = {}
    for pair in target.trade_offs:
        by_loser.setdefault(pair.forgets, []).append(pair)
    gains = {arm.label: arm.gain.delta.value for arm in target.arms if arm.gain and arm.gain.delta}
    order = sorted(by_loser, key=lambda label: -gains.get(label, 0.0))
    items = []
    for label in order[:_MOST_TRADES]:
        first, *others = by_loser[label]
        also = some([pair.keeps for pair in others])
        more = f" {also} {'is' if len(others) == 1 else 'are'} so too." if others else ""
        items.append(tag("li", f"{trade_sentence(first.keeps, first.forgets, first.retention, first.gain)}{more}"))
    rest = len(order) - len(items)
    note = (
        tag("p", f"The same can be said against {rest} more arms; see comparisons.csv.", class_="note") if rest else ""
    )
    return join([tag("h3", "Better trades"), tag("ul", *items), note])


def _pairs(target: TargetResult) -> Markup:
    lonely = uncompared(target)
    note = (
        tag("p", f"No common seed or no common answer, so not compared: {'; '.join(lonely)}.", class_="note")
        if lonely
        else ""
    )
    content = join([pairs_table(target), note])
    if len(target.comparisons) <= 15:
        return content
    return tag("details", tag("summary", f"All {len(target.comparisons)} pairs"), content)


def _provenance(result: StudyResult) -> Markup:
    """List what the records say about where they come from; several values mean that records differ."""
    records = [record for run in result.evidence.runs for record in run.provenance]
    fields: list[tuple[str, str]] = [
        ("commit", "git_commit"),
        ("uncommitted changes", "git_dirty"),
        ("peft-arena", "peft_arena"),
        ("python", "python"),
        ("platform", "platform"),
        ("processor", "processor"),
        ("cores", "cores"),
        ("threads", "threads"),
    ]
    rows = [(name, _values(records, key)) for name, key in fields]
    packages: dict[str, set[str]] = {}
    for record in records:
        for name, version in (record.get("packages") or {}).items():
            packages.setdefault(name, set()).add(str(version))
    listing = [f"{name} {' / '.join(sorted(found))}" for name, found in sorted(packages.items())]
    rows.append(("packages", ", ".join(listing)))
    engines = [record.engine for run in result.evidence.runs for record in run.every_evaluation]
    rows += [
        ("evaluation batch size", _values(engines, "batch_size")),
        ("evaluation dtype", _values(engines, "dtype")),
        ("evaluation device", _values(engines, "device")),
        *(
            (f"slow {key}", _values(slow, key))
            for key in (DECODING, READING)
            if (slow := [one for one in engines if key in one])
        ),
    ]
    created = sorted(run.created for run in result.evidence.runs if run.created)
    rows.append(("runs created", f"{created[0]} to {created[-1]}" if created else "none"))
    rows.append(("statistics", _statistics(result)))
    pairs = [tag(kind, text) for name, value in rows for kind, text in (("dt", name), ("dd", value or "not recorded"))]
    runs = [
        [
            escape(run.who),
            tag("td", run.spec.run_id, class_="txt"),
            tag("td", run.created or "not started", class_="txt"),
        ]
        for run in result.evidence.runs
    ]
    whole = tag(
        "details",
        tag("summary", f"{len(runs)} runs"),
        table("Runs", ["run", "id", "created (UTC)"], runs, "runs", text=(1, 2)),
    )
    return join([tag("dl", *pairs), whole])


def _statistics(result: StudyResult) -> str:
    """Say what words were given by."""
    margin = result.view.margin
    on_target = "2 points, for fractions" if margin.target is None else f"{margin.target:g}"
    primary = "; ".join(f"{left} against {right}" for left, right in result.view.primary)
    parts = [
        f"{result.family.size} comparisons corrected together",
        f"margin {on_target} on the target, {margin.retention:g} points on mean retention",
        *([f"compared first: {primary}"] if primary else []),
        f"{result.draws} joint draws, seed {result.seed}",
    ]
    return "; ".join(parts)


def _notes() -> Markup:
    return tag("dl", *(part for name, text in NOTES for part in (tag("dt", name), tag("dd", text))))


def _values(records: Sequence[Mapping[str, Any]], key: str) -> str:
    words = {True: "yes", False: "no", None: "unknown"}
    found = dict.fromkeys(
        words[value] if value is None or isinstance(value, bool) else str(value)
        for record in records
        for value in [record.get(key)]
    )
    text = ", ".join(found)
    return f"{text} (the records differ)" if len(found) > 1 else text
