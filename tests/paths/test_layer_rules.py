"""Rules that give each layer a factor: exact formulas, both ends, flattening."""

import math

import pytest
import torch
from peft import LoraConfig, OFTConfig

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.methods.targets import block_of
from peft_arena.paths import match
from peft_arena.paths.rules import make_rule
from peft_arena.paths.strength import block_strengths
from peft_arena.testing.subject import logits, tiny_model, tokens
from peft_arena.weights.adapter_directory import Changes
from peft_arena.weights.base import BaseWeights, base_weights
from peft_arena.weights.change import Dense
from peft_arena.weights.effective import EffectiveWeights, effective_weights
from tests.paths.path_toys import (
    BLOCKS,
    EMBEDDING,
    FINAL,
    KINDS,
    NORM,
    SIZES,
    deep_model,
    multiplied_out,
    tuned,
)
from tests.weights.weight_toys import LINEAR, save_adapter

OTHERS = {NORM: 0.1, EMBEDDING: 0.02, FINAL: 0.1}
LAYER_RULES = ["uniform", "safe", "min", "lines"]
SMALL, LARGE = 4, 3
"""The blocks with the smallest and the largest change."""
WAYS = [*((form, "own") for form in KINDS), ("rotation", "sqrt"), ("rotation", "linear"), ("dora", "linear")]


def close(found, wanted):
    """Compare two multiplied-out changes."""
    assert found.keys() == wanted.keys()
    for name, change in found.items():
        torch.testing.assert_close(change, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYER_RULES)
@pytest.mark.parametrize("form", KINDS)
def test_factor_zero_is_the_pretrained_model_exactly(name, form):
    rule = make_rule(name)
    point = rule.apply(tuned(form, others=OTHERS), 0.0)
    assert rule.card.from_base
    for change in multiplied_out(point).values():
        assert not change.any()


@pytest.mark.parametrize("form", KINDS)
def test_uniform_is_the_path_of_the_method(form):
    weights = tuned(form, others=OTHERS)
    rule = make_rule("uniform")
    assert rule.card.to_tuned
    close(multiplied_out(rule.apply(weights, 1.0)), multiplied_out(weights))
    close(multiplied_out(rule.apply(weights, 0.3)), multiplied_out(weights.interpolated(0.3)))
    close(multiplied_out(rule.apply(weights, 1.2)), multiplied_out(weights.interpolated(1.2)))


@pytest.mark.parametrize("form", ["low-rank", "dense"])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_safe_scales_stronger_blocks_by_the_exact_ratio(form, count):
    weights = tuned(form, others=OTHERS)
    before = block_strengths(weights)
    first = list(before.values())[:count]
    target = sum(first) / len(first)
    point = make_rule("safe", {"blocks": count}).apply(weights, 0.6)
    for name in weights.parameters():
        block = block_of(name)
        ratio = 1.0 if block is None else min(1.0, target / before[block])
        assert point.factor_of(name) == pytest.approx(0.6 * ratio, rel=1e-6), name
    factors = {point.factor_of(f"model.layers.{block}.mlp.up_proj.weight") for block in range(BLOCKS)}
    assert len(factors) > 2, "some blocks are above and some below"
    assert point.factor_of(NORM) == point.factor_of("model.layers.3.mlp.up_proj.weight") < 0.6
    assert point.factor_of(EMBEDDING) == point.factor_of(FINAL) == 0.6


@pytest.mark.parametrize("kind", ["relative_norm", "spectral", "angle"])
@pytest.mark.parametrize(("form", "way"), WAYS)
def test_no_block_is_above_the_target_afterwards_and_those_below_stay(form, way, kind):
    weights = tuned(form).along(way)
    if kind == "angle" and (form != "rotation" or way == "linear"):
        with pytest.raises(UserError, match="rule safe cannot be used here: strength angle is"):
            make_rule("safe", {"strength": kind}).apply(weights, 1.0)
        return
    before = block_strengths(weights, kind)
    target = sum(list(before.values())[:5]) / 5
    after = block_strengths(make_rule("safe", {"strength": kind}).apply(weights, 1.0), kind)
    assert max(after.values()) <= target * 1.005
    for block, strength in before.items():
        if strength <= target:
            assert after[block] == strength
        else:
            assert after[block] == pytest.approx(target, rel=0.005)
    assert before[LARGE] > 1.5 * target > target > before[SMALL]


