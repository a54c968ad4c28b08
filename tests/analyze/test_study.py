"""The analysis of whole studies with known truth."""

from dataclasses import replace

import numpy as np
import pytest

from peft_arena.analyze.compare import both_ways, ranks
from peft_arena.analyze.pareto import on_front
from peft_arena.analyze.study import analyze_study
from peft_arena.analyze.view import Arm, Margin, StudyView
from peft_arena.core.errors import UserError
from peft_arena.report.headline import trade_sentence
from tests.analyze.made import pair
from tests.analyze.synthetic import RETENTION, Truth, build_synthetic

TRUTHS = [
    Truth("strong", gain=0.6, forget=-0.15, corpus=0.2),
    Truth("careful", gain=0.6, forget=-0.01, corpus=0.0),
    Truth("twin", gain=0.6, forget=-0.01, corpus=0.0),
    Truth("weak", gain=0.1, forget=0.0, corpus=0.0),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return build_synthetic(tmp_path_factory.mktemp("runs"), TRUTHS, items=150)


@pytest.fixture(scope="module")
def result(study):
    return analyze_study(study.store, study.view, draws=1000)


def arm_of(result, label, target=0):
    return next(arm for arm in result.targets[target].arms if arm.label == label)


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.label)
def test_gain_and_retention_are_recovered(result, truth):
    arm = arm_of(result, truth.label)
    assert arm.gain.delta.unit == "points"
    assert arm.gain.delta.value == pytest.approx(100 * truth.gain, abs=10)
    assert arm.mean.value == pytest.approx(100 * truth.forget, abs=4)
    assert arm.mean.seeds == 3
    assert len(arm.retention) == len(RETENTION) + 1


def test_cross_entropy_is_oriented_in_its_own_unit_and_not_in_the_mean(result):
    arm = arm_of(result, "strong")
    corpus = next(effect for effect in arm.retention if not effect.task.is_fraction)
    assert corpus.delta.unit == "nats/token"
    assert corpus.delta.value == pytest.approx(-0.2, abs=0.03)
    fractions = [effect.delta.value for effect in arm.retention if effect.task.is_fraction]
    assert arm.mean.value == pytest.approx(np.mean(fractions))


def test_share_kept_is_above_chance(result):
    for effect in arm_of(result, "strong").retention:
        if effect.kept is not None:
            expected = (effect.tuned - effect.task.chance) / (effect.base - effect.task.chance)
            assert effect.kept.value == pytest.approx(expected)
    assert sum(effect.kept is not None for effect in arm_of(result, "strong").retention) == len(RETENTION)


def test_equal_arms_are_undecided_and_a_true_difference_is_found(result):
    table = both_ways(result.targets[0].comparisons)
    assert table["careful", "twin"].gain.word == "undecided"
    assert table["careful", "twin"].gain.detectable > 2
    assert table["careful", "twin"].retention.word == "undecided"
    assert table["careful", "strong"].retention.word == "better"
    assert table["strong", "weak"].gain.word == "better"
    assert table["weak", "strong"].gain.word == "worse"
    assert result.targets[0].ranks["gain"]["weak"] == (4, 4)
    assert result.targets[0].ranks["gain"]["careful"].last == 3


def test_trade_offs_and_dominance_need_a_gain_that_is_no_worse(study, result):
    assert result.targets[0].trade_offs == (), "150 items do not show a gain that is no worse within two points"
    target = analyze_study(study.store, replace(study.view, margin=Margin(target=25.0)), draws=200).targets[0]
    assert ("careful", "strong") in {(pair.keeps, pair.forgets) for pair in target.trade_offs}
    assert all(pair.forgets == "strong" for pair in target.trade_offs if pair.keeps in ("careful", "twin"))
    found = next(pair for pair in target.trade_offs if pair.keeps == "careful")
    said = trade_sentence(found.keeps, found.forgets, found.retention, found.gain)
    assert said.startswith("careful is better in mean retention than strong (+")
    assert "is no worse in gain within 25 (" in said
    for standing in (*target.pareto.values(), *result.targets[0].pareto.values()):
        assert 0 <= standing.probability <= 1
    assert "careful" in target.pareto["strong"].dominated_by
    assert result.targets[0].pareto["strong"].dominated_by == ()
    assert target.pareto["careful"].dominated_by == ()


def test_missing_failed_and_refused_runs_are_named_and_give_no_numbers(tmp_path):
    truths = [
        Truth("half", failed={1: "out of memory"}, untrained=(2,)),
        Truth("partly", skipped={"facts": (0,)}),
        Truth("never", skipped={"facts": (0, 1, 2)}),
        Truth("none", untrained=(0, 1, 2)),
    ]
    study = build_synthetic(tmp_path, truths, items=30, unscored=0.1)
    result = analyze_study(study.store, study.view, draws=200)
    gaps = {(gap.who, gap.kind): gap for gap in result.evidence.gaps}
    assert gaps["half, seed 1", "failed"].reason == "out of memory"
    assert gaps["half, seed 2", "missing"].reason == "not started"
    assert any(gap.kind == "unscored" for gap in result.evidence.gaps)
    assert arm_of(result, "half").gain.delta.seeds == 1
    assert arm_of(result, "half").gain.delta.left_out > 0
    assert arm_of(result, "partly").mean.seeds == 2
    assert arm_of(result, "never").mean is None
    assert "facts" in arm_of(result, "never").mean_missing
    assert arm_of(result, "none").gain.delta is None
    assert arm_of(result, "none").gain.base is not None
    summary = result.summary()["targets"][0]["arms"]
    assert summary[0]["gain"]["delta"]["covers"] == "items, and the seed spread of other arms"
    assert [arm["seeds_trained"] for arm in summary] == [1, 3, 3, 0]


