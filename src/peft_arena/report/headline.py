"""The few sentences an engineer reads first; each is backed by a corrected comparison or by a count."""

from __future__ import annotations

from peft_arena.analyze.compare import ALPHA, best_group, both_ways, holm
from peft_arena.analyze.costs import PEAK_MEMORY, TRAINABLE
from peft_arena.analyze.effects import ArmEffects
from peft_arena.analyze.paired import Estimate
from peft_arena.analyze.study import StudyResult, TargetResult
from peft_arena.report.numbers import estimate_text, listed, quantity, signed


def headline(result: StudyResult) -> list[str]:
    """Return the study's main findings as sentences, per target; every difference that is stated is significant."""
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
        return [f"No arm can be compared yet: none of {len(target.arms)} has been trained and evaluated."]
    best = best_group({label: found.value for label, found in gains.items()}, target.comparisons, "gain")
    found = [_gain(target, gains, best), _retention(target), _better_trade(target, best), _cheapest(target, best)]
    return [sentence for sentence in found if sentence]


def _gain(target: TargetResult, gains: dict[str, Estimate], best: list[str]) -> str:
    first = gains[best[0]]
    if len(gains) == 1:
        known = "" if first.excludes_zero else ", not distinguishable from zero"
        return f"{best[0]}, the only arm with results, changes the target score by {estimate_text(first)}{known}."
    values = sorted(gains[label].value for label in best)
    span = f"{signed(values[0])} to {signed(values[-1])} {first.unit}"
    if len(best) == len(gains):
        return f"All {len(gains)} arms are tied on the gain on {target.label} ({span})."
    others = len(gains) - len(best)
    start = f"{best[0]} gains most on {target.label}, {estimate_text(first)}"
    if len(best) == 1:
        rest = "the other arm" if others == 1 else f"each of the {others} other arms"
        return f"{start}, significantly more than {rest}."
    return (
        f"{start}, tied with {listed(best[1:])}; "
        f"{_count(others, 'other arm gains', 'other arms gain')} significantly less than {best[0]}."
    )


def _retention(target: TargetResult) -> str:
    means = {arm.label: arm.mean for arm in target.arms if arm.mean}
    if not means:
        return ""
    best = best_group({label: found.value for label, found in means.items()}, target.comparisons, "retention")
    corrected = holm([found.p for found in means.values()])
    losers = [
        label
        for (label, found), p in zip(means.items(), corrected, strict=True)
        if p is not None and p < ALPHA and found.value < 0
    ]
    worst = min(means, key=lambda label: means[label].value)
    if not losers:
        share = "No arm" if len(means) > 1 else best[0]
        verb = "forgets significantly" if len(means) > 1 else "does not forget significantly"
        return f"{share} {verb}: mean retention changes by {_span(means)}."
    text = f"{len(losers)} of {_count(len(means), 'arm forgets', 'arms forget')} significantly"
    if worst in losers:
        text += f", {worst} most (mean retention {estimate_text(means[worst])})"
    if len(best) < len(means):
        them = listed(best) if len(best) <= 4 else f"{len(best)} arms, {best[0]} first,"
        tied = "" if len(best) == 1 else ", tied"
        text += f"; {them} {'keeps' if len(best) == 1 else 'keep'} most ({_span(means, best)}{tied})"
    return f"{text}."


def _span(means: dict[str, Estimate], labels: list[str] | None = None) -> str:
    values = sorted(means[label].value for label in labels or means)
    if len(values) == 1:
        return f"{signed(values[0])} points"
    return f"{signed(values[0])} to {signed(values[-1])} points"


def _better_trade(target: TargetResult, best: list[str]) -> str:
    """Return the clearest case among the arms that gain most: the same gain, less forgotten."""
    inside = [pair for pair in target.trade_offs if pair.forgets in best]
    return f"{inside[0].sentence[:-1]}: the better trade." if inside else ""


def _cheapest(target: TargetResult, best: list[str]) -> str:
    """Say which of the arms that gain most is cheapest; measured costs only where the ranges do not overlap."""
    parts = []
    for metric, verb in ((TRAINABLE, "trains the fewest parameters"), (PEAK_MEMORY, "needs the least training memory")):
        costs = {label: cost for label in best if (cost := target.costs[label].get(metric)) and cost.value is not None}
        if len(costs) < len(best):
            continue
        order = sorted(costs, key=lambda label, costs=costs: costs[label].value or 0.0)  # type: ignore[misc]
        low = costs[order[0]]
        alone = len(order) == 1 or (low.high or 0.0) < min(costs[label].low or 0.0 for label in order[1:])
        if alone:
            parts.append((order[0], f"{verb} ({quantity(low.value, low.unit)})"))
    if not parts or len(best) == 1:
        return ""
    if len({label for label, _ in parts}) == 1:
        return f"Of the arms that gain most, {parts[0][0]} {' and '.join(text for _, text in parts)}."
    return f"Of the arms that gain most, {', and '.join(f'{label} {text}' for label, text in parts)}."


def caveats(result: StudyResult) -> list[str]:
    """Return what a reader must know before believing the findings: missing runs, arms with one seed."""
    found = []
    runs = [run for arm in result.evidence.arms for run in arm.runs]
    untrained = sum(run.training is None for run in runs)
    if untrained:
        found.append(
            f"{untrained} of {_count(len(runs), 'run is', 'runs are')} missing or failed; they are listed below."
        )
    if any(_single(arm) for target in result.targets for arm in target.arms):
        found.append("Arms with one seed: their intervals cover items only, not the spread between training runs.")
    return found


def _single(arm: ArmEffects) -> bool:
    return arm.gain is not None and arm.gain.delta is not None and arm.gain.delta.seeds == 1


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def uncompared(target: TargetResult) -> list[str]:
    """Return the pairs of arms with results that share no seed, so that they could not be compared."""
    have = {arm.label for arm in target.arms if arm.gain and arm.gain.delta}
    table = both_ways(target.comparisons)
    return [
        f"{left} and {right}"
        for (left, right), pair in table.items()
        if left < right and {left, right} <= have and pair.gain.verdict == "unknown"
    ]
