"""The commands ``peft-arena geometry``: any checkpoints against their pretrained model, without a study."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from peft_arena.commands.find_point import find_point, inside_run
from peft_arena.core.bounded import present, read_table, user_path
from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.geometry import ActivationsSpec, DriftSpec, GeometrySpec, SpectraSpec, What
from peft_arena.core.ids import content_id, file_hash
from peft_arena.core.specs import ModelSpec
from peft_arena.geometry.measure_run import measure, record_of
from peft_arena.methods.files import SETTINGS
from peft_arena.models.folder import check_files, refuse_both
from peft_arena.models.load import pin
from peft_arena.store.geometry import read_profiles, write_geometry
from peft_arena.store.reading import read_record
from peft_arena.store.records import GeometryRecord, RunRecord
from peft_arena.study.geometry_entry import source_of
from peft_arena.study.read_study import task_spec
from peft_arena.weights.start import init_of, tuned_run
from peft_arena.work.order import hush

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.geometry.measured import Progress
    from peft_arena.weights.tuned import Tuned

logger = logging.getLogger(__name__)
KINDS: Mapping[What, type[Any]] = {"spectra": SpectraSpec, "drift": DriftSpec, "activations": ActivationsSpec}
BEGUN = r"[a-z0-9-]+-[0-9a-f]{12}@\d+"
"""What an adapter calls its model if its training began at another run's weights."""
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
    dtype: str | None,
    factor: float,
    cache: Path | None,
    bar: Bar,
) -> list[GeometryRecord]:
    """Measure checkpoints and write a record of each, and figures; what is there is not measured again.

    Args:
        names: ``RUN``, ``RUN@STEP``, or directories with an adapter or a model.
        spec: what to measure.
        out: directory for records and figures.
        runs: the runs directory.
        base: name of the pretrained model; None: that of the runs.
        dtype: type of the pretrained model's weights; None: float32 for directories, and for runs their own.
        factor: how far along each method's path, 1 the trained weights.
        cache: where decompositions of pretrained weights are kept; None for the usual place.
        bar: opens a progress bar.

    Raises:
        UserError: no such checkpoint, another base model, a setting that does not fit, a disk that refuses, or another
            process measures into the same directory.
    """
    from peft_arena.report.geometry import write_geometry_page

    hush()
    if not math.isfinite(factor):
        raise UserError(f"--factor must be a finite number, got {factor}")
    points = [replace(point_named(name, runs, base, dtype), factor=factor) for name in names]
    labels = [_label(point) for point in points]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"--tuned names {twice[0]} more than once")
    bases = {point.base.id: point.base for point in points}
    if len(bases) > 1:
        found = ", ".join(sorted(f"{spec.name} ({spec.dtype}, {spec.revision})" for spec in bases.values()))
        raise UserError(f"checkpoints of one call must have one pretrained model; these have {found}")
    paths = [out / "records" / label / f"geometry-{spec.key}.json" for label in labels]
    with _held(out):
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


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keep other processes from measuring into a directory at the same time: they would share unfinished pieces.

    Raises:
        UserError: one does, the directory cannot be made, or it is inside a run, whose own records it would join.
    """
    place = out.resolve()
    run = next((folder for folder in (place, *place.parents) if (folder / "run.json").is_file()), None)
    if run is not None:
        raise UserError(f"--out {out} is inside the run {run.name}, which keeps its own records; choose another one")
    try:
        (out / "records").mkdir(parents=True, exist_ok=True)
        held = FileLock(out / "records" / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process measures into {out}; repeat the command when it is done") from None
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror or error}") from error
    with held:
        yield


def _everything(out: Path) -> list[tuple[str, GeometryRecord, pl.DataFrame | None]]:
    """Return all records of a directory, of this call and of earlier ones, so that the page shows them together."""
    paths = sorted((out / "records").glob("*/geometry-*.json"))
    labels = shortened([path.parent.name for path in paths])
    found = []
    for path, label in zip(paths, labels, strict=True):
        record = read_record(GeometryRecord, path)
        found.append((label, record, read_profiles(path, record)))
    return found


def shortened(names: Sequence[str]) -> list[str]:
    """Return names without the first and last words, between hyphens, that all of them share."""
    words = [name.split("-") for name in dict.fromkeys(names)]
    if len(words) < 2:
        return list(names)
    first = last = 0
    most = min(map(len, words)) - 1
    while first < most and len({parts[first] for parts in words}) == 1:
        first += 1
    while first + last < most and len({parts[-1 - last] for parts in words}) == 1:
        last += 1
    return ["-".join(name.split("-")[first : len(name.split("-")) - last]) for name in names]


def point_named(name: str, runs: Path, base: str | None, dtype: str | None) -> Tuned:
    """Return the point that a name stands for: a directory with files of weights, or a run.

    A checkpoint that lies in its run and whose training began at another run is taken as the run's.
    """
    from peft_arena.weights.tuned import Tuned

    inside, home = inside_run(name, runs)
    if inside != name:
        record = read_record(RunRecord, home / inside.partition("@")[0] / "run.json")
        if init_of(record.spec) is not None:
            name, runs = inside, home
    directory = user_path(name)
    if any(present(directory / file) for file in (SETTINGS, "config.json")):
        refuse_both(directory)
        check_files(directory)
        if base is None:
            raise UserError(f"{name} is a directory: --base must name the pretrained model it belongs to")
        spec = pin(build(ModelSpec, {"name": base, "dtype": dtype or "float32"}, where="--base"))
        _check_base(directory / SETTINGS, base)
        return Tuned(base=spec, directory=directory, method=None, subject=str(directory), step=None)
    try:
        run, step = find_point(name, runs)
    except UserError as error:
        if directory.is_dir() and not (directory / "run.json").exists():
            raise UserError(
                f"{name} is a directory with neither an adapter (adapter_config.json) nor a model (config.json)"
            ) from error
        raise
    if base is not None and base != run.spec.model.name:
        raise UserError(f"run {run.run_id} was trained from {run.spec.model.name}, and --base is {base}")
    if dtype is not None and dtype != run.spec.model.dtype:
        raise UserError(f"run {run.run_id} was trained in {run.spec.model.dtype}, and --dtype is {dtype}")
    return tuned_run(run, step)


def _check_base(settings: Path, base: str) -> None:
    """Say where an adapter names another model than it is put on: paths differ rightly, models do not.

    Raises:
        UserError: it names another run, at whose weights its training began.
    """
    try:
        named = str(read_table(settings)["base_model_name_or_path"] or base)
        other = Path(named).name.lower() != Path(base).name.lower()
    except (UserError, KeyError):
        return  # a model directory; or damaged settings, which reading the weights will name
    if re.fullmatch(BEGUN, named):
        raise UserError(
            f"{settings.parent} holds an adapter on the weights of run {named}, not on {base}: name the run it is from"
        )
    if other:
        logger.warning("%s says it was trained on %s, and is put on %s", settings, named, base)


def _label(point: Tuned) -> str:
    """Return a name for a point's records: readable, and for directories with a hash of their weights and their base.

    A run's name stands for its base too.
    """
    moved = "" if point.factor == 1 else f"-x{point.factor}"
    if point.step is not None:
        return f"{point.subject}-{point.step:06d}{moved}"
    assert point.directory is not None
    files = sorted(file for file in point.directory.iterdir() if file.suffix in {".safetensors", ".json"})
    content = content_id([point.base.id, {file.name: file_hash(file) for file in files}])
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", point.directory.resolve().name)
    return f"{readable}-{content}{moved}"
