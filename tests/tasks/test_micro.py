"""The micro tasks keep the task contract: disjoint splits, the same items everywhere, a total score."""

from __future__ import annotations

import calendar
import hashlib
import json
import re
import subprocess
import sys

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.registry import Registry
from peft_arena.tasks.base import Kind, Message, Role, Split
from peft_arena.tasks.micro import MICRO_TASKS
from peft_arena.tasks.micro.base import MicroTask, draw, stream
from peft_arena.tasks.micro.facts import NAMES, PHRASINGS, Facts, value_of

REGISTRY: Registry[type[MicroTask]] = Registry("micro task", MICRO_TASKS)
NAMES_OF_TASKS = REGISTRY.names()
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FINGERPRINTS = {
    "micro-boolean": "327b2334b613",
    "micro-calendar": "cc3aa2025653",
    "micro-cipher": "e34454f7279c",
    "micro-compare": "0fd8a2d33359",
    "micro-facts": "15f23263a3e6",
    "micro-format": "88c43bfe51fe",
    "micro-months": "24a5cf4e4532",
    "micro-operator": "5eda39c142d0",
    "micro-position": "256ea589abff",
    "micro-reverse": "1db66c6ff940",
    "micro-sort": "6ad4e6380818",
}
"""First hex digits of the SHA-256 over all items: a change of any item needs a new VERSION."""

NASTY = ["", " ", "\n", "\0", "<|im_end|>", "a" * 10_000, "é" * 50, "١٢٣", "\ud800", "[", "(((", "None", "nan", "{}"]


@pytest.fixture(scope="module", params=NAMES_OF_TASKS)
def task(request: pytest.FixtureRequest) -> MicroTask:
    """One task of each name."""
    return REGISTRY.get(request.param)()


def fingerprint(task: MicroTask) -> str:
    """Return a hash of all items of all splits, in order."""
    text = json.dumps([[item.id for item in task.items(split)] for split in SPLITS])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def test_there_are_enough_tasks_of_each_role() -> None:
    roles = [REGISTRY.get(name).card.role for name in NAMES_OF_TASKS]
    assert roles.count(Role.TARGET) >= 2
    assert roles.count(Role.RETENTION) >= 5


def test_card_has_the_registered_name(task: MicroTask) -> None:
    assert task.card.name in NAMES_OF_TASKS
    assert task.card.kind is Kind.GENERATE
    assert "white space" in task.card.description
    assert task.card.chance is not None
    assert 0 <= task.card.chance <= 0.5


def test_every_split_has_enough_different_items(task: MicroTask) -> None:
    for split, least in (("train", 1000), ("validation", 200), ("test", 200)):
        items = task.items(split)
        assert len(items) >= least
        assert len({item.id for item in items}) == len(items)


