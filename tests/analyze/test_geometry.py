"""Geometry of a study: profiles, what is absent and why, and correlations that find what is there and no more."""

import json

import numpy as np
import polars as pl
import pytest
from scipy import stats

from peft_arena.analyze.correlate import Point, correlate
from peft_arena.analyze.geometry import (
    NOT_APPLICABLE,
    NOT_MEASURED,
    ArmGeometry,
    TargetGeometry,
    make_run,
    metric_name,
)
from peft_arena.analyze.profiles import by_kind, kind_of, module_profiles, moving_average, short_names, window_of
from peft_arena.analyze.study import analyze_study
from peft_arena.core.quantities import QUANTITIES
from tests.analyze.synthetic import RETENTION, Truth, build_synthetic
from tests.analyze.synthetic_geometry import KEYS, KINDS, add_geometry, make_arrays, make_record

FORGET = {"a": -0.02, "b": -0.1, "c": -0.2, "d": -0.3, "e": -0.4, "prompt": -0.05, "later": -0.1}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    truths = [Truth(label, label, forget=forget, seeds=(0, 1)) for label, forget in FORGET.items()]
    made = build_synthetic(tmp_path_factory.mktemp("geometry"), truths, items=120)
    strength = {label: -forget for label, forget in FORGET.items()}
    return add_geometry(made, strength, weightless=("prompt",), missing=("later",))


@pytest.fixture(scope="module")
def result(study):
    return analyze_study(study.store, study.view, draws=100)


def test_every_run_keeps_its_own_numbers_and_the_mean_is_over_runs(result):
    arm = result.targets[0].geometry.arms[1]
    values = [run.measures["l2_relative"].value for run in arm.runs]
    assert values == pytest.approx([0.045, 0.05])
    mean = arm.mean("l2_relative")
    assert (mean.value, mean.low, mean.high, mean.runs) == pytest.approx((0.0475, 0.045, 0.05, 2))


def test_forgetting_of_a_run_is_minus_the_mean_over_retention_tasks(study, result):
    arm = result.targets[0].geometry.arms[2]
    base = study.store.run(study.view.base)
    for run in arm.runs:
        directory = study.store.find(run.run_id)
        changes = []
        for spec in study.view.retention:
            if spec.task.name in RETENTION:
                before = base.evaluation(base.point(0), spec).metrics[0].value
                changes.append(100 * (directory.evaluation(directory.point(200), spec).metrics[0].value - before))
        assert run.forgetting == pytest.approx(-np.mean(changes))
    kept = next(found for found in result.targets[0].arms if found.label == "c").mean.value
    assert np.mean([run.forgetting for run in arm.runs]) == pytest.approx(-kept)


def test_what_is_not_there_is_absent_with_a_reason_and_never_zero(result):
    arms = {arm.label: arm for arm in result.targets[0].geometry.arms}
    assert arms["prompt"].mean("l2_relative") == arms["prompt"].mean("drift_relative_general")
    assert (arms["prompt"].mean("l2_relative").value, arms["prompt"].mean("l2_relative").reason) == (
        None,
        NOT_APPLICABLE,
    )
    assert arms["prompt"].mean("kl_general").value is not None
    assert arms["later"].mean("kl_general").reason == NOT_MEASURED
    gaps = [(gap.who, gap.what, gap.kind) for gap in result.evidence.gaps if gap.what.startswith("geometry")]
    assert gaps == [(f"later, seed {seed}", f"geometry {part}", "missing") for seed in (0, 1) for part in KEYS], (
        "a method without weights is no gap"
    )


def test_failed_and_damaged_measurements_are_gaps(tmp_path):
    made = add_geometry(build_synthetic(tmp_path, [Truth("a", seeds=(0,)), Truth("b", seeds=(0,))], items=10), {"a": 1})
    one, two = (made.store.run(arm.runs[0]) for arm in made.view.arms)
    two.event("failed", stage=f"geometry {KEYS['drift']}", reason="out of memory")
    one.record_path(one.point(200), f"geometry-{KEYS['spectra']}").with_suffix(".parquet").write_bytes(b"x")
    found = analyze_study(made.store, made.view, draws=50)
    gaps = {(gap.who, gap.what): (gap.kind, gap.reason) for gap in found.evidence.gaps}
    assert gaps["b, seed 0", "geometry drift"] == ("failed", "out of memory")
    kind, reason = gaps["a, seed 0", "geometry spectra"]
    assert kind == "damaged"
    assert "is not what" in reason
    assert found.targets[0].geometry.arms[0].mean("stable_rank").reason == reason


