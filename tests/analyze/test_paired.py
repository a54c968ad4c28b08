"""Paired differences against scipy, against formulas, and against known truth."""

import numpy as np
import pytest
from scipy import stats

from peft_arena.analyze.paired import (
    Resamples,
    Scores,
    difference,
    estimate,
    mean_of,
)


def scores(values, weights=None, seeds=None):
    values = np.atleast_2d(np.asarray(values, dtype=float))
    weights = np.ones_like(values) if weights is None else np.atleast_2d(np.asarray(weights, dtype=float))
    return Scores(tuple(range(len(values))) if seeds is None else seeds, values, weights)


def base(values, weights=None):
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    return Scores((None,), values[None, :], weights[None, :])


def paired_difference(left, right, rng, unit, draws=4000):
    resamples = Resamples(rng, draws)
    return estimate(difference(left, right, resamples, "task"), resamples, unit)


def test_one_seed_agrees_with_scipy_and_with_the_standard_error():
    rng = np.random.default_rng(1)
    old = (rng.random(300) < 0.5).astype(float)
    new = np.where(rng.random(300) < 0.8, old, (rng.random(300) < 0.8).astype(float))
    found = paired_difference(scores(new), base(old), np.random.default_rng(2), "fraction", draws=10_000)
    reference = stats.bootstrap(
        (new, old),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(3),
    )
    assert found.value == pytest.approx(np.mean(new - old))
    assert found.low == pytest.approx(reference.confidence_interval.low, abs=0.006)
    assert found.high == pytest.approx(reference.confidence_interval.high, abs=0.006)
    assert found.stderr == pytest.approx(np.std(new - old, ddof=1) / np.sqrt(300), rel=0.04)
    assert (found.seeds, found.items, found.left_out) == (1, 300, 0)


def test_weighted_items_are_a_ratio_of_sums():
    rng = np.random.default_rng(4)
    weights = np.round(np.exp(rng.normal(4, 1, 150)))
    old, new = rng.normal(3, 1, 150), rng.normal(2.8, 1, 150)
    found = paired_difference(scores(new, weights), base(old, weights), np.random.default_rng(5), "nats", draws=8000)
    assert found.value == pytest.approx(np.average(new, weights=weights) - np.average(old, weights=weights))
    residual = weights * ((new - old) - found.value) / weights.mean()
    assert found.stderr == pytest.approx(np.std(residual, ddof=1) / np.sqrt(150), rel=0.12)


def test_seeds_and_items_give_the_variance_of_the_two_way_model():
    rng = np.random.default_rng(6)
    seeds, items = 5, 200
    errors = []
    for _ in range(60):
        noise = 0.05 * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(1, items)) + rng.normal(size=(seeds, items))
        found = paired_difference(scores(noise), base(np.zeros(items)), rng, "x", draws=400)
        errors.append(found.stderr**2)
    truth = 0.05**2 / seeds + 0.3**2 / items + 1 / (seeds * items)
    assert np.mean(errors) == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize(
    ("seed_sd", "item_sd", "noise_sd", "least"),
    [(0.0, 0.4, 0.3, 0.90), (0.03, 0.3, 0.3, 0.89), (0.1, 0.1, 0.1, 0.86)],
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(seed_sd, item_sd, noise_sd, least):
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(250):
        values = (
            0.1
            + seed_sd * rng.normal(size=(3, 1))
            + item_sd * rng.normal(size=(1, 100))
            + noise_sd * rng.normal(size=(3, 100))
        )
        found = paired_difference(scores(values), base(np.zeros(100)), rng, "x", draws=400)
        inside += found.low <= 0.1 <= found.high
    assert least <= inside / 250 <= 0.995


def test_the_test_of_no_difference_is_rarely_wrong():
    rng = np.random.default_rng(8)
    wrong = 0
    for _ in range(250):
        shared = rng.normal(size=(1, 100))
        left = shared + 0.05 * rng.normal(size=(3, 1)) + rng.normal(size=(3, 100))
        right = shared + 0.05 * rng.normal(size=(3, 1)) + rng.normal(size=(3, 100))
        wrong += paired_difference(scores(left), scores(right), rng, "x", draws=300).p < 0.05
    assert wrong / 250 <= 0.09


def test_pairing_makes_the_interval_narrower_than_two_independent_ones():
    rng = np.random.default_rng(9)
    hard = rng.random(200)
    old, new = (hard < 0.5).astype(float), (hard < 0.55).astype(float)
    found = paired_difference(scores(new), base(old), rng, "x")
    alone = np.sqrt((new.var() + old.var()) / 200)
    assert found.stderr < 0.5 * alone


def test_unscored_and_unasked_answers_are_left_out_of_both_sides_and_counted():
    new = [[1.0, np.nan, 1.0, 0.0, 1.0]]
    old = [0.0, 1.0, np.nan, 0.0, 1.0]
    found = paired_difference(scores(new, [[1, 1, 1, 1, 0]]), base(old), np.random.default_rng(0), "x", draws=50)
    assert found.value == pytest.approx(0.5)
    assert (found.items, found.left_out) == (2, 3)


def test_arms_are_matched_by_seed():
    left = scores([[1.0, 1.0], [0.0, 0.0]], seeds=(0, 1))
    right = scores([[0.0, 0.0], [1.0, 1.0]], seeds=(1, 2))
    found = difference(left, right, Resamples(np.random.default_rng(0), 20), "t")
    assert found.seeds == (1,)
    assert found.per_seed.tolist() == [0.0]
    assert difference(left, scores([[1.0, 1.0]], seeds=(7,)), Resamples(np.random.default_rng(0), 20), "t") is None


def test_one_item_has_a_value_and_no_interval():
    found = paired_difference(scores([[1.0]]), base([0.0]), np.random.default_rng(0), "x")
    assert (found.value, found.low, found.high, found.stderr, found.p) == (1.0, None, None, None, None)


def test_the_same_seed_gives_the_same_interval_and_the_mean_needs_equal_seeds():
    values = np.random.default_rng(0).random((3, 40))
    one, two = (paired_difference(scores(values), base(np.zeros(40)), np.random.default_rng(1), "x") for _ in range(2))
    assert (one.low, one.high) == (two.low, two.high)
    resamples = Resamples(np.random.default_rng(2), 100)
    first = difference(scores(values), base(np.zeros(40)), resamples, "a")
    other = difference(scores(values[:2]), base(np.zeros(40)), resamples, "b")
    assert mean_of([first, other]) is None
    joint = estimate(mean_of([first, difference(scores(values), base(np.zeros(40)), resamples, "b")]), resamples, "x")
    assert joint.value == pytest.approx(values.mean())
    assert joint.items == 80


def test_turning_over_swaps_the_ends():
    found = paired_difference(scores([[1.0, 0.0, 1.0]]), base([0.0, 0.0, 0.0]), np.random.default_rng(0), "x")
    turned = found.scaled(-100, "points")
    assert (turned.low, turned.high) == (-100 * found.high, -100 * found.low)
    assert turned.unit == "points"


def test_two_items_that_move_alike_prove_nothing():
    found = paired_difference(scores([[1.0, 1.0]]), base([0.0, 0.0]), np.random.default_rng(0), "x")
    assert (found.value, found.p) == (1.0, 0.5)
    many = paired_difference(scores(np.ones((1, 30))), base(np.zeros(30)), np.random.default_rng(0), "x")
    assert many.p < 1e-6
