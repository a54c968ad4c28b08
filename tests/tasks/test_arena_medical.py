"""Medical questions: which letter a text gives, both forms, and the mean over subjects."""

from __future__ import annotations

import pytest

from peft_arena.tasks.base import Kind, Score
from peft_arena.tasks.benchmarks.medical import MedQa, chosen_letter
from peft_arena.tasks.registry import make_task
from peft_arena.testing.tasks import check_task

NAMES = ("arena-medmcqa", "arena-medqa", "arena-mmlu-medical", "arena-pubmedqa")
OPTIONS = ("Aspirin", "Iron", "Vitamin K", "None of the above")
SAID = {
    "\\boxed{C}": "C",
    "\\boxed{c}": "C",
    "A is tempting. \\boxed{A}, no: $\\boxed{(C)}$, not B.": "C",
    "\\boxed{\\text{C}}": "C",
    "\\boxed{\\textbf{C. Vitamin K}}": "C",
    "\\boxed{C) the vitamin}": "C",
    "\\boxed{vitamin k}": "C",
    "The answer is A. \\boxed{C}": "C",
    "The answer is A, and later: the final answer is **C**": "C",
    "Answer: (C) Vitamin K": "C",
    "Answer: C\nSo the answer is not A": "C",
    "The answer is C because of the bleeding": "C",
    "\\boxed{B} \\boxed{C": "B",
    "\\boxed{Option C}": "C",
    "\\boxed{\\text{Answer: C}}": "C",
    "\\boxed{**C**}": "C",
    "\\boxed{C - Vitamin K}": "C",
    "\\boxed{C Vitamin K}": "C",
    "\\boxed{\\text{\\textbf{C}}}": "C",
    "**Answer**: C": "C",
    "The answer is: $\\textbf{C}$": "C",
    "The correct option is C.": "C",
    "": "",
    "C": "C",
    "It must be C.": "C",
    "The answer C is wrong": "",
    "The answer is a vitamin": "",
    "The answer is Aspirin": "A",
    "\\boxed{}": "",
    "\\boxed{E}": "",
    "\\boxed{B. or C}": "",
    "\\boxed{B - Vitamin K}": "",
    "\\boxed{B-cell}": "",
    "\\boxed{a vitamin}": "",
    "The correct option is not C": "",
    "\\boxed{B, C}": "",
    "\\boxed{3}": "",
    "\\boxed{zzz} The answer is C": "",
}


@pytest.mark.parametrize("said", SAID)
def test_letter_of_a_text(said: str) -> None:
    assert chosen_letter(said, OPTIONS) == SAID[said]


def test_the_text_of_two_options_is_no_answer() -> None:
    assert chosen_letter("\\boxed{same}", ("same", "Same", "other")) == ""
    assert chosen_letter("\\boxed{other}", ("same", "Same", "other")) == "C"


def test_an_option_may_begin_like_a_letter() -> None:
    germs = ("E. coli", "C. difficile", "H. pylori", "A. baumannii")
    assert [chosen_letter(f"\\boxed{{\\textit{{{germ}}}}}", germs) for germ in germs] == list("ABCD")
    assert chosen_letter("\\boxed{C}", germs) == "C"
    assert chosen_letter("\\boxed{B. C. difficile}", germs) == "B"
    assert chosen_letter("\\boxed{A}", ("O", "A", "B", "AB")) == "A"


def test_a_row_without_the_right_letter_is_left_out() -> None:
    row = {"question": "Which?", "options": dict(zip("ABCD", OPTIONS, strict=True))}
    task = MedQa()
    golds = [task.read({**row, "answer_idx": given}, task.data["test"][0]) for given in ("", "AB", None, "C")]
    assert [found and found.item.gold for found in golds] == [None, None, None, 2]


@pytest.mark.parametrize("name", NAMES)
def test_generated_answers(name: str) -> None:
    task = make_task(name, {"source": "miniature"})
    assert task.card.kind is Kind.GENERATE
    for item in task.items("test"):
        assert item.gold is not None
        right = item.choices[item.gold]
        turns = task.prompt(item)
        assert isinstance(turns, tuple)
        (turn,) = turns
        assert f"\n{right}. {item.data['options'][item.gold]}\n" in turn.content
        assert turn.content.endswith("within \\boxed{}.")
        assert task.score(item, f"It is not Z.\n\\boxed{{{right}}}").value == 1.0
        wrong = item.choices[(item.gold + 1) % len(item.choices)]
        assert task.score(item, f"\\boxed{{{right}}} or rather \\boxed{{{wrong}}}").value == 0.0
        assert task.score(item, right).value == 1.0
        assert task.score(item, f"{right} or {wrong}").value == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_likelihoods_of_letters(name: str) -> None:
    task = make_task(name, {"source": "miniature", "form": "likelihood"})
    check_task(task)
    assert task.card.kind is Kind.CHOICE
    item = task.items("test")[0]
    prompt = task.prompt(item)
    assert isinstance(prompt, str)
    assert prompt.startswith("Question: ") and prompt.endswith("\nAnswer:")
    assert task.continuations(item) == tuple(f" {letter}" for letter in "ABCD"[: len(item.choices)])
    with pytest.raises(TypeError, match="does not judge"):
        task.score(item, "\\boxed{A}")


def test_subjects_weigh_the_same() -> None:
    task = make_task("arena-mmlu-medical", {"source": "miniature"})
    items = task.items("test")
    subjects = [task.stratum(item) for item in items]  # type: ignore[attr-defined]
    assert len(set(subjects)) >= 3
    assert len(items) > len(set(subjects))  # some subject has more questions, so that the two means differ
    scores = [Score(float(subject == subjects[0]), others={}) for subject in subjects]
    settled = task.settle(items, scores)
    mean = sum(score.value or 0.0 for score in settled) / len(settled)
    assert mean == pytest.approx(1 / len(set(subjects)))
    assert sum(score.value or 0.0 for score in scores) / len(scores) != pytest.approx(mean)
    lost = [
        score if subject != subjects[0] else Score(None, reason="lost")
        for subject, score in zip(subjects, scores, strict=True)
    ]
    assert {score.value for score in task.settle(items, lost)} == {None}
