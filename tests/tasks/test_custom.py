"""The user's own data: what is read, and every mistake with its file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars
import pytest

from peft_arena.core.errors import UserError
from peft_arena.tasks import custom as module
from peft_arena.tasks.base import Kind, Message, Role, Task
from peft_arena.tasks.registry import make_task
from peft_arena.testing.tasks import check_task

ROWS = [{"q": f"What is {n} + {n}?", "a": str(2 * n), "n": n} for n in range(40)]
COLUMNS = {"prompt": "q", "response": "a"}


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines or Parquet."""
    if path.suffix == ".parquet":
        polars.DataFrame(rows).write_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(path: Path, /, **settings: Any) -> Task:
    """Make a custom task; prompt and response columns and the numeric scorer unless told otherwise."""
    return make_task("custom", {"path": str(path), "columns": COLUMNS, "scorer": "numeric", **settings})


def refusal(path: Path, /, **settings: Any) -> str:
    """Return the one line with which a custom task is refused."""
    with pytest.raises(UserError) as caught:
        make(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("scorer", ["exact_match", "contains", "numeric", "math_verify", "normalised_match"])
def test_prompt_and_response(suffix: str, style: str, scorer: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"mine{suffix}", ROWS)
    task = make(path, format=style, scorer=scorer, name="sums", licence="CC0", max_new_tokens=5, stop=["\n"])
    check_task(task, sample=5)
    assert [len(task.items(split)) for split in ("train", "validation", "test")] == [32, 4, 4]
    item = task.items("test")[0]
    number = item.data["answer"]
    expected = (Message("user", item.question),) if style == "chat" else item.question
    assert task.prompt(item) == expected
    assert task.target(item) == (number if style == "chat" else f" {number}")
    assert (task.generation.max_new_tokens, task.generation.stop) == (5, ("\n",))
    assert (task.card.name, task.card.licence, task.card.role) == ("sums", "CC0", Role.TARGET)
    assert task.card.revision.startswith("sha256:")
    assert "40 items; 0 rows that repeat another" in task.card.description


def test_the_revision_is_the_content(tmp_path: Path) -> None:
    one = make(write(tmp_path / "one.jsonl", ROWS)).card.revision
    assert make(write(tmp_path / "two.jsonl", ROWS)).card.revision == one
    assert make(write(tmp_path / "three.jsonl", ROWS[1:])).card.revision != one


def test_messages(tmp_path: Path) -> None:
    rows = [
        {
            "turns": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": f"{n * n + 40}"},
            ]
        }
        for n in range(20)
    ]
    for suffix in (".jsonl", ".parquet"):
        task = make(write(tmp_path / f"chat{suffix}", rows), columns={"messages": "turns"}, scorer="exact_match")
        check_task(task)
        item = task.items("train")[0]
        assert task.prompt(item) == (Message("system", "Be brief."), Message("user", item.question))
        assert int(task.target(item)) == int(item.question.split()[1][:-1]) ** 2 + 40


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_choices_are_compared_by_likelihood(style: str, tmp_path: Path) -> None:
    rows = [
        {"q": f"Is {n} even?", "options": ["yes", "no"], "right": n % 2 if n < 10 else ["yes", "no"][n % 2]}
        for n in range(20)
    ]
    columns = {"prompt": "q", "choices": "options", "gold": "right"}
    task = make(write(tmp_path / "mc.jsonl", rows), columns=columns, scorer="multiple_choice", format=style)
    check_task(task)
    assert task.card.kind is Kind.CHOICE
    assert task.continuations(task.items("test")[0]) == (("yes", "no") if style == "chat" else (" yes", " no"))
    for item in task.items("train"):
        assert item.gold == int(item.question.split()[1]) % 2


def test_named_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:30])
    write(tmp_path / "b.parquet", ROWS[30:])
    task = make(tmp_path, splits={"train": "a.jsonl", "test": "b.parquet"})
    check_task(task)
    assert [item.question for item in task.items("test")] == [row["q"] for row in ROWS[30:]]
    with pytest.raises(UserError, match="unknown split 'validation'"):
        task.items("validation")


def test_repeated_rows_stay_together_and_count_once(tmp_path: Path) -> None:
    rows = ROWS + ROWS[:7] + [{"q": ROWS[0]["q"].upper(), "a": "0"}, {"q": f" {ROWS[1]['q']}\u200b", "a": "2"}]
    task = make(write(tmp_path / "twice.jsonl", rows))
    check_task(task)
    assert "41 items; 8 rows that repeat another" in task.card.description


