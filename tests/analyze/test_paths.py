"""Choosing a point of a path, and judging it on other items, with known truth."""

import json
from dataclasses import replace

import numpy as np
import pytest

from peft_arena.analyze.path_claims import Claim
from peft_arena.analyze.paths import BEYOND, IS_PRETRAINED, IS_TUNED, NO_SCORE, choose
from peft_arena.analyze.study import analyze_study
from peft_arena.analyze.view import Margin
from peft_arena.core.errors import UserError
from peft_arena.core.paths import ScanSpec
from peft_arena.core.specs import OWN, EvalSpec, PathSpec, RuleSpec, TaskSpec
from peft_arena.store.records import EvaluationRecord, ItemRecord
from tests.analyze.made import judged, unknown
from tests.analyze.synthetic_paths import STEPS, Walk, build_walks, saturating, straight

TASKS = ("sums", "facts", "logic")
MIN = PathSpec(rule=RuleSpec(name="min", config={}))


def scan_of(grid, *, tolerance=2.0, path=OWN, tasks=TASKS):
    splits = {
        name: tuple(EvalSpec(task=TaskSpec(name=task), split=split) for task in tasks)
        for name, split in (("choose_on", "validation"), ("claim_on", "test"))
    }
    return ScanSpec(path=path, grid=grid, tolerance=tolerance, **splits)


def records(scan, answers, units=None, *, others=(1.0,) * 10):
    """Return one record per task; tasks without answers get the others, those without a unit are fractions."""
    found = []
    for spec in scan.choose_on:
        values = answers.get(spec.task.name, others)
        items = tuple(
            ItemRecord(id=str(n), value=value, reason="" if value is not None else "none")
            for n, value in enumerate(values)
        )
        unit, better = (units or {}).get(spec.task.name, ("fraction", "higher"))
        metric = {"name": "m", "unit": unit, "better": better}
        found.append(
            EvaluationRecord(
                run_id="r",
                step=1,
                factor=1.0,
                spec=spec,
                card={"metrics": [metric]},
                metrics=(),
                items=items,
                engine={},
                provenance={},
            )
        )
    return found


def forgetful(scan, answers, units=None):
    """Return records of a tuned model that forgot a little of everything."""
    return records(scan, answers, units, others=(1.0,) * 9 + (0.0,))


def right(count, of=100):
    return [1.0] * count + [0.0] * (of - count)


def test_the_smallest_factor_that_nothing_speaks_against_is_chosen():
    scan = scan_of((0.2, 0.4, 0.6, 0.8))
    counts = dict(zip(scan.grid, (10, 49, 50, 50), strict=True))
    points = {factor: records(scan, {"sums": right(count)}) for factor, count in counts.items()}
    choice = choose(scan, forgetful(scan, {"sums": right(50)}), points)
    assert choice.chosen == 0.4
    assert [row.allowed for row in choice.rows] == [False, True, True, True]
    assert choice.rows[0].target_change[0] == pytest.approx(-40)
    assert choice.rows[1].target == pytest.approx(0.49)
    assert "smallest of 3" in choice.reason
    assert choose(scan, forgetful(scan, {"sums": right(50)}), points) == choice


def test_a_point_that_keeps_no_more_than_the_tuned_model_is_not_chosen():
    scan = scan_of((0.5,))
    same = records(scan, {"sums": right(50)})
    choice = choose(scan, same, {0.5: same})
    assert choice.chosen is None
    assert "keeps no more than the tuned model: mean retention +0.0 points" in choice.reason
    alone = scan_of((0.5,), tasks=("sums",))
    same = records(alone, {"sums": right(50)})
    assert choose(alone, same, {0.5: same}).chosen == 0.5, "nothing is known of retention"


@pytest.mark.parametrize(("tolerance", "chosen"), [(2.0, None), (5.0, 0.5)])
def test_few_items_do_not_excuse_a_loss_beyond_the_margin(tolerance, chosen):
    scan = scan_of((0.5,), tolerance=tolerance)
    tuned, point = forgetful(scan, {"sums": right(10, 20)}), records(scan, {"sums": right(9, 20)})
    choice = choose(scan, tuned, {0.5: point})
    assert choice.chosen == chosen
    assert choice.rows[0].target_change[2] >= 0, "the interval alone does not exclude it"
    assert ("margin" in choice.rows[0].why) is (chosen is None)


