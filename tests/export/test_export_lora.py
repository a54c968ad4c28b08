"""Tuned models as plain LoRA, with the error that is left; and GGUF by a converter that is not ours."""

import json
import math
import re
import shutil
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peft_arena.commands.export_command import export
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.export.gguf import CONVERTER, converter
from peft_arena.export.nearest_lora import LIMIT, LOGITS, read_rank
from peft_arena.methods.registry import make_method
from peft_arena.models.load import PACKAGED, Source, load_model
from peft_arena.testing.subject import difference, logits, tokens
from tests.commands.test_geometry import micro_adapter
from tests.made_runs import made_run
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
    done = export(str(adapter), tmp_path / "out", "lora", base="micro", rank="4", accept_error=True)
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
    total = {name: float((tuned[name] - base[name]).detach().double().square().sum()) for name in changed}
    left = sum(record["errors"][name] ** 2 * total[name] for name in changed)
    assert found["error"] == pytest.approx(math.sqrt(left / sum(total.values())), rel=1e-3)
    assert (found["accepted"], found["limit"], found["limit_logits"]) == (True, LIMIT, LOGITS)
    assert found["ranks"] == [4, 4]
    assert 0 < found["logits"]["ratio"] < 1
    assert record["approximation"] == found
    assert (record["rank"], record["to"], record["base"]["name"]) == (4, "lora", "micro")


def test_the_logits_are_those_of_the_two_adapters(tmp_path):
    adapter = foreign(tmp_path / "adapter", loha())
    coarse, fine = (
        export(str(adapter), tmp_path / rank, "lora", base="micro", rank=rank, accept_error=True).approximation
        for rank in ("1", "9")
    )
    assert coarse["logits"]["rms_difference"] > 10 * fine["logits"]["rms_difference"]
    assert fine["worst"] < 1e-3  # a LoHa of rank 3 has rank 9
    assert coarse["logits"]["rms_change"] == pytest.approx(fine["logits"]["rms_change"])
    tuned = peft.PeftModel.from_pretrained(micro(), str(adapter))
    lora = peft.PeftModel.from_pretrained(micro(), str(tmp_path / "9"))
    assert difference(logits(tuned, tokens()), logits(lora, tokens())) < 1e-3


def test_a_share_of_energy_gives_each_layer_its_rank(tmp_path):
    adapter = foreign(tmp_path / "adapter", loha())
    done = export(str(adapter), tmp_path / "out", "lora", base="micro", rank="0.8", accept_error=True)
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


def error_of(done):
    """Return the error of an export; a LoRA that was copied has none."""
    return 0.0 if done.approximation is None else done.approximation["error"]


@pytest.mark.parametrize("rank", ["2", "4", "100"])
def test_a_plain_lora_at_a_rank_it_fits_into_is_the_same(rank, tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    done = export(str(adapter), tmp_path / "out", "lora", base="micro", rank=rank)
    assert error_of(done) < 1e-6
    assert (done.approximation is None) == (rank == "2"), "that one is copied"
    first, second = merged(adapter), merged(tmp_path / "out")
    base = dict(micro().named_parameters())
    sides = [min(first[name].shape) for name in base if not torch.equal(first[name], base[name])]
    if rank != "2":
        assert done.approximation["ranks"] == [min(int(rank), side) for side in (min(sides), max(sides))]
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)


