"""How a run begins on models of many families: what can be adapted, what a plan refuses, what is proved first."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_arena.commands.export_command import export
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.export.export_record import on_base
from peft_arena.methods.adaptable import left_out, notice
from peft_arena.methods.base import Attached, Calibration, CalibrationError
from peft_arena.methods.low_rank.lora import Lora
from peft_arena.methods.registry import make_method
from peft_arena.models.load import load
from peft_arena.study.attachable import Attachable, on_shapes, on_stand_in
from peft_arena.study.read_study import method_spec

from .zoo import FAMILIES, USUAL, tiny, write


def meta(family: str) -> PreTrainedModel:
    """Return a tiny model without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**USUAL, **FAMILIES[family]})
        )
    return model.eval()


def leaves(found: Mapping[str, str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in found}


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama", set()),
        ("bloom", set()),
        ("mixtral", set()),
        ("deepseek_v3", set()),
        ("jamba", {"dt_proj"}),
        ("mamba", {"x_proj", "dt_proj", "out_proj"}),
        ("mamba2", {"out_proj"}),
        ("falcon_h1", {"out_proj"}),
        ("llama4_text", {"router"}),
    ],
)
def test_layers_no_adapter_can_act_on_are_known_with_and_without_weights(family: str, wanted: set[str]) -> None:
    model = tiny(family)
    assert leaves(left_out(model)) == wanted
    assert left_out(meta(family)) == left_out(model)
    assert bool(notice(model)) == bool(wanted)


def test_a_weight_that_stands_at_two_places_is_left_out() -> None:
    model: Any = tiny("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    assert set(left_out(model)) == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    assert leaves(left_out(model)) == {"up_proj"}


class ReadsWeight(nn.Module):
    """Two layers, one of which is never called and one read by a helper."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.idle = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.called.forward(_product(hidden, self.read))
        return self.experts[0](hidden)


def _product(hidden: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    return functional.linear(hidden, layer.weight)


def test_a_layer_that_is_never_called_is_left_out_and_an_expert_without_tokens_is_not() -> None:
    model: Any = tiny("llama")
    model.model.layers[0].mlp = ReadsWeight()
    assert leaves(left_out(model)) == {"read", "idle"}
    with pytest.raises(UserError, match=r"targets: model.layers.0.mlp.read cannot be adapted: the model never calls"):
        make_method("lora", {"targets": ["read", "q_proj"]}).attach(model, seed=0)
    attached = make_method("lora", {"rank": 2}).attach(model, seed=0)
    assert not any(".read." in name or ".idle." in name for name in attached.trained())
    assert any("experts.1" in name for name in attached.trained())


class Fails(nn.Module):
    """Ends in an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.inner = nn.Linear(32, 32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("error", [NotImplementedError("no values"), RuntimeError("sizes"), TypeError("meta to numpy")])
def test_a_module_that_needs_values_hides_nothing_of_the_others(error: Exception) -> None:
    model: Any = meta("llama")
    model.model.layers[0].mlp = Fails(error)
    model.model.layers[1].mlp = ReadsWeight()
    assert leaves(left_out(model)) == {"read", "idle"}, "inner is not proved to be idle"


@pytest.mark.parametrize("error", [AssertionError("ours"), ZeroDivisionError("ours"), torch.OutOfMemoryError("full")])
def test_an_error_that_is_no_refusal_is_not_swallowed(error: Exception) -> None:
    for model in (meta("llama"), tiny("llama")):
        inner: Any = model.model
        inner.layers[0].mlp = Fails(error)
        with pytest.raises(type(error)):
            left_out(model)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "zamba2"])
@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_what_was_trained_is_read_back_although_peft_rewrites_its_settings(
    family: str, name: str, tmp_path: Path
) -> None:
    model = tiny(family)
    fresh = copy.deepcopy(model)
    ids = torch.arange(6, 18)[None]
    method = make_method(name, {"rank": 2})
    attached = method.attach(model, seed=0)
    before = dict(attached.trained())
    with torch.no_grad():
        for parameter in before.values():
            parameter.add_(0.05)
    attached.save(tmp_path / "saved")
    restored = method.restore(fresh, tmp_path / "saved")
    with torch.no_grad():
        one, other = (found.model.eval()(input_ids=ids).logits for found in (attached, restored))
    assert torch.allclose(one, other, atol=1e-4)


