"""The geometry of a study's runs: read from their records, put together by arm, and set against what was forgotten.

A quantity that a run does not have is absent with a reason, never zero: methods that change no weights have no spectra.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from peft_arena.analyze.correlate import Correlation, Point, correlate
from peft_arena.analyze.effects import ArmEffects, oriented, retention_contrast, unit_of
from peft_arena.analyze.evidence import Evidence, Gap, RunEvidence
from peft_arena.analyze.profiles import Profile, by_kind, kind_of, mean_profile, module_profiles, window_of
from peft_arena.core.errors import UserError
from peft_arena.core.measure import Measure
from peft_arena.core.quantities import QUANTITIES, Quantity, quantity_of
from peft_arena.core.stage import StageId, failures
from peft_arena.store.geometry import read_profiles
from peft_arena.store.records import GeometryRecord
from peft_arena.store.store import RunDirectory, Store

if TYPE_CHECKING:
    import polars as pl

PARTS = ("spectra", "drift", "activations")
NOT_APPLICABLE = "not applicable: the method has no weights of its own that could be compared"
NOT_MEASURED = "not measured yet"
PROMPTS = ("general", "target", "ratio")
GLOBAL = "global_"
MAIN = (
    "global_l2_relative",
    "stable_rank",
    "entropy_rank",
    "deviation_mean",
    "adaptation_mean",
    "drift_relative_general",
    "drift_relative_ratio",
    "procrustes_residual_general",
    "gram_distortion_general",
    "cka_general",
    "kl_general",
    "kl_target",
)
"""What the report's table shows; all others are in its CSV tables."""
_POINTS_PER_MODULE = 100


class MetricName(NamedTuple):
    """What the name of a metric in a record's summary says."""

    quantity: str
    prompts: str
    """``general``, ``target``, ``ratio``, or empty where prompts play no part."""
    total: bool
    """Whether it is one number of all parameters together, not a mean over modules."""

    @property
    def known(self) -> Quantity | None:
        """What the quantity is; None for one that this version does not know."""
        try:
            return quantity_of(self.quantity)
        except (KeyError, ValueError):
            return None

    @property
    def part(self) -> str:
        """Which of :data:`PARTS` measures it; empty where that is unknown."""
        known = self.known
        return "" if known is None else {"norms": "spectra", "output": "activations"}.get(known.part, known.part)

    @property
    def title(self) -> str:
        """For tables and axes."""
        known = self.known
        name = self.quantity.replace("_", " ") if known is None else known.title
        ends = {"": "", "ratio": ", general ÷ target"}.get(self.prompts, f", {self.prompts} prompts")
        return f"{name}{', all parameters' if self.total else ''}{ends}"


def metric_name(metric: str) -> MetricName:
    """Read the name of a metric: ``kl_general`` is ``kl`` on general prompts, ``global_l2`` the norm of everything."""
    stem, _, end = metric.rpartition("_")
    itself = metric.removeprefix(GLOBAL) in QUANTITIES  # log_norm_ratio is no ratio of two prompt sets
    prompts = end if end in PROMPTS and stem and not itself else ""
    quantity = stem if prompts else metric
    return MetricName(quantity.removeprefix(GLOBAL), prompts, quantity.startswith(GLOBAL))


@dataclass(frozen=True)
class Mean:
    """A quantity over the runs of an arm."""

    value: float | None
    """None where no run has it, and then ``reason`` says why."""
    low: float | None
    """Least of the runs."""
    high: float | None
    runs: int
    reason: str = ""

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Value, least and most; only where there is a value."""
        assert self.value is not None and self.low is not None and self.high is not None, "there is a value"
        return self.value, self.low, self.high


@dataclass(frozen=True, eq=False)
class RunGeometry:
    """What was measured of one run, or of one checkpoint."""

    label: str
    """Of the arm or checkpoint."""
    run_id: str
    seed: int | None
    records: Mapping[str, GeometryRecord]
    """By part: ``spectra``, ``drift``, ``activations``."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Part that there is no record of, to the reason."""
    kinds: Mapping[str, Profile] = field(default_factory=dict)
    """Kind of module to its mean profile."""
    modules: Mapping[str, Profile] = field(default_factory=dict)
    """Module to its profile's moving average, thinned."""
    gain: float | None = None
    """In :attr:`TargetGeometry.gain_unit`."""
    forgetting: float | None = None
    """Minus the mean retention, in points."""

    @property
    def measures(self) -> dict[str, Measure]:
        """Every measure of the records' summaries by name."""
        return {measure.metric: measure for record in self.records.values() for measure in record.summary}


