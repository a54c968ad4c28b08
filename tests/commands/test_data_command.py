"""A look at a file: what it says is what is there, and the task to paste is one that a study takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_arena.cli.app_data import columns_of
from peft_arena.cli.console_data import lines_of
from peft_arena.commands.data_command import look_at
from peft_arena.core.errors import UserError
from peft_arena.study.read_study import study_from
from peft_arena.study.writable_gold import check_written
from peft_arena.tasks.registry import make_task
from tests.tasks.test_custom import write


def study_of(entry: str) -> dict[str, Any]:
    return {
        "name": "pasted",
        "title": "pasted",
        "model": {"name": "micro"},
        "targets": yaml.safe_load(entry),
        "train": {"schedule": {"steps": 2}, "validation_items": 2},
        "arms": [{"method": "lora", "train": {"learning_rate": 1e-3}}],
        "seeds": [0],
    }


LABELS = [{"text": f"ticket {n}", "label": ["red", "blue", "red"][n % 3]} for n in range(60)]
NUMBERS = [{"question": f"{n} + 1?", "answer": n + 1} for n in range(60)]
BOXES = [{"problem": f"{n} + 1?", "solution": f"So \\boxed{{{n + 1}}}"} for n in range(60)]
SHORT = [{"question": f"Who is {n}?", "answers": [f"Person {n}", f"P{n}"]} for n in range(60)]
LONG = [{"instruction": f"Tell {n}.", "output": f"Once {n}.\n\nThe end."} for n in range(60)]
OPTIONS = [{"question": f"Is {n} even?", "options": ["no", "yes"], "answer": "AB"[n % 2]} for n in range(60)]


@pytest.mark.parametrize(
    ("rows", "form", "scorer"),
    [
        (LABELS, "pairs (text, label)", "exact_match"),
        (NUMBERS, "pairs (question, answer)", "numeric"),
        (BOXES, "pairs (problem, solution)", "boxed"),
        (SHORT, "prompts and accepted answers (question, answers)", "normalised_match"),
        (LONG, "Alpaca (instruction, input, output)", "exact_match"),
        (OPTIONS, "multiple choice (question, options, answer)", "multiple_choice"),
    ],
)
def test_form_and_scorer_of_a_file(rows: list[Any], form: str, scorer: str, tmp_path: Path) -> None:
    found = look_at(write(tmp_path / "mine.jsonl", rows))
    assert (found.rows, found.form, found.scorer) == (60, form, scorer)
    assert sum(found.items.values()) == 60
    assert not found.refused
    study = study_from(study_of(found.entry))
    assert study.targets[0].task.config["scorer"] == scorer
    assert json.loads(json.dumps(found.summary()))["rows"] == 60
    assert any("long texts" in line for line in lines_of(found)) == (rows is LONG)


def test_what_is_wrong_with_a_file_is_counted(tmp_path: Path) -> None:
    rows: list[Any] = [*LABELS, *LABELS[:3], {"text": "ticket 5", "label": "blue"}, {"text": "Ticket 6.", "label": "x"}]
    rows += [{"text": None, "label": "red"}, {"text": "cut \udc11", "label": "red"}, {"text": " ", "label": "red"}]
    found = look_at(write(tmp_path / "mine.jsonl", rows))
    assert (found.rows, found.duplicates, found.near_duplicates, found.several_answers) == (68, 3, 2, 1)
    assert [(one.reason, one.rows) for one in found.refused] == [
        ("column 'text' is empty", 2),
        ("column 'text' holds half of a character (a lone surrogate)", 1),
    ]
    assert "row 66" in found.refused[0].first
    assert "mine.jsonl row 6 and" in found.several_first
    assert (found.labels["red"], found.labels["x"]) == (40, 1)
    text = "\n".join(lines_of(found))
    assert "refused: 2 rows: column 'text' is empty; first" in text
    assert "# unusable: count   # instead of refusing 3 rows" in text


def test_what_is_pasted_is_what_a_plan_takes(tmp_path: Path) -> None:
    """A limit that was made without a tokenizer holds in any; the count of refused rows is that of rows."""
    rows = [{"question": f"q{n}", "answer": chr(0x12000 + n) * 14} for n in range(60)]
    found = look_at(write(tmp_path / "signs.jsonl", rows))
    assert not check_written(study_from(study_of(found.entry)))
    rows = [{"question": f"q{n}", "answer": f"{n}<|im_end|>" if n % 2 else str(n)} for n in range(60)]
    found = look_at(write(tmp_path / "ends.jsonl", rows), model="micro")
    assert [one.rows for one in found.refused] == [30]
    assert "# unusable: count   # instead of refusing 30 rows" in found.entry
    assert "ends.jsonl row 2" in found.refused[0].first


def test_few_rows_are_said_whatever_the_file_is_called(tmp_path: Path) -> None:
    for name in ("two.jsonl", "multiple_choice.jsonl"):
        found = look_at(write(tmp_path / name, [*NUMBERS[:2], {"question": "x", "answer": None}]))
        assert found.unfit.startswith(
            "nothing is left for validation, test: 3 rows hold only 2 different prompts and 1"
        )
        assert [one.reason for one in found.refused] == ["column 'answer' is empty"]
        assert any(line.startswith("refused as a whole: nothing is left") for line in lines_of(found))


def test_an_answer_that_its_scorer_cannot_give(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", NUMBERS)
    found = look_at(path, scorer="boxed")
    assert [(one.reason, one.rows) for one in found.refused] == [("its own answer cannot win", 60)]
    with pytest.raises(UserError, match="cannot win"):
        make_task("custom", yaml.safe_load(found.entry)[0]["config"])


def test_lengths_are_in_tokens_of_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", NUMBERS)
    plain, tokens = look_at(path), look_at(path, model="micro")
    assert (plain.answers.unit, plain.answers.longest, plain.answers.of) == ("characters", 2, 60)
    assert (tokens.answers.unit, tokens.answers.of) == ("tokens", 60)
    assert tokens.prompts.longest > tokens.answers.longest


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"x": f"q{n}", "y": f"a{n}"} for n in range(30)])
    with pytest.raises(UserError, match="cannot tell which columns"):
        look_at(path)
    found = look_at(path, columns=columns_of("prompt=x, response=y"))
    assert found.columns == {"prompt": "x", "response": "y"}
    for text in ("x", "prompt=", "=x", ","):
        with pytest.raises(UserError, match="--columns takes USE=COLUMN"):
            columns_of(text)
