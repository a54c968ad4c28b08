"""The runs directory: every record keyed by (run, step, factor, what)."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from peft_arena.core.bounded import present
from peft_arena.core.errors import UserError
from peft_arena.core.parts import sweep
from peft_arena.core.paths import ScanSpec
from peft_arena.core.provenance import provenance
from peft_arena.core.specs import OWN, EvalSpec, PathSpec, Point, RunSpec
from peft_arena.core.text import shown
from peft_arena.store.checkpoint import DONE
from peft_arena.store.files import append_line, read_lines, write_once
from peft_arena.store.geometry import write_geometry
from peft_arena.store.of_run import check_spec
from peft_arena.store.reading import read_record
from peft_arena.store.records import (
    CostRecord,
    EvaluationRecord,
    GeometryRecord,
    PathRecord,
    Record,
    RunRecord,
    TrainingRecord,
)

if TYPE_CHECKING:
    import polars as pl

R = TypeVar("R", bound=Record)
LOCK_WAIT_S = 600.0


class RunDirectory:
    """One run on disk. Code reads ``run.json``; the directory's name is for people."""

    def __init__(self, path: Path, spec: RunSpec) -> None:
        """Refer to a run; creates nothing."""
        self.path = path
        self.spec = spec
        self.run_id = spec.run_id

    def create(self) -> None:
        """Make the directory and ``run.json`` unless they exist.

        Raises:
            UserError: an existing ``run.json`` describes another run.
        """
        self._make()
        record = RunRecord(spec=self.spec, created=_now(), provenance=provenance())
        try:
            write_once(self.path / "run.json", record.model_dump(mode="json"))
        except FileExistsError:
            found = read_record(RunRecord, self.path / "run.json").spec
            if found.id != self.spec.id:
                raise UserError(f"{self.path} holds run {found.run_id}, not {self.run_id}") from None

    def record(self) -> RunRecord | None:
        """Return ``run.json``, None if there is none yet."""
        return self._read(RunRecord, self.path / "run.json")

    def _read(self, kind: type[R], path: Path) -> R | None:
        """Return a record of this run, None if it is not done.

        Raises:
            UserError: it is damaged, of another run or point, or says what the run's spec excludes.
        """
        if not present(path):
            return None
        record = read_record(kind, path)
        check_place(record, path, self)
        check_spec(record, path, self.spec)
        return record

    def _found(self, kind: type[R], path: Path) -> R:
        """Return a record of this run that is there."""
        record = self._read(kind, path)
        assert record is not None, "the directory lists it"
        return record

    def lock(self) -> FileLock:
        """Return the lock that a process holds while it works on this run; freed by the system if it dies."""
        self._make()
        file = self.path / ".lock"
        if present(file) and not file.is_file():
            raise UserError(f"{file} is no file: move it away, a lock is kept there")
        return FileLock(file)

    @contextmanager
    def held(self, wait_s: float) -> Iterator[None]:
        """Hold the lock inside the block; what killed writers left of the run is removed before.

        Raises:
            Timeout: another process holds it for so long.
        """
        with self.lock().acquire(timeout=wait_s):
            sweep(self.path)
            yield

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """Hold the lock inside the block, after waiting for another process that does.

        Raises:
            UserError: it holds the lock for more than ten minutes.
        """
        try:
            with self.held(LOCK_WAIT_S):
                yield
        except Timeout:
            told = f"another process has held run {self.run_id} for {LOCK_WAIT_S:.0f} s; try again later"
            raise UserError(told) from None

    @property
    def store(self) -> Store:
        """The runs directory that this run is in."""
        return Store(self.path.parent)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the directory {self.path}: {error.strerror or error}") from error

    def is_locked(self) -> bool:
        """Say whether another process works on this run now."""
        if not (self.path / ".lock").is_file():
            return False
        lock = self.lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def event(self, name: str, **fields: Any) -> None:
        """Append one line to ``events.jsonl``."""
        append_line(self.path / "events.jsonl", {"event": name, "time": _now(), **fields})

    def events(self) -> list[dict[str, Any]]:
        """Return every whole line of ``events.jsonl``, oldest first; none if it cannot be read."""
        try:
            return self.event_log()
        except UserError:
            return []

    def event_log(self) -> list[dict[str, Any]]:
        """Return every whole line of ``events.jsonl``, oldest first.

        Raises:
            UserError: something else than a file has its name, or it is too long.
        """
        return read_lines(self.path / "events.jsonl")

    def steps(self) -> list[int]:
        """Return the steps that have a whole checkpoint, ascending."""
        found = (self.path / "steps").glob(f"*/{DONE}")
        return sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())

    def checkpoint(self, step: int) -> Path:
        """Return the directory of the checkpoint at a step."""
        return self.path / "steps" / f"{step:06d}"

    def record_path(self, point: Point, what: str) -> Path:
        """Return where the record ``what`` of a point is."""
        return self.path / "records" / point.key / f"{what}.json"

    def point(self, step: int, factor: float = 1.0, path: PathSpec = OWN) -> Point:
        """Return a point of this run; the tuned model is the same point on every uniform path."""
        if factor == 1.0 and path.rule == OWN.rule:
            path = OWN
        return Point(run_id=self.run_id, step=step, factor=factor, path=path)

    def training(self) -> TrainingRecord | None:
        """Return the training record, None if training has not finished."""
        return self._read(TrainingRecord, self.path / "records" / "training.json")

    def write_training(self, record: TrainingRecord) -> None:
        """Write the training record: from then on the run counts as trained."""
        write_once(self.path / "records" / "training.json", record.model_dump(mode="json"))

    def final_point(self) -> Point | None:
        """Return the point a run is judged by: the last step; None while it is not trained."""
        if self.spec.is_base:
            return self.point(0)
        training = self.training()
        return None if training is None else self.point(training.steps)

    def evaluation(self, point: Point, spec: EvalSpec) -> EvaluationRecord | None:
        """Return the evaluation of a point, None if it is not done."""
        path = self.record_path(point, f"eval-{spec.key}")
        record = self._read(EvaluationRecord, path)
        if record is not None and record.spec != spec:
            raise UserError(f"{path} is out of place: it holds {record.spec.task.name} with other settings")
        return record

    def write_evaluation(self, point: Point, record: EvaluationRecord) -> None:
        """Write an evaluation."""
        write_once(self.record_path(point, f"eval-{record.spec.key}"), record.model_dump(mode="json"))

    def cost(self, stage: str) -> CostRecord | None:
        """Return the cost record of ``training`` or ``inference``, None if it is not done."""
        return self._read(CostRecord, self.path / "records" / f"cost-{stage}.json")

    def write_cost(self, record: CostRecord) -> None:
        """Write a cost record."""
        write_once(self.path / "records" / f"cost-{record.stage}.json", record.model_dump(mode="json"))

    def generation_cost(self, point: Point, key: str) -> CostRecord | None:
        """Return the generation benchmark of a point by the key of its settings, None if it is not done."""
        return self._read(CostRecord, self.record_path(point, f"cost-{key}"))

    def write_generation_cost(self, point: Point, key: str, record: CostRecord) -> None:
        """Write a generation benchmark."""
        write_once(self.record_path(point, f"cost-{key}"), record.model_dump(mode="json"))

    def geometry(self, point: Point, key: str) -> GeometryRecord | None:
        """Return the geometry of a point by the key of its spec, None if it is not done."""
        return self._read(GeometryRecord, self.record_path(point, f"geometry-{key}"))

    def write_geometry(self, point: Point, key: str, record: GeometryRecord, arrays: pl.DataFrame | None) -> None:
        """Write a geometry record, its profiles before it."""
        write_geometry(self.record_path(point, f"geometry-{key}"), record, arrays)

    def geometries(self) -> Iterator[tuple[GeometryRecord, Path]]:
        """Yield every geometry record of the run and its path, in a fixed order; see :func:`read_profiles`."""
        for path in sorted((self.path / "records").glob("*/geometry-*.json")):
            yield self._found(GeometryRecord, path), path

    def scan(self, point: Point, spec: ScanSpec) -> PathRecord | None:
        """Return the scan of a path back from a point, None if it is not done."""
        path = self.record_path(point, spec.key)
        record = self._read(PathRecord, path)
        if record is not None and record.spec != spec:
            raise UserError(f"{path} is out of place: it holds a scan with other settings")
        return record

    def write_scan(self, point: Point, record: PathRecord) -> None:
        """Write a scan, after every evaluation it rests on."""
        write_once(self.record_path(point, record.spec.key), record.model_dump(mode="json"))

    def scans(self, path: PathSpec | None = None) -> Iterator[PathRecord]:
        """Yield every scan of the run, or those of one path, in a fixed order."""
        name = "*" if path is None else f"{path.readable}-*"
        for file in sorted((self.path / "records").glob(f"*/path-{name}.json")):
            record = self._found(PathRecord, file)
            if path is None or record.spec.path == path:
                yield record

    def evaluations(self) -> Iterator[EvaluationRecord]:
        """Yield every evaluation of the run, in a fixed order."""
        for path in sorted((self.path / "records").glob("*/eval-*.json")):
            yield self._found(EvaluationRecord, path)


