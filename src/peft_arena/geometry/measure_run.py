"""Measuring geometry: of a run of a study, or of any checkpoints that a command names."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.geometry import DriftSpec, GeometrySpec, SpectraSpec
from peft_arena.core.provenance import provenance
from peft_arena.core.specs import Point
from peft_arena.store.records import GeometryRecord
from peft_arena.store.store import RunDirectory
from peft_arena.weights.start import tuned_run

if TYPE_CHECKING:
    from peft_arena.geometry.measured import Measured, Progress
    from peft_arena.weights.tuned import Tuned

NO_CACHE = "none"


def measure_run(run: RunDirectory, point: Point, spec: GeometrySpec, progress: Progress) -> None:
    """Measure one part of the geometry of a run's point and write its record.

    Raises:
        UserError: the checkpoint is damaged, or a setting does not fit the model.
    """
    tuned = tuned_run(run, point.step)
    parts = run.path / "records" / point.key / f".parts-{spec.key}"
    (found,) = measure([tuned], spec, parts=parts, progress=progress)
    run.write_geometry(point, spec.key, record_of(tuned, spec, found), found.arrays)
    shutil.rmtree(parts, ignore_errors=True)


def measure(
    tuned: Sequence[Tuned],
    spec: GeometrySpec,
    *,
    parts: Path | None,
    progress: Progress,
    cache: Path | None = None,
) -> list[Measured]:
    """Measure one part of the geometry of several points of the same model.

    Args:
        tuned: the points.
        spec: what to measure.
        parts: where finished modules are kept until all are done; None for nowhere.
        progress: called with the fraction that is done and what is being done.
        cache: where decompositions of pretrained weights are kept; None for the usual place.

    Raises:
        UserError: a setting does not fit the model, or a point has no weights of its own.
    """
    if isinstance(spec, SpectraSpec):
        from peft_arena.geometry.measure_spectra import measure_spectra
        from peft_arena.weights.svd import SvdCache, default_root

        root = None if cache == Path(NO_CACHE) else cache or default_root()
        return measure_spectra(tuned, spec, cache=SvdCache(root), parts=parts, progress=progress)
    if isinstance(spec, DriftSpec):
        from peft_arena.geometry.measure_drift import measure_drift

        return measure_drift(tuned, spec, parts=parts, progress=progress)
    from peft_arena.geometry.measure_activations import measure_activations

    return measure_activations(tuned, spec, parts=parts, progress=progress)


def record_of(tuned: Tuned, spec: GeometrySpec, found: Measured) -> GeometryRecord:
    """Return the record of what was measured at a point."""
    return GeometryRecord(
        subject=tuned.subject,
        step=tuned.step,
        base=tuned.base,
        factor=tuned.factor,
        spec=spec.model_dump(mode="json"),
        summary=found.summary,
        rows=found.rows,
        provenance=provenance(),
    )
