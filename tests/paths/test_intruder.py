"""Intruder dimensions against their definition, and against peft's own reduction."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.paths.rules import make_rule
from peft_arena.testing.subject import tiny_model
from peft_arena.weights import svd as decompositions
from peft_arena.weights.adapter_directory import Changes
from peft_arena.weights.base import base_weights
from peft_arena.weights.change import Dense, LowRank
from peft_arena.weights.effective import EffectiveWeights, effective_weights
from peft_arena.weights.svd import SvdCache
from tests.paths.path_toys import BLOCKS, NORM, multiplied_out, tuned, weight_of
from tests.weights.weight_toys import LINEAR

NAME = "model.layers.3.self_attn.q_proj.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def cache(tmp_path):
    return SvdCache(tmp_path / "svd")


def planted(scale=2.0):
    """Return low-rank tuned weights: one layer with an intruder, one whose change is along its own first direction."""
    weights = tuned("low-rank", sizes=[0] * BLOCKS, others={NORM: 0.1})
    left, values, right = torch.linalg.svd(weight_of(NAME))
    strange, other = left.mean(1), right.mean(0)  # |cosine| with each singular vector is 1 / sqrt(32)
    strange, other = strange / strange.norm(), other / other.norm()
    intruding = LowRank((scale * values[0] * strange)[:, None].float(), other[None].float())
    left, values, right = torch.linalg.svd(weight_of(OTHER), full_matrices=False)
    along = LowRank((values[0] * left[:, 0])[:, None].float(), right[:1].float())
    makers = {**weights.changes.makers, NAME: lambda: intruding, OTHER: lambda: along}
    return EffectiveWeights(weights.base_weights, Changes(makers))


def by_definition(change, weight, top=10, threshold=0.5):
    """Return the part of the tuned weight in intruder dimensions and their number, in float64."""
    before = torch.linalg.svd(weight, full_matrices=False).U
    left, values, right = torch.linalg.svd(weight + change, full_matrices=False)
    chosen = [j for j in range(top) if max(abs(float(left[:, j] @ u)) for u in before.T) < threshold]
    return sum((values[j] * torch.outer(left[:, j], right[j]) for j in chosen), torch.zeros_like(weight)), len(chosen)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.3])
def test_it_scales_the_intruders_of_the_tuned_weight_and_nothing_else(factor, cache):
    weights = planted()
    found, whole = multiplied_out(make_rule("intruder", cache=cache).apply(weights, factor)), multiplied_out(weights)
    part, count = by_definition(whole[NAME], weight_of(NAME))
    assert count == 1 and float(part.norm()) > 2 * float(torch.linalg.matrix_norm(weight_of(NAME), ord=2))
    torch.testing.assert_close(found[NAME], whole[NAME] + (factor - 1) * part, rtol=1e-4, atol=1e-5)
    for name, change in found.items():
        assert name == NAME or torch.equal(change, whole[name]), name
    assert whole[NORM].any() and whole[OTHER].any()


def test_factor_one_is_the_tuned_model_itself_and_zero_is_not_the_pretrained_one(cache):
    weights, rule = planted(), make_rule("intruder", cache=cache)
    assert rule.apply(weights, 1.0) is weights
    assert rule.card.to_tuned and not rule.card.from_base
    assert multiplied_out(rule.apply(weights, 0.0))[OTHER].any()


def test_the_rank_grows_by_the_number_of_intruders(cache):
    weights = planted()
    point = make_rule("intruder", cache=cache).apply(weights, 0.5)
    assert [weights.parameter(NAME).change.b.shape[1], point.parameter(NAME).change.b.shape[1]] == [1, 2]
    assert point.parameter(OTHER).change.b.shape[1] == 1


@pytest.mark.parametrize(
    ("settings", "count"), [({}, 1), ({"top": 500}, 2), ({"threshold": 0.05}, 0), ({"threshold": 0.9, "top": 4}, 4)]
)
def test_settings_choose_what_is_an_intruder(settings, count, cache):
    weights = planted(scale=0.7)
    whole = multiplied_out(weights)
    point = make_rule("intruder", settings, cache=cache).apply(weights, 0.0)
    top, threshold = min(settings.get("top", 10), 32), settings.get("threshold", 0.5)
    part, expected = by_definition(whole[NAME], weight_of(NAME), top, threshold)
    assert point.parameter(NAME).change.b.shape[1] - 1 == expected == count
    torch.testing.assert_close(multiplied_out(point)[NAME], whole[NAME] - part, rtol=1e-4, atol=1e-5)


def test_a_grid_decomposes_once_and_the_pretrained_weight_is_kept(cache, monkeypatch):
    made = []
    real = decompositions.svd
    monkeypatch.setattr(decompositions, "svd", lambda *given: made.append(1) or real(*given))
    weights = planted()
    rule = make_rule("intruder", cache=cache)
    for factor in (0.0, 0.25, 0.5, 0.75, 1.0):
        rule.apply(weights, factor)
    assert len(made) == 4, "W0 and W1 of two layers"
    make_rule("intruder", cache=cache).apply(weights, 0.5)
    assert len(made) == 6, "W0 is read"


def test_other_changes_are_refused(cache):
    rule = make_rule("intruder", cache=cache)
    assert rule.refuses(planted()) == ""
    for form in ("dense", "rotation", "rows", "dora"):
        with pytest.raises(
            UserError, match=r"for low-rank changes, such as those of LoRA, and that of model\.layers\.0"
        ):
            rule.apply(tuned(form), 0.5)
    norms = tuned("dense", sizes=[0] * BLOCKS, others={NORM: 0.1})
    assert "no linear layer is changed" in rule.refuses(norms)
    mixed = Changes({**planted().changes.makers, OTHER: lambda: Dense(torch.ones(48, 32))})
    assert OTHER.removesuffix(".weight") in rule.refuses(EffectiveWeights(norms.base_weights, mixed))
    unmoved = Changes({**planted().changes.makers, OTHER: lambda: None})
    assert rule.refuses(EffectiveWeights(norms.base_weights, unmoved)) == ""


def test_nothing_is_moved_where_there_are_no_intruders(cache):
    weights = planted()
    makers = {OTHER: weights.changes.makers[OTHER]}
    weights = EffectiveWeights(weights.base_weights, Changes(makers))
    assert make_rule("intruder", cache=cache).apply(weights, 0.0) is weights


@pytest.mark.parametrize("rank", [32, 2])
@pytest.mark.parametrize("share", [0.75, 0.0])
def test_peft_says_the_same_where_its_rank_is_large_enough(rank, share, cache, tmp_path):
    """The trained change has rank 2 and up to 10 intruders: peft cuts the result back to the rank of the adapter."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_model(), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape)
                values[(slice(None), slice(2, None)) if "lora_B" in name else slice(2, None)] = 0
                parameter.copy_((0.4 if "lora_B" in name else 0.3) * values)
    model.save_pretrained(tmp_path / "adapter")
    reduce_intruder_dimension(model, mitigation_lambda=share, logging_sink=None)
    weights = effective_weights(base_weights(ModelSpec(name=str(tmp_path / "base"))), tmp_path / "adapter")
    point = make_rule("intruder", cache=cache).apply(weights, share)
    added, apart = 0, 0.0
    for name in weights.modules():
        layer = model.base_model.model.get_submodule(name)
        base, change = point.pair(name)
        theirs, ours = layer.get_delta_weight("intruder_reduced"), change.dense(base)
        apart = max(apart, float((ours - theirs.detach()).norm() / ours.norm()))
        added += change.b.shape[1] - rank
    assert added > 14, "more than one intruder in each layer"
    assert apart < 1e-4 if rank == 32 else apart > 0.01
