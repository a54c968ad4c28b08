"""Adapters converted to plain LoRA by peft, with the error that is left; and GGUF by a converter that is not ours."""

import json
import math
import shutil
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.execute.export_command import export
from peft_arena.execute.export_gguf import CONVERTER, converter
from peft_arena.execute.export_lora import read_rank
from peft_arena.models.load import PACKAGED, Source, load_model
from peft_arena.testing.subject import difference, logits, tokens
from tests.execute.made_runs import made_run
from tests.execute.test_geometry import micro_adapter
from tests.weights.weight_toys import ATTENTION

Q = "model.layers.0.self_attn.q_proj.weight"


def micro():
    return load_model(Source("package", str(PACKAGED["micro"]), None), ModelSpec(name="micro"))


def foreign(directory, config):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(micro(), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(directory)
    return directory


def loha():
    return peft.LoHaConfig(r=3, alpha=3, target_modules=ATTENTION, task_type="CAUSAL_LM")


def merged(directory):
    wrapped = peft.PeftModel.from_pretrained(micro(), str(directory))
    return dict(wrapped.merge_and_unload().named_parameters())


def test_the_error_of_a_conversion_is_that_of_the_best_rank(tmp_path):
    """By Eckart and Young, the error of a layer is that of its singular values beyond the rank."""
    adapter = foreign(tmp_path / "adapter", loha())
    done = export(str(adapter), tmp_path / "out", "lora", base="micro", rank="4")
    base = dict(micro().named_parameters())
    tuned, lora = merged(adapter), merged(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    changed = [name for name in base if not torch.equal(base[name], tuned[name])]
    assert sorted(record["errors"]) == sorted(changed)
    for name in changed:
        change = (tuned[name] - base[name]).detach().double()
        values = torch.linalg.svdvals(change)
        best = float((values[4:].square().sum() / values.square().sum()).sqrt())
        assert record["errors"][name] == pytest.approx(best, rel=1e-3)
        left = float((lora[name].detach().double() - base[name].double() - change).norm() / change.norm())
        assert record["errors"][name] == pytest.approx(left, rel=1e-3)
    found = done.approximation
    assert found["mean"] == pytest.approx(sum(record["errors"].values()) / len(changed))
    assert found["worst"] == max(record["errors"].values()) == record["errors"][found["worst_at"]]
    assert found["ranks"] == [4, 4]
    assert 0 < found["logits"]["ratio"] < 1
    assert record["approximation"] == found
    assert (record["rank"], record["to"], record["base"]["name"]) == (4, "lora", "micro")


def test_the_logits_are_those_of_the_two_adapters(tmp_path):
    adapter = foreign(tmp_path / "adapter", loha())
    coarse, fine = (
        export(str(adapter), tmp_path / rank, "lora", base="micro", rank=rank).approximation for rank in ("1", "9")
    )
    assert coarse["logits"]["rms_difference"] > 10 * fine["logits"]["rms_difference"]
    assert fine["worst"] < 1e-3  # a LoHa of rank 3 has rank 9
    assert coarse["logits"]["rms_change"] == pytest.approx(fine["logits"]["rms_change"])
    tuned = peft.PeftModel.from_pretrained(micro(), str(adapter))
    lora = peft.PeftModel.from_pretrained(micro(), str(tmp_path / "9"))
    assert difference(logits(tuned, tokens()), logits(lora, tokens())) < 1e-3


def test_a_share_of_energy_gives_each_layer_its_rank(tmp_path):
    adapter = foreign(tmp_path / "adapter", loha())
    done = export(str(adapter), tmp_path / "out", "lora", base="micro", rank="0.8")
    low, high = done.approximation["ranks"]
    assert 1 <= low < high <= 9
    assert done.approximation["worst"] <= math.sqrt(0.2) + 1e-6
    peft.PeftModel.from_pretrained(micro(), str(tmp_path / "out"))


def test_a_plain_lora_is_copied(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    done = export(str(adapter), tmp_path / "out", "lora", base="micro", rank="2")
    assert (done.to, done.approximation) == ("lora", None)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["to"] == "lora"


@pytest.mark.parametrize("rank", ["1", "4", "0.5"])
def test_a_plain_lora_of_another_rank_is_refused(rank, tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"--rank {rank}: it is a LoRA of rank 2 already; export --to adapter copies"):
        export(str(adapter), tmp_path / "out", "lora", base="micro", rank=rank)
    assert not (tmp_path / "out").exists()


def test_a_run_of_ours_is_converted(tmp_path):
    run = made_run(tmp_path / "runs", "loha", dtype="bfloat16")
    done = export(f"{run.run_id}@2", tmp_path / "out", "lora", runs=tmp_path / "runs", rank="2")
    assert 0 < done.approximation["mean"] < 1
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert all("lora_" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "do not support LoRA conversion"),
        (peft.LNTuningConfig(target_modules=["input_layernorm"]), "peft cannot convert"),
        (loha(), "rank 5000 is larger than the weight shape"),
    ],
)
def test_what_peft_cannot_convert_is_one_line(config, message, tmp_path):
    adapter = foreign(tmp_path / "adapter", config)
    with pytest.raises(UserError, match=message) as caught:
        export(str(adapter), tmp_path / "out", "lora", base="micro", rank="5000")
    assert "\n" not in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == ["adapter"]


def test_a_model_is_no_lora(tmp_path):
    shutil.copytree(PACKAGED["micro"], tmp_path / "model")
    with pytest.raises(UserError, match="is no adapter of peft's"):
        export(str(tmp_path / "model"), tmp_path / "out", "lora", base="micro", rank="4")


def test_ranks():
    assert (read_rank("16"), read_rank("0.5"), read_rank(".9")) == (16, 0.5, 0.9)
    assert isinstance(read_rank("16"), int)
    for text in ("0", "-1", "1.0", "nan", "x", "16.0"):
        with pytest.raises(UserError, match="--rank must be"):
            read_rank(text)


CONVERTS = """\
import pathlib, sys
source, _, target, *kind = sys.argv[1:]
assert (pathlib.Path(source) / "config.json").exists()
pathlib.Path(target).write_bytes(b"GGUF" + " ".join(kind).encode())
"""


def fake_converter(folder, text=CONVERTS):
    folder.mkdir()
    (folder / CONVERTER).write_text(f"#!{sys.executable}\n{text}")
    (folder / CONVERTER).chmod(0o755)
    return folder


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(PACKAGED["micro"], tmp_path / "model")


def test_gguf_is_what_llama_cpp_makes(model, tmp_path, monkeypatch):
    folder = fake_converter(tmp_path / "llama.cpp")
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    done = export(str(model), tmp_path / "out", "gguf", dtype="bfloat16")
    assert done.files == ("model.gguf",)
    assert (tmp_path / "out" / "model.gguf").read_bytes() == b"GGUF--outtype bf16"
    assert json.loads((tmp_path / "out" / "export.json").read_text())["converter"] == str(folder / CONVERTER)
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", str(folder))
    export(str(model), tmp_path / "other", "gguf")
    assert (tmp_path / "other" / "model.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit('first\\nno such model: LlamaForX')", "failed: no such model: LlamaForX"),
        ("raise SystemExit(3)", "failed: exit code 3"),
        ("pass", "left no GGUF file"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(text, message, model, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(fake_converter(tmp_path / "llama.cpp", text)))
    with pytest.raises(UserError, match=message):
        export(str(model), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_gguf_without_its_converter_or_a_model(model, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"needs llama.cpp's {CONVERTER}, which is not installed"):
        export(str(model), tmp_path / "out", "gguf")
    with pytest.raises(UserError, match=f"which has no {CONVERTER}"):
        converter({"LLAMA_CPP": str(tmp_path)})
    with pytest.raises(UserError, match="is no model directory: write one first with peft-arena merge some-run"):
        export("some-run", tmp_path / "out", "gguf")
    with pytest.raises(UserError, match="cannot write a GGUF file as 'int4'"):
        export(str(model), tmp_path / "out", "gguf", dtype="int4")
