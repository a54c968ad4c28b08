"""PSCP of the arms of a target: from records to scores, their errors, and what the constants do to their order.

P is the headline of the target, in per cent where it is a fraction. M_p, M_f and M_m are the arm's recorded costs,
means over seeds, and taken as exact: the error of a score is that of P, scaled. Two uncertainties are kept apart. The
interval says what seeds and items leave open at the given constants; the band (:mod:`peft_arena.cost.pscp_band`) says
what the constants leave open at the measured values. An arm without one of the inputs has no score, and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from peft_arena.analyze.costs import PEAK_MEMORY, TRAINABLE, Cost
from peft_arena.analyze.effects import ArmEffects, estimate_summary
from peft_arena.analyze.estimate import Estimate, estimate
from peft_arena.analyze.evidence import Evidence, TaskInfo
from peft_arena.analyze.family import Family, Judgement
from peft_arena.analyze.paired import Scores, difference
from peft_arena.analyze.passk import level_of, level_summary, run_spread
from peft_arena.cost.pscp import Operations, PscpChoice, PscpConstants, pscp
from peft_arena.cost.pscp_band import Band, Order, PscpBands, PscpInputs, pscp_bands
from peft_arena.store.published import PublishedTable

PERCENT = "%"
FLOPS = {Operations.EXTRA: "extra_forward_flops_512", Operations.TOTAL: "forward_flops_512"}
"""Measure of the cost records that is M_f by each definition."""
NAMES = {
    TRAINABLE: "trained parameters (M_p)",
    FLOPS[Operations.EXTRA]: "forward FLOPs above the base model (M_f, extra)",
    FLOPS[Operations.TOTAL]: "forward FLOPs (M_f, total)",
    PEAK_MEMORY: "peak training memory (M_m)",
}
"""What a reader calls the inputs."""
PUBLISHED_FLOPS = {Operations.EXTRA: "extra_forward_flops", Operations.TOTAL: "forward_flops"}
PUBLISHED_PARAMETERS, PUBLISHED_MEMORY = "trainable_parameters", "memory_max"
"""Columns of a published table that hold inputs of the score."""


@dataclass(frozen=True, eq=False)
class PscpScore:
    """PSCP of one arm by one definition of M_f."""

    score: Estimate | None
    """In the unit of P; its interval is that of P, scaled."""
    band: Band | None
    """Over the constants; ranks are among the arms of the target that have a score."""
    missing: str
    """Why there is no score; empty where there is one."""


@dataclass(frozen=True, eq=False)
class ArmPscp:
    """PSCP of one arm and what it is made of."""

    label: str
    place: int
    """Position among the arms of the target."""
    performance: Estimate | None
    """P."""
    inputs: Mapping[str, Cost | None]
    """M_p, both M_f and M_m by the name of their measure; None: no record has it."""
    by: Mapping[Operations, PscpScore]


@dataclass(frozen=True, eq=False)
class PscpPair:
    """Two arms by the chosen definition of M_f."""

    left: str
    right: str
    judged: Judgement
    """Left minus right at the given constants, paired by seed and item, corrected in the study's family."""
    order: Order
    """What the constants do to the order."""


@dataclass(frozen=True, eq=False)
class TargetPscp:
    """PSCP of all arms of a target."""

    label: str
    """Of the target."""
    metric: str
    unit: str
    """Of P and of every score."""
    choice: PscpChoice
    arms: tuple[ArmPscp, ...]
    pairs: tuple[PscpPair, ...]
    points: int
    """Points of the grid of constants."""

    @property
    def ranked(self) -> list[tuple[ArmPscp, Band, Estimate]]:
        """Arms with a score by the chosen definition, the highest first."""
        found = []
        for arm in self.arms:
            one = arm.by[self.choice.operations]
            if one.band is not None and one.score is not None:
                found.append((arm, one.band, one.score))
        return sorted(found, key=lambda entry: -entry[1].score)

    def of(self, order: Order) -> list[PscpPair]:
        """Return the pairs whose order is so."""
        return [pair for pair in self.pairs if pair.order == order]

    def summary(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "metric": self.metric,
            "unit": self.unit,
            "constants": asdict(self.choice.constants),
            "operations": self.choice.operations.value,
            "grid_points": self.points,
            "arms": [
                {
                    "label": arm.label,
                    "performance": estimate_summary(arm.performance),
                    "inputs": {name: None if cost is None else cost.value for name, cost in arm.inputs.items()},
                    **{f"{kind.value}_flops": _score_summary(found) for kind, found in arm.by.items()},
                }
                for arm in self.arms
            ],
            "pairs": [
                {
                    "left": pair.left,
                    "right": pair.right,
                    "order": pair.order,
                    "difference": estimate_summary(pair.judged.estimate),
                    **pair.judged.summary(),
                }
                for pair in self.pairs
            ],
        }


