"""A model moved from point to point, on bfloat16 weights, where adapters are moved and on which merging would round."""

from dataclasses import dataclass

import pytest
import torch

from peft_arena.core.specs import MethodSpec, ModelSpec, PathSpec, RuleSpec
from peft_arena.methods.registry import make_method
from peft_arena.models.load import load, pin
from peft_arena.paths.placing import Placer
from peft_arena.paths.rules import rule_spec
from peft_arena.weights.tuned import Tuned

EXPRESSED = ("lora", "dora", "rslora", "oft", "boft", "ia3", "road", "vera", "miss", "ln_tuning")
OWN = PathSpec()


@dataclass
class Case:
    tuned: Tuned
    wanted: torch.Tensor


@pytest.fixture(scope="module")
def ids():
    return torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def make(tmp_path_factory, ids):
    """Make a checkpoint of a method with random numbers on the micro model, and what the method says its logits are."""
    made = {}

    def one(name, dtype="bfloat16"):
        if (name, dtype) not in made:
            spec = pin(ModelSpec(name="micro", dtype=dtype))
            method = make_method(name, {})
            attached = method.attach(load(spec).model, seed=0)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in attached.trained().values():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            directory = tmp_path_factory.mktemp(name)
            attached.save(directory)
            table = MethodSpec(name=name, config=method.config.model_dump(mode="json"))
            tuned = Tuned(spec, directory, table, name, 1)
            made[name, dtype] = Case(tuned, logits(tuned.model(load(spec)), ids))
        return made[name, dtype]

    return one


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("name", EXPRESSED)
def test_an_adapter_is_moved_and_comes_back_to_the_same_bits(make, ids, name):
    case = make(name)
    placer = Placer(case.tuned, OWN)
    assert {placer.expressed(factor) for factor in (0.5, 1.0, 1.2)} == {"adapter"}
    assert torch.equal(logits(placer.at(1.0).model, ids), case.wanted)
    half = logits(placer.at(0.5).model, ids)
    beyond = logits(placer.at(1.2).model, ids)
    assert torch.equal(logits(placer.at(0.5).model, ids), half)
    assert not torch.equal(half, beyond)
    base = logits(load(case.tuned.base).model.eval(), ids)
    assert torch.equal(logits(placer.at(0.0).model, ids), base)


@pytest.mark.parametrize("name", ["full", "loha"])
def test_what_no_adapter_says_is_merged_in_place(make, ids, name):
    case = make(name)
    placer = Placer(case.tuned, OWN)
    assert placer.expressed(0.5) == "weights"
    half = logits(placer.at(0.5).model, ids)
    tuned = logits(placer.at(1.0).model, ids)
    assert float((tuned - case.wanted).abs().max()) < 0.15
    assert torch.equal(logits(placer.at(0.5).model, ids), half)
    base = logits(load(case.tuned.base).model.eval(), ids)
    assert torch.equal(logits(placer.at(0.0).model, ids), base)


def test_a_point_beyond_what_an_adapter_says_does_not_change_how_the_others_are_placed(make, ids):
    case = make("coft")
    placer = Placer(case.tuned, OWN)
    first = logits(placer.at(0.5).model, ids)
    assert placer.expressed(0.5) == "adapter"
    logits(placer.at(3.0).model, ids)
    assert torch.equal(logits(placer.at(0.5).model, ids), first)


def test_a_rule_that_changes_ranks_is_placed_in_the_adapter(make, ids):
    case = make("lora")
    placer = Placer(case.tuned, PathSpec(rule=rule_spec("intruder", {"threshold": 0.9})))
    tuned = logits(placer.at(1.0).model, ids)
    without = logits(placer.at(0.0).model, ids)
    assert placer.expressed(0.0) == "adapter"
    files = placer.files(0.0)
    assert any(rank > 8 for rank in files.settings["rank_pattern"].values()), "no intruder was found: a weak test"
    assert not torch.equal(tuned, without)
    assert float((tuned - case.wanted).abs().max()) < 0.15
    assert torch.equal(logits(placer.at(1.0).model, ids), tuned)


def test_in_float32_merged_weights_stand_for_the_adapter(make, ids):
    case = make("lora", "float32")
    placer = Placer(case.tuned, OWN)
    assert placer.expressed(0.5) == "adapter"
    placed = placer.at(0.5)
    assert placed.model is placed.loaded.model
    assert float((logits(placer.at(1.0).model, ids) - case.wanted).abs().max()) < 1e-4


def test_a_rule_that_is_not_for_the_weights_is_refused(make):
    with pytest.raises(Exception, match="intruder is not for oft"):
        Placer(make("oft").tuned, PathSpec(rule=RuleSpec(name="intruder", config={})))