@dataclass(frozen=True, eq=False)
class ArmGeometry:
    """The geometry of an arm's runs, or of one checkpoint."""

    label: str
    place: int
    """Among the arms of the target: what it looks like in figures."""
    runs: tuple[RunGeometry, ...]

    def mean(self, metric: str) -> Mean:
        """Return the mean of a metric over the runs, with its range."""
        found = [measure for run in self.runs if (measure := run.measures.get(metric))]
        values = [measure.value for measure in found if measure.value is not None]
        if values:
            return Mean(float(np.mean(values)), min(values), max(values), len(values))
        reasons = [measure.how for measure in found]
        part = metric_name(metric).part
        reasons += [run.absent[part] for run in self.runs if part in run.absent]
        return Mean(None, None, None, 0, "; ".join(dict.fromkeys(reasons)) or "not measured")

    def profile(self, kind: str) -> Profile | None:
        """Return the mean profile of a kind of module over runs; None where no run has it."""
        found = [run.kinds[kind] for run in self.runs if kind in run.kinds]
        return replace(mean_profile(found), modules=found[0].modules) if found else None

    def module_profile(self, module: str) -> Profile | None:
        """Return the smoothed profile of a module, mean over runs; None where no run has it."""
        found = [run.modules[module] for run in self.runs if module in run.modules]
        return mean_profile(found) if found else None

    def depth(self, quantity: str, part: str = "spectra", prompts: str = "") -> dict[str, dict[int, float]]:
        """Return kind of module to block to the mean of a quantity over the runs and modules that have it."""
        found: dict[str, dict[int, list[float]]] = {}
        for run in self.runs:
            record = run.records.get(part)
            for row in record.rows if record else ():
                value = row.values.get(quantity)
                if value is not None and row.block is not None and row.prompts == prompts:
                    found.setdefault(kind_of(row.module), {}).setdefault(row.block, []).append(value)
        return {
            kind: {block: float(np.mean(values)) for block, values in sorted(blocks.items())}
            for kind, blocks in found.items()
        }


@dataclass(frozen=True, eq=False)
class TargetGeometry:
    """The geometry of all arms of one target, or of some checkpoints."""

    arms: tuple[ArmGeometry, ...]
    correlations: tuple[Correlation, ...] = ()
    gain_unit: str = ""

    @property
    def runs(self) -> tuple[RunGeometry, ...]:
        """Every run with a record."""
        return tuple(run for arm in self.arms for run in arm.runs if run.records)

    @property
    def parts(self) -> tuple[str, ...]:
        """What was measured of any run."""
        return tuple(part for part in PARTS if any(part in run.records for run in self.runs))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that some run has a number of, the main ones first."""
        found = dict.fromkeys(
            name for run in self.runs for name, measure in run.measures.items() if measure.value is not None
        )
        return tuple(dict.fromkeys([*(name for name in MAIN if name in found), *found]))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of module that some run has profiles of."""
        return tuple(dict.fromkeys(kind for run in self.runs for kind in run.kinds))

    @property
    def looked_at(self) -> int:
        """How many quantities were correlated with forgetting or with the gain."""
        return len({found.metric for found in self.correlations if found.value is not None})

    def summary(self) -> dict[str, Any]:
        """Return JSON values: every arm's means and every correlation."""
        return {
            "arms": [
                {
                    "label": arm.label,
                    "runs": len([run for run in arm.runs if run.records]),
                    "absent": {part: why for run in arm.runs for part, why in run.absent.items()},
                    "means": {name: asdict(arm.mean(name)) for name in self.metrics},
                }
                for arm in self.arms
            ],
            "correlations": [asdict(found) for found in self.correlations],
            "looked_at": self.looked_at,
        }


def make_run(
    label: str,
    run_id: str,
    seed: int | None,
    records: Iterable[tuple[GeometryRecord, pl.DataFrame | None]],
    absent: Mapping[str, str] | None = None,
    gain: float | None = None,
    forgetting: float | None = None,
) -> RunGeometry:
    """Put the records of one run or checkpoint together; of several of the same part the last counts."""
    found = {record.what: (record, arrays) for record, arrays in records}
    arrays = found["spectra"][1] if "spectra" in found else None
    modules = {} if arrays is None or not arrays.height else module_profiles(arrays)
    return RunGeometry(
        label=label,
        run_id=run_id,
        seed=seed,
        records={part: record for part, (record, _) in found.items()},
        absent=dict(absent or {}),
        kinds=by_kind(modules),
        modules={
            module: profile.smoothed(window_of(profile.directions)).thinned(_POINTS_PER_MODULE)
            for module, profile in modules.items()
        },
        gain=gain,
        forgetting=forgetting,
    )


