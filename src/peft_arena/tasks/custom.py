"""The user's own data as a task: a file that people export, or a hub data set at a commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import ClassVar

from peft_arena.core.errors import UserError, unknown
from peft_arena.tasks.base import (
    ACCURACY,
    CHOICE_METRICS,
    FRACTION,
    Generation,
    Item,
    Kind,
    Message,
    Metric,
    Prompt,
    Score,
    Split,
    T,
    Task,
    TaskCard,
    TaskConfig,
)
from peft_arena.tasks.custom_config import LIKELIHOOD, Columns, CustomConfig
from peft_arena.tasks.custom_items import CustomItems, Lost, Progress, read_items
from peft_arena.tasks.data import read_hub
from peft_arena.tasks.data_files import Rows, find_files, read_rows, sha256_of
from peft_arena.tasks.gold import gold_problem
from peft_arena.tasks.own_scorer import OwnScorer, is_own, own_scorer
from peft_arena.tasks.scorers import GAMED_BY, SCORERS, WANTS

__all__ = ["Columns", "Custom", "CustomConfig"]

VERSION = 2
"""Raised when prompts, items or scoring of the same settings and data change."""
SLOW_ANSWERS = 300
"""So many different answers are tried with scorers that read mathematics, which takes milliseconds each."""
SLOW = frozenset({"boxed", "math_verify"})
MOST_KEPT = 4
_KEPT: dict[tuple[object, ...], CustomItems] = {}
"""What was read of files, by settings and contents: a study makes its tasks many times over."""
OWN_SCORE = Metric(name="score", unit=FRACTION, better="higher")
"""What a scorer of the user's own gives."""


