"""A model with more tokens: the tokenizer has them, the embeddings have rows for them, and nothing else is another."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models.load import PACKAGED, load, pin, skeleton, weight_files
from peft_arena.weights.base import base_weights

NEW = ("<call>", "</call>", "<|note|>")
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_arena.models.extend.cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def spec_of(name="micro", tokens=NEW, dtype="float32"):
    return pin(ModelSpec(name=str(name), new_tokens=tokens, dtype=dtype))


def untied_in(directory, rows=832):
    """Write the packaged model with an output layer of its own, and rows of padding behind the last token."""
    shutil.copytree(PACKAGED["micro"], directory)
    tensors = load_file(directory / "model.safetensors")
    held = torch.cat([tensors[EMBEDDING], torch.full((rows - 832, 128), 9.0)])
    tensors |= {EMBEDDING: held, "lm_head.weight": -held.flip(1)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False, "vocab_size": rows}))
    return directory


def test_a_spec_without_new_tokens_is_written_as_before():
    assert "new_tokens" not in ModelSpec(name="micro").model_dump()
    assert ModelSpec(name="micro").id != ModelSpec(name="micro", new_tokens=NEW).id
    assert ModelSpec(**ModelSpec(name="micro", new_tokens=NEW).model_dump(mode="json")).new_tokens == NEW


def test_all_readers_have_the_same_model():
    spec, before = spec_of(), load(ModelSpec(name="micro"))
    loaded = load(spec)
    ids = loaded.tokenizer.convert_tokens_to_ids(list(NEW))
    assert ids == [832, 833, 834] == loaded.model.config.new_token_ids == skeleton(spec).config.new_token_ids
    text = "do <call>12</call> now"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text), skip_special_tokens=True) == text
    rows = loaded.model.get_input_embeddings().weight
    assert rows.shape == (835, 128) and rows is loaded.model.get_output_embeddings().weight
    old = before.model.get_input_embeddings().weight
    assert torch.equal(rows[:832], old)
    assert torch.equal(rows[832:], old.double().mean(0).bfloat16().float().expand(3, -1)), "as the file is"
    base = base_weights(spec)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(base.tensor(name), parameter)
    assert base.content_hash(EMBEDDING) != base_weights(pin(ModelSpec(name="micro"))).content_hash(EMBEDDING)


def test_old_tokens_are_read_as_before():
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        first = load(ModelSpec(name="micro")).model(input_ids=ids).logits
        assert torch.equal(load(spec_of()).model(input_ids=ids).logits[..., :832], first)


@pytest.mark.parametrize(("rows", "wanted"), [(832, 835), (834, 835), (900, 900)])
def test_an_output_layer_of_its_own_and_padding(rows, wanted, tmp_path):
    loaded = load(spec_of(untied_in(tmp_path / "model", rows)))
    for layer in (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()):
        assert layer.weight.shape[0] == wanted == loaded.model.config.vocab_size
        mean = layer.weight[:832].double().mean(0).float()
        assert torch.equal(layer.weight[832:835], mean.expand(3, -1)), "rows of padding are set too"
        assert bool((layer.weight[835:].abs() == 9).all()), "rows that no token has stay"


def test_it_is_made_once(cache):
    first = weight_files(spec_of())
    made = (first / "model.safetensors").stat().st_mtime_ns
    load(spec_of())
    assert (weight_files(spec_of()) / "model.safetensors").stat().st_mtime_ns == made
    assert weight_files(spec_of(tokens=NEW[:2])) != first
    (first / "model.safetensors").write_bytes(b"damaged")
    assert load(spec_of()).model.config.vocab_size == 835, "a damaged one is made anew"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("<call>", "<call>"), "a token is given twice"),
        (("<call>", "<|im_end|>"), "the tokenizer has '<|im_end|>' already"),
    ],
)
def test_tokens_that_cannot_be_new(tokens, message):
    with pytest.raises(UserError, match="new_tokens: ") as caught:
        load(spec_of(tokens=tokens))
    assert message in str(caught.value)


def test_files_with_other_names_are_refused(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(PACKAGED["micro"], model)
    tensors = {name.removeprefix("model."): held for name, held in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="other names than lm_head.weight, model.embed_tokens.weight"):
        load(spec_of(model))
