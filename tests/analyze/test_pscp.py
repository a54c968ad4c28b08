"""PSCP from records: scores by both definitions, errors, reasons, and which orders hold."""

import numpy as np
import pytest

from peft_arena.analyze.pscp import published_pscp
from peft_arena.analyze.study import analyze_study
from peft_arena.cost.pscp import Operations, PscpChoice, PscpConstants, pscp
from peft_arena.store.published import find_tables
from tests.analyze.synthetic import Truth, build_synthetic
from tests.analyze.synthetic_pscp import TOTAL, with_flops

CONSTANTS = PscpConstants(parameters=50_000, flops=1e9, memory=4e9)
EXTRA = {"big": 3e8, "small": 1234567.0, "poor": 0.0, "uncounted": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    truths = [
        Truth("big", gain=0.75, parameters=30_000, memory=2e9, spread=0.02),
        Truth("small", gain=0.6, parameters=1_000, memory=1e9, spread=0.02),
        Truth("poor", gain=0.1, parameters=40_000, memory=2.5e9),
        Truth("uncounted", gain=0.9),
        Truth("untrained", untrained=(0, 1, 2)),
    ]
    plain = build_synthetic(tmp_path_factory.mktemp("pscp"), truths, items=60, corpus=False)
    return with_flops(plain, EXTRA, PscpChoice(constants=CONSTANTS))


@pytest.fixture(scope="module")
def target(made):
    return analyze_study(made.store, made.view, draws=400).targets[0]


def test_scores_by_both_definitions(target):
    arms = {arm.label: arm for arm in target.pscp.arms}
    level = arms["big"].performance
    assert target.pscp.unit == "%" and level.value == pytest.approx(100 * target.arms[0].gain.tuned)
    memory = float(np.mean([2e9, 2e9 + 1e6, 2e9 + 2e6]))
    for kind, flops in ((Operations.EXTRA, 3e8), (Operations.TOTAL, TOTAL + 3e8)):
        found = arms["big"].by[kind]
        factor = pscp(1.0, 30_000, flops, memory, CONSTANTS)
        assert found.score.value == pytest.approx(level.value * factor)
        assert found.band.score == pytest.approx(found.score.value)
        assert (found.score.low, found.score.high) == (
            pytest.approx(factor * level.low),
            pytest.approx(factor * level.high),
        )
        assert found.score.stderr == pytest.approx(factor * level.stderr)
    assert arms["small"].inputs["extra_forward_flops_512"].value == 1234567, "never rounded"


def test_an_arm_without_an_input_has_no_score_but_the_reason(target):
    arms = {arm.label: arm for arm in target.pscp.arms}
    for kind, words in ((Operations.EXTRA, "above the base model"), (Operations.TOTAL, "total")):
        found = arms["uncounted"].by[kind]
        assert found.score is None and found.band is None
        assert words in found.missing and "not counted: no kernel" in found.missing
        assert "no accuracy on operator (P)" in arms["untrained"].by[kind].missing
    assert [arm.label for arm, _, _ in target.pscp.ranked] == ["small", "big", "poor"]
    assert {band.last for _, band, _ in target.pscp.ranked} <= {1, 2, 3}, "ranks are among arms with a score"


def test_pairs_say_what_data_and_what_constants_leave_open(target):
    pairs = {(pair.left, pair.right): pair for pair in target.pscp.pairs}
    assert set(pairs) == {("big", "small"), ("big", "poor"), ("small", "poor")}
    assert pairs["small", "poor"].order == "robust" and pairs["small", "poor"].judged.word == "better"
    assert pairs["big", "small"].order == "depends"
    difference = pairs["big", "small"].judged.estimate
    scores = {arm.label: score.value for arm, _, score in target.pscp.ranked}
    assert difference.value == pytest.approx(scores["big"] - scores["small"]) and difference.seeds == 3
    apart = float(np.hypot(*(score.stderr for arm, _, score in target.pscp.ranked if arm.label != "poor")))
    assert difference.stderr < 1.5 * apart


def test_only_a_study_that_asks_has_it(made, target, tmp_path):
    plain = build_synthetic(tmp_path, [Truth("lora", seeds=(0,))], items=10, corpus=False)
    found = analyze_study(plain.store, plain.view, draws=50)
    assert found.targets[0].pscp is None and "pscp" not in found.summary()["targets"][0]
    said = target.pscp.summary()
    assert said["constants"]["parameters"] == 50_000 and said["operations"] == "extra"
    assert said["arms"][3]["extra_flops"]["score"] is None and said["arms"][3]["extra_flops"]["missing"]


def test_a_target_that_is_better_when_lower_has_no_score(tmp_path):
    plain = build_synthetic(tmp_path, [Truth("a", target="corpus", seeds=(0,))], items=10, corpus=False)
    made = with_flops(plain, {"a": 1.0}, PscpChoice())
    arm = analyze_study(made.store, made.view, draws=50).targets[0].pscp.arms[0]
    assert all("cross_entropy is not better when higher" in one.missing for one in arm.by.values())


def test_a_negative_cost_gives_no_score_and_leaves_the_other_definition(tmp_path):
    plain = build_synthetic(tmp_path, [Truth("a", seeds=(0,))], items=10, corpus=False)
    made = with_flops(plain, {"a": -5.0}, PscpChoice())
    arm = analyze_study(made.store, made.view, draws=50).targets[0].pscp.arms[0]
    assert arm.by[Operations.EXTRA].band is None and "negative, -5" in arm.by[Operations.EXTRA].missing
    assert arm.by[Operations.TOTAL].band.rank == 1


def test_published_inputs_give_the_published_scores_and_a_band():
    (table,) = find_tables("peft-bench/pscp-llama-3-8b")
    found = published_pscp(table, PscpChoice(operations=Operations.TOTAL))
    assert found.operations is Operations.EXTRA, "the table has no other"
    scores = {band.label: round(band.score, 2) for band in found.ranked}
    assert list(scores)[:3] == ["LNTuning", "LoRA", "BitFit"] and found.left_out == ()
    assert (scores["LNTuning"], scores["LoRA"], scores["IA3"]) == (60.19, 60.08, 55.62)
    assert ("LoRA", "LNTuning") in {(pair.left, pair.right) for pair in found.bands.of("depends")}
    lacking = table.rows[0].model_copy(update={"values": {**table.rows[0].values, "memory_max": None}})
    shorter = published_pscp(table.model_copy(update={"rows": (lacking, *table.rows[1:])}), PscpChoice())
    assert shorter.left_out == ("LoRA",) and len(shorter.bands.rows) == len(table.rows) - 1
    (other, *_) = find_tables("peft-arena")
    assert published_pscp(other, PscpChoice()) is None