def read_geometry(
    store: Store, evidence: Evidence, arms: Sequence[ArmEffects]
) -> tuple[TargetGeometry | None, tuple[Gap, ...]]:
    """Read the geometry of all arms of a target at their final points.

    Args:
        store: where the records are.
        evidence: everything else that is known of the study.
        arms: of one target.

    Returns:
        None where the study asks for none or nothing is there yet; and what is missing.
    """
    wanted = evidence.view.geometry
    asked = {_part(key) for arm in arms for run in arm.evidence.runs for key in wanted.get(run.spec.run_id, ())}
    gaps: list[Gap] = []
    found, unit = [], ""
    for place, arm in enumerate(arms):
        known = _outcomes(evidence, arm)
        unit = unit or known.unit
        runs = []
        for run in arm.evidence.runs:
            keys = wanted.get(run.spec.run_id, ())
            records, absent = _records(store.run(run.spec), run, keys, gaps)
            absent.update({part: NOT_APPLICABLE for part in PARTS if part in asked and part not in map(_part, keys)})
            gain, kept = known.gain.get(run.spec.seed), known.retention.get(run.spec.seed)
            forgetting = None if kept is None else -kept
            runs.append(make_run(arm.label, run.spec.run_id, run.spec.seed, records, absent, gain, forgetting))
        found.append(ArmGeometry(arm.label, place, tuple(runs)))
    geometry = TargetGeometry(tuple(found), gain_unit=unit)
    if not geometry.runs:
        return None, tuple(gaps)
    correlations = correlate(points_of(geometry), geometry.metrics)
    return TargetGeometry(geometry.arms, correlations, unit), tuple(gaps)


def points_of(geometry: TargetGeometry) -> list[Point]:
    """Return every trained run as the correlations see it."""
    return [
        Point(
            run.label,
            {name: measure.value for name, measure in run.measures.items() if measure.value is not None},
            run.forgetting,
            run.gain,
        )
        for arm in geometry.arms
        for run in arm.runs
    ]


def _part(key: str) -> str:
    return key.partition("-")[0]


def _records(
    directory: RunDirectory, run: RunEvidence, keys: Sequence[str], gaps: list[Gap]
) -> tuple[list[tuple[GeometryRecord, pl.DataFrame | None]], dict[str, str]]:
    """Read the records of a run's final point; what is not there is a gap, unless the run was never trained."""
    if run.training is None:
        return [], {_part(key): "not trained" for key in keys}
    point = directory.point(run.training.steps)
    records, absent = [], {}
    for key in keys:
        part, what = _part(key), f"geometry {_part(key)}"
        try:
            record = directory.geometry(point, key)
            if record is not None:
                records.append((record, read_profiles(directory.record_path(point, f"geometry-{key}"), record)))
                continue
        except UserError as error:
            absent[part] = str(error)
            gaps.append(Gap(run.who, what, "damaged", str(error)))
            continue
        failure = failures(directory.events()).get(StageId("geometry", key))
        absent[part] = failure or NOT_MEASURED
        gaps.append(Gap(run.who, what, "failed" if failure else "missing", absent[part]))
    return records, absent


class _Outcomes(NamedTuple):
    gain: dict[int, float]
    retention: dict[int, float]
    """Mean over the retention tasks that are fractions, in points: the report's mean, of one seed."""
    unit: str
    """Of the gain."""


def _outcomes(evidence: Evidence, arm: ArmEffects) -> _Outcomes:
    """Return gain and mean retention of every seed, by the same contrasts as the arm's own."""
    target = arm.evidence.arm.target.id
    task, mine, base = evidence.tasks.get(target), arm.evidence.scores.get(target), evidence.base_scores.get(target)
    gain = None if task is None or mine is None or base is None else oriented(task, mine, base)
    kept = None if arm.mean is None else retention_contrast(evidence, arm.evidence, None)
    gains, means = (({} if found is None else found.by_seed()) for found in (gain, kept))
    return _Outcomes(gains, means, "" if task is None else unit_of(task))
