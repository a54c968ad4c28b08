"""The settings of a task with the user's own data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from peft_arena.core.errors import unknown
from peft_arena.tasks.base import Role, Split, TaskConfig
from peft_arena.tasks.own_scorer import is_own
from peft_arena.tasks.scorers import SCORERS

LIKELIHOOD = "multiple_choice"
"""The scorer that compares options by likelihood instead of judging a completion."""
DEFAULT_SPLITS: dict[Split, str | float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Columns(TaskConfig):
    """Which column holds what: prompt and response, or messages whose last turn is the answer."""

    prompt: str | None = None
    """Text, or a list of turns that ends with the user's."""
    response: str | None = None
    """The answer: text; numbers, booleans, lists and objects are taken as their JSON text."""
    accepted: str | None = Field(default=None, exclude_if=lambda column: column is None)
    """A list of accepted answers, beside ``response`` or instead of it; then the first is the one to train on."""
    input: str | None = Field(default=None, exclude_if=lambda column: column is None)
    """What stands behind the prompt after an empty line, where it is not empty."""
    system: str | None = Field(default=None, exclude_if=lambda column: column is None)
    """A system turn before the prompt, where it is not empty."""
    messages: str | None = None
    """Turns of ``role`` and ``content``, or of ``from`` and ``value``; the last is the assistant's, the answer."""
    choices: str | None = None
    """A list of option texts."""
    gold: str | None = None
    """The right option: its text, its index from 0, or its letter from A."""
    group: str | None = Field(default=None, exclude_if=lambda group: group is None)
    """What rows share (a passage, a template, a customer): rows of one group stay in one split, and errors are computed
    over groups. Rows with the same prompt are a group in any case."""

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("name either 'prompt' or 'messages'")
        if self.messages is not None and (self.response is not None or self.accepted is not None):
            raise ValueError("with 'messages' the answer is the last turn: leave 'response' and 'accepted' out")
        if self.messages is not None and self.input is not None:
            raise ValueError("'input' belongs to 'prompt'")
        if (self.choices is None) != (self.gold is None):
            raise ValueError("'choices' and 'gold' belong together")
        return self

    @property
    def has_answers(self) -> bool:
        """Whether rows hold an answer."""
        return any(one is not None for one in (self.response, self.accepted, self.messages, self.choices))

    def named(self) -> dict[str, str]:
        """Return what was named: use to column."""
        return {use: column for use, column in self.model_dump().items() if column is not None}


class CustomConfig(TaskConfig):
    """Settings of a task with the user's own data."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """What results call the task; if left out, the name of the file or folder without its ending, or of the hub's data
    set."""
    path: Path | None = None
    """A file ending in .csv, .json, .jsonl or .parquet; or the folder of the files named in ``splits``."""
    hub: str | None = None
    """Data set id on the hub, instead of ``path``."""
    revision: str | None = None
    """Commit of the hub data set; required with ``hub``."""
    subset: str | None = None
    """Configuration of the hub data set."""
    hub_split: str = "train"
    """The hub split that is divided when ``splits`` gives shares."""
    columns: Columns | None = None
    """None: recognised by their names, and the plan says as what."""
    splits: dict[Split, str | float] = Field(default_factory=lambda: dict(DEFAULT_SPLITS))
    """Each split's file or hub split; or each split's share of the one file, divided by content."""
    scorer: str
    """One of ours, or ``FILE.py:FUNCTION`` of your own: from answer and row to True, False, 0 to 1, or None."""
    format: Literal["chat", "plain"] = "chat"
    """``chat``: through the model's chat template. ``plain``: the prompt as it is; a space is put before the answer
    where neither the prompt ends nor the answer begins with white space."""
    max_new_tokens: int = Field(default=64, ge=1)
    stop: tuple[str, ...] = ()
    role: Role = Role.TARGET
    licence: str = "not stated"
    unusable: Literal["refuse", "count"] = "refuse"
    """``refuse``: a row that cannot be read, or whose own answer cannot win, is an error with its place. ``count``:
    rows that cannot be read are left out, items that cannot be won stay, and the plan says how many of each."""

    @model_validator(mode="before")
    @classmethod
    def _called(cls, given: Any) -> Any:
        """Fill in the name, so that what results are called does not depend on a file that may be gone."""
        if not isinstance(given, Mapping) or given.get("name"):
            return given
        source = Path(str(given["path"])).resolve().stem if given.get("path") else str(given.get("hub") or "")
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", source.rsplit("/", 1)[-1]).strip("-_.")
        return {**given, "name": name or "custom"}

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, name: str) -> str:
        names = [*SCORERS.names(), LIKELIHOOD]
        if name not in names and not is_own(name):
            raise ValueError(f"{unknown('scorer', name, names)}, or FILE.py:FUNCTION of your own")
        return name

    @model_validator(mode="after")
    def _complete(self) -> CustomConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name either 'path' or 'hub'")
        if self.hub is not None and not self.revision:
            raise ValueError("'hub' needs 'revision', the commit of the data set, so that results can be repeated")
        if self.hub is None and (self.revision or self.subset):
            raise ValueError("'revision' and 'subset' belong to 'hub'")
        if self.columns is not None:
            self._check_columns(self.columns)
        self._check_splits()
        return self

    def _check_columns(self, columns: Columns) -> None:
        if why := self.columns_problem(columns):
            raise ValueError(why)

    def columns_problem(self, columns: Columns) -> str:
        """Say why columns do not go with the scorer and the format; empty if they do."""
        if (self.scorer == LIKELIHOOD) != (columns.choices is not None):
            return f"scorer '{LIKELIHOOD}' and the columns 'choices' and 'gold' belong together"
        if not columns.has_answers and not is_own(self.scorer):
            return "'prompt' needs 'response', 'accepted', or 'choices' and 'gold'"
        if (columns.messages is not None or columns.system is not None) and self.format == "plain":
            return "messages and system turns need format 'chat'"
        return ""

    def _check_splits(self) -> None:
        needed: tuple[Split, ...] = ("train", "test") if self.role is Role.TARGET else ("test",)
        missing = [split for split in needed if split not in self.splits]
        if missing:
            raise ValueError(f"splits: a {self.role} task needs {' and '.join(missing)}")
        shares = [share for share in self.splits.values() if not isinstance(share, str)]
        if shares and len(shares) != len(self.splits):
            raise ValueError("splits: give a share for every split, or a file for every split")
        if shares and (min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(f"splits: shares must be above 0 and sum to 1, got {self.splits}")

    @property
    def shares(self) -> Mapping[str, float] | None:
        """The share of each split, or None where every split has a file of its own."""
        found: dict[str, float] = {split: share for split, share in self.splits.items() if not isinstance(share, str)}
        return found or None

    @property
    def sources(self) -> dict[str, str]:
        """The file or hub split of each split; empty where shares are given."""
        return {split: source for split, source in self.splits.items() if isinstance(source, str)}
