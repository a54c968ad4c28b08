"""One effect over several targets."""

import numpy as np
import pytest
from scipy import stats

from peft_arena.analyze.estimate import Estimate, Pivot, Term, estimate
from peft_arena.analyze.paired import difference
from peft_arena.analyze.random_effects import covariance, over_independent, over_shared_items, paule_mandel
from tests.analyze.test_paired import base, scores


def made(value, error):
    pivot = Pivot(value, error, (Term(1.0, 100.0),))
    return Estimate(value, "points", 3, 100, 100, pivot, pivot, (-100.0, 100.0))


def test_paule_mandel_solves_its_equation():
    values, variances = np.array([1.0, 4.0, 2.0, 9.0]), np.array([1.0, 2.0, 1.0, 4.0])
    tau2 = paule_mandel(values, variances)
    weights = 1 / (variances + tau2)
    mean = (weights * values).sum() / weights.sum()
    assert tau2 > 0
    assert (weights * (values - mean) ** 2).sum() == pytest.approx(3)
    assert paule_mandel(np.array([1.0, 1.1]), np.array([4.0, 4.0])) == 0.0


def test_mean_interval_and_prediction_by_hand():
    found = over_independent([made(10.0, 1.0), made(14.0, 1.0), made(12.0, 1.0)])
    tau2 = 4.0 - 1.0  # equal errors: the variance of the effects less theirs
    error = np.sqrt((tau2 + 1) / 3)
    assert found.tau == pytest.approx(np.sqrt(tau2))
    assert found.estimate.value == pytest.approx(12.0)
    assert found.estimate.high == pytest.approx(12 + stats.t.isf(0.025, 2) * error)
    half = stats.t.isf(0.025, 1) * np.sqrt(tau2 + error**2)
    assert found.prediction == pytest.approx((12 - half, 12 + half))
    assert found.shrunk == pytest.approx((12 - 0.75 * 2, 12 + 0.75 * 2, 12.0))
    assert found.estimate.covers == "targets" and not found.estimate.about_runs


def test_two_targets_have_a_mean_and_no_prediction_and_one_has_neither():
    found = over_independent([made(10.0, 1.0), made(14.0, 1.0)])
    assert found.prediction is None
    assert found.estimate.low < 0, "two targets say little"
    assert over_independent([made(1.0, 1.0)]) is None
    assert over_independent([made(1.0, 1.0), Estimate(1.0, "points", 1, 3, 3, missing="few")]) is None


def test_the_mean_over_targets_is_covered():
    rng = np.random.default_rng(0)
    inside = {4: 0, 8: 0}
    further = 0
    for count in inside:
        for _ in range(500):
            truths = 5 + 2 * rng.normal(size=count)
            errors = rng.uniform(0.5, 2.5, count)
            found = over_independent([made(t + e * rng.normal(), e) for t, e in zip(truths, errors, strict=True)])
            inside[count] += found.estimate.low <= 5 <= found.estimate.high
            further += count == 8 and found.prediction[0] <= 5 + 2 * rng.normal() <= found.prediction[1]
    assert all(0.92 <= hits / 500 <= 0.99 for hits in inside.values())
    assert further / 500 >= 0.93


def test_errors_that_targets_share_do_not_average_out():
    """Retention is of the same items after every training: what they share is left in the mean."""
    rng = np.random.default_rng(1)
    ends = {True: [], False: []}
    for shared in ends:
        common = rng.normal(size=300)
        contrasts = []
        for target in range(6):
            own = common if shared else rng.normal(size=300)
            values = own + 0.1 * rng.normal(size=(2, 300))
            contrasts.append(difference(scores(values), base(np.zeros(300)), "same" if shared else f"t{target}"))
        found = [estimate(one, "points") for one in contrasts]
        ends[shared] = over_shared_items(found, contrasts).estimate
        if shared:
            assert covariance(contrasts[0], contrasts[1]) == pytest.approx(1 / 300, rel=0.25)
            assert ends[shared].stderr == pytest.approx(found[0].stderr, rel=0.2)
        else:
            assert covariance(contrasts[0], contrasts[1]) == 0.0
            assert ends[shared].stderr == pytest.approx(found[0].stderr / np.sqrt(6), rel=0.5)
