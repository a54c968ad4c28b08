"""What a model's directory must be: no adapter in it, a row for each token, and the head that its files have."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models import folder, load
from peft_arena.models.folder import refuse_both, tokens_in
from peft_arena.models.load import PACKAGED, pin, skeleton, weight_files
from peft_arena.weights.base import base_weights


def model_in(directory, **settings):
    """Copy the packaged model, some settings of its configuration replaced."""
    shutil.copytree(PACKAGED["micro"], directory)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return directory


def adapter_in(directory, base=PACKAGED["micro"]):
    model = load.load(ModelSpec(name=str(base))).model
    wrapped = peft.get_peft_model(
        model,
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    )
    wrapped.save_pretrained(directory)
    return directory


def everywhere(name):
    """Yield what every reader of a pretrained model says of a directory."""
    spec = ModelSpec(name=str(name))
    for read in (pin, load.load, skeleton, weight_files, base_weights):
        with pytest.raises(UserError) as caught:
            read(spec)
        yield str(caught.value)


@pytest.mark.parametrize("left", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "both"])
def test_an_adapter_beside_the_weights_is_refused_everywhere(left, tmp_path):
    adapter, model = adapter_in(tmp_path / "adapter"), model_in(tmp_path / "model")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if left in (name, "both"):
            shutil.copyfile(adapter / name, model / name)
    if left == "adapter_model.bin":
        torch.save({}, model / left)
    shown = "adapter_config.json, adapter_model.safetensors" if left == "both" else left
    for said in everywhere(model):
        assert f"{model} holds an adapter ({shown}) beside the weights of a model" in said and "\n" not in said


def test_a_directory_that_is_only_an_adapter_is_said_to_be_one(tmp_path):
    adapter = adapter_in(tmp_path / "adapter")
    table = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**table, "base_model_name_or_path": "someone/seven"}))
    for said in everywhere(adapter):
        assert f"{adapter} is no model but an adapter of 'someone/seven'" in said and "--base" in said
    shutil.copyfile(PACKAGED["micro"] / "config.json", adapter / "config.json")
    for said in everywhere(adapter):
        assert "is no model but an adapter" in said, "a configuration beside it makes no model of it"


def test_a_tuned_directory_cannot_be_both(tmp_path):
    adapter = adapter_in(tmp_path / "adapter")
    refuse_both(adapter)
    shutil.copyfile(PACKAGED["micro"] / "model.safetensors", adapter / "model.safetensors")
    with pytest.raises(UserError, match="only one of them can be the tuned model"):
        refuse_both(adapter)


def test_an_adapter_on_the_hub_is_refused(monkeypatch, tmp_path):
    """Also at plan, where a model with its commit is not looked up: its cache is."""
    asked = []
    adapter = adapter_in(tmp_path / "adapter")

    def download(name, file, revision, etag_timeout, local_files_only):
        asked.append((name, file, revision, local_files_only))
        return str(adapter / "adapter_config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match="model 'owner/name' holds an adapter .* on the hub"):
        pin(ModelSpec(name="owner/name", revision="b" * 40))
    assert asked == [("owner/name", "adapter_config.json", "b" * 40, True)]
    with pytest.raises(UserError, match="holds an adapter"):
        load.load_model(load.Source("hub", "owner/name", "b" * 40), ModelSpec(name="owner/name"))


@pytest.mark.parametrize("more", [0, 3])
def test_tokens_need_rows_and_rows_need_no_tokens(more, tmp_path):
    model = model_in(tmp_path / "model")
    tokens = tokens_in(model)
    assert tokens == 832 == load.load(ModelSpec(name=str(model))).model.config.vocab_size
    table = json.loads((model / "tokenizer.json").read_text())
    table["added_tokens"] += [
        {
            "id": 832 + at,
            "content": f"<|more {at}|>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for at in range(more)
    ]
    (model / "tokenizer.json").write_text(json.dumps(table))
    spec = ModelSpec(name=str(model))
    if not more:
        pin(spec)
        return
    for read in (pin, lambda given: load.load(given.model_copy(update={"revision": None}))):
        with pytest.raises(UserError, match="has 835 tokens and the model has embeddings for 832: 3 tokens"):
            read(spec)
    _pad(model, 840)
    assert load.load(pin(spec)).model.config.vocab_size == 840, "rows that no token has are usual"


def _pad(model, rows):
    tensors = {
        name: torch.cat([held, held[:1].repeat(rows - len(held), 1)]) if len(held) == 832 else held
        for name, held in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": rows}))


def test_embeddings_of_another_size_than_the_configuration_says(tmp_path):
    model = model_in(tmp_path / "model")
    _pad(model, 836)
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 832}))
    for read in (load.load, base_weights):
        with pytest.raises(UserError, match=r"836") as caught:
            read(ModelSpec(name=str(model)))
        assert "\n" not in str(caught.value)


def test_tokens_are_counted_in_every_form_of_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]] * 7}}))
    assert tokens_in(tmp_path) == 7
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"8": {"content": "<x>"}}}))
    assert tokens_in(tmp_path) == 9
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<y>": 11}))
    assert tokens_in(tmp_path) == 12
    for file in tmp_path.iterdir():
        file.write_text("[damaged")
    assert tokens_in(tmp_path) is None, "loading it will say so"


def own_head_in(directory, times=1.5):
    """Write a tied model whose files have a head of their own, as some tools leave it."""
    model_in(directory, tie_word_embeddings=True)
    tensors = {name: held.bfloat16().float() for name, held in load_file(directory / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * times
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_head_of_its_own_is_one_everywhere(tmp_path):
    model = own_head_in(tmp_path / "model")
    spec = pin(ModelSpec(name=str(model)))
    held = load_file(model / "model.safetensors")
    loaded, bare, base = load.load(spec).model, skeleton(spec), base_weights(spec)
    assert torch.equal(loaded.lm_head.weight, held["lm_head.weight"])
    assert not loaded.config.tie_word_embeddings and not bare.config.tie_word_embeddings
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in bare.parameters()]
    assert base.own_head and not base.tied("lm_head.weight")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(base.tensor(name), held[name])


def test_a_copy_of_the_embeddings_is_no_head_of_its_own(tmp_path):
    model = own_head_in(tmp_path / "model", times=1.0)
    base = base_weights(pin(ModelSpec(name=str(model))))
    assert base.tied("lm_head.weight") and not base.own_head
    assert skeleton(ModelSpec(name=str(model))).config.tie_word_embeddings


def test_what_the_type_rounds_away_makes_no_head(tmp_path):
    """Loading compares in the type of the model, and so do we."""
    model = own_head_in(tmp_path / "model", times=1 + 2**-12)
    for dtype in ("float32", "bfloat16"):
        spec = ModelSpec(name=str(model), dtype=dtype)
        loaded = load.load(spec).model
        own = loaded.lm_head.weight is not loaded.model.embed_tokens.weight
        assert base_weights(spec).own_head == own, dtype
    assert not own, "in bfloat16 they are one"


def test_names_in_the_files_may_be_others(tmp_path):
    """Then the model that was loaded says what is one weight."""
    model = own_head_in(tmp_path / "model")
    tensors = {name.replace("model.", "", 1): held for name, held in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    spec = ModelSpec(name=str(model))
    loaded, base = load.load(spec).model, base_weights(spec)
    assert base.own_head == (loaded.lm_head.weight is not loaded.model.embed_tokens.weight)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(base.tensor(name), parameter)


def test_files_that_name_the_adapter_are_known():
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors"):
        assert folder.ADAPTER_FILE.fullmatch(name)
    assert not folder.ADAPTER_FILE.fullmatch("adapter_model_card.md")
