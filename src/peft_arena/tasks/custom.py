"""The user's own data as a task: a JSON-lines or Parquet file, or a hub data set at a commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peft_arena.core.errors import UserError, unknown
from peft_arena.tasks.base import (
    ACCURACY,
    CHOICE_METRICS,
    Generation,
    Item,
    Kind,
    Message,
    Prompt,
    Role,
    Score,
    Split,
    Task,
    TaskCard,
    TaskConfig,
)
from peft_arena.tasks.custom_data import (
    Placed,
    Rows,
    find_files,
    item_of,
    read_rows,
    refuse_overlap,
    refuse_two_groups,
    sha256_of,
)
from peft_arena.tasks.data import read_hub
from peft_arena.tasks.scorers import SCORERS
from peft_arena.tasks.splits import cut_by_share, normal_key, with_groups

LIKELIHOOD = "multiple_choice"
"""The scorer that compares options by likelihood instead of judging a completion."""
MATH_ROWS_TRIED = 50
"""Rows whose answers are checked to be readable as mathematics before a study starts."""
DEFAULT_SPLITS: dict[Split, str | float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Columns(TaskConfig):
    """Which column holds what: prompt and response, or messages whose last turn is the answer."""

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    """A list of turns with ``role`` and ``content``; the last is the assistant's and is the answer."""
    choices: str | None = None
    """A list of option texts."""
    gold: str | None = None
    """Index of the right option, from 0, or its text."""
    group: str | None = Field(default=None, exclude_if=lambda group: group is None)
    """What rows share (a passage, a template, a customer): rows of one group stay in one split, and errors are computed
    over groups. Rows with the same prompt are a group in any case."""

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("name either 'prompt' or 'messages'")
        if self.messages is not None and self.response is not None:
            raise ValueError("with 'messages' the answer is the last turn: leave 'response' out")
        if (self.choices is None) != (self.gold is None):
            raise ValueError("'choices' and 'gold' belong together")
        if self.prompt is not None and self.response is None and self.choices is None:
            raise ValueError("'prompt' needs 'response', or 'choices' and 'gold'")
        return self

    def named(self) -> dict[str, str]:
        """Return what was named: use to column."""
        return {use: column for use, column in self.model_dump().items() if column is not None}


class CustomConfig(TaskConfig):
    """Settings of a task with the user's own data."""

    name: str = Field(default="custom", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """What results call the task; two custom tasks of a study need two names."""
    path: Path | None = None
    """A file ending in .jsonl or .parquet; or the folder of the files named in ``splits``."""
    hub: str | None = None
    """Data set id on the hub, instead of ``path``."""
    revision: str | None = None
    """Commit of the hub data set; required with ``hub``."""
    subset: str | None = None
    """Configuration of the hub data set."""
    hub_split: str = "train"
    """The hub split that is divided when ``splits`` gives shares."""
    columns: Columns
    splits: dict[Split, str | float] = Field(default_factory=lambda: dict(DEFAULT_SPLITS))
    """Each split's file or hub split; or each split's share of the one file, divided by content."""
    scorer: str
    format: Literal["chat", "plain"] = "chat"
    """``chat``: through the model's chat template. ``plain``: the prompt as it is; a space is put before the answer
    where neither the prompt ends nor the answer begins with white space."""
    max_new_tokens: int = Field(default=64, ge=1)
    stop: tuple[str, ...] = ()
    role: Role = Role.TARGET
    licence: str = "not stated"

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, name: str) -> str:
        names = [*SCORERS.names(), LIKELIHOOD]
        if name not in names:
            raise ValueError(str(unknown("scorer", name, names)))
        return name

    @model_validator(mode="after")
    def _complete(self) -> CustomConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name either 'path' or 'hub'")
        if self.hub is not None and not self.revision:
            raise ValueError("'hub' needs 'revision', the commit of the data set, so that results can be repeated")
        if self.hub is None and (self.revision or self.subset):
            raise ValueError("'revision' and 'subset' belong to 'hub'")
        if (self.scorer == LIKELIHOOD) != (self.columns.choices is not None):
            raise ValueError(f"scorer '{LIKELIHOOD}' and the columns 'choices' and 'gold' belong together")
        if self.columns.messages is not None and self.format == "plain":
            raise ValueError("messages need format 'chat'")
        self._check_splits()
        return self

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


