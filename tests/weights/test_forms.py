"""Adapters made with peft: read in closed form, or through peft's merge, they are what peft merges."""

import shutil

import peft
import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.testing.subject import difference, logits, tiny_model, tokens
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Dense, LowRank
from peft_arena.weights.effective import effective_weights
from peft_arena.weights.forms import closed_form
from peft_arena.weights.rescaled import Decomposed
from peft_arena.weights.tuned import Tuned
from tests.weights.weight_toys import ATTENTION, LINEAR, edit, peft_changes, save_adapter, set_setting

MODULE = "model.layers.0.self_attn.q_proj"
OUTPUT = ["q_proj", "lm_head"]
LORA = {"r": 4, "lora_alpha": 12, "target_modules": LINEAR}
OFT = {"oft_block_size": 8, "target_modules": LINEAR}
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}}

CLOSED = {
    "lora": peft.LoraConfig(**LORA),
    "rslora": peft.LoraConfig(**LORA, use_rslora=True),
    "patterns": peft.LoraConfig(**LORA, **PATTERNS),
    "patterns, rslora": peft.LoraConfig(**LORA, **PATTERNS, use_rslora=True),
    "gaussian": peft.LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="gaussian"),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "dora with patterns": peft.LoraConfig(**LORA, **PATTERNS, use_dora=True, use_rslora=True),
    "oft": peft.OFTConfig(**OFT, use_cayley_neumann=False),
    "oft by series": peft.OFTConfig(**OFT),
    "oft of 2 terms": peft.OFTConfig(**OFT, num_cayley_neumann_terms=2),
    "oft of 3 terms": peft.OFTConfig(**OFT, num_cayley_neumann_terms=3),
    "oft of 6 terms": peft.OFTConfig(**OFT, num_cayley_neumann_terms=6),
    "oft in one block": peft.OFTConfig(**OFT, block_share=True),
    "coft": peft.OFTConfig(**OFT, coft=True, eps=0.4),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR),
    "boft of two blocks": peft.BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=LINEAR),
    "road": peft.RoadConfig(group_size=8, target_modules=LINEAR),
    "road of 2": peft.RoadConfig(variant="road_2", group_size=16, target_modules=LINEAR),
    "road of 4": peft.RoadConfig(variant="road_4", group_size=32, target_modules=LINEAR),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=80, target_modules=ATTENTION),
    "miss": peft.MissConfig(r=6, target_modules=LINEAR),
    "miss, bat": peft.MissConfig(r=4, target_modules=LINEAR, init_weights="bat"),
    "miss, mini": peft.MissConfig(r=4, mini_r=4, target_modules=LINEAR, init_weights="mini"),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "modules_to_save": peft.LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"]),
    "dora, with all norms": peft.LoraConfig(**LORA, use_dora=True, modules_to_save=["norm"]),
    "ia3, with whole layers": peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["down_proj"]
    ),
}
MERGED = {
    "output layer": peft.LoraConfig(r=4, target_modules=OUTPUT),
    "embeddings": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "token indices": peft.LoraConfig(r=4, target_modules=ATTENTION, trainable_token_indices=[3, 5]),
    "pissa": peft.LoraConfig(**LORA, init_lora_weights="pissa"),
    "loha": peft.LoHaConfig(r=4, target_modules=ATTENTION),
    "hra": peft.HRAConfig(r=4, target_modules=ATTENTION),
    "vera without its matrices": peft.VeraConfig(r=16, target_modules=ATTENTION, save_projection=False),
}


def base_of(kind="untied", dtype="float32"):
    return BaseWeights.of_model(tiny_model(kind, dtype))


