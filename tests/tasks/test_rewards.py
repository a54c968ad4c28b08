"""Rewards: known values, strict settings, plug-ins, and no task or reward that stops a training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_arena.core.errors import UserError
from peft_arena.core.specs import RewardSpec
from peft_arena.tasks.base import Generation, Item, Score, Task
from peft_arena.tasks.registry import make_task
from peft_arena.tasks.rewards import (
    GROUP,
    REWARDS,
    Answer,
    Reward,
    RewardCard,
    caution,
    judge_answer,
    problem_of,
    refusal,
    reward_of,
    reward_spec,
)

ITEM = Item("2+2", " 4", data={"answer": "4"})
RIGHT = Score(1.0)
SETTINGS: dict[str, dict[str, Any]] = {"length": {"buffer": 4}}


class Scripted(Task):
    """Scores as it is told."""

    card = make_task("micro-sort").card
    generation = Generation(max_new_tokens=10)

    def __init__(self, score: Callable[[], Any]) -> None:
        super().__init__()
        self._given = score

    def items(self, split: str) -> list[Item]:
        return [ITEM]

    def prompt(self, item: Item) -> str:
        return item.question

    def score(self, item: Item, completion: str) -> Score:
        return self._given()


class Odd(Reward):
    """Values as it is told."""

    card = RewardCard(name="odd", title="Odd", description="Odd.", range=(None, None))

    def __init__(self, value: Callable[[], Any]) -> None:
        super().__init__()
        self._given = value

    def value(self, task: Task, answer: Answer, score: Score) -> float:
        return self._given()


def made(name: str, **config: Any) -> Reward:
    return reward_of(reward_spec(name, config=config))


def value(name: str, completion: str = "4", tokens: int = 1, ended: bool = True, score: Score = RIGHT, **config: Any):
    return made(name, **config).value(Scripted(lambda: score), Answer(ITEM, completion, tokens, ended), score)


def fail(error: BaseException) -> Any:
    raise error


def test_task_is_the_score_and_0_without_one() -> None:
    assert value("task", score=Score(0.25)) == 0.25
    assert value("task", score=Score(None, reason="unreadable")) == 0.0


@pytest.mark.parametrize(
    ("pattern", "completion", "expected"),
    [
        (r"<a>.*</a>", " <a>one\ntwo</a>\n", 1.0),
        (r"<a>.*</a>", "so <a>1</a>", 0.0),
        (r"<a>.*</a>", "<a>1</a> end", 0.0),
        (r"a|ab", "ab", 1.0),
        (r"", "  ", 1.0),
    ],
)
def test_format_matches_from_start_to_end(pattern: str, completion: str, expected: float) -> None:
    assert value("format", completion, pattern=pattern) == expected


def test_format_without_pattern_asks_for_something_to_judge() -> None:
    assert value("format", score=Score(0.0, extracted="5")) == 1.0
    assert value("format", score=Score(0.0, extracted=" ")) == 0.0


def test_ended() -> None:
    assert [value("ended", ended=ended) for ended in (True, False)] == [1.0, 0.0]


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.0), (6, 0.0), (7, -0.25), (9, -0.75), (10, -1.0), (99, -1.0)])
def test_length_falls_over_the_buffer(tokens: int, expected: float) -> None:
    found = value("length", tokens=tokens, buffer=4)
    assert found == expected and math.copysign(1, found) == (1 if expected == 0 else -1)
    assert value("length", tokens=tokens + 10, buffer=4, limit=20) == expected
    answer = Answer(ITEM, "4", tokens + 5, True, limit=15)
    assert made("length", buffer=4).value(Scripted(lambda: RIGHT), answer, RIGHT) == expected


@given(text=st.text(st.characters()), tokens=st.integers(0, 10**6), ended=st.booleans(), extracted=st.text())
@pytest.mark.parametrize("name", REWARDS.own())
def test_every_reward_stays_in_its_range(name: str, text: str, tokens: int, ended: bool, extracted: str) -> None:
    low, high = REWARDS.get(name).card.range
    for score in (Score(0.5, extracted=extracted), Score(None, reason="none")):
        found = value(name, text, tokens, ended, score, **SETTINGS.get(name, {}))
        assert low is not None and high is not None and low <= found <= high


def test_a_spec_holds_every_default_and_makes_the_same_reward() -> None:
    assert reward_spec("task") == RewardSpec()
    spec = reward_spec("length", weight=0.5, config={"buffer": 3})
    assert spec == RewardSpec(name="length", weight=0.5, config={"limit": None, "buffer": 3})
    assert reward_of(spec).config.model_dump() == {"limit": None, "buffer": 3}
    assert [type(made(name, **SETTINGS.get(name, {}))) for name in REWARDS.own()] == list(
        map(REWARDS.get, REWARDS.own())
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("taks",), "unknown reward 'taks' (in s.yaml line 3). Did you mean 'task'?"),
        (("format", 1.0, {"patern": "x"}), "unknown key 'patern' (in reward format, s.yaml line 3)"),
        (
            ("format", 1.0, {"pattern": "(x"}),
            "pattern: is not a regular expression: missing ), unterminated subpattern",
        ),
        (("length",), "'buffer' is required (in reward length, s.yaml line 3)"),
        (("length", 1.0, {"buffer": 0}), "buffer: input should be greater than or equal to 1"),
        (("task", math.nan), "weight: input should be a finite number"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(UserError) as caught:
        reward_spec(*arguments, where="s.yaml line 3")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_only_what_a_model_writes_is_rewarded() -> None:
    assert "kind choice" in refusal(made("task"), make_task("piqa"), 10)
    assert "kind text" in refusal(made("task"), make_task("xsum-text"), 10)
    task = Scripted(lambda: Score(1.0))
    assert [refusal(made(name, **SETTINGS.get(name, {})), task, 10) for name in REWARDS.own()] == [""] * 4


def test_a_buffer_is_compared_with_the_limit_of_the_run_not_of_the_task() -> None:
    task = Scripted(lambda: RIGHT)
    assert task.generation.max_new_tokens == 10
    told = "reward length cannot judge task micro-sort: buffer 6 is longer than the limit of 5 tokens"
    assert refusal(made("length", buffer=6), task, 5) == told, "shorter than the task's"
    assert refusal(made("length", buffer=11), task, 11) == "", "longer than the task's"
    assert "limit of 7 tokens" in refusal(made("length", buffer=8, limit=7), task, 20), "its own goes first"


@pytest.mark.parametrize(
    ("score", "told"),
    [
        (lambda: fail(ValueError("odd\ntext")), "raised ValueError: odd"),
        (lambda: fail(SystemExit(1)), "raised SystemExit: 1"),
        (lambda: fail(RecursionError()), "raised RecursionError"),
        (lambda: Score(math.nan), "gave nan"),
        (lambda: Score(math.inf), "gave inf"),
        (lambda: 1.0, "gave float instead of a Score"),
        (lambda: Score("1"), "raised TypeError"),  # type: ignore[arg-type]
    ],
)
def test_a_task_that_cannot_score_leaves_the_answer_unscored(score: Callable[[], Any], told: str) -> None:
    judged = judge_answer(Scripted(score), [made("task"), made("ended")], Answer(ITEM, "4", 1, True))
    assert judged.score.value is None and told in judged.score.reason and "\n" not in judged.score.reason
    assert judged.rewards == {"task": 0.0, "ended": 1.0}


@pytest.mark.parametrize(
    ("given_value", "told"),
    [
        (lambda: math.nan, "reward odd gave nan"),
        (lambda: -math.inf, "reward odd gave -inf"),
        (lambda: None, "reward odd raised TypeError"),
        (lambda: 10**400, "reward odd raised OverflowError"),
        (lambda: fail(KeyError("x")), "reward odd raised KeyError: 'x'"),
    ],
)
def test_a_reward_that_is_no_number_is_0_with_the_reason(given_value: Callable[[], Any], told: str) -> None:
    judged = judge_answer(Scripted(lambda: Score(1.0)), [Odd(given_value), made("task")], Answer(ITEM, "4", 1, True))
    assert judged.rewards == {"odd": 0.0, "task": 1.0}
    assert set(judged.problems) == {"odd"} and told in judged.problems["odd"]


class Leaky(Scripted):
    """Says that its score can be won."""

    def reward_caution(self) -> str:
        return "any text wins"


def test_a_score_that_can_be_won_says_so_where_it_is_the_reward() -> None:
    task = Leaky(lambda: RIGHT)
    assert caution(made("task"), task) == ("reward task on micro-sort can be won without being right: any text wins")
    assert caution(made("ended"), task) == ""
    assert caution(made("task"), Scripted(lambda: RIGHT)) == ""


def test_what_cannot_be_a_reward_is_told() -> None:
    assert problem_of("odd", Odd) == ""
    assert "called 'odd'" in problem_of("even", Odd)
    assert "not a subclass" in problem_of("x", int)
    assert "no card" in problem_of("x", type("X", (Odd,), {"card": None}))
    assert "Config" in problem_of("odd", type("X", (Odd,), {"Config": dict}))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution ``brief 1.2`` that offers the reward ``brief``."""
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "brief-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brief\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nbrief = brief_code:Brief\n")
    (tmp_path / "brief_code.py").write_text(
        "from peft_arena.tasks.rewards import Reward, RewardCard\n"
        "class Brief(Reward):\n"
        "    card = RewardCard(name='brief', title='Brief', description='Short.', range=(None, 0.0))\n"
        "    def value(self, task, answer, score):\n"
        "        return -float(len(answer.completion))\n"
    )
    vars(REWARDS).pop("_plugins", None)
    yield
    monkeypatch.undo()
    vars(REWARDS).pop("_plugins", None)
    sys.modules.pop("brief_code", None)


