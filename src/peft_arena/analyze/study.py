"""The whole analysis of a study, from the store's records to one result that reports only have to show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft_arena.analyze.along import TrainingPoint, along_training
from peft_arena.analyze.compare import (
    AXES,
    AgainstBase,
    Axis,
    Comparison,
    Rank,
    TradeOff,
    compare_arms,
    compare_tasks,
    compare_with_base,
    ranks,
    trade_offs,
)
from peft_arena.analyze.costs import Cost, arm_costs
from peft_arena.analyze.effects import ArmEffects, Spreads, TaskEffect, arm_effects, estimate_summary
from peft_arena.analyze.estimate import LEVEL
from peft_arena.analyze.evidence import Evidence, TaskInfo, read_evidence
from peft_arena.analyze.family import Family, Judgement
from peft_arena.analyze.geometry import TargetGeometry, read_geometry
from peft_arena.analyze.limits import NO_LIMITS, Limits, read_limits
from peft_arena.analyze.over_targets import OverTargets, TargetEffects, over_targets
from peft_arena.analyze.pareto import ParetoStatus, pareto
from peft_arena.analyze.passk import TargetPassK, read_passk
from peft_arena.analyze.path_study import TargetPaths, read_paths
from peft_arena.analyze.pscp import TargetPscp, read_pscp
from peft_arena.analyze.resamples import Resamples
from peft_arena.analyze.rl import TargetRL, read_rl
from peft_arena.analyze.rl_pairs import objective_pairs
from peft_arena.analyze.seed_spread import Wild, wild_arms
from peft_arena.analyze.view import StudyView
from peft_arena.core.specs import EvalSpec
from peft_arena.store.store import Store

DRAWS = 4000


@dataclass(frozen=True, eq=False)
class TargetResult:
    """Everything about the arms that were trained on one target."""

    spec: EvalSpec
    label: str
    task: TaskInfo | None
    """None while no run was evaluated on it."""
    arms: tuple[ArmEffects, ...]
    costs: Mapping[str, Mapping[str, Cost]]
    """Arm label to metric to cost."""
    against_base: Mapping[str, AgainstBase]
    per_task: Mapping[tuple[str, str], Judgement]
    """Label and id of a retention task's evaluation to what is said of the arm against the pretrained model there."""
    """Arm label to how it compares with the pretrained model."""
    comparisons: tuple[Comparison, ...]
    ranks: Mapping[Axis, Mapping[str, Rank]]
    pareto: Mapping[str, ParetoStatus]
    trade_offs: tuple[TradeOff, ...]
    along: Mapping[str, tuple[TrainingPoint, ...]]
    """Arm label to its evaluated save points with the last; only arms with more than one."""
    wild: Mapping[Axis, tuple[Wild, ...]]
    """Arms whose trainings lie further apart than those of the others: pooling their spread is wrong for them."""
    geometry: TargetGeometry | None = None
    """None where the study measures none, or nothing is there yet."""
    paths: TargetPaths | None = None
    """None where the study scans none."""
    rl: TargetRL | None = None
    """None where no arm is trained by reinforcement learning."""
    passk: TargetPassK | None = None
    """None where the study samples no answers, or none are there yet."""
    pscp: TargetPscp | None = None
    """None where the study does not ask for it, or nothing is evaluated yet."""
    limits: Limits = NO_LIMITS
    """How many answers met the limit of new tokens."""


