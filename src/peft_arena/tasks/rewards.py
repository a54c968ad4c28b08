"""Rewards of reinforcement learning: the task's own score, form, an end, length; and those of installed plug-ins.

A reward is one term of a weighted sum. It sees one completion at a time, its value is a finite number, and it never
executes what a model wrote. Importing this module imports no task.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from peft_arena.core.build import build
from peft_arena.core.errors import first_line
from peft_arena.core.registry import Registry
from peft_arena.core.specs import RewardSpec
from peft_arena.tasks.base import Item, Kind, Score, Task

GROUP = "peft_arena.rewards"
"""Entry points of this group are rewards of installed plug-ins."""


class Answer(NamedTuple):
    """One completion of an item's prompt."""

    item: Item
    completion: str
    """Cut at the task's stop string, as in evaluation."""
    tokens: int
    """Tokens of the completion, its end token included."""
    ended: bool
    """Whether it ended before the limit of new tokens."""
    limit: int | None = None
    """The limit of new tokens; None: the task's own."""


class Judged(NamedTuple):
    """What a completion was worth."""

    score: Score
    """The task's own; unscored where it raised, gave no finite number or took too long."""
    rewards: dict[str, float]
    """Value of every reward by name, not weighted, finite."""
    problems: Mapping[str, str] = MappingProxyType({})
    """Why a reward is 0 that raised or gave no finite number, by name."""


class RewardCard(BaseModel):
    """What a reader must know about a reward."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    description: str
    range: tuple[float | None, float | None]
    """Smallest and largest value; None where there is no bound."""


class RewardConfig(BaseModel):
    """Settings of a reward; each reward may subclass it. Unknown keys are errors.

    The docstring below a field is its description in the documentation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Reward(ABC):
    """One term of a reward, with its settings."""

    card: ClassVar[RewardCard]
    Config: ClassVar[type[RewardConfig]] = RewardConfig

    def __init__(self, config: RewardConfig | None = None) -> None:
        """Create the reward with its settings; the defaults where none are given."""
        self.config = config if config is not None else self.Config()

    def refuses(self, task: Task, limit: int) -> str:
        """Return in one line why the reward cannot judge answers to this task; empty if it can.

        Args:
            task: that asks.
            limit: most tokens of an answer.
        """
        return ""

    def caution(self, task: Task) -> str:
        """Return in one clause how answers to this task can win the reward without being right; empty if unknown."""
        return ""

    @abstractmethod
    def value(self, task: Task, answer: Answer, score: Score) -> float:
        """Return what an answer is worth.

        Args:
            task: that asked.
            answer: any text may be in it.
            score: the task's own of the same answer; without a value where it could not be scored.
        """


class TaskReward(Reward):
    """The task's own score."""

    card = RewardCard(
        name="task",
        title="Task score",
        description="The task's own score of the answer, the one that evaluations report; 0 where it has no value.",
        range=(0.0, 1.0),
    )

    def caution(self, task: Task) -> str:
        """Return how the task's own score can be won."""
        return task.reward_caution()

    def value(self, task: Task, answer: Answer, score: Score) -> float:
        """Return the score's value, 0 without one."""
        return 0.0 if score.value is None else score.value


class FormatConfig(RewardConfig):
    """Settings of ``format``."""

    pattern: str | None = None
    """Regular expression that must match the completion from start to end, white space around it left out; a point
    matches line ends too. None: the task must find something to judge in the completion."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "", re.DOTALL)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return pattern


class FormatReward(Reward):
    """1 for a completion of the right form."""

    card = RewardCard(
        name="format",
        title="Form",
        description="1 if the completion has the form of `pattern`; without one, if it holds anything to judge.",
        range=(0.0, 1.0),
    )
    Config = FormatConfig

    def value(self, task: Task, answer: Answer, score: Score) -> float:
        """Return 1 for a match of the whole completion, or for something to judge; else 0."""
        assert isinstance(self.config, FormatConfig)
        if self.config.pattern is None:
            return float(bool(score.extracted.strip()))
        return float(re.fullmatch(self.config.pattern, answer.completion.strip(), re.DOTALL) is not None)


class EndedReward(Reward):
    """1 for a completion that ends."""

    card = RewardCard(
        name="ended",
        title="Ended",
        description="1 if the completion ended before the limit of new tokens.",
        range=(0.0, 1.0),
    )

    def value(self, task: Task, answer: Answer, score: Score) -> float:
        """Return 1 if the completion ended by itself; else 0."""
        return float(answer.ended)


class LengthConfig(RewardConfig):
    """Settings of ``length``."""

    limit: int | None = Field(default=None, ge=1)
    """Tokens at which the punishment is -1; None: the limit of new tokens."""
    buffer: int = Field(ge=1)
    """Tokens before the limit over which the punishment grows."""


class LengthReward(Reward):
    """A soft punishment of long completions."""

    card = RewardCard(
        name="length",
        title="Soft overlong punishment",
        description=(
            "0 up to `limit` - `buffer` tokens, falling linearly to -1 at `limit` and beyond "
            "(Yu et al. 2025, DAPO, equation 13)."
        ),
        range=(-1.0, 0.0),
    )
    Config = LengthConfig

    def refuses(self, task: Task, limit: int) -> str:
        """Refuse a buffer longer than the limit: every completion would be punished."""
        buffer, limit = self._settings.buffer, self._limit(task, limit)
        return "" if buffer <= limit else f"buffer {buffer} is longer than the limit of {limit} tokens"

    def value(self, task: Task, answer: Answer, score: Score) -> float:
        """Return the punishment for the completion's tokens."""
        over = answer.tokens - (self._limit(task, answer.limit) - self._settings.buffer)
        return 0.0 - min(max(over / self._settings.buffer, 0.0), 1.0)

    @property
    def _settings(self) -> LengthConfig:
        assert isinstance(self.config, LengthConfig)
        return self.config

    def _limit(self, task: Task, given: int | None) -> int:
        return self._settings.limit or given or task.generation.max_new_tokens


