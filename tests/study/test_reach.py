"""Whether the planned items can show the margin."""

import math

import numpy as np
import pytest

from peft_arena.analyze.estimate import estimate
from peft_arena.analyze.paired import Scores, difference
from peft_arena.study.reach import FEWEST_DIFFER, reaches
from peft_arena.study.read_study import read_study
from peft_arena.tasks.micro.base import MicroTask
from tests.study.test_study import study_file


def of(tmp_path, *changes):
    return reaches(read_study(study_file(tmp_path, *changes)))


def test_twenty_items_cannot_show_two_points(tmp_path):
    target, kept = of(tmp_path)
    assert (kept.items, kept.what) == (256, "of mean retention over 1 task"), "the data is at hand: it is counted"
    assert (target.what, target.margin, target.items, target.is_short) == ("on micro-reverse", 2.0, 20, True)
    assert target.needed == (2150, 4300)
    assert target.reach == pytest.approx(100 * math.sqrt(8.6 * 0.1 / 20))
    assert "20 planned, 2,150 to 4,300 needed" in str(target) and "within 20.7" in str(target)


def test_a_wide_margin_is_in_reach_and_tasks_of_unknown_size_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(MicroTask, "at_hand", False)
    (target,) = of(tmp_path, ("seeds: [0, 1]\n", "seeds: [0, 1]\nmargin: {target: 25}\n"))
    assert not target.is_short


def test_mean_retention_takes_the_items_of_all_its_tasks(tmp_path):
    _, kept = of(
        tmp_path, ("task: micro-sort\n", "task: micro-sort\n    items: 100\n  - {task: micro-facts, items: 50}\n")
    )
    assert kept.what == "of mean retention over 2 tasks"
    assert kept.items == 150
    assert kept.reach == pytest.approx(100 * math.sqrt(8.6 * 0.1 * (1 / 100 + 1 / 50) / 4))
    assert kept.needed[0] == math.ceil(150 * (1 / 100 + 1 / 50) / 4 * 0.86 / 0.02**2)


def test_so_many_items_show_the_margin_in_nine_of_ten_studies():
    rng = np.random.default_rng(7)
    shown = 0
    for _ in range(400):
        left = (rng.random(2150) < 0.5).astype(float)
        right = np.where(rng.random(2150) < FEWEST_DIFFER, 1 - left, left)  # as many either way
        one, two = (Scores((0,), values[None], np.ones((1, 2150))) for values in (left, right))
        shown += estimate(difference(one, two, "t", fraction=True).times(100), "points").p_above(-2.0) < 0.05
    assert 0.86 < shown / 400 < 0.94


@pytest.mark.parametrize(("items", "silent"), [(5, True), (6, False)])
def test_fewer_than_six_items_have_no_interval_and_the_plan_says_so(tmp_path, items, silent):
    target, _ = of(tmp_path, ("items: 20", f"items: {items}"))
    assert target.is_short and bool(target.no_interval) is silent
    assert ("too few items to say anything on micro-reverse: 5 items, and an interval needs 6" in str(target)) is silent
    assert target.summary()["no_interval"] == target.no_interval
