"""pass@k before and after training, from records with known chances."""

import itertools

import numpy as np
import pytest

from peft_arena.analyze.study import analyze_study
from peft_arena.core.passk import pass_at_k
from peft_arena.report.passk import arm_sentence
from tests.analyze.synthetic import Truth, build_synthetic
from tests.analyze.synthetic_passk import ITEMS, SAMPLING, add_samples, chances

LABELS = ("sharpened", "widened", "better", "same", "absent")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    truths = [Truth(label, seeds=(0, 1, 2)) for label in LABELS]
    return build_synthetic(tmp_path_factory.mktemp("passk"), truths, items=40, corpus=False)


@pytest.fixture(scope="module")
def before(plain):
    return analyze_study(plain.store, plain.view, draws=800)


@pytest.fixture(scope="module")
def result(before, plain):
    return analyze_study(plain.store, add_samples(plain, chances()).view, draws=800)


def test_the_estimate_is_the_share_of_sets_with_a_right_one():
    for n, right, k in ((5, 2, 3), (6, 0, 4), (6, 6, 1), (4, 1, 4), (7, 3, 2)):
        sets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, sets)) / len(sets))


def test_the_estimate_is_unbiased_and_the_plain_one_is_not():
    chance, n, k = 0.2, 8, 4
    counts = np.random.default_rng(0).binomial(n, chance, 20_000)
    table = [pass_at_k(n, right, k) for right in range(n + 1)]
    truth = 1 - (1 - chance) ** k
    assert np.mean([table[right] for right in counts]) == pytest.approx(truth, abs=0.006)
    assert np.mean(1 - (1 - counts / n) ** k) < truth - 0.02


@pytest.mark.parametrize(("n", "right", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_what_cannot_be_estimated_is_refused(n, right, k):
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(n, right, k)


def test_values_and_differences_hold_the_truth(result):
    found = result.targets[0].passk
    assert [k for k, _ in found.base] == list(SAMPLING.k) and found.items == ITEMS
    known = chances()
    truth = {label: [np.mean(1 - (1 - known[label]) ** k) for k in SAMPLING.k] for label in known}
    for (_, level), true in zip(found.base, truth["base"], strict=True):
        assert level.low < true < level.high and level.high - level.low < 0.14
    for arm in found.arms:
        for point, true, base in zip(arm.points, truth[arm.label], truth["base"], strict=True):
            assert abs(point.tuned.value - true) < 0.03
            assert point.delta.low - 1 < 100 * (true - base) < point.delta.high + 1
            assert (point.delta.seeds, point.delta.items, point.delta.unit) == (3, ITEMS, "points")


def test_each_arm_reads_as_what_it_did(result):
    arms = {arm.label: arm for arm in result.targets[0].passk.arms}
    assert list(arms) == ["sharpened", "widened", "better", "same"]
    sharpened = arm_sentence(arms["sharpened"])
    assert sharpened.startswith("sharpened: pass@1 (+")
    assert " better and pass@16 (−" in sharpened and " worse than before: " in sharpened
    assert sharpened.endswith("a single answer is right more often, and fewer items have a right one among 16 answers.")
    widened = arm_sentence(arms["widened"])
    assert widened.startswith("widened: pass@16 (+") and " better and pass@1 (−" in widened
    assert widened.endswith("a single answer is right less often, and more items have a right one among 16 answers.")
    better = arm_sentence(arms["better"])
    assert better.startswith("better: pass@1 (+") and better.endswith(" better than before.")
    assert "same: pass@k is neither better nor worse at any k: pass@1 undecided (" in arm_sentence(arms["same"])
    assert {point.change for point in arms["same"].points} == {0}


def test_gain_and_retention_are_those_without_samples(result, before):
    for one, other in zip(before.targets[0].arms, result.targets[0].arms, strict=True):
        assert one.gain.delta.value == other.gain.delta.value and one.gain.delta.low == other.gain.delta.low
        assert one.mean.value == other.mean.value
    assert before.targets[0].label == result.targets[0].label
    assert before.targets[0].passk is None and "passk" not in before.summary()["targets"][0]


def test_a_missing_evaluation_is_a_gap(result):
    missing = [gap for gap in result.evidence.gaps if gap.kind == "missing"]
    assert [gap.who for gap in missing] == [f"absent, seed {seed}" for seed in (0, 1, 2)]
    assert {gap.what for gap in missing} == {"operator, sampled"}


def test_the_summary_has_every_number(result):
    found = result.summary()["targets"][0]["passk"]
    assert found["evaluation"]["sampling"]["samples"] == 16
    assert set(found["base"]) == {"pass@1", "pass@4", "pass@16"}
    assert found["arms"][0]["pass@4"]["delta"]["unit"] == "points"
    assert "p" not in found["base"]["pass@1"] | found["arms"][0]["pass@1"]["tuned"]
    assert found["arms"][0]["pass@1"]["p_corrected"] >= found["arms"][0]["pass@1"]["delta"]["p"]


def test_without_the_base_there_are_values_and_no_differences(tmp_path):
    made = build_synthetic(tmp_path, [Truth("same", seeds=(0,))], items=20, corpus=False)
    found = analyze_study(made.store, add_samples(made, chances(), skip_base=True).view, draws=200).targets[0].passk
    assert found.base == () and [point.delta for point in found.arms[0].points] == [None] * 3
    assert arm_sentence(found.arms[0]) == "same: what training did to pass@k is not known."
    assert found.arms[0].points[0].tuned.seeds == 1


def test_unscored_items_are_left_out_of_both(tmp_path):
    made = build_synthetic(tmp_path, [Truth("same", seeds=(0,))], items=20, corpus=False)
    found = analyze_study(made.store, add_samples(made, chances(), unscored=10).view, draws=200).targets[0].passk
    delta = found.arms[0].points[0].delta
    assert (delta.items, delta.left_out) == (ITEMS - 10, 10)