def test_an_unchanged_model_has_no_ranks_and_says_why():
    record = make_record("spectra", 0.0, changed=False)
    arm = ArmGeometry("same", 0, (make_run("same", "same", None, [(record, None)]),))
    assert (arm.mean("stable_rank").value, arm.mean("stable_rank").reason) == (None, "the weight is unchanged")
    assert TargetGeometry((arm,)).metrics == ("global_l2_relative",)
    assert arm.depth("stable_rank") == {}
    assert arm.profile(KINDS[0]) is None


def test_a_study_that_asks_for_no_geometry_has_none(study):
    plain = build_synthetic(study.store.root.parent / "plain", [Truth("a", seeds=(0,))], items=10)
    found = analyze_study(plain.store, plain.view, draws=50)
    assert found.targets[0].geometry is None
    assert "geometry" not in found.summary()["targets"][0]


def test_the_summary_is_json(result):
    summary = result.summary()["targets"][0]["geometry"]
    json.dumps(summary, allow_nan=False)
    assert summary["arms"][0]["means"]["kl_general"]["runs"] == 2
    assert summary["looked_at"] == len({one["metric"] for one in summary["correlations"] if one["value"] is not None})


def test_correlations_are_of_ranks_over_the_means_of_arms(result):
    geometry = result.targets[0].geometry
    found = next(one for one in geometry.correlations if (one.metric, one.outcome) == ("l2_relative", "forgetting"))
    arms = [arm for arm in geometry.arms if arm.mean("l2_relative").value is not None]
    x = [arm.mean("l2_relative").value for arm in arms]
    y = [np.mean([run.forgetting for run in arm.runs]) for arm in arms]
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert (found.arms, found.left_out) == (5, 2)
    assert (found.low, found.high, found.p) == (None, None, None), "five arms say nothing"


def twelve(seed=0, count=12):
    x, y = np.random.default_rng(seed).normal(size=(2, count))
    return [Point(str(place), {"m": x[place], "n": -(x[place] ** 3)}, y[place], None) for place in range(count)]


def test_the_interval_is_that_of_bonett_and_wright_and_the_p_value_its_inversion():
    one, other, *_ = correlate(twelve(), ["m", "n"])
    z, error = np.arctanh(one.value), np.sqrt((1 + one.value**2 / 2) / 9)
    assert (one.low, one.high) == pytest.approx((np.tanh(z - 1.959964 * error), np.tanh(z + 1.959964 * error)))
    assert one.p == pytest.approx(2 * stats.norm.sf(abs(z) / error))
    assert other.value == pytest.approx(-one.value)
    assert one.p_corrected == pytest.approx(min(1.0, 2 * one.p))
    for seed in range(200):
        found = correlate(twelve(seed), ["m"])[0]
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_seeds_of_an_arm_do_not_count_as_methods():
    single = twelve()
    copied = [point for point in single for _ in range(4)]
    one, many = (correlate(points, ["m"])[0] for points in (single, copied))
    assert many == one


def test_intervals_hold_the_truth_and_chance_is_seldom_taken_for_more():
    rng = np.random.default_rng(0)
    pearson, held, rejected, count = 0.7, 0, 0, 500
    truth = 6 / np.pi * np.arcsin(pearson / 2)
    for _ in range(count):
        x, noise, other = rng.normal(size=(3, 12))
        y = pearson * x + np.sqrt(1 - pearson**2) * noise
        points = [Point(str(place), {"m": x[place], "n": other[place]}, y[place], None) for place in range(12)]
        found = correlate(points, ["m", "n"])
        held += found[0].low <= truth <= found[0].high
        rejected += found[1].p < 0.05
    assert 0.93 <= held / count <= 0.99
    assert rejected / count <= 0.06


