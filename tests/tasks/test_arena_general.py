"""PEFT-Arena's general and extended benchmarks: extraction, prompts, means over parts; on rows made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peft_arena.tasks.benchmarks.code_humaneval as code_humaneval
import peft_arena.tasks.benchmarks.executing as executing
import peft_arena.tasks.sandbox as sandbox
from peft_arena.core.errors import UserError
from peft_arena.tasks.base import Item, Kind, Message, Score, Task
from peft_arena.tasks.benchmarks import ARENA_GENERAL
from peft_arena.tasks.benchmarks.bbh import SUBTASKS, stated_answer, worked_examples
from peft_arena.tasks.benchmarks.code_humaneval import OFF, HumanEval, program_of
from peft_arena.tasks.benchmarks.executing import ExecuteConfig
from peft_arena.tasks.benchmarks.extended import LANGUAGES, SUBJECTS
from peft_arena.tasks.benchmarks.general import answer_part
from peft_arena.tasks.benchmarks.letters import first_letter
from peft_arena.tasks.groups import GROUPS
from peft_arena.tasks.registry import make_task


def mini(name: str, **settings: Any) -> Task:
    return make_task(name, {"source": "miniature", **settings})


def last_turn(task: Task, item: Item) -> str:
    prompt = task.prompt(item)
    assert not isinstance(prompt, str)
    return prompt[-1].content


def test_the_groups_are_complete() -> None:
    assert set(GROUPS["general"]) | set(GROUPS["general-extended"]) == set(ARENA_GENERAL)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (C) because", "C"),
        ("**D**", "D"),
        ("The answer is B.", "B"),
        ("A and B are close, but the answer is: (C)", "C"),
        ("Answer: **d**", "D"),
        ("A dog runs, so D", "D"),
        ("The answer is A because dogs run, and B does not", "A"),
        ("A is correct, not B", "A"),
        ("A or B", ""),
        ("A\n\nthe dog, not B", "A"),
        ("A. The dog", "A"),
        ("E", ""),
        ("Because", ""),
        ("I'd say nothing", ""),
        ("", ""),
    ],
)
def test_the_letter_of_a_short_answer(text: str, letter: str) -> None:
    assert first_letter(text, 4) == letter


@pytest.mark.parametrize(
    ("text", "gold", "said"),
    [
        ("So the answer is (B).", "(B)", "(B)"),
        ("the answer is B.", "(B)", "(B)"),
        ("answer is **(B)**.", "(A)", "(B)"),
        ("The answer is (A). No, the answer is (B).", "(B)", "(A)"),  # the first counts
        ("It may be (C).", "(A)", "(C)"),
        ("answer is Both", "(B)", "Both"),
        ("answer is $\\boxed{\\text{B}}$.", "(A)", "(B)"),
        ("answer is Option B.", "(A)", "(B)"),
        ("answer is True.\nmore", "True", "True"),
        ("answer is ] } )", "] } )", "] } )"),
        ("answer is 5.", "5", "5"),
        ("Answer Is 5", "5", "Answer Is 5"),
        ("", "5", ""),
    ],
)
def test_the_answer_of_a_chain_of_thought(text: str, gold: str, said: str) -> None:
    assert stated_answer(text, gold) == said


def test_worked_examples_are_those_of_the_installed_package() -> None:
    for subtask in SUBTASKS:
        text = worked_examples(subtask)
        assert text.count("A: Let's think step by step.\n") == 3, subtask
        assert text.count("answer is ") >= 3, subtask
    with pytest.raises(UserError, match="no worked examples of no_such_task in the installed lm_eval"):
        worked_examples("no_such_task")


def test_a_problem_of_bbh_follows_its_own_examples() -> None:
    task = mini("arena-bbh")
    item = next(item for item in task.items("test") if item.data["part"] == "date_understanding")
    shown = last_turn(task, item)
    assert shown.startswith("Infer the date from context.\n\nQ: ")
    assert shown.endswith(f"Q: {item.question}\nA: Let's think step by step.")
    assert shown.count("\n\nQ: ") == 4


def test_parts_have_equal_weight_whatever_their_size() -> None:
    task = mini("arena-bbh")
    items = task.items("test")
    assert sorted(item.data["part"] for item in items) == [
        "boolean_expressions", "boolean_expressions", "date_understanding", "date_understanding", "dyck_languages",
        "dyck_languages", "word_sorting", "word_sorting",
    ]  # fmt: skip
    right = {"boolean_expressions": 1, "date_understanding": 2, "dyck_languages": 1, "word_sorting": 0}
    scores: list[Score] = []
    for item in items:
        known = right[item.data["part"]] > 0
        right[item.data["part"]] -= known
        scores.append(task.score(item, item.answer if known else "answer is nothing"))
    settled = task.settle(items, scores)
    values = [score.value for score in settled]
    assert sum(value or 0 for value in values) / 8 == pytest.approx((1 / 2 + 1 + 1 / 2 + 0) / 4)
    items_right = [score.others["item_accuracy"].value for score in settled]
    assert sum(items_right) / 8 == pytest.approx(4 / 8)


@pytest.mark.parametrize(
    ("name", "parts"), [("arena-bbh", SUBTASKS), ("arena-mmlu", SUBJECTS), ("arena-xcopa", LANGUAGES)]
)
def test_a_mean_over_some_parts_is_none(name: str, parts: tuple[str, ...]) -> None:
    assert len(set(parts)) == {"arena-bbh": 27, "arena-mmlu": 57, "arena-xcopa": 11}[name]
    whole = make_task(name)
    items = mini(name).items("test")
    settled = whole.settle(items, [Score(1.0) for _ in items])
    assert {score.value for score in settled} == {None}
    assert "fewer than 2 scored items in" in settled[0].reason


def test_instructions_weigh_a_request(wheel_for: Callable[[str], None]) -> None:
    wheel_for("arena-ifeval")
    task = mini("arena-ifeval")
    assert sorted(task.score(item, item.answer).weight for item in task.items("test")) == [1, 2, 2, 2, 3]
    item = next(item for item in task.items("test") if len(item.data["kwargs"]) == 3)
    assert "keywords" not in item.data["kwargs"][0]  # what is null on the hub is no argument
    score = task.score(item, "I packed [name].")
    assert (score.value, score.weight, score.others["prompt_strict"].value) == (pytest.approx(1 / 3), 3, 0.0)


@pytest.mark.parametrize(
    ("text", "contains", "exact"),
    [
        ("The answer is 8.", 1.0, 1.0),
        ("the Answer is: Eight", 1.0, 1.0),
        ("It has eight legs", 1.0, 0.0),
        ("The answer is six, no, the answer is eight\nor nine", 1.0, 1.0),
        ("Six.\nThe answer is eight", 0.0, 0.0),
        ("18", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_an_accepted_answer_is_held_or_given(text: str, contains: float, exact: float) -> None:
    task = mini("arena-nq")
    item = next(item for item in task.items("test") if "spider" in item.question)
    score = task.score(item, text)
    assert (score.value, score.others["exact_match"].value) == (contains, exact)


def test_nothing_after_the_mark_is_no_answer() -> None:
    assert answer_part("so the answer is") == ""
    assert answer_part("x ANSWER IS: y ") == "y"


def test_shots_are_answered_turns_of_the_same_part() -> None:
    task = mini("arena-mmlu")
    item = next(item for item in task.items("test") if item.data["part"] == "marketing")
    prompt = task.prompt(item)
    assert [turn.role for turn in prompt if isinstance(turn, Message)] == ["user", "assistant"] * 2 + ["user"]
    assert {turn.content for turn in prompt if isinstance(turn, Message) and turn.role == "assistant"} == {"C", "D"}
    assert last_turn(task, item).startswith("A multiple choice question about marketing. Reply with one letter, A, B")
    assert last_turn(task, item).endswith("\nAnswer:")


@pytest.mark.parametrize(
    ("name", "turns"), [("arena-hellaswag", 21), ("arena-winogrande", 1), ("arena-arc", 1), ("arena-gsm8k-cot", 9)]
)
def test_as_many_shots_as_the_protocol_says(name: str, turns: int) -> None:
    task = mini(name)
    for item in task.items("test"):
        assert len(task.prompt(item)) == turns


def test_an_item_is_never_its_own_shot(tmp_path: Path) -> None:
    rows = json.loads((Path(code_humaneval.__file__).parent / "miniatures" / "arena-gsm8k-cot.json").read_text())
    (tmp_path / "main").mkdir()
    for key in rows:
        (tmp_path / f"{key}.jsonl").write_text("\n".join(json.dumps(row) for row in rows["main/train"]))
    task = make_task("arena-gsm8k-cot", {"source": "file", "path": str(tmp_path)})
    for item in task.items("test"):
        prompt = task.prompt(item)
        assert len(prompt) == 9
        assert sum(item.question in turn.content for turn in prompt if isinstance(turn, Message)) == 1


def test_worked_problems_end_with_their_number() -> None:
    task = mini("arena-gsm8k-cot")
    item = next(item for item in task.items("test") if "Mira" in item.question)
    assert item.answer == "She reads 15 * 80 = 1200 pages.\nThe answer is 1200"
    for text, value in (
        ("1,200", 1.0),
        ("12 and then 1200.0 pages", 1.0),
        ("1200, or 12", 0.0),
        ("#### 1200 of 5", 1.0),
    ):
        assert task.score(item, text).value == value, text


def test_likelihoods_of_letters_are_another_form() -> None:
    task = mini("arena-hellaswag", form="likelihood")
    item = task.items("test")[0]
    assert task.card.kind is Kind.CHOICE
    assert task.continuations(item) == (" A", " B", " C", " D")
    prompt = task.prompt(item)
    assert isinstance(prompt, str)
    assert prompt.count("\nAnswer: ") == 10 and prompt.endswith("\nAnswer:")
    subjects = mini("arena-mmlu", form="likelihood")
    score = subjects.score_choice(subjects.items("test")[0], [-1.0, -2.0, -3.0, -4.0])
    assert set(score.others) == {metric.name for metric in subjects.card.metrics[1:]}


def test_labels_of_options_become_letters() -> None:
    items = {item.question.split("\n")[0]: item for item in mini("arena-arc").items("test")}
    numbered = items["What turns water into ice?"]
    assert (numbered.answer, numbered.question.split("\n")[2]) == ("B", "B. freezing")
    assert items["Which animal lays eggs?"].choices == ("A", "B", "C")
    assert items["What does a thermometer measure?"].choices == ("A", "B", "C", "D", "E")


def test_rows_whose_label_is_hidden_are_left_out(tmp_path: Path) -> None:
    row = {"sentence": "The _ is red.", "option1": "hat", "option2": "cap"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**row, "answer": answer}) for answer in ("", "2")))
    (item,) = make_task("arena-winogrande", {"source": "file", "path": str(path)}).items("test")
    assert item.question.endswith("A. The hat is red.\nB. The cap is red.")
    assert item.gold == 1


def test_both_options_of_xcopa_stand_in_one_template() -> None:
    task = mini("arena-xcopa")
    for item in task.items("test"):
        prompt = task.prompt(item)
        assert isinstance(prompt, str)
        assert prompt.startswith("Premise: ") and prompt.endswith(("\nCause:", "\nEffect:"))
        assert task.continuations(item) == tuple(f" {choice}" for choice in item.choices)


STUB = "import math\n\n\ndef half(x):\n    '''Return half of x.'''\n"


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("    return x / 2", f"{STUB}    return x / 2\n"),
        ("return x / 2", f"{STUB}    return x / 2\n"),
        ("Sure:\n```python\ndef half(x):\n    return x / 2\n```\nDone.", f"{STUB}\n\ndef half(x):\n    return x / 2\n"),
        ("```\n    return x / 2", f"{STUB}    return x / 2\n"),
        ("def halves(x): pass", f"{STUB}    def halves(x): pass\n"),
        ("1. So:\n   ```python\n   def half(x):\n       return 1\n   ```", f"{STUB}\n\ndef half(x):\n    return 1\n"),
        (
            "```sh\npip install x\n```\nthen\n```\ndef half(x):\n    return 1\n```",
            f"{STUB}\n\ndef half(x):\n    return 1\n",
        ),
        ("", f"{STUB}\n"),
    ],
)
def test_the_program_of_an_answer(completion: str, program: str) -> None:
    assert program_of(completion, STUB, "half") == program


def test_programs_are_not_run_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr(code_humaneval, "_outcome", refuse)
    monkeypatch.setattr(sandbox, "_run", refuse)
    assert ExecuteConfig().execute is False
    task = mini("arena-humaneval")
    score = task.score(task.items("test")[0], task.items("test")[0].answer)
    assert (score.value, score.reason) == (None, OFF)
    assert "execute: true" in OFF and "sandbox" in OFF


def test_a_wrong_function_fails_its_tests() -> None:
    if sandbox.refusal() is not None:
        pytest.skip("programs cannot be confined here")
    task = mini("arena-humaneval", execute=True)
    item = next(item for item in task.items("test") if item.data["entry_point"] == "initials")
    assert task.score(item, "return name").value == 0.0
    assert task.score(item, "return name").reason.startswith("AssertionError")
    assert task.score(item, "import sys\nsys.exit(0)").value == 0.0
    assert task.score(item, "return ''.join(w[0] for w in name.upper().split())").value == 1.0


def test_where_programs_cannot_be_confined_none_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (code_humaneval, executing):
        monkeypatch.setattr(module, "refusal", lambda: "no Landlock here")
    task = HumanEval(ExecuteConfig(source="miniature", execute=True))
    with pytest.raises(UserError, match="task arena-humaneval: no Landlock here"):
        task.items("test")
    item = mini("arena-humaneval").items("test")[0]
    assert task.score(item, item.answer) == Score(None, reason="no Landlock here")
