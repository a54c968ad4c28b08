"""The few sentences an engineer reads first; each word in them is one of the five, with the numbers it rests on."""

from __future__ import annotations

from collections.abc import Mapping

from peft_arena.analyze.compare import AXES, Standing, both_ways, standing
from peft_arena.analyze.costs import PEAK_MEMORY, TRAINABLE
from peft_arena.analyze.effects import ArmEffects
from peft_arena.analyze.estimate import Estimate
from peft_arena.analyze.family import Judgement
from peft_arena.analyze.paired import MANY_UNSCORED
from peft_arena.analyze.study import StudyResult, TargetResult
from peft_arena.report.limits import limit_caveats
from peft_arena.report.numbers import digits_of, quantity, signed
from peft_arena.report.passk import passk_sentences
from peft_arena.report.paths_text import overshoot_sentence
from peft_arena.report.rl_text import rl_caveat, rl_sentence
from peft_arena.report.words import (
    about_runs,
    detectable_text,
    judged_text,
    named,
    resolution,
    sentence,
    some,
    stated_text,
    subject,
)

_AXIS_NAMES = {"gain": "the gain", "retention": "mean retention"}


def headline(result: StudyResult) -> list[str]:
    """Return the study's main findings as sentences, per target."""
    sentences = []
    for target in result.targets:
        prefix = f"{target.label}: " if len(result.targets) > 1 else ""
        said = f" on {target.label}"
        sentences += [text if said in text else f"{prefix}{text}" for text in target_headline(target)]
    return sentences


def target_headline(target: TargetResult) -> list[str]:
    """Return the main findings about the arms of one target."""
    gains = {arm.label: arm.gain.delta for arm in target.arms if arm.gain and arm.gain.delta}
    if not gains:
        return [f"No arm can be compared yet: none of {len(target.arms)} has a gain over a base score."]
    if not all(pair.on(axis).is_tested for pair in target.comparisons for axis in AXES):
        return _primary(target)
    best = standing({label: found.value for label, found in gains.items()}, target.comparisons, "gain")
    found = [_gain(target, gains, best), _retention(target), _keeping(target), _better_trade(target, best)]
    found.append("" if target.rl is None else rl_sentence(target.rl))
    found.append("" if target.passk is None else passk_sentences(target.passk))
    found += ["" if target.paths is None else overshoot_sentence(target.paths, target.label), _cheapest(target, best)]
    return [sentence(text) for text in found if text]


def _primary(target: TargetResult) -> list[str]:
    """Say what became of primary comparisons of which one is undecided, so that nothing else was tested."""
    tested = [pair for pair in target.comparisons if pair.gain.is_tested and pair.retention.is_tested]
    told = [
        f"{subject([pair.left], about_runs([pair.gain, pair.retention]))} against {named([pair.right])}: "
        f"{stated_text(pair.gain, f'in gain on {target.label}')}, {stated_text(pair.retention, 'in mean retention')}."
        for pair in tested
    ]
    end = (
        "A primary comparison is undecided, so nothing that goes after it was tested: of the rest nothing can be said."
    )
    return [*map(sentence, told), end]


def _gain(target: TargetResult, gains: Mapping[str, Estimate], best: Standing) -> str:
    """Say which arms gain most, or that none can be told from another."""
    if len(gains) == 1:
        (label,) = gains
        judged = target.against_base[label].gain
        return f"{subject([label], about_runs([judged]))} is {_against_base(judged, f'on {target.label}')}."
    pairs = _among(target, best.best, "gain")
    runs = about_runs(pairs)
    if len(best.best) == len(gains) and best.alike:
        over = _over_base(target, list(gains))
        who, end = subject(list(gains), runs), f"in gain on {target.label} ({_span(gains)}{over}{resolution(pairs)})."
        if all(one.has("equivalent") for one in pairs):
            return f"{who} are equivalent to each other {end}"
        if all(one.word == one.turned().word == "undecided" for one in pairs):
            return f"{who} are undecided against each other {end}"
        return f"none of {who} is better than another {end}"
    if best.unclear and not best.worse and len(best.best) == len(best.highest):
        return f"which arm is best in gain on {target.label} cannot be said: {_why_unclear(target)}."
    top = target.against_base[best.highest[0]].gain
    who = _one_of(best.best, runs or about_runs([top]))
    text = f"best in gain on {target.label}: {who} ({_span(gains, best.best)}"
    text += _over_base(target, best.best)
    text += "" if len(best.best) == 1 else resolution(pairs)
    text += f"; {len(best.highest)} have exactly the highest score)" if len(best.highest) > 1 else ")"
    if best.worse:
        text += f"; worse than the highest: {named(best.worse)}"
    if best.unclear:
        text += f"; not comparable with the highest: {named(best.unclear)}"
    return f"{text}."


