"""What a claim about a chosen point says, in sentences."""

from __future__ import annotations

from peft_arena.analyze.path_study import ArmPath, TargetPaths
from peft_arena.report.numbers import NONE, listed, plain
from peft_arena.report.words import about_runs, judged_text, sentence, stated_text, subject


def factors_text(arm: ArmPath) -> str:
    """Return the chosen factors, each with the number of seeds if there is more than one seed."""
    counted = [(f"{factor:g}", seeds) for factor, seeds in arm.chosen.items()]
    if arm.claim.kept_tuned:
        counted.append(("none", len(arm.claim.kept_tuned)))
    if len(arm.claim.chosen) < 2:
        return counted[0][0] if counted else NONE
    return ", ".join(f"{text} ({seeds} seed{'s' if seeds > 1 else ''})" for text, seeds in counted)


def share_text(share: float | None) -> str:
    """Return a share in per cent."""
    return NONE if share is None else f"{plain(100 * share, 0)} %"


def overshoot_sentence(paths: TargetPaths, target: str) -> str:
    """Say which arms overshot the target, with the numbers of the one that regains most; empty if none did."""
    found = paths.overshoots
    if not found:
        return ""
    others = [label for label in dict.fromkeys(arm.label for arm in found) if label != found[0].label]
    named = listed(others) if len(others) <= 4 else f"{len(others)} other arms ({listed(others[:3])} among them)"
    more = f" So did {named}." if others else ""
    return f"{_overshoot(found[0], target)}{more}"


def claim_sentence(arm: ArmPath, target: str) -> str:
    """Say what test items say of an arm along a path."""
    claim = arm.claim
    start = f"{arm.label} along its path ({arm.words})"
    if claim.verdict == "overshoot":
        return _overshoot(arm, target)
    if claim.missing:
        return f"{start}: nothing can be claimed: {claim.missing}."
    if claim.none_chosen:
        reasons = {run.seed: run.record.reason for run in arm.found if run.record is not None}
        told = reasons.values() if len(reasons) == 1 else [f"seed {seed}: {why}" for seed, why in reasons.items()]
        return f"{start}: the tuned model stays: {'; '.join(told)}."
    change = claim.target.estimate
    if change is None or claim.verdict == "unknown":
        return f"{start}: too few items for an interval, so nothing is claimed."
    numbers = (
        f"on {change.items} test items the point is {stated_text(claim.target, f'on {target}')} and "
        f"{stated_text(claim.retention, 'in mean retention')} against the tuned model"
    )
    if claim.verdict == "target worse":
        return f"{start}, factor {factors_text(arm)}: the target is worse after all: {numbers}."
    return f"{start}, factor {factors_text(arm)}: undecided whether it overshot ({claim.why_not}): {numbers}."


def _overshoot(arm: ArmPath, target: str) -> str:
    claim = arm.claim
    change = claim.target.estimate
    assert change is not None, "an overshoot has both numbers"
    share = "" if claim.recovered is None else f", {share_text(claim.recovered)} of what was lost"
    better = "better too" if claim.target.has("better") else f"no worse within {claim.target.margin:g}"
    wrecked = "" if arm.gained else f" The tuned model itself gained nothing on {target} that validation items show."
    who = sentence(subject([arm.label], about_runs([claim.target, claim.retention])))
    return (
        f"{who} overshot: at factor {factors_text(arm)} of its path ({arm.words}), chosen on validation items, "
        f"mean retention on test items is better than the tuned model's ({judged_text(claim.retention)}{share}), and "
        f"{target} is {better} ({judged_text(claim.target)}) over {change.items} items.{wrecked}"
    )
