"""Reading the user's own files: every mistake is reported with the file and the row it stands in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_arena.core.errors import UserError, unknown
from peft_arena.tasks.base import Item
from peft_arena.tasks.splits import Keyed, normal_key

SUFFIXES = (".jsonl", ".parquet")
ROLES = ("assistant", "system", "user")


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
            place = f"{self.source} row {self.lines[number] if self.lines else self.first + number}"
            if not isinstance(row, dict):
                raise UserError(f"{place}: must be an object with named columns, got {type(row).__name__}")
            for column in columns.values():
                if column not in row:
                    raise unknown("column", column, map(str, row), where=place)
            yield row, place


class Placed(NamedTuple):
    """An item, the file and row it was read from, and its prompt."""

    keyed: Keyed
    place: str
    prompt: str
    """All of it, as far as it decides what the model is shown."""


def refuse_two_groups(rows: Iterable[Placed]) -> None:
    """Refuse a prompt that stands in two groups, since it might then be in two splits.

    Raises:
        UserError: there is such a prompt; the message says where.
    """
    seen: dict[str, tuple[str, str]] = {}
    for keyed, place, prompt in rows:
        group, first = seen.setdefault(normal_key(prompt), (normal_key(keyed.key), place))
        if group != normal_key(keyed.key):
            raise UserError(
                f"{place}: the prompt also stands in {first} with another group; rows with one prompt need one group, "
                f"got {keyed.key!r} and {group!r}"
            )


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
            raise UserError(f"data file '{file}' must end in {' or '.join(SUFFIXES)}, got '{file.suffix}'")
    return found


def sha256_of(files: Mapping[str, Path]) -> str:
    """Return a hash of the files' contents and of the splits they stand for; a single file's is its plain SHA-256."""
    hashes = {split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in files.items()}
    if list(hashes) == [""]:
        return hashes[""]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_rows(path: Path) -> Rows:
    """Return the rows of a JSON-lines or Parquet file.

    Raises:
        UserError: the file cannot be read; for JSON lines the message gives the line.
    """
    if path.suffix == ".parquet":
        import polars
        from polars.exceptions import PolarsError

        try:
            return Rows(str(path), polars.read_parquet(path).to_dicts(), first=0)
        except (PolarsError, OSError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
    numbers = tuple(number for number, line in enumerate(lines, start=1) if line.strip())
    return Rows(str(path), [_parsed(lines[number - 1], f"{path} row {number}") for number in numbers], 1, numbers)


def item_of(row: Mapping[str, Any], columns: Mapping[str, str], place: str, join: Callable[[str, str], str]) -> Placed:
    """Make an item of a row.

    Args:
        row: the row, with all named columns.
        columns: use to column, see :class:`peft_arena.tasks.custom.Columns`.
        place: file and row, for messages.
        join: from prompt and answer to the answer as it follows the prompt.

    Raises:
        UserError: a value has the wrong type or is empty.
    """
    data: dict[str, Any] = {}
    if "messages" in columns:
        turns = _turns(row[columns["messages"]], f"{place}, column '{columns['messages']}'")
        answer, turns = turns[-1]["content"], turns[:-1]
        question = turns[-1]["content"]
        data["messages"] = turns
        key = json.dumps(turns, ensure_ascii=False)
    else:
        question = key = _text(row, columns["prompt"], place)
        answer = _text(row, columns["response"], place) if "response" in columns else ""
    group = _group(row, columns["group"], place) if "group" in columns else ""
    if "choices" not in columns:
        item = Item(question, join(question, answer), data={**data, "answer": answer}, group=group)
    else:
        choices, gold = _options(row, columns, place)
        item = Item(question, join(question, choices[gold]), choices, gold, data, group)
    return Placed(Keyed(group or key, item), place, key)


def refuse_overlap(parts: Mapping[str, Sequence[Placed]]) -> None:
    """Refuse splits that share a prompt, whatever its letter case and white space.

    Raises:
        UserError: a prompt is in two splits; the message says where the first stands and how many there are.
    """
    seen: dict[str, tuple[str, str]] = {}
    shared: dict[str, str] = {}
    for split, rows in parts.items():
        for _, place, prompt in rows:
            key = normal_key(prompt)
            owner, first = seen.setdefault(key, (split, place))
            if owner != split:
                shared.setdefault(key, f"{owner} ({first}) and {split} ({place})")
    if shared:
        key, places = next(iter(shared.items()))
        raise UserError(f"splits overlap: {len(shared)} prompts are in two, the first in {places}: {key[:80]!r}")


def _parsed(line: str, place: str) -> object:
    try:
        found: object = json.loads(line)
        return found
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from error


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{place}: column '{column}' must be text, got {type(value).__name__} {str(value)[:40]}")
    if not value.strip():
        raise UserError(f"{place}: column '{column}' is empty")
    return value


def _group(row: Mapping[str, Any], column: str, place: str) -> str:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise UserError(f"{place}: column '{column}' must be text or a whole number that is not empty, got {value!r}")
    return str(value)


def _options(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> tuple[tuple[str, ...], int]:
    choices, gold = row[columns["choices"]], row[columns["gold"]]
    where = f"{place}: column '{columns['choices']}'"
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where} must be a list of at least two options, got {str(choices)[:60]}")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(f"{where} must hold texts that are not empty, got {str(choices)[:60]}")
    if len(set(choices)) < len(choices):
        raise UserError(f"{where} holds an option twice: {str(choices)[:60]}")
    where = f"{place}: column '{columns['gold']}'"
    if isinstance(gold, str) and gold in choices:
        return tuple(choices), choices.index(gold)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise UserError(f"{where} must be an index from 0 to {len(choices) - 1} or the text of an option, got {gold!r}")
    return tuple(choices), gold


def _turns(value: object, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"{where} must be a list of at least two turns, got {str(value)[:60]}")
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise UserError(f"{where}, turn {number}: must be an object with 'role' and a text 'content', got {turn!r}")
        if turn.get("role") not in ROLES:
            raise UserError(f"{where}, turn {number}: role must be one of {', '.join(ROLES)}, got {turn.get('role')!r}")
    if value[-1]["role"] != "assistant" or not value[-1]["content"].strip():
        raise UserError(f"{where}: the last turn must be an assistant's and not empty, got {str(value[-1])[:60]}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