@dataclass(frozen=True, eq=False)
class StudyResult:
    """The analysed study."""

    evidence: Evidence
    targets: tuple[TargetResult, ...]
    draws: int
    seed: int
    family: Family
    """Of all comparisons of the study."""
    over: OverTargets | None = None
    """Over all targets; None for a study of one."""

    @property
    def view(self) -> StudyView:
        """The study that was analysed."""
        return self.evidence.view

    def summary(self) -> dict[str, Any]:
        """Return the result as JSON values: what ``summary.json`` and ``--json`` say."""
        return {
            "study": self.view.name,
            "level": LEVEL,
            "draws": self.draws,
            "seed": self.seed,
            "base": self.view.base.run_id,
            "margin": {"target": self.view.margin.target, "retention": self.view.margin.retention},
            "seed_sd": None if self.view.seed_sd is None else asdict(self.view.seed_sd),
            "primary": [list(pair) for pair in self.view.primary],
            "comparisons_corrected_together": self.family.size,
            "targets": [_target_summary(target) for target in self.targets],
            "over_targets": None if self.over is None else self.over.summary(),
            "gaps": [asdict(gap) for gap in self.evidence.gaps],
        }


def analyze_study(store: Store, view: StudyView, *, seed: int = 0, draws: int = DRAWS) -> StudyResult:
    """Analyse a study.

    Args:
        store: where the records are.
        view: which runs and evaluations belong to the study.
        seed: seeds the joint draws; the same records and seed give the same numbers.
        draws: how many there are.
    """
    evidence = read_evidence(store, view)
    family, resamples = Family(), Resamples(seed, draws)
    asked = [_Target(store, evidence, spec, family) for spec in view.targets]
    gaps = [gap for one in asked for gap in one.gaps]
    over = over_targets(evidence, [one.effects for one in asked], family, resamples)
    # every comparison is asked by now: from here on words are read
    targets = tuple(one.result(resamples) for one in asked)
    if view.geometry:
        found = [read_geometry(store, evidence, target.arms) for target in targets]
        gaps += [gap for _, missing in found for gap in missing]
        targets = tuple(replace(target, geometry=one) for target, (one, _) in zip(targets, found, strict=True))
    evidence = replace(evidence, gaps=(*evidence.gaps, *gaps))
    return StudyResult(evidence, targets, draws, seed, family, over)


class _Target:
    """One target at work: all that is asked of the family first, then what is read of its answers."""

    def __init__(self, store: Store, evidence: Evidence, spec: EvalSpec, family: Family) -> None:
        own = [arm for arm in evidence.arms if arm.arm.target.id == spec.id]
        self.evidence, self.spec = evidence, spec
        self.spreads = Spreads(evidence, own)
        self.arms = tuple(arm_effects(evidence, arm, self.spreads) for arm in own)
        self.costs = {arm.label: arm_costs(arm.evidence) for arm in self.arms}
        self.comparisons = compare_arms(evidence, self.arms, self.spreads, family)
        self.against_base = compare_with_base(evidence, self.arms, family)
        self.passk = read_passk(evidence, own, family)
        self.pscp = read_pscp(evidence, self.arms, self.costs, family)
        self.paths, self.gaps = read_paths(store, evidence, own, family) if evidence.view.paths else (None, ())

    @property
    def task(self) -> TaskInfo | None:
        return self.evidence.tasks.get(self.spec.id)

    @property
    def effects(self) -> TargetEffects:
        return TargetEffects(self.evidence.labels[self.spec.id], self.task, self.arms, self.comparisons, self.costs)

    def result(self, resamples: Resamples) -> TargetResult:
        labels = [arm.label for arm in self.arms]
        runs = {"gain": {} if self.task is None else self.spreads.runs_on(self.task)}
        runs["retention"] = self.spreads.retention_runs()
        return TargetResult(
            spec=self.spec,
            label=self.evidence.labels[self.spec.id],
            task=self.task,
            arms=self.arms,
            costs=self.costs,
            against_base=self.against_base,
            per_task=compare_tasks(self.arms),
            comparisons=self.comparisons,
            ranks={axis: ranks(labels, self.comparisons, axis) for axis in AXES},
            pareto=pareto(self.arms, self.comparisons, resamples),
            trade_offs=trade_offs(self.comparisons),
            along={
                arm.label: points for arm in self.arms if (points := along_training(self.evidence, arm, self.spreads))
            },
            wild={axis: wild_arms(runs[axis]) for axis in AXES},
            paths=self.paths,
            rl=read_rl(self.arms, objective_pairs(self.arms, self.comparisons)),
            passk=self.passk,
            pscp=self.pscp,
            limits=read_limits(self.evidence.base, [arm.evidence for arm in self.arms]),
        )


