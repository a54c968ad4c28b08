"""Facts about the orthogonal, selective and weight-dependent methods, each against an independent computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached
from peft_arena.methods.registry import make_method
from peft_arena.testing.methods import EXACT, MERGE, difference, logits, tiny_model, tokens, train
from tests.methods.settings.weight_maps import SETTINGS

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"


def attach(
    name: str, config: dict[str, Any] | None = None, *, kind: Any = "untied", dtype: str = "float32"
) -> Attached:
    return make_method(name, config).attach(tiny_model(kind, dtype), seed=0)


def trained(name: str, config: dict[str, Any] | None = None, rate: float = 1e-2, **which: Any) -> Any:
    attached = attach(name, config, **which)
    train(attached, rate)
    return attached


def layer(attached: Any, module: str = Q) -> Any:
    return attached.model.base_model.model.get_submodule(module)


def weight(module: str = Q) -> torch.Tensor:
    return tiny_model().get_submodule(module).weight.detach()


def check_tuned(attached: Attached, expected: torch.Tensor, module: str = Q) -> None:
    torch.testing.assert_close(attached.delta(module), (expected - weight(module)).detach(), atol=1e-5, rtol=1e-4)


def test_boft_rotates_inputs_and_scales_outputs() -> None:
    attached = trained("boft", {"block_size": 4})
    blocks, scale = layer(attached).boft_R["default"][0], layer(attached).boft_s["default"]
    skew = (blocks - blocks.mT) / 2
    eye = torch.eye(4)
    rotation = torch.block_diag(*((eye - skew) @ torch.linalg.inv(eye + skew)))
    assert difference(rotation @ rotation.T, torch.eye(64)) < 1e-5 and difference(scale, torch.ones(64, 1)) > 1e-3
    check_tuned(attached, scale * (weight() @ rotation.T))
    decays = {p.shape: g["weight_decay"] for g in attached.parameter_groups(1.0, 0.1) for p in g["params"]}
    assert decays[torch.Size([64, 1])] == 0 and decays[torch.Size([1, 16, 4, 4])] == 0.1


def test_boft_builds_no_extension_and_has_no_butterflies(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    import torch.utils.cpp_extension as extension

    def build(*args: Any, **settings: Any) -> None:
        raise AssertionError("an extension was built")

    monkeypatch.setattr(extension, "load", build)
    attached = attach("boft")
    assert len({layer(attached, f"model.layers.{n}.self_attn.q_proj").boft_P.data_ptr() for n in (0, 1)}) == 1
    assert capfd.readouterr().out == ""
    with pytest.raises(UserError, match="unknown key"):
        make_method("boft", {"n_butterfly_factor": 2})


def test_hra_is_a_chain_of_reflections() -> None:
    attached = trained("hra", {"rank": 4})
    expected = weight()
    for u in layer(attached).hra_u["default"].T:
        expected = expected @ (torch.eye(64) - 2 * torch.outer(u, u) / (u @ u))
    check_tuned(attached, expected)
    with pytest.raises(UserError, match="unknown key"):
        make_method("hra", {"apply_gs": True})


def test_coft_stays_within_its_ball_and_looking_moves_nothing() -> None:
    found = {}
    for name, extra in (("oft", {}), ("coft", {"eps": 0.1})):
        attached = trained(name, {"block_size": 16, **extra}, rate=5e-2)
        logits(attached.model, tokens())
        q = layer(attached).oft_R["default"].weight
        found[name] = float((2**0.5 * q.detach().norm(dim=1)).max())
        before = q.detach().clone()
        logits(attached.model, tokens())
        assert torch.equal(q, before)
    assert found["coft"] <= 0.1 / 4**0.5 * (1 + 1e-5) < found["oft"]


def test_road_rotates_pairs_half_a_group_apart() -> None:
    attached = trained("road", {"group_size": 8, "variant": "road_1"}, rate=5e-2)
    angle, scale = layer(attached).road_theta["default"], layer(attached).road_alpha["default"]
    expected = weight().clone()
    for pair in range(32):
        first = pair // 4 * 8 + pair % 4
        one, two = weight()[first], weight()[first + 4]
        c, s = scale[pair] * angle[pair].cos(), scale[pair] * angle[pair].sin()
        expected[first], expected[first + 4] = (c * one - s * two).detach(), (s * one + c * two).detach()
    check_tuned(attached, expected)


def test_psoft_keeps_every_singular_value_without_scales(tmp_path: Path) -> None:
    attached = trained("psoft", {"rank": 12, "in_scale": False, "out_scale": False}, rate=5e-2)
    change: Any = attached.delta(Q)
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 12
    kept = torch.linalg.svdvals((weight() + change).double())
    torch.testing.assert_close(kept, torch.linalg.svdvals(weight().double()), atol=1e-5, rtol=1e-5)
    attached.save(tmp_path)
    table = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (table["peft_type"], table["r"], table["lora_alpha"]) == ("LORA", 12, 12)


def test_alpha_of_psoft_does_nothing_in_peft() -> None:
    import peft

    found = []
    for alpha in (4, 64):
        config = peft.PsoftConfig(r=8, psoft_alpha=alpha, target_modules=["q_proj"])
        model = peft.get_peft_model(tiny_model(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "psoft_R" in name:
                    parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
        found.append(logits(model, tokens()))
    assert difference(found[0], logits(tiny_model(), tokens())) > 0.1
    assert difference(*found) < EXACT, "peft has changed: psoft_alpha could be a setting"


@pytest.mark.parametrize(("name", "config"), [("psoft", {"svd_iterations": 1, "rank": 12}), ("osf", {}), ("frod", {})])
def test_training_continues_on_another_decomposition(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    attached = trained(name, config)
    state = {key: tensor.clone() for key, tensor in attached.state().items()}
    attached.save(tmp_path)
    tuned = logits(attached.model, tokens())
    svd, eigh = torch.linalg.svd, torch.linalg.eigh

    def other_svd(matrix: torch.Tensor, **how: Any) -> Any:
        left, values, right = svd(matrix, **how)
        signs = torch.ones_like(values)
        signs[::2] = -1
        return left * signs, values, signs[:, None] * right

    def other_eigh(matrix: torch.Tensor) -> Any:
        values, vectors = eigh(matrix)
        return values, -vectors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", other_svd)
        patch.setattr(torch.linalg, "eigh", other_eigh)
        other = make_method(name, config).attach(tiny_model(), seed=77)
        start = other.state()
        assert any(not torch.equal(start[key], state[key]) for key in state if key.startswith(("frozen", "basis")))
        other.load_state(state)
        assert difference(logits(other.model, tokens()), tuned) == 0
        restored = make_method(name, config).restore(tiny_model(), tmp_path)
    assert difference(logits(restored.model, tokens()), tuned) <= EXACT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_osf_gradients_leave_the_preserved_directions_alone(dtype: str) -> None:
    attached = attach("osf", {"preserved": 0.75}, dtype=dtype)
    for module in (Q, V, "model.layers.1.mlp.up_proj"):
        base = tiny_model(dtype=dtype).get_submodule(module).weight.detach().float()
        left, values, right = torch.linalg.svd(base, full_matrices=False)
        kept = int(0.75 * min(base.shape))
        now = layer(attached, module).osf_svd_params["default"]
        torch.testing.assert_close(now["S_low"].detach(), values[kept:], atol=1e-5, rtol=1e-5)
        attached.model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert now["U_low"].grad.norm() > 1e-4 and now["V_low"].grad.norm() > 1e-4
        assert difference(left[:, :kept].T @ now["U_low"].grad, torch.tensor(0.0)) < 1e-5
        assert difference(now["V_low"].grad @ right[:kept].T, torch.tensor(0.0)) < 1e-5


def test_osf_checkpoints_belong_to_their_share(tmp_path: Path) -> None:
    attach("osf", {"preserved": 0.75}).save(tmp_path)
    with pytest.raises(UserError, match=r"preserved = 0\.5"):
        make_method("osf").restore(tiny_model(), tmp_path)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["boft", "frod", "deft", "glora", "hra", "miss_bat", "osf", "psoft", "supertuning"])
def test_the_untrained_model_is_the_pretrained_one_in_bfloat16(name: str, autocast: bool) -> None:
    attached = attach(name, {"rank": 12} if name == "psoft" else {}, dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pretrained = logits(tiny_model(dtype="bfloat16"), tokens())
        assert difference(logits(attached.model, tokens()), pretrained) == 0


def test_osf_small_changes_are_not_lost_in_mixed_precision() -> None:
    attached = trained("osf", rate=2e-5)
    found, delta = layer(attached), attached.delta(Q)
    assert delta is not None and 0 < delta.norm() < 1e-2 * weight().norm()
    found.get_base_layer().weight.data.zero_()
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        change = found(x).float()
    assert (change - x @ delta.T).norm() < 0.02 * (x @ delta.T).norm()


def test_boft_and_hra_build_no_square_matrices() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                self.entries = max(self.entries, found.numel())
            return found

    for name in ("boft", "hra"):
        found = layer(attach(name), "model.layers.0.self_attn.k_proj")  # (32, 64)
        with Largest() as seen:
            found(torch.ones(2, 64)).sum().backward()
        assert seen.entries < 64 * 64


def test_frod_mixes_in_the_shared_basis() -> None:
    attached = trained("frod", {"sparse_rate": 0.05})
    found = layer(attached)
    basis, (rows, columns) = found.frod_V["default"], found.frod_s_indices["default"]
    own = torch.linalg.solve(basis.double(), weight().double().T).T
    start = own.norm(dim=0)
    inner = torch.diag(found.frod_lambda_l["default"].double() - start)
    inner[rows, columns] = found.frod_lambda_s_values["default"].double()
    check_tuned(attached, weight() + ((own / start) @ inner @ basis.double().T).float())
    other = layer(attached, "model.layers.1.self_attn.q_proj")
    assert other.frod_V is found.frod_V and (rows != columns).all()


def test_glora_adds_and_multiplies_and_leaves_biases_alone() -> None:
    attached = trained("glora", {"rank": 4}, kind="biased")
    first, second = (getattr(layer(attached), f"glora_{path}")["default"] for path in "AB")
    before = tiny_model("biased").get_submodule(Q).weight.detach()
    expected = before * (first.Xd @ first.Xu) + second.Xd @ second.Xu
    torch.testing.assert_close(attached.delta(Q), expected.detach(), atol=1e-5, rtol=1e-4)
    assert all(".glora_A." in name or ".glora_B." in name for name in attached.trained())
    merged: Any = trained("glora", {"rank": None}, kind="biased").merged()
    assert torch.equal(merged.get_submodule(Q).bias, tiny_model("biased").get_submodule(Q).bias)


@pytest.mark.parametrize("form", ["relu", "qr"])
def test_deft_removes_and_injects(form: str) -> None:
    attached = trained("deft", {"rank": 4, "alpha": 12.0, "decomposition": form})
    p, r = layer(attached).deft_P["default"], layer(attached).deft_R["default"]
    left, right = (p, p.clamp(min=0)) if form == "relu" else (torch.linalg.qr(p)[0],) * 2
    check_tuned(attached, weight() - left @ right.T @ weight() + 3.0 * left @ r)


def test_para_takes_rank_away_from_the_start() -> None:
    attached = attach("deft_para", {"rank": 5})
    tuned = weight(V) + attached.delta(V)  # type: ignore[operator]
    assert torch.linalg.matrix_rank(tuned, rtol=1e-5) == 32 - 5


def test_peanut_reads_the_columns_of_a_weight() -> None:
    attached = trained("peanut", {"rank": 4, "depth": 1, "activation": "tanh", "scaling": 0.5})
    found = layer(attached)
    a, b = found.peanut_A["default"].weight, found.peanut_B["default"].weight
    encoder, decoder = (getattr(found, f"peanut_{part}")["default"][0].weight for part in ("encoders", "decoders"))
    inner = torch.tanh(a @ weight())
    inner = torch.tanh(decoder @ torch.tanh(encoder @ inner)) + inner
    check_tuned(attached, weight() + 0.5 * b @ inner)


def test_miss_bat_and_mini_work_on_blocks() -> None:
    bat = trained("miss_bat", {"rank": 8})
    blocks = layer(bat).miss_block["default"]
    expected = weight().clone()
    for row in range(0, 64, 8):
        for column in range(0, 64, 8):
            cell, block = weight()[row : row + 8, column : column + 8], blocks[row // 8]
            expected[row : row + 8, column : column + 8] = (cell + cell @ block + block).detach()
    check_tuned(bat, expected)
    mini = trained("miss_mini", {"rank": 8, "mini_rank": 16})
    check_tuned(mini, weight() + layer(mini).miss_block["default"].T.repeat(4, 8))


@pytest.mark.parametrize("largest", [True, False])
def test_supertuning_changes_exactly_the_chosen_entries(largest: bool) -> None:
    attached = trained("supertuning", {"sparsity": 0.95, "largest": largest})
    changed: Any = attached.delta(Q) != 0
    wanted = weight().abs().flatten().argsort(descending=largest)[: int(64 * 64 * 0.05)]
    assert set(changed.flatten().nonzero().flatten().tolist()) == set(wanted.tolist())


def test_small_changes_of_large_entries_count_in_bfloat16() -> None:
    attached: Any = attach("supertuning", dtype="bfloat16")
    found = layer(attached)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = found.get_base_layer().weight.flatten()
    with torch.no_grad():
        found.supertuning_values["default"].copy_(1e-3 * base[found.supertuning_indices["default"].long()].float())
        rounded = base.clone()
        rounded[found.supertuning_indices["default"].long()] += found.supertuning_values["default"].bfloat16()
        assert torch.equal(rounded, base), "the change is above the rounding of the weight"
        assert difference(found(x), found.get_base_layer()(x)) > 0


def test_beft_is_bitfit_on_the_value_projections() -> None:
    ours, other = trained("beft", rate=2e-2), trained("bitfit", {"targets": ["v_proj"]}, rate=2e-2)
    assert difference(logits(ours.model, tokens()), logits(other.model, tokens())) == 0
    tuned = logits(ours.model, tokens())
    merged = ours.merged()
    assert merged.config.attention_bias and difference(logits(merged, tokens()), tuned) <= MERGE
    with pytest.raises(UserError, match="cannot merge beft"):
        attach("beft", {"targets": ["down_proj"]}, kind="biased").merged()


@pytest.mark.parametrize(
    ("name", "config", "parts"),
    [
        ("boft", {"block_size": 24}, ("block_size: 24", "input size 64", "q_proj", "2, 4, 8")),
        ("boft", {"dropout": 0.01}, ("dropout: 0.01", "less than one block", "0.0625")),
        ("coft", {"block_size": 48}, ("block_size: 48", "divisors")),
        ("hra", {"rank": 7}, ("rank", "multiple of 2")),
        ("hra", {"rank": 66}, ("66 reflections", "64 inputs", "q_proj")),
        ("road", {"group_size": 64}, ("group_size: 64", "output size 32", "k_proj")),
        ("road", {"group_size": 7}, ("group_size", "multiple of 2")),
        ("psoft", {"rank": 33}, ("rank: 33", "k_proj", "1 to 32")),
        ("psoft", {"psoft_alpha": 8}, ("psoft_alpha",)),
        ("psoft", {"neumann_terms": 3}, ("3 terms",)),
        ("osf", {"preserved": 2944}, ("preserved", "less than 1")),
        ("osf", {"preserved": 1.0}, ("preserved", "less than 1")),
        ("osf", {"preserved": 0.03}, ("0.03 of the 32", "k_proj", "0.03125")),
        ("miss_bat", {"rank": 12}, ("rank: 12", "input size 64")),
        ("miss_bat", {"rank": 64}, ("rank: 64", "output size 32", "k_proj")),
        ("miss_bat", {"dropout": 0.1}, ("dropout",)),
        ("miss_mini", {"mini_rank": 12}, ("mini_rank: 12", "output size 64")),
        ("deft", {"rank": 33}, ("rank: 33", "1 to 32")),
        ("deft_para", {"dropout": 0.1}, ("dropout",)),
        ("glora", {"config_C": "lora"}, ("config_C",)),
        ("glora", {"rank": 33}, ("rank: 33",)),
        ("supertuning", {"sparsity": 0.9999}, ("sparsity: 0.9999", "q_proj", "4096 entries")),
        ("supra", {"rank": 33}, ("rank: 33",)),
        ("frod", {"sparse_rate": 0.0}, ("sparse_rate",)),
    ],
)
def test_what_does_not_fit_is_refused(name: str, config: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        make_method(name, config).count(tiny_model())
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "beft"])
def test_sizes_fit_and_their_counts_are_exact(name: str) -> None:
    method = make_method(name, SETTINGS[name].get("config"))
    with torch.device("meta"):
        sketch = type(tiny_model())(tiny_model().config)
    values = list(method.sizes(sketch))
    some = sorted({*range(0, len(values), max(1, len(values) // 20)), len(values) - 1})
    size = method.size
    assert size is not None

    def make(index: int) -> Any:
        return make_method(name, {**SETTINGS[name].get("config", {}), size: values[index]})

    counts = [make(index).count(sketch) for index in some]
    assert counts == sorted(counts) and counts[-1] > counts[0]
    for index in (0, len(values) - 1):
        attached = make(index).attach(tiny_model(), seed=0)
        assert sum(p.numel() for p in attached.trained().values()) == make(index).count(sketch)