def test_the_margin_does_not_excuse_a_loss_that_the_items_show():
    scan = scan_of((0.5,))
    choice = choose(scan, records(scan, {"sums": right(200, 400)}), {0.5: records(scan, {"sums": right(193, 400)})})
    assert choice.rows[0].target_change[0] > -2
    assert choice.chosen is None
    assert choice.rows[0].why.startswith("below the tuned model on the target")


def test_a_point_that_is_worse_than_the_best_of_the_grid_is_not_chosen():
    scan = scan_of((0.3, 0.6))
    points = {0.3: records(scan, {"sums": right(50)}), 0.6: records(scan, {"sums": right(95)})}
    choice = choose(scan, forgetful(scan, {"sums": right(50)}), points)
    assert choice.chosen == 0.6
    assert "best point of the grid" in choice.rows[0].why


def test_the_ends_of_the_path_and_what_lies_beyond_are_never_chosen():
    scan = scan_of((0.0, 1.0, 1.2))
    same = records(scan, {"sums": right(50)})
    choice = choose(scan, same, {0.0: same, 1.0: same, 1.2: records(scan, {"sums": right(99)})})
    assert choice.chosen is None
    assert [row.why for row in choice.rows] == [IS_PRETRAINED, IS_TUNED, BEYOND]
    assert "no factor between" in choice.reason
    assert choice.rows[2].target_change[0] == pytest.approx(49), "shown all the same"


def test_factor_zero_of_a_rule_that_does_not_begin_at_the_pretrained_model_may_be_chosen():
    scan = scan_of((0.0, 1.0), path=PathSpec(rule=RuleSpec(name="intruder")))
    same = records(scan, {"sums": right(50)})
    choice = choose(scan, forgetful(scan, {"sums": right(50)}), {0.0: same, 1.0: same})
    assert choice.chosen == 0.0
    assert choice.rows[1].why == IS_TUNED


def test_factor_one_of_a_rule_that_changes_the_tuned_model_may_be_chosen():
    scan = scan_of((1.0, 1.2), path=MIN)
    same = records(scan, {"sums": right(50)})
    assert choose(scan, forgetful(scan, {"sums": right(50)}), {1.0: same, 1.2: same}).chosen == 1.0


def test_answers_that_one_side_lacks_are_left_out_of_both():
    scan = scan_of((0.5, 0.6, 0.7))
    tuned = forgetful(scan, {"sums": [None, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]})
    points = {
        0.5: records(scan, {"sums": [1.0, None, *[1.0] * 6]}),
        0.6: records(scan, {"sums": [None] * 8}),
        0.7: records(scan, {"sums": [*[None] * 7, 1.0]}),
    }
    choice = choose(scan, tuned, points)
    assert choice.rows[0].target_change[0] == pytest.approx(100 * (6 / 6 - 5 / 6))
    assert choice.rows[0].target == pytest.approx(1.0)
    assert (choice.rows[1].target, choice.rows[1].target_change) == (None, None)
    assert [row.why for row in choice.rows] == ["", NO_SCORE, "1 item: an interval needs 6"]


def test_a_factor_without_evaluations_is_said_and_not_chosen():
    scan = scan_of((0.4, 0.5))
    same = records(scan, {"sums": right(50)})
    choice = choose(scan, forgetful(scan, {"sums": right(50)}), {0.5: same})
    assert (choice.chosen, choice.rows[0].why, choice.rows[0].target) == (0.5, NO_SCORE, None)


def test_a_target_where_lower_is_better_is_turned_and_keeps_its_unit():
    scan = scan_of((0.3, 0.4, 0.6), tolerance=0.1)
    spread, units = np.linspace(0, 1, 50), {"sums": ("nats", "lower")}
    wobble = 0.01 * np.cos(np.arange(50))
    points = {
        factor: records(scan, {"sums": list(level + spread + place * (wobble - wobble.mean()))}, units)
        for place, (factor, level) in enumerate(zip(scan.grid, (2.5, 2.0, 1.9), strict=True), start=1)
    }
    choice = choose(scan, forgetful(scan, {"sums": list(2.0 + spread)}, units), points)
    assert choice.chosen == 0.6
    assert [row.target_change[0] for row in choice.rows] == pytest.approx([-0.5, 0.0, 0.1])
    assert "best point of the grid" in choice.rows[1].why
    assert "nats" in choice.reason


