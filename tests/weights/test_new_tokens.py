"""A model with new tokens, its rows trained, saved, read back and merged with the tokenizer that has them."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_arena.core.errors import UserError
from peft_arena.core.specs import MethodSpec, ModelSpec
from peft_arena.cost.counts import count, count_key
from peft_arena.export.plain_adapter import refuse_start
from peft_arena.methods.registry import make_method
from peft_arena.models.load import config_at_hand, load, pin, weight_files
from peft_arena.testing.subject import difference, logits
from peft_arena.weights.base import base_weights
from peft_arena.weights.effective import effective_weights
from peft_arena.weights.merge import merge_point
from peft_arena.weights.tuned import Tuned

NEW = ("<sum>", "</sum>")
WAYS = {
    "rows": ("lora_tokens", {"tokens": "new", "rank": 2}),
    "norm beside": ("oft", {"modules_to_save": ["norm"]}),
    "everything": ("full", {}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_arena.models.extend.cache_root", lambda: tmp_path / "cache")


def trained(spec, name, config):
    """Return a method after two steps on text with the new tokens, and the ids of that text."""
    loaded = load(spec)
    ids = loaded.tokenizer("Add 1 and 2: <sum>3</sum>", return_tensors="pt").input_ids
    attached = make_method(name, config).attach(loaded.model, seed=0)
    optimizer = attached.optimizer(1e-2, 0.0)
    for _ in range(2):
        attached.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return attached, ids


@pytest.mark.parametrize("way", WAYS)
def test_new_tokens_round_trip(way, tmp_path):
    name, config = WAYS[way]
    spec = pin(ModelSpec(name="micro", new_tokens=NEW))
    attached, ids = trained(spec, name, config)
    tuned = logits(attached.model, ids)
    attached.save(tmp_path / "saved")
    method = make_method(name, config)
    assert difference(logits(method.restore(load(spec).model, tmp_path / "saved").model, ids), tuned) < 1e-4
    weights = effective_weights(base_weights(spec), tmp_path / "saved", method)
    change = weights.parameter("model.embed_tokens.weight").change
    if way == "rows":
        moved = change.dense(weights.parameter("model.embed_tokens.weight").base).abs().sum(1).nonzero().flatten()
        assert moved.tolist() == [832, 833], "the new rows train, and no other"
    elif way == "norm beside":
        assert change is None
    merge_point(weights, weight_files(spec), tmp_path / "out", dtype="float32")
    merged, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert difference(logits(merged.eval(), ids), tuned) < 1e-3
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == [832, 833]
    assert "new_token_ids" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_trains_is_counted_for_these_tokens():
    spec, plain = (pin(ModelSpec(name="micro", new_tokens=tokens)) for tokens in (NEW, ()))
    arm = MethodSpec(name="lora_tokens", config=make_method("lora_tokens", {"tokens": "new"}).config.model_dump())
    lora = MethodSpec(name="lora", config=make_method("lora").config.model_dump())
    assert count(spec, arm).trained == count(plain, lora).trained + 2 * 128
    assert "model.new_tokens" in count(plain, arm).why
    assert count_key(config_at_hand(spec), arm) != count_key(config_at_hand(plain), arm)


def test_the_adapter_alone_is_not_exported(tmp_path):
    point = Tuned(pin(ModelSpec(name="micro", new_tokens=NEW)), tmp_path, None, "my-run", 2)
    with pytest.raises(UserError, match="my-run was trained with 2 new tokens, for which micro has no embeddings"):
        refuse_start(point)


def test_an_adapter_with_new_rows_does_not_fit_the_model_without(tmp_path):
    attached, _ = trained(pin(ModelSpec(name="micro", new_tokens=NEW)), *WAYS["rows"])
    attached.save(tmp_path / "saved")
    with pytest.raises(UserError, match="trains the row of token 833"):
        effective_weights(base_weights(pin(ModelSpec(name="micro"))), tmp_path / "saved")