class Custom(Task):
    """A task with the user's own data and a scorer of their choice."""

    Config: ClassVar[type[TaskConfig]] = CustomConfig

    def __init__(
        self, config: TaskConfig | None = None, progress: Progress | None = None, *, refuses: bool = True
    ) -> None:
        """Find the data; files are read and checked at once, a hub data set when its items are asked for.

        Args:
            config: the settings.
            progress: told how many rows of files are read.
            refuses: False to look at rows and answers that a study would refuse.

        Raises:
            UserError: a setting is missing, or the files cannot be used; the message names file and row.
        """
        if config is None:
            raise UserError("task custom needs settings: at least path or hub, and scorer")
        super().__init__(config)
        settings = self.settings
        self.generation = Generation(max_new_tokens=settings.max_new_tokens, stop=settings.stop)
        self.unusable = settings.unusable
        self._own: OwnScorer | None = own_scorer(settings.scorer) if is_own(settings.scorer) else None
        self._files = find_files(settings.path, settings.sources) if settings.path is not None else {}
        self._progress = progress
        self.card = self._make_card("")
        if self._files:
            found = self._checked() if refuses else self.found
            self.config = settings.model_copy(update={"columns": Columns(**found.columns)})
            dropped = f" {found.held} items; {found.duplicates} rows that repeat another were left out."
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
        return self._checked().parts[split]

    def notes(self) -> Sequence[str]:
        """Return what was recognised, left out, joined and counted; nothing for a hub data set that is not read yet."""
        if not self._is_read:
            return ()
        notes = self.found.notes(self.settings.scorer == LIKELIHOOD)
        if lost := self.lost:
            notes.append(f"{len(lost):,} item{'s' if len(lost) > 1 else ''} that cannot be won, the first {lost[0]}")
        return notes

    def place_of(self, item: Item) -> str:
        """Return file and row of an item."""
        return self.found.places.get(item.id) or super().place_of(item)

    def in_order(self, found: Iterable[T], key: Callable[[T], Item]) -> list[T]:
        """Return what was found of items in the order of the rows."""
        ranks = {identity: rank for rank, identity in enumerate(self.found.places)}
        return sorted(found, key=lambda one: ranks.get(key(one).id, len(ranks)))

    def prompt(self, item: Item) -> Prompt:
        """Return the prompt in the format the user chose."""
        if "messages" in item.data:
            return tuple(Message(turn["role"], turn["content"]) for turn in item.data["messages"])
        return (Message("user", item.question),) if self.settings.format == "chat" else item.question

    def continuations(self, item: Item) -> tuple[str, ...]:
        """Return the options as they follow the prompt: a space comes first in plain text only."""
        return tuple(self._joined(item.question, choice) for choice in item.choices)

    def score(self, item: Item, completion: str) -> Score:
        """Judge a completion with the scorer the user chose, against every accepted answer."""
        if self.settings.scorer == LIKELIHOOD:
            return super().score(item, completion)
        if self._own is not None:
            return self._own.score(completion, item.data["row"], self.place_of(item))
        accepted = item.data.get("accepted") or [item.data["answer"]]
        return SCORERS.get(self.settings.scorer)(accepted, completion)

    @cached_property
    def found(self) -> CustomItems:
        """The items and what was found on the way; files are read once for equal settings and contents.

        Raises:
            UserError: the data cannot be used; the message names file and row.
        """
        settings = self.settings
        try:
            if not self._files:
                return read_items(settings, self._hub_rows(), self._joined)
            key = (self._reading, self._sha256, None if self._own is None else self._own.sha256)
            if key not in _KEPT:
                sources = {name: read_rows(path) for name, path in self._files.items()}
                while len(_KEPT) >= MOST_KEPT:
                    del _KEPT[next(iter(_KEPT))]
                _KEPT[key] = read_items(settings, sources, self._joined, self._progress)
            return _KEPT[key]
        except UserError as error:
            raise UserError(f"task {self.settings.name}: {error}") from None

    @property
    def _reading(self) -> str:
        """The settings that decide what is read: scorers of ours that judge a completion read alike."""
        settings = self.settings
        judged = "" if settings.scorer in SCORERS.names() else settings.scorer
        return settings.model_copy(update={"scorer": judged, "max_new_tokens": 1}).model_dump_json()

    @cached_property
    def _sha256(self) -> str:
        return sha256_of(self._files)

    @property
    def _is_read(self) -> bool:
        """Whether the items were read: files are at once, a hub data set is when it is asked for."""
        return bool(self._files) or "found" in vars(self)

    def _checked(self) -> CustomItems:
        """Return the items after trying whether the answer of each can win.

        Raises:
            UserError: a row cannot be used or an item's answer cannot win, and the settings do not say that they are
                counted; or there are too few rows.
        """
        self._refuse_rows()
        if self.lost and self.unusable == "refuse":
            scorer = self.settings.scorer
            others = f"; nor can {len(self.lost) - 1:,} more items" if len(self.lost) > 1 else ""
            stops = f", with stop {list(self.settings.stop)}" if self.settings.stop else ""
            raise UserError(
                f"task {self.settings.name}: {self.lost[0]}{others}; scorer {scorer} "
                f"{WANTS.get(scorer, 'is your own')}{stops}; mend the answers, choose another scorer, or say unusable: "
                "count to keep and count them"
            )
        return self.found

    def _refuse_rows(self) -> None:
        """Refuse rows that cannot be used, the first with its place, and data that is too little.

        Raises:
            UserError: there is such a row, and they are not counted; or a split has no items.
        """
        unread = self.found.unread
        if unread and (self.unusable == "refuse" or len(unread) == self.found.rows):
            place, error = unread[0]
            more = len(unread) - 1
            others = f"; {more:,} more row{'s' if more > 1 else ''} cannot be used" if more else ""
            raise UserError(
                f"task {self.settings.name}: {place}: {error}{others}; mend the rows, or say unusable: count to leave "
                "them out"
            )
        if self.found.unfit:
            raise UserError(f"task {self.settings.name}: {self.found.unfit}")

    @property
    def lost(self) -> Sequence[Lost]:
        """The items that their own answer does not win, in the order of the rows; see :data:`SLOW_ANSWERS`."""
        found, scorer = self.found, self.settings.scorer
        if scorer not in found.lost:
            found.lost[scorer] = self._lost(found)
        return found.lost[scorer]

    def _lost(self, found: CustomItems) -> list[Lost]:
        known: dict[tuple[str, ...], str] = {}
        lost: dict[str, Lost] = {}
        for item in (item for items in found.parts.values() for item in items):
            key = (item.answer, *item.data.get("accepted", ())) if self._own is None else (item.id,)
            if key not in known:
                if self.settings.scorer in SLOW and len(known) >= SLOW_ANSWERS:
                    continue
                known[key] = gold_problem(self, item)
            if known[key]:
                lost[item.id] = Lost(self.place_of(item), str(item.data.get("answer", item.answer)), known[key])
        return [lost[key] for key in found.places if key in lost]

    def _hub_rows(self) -> dict[str, Rows]:
        settings = self.settings
        wanted = settings.sources or {"": settings.hub_split}
        revision = settings.revision or ""
        return {
            name: Rows(f"{settings.hub} {split}", read_hub(str(settings.hub), settings.subset, split, revision), 0)
            for name, split in wanted.items()
        }

    def reward_caution(self) -> str:
        """Return how answers can win the scorer without being right."""
        return GAMED_BY.get(self.settings.scorer, "")

    def _make_card(self, dropped: str) -> TaskCard:
        settings = self.settings
        chooses = settings.scorer == LIKELIHOOD
        metric = ACCURACY if self._own is None else OWN_SCORE
        found = self.found if self._files else None
        columns = found.columns if found else settings.columns.named() if settings.columns else {}
        used = ", ".join(f"{use}: {column}" for use, column in columns.items()) or "recognised when they are read"
        data = settings.revision or f"sha256:{self._sha256}"
        return TaskCard(
            name=self.settings.name,
            title=f"User data '{self.settings.name}'",
            version=VERSION,
            role=settings.role,
            kind=Kind.CHOICE if chooses else Kind.GENERATE,
            metrics=CHOICE_METRICS if chooses else (metric,),
            chance=None,
            source=f"hub {settings.hub}, subset {settings.subset}" if settings.hub else f"file {settings.path}",
            revision=data if self._own is None else f"{data}; scorer sha256:{self._own.sha256}",
            licence=settings.licence,
            citation="none: given by the user",
            description=f"Columns {used}; {settings.format} prompts; scored by {settings.scorer}.{dropped}",
        )

    def _joined(self, prompt: str, answer: str) -> str:
        spaced = prompt[-1:].isspace() or answer[:1].isspace()
        return answer if self.settings.format == "chat" or spaced else f" {answer}"
