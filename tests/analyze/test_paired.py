"""Paired differences, linearised unit by unit: against formulas, and against scipy."""

import numpy as np
import pytest
from scipy import stats

from peft_arena.analyze.estimate import estimate
from peft_arena.analyze.paired import Scores, difference, level, mean_of, share_kept


def scores(values, weights=None, seeds=None, units=None):
    values = np.atleast_2d(np.asarray(values, dtype=float))
    weights = np.ones_like(values) if weights is None else np.atleast_2d(np.asarray(weights, dtype=float))
    units = None if units is None else np.asarray(units)
    return Scores(tuple(range(len(values))) if seeds is None else seeds, values, weights, units)


def base(values, weights=None, units=None):
    return scores(values, weights, (None,), units)


def test_one_seed_is_the_paired_t_test_of_scipy():
    rng = np.random.default_rng(1)
    old, new = rng.normal(3, 1, 60), rng.normal(3.2, 1, 60)
    found = estimate(difference(scores(new), base(old), "t"), "nats")
    reference = stats.ttest_rel(new, old)
    ends = reference.confidence_interval()
    assert found.value == pytest.approx(np.mean(new - old))
    assert found.p == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.stderr == pytest.approx(np.std(new - old, ddof=1) / np.sqrt(60))
    assert (found.seeds, found.items, found.units, found.left_out) == (1, 60, 60, 0)
    assert found.about_runs


def test_weighted_items_are_a_ratio_of_sums():
    rng = np.random.default_rng(4)
    weights = np.round(np.exp(rng.normal(4, 1, 150)))
    old, new = rng.normal(3, 1, 150), rng.normal(2.8, 1, 150)
    found = estimate(difference(scores(new, weights), base(old, weights), "t"), "nats")
    assert found.value == pytest.approx(np.average(new, weights=weights) - np.average(old, weights=weights))
    residual = weights * ((new - old) - found.value) / weights.mean()
    a = weights / weights.sum()
    least = 1 - 2 * a + (a**2).sum()
    assert found.stderr == pytest.approx(np.sqrt((residual**2 / least).sum()) / 150, rel=1e-9)
    pulls = np.diag(a) - np.outer(a, a)  # what a unit's value adds to each pull
    form = (pulls.T / least) @ pulls
    assert found.lower.terms[0].df == pytest.approx(np.trace(form) ** 2 / np.trace(form @ form), rel=1e-6)
    assert found.lower.terms[0].df < 149


def test_pairing_makes_the_interval_narrower_than_two_independent_ones():
    hard = np.random.default_rng(9).random(200)
    old, new = (hard < 0.5).astype(float), (hard < 0.55).astype(float)
    found = estimate(difference(scores(new), base(old), "t"), "x")
    assert found.stderr < 0.5 * np.sqrt((new.var() + old.var()) / 200)


