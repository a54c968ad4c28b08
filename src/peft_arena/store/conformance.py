"""What a conformance suite tried on a method or task, found, and did not test; and the shipped records of our methods.

A record exists only of what passed: what fails is an error of the suite, which says what and where.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from peft_arena.core.errors import UserError, first_problem
from peft_arena.store.files import read_json

NAME = "conformance.json"
PACKAGED = (Path(__file__).parents[1] / NAME, Path(__file__).parents[3] / "results" / NAME)
"""Where the shipped records are: beside the installed package, or in the source tree it runs from."""
SUITE = 3
"""Version of the suite of methods; raised when a check is added or finds more, so that old records can be told."""
UNTRIED = (
    "models of real sizes, other architectures than Llama and Qwen2, and quantised weights",
    "GPUs, and more than one device",
    "more than four steps of training: that a method learns well is shown by studies, not here",
    "the numbers of the paper",
)
"""What the suite tests of no method."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Facts(_Frozen):
    """What was measured on one tiny model; differences are the largest between two logits, None: not measured."""

    parameters: int
    step0_difference: float
    """Attached but untrained, against the pretrained model."""
    disabled_difference: float | None
    """Trained and switched off, against the pretrained model."""
    reload_difference: float | None
    """Restored on a fresh model, against the trained one."""
    merge_difference: float | None
    """Merged, against the trained one; None if not mergeable."""
    first_loss: float
    """Attached but untrained, in evaluation mode."""
    last_loss: float


class ConformanceRecord(_Frozen):
    """What a conformance suite tried on one method or task with some settings, found, and did not test."""

    name: str
    """Of the method or task, as on its card."""
    suite: int
    """Version of the suite; raised when a check is added or finds more."""
    config: Mapping[str, Any]
    """Every setting, defaults written out."""
    passed: tuple[str, ...]
    """Checks that were tried in full or in part, in the order of the suite."""
    not_tested: Mapping[str, str] = Field(default_factory=dict)
    """Checks, or ``check on model``, that were not tried or were waived: why."""


class MethodRecord(ConformanceRecord):
    """The same of a method, with what was measured on it."""

    name: str = Field(validation_alias=AliasChoices("method", "name"), serialization_alias="method")
    """As on its card; files call it ``method``."""
    source: str
    """Package and version the method is from."""
    suite: int = SUITE
    learning_rate: float
    versions: Mapping[str, str]
    """Of the libraries that were used."""
    known_failures: Mapping[str, str] = Field(default_factory=dict)
    """Checks that failed, as the card says: the card's reason."""
    models: Mapping[str, Facts]
    """What was measured, by tiny model; nothing for a method that needs a quantised base."""


class ConformanceFile(_Frozen):
    """Records of many methods."""

    schema_version: Literal[1] = 1
    kind: Literal["conformance"] = "conformance"
    methods: Mapping[str, MethodRecord]
    """By name of the method."""


def read_conformance(path: Path) -> Mapping[str, MethodRecord]:
    """Read a file of records, by method.

    Raises:
        UserError: missing, damaged, or of another form.
    """
    try:
        return ConformanceFile.model_validate(read_json(path)).methods
    except ValidationError as error:
        raise UserError(f"{path} is not a file of conformance records: {first_problem(error)}") from None


@functools.cache
def shipped_conformance() -> Mapping[str, MethodRecord]:
    """Return the records that come with peft-arena, by method; nothing where none come with it.

    Raises:
        UserError: the file is damaged.
    """
    path = next((path for path in PACKAGED if path.is_file()), None)
    return {} if path is None else read_conformance(path)


def conformance_of(method: str) -> MethodRecord | None:
    """Return the shipped record of a method; None where there is none, as for methods of other packages.

    Raises:
        UserError: the shipped file is damaged.
    """
    return shipped_conformance().get(method)


def conformance_text(records: Mapping[str, MethodRecord]) -> str:
    """Return the text of a file of records: a line for each method, in the order of their names."""
    lines = [f"{json.dumps(name)}: {_line(records[name])}" for name in sorted(records)]
    return '{"kind": "conformance", "schema_version": 1, "methods": {\n' + ",\n".join(lines) + "\n}}\n"


def _line(record: MethodRecord) -> str:
    return json.dumps(_rounded(record.model_dump(mode="json", by_alias=True)), sort_keys=True, allow_nan=False)


def _rounded(value: Any) -> Any:
    """Return a JSON value whose floats have three digits: more differ from processor to processor."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value
