"""The scorer of mathematics on public sets: every gold answer is right, and its neighbours are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from peft_arena.tasks.scorers import math_verify

SETS = Path(__file__).parents[3] / "shared" / "data" / "math"
EVERY = {"aime24": 1, "amc23": 1, "asdiv": 15, "gsm8k": 15, "math500": 4, "svamp": 15}
"""Of how many rows one is tried."""
pytestmark = [
    pytest.mark.skipif(not SETS.is_dir(), reason=f"there are no math sets at {SETS}"),
    pytest.mark.slow,
    pytest.mark.parametrize("name", EVERY),
]


def golds(name: str) -> list[str]:
    """Return the answers of a set as their authors write them, units and rationale left out."""
    rows = [json.loads(line) for line in (SETS / name / "test.jsonl").read_text().splitlines()]
    found = [row.get("answer", row.get("Answer")) for row in rows]
    if name == "gsm8k":
        found = [answer.rpartition("####")[2].strip() for answer in found]
    if name == "asdiv":
        found = [answer.partition(" (")[0] for answer in found]
    return [f"{answer:g}" if isinstance(answer, float) else str(answer) for answer in found]


def test_gold_answers_are_right(name: str) -> None:
    tried = golds(name)[:: EVERY[name]]
    assert len(tried) >= 30
    wrong = {gold for gold in tried if math_verify([gold], f"So the answer is $\\boxed{{{gold}}}$.").value != 1.0}
    assert wrong == set()


def test_neighbours_of_whole_numbers_are_wrong(name: str) -> None:
    whole = [gold for gold in golds(name)[:: EVERY[name]] if re.fullmatch(r"-?[0-9,]+", gold)]
    assert len(whole) >= 30
    near = {gold: int(gold.replace(",", "")) for gold in whole}
    judged = {
        (gold, said): math_verify([gold], f"\\boxed{{{said}}}").value
        for gold in near
        for said in (near[gold] - 1, near[gold] + 1)
    }
    assert {pair for pair, value in judged.items() if value != 0.0} == set()