def test_unscored_and_unasked_answers_are_left_out_of_both_sides_and_counted():
    new = [[1.0, np.nan, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    old = [0.0, 1.0, np.nan, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    asked = [[1, 1, 1, 1, 0, 1, 1, 1, 1]]
    found = difference(scores(new, asked), base(old), "t")
    assert found.value == pytest.approx(5 / 6)
    assert (found.items, found.left_out) == (6, 3)
    assert found.unscored == pytest.approx(2 / 8)  # of those that both were asked


def test_arms_are_matched_by_seed():
    left = scores([[1.0, 1.0], [0.0, 0.0]], seeds=(0, 1))
    right = scores([[0.0, 0.0], [1.0, 1.0]], seeds=(1, 2))
    found = difference(left, right, "t")
    assert found.seeds == (1,)
    assert found.per_seed.tolist() == [0.0]
    assert difference(left, scores([[1.0, 1.0]], seeds=(7,)), "t") is None


def test_a_seed_without_any_pair_gives_no_difference():
    left = scores([[1.0, np.nan], [1.0, 1.0]])
    assert difference(left, base([np.nan, 1.0]), "t") is None


def test_items_of_one_group_are_one_unit():
    rng = np.random.default_rng(3)
    passages = rng.normal(size=20)
    values = np.repeat(passages, 10)
    units = np.repeat(np.arange(20), 10)
    alike = estimate(difference(scores(values, units=units), base(np.zeros(200), units=units), "t"), "x")
    few = estimate(difference(scores(passages), base(np.zeros(20)), "t"), "x")
    assert (alike.items, alike.units) == (200, 20)
    assert alike.stderr == pytest.approx(few.stderr)
    assert (alike.low, alike.high) == pytest.approx((few.low, few.high))
    apart = estimate(difference(scores(values), base(np.zeros(200)), "t"), "x")
    assert apart.stderr < 0.4 * alike.stderr


def test_groups_are_collapsed_after_masking():
    units = np.repeat(np.arange(8), 2)
    values = np.array([1.0, 0.0] * 8)
    values[1] = np.nan  # one answer of the first group could not be scored
    found = difference(scores(values, units=units), base(np.zeros(16), units=units), "t")
    assert found.value == pytest.approx(8 / 15)
    assert (found.items, found.units) == (15, 8)
    pulls = np.where(np.isfinite(values), np.nan_to_num(values) - 8 / 15, 0.0) / 15
    assert found.parts[0].pull == pytest.approx(pulls.reshape(8, 2).sum(axis=1))


def test_the_mean_over_tasks_needs_equal_seeds_and_weighs_tasks_equally():
    values = np.random.default_rng(0).random((3, 40))
    first = difference(scores(values), base(np.zeros(40)), "a")
    assert mean_of([first, difference(scores(values[:2]), base(np.zeros(40)), "b")]) is None
    other = difference(scores(values[:, :20] + 1), base(np.zeros(20)), "b")
    joint = mean_of([first, other])
    assert joint.value == pytest.approx((values.mean() + values[:, :20].mean() + 1) / 2)
    assert (joint.items, joint.units) == (60, 60)
    assert mean_of([]) is None


def test_turning_over_swaps_everything():
    new = (np.random.default_rng(5).random((2, 30)) < 0.7).astype(float)
    new[0, :4] = np.nan
    forth = estimate(difference(scores(new), base(np.zeros(30)), "t", fraction=True).times(100), "points")
    back = estimate(difference(scores(new), base(np.zeros(30)), "t", fraction=True).times(-100), "points")
    assert forth.bounded
    for found in (back, forth.times(-1, "points")):
        assert found.value == pytest.approx(-forth.value)
        assert (found.low, found.high) == pytest.approx((-forth.high, -forth.low))
        assert found.p == pytest.approx(forth.p)


def test_unscored_answers_widen_the_interval_to_what_they_could_have_been():
    rng = np.random.default_rng(6)
    old, new = (rng.random(200) < 0.3).astype(float), (rng.random(200) < 0.6).astype(float)
    new[:20] = np.nan
    found = estimate(difference(scores(new), base(old), "t", fraction=True), "x")
    ends = []
    for value in (0.0, 1.0):
        filled = np.where(np.isnan(new), value, new)
        ends.append(estimate(difference(scores(filled), base(old), "t", fraction=True), "x"))
    assert found.bounded and found.unscored == pytest.approx(0.1)
    assert found.value == pytest.approx(np.mean(new[20:]) - np.mean(old[20:]))
    assert (found.low, found.high) == pytest.approx((ends[0].low, ends[1].high))
    assert found.p == pytest.approx(ends[0].p)


def test_a_claim_must_hold_at_the_worse_bound():
    """20 of 200 answers are unscored and all wrong, the true gain is 0: left out they look like a gain."""
    old = np.zeros(200)
    old[:90] = 1.0
    new = old.copy()
    new[80:100] = np.nan
    found = estimate(difference(scores(new), base(old), "t", fraction=True), "x")
    assert found.low < 0 < found.high
    plain = difference(scores(np.where(np.isnan(new), 0.0, new)), base(old), "t", fraction=True)
    assert found.low <= plain.value <= found.high


def test_few_unscored_answers_and_values_that_are_no_fractions_have_no_bounds():
    new = np.ones(200)
    new[0] = np.nan
    assert difference(scores(new), base(np.zeros(200)), "t", fraction=True).bounds is None
    new[:20] = np.nan
    assert difference(scores(new), base(np.zeros(200)), "t").bounds is None
    assert difference(scores(new * 1.5), base(np.zeros(200)), "t", fraction=True).bounds is None  # linearised values


def test_a_level_near_the_ends_stays_inside_and_has_a_width():
    found = estimate(level(scores(np.ones((1, 50))), "t", fraction=True), "fraction")
    assert found.value == 1.0
    assert 0.9 < found.low < 1.0 and found.high == 1.0
    many = np.random.default_rng(2).random((3, 400)) < 0.4
    middle = estimate(level(scores(many), "t", fraction=True), "fraction")
    assert middle.low < 0.4 < middle.high
    assert level(scores([[np.nan, np.nan]]), "t") is None


def test_the_share_kept_is_of_what_the_base_had_above_chance():
    rng = np.random.default_rng(8)
    old = (rng.random(300) < 0.9).astype(float)
    new = np.where(rng.random(300) < 0.8, old, 0.0)
    found = estimate(share_kept(scores(new), base(old), 0.25, "t"), "share")
    assert found.value == pytest.approx((new.mean() - 0.25) / (old.mean() - 0.25))
    drawn = []
    for _ in range(2000):
        rows = rng.integers(0, 300, 300)
        drawn.append((new[rows].mean() - 0.25) / (old[rows].mean() - 0.25))
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.1)
    assert share_kept(scores(new), base(old), old.mean() - 0.01, "t") is None
