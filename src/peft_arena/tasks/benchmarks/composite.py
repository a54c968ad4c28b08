"""Targets that are trained on one data set and tested on others: PEFT-Arena's domains, the PEFT library's target.

Train and validation items are those of the training data, test items those of the members. Each item is asked and
judged by the task it is from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import model_validator

from peft_arena.tasks.base import (
    ACCURACY,
    FRACTION,
    Generation,
    Item,
    Kind,
    Metric,
    Part,
    Prompt,
    Role,
    Score,
    Split,
    Task,
    TaskCard,
    TaskConfig,
)
from peft_arena.tasks.benchmarks.base import ITEM_ACCURACY, Benchmark, rows_from
from peft_arena.tasks.settle import settle_rates, settle_strata

MEMBER = "member"
"""Key in the data of a test item: the name of the benchmark it is from."""
_FIRST_OPTION = re.compile(r"(?:\$|\\(?:textbf|text|mathrm|mathbf)\s*\{)+\s*\(A\)|\s\(?A[.):]\s")
_NO_CONTENT = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|[\s${}.,;:?!~]+")


def problem_key(text: str) -> str:
    r"""Return what counts as the same problem: a text without its options, in one letter case, without punctuation.

    White space, dollar signs, braces and LaTeX's spaces are left out too, and ``\dfrac`` is ``\frac``.
    """
    found = _FIRST_OPTION.search(text)
    stem = text[: found.start()] if found else text
    plain = _NO_CONTENT.sub("", stem.casefold()).replace("\\dfrac", "\\frac")
    return plain or _NO_CONTENT.sub("", text.casefold())


class CompositeConfig(TaskConfig):
    """Settings of a target made of several data sets: where all their rows are read from."""

    source: Literal["hub", "file", "miniature"] = "hub"
    """``hub``: the Hugging Face hub, each data set at its own commit; ``file``: the user's copies; ``miniature``: a few
    rows of our own, to try out."""
    path: str | None = None
    """A folder with one sub-folder per data set, named as its task; only for ``file``."""

    @model_validator(mode="after")
    def _fits(self) -> CompositeConfig:
        if (self.path is not None) != (self.source == "file"):
            raise ValueError("'path' belongs to source 'file', and only there")
        return self

    def of(self, name: str) -> dict[str, str]:
        """Return the settings of one of the data sets."""
        if self.path is None:
            return {"source": self.source}
        return {"source": self.source, "path": str(Path(self.path) / name)}


def joined_generation(members: Sequence[type[Benchmark]]) -> Generation:
    """Return the generation under which all members can be asked: the largest limit, the stop strings they share.

    Raises:
        TypeError: they have different stop strings.
    """
    stops = {member.generation.stop for member in members}
    if len(stops) != 1:
        raise TypeError(f"{', '.join(member.card.name for member in members)} stop at different strings")
    return Generation(max(member.generation.max_new_tokens for member in members), stops.pop())


def composite_card(
    *,
    name: str,
    title: str,
    training: type[Benchmark],
    members: Sequence[type[Benchmark]],
    description: str,
    version: int = 1,
) -> TaskCard:
    """Return the card of a target from those of its data sets; sources, revisions and licences are joined.

    The headline is the unweighted mean over the members. Further metrics are each member's own headline, by its name,
    and the mean over items; with one member there are none.
    """
    cards = [training.card, *(member.card for member in members)]
    chances = [member.card.chance for member in members]
    joined = _joined(cards)
    own = [Metric(name=member.card.name, unit=FRACTION, better="higher") for member in members]
    return TaskCard(
        name=name,
        title=title,
        version=version,
        role=Role.TARGET,
        kind=Kind.GENERATE,
        metrics=(ACCURACY, ITEM_ACCURACY, *own) if len(members) > 1 else (ACCURACY,),
        chance=fmean(chance for chance in chances if chance is not None) if None not in chances else None,
        description=description,
        source=joined["source"],
        revision=joined["revision"],
        licence=joined["licence"],
        citation=joined["citation"],
    )


def _joined(cards: Sequence[TaskCard]) -> dict[str, str]:
    """Return what the card of a target takes from those of its training data, the first, and of its members."""
    first, *others = cards
    return {
        "source": f"train: {first.name}; test: {', '.join(card.name for card in others)}",
        "revision": ", ".join(dict.fromkeys(card.revision for card in cards)),
        "licence": "; ".join(f"{card.name}: {card.licence}" for card in cards),
        "citation": "; ".join(dict.fromkeys(card.citation for card in cards)),
    }


class Composite(Task):
    """A target whose training data is another set than its tests. Subclasses name the tasks it is made of."""

    Config: ClassVar[type[TaskConfig]] = CompositeConfig
    training: ClassVar[type[Benchmark]]
    """Gives the train and validation items."""
    members: ClassVar[tuple[type[Benchmark], ...]]
    """Give the test items; all are of kind GENERATE."""

    def __init__(self, config: TaskConfig | None = None) -> None:
        """Make the tasks it is made of; the revision on its card is theirs.

        Raises:
            UserError: files of one of them cannot be found.
        """
        super().__init__(config)
        assert isinstance(self.config, CompositeConfig)
        settings = self.config
        self._training = self._made(self.trained_on(), settings)
        self._members = {member.card.name: self._made(member, settings) for member in self.members}
        cards = [self._training.card, *(member.card for member in self._members.values())]
        read = _joined(cards)
        self.card = type(self).card.model_copy(
            update={**read, "source": rows_from(read["source"], settings.source, settings.path)}
        )

    def trained_on(self) -> type[Benchmark]:
        """Return the task that gives the train and validation items."""
        return self.training

    def items(self, split: Split) -> Sequence[Item]:
        """Return all items of a split: the members' in turn, or the training data's without problems that are tested.

        Raises:
            UserError: there is no such split, or the rows of one of the data sets cannot be had.
        """
        if split == "test":
            return self._tested
        asked = {problem_key(item.question) for item in self._tested}
        return tuple(item for item in self._training.items(split) if problem_key(item.question) not in asked)

    def prompt(self, item: Item) -> Prompt:
        """Return what the task an item is from shows."""
        return self._owner(item).prompt(item)

    def score(self, item: Item, completion: str) -> Score:
        """Judge as the task an item is from does."""
        found = self._owner(item).score(item, completion)
        if found.value is None:
            return replace(found, others={})
        return replace(found, others={name: Part(found.value, found.weight) for name in self.metrics_of(item)})

    def target(self, item: Item) -> str:
        """Return what the task an item is from would have the model write."""
        return self._owner(item).target(item)

    def metrics_of(self, item: Item) -> tuple[str, ...]:
        """Return the further metrics of an item: the mean over items, and its member's own."""
        if len(self.members) == 1:
            return ()
        return (ITEM_ACCURACY.name, *([item.data[MEMBER]] if MEMBER in item.data else []))

    def settle(self, items: Sequence[Item], scores: Sequence[Score]) -> Sequence[Score]:
        """Turn the scores of test items into ones whose mean is the unweighted mean over the members.

        Each member's scores are settled by itself first, so that its part is its own headline. Without a value of one
        member there is none. Items of the training data keep their scores.
        """
        names = [item.data.get(MEMBER, "") for item in items]
        if not any(names):
            return scores
        settled = list(scores)
        for name, member in self._members.items():
            places = [place for place, owner in enumerate(names) if owner == name]
            own = member.settle([items[place] for place in places], [scores[place] for place in places])
            for place, score in zip(places, own, strict=True):
                settled[place] = self._with_own(score, scores[place], name)
        return settle_strata(settled, names, list(self._members))

    def settle_rates(self, items: Sequence[Item], rates: Sequence[float | None]) -> Sequence[float | None]:
        """Turn pass@k of test items into values whose mean is the unweighted mean over the members."""
        names = [item.data.get(MEMBER, "") for item in items]
        return settle_rates(rates, names, list(self._members)) if any(names) else rates

    @cached_property
    def _tested(self) -> tuple[Item, ...]:
        columns = [
            [replace(item, data={**item.data, MEMBER: name}) for item in member.items("test")]
            for name, member in self._members.items()
        ]
        return tuple(item for row in zip_longest(*columns) for item in row if item is not None)

    def _owner(self, item: Item) -> Benchmark:
        return self._members[item.data[MEMBER]] if MEMBER in item.data else self._training

    def _with_own(self, settled: Score, scored: Score, name: str) -> Score:
        """Return a member's settled score with the member's own headline among the further metrics."""
        others = {key: part for key, part in scored.others.items() if key != name}
        if settled.value is not None and len(self.members) > 1:
            others[name] = Part(settled.value, settled.weight)
        return replace(settled, others=others)

    def card_as_loaded(self) -> TaskCard:
        """Return the card with the revisions that the data sets were loaded at."""
        cards = [task.card_as_loaded() for task in (self._training, *self._members.values())]
        return self.card.model_copy(update={"revision": _joined(cards)["revision"]})

    @staticmethod
    def _made(kind: type[Benchmark], settings: CompositeConfig) -> Benchmark:
        return kind(kind.Config.model_validate(settings.of(kind.card.name)))
