"""What a task is: a card, items, a prompt and a score.

The same object gives the training examples, the evaluation requests, the metric and the reinforcement-learning
reward, so that there is one definition of "correct". Importing a task never imports torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from peft_arena.core.errors import UnknownNameError
from peft_arena.core.ids import content_id
from peft_arena.core.measure import Better

T = TypeVar("T")
Split = Literal["train", "validation", "test"]


class Role(StrEnum):
    """What a task is for in a study."""

    TARGET = "target"
    """Learned; has train, validation and test items."""
    RETENTION = "retention"
    """Only evaluated, to see what was forgotten."""


class Kind(StrEnum):
    """How a model answers."""

    GENERATE = "generate"
    """Greedy text after the prompt, scored by :meth:`Task.score`."""
    CHOICE = "choice"
    """The option with the highest log-likelihood after the prompt."""
    TEXT = "text"
    """No answer: the log-likelihood of the item's text itself."""


class Metric(BaseModel):
    """Name, unit and direction of one number a task reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    unit: str
    better: Better


FRACTION = "fraction"
ACCURACY = Metric(name="accuracy", unit=FRACTION, better="higher")
CHOICE_METRICS = (
    ACCURACY,
    Metric(name="accuracy_sum", unit=FRACTION, better="higher"),
    Metric(name="gold_nll", unit="nats", better="lower"),
)
"""What :meth:`Task.score_choice` reports."""
TEXT_METRICS = (
    Metric(name="cross_entropy", unit="nats/token", better="lower"),
    Metric(name="bits_per_byte", unit="bits/byte", better="lower"),
)
"""What :meth:`Task.score_text` reports."""


class TaskCard(BaseModel):
    """What a reader must know to judge a number of this task. All fields are required: nothing is guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    version: int
    """Raised when prompts, items or scoring change; a published version is never edited."""
    role: Role
    kind: Kind
    metrics: tuple[Metric, ...]
    """The first is the task's headline number."""
    chance: float | None
    """Expected headline value of guessing; None where it has no meaning."""
    source: str
    """Where the data comes from: hub id, generator or file."""
    revision: str
    """Hub commit, package version or generator version of the data."""
    licence: str
    citation: str
    description: str
    superseded_by: str | None = None
    waived: Mapping[str, str] = Field(default={}, exclude_if=lambda waived: not waived)
    """Checks of the conformance suite that the task's data cannot pass, each with the reason; only those of
    :data:`peft_arena.testing.tasks.WAIVABLE`. Each must then fail."""

    @property
    def headline(self) -> Metric:
        """The metric the task is judged by."""
        return self.metrics[0]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | tuple[Message, ...]
"""Plain text, given to the model as it is; or a conversation, rendered by the tokenizer's own chat template."""


@dataclass(frozen=True)
class Item:
    """One question. ``id`` is a content id, so that the same item has the same id in every run."""

    question: str
    """The question, or the text itself for tasks of kind TEXT."""
    answer: str = ""
    """What the model is trained to say: the gold completion, rationale included."""
    choices: tuple[str, ...] = ()
    gold: int | None = None
    """Index of the right choice."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else scoring needs; JSON values only."""
    group: str = ""
    """What the item shares with others of its task (a passage, a template): items of one group are not independent
    evidence, and errors are computed over groups. Empty: the item stands alone. No part of the id."""

    @cached_property
    def id(self) -> str:
        """Content id over every field but the group."""
        return content_id([self.question, self.answer, self.choices, self.gold, dict(self.data)])


class Part(NamedTuple):
    """One further value of an item and the units behind it."""

    value: float
    weight: float = 1.0


@dataclass(frozen=True)
class Score:
    """The result of one item. A value of None means it could not be scored, and ``reason`` says why."""

    value: float | None
    """Headline value; in [0, 1] for accuracies and rewards."""
    extracted: str = ""
    """The part of the completion that was judged."""
    reason: str = ""
    weight: float = 1.0
    """Units behind the value (tokens of a document, instructions of a prompt); a task's mean is weighted by it."""
    others: Mapping[str, Part] = field(default_factory=dict)
    """Values of the card's further metrics, by metric name."""

    def __post_init__(self) -> None:
        """Require a reason where there is no value."""
        if self.value is None and not self.reason:
            raise ValueError("a score without a value needs a reason")


@dataclass(frozen=True)
class Generation:
    """When to stop generating."""

    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)

    def cut(self, text: str) -> str:
        """Return the text up to, and without, the first of the stop strings."""
        ends = [place for place in (text.find(mark) for mark in self.stop if mark) if place >= 0]
        return text[: min(ends)] if ends else text


