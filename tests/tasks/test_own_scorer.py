"""A scorer of the user's own: a function by its file, part of the identity, whose errors are unscored answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_arena.core.errors import UserError
from peft_arena.study.read_study import task_spec
from peft_arena.tasks.base import Task
from peft_arena.tasks.registry import make_task, task_of
from tests.tasks.test_custom import write

ROWS = [{"q": f"q{n}", "a": f"answer {n}", "tags": [], "n": n} for n in range(30)]
SCORER = """
from dataclasses import dataclass

@dataclass
class Verdict:
    right: bool

def judge(answer, row):
    if answer == "boom":
        return row["missing"]
    if answer == "many":
        return 3
    if answer == "half":
        return 0.5
    if answer == "skip":
        return None
    if answer == "out":
        raise SystemExit(3)
    if answer == "half a sign":
        raise ValueError("not \\ud83d")
    if answer == "text":
        return "1"
    row["tags"].append("seen")
    assert row["tags"] == ["seen"], "no call sees what another did to the row"
    print("judged")
    return Verdict(answer == row["a"]).right

def three(answer, row, more):
    return True

LIMIT = 5
"""


def make(folder: Path, function: str = "judge", code: str = SCORER, **settings: Any) -> Task:
    (folder / "my.py").write_text(code)
    data = write(folder / "mine.jsonl", ROWS)
    columns = {"prompt": "q", "response": "a"}
    given = {"path": str(data), "columns": columns, "scorer": f"{folder / 'my.py'}:{function}", **settings}
    return make_task("custom", given)


def test_it_judges_answer_and_row(tmp_path: Path) -> None:
    task = make(tmp_path)
    item = task.items("test")[0]
    said = {text: task.score(item, text) for text in (item.data["answer"], "no", "half", "skip", "boom", "many", "out")}
    assert [said[text].value for text in (item.data["answer"], "no", "half", "skip")] == [1.0, 0.0, 0.5, None]
    odd = {text: task.score(item, text) for text in ("half a sign", "text")}
    assert "\\ud83d" in odd["half a sign"].reason and "gave '1'" in odd["text"].reason
    odd["half a sign"].reason.encode()
    assert all(one.value is None for one in (*odd.values(), said["boom"], said["many"], said["out"]))
    place = f"(mine.jsonl row {item.data['row']['n'] + 1})".replace("(", f"({tmp_path}/")
    assert "raised KeyError: 'missing' in line 10" in said["boom"].reason
    assert "gave 3: True, False, None or a number from 0 to 1" in said["many"].reason
    assert "raised SystemExit" in said["out"].reason
    assert all(said[text].reason.endswith(place) for text in ("boom", "many", "skip", "out"))
    assert task.card.headline.name == "score"


def test_its_text_is_part_of_the_identity(tmp_path: Path) -> None:
    make(tmp_path)
    settings = {"path": str(tmp_path / "mine.jsonl"), "columns": {"prompt": "q", "response": "a"}}
    settings["scorer"] = f"{tmp_path / 'my.py'}:judge"
    spec = task_spec("custom", settings, "here")
    assert task_of(spec).card.revision == spec.revision
    (tmp_path / "my.py").write_text(SCORER + "\n# changed\n")
    assert task_spec("custom", settings, "here").id != spec.id
    with pytest.raises(UserError, match="plan it again"):
        task_of(spec)


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("juge", SCORER, "Did you mean 'judge'"),
        ("LIMIT", SCORER, "unknown function 'LIMIT'"),
        ("three", SCORER, "must take an answer and a row"),
        ("judge", "import nothing_like_it\n", "No module named 'nothing_like_it' in line 1"),
        ("judge", "def judge(answer, row:\n    pass\n", "SyntaxError"),
        ("judge", "def judge(answer, row):\n    return False\n", "its own answer 'answer 0' cannot win"),
        ("judge", "def judge(answer, row):\n    return row['b']\n", "raised KeyError: 'b' in line 2"),
    ],
)
def test_what_cannot_judge_is_refused(function: str, code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path, function, code)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file nowhere.py"):
        make(tmp_path, scorer="nowhere.py:judge")
    with pytest.raises(UserError, match="or FILE.py:FUNCTION"):
        make(tmp_path, scorer="nowhere:judge")


def test_rows_need_no_answer(tmp_path: Path) -> None:
    task = make(tmp_path, columns={"prompt": "q"}, role="retention")
    item = task.items("test")[0]
    assert task.target(item) == ""
    assert task.score(item, item.data["row"]["a"]).value == 1.0


def test_every_row_is_asked_with_its_own(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(SCORER)
    rows = [{"q": f"q{n % 15}", "a": f"answer {n}", "tags": []} for n in range(30)]
    path = write(tmp_path / "mine.jsonl", [*rows, rows[0]])
    given = {"path": str(path), "columns": {"prompt": "q", "response": "a"}, "scorer": f"{tmp_path / 'my.py'}:judge"}
    task = make_task("custom", given)
    items = [item for split in ("train", "validation", "test") for item in task.items(split)]
    assert len(items) == 30
    assert all(task.score(item, item.data["answer"]).value == 1.0 for item in items)