@pytest.mark.parametrize("kind", ["relative_norm", "spectral", "angle"])
def test_the_ratio_alone_would_not_do_for_large_rotations(kind):
    weights = tuned("rotation")
    before = block_strengths(weights, kind)
    target = before[SMALL]
    ratio = weights.interpolated(target / before[LARGE])
    assert abs(block_strengths(ratio, kind)[LARGE] / target - 1) > 0.02
    found = match.matching_factors(weights, kind, before, target)
    assert set(found) == set(range(BLOCKS)) - {SMALL}
    exact = block_strengths(weights.interpolated(found[LARGE]), kind)[LARGE]
    assert exact == pytest.approx(target, rel=0.005)


@pytest.mark.parametrize(("form", "way"), WAYS)
def test_min_brings_every_block_to_the_weakest(form, way):
    weights = tuned(form, others=OTHERS).along(way)
    before = block_strengths(weights)
    point = make_rule("min").apply(weights, 1.0)
    after = block_strengths(point)
    assert list(after.values()) == pytest.approx([before[SMALL]] * BLOCKS, rel=0.005)
    assert after[SMALL] == before[SMALL] == min(before.values())
    assert point.factor_of(EMBEDDING) == 1.0 and point.factor_of(NORM) < 0.5


@pytest.mark.parametrize("name", ["safe", "min"])
@pytest.mark.parametrize("way", ["own", "sqrt"])
def test_rotations_stay_rotations(name, way):
    rule, weights = make_rule(name), tuned("rotation").along(way)
    for factor in (0.3, 1.0, 1.2):
        assert rule.apply(weights, factor).orthogonality() <= 1e-5
    straight = weights.along("linear")
    assert rule.apply(straight, 0.5).orthogonality() > 1e-3, "the measure sees what leaves the rotations"


@pytest.mark.parametrize("name", ["safe", "min"])
def test_strengths_grow_with_the_factor(name):
    rule, weights = make_rule(name), tuned("rotation")
    found = [block_strengths(rule.apply(weights, factor)) for factor in (0.0, 0.25, 0.5, 1.0, 1.25)]
    for block in range(BLOCKS):
        along = [strengths[block] for strengths in found]
        assert along == sorted(along) and along[0] == 0 < along[1]


def test_blocks_of_zero_strength_count_nowhere():
    sizes = (0, 0, 0.8, 0, 0.3, 0.5)
    weights = tuned("low-rank", sizes=sizes, others=OTHERS)
    before = block_strengths(weights)
    weakest = make_rule("min").apply(weights, 1.0)
    after = block_strengths(weakest)
    assert [after[block] for block in (2, 4, 5)] == pytest.approx([before[4]] * 3, rel=1e-5)
    assert [after[block] for block in (0, 1, 3)] == [0, 0, 0]
    assert weakest.factor_of(NORM) == 1.0, "block 3 has no strength to match"
    two = block_strengths(make_rule("safe", {"blocks": 2}).apply(weights, 1.0))
    assert two[2] == pytest.approx((before[2] + before[4]) / 2, rel=1e-5)
    assert two[4] == before[4]


@pytest.mark.parametrize("first", [0.0, 0.25, 1.0])
def test_lines_grow_linearly_with_depth(first):
    weights = tuned("dora", others=OTHERS)
    point = make_rule("lines", {"first": first}).apply(weights, 0.8)
    for name in weights.parameters():
        block = block_of(name)
        depth = block / (BLOCKS - 1) if block is not None else 0.0 if name == EMBEDDING else 1.0
        assert point.factor_of(name) == pytest.approx(0.8 * (first + (1 - first) * depth)), name
    assert {name for name in weights.parameters() if block_of(name) is None} == {EMBEDDING, FINAL, "lm_head.weight"}
    moved, whole = multiplied_out(point), multiplied_out(weights)
    torch.testing.assert_close(moved[EMBEDDING], 0.8 * first * whole[EMBEDDING], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved[FINAL], 0.8 * whole[FINAL], rtol=1e-4, atol=1e-7)


def test_an_output_layer_tied_to_the_embeddings_goes_with_them():
    weights = tuned("dense", others={EMBEDDING: 0.1}, model=deep_model(tied=True))
    point = make_rule("lines", {"first": 0.5}).apply(weights, 1.0)
    assert point.factor_of(EMBEDDING) == 0.5 and "lm_head.weight" not in weights.parameters()


def test_the_only_block_of_a_model_is_its_last():
    weights = tuned("dense", sizes=[1.0], others={FINAL: 0.1}, model=deep_model(1))
    point = make_rule("lines", {"first": 0.5}).apply(weights, 1.0)
    assert point.factor_of("model.layers.0.mlp.up_proj.weight") == 1.0
    assert point.factor_of(EMBEDDING) == 0.5 and point.factor_of(FINAL) == 1.0


