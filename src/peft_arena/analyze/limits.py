"""How many answers went on until the limit of new tokens: a score of such answers is partly that of the limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft_arena.analyze.evidence import ArmEvidence, RunEvidence
from peft_arena.store.records import EvaluationRecord

MANY_AT_LIMIT = 0.1
"""Share of answers above which a report says so."""


class AtLimit(NamedTuple):
    """Answers to one task, of all runs of an arm or of the base model."""

    met: int
    """Answers that went on until the limit."""
    answers: int
    limit: int | None
    """New tokens an answer may have; None where it is not known."""

    @property
    def share(self) -> float:
        """Fraction of the answers that met the limit."""
        return self.met / self.answers

    @property
    def is_large(self) -> bool:
        """Whether a report says so."""
        return self.share > MANY_AT_LIMIT

    @property
    def text(self) -> str:
        """The share in words, for example ``25 of 40 (64 tokens)``."""
        tokens = "" if self.limit is None else f" ({self.limit} tokens)"
        return f"{self.met:,} of {self.answers:,}{tokens}"

    def summary(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**self._asdict(), "share": self.share}


@dataclass(frozen=True)
class Limits:
    """What is recorded of a target's arms and of the base model; evaluations without a record of it are left out."""

    base: Mapping[str, AtLimit] = field(default_factory=dict)
    """By evaluation id."""
    arms: Mapping[str, Mapping[str, AtLimit]] = field(default_factory=dict)
    """Arm label to evaluation id."""

    def of(self, label: str, key: str) -> AtLimit | None:
        """Return what is recorded of an arm on a task; None: nothing is."""
        return self.arms.get(label, {}).get(key)


NO_LIMITS = Limits()
"""Of a target that no record says anything of."""


def read_limits(base: RunEvidence, arms: Iterable[ArmEvidence]) -> Limits:
    """Return how many answers met the limit, by the records of the points the runs are judged by."""
    return Limits(_of_runs([base]), {arm.arm.label: _of_runs(arm.runs) for arm in arms})


def at_limit(records: Iterable[EvaluationRecord]) -> AtLimit | None:
    """Return the answers of some evaluations of one task together; None where a record says nothing of it, or none is.

    Args:
        records: of one task.
    """
    found = [record.written for record in records]
    known = [written for written in found if written is not None]
    answers = sum(written.answers for written in known)
    if len(known) < len(found) or not answers:
        return None
    limits = {written.limit for written in known}
    return AtLimit(sum(written.met_limit for written in known), answers, limits.pop() if len(limits) == 1 else None)


def _of_runs(runs: Iterable[RunEvidence]) -> dict[str, AtLimit]:
    records: dict[str, list[EvaluationRecord]] = {}
    for run in runs:
        for key, record in run.evaluations.items():
            records.setdefault(key, []).append(record)
    found = {key: at_limit(of_task) for key, of_task in records.items()}
    return {key: one for key, one in found.items() if one is not None}
