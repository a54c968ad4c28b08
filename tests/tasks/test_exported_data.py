"""Data as people export it: its form is recognised, its texts are read, what repeats or contradicts is said."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_arena.core.errors import UserError
from peft_arena.tasks.base import Message
from peft_arena.tasks.custom import Custom
from peft_arena.tasks.registry import make_task
from peft_arena.tasks.splits import near_key, normal_key, same_text
from tests.tasks.test_custom import write


def custom(path: Path, **settings: Any) -> Custom:
    """Make a custom task with recognised columns."""
    task = make_task("custom", {"path": str(path), "scorer": "exact_match", **settings})
    assert isinstance(task, Custom)
    return task


def notes(task: Custom) -> str:
    return "; ".join(task.notes())


def openai(n: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": f"Say {n}."}, {"type": "image_url", "image_url": {}}],
            },
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "say"}}]},
            {"role": "tool", "content": "spoken", "tool_call_id": "1"},
            {"role": "assistant", "content": [{"type": "text", "text": str(n)}]},
        ]
    }


def sharegpt(n: int) -> dict[str, Any]:
    turns = [("system", "Be brief."), ("human", f"Say {n}."), ("function_call", "say()"), ("observation", "x")]
    return {"id": n, "conversations": [{"from": who, "value": said} for who, said in [*turns, ("gpt", str(n))]]}


@pytest.mark.parametrize(("row", "form"), [(openai, "OpenAI chat"), (sharegpt, "ShareGPT")])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_chats_of_other_tools(row: Any, form: str, suffix: str, tmp_path: Path) -> None:
    rows = [row(n) for n in range(30)]
    path = tmp_path / f"chat{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(one) + "\n" for one in rows))
    task = custom(path)
    item = task.items("test")[0]
    assert task.prompt(item) == (Message("system", "Be brief."), Message("user", f"Say {task.target(item)}."))
    assert f"read as {form}" in notes(task)
    assert "60 turns and calls of tools" in notes(task)
    assert ("30 parts of type image_url" in notes(task)) == (row is openai)


def test_turns_that_a_tool_stood_between_become_one(tmp_path: Path) -> None:
    turns = [("user", "Weather?"), ("assistant", "I look."), ("tool", "15"), ("assistant", "It is 15.")]
    rows = [{"messages": [{"role": r, "content": f"{c} {n}"} for r, c in turns]} for n in range(20)]
    task = custom(write(tmp_path / "a.jsonl", rows))
    assert task.target(task.items("test")[0]).startswith("I look. ")
    assert "\n\nIt is 15. " in task.target(task.items("test")[0])


def test_alpaca_with_and_without_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Double {n}.", "output": str(2 * n), **({"input": f"n = {n}"} if n % 2 else {"input": ""})}
        for n in range(40)
    ]
    rows[4].pop("input")
    task = custom(write(tmp_path / "alpaca.jsonl", rows))
    assert "read as Alpaca" in notes(task)
    for item in task.items("train"):
        n = int(task.target(item)) // 2
        assert item.question == (f"Double {n}.\n\nn = {n}" if n % 2 else f"Double {n}.")


def test_csv_with_quotes_and_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "tickets.csv"
    lines = [f'"Printer {n};\nroom ""{n}""";{n}' for n in range(30)]
    path.write_text("\ufeffquestion;answer\r\n" + "\r\n".join(lines), encoding="utf-8")
    task = custom(path)
    item = task.items("test")[0]
    assert item.question == f'Printer {task.target(item)};\nroom "{task.target(item)}"'
    assert task.place_of(item) == f"{path} row {2 + 2 * int(task.target(item))}"
    assert task.card.name == "tickets"


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (True, "true"), (1.5, "1.5"), (["a", 1], '["a", 1]'), ({"k": "ü"}, '{"k": "ü"}')]
)
def test_answers_that_are_no_texts(value: Any, text: str, tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": value} for n in range(30)]
    task = custom(write(tmp_path / "a.jsonl", rows))
    assert {task.target(item) for item in task.items("train")} == {text}


def test_accepted_answers_of_a_list(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answers": [f"a{n}", f"b{n}"]} for n in range(30)]
    task = custom(write(tmp_path / "a.jsonl", rows))
    item = task.items("test")[0]
    assert task.target(item).startswith("a")
    assert [task.score(item, f"{sign}{item.question[1:]}").value for sign in "abc"] == [1.0, 1.0, 0.0]


def test_several_answers_are_joined_and_said(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"{sign}{n}"} for sign in "ab" for n in range(30)]
    task = custom(write(tmp_path / "a.jsonl", rows))
    for split in ("validation", "test"):
        asked = [item.question for item in task.items(split)]
        assert len(set(asked)) == len(asked) == 3
    for item in task.items("test"):
        assert task.score(item, f"a{item.question[1:]}").value == task.score(item, f"b{item.question[1:]}").value == 1.0
    assert len(task.items("train")) == 48
    assert "30 prompts with different answers" in notes(task)
    assert "a.jsonl row 1 and" in notes(task)


def test_options_that_contradict_are_said(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "choices": ["yes", "no"], "answer": n % 2} for n in range(30)]
    rows.append({"question": "q4", "choices": ["yes", "no"], "answer": "no"})
    rows.append({"question": "q5", "choices": ["yes", "no"], "answer": "B"})
    task = custom(write(tmp_path / "a.jsonl", rows), scorer="multiple_choice")
    assert "1 prompt with different answers" in notes(task)
    assert "each is asked with its own" in notes(task)
    assert "1 row left out with the prompt and answer" in notes(task)