def read_pscp(
    evidence: Evidence, arms: Sequence[ArmEffects], costs: Mapping[str, Mapping[str, Cost]], family: Family
) -> TargetPscp | None:
    """Return PSCP on one target; None where the study does not ask for it, or nothing was evaluated.

    Args:
        evidence: of the study.
        arms: of the target.
        costs: arm label to metric to cost.
        family: that differences are corrected in.
    """
    choice = evidence.view.pscp
    task = evidence.tasks.get(arms[0].evidence.arm.target.id) if arms else None
    if choice is None or task is None:
        return None
    unit, scale = (PERCENT, 100.0) if task.is_fraction else (task.unit, 1.0)
    scores = {arm.label: found for arm in arms if (found := arm.evidence.scores.get(task.key))}
    spread = run_spread(scores)
    levels = {
        label: level_of(found, task.key, unit, scale=scale, spread=spread.of_run(label, scale))
        for label, found in scores.items()
    }
    inputs = {arm.label: {name: costs[arm.label].get(name) for name in NAMES} for arm in arms}
    made: dict[Operations, dict[str, PscpScore]] = {}
    pairs: tuple[PscpPair, ...] = ()
    points = 0
    for kind in Operations:
        known, missing = _complete(task, levels, inputs, kind)
        bands = pscp_bands(known, choice.constants)
        points = bands.points
        factors = {one.label: _factor(one, choice.constants) for one in known}
        rows = {band.label: band for band in bands.rows}
        made[kind] = {
            arm.label: PscpScore(
                _scaled(levels.get(arm.label), factors.get(arm.label)), rows.get(arm.label), missing.get(arm.label, "")
            )
            for arm in arms
        }
        if kind is choice.operations:
            orders = {(pair.left, pair.right): pair.order for pair in bands.pairs}
            discounts = {label: scale * factor for label, factor in factors.items()}
            pairs = _pairs(scores, discounts, orders, family, task)
    read = [
        ArmPscp(
            arm.label, place, levels.get(arm.label), inputs[arm.label], {kind: made[kind][arm.label] for kind in made}
        )
        for place, arm in enumerate(arms)
    ]
    return TargetPscp(task.label, task.metric, unit, choice, tuple(read), pairs, points)


@dataclass(frozen=True, eq=False)
class PublishedPscp:
    """PSCP of the rows of a published table, from its own numbers."""

    title: str
    """Of the table."""
    performance: str
    """What P is."""
    operations: Operations
    bands: PscpBands
    left_out: tuple[str, ...]
    """Rows that lack an input."""

    @property
    def ranked(self) -> list[Band]:
        """Rows with a score, the highest first."""
        return sorted(self.bands.rows, key=lambda band: -band.score)