def problem_of(name: str, found: object) -> str:
    """Say why an object cannot be the reward of a name; empty if it can."""
    if not (isinstance(found, type) and issubclass(found, Reward)):
        return "it is not a subclass of peft_arena.tasks.rewards.Reward"
    card, config = getattr(found, "card", None), getattr(found, "Config", None)
    if not isinstance(card, RewardCard):
        return "it has no card"
    if not (isinstance(config, type) and issubclass(config, RewardConfig)):
        return "its Config is not a subclass of RewardConfig"
    return "" if card.name == name else f"its card says the reward is called '{card.name}'"


REWARDS: Registry[type[Reward]] = Registry(
    "reward",
    {
        "ended": f"{__name__}:EndedReward",
        "format": f"{__name__}:FormatReward",
        "length": f"{__name__}:LengthReward",
        "task": f"{__name__}:TaskReward",
    },
    group=GROUP,
    problem=problem_of,
)
"""Name to reward class."""


def reward_spec(name: str, weight: float = 1.0, config: Mapping[str, Any] | None = None, where: str = "") -> RewardSpec:
    """Return the spec of a reward, every default written out.

    Args:
        name: one of ``REWARDS.names()``.
        weight: factor of its value in the sum.
        config: the reward's own settings; what is not given takes its default.
        where: file and line, or the option, the request was read from, for messages.

    Raises:
        UserError: unknown name, unknown key or forbidden value, or a weight that is no finite number.
    """
    settings = _make(name, config or {}, where).config.model_dump(mode="json")
    table = {"name": name, "weight": weight, "config": settings, "plugin": REWARDS.plugin(name)}
    return build(RewardSpec, table, where=_place(name, where))


def reward_of(spec: RewardSpec) -> Reward:
    """Return the reward a spec describes, and only that one.

    Raises:
        UserError: unknown name, unknown key or forbidden value; or the reward now comes from another plug-in, or
            version of it, than the spec names.
    """
    REWARDS.check_plugin(spec.name, spec.plugin)
    return _make(spec.name, spec.config, "")


def refusal(reward: Reward, task: Task, limit: int) -> str:
    """Return in one line why answers to a task of at most ``limit`` tokens cannot be rewarded so; empty if they can."""
    if task.card.kind is not Kind.GENERATE:
        return (
            f"task {task.card.name} is of kind {task.card.kind}: only what a model writes can be rewarded, "
            f"tasks of kind {Kind.GENERATE}"
        )
    problem = reward.refuses(task, limit)
    return f"reward {reward.card.name} cannot judge task {task.card.name}: {problem}" if problem else ""


def caution(reward: Reward, task: Task) -> str:
    """Return a line that says how a reward can be won without being right; empty where no way is known."""
    how = reward.caution(task)
    return f"reward {reward.card.name} on {task.card.name} can be won without being right: {how}" if how else ""


def judge_answer(task: Task, rewards: Sequence[Reward], answer: Answer) -> Judged:
    """Score an answer and give it every reward; whatever task and rewards raise becomes a reason.

    It takes as long as the task takes: :class:`peft_arena.tasks.judge.Judge` bounds the time.
    """
    score = _score(task, answer)
    values: dict[str, float] = {}
    problems: dict[str, str] = {}
    for reward in rewards:
        name = reward.card.name
        try:
            values[name] = float(reward.value(task, answer, score))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plug-in raises anything; training must go on
            values[name], problems[name] = 0.0, f"reward {name} raised {_told(error)}"
        if not math.isfinite(values[name]):
            values[name], problems[name] = 0.0, f"reward {name} gave {values[name]}"
    return Judged(score, values, problems)


def _score(task: Task, answer: Answer) -> Score:
    """Return the task's score, without a value where it raised or is no finite number."""
    name = task.card.name
    try:
        score = task.score(answer.item, answer.completion)
        if not isinstance(score, Score):
            return Score(None, reason=f"task {name} gave {type(score).__name__} instead of a Score")
        if score.value is not None and not math.isfinite(score.value):
            return Score(None, extracted=score.extracted, reason=f"task {name} gave {score.value}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
        return Score(None, reason=f"task {name} raised {_told(error)}")
    return score


def _told(error: BaseException) -> str:
    """Return type and first line of an error, of bounded length: it may quote a completion."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def _make(name: str, config: Mapping[str, Any], where: str) -> Reward:
    kind = REWARDS.get(name, where)
    return kind(build(kind.Config, config, where=_place(name, where)))


def _place(name: str, where: str) -> str:
    return f"reward {name}" + (f", {where}" if where else "")
