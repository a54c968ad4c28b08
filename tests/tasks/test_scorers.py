"""Scorers: known verdicts, and no text whatever makes one raise."""

from __future__ import annotations

import threading
import unicodedata
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_arena.tasks import scorers
from peft_arena.tasks.base import Score
from peft_arena.tasks.scorers import GAMED_BY, SCORERS, canonical_number, extract_number, find_numbers, normalise_answer

CASES = [
    ("exact_match", "red", " red\n", 1.0),
    ("exact_match", "red", "Red", 0.0),
    ("normalised_match", "The Beatles", "beatles.", 1.0),
    ("normalised_match", "The Beatles", "beatles band", 0.0),
    ("normalised_match", "The The", "The The", 1.0),
    ("contains", "Beatles", "It was the Beatles, I think.", 1.0),
    ("contains", "art", "It was the party", 0.0),
    ("contains", "Beatles", "no idea\nBeatles", 0.0),
    ("contains", "The", "anything", 0.0),
    ("contains", "The", "The", 1.0),
    ("numeric", "42", "The answer is 42.", 1.0),
    ("numeric", "42", "142", 0.0),
    ("numeric", "1,000", "$1000.00", 1.0),
    ("numeric", "-5", "\N{MINUS SIGN}5", 1.0),
    ("numeric", "5", "no number", 0.0),
    ("numeric", "5 apples", "2+3=5\n#### 5 of 7", 1.0),
    ("numeric", "none", "5", None),
    ("math_verify", "1/2", "$\\frac{1}{2}$", 1.0),
    ("math_verify", "0.5", "The answer is 1/2", 1.0),
    ("math_verify", "x+1", "$1+x$", 1.0),
    ("math_verify", "7", "8", 0.0),
    ("math_verify", "7", "", 0.0),
    ("math_verify", "7", "$9^{9^{9^9}}$", None),
    ("math_verify", "7", "$" + "(" * 2000 + "$", None),
    ("math_verify", "7", "$\\operatorname{ eye }(9999)$", None),
    ("math_verify", "7", "the zeros of $\\operatorname{sinc}(x)$: 7", 1.0),
    ("math_verify", "\\$36", "It costs $36$.", 1.0),
    ("math_verify", "\\$36", "It costs $35$.", 0.0),
    ("contains", "Beatles", "x " * 10_000 + "Beatles", 0.0),
    ("boxed", "1/2", "It is \\boxed{3}, no, \\boxed{\\frac{1}{2}} of 7.", 1.0),
    ("boxed", "So $\\boxed{7}$.", "\\boxed{7}", 1.0),
    ("boxed", "7", "The answer is 7.", 0.0),
    ("boxed", "7", "\\boxed{7} and \\boxed{}", 0.0),
    ("boxed", "7", "\\boxed{" + "7+" * 1000 + "7}", 0.0),
    ("boxed", "7", "\\boxed{9^{9^{9^9}}}", None),
    ("boxed", "27", "\\boxed{27.}", 1.0),
    ("boxed", "27", "\\boxed{**27**}", 1.0),
    ("boxed", "2.7", "\\boxed{27.}", 0.0),
    ("boxed", "90", "\\boxed{90\\degree}", 1.0),
]


def test_every_scorer_has_cases() -> None:
    assert {case[0] for case in CASES} == set(SCORERS.names())


@pytest.mark.parametrize(("name", "gold", "completion", "value"), CASES)
def test_verdicts(name: str, gold: str, completion: str, value: float | None) -> None:
    assert SCORERS.get(name)([gold], completion).value == value


@pytest.mark.parametrize("name", SCORERS.names())
def test_listing_candidates_wins_only_where_that_is_said(name: str) -> None:
    listed = ["5, 6, 7, 8", "5 or 6 or 7 or 8", "$5$, $6$, $7$, $8$", "\\boxed{5, 6, 7, 8}", "5\n6\n7\n8"]
    wins = [text for text in listed if SCORERS.get(name)(["6"], text).value == 1.0]
    assert bool(wins) == (name in GAMED_BY), wins


def test_any_accepted_answer_counts() -> None:
    for name in SCORERS.names():
        said = "\\boxed{8}" if name == "boxed" else "8"
        assert SCORERS.get(name)(["7", "8"], said).value == 1.0


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("5-3", []),
        ("5 - 3 = -2", ["-2"]),
        ("+07 and 1,234,567.50 and 1,23", ["7", "1234567.5"]),
        ("-0, 0.0", ["0", "0"]),
        ("(3)-4, 1/2", ["0.5"]),
        ("", []),
    ],
)
def test_finding_numbers(text: str, numbers: list[str]) -> None:
    assert find_numbers(text) == numbers


def test_the_mark_decides_where_the_number_is() -> None:
    assert extract_number("3 + 4 = 7\n#### 7 (or 8)") == "7"
    assert extract_number("it is 7, then 8") == "8"
    assert extract_number("it is 7 ####") == ""


@given(st.integers(), st.integers(min_value=0, max_value=999))
def test_numbers_survive_writing(whole: int, thousandths: int) -> None:
    written = f"{whole:+,}.{thousandths:03d}"
    assert Decimal(canonical_number(written)) == Decimal(written.replace(",", ""))
    assert scorers.numeric([written], f"so it is {written}").value == 1.0


ACCENTS = st.text(alphabet=st.sampled_from("CaeiIs\u0130\u0131\u03a3\u1100\u1161\u11a8\u0327\u0301\u0307:;\u037e' the"))


@given(st.one_of(st.text(), ACCENTS))
@example("C:\u0327")
@example("a;\u0301")
@example("\u0130")
@example("the\u037e\u0301")
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    assert normalise_answer(unicodedata.normalize("NFC", text)) == once
    assert normalise_answer(unicodedata.normalize("NFD", text)) == once


TEXTS = st.one_of(st.text(), st.text(alphabet="0123456789-+.,#^*/=\\{}$()[] \nxy!"))


@settings(max_examples=150, deadline=None)
@given(gold=TEXTS, completion=TEXTS)
@pytest.mark.parametrize("name", [name for name in SCORERS.names() if name != "math_verify"])
def test_any_text_gives_a_score(name: str, gold: str, completion: str) -> None:
    _is_score(SCORERS.get(name)([gold], completion))


@settings(max_examples=40, deadline=None)
@given(gold=TEXTS, completion=TEXTS)
def test_any_text_gives_a_score_of_mathematics(gold: str, completion: str) -> None:
    _is_score(scorers.math_verify([gold], completion))


def test_mathematics_outside_the_main_thread() -> None:
    found: list[Score] = []
    worker = threading.Thread(target=lambda: found.append(scorers.math_verify(["1/2"], "$0.5$")))
    worker.start()
    worker.join(timeout=60)
    assert [score.value for score in found] == [1.0]


def _is_score(score: Score) -> None:
    assert score.value in (0.0, 1.0) or (score.value is None and score.reason)
