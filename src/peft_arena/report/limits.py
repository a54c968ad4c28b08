"""What a report says of answers that met the limit of new tokens."""

from __future__ import annotations

from collections.abc import Mapping

from peft_arena.analyze.evidence import TaskInfo
from peft_arena.analyze.limits import MANY_AT_LIMIT, AtLimit
from peft_arena.analyze.study import StudyResult, TargetResult
from peft_arena.report.numbers import listed
from peft_arena.tasks.base import Kind

NOT_RECORDED = "not recorded"


def limit_title(target: TargetResult, label: str, task: TaskInfo) -> str:
    """Return which shares of base and tuned answers met the limit; empty where no answer is written.

    Args:
        target: of the arm.
        label: of the arm.
        task: the target, or a retention task.
    """
    if task.card.get("kind") != Kind.GENERATE:
        return ""
    base, tuned = target.limits.base.get(task.key), target.limits.of(label, task.key)
    if base is None and tuned is None:
        return f"answers that met the limit of new tokens: {NOT_RECORDED}"
    return f"answers that met the limit{_tokens(base or tuned)}: base {_share(base)}, tuned {_share(tuned)}"


def limit_small(target: TargetResult, label: str) -> str:
    """Return the same for the target in a few words; empty where nothing is recorded."""
    key = target.spec.id
    base, tuned = target.limits.base.get(key), target.limits.of(label, key)
    if base is None and tuned is None:
        return ""
    return f"at the limit {_share(base)} → {_share(tuned)}"


def limit_caveats(result: StudyResult) -> list[str]:
    """Return a sentence for each target and retention task with many answers that met the limit.

    A retention task is named only where the share changed as well: what is the same on both sides drops out of the
    difference.
    """
    found = []
    for target in result.targets:
        found += _of_target(target)
        for spec in result.view.retention:
            found += _of_retention(target, spec.id, result.evidence.labels[spec.id])
    return list(dict.fromkeys(found))


def _of_target(target: TargetResult) -> list[str]:
    key = target.spec.id
    base = target.limits.base.get(key)
    tuned = _known(target, key)
    many = {label: one for label, one in tuned.items() if one.is_large}
    if base is not None and base.is_large:
        also = f"; of the tuned models': {_listed(tuned)}" if tuned else ""
        return [
            f"{_share(base)} of the base model's answers on {target.label} met the limit{_tokens(base)}{also}. "
            "The base model's score, and with it the gain, is partly that of the limit."
        ]
    if many:
        return [
            f"Answers on {target.label} that met the limit{_tokens(next(iter(many.values())))}: {_listed(many)}. These "
            "scores are partly those of the limit."
        ]
    return []


def _of_retention(target: TargetResult, key: str, label: str) -> list[str]:
    base = target.limits.base.get(key)
    if base is None:
        return []
    moved = {arm: one for arm, one in _known(target, key).items() if abs(one.share - base.share) > MANY_AT_LIMIT}
    if not moved:
        return []
    return [
        f"Answers on {label} that met the limit{_tokens(base)}: {_share(base)} of the base model's, {_listed(moved)}. "
        "What changed there is partly how long the answers are."
    ]


def _known(target: TargetResult, key: str) -> dict[str, AtLimit]:
    found = {arm.label: target.limits.of(arm.label, key) for arm in target.arms}
    return {label: one for label, one in found.items() if one is not None}


def _listed(shares: Mapping[str, AtLimit]) -> str:
    return listed([f"{label} {_share(one)}" for label, one in shares.items()])


def _tokens(found: AtLimit | None) -> str:
    return "" if found is None or found.limit is None else f" of {found.limit} tokens"


def _share(found: AtLimit | None) -> str:
    return NOT_RECORDED if found is None else f"{100 * found.share:.0f} %"
