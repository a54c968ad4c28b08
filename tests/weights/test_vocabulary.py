"""Adapters and bases of other vocabularies, bases with a head of their own, and settings that peft does not know."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_arena.commands.export_command import export
from peft_arena.commands.geometry_command import point_named
from peft_arena.commands.merge_command import merge
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.methods.files import refuse_unknown_fields
from peft_arena.methods.full.full import Full
from peft_arena.models.load import PACKAGED, load, pin
from peft_arena.testing.subject import difference, logits, tiny_model, tokens, train
from peft_arena.weights.base import BaseWeights, base_weights
from peft_arena.weights.effective import effective_weights
from peft_arena.weights.forms import closed_form
from tests.weights.weight_toys import save_adapter, set_setting, small_tokenizer

ROWS = 207
"""Embeddings of the model that adapters were made on; the tiny ones have 200."""


def resized(kind="untied"):
    model = tiny_model(kind)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.resize_token_embeddings(ROWS, mean_resizing=False)
    return model.eval()


def base_of():
    return BaseWeights.of_model(tiny_model())


def model_in(directory, model):
    model.save_pretrained(directory)
    small_tokenizer(directory)
    return directory


def adapter_in(directory, model, **settings):
    """Write an adapter with random values; ``save_embedding_layers`` goes to peft's saving."""
    whole = settings.pop("save_embedding_layers", False)
    config = peft.LoraConfig(**{"r": 3, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"} | settings)
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(directory, save_embedding_layers=whole)
    return directory, logits(wrapped.eval(), tokens())


OTHER = {
    "embeddings saved": {"save_embedding_layers": True},
    "embeddings trained": {"modules_to_save": ["embed_tokens"]},
    "head trained": {"modules_to_save": ["lm_head"]},
    "head adapted": {"target_modules": ["up_proj", "lm_head"]},
    "embeddings adapted": {"target_modules": ["up_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("made", OTHER)
def test_an_adapter_of_other_embeddings_names_both_sizes(made, tmp_path):
    adapter, tuned = adapter_in(tmp_path / "adapter", resized(), **OTHER[made])
    small, large = model_in(tmp_path / "small", tiny_model()), model_in(tmp_path / "large", resized())
    merge(str(adapter), tmp_path / "right", base=str(large))
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "right"), tokens()), tuned) < 1e-4
    for use in (
        lambda: merge(str(adapter), tmp_path / "out", base=str(small)),
        lambda: point_named(str(adapter), tmp_path, str(small), None).weights(),
        lambda: export(str(adapter), tmp_path / "out", to="adapter", base=str(small)),
    ):
        with pytest.raises(
            UserError, match=r"is an adapter of a model with 207 tokens .* embeddings for 200"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_smaller_embeddings_is_refused_too(tmp_path):
    adapter, _ = adapter_in(tmp_path / "adapter", tiny_model(), modules_to_save=["lm_head"])
    large = model_in(tmp_path / "large", resized())
    with pytest.raises(UserError, match="of a model with 200 tokens .* embeddings for 207"):
        merge(str(adapter), tmp_path / "out", base=str(large))


@pytest.mark.parametrize("size", [200, 203])
def test_the_tokenizer_of_an_adapter_must_fit_the_base(size, tmp_path):
    adapter, _ = adapter_in(tmp_path / "adapter", tiny_model())
    small_tokenizer(adapter, size)
    base = model_in(tmp_path / "base", tiny_model())
    if size == 200:
        merge(str(adapter), tmp_path / "out", base=str(base))
        return
    with pytest.raises(UserError, match="has 203 tokens and the pretrained model has embeddings for 200: 3 tokens"):
        merge(str(adapter), tmp_path / "out", base=str(base))


def test_a_row_that_is_not_there_cannot_be_trained(tmp_path):
    adapter, _ = adapter_in(tmp_path / "adapter", resized(), trainable_token_indices=[4, 205])
    base = base_of()
    with pytest.raises(UserError, match=r"trains the row of token 205, .* for 200 tokens \(ids 0 to 199\)"):
        effective_weights(base, adapter)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}, {"deep": [None, {"off": False}]}])
