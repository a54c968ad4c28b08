"""No text stops a scorer, changes its mind, or is executed: every scorer, and every task that judges text."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy.parsing.sympy_parser as sympy_parser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_arena.core.specs import TaskSpec
from peft_arena.tasks.base import Kind, Score, Task
from peft_arena.tasks.benchmarks import BENCHMARK_TASKS
from peft_arena.tasks.judge import Judge
from peft_arena.tasks.registry import TASKS, make_task
from peft_arena.tasks.rewards import Answer, reward_spec
from peft_arena.tasks.scorers import SCORERS

SMALL: dict[str, dict[str, Any]] = {
    name: {"train_items": 5, "validation_items": 5, "test_items": 5}
    for name in ("basic_arithmetic", "chain_sum", "gsm_symbolic")
} | {name: {"source": "miniature"} for name in BENCHMARK_TASKS}
"""Settings that make a task quickly."""
JUDGED = [name for name in TASKS.own() if name != "custom" and TASKS.get(name).card.kind is Kind.GENERATE]
TEXTS = st.one_of(
    st.text(st.characters()),
    st.text(alphabet="0123456789-+.,#^*/=\\{}$()[] \n\x00\ud800xy!"),
    st.lists(
        st.sampled_from(
            ("####", "\\boxed{", "}", "$", "\\frac{", "\\sqrt", "^", "answer is ", " 7", "-", "1,000", ".5", "%", "\\$")
        )
    ).map("".join),
)
PAYLOADS = (
    "__import__('os').system('touch {file}')",
    "open('{file}', 'w')",
    "(lambda: open('{file}', 'w'))()",
    "[open(f, 'w') for f in ['{file}']]",
    "exec(\"open('{file}', 'w')\")",
    "().__class__.__base__.__subclasses__()",
    "`touch {file}`",
    "$(touch {file})",
    "; touch {file};",
    "{{{{ open('{file}', 'w') }}}}",
    "1 + __import__('pathlib').Path('{file}').touch()",
    "!!python/object/apply:os.system ['touch {file}']",
)
GUISES = (
    "{}",
    "#### {}",
    "The final answer is {}. I hope it is correct.",
    "answer: {}",
    "\\boxed{{{}}}",
    "$\\operatorname{{{}}}(1)$",
    "$\\operatorname{{f}}({})$",
    "$f({})$",
    "$\\text{{{}}} = 9$",
    "$\\mathrm{{{}}}$",
    "$x_{{{}}}$",
    "$\\{{1, {}\\}}$",
    "$\\max({}, 2)$",
    "$\\sqrt{{{}}}$",
    "$\\frac{{{}}}{{2}}$",
    "$x = {}$",
    "$({}, 1]$",
    "```python\n{}\n```",
    '{{"answer": "{}"}}',
)


@pytest.fixture(scope="module")
def task_of_name(wheel_for: Callable[[str], None]) -> Callable[[str], Task]:
    """A function that makes a task once, or skips where its data cannot be had."""
    made: dict[str, Task] = {}

    def make(name: str) -> Task:
        wheel_for(name)
        return made.setdefault(name, make_task(name, SMALL.get(name)))

    return make


@pytest.fixture(params=SCORERS.own())
def custom(request: pytest.FixtureRequest, tmp_path: Path) -> Task:
    """A task of the user's own data with each scorer."""
    return make_custom(tmp_path, request.param)


def make_custom(folder: Path, scorer: str) -> Task:
    form = "\\boxed{{{}}}" if scorer == "boxed" else "{}"
    rows = [{"q": f"3+{number}", "a": form.format(3 + number)} for number in range(20)]
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return make_task("custom", {"path": str(path), "columns": {"prompt": "q", "response": "a"}, "scorer": scorer})


def check(score: Score, again: Score) -> None:
    assert score.value is None or (math.isfinite(score.value) and 0 <= score.value <= 1), score
    assert score.value is not None or score.reason
    assert all(math.isfinite(part.value) for part in score.others.values())
    assert score == again


def test_tasks_that_judge_text_were_found() -> None:
    assert len(JUDGED) >= 15 and {"asdiv", "gsm_symbolic", "instruction_following", "micro-sort"} <= set(JUDGED)


