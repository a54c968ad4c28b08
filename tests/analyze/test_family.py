"""The five words, the family they are corrected in, and the intervals that say the same."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_arena.analyze.estimate import Estimate, Pivot, Term
from peft_arena.analyze.family import ALPHA, Family, judge_alone
from peft_arena.analyze.holm import correct, holm


def made(value, error, df=1e9, unit="points"):
    pivot = Pivot(value, error, (Term(1.0, df),))
    return Estimate(value, unit, 3, 100, 100, pivot, pivot, (-100.0, 100.0))


def one(value, error, margin=2.0, **more):
    (found,) = judge_alone([made(value, error, **more)], margin)
    return found


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (5.0, 1.0, ("better",)),
        (-5.0, 1.0, ("worse",)),
        (0.0, 5.0, ("undecided",)),
        (0.0, 0.5, ("equivalent",)),
        (1.8, 1.0, ("no worse",)),
        (-1.0, 0.3, ("worse", "no worse")),
        (1.0, 0.3, ("better", "equivalent")),
        (-1.8, 1.0, ("undecided",)),
    ],
)
def test_each_word_by_hand(value, error, words):
    found = one(value, error)
    assert found.words == words
    assert found.word == words[0]


def test_without_a_margin_nothing_is_no_worse_unless_it_is_better():
    assert one(0.0, 0.1, None).words == ("undecided",)
    assert one(3.0, 0.1, None).words == ("better",)
    assert one(3.0, 0.1, None).has("no worse")


def test_what_cannot_be_compared_has_none_of_the_words():
    missing, none = judge_alone([None, Estimate(1.0, "points", 1, 3, 3, missing="3 items")])
    for found in (missing, none):
        assert found.words == ("not comparable",)
        assert (found.p_corrected, found.level, found.interval, found.detectable) == (None, None, None, None)


def test_swapping_the_sides_swaps_the_words():
    swap = {"better": "worse", "worse": "better", "equivalent": "equivalent", "undecided": "undecided"}
    for value in np.linspace(-6, 6, 49):
        for error in (0.2, 0.8, 1.5, 4.0):
            forth, back = judge_alone([made(value, error), made(-value, error)], 2.0)
            assert forth.turned().words == back.words
            assert forth.turned().interval == pytest.approx(back.interval)
            assert forth.turned().turned().words == forth.words
            for word, other in swap.items():
                assert forth.has(word) == back.has(other) or "undecided" in (word, other)


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 5), st.integers(1, 30)), min_size=1, max_size=12))
def test_word_interval_and_corrected_p_never_disagree(rows):
    family = Family()
    asked = [family.ask(made(value, error, df), margin=2.0) for value, error, df in rows]
    for found in asked:
        low, high = found.interval
        assert 0.5 < found.level < 1
        if found.word in ("better", "worse"):
            assert found.p_corrected < ALPHA
            assert (low > 0) if found.word == "better" else (high < 0)
        if found.word == "undecided":
            assert found.p_corrected >= ALPHA
            assert low <= 1e-9 and high >= -1e-9
        if found.word == "equivalent":
            assert low >= -2.0 - 1e-9 and high <= 2.0 + 1e-9
        if found.word == "no worse":
            assert low >= -2.0 - 1e-9


def test_holm_by_hand():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert [round(found.times, 9) for found in correct([0.01, 0.04, 0.03])] == [3.0, 1.5, 2.0]


def test_holm_does_not_depend_on_the_order():
    p = [0.02, 0.02, 0.001, 0.4, 0.02]
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        assert holm([p[place] for place in order]) == [holm(p)[place] for place in order]


def test_steps_are_a_fixed_sequence():
    found = correct([0.03, 0.01, 0.001], [0, 1, 1])
    assert [one.p for one in found] == pytest.approx([0.03, 0.03, 0.03])
    failed = correct([0.2, 0.0001, 0.0001], [0, 1, 1])
    assert [one.p for one in failed] == pytest.approx([0.2, 0.2, 0.2])
    assert [one.is_tested for one in failed] == [True, False, False]
    assert [one.is_tested for one in found] == [True, True, True]
    assert [one.times for one in found] == pytest.approx([1.0, 1.0, 2.0]), "the interval is corrected in its step"


def test_a_p_of_zero_is_corrected_like_any_other():
    assert [one.times for one in correct([0.0, 0.2, 0.0, 0.9])] == [4.0, 2.0, 3.0, 1.0]
    assert [one.times for one in correct([0.03, 0.0, 0.0], [0, 1, 1])] == [1.0, 2.0, 1.0]


def test_what_comes_after_an_undecided_primary_comparison_is_not_tested():
    family = Family()
    first = family.ask(made(0.1, 1.0), step=0)
    late = family.ask(made(50.0, 1.0), margin=2.0)
    assert first.is_tested and not late.is_tested
    assert late.words == ("undecided",)
    assert (late.level, late.interval, late.detectable) == (None, None, None)
    assert first.detectable == pytest.approx(stats.norm.isf(0.025) + stats.norm.isf(0.2))
    assert late.turned().words == ("undecided",)
    assert json.loads(json.dumps(late.summary(), allow_nan=False))["is_tested"] is False


def test_a_primary_comparison_is_tested_at_the_full_level():
    family = Family()
    first = family.ask(made(2.2, 1.0), step=0)
    others = [family.ask(made(0.1, 1.0)) for _ in range(30)]
    assert first.word == "better"
    assert first.p_corrected == pytest.approx(2 * stats.norm.sf(2.2))
    assert {one.word for one in others} == {"undecided"}
    late = Family()
    alone = [late.ask(made(2.2, 1.0)), *(late.ask(made(0.1, 1.0)) for _ in range(30))][0]
    assert alone.word == "undecided"


def test_a_family_is_closed_by_its_first_word():
    family = Family()
    found = family.ask(made(1.0, 1.0))
    assert found.word == "undecided"
    with pytest.raises(RuntimeError, match="already in use"):
        family.ask(made(1.0, 1.0))


def test_the_detectable_difference_is_found_in_four_of_five():
    family = Family()
    asked = [family.ask(made(0.0, 2.8)) for _ in range(10)]
    single = one(0.0, 2.8)
    assert single.detectable == pytest.approx((stats.norm.isf(0.025) + stats.norm.isf(0.2)) * 2.8)
    assert asked[0].detectable == pytest.approx((stats.norm.isf(0.0025) + stats.norm.isf(0.2)) * 2.8)
    rng = np.random.default_rng(0)
    size = single.detectable
    assert np.mean([one(size + 2.8 * rng.normal(), 2.8).word == "better" for _ in range(2000)]) == pytest.approx(
        0.8, abs=0.03
    )


def test_retained_is_corrected_over_arms_and_not_with_the_pairs():
    """Loss against the base is its own family of one-sided tests; the two-sided ones are all one family."""
    alone, many = Family(), Family()
    few = [alone.ask(made(0.5, 0.7), margin=2.0, against_base=True) for _ in range(2)]
    same = [many.ask(made(0.5, 0.7), margin=2.0, against_base=True) for _ in range(2)]
    for _ in range(50):
        many.ask(made(0.0, 3.0), margin=2.0)
    assert [one.p_no_worse for one in few] == [one.p_no_worse for one in same]
    assert few[0].family.size == 2 and same[0].family.size == 52


def test_the_summary_says_all_of_it():
    said = one(-1.0, 0.3).summary()
    assert said["words"] == ["worse", "no worse"]
    assert said["verdict"] == "worse" and said["about"] == "the method" and said["margin"] == 2.0
    assert said["low_corrected"] < said["high_corrected"] < 0
    assert said["detectable"] is None
    assert one(0.0, 3.0).summary()["detectable"] > 8