def test_retention_is_the_mean_over_fractions_against_the_tuned_model():
    scan = scan_of((0.5,), tasks=(*TASKS, "corpus"))
    units = {"corpus": ("nats", "lower")}
    tuned = records(scan, {"facts": right(40), "logic": right(10, 20), "corpus": [2.0] * 9}, units)
    point = records(scan, {"facts": right(60), "logic": right(12, 20), "corpus": [9.0] * 9}, units)
    row = choose(scan, tuned, {0.5: point}).rows[0]
    assert row.retention_change[0] == pytest.approx((20 + 10) / 2)
    assert row.retention_change[1] < 15 < row.retention_change[2]


def test_evaluations_of_other_items_are_refused():
    scan = scan_of((0.5,))
    same = records(scan, {})
    with pytest.raises(UserError, match="chosen by sums"):
        choose(scan, same[::-1], {0.5: same})
    with pytest.raises(UserError, match="chosen by sums"):
        choose(scan, same, {0.5: same[:2]})


@pytest.mark.parametrize(
    ("target", "kept", "verdict"),
    [
        (judged(-0.5, 0.5), judged(5, 1), "overshoot"),
        (judged(3, 1), judged(5, 1), "overshoot"),
        (judged(-0.5, 0.5), judged(5, 4), "undecided"),
        (judged(-0.5, 0.5), judged(-5, 1), "retention worse"),
        (judged(-0.5, 3), judged(5, 1), "undecided"),
        (judged(-1.9, 1), judged(5, 1), "undecided"),
        (judged(-1, 0.2), judged(5, 1), "overshoot"),
        (judged(-1, 0.2), judged(-5, 1), "retention worse"),
        (judged(-5, 1), judged(5, 1), "target worse"),
        (judged(0, 0.1, None), judged(5, 1), "undecided"),
        (judged(-1, None), judged(5, 1), "unknown"),
        (judged(-0.5, 0.5), unknown(), "unknown"),
        (unknown(), judged(5, 1), "unknown"),
    ],
)
def test_an_overshoot_needs_better_retention_and_a_target_that_is_no_worse(target, kept, verdict):
    assert Claim(target, kept, unknown(), {0: 0.5}).verdict == verdict
    assert Claim(target, kept, unknown(), {0: 0.5}, missing="no scan").verdict == "unknown"


def test_what_an_overshoot_lacks_is_said():
    claim = Claim(judged(-3, 3), judged(1, 3), unknown(), {0: 0.5})
    assert claim.why_not == "retention undecided, target not shown no worse within 2"
    assert Claim(judged(-3, 0.5), judged(4, 1), unknown(), {0: 0.5}).why_not == "target worse"
    assert Claim(judged(0, 0.1, None), judged(4, 1), unknown(), {0: 0.5}).why_not == "target no margin for its unit"


def test_a_share_is_regained_only_of_a_loss_that_is_shown():
    kept = judged(5, 1)
    assert Claim(judged(0, 1), kept, judged(-20, 2)).recovered == pytest.approx(0.25)
    assert Claim(judged(0, 1), kept, judged(-20, 15)).recovered is None
    assert Claim(judged(0, 1), kept, judged(20, 2)).recovered is None
    assert Claim(judged(0, 1), kept, unknown()).recovered is None


OVER = (0, 1, 2, 3, 4)
WALKS = [
    Walk("over", seeds=OVER, save_points=(50, 100), grid=(0.2, 0.4, 0.6, 0.8, 1.0), forced=dict.fromkeys(OVER, 0.6)),
    Walk("tight", gain=straight(0.6), forget=straight(-0.1), grid=(0.2, 0.5)),
    Walk("diverged", gain=straight(-0.15), forget=straight(-0.6), grid=(0.0, 0.1, 0.5, 1.2)),
    Walk("fooled", gain=straight(0.6), forced={0: 0.2}, grid=(0.2, 0.5)),
    Walk("half", seeds=(0, 1), forced={0: 0.4, 1: None}, grid=(0.4,)),
    Walk("lacking", seeds=(0, 1), unscanned=(1,), grid=(0.4,)),
    Walk("waiting", seeds=(0, 1), untrained=(1,), grid=(0.4,)),
    Walk("absent", untrained=(0,), grid=(0.4,)),
]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    return build_walks(tmp_path_factory.mktemp("runs"), WALKS, seed=3)


@pytest.fixture(scope="module")
def result(walked):
    return analyze_study(walked.store, replace(walked.view, margin=Margin(target=10.0)), draws=500)


def path_of(result, label):
    return next(arm for arm in result.targets[0].paths.arms if arm.label == label)


