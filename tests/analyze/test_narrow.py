"""Where intervals would be too narrow: ties of seeds, unequal groups, discounts, unscored answers."""

import json

import numpy as np
import pytest

from peft_arena.analyze.estimate import Estimate, Pivot, Term, estimate
from peft_arena.analyze.family import Family
from peft_arena.analyze.paired import Scores, difference, level, mean_of
from peft_arena.analyze.passk import run_spread
from peft_arena.analyze.pscp import _pairs
from peft_arena.analyze.random_effects import over_independent
from peft_arena.analyze.seed_spread import pooled
from peft_arena.analyze.study import analyze_study
from tests.analyze.synthetic import Truth, build_synthetic
from tests.analyze.test_paired import base, scores


def answers(right, of):
    return np.repeat([1.0, 0.0], [right, of - right])


def test_seeds_that_tie_leave_the_error_of_the_items():
    """Two arms whose two seeds differ by the same: the spread comes out as nothing, and says nothing."""
    rng = np.random.default_rng(0)
    left, right = ([rng.permutation(answers(count, 200)) for count in counts] for counts in ((75, 80), (80, 85)))
    found = difference(scores(left), scores(right), "t", fraction=True)
    spread = pooled({"a": {0: 0.375, 1: 0.4}, "b": {0: 0.4, 1: 0.425}}).of_difference("a", "b")
    assert sum(one.variance for one in spread) == pytest.approx(0, abs=1e-12)
    known, alone = estimate(found, "x", spread=spread), estimate(found, "x")
    assert known.p > 0.05
    assert known.stderr == pytest.approx(alone.stderr, rel=0.05)
    assert known.stderr > 0.02


def test_an_a_a_pair_that_ends_alike_says_nothing_of_the_others(tmp_path):
    truths = [Truth("full", gain=0.99, spread=0.0), Truth("a", gain=0.4, seeds=(0,)), Truth("b", gain=0.5, seeds=(0,))]
    made = build_synthetic(tmp_path, truths, items=60, corpus=False)
    target = analyze_study(made.store, made.view, draws=50).targets[0]
    runs = [np.mean([item.value for item in _items(made, run)]) for run in made.view.arms[0].runs]
    assert len(set(runs)) == 1, "the three seeds end alike"
    about = {arm.label: arm.gain.delta.about_runs for arm in target.arms}
    assert about == {"full": False, "a": True, "b": True}


def _items(made, run):
    directory = made.store.run(run)
    return directory.evaluation(directory.point(200), made.view.arms[0].target).items


@pytest.mark.parametrize("sizes", [[100, *[10] * 5], [60, 60, *[5] * 6], [300, *[3] * 19]])
def test_a_few_groups_with_all_the_weight_have_no_interval(sizes):
    units = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(1)
    found = [(rng.random(len(units)) < 0.5).astype(float) for _ in "ab"]
    refused = estimate(difference(scores(found[0], units=units), base(found[1], units=units), "t", fraction=True), "x")
    assert not refused.known
    assert "groups with the weight of" in refused.missing


def test_unequal_groups_have_fewer_degrees_of_freedom_than_groups():
    def df(sizes):
        units = np.repeat(np.arange(len(sizes)), sizes)
        values = np.random.default_rng(2).random(len(units))
        found = estimate(difference(scores(values, units=units), base(np.zeros_like(values), units=units), "t"), "x")
        return found.lower.terms[0].df

    assert df([10] * 12) == pytest.approx(11)
    assert 3 < df([60] * 4 + [20] * 8) < 7


def test_pscp_of_equal_arms_has_the_spread_of_their_scores_whatever_the_other_discounts():
    rng = np.random.default_rng(3)

    class Task:
        key, is_fraction, unit = "t", True, "fraction"

    values = {name: rng.random((3, 100)) < 0.6 for name in "abcd"}
    arms = {name: Scores((0, 1, 2), one.astype(float), np.ones((3, 100))) for name, one in values.items()}
    orders = {(left, right): "robust" for left in "abcd" for right in "abcd"}

    def error(discounts):
        pairs = _pairs(arms, discounts, orders, Family(), Task)
        return next(one.judged.estimate for one in pairs if (one.left, one.right) == ("a", "b")).stderr

    alike = error(dict.fromkeys("abcd", 0.9))
    assert error({"a": 0.9, "b": 0.9, "c": 0.1, "d": 0.1}) == pytest.approx(alike)