def _why_unclear(target: TargetResult) -> str:
    """Say why no two arms can be compared in gain."""
    known = [pair.gain.estimate for pair in target.comparisons if pair.gain.estimate is not None]
    return _no_interval(known[0]) if known else "no two arms have a seed and an answer in common"


def _no_interval(found: Estimate) -> str:
    return found.missing or "no interval"


def _over_base(target: TargetResult, labels: list[str]) -> str:
    """Say which of some arms are better than the pretrained model in gain."""
    better = [label for label in labels if target.against_base[label].gain.has("better")]
    if len(better) == len(labels):
        return f"; {'' if len(labels) == 1 else 'each '}better than the pretrained model"
    if not better:
        return "; none shown better than the pretrained model"
    return f"; not shown better than the pretrained model: {named([one for one in labels if one not in better])}"


def _one_of(labels: list[str], runs: bool) -> str:
    """Return who may be the best: several are named together, for none of them is known to be it."""
    return f"{'one of ' if len(labels) > 1 else ''}{subject(labels, runs)}"


def _against_base(judged: Judgement, where: str) -> str:
    """Return the word of an arm against the pretrained model, with its numbers.

    Args:
        judged: the comparison.
        where: on what.
    """
    than = {"better": "than", "worse": "than", "no worse": "than", "equivalent": "to"}.get(judged.word, "against")
    more = detectable_text(judged) if judged.word == "undecided" else ""
    also = f", and {judged.words[1]} within {judged.margin:g}" if len(judged.words) > 1 else ""
    return (
        f"{judged.word} {than} the pretrained model {where}{also}: {judged_text(judged)}{f'; {more}' if more else ''}"
    )


def _among(target: TargetResult, labels: list[str], axis: str) -> list[Judgement]:
    """Return the comparisons among some arms."""
    wanted = set(labels)
    return [
        pair.gain if axis == "gain" else pair.retention
        for pair in target.comparisons
        if pair.left in wanted and pair.right in wanted
    ]


def _retention(target: TargetResult) -> str:
    """Say which arms forget, which retain, and which are undecided."""
    judged = {label: one.retention for label, one in target.against_base.items() if one.retention.estimate is not None}
    if not judged:
        return ""
    losing = [label for label, one in judged.items() if one.has("worse")]
    retained = [label for label, one in judged.items() if one.has("no worse") and label not in losing]
    known = {label: one.estimate for label, one in judged.items() if one.estimate is not None}
    runs = about_runs(list(judged.values()))
    margin = next(iter(judged.values())).margin
    if len(judged) == 1:
        (label,) = judged
        return f"{subject([label], runs)} is {_against_base(judged[label], 'in mean retention')}."
    parts = []
    if losing:
        lowest = min(losing, key=lambda label: known[label].value)
        verb, which = ("forgets", "") if len(losing) == 1 else ("forget", f" the lowest {named([lowest])}")
        of = f"{len(losing)} of {len(judged)} arms {verb} (mean retention worse than the pretrained model's)"
        parts.append(f"{of}: {some(losing)},{which} at {judged_text(judged[lowest])}")
        within = [label for label in losing if judged[label].has("no worse")]
        if within:
            parts.append(f"of these no worse within {margin:g} points all the same: {named(within)}")
    if retained:
        parts.append(f"no worse than the pretrained model within {margin:g} points: {named(retained)}")
    rest = [label for label, one in judged.items() if one.word == "undecided"]
    unknown = [label for label, one in judged.items() if one.word == "not comparable"]
    if unknown:
        parts.append(f"not comparable with the pretrained model: {named(unknown)} ({_no_interval(known[unknown[0]])})")
    if rest:
        parts.append(f"undecided: {named(rest)} ({_span(known, rest)}{resolution([judged[label] for label in rest])})")
    text = f"{'; '.join(parts)}."
    if not losing:
        return f"Mean retention{' of these runs' if runs else ''}: {text}"
    return f"In these runs, {text}" if runs else text