def check_against_peft(weights, directory, kind="untied", dtype="float32", limit=1e-6):
    wanted = peft_changes(directory, kind, dtype)
    assert max(float(change.abs().max()) for change in wanted.values()) > 1e-3
    for name, change in wanted.items():
        pair = weights.parameter(name)
        found = torch.zeros(change.shape) if pair.change is None else pair.change.dense(pair.base)
        assert found.dtype == torch.float32
        assert difference(found, change) < limit, name


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_is_what_peft_merges(name, tmp_path):
    directory = save_adapter(tmp_path / "adapter", CLOSED[name])
    base = base_of()
    assert closed_form(base, directory) is not None
    check_against_peft(effective_weights(base, directory), directory)


@pytest.mark.parametrize("name", ["dora", "ia3", "boft", "road", "road of 4"])
@pytest.mark.parametrize(("kind", "dtype"), [("biased", "float32"), ("tied", "float32"), ("untied", "bfloat16")])
def test_closed_form_on_other_bases(name, kind, dtype, tmp_path):
    directory = save_adapter(tmp_path / "adapter", CLOSED[name], kind)
    base = base_of(kind, dtype)
    assert closed_form(base, directory) is not None
    check_against_peft(effective_weights(base, directory), directory, kind, dtype)


def test_miss_with_a_rank_that_does_not_divide(tmp_path):
    directory = save_adapter(tmp_path / "adapter", peft.MissConfig(r=10, target_modules=LINEAR), "awkward")
    check_against_peft(effective_weights(base_of("awkward"), directory), directory, "awkward")


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.filterwarnings("ignore")
def test_the_rest_goes_through_the_merge_of_peft(name, tmp_path):
    directory = save_adapter(tmp_path / "adapter", MERGED[name])
    base = base_of()
    assert closed_form(base, directory) is None
    check_against_peft(effective_weights(base, directory), directory)


@pytest.mark.parametrize("setting", [{"lora_bias": True}, {"bias": "lora_only"}, {"bias": "all"}], ids=str)
def test_trained_biases_go_through_the_merge_of_peft(setting, tmp_path):
    directory = save_adapter(tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=ATTENTION, **setting), "biased")
    base = base_of("biased")
    assert closed_form(base, directory) is None
    weights = effective_weights(base, directory)
    check_against_peft(weights, directory, "biased")
    assert weights.parameter("model.layers.0.self_attn.v_proj.bias").change is not None


def test_low_rank_changes_are_handed_over_as_factors(tmp_path):
    for name, kind, rank in (("patterns", LowRank, 2), ("dora", Decomposed, 4)):
        directory = save_adapter(tmp_path / name, CLOSED[name])
        change = effective_weights(base_of(), directory).pair(MODULE).change
        assert isinstance(change, kind)
        assert change.a.shape == (rank, 64)


def test_an_active_setting_that_peft_does_not_know_is_refused_by_name(tmp_path):
    directory = save_adapter(tmp_path / "adapter", CLOSED["lora"])
    base = base_of()
    assert closed_form(base, directory) is not None
    set_setting(directory, invented_in_2031=None)
    assert closed_form(base, directory) is not None, "a setting that is off changes nothing"
    set_setting(directory, invented_in_2031=True)
    with pytest.raises(UserError, match=r"no such field of LORA as `invented_in_2031` = True"):
        closed_form(base, directory)


def test_settings_of_rotations_that_are_not_understood_are_left_to_the_merge(tmp_path):
    base = base_of()
    for name, stored in (("boft", "boft_R"), ("road", "road_theta")):
        adapter = save_adapter(tmp_path / name, CLOSED[name])
        assert closed_form(base, adapter) is not None
        edit(adapter, lambda tensors, stored=stored: {key: one for key, one in tensors.items() if stored not in key})
        assert closed_form(base, adapter) is None, "half of its tensors"
    biased = save_adapter(tmp_path / "biased", CLOSED["boft"])
    set_setting(biased, bias="all")
    assert closed_form(base, biased) is None
    more = save_adapter(tmp_path / "more", CLOSED["boft"])
    edit(more, lambda tensors: {key: one.repeat(2, 1, 1, 1) if "_R" in key else one for key, one in tensors.items()})
    assert closed_form(base, more) is None, "two butterfly factors"
    unknown = save_adapter(tmp_path / "unknown", CLOSED["road"])
    set_setting(unknown, variant="road_8")
    assert closed_form(base, unknown) is None


