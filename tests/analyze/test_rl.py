"""What is read from the records of reinforcement learning: curves, changes, warnings, and pairs with fine-tuning."""

import re

import numpy as np
import pytest
from scipy import stats

from peft_arena.analyze.compare import both_ways
from peft_arena.analyze.rl import read_rl
from peft_arena.analyze.rl_checks import CHECKS, _reward_error, warnings_of
from peft_arena.analyze.rl_curves import RLArm, RLRun
from peft_arena.analyze.study import analyze_study
from peft_arena.core.specs import RLSpec, Schedule, TaskSpec
from peft_arena.report.rl_text import pair_sentence
from peft_arena.store.records import LogEntry, Rollouts, TrainingRecord
from tests.analyze.synthetic import PROVENANCE, Truth, _run, build_synthetic
from tests.analyze.synthetic_rl import Learning, rl_training

SPEC = RLSpec(task=TaskSpec(name="sums"), schedule=Schedule(steps=200), learning_rate=1e-5, objective="grpo")


def record(log=(), **more):
    fields = {"run_id": "r", "steps": 200, "tokens": 1, "padded_tokens": 1, "examples": 1, "dropped": 0}
    return TrainingRecord(**fields, log=tuple(log), save_points=(200,), provenance=PROVENANCE, **more)


def arm_of(*learnings, seed=0):
    """Return an arm with one run for each of some made trainings."""
    rng = np.random.default_rng(seed)
    run = _run(Truth("a", rl=Learning()), 0)
    runs = tuple(
        RLRun(number, f"r{number}", SPEC, rl_training(learning, record(), run, rng))
        for number, learning in enumerate(learnings)
    )
    return RLArm("a", 0, "grpo", len(runs), runs, "")


def logged(*arms):
    """Return an arm whose runs have logged some values of the reward, given as step to value for each run."""
    sample = arm_of(Learning(entries=1)).runs[0].training.log[-1]
    entry = sample.rollout

    def one(step, value):
        return LogEntry(step=step, tokens=1, rollout=entry.model_copy(update={"reward": value}))

    runs = tuple(
        RLRun(number, f"r{number}", SPEC, record(one(step, value) for step, value in found.items()))
        for number, found in enumerate(arms)
    )
    return RLArm("a", 0, "grpo", len(runs), runs, "")


def test_a_curve_is_the_mean_and_the_range_over_the_steps_all_runs_have():
    curve = logged({1: 0.0, 2: 0.2, 3: 0.4}, {1: 1.0, 2: 0.6}).curve("reward")
    assert curve.steps == (1, 2)
    assert curve.mean == pytest.approx((0.5, 0.4))
    assert (curve.low, curve.high, curve.runs) == ((0.0, 0.2), (1.0, 0.6), 2)
    assert logged({1: 0.0}).curve("kl") is not None
    assert logged({1: 0.0}).curve("validation_reward") is None


def test_start_and_end_are_means_over_a_tenth_with_a_paired_interval():
    first = {step: (0.0 if step <= 2 else 0.9) for step in range(1, 19)} | {19: 0.85, 20: 0.95}
    second = {step: (0.2 if step <= 2 else 0.5) for step in range(1, 21)}
    third = {step: (0.4 if step <= 2 else 1.0) for step in range(1, 21)}
    found = logged(first, second, third).change("reward")
    assert (found.start, found.end, found.seeds) == (pytest.approx(0.2), pytest.approx(0.8), 3)
    expected = stats.ttest_rel([0.9, 0.5, 1.0], [0.0, 0.2, 0.4]).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_one_seed_has_no_interval():
    found = logged({1: 0.1, 2: 0.3}).change("reward")
    assert (found.start, found.end, found.low, found.high, found.seeds) == (0.1, 0.3, None, None, 1)


def test_a_training_that_went_well_gives_no_warning():
    assert warnings_of(arm_of(Learning(), Learning(), seed=1)) == []


TROUBLE = {
    "no_signal": (Learning(zero_variance=(0.97, 0.95)), r"9\d\.\d % of the groups over 8 log entries"),
    "not_held_out": (
        Learning(validation=(0.3, 0.2)),
        r"task reward 0\.\d+ → 0\.7\d*, standard error .* → 0\.2\d* on 64 items",
    ),
    "entropy": (
        Learning(entropy=(1.0, 0.02)),
        r"0\.9\d* first logged → 0\.0\d+ nats per token, \d\.\d % of it",
    ),
    "truncated": (Learning(ended=(0.9, 0.3), length=(20, 60)), r"7\d\.\d % → 3\d\.\d % ended, mean length 2\d\.\d → "),
    "kl": (
        Learning(kl=(0.0, 2.5)),
        r"2\.\d+ nats per token at step \d+, 0\.\d+ first logged, 2\.\d+ last",
    ),
    "unscored": (Learning(unscored=0.05), r"640 of 12800 completions, 5\.0 %"),
}