def test_biases_that_a_method_adds_go_with_their_block():
    weights = tuned("dense")
    name = "model.layers.3.mlp.up_proj.bias"
    makers = {**weights.changes.makers, name: lambda: Dense(torch.ones(48))}
    weights = EffectiveWeights(weights.base_weights, Changes(makers, {name: (48,)}))
    for rule in ("safe", "min", "lines"):
        point = make_rule(rule).apply(weights, 1.0)
        assert point.factor_of(name) == point.factor_of("model.layers.3.mlp.up_proj.weight") < 1


@pytest.mark.parametrize("name", LAYER_RULES)
def test_a_grid_measures_once(name, monkeypatch):
    calls, real = [], match.block_strengths
    monkeypatch.setattr(match, "block_strengths", lambda *given, **named: calls.append(1) or real(*given, **named))
    rule, weights = make_rule(name), tuned("rotation")
    rule.apply(weights, 0.5)
    first = len(calls)
    points = [rule.apply(weights, factor / 10) for factor in range(13)]
    assert len(calls) == first and len(points) == 13
    assert first == 0 if name in ("uniform", "lines") else 2 <= first <= 6
    rule.apply(tuned("rotation", sizes=SIZES[::-1]), 1.0)
    assert len(calls) == 0 if name in ("uniform", "lines") else len(calls) > first, "other weights are measured anew"


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_factors_that_are_no_point_are_refused(factor):
    with pytest.raises(UserError, match="a factor is a finite number of at least 0, got"):
        make_rule("lines").apply(tuned("dense"), factor)


@pytest.mark.parametrize("name", ["safe", "min"])
def test_weights_without_strengths_are_refused(name):
    norms = tuned("dense", sizes=[0] * BLOCKS, others=OTHERS)
    assert "no weight of a linear layer inside a transformer block is changed" in make_rule(name).refuses(norms)
    with pytest.raises(UserError, match=f"rule {name} cannot be used here: no weight of a linear layer"):
        make_rule(name).apply(norms, 0.5)
    unmoved = tuned("low-rank").interpolated(0.0)
    with pytest.raises(UserError, match=f"rule {name} cannot be used here: no weight of a linear layer"):
        make_rule(name).apply(unmoved, 0.5)


def test_lines_need_blocks():
    model = torch.nn.Module()
    model.head = torch.nn.Linear(4, 4)
    model.get_output_embeddings = lambda: None
    base = BaseWeights(model, torch.float32, lambda name: model.head.weight.detach(), lambda: model)
    assert "inside a numbered transformer block" in make_rule("lines").refuses(EffectiveWeights(base, Changes()))


def test_a_strength_that_jumps_is_an_error(monkeypatch):
    weights = tuned("rotation")
    monkeypatch.setattr(match, "block_strengths", lambda *a, blocks, **k: dict.fromkeys(blocks, 9.0))
    with pytest.raises(UserError, match=r"no factor brings block 3 to a strength \(relative_norm\) of 1"):
        match.matching_factors(weights, "relative_norm", {3: 2.0}, 1.0)


CONFIGS = {
    "one block of two": lambda: OFTConfig(
        r=0, oft_block_size=8, target_modules=LINEAR, layers_to_transform=[1], use_cayley_neumann=False
    ),
    "rotations": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=LINEAR, use_cayley_neumann=True),
    "low-rank": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("name", LAYER_RULES)
def test_adapters_of_peft_are_moved_as_said(case, name, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", CONFIGS[case](), size=0.1)
    weights = effective_weights(base_weights(ModelSpec(name=str(tmp_path / "base"))), tmp_path / "adapter")
    rule, ids, model = make_rule(name), tokens(), tiny_model()
    before = block_strengths(weights)
    assert (before[0] == 0) == (case == "one block of two") and before[1] > 0
    wanted = {"uniform": before, "min": dict.fromkeys(before, min(value for value in before.values() if value))}
    after = block_strengths(rule.apply(weights, 1.0))
    assert after[1] == pytest.approx(wanted.get(name, {}).get(1, after[1]), rel=0.005) and after[1] > 0
    if name == "lines":
        assert after == {0: 0.0, 1: before[1]}
    base = logits(tiny_model(), ids)
    rule.apply(weights, 1.0).load_into(model)
    assert float((logits(model, ids) - base).abs().max()) > 1e-2
    rule.apply(weights, 0.0).load_into(model)
    assert torch.equal(logits(model, ids), base)
