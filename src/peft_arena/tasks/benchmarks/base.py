"""Benchmarks from the hub: where the data is, how a row is read, and the packaged miniature that proves the path.

The data is the hub's, at a commit; a file of the user's in the same columns; or the miniature: about five rows of our
own writing in the same columns, with which loading, prompting, answering, scoring and aggregating run without network.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from peft_arena.core.bounded import user_path
from peft_arena.core.errors import UserError, unknown
from peft_arena.tasks.base import FRACTION, Item, Metric, Part, Score, Split, Task, TaskCard, TaskConfig
from peft_arena.tasks.data import HUB_VERSION, Row, read_hub
from peft_arena.tasks.data_files import read_rows
from peft_arena.tasks.settle import settle_rates, settle_strata
from peft_arena.tasks.splits import Keyed, cut, cut_by_share

MINIATURES = Path(__file__).parent / "miniatures"
UNPINNED = "main"
"""Revision of hub data no commit of which is known: resolved when the data is loaded, and recorded then."""
VALIDATION_SHARE = 0.1
ITEM_ACCURACY = Metric(name="item_accuracy", unit=FRACTION, better="higher")
"""The mean over items, beside a headline that is the mean over parts."""
SUFFIXES = (".jsonl", ".parquet")
"""Of files that stand for the hub's."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSplit:
    """One split of a hub data set, or of one of its subsets."""

    hub: str
    """Data set id on the hub."""
    split: str
    subset: str | None = None
    """Configuration of the data set."""
    revision: str = UNPINNED
    """Commit, 40 hex digits."""
    file: str | None = None
    """JSON-lines or Parquet file of the data set that holds the split; for data sets given by a loading script, which
    is not run, and for folders that are no subset."""

    @property
    def key(self) -> str:
        """Name of the split in files and miniatures: ``subset/split``, or ``split`` where there is one subset."""
        return f"{self.subset}/{self.split}" if self.subset else self.split

    def __str__(self) -> str:
        """Say where it is."""
        return f"{self.hub} ({', '.join(filter(None, (self.subset, self.split)))})"


class BenchmarkConfig(TaskConfig):
    """Settings of a benchmark: where its rows are read from."""

    source: Literal["hub", "file", "miniature"] = "hub"
    """``hub``: the Hugging Face hub; ``file``: the user's copy; ``miniature``: a few rows of our own, to try out."""
    revision: str | None = None
    """Commit of the hub data set, over the one on the card; only for ``hub``."""
    path: str | None = None
    """A JSON-lines or Parquet file in the hub's columns, or a folder with one per split (``KEY.jsonl``, the slash in
    ``subset/split`` being a folder); only for ``file``."""

    @model_validator(mode="after")
    def _fits(self) -> BenchmarkConfig:
        if (self.path is not None) != (self.source == "file"):
            raise ValueError("'path' belongs to source 'file', and only there")
        if self.revision is not None and (self.source != "hub" or not _COMMIT.fullmatch(self.revision)):
            raise ValueError(f"'revision' is a commit of 40 hex digits for source 'hub', got {self.revision!r}")
        return self


