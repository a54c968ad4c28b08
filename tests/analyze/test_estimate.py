"""Intervals that invert their test, on data where the first version's did not; and simulated coverage, small."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from peft_arena.analyze.estimate import Pivot, Term, estimate
from peft_arena.analyze.paired import Scores, difference, mean_of
from peft_arena.analyze.seed_spread import SeedSpread
from peft_arena.core.measure import FEWEST_UNITS
from tests.analyze.test_paired import base, scores


def in_points(new, old, **more):
    return estimate(difference(scores(new), base(old), "t", fraction=True).times(100.0), "points", **more)


def agrees(found, level=0.95):
    """Say whether interval and p-value tell the same of zero."""
    low, high = found.interval(level)
    return (low > 0 or high < 0) == (found.p < 1 - level)


def test_one_wrong_answer_of_three_hundred_excludes_nothing():
    new = np.ones((3, 100))
    new[1, 7] = 0.0
    found = in_points(new, np.ones(100))
    assert found.value == pytest.approx(-1 / 3)
    assert found.low < 0 <= found.high
    assert found.p > 0.05


def test_the_numbers_of_one_seed_are_those_of_agresti_and_min():
    new, old = np.zeros(200), np.zeros(200)
    new[:60] = 1.0
    old[:20], old[60:70] = 1.0, 1.0
    d = new - old
    value, n = d.mean(), 200
    found = in_points(new, old)
    error = np.sqrt(d.var(ddof=1) / n * (n / (n + 2)) ** 2 + 1 / (n + 2) ** 2)
    half = stats.t.isf(0.025, n - 1) * error
    centre = value * n / (n + 2)
    assert (found.low, found.high) == pytest.approx((100 * (centre - half), 100 * (centre + half)))
    assert found.stderr == pytest.approx(100 * error)
    assert found.p == pytest.approx(2 * stats.t.sf(centre / error, n - 1))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_no_interval_has_width_zero_because_all_answers_agree(value, seeds):
    found = in_points(np.full((seeds, 80), value), np.zeros(80))
    assert found.value == 100 * value
    assert found.high - found.low > 1
    assert found.low <= found.value <= found.high
    assert agrees(found)


def test_no_end_is_impossible():
    new = np.zeros((2, 100))
    new[0, :90] = 1.0  # two trainings that could not differ more
    found = in_points(new, np.r_[np.ones(80), np.zeros(20)])
    assert found.low >= -100 and found.high <= 100
    assert found.low < -80 and found.high > 20, "the truth may be beyond what was measured of the base"
    assert found.high <= 100 * (1 - 0.67) and found.low >= -90


def test_quantities_that_are_no_fractions_have_no_interval_where_all_differ_alike():
    found = estimate(difference(scores(np.full(40, 2.0)), base(np.full(40, 1.5)), "t"), "nats")
    assert (found.low, found.high, found.p, found.stderr) == (None, None, None, None)
    assert "differ by the same amount" in found.missing


@pytest.mark.parametrize(("items", "group", "said"), [(5, 1, "5 items"), (1, 1, "1 item:"), (50, 10, "5 groups")])
def test_below_six_units_there_is_no_interval(items, group, said):
    units = np.arange(items) // group
    rng = np.random.default_rng(0)
    one, other = scores(rng.random(items), units=units), base(rng.random(items), units=units)
    found = estimate(difference(one, other, "t"), "x")
    assert found.low is None and found.p is None
    assert said in found.missing and f"needs {FEWEST_UNITS}" in found.missing
    assert np.isfinite(found.value)


@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(6, 40),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([0.5, 0.9, 0.95, 0.999]),
)
def test_interval_and_p_value_never_disagree(seeds, items, seed, level, noise, coverage):
    rng = np.random.default_rng(seed)
    old = (rng.random(items) < level).astype(float)
    new = np.where(rng.random((seeds, items)) < noise, rng.random((seeds, items)) < level, old).astype(float)
    new[rng.random((seeds, items)) < 0.05] = np.nan
    found = difference(scores(new), base(old), "t", fraction=True)
    if found is None:
        return
    spread = (SeedSpread(float(rng.random()) * 1e-3, float(rng.integers(1, 9))),)
    for more in ({}, {"spread": spread}):
        one = estimate(found, "x", **more)
        if not one.known:
            continue
        assert agrees(one, coverage)
        low, high = one.interval(coverage)
        assert low <= one.value <= high and high > low
        assert low >= -1 and high <= 1
        wider = one.interval(0.9999)
        assert wider[0] <= low and high <= wider[1]


def test_a_test_of_one_term_is_students_t_and_of_several_lies_between_theirs():
    one = Pivot(1.0, 0.5, (Term(1.0, 7.0),))
    assert one.above(0.0) == pytest.approx(stats.t.sf(2.0, 7))
    assert one.below(0.0) == pytest.approx(stats.t.cdf(2.0, 7))
    assert one.half(0.95) == pytest.approx(stats.t.isf(0.025, 7) * 0.5)
    both = Pivot(1.0, 0.5, (Term(0.3, 1e9), Term(0.7, 2.0)))
    assert stats.norm.sf(2.0) < both.above(0.0) < stats.t.sf(2.0, 2)
    assert both.half(0.95) == pytest.approx(
        0.5 * np.sqrt(0.3 * stats.norm.isf(0.025) ** 2 + 0.7 * stats.t.isf(0.025, 2) ** 2)
    )
    for tail in (0.4, 0.05, 1e-4, 1e-9):
        assert both.tail(both.quantile(tail)) == pytest.approx(tail, rel=1e-6)
    assert both.tail(0.0) == 0.5
    assert both.tail(-1.0) == pytest.approx(1 - both.tail(1.0))


def test_seeds_and_items_give_the_variance_of_the_two_way_model():
    rng = np.random.default_rng(6)
    seeds, items = 5, 200
    errors = []
    for _ in range(200):
        noise = 0.05 * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(1, items)) + rng.normal(size=(seeds, items))
        errors.append(estimate(difference(scores(noise), base(np.zeros(items)), "t"), "x").stderr ** 2)
    truth = 0.05**2 / seeds + 0.3**2 / items + 1 / (seeds * items)
    assert np.mean(errors) == pytest.approx(truth, rel=0.1)


def test_a_spread_that_is_declared_counts_for_one_seed_only():
    rng = np.random.default_rng(2)
    new, old = (rng.random((1, 300)) < 0.6).astype(float), (rng.random(300) < 0.5).astype(float)
    declared = SeedSpread(3.0**2, 9.0)
    alone, told = in_points(new, old), in_points(new, old, declared=declared)
    assert (alone.covers, told.covers) == ("items only", "items, and seed_sd")
    assert told.stderr == pytest.approx(np.hypot(alone.stderr, 3.0))
    twice = np.vstack([new, new])
    assert in_points(twice, old, declared=declared).covers == "seeds and items"
    measured = in_points(new, old, spread=(SeedSpread(4.0, 5.0),), declared=declared)
    assert measured.covers == "items, and the seed spread of other arms"
    assert measured.stderr == pytest.approx(np.hypot(alone.stderr, 2.0))


def test_tasks_add_up_in_a_mean():
    rng = np.random.default_rng(7)
    first = [(rng.random(100) < 0.8).astype(float), (rng.random(100) < 0.7).astype(float)]
    second = [(rng.random(60) < 0.4).astype(float), (rng.random(60) < 0.5).astype(float)]
    alone = [in_points(*pair) for pair in (first, second)]
    parts = [
        difference(scores(new), base(old), name, fraction=True).times(100.0)
        for name, (new, old) in zip("ab", (first, second), strict=True)
    ]
    joint = estimate(mean_of(parts), "points")
    assert joint.value == pytest.approx(np.mean([one.value for one in alone]))
    assert joint.stderr == pytest.approx(np.hypot(*(one.stderr for one in alone)) / 2)


def coverage(build, truth, studies, seed=0):
    rng = np.random.default_rng(seed)
    inside = [found.low <= truth <= found.high for found in (build(rng) for _ in range(studies))]
    return np.mean(inside)


@pytest.mark.parametrize(("seed_sd", "item_sd", "noise_sd"), [(0.0, 0.4, 0.3), (0.03, 0.3, 0.3), (0.1, 0.1, 0.1)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_hold_the_truth_about_as_often_as_they_say(seeds, seed_sd, item_sd, noise_sd):
    def build(rng):
        values = (
            0.1
            + seed_sd * rng.normal(size=(seeds, 1))
            + item_sd * rng.normal(size=(1, 100))
            + noise_sd * rng.normal(size=(seeds, 100))
        )
        return estimate(difference(scores(values), base(np.zeros(100)), "t"), "x")

    share = coverage(build, 0.1, 400)
    assert 0.92 <= share <= (0.998 if seeds == 2 else 0.99)


def test_equal_accuracies_near_one_are_covered():
    def build(rng):
        shared = rng.random(50)
        answers = [
            (np.where(rng.random((3, 50)) < 0.7, shared, rng.random((3, 50))) < 0.99).astype(float) for _ in "ab"
        ]
        return estimate(difference(scores(answers[0]), scores(answers[1]), "t", fraction=True), "x")

    assert coverage(build, 0.0, 400) >= 0.95


def test_clustered_items_are_covered():
    units = np.repeat(np.arange(20), 10)

    def build(rng):
        values = np.sqrt(0.3) * rng.normal(size=20)[units] + np.sqrt(0.7) * rng.normal(size=200)
        return estimate(difference(scores(values, units=units), base(np.zeros(200), units=units), "t"), "x")

    assert 0.92 <= coverage(build, 0.0, 400) <= 0.98


def test_units_are_taken_from_either_side():
    left = Scores((0,), np.ones((1, 12)), np.ones((1, 12)), np.arange(12) // 2)
    assert difference(left, base(np.zeros(12), units=np.arange(12) // 2), "t").units == 6