def test_every_check_is_tested():
    assert set(TROUBLE) == {check.name for check in CHECKS}


@pytest.mark.parametrize("name", TROUBLE)
def test_a_warning_gives_the_numbers_of_the_runs_it_is_about(name):
    learning, numbers = TROUBLE[name]
    (found,) = warnings_of(arm_of(Learning(), learning))
    assert (found.check, found.seeds, found.runs) == (name, (1,), 2)
    assert "(1 of 2 runs). Seed 1: " in found.text
    assert re.search(numbers, found.numbers), found.numbers
    assert found.text.endswith(found.meaning)


@pytest.mark.parametrize(
    "learning",
    [
        Learning(ended=(0.4, 0.45)),
        Learning(entropy=(1.0, 0.2)),
        Learning(kl=(0.0, 0.9)),
        Learning(unscored=0.01),
        Learning(zero_variance=(0.85, 0.99)),
        Learning(reward=(0.3, 0.3), validation=(0.3, 0.2), noise=0.003),
        Learning(validation=None),
        Learning(validation=(0.3, 0.3), noise=0.0),
        Learning(validation=(1.0, 0.97), noise=0.0),
    ],
)
def test_on_the_right_side_of_a_threshold_nothing_is_said(learning):
    assert warnings_of(arm_of(learning, seed=3)) == []


def test_without_log_entries_everything_is_absent():
    arm = RLArm("a", 0, "grpo", 1, (RLRun(0, "r", SPEC, record()),), "")
    assert arm.curve("reward") is None
    assert arm.change("reward") is None
    assert warnings_of(arm) == []


def test_an_entry_without_a_new_rollout_says_nothing_of_completions():
    log = arm_of(Learning(entries=2, validation=None)).runs[0].training.log
    again = {"completions": 0, "entropy": None, "clip_low": None}
    log = (log[0], log[1].model_copy(update={"rollout": log[1].rollout.model_copy(update=again)}))
    run = RLRun(0, "r", SPEC, record(log))
    for name in ("reward", "length", "ended", "zero_variance", "entropy", "clipped"):
        assert list(run.series(name)) == [log[0].step], name
    assert list(run.series("kl")) == [entry.step for entry in log]
    assert run.rollouts() == [log[0].rollout]


def test_the_completions_of_a_group_count_as_one():
    entry = arm_of(Learning(entries=1)).runs[0].training.log[-1].rollout
    one = entry.model_copy(update={"completions": 32, "reward_std": 0.4, "rewards": {"task": 0.5}})
    assert _reward_error([one, one], 8, task=False) == pytest.approx((2 * 0.16 / 4) ** 0.5)
    assert _reward_error([one, one], 8, task=True) == pytest.approx((2 * 0.25 / 4) ** 0.5)


def test_an_arm_that_began_at_another_run_is_in_no_pair(tmp_path):
    tuned = Truth("tuned", seeds=(0,), setting="x")
    on_top = Truth("on", seeds=(0,), setting="x", rl=Learning(init_from=(_run(tuned, 0),)))
    plain = Truth("plain", seeds=(0,), setting="x", rl=Learning())
    (target,) = analyzed(tmp_path, [tuned, on_top, plain], items=20).targets
    assert [(pair.comparison.left, pair.comparison.right) for pair in target.rl.pairs] == [("plain", "tuned")]


def test_unscored_is_counted_over_all_rollouts_and_not_over_the_log():
    counts = {"completions": 1000, "groups": 125, "prompt_tokens": 1, "generated_tokens": 1, "unscored": 11}
    seconds = {"rollout_seconds": 1.0, "scoring_seconds": 0.1, "update_seconds": 1.0}
    whole = Rollouts(engine={}, **counts, **seconds, samples=())
    entries = arm_of(Learning(entries=3)).runs[0].training.log
    found = warnings_of(RLArm("a", 0, "grpo", 1, (RLRun(0, "r", SPEC, record(entries, rollouts=whole)),), ""))
    assert [(warned.check, warned.numbers) for warned in found] == [
        ("unscored", "Seed 0: 11 of 1000 completions, 1.1 %")
    ]


