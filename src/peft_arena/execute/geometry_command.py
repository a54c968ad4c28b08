"""The commands ``peft-arena geometry``: any checkpoints against their pretrained model, without a study."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.geometry import ActivationsSpec, DriftSpec, GeometrySpec, SpectraSpec, What
from peft_arena.core.ids import content_id, file_hash
from peft_arena.core.specs import ModelSpec
from peft_arena.execute.geometry import measure, record_of, tuned_run
from peft_arena.execute.geometry_entry import source_of
from peft_arena.execute.points import find_point
from peft_arena.execute.study import task_spec
from peft_arena.execute.work import hush
from peft_arena.models.load import pin
from peft_arena.store.geometry import read_profiles, write_geometry
from peft_arena.store.reading import read_record
from peft_arena.store.records import GeometryRecord

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.geometry.measured import Progress
    from peft_arena.weights.tuned import Tuned

KINDS: Mapping[What, type[Any]] = {"spectra": SpectraSpec, "drift": DriftSpec, "activations": ActivationsSpec}
Bar = Callable[[], AbstractContextManager["Progress"]]


def geometry_spec(
    what: What, settings: Mapping[str, Any], general: Sequence[str] = (), target: Sequence[str] = ()
) -> GeometrySpec:
    """Return what is to be measured.

    Args:
        what: ``spectra``, ``drift`` or ``activations``.
        settings: fields of its spec; None stands for the default.
        general: tasks or files of general prompts.
        target: tasks or files of target prompts.

    Raises:
        UserError: an unknown or impossible setting, prompts that cannot be read, or no prompts where they are needed.
    """
    table = {key: value for key, value in settings.items() if value is not None}
    if what != "spectra":
        for name, sources in (("general", general), ("target", target)):
            if not sources:
                raise UserError(f"geometry {what} needs --{name}: a task, or a txt, jsonl or json file of prompts")
            table[name] = [source_of(text, task_spec).model_dump() for text in sources]
    spec: GeometrySpec = build(KINDS[what], table, where=f"geometry {what}")
    return spec


def measure_points(
    names: Sequence[str],
    spec: GeometrySpec,
    out: Path,
    *,
    runs: Path,
    base: str | None,
    dtype: str,
    factor: float,
    cache: Path | None,
    bar: Bar,
) -> list[GeometryRecord]:
    """Measure checkpoints and write a record of each, tables and figures; what is there is not measured again.

    Args:
        names: ``RUN``, ``RUN@STEP``, or directories with an adapter or a model.
        spec: what to measure.
        out: directory for records and figures.
        runs: the runs directory.
        base: name of the pretrained model; None: that of the runs.
        dtype: type of the pretrained model's weights, for directories.
        factor: how far along each method's path, 1 the trained weights.
        cache: where decompositions of pretrained weights are kept; None for the usual place.
        bar: opens a progress bar.

    Raises:
        UserError: no such checkpoint, another base model, a setting that does not fit, or a disk that refuses.
    """
    from peft_arena.report.geometry import write_geometry_page

    hush()
    points = [replace(_point(name, runs, base, dtype), factor=factor) for name in names]
    labels = [_label(point) for point in points]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"--tuned names {twice[0]} more than once")
    bases = {point.base.id: point.base for point in points}
    if len(bases) > 1:
        found = ", ".join(sorted(f"{spec.name} ({spec.dtype}, {spec.revision})" for spec in bases.values()))
        raise UserError(f"checkpoints of one call must have one pretrained model; these have {found}")
    paths = [out / "records" / label / f"geometry-{spec.key}.json" for label in labels]
    missing = [(point, path) for point, path in zip(points, paths, strict=True) if not path.exists()]
    if missing:
        parts = out / "records" / f".parts-{spec.key}"
        with bar() as progress:
            measured = measure([point for point, _ in missing], spec, parts=parts, progress=progress, cache=cache)
        for (point, path), result in zip(missing, measured, strict=True):
            write_geometry(path, record_of(point, spec, result), result.arrays)
        shutil.rmtree(parts, ignore_errors=True)
    write_geometry_page(_everything(out), out)
    return [read_record(GeometryRecord, path) for path in paths]


def _everything(out: Path) -> list[tuple[str, GeometryRecord, pl.DataFrame | None]]:
    """Return all records of a directory, of this call and of earlier ones, so that the page shows them together."""
    found = []
    for path in sorted((out / "records").glob("*/geometry-*.json")):
        record = read_record(GeometryRecord, path)
        found.append((path.parent.name, record, read_profiles(path, record)))
    return found


def _point(name: str, runs: Path, base: str | None, dtype: str) -> Tuned:
    """Return the point that a name stands for: a directory with files of weights, or a run."""
    from peft_arena.weights.tuned import Tuned

    directory = Path(name).expanduser()
    if any((directory / file).is_file() for file in ("adapter_config.json", "config.json")):
        if base is None:
            raise UserError(f"{name} is a directory: --base must name the pretrained model it belongs to")
        spec = pin(build(ModelSpec, {"name": base, "dtype": dtype}, where="--base"))
        return Tuned(base=spec, directory=directory, method=None, subject=str(directory), step=None)
    run, step = find_point(name, runs)
    if base is not None and base != run.spec.model.name:
        raise UserError(f"run {run.run_id} was trained from {run.spec.model.name}, and --base is {base}")
    return tuned_run(run, step)


def _label(point: Tuned) -> str:
    """Return a name for a point's records: readable, and for directories with a hash of their weights."""
    moved = "" if point.factor == 1 else f"-x{point.factor:g}"
    if point.step is not None:
        return f"{point.subject}-{point.step:06d}{moved}"
    assert point.directory is not None
    files = sorted(file for file in point.directory.iterdir() if file.suffix in {".safetensors", ".json"})
    content = content_id({file.name: file_hash(file) for file in files})
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", point.directory.resolve().name)
    return f"{readable}-{content}{moved}"
