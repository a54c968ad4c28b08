"""The conformance suite of methods finds what is wrong, and takes methods in every form."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from peft_arena.methods.low_rank.lora import Lora, LoraConfig
from peft_arena.testing.methods import CHECKS, check_method, method_tests, run_check
from peft_arena.testing.trial import Trial
from tests.testing import broken_methods as broken
from tests.testing.test_method_suite_more import BROKEN as MORE

SMALL: dict[str, Any] = {"targets": ["q_proj", "down_proj"]}
BROKEN: list[tuple[type, str, str, dict[str, Any]]] = [
    (broken.HasUndocumented, "card", "strength has no docstring", {}),
    (broken.KnownUnderNoName, "card", "known_failures names mergin", {}),
    (broken.NotReallyQuantized, "quantized_base", "attaches to a plain one", {}),
    (broken.UsesGlobalSeed, "start", "random state changed", {}),
    (broken.TrainsHead, "start", "weights of the base train", {}),
    (broken.ClaimsIdentity, "start", "declares identity_at_init", {"num_virtual_tokens": 6}),
    (broken.ClaimsVectors, "start", "0 trained vectors are seen before the input", {}),
    (broken.LeavesTrainingMode, "mode", "out of training mode", {}),
    (broken.CountsWrongly, "count", r"count\(\) says", {}),
    (broken.CountsNothing, "count", r"count\(\) says None", {}),
    (broken.CountsByWeights, "count", "without weights", {}),
    (broken.TrainsHead, "training", "base changed: True", {}),
    (broken.Climbs, "training", "loss did not fall", {}),
    (broken.MovesUnderAutocast, "mixed_precision", "under autocast the output moved", {}),
    (broken.BreaksUnderAutocast, "mixed_precision", "loss did not fall in mixed precision", {}),
    (broken.GrowsWithEveryCall, "recompute", "recomputing activations changes gradients", {}),
    (broken.ClaimsKeysAndValues, "recompute", "can be recomputed, and the card declares keys_and_values", {}),
    (broken.TakesAnyState, "state", "took a state that does not fit", {}),
    (broken.ForgetsProjection, "state", "depends on the seed", {"rank": 8}),
    (broken.CountsSteps, "resume", "resumed after step 2", {}),
    (broken.OddMoments, "resume", "no tensor", {}),
    (broken.StaysOn, "disabled", "away from the pretrained model", {}),
    (broken.SavesNothing, "checkpoint", "away from the saved one", {"block_size": 4}),
    (broken.AnyProjection, "checkpoint", "global random state changed", {"rank": 8}),
    (broken.NamesAnotherBase, "peft_adapter", "names gpt2 as its base model", {}),
    (broken.WritesWhatItNeverReads, "damage", "restored without notes.txt", {}),
    (broken.DoraForServers, "lora_adapter", "use_dora = True", {}),
    (broken.MissForServers, "lora_adapter", "peft_type = 'MISS'", {}),
    (broken.WrongScaleInFile, "lora_adapter", "away from the tuned model", {}),
    (broken.MergesTwice, "merge", "the merged model is", {}),
    (broken.WrongScaleInFile, "weights", "read from the checkpoint is", {}),
    (broken.SaysRotation, "path", "the card says that the path is cayley, the weights go linear", {}),
    (broken.SaysNoPath, "path", "names no path", {}),
    (broken.TurnsBySeries, "path", "no rotation", {"block_size": 8, "neumann_terms": 5}),
    (broken.GeneratesAnything, "generation", "does not follow the logits", {}),
    (broken.WornBySampling, "online_rl", "a rollout left changed: values of worn", {}),
    (broken.DrawsFromOthers, "online_rl", "cannot be decoded here: its logits after a token depend on", {}),
    (broken.RemembersReference, "online_rl", "nats away from the pretrained model", {}),
    (broken.LearnsLongRowsFaster, "online_rl", "the gradient of", {}),
    (broken.FreezesByStep, "online_rl", "had a gradient and did not move", {}),
    (broken.MixesRows, "online_rl", "depend on the other rows", {"rank": 8, "routing": "batch"}),
    (broken.NoCalibrationAsked, "calibration", "calibration_examples is 0", {}),
    (broken.TakesNoCalibration, "calibration", "attaches without calibration data", {}),
    (broken.NoSizes, "sizes", "offers no rank", {}),
    (broken.FallingSizes, "sizes", "does not grow", {}),
    (broken.ClipsRank, "sizes", "is silently taken for", {}),
    (broken.TakesAnyRank, "sizes", "rank=-1 is taken", {}),
    (broken.DeniesItsSeed, "seeds", "another seed changes the start: True", {}),
    (broken.IgnoresAlpha, "fields", "setting alpha to 4.0 changed nothing", {}),
    (broken.Remembers, "fresh_process", "in a new process it is", {}),
    (broken.WronglyKnownToFail, "merge", "does not fail; remove it", {}),
]


@pytest.mark.parametrize(
    ("method", "check", "reason", "config"),
    BROKEN,
    ids=[f"{method.__name__}-{check}" for method, check, _, _ in BROKEN],
)
def test_the_suite_finds_broken_methods(method: Any, check: str, reason: str, config: dict[str, Any]) -> None:
    targets = {} if "targets" not in method.Config.model_fields else SMALL
    with pytest.raises(AssertionError, match=reason):
        run_check(Trial(method, {**targets, **config}), check)


def test_every_check_can_fail() -> None:
    assert {check for _, check, _, _ in BROKEN} | {check for _, check, _ in MORE} == set(CHECKS)


def test_a_known_failure_must_fail_and_nothing_else_may() -> None:
    trial = Trial(broken.KnownToFail, SMALL)
    run_check(trial, "fields")
    run_check(trial, "start")


def test_layers_of_other_ranks_and_scales_are_a_plain_lora() -> None:
    trial = Trial(broken.PatternsForServers, {"rank": 8})
    for check in ("count", "lora_adapter"):
        run_check(trial, check)


def test_a_method_that_was_made_in_a_function_is_named_and_not_lost() -> None:
    class Local(Lora):
        pass

    with pytest.raises(AssertionError, match="define it at the top level of a module"):
        run_check(Trial(Local, SMALL), "fresh_process")


def test_a_method_with_its_settings_takes_no_others() -> None:
    with pytest.raises(AssertionError, match="give no config"):
        check_method(Lora(), {"rank": 4})


test_in_a_file_of_ones_own = method_tests(Lora(LoraConfig(rank=2, targets=("v_proj",))))


def test_the_public_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; from peft_arena.testing import check_method, check_task, method_tests; "
        "print({'torch', 'peft', 'transformers', 'pytest'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
