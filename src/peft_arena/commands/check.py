"""Check that what is on disk is sound: study files, runs, checkpoints, records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_arena.core.bounded import present
from peft_arena.core.errors import UserError
from peft_arena.core.parts import SUFFIX, abandoned_below
from peft_arena.core.text import shown
from peft_arena.store.checkpoint import HASHES, verify_checkpoint
from peft_arena.store.files import broken_lines, read_json
from peft_arena.store.geometry import read_profiles
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
from peft_arena.store.store import RunDirectory, check_place
from peft_arena.study.read_study import read_study
from peft_arena.tasks.recorded import check_task
from peft_arena.weights.start import init_of, source_of
from peft_arena.weights.tuned import name_of

RUN = "run.json"
_RUN_ID = re.compile(r"-[0-9a-f]{12}$")
KINDS: dict[str, type[Record]] = {
    "run": RunRecord,
    "training": TrainingRecord,
    "cost": CostRecord,
    "evaluation": EvaluationRecord,
    "geometry": GeometryRecord,
    "path": PathRecord,
}


def check_path(path: Path) -> dict[str, Any]:
    """Check one file or directory, whatever it is.

    Returns:
        What was checked and how many of each.

    Raises:
        UserError: something is damaged; every problem is named.
    """
    if path.suffix in {".yaml", ".yml"}:
        study = read_study(path)
        return {"checked": str(path), "study": study.file.name, "runs": len(study.runs())}
    if path.suffix == ".json":
        return {"checked": str(path), "record": _check_record(path)}
    if not path.is_dir():
        raise UserError(f"cannot check {path}: give a study file, a record, a checkpoint, a run or a runs directory")
    if (path / HASHES).exists():
        verify_checkpoint(path)
        run = path.absolute().parents[1]
        start = _start(run / "run.json") if (run / "run.json").is_file() else None
        return {"checked": str(path), "checkpoints": 1} | ({} if start is None else {"begins_at": start})
    return _check_tree(path)


def _check_tree(path: Path) -> dict[str, Any]:
    records = [file for file in sorted(path.rglob("*.json")) if _is_record(file, path)]
    checkpoints = sorted(file.parent for file in path.rglob(HASHES) if not _is_unfinished(file, path))
    if not records and not checkpoints:
        raise UserError(f"cannot check {path}: it holds no records and no checkpoints")
    jobs: list[Callable[[], object]] = [lambda file=file: _check_record(file) for file in records]  # type: ignore[misc]
    checkpoints = sorted({*checkpoints, *_promised(path)})
    jobs += [lambda folder=folder: verify_checkpoint(folder) for folder in checkpoints]  # type: ignore[misc]
    jobs += [lambda file=file: _start(file) for file in records if file.name == RUN]  # type: ignore[misc]
    jobs += [lambda file=file: _check_log(file) for file in records if file.name == RUN]  # type: ignore[misc]
    problems = [problem for job in jobs if (problem := _problem(job))]
    if problems:
        unique = list(dict.fromkeys(problems))
        raise UserError(f"{len(unique)} of {len(jobs)} damaged: " + "; ".join(unique))
    left = [str(part.relative_to(path)) for part in abandoned_below(path)]
    found: dict[str, Any] = {"checked": str(path), "records": len(records), "checkpoints": len(checkpoints)}
    if nameless := _without_run(records, path):
        found["without_run_json"] = nameless
    return found | ({"left_by_killed_writers": left} if left else {})


def _start(file: Path) -> str | None:
    """Return what a run begins at, if not at the pretrained model; without it no checkpoint of the run can be used.

    Raises:
        UserError: it is not there, or damaged.
    """
    run = RunDirectory(file.absolute().parent, read_record(RunRecord, file).spec)
    if init_of(run.spec) is None or not run.steps():
        return None
    source = source_of(run)
    return None if source is None else name_of(source)


def _promised(path: Path) -> list[Path]:
    """Return the checkpoints that the training records below a directory say are there."""
    found: list[Path] = []
    for file in path.rglob("records/training.json"):
        try:
            training = read_record(TrainingRecord, file)
        except UserError:
            continue  # named as damaged among the records
        found += [file.parents[1] / "steps" / f"{step:06d}" for step in training.save_points]
    return found


def _without_run(records: Sequence[Path], root: Path) -> list[str]:
    """Return the directories below one that hold records or events of a run, and not what the run is."""
    homes = {up.parent for file in records for up in file.parents if up.name == "records" and up.is_relative_to(root)}
    homes |= {file.parent for file in root.rglob("events.jsonl")}
    return sorted(str(home) for home in homes if not present(home / RUN))


def _is_unfinished(file: Path, root: Path) -> bool:
    return any(name.endswith(SUFFIX) for name in file.relative_to(root).parts)


def _is_record(file: Path, root: Path) -> bool:
    inside = file.relative_to(root).parts
    named = file.name == RUN or "records" in (root.name, *inside[:-1])
    return named and not _is_unfinished(file, root)


def _check_record(file: Path) -> str:
    data = read_json(file)
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        told = shown(repr(kind), 60)
        raise UserError(f"{shown(file)} is not a record: its kind is {told}. Known: {', '.join(sorted(KINDS))}")
    record = read_record(KINDS[kind], file)
    run = _run_of(file)
    if run is not None:
        check_place(record, file, run)
        check_spec(record, file, run.spec)
    if isinstance(record, EvaluationRecord):
        check_task(record, file)
    if isinstance(record, TrainingRecord) and record.steps and not record.log:
        raise UserError(f"{shown(file)} contradicts itself: log: must hold at least the last step, got none")
    if isinstance(record, GeometryRecord):
        read_profiles(file, record)
    return kind


def _run_of(file: Path) -> RunDirectory | None:
    """Return the run that a record lies in; None for one that lies in none, or in one whose own record is damaged.

    Raises:
        UserError: the directory is named like another run.
    """
    place = file.absolute()
    home = (
        place.parent if place.name == RUN else next((up.parent for up in place.parents if up.name == "records"), None)
    )
    if home is None or not present(home / RUN):
        return None
    try:
        run = RunDirectory(home, read_record(RunRecord, home / RUN).spec)
    except UserError:
        return None  # named as damaged by itself
    if place.name == RUN and _RUN_ID.search(home.name) and home.name != run.run_id:
        raise UserError(f"{file} is out of place: it is the record of {run.run_id}; move it away to have it made anew")
    return run


def _check_log(file: Path) -> None:
    """Check that the log of a run's events can be read.

    Raises:
        UserError: something else has its name, or a line holds what no killed writer leaves.
    """
    log = file.parent / "events.jsonl"
    if broken := broken_lines(log):
        listed = ", ".join(map(str, broken[:8])) + (" ..." if len(broken) > 8 else "")
        raise UserError(
            f"{log} is damaged: no JSON object in line {listed}; remove {'it' if len(broken) == 1 else 'them'}"
        )


def _problem(job: Callable[[], object]) -> str:
    try:
        job()
    except UserError as error:
        return str(error)
    return ""