def test_many_names_of_layers_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **{**USUAL, "num_hidden_layers": 12})
    model, fresh = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    method = make_method("lora", {"rank": 2, "targets": ["q_proj", "v_proj"], "layers": list(range(11))})
    method.attach(model, seed=0).save(tmp_path / "saved")
    method.restore(fresh, tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "config", "family", "said"),
    [
        (
            "dora",
            {"targets": ["dt_proj"], "rank": 2},
            "jamba",
            "targets: model.layers.0.mamba.dt_proj cannot be adapted",
        ),
        ("oft", {"block_size": 8}, "deepseek_v3", "oft cannot be attached to deepseek_v3: "),
        ("prefix_tuning", {"num_virtual_tokens": 4}, "falcon", "prefix_tuning cannot be attached to falcon: "),
        ("ln_tuning", {}, "zamba2", "ln_tuning cannot be trained on zamba2: AttributeError: "),
        ("ln_tuning", {}, "mamba2", "ln_tuning cannot be trained on mamba2: AttributeError: "),
        ("ln_tuning", {}, "llama", ""),
        ("prefix_tuning", {"num_virtual_tokens": 4}, "deepseek_v2", "prefix_tuning cannot be attached to deepseek_v2"),
        ("oft", {"block_size": 4}, "deepseek_v2", "oft cannot be attached to deepseek_v2: "),
        ("lora", {"rank": 64}, "llama", "rank: 64 is above"),
        ("lora", {"rank": 2}, "deepseek_v3", ""),
        ("hra", {"rank": 4}, "llama", ""),
        ("lora_ga", {"rank": 2}, "llama", ""),
    ],
)
def test_a_plan_refuses_what_training_would(name: str, config: dict[str, Any], family: str, said: str) -> None:
    method = make_method(name, config)
    found = on_shapes(method, meta(family))
    if found is None:
        found = on_stand_in(method, meta(family))
    assert found.startswith(said) and "\n" not in found
    assert bool(found) == bool(said)


def test_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ARENA_CACHE", str(tmp_path / "cache"))
    spec = ModelSpec(name=str(write("jamba", tmp_path / "jamba")))
    method = make_method("lora", {"targets": ["dt_proj"], "rank": 2})
    first = Attachable(spec).refusal(method, method_spec("lora", method))
    assert "dt_proj cannot be adapted" in first
    again = Attachable(spec)
    monkeypatch.setattr(Attachable, "_tried", lambda *_: pytest.fail("tried again"))
    assert again.refusal(method, method_spec("lora", method)) == first


class Doubting(Lora):
    """Finds fault with whatever data it is given."""

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        raise CalibrationError("rank: the examples are too few")


def test_data_that_the_plan_made_up_refuses_no_method() -> None:
    """What a plan tries a method on is not the run's data."""
    assert on_shapes(Doubting(), meta("llama")) is None
    assert on_stand_in(Doubting(), meta("llama")) == ""
    long = make_method("cartridge", {"num_virtual_tokens": 20, "calibration_examples": 1})
    assert on_shapes(long, meta("llama")) is None
    assert on_stand_in(long, meta("llama")) == "", "two rows of eight tokens are the plan's, not the user's"


def test_a_library_is_not_believed_where_the_model_itself_needs_values() -> None:
    model = meta("llama")
    model.model.norm = NeedsValues()
    assert on_shapes(make_method("lora", {"rank": 2}), model) is None


class NeedsValues(nn.Module):
    """Computes with numbers that only the CPU has."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.zeros(hidden.shape[-1], device="cpu")


@pytest.mark.parametrize(("family", "refused"), [("deepseek_v3", True), ("llama", False)])
def test_an_adapter_that_peft_alone_takes_for_the_experts_is_read_here_and_not_exported(
    family: str, refused: bool, tmp_path: Path
) -> None:
    """DeepSeek's dense layers have the names that its experts had before they were fused, and peft renames by name."""
    write(family, tmp_path / "model")
    attached = make_method("lora", {"rank": 2}).attach(tiny(family), seed=0)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.normal_(std=0.1)
    attached.save(tmp_path / "adapter")
    ids = torch.arange(12).reshape(2, 6)
    wanted = attached.model.eval()(ids, use_cache=False).logits
    point = on_base(tmp_path / "adapter", str(tmp_path / "model"))
    found = point.model(load(point.base))(ids, use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-5) and wanted.std() > 0.01
    said = "peft alone would read another model .* merge writes the whole"
    with pytest.raises(UserError, match=said) if refused else nullcontext():
        export(str(tmp_path / "adapter"), tmp_path / "plain", "adapter", base=str(tmp_path / "model"))
    assert (tmp_path / "plain").exists() != refused
