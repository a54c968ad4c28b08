"""A file where a task's name stands: in a study, in training and in evaluation without one; labels of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_arena.commands.single_run import evaluate_point, scores, train_one
from peft_arena.core.errors import UserError
from peft_arena.study.labels import task_labels
from peft_arena.study.model import Study
from peft_arena.study.preflight import check_study
from peft_arena.study.read_study import study_from
from peft_arena.study.study_view import view_of
from peft_arena.work.run_study import run_study

JUDGE = "def judge(answer, row):\n    return answer.strip() == row['answer']\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file of data and a scorer."""
    rows = [{"question": f"Turn round {n:03d}.", "answer": f"{n:03d}"[::-1], "n": n} for n in range(60)]
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.py").write_text(JUDGE)
    return tmp_path


def study(folder: Path, **target: Any) -> Study:
    entry = {"task": str(folder / "turned.jsonl"), "config": {"scorer": "exact_match", "max_new_tokens": 8}, **target}
    return study_from(
        {
            "name": "own",
            "title": "Mine",
            "model": {"name": "micro"},
            "targets": [entry],
            "train": {"schedule": {"steps": 2}, "learning_rate": 1e-3},
            "arms": [{"method": "lora"}],
            "seeds": [0],
        }
    )


def test_a_file_stands_for_the_task_of_its_data(folder: Path) -> None:
    found = study(folder)
    assert found.targets[0].task.name == "custom"
    assert list(task_labels(found).values()) == ["turned"]
    assert "read as pairs (question, answer)" in [note.text for note in check_study(found)]
    with pytest.raises(UserError, match="data file '.*gone.csv' does not exist"):
        study(folder, task=str(folder / "gone.csv"))
    with pytest.raises(UserError, match=r"targets.0.task.*two words"):
        study(folder, task="two words")


def test_a_label_names_the_task_and_is_no_part_of_the_run(folder: Path) -> None:
    plain, named = study(folder), study(folder, label="Turning round")
    assert [run.id for run in plain.runs()] == [run.id for run in named.runs()]
    assert list(task_labels(named).values()) == ["Turning round"]
    assert view_of(named).labels == {named.targets[0].id: "Turning round"}
    assert {note.about for note in check_study(named)} == {"Turning round"}


def test_one_run_and_evaluations_by_a_scorer_of_ones_own(folder: Path) -> None:
    data, own = str(folder / "turned.jsonl"), f"{folder / 'my.py'}:judge"
    settings = [f"task.scorer={own}", "task.max_new_tokens=8", "train.learning_rate=1e-3", "train.schedule.steps=2"]
    outcome, made = train_one("micro", "lora", data, settings, folder / "runs", quiet=True)
    assert outcome.complete
    (row,) = scores(made, folder / "runs")
    assert row["task"] == "turned"
    assert "unscored" not in row
    asked: dict[str, Any] = {"items": None, "split": "test", "dtype": "float32", "batch_size": None}
    (found,) = evaluate_point("micro", [data], folder / "runs", own={"scorer": own}, **asked)
    assert (found["task"], found["metric"], found["n"], found["unscored"]) == ("turned", "score", 6, 0)
    (folder / "my.py").write_text(JUDGE.replace("row['answer']", "row['gone']"))
    with pytest.raises(UserError, match="raised KeyError: 'gone' in line 2"):
        evaluate_point("micro", [data], folder / "runs", own={"scorer": own}, **asked)
    with pytest.raises(UserError, match="needs --scorer: one of boxed"):
        evaluate_point("micro", [data], folder / "runs", **asked)
    with pytest.raises(UserError, match="--scorer is for a file of your own, and --tasks names none"):
        evaluate_point("micro", ["micro-sort"], folder / "runs", own={"scorer": own}, **asked)


def test_an_answer_that_the_scorer_cannot_judge_is_unscored_with_its_row(folder: Path) -> None:
    judge = JUDGE.replace("return", "return None if row['n'] % 2 and answer.strip() != row['answer'] else")
    (folder / "my.py").write_text(judge)
    found = study(folder, config={"scorer": f"{folder / 'my.py'}:judge", "max_new_tokens": 8})
    run_study(found, folder / "runs", quiet=True)
    (row,) = scores(found, folder / "runs")
    assert row["unscored"].endswith("%")
    (record,) = (folder / "runs" / found.base.run_id).rglob("records/**/*custom*.json")
    items = json.loads(record.read_text())["items"]
    unscored = [item for item in items if item["value"] is None]
    assert 0 < len(unscored) < len(items)
    assert all(
        "my.py:judge gave no score" in item["reason"] and "turned.jsonl row" in item["reason"] for item in unscored
    )