def test_no_question_is_in_two_splits(task: MicroTask) -> None:
    questions = {split: {item.question for item in task.items(split)} for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not questions[one] & questions[other]


def test_no_content_is_in_two_splits_whatever_is_asked_of_it(task: MicroTask) -> None:
    """The operands without the wording: letters, the digits of numbers, names of months."""
    if task.card.name in ("micro-boolean", "micro-calendar", "micro-facts"):
        pytest.skip("its questions share all operands; the questions themselves are compared above")
    unordered = task.card.name in ("micro-sort", "micro-compare", "micro-months", "micro-operator")
    months = "|".join(calendar.month_name[1:])

    def operands(question: str) -> str:
        found = re.findall(rf"\b(?:[a-z]|[0-9]+|{months})\b", question)
        return " ".join(sorted(found) if unordered else found)

    contents = {split: {operands(item.question) for item in task.items(split)} for split in SPLITS}
    assert all("" not in found for found in contents.values())
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not contents[one] & contents[other]


def test_items_are_the_published_ones(task: MicroTask) -> None:
    assert fingerprint(task) == FINGERPRINTS[task.card.name]


def test_items_do_not_depend_on_the_hash_salt() -> None:
    code = (
        "from peft_arena.tasks.micro.letters import Sort; from peft_arena.tasks.micro.reasoning import Calendar\n"
        "print([task().items('test')[7].id for task in (Sort, Calendar)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(outputs) == 1


def test_gold_scores_one_and_wrong_scores_zero(task: MicroTask) -> None:
    for split in SPLITS:
        for item in task.items(split)[:100]:
            assert task.score(item, task.target(item)).value == 1.0
            assert task.score(item, f" {task.target(item)}\n").value == 1.0
            assert task.score(item, task.target(item) + "?").value == 0.0
            assert task.score(item, f"The answer is {task.target(item)}").value == 0.0


@pytest.mark.parametrize("completion", NASTY)
def test_any_string_gives_a_score(task: MicroTask, completion: str) -> None:
    assert task.score(task.items("test")[0], completion).value == 0.0


def test_letter_case_counts() -> None:
    task = REGISTRY.get("micro-cipher")()
    item = task.items("test")[0]
    assert task.score(item, item.answer.lower()).value == 0.0


def test_prompt_is_one_user_turn(task: MicroTask) -> None:
    item = task.items("test")[0]
    assert task.prompt(item) == (Message("user", item.question),)


def test_unknown_split_is_a_user_error(task: MicroTask) -> None:
    with pytest.raises(UserError, match=r"unknown split 'tset'.*Did you mean 'test'"):
        task.items("tset")  # type: ignore[arg-type]


def test_answers_fit_the_generation_limit(task: MicroTask) -> None:
    longest = max(len(item.answer) for split in SPLITS for item in task.items(split))
    assert longest <= task.generation.max_new_tokens
    assert all("\n" not in item.answer for item in task.items("test"))


HAND_MADE = [
    ("micro-sort", "Sort the letters: d a c b", "a b c d"),
    ("micro-cipher", "Shift the letters: a z m y", "BANZ"),
    ("micro-operator", "Which is 58 @ 37?", "85"),
    ("micro-reverse", "Which is 0120 reversed?", "0210"),
    ("micro-compare", "Which is larger: 41 or 85?", "85"),
    ("micro-compare", "Which is smaller: 41 or 85?", "41"),
    ("micro-boolean", "Evaluate: (true and not true) or (false or not false)", "true"),
    ("micro-calendar", "Which is the latest: Saturday, Monday or Sunday?", "Sunday"),
    ("micro-calendar", "Which is the earliest: May, January or April?", "January"),
    ("micro-months", "Give the latest of the months: May, June, January, April", "June"),
    ("micro-months", "Give the earliest of the months: July, May, December, June, August, November", "May"),
    ("micro-position", "Give the last of the letters: a b c d e", "e"),
    ("micro-format", "Write the letters with dashes: k a s", "k-a-s"),
    ("micro-format", "Write the letters in capitals: k a s", "K A S"),
    ("micro-format", "Write the letters twice: k a s", "k a s k a s"),
]
"""Answers worked out by hand."""


def solve_letters(name: str, question: str) -> str:
    """Answer a question on letters."""
    before, _, after = question.partition(": ")
    letters = after.split()
    match name:
        case "micro-sort":
            return " ".join(sorted(letters))
        case "micro-cipher":
            return "".join("A" if letter == "z" else chr(ord(letter) + 1).upper() for letter in letters)
        case "micro-position":
            return letters[{"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1}[before.split()[2]]]
    match before.split()[-1]:
        case "capitals":
            return after.upper()
        case "brackets":
            return f"[{after}]"
        case "twice":
            return f"{after} {after}"
        case "commas":
            return after.replace(" ", ", ")
    return after.replace(" ", "-")


def solve(name: str, question: str) -> str:
    """Answer a question of any task but facts, by other means than the generator's."""
    if name in ("micro-sort", "micro-cipher", "micro-position", "micro-format"):
        return solve_letters(name, question)
    numbers = re.findall(r"[0-9]+", question)
    match name:
        case "micro-boolean":
            return str(
                eval(question.removeprefix("Evaluate: ").replace("true", "True").replace("false", "False"))
            ).lower()
        case "micro-operator":
            tens, ones = ((int(numbers[0][place]) + int(numbers[1][place])) % 10 for place in (0, 1))
            return f"{tens}{ones}"
        case "micro-reverse":
            return "".join(reversed(numbers[0]))
        case "micro-compare":
            return str((max if "larger" in question else min)(map(int, numbers)))
    order = [*calendar.day_name, *calendar.month_name[1:]]
    named = sorted((word for word in re.findall(r"\w+", question) if word in order), key=order.index)
    return named[0] if "earliest" in question else named[-1]


@pytest.mark.parametrize(("name", "question", "answer"), HAND_MADE)
def test_the_reference_solver_agrees_with_hand_made_examples(name: str, question: str, answer: str) -> None:
    assert solve(name, question) == answer


def test_every_answer_agrees_with_the_reference_solver(task: MicroTask) -> None:
    if task.card.name == "micro-facts":
        pytest.skip("invented facts cannot be worked out")
    wrong = [
        item for split in SPLITS for item in task.items(split) if solve(task.card.name, item.question) != item.answer
    ]
    assert not wrong


def test_each_fact_is_trained_on_in_four_phrasings_and_tested_in_one() -> None:
    task = Facts()
    for who in NAMES[:8]:
        for what in ("pet", "town"):
            questions = {phrasing.format(who=who, what=what) for phrasing in PHRASINGS}
            counts = [sum(item.question in questions for item in task.items(split)) for split in SPLITS]
            assert counts == [4, 1, 1]
            answers = {item.answer for split in SPLITS for item in task.items(split) if item.question in questions}
            assert answers == {value_of(who, what)}


def test_no_set_of_months_is_one_the_packaged_model_was_trained_on() -> None:
    """The retention tasks name at most three months, so that no longer list of them was seen."""
    retention = [kind() for kind in map(REGISTRY.get, NAMES_OF_TASKS) if kind.card.role is Role.RETENTION]
    seen = [len(named_months(item.question)) for task in retention for item in task.items("train")]
    asked = [named_months(item.question) for split in SPLITS for item in REGISTRY.get("micro-months")().items(split)]
    assert max(seen) == 3
    assert {len(set(names)) for names in asked} == {len(names) for names in asked} == {4, 5, 6}


def named_months(question: str) -> list[str]:
    """Return the months a question names."""
    return [word for word in re.findall(r"\w+", question) if word in calendar.month_name[1:]]


def test_drawing_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot draw 3 different values from 2"):
        draw(stream("x"), "ab", 3)
