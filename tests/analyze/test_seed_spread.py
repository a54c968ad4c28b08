"""The spread between trainings, pooled over arms."""

import numpy as np
import pytest

from peft_arena.analyze.seed_spread import PRIOR, pooled, wild_arms


def runs(values):
    return {f"arm {place}": dict(enumerate(map(float, row))) for place, row in enumerate(values)}


def total(spreads):
    return sum(one.variance for one in spreads)


def test_runs_that_end_alike_say_nothing_of_how_far_they_may_lie_apart():
    assert pooled(runs([[1.0, 1.0], [0.3, 0.3]])).run == ()
    assert pooled(runs([[1.0, 1.0, 1.0]])).of_run("another") == ()


def test_the_spread_of_a_run_and_of_a_difference_are_those_of_the_analysis_of_variance():
    rng = np.random.default_rng(0)
    values = 50 + 3 * rng.normal(size=(5, 1)) + 2 * rng.normal(size=(1, 4)) + rng.normal(size=(5, 4))
    found = pooled(runs(values))
    within = values - values.mean(axis=1, keepdims=True)
    rest = within - within.mean(axis=0, keepdims=True)
    assert total(found.run) == pytest.approx((within**2).sum() / (5 * 3))
    assert found.difference.variance == pytest.approx(2 * (rest**2).sum() / (4 * 3))
    assert found.difference.df == 12


def test_seeds_that_move_all_arms_together_count_once():
    rng = np.random.default_rng(1)
    shared = 5 * rng.normal(size=(1, 4)) + 0.01 * rng.normal(size=(8, 4))
    apart = 5 * rng.normal(size=(8, 4))
    together, own = pooled(runs(shared)).run
    assert (together.df, own.df) == (3, 21) and own.variance < 0.001 * together.variance
    assert [one.df for one in pooled(runs(apart)).run] == [24]
    assert pooled(runs(shared)).difference.variance < 0.01 * pooled(runs(apart)).difference.variance


def test_arms_with_one_seed_take_the_spread_of_the_others_and_without_any_nothing_is_known():
    values = runs([[1.0, 2.0, 4.0], [2.0, 2.5, 4.5]])
    lonely = {**values, "one": {0: 9.0}}
    assert pooled(lonely).run == pooled(values).run
    assert pooled(lonely).of_run("one") == pooled(values).run
    assert pooled({"one": {0: 9.0}}).of_run("one") == ()
    assert pooled({}).of_difference("a", "b") == ()


def test_a_number_of_times_the_quantity_has_its_square_of_the_variance():
    found = pooled(runs([[1.0, 2.0, 4.0], [2.0, 2.5, 4.5]]))
    assert found.of_run("arm 0", 100.0)[0].variance == pytest.approx(1e4 * found.run[0].variance)


def test_arms_that_are_not_alike_have_spreads_of_their_own_moderated_by_the_pool():
    values = np.array([[0, 3, 6], [0, 8, 4], [0, 0.1, 0.2], [0.3, 0.1, 0], [7, 3.5, 0], [0, 0.2, 0.1]])
    assert wild_arms(runs(values)) == ()
    found = pooled(runs(values))
    (some,), (other,) = found.of_run("arm 0"), found.of_run("arm 2")
    own = float(np.var(values[0], ddof=1))
    assert some.variance == pytest.approx((PRIOR * total(found.run) + 2 * own) / (PRIOR + 2))
    assert some.df == PRIOR + 2
    assert other.variance < some.variance
    assert found.of_difference("arm 0", "arm 2") == (some, other)


def test_an_arm_that_is_named_as_wilder_has_its_own_spread_and_the_others_are_without_it():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(6, 3)) * np.array([[40.0], [0.5], [0.5], [0.5], [0.5], [0.5]])
    assert [one.label for one in wild_arms(runs(values))] == ["arm 0"]
    found = pooled(runs(values))
    assert found.of_run("arm 0")[0] == pytest.approx((np.var(values[0], ddof=1), 2))
    assert total(found.run) == pytest.approx(np.mean(np.var(values[1:], axis=1, ddof=1)))


def test_of_two_arms_the_difference_is_that_of_the_pairs_by_seed():
    values = np.array([[1.0, 5.0, 9.0], [1.1, 5.2, 9.0]])
    found = pooled(runs(values))
    (between,) = found.of_difference("arm 0", "arm 1")
    assert between.variance == pytest.approx(np.var(values[0] - values[1], ddof=1))
    assert between.df == 2


def test_missing_runs_are_left_out():
    values = runs([[1.0, 2.0, 4.0], [2.0, 2.5, 4.5], [0.0, 1.0, 3.0]])
    del values["arm 1"][2]
    found = pooled(values)
    assert total(found.run) > 0 and found.difference.df == 3


def test_a_much_wilder_arm_is_named_and_equal_ones_are_not():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(5, 4))
    values[2] *= 30
    (found,) = wild_arms(runs(values))
    assert found.label == "arm 2"
    assert found.sd > 10 * found.others
    named = sum(bool(wild_arms(runs(rng.normal(size=(5, 4))))) for _ in range(300))
    assert named / 300 < 0.09
