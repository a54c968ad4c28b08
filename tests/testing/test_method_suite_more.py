"""The conformance suite of methods finds what is wrong in learning, evaluating, computing and sharing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peft_arena.methods.low_rank.lora import Lora, LoraConfig
from peft_arena.store.conformance import MethodRecord, conformance_text, read_conformance
from peft_arena.testing.methods import CHECKS, check_method, record_of, run_check
from peft_arena.testing.trial import Trial
from tests.testing import broken_learning as broken

SMALL: dict[str, Any] = {"targets": ["q_proj", "v_proj", "down_proj"]}
BROKEN: list[tuple[type, str, str]] = [
    (broken.DropsInEvaluation, "evaluation", "with dropout = 0.5, two evaluations"),
    (broken.NoisyEvaluation, "evaluation", "two evaluations of the trained model differ"),
    (broken.StuckInTraining, "evaluation", "in evaluation mode has modules in training mode"),
    (broken.FixedRate, "optimizer", "not those of parameter_groups"),
    (broken.PromisesFixedRate, "optimizer", "at a learning rate of"),
    (broken.ForgetsGroups, "optimizer", "not those of parameter_groups"),
    (broken.IgnoresSchedule, "optimizer", "ignores a schedule"),
    (broken.ResetsSchedule, "optimizer", "changes rates that a schedule has set"),
    (broken.IgnoresDecay, "optimizer", "ignores weight decay"),
    (broken.DecaysTwice, "optimizer", r"does 1\.9 times what is asked for"),
    (broken.NegatesAGradient, "gradients", "gradients are not those of the loss"),
    (broken.HalvesAGradient, "gradients", "gradients are not those of the loss"),
    (broken.TrainsDoubles, "gradients", "in training mode the outputs are"),
    (broken.MergesByDefault, "settings", "with every setting changed, the merged model is"),
    (broken.SaysChangesByDefault, "settings", "with every setting changed, delta of"),
    (broken.NeverDecays, "optimizer", "is a matrix and gets no weight decay"),
    (broken.IgnoresClipping, "optimizer", "whose gradients are zero"),
    (broken.ForgetsFirstPass, "gradients", "do not add up"),
    (broken.ExtraByRow, "gradients", "depends on the batch size"),
    (broken.StaysOffAfterError, "disabled", "not undone after an error"),
    (broken.SwallowsErrors, "disabled", "swallowed an error"),
    (broken.RestoresDefaults, "settings", "the restored model is .* away from the saved one"),
    (broken.RestoresAnySettings, "settings", "took a checkpoint of other settings"),
    (broken.SavesHalf, "checkpoint", "away from"),
    (broken.SavesAndThaws, "checkpoint", "saving changed"),
    (broken.SeesLaterTokens, "rows", "tokens after it"),
    (broken.SeesOtherRows, "rows", "the other rows of its batch"),
    (broken.KnowsItsPlace, "rows", "the other rows of its batch|its place in the batch"),
    (broken.IgnoresTheMask, "rows", "padding on its left"),
    (broken.DoublesScale, "equation", "away from that of the card's equation"),
    (broken.ForgetsRank, "equation", "with rank = 4"),
    (broken.SaysRoot, "equation", r"alpha / sqrt\(rank\)"),
    (broken.Transposes, "equation", "away from that of the card's equation"),
    (broken.NoEquation, "card", "cannot be read"),
    (broken.CallsAnything, "card", "its equation calls eval"),
    (broken.SharesWeights, "apart", "share memory|begins elsewhere"),
    (broken.CleansTheBase, "apart", "only to look at"),
    (broken.MovesBuffers, "apart", "buffers of the base are not what they were"),
    (broken.LeavesHooks, "merge", "has hooks left"),
    (broken.ForgetsItsChange, "merge", "is another when asked again"),
    (broken.MergesAgain, "merge", "merges again"),
]
FIRST = {broken.CleansTheBase: ("count",), broken.MovesBuffers: ("checkpoint",)}
"""Checks in which these do what the last one finds."""


@pytest.mark.parametrize(
    ("method", "check", "reason"), BROKEN, ids=[f"{method.__name__}-{check}" for method, check, _ in BROKEN]
)
def test_the_suite_finds_broken_methods(method: Any, check: str, reason: str) -> None:
    trial = Trial(method, SMALL)
    for before in FIRST.get(method, ()):
        run_check(trial, before)
    with pytest.raises(AssertionError, match=f"check {check}: .*{reason}"):
        run_check(trial, check)


@pytest.mark.parametrize("check", sorted({check for _, check, _ in BROKEN} - {"apart"}))
def test_their_unbroken_twin_passes(check: str, twin: Trial) -> None:
    assert run_check(twin, check).passed


@pytest.fixture(scope="module")
def twin() -> Trial:
    return Trial(broken.Held, SMALL)


def test_no_weight_decay_is_allowed_where_the_card_says_why() -> None:
    assert run_check(Trial(broken.ExplainsNoDecay, SMALL), "optimizer").passed


def test_other_gradients_are_allowed_where_the_card_says_so() -> None:
    result = run_check(Trial(broken.SaysOtherGradients, SMALL), "gradients")
    assert result.passed and result.not_tested == {"gradients on the slopes of the loss": "so that a test can see it"}


def test_what_is_not_stated_is_not_tested() -> None:
    assert run_check(Trial(broken.Unstated, SMALL), "equation").not_tested == {
        "equation": "the card states no equation"
    }
    left = run_check(Trial(broken.PlainPrompt, {"num_virtual_tokens": 6}, learning_rate=5e-2), "rows").not_tested
    assert left == {"rows on rows padded on the left": "the arena never pads them so for this method"}


def test_the_record_says_what_was_tried_found_and_not_tested(tmp_path: Any) -> None:
    record = check_method(Lora(LoraConfig(rank=4, targets=("q_proj",))))
    assert set(record.passed) | set(record.not_tested) == set(CHECKS)
    assert record.not_tested["calibration"] == "the method takes no calibration data"
    assert record.config["rank"] == 4 and record.name == "lora" and record.source.startswith("peft-arena ")
    assert record.models["untied"].parameters == 2 * 4 * (64 + 64) and "torch" in record.versions
    file = tmp_path / "records.json"
    file.write_text(conformance_text({"lora": record}))
    (read,) = read_conformance(file).values()
    assert read.passed == record.passed and read.config == json.loads(json.dumps(dict(record.config)))
    assert MethodRecord.model_validate_json(record.model_dump_json()) == record


def test_a_known_failure_is_in_the_record() -> None:
    from tests.testing.broken_methods import KnownToFail

    trial = Trial(KnownToFail, SMALL)
    record = record_of(trial, [run_check(trial, "fields")])
    assert record.known_failures == {"fields": "alpha is ignored"} and not record.passed