class Store:
    """A directory of runs."""

    def __init__(self, root: Path) -> None:
        """Refer to a runs directory; creates nothing.

        Raises:
            UserError: the path is something else than a directory.
        """
        self.root = root
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is not a directory; --runs names the directory that runs are kept in")

    def check_writable(self) -> None:
        """Make the directory if need be.

        Raises:
            UserError: it cannot be made or written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise UserError(f"cannot write to {self.root}: {error.strerror or error}") from None

    def run(self, spec: RunSpec) -> RunDirectory:
        """Return the directory of a run, whether or not it exists yet."""
        return RunDirectory(self.root / spec.run_id, spec)

    def runs(self) -> Iterator[RunDirectory]:
        """Yield every run that has a ``run.json``, by name.

        Raises:
            UserError: a ``run.json`` is damaged.
        """
        for path in sorted(self.root.glob("*/run.json")):
            yield RunDirectory(path.parent, read_record(RunRecord, path).spec)

    def find(self, run_id: str) -> RunDirectory:
        """Return the run of that id, or of a unique beginning or hash of one.

        Raises:
            UserError: no run or several runs fit, or the one that fits is damaged.
        """
        runs = []
        for path in sorted(self.root.glob("*/run.json")):
            try:
                runs.append(RunDirectory(path.parent, read_record(RunRecord, path).spec))
            except UserError:
                if path.parent.name.startswith(run_id) or path.parent.name.endswith(f"-{run_id}"):
                    raise
        found = [run for run in runs if run_id == run.run_id]
        found = found or [run for run in runs if run.run_id.startswith(run_id) or run.spec.id == run_id]
        if len(found) == 1:
            return found[0]
        names = ", ".join(run.run_id for run in found or runs) or "none"
        problem = "several runs fit" if found else "no run"
        raise UserError(f"{problem} '{run_id}' in {self.root}. Known: {names}")


def check_place(record: Record, path: Path, run: RunDirectory) -> None:
    """Refuse a record of another run or point than the file it stands in says.

    Args:
        record: what was read.
        path: of the file, inside the run's directory.
        run: whose directory it is.

    Raises:
        UserError: it is out of place.
    """
    owner, place = _of_whom(record, path, run)
    wrong = f"it holds the {record.kind} record of {shown(owner)}" if owner != run.run_id else ""  # type: ignore[attr-defined]
    if not wrong and place is not None and path.absolute() != place.absolute():
        wrong = f"what it holds belongs into {place.relative_to(run.path)}"
    if wrong:
        raise UserError(f"{path} is out of place: {wrong}; move it away to have it made anew")


def _of_whom(record: Record, path: Path, run: RunDirectory) -> tuple[str, Path | None]:
    """Return the run that a record says it is of, and where it has to lie; None where its content does not say it."""
    records = run.path / "records"
    if isinstance(record, RunRecord):
        return record.spec.run_id, run.path / "run.json"
    if isinstance(record, TrainingRecord):
        return record.run_id, records / "training.json"
    if isinstance(record, CostRecord):
        return record.run_id, records / f"cost-{record.stage}.json" if record.step is None else None
    if isinstance(record, EvaluationRecord):
        point = run.point(record.step, record.factor, record.path)
        return record.run_id, run.record_path(point, f"eval-{record.spec.key}")
    if isinstance(record, PathRecord):
        return record.run_id, run.record_path(run.point(record.step), record.spec.key)
    if isinstance(record, GeometryRecord):
        # its settings are free, and so is the rest of its name
        point = run.point(0 if record.step is None else record.step, record.factor)
        rest = path.stem.removeprefix(f"geometry-{record.what}-") if path.name.startswith("geometry-") else ""
        return record.subject, run.record_path(point, f"geometry-{record.what}-{rest}")
    raise AssertionError(f"{type(record).__name__} is not a record of a run")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