@pytest.mark.parametrize("name", JUDGED)
def test_every_task_judges_any_text(name: str, task_of_name: Callable[[str], Task]) -> None:
    task = task_of_name(name)
    items = list(task.items("test"))
    items = items[:200:10] if len(items) > 20 else items

    @settings(
        max_examples=20 if name in BENCHMARK_TASKS else 60, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(text=TEXTS, place=st.integers(0, len(items) - 1))
    def judge(text: str, place: int) -> None:
        check(task.score(items[place], text), task.score(items[place], text))

    judge()


def test_data_of_the_users_own_judge_any_text(custom: Task) -> None:
    item = custom.items("test")[0]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(text=TEXTS)
    def judge(text: str) -> None:
        check(custom.score(item, text), custom.score(item, text))

    judge()


LONG = {
    "digits": "9" * 300_000,
    "groups": "111" + ",111" * 75_000 + "1",
    "accents": "a" + "\u0315\u0300" * 100_000,
    "lines": "\n" * 300_000,
    "boxes": "\\boxed{" * 10_000,
    "brackets": "(" * 300_000,
    "dollars": "$" * 300_000,
    "words": "the " * 75_000,
    "nothing": "\x00" * 300_000,
    "surrogates": "\ud800" * 300_000,
    "tower": "$9^{9^{9^{9}}}$",
    "power": "$10^{99999}$",
    "factorial": "$99999!$",
    "equals": "$" + "=" * 3000 + "$",
    "matrix": "$\\operatorname{zeros}(99999, 99999)$",
    "answers": "answer is " * 1000,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("name", SCORERS.own())
def test_scorers_end_in_time_on_long_texts(name: str, kind: str) -> None:
    began = time.process_time()
    check(SCORERS.get(name)(["7"], LONG[kind]), SCORERS.get(name)(["7"], LONG[kind]))
    assert time.process_time() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", JUDGED)
def test_tasks_end_in_time_on_long_texts(name: str, task_of_name: Callable[[str], Task]) -> None:
    task = task_of_name(name)
    item = task.items("test")[0]
    for kind in ("digits", "groups", "lines", "brackets", "words", "surrogates"):
        text = LONG[kind][:50_000]
        began = time.process_time()
        check(task.score(item, text), task.score(item, text))
        assert time.process_time() - began < 10, kind


@pytest.mark.slow
def test_the_judge_ends_what_scorers_do_not(tmp_path: Path) -> None:
    task = make_custom(tmp_path, "math_verify")
    spec = TaskSpec(
        name="custom",
        version=task.card.version,
        revision=task.card.revision,
        config=task.config.model_dump(mode="json"),
    )
    item = task.items("test")[0]
    with Judge(spec, [reward_spec("task")], seconds=2) as judge:
        late, right = judge.judge([Answer(item, text, 9, True) for text in ("$(((9!)!)!)!$", f"${item.answer}$")])
    assert "took longer than 2 s" in late.score.reason
    assert (late.rewards["task"], right.rewards["task"]) == (0.0, 1.0)


def hostile(file: Path) -> list[str]:
    return [guise.format(payload.format(file=file)) for guise in GUISES for payload in PAYLOADS]


@pytest.mark.parametrize("name", [name for name in SCORERS.own() if name not in ("boxed", "math_verify")])
def test_scorers_execute_nothing(name: str, tmp_path: Path) -> None:
    for text in hostile(tmp_path / "made"):
        assert SCORERS.get(name)(["7"], text).value in (0.0, 1.0)
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm_symbolic", "instruction_following", "micro-operator", "micro-format"])
def test_tasks_execute_nothing(name: str, tmp_path: Path, task_of_name: Callable[[str], Task]) -> None:
    task = task_of_name(name)
    for text in hostile(tmp_path / "made")[::5]:
        task.score(task.items("test")[0], text)
    assert not (tmp_path / "made").exists()


def test_only_arithmetic_reaches_the_evaluation_of_sympy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain numbers go through sympy's ``parse_expr``, which uses ``eval``; nothing with a letter in it may."""
    seen: list[str] = []
    stringify = sympy_parser.stringify_expr

    def record(text: str, *arguments: Any) -> str:
        seen.append(text)
        return stringify(text, *arguments)

    SCORERS.get("math_verify")(["7"], "$\\sin 7$")  # imports what defines its own symbols so
    monkeypatch.setattr(sympy_parser, "stringify_expr", record)
    for text in (*hostile(tmp_path / "made"), "the answer is 1 + 2*(3 - 1)/5", "(1+2).real", "3 + 5 .__class__"):
        score = SCORERS.get("math_verify")(["7"], text)
        assert score.value in (0.0, None)
    assert any("3 - 1" in text for text in seen), "nothing was recorded: is this still what evaluates?"
    assert not [text for text in seen if not re.fullmatch(r"[\d\s.+\-*/()×÷]*", text)]
    assert not (tmp_path / "made").exists()


def test_an_answer_without_letters_evaluates_to_a_number_at_most(tmp_path: Path) -> None:
    for text in ("answer: 9**9**9**9**9", "1 (2) (3)", "answer: 5/0", "answer: 0**-1", "7" + "*(7" * 150):
        check(SCORERS.get("math_verify")(["7"], text), SCORERS.get("math_verify")(["7"], text))
