"""Reinforcement learning on one target, as its records tell it: arms, warnings, and pairs with fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_arena.analyze.effects import ArmEffects
from peft_arena.analyze.evidence import RunEvidence
from peft_arena.analyze.rl_checks import Warned, warnings_of
from peft_arena.analyze.rl_curves import QUANTITIES, RLArm, RLRun
from peft_arena.analyze.rl_pairs import ObjectivePair
from peft_arena.core.specs import RLSpec


@dataclass(frozen=True, eq=False)
class TargetRL:
    """Everything about reinforcement learning on one target."""

    arms: tuple[RLArm, ...]
    """Arms of reinforcement learning, finished or not, in the study's order."""
    warnings: tuple[Warned, ...]
    pairs: tuple[ObjectivePair, ...]
    """Arms of one method with one configuration, trained in different ways."""

    @property
    def trained(self) -> tuple[RLArm, ...]:
        """Arms with a finished run."""
        return tuple(arm for arm in self.arms if arm.runs)

    def summary(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "arms": [_arm_summary(arm) for arm in self.arms],
            "warnings": [
                {"arm": found.arm, "check": found.check, "seeds": list(found.seeds), "text": found.text}
                for found in self.warnings
            ],
            "pairs": [pair.summary() for pair in self.pairs],
        }


def _arm_summary(arm: RLArm) -> dict[str, Any]:
    return {
        "label": arm.label,
        "objective": arm.objective,
        "runs": [run.run_id for run in arm.runs],
        "seeds_planned": arm.planned,
        "origin": arm.origin or None,
        "quantities": {
            quantity.name: {
                "unit": quantity.unit,
                "start": found.start,
                "end": found.end,
                "change": found.value,
                "low": found.low,
                "high": found.high,
                "seeds": found.seeds,
            }
            for quantity in QUANTITIES
            if (found := arm.change(quantity.name)) is not None
        },
    }


def read_rl(arms: Sequence[ArmEffects], pairs: Sequence[ObjectivePair]) -> TargetRL | None:
    """Return what the records of a target's arms say; None where no arm is of reinforcement learning.

    Args:
        arms: every arm of the target, in order.
        pairs: the same method trained in different ways.
    """
    names = {run.spec.run_id: (arm.label, run.spec.seed) for arm in arms for run in arm.evidence.runs}
    found = tuple(_arm(arm, place, names) for place, arm in enumerate(arms) if arm.evidence.arm.is_rl)
    if not found:
        return None
    return TargetRL(found, tuple(warned for arm in found for warned in warnings_of(arm)), tuple(pairs))


def _arm(arm: ArmEffects, place: int, names: Mapping[str, tuple[str, int]]) -> RLArm:
    runs = tuple(
        RLRun(run.spec.seed, run.spec.run_id, run.spec.train, run.training)
        for run in arm.evidence.runs
        if run.training is not None and isinstance(run.spec.train, RLSpec)
    )
    source = arm.evidence.arm
    return RLArm(arm.label, place, source.objective, len(arm.evidence.runs), runs, origin_of(arm.evidence.runs, names))


def origin_of(runs: Sequence[RunEvidence], names: Mapping[str, tuple[str, int]]) -> str:
    """Return in words which runs the runs of an arm began at; empty where that is the pretrained model.

    Args:
        runs: of the arm.
        names: arm and seed of the runs of the same target, by id; others are called by their id.
    """
    told = []
    for run in runs:
        train = run.spec.train
        if not isinstance(train, RLSpec) or train.init_from is None:
            continue
        start = run.training.start if run.training is not None else None
        run_id = train.init_from.run.run_id
        label, seed = names.get(run_id, (run_id, None))
        which = "" if seed is None else ", the same seed" if seed == run.spec.seed else f", seed {seed}"
        step = start.step if start is not None else train.init_from.step
        at = f", after {step} steps" if step is not None else ""
        how = f" ({start.how})" if start is not None and start.how else ""
        told.append(f"{label}{which}{at}{how}")
    return "; ".join(dict.fromkeys(told))