def published_pscp(table: PublishedTable, choice: PscpChoice) -> PublishedPscp | None:
    """Return PSCP of a published table with the study's constants; None where it lacks a column for an input.

    P is its one target column, in per cent where that is a fraction; M_f is what the table has, the chosen definition
    first.

    Args:
        table: imported, single runs.
        choice: constants of the study.
    """
    names = {column.name for column in table.columns}
    targets = [one for one in table.columns if one.role == "target" and one.better == "higher"]
    kinds = [kind for kind in (choice.operations, *Operations) if PUBLISHED_FLOPS[kind] in names]
    if len(targets) != 1 or not kinds or not {PUBLISHED_PARAMETERS, PUBLISHED_MEMORY} <= names:
        return None
    scale = 100.0 if targets[0].unit == "fraction" else 1.0
    found: list[PscpInputs] = []
    left_out = []
    asked = (targets[0].name, PUBLISHED_PARAMETERS, PUBLISHED_FLOPS[kinds[0]], PUBLISHED_MEMORY)
    for row in table.rows:
        values = [value for name in asked if (value := row.values[name]) is not None and value >= 0]
        if len(values) == len(asked):
            found.append(PscpInputs(row.label, scale * values[0], *values[1:]))
        else:
            left_out.append(row.label)
    bands = pscp_bands(found, choice.constants)
    return PublishedPscp(table.title, targets[0].title, kinds[0], bands, tuple(left_out))


def _complete(
    task: TaskInfo, levels: Mapping[str, Estimate | None], inputs: Mapping[str, Mapping[str, Cost | None]],
    kind: Operations,
) -> tuple[list[PscpInputs], dict[str, str]]:  # fmt: skip
    """Return the arms with every input, and for each of the others what it lacks."""
    found: list[PscpInputs] = []
    missing: dict[str, str] = {}
    for label, costs in inputs.items():
        level = levels.get(label)
        values = {name: cost.value if (cost := costs[name]) else None for name in (TRAINABLE, FLOPS[kind], PEAK_MEMORY)}
        parameters, flops, memory = values.values()
        lacking = [
            f"{NAMES[name]}: {_why(costs[name])}" for name, value in values.items() if value is None or value < 0
        ]
        if task.better != "higher":
            missing[label] = f"{task.metric} is not better when higher"
        elif level is None:
            missing[label] = f"no {task.metric} on {task.label} (P)"
        elif level.value < 0:
            missing[label] = f"{task.metric} is negative (P): a cost would raise the score"
        elif lacking or parameters is None or flops is None or memory is None:
            missing[label] = "; ".join(lacking)
        else:
            found.append(PscpInputs(label, level.value, parameters, flops, memory))
    return found, missing


def _why(cost: Cost | None) -> str:
    if cost is None:
        return "not in the records"
    return cost.how if cost.value is None else f"negative, {cost.value:g}"


def _factor(inputs: PscpInputs, constants: PscpConstants) -> float:
    """Return PSCP over P."""
    return pscp(1.0, inputs.parameters, inputs.flops, inputs.memory, constants)


def _scaled(level: Estimate | None, factor: float | None) -> Estimate | None:
    return None if level is None or factor is None else level.times(factor, level.unit)


def _pairs(
    scores: Mapping[str, Scores], discounts: Mapping[str, float], orders: Mapping[tuple[str, str], Order],
    family: Family, task: TaskInfo,
) -> tuple[PscpPair, ...]:  # fmt: skip
    """Return the difference of every two scores, paired by seed and item.

    Args:
        scores: by label, of the arms of the target.
        discounts: what the score of each arm that has every input is multiplied with.
        orders: what the constants do to the order of every two.
        family: that differences are corrected in.
        task: that the scores are of.
    """
    unit = PERCENT if task.is_fraction else task.unit
    discounted = {label: scores[label].times(factor) for label, factor in discounts.items()}
    spread = run_spread({label: scores[label] for label in discounts})
    pairs = []
    for left, right in combinations(discounted, 2):
        most = (discounts[left], discounts[right])
        found = difference(discounted[left], discounted[right], task.key, fraction=task.is_fraction, most=most)
        between = spread.of_difference(left, right, most[0])
        if most[0] != most[1]:  # what a seed does to both arms does not cancel
            between = (*spread.of_run(left, most[0]), *spread.of_run(right, most[1]))
        judged = family.ask(None if found is None else estimate(found, unit, spread=between))
        pairs.append(PscpPair(left, right, judged, orders[left, right]))
    return tuple(pairs)


def _score_summary(found: PscpScore) -> dict[str, Any]:
    return {
        "score": level_summary(found.score),
        "band": None if found.band is None else found.band._asdict(),
        "missing": found.missing or None,
    }
