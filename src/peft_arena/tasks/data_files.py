"""Reading tables that people export: JSON lines, JSON, CSV and Parquet. Every mistake has its file and row."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_arena.core.bounded import DATA_BYTES, deeper, opened, parse_json, read_bytes
from peft_arena.core.errors import UserError, unknown
from peft_arena.core.foreign import reading
from peft_arena.core.ids import file_hash

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
_SEPARATORS = ",;\t"
"""What may stand between the columns of a CSV file; the one that its first line holds most often does."""
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_PARQUET, _SHORTEST_PARQUET = b"PAR1", 12
_DEEPEST = 200
_FIELD_CHARACTERS = 1 << 30
"""The csv module's own limit of a field is shorter than some documents."""


class RowError(Exception):
    """Why a row cannot be used; ``what`` is the same for rows with one fault, the text also says what was given."""

    def __init__(self, what: str, given: object = "", why: object = "") -> None:
        """Keep what is wrong, and show what was given, or why it is wrong, in one line of bounded length."""
        shown = f": {short(why)}" if why != "" else f", got {short(given)}" if given != "" else ""
        super().__init__(f"{what}{shown}")
        self.what = what


def short(value: object) -> str:
    """Return a value in one line of bounded length, without half characters."""
    return " ".join(str(value).split())[:80].encode("utf-8", "backslashreplace").decode()


class Rows(NamedTuple):
    """The rows of one source and how to name them in messages."""

    source: str
    rows: Sequence[Any]
    """Of a line that cannot be read the :class:`RowError`."""
    first: int
    """Number of the first row: lines of a text file count from 1, rows of a table from 0."""
    lines: tuple[int, ...] = ()
    """Line of each row, where rows are lines and some lines are empty."""

    def numbered(self, columns: Iterable[str]) -> Iterator[tuple[dict[str, Any] | RowError, str]]:
        """Yield each row with its place; instead of one that is no object or lacks a column, why it cannot be used.

        Args:
            columns: names of the columns that every row must have.

        Raises:
            UserError: there are no rows.
        """
        if not self.rows:
            raise UserError(f"{self.source} holds no rows")
        for number, row in enumerate(self.rows):
            yield _whole(row, columns), self.place(number)

    def read(self) -> list[dict[str, Any]]:
        """Return the rows.

        Raises:
            UserError: one cannot be read, or is no object; with its place.
        """
        found = []
        for row, place in self.numbered(()) if self.rows else ():
            if isinstance(row, RowError):
                raise UserError(f"{place}: {row}")
            found.append(row)
        return found

    def place(self, number: int) -> str:
        """Return file and row of the row with a number, counted from 0 here."""
        return f"{self.source} row {self.lines[number] if self.lines else self.first + number}"


def _whole(row: object, columns: Iterable[str]) -> dict[str, Any] | RowError:
    if isinstance(row, RowError):
        return row
    if not isinstance(row, dict):
        return RowError("must be an object with named columns", f"{type(row).__name__} {row}")
    missing = next((column for column in columns if column not in row), None)
    if missing is None:
        return row
    return RowError(str(unknown("column", missing, map(str, row))))


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
            looked = "" if file.is_absolute() or file.exists() else f" in {Path.cwd()}"
            raise UserError(f"data file '{file}' {state}{looked}")
        if file.suffix not in SUFFIXES:
            raise UserError(f"data file '{file}' must end in {', '.join(SUFFIXES)}, got '{file.suffix}'")
    return found


def sha256_of(files: Mapping[str, Path]) -> str:
    """Return a hash of the files' contents and of the splits they stand for; a single file's is its plain SHA-256."""
    hashes = {split: file_hash(path, DATA_BYTES) for split, path in files.items()}
    if list(hashes) == [""]:
        return hashes[""]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_rows(path: Path) -> Rows:
    """Return the rows of a file.

    A ``.json`` file is a list of rows, or an object that holds one list and nothing else that is a list. The first line
    of a ``.csv`` file names the columns, and all its values are texts.

    Raises:
        UserError: the file cannot be read as a whole. A line of a ``.jsonl`` file that cannot is a row that says why.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    try:
        text = read_bytes(path, DATA_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
    if path.suffix == ".json":
        return _json(path, text)
    if path.suffix == ".csv":
        return _csv(path, text)
    lines = text.split("\n")
    numbers = tuple(number for number, line in enumerate(lines, start=1) if line.strip())
    return Rows(str(path), [_line(lines[number - 1]) for number in numbers], 1, numbers)


def _line(text: str) -> object:
    try:
        return _parsed(text)
    except ValueError as error:
        return RowError("is not JSON", why=error)


def _parquet(path: Path) -> Rows:
    import polars

    _parquet_ends(path)
    with reading(f"{path} cannot be read as Parquet"):
        return Rows(str(path), polars.read_parquet(path).to_dicts(), first=0)


def _parquet_ends(path: Path) -> None:
    """Refuse what is no Parquet file by its first and last bytes: polars panics over some of them."""
    with opened(path) as handle:
        first = handle.read(len(_PARQUET))
        size = handle.seek(0, 2)
        handle.seek(max(0, size - len(_PARQUET)))
        last = handle.read(len(_PARQUET))
    if size < _SHORTEST_PARQUET or first != _PARQUET or last != _PARQUET:
        raise UserError(f"{path} cannot be read as Parquet: it does not begin and end as such a file does")


def _json(path: Path, text: str) -> Rows:
    try:
        found = _parsed(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
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
    head = _QUOTED.sub("", text.split("\n", 1)[0])
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


def _parsed(text: str) -> object:
    """Return what JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested too deep.
    """
    found: object = parse_json(text, finite=False)
    if deeper(found, _DEEPEST):
        raise ValueError("nested too deep")
    return found
