"""A model directory that is not all of a model, or more than it, is refused by name; and all that is read is hashed."""

import json
import logging
import os
import shutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GptOssConfig, LlamaConfig, MambaConfig, MixtralConfig
from transformers.utils import logging as notes

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models import content
from peft_arena.models.content import content_of, kept_hash
from peft_arena.models.load import PACKAGED, load, load_model, pin, resolve, skeleton
from peft_arena.models.stored import INDEX, SINGLE, unreported
from peft_arena.testing.subject import tiny_model
from peft_arena.weights.base import base_weights
from peft_arena.weights.effective import effective_weights

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(PACKAGED["micro"], tmp_path / "model")


def rewrite(model, change):
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(model / SINGLE)).items()}
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})


def sharded(model, places=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Put the weights into two files, with an index, and return its table."""
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    table = {name: places[number % 2] for number, name in enumerate(sorted(tensors))}
    for place in set(table.values()):
        (model / place).parent.mkdir(parents=True, exist_ok=True)
        held = {name: tensor for name, tensor in tensors.items() if table[name] == place}
        save_file(held, model / place, metadata={"format": "pt"})
    write_index(model, table)
    return table


def write_index(model, table):
    (model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))


def said(model, *readers):
    """Return what readers of a model say of a directory, each in one line."""
    spec = ModelSpec(name=str(model))
    found = []
    for read in readers or (load, skeleton, base_weights):
        with pytest.raises(UserError) as caught:
            read(spec)
        found.append(str(caught.value))
        assert "\n" not in found[-1]
    return found


def without(*parts):
    return lambda held: {name: tensor for name, tensor in held.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (without(UP), ["lack 1 tensor", UP, "random numbers"]),
        (without("q_proj", NORM), ["q_proj.weight, ", "lack 5 tensors", ", ..."]),
        (without("embed_tokens"), ["model.embed_tokens.weight"]),
        (lambda held: {**held, "score.weight": torch.zeros(3)}, ["hold 1 tensor (score.weight)", "no place"]),
        (
            lambda held: {name.replace("up_proj", "up"): tensor for name, tensor in held.items()},
            ["lack 4 tensors", UP, "hold 4 tensors", "mlp.up.weight"],
        ),
        (lambda held: {**held, UP: held[UP][:7]}, [UP, "(7, 128)", "(384, 128)"]),
        (lambda held: {**held, UP: held[UP].T}, [UP, "(128, 384)"]),
        (lambda held: {**held, UP: held[UP].to(torch.int32)}, ["1 tensor", UP, "I32"]),
        (lambda held: {**held, UP: held[UP].to(torch.float8_e4m3fn)}, [UP, "F8_E4M3"]),
    ],
    ids=["missing", "several", "embeddings", "stray", "renamed", "shape", "turned", "integers", "packed"],
)
def test_what_is_missing_stray_or_other_is_named(change, names, model):
    held = load_file(model / SINGLE)
    layers = len({name for name in held if name.endswith("up_proj.weight")})
    rewrite(model, change)
    names = [name.replace(" 5 ", f" {layers + 1} ").replace(" 4 ", f" {layers} ") for name in names]
    rows, columns = held[UP].shape
    names = [name.replace("384", str(rows)).replace("128", str(columns)) for name in names]
    for line in said(model):
        assert str(model) in line
        for name in names:
            assert name in line, line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_named(value, model):
    def change(held):
        held[NORM][3] = value
        return held

    rewrite(model, change)
    (line,) = said(model, load)
    assert f"1 tensor ({NORM}) with entries that are no finite numbers in float32" in line
    with pytest.raises(UserError, match=f"holds {NORM} with entries that are not finite"):
        base_weights(ModelSpec(name=str(model))).tensor(NORM)


def test_numbers_beyond_the_type_are_named(model):
    rewrite(model, lambda held: {**held, NORM: torch.full_like(held[NORM].float(), 3.4e38)})
    load(ModelSpec(name=str(model)))
    with pytest.raises(UserError, match="no finite numbers in bfloat16"):
        load(ModelSpec(name=str(model), dtype="bfloat16"))


@pytest.mark.parametrize(
    "extra",
    [HEAD, "model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"],
)
def test_what_is_rightly_there_passes(extra, model):
    """The head of a tied model, and a buffer of older versions."""
    before = load(ModelSpec(name=str(PACKAGED["micro"]))).model
    table = load_file(model / SINGLE)["model.embed_tokens.weight"]
    value = table.clone() if extra == HEAD else torch.ones(16)
    rewrite(model, lambda held: {**held, extra: value})
    spec = ModelSpec(name=str(model))
    skeleton(spec)
    assert base_weights(pin(spec)).tensor(UP) is not None
    for name, parameter in load(spec).model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name))


def test_a_model_of_its_older_names_passes(tmp_path):
    """Without the prefix that transformers adds; the weights are then those it loads."""
    tiny_model("untied").save_pretrained(tmp_path / "model")
    shutil.copyfile(PACKAGED["micro"] / "tokenizer_config.json", tmp_path / "model" / "tokenizer_config.json")
    rewrite(tmp_path / "model", lambda held: {name.removeprefix("model."): value for name, value in held.items()})
    skeleton(ModelSpec(name=str(tmp_path / "model")))
    found = base_weights(ModelSpec(name=str(tmp_path / "model"))).tensor(UP)
    assert torch.equal(found, tiny_model("untied").get_parameter(UP))


def test_shards_pass_and_each_that_is_broken_does_not(model):
    table = sharded(model)
    spec = ModelSpec(name=str(model))
    assert torch.equal(load(spec).model.get_parameter(UP), load_file(PACKAGED["micro"] / SINGLE)[UP].float())
    write_index(model, {name: place for name, place in table.items() if name != UP})
    load(spec)  # the file has it, whatever the index forgets
    held = load_file(model / table[UP])
    save_file(without(UP)(held), model / table[UP], metadata={"format": "pt"})
    write_index(model, table)
    for line in said(model, load, skeleton, pin):
        assert f"lacks 1 tensor ({UP}) where {INDEX} says" in line
    (model / table[UP]).write_bytes(b"")
    for line in said(model):
        assert f"{model / table[UP]} is damaged" in line
    save_file(held, model / table[UP], metadata={"format": "pt"})
    whole = (model / table[UP]).read_bytes()
    (model / table[UP]).write_bytes(whole[:-100])
    for line in said(model, load, skeleton, pin, base_weights):
        assert f"{model / table[UP]} is damaged" in line
    (model / table[UP]).unlink()
    for line in said(model, load, skeleton, pin, base_weights):
        assert f"{model / table[UP]} is missing" in line


def test_one_set_of_weights_beside_another_is_refused(model):
    whole = load_file(model / SINGLE)
    table = sharded(model)
    save_file({name: 1.5 * value for name, value in whole.items()}, model / SINGLE, metadata={"format": "pt"})
    for line in said(model):
        assert f"{model} holds two sets of weights, {SINGLE} and model-0000" in line
    for place in set(table.values()):
        (model / place).unlink()
    load(ModelSpec(name=str(model)))  # an index alone is none


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: "),
        ("[]", "must hold an object"),
        ('{"weight_map": [1]}', "weight_map must be an object"),
        ('{"weight_map": {}}', "its weight_map is empty"),
        ('{"weight_map": {"a": 3}}', "the file of a is 3"),
        ('{"weight_map": {"a": ""}}', "the file of a is ''"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_an_index_that_is_none_is_refused(text, message, model):
    (model / SINGLE).unlink()
    (model / INDEX).write_text(text)
    for line in said(model, load, skeleton, pin, base_weights):
        assert str(model / INDEX) in line
        assert message in line


@pytest.mark.parametrize("way", ["above", "hidden", "absolute", "link", "folder"])
def test_an_index_names_no_file_outside(way, model, tmp_path):
    table = sharded(model)
    other = tmp_path / "other.safetensors"
    shutil.move(model / table[UP], other)
    names = {"above": "../other.safetensors", "hidden": "sub/../../other.safetensors", "absolute": str(other)}
    if way == "link":
        (model / table[UP]).symlink_to(other)
    elif way == "folder":
        (model / "sub").symlink_to(tmp_path)
        names["folder"] = "sub/other.safetensors"
    name = names.get(way, table[UP])
    write_index(model, {key: name if place == table[UP] else place for key, place in table.items()})
    for line in said(model, load, skeleton, pin, base_weights):
        assert f"{model / INDEX} names {name}, which is outside of {model}" in line


def test_links_of_the_hub_s_cache_pass(model, tmp_path):
    table = sharded(model)
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir()
    shutil.move(model, snapshot)
    for place in set(table.values()):
        shutil.move(snapshot / place, home / "blobs" / place)
        (snapshot / place).symlink_to(f"../../blobs/{place}")
    load(ModelSpec(name=str(snapshot)))
    (snapshot / table[UP]).unlink()
    shutil.move(home / "blobs" / table[UP], home / "elsewhere")
    (snapshot / table[UP]).symlink_to("../../elsewhere")
    assert "outside of" in said(snapshot, load)[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(name, model):
    (model / SINGLE).unlink()
    torch.save({}, model / name)
    for line in said(model, load, skeleton, pin, base_weights):
        assert f"as {name}, a pickle" in line


def test_one_file_goes_before_an_index_for_every_reader(model):
    """As in transformers: what geometry reads is what was evaluated."""
    tensors = load_file(model / SINGLE)
    for place in set(sharded(model).values()):
        (model / place).unlink()
    tensors[UP] = tensors[UP] * 2
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    spec = ModelSpec(name=str(model))
    assert torch.equal(load(spec).model.get_parameter(UP), base_weights(spec).tensor(UP))


@pytest.mark.parametrize("what", ["tensor", "nested", "template"])
def test_all_that_is_read_is_in_the_revision(what, model, tmp_path):
    if what == "nested":
        table = sharded(model, ("deep/one.safetensors", "deep/two.safetensors"))
    (model / "additional_chat_templates").mkdir()
    template = model / "additional_chat_templates" / "tools.jinja"
    template.write_text("{{ 1 }}")
    before = pin(ModelSpec(name=str(model))).revision
    assert pin(ModelSpec(name=str(model))).revision == before
    if what == "template":
        template.write_text("{{ 2 }}")
    else:
        file = model / (table[UP] if what == "nested" else SINGLE)
        tensors = load_file(file)
        tensors[UP][0, 0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    assert pin(ModelSpec(name=str(model))).revision != before


def test_the_revision_of_a_plain_directory_stays(model):
    """Ids of runs hang on it."""
    assert content_of(model) == content_of(PACKAGED["micro"])
    (model / "README.md").write_text("not read")
    assert content_of(model) == content_of(PACKAGED["micro"])
    assert pin(ModelSpec(name="micro")).revision == "sha256:a778c0a2f1fd"


def test_a_large_file_is_hashed_once_until_it_changes(model, tmp_path, monkeypatch):
    made = []

    def counted(path, plain=content.file_hash):
        made.append(path.name)
        return plain(path)

    monkeypatch.setattr(content, "LARGE", 1000)
    monkeypatch.setattr(content, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(content, "file_hash", counted)
    file = tmp_path / "model" / SINGLE
    first = kept_hash(file)
    assert kept_hash(file) == first
    assert len(made) == 2, "a file that has just been written is not trusted"
    monkeypatch.setattr(content, "SETTLED_S", -1.0)
    assert [kept_hash(file) for _ in range(3)] == [first] * 3
    assert len(made) == 3
    stamp = file.stat()
    rewrite(model, lambda held: {**held, UP: held[UP] * 2})
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    assert kept_hash(file) != first, "size and time of change are the same, and the content is not"
    (entry,) = (tmp_path / "cache" / "hashes").iterdir()
    entry.write_text("[")
    assert kept_hash(file) != first


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
HEADS = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def written(directory, config):
    """Write a tiny model of a configuration that loads, and return what is in its file."""
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    spec = ModelSpec(name=str(directory))
    skeleton(spec)
    bare(spec)
    return load_file(directory / SINGLE)


def bare(spec):
    """Load a model without its tokenizer."""
    return load_model(resolve(spec), spec)


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_an_expert_that_lacks_a_part_is_named(part, tmp_path):
    """transformers puts experts together, and cannot say which of them is not there."""
    held = written(tmp_path / "model", MixtralConfig(**SIZES, **HEADS, num_local_experts=3))
    (name,) = [name for name in held if f"1.block_sparse_moe.experts.2.{part}" in name]
    rewrite(tmp_path / "model", without(name))
    for line in said(tmp_path / "model", skeleton, bare):
        assert name in line


@pytest.mark.parametrize("number", ["7", "02"])
def test_experts_have_their_numbers(number, tmp_path):
    """transformers puts experts together in the order of their numbers, whatever these are."""
    written(tmp_path / "model", MixtralConfig(**SIZES, **HEADS, num_local_experts=3))
    old, new = "1.block_sparse_moe.experts.1.", f"1.block_sparse_moe.experts.{number}."
    rewrite(tmp_path / "model", lambda held: {name.replace(old, new): value for name, value in held.items()})
    for line in said(tmp_path / "model", skeleton, bare):
        assert f"holds model.layers.{new[:-1]}" in line and "without a gap" in line


@pytest.mark.parametrize(
    ("config", "end", "kind"),
    [
        (MambaConfig(**SIZES, state_size=4), "1.mixer.A_log", torch.int32),
        (GptOssConfig(**SIZES, **HEADS, head_dim=8, num_local_experts=2), "1.self_attn.sinks", torch.int8),
        (GptOssConfig(**SIZES, **HEADS, head_dim=8, num_local_experts=2), "1.mlp.experts.gate_up_proj", torch.int8),
    ],
)
def test_weights_are_floats_whatever_their_names(config, end, kind, tmp_path):
    held = written(tmp_path / "model", config)
    (name,) = [name for name in held if name.endswith(end)]
    rewrite(tmp_path / "model", lambda held: {**held, name: held[name].to(kind)})
    for line in said(tmp_path / "model", skeleton, bare):
        assert f"1 tensor ({name}) as I" in line


def test_a_mask_of_older_versions_is_no_weight(tmp_path):
    config = GPTNeoXConfig(**SIZES, intermediate_size=24, num_attention_heads=2)
    written(tmp_path / "model", config)
    spec = ModelSpec(name=str(tmp_path / "model"))
    before = bare(spec)
    mask = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    rewrite(tmp_path / "model", lambda held: {**held, **mask})
    skeleton(spec)
    for name, parameter in bare(spec).named_parameters():
        assert torch.equal(parameter, before.get_parameter(name))


@pytest.mark.parametrize(
    "table",
    [
        {"quantization_config": {"quant_method": "none"}},
        {"quantization_config": {"bits": 8}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
)
def test_only_a_quantisation_that_is_applied_counts(table, model):
    rewrite(model, lambda held: {**held, UP: held[UP].to(torch.int8)})
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | table))
    for line in said(model, skeleton):
        assert f"1 tensor ({UP}) as I8" in line
    for line in said(model, load):
        assert str(model) in line


def test_a_zero_head_is_the_model_s_own(model):
    """Although the configuration says that it is the embeddings."""
    rewrite(model, lambda held: {**held, HEAD: torch.zeros_like(held["model.embed_tokens.weight"])})
    spec = ModelSpec(name=str(model))
    assert not load(spec).model.get_output_embeddings().weight.any()
    assert not skeleton(spec).config.tie_word_embeddings
    assert not base_weights(spec).tensor(HEAD).any()


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (GPTNeoXConfig(**SIZES, intermediate_size=24, num_attention_heads=2), "embed_out.weight", HEAD),
        (LlamaConfig(**SIZES, **HEADS), "norm.weight", NORM),
    ],
)
def test_a_weight_under_two_names_is_named(config, old, new, tmp_path):
    """One of them would be dropped without a word."""
    held = written(tmp_path / "model", config)
    value = held[old] if old in held else held[new]
    rewrite(tmp_path / "model", lambda held: {**held, old: value, new: torch.zeros_like(value)})
    for line in said(tmp_path / "model", skeleton, bare):
        assert f"holds 1 tensor ({old}) under older names" in line


def test_transformers_is_quiet_inside_and_as_before_after(capsys):
    loggers = [logging.getLogger(name) for name in ("transformers", "transformers.modeling_utils")]
    before = [logger.level for logger in loggers], notes.is_progress_bar_enabled()
    with unreported():
        notes.get_logger("transformers.modeling_utils").warning("noted")
        warnings.warn("is deprecated", FutureWarning, stacklevel=1)
        list(notes.tqdm([1], desc="Loading weights"))
    assert capsys.readouterr().err == ""
    assert ([logger.level for logger in loggers], notes.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], r=2), "lora_A"),
        (peft.LoHaConfig(target_modules=["q_proj"], r=2), "hada_w1_a"),
    ],
)
def test_adapters_that_are_broken_are_refused(config, changed, tmp_path):
    """Of a kind that is read from its files, and of one that peft merges."""
    base = load(ModelSpec(name="micro")).model
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    weights = base_weights(ModelSpec(name="micro"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    first = next(name for name in held if changed in name)
    broken = {
        "lacks": without(first)(held),
        "no place|not an adapter": {**held, "base_model.model.model.layers.0.nothing.lora_A.weight": torch.ones(2, 2)},
        "does not fit|cannot load": {**held, first: held[first][:1].contiguous()},
        "not finite": {**held, first: held[first] * float("nan")},
    }
    for message, tensors in broken.items():
        save_file(tensors, file)
        with pytest.raises(UserError, match=message) as caught:
            point = effective_weights(weights, tmp_path / "adapter")
            for name in point.changes.makers:
                point.parameter(name)
        assert "\n" not in str(caught.value)
