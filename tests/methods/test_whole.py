"""Modules that train as a whole beside an adapter, on every way that a method saves one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_arena.core.errors import UserError
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.methods.targets import AdaptedConfig
from peft_arena.testing.methods import CHECKS, Subject, Trial, difference, logits, run_check, tiny_model, tokens, train
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.effective import effective_weights
from peft_arena.weights.forms import closed_form
from tests.methods.settings import SETTINGS

pytestmark = pytest.mark.spread
WAYS = ("adamss", "adalora", "boft", "dora", "lily", "lora", "lora_fa", "lora_plus", "osf", "pissa", "poly", "svft")
"""One method or more of each kind of attachment and of checkpoint."""
TRIED = ("start", "count", "training", "state", "resume", "disabled", "checkpoint", "peft_adapter", "lora_adapter")
TRIED += ("merge", "weights", "path", "mixed_precision", "damage")
ENDS = ("lm_head", "embed_tokens")


@pytest.mark.parametrize("name", WAYS)
def test_a_method_does_what_its_card_says_with_a_module_beside_it(name: str, tmp_path: Path) -> None:
    settings = dict(SETTINGS[name])
    config = {**settings.pop("config", {}), "modules_to_save": ("norm",)}
    awkward = settings.pop("awkward", None)
    trial = Trial(
        name,
        config,
        directory=tmp_path,
        awkward=None if awkward is None else {**awkward, "modules_to_save": ("norm",)},
        **settings,
    )
    for check in TRIED:
        assert check in CHECKS
        run_check(trial, check)
    life = trial.life("untied")
    assert "model.norm.modules_to_save.default.weight" in " ".join(life.attached.trained())
    stored = load_file(life.saved / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    assert difference(stored, life.subject.model().model.norm.weight) > 0, "it was trained"


def test_the_setting_is_not_written_at_its_default() -> None:
    for name in METHODS.own():
        kind = METHODS.get(name).Config
        if issubclass(kind, AdaptedConfig):
            given = dict(SETTINGS[name].get("config", {}))
            assert "modules_to_save" not in make_method(name, given).config.model_dump(mode="json")
            given["modules_to_save"] = ["norm"]
            assert make_method(name, given).config.model_dump(mode="json")["modules_to_save"] == ["norm"]


@pytest.mark.parametrize("name", ["lora", "pissa", "osf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ends_of_the_model_round_trip(name: str, dtype: str, tmp_path: Path) -> None:
    config = {**SETTINGS[name].get("config", {}), "modules_to_save": ENDS}
    subject = Subject(METHODS.get(name), config, dtype=dtype)
    attached = subject.attach()
    limit = 1e-5 if dtype == "float32" else 0.25
    assert difference(logits(attached.model, tokens()), logits(subject.model(), tokens())) <= limit
    losses, reached = train(attached, 5e-3)
    assert losses[-1] < losses[0]
    assert {part for part in ENDS if any(part in found for found in reached)} == set(ENDS)
    tuned = logits(attached.model, tokens())
    attached.save(tmp_path / "saved")
    restored = subject.make().restore(subject.model(), tmp_path / "saved")
    assert difference(logits(restored.model, tokens()), tuned) <= limit
    base = BaseWeights.of_model(subject.model())
    found = closed_form(base, tmp_path / "saved")
    assert found is not None and {"lm_head.weight", "model.embed_tokens.weight"} <= set(found.makers)
    model = subject.model()
    effective_weights(base, tmp_path / "saved", subject.make()).load_into(model)
    assert difference(logits(model, tokens()), tuned) <= 10 * limit
    merged = attached.merged()
    assert difference(logits(merged, tokens()), tuned) <= 10 * limit
    assert {p.dtype for p in merged.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("untied", {"modules_to_save": ("nrom",)}, "unknown module 'nrom'.*modules_to_save.*Did you mean 'norm'"),
        ("untied", {"modules_to_save": ("layers",)}, "holds model.layers.0.mlp.down_proj, which trains already"),
        ("untied", {"modules_to_save": ("q_proj",)}, "q_proj holds an adapter, which trains already"),
        ("untied", {"modules_to_save": ("layers",), "targets": ("lm_head",)}, "lm_head"),
        ("untied", {"modules_to_save": ("act_fn",)}, "without weights of its own to train"),
        ("untied", {"modules_to_save": ("mlp", "gate_proj"), "targets": ("q_proj",)}, "which trains already"),
        ("tied", {"modules_to_save": ("lm_head",)}, r"the weight of lm_head is one with model.embed_tokens.weight"),
        ("tied", {"modules_to_save": ("embed_tokens",)}, r"one with lm_head.weight"),
    ],
)
def test_modules_that_cannot_train_as_a_whole(kind: Any, settings: dict[str, Any], message: str) -> None:
    subject = Subject(METHODS.get("lora"), settings, kind=kind)
    for ask in (subject.attach, partial(subject.make().trained_count, subject.model())):
        with pytest.raises(UserError, match=message):
            ask()


def test_a_checkpoint_with_other_modules_is_refused(tmp_path: Path) -> None:
    make_method("lora", {"modules_to_save": ["norm"]}).attach(tiny_model(), seed=0).save(tmp_path / "one")
    for other in ([], ["lm_head"], ["input_layernorm"]):
        with pytest.raises(UserError, match="modules_to_save = "):
            make_method("lora", {"modules_to_save": other}).restore(tiny_model(), tmp_path / "one")