def _keeping(target: TargetResult) -> str:
    """Say which arms keep most, where some are worse."""
    means = {arm.label: arm.mean.value for arm in target.arms if arm.mean}
    if len(means) < 2:
        return ""
    best = standing(means, target.comparisons, "retention")
    if not best.worse:
        return ""
    known = {arm.label: arm.mean for arm in target.arms if arm.mean}
    pairs = _among(target, best.best, "retention")
    tables = both_ways(target.comparisons)
    against = [tables[label, best.highest[0]].retention for label in best.worse if label not in best.highest]
    more = "" if len(best.best) == 1 else resolution(pairs)
    who = _one_of(best.best, about_runs([*pairs, *against]))
    text = f"best in mean retention: {who} ({_span(known, best.best)}{more})"
    text += f"; worse than the highest: {named(best.worse)}"
    return f"{text}{f'; not comparable with the highest: {named(best.unclear)}' if best.unclear else ''}."


def _span(known: Mapping[str, Estimate], labels: list[str] | None = None) -> str:
    found = [known[label] for label in labels or known]
    values = sorted(one.value for one in found)
    unit, digits = found[0].unit, digits_of(found[0].unit)
    if len(values) == 1 or signed(values[0], digits) == signed(values[-1], digits):
        return f"{signed(values[0], digits)} {unit}"
    return f"{signed(values[0], digits)} to {signed(values[-1], digits)} {unit}"


def trade_sentence(keeps: str, forgets: str, retention: Judgement, gain: Judgement) -> str:
    """Say that one arm keeps more than another and gains no less, with the numbers.

    Args:
        keeps: label of the arm that keeps more.
        forgets: label of the other.
        retention: first minus second.
        gain: the same.
    """
    runs = about_runs([retention, gain])
    how = "is better in gain too" if gain.has("better") else f"is no worse in gain within {gain.margin:g}"
    if gain.has("worse"):
        how = f"is worse in gain, yet no worse within {gain.margin:g}"
    text = (
        f"{subject([keeps], runs)} is better in mean retention than {subject([forgets], runs)} "
        f"({judged_text(retention)}) and {how} ({judged_text(gain)})."
    )
    return sentence(text)


def _better_trade(target: TargetResult, best: Standing) -> str:
    """Return the clearest case among the arms that gain most: no less gain, less forgotten."""
    inside = [pair for pair in target.trade_offs if pair.forgets in best.best]
    if not inside:
        return ""
    first = inside[0]
    return f"{trade_sentence(first.keeps, first.forgets, first.retention, first.gain)[:-1]}: the better trade."


def _cheapest(target: TargetResult, best: Standing) -> str:
    """Say which of the arms that gain most is cheapest; measured costs only where the ranges do not overlap."""
    if len(best.best) < 2:
        return ""
    parts = []
    for metric, verb in ((TRAINABLE, "trains the fewest parameters"), (PEAK_MEMORY, "needs the least training memory")):
        found = {label: target.costs[label].get(metric) for label in best.best}
        costs = {label: cost for label, cost in found.items() if cost is not None and cost.value is not None}
        if len(costs) < len(best.best):
            continue
        first, *others = sorted(costs, key=lambda label, costs=costs: costs[label].value or 0.0)  # type: ignore[misc]
        if (costs[first].high or 0.0) < min(costs[label].low or 0.0 for label in others):
            parts.append((first, f"{verb} ({quantity(costs[first].value, costs[first].unit)})"))
    if not parts:
        return ""
    start = "of the arms that may be best in gain"
    if len({label for label, _ in parts}) == 1:
        return f"{start}, {named([parts[0][0]])} {' and '.join(text for _, text in parts)}."
    return f"{start}, {', and '.join(f'{named([label])} {text}' for label, text in parts)}."


