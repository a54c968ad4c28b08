"""Geometry on disk: a JSON record, and beside it the profiles as a Parquet file that the record names and hashes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.bounded import DATA_BYTES, present
from peft_arena.core.errors import UserError
from peft_arena.core.foreign import reading
from peft_arena.core.ids import file_hash
from peft_arena.core.parts import unfinished
from peft_arena.store.files import write_once
from peft_arena.store.records import GeometryRecord

if TYPE_CHECKING:
    import polars as pl


def write_geometry(path: Path, record: GeometryRecord, arrays: pl.DataFrame | None) -> None:
    """Write a geometry record, and before it the file of its profiles; a crash leaves at most that file.

    Args:
        path: of the record; the profiles get the same name with another suffix.
        record: what was measured; which file holds the profiles is filled in.
        arrays: the profiles, None for none.

    Raises:
        FileExistsError: the record exists; nothing is ever replaced.
        UserError: the disk refused the write.
    """
    if arrays is not None:
        file = path.with_suffix(".parquet")
        _write_parquet(file, arrays)
        record = record.model_copy(update={"arrays": file.name, "arrays_sha256": file_hash(file)})
    write_once(path, record.model_dump(mode="json"))


def read_profiles(path: Path, record: GeometryRecord) -> pl.DataFrame | None:
    """Return the profiles that belong to a record, None if it has none.

    Args:
        path: of the record.
        record: what it holds.

    Raises:
        UserError: the file is missing, or is not the one that was written.
    """
    import polars as pl

    if record.arrays is None:
        return None
    file = path.with_name(record.arrays)
    if not present(file):
        raise UserError(f"{file} is missing: {path.name} names it; move the record away to have both made anew")
    if file_hash(file, DATA_BYTES) != record.arrays_sha256:
        raise UserError(f"{file} is damaged: it is not what {path.name} says; move both away to have them made anew")
    with reading(f"{file} is damaged: it cannot be read as Parquet"):
        return pl.read_parquet(file)


def _write_parquet(file: Path, arrays: pl.DataFrame) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(file) as part:
            arrays.write_parquet(part)
            with part.open("rb") as handle:
                os.fsync(handle.fileno())
            part.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}; nothing was written") from error
