"""Facts about single methods, each checked against an independent computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached
from peft_arena.methods.registry import make_method
from peft_arena.testing.methods import MERGE, difference, logits, tiny_model, tokens, train

Q = "model.layers.0.self_attn.q_proj"


def attach(
    name: str, config: dict[str, Any] | None = None, *, kind: Any = "untied", dtype: str = "float32"
) -> Attached:
    return make_method(name, config).attach(tiny_model(kind, dtype), seed=0)


def test_lora_delta_is_scaled_product() -> None:
    for name, scale in (("lora", 16 / 4), ("rslora", 16 / 2)):
        attached = attach(name, {"rank": 4})
        train(attached, 5e-3, steps=2)
        weights = dict(attached.model.named_parameters())
        b, a = (weights[f"base_model.model.{Q}.lora_{part}.default.weight"] for part in "BA")
        torch.testing.assert_close(attached.delta(Q), (scale * b @ a).detach(), atol=1e-6, rtol=1e-5)
        assert attached.delta("lm_head") is None


def test_lora_plus_gives_b_its_own_rate() -> None:
    attached = attach("lora_plus", {"lr_ratio": 8.0})
    slow, fast = attached.parameter_groups(1e-3, 0.1)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3) and slow["weight_decay"] == fast["weight_decay"] == 0.1
    assert all(bool((p == 0).all()) for p in fast["params"]) and all(bool((p != 0).any()) for p in slow["params"])


def test_scales_and_biases_do_not_decay() -> None:
    for name in ("ia3", "bitfit", "ln_tuning"):
        assert [group["weight_decay"] for group in attach(name).parameter_groups(1e-3, 0.1)] == [0.0]
    decay = {p.ndim: g["weight_decay"] for g in attach("dora").parameter_groups(1e-3, 0.1) for p in g["params"]}
    assert decay == {1: 0.0, 2: 0.1}
    assert attach("lora", {"rank": 1}).parameter_groups(1e-3, 0.1)[0]["weight_decay"] == 0.1


def test_dora_is_the_base_model_at_the_start_in_bfloat16() -> None:
    pretrained = logits(tiny_model(dtype="bfloat16"), tokens())
    assert difference(logits(attach("dora", dtype="bfloat16").model, tokens()), pretrained) == 0


def test_oft_rotation_is_orthogonal_only_with_the_exact_transform() -> None:
    found = {}
    for terms in (None, 5):
        attached = attach("oft", {"block_size": 16, "neumann_terms": terms, "targets": ["q_proj"]})
        train(attached, 5e-2, steps=4)
        before = tiny_model().get_submodule(Q).weight.detach()
        tuned = before + attached.delta(Q)
        found[terms] = difference(tuned @ tuned.T, before @ before.T)
    assert found[None] < 1e-4 < 1e-2 < found[5]


def test_peft_computes_three_neumann_terms_as_four() -> None:
    from peft.tuners.oft.layer import OFTRotationModule

    q = torch.randn(2, 6) * 0.3
    outputs = {terms: OFTRotationModule(2, 6, 4, 8)._cayley_batch(q, 4, True, terms) for terms in (2, 3, 4, 5, 6)}
    assert torch.equal(outputs[3], outputs[4]), "peft has changed: neumann_terms=3 need not be refused any more"
    assert not any(torch.equal(outputs[terms], outputs[terms + 1]) for terms in (2, 4, 5))


def test_pissa_trains_the_principal_part_and_leaves_the_rest() -> None:
    weight = tiny_model().get_submodule(Q).weight.detach()
    attached = attach("pissa", {"rank": 8})
    layer = attached.model.base_model.model.get_submodule(Q)
    kept = torch.linalg.svdvals(layer.get_base_layer().weight.double())
    values = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(kept[:56], values[8:], atol=1e-5, rtol=1e-5)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(torch.linalg.svdvals((2.0 * b @ a).double())[:8], values[:8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=1e-5, rtol=1e-5)


def test_pissa_continues_on_a_model_split_with_other_signs() -> None:
    attached = attach("pissa", {"svd_iterations": 2})
    train(attached, 5e-3, steps=2)
    state = {name: tensor.clone() for name, tensor in attached.state().items()}
    other = make_method("pissa", {"svd_iterations": 2}).attach(tiny_model(), seed=77)
    assert any(not torch.equal(tensor, state[name]) for name, tensor in other.state().items() if "start" in name)
    other.load_state(state)
    assert difference(logits(other.model, tokens()), logits(attached.model, tokens())) < MERGE
    with other.disabled() as model:
        assert difference(logits(model, tokens()), logits(tiny_model(), tokens())) < MERGE


def test_pissa_checkpoint_is_a_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    attach("pissa", {"rank": 4, "alpha": 6.0}).save(tmp_path)
    table = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (table["r"], table["lora_alpha"], table["init_lora_weights"]) == (8, 12.0, True)


def test_bitfit_beside_a_bias_is_training_that_bias() -> None:
    config = {"targets": ["q_proj", "k_proj", "v_proj"]}
    attached = attach("bitfit", config, kind="biased")
    train(attached, 1e-2)
    plain = tiny_model("biased")
    plain.requires_grad_(False)
    biases = [p.requires_grad_(True) for name, p in plain.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 6
    optimizer = torch.optim.AdamW(biases, lr=1e-2, weight_decay=0.0)
    ids = tokens(seed=3)
    for _ in range(4):
        optimizer.zero_grad()
        plain(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert difference(logits(attached.model, tokens()), logits(plain, tokens())) < MERGE
    merged = attached.merged()
    assert difference(logits(merged, tokens()), logits(plain, tokens())) < MERGE
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_bitfit_merges_into_a_llama_with_biases_and_is_refused_on_qwen() -> None:
    attached = attach("bitfit", {"targets": ["v_proj", "down_proj"]})
    train(attached, 1e-2)
    tuned = logits(attached.model, tokens())
    merged = attached.merged()
    assert merged.config.attention_bias and merged.config.mlp_bias
    assert all(m.bias is not None for n, m in merged.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert difference(logits(merged, tokens()), tuned) < MERGE
    with pytest.raises(UserError, match=r"no place for a bias on model\.layers\.0\.self_attn\.o_proj"):
        attach("bitfit", kind="biased").merged()


def test_prompt_tuning_takes_labels_as_long_as_the_input() -> None:
    attached = attach("prompt_tuning", {"num_virtual_tokens": 6})
    ids = tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    out = attached.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    assert out.logits.shape[:2] == (3, 16)
    real = out.logits[:, 6:][:, 3:-1].reshape(-1, 200)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(real, ids[:, 4:].reshape(-1)))


def test_full_keeps_no_second_model_in_memory_and_saves_the_type_of_the_base(tmp_path: Path) -> None:
    attached = attach("full", dtype="bfloat16")
    assert {p.dtype for p in attached.model.parameters()} == {torch.float32}
    attached.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in attached.model.parameters()} == {torch.float32}
    held = [value for value in vars(attached).values() if isinstance(value, torch.Tensor)]
    assert not held and not any(isinstance(value, torch.Tensor) for value in vars(attached.pretrained).values())


def test_settings_reach_the_adapter_file(tmp_path: Path) -> None:
    given = {"rank": 4, "alpha": 6.0, "dropout": 0.25, "init": "gaussian", "targets": ["q_proj", "mlp.down_proj"]}
    attach("lora", given).save(tmp_path)
    table = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (table["r"], table["lora_alpha"], table["lora_dropout"]) == (4, 6.0, 0.25)
    assert table["init_lora_weights"] == "gaussian" and table["target_modules"] == ["down_proj", "q_proj"]
    assert table["base_model_name_or_path"] == "tiny-untied"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ln_tuning_of_torch_layer_norms(dtype: str, tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    def phi() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
            model = PhiForCausalLM(PhiConfig(num_attention_heads=4, initializer_range=0.12, **sizes))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return model.eval()

    attached = make_method("ln_tuning").attach(phi(), seed=0)
    assert len(attached.trained()) == 6 and {p.dtype for p in attached.trained().values()} == {torch.float32}
    assert difference(logits(attached.model, tokens()), logits(phi(), tokens())) == 0
    losses, _ = train(attached, 2e-2)
    assert losses[-1] < losses[0]
    tuned = logits(attached.model, tokens())
    attached.save(tmp_path)
    restored = make_method("ln_tuning").restore(phi(), tmp_path)
    assert difference(logits(restored.model, tokens()), tuned) == 0
    assert difference(logits(attached.merged(), tokens()), tuned) <= (MERGE if dtype == "float32" else 0.1)


def test_ia3_scales_inputs_of_feedforward_targets_only() -> None:
    config = {"targets": ["v_proj", "down_proj"], "feedforward": ["down_proj"]}
    sizes = {name.split(".")[-3]: tuple(p.shape) for name, p in attach("ia3", config).trained().items()}
    assert sizes == {"v_proj": (32, 1), "down_proj": (1, 128)}
