"""Points anywhere between the pretrained and the tuned weights: factors by parameter, ways, additions, rotations."""

import math

import peft
import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.methods.base import PathKind
from peft_arena.testing.subject import difference, logits, tiny_model, tokens
from peft_arena.weights.adapter_files import express
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Dense, LowRank
from peft_arena.weights.effective import effective_weights
from peft_arena.weights.rotation import Rotation
from tests.weights.weight_toys import ATTENTION, LINEAR, save_adapter

Q, V, UP = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules=ATTENTION),
    "dora": peft.LoraConfig(r=4, target_modules=ATTENTION, use_dora=True),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION, use_cayley_neumann=False),
    "oft by series": peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION),
    "boft": peft.BOFTConfig(boft_block_size=8, target_modules=ATTENTION),
    "road": peft.RoadConfig(group_size=8, target_modules=ATTENTION),
    "ia3": peft.IA3Config(target_modules=[*ATTENTION, "down_proj"], feedforward_modules=["down_proj"]),
    "norms": peft.LNTuningConfig(target_modules=["norm"]),
    "loha": peft.LoHaConfig(r=4, target_modules=ATTENTION),
}
KINDS = {"oft": "cayley", "oft by series": "cayley", "boft": "cayley", "dora": "multiplicative"}
KINDS |= {"road": "multiplicative", "ia3": "multiplicative"}
EXTRA = LowRank(torch.full((64, 1), 0.1), torch.full((1, 64), 0.2))


def point(directory, name, kind="untied", size=0.05):
    adapter = save_adapter(directory / name.replace(" ", "-"), CONFIGS[name], kind, size)
    return effective_weights(BaseWeights.of_model(tiny_model(kind)), adapter)


def change(weights, module):
    pair = weights.pair(module)
    return torch.zeros_like(pair.base) if pair.change is None else pair.change.dense(pair.base)


@pytest.mark.parametrize("name", CONFIGS)
def test_kinds_are_told_by_the_form(name, tmp_path):
    assert point(tmp_path, name).path_kinds() == {PathKind(KINDS.get(name, "linear"))}


def test_the_pretrained_model_has_no_path():
    weights = effective_weights(BaseWeights.of_model(tiny_model()), None)
    assert weights.path_kinds() == frozenset()
    assert weights.orthogonality() is None and express(weights) is None
    with pytest.raises(UserError, match="nothing is changed"):
        weights.along("sqrt")


def test_factors_multiply_and_leave_the_others(tmp_path):
    whole = point(tmp_path, "lora")
    moved = whole.interpolated(0.5).scaled({f"{Q}.weight": 0.6}).scaled({f"{Q}.weight": 0.5, f"{UP}.weight": 7.0})
    assert moved.factor_of(f"{Q}.weight") == pytest.approx(0.15)
    torch.testing.assert_close(change(moved, Q), 0.15 * change(whole, Q))
    torch.testing.assert_close(change(moved, V), 0.5 * change(whole, V))
    assert moved.pair(UP).change is None
    assert whole.factor_of(f"{Q}.weight") == 1.0 and moved.interpolated(2.0).factor_of(f"{V}.weight") == 1.0
    with pytest.raises(UserError, match="unknown parameter"):
        whole.scaled({"model.layers.9.mlp.up_proj.weight": 0.5})


def test_added_biases_and_tied_names_have_factors_too(tmp_path):
    adapter = save_adapter(tmp_path / "beft", peft.BeftConfig(target_modules=["o_proj"]), size=0.5)
    whole = effective_weights(BaseWeights.of_model(tiny_model()), adapter)
    bias = "model.layers.0.self_attn.o_proj.bias"
    moved = whole.scaled({bias: 0.25})
    torch.testing.assert_close(moved.parameter(bias).change.delta, 0.25 * whole.parameter(bias).change.delta)
    tuned = tiny_model("tied")
    with torch.no_grad():
        tuned.model.embed_tokens.weight.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    tied = effective_weights(BaseWeights.of_model(tiny_model("tied")), tmp_path / "tuned")
    assert tied.scaled({"lm_head.weight": 0.5}).factor_of("model.embed_tokens.weight") == 0.5


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_factors_are_numbers(factor, tmp_path):
    whole = point(tmp_path, "lora")
    for call in (whole.interpolated, lambda value: whole.scaled({f"{Q}.weight": value})):
        with pytest.raises(UserError, match="finite"):
            call(factor)


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_sqrt_scales_the_generator_by_the_root(name, tmp_path):
    whole = point(tmp_path, name)
    moved, own = whole.along("sqrt").interpolated(0.49), whole.interpolated(0.7)
    turned = [one.pair(Q).change for one in (moved, own)]
    turned = [one if isinstance(one, Rotation) else one.rotation for one in turned]
    torch.testing.assert_close(turned[0].skew, turned[1].skew)
    if name == "oft":
        assert difference(change(moved, Q), change(own, Q)) < 1e-7
    else:
        factors = moved.pair(Q).change.beyond, whole.pair(Q).change.beyond
        torch.testing.assert_close(factors[0], 0.49 * factors[1])
    assert torch.equal(change(whole.along("sqrt"), Q), change(whole, Q))
    assert moved.way == "sqrt" and whole.way == "own"