class TaskConfig(BaseModel):
    """Settings of a task; each task may subclass it. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Task(ABC):
    """One task: subclasses set its card, may set its config and generation, and define items, prompt and score."""

    card: TaskCard
    """Set by the class; an instance whose data depends on its settings replaces it by its own."""
    Config: ClassVar[type[TaskConfig]] = TaskConfig
    generation: Generation = Generation()
    samples_refused: str = ""
    """Why the headline cannot be taken over several samples of each item; empty if it can."""
    unusable: Literal["refuse", "count"] = "refuse"
    """What a plan does where an item's own answer cannot win."""

    def __init__(self, config: TaskConfig | None = None) -> None:
        """Create the task with its settings; the defaults where none are given."""
        self.config = config if config is not None else self.Config()

    def card_as_loaded(self) -> TaskCard:
        """Return the card for records: with the commit of data that was not pinned, once it is loaded.

        The card itself never changes: it is the one a study was planned with.
        """
        return self.card

    def notes(self) -> Sequence[str]:
        """Return what a reader of a plan should know of the data, a sentence each: what was recognised, what is odd."""
        return ()

    def place_of(self, item: Item) -> str:
        """Return where an item was read from, for messages: file and row, or its id."""
        return item.id

    def in_order(self, found: Iterable[T], key: Callable[[T], Item]) -> list[T]:
        """Return what was found of items in the order in which their data has them; here as it came."""
        return list(found)

    @abstractmethod
    def items(self, split: Split) -> Sequence[Item]:
        """Return all items of a split, in a fixed order, the same on every machine.

        Raises:
            UserError: the task has no such split (an :func:`peft_arena.core.errors.unknown` split), or its data cannot
                be found.
        """

    @property
    def at_hand(self) -> bool:
        """Whether the items can be had at once and without any network, so that a plan may read them.

        Here: where they are files of the user's. Generators that are fast say so themselves.
        """
        return self.reads_files

    @property
    def reads_files(self) -> bool:
        """Whether the items come from files of the user's: the settings name a ``path``."""
        return getattr(self.config, "path", None) is not None

    @abstractmethod
    def prompt(self, item: Item) -> Prompt:
        """Return what the model is shown."""

    def score(self, item: Item, completion: str) -> Score:
        """Judge a completion. Total: any string gives a score, none raises. For tasks of kind GENERATE."""
        raise TypeError(f"task {self.card.name} is of kind {self.card.kind}: it does not judge completions")

    def continuations(self, item: Item) -> tuple[str, ...]:
        """Return the texts whose likelihoods are compared, each as it follows the prompt. For kind CHOICE."""
        return tuple(f" {choice}" for choice in item.choices)

    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        """Judge by the log-likelihood (nats) of each continuation. For kind CHOICE.

        The headline picks the highest log-likelihood per character, ``accuracy_sum`` the highest sum; a tie goes to
        the first option.
        """
        if item.gold is None:
            return Score(None, reason="the item has no right choice")
        texts = self.continuations(item)
        per_character = [total / max(len(text), 1) for total, text in zip(log_likelihoods, texts, strict=True)]
        picked = max(range(len(texts)), key=per_character.__getitem__)
        by_sum = max(range(len(texts)), key=list(log_likelihoods).__getitem__)
        others = {
            "accuracy_sum": Part(float(by_sum == item.gold)),
            "gold_nll": Part(-log_likelihoods[item.gold]),
        }
        return Score(float(picked == item.gold), extracted=item.choices[picked], others=others)

    def score_text(self, item: Item, log_likelihood: float, tokens: int) -> Score:
        """Judge by the log-likelihood (nats) of the item's text over so many predicted tokens. For kind TEXT."""
        if tokens < 1:
            return Score(None, reason="the text has no predicted token")
        size = max(len(item.question.encode()), 1)
        bits = Part(-log_likelihood / math.log(2) / size, weight=float(size))
        return Score(-log_likelihood / tokens, weight=float(tokens), others={"bits_per_byte": bits})

    def settle(self, items: Sequence[Item], scores: Sequence[Score]) -> Sequence[Score]:
        """Turn the scores of all items of one evaluation into those whose weighted mean is the headline.

        For headlines that are no mean over items (F1, a correlation, a mean over subtasks); see
        :mod:`peft_arena.tasks.settle`. Here the scores stay as they are.

        Args:
            items: what was asked.
            scores: one for each item; of sampled answers their mean.
        """
        return scores

    def settle_rates(self, items: Sequence[Item], rates: Sequence[float | None]) -> Sequence[float | None]:
        """Turn further rates of the items of one evaluation, such as pass@k, into those whose mean is reported.

        For headlines that are means over parts: the rates are then taken over the same parts.

        Args:
            items: what was asked.
            rates: one for each item; None where it was not scored.
        """
        return rates

    def reward_caution(self) -> str:
        """Return in one clause how answers can win the score without being right; empty where no way is known.

        It is said where the score is chosen as a reward: reinforcement learning finds such ways.
        """
        return ""

    def metrics_of(self, item: Item) -> tuple[str, ...]:
        """Return the names of the further metrics an item has a value for: all of them, unless the task says less."""
        return tuple(metric.name for metric in self.card.metrics[1:])

    def target(self, item: Item) -> str:
        """Return the completion to train on, exactly as the model should write it after the prompt."""
        return item.answer


def split_items(task: Task, split: Split) -> Sequence[Item] | None:
    """Return the items of a split; None where the task has no such split.

    Raises:
        UserError: the task's data cannot be found.
    """
    try:
        return task.items(split)
    except UnknownNameError as error:
        if error.kind != "split":
            raise
        return None
