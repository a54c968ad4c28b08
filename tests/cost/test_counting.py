"""Counts of parameters and operations, against formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cost_toys import Adapter, Whole, llama
from peft import PromptTuningConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from peft_arena.core.errors import UserError
from peft_arena.cost.flops import (
    _count,
    formula_flops,
    forward_flops,
    forward_measures,
    shape_of,
    training_flops_per_token,
    training_measures,
)
from peft_arena.cost.parameters import checkpoint_measure, parameter_measures

LORA_SIZE = 5 * 8 * ((128 + 128) + (128 + 64))
"""Five layers, rank 8, of the query (128 → 128) and the value (128 → 64) projection."""


def test_parameters_of_an_adapter() -> None:
    base = llama()
    before = sum(p.numel() for p in base.parameters())
    attached = Adapter(base)
    trained, total, share = parameter_measures(attached.model, attached.trained())
    assert trained.value == LORA_SIZE
    assert total.value == before + LORA_SIZE
    assert share.value == pytest.approx(LORA_SIZE / (before + LORA_SIZE))
    assert parameter_measures(attached.model)[0].value == LORA_SIZE


def test_tied_weights_count_once() -> None:
    model = llama()
    _, total, share = parameter_measures(Whole(model).model)
    assert total.value == sum(p.numel() for p in model.parameters())
    assert total.value + 832 * 128 == sum(p.numel() for p in model.state_dict().values())
    assert share.value == 1.0


def test_checkpoint_bytes(tmp_path: Path) -> None:
    Adapter(llama()).save(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    measure = checkpoint_measure(tmp_path)
    assert measure.value == size and size == pytest.approx(4 * LORA_SIZE, rel=0.2)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert checkpoint_measure(empty).value is None
    with pytest.raises(UserError, match="no checkpoint directory"):
        checkpoint_measure(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [32, 512])
def test_forward_operations_agree_with_the_formula(length: int) -> None:
    model = llama()
    assert forward_flops(model, length) == pytest.approx(formula_flops(shape_of(model), length), rel=0.03)


def test_the_formula_by_hand() -> None:
    shape = shape_of(llama())
    layer = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384
    assert shape == (5 * layer + 128 * 832, 5, 128)
    assert formula_flops(shape, 10) == 2 * (5 * layer + 128 * 832) * 10 + 4 * 5 * 100 * 128


def test_adapter_adds_two_operations_per_weight_and_token() -> None:
    base = llama()
    plain = forward_flops(base, 64)
    assert forward_flops(Adapter(base).model, 64) - plain == 2 * LORA_SIZE * 64


def test_virtual_tokens_are_counted() -> None:
    base = llama()
    longer = forward_flops(base, 74)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    assert forward_flops(model, 64) == pytest.approx(longer, rel=0.01)


def test_full_training_costs_three_forward_passes() -> None:
    model = Whole(llama()).model
    each = training_flops_per_token(model, batch=2, length=64)
    assert each * 64 == pytest.approx(3 * forward_flops(model, 64), rel=0.1)


def test_frozen_weights_make_training_cheaper() -> None:
    full = training_flops_per_token(Whole(llama()).model, length=64)
    adapter = training_flops_per_token(Adapter(llama()).model, length=64)
    forward = forward_flops(llama(), 64) / 64
    assert 1.9 * forward < adapter < 2.4 * forward < full


def test_counting_leaves_no_trace() -> None:
    attached = Adapter(llama())
    model = attached.model
    model.train()
    for p in attached.trained().values():
        p.grad = torch.full_like(p, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    training_flops_per_token(model)
    forward_flops(model, 16)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is not None and bool((p.grad == 3).all()) for p in attached.trained().values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_measures_name_what_was_counted() -> None:
    attached = Adapter(llama())
    total, extra = forward_measures(attached.model, llama(), {"512": 512})
    assert (total.metric, extra.metric) == ("forward_flops_512", "extra_forward_flops_512")
    assert extra.value == 2 * LORA_SIZE * 512 and "flop_counter" in extra.how
    each, whole = training_measures(attached.model, tokens=1000, length=32)
    assert each.value is not None and whole.value == each.value * 1000
    assert (each.unit, whole.unit) == ("FLOPs/token", "FLOPs")


def test_what_cannot_be_counted_says_why() -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel\nmore")

    broken = llama()
    broken.register_forward_pre_hook(fails)
    total, extra = forward_measures(llama(), broken, {"8": 8})
    assert total.value is not None
    assert extra.value is None and extra.how == "not counted: RuntimeError: no kernel" and extra.n == 0


def mixtral(top: int, width: int, experts: str) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=top, experts_implementation=experts,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("top", [1, 2, 4])
def test_experts_cost_the_same_however_they_are_run(top: int) -> None:
    grouped, eager = mixtral(top, 48, "grouped_mm"), mixtral(top, 48, "eager")
    assert forward_flops(grouped, 32) == pytest.approx(forward_flops(eager, 32), rel=0.01)
    one = 2 * 2 * 3 * 32 * 48 * 32  # two layers of one expert
    assert forward_flops(grouped, 32) - forward_flops(mixtral(1, 48, "grouped_mm"), 32) == one * (top - 1)
    assert forward_flops(mixtral(top, 96, "grouped_mm"), 32) - forward_flops(grouped, 32) == one * top
    each = training_flops_per_token(Whole(grouped).model, length=32)
    assert each == pytest.approx(training_flops_per_token(Whole(eager).model, length=32), rel=0.01)


def test_products_of_vectors_count() -> None:
    a, b, v = torch.ones(3, 4), torch.ones(2, 4, 5), torch.ones(4)
    assert _count(lambda: torch.mv(a, v)) == 24
    assert _count(lambda: torch.addmv(torch.ones(3), a, v)) == 24
    assert _count(lambda: torch.dot(v, v)) == 8
    assert _count(lambda: torch.addbmm(torch.ones(3, 5), a.expand(2, 3, 4), b)) == 2 * 2 * 3 * 4 * 5


def test_a_product_without_a_known_cost_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_arena.cost.flops.products", dict)
    (measure, _) = training_measures(Whole(mixtral(2, 48, "grouped_mm")).model, 10, length=8)
    assert measure.value is None and "_grouped_mm" in measure.how and "not known" in measure.how
