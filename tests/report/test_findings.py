"""The sentences at the top of the page: no word that the comparisons do not carry."""

import pytest

from peft_arena.analyze.compare import standing
from peft_arena.analyze.study import analyze_study
from peft_arena.report.headline import caveats, headline
from peft_arena.report.words import ends_text
from tests.analyze.made import pair
from tests.analyze.synthetic import Truth, build_synthetic


def findings(tmp_path, truths, items=100, **more):
    study = build_synthetic(tmp_path, truths, items=items, corpus=False, **more)
    result = analyze_study(study.store, study.view, draws=300)
    return headline(result), caveats(result)


def test_an_arm_without_a_common_seed_is_not_comparable_rather_than_worse(tmp_path):
    truths = [Truth("best", gain=0.7, forget=-0.02), Truth("apart", gain=0.1, forget=-0.3, seeds=(7, 8, 9))]
    said, _ = findings(tmp_path, truths)
    assert said[0].startswith("Which arm is best in gain on operator cannot be said: no two arms have a seed and")
    assert not any("worse than the highest" in text for text in said)


def test_worse_is_said_of_the_worse_arms_only(tmp_path):
    truths = [
        Truth("best", gain=0.7, forget=-0.02),
        Truth("poor", gain=0.1, forget=-0.3),
        Truth("apart", gain=0.1, forget=-0.3, seeds=(7, 8, 9)),
    ]
    said, _ = findings(tmp_path, truths)
    assert said[0].endswith("; worse than the highest: poor; not comparable with the highest: apart.")
    kept = next(text for text in said if text.startswith("Best in mean retention"))
    assert kept.startswith("Best in mean retention: best (") and "worse than the highest: poor" in kept


def test_several_best_arms_are_named_together_in_the_order_of_the_study(tmp_path):
    truths = [Truth("poor", gain=0.1), Truth("two", gain=0.6), Truth("one", gain=0.6)]
    gain = findings(tmp_path, truths)[0][0]
    assert gain.startswith("Best in gain on operator: one of two and one (")
    assert "would be found" in gain
    assert gain.endswith("; worse than the highest: poor.")
    turned = findings(tmp_path / "turned", truths[::-1])[0][0]
    assert turned.startswith("Best in gain on operator: one of one and two (")


def test_arms_that_cannot_be_told_apart_are_undecided_with_what_would_be_found(tmp_path):
    gain = findings(tmp_path, [Truth(name, gain=0.4) for name in "abc"])[0][0]
    assert gain.startswith("a, b and c are undecided against each other in gain on operator (+")
    assert "would be found" in gain


def test_arms_of_which_some_are_no_worse_are_not_called_undecided(tmp_path):
    from dataclasses import replace

    from peft_arena.analyze.view import Margin

    study = build_synthetic(tmp_path, [Truth(name, gain=0.4) for name in "abcd"], items=400, corpus=False)
    result = analyze_study(study.store, replace(study.view, margin=Margin(9.0, 9.0)), draws=50)
    words = {one.gain.word for one in result.targets[0].comparisons}
    assert words & {"no worse", "equivalent"}
    assert not {"better", "worse"} & words
    assert "are undecided against each other" not in headline(result)[0]
    assert headline(result)[0].startswith(("None of a, b, c and d is better", "a, b, c and d are equivalent"))


def test_one_seed_is_one_run(tmp_path):
    truths = [Truth("best", gain=0.7, forget=-0.3, seeds=(0,)), Truth("poor", gain=0.1, forget=0.0, seeds=(0,))]
    said, notes = findings(tmp_path, truths, items=400)
    assert said[0].startswith("Best in gain on operator: this run of best (+")
    assert said[1].startswith("In these runs, 1 of 2 arms forget")
    assert all("run" in text for text in said if "Of the arms" not in text), said
    assert any(text.startswith("One seed is one run") for text in notes)


def test_a_declared_spread_lets_one_seed_speak_of_the_method(tmp_path):
    from dataclasses import replace

    from peft_arena.analyze.view import SeedSd

    study = build_synthetic(
        tmp_path, [Truth("best", gain=0.7, seeds=(0,)), Truth("poor", seeds=(0,), gain=0.1)], corpus=False
    )
    view = replace(study.view, seed_sd=SeedSd(2.0, 1.0, runs=12, source="results/aa.json"))
    result = analyze_study(study.store, view, draws=100)
    assert headline(result)[0].startswith("Best in gain on operator: best (+")
    assert any(
        "as the study declares it (results/aa.json), measured on 12 runs: standard deviation 2 on the" in text
        for text in caveats(result)
    )
    plain = analyze_study(study.store, study.view, draws=100).targets[0].arms[0].gain.delta
    told = result.targets[0].arms[0].gain.delta
    assert told.high - told.low > plain.high - plain.low
    assert (plain.about_runs, told.about_runs) == (True, False)


