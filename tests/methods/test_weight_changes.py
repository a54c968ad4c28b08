"""Facts about methods that add a change to each weight, each checked against an independent computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached
from peft_arena.methods.registry import make_method
from peft_arena.testing.methods import difference, logits, tiny_model, tokens, train
from tests.methods.settings.weight_changes import SETTINGS

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
DOWN = "model.layers.1.mlp.down_proj"
FROZEN = ("delora", "fourierft", "pvera", "randlora", "shira", "tinylora", "unilora", "waveft")


def attach(name: str, config: dict[str, Any] | None = None, seed: int = 0, dtype: str = "float32") -> Attached:
    settings = SETTINGS[name].get("config", {}) | (config or {})
    return make_method(name, settings).attach(tiny_model(dtype=dtype), seed=seed)


def trained(name: str, config: dict[str, Any] | None = None, dtype: str = "float32") -> Attached:
    attached = attach(name, config, dtype=dtype)
    train(attached, SETTINGS[name].get("learning_rate", 5e-3), steps=3)
    return attached


def weight_of(module: str) -> Tensor:
    layer: Any = tiny_model().get_submodule(module)
    weight: Tensor = layer.weight.detach()
    return weight


def shapes() -> Any:
    model: Any = tiny_model()
    return model.to("meta")


def layer_of(attached: Attached, module: str) -> Any:
    return attached.model.base_model.model.get_submodule(module)  # type: ignore[union-attr]


def loha(layer: Any, _: Tensor) -> Tensor:
    one = layer.hada_w1_a["default"] @ layer.hada_w1_b["default"]
    return 2.0 * one * (layer.hada_w2_a["default"] @ layer.hada_w2_b["default"])


def lokr(layer: Any, weight: Tensor) -> Tensor:
    first = layer.lokr_w1["default"]
    second = layer.lokr_w2_a["default"] @ layer.lokr_w2_b["default"]
    product = torch.einsum("ac,bd->abcd", first, second).reshape(weight.shape)
    return 16.0 / 3 * product


def hira(layer: Any, weight: Tensor) -> Tensor:
    return weight * (layer.hira_B["default"] @ layer.hira_A["default"])


def gralora(layer: Any, weight: Tensor) -> Tensor:
    """Tile (i, j) is a product of rank rank / blocks from the i-th part of B and the j-th part of A."""
    a, b = layer.gralora_A["default"], layer.gralora_B["default"]  # (blocks, in / blocks, rank), (blocks, rank, ...)
    rows = [torch.cat([b[i, 4 * j : 4 * j + 4].T @ a[j, :, 4 * i : 4 * i + 4].T for j in (0, 1)], 1) for i in (0, 1)]
    return 2.0 * torch.cat(rows)


def delora(layer: Any, weight: Tensor) -> Tensor:
    a, b = layer.delora_A["default"], layer.delora_B["default"]
    directions = torch.nn.functional.normalize(b, dim=0) @ torch.nn.functional.normalize(a, dim=1)
    return layer.delora_lambda["default"] / 8 * directions * weight.norm(dim=0)


def randlora(layer: Any, weight: Tensor) -> Tensor:
    """peft takes the columns of the random B in another order for each number of bases; they are random anyway."""
    a, b = layer.randlora_A["default"], layer.randlora_B["default"]
    scales, behind = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    narrow, wide = sorted(weight.shape)
    total = torch.zeros(wide, narrow)
    count = narrow // 8
    columns = b[:wide, :count].flatten(1)
    for j in range(count):
        total = total + columns[:, j::count] @ torch.diag(scales[:, j]) @ a[:, 0, :narrow] @ torch.diag(behind[j])
    return 20.0 * (total if weight.shape[0] == wide else total.T)


def pvera(layer: Any, weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    a, b = layer.pvera_A["default"][:8, :columns], layer.pvera_B["default"][:rows]
    return layer.pvera_lambda_b["default"][:, None] * b @ (layer.pvera_lambda_d["default"][:8, None] * a)


def vblora(layer: Any, _: Tensor) -> Tensor:
    bank = layer.vblora_vector_bank["default"]

    def mixed(logit: Tensor) -> Tensor:
        best = logit.sort(descending=True)
        weights = best.values[:2].exp() / best.values[:2].exp().sum()
        return weights[0] * bank[best.indices[0]] + weights[1] * bank[best.indices[1]]

    first, second = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]
    a = torch.stack([torch.cat([mixed(piece) for piece in row]) for row in first])
    b = torch.cat([torch.stack([mixed(piece) for piece in part], 1) for part in second])
    return b @ a


def unilora(layer: Any, _: Tensor) -> Tensor:
    theta = layer.unilora_theta_d["default"]
    a = theta[layer.unilora_indices_A["default"]] * layer.unilora_scales_A["default"]
    return (theta[layer.unilora_indices_B["default"]] * layer.unilora_scales_B["default"]) @ a


def tinylora(layer: Any, weight: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    vector = layer.tinylora_v["default"][layer._tinylora_v_key["default"]]
    middle = sum(v * p for v, p in zip(vector, layer.tinylora_P["default"], strict=True))
    root = values[:2].sqrt()
    signs = (layer.tinylora_A["default"] * right[:2]).sum(1).sign()
    return (left[:, :2] * signs * root) @ middle @ (signs[:, None] * root[:, None] * right[:2])


def fourierft(layer: Any, weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    total = torch.zeros(rows, columns, dtype=torch.float64)
    for coefficient, (k, m) in zip(layer.fourierft_spectrum["default"], layer.indices["default"].T, strict=True):
        angles = torch.arange(rows)[:, None] * k / rows + torch.arange(columns) * m / columns
        total += coefficient * torch.cos(2 * torch.pi * angles.double())
    return (60.0 * total / (rows * columns)).float()


def waveft(layer: Any, weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    total = torch.zeros(rows, columns)
    for coefficient, (k, m) in zip(layer.waveft_spectrum["default"], layer.waveft_indices["default"].T, strict=True):
        i, j = int(k) % (rows // 2), int(m) % (columns // 2)
        pattern = haar(bool(2 * m >= columns), bool(2 * k >= rows))
        total[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += coefficient.detach() * pattern
    return 25.0 * total


def haar(down: bool, across: bool) -> Tensor:
    """Return the 2 x 2 pattern of one Haar coefficient: a mean or a difference along each side."""
    plain, change = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    return 0.5 * torch.outer(change if down else plain, change if across else plain)


def c3a(layer: Any, weight: Tensor) -> Tensor:
    kernels = layer.c3a_kernel["default"]
    rows = [torch.cat([circulant(kernel) for kernel in row], 1) for row in kernels]
    return torch.cat(rows) / weight.shape[1]


def circulant(kernel: Tensor) -> Tensor:
    size = len(kernel)
    return torch.stack([torch.stack([kernel[(j - i) % size] for j in range(size)]) for i in range(size)])


def shira(layer: Any, weight: Tensor) -> Tensor:
    change = torch.zeros(weight.shape)
    for value, (row, column) in zip(layer.shira_weight["default"], layer.shira_indices["default"].T, strict=True):
        change[row, column] = value.detach()
    return change


EQUATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    function.__name__: function
    for function in (
        *(loha, lokr, hira, gralora, delora, randlora, pvera, vblora),
        *(unilora, tinylora, fourierft, waveft, c3a, shira),
    )
}


@pytest.mark.parametrize("name", SETTINGS)
def test_change_is_what_the_equation_says(name: str) -> None:
    attached = trained(name)
    for module in (Q, V, DOWN):
        weight = weight_of(module)
        wanted = EQUATIONS[name](layer_of(attached, module), weight).detach()
        found = attached.delta(module)
        assert found is not None and float(found.abs().max()) > 1e-5
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", FROZEN)
def test_checkpoint_and_state_hold_what_was_drawn(name: str, tmp_path: Path) -> None:
    attached = trained(name)
    tuned = logits(attached.model, tokens())
    other = attach(name, seed=9)
    other.load_state({key: tensor.clone() for key, tensor in attached.state().items()})
    assert difference(logits(other.model, tokens()), tuned) == 0
    attached.save(tmp_path)
    method = make_method(name, SETTINGS[name].get("config"))
    file = tmp_path / "adapter_config.json"
    table = json.loads(file.read_text())
    seeds = {key: 12345 for key in method.derived_settings}  # type: ignore[attr-defined]
    file.write_text(json.dumps(table | seeds))
    assert difference(logits(method.restore(tiny_model(), tmp_path).model, tokens()), tuned) == 0


def test_tinylora_is_read_without_an_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attached = trained("tinylora")
    attached.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("an SVD was taken"))
        restored = make_method("tinylora", SETTINGS["tinylora"]["config"]).restore(tiny_model(), tmp_path)
    assert difference(logits(restored.model, tokens()), logits(attached.model, tokens())) == 0
    assert layer_of(attach("tinylora"), Q).tinylora_A["default"].abs().max() > 0


def test_randlora_saves_its_bases_once(tmp_path: Path) -> None:
    attach("randlora").save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    bases = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "randlora_A" in name or "_B" in name}
    assert sorted(bases.values()) == [(8, 1, 128), (128, 16, 8)]


def test_pvera_samples_in_training_only() -> None:
    attached = trained("pvera")
    with torch.no_grad():
        mean = attached.model(input_ids=tokens()).logits
        attached.model.train()
        first, second = (attached.model(input_ids=tokens()).logits for _ in range(2))
    assert difference(first, second) > 1e-4 and difference(first, mean) > 1e-4
    attached.model.eval()
    assert torch.equal(attached.model(input_ids=tokens()).logits, mean)


def test_shira_masks_differ_between_layers_of_one_shape_and_small_changes_count_in_bfloat16() -> None:
    attached = attach("shira", dtype="bfloat16")
    first, second = (layer_of(attached, f"model.layers.{n}.self_attn.q_proj") for n in (0, 1))
    assert not torch.equal(first.shira_indices["default"], second.shira_indices["default"])
    layer = layer_of(attached, Q)
    with torch.no_grad():
        layer.shira_weight["default"].fill_(1e-4)  # far below the rounding of the weights
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    moved = (layer(x) - layer.base_layer(x)).detach()
    assert float(moved.abs().max()) > 0
    plain = layer.base_layer.weight.detach()
    assert torch.equal(plain[plain.abs() > 0.05] + 1e-4, plain[plain.abs() > 0.05])


def test_delora_reaches_full_strength_in_one_step_at_any_rate() -> None:
    sizes = []
    for rate in (1e-4, 1e-2):
        attached = attach("delora")
        train(attached, rate, steps=1)
        change = attached.delta(Q)
        assert change is not None
        sizes.append(float(change.norm()))
    weight = weight_of(Q).norm()
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1) and sizes[0] > 0.5 * float(weight)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {}) for name in SETTINGS),
        ("lokr", {"decompose_both": True}),
        ("lokr", {"decompose_factor": 4, "rank": 5}),
        ("gralora", {"hybrid_rank": 3, "blocks": 4}),
        ("tinylora", {"weight_tying": 0.7}),
        ("randlora", {"rank": 7}),
    ],
)
def test_count_needs_no_weights_and_grows_with_size(name: str, config: dict[str, Any]) -> None:
    settings = SETTINGS[name].get("config", {}) | config
    method = make_method(name, settings)
    model = shapes()
    assert method.count(model) == sum(p.numel() for p in attach(name, config).trained().values())
    assert method.size is not None
    sizes = method.sizes(model)
    step = max(1, len(sizes) // 12)
    picked = [*sizes[::step], sizes[-1]]
    counts = [make_method(name, settings | {method.size: size}).count(model) for size in picked]
    assert len(picked) > 2 and all(one is not None and two is not None and one <= two for one, two in pairwise(counts))


@pytest.mark.parametrize(
    ("name", "config", "parts"),
    [
        ("c3a", {"block_size": 24}, ("24", "q_proj", "64 x 64", "2, 4, 8, 16, 32")),
        ("delora", {"rank": 33}, ("33", "k_proj", "1 to 32")),
        ("fourierft", {"coefficients": 2049}, ("2049", "k_proj", "32 x 64", "2048")),
        ("gralora", {"blocks": 3, "rank": 9}, ("blocks: 3", "q_proj")),
        ("gralora", {"rank": 9}, ("rank 9", "blocks 2")),
        ("gralora", {"hybrid_rank": 33}, ("hybrid_rank", "k_proj", "32")),
        ("gralora", {"blocks": 1}, ("blocks",)),
        ("hira", {"rank": 33}, ("33", "k_proj", "1 to 32")),
        ("loha", {"rank": 33}, ("33", "k_proj", "1 to 32")),
        ("lokr", {"rank": 4}, ("rank: 4", "q_proj", "1 to 3")),
        ("lokr", {"rank": 2, "decompose_factor": 2, "decompose_both": True}, ("rank: 2", "none")),
        ("lokr", {"decompose_factor": 5}, ("decompose_factor: 5", "q_proj", "2, 4, 8, 16, 32")),
        ("randlora", {"rank": 33}, ("33", "k_proj", "1 to 32")),
        ("shira", {"rank": 22}, ("22", "k_proj", "32 x 64", "1 to 21")),
        ("tinylora", {"rank": 33}, ("33", "k_proj", "1 to 32")),
        ("unilora", {"theta_length": 8193}, ("8193", "8192")),
        ("vblora", {"vector_length": 24}, ("24", "q_proj", "64 x 64", "1, 2, 4, 8, 16, 32")),
        ("vblora", {"topk": 1}, ("topk",)),
        ("vblora", {"vectors": 2, "topk": 3}, ("topk 3", "vectors 2")),
        ("waveft", {"coefficients": 2049}, ("2049", "k_proj", "32 x 64", "2048")),
    ],
)
def test_what_does_not_fit_is_refused_by_count_too(name: str, config: dict[str, Any], parts: tuple[str, ...]) -> None:
    settings = SETTINGS[name].get("config", {}) | config
    with pytest.raises(UserError) as caught:
        make_method(name, settings).count(shapes())
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in parts), text