def test_tensors_without_a_place_and_missing_ones_are_refused(tmp_path):
    directory = save_adapter(tmp_path / "adapter", CLOSED["lora"])
    stray = "base_model.model.model.layers.0.self_attn.q_proj.invented"
    edit(directory, lambda tensors: tensors | {stray: torch.ones(3)})
    with pytest.raises(UserError, match="no place"):
        effective_weights(base_of(), directory)
    lost = f"base_model.model.{MODULE}.lora_B.weight"
    edit(directory, lambda tensors: {name: one for name, one in tensors.items() if name not in (stray, lost)})
    with pytest.raises(UserError, match="lacks 1 tensors"):
        effective_weights(base_of(), directory)


@pytest.mark.parametrize(
    "settings",
    [{"r": None}, {"r": 0}, {"lora_alpha": "16"}, {"rank_pattern": {"(": 3}}, {"peft_type": ["LORA"]}],
    ids=str,
)
def test_damaged_settings_are_refused_in_a_line(settings, tmp_path):
    directory = save_adapter(tmp_path / "adapter", CLOSED["lora"])
    set_setting(directory, **settings)
    tuned = Tuned(ModelSpec(name=str(tmp_path)), directory, None, "path", None)
    assert tuned.has_weights()
    with pytest.raises(UserError) as caught:
        effective_weights(base_of(), directory)
    assert "\n" not in str(caught.value)


def without_block_one(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}