def test_near_duplicates_are_counted(tmp_path: Path) -> None:
    rows = [{"question": f"Où est le café {n} ?", "answer": f"{n}"} for n in range(40)]
    rows += [{"question": "Ou est le “cafe” 3?", "answer": "x"}, {"question": "ou est le cafe 4", "answer": "4"}]
    assert "4 prompts that only letter case, spaces, accents" in notes(custom(write(tmp_path / "a.jsonl", rows)))


def test_rows_that_cannot_be_used_are_counted_if_asked(tmp_path: Path) -> None:
    rows: list[Any] = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)]
    rows[3]["answer"] = None
    rows[9]["question"] = "cut \ud83d"
    rows[12]["answer"] = "two\nlines"
    rows[14].pop("answer")
    rows[15] = [1]
    path = write(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + '{"question": "cut off\n')
    with pytest.raises(UserError, match=r"row 4: column 'answer' is empty; 4 more rows cannot be used; mend"):
        custom(path)
    task = custom(path, unusable="count", stop=["\n"])
    assert sum(len(task.items(split)) for split in ("train", "validation", "test")) == 26
    assert "5 rows left out that cannot be used, the first" in notes(task)
    assert "1 item that cannot be won, the first" in notes(task)
    assert "stop string '\\n' cuts it to 'two'" in notes(task)


def test_what_is_not_recognised_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot tell which columns hold prompt and answer; its columns are a, b"):
        custom(write(tmp_path / "a.jsonl", [{"a": "1", "b": "2"}]))
    with pytest.raises(UserError, match=r"row 2: must be an object"):
        custom(write(tmp_path / "a.jsonl", [{"question": "1", "answer": "2"}, "x"]))
    with pytest.raises(UserError, match=r"row 1: must be an object with named columns, got int 5"):
        custom(write(tmp_path / "a.jsonl", [5]))
    chat = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "x"}]} for n in range(9)
    ]
    with pytest.raises(UserError, match="need format 'chat'; the data was read as OpenAI chat"):
        custom(write(tmp_path / "a.jsonl", chat), format="plain")


@pytest.mark.parametrize(
    ("given", "name"), [("tickets.jsonl", "tickets"), ("my data (1).jsonl", "my-data-1"), ("….jsonl", "custom")]
)
def test_the_task_is_called_by_its_file(given: str, name: str, tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)]
    assert custom(write(tmp_path / given, rows)).card.name == name
    assert custom(tmp_path / given, name="mine").card.name == "mine"


FORMS = ["NFC", "NFD", "NFKC", "NFKD"]


@given(st.text(max_size=30), st.sampled_from(FORMS))
def test_the_canonical_form_is_one(text: str, form: str) -> None:
    whole = normal_key(text)
    assert normal_key(whole) == whole
    assert normal_key(unicodedata.normalize(form, text)) == whole
    assert normal_key(f" \u200b{text}\u00a0\ufeff") == whole
    assert near_key(unicodedata.normalize(form, text)) == near_key(text)
    assert same_text(same_text(text)) == same_text(text)