def test_a_run_of_ours_is_converted(tmp_path):
    run = made_run(tmp_path / "runs", "loha", dtype="bfloat16")
    done = export(f"{run.run_id}@2", tmp_path / "out", "lora", runs=tmp_path / "runs", rank="2", accept_error=True)
    assert 0 < done.approximation["mean"] < 1
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert all("lora_" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


EXACT = {
    "pissa": ({"rank": 3}, 6),
    "olora": ({"rank": 3}, 6),
    "milora": ({"rank": 3}, 6),
    "adalora": ({}, None),
    "rslora": ({"rank": 3}, 3),
    "vera": ({"rank": 5}, 5),
}
"""Methods whose change has low rank: settings, and the rank, or None for the largest a layer has."""
FULL_RANK = ("dora", "oft", "full", "ia3", "miss_bat")


def plain_logits(model):
    return logits(model, tokens())


@pytest.mark.parametrize("name", [*EXACT, *FULL_RANK])
def test_what_peft_makes_of_it_is_the_tuned_model(name, tmp_path):
    """Exact at the rank of the change, or at the full one: by plain peft on the plain base, against the method's."""
    config, rank = EXACT.get(name, ({}, None))
    run = made_run(tmp_path / "runs", name, config)
    done = export(f"{run.run_id}@2", tmp_path / "out", "lora", runs=tmp_path / "runs", rank=str(rank or 128))
    assert error_of(done) < 1e-5
    tuned = make_method(name, run.spec.method.config).restore(micro(), run.checkpoint(2)).model
    lora = peft.PeftModel.from_pretrained(micro(), str(tmp_path / "out"))
    change = difference(plain_logits(micro()), plain_logits(tuned))
    assert change > 0.05
    assert difference(plain_logits(tuned), plain_logits(lora)) < 1e-4 * max(1.0, change)


@pytest.mark.parametrize("name", ["pissa", "olora", "dora", "oft", "full"])
def test_above_the_limit_it_is_refused_with_the_rank_that_is_enough(name, tmp_path):
    config = {"rank": 8} if name in ("pissa", "olora", "dora") else {}
    run = made_run(tmp_path / "runs", name, config)
    with pytest.raises(UserError, match=r"of the change of its weights is missing .*limit 0.1") as caught:
        export(f"{run.run_id}@2", tmp_path / "out", "lora", runs=tmp_path / "runs", rank="1")
    said = str(caught.value)
    assert "\n" not in said
    assert "--accept-error" in said
    assert not (tmp_path / "out").exists()
    enough = int(re.search(r"--rank (\d+) brings", said)[1])
    done = export(f"{run.run_id}@2", tmp_path / "out", "lora", runs=tmp_path / "runs", rank=str(enough))
    assert error_of(done) <= LIMIT
    with pytest.raises(UserError, match="is missing"):
        export(f"{run.run_id}@2", tmp_path / "less", "lora", runs=tmp_path / "runs", rank=str(enough - 1))
    forced = export(f"{run.run_id}@2", tmp_path / "one", "lora", runs=tmp_path / "runs", rank="1", accept_error=True)
    assert forced.approximation["error"] == pytest.approx(float(re.search(r": ([\d.]+) of", said)[1]), abs=1e-2)
    record = json.loads((tmp_path / "one" / "export.json").read_text())["approximation"]
    assert (record["accepted"], record["error"]) == (True, forced.approximation["error"])


def test_norms_and_tied_embeddings_are_there_as_a_whole(tmp_path):
    run = made_run(tmp_path / "runs", "full")
    done = export(f"{run.run_id}@2", tmp_path / "out", "lora", runs=tmp_path / "runs", rank="128")
    assert "model.embed_tokens" in done.approximation["whole"]
    tuned = make_method("full", {}).restore(micro(), run.checkpoint(2)).model
    lora = merged(tmp_path / "out")
    for name, parameter in tuned.named_parameters():
        torch.testing.assert_close(lora[name], parameter, rtol=0, atol=1e-5)


def test_a_model_directory_becomes_a_lora(tmp_path):
    """Of a layer whose weight lies the other way, too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    base = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    before = plain_logits(base)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(("c_attn.weight", "ln_1.weight", "c_fc.weight")):
                change = torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[-1])
                parameter.add_(0.1 * (change if parameter.dim() == 2 else change[0, :32]))
    base.save_pretrained(tmp_path / "tuned")
    done = export(str(tmp_path / "tuned"), tmp_path / "out", "lora", base=str(tmp_path / "base"), rank="2")
    assert done.approximation["error"] < 1e-5
    assert done.approximation["whole"] == ["transformer.h.0.ln_1"]
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    lora = peft.PeftModel.from_pretrained(again, str(tmp_path / "out"))
    assert difference(before, plain_logits(base)) > 0.05
    assert difference(plain_logits(base), plain_logits(lora)) < 1e-4


@pytest.mark.parametrize(
    ("config", "rank", "message"),
    [
        (peft.LNTuningConfig(target_modules=["input_layernorm"]), "4", "no linear layer: there is nothing for a LoRA"),
        (loha(), "5000", "--rank 5000 is more than any layer of .* can have: at most 128"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "4", "no weights to look at"),
    ],
)
def test_what_no_lora_can_be_is_one_line(config, rank, message, tmp_path):
    adapter = foreign(tmp_path / "adapter", config)
    with pytest.raises(UserError, match=message) as caught:
        export(str(adapter), tmp_path / "out", "lora", base="micro", rank=rank)
    assert "\n" not in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == ["adapter"]


def test_biases_and_models_that_are_the_base_are_refused(tmp_path):
    run = made_run(tmp_path / "runs", "bitfit")
    with pytest.raises(UserError, match=r"proj.bias and \d+ more such parameters, which a LoRA cannot"):
        export(f"{run.run_id}@2", tmp_path / "out", "lora", runs=tmp_path / "runs", rank="4")
    shutil.copytree(PACKAGED["micro"], tmp_path / "model")
    with pytest.raises(UserError, match="changes no weight of its pretrained model"):
        export(str(tmp_path / "model"), tmp_path / "out", "lora", base="micro", rank="4")
    with pytest.raises(UserError, match="--accept-error is for --to lora, and this is --to adapter"):
        export(f"{run.run_id}@2", tmp_path / "out", "adapter", runs=tmp_path / "runs", accept_error=True)


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
    with pytest.raises(UserError, match="is not a model directory: write one first with peft-arena merge some-run"):
        export("some-run", tmp_path / "out", "gguf")
    with pytest.raises(UserError, match="cannot write a GGUF file as 'int4'"):
        export(str(model), tmp_path / "out", "gguf", dtype="int4")