def test_a_field_that_is_off_says_nothing(value, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", peft.LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    set_setting(adapter, made_in_2040=value)
    assert closed_form(base_of(), adapter) is not None


@pytest.mark.parametrize("value", [True, 1, 0.5, "fast", ["q_proj"], {"deep": [None, 3]}])
@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.HRAConfig, peft.LNTuningConfig])
def test_a_field_that_is_on_is_refused_by_name(value, kind):
    table = json.loads(json.dumps(kind(target_modules=["k_proj"]).to_dict(), default=lambda held: list(held)))
    refuse_unknown_fields(table, "here")
    with pytest.raises(UserError, match=r"^here: the installed peft \S+ has no such field of \w+ as `made_in_2040` = "):
        refuse_unknown_fields({**table, "made_in_2040": value}, "here")


def test_fields_of_the_past_and_of_where_it_was_made_pass():
    table = {"peft_type": "LORA", "merge_weights": True, "enable_lora": None, "peft_version": "0.99.1", "revision": "x"}
    refuse_unknown_fields(table | {"auto_mapping": {"unsloth_fixed": True}, "runtime_config": {"new": 1}}, "here")
    refuse_unknown_fields(table | {"corda_config": {"later": True}, "eva_config": {"later": 2}}, "here")
    with pytest.raises(UserError, match="`enable_lora` = "):
        refuse_unknown_fields(table | {"enable_lora": [True, False, True]}, "here")


def test_an_unknown_type_is_left_to_peft():
    refuse_unknown_fields({"peft_type": "LATER", "anything": 1}, "here")
    refuse_unknown_fields({"peft_type": ["no", "text"], "anything": 1}, "here")


def own_head_in(directory):
    """Write a model whose files have a head of their own and whose configuration says that it is tied."""
    model_in(directory, tiny_model("untied"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return directory


def test_an_adapter_on_a_head_of_its_own_is_merged(tmp_path):
    base = own_head_in(tmp_path / "base")
    adapter, tuned = adapter_in(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base).eval())
    merge(str(adapter), tmp_path / "out", base=str(base))
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens()), tuned) < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], load_file(base / "model.safetensors")["lm_head.weight"])


def test_full_fine_tuning_keeps_a_head_of_its_own(tmp_path):
    spec = pin(ModelSpec(name=str(own_head_in(tmp_path / "base"))))
    attached = Full().attach(load(spec).model, seed=0)
    train(attached, 1e-2)
    tuned = logits(attached.model, tokens())
    attached.save(tmp_path / "saved")
    assert difference(logits(Full().restore(load(spec).model, tmp_path / "saved").model, tokens()), tuned) < 1e-5
    weights = effective_weights(base_weights(spec), tmp_path / "saved", Full())
    changes = {name: weights.parameter(name).change for name in ("lm_head.weight", "model.embed_tokens.weight")}
    assert all(change is not None for change in changes.values())
    model = load(spec).model
    weights.load_into(model)
    assert difference(logits(model, tokens()), tuned) < 1e-5
    merge(str(tmp_path / "saved"), tmp_path / "out", base=spec.name)
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens()), tuned) < 1e-4


def test_a_tied_tuned_directory_on_a_head_of_its_own(tmp_path):
    """Its head is its embedding: the change of the head is the way from the one to the other."""
    base, tuned = own_head_in(tmp_path / "base"), tiny_model("tied")
    model_in(tmp_path / "tuned", tuned)
    assert "lm_head.weight" not in load_file(tmp_path / "tuned" / "model.safetensors")
    merge(str(tmp_path / "tuned"), tmp_path / "out", base=str(base))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert difference(logits(found, tokens()), logits(tuned, tokens())) < 1e-4


def test_a_directory_that_is_both_is_no_tuned_point(tmp_path):
    adapter, _ = adapter_in(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(PACKAGED["micro"]))
    shutil.copyfile(PACKAGED["micro"] / "model.safetensors", adapter / "model.safetensors")
    for use in (merge, export):
        with pytest.raises(UserError, match="only one of them can be the tuned model"):
            use(str(adapter), tmp_path / "out", base="micro", **({"to": "adapter"} if use is export else {}))