def test_unscored_answers_widen_pscp_over_targets_and_levels():
    values = np.where(np.arange(200) < 20, np.nan, np.tile([1.0, 0.0], 100))
    full = np.tile([1.0, 0.0], 100)
    pair = difference(scores(values).times(0.5), scores(full).times(0.9), "t", fraction=True, most=(0.5, 0.9))
    assert pair.bounds is not None
    assert pair.bounds.low.value == pytest.approx(0.5 * 0.45 - 0.9 * 0.5)
    one = estimate(difference(scores(values), base(full), "t", fraction=True), "x")
    over = over_independent([one] * 5).estimate
    assert over.bounded
    assert over.lower.centre < one.value < over.upper.centre
    assert level(scores(values), "t", fraction=True).bounds.high.value == pytest.approx(0.55)


def test_unscored_answers_of_unknown_worth_leave_no_interval():
    values = np.where(np.arange(100) < 3, np.nan, 3.0 + np.arange(100) / 50)
    found = estimate(difference(scores(values), base(values - 0.1), "t"), "nats")
    assert not found.known and "3.0 % of the answers are unscored" in found.missing
    known = difference(scores(np.tile([1.0, 0.0], 50)), base(np.ones(100)), "u", fraction=True)
    assert not estimate(mean_of([difference(scores(values), base(values - 0.1), "t"), known]), "x").known


def test_a_word_holds_at_the_bounds_and_not_at_the_value():
    """Most answers of the left side are unscored: what is left of them is no evidence."""
    lower, upper = (Pivot(end, 1.0, (Term(1.0, np.inf),)) for end in (-30.0, -10.0))
    found = Estimate(5.0, "points", 1, 100, 100, lower, upper, bounded=True, unscored=0.6)
    judged = Family().ask(found)
    assert judged.word == "worse"
    assert judged.interval[1] < 0
    assert judged.detectable > 35


def test_targets_with_one_seed_weigh_the_same():
    small, large = (
        Estimate(value, "points", 1, 50, 50, *[Pivot(value, error, (Term(1.0, 49.0),))] * 2, covers="items only")
        for value, error in ((4.0, 5.0), (1.0, 0.1))
    )
    found = over_independent([small, small, large])
    assert found.estimate.value == pytest.approx(3.0)


def test_a_run_without_a_score_does_not_break_the_spread_of_the_others():
    some, none = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), np.full((2, 3), np.nan)
    found = run_spread({"a": scores(some), "b": scores(np.vstack([some[:1], none[:1]])), "c": scores(some[:, ::-1])})
    assert all(np.isfinite(one.variance) for one in found.of_run("a"))


def test_a_report_behind_an_undecided_primary_pair_is_written_and_says_so(tmp_path):
    from dataclasses import replace

    from peft_arena.report.build import build_report

    truths = [
        Truth("lora", gain=0.3, seeds=(0,)),
        Truth("oft", gain=0.3, seeds=(0,)),
        Truth("full", gain=0.6, seeds=(0,)),
    ]
    made = build_synthetic(tmp_path, truths, items=200, corpus=False)
    build_report(made.store, replace(made.view, primary=(("lora", "oft"),)), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count(">not tested<") >= 4
    assert summary["headline"][0].startswith("This run of lora against oft: undecided in gain on operator (")
    assert summary["headline"][1].startswith("A primary comparison is undecided, so nothing that goes after it")
    assert "none shown better" not in page and "inf" not in page.split("<table")[1]
    said = [pair["gain"] for pair in summary["targets"][0]["comparisons"]]
    assert [one["is_tested"] for one in said] == [True, False, False]
    assert all(one["detectable"] is None for one in said[1:])