@pytest.mark.parametrize("name", ["lora", "oft", "ia3", "norms"])
def test_an_adapter_that_lost_the_tensors_of_a_layer_is_refused(name, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", CLOSED[name])
    edit(adapter, without_block_one)
    with pytest.raises(UserError, match=r"lacks the tensors of \d+ of the \d+ modules"):
        effective_weights(base_of(), adapter)


def test_a_layer_that_the_settings_leave_out_is_not_missed(tmp_path):
    for place, more in enumerate(({"layers_to_transform": [0]}, {"exclude_modules": r".*layers\.1\..*"})):
        config = peft.LoraConfig(r=4, target_modules=r".*_proj" if place else LINEAR, **more)
        adapter = save_adapter(tmp_path / str(place), config)
        assert closed_form(base_of(), adapter) is not None
        check_against_peft(effective_weights(base_of(), adapter), adapter)


def test_adapters_of_another_base_are_refused(tmp_path):
    larger = save_adapter(tmp_path / "larger", CLOSED["lora"], "awkward")
    with pytest.raises(UserError, match="does not have here"):
        effective_weights(base_of(), larger)
    wider = save_adapter(tmp_path / "wider", peft.LoraConfig(r=4, target_modules=["q_proj"]), "awkward")
    edit(wider, lambda tensors: {name: one for name, one in tensors.items() if "layers.2" not in name})
    with pytest.raises(UserError, match=r"has shape \(4, 72\)"):
        effective_weights(base_of(), wider)


def test_closed_form_of_the_output_layer(tmp_path):
    directory = save_adapter(tmp_path / "adapter", MERGED["output layer"])
    edit(directory, lambda tensors: {name: one for name, one in tensors.items() if "lora_" in name})
    base = base_of()
    assert isinstance(closed_form(base, directory).makers["lm_head.weight"](), LowRank)
    check_against_peft(effective_weights(base, directory), directory)


@pytest.mark.parametrize("name", ["output layer", "embeddings"])
def test_half_of_a_tied_weight_is_refused(name, tmp_path):
    config = {**CLOSED, **MERGED}[name]
    directory = save_adapter(tmp_path / "adapter", config, "untied")
    with pytest.raises(UserError, match="is one with"):
        effective_weights(base_of("tied"), directory)


def test_prompts_are_refused_by_peft_types_too(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    directory = save_adapter(tmp_path / "adapter", config)
    with pytest.raises(UserError, match="adapter"):
        effective_weights(base_of(), directory)


@pytest.mark.parametrize("kind", ["untied", "biased"])
def test_biases_are_added_where_there_are_none(kind, tmp_path):
    directory = save_adapter(tmp_path / "adapter", peft.BeftConfig(target_modules=["v_proj", "o_proj"]), kind, 0.5)
    weights = effective_weights(base_of(kind), directory)
    name = "model.layers.1.self_attn.o_proj.bias"
    assert set(weights.parameters()) - set(weights.base_weights.shapes) == {
        f"model.layers.{layer}.self_attn.{leaf}.bias"
        for layer in (0, 1)
        for leaf in (("v_proj", "o_proj") if kind == "untied" else ("o_proj",))
    }
    pair = weights.parameter(name)
    assert bool((pair.base == 0).all())
    assert isinstance(pair.change, Dense)
    model = tiny_model(kind)
    weights.load_into(model)
    truth = peft.PeftModel.from_pretrained(tiny_model(kind), str(directory))
    assert difference(logits(model, tokens()), logits(truth, tokens())) < 1e-5
    assert difference(logits(model, tokens()), logits(tiny_model(kind), tokens())) > 1e-2


SCALED = {
    "lora": lambda name, tensor, f: f * tensor if "lora_B" in name else tensor,
    "oft": lambda name, tensor, f: f * tensor,
    "oft by series": lambda name, tensor, f: f * tensor,
    "boft": lambda name, tensor, f: f * tensor if "boft_R" in name else 1 + f * (tensor - 1),
    "road": lambda name, tensor, f: f * tensor if "theta" in name else 1 + f * (tensor - 1),
    "road of 2": lambda name, tensor, f: f * tensor if "theta" in name else 1 + f * (tensor - 1),
    "road of 4": lambda name, tensor, f: f * tensor if "theta" in name else 1 + f * (tensor - 1),
    "ia3": lambda name, tensor, f: 1 + f * (tensor - 1),
    "miss": lambda name, tensor, f: f * tensor,
    "miss, bat": lambda name, tensor, f: f * tensor,
    "vera": lambda name, tensor, f: f * tensor if "lambda_b" in name else tensor,
}
"""The path of each method, in its own parameters."""


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("factor", [0.3, 1.2])
def test_path_goes_by_the_methods_own_parameters(name, factor, tmp_path):
    directory = save_adapter(tmp_path / "adapter", CLOSED[name])
    base = base_of()
    found = effective_weights(base, directory).interpolated(factor)
    assert found.factor == factor
    moved = shutil.copytree(directory, tmp_path / "moved")
    edit(moved, lambda tensors: {key: SCALED[name](key, one, factor) for key, one in tensors.items()})
    check_against_peft(found, moved)


def test_path_of_dora_goes_by_lengths_and_by_the_low_rank_change(tmp_path):
    directory = save_adapter(tmp_path / "adapter", CLOSED["dora"])
    base = base_of()
    found = effective_weights(base, directory).interpolated(0.6).interpolated(0.5)
    assert found.factor == pytest.approx(0.3)

    def along(tensors):
        found = {}
        for key, one in tensors.items():
            if "lora_B" in key:
                found[key] = 0.3 * one
            elif "magnitude" in key:
                module = key.removeprefix("base_model.model.").split(".lora_")[0]
                start = base.tensor(f"{module}.weight").norm(dim=1)
                found[key] = start + 0.3 * (one - start)
            else:
                found[key] = one
        return found

    moved = shutil.copytree(directory, tmp_path / "moved")
    edit(moved, along)
    check_against_peft(found, moved)
