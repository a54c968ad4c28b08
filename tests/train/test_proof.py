"""What a run proves before hours are spent: its start, and that its checkpoints can be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.specs import Schedule
from peft_arena.methods.base import Attached
from peft_arena.methods.full.full import Full
from peft_arena.methods.low_rank.lora import Lora, LoraConfig
from peft_arena.methods.low_rank.pissa import Pissa
from peft_arena.models.load import load_model as plain_model
from peft_arena.models.load import resolve
from peft_arena.train.proof import Proof, relative
from peft_arena.train.run import finish
from peft_arena.train.sft import train_sft

from .toy import ToyTask, load_model, open_run, run_spec


class Moved(Lora):
    """LoRA whose B does not start at zero in one layer."""

    def finish(self, model: Any) -> None:
        """Move it."""
        super().finish(model)
        with torch.no_grad():
            model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.fill_(0.3)


class Refused(Lora):
    """LoRA that reads other settings than it wrote."""

    def stored_config(self, patterns: list[str]) -> Any:
        """Return another rank."""
        config: Any = super().stored_config(patterns)
        config.lora_alpha *= 2
        return config


class Forgets(Lora):
    """LoRA that reads its checkpoint and loses it."""

    def restore(self, model: Any, directory: Path) -> Attached:
        """Read, then zero B."""
        attached = super().restore(model, directory)
        with torch.no_grad():
            for name, parameter in attached.model.named_parameters():
                if ".lora_B." in name:
                    parameter.zero_()
        return attached


class Clashes(Lora):
    """LoRA on a model whose code for training asks for what is not there."""

    def finish(self, model: Any) -> None:
        """Ask for it."""
        super().finish(model)
        model.register_forward_pre_hook(lambda module, _: module.nothing_of_the_kind if module.training else None)


def train(root: Path, model_dir: Path, method: Any, dtype: str = "float32", **changes: Any) -> tuple[Any, list[int]]:
    spec = run_spec(model_dir, dtype=dtype, **changes)
    run, loaded = open_run(root, spec), load_model(model_dir, dtype)
    task, steps = ToyTask(), []
    proof = Proof(spec, loaded, task, method, lambda: plain_model(resolve(spec.model), spec.model))
    attached = method.attach(loaded.model, seed=0)
    proof.start(attached)
    try:
        outcome = train_sft(
            run, loaded, attached, task, progress=False, on_step=lambda info: steps.append(info.step), proof=proof
        )
    except UserError as error:
        assert not list(run.path.glob("*.part")) and not list(run.path.glob(".*.part"))
        raise UserError(f"after {len(steps)} steps: {error}") from None
    finish(run, outcome.record)
    return run, steps


@pytest.mark.parametrize("kind", [Lora, Pissa])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sound_methods_prove_themselves(tmp_path: Path, model_dir: Path, kind: Any, dtype: str) -> None:
    run, steps = train(tmp_path, model_dir, kind(kind.Config(rank=4)), dtype, schedule=Schedule(steps=22))
    assert len(steps) == 22
    assert sorted(path.name for path in run.path.iterdir() if path.name.startswith(".proof")) == []


def test_a_start_that_is_not_the_base_is_refused_and_the_module_named(tmp_path: Path, model_dir: Path) -> None:
    said = r"lora would not start at the pretrained model, .* first in model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(UserError, match=said):
        train(tmp_path, model_dir, Moved(LoraConfig(rank=4)))


def test_what_a_library_refuses_in_the_first_step_is_one_line(tmp_path: Path, model_dir: Path) -> None:
    said = "^after 0 steps: toy cannot be trained on llama: AttributeError: .*nothing_of_the_kind.*$"
    with pytest.raises(UserError, match=said):
        train(tmp_path, model_dir, Clashes(LoraConfig(rank=4)))


@pytest.mark.parametrize(("kind", "said"), [(Refused, "lora_alpha"), (Forgets, "is not the model that was trained")])
@pytest.mark.parametrize(("steps", "done"), [(40, 0), (12, 5)])
def test_a_checkpoint_that_cannot_be_read_ends_the_run_early(
    tmp_path: Path, model_dir: Path, kind: Any, said: str, steps: int, done: int
) -> None:
    with pytest.raises(UserError, match=f"after {done} steps: the checkpoint of method lora .*{said}"):
        train(tmp_path, model_dir, kind(LoraConfig(rank=4)), schedule=Schedule(steps=steps), learning_rate=0.5)


def test_a_run_without_memory_for_a_second_model_goes_on_unread(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    method = Full(Full.Config())
    run, steps = train(tmp_path, model_dir, method, schedule=Schedule(steps=12))
    unread = [event for event in run.events() if event["event"] == "checkpoint_not_read_back"]
    assert len(steps) == 12
    assert [event["checkpoint"] for event in unread] == ["of step 6"]
    assert "1000 are free" in unread[0]["reason"]


def test_training_is_the_same_with_and_without_a_proof(tmp_path: Path, model_dir: Path) -> None:
    run, _ = train(tmp_path / "a", model_dir, Lora(LoraConfig(rank=4)), schedule=Schedule(steps=24))
    spec = run_spec(model_dir, schedule=Schedule(steps=24))
    plain, loaded = open_run(tmp_path / "b", spec), load_model(model_dir)
    attached = Lora(LoraConfig(rank=4)).attach(loaded.model, seed=0)
    outcome = train_sft(plain, loaded, attached, ToyTask(), progress=False)
    assert [entry.loss for entry in outcome.record.log] == [entry.loss for entry in run.training().log]


def test_relative_difference() -> None:
    wanted = torch.tensor([1.0, -1.0])
    assert relative(wanted, wanted) == 0
    assert relative(wanted + 0.5, wanted) == pytest.approx(0.5)
    assert not relative(torch.tensor([float("nan"), 0.0]), wanted) <= 1
    assert relative(torch.zeros(3), wanted) == float("inf")