def test_a_plugin_is_part_of_the_spec(plugin: None) -> None:
    assert "brief" in REWARDS.names() and "brief_code" not in sys.modules
    spec = reward_spec("brief", weight=0.1)
    assert spec == RewardSpec(name="brief", weight=0.1, plugin="brief 1.2")
    assert reward_of(spec).value(Scripted(lambda: Score(1.0)), Answer(ITEM, "four", 1, True), Score(1.0)) == -4.0
    with pytest.raises(UserError, match="was planned with brief 1.1"):
        reward_of(spec.model_copy(update={"plugin": "brief 1.1"}))


def test_the_example_of_the_documentation_is_a_reward() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    found: dict[str, Any] = {"__name__": "example"}
    exec(text.partition("```python\n")[2].partition("```")[0], found)
    brief = found["Brief"]
    assert problem_of("brief", brief) == "" and 'brief = "my_package:Brief"' in text
    task = Scripted(lambda: RIGHT)
    assert [brief().value(task, Answer(ITEM, "a " * words, 1, True), RIGHT) for words in (50, 51)] == [1.0, 0.0]


def test_every_reward_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    for name in REWARDS.own():
        settings = [f"`{field}`" for field in REWARDS.get(name).Config.model_fields]
        rows = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(rows) == 1 and all(setting in rows[0] for setting in settings), name