CHANGED = ["upper", "wide", "zero", *FORMS]


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), form=st.sampled_from(CHANGED))
def test_no_form_of_a_text_is_in_two_splits(text: str, form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    wide = str.maketrans({48 + place: 0xFF10 + place for place in range(10)})
    changes = {"upper": str.casefold, "wide": lambda one: one.translate(wide), "zero": "\u2060".join}
    change = changes.get(form, lambda one: unicodedata.normalize(form, one))
    rows = [{"question": f"{text} {n}", "answer": f"a{n}"} for n in range(24)]
    rows += [{"question": change(row["question"]), "answer": row["answer"]} for row in rows]
    path = tmp_path_factory.mktemp("forms") / "a.json"
    path.write_text(json.dumps(rows))
    task = custom(path)
    seen = {split: {item.data["answer"] for item in task.items(split)} for split in ("train", "validation", "test")}
    assert sum(map(len, seen.values())) == len(set().union(*seen.values())) == 24


def user(text: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("long", [False, True])
def test_chats_are_one_content_whatever_their_white_space(long: bool, tmp_path: Path) -> None:
    forms = (
        "Reverse {}",
        "Reverse {}\n",
        " Reverse  {}",
        "Reverse\t{}",
        "REVERSE {}",
        "Reverse\u180b {}",
        "\x00Reverse {}",
    )
    rows = [user(form.format(n), f"a{n}") for n in range(30) for form in forms]
    if long:
        for row in rows:
            row["messages"] = [{"role": "system", "content": "Go."}, *row["messages"]]
    else:
        rows += [{"messages": rows[n * len(forms)]["messages"]} for n in range(30)]
    task = custom(write(tmp_path / "a.jsonl", rows))
    seen = {split: {item.data["answer"] for item in task.items(split)} for split in ("train", "validation", "test")}
    assert sum(map(len, seen.values())) == len(set().union(*seen.values())) == 30


def test_a_prompt_as_text_and_as_a_turn_is_one_content(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(30)]
    rows += [{"prompt": [{"role": "user", "content": f"q{n}"}], "completion": f"a{n}"} for n in range(30)]
    task = custom(write(tmp_path / "a.jsonl", rows))
    assert sum(len(task.items(split)) for split in ("train", "validation", "test")) == 30
    assert "30 rows left out with the prompt and answer of another" in notes(task)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "answer": float("nan")}, "column 'answer' is empty, got nan"),
        ({"question": float("inf"), "answer": "a"}, "column 'question' is empty, got inf"),
    ],
)
def test_what_is_no_number_is_no_answer(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"row 1: {words}"):
        custom(write(tmp_path / "a.jsonl", [row]))


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "the last turn is a tool's or calls one"),
        ([{"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}], "the last turn is a tool's"),
        ([{"role": "assistant", "content": "x", "weight": 0}], "has weight 0"),
        ([{"role": "assistant", "content": [{"type": "reasoning", "text": "secret"}]}], "a turn holds no text"),
    ],
)
def test_chats_without_an_answer_to_learn(last: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        custom(write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}, *last]}]))


def test_a_thought_is_no_part_of_an_answer_and_a_system_column_is_a_turn(tmp_path: Path) -> None:
    parts = [{"type": "reasoning", "text": "secret"}, {"type": "output_text", "text": "said"}]
    rows = [
        {"system": "Be brief.", "conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": parts}]}
        for n in range(30)
    ]
    task = custom(write(tmp_path / "a.jsonl", rows))
    item = task.items("test")[0]
    assert task.target(item) == "said"
    assert task.prompt(item)[0] == Message("system", "Be brief.")
    assert "30 parts of type reasoning" in notes(task)


def test_the_right_option_is_read_alike_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "choices": [1, 2, 3, 4], "answer": 1} for n in range(30)]
    (tmp_path / "a.csv").write_text(
        "question,choices,answer\n" + "".join(f'q{n},"[1, 2, 3, 4]",1\n' for n in range(30))
    )
    for path in (write(tmp_path / "a.jsonl", rows), tmp_path / "a.csv"):
        assert {item.choices[item.gold or 0] for item in custom(path, scorer="multiple_choice").items("train")} == {"1"}
    rows[0]["answer"] = "9" * 5000
    with pytest.raises(UserError, match="row 1: column 'answer' must be an index"):
        custom(write(tmp_path / "a.jsonl", rows), scorer="multiple_choice")


def test_lists_as_python_writes_them_and_separators_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'question,"x;y;z;w",answers\n' + "".join(f"q{n},1,\"['a', 'b']\"\n" for n in range(30))
    )
    item = custom(tmp_path / "a.csv").items("test")[0]
    assert item.data["accepted"] == ["a", "b"]


def test_recognised_and_named_columns_are_one_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)])
    named = custom(path, columns={"prompt": "question", "response": "answer"})
    assert custom(path).config == named.config
    assert notes(custom(path)) == notes(named)


def test_a_conversation_exported_answer_by_answer_is_in_one_split(tmp_path: Path) -> None:
    rows = []
    for n in range(30):
        turns = [(role, f"{role} {n}.{place}") for place in range(3) for role in ("user", "assistant")]
        chat = [{"role": role, "content": said} for role, said in turns]
        rows += [{"messages": chat[:size]} for size in (2, 4, 6)]
    task = custom(write(tmp_path / "a.jsonl", rows))
    owner: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for item in task.items(split):
            assert owner.setdefault(item.data["answer"].split(".")[0], split) == split
            assert item.group
    assert len(owner) == 30
    for name, part in (("train", rows[:60]), ("test", [rows[1], *rows[60:]])):
        write(tmp_path / f"{name}.jsonl", part)
    with pytest.raises(UserError, match="splits overlap: 1 prompts are in two"):
        custom(tmp_path, splits={"train": "train.jsonl", "test": "test.jsonl"})
    write(tmp_path / "train.jsonl", [*rows[3:60], rows[0]])
    with pytest.raises(UserError, match="splits overlap: 1 prompts are in two"):
        custom(tmp_path, splits={"train": "train.jsonl", "test": "test.jsonl"})
