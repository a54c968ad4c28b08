"""From scores to the record of an item: of one answer, or of several samples together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_arena.core.passk import FULL_MARKS, metric_name, pass_at_k
from peft_arena.evaluate.metrics import weighted_mean
from peft_arena.store.records import ItemRecord
from peft_arena.tasks.base import FRACTION, Item, Metric, Part, Score, Task

if TYPE_CHECKING:
    from peft_arena.core.specs import Sampling


@dataclass(frozen=True)
class Samples:
    """The scores of several sampled answers to one item."""

    sampling: Sampling
    scores: Sequence[Score]
    """At least one, in the order of the samples."""
    outputs: Sequence[str]
    """What was written, in the same order."""

    @property
    def score(self) -> Score:
        """All samples as one score: means over those that have a value, and pass@k over all of them.

        A sample without a value does not pass. The item has no value only if none of its samples has one; if some have
        none, the reason says how many.
        """
        scores = [_finite(score) for score in self.scores]
        known = [score for score in scores if score.value is not None]
        lost = [score for score in scores if score.value is None]
        n = len(scores)
        why = f"{len(lost)} of {n} samples could not be scored: {lost[0].reason}" if lost else ""
        if not known:
            return Score(None, reason=why)
        mean = _part([Part(score.value, score.weight) for score in known if score.value is not None])
        names = dict.fromkeys(name for score in known for name in score.others)
        others = {name: _part([score.others[name] for score in known if name in score.others]) for name in names}
        right = sum(score.value is not None and score.value >= FULL_MARKS for score in known)
        others |= {metric_name(k): Part(pass_at_k(n, right, k)) for k in self.sampling.k}
        return Score(mean.value, reason=why, weight=mean.weight, others=others)


def passk_metrics(sampling: Sampling) -> tuple[Metric, ...]:
    """Return what is reported of samples beside the task's own metrics."""
    return tuple(Metric(name=metric_name(k), unit=FRACTION, better="higher") for k in sampling.k)


def with_settled_rates(
    task: Task, items: Sequence[Item], scores: Sequence[Score], settled: Sequence[Score], sampling: Sampling
) -> list[Score]:
    """Return settled scores whose pass@k is taken over the same parts as the headline.

    Args:
        task: what was asked.
        items: its items.
        scores: of the items, before they were settled.
        settled: the same, settled.
        sampling: names the rates.
    """
    found = [dict(score.others) for score in settled]
    for metric in passk_metrics(sampling):
        rates = [score.others[metric.name].value if metric.name in score.others else None for score in scores]
        for others, rate in zip(found, task.settle_rates(items, rates), strict=True):
            others.pop(metric.name, None)
            if rate is not None:
                others[metric.name] = Part(rate)
    return [replace(score, others=others) for score, others in zip(settled, found, strict=True)]


def item_score(found: Score | Samples) -> Score:
    """Return the one score of an item; a value that is not finite becomes an unscored item with a reason."""
    return _finite(found.score if isinstance(found, Samples) else found)


def item_record(item: Item, found: Score | Samples, output: str = "", settled: Score | None = None) -> ItemRecord:
    """Return the record of one item; a value that is not finite becomes an unscored item with a reason.

    Args:
        item: what was asked.
        found: the score of its answer, or those of its samples.
        output: what was written, where it is one answer.
        settled: what the task made of the score, see :meth:`peft_arena.tasks.base.Task.settle`.
    """
    outputs = tuple(found.outputs) if isinstance(found, Samples) else ()
    score = item_score(found) if settled is None else settled
    return ItemRecord(
        id=item.id,
        value=None if score.value is None else float(score.value),
        weight=float(score.weight),
        others={name: (float(part.value), float(part.weight)) for name, part in score.others.items()},
        extracted=score.extracted,
        reason=score.reason,
        output=output,
        group=item.group,
        outputs=outputs,
    )


def _finite(score: Score) -> Score:
    """Return a score without whatever of it is not finite."""
    if score.value is None:
        return replace(score, others={})
    if not (math.isfinite(score.value) and math.isfinite(score.weight)):
        return Score(None, extracted=score.extracted, reason=f"the value is not finite: {score.value}")
    others = {
        name: part for name, part in score.others.items() if math.isfinite(part.value) and math.isfinite(part.weight)
    }
    return replace(score, others=others)


def _part(parts: Sequence[Part]) -> Part:
    """Return the weighted mean of some values, and the mean of their weights."""
    weights = [part.weight for part in parts]
    mean = weighted_mean([part.value for part in parts], weights).value
    return Part(0.0 if mean is None else mean, sum(weights) / len(weights))