class Custom(Task):
    """A task with the user's own data and a scorer of their choice."""

    Config: ClassVar[type[TaskConfig]] = CustomConfig

    def __init__(self, config: TaskConfig | None = None) -> None:
        """Find the data; files are read and checked at once, a hub data set when its items are asked for.

        Raises:
            UserError: a setting is missing, or the files cannot be used; the message names file and row.
        """
        if config is None:
            raise UserError("task custom needs settings: at least path or hub, columns and scorer")
        super().__init__(config)
        settings = self.settings
        self.generation = Generation(max_new_tokens=settings.max_new_tokens, stop=settings.stop)
        self._files = find_files(settings.path, settings.sources) if settings.path is not None else {}
        self._duplicates = 0
        dropped = ""
        if self._files:
            held = sum(map(len, self._parts.values()))
            dropped = f" {held} items; {self._duplicates} exact duplicates were left out."
        self.card = self._make_card(dropped)

    @property
    def settings(self) -> CustomConfig:
        """The task's settings with their own type."""
        assert isinstance(self.config, CustomConfig)
        return self.config

    def items(self, split: Split) -> Sequence[Item]:
        """Return all items of a split, in a fixed order.

        Raises:
            UserError: there is no such split, or the data cannot be used.
        """
        if split not in self.settings.splits:
            raise unknown("split", split, self.settings.splits, where=f"task {self.settings.name}")
        return self._parts[split]

    def prompt(self, item: Item) -> Prompt:
        """Return the prompt in the format the user chose."""
        if "messages" in item.data:
            return tuple(Message(turn["role"], turn["content"]) for turn in item.data["messages"])
        return (Message("user", item.question),) if self.settings.format == "chat" else item.question

    def continuations(self, item: Item) -> tuple[str, ...]:
        """Return the options as they follow the prompt: a space comes first in plain text only."""
        return tuple(self._joined(item.question, choice) for choice in item.choices)

    def score(self, item: Item, completion: str) -> Score:
        """Judge a completion with the scorer the user chose."""
        if self.settings.scorer == LIKELIHOOD:
            return super().score(item, completion)
        return SCORERS.get(self.settings.scorer)([item.data["answer"]], completion)

    def _make_card(self, dropped: str) -> TaskCard:
        settings = self.settings
        chooses = settings.scorer == LIKELIHOOD
        used = ", ".join(f"{use}: {column}" for use, column in settings.columns.named().items())
        return TaskCard(
            name=settings.name,
            title=f"User data '{settings.name}'",
            version=1,
            role=settings.role,
            kind=Kind.CHOICE if chooses else Kind.GENERATE,
            metrics=CHOICE_METRICS if chooses else (ACCURACY,),
            chance=None,
            source=f"hub {settings.hub}, subset {settings.subset}" if settings.hub else f"file {settings.path}",
            revision=settings.revision or f"sha256:{sha256_of(self._files)}",
            licence=settings.licence,
            citation="none: given by the user",
            description=f"Columns {used}; {settings.format} prompts; scored by {settings.scorer}.{dropped}",
        )

    def _joined(self, prompt: str, answer: str) -> str:
        spaced = prompt[-1:].isspace() or answer[:1].isspace()
        return answer if self.settings.format == "chat" or spaced else f" {answer}"

    def _read(self) -> dict[str, Rows]:
        """Return the rows of each split; under one name, empty, where the one source is yet to be divided."""
        settings = self.settings
        if settings.hub is None:
            return {name: read_rows(path) for name, path in self._files.items()}
        wanted = settings.sources or {"": settings.hub_split}
        revision = settings.revision or ""
        return {
            name: Rows(f"{settings.hub} {split}", read_hub(settings.hub, settings.subset, split, revision), first=0)
            for name, split in wanted.items()
        }

    @cached_property
    def _parts(self) -> dict[str, tuple[Item, ...]]:
        made: dict[str, list[Placed]] = {}
        for name, read in self._read().items():
            numbered = read.numbered(self.settings.columns.named())
            made[name] = [self._placed(row, place, number) for number, (row, place) in enumerate(numbered)]
        shares = self.settings.shares
        if shares is not None:
            rows = [found for part in made.values() for found in part]
            refuse_two_groups(rows)
            parts = cut_by_share([found.keyed for found in rows], shares)
        else:
            refuse_overlap(made)
            parts = {name: with_groups(found.keyed for found in rows) for name, rows in made.items()}
        total = sum(map(len, made.values()))
        empty = [name for name, items in parts.items() if not items]
        if empty:
            keys = {normal_key(found.keyed.key) for rows in made.values() for found in rows}
            raise UserError(
                f"task {self.settings.name}: nothing is left for {', '.join(empty)}: "
                f"{total} rows hold only {len(keys)} different {'groups' if self.settings.columns.group else 'prompts'}"
            )
        self._duplicates = total - sum(map(len, parts.values()))
        return parts

    def _placed(self, row: dict[str, object], place: str, number: int) -> Placed:
        """Make an item of a row; a numeric or mathematical answer must be one its scorer can judge.

        As reading mathematics is slow, only the first rows are tried with ``math_verify``.
        """
        placed = item_of(row, self.settings.columns.named(), place, self._joined)
        answer = placed.keyed.item.data.get("answer")
        tried = {"numeric": True, "math_verify": number < MATH_ROWS_TRIED}.get(self.settings.scorer, False)
        if tried and answer is not None:
            judged = SCORERS.get(self.settings.scorer)([answer], answer)
            if judged.value != 1.0:
                raise UserError(
                    f"{place}: scorer '{self.settings.scorer}' cannot judge the answer {answer[:80]!r}: "
                    f"{judged.reason or 'it does not even match itself'}"
                )
        return placed