def _target_summary(target: TargetResult) -> dict[str, Any]:
    return {
        "target": target.label,
        "evaluation": target.spec.model_dump(mode="json"),
        "arms": [_arm_summary(target, arm) for arm in target.arms],
        "comparisons": [
            {
                "left": comparison.left,
                "right": comparison.right,
                **{axis: _judged_summary(comparison.on(axis)) for axis in AXES},
            }
            for comparison in target.comparisons
        ],
        "trade_offs": [{"keeps": pair.keeps, "forgets": pair.forgets} for pair in target.trade_offs],
        "wild": {axis: [one._asdict() for one in found] for axis, found in target.wild.items()},
        **({} if target.geometry is None else {"geometry": target.geometry.summary()}),
        **({} if target.paths is None else {"paths": target.paths.summary()}),
        **({} if target.rl is None else {"rl": target.rl.summary()}),
        **({} if target.passk is None else {"passk": target.passk.summary()}),
        **({} if target.pscp is None else {"pscp": target.pscp.summary()}),
    }


def _arm_summary(target: TargetResult, arm: ArmEffects) -> dict[str, Any]:
    place = target.pareto.get(arm.label)
    return {
        "label": arm.label,
        "method": arm.evidence.arm.method,
        "objective": arm.evidence.arm.objective,
        "learning_rate": arm.evidence.arm.learning_rate,
        "runs": [run.spec.run_id for run in arm.evidence.runs],
        "seeds_planned": len(arm.evidence.runs),
        "seeds_trained": len(arm.evidence.trained_seeds),
        "gain": _effect_summary(arm.gain),
        "at_limit": _limit_summary(target, arm.label),
        "gain_judged": target.against_base[arm.label].gain.summary(),
        "retention_mean": estimate_summary(arm.mean),
        "retention_judged": target.against_base[arm.label].retention.summary(),
        "retention_mean_missing": arm.mean_missing or None,
        "retention": {effect.task.label: _effect_summary(effect) for effect in arm.retention},
        "gain_rank": _rank_summary(target.ranks["gain"].get(arm.label)),
        "retention_rank": _rank_summary(target.ranks["retention"].get(arm.label)),
        "pareto": None if place is None else asdict(place),
        "along": [_along_summary(point) for point in target.along.get(arm.label, ())],
        "costs": {name: asdict(cost) for name, cost in target.costs[arm.label].items()},
    }


def _limit_summary(target: TargetResult, label: str) -> dict[str, Any]:
    """Return how many answers on the target met the limit; None: not recorded, or nothing is written."""
    found = {"base": target.limits.base.get(target.spec.id), "tuned": target.limits.of(label, target.spec.id)}
    return {side: None if one is None else one.summary() for side, one in found.items()}


def _along_summary(point: TrainingPoint) -> dict[str, Any]:
    gain = point.effects.gain
    return {
        "step": point.step,
        "gain": estimate_summary(None if gain is None else gain.delta),
        "retention_mean": estimate_summary(point.effects.mean),
    }


def _effect_summary(effect: TaskEffect | None) -> dict[str, Any] | None:
    if effect is None:
        return None
    return {
        "task": effect.task.label,
        "metric": effect.task.metric,
        "unit": effect.task.unit,
        "better": effect.task.better,
        "chance": effect.task.chance,
        "base": effect.base,
        "tuned": effect.tuned,
        "delta": estimate_summary(effect.delta),
        "kept_above_chance": estimate_summary(effect.kept),
    }


def _judged_summary(judged: Judgement) -> dict[str, Any]:
    return {"difference": estimate_summary(judged.estimate), **judged.summary()}


def _rank_summary(rank: Rank | None) -> dict[str, int] | None:
    return None if rank is None else {"first": rank.first, "last": rank.last}