def test_a_failed_evaluation_is_told_from_the_stage_with_its_id(tmp_path):
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,), skipped={"facts": (0,)})], items=10)
    spec = next(spec for spec in study.view.retention if spec.task.name == "facts")
    run = study.store.run(study.view.arms[0].runs[0])
    for other in (f"evaluate facts {spec.id} at step 20", f"evaluate facts {spec.id} at step 2000", "evaluate facts"):
        run.event("failed", stage=other, reason="not this one")
    run.event("failed", stage=f"evaluate facts {spec.id} at step 200", reason="the engine died")
    run.event("finished", stage=f"evaluate facts {spec.id} at step 20")
    gaps = analyze_study(study.store, study.view, draws=50).evidence.gaps
    assert [(gap.what, gap.kind, gap.reason) for gap in gaps] == [("facts", "failed", "the engine died")]


def test_a_damaged_record_is_a_gap(tmp_path):
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,))], items=10)
    run = study.store.run(study.view.arms[0].runs[0])
    next((run.path / "records").glob("*/eval-facts-*.json")).write_text("{")
    result = analyze_study(study.store, study.view, draws=50)
    assert [gap.kind for gap in result.evidence.gaps] == ["damaged"]
    assert arm_of(result, "one").mean is None


def test_without_a_base_nothing_is_compared_with_it(tmp_path):
    study = build_synthetic(tmp_path, [Truth("one"), Truth("two")], items=20, with_base=False)
    target = analyze_study(study.store, study.view, draws=100).targets[0]
    assert [arm.gain.delta for arm in target.arms] == [None, None]
    assert "base model was not evaluated" in target.arms[0].mean_missing
    assert target.comparisons[0].gain.estimate is not None


def test_ranks_are_ranges():
    pairs = [pair("a", "b", 1.0, 1.0), pair("a", "c", 5.0, 1.0), pair("b", "c", 1.0, 1.0)]
    found = ranks(["a", "b", "c"], pairs, "gain")
    assert {label: str(rank) for label, rank in found.items()} == {"a": "1–2", "b": "1–3", "c": "2–3"}


def test_the_front_by_hand():
    gain, kept = np.array([3.0, 2.0, 1.0, 1.0, 3.0]), np.array([1.0, 2.0, 1.0, 3.0, 1.0])
    assert on_front(gain, kept).tolist() == [True, True, False, True, True]


def test_views_refuse_what_makes_no_sense(study):
    arm = study.view.arms[0]
    with pytest.raises(UserError, match="has no runs"):
        Arm("x", (), arm.target)
    with pytest.raises(UserError, match="more than one run with seed 0"):
        Arm("x", (arm.runs[0], arm.runs[0]), arm.target)
    with pytest.raises(UserError, match="more than one arm is called 'strong'"):
        StudyView("s", study.view.base, (arm, arm), study.view.retention)
    with pytest.raises(UserError, match="is a trained run"):
        StudyView("s", arm.runs[0], (arm,), study.view.retention)


def test_items_of_one_passage_are_one_unit(tmp_path):
    truths = [Truth("a", gain=0.4, seeds=(0, 1)), Truth("b", gain=0.2, seeds=(0, 1))]
    found = build_synthetic(tmp_path, truths, items=300, passage=10, corpus=False)
    arm = analyze_study(found.store, found.view, draws=50).targets[0].arms[0]
    assert (arm.gain.delta.items, arm.gain.delta.units) == (300, 30)
    assert (arm.mean.items, arm.mean.units) == (300 * len(RETENTION), 30 * len(RETENTION))
    alone = build_synthetic(tmp_path / "alone", truths, items=300, corpus=False)
    apart = analyze_study(alone.store, alone.view, draws=50).targets[0].arms[0]
    assert arm.gain.delta.stderr > 1.3 * apart.gain.delta.stderr


def test_an_a_a_pair_shows_the_spread_between_trainings(tmp_path):
    """The same arm under two labels, with other seeds: one arm, as far as the spread goes."""
    truths = [Truth("a", gain=0.5, seeds=(0,), setting="x"), Truth("twin", gain=0.5, seeds=(1,), setting="x")]
    truths += [Truth("b", gain=0.5, seeds=(0,)), Truth("c", gain=0.5, seeds=(0,))]
    found = build_synthetic(tmp_path, truths, items=100, corpus=False)
    target = analyze_study(found.store, found.view, draws=50).targets[0]
    covers = {arm.label: arm.gain.delta.covers for arm in target.arms}
    assert set(covers.values()) == {"items, and the seed spread of other arms"}
    (pair,) = [one for one in target.comparisons if (one.left, one.right) == ("b", "c")]
    assert not pair.gain.estimate.about_runs
    (twins,) = [one for one in target.comparisons if (one.left, one.right) == ("a", "twin")]
    assert twins.gain.word == "not comparable", "no seed in common"
    values = [np.mean([item.value for item in _target_items(found, place)]) for place in (0, 1)]
    spread = 100 * np.std(values, ddof=1)
    alone = build_synthetic(tmp_path / "alone", truths[:1], items=100, corpus=False)
    run = analyze_study(alone.store, alone.view, draws=50).targets[0].arms[0].gain.delta
    assert target.arms[0].gain.delta.stderr == pytest.approx(np.hypot(run.stderr, spread), rel=0.05)


def _target_items(found, place):
    arm = found.view.arms[place]
    directory = found.store.run(arm.runs[0])
    return directory.evaluation(directory.point(200), arm.target).items
