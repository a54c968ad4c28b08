"""What vLLM would be given. vLLM itself cannot run where these tests do."""

from __future__ import annotations

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec, RLSpec, TaskSpec
from peft_arena.methods.base import Capability
from peft_arena.methods.registry import METHODS
from peft_arena.testing.trial import Trial
from peft_arena.train.vllm import check_unchanged, digest, plain_weights, vllm_arguments, vllm_refusal
from tests.methods.settings import SETTINGS

pytestmark = pytest.mark.spread
MORE_THAN_LINEAR = {"lora_tokens"}
MICRO = ModelSpec(name="micro")
ABLE = [
    name
    for name in METHODS.own()
    if name != "none" and name not in MORE_THAN_LINEAR and not vllm_refusal(METHODS.get(name).card, MICRO)
]


@pytest.mark.parametrize("name", ABLE)
def test_vllm_gets_the_merged_weights_and_the_live_ones_stay(name, tmp_path):
    life = Trial(name, directory=tmp_path, **SETTINGS[name]).life("untied")
    model = life.attached.model
    before = digest(model)
    trained = {key: p.detach().clone() for key, p in life.attached.trained().items()}
    found = dict(plain_weights(life.attached))
    check_unchanged(before, model)
    assert all(bool((p == trained[key]).all()) for key, p in life.attached.trained().items())
    wanted = dict(life.twin().merged().named_parameters())
    assert set(found) == set(wanted)
    for key, weight in wanted.items():
        assert found[key].dtype == weight.dtype
        assert float((found[key] - weight).detach().abs().max()) <= 1e-6, key


@pytest.mark.parametrize("name", sorted(MORE_THAN_LINEAR))
def test_what_is_not_a_linear_layer_is_refused_and_not_left_out(name, tmp_path):
    life = Trial(name, directory=tmp_path, **SETTINGS[name]).life("untied")
    with pytest.raises(UserError, match="is also changed"):
        list(plain_weights(life.attached))


def test_most_methods_can_and_the_others_say_why():
    assert len(ABLE) >= 45
    assert {"lora", "dora", "oft", "vera", "full"} <= set(ABLE)
    for name in ("pissa", "prompt_tuning", "ln_tuning", "lily"):
        assert "vLLM" in vllm_refusal(METHODS.get(name).card, MICRO)


def test_a_model_with_new_tokens_is_refused():
    longer = MICRO.model_copy(update={"new_tokens": ("<tool>",)})
    assert "without model.new_tokens" in vllm_refusal(METHODS.get("lora").card, longer)


def test_pissa_is_refused_because_its_base_is_no_longer_the_pretrained_one():
    card = METHODS.get("pissa").card
    assert {Capability.LINEAR_DELTA, Capability.MERGEABLE, Capability.CHANGES_BASE} <= card.capabilities
    assert "put other weights in their place" in vllm_refusal(card, MICRO)


@pytest.mark.parametrize("kind", ["first", "last"])
def test_a_frozen_weight_that_moved_is_an_error(kind, tmp_path):
    import torch

    life = Trial("lora", directory=tmp_path, **SETTINGS["lora"]).life("untied")
    model = life.attached.model
    before = digest(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with torch.no_grad():
        flat = (frozen[0] if kind == "first" else frozen[-1]).view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    with pytest.raises(UserError, match="changed 1 frozen parameters"):
        check_unchanged(before, model)


def spec(**changes):
    given = {"objective": "grpo", "task": TaskSpec(name="t"), "schedule": {"steps": 1}, "learning_rate": 1e-3}
    return RLSpec.model_validate({**given, **changes})


def test_arguments_are_those_of_trl():
    from trl import GRPOConfig, RLOOConfig

    assert vllm_arguments(spec(), ("\n",)) == {}
    colocate = vllm_arguments(spec(rollouts="vllm_colocate"), ("\n",))
    assert colocate == {"use_vllm": True, "vllm_mode": "colocate", "generation_kwargs": {"stop": ["\n"]}}
    server = vllm_arguments(spec(rollouts="vllm_server"), ())
    assert server == {"use_vllm": True, "vllm_mode": "server", "generation_kwargs": None}
    for config in (GRPOConfig, RLOOConfig):
        assert set(colocate) <= set(config.__dataclass_fields__)