@pytest.mark.parametrize(
    ("values", "outcomes", "reason"),
    [
        ([1, 2, 3], [1, 2, 3], "3 arms have both numbers"),
        ([1, 1, 1, 1], [1, 2, 3, 4], "the quantity is the same"),
        ([1, 2, 3, 4], [2, 2, 2, 2], "the forgetting is the same"),
        ([1, 2, 3, 4], [1, 2, None, 4], "3 arms have both numbers"),
    ],
)
def test_no_correlation_without_numbers_to_correlate(values, outcomes, reason):
    points = [Point(str(place), {"m": x}, y, None) for place, (x, y) in enumerate(zip(values, outcomes, strict=True))]
    found = correlate(points, ["m"])[0]
    assert found.value is None
    assert found.reason.startswith(reason)


def test_below_eight_arms_there_is_the_value_alone():
    for count in (4, 7, 8):
        points = [Point(str(place), {"m": float(place)}, float(place**2), None) for place in range(count)]
        found = correlate(points, ["m"])[0]
        assert found.value == pytest.approx(1.0)
        assert (found.low is None) == (found.p is None) == (found.p_corrected is None) == (count < 8)
    assert 0 < found.low < 1 and found.high == pytest.approx(1.0) and found.p > 0, (
        "a perfect order of eight is no certainty"
    )


def test_quantities_count_as_looked_at_where_only_the_gain_is_known():
    points = [Point(str(place), {"m": float(place), "n": float(-place)}, None, place**2.0) for place in range(5)]
    assert TargetGeometry((), correlate(points, ["m", "n"])).looked_at == 2


def test_profiles_are_read_by_module_and_averaged_by_kind():
    arrays = make_arrays(0.1, blocks=3, directions=20).sample(fraction=1.0, shuffle=True, seed=0)
    modules = module_profiles(arrays)
    part = arrays.filter(pl.col("module") == "model.layers.1.mlp.up_proj").sort("index")
    np.testing.assert_array_equal(modules["model.layers.1.mlp.up_proj"].values["deviation"], part["deviation"])
    assert "alignment" not in modules["model.layers.1.mlp.up_proj"].values, "a column of nulls is no profile"
    kinds = by_kind(modules)
    mean = arrays.filter(pl.col("module").str.ends_with("up_proj")).group_by("index").agg(pl.col("deviation").mean())
    np.testing.assert_allclose(kinds["mlp.up_proj"].values["deviation"], mean.sort("index")["deviation"])
    assert kinds["mlp.up_proj"].modules == 3
    assert kinds["mlp.up_proj"].thinned(5).index.tolist() == [0, 5, 10, 14, 19]


def test_the_moving_average_pads_by_reflection():
    values = [4.0, 1.0, 7.0, 3.0, 9.0, 2.0]
    padded = [7.0, 1.0, *values, 9.0, 3.0]
    np.testing.assert_allclose(moving_average(values, 5), [np.mean(padded[i : i + 5]) for i in range(6)])
    np.testing.assert_allclose(moving_average([2.0], 5), [2.0])
    np.testing.assert_allclose(moving_average([2.0, 4.0], 5), [np.mean([4, 2, 4]), np.mean([2, 4, 2])])
    assert [window_of(count) for count in (1, 100, 576, 3584)] == [5, 5, 13, 73]


def test_names():
    assert kind_of("model.layers.3.self_attn.q_proj") == "self_attn.q_proj"
    assert kind_of("model.layers.3.mlp.experts.7.up_proj") == "mlp.experts.*.up_proj"
    assert kind_of("lm_head") == "lm_head"
    assert short_names(["attn.c_proj", "mlp.c_proj", "mlp.c_fc"]) == {
        "attn.c_proj": "attn.c_proj",
        "mlp.c_proj": "mlp.c_proj",
        "mlp.c_fc": "c_fc",
    }
    assert metric_name("kl_target").title == "forward KL per token, target prompts"
    assert metric_name("drift_relative_ratio").title == "relative drift, general ÷ target"
    assert metric_name("global_l2_relative").title == "relative L2 norm, all parameters"
    assert metric_name("pca_distance_32_general").part == "activations"
    assert metric_name("of_another_version").known is None
    for name in QUANTITIES:
        assert metric_name(name) == (name, "", False), "log_norm_ratio is no ratio of two prompt sets"
        assert metric_name(f"{name}_ratio")[:2] == (name, "ratio")
