"""Facts about LoRA variants that differ by their start, each against an independent computation or peft's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached, Calibration
from peft_arena.methods.calibrate import gradients, input_moments
from peft_arena.methods.low_rank.eva import redistributed
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.methods.targets import linear_layers
from peft_arena.testing.methods import MERGE, difference, logits, tiny_model, tokens, train

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPLITS = ("olora", "milora", "corda_ipm", "corda_kpm", "lora_ga", "keeplora", "kasa")


def examples() -> Calibration:
    """Return four padded examples of unequal length in two batches, labels on a part of the tokens."""
    batches = []
    for seed in (60, 61):
        ids = tokens(seed)[:2]
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[1, 7:] = 0
        labels[0, :4], labels[1, :2], labels[1, 7:] = -100, -100, -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return Calibration(batches)


def attach(name: str, config: dict[str, Any] | None = None, *, model: Any = None, dtype: str = "float32") -> Attached:
    method = make_method(name, config)
    given = examples() if method.calibration_examples else None
    return method.attach(tiny_model(dtype=dtype) if model is None else model, seed=0, calibration=given)


def layer_of(attached: Any, module: str) -> Any:
    return attached.model.base_model.model.get_submodule(module)


def parts(attached: Any, module: str) -> tuple[Tensor, Tensor]:
    layer = layer_of(attached, module)
    return layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()


def pretrained(module: str, dtype: str = "float32") -> Tensor:
    weight: Any = tiny_model(dtype=dtype).get_submodule(module).weight
    return weight.detach()


def lora_config(**other: Any) -> Any:
    import peft

    return peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEARS, **other)


def test_olora_starts_as_in_peft() -> None:
    import peft

    theirs: Any = peft.get_peft_model(tiny_model(), lora_config(init_lora_weights="olora"))
    ours = attach("olora")
    for module in (Q, DOWN):
        layer = theirs.base_model.model.get_submodule(module)
        a, b = parts(ours, module)
        torch.testing.assert_close(a, layer.lora_A["default"].weight.detach())
        torch.testing.assert_close(b, layer.lora_B["default"].weight.detach())
        torch.testing.assert_close(layer_of(ours, module).get_base_layer().weight, layer.get_base_layer().weight)
        torch.testing.assert_close(b.T @ b, torch.eye(8), atol=1e-5, rtol=0)


def test_milora_trains_the_minor_part_and_leaves_the_principal_one() -> None:
    attached = attach("milora")
    a, b = parts(attached, Q)
    values = torch.linalg.svdvals(pretrained(Q).double())
    torch.testing.assert_close(torch.linalg.svdvals((2.0 * b @ a).double())[:8], values[-8:], atol=1e-5, rtol=1e-5)
    rest = layer_of(attached, Q).get_base_layer().weight
    torch.testing.assert_close(torch.linalg.svdvals(rest.double())[:56], values[:56], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(mode: Any) -> None:
    import peft
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = tiny_model()
    config = lora_config(init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))

    def run() -> None:
        for batch in examples().batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])

    preprocess_corda(model, config, run_model=run)
    theirs: Any = peft.get_peft_model(model, config)
    ours = attach(f"corda_{mode}")
    for module in (Q, DOWN):
        layer = theirs.base_model.model.get_submodule(module)
        wanted = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        a, b = parts(ours, module)
        assert float((b @ a - wanted).norm()) < 1e-2 * float(wanted.norm())  # peft inverts in float32
        torch.testing.assert_close(
            b.norm(dim=0), layer.lora_B["default"].weight.norm(dim=0).detach(), rtol=1e-2, atol=0
        )


def plain_gradient(module: str) -> Tensor:
    """Return the gradient of the mean cross-entropy over all labels, without padding."""
    model = tiny_model()
    weight: Any = model.get_submodule(module).weight
    nats, count = torch.zeros(()), 0
    for batch in examples().batches:
        for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
            wanted = labels[mask.bool()][1:]
            found = model(input_ids=ids[mask.bool()][None]).logits[0, :-1]
            nats = nats + nn.functional.cross_entropy(found, wanted, reduction="sum")
            count += int((wanted != -100).sum())
    (gradient,) = torch.autograd.grad(nats / count, [weight])
    return gradient


def test_lora_ga_starts_from_singular_vectors_of_the_gradient() -> None:
    gradient = plain_gradient(DOWN)
    left, _, right = torch.linalg.svd(gradient)
    for direction, rows, columns in (
        ("ArB2r", range(8), range(8, 16)),
        ("A2rBr", range(8, 16), range(8)),
        ("ArBr", range(1, 16, 2), range(0, 16, 2)),
    ):
        a, b = parts(attach("lora_ga", {"direction": direction}), DOWN)
        length = 64**0.25 / 4
        torch.testing.assert_close(a.norm(dim=1), torch.full((8,), length))
        torch.testing.assert_close(
            (a * right[list(rows)]).sum(dim=1).abs(), torch.full((8,), length), rtol=1e-3, atol=0
        )
        cosines = (b * left[:, list(columns)]).sum(dim=0).abs()
        torch.testing.assert_close(cosines, torch.full((8,), length), rtol=1e-3, atol=0)
    a, b = parts(attach("lora_ga", {"length": "gd"}), DOWN)
    torch.testing.assert_close(a.norm(dim=1), torch.full((8,), 0.5))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_takes_the_directions_of_peft_and_not_its_lengths() -> None:
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    model = tiny_model()
    config = lora_config(init_lora_weights="lora_ga", lora_ga_config=peft.tuners.lora.LoraGAConfig())
    ours = attach("lora_ga")
    gradient = dict(gradients(model, {DOWN: linear_layers(model)[DOWN]}, examples().batches))[DOWN]

    def step() -> None:
        for batch in examples().batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, step)
    linear_layers(model)[DOWN]._peft_loraga_grad = gradient
    theirs: Any = peft.get_peft_model(model, config)
    layer = theirs.base_model.model.get_submodule(DOWN)
    a, b = parts(ours, DOWN)
    peft_a, peft_b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    assert bool((nn.functional.cosine_similarity(a, peft_a, dim=1).abs() > 0.99).all())
    assert bool((nn.functional.cosine_similarity(b, peft_b, dim=0).abs() > 0.99).all())
    spread = peft_b.norm(dim=0)
    assert spread[0] > 1.1 * spread[-1], "peft scales B by singular values no more: take it off the deviations"


def test_gradients_leave_the_model_as_it_was_and_do_not_depend_on_the_grouping() -> None:
    for dtype in ("float32", "bfloat16"):
        model = tiny_model(dtype=dtype)
        model.model.layers[0].requires_grad_(False)
        model.train()
        before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
        layers = linear_layers(model)
        whole = dict(gradients(model, layers, examples().batches))
        single = dict(gradients(model, layers, examples().batches, limit=1))
        assert list(whole) == list(single) == list(layers)
        for name, gradient in whole.items():
            assert gradient.dtype == torch.float32 and difference(gradient, single[name]) < 1e-6 * float(
                gradient.norm()
            )
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
            assert parameter.grad is None
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_are_of_real_tokens_only() -> None:
    model = tiny_model()
    seen: list[Tensor] = []
    hook = linear_layers(model)[DOWN].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[0]))
    for batch in examples().batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None])
    hook.remove()
    rows = torch.cat(seen).double()
    ((_, moments),) = input_moments(model, {DOWN: linear_layers(model)[DOWN]}, examples().batches)
    assert (moments.tokens, moments.examples) == (len(rows), 4) == (34, 4)
    torch.testing.assert_close(moments.square, rows.T @ rows, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(moments.total, rows.sum(dim=0), atol=1e-3, rtol=1e-4)


def test_keeplora_never_touches_the_principal_directions_of_the_weight() -> None:
    weight, gradient = pretrained(DOWN), plain_gradient(DOWN)
    _, _, right = torch.linalg.svd(weight)
    protected = right[:24]
    attached: Any = attach("keeplora", {"rank": 6})
    rest = gradient - gradient @ protected.T @ protected
    left, values, rows = torch.linalg.svd(rest, full_matrices=False)
    a, b = parts(attached, DOWN)
    torch.testing.assert_close(b @ a, (left[:, :6] * values[:6]) @ rows[:6], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(a @ a.T, torch.eye(6), atol=1e-5, rtol=0)
    train(attached, 1e-2)
    assert torch.equal(parts(attached, DOWN)[0], a) and not torch.equal(parts(attached, DOWN)[1], b)
    change = attached.delta(DOWN)
    assert float((change @ protected.T).norm()) < 1e-3 * float(change.norm())
    assert all(".lora_B." in name for name in attached.trained())


def test_keeplora_checkpoint_has_its_own_rank(tmp_path: Path) -> None:
    attached = attach("keeplora", {"rank": 4, "alpha": 6.0})
    attached.save(tmp_path)
    table = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (table["r"], table["lora_alpha"], table["init_lora_weights"]) == (4, 6.0, True)


@pytest.mark.parametrize("name", SPLITS)
def test_delta_and_switching_off_are_relative_to_the_pretrained_model(name: str) -> None:
    attached = attach(name)
    attached.model.train()
    train(attached, 5e-3, steps=2)
    before = logits(tiny_model(), tokens())
    with attached.disabled() as model:
        assert difference(logits(model, tokens()), before) < 1e-4
    wrapped: Any = attached.model
    with wrapped.disable_adapter():
        naive = difference(logits(attached.model, tokens()), before)
    assert naive > 1e-3 or name == "keeplora", "peft's own switch is right: no need for ours"
    change = attached.delta(Q)
    merged: Any = attached.merged().get_submodule(Q)
    assert change is not None
    torch.testing.assert_close(change, merged.weight.detach() - pretrained(Q), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SPLITS)
def test_a_state_is_continued_on_a_model_that_was_split_otherwise(name: str) -> None:
    attached: Any = attach(name)
    train(attached, 5e-3, steps=2)
    state = {key: tensor.clone() for key, tensor in attached.state().items()}
    other: Any = attach(name)
    with torch.no_grad():  # as if another library had chosen other starting factors: a tenth of them
        for module, start in other.start.items():
            weight = layer_of(other, module).get_base_layer().weight
            weight.add_(0.9 * other.method.scale * (start.b @ start.a))
            start.b.mul_(0.1)
    other.load_state(state)
    assert difference(logits(other.model, tokens()), logits(attached.model, tokens())) < MERGE
    with other.disabled() as model:
        assert difference(logits(model, tokens()), logits(tiny_model(), tokens())) < MERGE


def test_kasa_computes_what_peft_does_and_adds_its_loss() -> None:
    import peft

    config = lora_config(kasa_config=peft.tuners.lora.KasaConfig(beta=1e-4, gamma=1e-3))
    theirs: Any = peft.get_peft_model(tiny_model(), config)
    ours: Any = attach("kasa")
    train(ours, 5e-3, steps=2)
    tensors = dict(ours.model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(tensors[name])
            else:
                torch.testing.assert_close(parameter, tensors[name], atol=1e-5, rtol=1e-4)
    assert difference(logits(theirs, tokens()), logits(ours.model, tokens())) < MERGE
    torch.testing.assert_close(ours.extra_loss(), theirs.base_model._get_kasa_loss(), rtol=1e-5, atol=1e-6)
    ours.extra_loss().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ours.trained().values())


def test_kasa_switched_off_in_training_drops_nothing_of_what_was_put_back() -> None:
    attached = attach("kasa", {"dropout": 0.5})
    attached.model.train()
    with attached.disabled() as model, torch.no_grad():
        found = model(input_ids=tokens()).logits
    assert difference(found, logits(tiny_model(), tokens())) < 1e-4
    modes = {type(m).__name__: m.training for m in attached.model.modules() if isinstance(m, nn.Dropout)}
    assert modes == {"Dropout": True}


def test_mica_adapts_as_peft_does_with_b_frozen(tmp_path: Path) -> None:
    import peft

    theirs: Any = peft.get_peft_model(tiny_model(), lora_config(init_lora_weights="mica"))
    ours = attach("mica")
    wanted = theirs.base_model.model.get_submodule(Q).lora_B["default"].weight
    torch.testing.assert_close(parts(ours, Q)[1], wanted.detach())
    assert sorted(ours.trained()) == sorted(name for name, p in theirs.named_parameters() if p.requires_grad)
    train(ours, 5e-3)
    torch.testing.assert_close(parts(ours, Q)[1], wanted.detach())
    ours.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    exact = torch.linalg.svd(pretrained(Q, "bfloat16").float())[0][:, -8:]
    torch.testing.assert_close(parts(attach("mica", dtype="bfloat16"), Q)[1], exact)


def test_orthogonal_start_is_random_with_product_zero() -> None:
    a, b = parts(attach("lora_orthogonal"), Q)
    assert float((b @ a).abs().max()) < 1e-6 < 0.1 < float(a.norm()) and float(b.norm()) > 0.1
    assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 4
    torch.testing.assert_close(a.std(), torch.tensor(0.1 / 2**0.5), rtol=0.2, atol=0)


def test_eva_starts_from_the_principal_components_of_the_inputs(tmp_path: Path) -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    model = tiny_model()
    seen: list[Tensor] = []
    hook = linear_layers(model)[DOWN].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[0]))
    for batch in examples().batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None])
    hook.remove()
    wanted = IncrementalPCA(n_components=8).fit(torch.cat(seen)).components_.float()
    a, b = parts(attach("eva", {"rho": 1.0}), DOWN)
    torch.testing.assert_close((a * wanted).sum(dim=1).abs(), torch.ones(8), rtol=1e-3, atol=0)
    assert not b.any()


def test_eva_keeps_its_ranks_in_the_checkpoint_and_its_number_of_parameters(tmp_path: Path) -> None:
    attached: Any = attach("eva", {"rank": 6})
    ranks = {name: p.shape[0] for name, p in attached.trained().items() if ".lora_A." in name}
    assert len(set(ranks.values())) > 1 and min(ranks.values()) >= 1 and max(ranks.values()) <= 12
    counted = sum(p.numel() for p in attached.trained().values())
    assert counted == make_method("eva", {"rank": 6}).count(tiny_model())
    scales = [layer_of(attached, name).scaling["default"] for name in linear_layers(tiny_model())]
    assert scales == pytest.approx([16 / 6] * 14)
    train(attached, 5e-3, steps=2)
    attached.save(tmp_path)
    table = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(table["rank_pattern"]) == set(table["alpha_pattern"]) != set()
    restored = make_method("eva", {"rank": 6}).restore(tiny_model(), tmp_path)
    assert difference(logits(restored.model, tokens()), logits(attached.model, tokens())) < 1e-5


def test_ranks_go_to_what_explains_most_within_equal_sizes() -> None:
    shares = {"one": [0.9, 0.05, 0.01, 0.0], "two": [0.4, 0.3, 0.2, 0.1], "three": [0.5, 0.5, 0.0, 0.0]}
    assert redistributed(shares, {"one": 10, "two": 10, "three": 20}, 2) == {"one": 1, "two": 3, "three": 2}


@pytest.mark.parametrize(
    ("name", "config", "part"),
    [
        ("lora_orthogonal", {"rank": 7}, "rank"),
        ("lora_ga", {"rank": 17}, "k_proj (32 x 64), as A and B take different singular vectors; allowed: 1 to 16"),
        ("lora_ga", {"length": "unit", "gamma": 2.0}, "gamma is only used with length = 'stable'"),
        ("kasa", {"rank": 32}, "would drop all of model.layers.0.self_attn.k_proj (32 x 64); allowed: 1 to 31"),
        ("keeplora", {"rank": 9}, "protected_rank: 36 (4 * rank, as none is given) does not fit"),
        ("keeplora", {"targets": ["q_proj"], "protected_rank": 60}, "allowed with this rank: 1 to 56"),
        ("eva", {"rank": 17}, "rank: 17 with rho 2 can become 34, above the smaller side of"),
        ("mica", {"rank": 33}, "allowed: 1 to 32"),
        ("milora", {"rank": 33}, "allowed: 1 to 32"),
        ("olora", {"dropout": 0.1}, "dropout"),
        ("lora_ga", {"direction": "random"}, "direction"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, config: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        make_method(name, config).count(tiny_model())
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["corda_ipm", "eva", "lora_ga", "keeplora"])
def test_examples_that_say_too_little_are_refused(name: str) -> None:
    ids = tokens()[:1, :2]
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    if name == "corda_ipm":  # one token is enough for a damped covariance
        make_method(name).attach(tiny_model(), seed=0, calibration=Calibration([one]))
        return
    with pytest.raises(UserError, match="calibration"):
        make_method(name).attach(tiny_model(), seed=0, calibration=Calibration([one]))
    with pytest.raises(UserError, match=r"calibration.*(zero|too few|only \d+ of)"):
        make_method(name).attach(tiny_model(), seed=0, calibration=Calibration([{**one, "labels": ids}]))


def test_every_method_here_is_registered() -> None:
    assert {*SPLITS, "eva", "mica", "lora_orthogonal", "pissa"} <= set(METHODS.names())


def test_eva_refuses_inputs_that_leave_directions_open() -> None:
    """Many tokens of three kinds: more components would be what the linear algebra makes of rounding."""
    ids = torch.tensor([[5, 9, 11] * 20])
    same = Calibration([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}])
    with pytest.raises(UserError, match=r"calibration_examples: the inputs of .*q_proj .* vary in only 2 of the 16"):
        make_method("eva").attach(tiny_model(), seed=0, calibration=same)
