"""The merge of a point that a command line names."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_arena.commands.merge_command import merge
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models.load import PACKAGED, load
from peft_arena.store.store import Store
from peft_arena.testing.subject import difference, logits, tokens
from tests.commands.test_geometry import micro_adapter
from tests.made_runs import made_run

METHODS = ("lora", "full", "prompt_tuning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    for method in METHODS:
        made_run(folder, method)
    return folder


def run_of(runs, method):
    return next(run for run in Store(runs).runs() if run.spec.method.name == method)


def name_of(runs, method):
    return f"{run_of(runs, method).run_id}@2"


def copy_of_micro(directory, dtype="float32"):
    shutil.copytree(PACKAGED["micro"], directory)
    if dtype != "float32":
        tensors = load_file(directory / "model.safetensors")
        held = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
        save_file(held, directory / "model.safetensors", {"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return directory


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_is_merged_as_its_method_restores_it(runs, method, tmp_path):
    from peft_arena.weights.start import tuned_run

    run = run_of(runs, method)
    merged = merge(f"{run.run_id}@2", tmp_path / "out", runs=runs)
    tuned = tuned_run(run, 2).model(load(run.spec.model))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(logits(found, tokens()), logits(tuned, tokens())) < 1e-4
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["subject"], record["step"], record["base"]["name"]) == (run.run_id, 2, "micro")
    assert record["base"]["revision"] == run.spec.model.revision
    assert record["method"]["name"] == method
    assert "config.json" in record["checkpoint"]["files"] or "adapter_config.json" in record["checkpoint"]["files"]
    assert merged.verified.point.ratio < 1e-3
    assert merged.verified.written.ratio < 1e-3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.pad_token_id == 0


def test_a_factor_is_a_point_of_the_methods_path(runs, tmp_path):
    run = run_of(runs, "lora")
    merged = merge(f"{run.run_id}@2", tmp_path / "out", runs=runs, factor=0.0)
    base = load_file(PACKAGED["micro"] / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    assert merged.factor == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_directory_is_written_in_the_type_of_its_base(dtype, tmp_path):
    adapter, base = micro_adapter(tmp_path / "adapter"), copy_of_micro(tmp_path / "base", dtype)
    merged = merge(str(adapter), tmp_path / "out", base=str(base))
    assert merged.dtype == dtype
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_a_model_directory_of_a_wider_type_is_not_rounded_on_the_way(tmp_path):
    base = copy_of_micro(tmp_path / "base", "bfloat16")
    tuned = copy_of_micro(tmp_path / "tuned")
    torch.manual_seed(0)
    wanted = {
        name: tensor.float() * (1 + 1e-3 * torch.randn(tensor.shape))
        for name, tensor in load_file(tuned / "model.safetensors").items()
    }
    save_file(wanted, tuned / "model.safetensors", {"format": "pt"})
    merge(str(tuned), tmp_path / "out", base=str(base), dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-8) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": None}, "--base must name"),
        ({"shard_size": "huge"}, "a shard size is"),
        ({"factor": float("nan")}, "--factor must be a finite number"),
        ({"factor": 1e30}, r"--factor must be a finite number from -1000 to 1000, got 1e\+30"),
        ({"dtype": "int4"}, "cannot write weights as 'int4'"),
        ({"base": "nowhere"}, "unknown model 'nowhere'"),
    ],
)
def test_a_wrong_request_is_one_line(settings, message, tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as caught:
        merge(str(adapter), tmp_path / "out", **{"base": "micro"} | settings)
    assert "\n" not in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == ["adapter"]


def test_a_method_without_weights_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="prompt_tuning has no weights to look at"):
        merge(name_of(runs, "prompt_tuning"), tmp_path / "out", runs=runs)
    with pytest.raises(UserError, match="is the pretrained model"):
        merge("micro", tmp_path / "out", runs=runs)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_model_is_refused(tmp_path):
    """By shape, and by the commit it says it was trained on."""
    adapter = micro_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(2, 64)}, file)
    with pytest.raises(UserError, match=r"has shape \(2, 64\)"):
        merge(str(adapter), tmp_path / "out", base="micro")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(UserError, match="lora_A"):
        merge(str(adapter), tmp_path / "out", base="micro")
    assert [found.name for found in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_another_commit_is_refused(tmp_path, monkeypatch):
    adapter = micro_adapter(tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"revision": "a" * 40}))
    pinned = ModelSpec(name="micro", revision="b" * 40)
    monkeypatch.setattr("peft_arena.commands.geometry_command.pin", lambda spec: pinned)
    monkeypatch.setattr("peft_arena.models.load.weight_files", lambda spec: PACKAGED["micro"])
    with pytest.raises(UserError, match=f"was trained on revision {'a' * 40} of its model, and micro is at {'b' * 40}"):
        merge(str(adapter), tmp_path / "out", base="micro")


def test_a_base_that_changed_since_the_run_is_refused(runs, tmp_path, monkeypatch):
    """The run holds the hash of its base: other files under that name are another model."""
    run = run_of(runs, "lora")
    other = copy_of_micro(tmp_path / "other", "bfloat16")
    with pytest.raises(UserError, match="--base is"):
        merge(f"{run.run_id}@2", tmp_path / "out", runs=runs, base=str(other))
    monkeypatch.setitem(PACKAGED, "micro", other)
    with pytest.raises(UserError, match=f"is at revision .*, not {run.spec.model.revision}"):
        merge(f"{run.run_id}@2", tmp_path / "out", runs=runs)
    assert [found.name for found in tmp_path.iterdir()] == ["other"]


def test_a_damaged_checkpoint_is_refused(runs, tmp_path):
    run = run_of(runs, "lora")
    folder = tmp_path / "runs" / run.run_id
    shutil.copytree(run.path, folder)
    file = next(folder.rglob("adapter_model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="adapter_model.safetensors has sha256"):
        merge(f"{run.run_id}@2", tmp_path / "out", runs=tmp_path / "runs")
    assert not (tmp_path / "out").exists()


CLOSED = ("dora", "oft", "ia3", "vera", "miss", "ln_tuning", "beft")
"""Methods whose files say their change in closed form, besides those of runs above."""
BY_MERGE = ("boft", "hra", "adalora", "pissa", "bitfit")
"""Methods that are merged by their own code, or store weights in another way."""


@pytest.mark.parametrize("method", [*CLOSED, *BY_MERGE])
def test_every_form_of_change_is_merged_as_its_method_restores_it(method, tmp_path):
    """The check by logits is the test: the restored model shares no code with the writing of weights."""
    run = made_run(tmp_path / "runs", method)
    merged = merge(f"{run.run_id}@2", tmp_path / "out", runs=tmp_path / "runs")
    assert merged.verified.point.max_change > 0.05
    assert merged.verified.point.ratio < 1e-3
    assert merged.verified.written.ratio < 1e-3


@pytest.mark.parametrize("method", ["lora", "vera", "ln_tuning"])
def test_weights_of_16_bits_are_exact_before_they_are_rounded(method, tmp_path):
    run = made_run(tmp_path / "runs", method, dtype="bfloat16", size=0.1)
    merged = merge(f"{run.run_id}@2", tmp_path / "out", runs=tmp_path / "runs", dtype="float32")
    assert merged.verified.point.max_change > 0.05
    assert merged.verified.point.ratio < 1e-3
    assert merged.verified.written.ratio < 1e-3


@pytest.mark.parametrize(("method", "own"), [("lora", True), ("full", False)])
def test_a_point_on_the_way_is_held_against_its_own_adapter_where_there_is_one(method, own, runs, tmp_path):
    merged = merge(name_of(runs, method), tmp_path / "out", runs=runs, factor=0.5)
    verified = json.loads((tmp_path / "out" / "merge.json").read_text())["verified"]
    assert (merged.verified.point is not None) == own
    assert ("the point's own adapter" in verified["against"]) == own
    assert ("is not shown" in verified["against"]) != own
    if own:
        assert verified["point"]["ratio"] < verified["point"]["limit"] == 1e-3
    assert {"point"} & {file.name for file in (tmp_path / "out").iterdir()} == set()


def test_a_directory_on_the_way_is_held_against_its_own_adapter(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    merged = merge(str(adapter), tmp_path / "out", base="micro", factor=0.5)
    assert merged.verified.point.ratio < 1e-3


def rescaled_copy(directory, **settings):
    """Return a directory with other weights, and other settings, than the micro model."""
    copy_of_micro(directory)
    tensors = {name: 1.1 * tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    return directory


@pytest.mark.parametrize("choice", [{"verify": False}, {"factor": 0.5}, {}])
def test_a_model_that_computes_in_another_way_is_refused(choice, tmp_path):
    tuned = rescaled_copy(tmp_path / "tuned", rms_norm_eps=0.1)
    with pytest.raises(UserError, match="is no tuned version of this model: rms_norm_eps is 0.1 there"):
        merge(str(tuned), tmp_path / "out", base="micro", **choice)
    assert [found.name for found in tmp_path.iterdir()] == ["tuned"]


def test_the_type_is_that_of_the_tensors_not_of_the_settings(tmp_path):
    """A base that says bfloat16 and holds float32 is rounded when it is written, and then alone."""
    base = copy_of_micro(tmp_path / "base")
    tensors = {name: tensor + 1e-5 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    adapter = micro_adapter(tmp_path / "adapter")
    merge(str(adapter), tmp_path / "out", base=str(base), dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"])
    assert merge(str(adapter), tmp_path / "other", base=str(base)).dtype == "bfloat16"


def test_weights_that_an_adapter_holds_in_float32_are_not_rounded_on_the_way(tmp_path):
    base, adapter = copy_of_micro(tmp_path / "base", "bfloat16"), tmp_path / "adapter"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(PACKAGED["micro"], dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    wrapped.save_pretrained(adapter)
    merged = merge(str(adapter), tmp_path / "out", base=str(base), dtype="float32")
    assert merged.verified.point.ratio < 1e-4
    wanted = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    found = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.allclose(found, wanted, rtol=1e-6, atol=0)
    assert not torch.equal(wanted, wanted.bfloat16().float())


def test_norms_of_an_adapter_in_float32_are_held_against_themselves(tmp_path):
    base, adapter = copy_of_micro(tmp_path / "base", "bfloat16"), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(PACKAGED["micro"], dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1037)
    wrapped.save_pretrained(adapter)
    assert merge(str(adapter), tmp_path / "out", base=str(base)).verified.point.ratio < 1e-5


def test_special_tokens_go_with_the_tokenizer(tmp_path):
    tuned = rescaled_copy(tmp_path / "tuned", eos_token_id=7)
    base = tmp_path / "base"
    copy_of_micro(base)
    for name, from_tuned in (("out", True), ("other", False)):
        (tuned / "generation_config.json").unlink(missing_ok=True)
        if from_tuned:
            (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.5}))
        merge(str(tuned), tmp_path / name, base=str(base), verify=False)
        assert json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] == 7
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert generation["eos_token_id"] == 7
        assert (generation.get("temperature") == 0.5) == from_tuned
    (tuned / "tokenizer_config.json").unlink()
    merge(str(tuned), tmp_path / "third", base=str(base), verify=False)
    for name in ("config.json", "generation_config.json"):
        wanted = json.loads((base / name).read_text()).get("eos_token_id")
        assert json.loads((tmp_path / "third" / name).read_text()).get("eos_token_id") == wanted != 7


def test_directories_of_a_run_stand_for_it(runs, tmp_path):
    run = run_of(runs, "lora")
    step = run.checkpoint(2)
    merged = merge(str(step), tmp_path / "out", verify=False)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["subject"], record["step"]) == (run.run_id, 2)
    assert merged.dtype == "float32"
    with pytest.raises(UserError, match=f"run {run.run_id} is not trained to its end"):
        merge(str(run.path), tmp_path / "other", verify=False)


def test_nothing_is_merged_into_a_run(runs, tmp_path):
    run = run_of(runs, "lora")
    before = sorted(run.path.rglob("*"))
    with pytest.raises(UserError, match=f"is inside the run {run.run_id}"):
        merge(f"{run.run_id}@2", run.path / "merged", runs=runs)
    assert sorted(run.path.rglob("*")) == before


def test_what_is_no_file_beside_the_weights_is_left_out(tmp_path):
    base = copy_of_micro(tmp_path / "base")
    (base / "link.json").symlink_to(tmp_path / "nowhere")
    (base / "folder.json").mkdir()
    strange = ("pytorch_model.bin.index.json", "model.fp16.safetensors.index.json", "rewind.json", "merge.json")
    for name in strange:
        (base / name).write_text("{}")
    merge(str(micro_adapter(tmp_path / "adapter")), tmp_path / "out", base=str(base))
    left_out = {"link.json", "folder.json", *strange[:3]}
    assert not left_out & {file.name for file in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) != {}


def test_a_vocabulary_of_another_size_is_named_with_its_reason(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": ["lm_head"]}))
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.zeros(840, 128)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"(840|lm_head)") as caught:
        merge(str(adapter), tmp_path / "out", base="micro")
    assert "\n" not in str(caught.value)
