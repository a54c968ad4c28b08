"""Over the targets of a study."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peft_arena.analyze.family import Family
from peft_arena.analyze.over_targets import CORRELATION, OverTargets, TargetEffects, over_targets
from peft_arena.analyze.random_effects import over_independent
from peft_arena.analyze.resamples import Resamples
from peft_arena.analyze.study import StudyResult, analyze_study
from peft_arena.cost.pscp import DEFAULT, Operations, PscpChoice, pscp
from peft_arena.report.over_targets import over_targets_frame, over_targets_section, over_targets_table
from peft_arena.tasks.registry import make_task
from tests.analyze.synthetic import Truth, build_synthetic
from tests.analyze.synthetic_pscp import with_flops

LABELS = ("lora", "oft", "lost")
CHOICE = PscpChoice(constants=DEFAULT, operations=Operations.EXTRA)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResult, ...]:
    """Three studies of one target; the last arm was not evaluated in the third."""
    found = []
    for number in range(3):
        labels = LABELS if number < 2 else LABELS[:2]
        truths = [Truth(label, gain=0.1 * (number + 3 * place), forget=-0.05) for place, label in enumerate(labels)]
        made = build_synthetic(tmp_path_factory.mktemp("runs"), truths, items=60, seed=number)
        study = with_flops(made, dict.fromkeys(labels, 1e9), CHOICE)
        found.append(analyze_study(study.store, study.view, draws=200))
    return tuple(found)


@pytest.fixture(scope="module")
def targets(results) -> tuple[TargetEffects, ...]:
    first = [result.targets[0] for result in results]
    return tuple(
        TargetEffects(f"target {number}", one.task, one.arms, one.comparisons, one.costs)
        for number, one in enumerate(first)
    )


def put_together(results, targets, choice=CHOICE) -> OverTargets | None:
    evidence = replace(results[0].evidence, view=replace(results[0].view, pscp=choice))
    return over_targets(evidence, targets, Family(), Resamples(0, 300))


@pytest.fixture(scope="module")
def over(results, targets) -> OverTargets:
    found = put_together(results, targets)
    assert found is not None
    return found


def effects(targets, label: str) -> list:
    return [next(arm for arm in target.arms if arm.label == label).gain for target in targets]


def test_scores_are_plain_means_and_gains_random_effects(targets, over):
    for arm in over.arms[:2]:
        gains = effects(targets, arm.label)
        assert arm.score == pytest.approx(100 * sum(gain.tuned for gain in gains) / 3)
        expected = over_independent([gain.delta for gain in gains])
        assert arm.gain.estimate.value == pytest.approx(expected.estimate.value)
        assert (arm.gain.estimate.low, arm.gain.prediction) == (expected.estimate.low, expected.prediction)
        assert arm.gain.prediction[0] < arm.gain.estimate.low < arm.gain.estimate.value
        assert not arm.gain.estimate.about_runs
    assert over.base == pytest.approx(100 * sum(gain.base for gain in effects(targets, "lora")) / 3)


def test_retention_is_judged_against_the_pretrained_model(targets, over):
    means = [next(arm for arm in target.arms if arm.label == "lora").mean for target in targets]
    found = over.arms[0]
    assert found.retention.estimate.value == pytest.approx(sum(mean.value for mean in means) / 3)
    assert found.judged.estimate is found.retention.estimate
    assert found.judged.margin == 2.0


def test_arms_are_compared_target_by_target(targets, over):
    (pair,) = over.comparisons
    assert (pair.left, pair.right) == ("lora", "oft")
    each = [next(one for one in target.comparisons if (one.left, one.right) == ("lora", "oft")) for target in targets]
    expected = over_independent([one.gain.estimate for one in each])
    assert pair.gain.estimate.value == pytest.approx(expected.estimate.value)
    assert pair.gain.estimate.value < 0
    assert [str(arm.rank) for arm in over.arms[:2]] == ["2", "1"]
    assert "lora" in over_targets_section(over)


def test_an_arm_that_lacks_a_target_has_no_mean(over):
    lost = over.arms[2]
    assert (lost.label, lost.score, lost.gain, lost.band) == ("lost", None, None, None)
    assert lost.missing == "nothing on target 2"
    assert lost.costs["trained_parameters"] is None


def test_scores_in_other_units_are_not_averaged(results, targets):
    task = replace(targets[1].task, unit="nats/token", better="lower")
    found = put_together(results, [targets[0], targets[1]._replace(task=task)], None)
    assert {arm.missing for arm in found.arms} == {"no fraction or correlation that is better when higher: target 1"}


def test_a_correlation_counts_times_100(results, targets):
    assert make_task("bench-stsb", {"source": "miniature"}).card.metrics[0].unit == CORRELATION
    task = replace(targets[1].task, unit=CORRELATION)
    arms = tuple(
        replace(
            arm,
            gain=replace(
                arm.gain,
                task=task,
                delta=arm.gain.delta.times(0.01, CORRELATION),
                contrast=arm.gain.contrast.times(0.01),
            ),
        )
        for arm in targets[1].arms
    )
    turned = tuple(
        replace(one, gain=replace(one.gain, estimate=one.gain.estimate.times(0.01, CORRELATION)))
        for one in targets[1].comparisons
    )
    plain = put_together(results, targets[:2], None)
    found = put_together(results, [targets[0], targets[1]._replace(task=task, arms=arms, comparisons=turned)], None)
    assert found.base == pytest.approx(plain.base)
    for mine, other in zip(found.arms, plain.arms, strict=True):
        assert mine.score == pytest.approx(other.score) and mine.missing == ""
        assert mine.gain.estimate.value == pytest.approx(other.gain.estimate.value)
        assert mine.gain.estimate.stderr == pytest.approx(other.gain.estimate.stderr)
        assert mine.rank == other.rank
    for mine, other in zip(found.comparisons, plain.comparisons, strict=True):
        assert mine.gain.estimate.value == pytest.approx(other.gain.estimate.value)


def test_pscp_is_that_of_the_mean_score_at_the_mean_costs(results, targets, over):
    arm = over.arms[0]
    costs = [target.costs[arm.label] for target in targets]
    means = [sum(cost[name].value for cost in costs) / 3 for name in ("trained_parameters", "extra_forward_flops_512")]
    memory = sum(cost["peak_memory_training"].value for cost in costs) / 3
    assert arm.band.score == pytest.approx(pscp(arm.score, *means, memory))
    assert put_together(results, targets, None).arms[0].band is None


def test_one_target_has_no_means_over_targets(results, targets):
    assert put_together(results, targets[:1]) is None


def test_the_table_and_the_file_show_what_is_missing(over):
    page = over_targets_table(over)
    assert page.index(">oft<") < page.index(">lora<") < page.index(">lost<")
    assert "nothing on target 2" in page
    costs = {"lora": {**over.arms[0].costs, "extra_forward_flops_512": -1.0, "peak_memory_training": None}}
    arms = tuple(replace(arm, costs=costs.get(arm.label, arm.costs), band=None) for arm in over.arms)
    page = over_targets_table(replace(over, arms=arms))
    assert "(M_f, extra): negative; peak training memory (M_m): not on every target" in page
    frame = over_targets_frame(over)
    assert frame.filter(frame["arm"] == "lost")["gain_value"].to_list() == [None]
    assert frame["missing"].to_list() == [None, None, "nothing on target 2"]
