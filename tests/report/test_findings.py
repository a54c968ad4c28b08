"""The sentences at the top of the page: nothing is called significant that was not tested and found so."""

import pytest

from peft_arena.analyze.compare import Comparison, Versus, standing
from peft_arena.analyze.paired import Estimate
from peft_arena.analyze.study import analyze_study
from peft_arena.report.headline import headline
from tests.analyze.synthetic import Truth, build_synthetic


def findings(tmp_path, truths, items=100):
    study = build_synthetic(tmp_path, truths, items=items, corpus=False)
    return headline(analyze_study(study.store, study.view, draws=300))


def test_an_arm_without_a_common_seed_is_not_comparable_rather_than_worse(tmp_path):
    truths = [Truth("best", gain=0.7, forget=-0.02), Truth("apart", gain=0.1, forget=-0.3, seeds=(7, 8))]
    gain, kept, *_ = findings(tmp_path, truths)
    assert "significantly more" not in gain
    assert gain.startswith("best has the highest gain estimate on operator")
    assert gain.endswith("; not comparable with best: apart.")
    assert "keeps" not in kept
    assert kept.endswith("; not comparable with best: apart.")


def test_significantly_more_is_said_of_the_worse_arms_only(tmp_path):
    truths = [
        Truth("best", gain=0.7, forget=-0.02),
        Truth("poor", gain=0.1, forget=-0.3),
        Truth("apart", gain=0.1, forget=-0.3, seeds=(7, 8)),
    ]
    gain, kept, *_ = findings(tmp_path, truths)
    assert ", significantly more than poor; not comparable with best: apart." in gain
    assert "gains most" not in gain
    assert "best keeps significantly more than poor" in kept
    assert "keeps most" not in kept
    assert kept.endswith("; not comparable with best: apart.")


def test_a_tied_a_worse_and_an_incomparable_arm_are_told_apart(tmp_path):
    truths = [
        Truth("one", gain=0.6),
        Truth("two", gain=0.6),
        Truth("poor", gain=0.1),
        Truth("apart", gain=0.1, seeds=(7, 8)),
    ]
    gain = findings(tmp_path, truths)[0]
    assert "tied with" in gain
    assert "1 other arm gains significantly less than" in gain
    assert gain.endswith(": apart.")


def test_with_all_pairs_compared_the_words_are_short(tmp_path):
    gain, kept, *_ = findings(tmp_path, [Truth("best", gain=0.7, forget=-0.02), Truth("poor", gain=0.1, forget=-0.3)])
    assert gain.endswith(", significantly more than the other arm.")
    assert "best gains most" in gain
    assert "best keeps most" in kept
    assert "comparable" not in gain + kept


def test_forgets_most_is_said_only_where_it_was_found(tmp_path):
    alike = [Truth(name, forget=-0.3) for name in "abc"]
    assert "the lowest estimate is that of" in findings(tmp_path / "alike", alike)[1]
    one = findings(tmp_path / "one", [Truth("a", forget=-0.3)])[1]
    assert one.startswith("a forgets significantly: mean retention changes by")


def pair(left, right, value, p):
    found = Versus(None if p is None else Estimate(value, value - 1, value + 1, 0.5, p, "points", 3, 10), p)
    return Comparison(left, right, found, found)


@pytest.mark.parametrize(("p", "alike"), [(0.5, True), (0.01, False), (None, False)])
def test_all_are_tied_only_if_every_pair_is(p, alike):
    pairs = [pair("a", "b", 1.0, 0.5), pair("a", "c", 1.0, 0.5), pair("b", "c", 1.0, p)]
    found = standing({"a": 3.0, "b": 2.0, "c": 1.0}, pairs, "gain")
    assert (found.group, found.worse, found.unclear, found.alike) == (["a", "b", "c"], [], [], alike)


def test_an_arm_that_is_better_on_the_common_seeds_is_not_called_worse():
    found = standing({"a": 3.0, "b": 2.0}, [pair("a", "b", -1.0, 0.01)], "gain")
    assert (found.tied, found.worse, found.unclear) == ([], [], ["b"])