def test_a_retention_task_needs_no_train_split(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", ROWS)
    task = make(path, role="retention", splits={"validation": 0.5, "test": 0.5})
    check_task(task)
    assert len(task.items("test")) == 20


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*given: Any) -> list[Any]:
        asked.append(given)
        return ROWS[:30] if given[2] == "train" else ROWS[30:]

    monkeypatch.setattr(module, "read_hub", load)
    settings = {"hub": "me/sums", "revision": "abc123", "columns": COLUMNS, "scorer": "numeric"}
    divided = make_task("custom", settings)
    assert asked == []
    check_task(divided)
    assert set(asked) == {("me/sums", None, "train", "abc123")}
    assert (divided.card.revision, divided.card.source) == ("abc123", "hub me/sums, subset None")
    named = make_task("custom", {**settings, "subset": "x", "splits": {"train": "train", "test": "dev"}})
    assert [len(named.items(split)) for split in ("train", "test")] == [30, 10]
    assert asked[-2:] == [("me/sums", "x", "train", "abc123"), ("me/sums", "x", "dev", "abc123")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["holds no rows"]),
        ([{"q": "x"}], ["row 1", "unknown column 'a'", "Known: q"]),
        ([*ROWS[:3], {"question": "x", "a": "1"}], ["row 4", "unknown column 'q'"]),
        ([*ROWS[:1], {"q": "x", "a": None}], ["row 2", "column 'a' is empty"]),
        (
            [*ROWS[:6], {"q": "x \ud83d", "a": "1"}],
            ["row 7", "holds half of a character", "U+D83D at character 3"],
        ),
        ([{"q": " ", "a": "1"}], ["row 1", "column 'q' is empty"]),
        ([*ROWS, {"q": "x", "a": "one"}], ["row 41", "its own answer 'one' cannot win"]),
        ([["x", "1"]], ["row 1", "must be an object", "list"]),
        (ROWS[:2], ["nothing is left for", "2 rows hold only 2 different prompts"]),
    ],
)
def test_bad_rows_are_named(rows: list[Any], words: list[str], tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "bad.jsonl", rows))
    assert all(word in message for word in [*words, *(["bad.jsonl"] if "row" in words[0] else [])]), message