class Benchmark(Task):
    """A task whose rows have a fixed schema. Subclasses say where the splits are and read one row."""

    Config: ClassVar[type[TaskConfig]] = BenchmarkConfig
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]]
    """Our split to the hub's. Where ``train`` is given without ``validation``, a tenth of its contents, by the hash of
    their keys, is the validation split."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Names of the benchmark's parts (subtasks, subjects, languages), where its headline is the mean over them."""

    def __init__(self, config: TaskConfig | None = None) -> None:
        """Create the task; its card names the rows it will read, and says so where they are not the hub's."""
        super().__init__(config)
        card = type(self).card
        read = {
            "revision": self._planned_revision(),
            "source": rows_from(card.source, self.settings.source, self.settings.path),
            "version": card.version if self.settings.source == "miniature" else max(card.version, HUB_VERSION),
        }
        self.card = card.model_copy(update=read)

    @property
    def settings(self) -> BenchmarkConfig:
        """The task's settings with their own type."""
        assert isinstance(self.config, BenchmarkConfig)
        return self.config

    @abstractmethod
    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Make an item of a row in the hub's columns; None leaves the row out.

        Args:
            row: the row.
            where: the split it is from; for tasks of several subsets, put what is needed of it into the item's data.
        """

    def stratum(self, item: Item) -> str:
        """Return the part of the benchmark an item belongs to: ``part`` in its data; empty where there is one part.

        The headline is the unweighted mean over the parts.
        """
        return str(item.data.get("part", ""))

    def strata(self) -> Sequence[str]:
        """Return all parts the mean must be over; with only some of them there is no mean. Empty: one part.

        A miniature has some of the parts only, and its mean is over those.
        """
        if self.parts and self.settings.source == "miniature":
            return sorted({self.stratum(item) for item in self.items("test")})
        return self.parts

    def settle(self, items: Sequence[Item], scores: Sequence[Score]) -> Sequence[Score]:
        """Turn the scores of an evaluation into ones whose mean is the unweighted mean over the parts."""
        expected = self.strata()
        if not expected:
            return scores
        return settle_strata(scores, [self.stratum(item) for item in items], expected)

    def settle_rates(self, items: Sequence[Item], rates: Sequence[float | None]) -> Sequence[float | None]:
        """Turn pass@k of the items into values whose mean is the unweighted mean over the parts."""
        expected = self.strata()
        return settle_rates(rates, [self.stratum(item) for item in items], expected) if expected else rates

    def items(self, split: Split) -> Sequence[Item]:
        """Return all items of a split, the same on every machine: the parts in turn, in each by the keys' hashes.

        So the first n are a random sample, spread evenly over the parts. An item that occurs twice is kept once.

        Raises:
            UserError: there is no such split, or its rows cannot be had.
        """
        held = [*self.data, *(["validation"] if "train" in self.data and "validation" not in self.data else [])]
        if split not in held:
            raise unknown("split", split, held, where=f"task {self.card.name}")
        return self._kept[split] if split in self._kept else self._read_split(split)

    @cached_property
    def _resolved(self) -> dict[str, str]:
        """Hub data set to the commit it was loaded at, of those that are not pinned."""
        return {}

    @cached_property
    def _kept(self) -> dict[str, tuple[Item, ...]]:
        """Splits that are kept: all that were read."""
        return {}

    def _read_split(self, split: str) -> tuple[Item, ...]:
        source = "train" if split == "validation" and "validation" not in self.data else split
        keyed = [found for where in self.data[source] for found in self._keyed(where)]
        if not keyed:
            raise UserError(f"task {self.card.name}: no rows of its {split} split can be used ({self._place()})")
        if source == "train" and "validation" not in self.data:
            shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
            self._kept.update(cut_by_share(keyed, shares))
        else:
            self._kept[split] = _alternating(cut(keyed, {split: None})[split], self.stratum)
        return self._kept[split]

    def _keyed(self, where: HubSplit) -> Iterator[Keyed]:
        rows = self._rows(where)
        for row in rows:
            try:
                found = self.read(row, where)
            except KeyError as error:
                raise UserError(
                    f"task {self.card.name}: {where} has no column {error} ({self._place()}); it has "
                    f"{', '.join(sorted(map(str, row)))}"
                ) from error
            if found is not None:
                yield found

    def _rows(self, where: HubSplit) -> Sequence[Row]:
        settings = self.settings
        if settings.source == "hub":
            revision = self._commit(where)
            return read_hub(where.hub, where.subset, where.split, revision, file=where.file)
        if settings.source == "miniature":
            return miniature(self.card.name).get(where.key, ())
        return read_rows(self._file(where)).read()

    def _commit(self, where: HubSplit) -> str:
        """Return the commit to read; one that is not pinned is looked up once."""
        wanted = self.settings.revision or where.revision
        if wanted != UNPINNED:
            return wanted
        if where.hub not in self._resolved:
            self._resolved[where.hub] = _newest(where.hub)
        return self._resolved[where.hub]

    def card_as_loaded(self) -> TaskCard:
        """Return the card with the commits that unpinned data was loaded at, in the place of ``main``."""
        revision = self.card.revision
        for hub, commit in self._resolved.items():
            revision = revision.replace(f"{hub}@{UNPINNED}", f"{hub}@{commit}")
        return self.card.model_copy(update={"revision": revision})

    def _file(self, where: HubSplit) -> Path:
        path = user_path(self.settings.path or "")
        if path.is_file():
            if sum(map(len, self.data.values())) > 1 and path.stem != where.split:
                names = ", ".join(split.key for splits in self.data.values() for split in splits)
                raise UserError(
                    f"task {self.card.name} has several splits: path must be a folder with {names}, got file '{path}'"
                )
            return path
        for suffix in SUFFIXES:
            if (found := path / f"{where.key}{suffix}").is_file():
                return found
        raise UserError(f"task {self.card.name}: no file {path / where.key}{' or '.join(SUFFIXES)}")

    def _planned_revision(self) -> str:
        settings = self.settings
        if settings.source == "miniature":
            text = (MINIATURES / f"{type(self).card.name}.json").read_bytes()
            return f"miniature sha256:{hashlib.sha256(text).hexdigest()[:12]}"
        if settings.source == "file":
            path = user_path(settings.path or "")
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
            if not files:
                raise UserError(f"task {type(self).card.name}: '{path}' is no file and holds none")
            digest = hashlib.sha256()
            for file in files:
                digest.update(file.read_bytes())
            return f"sha256:{digest.hexdigest()[:12]}"
        if settings.revision is not None:
            return settings.revision
        return pins([split for splits in self.data.values() for split in splits])

    def _place(self) -> str:
        settings = self.settings
        return {"hub": "on the hub", "miniature": "in the miniature"}.get(settings.source, f"in {settings.path}")


def _alternating(items: Sequence[Item], stratum: Callable[[Item], str]) -> tuple[Item, ...]:
    """Return the items with their parts in turn."""
    places: Counter[str] = Counter()
    ranked: list[tuple[int, str, Item]] = []
    for item in items:
        name = stratum(item)
        ranked.append((places[name], name, item))
        places[name] += 1
    return tuple(item for _, _, item in sorted(ranked, key=lambda row: row[:2]))


def rows_from(hub: str, source: str, path: str | None) -> str:
    """Return what a card says of its rows: the hub's, or what stands in their place.

    Args:
        hub: what the card says of rows of the hub.
        source: as in :class:`BenchmarkConfig`.
        path: the same.
    """
    if source == "miniature":
        return f"packaged miniature in the place of {hub}"
    return f"files of {path} in the place of {hub}" if source == "file" else hub


def pins(splits: Sequence[HubSplit]) -> str:
    """Return the data sets of a card with their commits."""
    return ", ".join(dict.fromkeys(f"{split.hub}@{split.revision}" for split in splits))


def with_item_accuracy(score: Score) -> Score:
    """Return the score with its value as the further metric that stays when a mean over parts is made."""
    if score.value is None:
        return score
    return replace(score, others={**score.others, ITEM_ACCURACY.name: Part(score.value)})


def miniature(name: str) -> Mapping[str, Sequence[Row]]:
    """Return the packaged miniature of a benchmark: the key of a split to its rows, in the hub's columns."""
    found: dict[str, list[dict[str, Any]]] = json.loads((MINIATURES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _newest(hub: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        sha = HfApi().dataset_info(hub).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"cannot find out the commit of data set {hub} on the hub: {first}") from error
    if sha is None:
        raise UserError(f"the hub names no commit of data set {hub}")
    return sha
