"""pass@k before and after training: how often one of k sampled answers is right.

A method may answer more often what could be answered before, and fewer items at all: then pass@1 rises and pass@k falls
(Yue et al. 2025, Does Reinforcement Learning Really Incentivize Reasoning Capacity in LLMs Beyond the Base Model?).
The estimates of every item are in the records (:mod:`peft_arena.core.passk`); here they are means over items, paired
with the pretrained model's by item, and every change is a question to the study's family of comparisons. Samples of
both models use the same random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_arena.analyze.effects import estimate_summary
from peft_arena.analyze.estimate import Estimate, estimate
from peft_arena.analyze.evidence import ArmEvidence, Evidence, columns_of, scores_of
from peft_arena.analyze.family import Family, Judgement
from peft_arena.analyze.paired import Scores, difference, level
from peft_arena.analyze.seed_spread import Pooled, SeedSpread, pooled
from peft_arena.core.measure import POINTS
from peft_arena.core.passk import metric_name
from peft_arena.core.specs import EvalSpec, Sampling
from peft_arena.store.records import EvaluationRecord

FRACTION = "fraction"


@dataclass(frozen=True, eq=False)
class PassK:
    """pass@k of one arm for one k."""

    k: int
    tuned: Estimate | None
    """Of the tuned models, a fraction, over all items they were scored on."""
    judged: Judgement
    """Tuned minus pretrained in points, over items that both were scored on."""

    @property
    def delta(self) -> Estimate | None:
        """The difference."""
        return self.judged.estimate

    @property
    def change(self) -> int:
        """1 or -1 where pass@k is better or worse than before, else 0."""
        return self.judged.has("better") - self.judged.has("worse")


@dataclass(frozen=True, eq=False)
class ArmPassK:
    """pass@k of one arm."""

    label: str
    place: int
    """Position among the arms of the target."""
    points: tuple[PassK, ...]
    """By rising k."""

    @property
    def rises(self) -> tuple[PassK, ...]:
        """The k at which it is better."""
        return tuple(point for point in self.points if point.change > 0)

    @property
    def falls(self) -> tuple[PassK, ...]:
        """The k at which it is worse."""
        return tuple(point for point in self.points if point.change < 0)


@dataclass(frozen=True, eq=False)
class TargetPassK:
    """pass@k of the pretrained model and of every arm on one target."""

    spec: EvalSpec
    label: str
    """Of the target."""
    items: int
    base: tuple[tuple[int, Estimate], ...]
    """k and the pretrained model's value, a fraction; empty while it is not evaluated."""
    arms: tuple[ArmPassK, ...]
    """Arms with at least one sampled evaluation."""
    judges: bool
    """Whether the target's own score is of these answers; of greedy ones if not."""

    @property
    def sampling(self) -> Sampling:
        """How answers were sampled."""
        assert self.spec.sampling is not None, "the evaluation is a sampled one"
        return self.spec.sampling

    def summary(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "evaluation": self.spec.model_dump(mode="json"),
            "base": {metric_name(k): level_summary(found) for k, found in self.base},
            "arms": [
                {
                    "label": arm.label,
                    **{
                        metric_name(point.k): {
                            "tuned": level_summary(point.tuned),
                            "delta": estimate_summary(point.delta),
                            **point.judged.summary(),
                        }
                        for point in arm.points
                    },
                }
                for arm in self.arms
            ],
        }


def read_passk(evidence: Evidence, arms: Sequence[ArmEvidence], family: Family) -> TargetPassK | None:
    """Return pass@k on one target; None where no answers were sampled.

    Args:
        evidence: of the study.
        arms: of the target.
        family: that changes are corrected in.
    """
    spec = next((arm.arm.sampled for arm in arms if arm.arm.sampled), None)
    if spec is None or spec.sampling is None:
        return None
    pretrained = evidence.base.evaluations.get(spec.id)
    base: list[tuple[int | None, EvaluationRecord]] = [] if pretrained is None else [(None, pretrained)]
    answered = [(place, arm, found) for place, arm in enumerate(arms) if (found := _records(arm, spec))]
    records = [one for _, one in base] + [one for _, _, found in answered for _, one in found]
    if not records:
        return None
    columns = columns_of(records)
    ks = spec.sampling.k
    of_base = {k: scores_of(base, columns, metric_name(k)) for k in ks} if base else {}
    levels = [(k, one) for k in of_base if (one := level_of(of_base[k], spec.id)) is not None]
    points: dict[int, list[PassK]] = {place: [] for place, _, _ in answered}
    for k in ks:
        scores = {arm.arm.label: scores_of(found, columns, metric_name(k)) for _, arm, found in answered}
        spread = run_spread(scores)
        margin = evidence.view.margin.on_target(POINTS)
        for (place, _, _), (name, mine) in zip(answered, scores.items(), strict=True):
            delta = difference(mine, of_base[k], spec.id, fraction=True) if k in of_base else None
            in_points = None
            if delta is not None:
                in_points = estimate(delta.times(100.0), POINTS, spread=spread.of_run(name, 100.0))
            judged = family.ask(in_points, margin=margin, against_base=True)
            points[place].append(PassK(k, level_of(mine, spec.id, spread=spread.of_run(name)), judged))
    read = tuple(ArmPassK(arm.arm.label, place, tuple(points[place])) for place, arm, _ in answered)
    label = evidence.labels[arms[0].arm.target.id]
    judges = spec.id == arms[0].arm.target.id
    return TargetPassK(spec, label, len(columns), tuple(levels), read, judges)


def _records(arm: ArmEvidence, spec: EvalSpec) -> list[tuple[int | None, EvaluationRecord]]:
    return [(run.spec.seed, run.evaluations[spec.id]) for run in arm.runs if spec.id in run.evaluations]


def run_spread(scores: Mapping[str, Scores]) -> Pooled:
    """Return how far the means of the runs of some arms, by label, lie apart."""
    return pooled({label: one.by_seed() for label, one in scores.items()})


def level_of(
    scores: Scores, task: str, unit: str = FRACTION, *, scale: float = 1.0, spread: Sequence[SeedSpread] = ()
) -> Estimate | None:
    """Return the mean over seeds and items with its interval; None where a seed has no scored item.

    Args:
        scores: of an arm, or of the pretrained model.
        task: id of the evaluation.
        unit: of the result; it is taken to be a fraction if that is ``fraction`` or ``%``.
        scale: what the mean is multiplied with.
        spread: of a run, scaled.
    """
    found = level(scores, task, fraction=unit in (FRACTION, "%"))
    if found is None:
        return None
    return estimate(found.times(scale), unit, spread=spread)


def level_summary(found: Estimate | None) -> dict[str, Any] | None:
    """Return a level as JSON values, without its p-value: nobody asks whether it is 0."""
    values = estimate_summary(found)
    return None if values is None else {name: value for name, value in values.items() if name != "p"}