def caveats(result: StudyResult) -> list[str]:
    """Return what a reader must know before believing the findings."""
    found = []
    runs = [run for arm in result.evidence.arms for run in arm.runs]
    untrained = sum(run.training is None for run in runs)
    if untrained:
        found.append(
            f"{untrained} of {_count(len(runs), 'run is', 'runs are')} missing or failed; they are listed below."
        )
    arms = [arm for target in result.targets for arm in target.arms]
    if any(arm.gain and arm.gain.delta and arm.gain.delta.about_runs for arm in arms):
        found.append(
            "One seed is one run: intervals cover items only, and nothing here is said of a method. Another training "
            "with another seed may come out in another order."
        )
    if result.view.seed_sd is not None and any(_covered_by_declaration(arm) for arm in arms):
        sd = result.view.seed_sd
        where = f" ({sd.source})" if sd.source else ""
        measured = "" if sd.runs is None else f", measured on {sd.runs} runs"
        found.append(
            f"Spread between trainings as the study declares it{where}{measured}: standard deviation {sd.target:g} on "
            f"the target, {sd.retention:g} in mean retention."
        )
    found += [text for target in result.targets for text in _borrowed(target)]
    found += [text for target in result.targets for text in (*_wild(target), *_unscored(target))]
    found += limit_caveats(result)
    return [*found, *(text for target in result.targets if target.rl is not None and (text := rl_caveat(target.rl)))]


def _borrowed(target: TargetResult) -> list[str]:
    """Name the arms whose spread between trainings is that of others."""
    found = {arm.label: {"gain": arm.gain.delta if arm.gain else None, "retention": arm.mean} for arm in target.arms}
    told = []
    for axis in AXES:
        known = {label: one for label, by in found.items() if (one := by[axis]) is not None}
        labels = [label for label, one in known.items() if one.covers == "items, and the seed spread of other arms"]
        donors = [f"{named([label])}, {one.seeds} seeds" for label, one in known.items() if one.seeds > 1]
        if labels:
            told.append(
                f"{named(labels)} on {target.label}: one seed; for {_AXIS_NAMES[axis]} the spread between trainings "
                f"that other arms show stands for theirs ({'; '.join(donors)}). Few such seeds leave wide intervals."
            )
    return told


def _covered_by_declaration(arm: ArmEffects) -> bool:
    return arm.gain is not None and arm.gain.delta is not None and arm.gain.delta.covers == "items, and seed_sd"


def _wild(target: TargetResult) -> list[str]:
    """Name the arms whose trainings lie further apart than those of the others."""
    return [
        f"{one.label} on {target.label}: its trainings lie further apart in {_AXIS_NAMES[axis]} (standard deviation "
        f"{one.sd:.1f}) than those of the other arms ({one.others:.1f}); comparisons with it are called different "
        "falsely more often than they should be where arms have few seeds (docs/coverage.md)."
        for axis in AXES
        for one in target.wild[axis]
    ]


def _unscored(target: TargetResult) -> list[str]:
    """Name the arms with many answers that could not be scored."""
    shares = {
        arm.label: found.unscored
        for arm in target.arms
        if (found := arm.gain.delta if arm.gain else None) is not None and found.unscored > MANY_UNSCORED
    }
    if not shares:
        return []
    listed = ", ".join(f"{label} {100 * share:.1f} %" for label, share in shares.items())
    return [
        f"Answers on {target.label} that could not be scored, of either side: {listed}. Intervals hold for whatever "
        "these answers were worth, where that is known."
    ]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def uncompared(target: TargetResult) -> list[str]:
    """Return the pairs of arms with results that could not be compared: no common seed or no common answer."""
    have = {arm.label for arm in target.arms if arm.gain and arm.gain.delta}
    return [
        f"{pair.left} and {pair.right}"
        for pair in target.comparisons
        if {pair.left, pair.right} <= have and pair.gain.estimate is None
    ]