def test_a_second_seed_of_one_arm_lets_the_others_speak_of_the_method(tmp_path):
    truths = [Truth("best", gain=0.7, seeds=(0, 1, 2, 3)), Truth("poor", gain=0.1, seeds=(0,))]
    study = build_synthetic(tmp_path, truths, corpus=False)
    result = analyze_study(study.store, study.view, draws=100)
    arms = result.targets[0].arms
    assert any(
        "poor on operator: one seed; for the gain" in text and "(best, 4 seeds)" in text for text in caveats(result)
    )
    assert arms[1].gain.delta.covers == "items, and the seed spread of other arms"
    assert not arms[1].gain.delta.about_runs


def test_an_arm_whose_trainings_differ_much_more_is_named(tmp_path):
    truths = [Truth("wild", gain=0.5, spread=0.25, seeds=tuple(range(5)))]
    truths += [Truth(name, gain=0.5, seeds=tuple(range(5))) for name in ("a", "b", "c", "d")]
    notes = findings(tmp_path, truths, items=300)[1]
    assert any(text.startswith("wild on operator: its trainings lie further apart in the gain") for text in notes)


def test_unscored_answers_are_said_and_bound_the_interval(tmp_path):
    said, notes = findings(tmp_path, [Truth("a"), Truth("b")], unscored=0.08)
    assert any(text.startswith("Answers on operator that could not be scored, of either side: a ") for text in notes)
    assert said


def test_a_single_arm_is_said_to_be_what_it_is_against_the_pretrained_model(tmp_path):
    said, _ = findings(tmp_path, [Truth("a", forget=-0.3)])
    assert said[0].startswith("a is better than the pretrained model on operator: +")
    assert said[1].startswith("a is worse than the pretrained model in mean retention: −")
    nothing, _ = findings(tmp_path / "nothing", [Truth("a", gain=0.0, forget=0.0)])
    assert nothing[0].startswith("a is undecided against the pretrained model on operator: ")
    assert nothing[0].endswith("would be found.")


@pytest.mark.parametrize(("error", "alike"), [(1.0, True), (0.2, False), (None, False)])
def test_the_best_are_alike_only_if_no_one_of_them_is_better(error, alike):
    pairs = [pair("a", "b", 1.0, 1.0), pair("a", "c", 1.0, 1.0), pair("b", "c", 1.0, error)]
    found = standing({"a": 3.0, "b": 2.0, "c": 1.0}, pairs, "gain")
    assert (found.best, found.worse, found.unclear, found.alike) == (["a", "b", "c"], [], [], alike)


def test_an_interval_that_excludes_zero_is_seen_to():
    assert ends_text((-12.31, -0.02), "points") == "[−12.31, −0.02]"
    assert ends_text((-12.31, 0.02), "points") == "[−12.3, 0.0]"
    assert ends_text((0.0, 4.0), "points") == "[0.0, +4.0]"


def test_scores_that_are_the_same_but_for_rounding_are_both_the_highest():
    found = standing(
        {"a": 0.1 + 0.2, "b": 0.3, "c": 0.2}, [pair(*labels, 0.0, 1.0) for labels in ("ab", "ac", "bc")], "gain"
    )
    assert found.highest == ["a", "b"]


def test_an_arm_that_is_better_on_the_common_seeds_is_not_called_worse():
    found = standing({"a": 3.0, "b": 2.0}, [pair("a", "b", -5.0, 1.0)], "gain")
    assert (found.best, found.worse, found.unclear) == (["a"], [], ["b"])


def test_equal_highest_arms_have_no_order():
    values = {"b": 3.0, "a": 3.0, "c": 1.0}
    pairs = [pair("b", "a", 0.0, 1.0), pair("b", "c", 5.0, 1.0), pair("a", "c", 1.0, 1.0)]
    found = standing(values, pairs, "gain")
    assert found.highest == ["b", "a"] and found.best == ["b", "a"] and found.worse == ["c"]
