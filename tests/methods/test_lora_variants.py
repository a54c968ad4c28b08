"""Facts about LoRA variants and rank-adaptive methods, each against an independent computation or peft itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached
from peft_arena.methods.refused import REFUSED
from peft_arena.methods.registry import make_method
from peft_arena.models.modes import base_of
from peft_arena.testing.methods import EXACT, difference, logits, tiny_model, tokens, train
from peft_arena.train.batch import collate
from peft_arena.train.data import Example
from peft_arena.train.loss import TokenLoss
from tests.methods.settings.lora_variants import INVOKED, SEEN, SETTINGS

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741


def attach(name: str, config: Mapping[str, Any] | None = None, kind: Any = "untied") -> Any:
    return make_method(name, config).attach(tiny_model(kind), seed=0)


def layer_of(attached: Attached, name: str = Q) -> Any:
    return base_of(attached.model).get_submodule(name)


def backward(attached: Attached) -> None:
    ids = tokens(seed=3)
    attached.model.train()
    attached.model(input_ids=ids, labels=ids).loss.backward()


def fill_b(attached: Attached) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in attached.trained().items():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)


def test_velora_compresses_only_the_gradient_of_a() -> None:
    attached = attach("velora", {"groups": 16, "scale": 0.5, "projection": "random", "rank": 4})
    fill_b(attached)
    layer, seen = layer_of(attached), {}
    layer.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0].detach()))
    layer.lora_B["default"].register_full_backward_hook(lambda _, grad, __: seen.update(g=grad[0].detach()))
    backward(attached)
    v = layer.lora_velora_embed["default"]
    assert abs(float(v.norm()) - 1) < 1e-6 and v.shape == (4,)
    rebuilt = 0.5 * torch.einsum("btgd,d,e->btge", seen["x"].reshape(3, 10, 16, 4), v, v).reshape(3, 10, 64)
    wanted = torch.einsum("btr,bti->ri", seen["g"], rebuilt)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, wanted, atol=1e-6, rtol=1e-4)
    plain = torch.einsum("btr,bti->ri", seen["g"], seen["x"])
    assert difference(plain, wanted) > 0.1 * float(plain.abs().max())


def test_velora_that_would_be_lora_is_refused() -> None:
    with pytest.raises(UserError, match=r"groups: 64 .*q_proj.* plain LoRA; allowed: 1 to 63"):
        attach("velora", {"groups": 64})


def test_bdlora_factors_are_block_diagonal() -> None:
    attached = attach("bdlora", {"rank": 4, "alpha": 8.0, "blocks": 2})
    train(attached, 5e-3, steps=2)
    for name, cut in ((Q, "lora_B"), (O, "lora_A")):
        layer = layer_of(attached, name)
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        whole = torch.block_diag(*(b if cut == "lora_B" else a).chunk(2))
        product = 2.0 * (whole @ a if cut == "lora_B" else b @ whole)
        torch.testing.assert_close(attached.delta(name), product, atol=1e-6, rtol=1e-5)
        assert int((whole == 0).sum()) >= whole.numel() // 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"rank": 9}, "rank 9 is not a multiple of blocks 2"),
        ({"rank": 12, "blocks": 3}, "blocks: 3 does not divide the output size 64 of .*q_proj"),
        ({"row_parallel": ("out_proj",)}, "unknown linear layer 'out_proj' .*Did you mean 'o_proj'"),
        ({"row_parallel": ("o_proj", "down_projx")}, "Did you mean 'down_proj'"),
    ],
)
def test_bdlora_refusals(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        attach("bdlora", config)


def test_monteclora_is_stochastic_in_training_only_and_can_be_measured_at_any_time() -> None:
    attached = attach("monteclora", {"noise": 0.05})
    fill_b(attached)
    ids = tokens(seed=3)
    attached.begin(4)
    attached.model.train()
    with torch.random.fork_rng(), torch.no_grad():
        first, second = (attached.model(input_ids=ids).logits for _ in range(2))
    assert difference(first, second) > EXACT
    attached.model(input_ids=ids)
    extra = attached.extra_loss()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer_of(attached))
    layer = layer_of(attached)
    wanted = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(attached.delta(Q), wanted.detach(), atol=1e-6, rtol=1e-5)
    extra.backward()
    reached = {name.split(".")[-1] for name, p in attached.trained().items() if p.grad is not None}
    assert reached == {"std_prior", "expert_weights_prior"}
    assert torch.equal(logits(attached.model, ids), logits(attached.model, ids))


@pytest.mark.parametrize("samples", [3, 40])
def test_monteclora_has_a_divergence_of_its_mixture_where_peft_has_none(samples: int) -> None:
    from torch.distributions import Dirichlet, kl_divergence

    attached = attach("monteclora", {"samples": samples, "dirichlet_prior": 0.3, "kl_weight": 1.0})
    layer = layer_of(attached)
    sampler = layer.lora_monteclora_sampler["default"]
    given = sampler.expert_weights_prior.detach().exp()
    theirs = type(sampler).dirichlet_kl(sampler, given)
    assert not theirs.isfinite() or theirs < 0
    wanted = kl_divergence(Dirichlet(given), Dirichlet(torch.full((samples,), 0.3)))
    torch.testing.assert_close(sampler.dirichlet_kl(given), wanted)
    same = torch.full((samples,), 0.3, requires_grad=True)
    at_prior = sampler.dirichlet_kl(same)
    at_prior.backward()
    assert same.grad is not None
    assert abs(float(at_prior.detach())) < 1e-4 and float(same.grad.abs().max()) < 1e-4
    attached.model.train()
    attached.model(input_ids=tokens(seed=3))
    extra = attached.extra_loss()
    extra.backward()
    assert extra.isfinite() and sampler.expert_weights_prior.grad.isfinite().all()


def test_lora_fa_step_is_the_b_gradient_nearest_the_full_gradient() -> None:
    plain = tiny_model()
    ids = tokens(seed=3)
    plain(input_ids=ids, labels=ids).loss.backward()
    full = plain.get_submodule(Q).weight.grad.double()
    attached = attach("lora_fa", {"rank": 4, "alpha": 12.0})
    assert {name.split(".")[-3] for name in attached.trained()} == {"lora_B"}
    layer = layer_of(attached)
    a = layer.lora_A["default"].weight.detach().clone()
    optimizer = attached.optimizer(1e-3, 0.0)
    backward(attached)
    optimizer.step()
    nearest = torch.linalg.lstsq(3.0 * a.double().T, full.T).solution.T  # (out, rank), scale 12 / 4
    step = -1e-3 * nearest / (nearest.abs() + 1e-8)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad.double(), nearest, atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(layer.lora_B["default"].weight.double(), step, atol=2e-6, rtol=0)
    assert torch.equal(layer.lora_A["default"].weight, a)


def test_riemannian_step_divides_each_gradient_by_the_other_factor() -> None:
    attached = attach("lora_riemannian", {"rank": 4, "damping": 0.05})
    fill_b(attached)
    backward(attached)
    layer = layer_of(attached)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    old_a, old_b, grad_a, grad_b = (t.detach().double().clone() for t in (a, b, a.grad, b.grad))
    eye = 0.05 * torch.eye(4, dtype=torch.float64)
    wanted_a = torch.linalg.inv(old_b.T @ old_b + eye) @ grad_a
    wanted_b = grad_b @ torch.linalg.inv(old_a @ old_a.T + eye)
    attached.optimizer(1e-3, 0.1).step()
    for parameter, old, grad in ((a, old_a, wanted_a), (b, old_b, wanted_b)):
        step = old * (1 - 1e-4) - 1e-3 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), step, atol=2e-6, rtol=0)


def batch() -> Any:
    rows = tokens(seed=3).tolist()
    return collate([Example(ids=row, first_label=4) for row in rows], packing=False, limit=64, pad=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_variants_train_in_mixed_precision_as_in_full(name: str) -> None:
    found = []
    for dtype in ("bfloat16", "float32"):
        config = SETTINGS[name].get("config")
        attached = make_method(name, config).attach(tiny_model(dtype=dtype), seed=0)
        optimizer = attached.optimizer(1e-2, 0.0)
        attached.begin(4)
        attached.model.train()
        torch.manual_seed(0)  # a method that draws in training draws the same in both
        losses = []
        with TokenLoss(attached.model, autocast=dtype == "bfloat16", added=attached.extra_loss) as loss:
            for step in (1, 2, 3):
                parts = loss(batch())
                losses.append(float(parts.nats.detach()) / len(batch().targets))
                (parts.nats if parts.extra is None else parts.nats + parts.extra).backward()
                optimizer.step()
                attached.after_step(step, 4)
                optimizer.zero_grad()
        assert all(p.dtype == torch.float32 for p in attached.trained().values())
        found.append(losses)
    assert found[0][-1] < found[0][0]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), atol=0.05, rtol=0)


def test_adalora_keeps_its_orthogonality_term_in_our_loss() -> None:
    attached = attach("adalora", {"orthogonality": 0.25})
    attached.model.train()
    with TokenLoss(attached.model, autocast=False, added=attached.extra_loss) as loss:
        extra = loss(batch()).extra
    gaps = [
        torch.linalg.norm((p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(12))
        for name, p in attached.trained().items()
        if "lora_E" not in name
    ]
    torch.testing.assert_close(extra, 0.25 * torch.stack(gaps).mean())


def test_adalora_prunes_to_the_target_rank_and_any_moment_can_be_saved(tmp_path: Path) -> None:
    config = {"initial_rank": 8, "target_rank": 3, "interval": 3}
    attached = attach("adalora", config)
    optimizer, ids = attached.optimizer(2e-2, 0.01), tokens(seed=3)
    attached.begin(20)
    attached.model.train()
    for step in range(1, 21):
        attached.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        attached.after_step(step, 20)
        optimizer.zero_grad()
        if step == 10:  # entries masked at step 9 have grown again; peft's own file would drop them
            middle = logits(attached.model, ids)
            attached.save(tmp_path)
            restored = make_method("adalora", config).restore(tiny_model(), tmp_path)
            assert difference(logits(restored.model, ids), middle) <= EXACT
    ranks = attached.ranks()
    assert len(ranks) == 14 and sum(ranks.values()) == 3 * 14 and len(set(ranks.values())) > 1
    found = int(torch.linalg.matrix_rank(attached.delta(Q).double(), rtol=1e-6))
    assert found == ranks[Q]


def test_adalora_has_a_step_to_prune_in_any_training() -> None:
    for total in (1, 2, 3, 7):
        attached = attach("adalora", {"warmup": 0.5, "final": 0.49})
        train(attached, 1e-2, steps=total)
        assert sum(attached.ranks().values()) == 8 * 14
    with pytest.raises(UserError, match="leave no time to prune"):
        attach("adalora", {"warmup": 0.5, "final": 0.5})
    with pytest.raises(UserError, match="target_rank 8 must be below initial_rank 8"):
        attach("adalora", {"initial_rank": 8})
    with pytest.raises(UserError, match=r"initial_rank: 33 is above the smaller side of .*k_proj.* allowed: 2 to 32"):
        attach("adalora", {"initial_rank": 33})


def test_adamss_changes_each_cluster_within_the_leading_directions() -> None:
    attached = attach("adamss", {"rank": 6, "subspaces": 4})
    train(attached, 2e-2)
    layer, delta = layer_of(attached), attached.delta(Q).double()
    directions = layer.adamss_newB["default"].double()
    torch.testing.assert_close(delta @ directions.T @ directions, delta, atol=1e-6, rtol=1e-4)
    sizes = [len(p) for p in layer.adamss_B["default"]]
    assert sum(sizes) == 64 and len(sizes) == 4
    for rows in layer.scatter_index["default"].split(sizes):
        assert int(torch.linalg.matrix_rank(delta[rows], rtol=1e-5)) == 1


def test_adamss_checkpoint_is_a_lora_also_of_biases(tmp_path: Path) -> None:
    for kind in ("untied", "biased"):
        attached = attach("adamss", {"subspaces": 5}, kind)
        train(attached, 2e-2)
        attached.save(tmp_path / kind)
        table = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert (table["peft_type"], table["r"], table["lora_bias"]) == ("LORA", 5, kind == "biased")


def test_asa_leaves_exactly_the_target_and_freezes_the_rest() -> None:
    attached = attach("adamss_asa", {"keep": 0.25, "warmup": 0.1, "until": 0.6, "interval": 2})
    optimizer, ids = attached.optimizer(1e-2, 0.01), tokens(seed=3)
    attached.begin(20)
    attached.model.train()
    for step in range(1, 21):
        attached.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        attached.after_step(step, 20)
        optimizer.zero_grad()
        if step == 12:
            frozen = {name: p.detach().clone() for name, p in attached.trained().items()}
            assert attached.active() == round(0.25 * 14 * 8)
    still = sum(torch.equal(p, frozen[name]) for name, p in attached.trained().items())
    assert still == 2 * (14 * 8 - attached.active())


def test_peft_leaves_one_subspace_less_than_asked() -> None:
    attached = attach("adamss_asa", {"interval": 1})
    train(attached, 1e-2, steps=2)
    state = attached.state()
    attached.load_state({name: torch.ones(8) if name.startswith("training.") else held for name, held in state.items()})
    backward(attached)
    layers = [m for m in attached.model.modules() if hasattr(m, "adamss_A")]
    for layer in layers:
        layer.update_importance("default")
    attached.model.base_model._global_mask_to_target(20, "default", layers)
    left = sum(p.requires_grad for layer in layers for p in layer.adamss_A["default"])
    assert left == 19, "peft has changed: its own allocation can be used"


def test_alora_acts_from_the_last_invocation_on() -> None:
    attached = attach("alora", {"invocation": [[5, 6]]})
    fill_b(attached)
    ids = tokens()
    ids[0, 2:4] = ids[0, 6:8] = ids[1, 4:6] = torch.tensor([5, 6])
    gap = (logits(attached.model, ids) - logits(tiny_model(), ids)).abs().amax(-1)
    assert [int((row > 1e-4).nonzero()[0]) if (row > 1e-4).any() else None for row in gap] == [6, 4, None]
    assert float(gap[0, :6].max()) == float(gap[1, :4].max()) == float(gap[2].max()) == 0
    packed = torch.cat([ids[0], ids[1]])[None]
    positions = torch.arange(10).repeat(2)[None]
    attached.model.eval()
    with torch.no_grad():
        found = attached.model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
    assert difference(found[10:], logits(attached.model, ids)[1]) < EXACT


def test_alora_is_the_same_with_peft_with_a_cache_and_without(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import DynamicCache

    attached = attach("alora", {"invocation": [[5, 6]]})
    fill_b(attached)
    ids = tokens()
    ids[:2, 5:7] = torch.tensor([5, 6])  # the third row is not invoked
    wanted = logits(attached.model, ids)
    cache = DynamicCache(config=attached.model.config)
    attached.model.eval()
    with torch.no_grad():
        attached.model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([2, 0]))
        after = attached.model(input_ids=ids[[2, 0], 8:], past_key_values=cache, use_cache=True).logits
    assert difference(after, wanted[[2, 0], 8:]) < EXACT
    attached.save(tmp_path)
    assert difference(logits(PeftModel.from_pretrained(tiny_model(), str(tmp_path)), ids), wanted) < EXACT


def test_alora_does_not_train_on_examples_without_its_invocation() -> None:
    for config in ({}, {"invocation": INVOKED[:2]}):
        with pytest.raises(UserError, match="invocation: a training example contains none of"):
            train(attach("alora", config), 5e-3, steps=1)
    backward(attach("alora", {"invocation": INVOKED[:2]}))  # outside of a training, as costs are measured
    with pytest.raises(UserError, match="invocation: 200 is outside the model's vocabulary; allowed: 0 to 199"):
        attach("alora", {"invocation": [[5, 200]]})


@pytest.mark.parametrize("name", ["trainable_tokens", "lora_tokens"])
def test_trained_tokens_are_checked(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokens: 200 is outside the model's vocabulary; allowed: 0 to 199"):
        attach(name, {"tokens": [3, 200]})
    with pytest.raises(UserError, match="given twice"):
        attach(name, {"tokens": [3, 3]})
    with pytest.raises(UserError, match="none of the 2 tokens was trained in the first 20 steps"):
        train(attach(name, {"tokens": [198, 199]}), 1e-3, steps=20)
    with pytest.raises(UserError, match="none of the 2 tokens was trained in the first 3 steps"):
        train(attach(name, {"tokens": [198, 199]}), 1e-3, steps=3)
    attach(name, {"tokens": [3, 4]}).save(tmp_path)
    with pytest.raises(UserError, match="the checkpoint was made with the ids"):
        make_method(name, {"tokens": [3, 5]}).restore(tiny_model(), tmp_path)


@pytest.mark.parametrize("name", ["trainable_tokens", "lora_tokens"])
def test_tied_rows_are_trained_on_both_sides_and_no_others(name: str) -> None:
    attached = attach(name, {"tokens": SEEN}, "tied")
    with TokenLoss(attached.model, autocast=False) as loss:
        losses: list[Tensor] = []
        optimizer = attached.optimizer(2e-2, 0.1)
        attached.model.train()
        for _ in range(3):
            parts = loss(batch())
            parts.nats.backward()
            losses.append(parts.nats.detach())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    tuned = logits(attached.model, tokens())
    merged = attached.merged()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert difference(logits(merged, tokens()), tuned) < 1e-4
    rows = (merged.get_input_embeddings().weight != tiny_model("tied").get_input_embeddings().weight).any(1)
    assert set(rows.nonzero().flatten().tolist()) == set(SEEN)


def test_the_output_layer_is_never_a_target() -> None:
    for kind in ("tied", "untied"):
        with pytest.raises(UserError, match="unknown linear layer to target 'lm_head'"):
            attach("lora", {"targets": ["lm_head"]}, kind)
        attached = attach("lora", kind=kind)
        assert not any("lm_head" in name for name in attached.trained())


def test_layer_replication_is_another_architecture() -> None:
    import peft

    assert "lora_layer_replication" in REFUSED
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model(), config)
    assert len(wrapped.get_base_model().model.layers) == 3 != len(tiny_model().model.layers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="peft can start LoftQ on CUDA")
def test_loftq_has_no_start_without_cuda() -> None:
    import peft

    assert "loftq" in REFUSED
    config = peft.LoraConfig(
        target_modules=["q_proj"], init_lora_weights="loftq", loftq_config=peft.LoftQConfig(), task_type="CAUSAL_LM"
    )
    with pytest.raises((ImportError, ValueError, AssertionError, RuntimeError)):
        peft.get_peft_model(tiny_model(), config)
