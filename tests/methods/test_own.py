"""Facts about our own methods, freezing and the mixtures: equations computed again, and traps that stay shut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached, Capability, MethodCard
from peft_arena.methods.low_rank.qalora import QaLora, is_quantised
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.testing.methods import EXACT, difference, logits, run_check, tiny_model, tokens, train
from peft_arena.testing.trial import Trial

Q = "model.layers.0.self_attn.q_proj"
MLP = "model.layers.0.mlp"


def attach(
    name: str, config: dict[str, Any] | None = None, *, kind: Any = "untied", dtype: str = "float32"
) -> Attached:
    return make_method(name, config).attach(tiny_model(kind, dtype), seed=0)


def trained(name: str, config: dict[str, Any], learning_rate: float = 5e-3) -> Attached:
    attached = attach(name, config)
    train(attached, learning_rate, steps=3)
    return attached


def wrapped(attached: Attached, name: str) -> Any:
    return attached.model.get_base_model().get_submodule(name)  # type: ignore[operator]


def test_svft_changes_only_the_entries_of_its_band() -> None:
    u, _, v = torch.linalg.svd(tiny_model().get_submodule(Q).weight.detach(), full_matrices=False)
    for config, allowed in (
        ({"pattern": "banded", "off_diagonals": 2}, 2),
        ({"pattern": "plain", "off_diagonals": 0}, 0),
    ):
        inner = u.T @ trained("svft", config, 2e-2).delta(Q) @ v.T  # type: ignore[operator]
        place = torch.arange(64)
        inside = (place[:, None] - place[None, :]).abs() <= allowed
        assert float(inner[~inside].abs().max()) < 1e-5 < float(inner[inside].abs().min())


def test_svft_top_k_takes_the_most_aligned_pairs_and_square_weights_only() -> None:
    config = {"pattern": "top_k", "off_diagonals": 1, "targets": ["q_proj", "o_proj"]}
    u, _, v = torch.linalg.svd(tiny_model().get_submodule(Q).weight.detach(), full_matrices=False)
    inner = u.T @ trained("svft", config, 2e-2).delta(Q) @ v.T  # type: ignore[operator]
    taken = inner.abs() > 1e-5
    alignment = (u.T @ v.T).abs()
    assert int(taken.sum()) == 3 * 64 - 2
    assert float(alignment[taken].min()) >= float(alignment[~taken].max())
    with pytest.raises(UserError, match="k_proj .32 x 64.; allowed: square targets"):
        make_method("svft", {"pattern": "top_k", "off_diagonals": 1}).count(tiny_model())


def test_svft_draws_random_places_by_the_seed_and_none_twice() -> None:
    method = make_method("svft", {"pattern": "random", "off_diagonals": 3})
    first, second = (wrapped(method.attach(tiny_model(), seed=seed), Q).svft_index["default"] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert len({tuple(pair) for pair in first.T.tolist()}) == first.shape[1] == 64 * 7 - 12


def test_svft_never_repeats_its_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attached = trained("svft", {"off_diagonals": 4}, 2e-2)
    attached.save(tmp_path)
    real = torch.linalg.svd

    def other_signs(*args: Any, **kwargs: Any) -> Any:
        u, s, v = real(*args, **kwargs)
        return -u, s, v.flip(0)

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    resumed = attach("svft", {"off_diagonals": 4})
    resumed.load_state(attached.state())
    assert difference(logits(resumed.model, tokens()), logits(attached.model, tokens())) == 0
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("restoring computes an SVD"))
    restored = make_method("svft", {"off_diagonals": 4}).restore(tiny_model(), tmp_path)
    assert difference(logits(restored.model, tokens()), logits(attached.model, tokens())) == 0


@pytest.mark.parametrize(
    ("name", "per_block"), [("adapter_houlsby", 2), ("adapter_pfeiffer", 1), ("adapter_parallel", 1)]
)
def test_bottleneck_adapters_compute_what_their_papers_say(name: str, per_block: int) -> None:
    attached = trained(name, {"bottleneck": 6, "activation": "tanh", "scaling": 3.0}, 1e-2)
    layers = [m for m in attached.model.modules() if hasattr(m, "bottleneck_down")]
    assert len(layers) == 2 * per_block
    layer, x = wrapped(attached, MLP), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = tiny_model().get_submodule(MLP)(x)
        read = x if name == "adapter_parallel" else plain
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
        wanted = plain + 3.0 * (torch.tanh(read @ down.weight.T + down.bias) @ up.weight.T + up.bias)
        assert difference(layer(x), wanted) < 1e-5 < difference(wanted, plain)


def test_parallel_adapters_stand_where_placement_says() -> None:
    for placement, parts in (("feed_forward", {"mlp"}), ("attention", {"self_attn"}), ("both", {"mlp", "self_attn"})):
        attached = attach("adapter_parallel", {"bottleneck": 4, "placement": placement, "layers": [1]})
        found = {name for name, m in attached.model.named_modules() if hasattr(m, "bottleneck_down")}
        assert found == {f"base_model.model.model.layers.1.{part}" for part in parts}


def test_bottleneck_adapters_refuse_models_without_their_blocks() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    with pytest.raises(UserError, match="submodules self_attn and mlp; GPT2LMHeadModel has none"):
        make_method("adapter_houlsby", {"bottleneck": 4}).count(model)
    with pytest.raises(UserError, match="bottleneck: 65 is above the hidden size .* 1 to 64"):
        make_method("adapter_pfeiffer", {"bottleneck": 65}).attach(tiny_model(), seed=0)


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with a scale for each row, as quantised layers are seen from outside."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("qweight", (weight / self.scale).round().to(torch.int8))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        scale: Any = self.scale
        qweight: Any = self.qweight
        return nn.functional.linear(x, (scale * qweight).to(x.dtype), self.bias)  # type: ignore[arg-type]


def quantised_model(kind: Any = "untied", dtype: str = "float32", device: str = "cpu") -> Any:
    model: Any = tiny_model(kind, dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.lm_head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(layer))
    return model.to(device)


class TriedQaLora(QaLora):
    """QA-LoRA for the suite, which tries methods on plain models unless their card says they refuse them."""

    card: ClassVar[MethodCard] = QaLora.card.model_copy(
        update={"capabilities": QaLora.card.capabilities - {Capability.NEEDS_QUANTIZED_BASE}}
    )


def test_qalora_lives_on_quantised_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in ("subject.tiny_model", "subject.shared_model", "card_checks.tiny_model"):
        monkeypatch.setattr(f"peft_arena.testing.{made}", quantised_model)
    trial = Trial(TriedQaLora, {"rank": 2, "group_size": 8}, awkward={"rank": 2, "group_size": 4}, learning_rate=1e-2)
    for check in (
        *("card", "start", "mode", "count", "training", "state", "resume", "disabled", "checkpoint", "damage"),
        *("merge", "generation", "seeds", "fields"),
    ):
        run_check(trial, check)


def test_qalora_computes_the_papers_algorithm() -> None:
    method = make_method("qalora", {"rank": 4, "group_size": 8, "alpha": 12.0})
    attached = method.attach(quantised_model(), seed=0)
    train(attached, 1e-2, steps=3)
    layer, x = wrapped(attached, Q), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    a, b = layer.qalora_A["default"], layer.qalora_B["default"]
    assert a.shape == (4, 8) and b.shape == (64, 4)
    with torch.no_grad():
        update = (nn.AvgPool1d(8)(x) * 8) @ a.T @ b.T * (12.0 / 4)
        assert difference(layer(x) - layer.base_layer(x), update) < 1e-5 < float(update.abs().max())
        delta = attached.delta(Q)
        assert delta is not None and difference(x @ delta.T, update) < 1e-5
    grouped = delta.unflatten(1, (8, 8))
    assert torch.equal(grouped, grouped[:, :, :1].expand_as(grouped))


def test_qalora_is_refused_where_nothing_is_quantised() -> None:
    method = make_method("qalora")
    for call in (lambda: method.attach(tiny_model(), seed=0), lambda: method.count(tiny_model())):
        with pytest.raises(UserError, match="needs a quantised base model: LlamaForCausalLM has no quantised linear"):
            call()
    mixed = quantised_model()
    mixed.model.layers[0].self_attn.q_proj = nn.Linear(64, 64)
    with pytest.raises(UserError, match=r"targets: model.layers.0.self_attn.q_proj is not quantised"):
        make_method("qalora", {"targets": ["q_proj"]}).count(mixed)
    with pytest.raises(UserError, match="group_size: 48 does not divide the input size 64"):
        make_method("qalora", {"group_size": 48, "rank": 1}).count(quantised_model())


def test_quantised_layers_are_known_by_what_they_hold() -> None:
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert is_quantised(packed) and not is_quantised(nn.Linear(4, 4)) and not is_quantised(nn.Linear(4, 4).bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_freeze_tunes_and_saves_the_last_block_alone(dtype: str, tmp_path: Path) -> None:
    attached = make_method("freeze", {"blocks": 1}).attach(tiny_model("awkward", dtype), seed=0)
    assert {name.split(".")[2] for name in attached.trained()} == {"2"}
    train(attached, 2e-3)
    attached.save(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == set(attached.trained())
    assert {str(tensor.dtype) for tensor in saved.values()} == {f"torch.{dtype}"}
    merged: Any = attached.merged()
    assert {str(p.dtype) for p in merged.parameters()} == {f"torch.{dtype}"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.model.layers)
    with pytest.raises(UserError, match="blocks: LlamaForCausalLM has 3, 4 were asked for"):
        make_method("freeze", {"blocks": 4}).count(tiny_model("awkward"))
    with pytest.raises(UserError, match="has 1 tuned blocks instead of 2"):
        make_method("freeze", {"blocks": 2}).restore(tiny_model("awkward", dtype), tmp_path)


def test_lily_mixes_by_token_unless_asked_and_then_refuses_packing() -> None:
    ids = tokens()
    changed = ids.clone()
    changed[:, -1] = 1 + changed[:, -1] % 150
    gaps = {}
    for routing in ("token", "batch"):
        model = trained("lily", {"rank": 8, "stride": 2, "routing": routing}, 2e-2).model
        full = logits(model, ids)
        gaps[routing] = (
            difference(logits(model, changed)[:, :-1], full[:, :-1]),
            difference(logits(model, ids[:1]), full[:1]),
        )
        packed = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(5).repeat(2).expand(3, -1)}
        if routing == "batch":
            with pytest.raises(UserError, match="packing cannot be used with lily and routing = batch"):
                model(**packed)
        else:
            model(**packed)
    assert max(gaps["token"]) < EXACT < 1e-4 < min(gaps["batch"])


def test_lily_computes_its_equation_and_shares_even_by_whole_names(tmp_path: Path) -> None:
    blocks = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1, 2)]
    config = {"rank": 8, "stride": 2, "experts": 3, "scaling": 0.5, "targets": blocks}
    attached = make_method("lily", config).attach(tiny_model("awkward"), seed=0)
    first, second, third = (wrapped(attached, name) for name in blocks)
    assert first.lily_A["default"] is second.lily_A["default"] is not third.lily_A["default"]
    assert first.lily_B["default"] is second.lily_B["default"] is third.lily_B["default"]
    train(attached, 2e-2, steps=3)
    x = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = x @ first.lily_A["default"].weight.T
        shares = (hidden @ first.lily_router["default"].weight.T).softmax(-1)
        experts = first.lily_B["default"].weight.view(3, 8, 72)
        wanted = 0.5 * sum(shares[..., e, None] * (hidden @ experts[e]) for e in range(3))
        assert difference(first(x) - first.base_layer(x), wanted) < 1e-5 < float(wanted.abs().max())  # type: ignore[union-attr]


def test_lily_saves_a_peft_adapter_only_where_peft_would_compute_the_same(tmp_path: Path) -> None:
    from peft import PeftModel

    for routing, kind in (("batch", "LILY"), ("token", "PEFT_ARENA_LILY")):
        attached = trained("lily", {"rank": 8, "stride": 2, "routing": routing}, 2e-2)
        attached.save(tmp_path / routing)
        assert json.loads((tmp_path / routing / "adapter_config.json").read_text())["peft_type"] == kind
        with pytest.raises(UserError, match="adapter, method lily needs"):
            other = {"rank": 8, "stride": 2, "routing": {"batch": "token", "token": "batch"}[routing]}
            make_method("lily", other).restore(tiny_model(), tmp_path / routing)
        if routing == "batch":
            loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / routing))
            assert difference(logits(loaded, tokens()), logits(attached.model, tokens())) < EXACT


def _called(mlp: Any, given: Any) -> None:
    mlp.gate_up_proj(given[0])


def test_lily_refuses_names_that_peft_confuses() -> None:
    model: Any = tiny_model()
    for layer in model.model.layers:
        layer.mlp.gate_up_proj = nn.Linear(64, 128)
        layer.mlp.register_forward_pre_hook(_called)
    with pytest.raises(UserError, match="gate_up_proj ends in up_proj"):
        make_method("lily").count(model)


@pytest.mark.parametrize("splits", [1, 2])
def test_poly_is_random_in_training_and_one_change_of_weights_afterwards(splits: int) -> None:
    attached = trained("poly", {"rank": 4, "skills": 3, "splits": splits}, 1e-2)
    layer, x = wrapped(attached, Q), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    delta = attached.delta(Q)
    with torch.no_grad():
        attached.model.eval()
        plain = layer.base_layer(x)
        assert delta is not None and difference(layer(x), plain + x @ delta.T) < 1e-5 < float(delta.abs().max())
        attached.model.train()
        assert difference(layer(x), layer(x)) > 1e-5


def test_poly_refuses_splits_that_leave_a_rest() -> None:
    with pytest.raises(UserError, match=r"splits: 3 does not divide both sides of .*q_proj \(64 x 64\)"):
        make_method("poly", {"splits": 3}).count(tiny_model())


def test_xlora_gives_the_same_with_a_cache_also_for_selected_rows() -> None:
    model: Any = trained("xlora", {"experts": 2}, 1e-2).model
    ids, cache, index = tokens(), DynamicCache(config=model.config), torch.tensor([2, 0])
    full = logits(model, ids)
    with torch.no_grad():
        start = model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True).logits
        cache.batch_select_indices(index)
        rest = [
            model(input_ids=ids[index, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(6, 10)
        ]
    assert difference(start, full[:, :6]) < EXACT and difference(torch.cat(rest, dim=1), full[index, 6:]) < EXACT
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        tiny_model()(input_ids=ids, past_key_values=filled, use_cache=True)
    with pytest.raises(UserError, match="xlora cannot use this cache"):
        model(input_ids=ids, past_key_values=filled, use_cache=True)


@pytest.mark.parametrize("config", [{"gate_size": 8}, {"top_k": 1}, {"layerwise": False, "gate_size": 5}])
def test_xlora_saves_its_whole_gate_and_computes_its_equation(config: dict[str, Any], tmp_path: Path) -> None:
    method = make_method("xlora", {"experts": 3, "rank": 4, **config})
    attached = trained("xlora", {"experts": 3, "rank": 4, **config}, 2e-2)
    attached.save(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == set(attached.trained()) and method.count(tiny_model()) == sum(
        t.numel() for t in saved.values()
    )
    tuner: Any = attached.model.base_model
    gate = tuner.internal_xlora_classifier.layers
    with torch.no_grad():
        hidden = tiny_model()(input_ids=tokens(), output_hidden_states=True).hidden_states[-1]
        weights = gate(hidden).view(3, 10, -1, 3).softmax(-1)[:, :, 0]
        if "top_k" in config:
            weights = weights * (weights == weights.amax(-1, keepdim=True))
        layer, seen = wrapped(attached, Q), []
        handle = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        logits(attached.model, tokens())
        handle.remove()
        x, output = seen[-1]
        parts = [x @ layer.lora_A[str(e)].weight.T @ layer.lora_B[str(e)].weight.T for e in range(3)]
        wanted = layer.base_layer(x) + 4.0 * sum(weights[..., e, None] * parts[e] for e in range(3))
        assert difference(output, wanted) < 1e-5 < float((wanted - layer.base_layer(x)).abs().max())


def test_peft_still_drops_layers_of_the_xlora_gate() -> None:
    from peft import get_peft_model_state_dict

    model: Any = attach("xlora", {"experts": 2, "gate_size": 8}).model
    kept = [name for name in get_peft_model_state_dict(model) if "internal_xlora_classifier" in name]
    assert len(kept) < 4, "peft has changed: its checkpoint of an X-LoRA may be whole now"


def test_mixtures_refuse_what_changes_nothing() -> None:
    for name, config, part in (
        ("xlora", {"top_k": 4}, "top_k must be below experts"),
        ("svft", {"pattern": "plain"}, "off_diagonals must be 0, not 16"),
        ("lily", {"experts": 1}, "experts"),
        ("poly", {"skills": 1}, "skills"),
    ):
        with pytest.raises(UserError, match=part):
            make_method(name, config)
    assert {"svft", "qalora", "freeze"} <= set(METHODS.own())