def test_sqrt_is_refused_where_nothing_turns_or_the_factor_has_no_root(tmp_path):
    for name in ("lora", "ia3", "road"):
        with pytest.raises(UserError, match="sqrt is for rotations"):
            point(tmp_path, name).along("sqrt")
    weights = point(tmp_path, "oft")
    for call in (
        lambda: weights.along("sqrt").interpolated(-0.5),
        lambda: weights.interpolated(-0.5).along("sqrt"),
        lambda: weights.along("sqrt").scaled({f"{Q}.weight": -1.0}),
    ):
        with pytest.raises(UserError, match="root"):
            call()
    assert difference(change(weights.interpolated(-0.5), Q), torch.zeros(64, 64)) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_the_straight_way_is_straight(name, tmp_path):
    whole = point(tmp_path, name, size=0.2)
    straight = whole.along("linear")
    kind = type(whole.pair(Q).change)
    for factor in (0.0, 0.4, 1.0, 1.2):
        moved = straight.interpolated(factor)
        assert difference(change(moved, Q), factor * change(whole, Q)) < 1e-6
        own = difference(change(whole.interpolated(factor), Q), factor * change(whole, Q))
        curved = name in ("oft", "oft by series", "boft", "road", "dora") and factor in (0.4, 1.2)
        assert (own > 1e-4) == curved
        assert not curved or isinstance(moved.pair(Q).change, Dense)
    if name in ("lora", "ia3"):
        assert type(straight.interpolated(0.4).pair(Q).change) is kind


@pytest.mark.parametrize(("name", "kind"), [("lora", LowRank), ("dora", Dense), ("oft", Dense), ("loha", Dense)])
def test_low_rank_changes_are_added_after_scaling(name, kind, tmp_path):
    whole = point(tmp_path, name)
    moved = whole.plus({f"{Q}.weight": EXTRA}).interpolated(0.5).plus({f"{Q}.weight": EXTRA})
    assert isinstance(moved.pair(Q).change, kind)
    assert difference(change(moved, Q), change(whole.interpolated(0.5), Q) + 0.04) < 1e-6
    assert difference(change(moved, V), change(whole.interpolated(0.5), V)) == 0
    assert name != "lora" or moved.pair(Q).change.a.shape == (6, 64)


def test_additions_that_have_no_place_are_refused(tmp_path):
    whole = point(tmp_path, "lora")
    for name, extra, part in (
        (f"{UP}.weight", LowRank(torch.zeros(128, 1), torch.zeros(1, 64)), "leaves it as it is"),
        (f"{V}.weight", EXTRA, r"shape \(64, 64\) cannot be added"),
        ("nowhere.weight", EXTRA, "unknown parameter"),
    ):
        with pytest.raises(UserError, match=part):
            whole.plus({name: extra})
    tiny_model().save_pretrained(tmp_path / "same")
    same = effective_weights(BaseWeights.of_model(tiny_model()), tmp_path / "same").plus({f"{Q}.weight": EXTRA})
    with pytest.raises(UserError, match="leaves it as it is"):
        same.pair(Q)


def test_one_model_is_moved_between_points_of_every_kind(tmp_path):
    whole = point(tmp_path, "oft")
    views = {
        "base": whole.interpolated(0.0),
        "half": whole.interpolated(0.5),
        "root": whole.along("sqrt").interpolated(0.5),
        "straight": whole.along("linear").interpolated(0.5),
        "one layer": whole.scaled({f"{Q}.weight": 0.0}),
        "more": whole.plus({f"{Q}.weight": EXTRA}),
        "tuned": whole,
    }
    model, seen = tiny_model(), {}
    for name in [*views, *reversed(views)]:
        views[name].load_into(model)
        now = logits(model, tokens())
        assert difference(now, seen.setdefault(name, now)) == 0
    names = list(views)
    gaps = [difference(seen[a], seen[b]) for place, a in enumerate(names) for b in names[:place]]
    assert min(gaps) > 1e-4
    assert difference(seen["base"], logits(tiny_model(), tokens())) == 0


def test_how_orthogonal_a_point_is(tmp_path):
    for name in ("oft", "boft"):
        whole = point(tmp_path, name, size=0.3)
        for moved in (whole, whole.interpolated(1.5), whole.along("sqrt").interpolated(0.3)):
            assert 0 < moved.orthogonality() <= 1e-6
    straight = point(tmp_path, "oft", size=0.3).along("linear")
    turned = straight.pair(Q).change
    assert isinstance(turned, Rotation)
    half = torch.eye(8).double() + 0.5 * turned.beyond.double()
    own = float((half.transpose(1, 2) @ half - torch.eye(8)).norm(dim=(1, 2)).max())
    assert straight.interpolated(0.5).orthogonality() >= own - 1e-9 > 1e-2
    assert straight.interpolated(0.0).orthogonality() == 0
    assert point(tmp_path, "oft by series", size=0.3).orthogonality() > 1e-2
    few = point(tmp_path, "oft by series", size=0.3).scaled(
        {f"model.layers.{layer}.self_attn.{leaf}.weight": 0.0 for layer in (0, 1) for leaf in ATTENTION}
    )
    assert few.orthogonality() == 0
    for name in ("lora", "road", "norms"):
        assert point(tmp_path, name).orthogonality() is None
    assert point(tmp_path, "boft", size=0.3).along("linear").interpolated(0.5).orthogonality() is None


def test_linear_layers_of_the_base_are_the_targets():
    assert {name.rpartition(".")[2] for name in BaseWeights.of_model(tiny_model()).linears} == set(LINEAR)
