"""Checkpoints exported as plain adapters and models: every tensor finds its place, or nothing is written."""

import importlib.util
import json
import os
import pickle
import shutil
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_arena.weights.writing as writing
from peft_arena.commands.export_command import export
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.export.shards import distributed
from peft_arena.models.load import PACKAGED, Source, load_model
from peft_arena.testing.subject import difference, logits, tokens
from tests.commands.test_geometry import micro_adapter
from tests.export.shard_toys import write_shards, write_split_shards
from tests.made_runs import made_run

PREFIX = "base_model.model."


def micro():
    return load_model(Source("package", str(PACKAGED["micro"]), None), ModelSpec(name="micro"))


def in_memory(directory, whole=False):
    """Return the tensors of an adapter as a model has them in memory: with its name, and with the base's if whole."""
    wrapped = peft.PeftModel.from_pretrained(micro(), str(directory))
    state = {name: tensor.detach() for name, tensor in wrapped.state_dict().items()}
    return state if whole else {name: tensor for name, tensor in state.items() if "lora_" in name}


def only(folder, *names):
    return {found.name for found in folder.iterdir()} == set(names)


def nudged_model():
    model = micro()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return model


def same_adapter(out, adapter):
    found, wanted = load_file(out / "adapter_model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    loaded = peft.PeftModel.from_pretrained(micro(), str(out))
    assert difference(logits(loaded, tokens()), logits(micro(), tokens())) > 0.1


def test_a_checkpoint_of_ours_becomes_a_plain_adapter(tmp_path):
    run = made_run(tmp_path / "runs", "lora")
    step = run.checkpoint(2)
    done = export(str(step), tmp_path / "out", "adapter")
    again = export(f"{run.run_id}@2", tmp_path / "again", "adapter", runs=tmp_path / "runs")
    assert (again.files, again.tensors) == (done.files, done.tensors)
    assert done.tensors > 10
    assert only(tmp_path / "out", "adapter_config.json", "adapter_model.safetensors", "export.json")
    same_adapter(tmp_path / "out", step)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (record["subject"], record["step"], record["base"]["name"]) == (run.run_id, 2, "micro")
    assert set(record["hashes"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_trainers_directory_loses_all_that_is_training(tmp_path):
    source = micro_adapter(tmp_path / "checkpoint-100")
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin", "README.md"):
        (source / name).write_text("x")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PACKAGED["micro"] / name, source / name)
    export(str(source), tmp_path / "out", "adapter", base="micro")
    same_adapter(tmp_path / "out", source)
    assert only(
        tmp_path / "out",
        *("adapter_config.json", "adapter_model.safetensors", "export.json", "tokenizer.json", "tokenizer_config.json"),
    )


@pytest.mark.parametrize("whole", [False, True], ids=["adapter alone", "with its base"])
@pytest.mark.parametrize("place", ["shards", "shards/pytorch_model_fsdp_0"])
def test_shards_become_an_adapter(whole, place, tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    (tmp_path / "shards").mkdir()
    shutil.copyfile(adapter / "adapter_config.json", tmp_path / "shards" / "adapter_config.json")
    (tmp_path / "shards" / "optimizer_0").mkdir()
    (tmp_path / "shards" / "optimizer_0" / ".metadata").write_text("not read")
    write_shards(tmp_path / place, in_memory(adapter, whole))
    assert len(list((tmp_path / place).glob("*.distcp"))) == 2
    done = export(str(tmp_path / "shards"), tmp_path / "out", "adapter", base="micro")
    assert done.layout == "torch.distributed.checkpoint"
    same_adapter(tmp_path / "out", adapter)
    assert only(tmp_path / "out", "adapter_config.json", "adapter_model.safetensors", "export.json")


def test_tensors_that_two_processes_split_are_put_together(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    shards = write_split_shards(tmp_path / "shards", in_memory(adapter))
    assert {file.name for file in shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    export(str(shards), tmp_path / "out", "adapter", base="micro", settings=adapter)
    same_adapter(tmp_path / "out", adapter)


def stray(tensors):
    return {**tensors, f"{PREFIX}model.layers.0.self_attn.q_proj.lora_C.weight": torch.zeros(2)}


def lacking(tensors):
    return dict(list(tensors.items())[1:])


def misshapen(tensors):
    name = next(iter(tensors))
    return {**tensors, name: torch.zeros(3, 3)}


def of_another_base(tensors):
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight"
    return {**tensors, name: tensors[name] + 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stray, "1 tensors that have no place, the first: model.base_model.model.model.layers.0.self_attn.q_proj.lora"),
        (lacking, "lacks 1 of 10 tensors, the first"),
        (misshapen, r"as \(3, 3\), the model and its settings ask for \(2, 128\)"),
        (of_another_base, "with other values than model.layers.0.self_attn.q_proj.weight of the base"),
    ],
)
def test_shards_that_do_not_fit_are_refused(change, message, tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    write_shards(tmp_path / "shards", change(in_memory(adapter, whole=change is of_another_base)))
    with pytest.raises(UserError, match=message) as caught:
        export(str(tmp_path / "shards"), tmp_path / "out", "adapter", base="micro", settings=adapter)
    assert "\n" not in str(caught.value)
    assert only(tmp_path, "adapter", "shards")


def test_damaged_shards_are_refused(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    shards = write_shards(tmp_path / "shards", in_memory(adapter))

    def attempt():
        export(str(shards), tmp_path / "out", "adapter", base="micro", settings=adapter)

    file = shards / "__0_1.distcp"
    held = file.read_bytes()
    file.write_bytes(held[:-200])
    with pytest.raises(UserError, match="is damaged: .* cannot be read"):
        attempt()
    file.unlink()
    with pytest.raises(UserError, match="lacks 1 of its 2 shards, the first: __0_1.distcp"):
        attempt()
    (shards / ".metadata").write_bytes(b"nothing")
    with pytest.raises(UserError, match="metadata is damaged"):
        attempt()
    assert only(tmp_path, "adapter", "shards")


def test_settings_are_needed_and_looked_for(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    shards = write_shards(tmp_path / "a" / "shards", in_memory(adapter))
    with pytest.raises(UserError, match="--settings must name the adapter's own"):
        export(str(shards), tmp_path / "out", "adapter", base="micro")
    with pytest.raises(UserError, match="must be an adapter_config.json or a directory with one"):
        export(str(shards), tmp_path / "out", "adapter", base="micro", settings=tmp_path)
    with pytest.raises(UserError, match="--base must name"):
        export(str(shards), tmp_path / "out", "adapter", settings=adapter)
    export(str(shards), tmp_path / "out", "adapter", base="micro", settings=adapter / "adapter_config.json")
    same_adapter(tmp_path / "out", adapter)


def test_shards_of_a_model_become_a_model(tmp_path):
    """The whole state of a training: wrappers' names, tied weights twice, an optimizer."""
    model = nudged_model()
    state = {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in model.state_dict().items()}
    assert len(state) == len(dict(model.named_parameters())) + 1  # lm_head is embed_tokens again
    shards = write_shards(tmp_path / "checkpoint-9" / "pytorch_model_fsdp_0", state)
    done = export(str(tmp_path / "checkpoint-9"), tmp_path / "out", "model", base="micro", shard_size="1MB")
    assert len(done.files) > 1
    assert done.dtype == "float32"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (PACKAGED["micro"] / name).read_bytes()
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["subject"] == str(shards)
    assert record["layout"] == "torch.distributed.checkpoint"


def test_other_parts_of_a_training_are_left_out_of_a_model(tmp_path):
    state = nudged_model().state_dict()
    import torch.distributed.checkpoint as dcp

    whole = {"model": dict(state), "optimizer": {"state": {"m": torch.zeros(3)}}, "train_state": {"step": 7}}
    dcp.save(whole, checkpoint_id=tmp_path / "shards", no_dist=True)
    done = export(str(tmp_path / "shards"), tmp_path / "out", "model", base="micro", dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert done.dtype == json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "layers.4.mlp.up" not in k},
            r"lacks 1 of \d+ tensors, the first: model.layers.4.mlp.up",
        ),
        (lambda s: {**s, "model.layers.5.mlp.up_proj.weight": torch.zeros(2)}, "1 tensors that have no place"),
        (lambda s: {**s, "model.norm.weight": torch.ones(64)}, r"model.norm.weight as \(64,\).* ask for \(128,\)"),
        (lambda s: {**s, "lm_head.weight": s["lm_head.weight"] + 1}, "its own weights for model.embed_tokens.weight"),
        (lambda s: {**s, "model.norm.weight": torch.full((128,), torch.nan)}, "no finite numbers"),
        (lambda s: {k: v for k, v in s.items() if "embed" not in k and "lm_head" not in k}, "lacks 1 tensors"),
    ],
)
def test_a_model_that_does_not_fit_the_base_is_refused(change, message, tmp_path):
    write_shards(tmp_path / "shards", change(nudged_model().state_dict()))
    with pytest.raises(UserError, match=message):
        export(str(tmp_path / "shards"), tmp_path / "out", "model", base="micro")
    assert only(tmp_path, "shards")


def test_a_trainers_model_directory_becomes_a_model(tmp_path):
    model = nudged_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_text("x")
    done = export(str(tmp_path / "checkpoint-9"), tmp_path / "out", "model", base="micro")
    assert (done.layout, done.dtype) == ("safetensors", "bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_the_model_of_an_adapter_is_a_merge(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"peft-arena merge {adapter}"):
        export(str(adapter), tmp_path / "out", "model", base="micro")
    with pytest.raises(UserError, match="peft-arena merge some-run@4"):
        export("some-run@4", tmp_path / "out", "model")
    with pytest.raises(UserError, match=r"has no adapter_config.json: it is a model; peft-arena merge"):
        nudged_model().save_pretrained(tmp_path / "model")
        export(str(tmp_path / "model"), tmp_path / "out", "adapter", base="micro")
    assert only(tmp_path, "adapter", "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "onnx"}, "unknown form to export to 'onnx'"),
        ({"rank": "4"}, "--rank is for --to lora"),
        ({"to": "model", "settings": "x"}, "--settings is for --to adapter"),
        ({"dtype": "float32"}, "--dtype is for --to model and gguf"),
        ({"to": "model", "dtype": "int8"}, "cannot write weights as 'int8'"),
        ({"to": "lora"}, "--to lora needs --rank"),
        ({"to": "lora", "rank": "0"}, "--rank must be a whole number"),
        ({"to": "lora", "rank": "1.5"}, "--rank must be a whole number"),
        ({"to": "lora", "rank": "many"}, "got 'many'"),
        ({"base": None}, "--base must name"),
        ({"shard_size": "?"}, "a shard size is"),
    ],
)
def test_a_wrong_request_is_one_line(settings, message, tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    shutil.copytree(PACKAGED["micro"], tmp_path / "model")
    choices = {"to": "adapter", "base": "micro"} | settings
    subject = tmp_path / "model" if choices["to"] == "model" else adapter
    with pytest.raises(UserError, match=message) as caught:
        export(str(subject), tmp_path / "out", choices.pop("to"), **choices)
    assert "\n" not in str(caught.value)
    assert only(tmp_path, "adapter", "model")


def test_pickled_weights_are_not_read(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin, a Python pickle, which is not read"):
        export(str(adapter), tmp_path / "out", "adapter", base="micro")


def test_zero_needs_deepspeed(tmp_path, monkeypatch):
    (tmp_path / "zero" / "global_step4").mkdir(parents=True)
    (tmp_path / "zero" / "latest").write_text("global_step4")
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(UserError, match=r"needs deepspeed \(pip install deepspeed\)"):
            export(str(tmp_path / "zero"), tmp_path / "out", "model", base="micro")
    state = {f"module.{name}": tensor.float() for name, tensor in nudged_model().state_dict().items()}
    tool = SimpleNamespace(get_fp32_state_dict_from_zero_checkpoint=lambda directory: state)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__spec__=SimpleNamespace(name="deepspeed")))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.utils.zero_to_fp32", tool)
    done = export(str(tmp_path / "zero"), tmp_path / "out", "model", base="micro")
    assert done.layout == "deepspeed"
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, state[f"module.{name}"]) for name, tensor in found.items())


def test_an_adapter_with_a_missing_tensor_is_not_copied(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(UserError, match="lacks 1 tensors of its own settings"):
        export(str(adapter), tmp_path / "out", "adapter", base="micro")
    assert only(tmp_path, "adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_with_entries_that_are_no_numbers_are_refused(value, tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    shards = write_shards(tmp_path / "shards", in_memory(adapter) | spoilt(in_memory(adapter), value))
    with pytest.raises(UserError, match="shards holds .* with entries that are no finite numbers"):
        export(str(shards), tmp_path / "out", "adapter", base="micro", settings=adapter)
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | spoilt(load_file(file), value), file, {"format": "pt"})
    with pytest.raises(UserError, match=f"^{file} holds .* with entries that are not finite numbers"):
        export(str(adapter), tmp_path / "out", "adapter", base="micro")
    assert only(tmp_path, "adapter", "shards")


def spoilt(tensors, value):
    name = next(name for name in tensors if "lora_B" in name)
    wrong = tensors[name].clone()
    wrong[0, 0] = value
    return {name: wrong}


def wrongly_written(monkeypatch):
    """Let one entry of what is written be a hundredth off."""
    made = writing._write

    def wrong(handle, entry, parts):
        made(handle, entry, lambda entry: [part * 1.01 if ".1." in entry.name else part for part in parts(entry)])

    monkeypatch.setattr(writing, "_write", wrong)


@pytest.mark.parametrize("to", ["adapter", "model"])
def test_what_is_written_is_compared_with_the_source(to, tmp_path, monkeypatch):
    adapter = micro_adapter(tmp_path / "adapter")
    state = in_memory(adapter) if to == "adapter" else nudged_model().state_dict()
    shards = write_shards(tmp_path / "shards", state)
    wrongly_written(monkeypatch)
    with pytest.raises(UserError, match="read back is another; nothing was kept"):
        export(str(shards), tmp_path / "out", to, base="micro", settings=adapter if to == "adapter" else None)
    assert only(tmp_path, "adapter", "shards")


@pytest.mark.parametrize("place", ["shards", "."])
def test_shards_of_a_model_that_computes_in_another_way_are_refused(place, tmp_path):
    write_shards(tmp_path / "shards", nudged_model().state_dict())
    table = json.loads((PACKAGED["micro"] / "config.json").read_text())
    (tmp_path / place / "config.json").write_text(json.dumps(table | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match="is no tuned version of this model: rms_norm_eps is 0.1 there"):
        export(str(tmp_path / "shards"), tmp_path / "out", "model", base="micro")
    assert not (tmp_path / "out").exists()


def test_special_tokens_of_an_exported_model_go_with_its_tokenizer(tmp_path):
    nudged_model().save_pretrained(tmp_path / "model")
    table = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(table | {"eos_token_id": 7}))
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PACKAGED["micro"] / name, tmp_path / "model" / name)
    export(str(tmp_path / "model"), tmp_path / "out", "model", base="micro")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 7


def test_nothing_is_exported_into_a_run(tmp_path):
    run = made_run(tmp_path / "runs", "lora")
    with pytest.raises(UserError, match=f"is inside the run {run.run_id}"):
        export(str(run.checkpoint(2)), run.checkpoint(2) / "out", "adapter")


class Harmful:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_metadata_that_would_run_code_are_refused_before_they_do(tmp_path):
    shards = write_shards(tmp_path / "shards", {"a": torch.zeros(2, 3)})
    (shards / ".metadata").write_bytes(pickle.dumps(Harmful(str(tmp_path / "harm"))))
    with pytest.raises(UserError, match=r"it names (posix|nt|os)\.mkdir, which no checkpoint needs"):
        distributed(shards)
    assert not (tmp_path / "harm").exists()


def test_metadata_as_torch_writes_them_are_read(tmp_path):
    values = {"a": torch.randn(4, 3).bfloat16(), "b": torch.arange(5), "c": torch.zeros(())}
    found = distributed(write_shards(tmp_path / "shards", values))
    assert {name: (one.shape, one.dtype) for name, one in found.stored.items()} == {
        f"model.{name}": (tuple(tensor.shape), tensor.dtype) for name, tensor in values.items()
    }
    assert all(torch.equal(found.read(f"model.{name}"), tensor) for name, tensor in values.items())
