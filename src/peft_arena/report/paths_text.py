"""What a claim about a chosen point says, in sentences."""

from __future__ import annotations

from peft_arena.analyze.effects import unit_of
from peft_arena.analyze.path_study import ArmPath, TargetPaths
from peft_arena.core.paths import TUNED
from peft_arena.report.numbers import NONE, in_unit, plain
from peft_arena.report.words import about_runs, ends_text, judged_text, sentence, stated_text, subject
from peft_arena.store.records import PathRecord


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
    runs = about_runs([one for arm in found for one in (arm.claim.target, arm.claim.retention)])
    more = f" So did {subject(others, runs)}." if others else ""
    return f"{_overshoot(found[0], target)}{more}"


def claim_sentence(arm: ArmPath, target: str) -> str:
    """Say what test items say of an arm along a path."""
    claim = arm.claim
    who = sentence(subject([arm.label], about_runs([claim.target, claim.retention])))
    start = f"{who} along its path ({arm.words})"
    if claim.verdict == "overshoot":
        return _overshoot(arm, target)
    if claim.missing:
        return f"{start}: nothing can be claimed: {claim.missing}."
    if claim.none_chosen:
        return f"{start}: the tuned model stays: {_why_none(arm)}."
    change = claim.target.estimate
    if change is None or claim.verdict == "unknown":
        return f"{start}: nothing is claimed: {'too few items' if change is None else change.missing or 'no interval'}."
    numbers = (
        f"on {change.items} test items the point is {stated_text(claim.target, f'on {target}')} and "
        f"{stated_text(claim.retention, 'in mean retention')} against the tuned model"
    )
    if claim.verdict in ("target worse", "retention worse"):
        what = "the target is worse" if claim.verdict == "target worse" else "it keeps less"
        return f"{start}, factor {factors_text(arm)}: {what} after all: {numbers}."
    return f"{start}, factor {factors_text(arm)}: undecided whether it overshot ({claim.why_not}): {numbers}."


def _why_none(arm: ArmPath) -> str:
    """Say why no seed has a chosen point, on validation items."""
    told = {run.seed: _refused_text(run.record, arm) for run in arm.found if run.record is not None}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"seed {seed}: {why}" for seed, why in told.items())


def _refused_text(record: PathRecord, arm: ArmPath) -> str:
    tried = [row for row in record.rows if row.factor < TUNED and row.target_change is not None]
    change = tried[-1].target_change if tried else None
    if change is None or change[2] is None or change[2] >= 0:
        return record.reason
    unit = unit_of(arm.validation[0])
    value = f"{in_unit(change[0], unit)} {unit} {ends_text((change[1] or 0.0, change[2]), unit)}"
    return f"on validation items the target of the largest factor tried, {tried[-1].factor:g}, changes by {value}"


def _overshoot(arm: ArmPath, target: str) -> str:
    claim = arm.claim
    change = claim.target.estimate
    assert change is not None, "an overshoot has both numbers"
    share = "" if claim.recovered is None else f", {share_text(claim.recovered)} of what was lost"
    within = f"no worse within {claim.target.margin:g}" if claim.target.margin is not None else ""
    how = f"worse, yet {within}" if claim.target.has("worse") else within
    how = "better too" if claim.target.has("better") else how
    wrecked = "" if arm.gained else f" The tuned model itself gained nothing on {target} that validation items show."
    who = sentence(subject([arm.label], about_runs([claim.target, claim.retention])))
    return (
        f"{who} overshot: at factor {factors_text(arm)} of its path ({arm.words}), chosen on validation items, "
        f"mean retention on test items is better than the tuned model's ({judged_text(claim.retention)}{share}), and "
        f"{target} is {how} ({judged_text(claim.target)}) over {change.items} items.{wrecked}"
    )
