"""Activations computed again instead of kept: the same training, bit for bit."""

from __future__ import annotations

import pytest
import torch

from peft_arena.core.specs import RunSpec
from peft_arena.methods.registry import make_method, method_of
from peft_arena.models.load import load
from peft_arena.store.store import Store
from peft_arena.study.read_study import study_from
from peft_arena.tasks.registry import task_of
from peft_arena.train.recompute import recomputes
from peft_arena.train.run import finish, train_run

TRAIN = {"schedule": {"steps": 3}, "batch_size": 4, "learning_rate": 1e-3, "validation_items": 4}
GRPO = {"objective": "grpo", "batch_size": 8, "group_size": 4}


def spec_of(dtype: str, train: dict) -> RunSpec:
    arm = {"method": "lora", "config": {"dropout": 0.2}, "train": train}
    data = {"name": "t", "title": "t", "model": {"name": "micro", "dtype": dtype}, "train": TRAIN, "arms": [arm]}
    return study_from({**data, "targets": [{"task": "micro-months"}], "seeds": [0]}).arms[0].runs[0]


def trained(root, spec: RunSpec, recompute: bool):
    run = Store(root).run(spec)
    run.create()
    loaded = load(spec.model)
    attached = method_of(spec.method).attach(loaded.model, seed=0)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        outcome = train_run(run, loaded, attached, task_of(spec.train.task), progress=False, recompute=recompute)
    finish(run, outcome.record)
    weights = (run.checkpoint(outcome.record.steps) / "adapter_model.safetensors").read_bytes()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in loaded.model.modules())
    return weights, [entry.loss for entry in outcome.record.log], kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [{}, GRPO], ids=["sft", "grpo"])
def test_recomputing_changes_no_bit(tmp_path, dtype, train):
    spec = spec_of(dtype, train)
    weights, losses, kept = trained(tmp_path / "kept", spec, recompute=False)
    again, repeated, fewer = trained(tmp_path / "again", spec, recompute=True)
    assert again == weights
    assert repeated == losses
    assert fewer != kept, "activations were kept as before"


def test_methods_with_keys_and_values_keep_their_activations():
    cards = {
        name: make_method(name, {}, "t").card for name in ("lora", "prompt_tuning", "prefix_tuning", "p_tuning_v2")
    }
    assert {name: recomputes(card) for name, card in cards.items()} == {
        "lora": True, "prompt_tuning": True, "prefix_tuning": False, "p_tuning_v2": False,
    }  # fmt: skip
