"""Data to train on, and targets that are tested on other data: filters, means by hand, nothing tested is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_arena.core.errors import UserError
from peft_arena.tasks.base import Item, Score, Task
from peft_arena.tasks.benchmarks import library
from peft_arena.tasks.benchmarks.base import HubSplit
from peft_arena.tasks.benchmarks.composite import Composite, composite_card, joined_generation, problem_key
from peft_arena.tasks.benchmarks.library import HfGsm8k, library_answer, number_of
from peft_arena.tasks.benchmarks.math import BOX_REQUEST, Aime24
from peft_arena.tasks.benchmarks.training import HELD_OUT, OPENR1_CHARACTERS, MedThink, OpenR1Math
from peft_arena.tasks.registry import make_task
from peft_arena.tasks.splits import Keyed

MINIATURE = {"source": "miniature"}
COMPOSITES = ("arena-math", "arena-medical", "hf-metamathqa")
HERE = HubSplit("here", "train")
RIGHT = "<think>\nso\n</think>\n\n$\\boxed{4}$"


def openr1(**changes: Any) -> dict[str, Any]:
    row = {
        "problem": "2 + 2?",
        "answer": "4",
        "generations": [RIGHT],
        "correctness_math_verify": [True],
        "is_reasoning_complete": [True],
    }
    return {**row, **changes}


def m23k(**changes: Any) -> dict[str, Any]:
    row = {"prompt": "Which?\nA. x\nB. y", "answer_letter": "B", "reasoning": "So.", "distilled_answer_string": "y."}
    return {**row, **changes}


def read(task: type[OpenR1Math | MedThink | library.MetaMathQa], row: dict[str, Any]) -> Item | None:
    found: Keyed | None = task().read(row, HERE)
    return None if found is None else found.item


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"correctness_math_verify": [False]},
        {"is_reasoning_complete": [False]},
        {"correctness_math_verify": None},
        {"generations": ["<think>\n\\boxed{4}\n</think>\n\nFour."]},
        {"generations": ["x" * OPENR1_CHARACTERS + RIGHT]},
        {"answer": ""},
        {"answer": None},
        {"problem": " "},
    ],
)
def test_openr1_leaves_out(changes: dict[str, Any]) -> None:
    assert read(OpenR1Math, openr1()) == Item("2 + 2?", answer=RIGHT, data={"answer": "4"})
    assert read(OpenR1Math, openr1(**changes)) is None


def test_openr1_takes_the_first_right_generation() -> None:
    second = RIGHT.replace("so", "then")
    row = openr1(
        generations=["\\boxed{5}", RIGHT + " cut", second, RIGHT],
        correctness_math_verify=[False, True, True, True],
        is_reasoning_complete=[True, False, True, True],
    )
    item = read(OpenR1Math, row)
    assert item is not None and item.answer == second


def test_medthink_ends_with_the_letter() -> None:
    added = read(MedThink, m23k())
    assert added is not None and added.answer == "<think>\nSo.\n</think>\n\ny.\n\n\\boxed{B}"
    kept = read(MedThink, m23k(distilled_answer_string="Answer: B"))
    assert kept is not None and kept.answer.endswith("</think>\n\nAnswer: B")
    boxed_thought = read(MedThink, m23k(reasoning="\\boxed{A}?", distilled_answer_string="Answer: B"))
    assert boxed_thought is not None and boxed_thought.answer.endswith("</think>\n\nAnswer: B")
    for changes in (
        {"distilled_answer_string": "Answer: A"},
        {"reasoning": ""},
        {"answer_letter": "y"},
        {"answer_letter": None},
    ):
        assert read(MedThink, m23k(**changes)) is None


@pytest.mark.parametrize(("name", "gold"), [("data-arena-math", "4"), ("data-arena-medical", "B")])
def test_rows_of_peft_arena_itself(name: str, gold: str, tmp_path: Path) -> None:
    def row(question: str, answer: str, truth: str) -> dict[str, Any]:
        return {"extra_info": {"question": question, "answer": answer}, "reward_model": {"ground_truth": truth}}

    answer = f"Long. \\boxed{{{gold}}}"
    rows = [row(f"Q{n}?", answer, gold) for n in range(2 * HELD_OUT + 5)]
    rows[0] = row(f"Q0?\n{BOX_REQUEST}", answer, gold)
    dropped = [row("No answer?", "", gold), row("No gold?", answer, ""), row("", answer, gold)]
    path = write(tmp_path / "train.jsonl", [*rows, *dropped])
    task = make_task(name, {"source": "file", "path": path})
    items = [item for split in ("train", "validation", "test") for item in task.items(split)]
    assert sorted(item.question for item in items) == sorted(f"Q{n}?" for n in range(2 * HELD_OUT + 5))
    assert {(item.answer, item.data["answer"]) for item in items} == {(answer, gold)}
    assert len(task.items("train")) == 5
    assert task.score(items[0], answer).value == 1.0
    with pytest.raises(UserError, match="has no column 'extra_info'"):
        make_task(name, {"source": "file", "path": write(tmp_path / "b" / "train.jsonl", [openr1()])}).items("train")


@pytest.mark.parametrize(("name", "data"), [("arena-math", "data-arena-math"), ("arena-medical", "data-arena-medical")])
def test_targets_can_be_trained_on_the_published_rows(name: str, data: str) -> None:
    task, filtered = make_task(name, {**MINIATURE, "rows": "published"}), make_task(name, MINIATURE)
    assert {item.id for item in task.items("train")} == {item.id for item in make_task(data, MINIATURE).items("train")}
    assert not {item.id for item in task.items("train")} & {item.id for item in filtered.items("train")}
    assert [item.id for item in task.items("test")] == [item.id for item in filtered.items("test")]
    assert task.card.source.startswith(f"packaged miniature in the place of train: {data};")
    assert "SphereLab/PEFTArena-data@" in make_task(name, {"rows": "published"}).card.revision
    assert "SphereLab/PEFTArena-data@" not in make_task(name).card.revision


def test_splits_are_dealt_out_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenR1Math, "sizes", {"validation": HELD_OUT, "test": HELD_OUT, "train": None})
    rows = [openr1(problem=f"{n} + {4 - n}?") for n in range(300)]
    path = write(tmp_path / "train.jsonl", [*rows, openr1(problem=rows[0]["problem"], generations=[RIGHT + "!"])])
    task = make_task("data-openr1-math", {"source": "file", "path": path})
    parts = {split: task.items(split) for split in ("train", "validation", "test")}
    assert {split: len(items) for split, items in parts.items()} == {"train": 220, "validation": 40, "test": 40}
    questions = [item.question for items in parts.values() for item in items]
    assert len(set(questions)) == 300
    again = make_task("data-openr1-math", {"source": "file", "path": write(tmp_path / "b" / "train.jsonl", rows[::-1])})
    assert [item.id for item in again.items("train")] == [item.id for item in parts["train"]]


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [openr1(problem=str(n)) for n in range(2 * HELD_OUT)])
    with pytest.raises(UserError, match="nothing is left for train of 80 usable rows"):
        make_task("data-openr1-math", {"source": "file", "path": path}).items("train")


def test_rewritings_of_one_problem_stay_together() -> None:
    task = make_task("data-metamathqa", MINIATURE)
    split_of: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for item in task.items(split):
            split_of.setdefault(item.answer.rpartition("Again: ")[2], set()).add(split)
    assert sum(len(task.items(split)) for split in ("train", "validation", "test")) == 17
    assert {len(splits) for splits in split_of.values()} == {1}
    response = "The answer is: 5"
    query = "q" * (1300 - 1 - len(response))
    assert read(library.MetaMathQa, {"query": query, "response": response}) is not None
    assert read(library.MetaMathQa, {"query": f"{query}q", "response": response}) is None
    assert read(library.MetaMathQa, {"query": "q", "response": "It is 5"}) is None


@pytest.mark.parametrize(
    ("text", "answer", "number"),
    [
        ("so 4.\n#### 5\nThe answer is: 5", "5", 5.0),
        ("The answer is: 5\nQuestion: more\nThe answer is: 6.", "6", 6.0),
        ("The final answer is $1,500.", "1,500", 1500.0),
        ("The answer is: 3/4", "3/4", 0.75),
        ("The answer is: 50%!", "50", 50.0),
        ("The answer is: -.5", "-.5", -0.5),
        ("#### 7", "7", 7.0),
        ("The answer is: 1/0", "1/0", None),
        ("The answer is: 1,2", "1,2", None),
        ("The answer is: x^2", "x^2", None),
        ("The answer is: 1e3", "1e3", None),
        ("The answer is: " + "9" * 5000, "9" * 5000, None),
        ("The answer is: ", "", None),
        ("It is 5", "", None),
    ],
)
def test_answers_of_the_library(text: str, answer: str, number: float | None) -> None:
    assert library_answer(text) == answer
    assert number_of(answer) == number


def test_gsm8k_of_the_library() -> None:
    task = make_task("hf-gsm8k", MINIATURE)
    items = {item.data["answer"]: item for item in task.items("test")}
    assert set(items) == {"16", "1,500", "15", "5", "0"}
    assert task.prompt(items["5"]) == f"Question: {items['5'].question} Think step by step.\nAnswer:"
    assert [task.score(items["1,500"], f" The answer is: {said}").value for said in ("1500", "3000/2", "150")] == [
        1,
        1,
        0,
    ]
    assert task.score(items["5"], "It is 5").value == 0.0
    assert (task.generation.max_new_tokens, task.generation.stop) == (300, ())


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_ask_and_judge_as_their_parts(name: str) -> None:
    task = make_task(name, MINIATURE)
    assert isinstance(task, Composite)
    trained = task.training(task.training.Config.model_validate(MINIATURE))
    for item in task.items("train"):
        assert task.prompt(item) == trained.prompt(item)
        assert task.score(item, task.target(item)).value == 1.0  # so its score is a reward
        assert task.score(item, "no idea").value == 0.0
    for member in task.members:
        own = member(member.Config.model_validate(MINIATURE))
        name_of_member = member.card.name
        mine = [item for item in task.items("test") if item.data["member"] == name_of_member]
        assert len(mine) == len(own.items("test"))
        for item, original in zip(mine, own.items("test"), strict=True):
            assert (item.question, task.prompt(item)) == (original.question, own.prompt(original))
            assert task.generation.max_new_tokens >= own.generation.max_new_tokens
    first = [item.data["member"] for item in task.items("test")[: len(task.members)]]
    assert first == [member.card.name for member in task.members]  # in turn


def scored(task: Task, right: Callable[[Item], bool]) -> tuple[list[Item], list[Score]]:
    items = list(task.items("test"))
    return items, [task.score(item, task.target(item) if right(item) else "zzz") for item in items]


def mean(scores: list[Score], name: str = "") -> float:
    """Weighted mean of the headline, or of a further metric over the items that have it."""
    if name:
        parts = [score.others[name] for score in scores if name in score.others]
        return sum(part.value * part.weight for part in parts) / sum(part.weight for part in parts)
    return sum((score.value or 0.0) * score.weight for score in scores) / sum(score.weight for score in scores)


def test_the_headline_is_the_mean_over_members() -> None:
    task = make_task("arena-math", MINIATURE)
    seen: dict[str, int] = {}

    def right(item: Item) -> bool:
        member = item.data["member"]
        seen[member] = seen.get(member, 0) + 1
        return seen[member] <= {"arena-math500": 4, "arena-aime24": 1, "arena-amc23": 0}[member]

    items, scores = scored(task, right)
    keep = [place for place, item in enumerate(items) if item.data["member"] != "arena-amc23"]
    keep += [place for place, item in enumerate(items) if item.data["member"] == "arena-amc23"][:2]
    items, scores = [items[place] for place in keep], [scores[place] for place in keep]
    settled = list(task.settle(items, scores))
    assert mean(settled) == pytest.approx((4 / 5 + 1 / 5 + 0 / 2) / 3)
    assert mean(settled, "item_accuracy") == pytest.approx(5 / 12)
    assert mean(settled, "arena-math500") == pytest.approx(4 / 5)
    assert mean(settled, "arena-aime24") == pytest.approx(1 / 5)
    assert mean(settled, "arena-amc23") == 0.0
    assert sum("arena-aime24" in score.others for score in settled) == 5


def test_a_member_with_parts_counts_with_its_own_headline() -> None:
    task = make_task("arena-medical", MINIATURE)
    items, scores = scored(task, lambda item: item.data.get("part") == "anatomy")
    settled = list(task.settle(items, scores))
    assert mean(settled, "arena-mmlu-medical") == pytest.approx(1 / 6)  # one of six subjects is right
    assert mean(settled) == pytest.approx(1 / 24)


def test_without_a_member_there_is_no_mean() -> None:
    task = make_task("arena-math", MINIATURE)
    items, scores = scored(task, lambda _: True)
    lost = [
        Score(None, reason="lost") if item.data["member"] == "arena-aime24" else score
        for item, score in zip(items, scores, strict=True)
    ]
    settled = list(task.settle(items, lost))
    assert {score.value for score in settled} == {None}
    assert any("fewer than 2 scored items in arena-aime24" in score.reason for score in settled)
    assert mean(settled, "arena-math500") == 1.0
    kept = [(item, score) for item, score in zip(items, scores, strict=True) if item.data["member"] != "arena-amc23"]
    assert {score.value for score in task.settle(*map(list, zip(*kept, strict=True)))} == {None}


def test_validation_items_keep_their_scores() -> None:
    task = make_task("arena-math", MINIATURE)
    items = task.items("validation")
    scores = [task.score(item, task.target(item)) for item in items]
    assert task.settle(items, scores) == scores
    assert {name for score in scores for name in score.others} == {"item_accuracy"}


def test_what_is_tested_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenR1Math, "sizes", {"validation": 2, "test": 2, "train": None})
    problems = [f"What is {n}?" for n in range(30)]
    write(tmp_path / "data-openr1-math" / "default" / "train.jsonl", [openr1(problem=p) for p in problems])
    tested = [{"problem": f" what IS {n}? ", "answer": "4"} for n in range(25)]
    write(tmp_path / "arena-math500" / "test.jsonl", tested)
    write(tmp_path / "arena-aime24" / "train.jsonl", [{"problem": "Other?", "answer": "1"}])
    write(tmp_path / "arena-amc23" / "test.jsonl", [{"question": "Another?", "answer": 2.0}])
    task = make_task("arena-math", {"source": "file", "path": str(tmp_path)})
    assert len(task.items("test")) == 27
    left = {item.question for split in ("train", "validation") for item in task.items(split)}
    assert left <= set(problems[25:])
    assert left
    assert task.card.revision.count("sha256:") == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find $\\dfrac{x}{2}$ .", "find \\frac{x}{2}"),
        ("How many? $\\textbf{(A)}~1 \\qquad \\textbf{(B)}~2$", "How many?"),
        ("What is $\\left(2\\right)$, sir? $\\mathrm{(A) \\ } 1$", "What is (2), sir?"),
        ("A man of 40 coughs.\nA. Rest\nB. Tea", "A man of 40 coughs. (A) Rest (B) Tea"),
    ],
)
def test_the_same_problem_in_another_form(one: str, other: str) -> None:
    assert problem_key(one) == problem_key(other) != ""


def test_other_problems_are_others() -> None:
    texts = ["What is 1+1?", "What is 1-1?", "What is 11?", "Find f(A) and (B).", "Find f(A).", "A. b", "A. c"]
    assert len(set(map(problem_key, texts))) == len(texts)


def test_settings_of_composites() -> None:
    with pytest.raises(UserError, match="'path' belongs to source 'file'"):
        make_task("arena-math", {"source": "file"})
    with pytest.raises(UserError, match="revision"):
        make_task("arena-math", {"revision": "0" * 40})
    revision = make_task("arena-math").card.revision
    assert all(f"{hub}@" in revision for hub in ("open-r1/OpenR1-Math-220k", "HuggingFaceH4/MATH-500", "math-ai/amc23"))


def test_files_of_every_part_are_needed(tmp_path: Path) -> None:
    write(tmp_path / "data-metamathqa" / "train.jsonl", [{"query": "q", "response": "#### 1"}])
    with pytest.raises(UserError, match="task hf-gsm8k: .*hf-gsm8k' is no file and holds none"):
        make_task("hf-metamathqa", {"source": "file", "path": str(tmp_path)})


def test_of_wikipedia_only_the_first_rows_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    class Endless:
        def take(self, count: int) -> list[dict[str, str]]:
            return [{"text": f"Article {n}. " + "word " * 900} for n in range(count)]

    def load(*where: Any, **how: Any) -> Endless:
        asked.update(how, where=where)
        return Endless()

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = make_task("hf-wikipedia")
    items = task.items("test")
    assert asked["where"] == ("HuggingFaceFW/finewiki", "en")
    assert asked["streaming"] is True
    assert asked["revision"] in task.card.revision
    assert len(items) == 100
    assert max(len(item.question) for item in items) == 3000
    short = make_task("hf-wikipedia", {"characters": 200}).items("test")
    assert max(len(item.question) for item in short) <= 200


def test_of_a_file_of_articles_the_first_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": f"Article {n}."} for n in range(120)])
    items = make_task("hf-wikipedia", {"source": "file", "path": path}).items("test")
    assert {item.question for item in items} == {f"Article {n}." for n in range(100)}


def test_members_must_stop_alike() -> None:
    class Other(HfGsm8k):
        generation = HfGsm8k.generation.__class__(10, ("\n",))

    with pytest.raises(TypeError, match="stop at different strings"):
        joined_generation([Aime24, Other])
    assert joined_generation([Aime24, HfGsm8k]).max_new_tokens == 8192
    card = composite_card(name="x", title="x", training=OpenR1Math, members=[HfGsm8k], description="x")
    assert [metric.name for metric in card.metrics] == ["accuracy"]
