"""Reading tables that people export: JSON lines, JSON, CSV and Parquet. Every mistake has its file and row."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_arena.core.errors import UserError, unknown

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
_SEPARATORS = ",;\t"
"""What may stand between the columns of a CSV file; the one that its first line holds most often does."""
_FIELD_CHARACTERS = 1 << 30
"""The csv module's own limit of a field is shorter than some documents."""


class Rows(NamedTuple):
    """The rows of one source and how to name them in messages."""

    source: str
    rows: Sequence[Any]
    first: int
    """Number of the first row: lines of a text file count from 1, rows of a table from 0."""
    lines: tuple[int, ...] = ()
    """Line of each row, where rows are lines and some lines are empty."""

    def numbered(self, columns: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield each row with its place, after checking that it has the columns.

        Raises:
            UserError: there are no rows, or a row is no table row or lacks a column.
        """
        if not self.rows:
            raise UserError(f"{self.source} holds no rows")
        for number, row in enumerate(self.rows):
            place = self.place(number)
            if not isinstance(row, dict):
                raise UserError(f"{place}: must be an object with named columns, got {type(row).__name__}")
            for column in columns.values():
                if column not in row:
                    raise unknown("column", column, map(str, row), where=place)
            yield row, place

    def place(self, number: int) -> str:
        """Return file and row of the row with a number, counted from 0 here."""
        return f"{self.source} row {self.lines[number] if self.lines else self.first + number}"


def find_files(path: Path, named: Mapping[str, str]) -> dict[str, Path]:
    """Return the file of each split; under the empty name the one file that is to be divided.

    Args:
        path: one file, or the folder of the named files.
        named: split to file name; empty where the one file is divided by shares.

    Raises:
        UserError: a file is missing, or of a kind that cannot be read.
    """
    if named and not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise UserError(f"splits name files, so path must be their folder; '{path}' {state}")
    found = {split: path / name for split, name in named.items()} or {"": path}
    for file in found.values():
        if not file.is_file():
            state = "is a folder: name a file, or name a file for each split" if file.is_dir() else "does not exist"
            raise UserError(f"data file '{file}' {state}")
        if file.suffix not in SUFFIXES:
            raise UserError(f"data file '{file}' must end in {', '.join(SUFFIXES)}, got '{file.suffix}'")
    return found


def sha256_of(files: Mapping[str, Path]) -> str:
    """Return a hash of the files' contents and of the splits they stand for; a single file's is its plain SHA-256."""
    hashes = {split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in files.items()}
    if list(hashes) == [""]:
        return hashes[""]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_rows(path: Path) -> Rows:
    """Return the rows of a file.

    A ``.json`` file is a list of rows, or an object that holds one list and nothing else that is a list. The first line
    of a ``.csv`` file names the columns, and all its values are texts.

    Raises:
        UserError: the file cannot be read; the message gives the line where there are lines.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
    if path.suffix == ".json":
        return _json(path, text)
    if path.suffix == ".csv":
        return _csv(path, text)
    lines = text.split("\n")
    numbers = tuple(number for number, line in enumerate(lines, start=1) if line.strip())
    return Rows(str(path), [_parsed(lines[number - 1], f"{path} row {number}") for number in numbers], 1, numbers)


def _parquet(path: Path) -> Rows:
    import polars
    from polars.exceptions import PolarsError

    try:
        return Rows(str(path), polars.read_parquet(path).to_dicts(), first=0)
    except (PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _json(path: Path, text: str) -> Rows:
    found = _parsed(text, str(path))
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(
                f"{path} must be a list of rows, or an object that holds one list of rows; it is an object with "
                f"{len(lists)} lists among {', '.join(map(str, found)) or 'no keys'}"
            )
        found = lists[0]
    if not isinstance(found, list):
        raise UserError(f"{path} must be a list of rows, got {type(found).__name__}")
    return Rows(str(path), found, first=0)


def _csv(path: Path, text: str) -> Rows:
    head = text.split("\n", 1)[0]
    separator = max(_SEPARATORS, key=head.count)
    csv.field_size_limit(_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    names: list[str] = []
    begins = 1
    try:
        for cells in reader:
            if not names:
                names = _header(path, cells)
            elif cells:
                if len(cells) != len(names):
                    raise UserError(f"{path} row {begins}: has {len(cells)} columns, and the first line {len(names)}")
                rows.append(dict(zip(names, cells, strict=True)))
                lines.append(begins)
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} row {begins} is not CSV: {error}") from error
    return Rows(str(path), rows, 2, tuple(lines))


def _header(path: Path, names: Sequence[str]) -> list[str]:
    plain = [name.strip() for name in names]
    if not all(plain) or len(set(plain)) < len(plain):
        raise UserError(f"{path}: the first line must name every column once, got {', '.join(names)[:200]!r}")
    return plain


def _parsed(text: str, place: str) -> object:
    try:
        found: object = json.loads(text)
        return found
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from error