def test_an_overshoot_is_confirmed_on_test_items(result):
    arm = path_of(result, "over")
    claim = arm.claim
    assert claim.verdict == "overshoot", claim.why_not
    assert set(claim.chosen) == {0, 1, 2, 3, 4}
    at = np.mean(list(claim.chosen.values()))
    kept = claim.retention.estimate
    assert 0.3 <= at < 0.9
    assert kept.value == pytest.approx(30 * (1 - at), abs=5)
    assert kept.seeds == 5
    assert claim.recovered == pytest.approx(1 - at, abs=0.15)
    assert claim.loss.estimate.value == pytest.approx(-30, abs=5)
    assert claim.at_most_worse == pytest.approx(-claim.target.interval[0])
    assert [task.label for task, _ in claim.tasks] == ["sums", "facts", "logic", "corpus"]
    means = [change.value for task, change in claim.tasks[1:3]]
    assert kept.value == pytest.approx(np.mean(means)), "the corpus is no fraction"


def test_where_no_point_may_be_chosen_the_tuned_model_stays(result):
    claim = path_of(result, "tight").claim
    assert claim.chosen == {0: None}
    assert claim.none_chosen
    assert claim.verdict == "no point chosen"
    assert claim.target.estimate is None
    assert claim.retention.p_corrected is None


def test_a_run_that_diverged_is_rewound_and_its_target_is_better(result):
    arm = path_of(result, "diverged")
    assert arm.claim.chosen == {0: 0.1}
    assert arm.claim.verdict == "overshoot"
    assert arm.claim.target.estimate.low > 0
    assert arm.claim.at_most_worse == max(0.0, -arm.claim.target.interval[0])


def test_a_point_that_loses_the_target_on_test_items_is_no_overshoot(result):
    claim = path_of(result, "fooled").claim
    assert claim.retention.has("better")
    assert claim.verdict == "target worse"


def test_a_seed_without_a_point_counts_as_no_difference(result, walked):
    claim = path_of(result, "half").claim
    assert claim.kept_tuned == (1,)
    run = walked.view.arms[4].runs[0]
    directory, scan = walked.store.run(run), walked.scans["half", 0]
    facts = scan.claim_on[1]
    values = [
        np.mean([item.value for item in directory.evaluation(directory.point(STEPS, factor), facts).items])
        for factor in (0.4, 1.0)
    ]
    facts_change = next(change for task, change in claim.tasks if task.label == "facts")
    assert facts_change.value == pytest.approx(100 * (values[0] - values[1]) / 2)


def test_claims_are_part_of_the_family_of_the_study(result):
    claims = [arm.claim for arm in result.targets[0].paths.arms]
    family = result.family
    assert {claim.target.family for claim in claims} == {claim.retention.family for claim in claims} == {family}
    pairs = len(result.targets[0].comparisons)
    judged = sum(claim.target.p_corrected is not None for claim in claims)
    assert judged == 5
    assert family.size > 2 * judged + pairs


def test_an_arm_can_only_be_judged_if_every_trained_seed_was_scanned(result):
    claim = path_of(result, "lacking").claim
    assert claim.missing == "seed 1: not scanned yet"
    assert claim.verdict == "unknown"
    assert claim.target.estimate is None
    gaps = [gap for gap in result.evidence.gaps if gap.what.startswith("path")]
    assert [(gap.who, gap.kind) for gap in gaps] == [("lacking, seed 1", "missing")]
    assert path_of(result, "waiting").claim.missing == ""
    assert set(path_of(result, "waiting").claim.chosen) == {0}
    assert path_of(result, "absent").claim.missing == "no run is trained"


def test_curves_are_gains_over_the_base_model_on_validation_items(result):
    arm = path_of(result, "over")
    assert [point.at for point in arm.points] == list(arm.scan.grid)
    by_factor = {point.at: point for point in arm.points}
    assert by_factor[0.2].gain.value == pytest.approx(20, abs=8)
    assert by_factor[1.0].kept.value == pytest.approx(-30, abs=6)
    assert by_factor[1.0].gain.value == arm.tuned.gain.value
    assert by_factor[0.2].gain.seeds == 5
    zero = path_of(result, "diverged").points[0]
    assert (zero.at, zero.gain.value, zero.kept.value) == (0.0, 0.0, 0.0)