def test_bad_files_are_named(tmp_path: Path) -> None:
    assert "missing.jsonl' does not exist" in refusal(tmp_path / "missing.jsonl")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "x.txt").write_text("q,a\n")
    assert "must end in .csv, .json, .jsonl, .parquet, got '.txt'" in refusal(tmp_path / "x.txt")
    (tmp_path / "x.csv").write_text("q,a\n")
    assert "x.csv holds no rows" in refusal(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text('q,a\n"1\n2",3\n4,5,6\n')
    assert "x.csv row 4: has 3 columns, and the first line 2" in refusal(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("q,q\n1,2\n")
    assert "must name every column once" in refusal(tmp_path / "x.csv")
    (tmp_path / "x.json").write_text('{"a": [], "b": []}')
    assert "2 lists among a, b" in refusal(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text('{"q": "1", "a": "1"}\n\n{"q": \n')
    assert "x.jsonl row 3: is not JSON" in refusal(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_bytes(b'{"q": "\xff"}')
    assert "y.jsonl is not UTF-8" in refusal(tmp_path / "y.jsonl")
    (tmp_path / "z.parquet").write_bytes(b"no parquet")
    assert "z.parquet cannot be read as Parquet" in refusal(tmp_path / "z.parquet")
    assert "does not exist" in refusal(tmp_path / "no", splits={"train": "a.jsonl", "test": "b.jsonl"})


def test_overlapping_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:20])
    write(tmp_path / "b.jsonl", [*ROWS[30:], {"q": f"  {ROWS[4]['q'].upper()} ", "a": "9"}])
    message = refusal(tmp_path, splits={"train": "a.jsonl", "test": "b.jsonl"})
    assert "splits overlap: 1 prompts" in message
    assert "a.jsonl row 5" in message
    assert "b.jsonl row 11" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"turns": "hi"}, "must be a list of turns"),
        ({"turns": [{"role": "user", "content": "hi"}]}, "last turn must be an assistant"),
        ({"turns": [{"role": "assistant", "content": "hi"}]}, "last turn must be an assistant"),
        (
            {"turns": [{"role": "user", "content": "hi"}, {"role": "user", "content": "x"}]},
            "last turn must be an assistant",
        ),
        ({"turns": [{"role": "elf", "content": "hi"}, {"role": "assistant", "content": "x"}]}, "got 'elf'"),
        ({"turns": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}, "turn 0"),
        ({"turns": [{"text": "hi"}, {"role": "assistant", "content": "x"}]}, "'from' and 'value'"),
        ({"turns": [{"role": "user", "content": "\udc00"}, {"role": "assistant", "content": "x"}]}, "surrogate"),
    ],
)
def test_bad_messages_are_named(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [row])
    message = refusal(path, columns={"messages": "turns"}, scorer="exact_match")
    assert words in message
    assert "chat.jsonl row 1: column 'turns'" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"c": ["a"]}, "at least two options"),
        ({"c": ["a", " "]}, "is empty"),
        ({"c": ["a", "a"]}, "an option twice"),
        ({"g": 2}, "index from 0 to 1"),
        ({"g": True}, "index from 0 to 1"),
        ({"g": "c"}, "index from 0 to 1"),
    ],
)
def test_bad_choices_are_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mc.jsonl", [{"q": "x", "c": ["a", "b"], "g": 0, **change}])
    columns = {"prompt": "q", "choices": "c", "gold": "g"}
    message = refusal(path, columns=columns, scorer="multiple_choice")
    assert words in message
    assert "mc.jsonl row 1" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scorer": "numerics"}, "Did you mean 'numeric'"),
        ({"columns": {}}, "either 'prompt' or 'messages'"),
        ({"columns": {"prompt": "q"}}, "'prompt' needs 'response'"),
        ({"columns": {"prompt": "q", "choices": "c"}}, "belong together"),
        ({"columns": {"messages": "m", "response": "a"}}, "leave 'response' and"),
        ({"columns": {"messages": "m"}, "format": "plain"}, "messages and system turns need format 'chat'"),
        ({"scorer": "multiple_choice"}, "belong together"),
        ({"hub": "me/x"}, "either 'path' or 'hub'"),
        ({"path": None}, "either 'path' or 'hub'"),
        ({"path": None, "hub": "me/x"}, "'hub' needs 'revision'"),
        ({"revision": "abc"}, "belong to 'hub'"),
        ({"splits": {"train": 0.5, "test": 0.2}}, "sum to 1"),
        ({"splits": {"train": 1.5, "test": -0.5}}, "above 0"),
        ({"splits": {"train": 0.5, "test": "b.jsonl"}}, "for every split"),
        ({"splits": {"test": 1.0}}, "a target task needs train"),
        ({"splits": {"dev": 1.0}}, "splits"),
        ({"name": "a b"}, "name"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refusal(write(tmp_path / "mine.jsonl", ROWS), **settings)


GROUPED = {"prompt": "q", "response": "a", "group": "passage"}


def test_rows_of_one_group_stay_together_and_are_marked(tmp_path: Path) -> None:
    rows = [{"q": f"question {place}", "a": "1", "passage": place // 5} for place in range(100)]
    path = write(tmp_path / "d.jsonl", rows)
    task = make(path, columns=GROUPED)
    sides = {split: {item.group for item in task.items(split)} for split in ("train", "validation", "test")}
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) == 20
    assert {item.group for item in task.items("test")} <= {str(place) for place in range(20)}
    plain = make(path, columns={"prompt": "q", "response": "a"})
    assert "group" not in plain.config.model_dump(mode="json")["columns"]
    assert all(not item.group for item in plain.items("test"))
    ids = {item.id for split in sides for item in task.items(split)}
    assert ids == {item.id for split in sides for item in plain.items(split)}


def test_groups_that_contradict_the_prompts_are_refused(tmp_path: Path) -> None:
    rows = [{"q": f"question {place}", "a": "1", "passage": "p"} for place in range(20)]
    rows.append({"q": "Question  3", "a": "2", "passage": "other"})
    said = refusal(write(tmp_path / "d.jsonl", rows), columns=GROUPED)
    assert "row 21" in said and "row 4" in said and "need one group" in said
    for value in (True, None, "  ", 1.5):
        rows = [{"q": f"question {place}", "a": "1", "passage": value} for place in range(20)]
        said = refusal(write(tmp_path / "d.jsonl", rows), columns=GROUPED)
        assert "row 1: column 'passage' must be text or a whole number" in said


def test_files_of_the_users_own_may_share_groups_but_no_prompts(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", [{"q": f"{name} {n}", "a": "1", "passage": n % 3} for n in range(12)])
    task = make(tmp_path, splits={"train": "train.jsonl", "test": "test.jsonl"}, columns=GROUPED)
    for split in ("train", "test"):
        assert {item.group for item in task.items(split)} == {"0", "1", "2"}