def analyzed(tmp_path, truths, items=120):
    study = build_synthetic(tmp_path, truths, items=items, corpus=False)
    return analyze_study(study.store, study.view, draws=400)


def test_pairs_are_one_method_in_two_ways_with_the_p_values_of_the_study(tmp_path):
    truths = [
        Truth("lora", gain=0.6, forget=-0.3, setting="l"),
        Truth("lora rl", gain=0.3, forget=-0.01, setting="l", rl=Learning()),
        Truth("oft rl", "oft", gain=0.3, setting="o", rl=Learning()),
        Truth("oft", "oft", gain=0.3, setting="o"),
        Truth("lora other", gain=0.3, setting="other", rl=Learning()),
    ]
    (target,) = analyzed(tmp_path, truths).targets
    pairs = target.rl.pairs
    assert [(pair.comparison.left, pair.comparison.right) for pair in pairs] == [("lora rl", "lora"), ("oft rl", "oft")]
    assert [pair.objectives for pair in pairs] == [("grpo", "sft")] * 2
    for axis in ("gain", "retention"):
        every = both_ways(target.comparisons)
        for pair in pairs:
            same = every[pair.comparison.left, pair.comparison.right].on(axis)
            assert pair.comparison.on(axis).p_corrected == same.p_corrected
    first, second = (pair.comparison for pair in pairs)
    assert (first.gain.word, first.retention.word) == ("worse", "better")
    assert (second.gain.word, second.retention.word) == ("undecided", "undecided")
    assert first.gain.estimate.value == pytest.approx(-30, abs=12)
    assert pair_sentence(pairs[0]).startswith("lora rl against lora: worse in gain (−")
    assert "; better in mean retention (+" in pair_sentence(pairs[0])
    assert ": undecided in gain (" in pair_sentence(pairs[1])


def test_arms_that_share_no_seed_are_not_compared(tmp_path):
    truths = [Truth("a", seeds=(0, 1), setting="x"), Truth("b", seeds=(2, 3), setting="x", rl=Learning())]
    (pair,) = analyzed(tmp_path, truths, items=20).targets[0].rl.pairs
    assert pair_sentence(pair) == "b against a: not comparable in gain; not comparable in mean retention."


def test_only_fine_tuning_has_nothing_of_it(tmp_path):
    result = analyzed(tmp_path, [Truth("a"), Truth("b")], items=20)
    assert result.targets[0].rl is None
    assert "rl" not in result.summary()["targets"][0]
    assert read_rl(result.targets[0].arms, ()) is None


def test_the_summary_has_the_numbers_of_the_analysis(tmp_path):
    truths = [Truth("a", seeds=(0, 1), rl=Learning(kl=None, entropy=(1.0, 0.02)), untrained=(1,))]
    summary = analyzed(tmp_path, truths, items=20).summary()["targets"][0]
    arm = summary["rl"]["arms"][0]
    assert (arm["label"], arm["objective"], len(arm["runs"]), arm["seeds_planned"]) == ("a", "grpo", 1, 2)
    assert set(arm["quantities"]) >= {"reward", "validation_reward", "entropy"}
    assert "kl" not in arm["quantities"]
    reward = arm["quantities"]["reward"]
    assert reward["change"] == pytest.approx(reward["end"] - reward["start"])
    assert (reward["low"], reward["seeds"]) == (None, 1)
    assert [found["check"] for found in summary["rl"]["warnings"]] == ["entropy"]
    assert summary["arms"][0]["objective"] == "grpo"


def test_where_an_arm_began_is_said_by_the_study_s_own_names(tmp_path):
    tuned = Truth("tuned", seeds=(0, 1), setting="x")
    same = Learning(init_from=(_run(tuned, 0), _run(tuned, 1)))
    one = Learning(init_from=(_run(tuned, 1),))
    apart = Learning(init_from=(_run(Truth("apart"), 0),))
    truths = [
        tuned,
        Truth("same", seeds=(0, 1), rl=same),
        Truth("one", seeds=(0, 1), rl=one),
        Truth("apart", seeds=(0,), rl=apart, untrained=(0,)),
    ]
    arms = analyzed(tmp_path, truths, items=20).targets[0].rl.arms
    assert arms[0].origin == "tuned, the same seed, after 200 steps (merged in float32)"
    assert arms[1].origin.startswith("tuned, seed 1, after 200 steps (merged in float32); tuned, the same seed")
    assert arms[2].origin == _run(Truth("apart"), 0).run_id