def test_the_training_is_put_beside_the_path(result):
    arm = path_of(result, "over")
    assert [point.at for point in arm.along] == [50, 100]
    assert arm.along[0].gain.value == pytest.approx(25, abs=8)
    assert arm.along[0].kept.value == pytest.approx(-7.5, abs=6)
    assert path_of(result, "half").along == ()


def test_strengths_are_means_over_the_seeds_that_chose_a_point(result):
    half = path_of(result, "half")
    assert len(half.strengths()) == 6
    assert path_of(result, "tight").strengths() == []


def test_the_summary_is_json(result):
    text = json.dumps(result.summary(), allow_nan=False)
    paths = {arm["arm"]: arm for arm in json.loads(text)["targets"][0]["paths"]}
    assert paths["over"]["verdict"] == "overshoot"
    assert paths["half"]["chosen"] == {"0": 0.4, "1": None}
    assert paths["lacking"]["missing"] == "seed 1: not scanned yet"


def small(tmp_path, **settings):
    walk = Walk("a", **({"grid": (0.4, 0.7)} | settings))
    return build_walks(tmp_path, [walk, Walk("b", grid=(0.4,))], validation=30, test=30)


def replace_paths(walked, **changes):
    """Let the second arm's scan differ from the first's."""
    run = walked.view.arms[1].runs[0].run_id
    scan = walked.scans["b", 0].model_copy(update=changes)
    return replace(walked.view, paths={**walked.view.paths, run: (scan,)})


def test_scans_on_other_items_are_not_mixed(tmp_path):
    walked = small(tmp_path)
    fewer = tuple(spec.model_copy(update={"items": 7}) for spec in walked.scans["b", 0].claim_on)
    with pytest.raises(UserError, match="2 different sets of claim_on"):
        analyze_study(walked.store, replace_paths(walked, claim_on=fewer), draws=50)


def test_a_scan_of_another_target_is_refused(tmp_path):
    walked = small(tmp_path)
    scan = walked.scans["a", 0]
    turned = scan.model_copy(update={"choose_on": scan.choose_on[::-1], "claim_on": scan.claim_on[::-1]})
    view = replace(walked.view, paths={run: (turned,) for run in walked.view.paths})
    with pytest.raises(UserError, match="is its target, sums, got corpus"):
        analyze_study(walked.store, view, draws=50)


def test_failed_damaged_and_lost_records_are_gaps(tmp_path):
    walked = small(tmp_path, seeds=(0, 1, 2), unscanned=(0,), forced={1: 0.4, 2: 0.4})
    failed, damaged, lost = (walked.store.run(run) for run in walked.view.arms[0].runs)
    failed.event("failed", stage=f"scan {walked.scans['a', 0].key}", reason="out of memory")
    next((damaged.path / "records").glob("*/path-*.json")).write_text("{")
    point = lost.point(STEPS, 0.4)
    lost.record_path(point, f"eval-{walked.scans['a', 0].claim_on[1].key}").unlink()
    result = analyze_study(walked.store, walked.view, draws=50)
    gaps = {gap.who: gap for gap in result.evidence.gaps if gap.what.startswith("path")}
    assert {who: gap.kind for who, gap in gaps.items()} == {
        "a, seed 0": "failed", "a, seed 1": "damaged", "a, seed 2": "missing"
    }  # fmt: skip
    assert gaps["a, seed 0"].reason == "out of memory"
    assert "the chosen factor 0.4 on facts (test)" in gaps["a, seed 2"].reason
    assert path_of(result, "a").claim.verdict == "unknown"


def test_without_its_loss_on_test_items_no_share_is_regained(tmp_path):
    walked = small(tmp_path)
    base = walked.store.run(walked.view.base)
    base.record_path(base.point(0), f"eval-{walked.scans['a', 0].claim_on[1].key}").unlink()
    result = analyze_study(walked.store, walked.view, draws=50)
    claim = path_of(result, "a").claim
    assert claim.retention.estimate is not None
    assert (claim.loss.estimate, claim.recovered) == (None, None)
    assert any(gap.who == "base" and gap.what == "paths" for gap in result.evidence.gaps)


def test_unscored_answers_are_left_out_and_counted(tmp_path):
    walked = build_walks(tmp_path, [Walk("a", grid=(0.5,), gain=saturating(0.4), unscored=0.1, forced={0: 0.5})])
    change = path_of(analyze_study(walked.store, walked.view, draws=50), "a").claim.target.estimate
    assert 0 < change.left_out < 100
    assert change.items == 200 - change.left_out
