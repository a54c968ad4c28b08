"""Tables of results that others published: what was run, by whom, and every number as it stands there.

They are shown beside a study's own numbers. They have no items and no intervals, so nothing is computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peft_arena.core.errors import UserError, first_problem, unknown
from peft_arena.core.measure import Better
from peft_arena.core.specs import Name, Objective
from peft_arena.store.files import read_json

PACKAGED = (Path(__file__).parents[1] / "published", Path(__file__).parents[3] / "results" / "published")
"""Where shipped tables are: beside the installed package, or in the source tree it runs from."""
SUCCESS = "success"
Scalar = str | int | float | bool | None


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PublishedSource(_Frozen):
    """Where a table is from."""

    text: str
    """Authors, title, and which of their tables or files."""
    url: str = ""
    date: str = ""
    """When it was published or measured, ISO 8601 as far as it is known."""
    licence: str = ""


class PublishedRegime(_Frozen):
    """What was run, as far as the source says."""

    model: str
    revision: str | None = None
    """Commit of the model; None: the source does not say."""
    objective: Objective = "sft"
    regime: str
    """How it was trained, in words."""
    target: str
    retention: str = ""


class PublishedColumn(_Frozen):
    """One quantity of a table."""

    name: Name
    title: str
    unit: str
    """As in measures: ``fraction``, ``seconds``, ``bytes``, ``parameters``, ``FLOPs``, ``nats/token``."""
    better: Better
    role: Literal["target", "retention", "cost", "other"] = "other"
    how: str = ""
    """How it was obtained, as far as the source says."""


class PublishedRow(_Frozen):
    """One run, or whatever else the source gives one line to."""

    label: str
    method: Name | None = None
    """Our name of the method; None where we have none."""
    status: Literal["success", "failed", "canceled", "running"] = "success"
    """What became of the run, by the source."""
    reason: str = ""
    """Why it did not succeed, or why a value is missing, by the source."""
    settings: Mapping[str, Scalar] = Field(default_factory=dict)
    values: Mapping[str, float | None]
    """By name of column; None: the source has no number."""

    @model_validator(mode="after")
    def _no_numbers_of_nothing(self) -> PublishedRow:
        if self.status != SUCCESS and any(value is not None for value in self.values.values()):
            raise ValueError(f"row '{self.label}' is {self.status} and yet has numbers")
        return self


class PublishedTable(_Frozen):
    """A table of results, each of one run, without intervals."""

    id: Name
    title: str
    source: PublishedSource
    ran: PublishedRegime
    seeds: tuple[int, ...] | None = None
    """Seeds of the runs; None: the source does not say."""
    runs_per_row: Literal[1] = 1
    """Only single runs can be shown so: a mean would need its spread."""
    caveats: tuple[str, ...] = ()
    columns: tuple[PublishedColumn, ...] = Field(min_length=1)
    rows: tuple[PublishedRow, ...]

    @model_validator(mode="after")
    def _whole(self) -> PublishedTable:
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"table '{self.id}' has a column twice: {names}")
        labels = [row.label for row in self.rows]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"table '{self.id}' has a row twice: {', '.join(twice)}")
        for row in self.rows:
            if set(row.values) != set(names):
                odd = ", ".join(sorted(set(row.values) ^ set(names)))
                raise ValueError(f"table '{self.id}', row '{row.label}': columns and values differ in {odd}")
            for column in self.columns:
                value = row.values[column.name]
                if value is not None and column.unit == "fraction" and not 0 <= value <= 1:
                    place = f"table '{self.id}', row '{row.label}', column {column.name}"
                    raise ValueError(f"{place}: {value} is not a fraction; write percent divided by 100")
        return self


class PublishedFile(_Frozen):
    """Tables of one source."""

    schema_version: Literal[1] = 1
    kind: Literal["published"] = "published"
    tables: tuple[PublishedTable, ...] = Field(min_length=1)


def read_published(path: Path) -> tuple[PublishedTable, ...]:
    """Read a file of published tables.

    Raises:
        UserError: missing, damaged, or of another form.
    """
    try:
        return PublishedFile.model_validate(read_json(path)).tables
    except ValidationError as error:
        raise UserError(f"{path} is not a file of published tables: {first_problem(error)}") from None


def shipped_tables() -> dict[str, PublishedTable]:
    """Return id to table of every table that comes with peft-arena.

    Raises:
        UserError: a file is damaged, or two have a table of the same id.
    """
    found: dict[str, PublishedTable] = {}
    for directory in PACKAGED:
        if not directory.is_dir():
            continue
        for path in sorted(directory.glob("*.json")):
            for table in read_published(path):
                if table.id in found:
                    raise UserError(f"{path}: there is another published table '{table.id}'")
                found[table.id] = table
        break
    return found


def find_tables(name: str, where: str = "") -> list[PublishedTable]:
    """Return the shipped table of an id, or all those whose id begins with the name and a slash.

    Raises:
        UserError: there is none.
    """
    tables = shipped_tables()
    found = [table for key, table in tables.items() if key == name or key.startswith(f"{name}/")]
    if not found:
        groups = {key.partition("/")[0] for key in tables}
        raise unknown("published table", name, {*tables, *groups}, where)
    return found


def finite(value: object) -> float | None:
    """Return a number as a float; None for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
