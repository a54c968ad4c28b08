"""A tuned point written as a model directory: the same numbers, everything beside them, or nothing at all."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_arena.weights.merge as merge_module
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models.load import PACKAGED
from peft_arena.testing.subject import difference, logits, tiny_model, tokens
from peft_arena.weights.base import base_weights
from peft_arena.weights.effective import EffectiveWeights, effective_weights
from peft_arena.weights.files import model_files
from peft_arena.weights.merge import merge_point
from peft_arena.weights.model_directory import load_back
from peft_arena.weights.probe import Distance, distance, limit_of, probe_batch, probe_logits
from peft_arena.weights.verify import SAME
from tests.weights.weight_toys import ATTENTION, LINEAR, save_adapter, small_tokenizer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
Q = "model.layers.0.self_attn.q_proj"


def lora():
    return peft.LoraConfig(**LORA)


def base_in(directory, kind="untied", dtype="float32", shard="1GB"):
    """Write a tiny model with a tokenizer of its size, and return what is measured against."""
    tiny_model(kind, dtype).save_pretrained(directory, max_shard_size=shard)
    small_tokenizer(directory)
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copyfile(PACKAGED["micro"] / name, directory / name)
    return base_weights(ModelSpec(name=str(directory), dtype=dtype))


def tuned_point(folder, config=None, kind="untied", dtype="float32", shard="1GB"):
    base = base_in(folder / "base", kind, dtype, shard)
    return effective_weights(base, save_adapter(folder / "adapter", config or lora(), kind, dtype=dtype))


def reloaded(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def nothing_left(folder):
    return {found.name for found in folder.iterdir()} <= {"base", "adapter", "tuned"}


@pytest.mark.parametrize("kind", ["untied", "tied", "biased", "awkward"])
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_a_merged_model_is_what_peft_makes(kind, shard, tmp_path):
    point = tuned_point(tmp_path, kind=kind, shard=shard)
    wrapped = peft.PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "adapter"))
    merged = merge_point(
        point, tmp_path / "base", tmp_path / "out", shard_size=60_000, tuned=lambda model: wrapped.eval()
    )
    wanted = logits(wrapped, tokens())
    assert difference(logits(reloaded(tmp_path / "out"), tokens()), wanted) < 1e-4
    assert difference(logits(tiny_model(kind), tokens()), wanted) > 0.1
    assert len(merged.files) > 1
    names = set(model_files(tmp_path / "out").places)
    assert names == set(model_files(tmp_path / "base").places)  # tied weights once, as transformers does
    assert merged.parameters == sum(p.numel() for p in tiny_model(kind).parameters())
    assert merged.verified.written.ratio < 1e-5
    assert merged.verified.point.ratio < 1e-5
    assert merged.verified.tensors == len(names)
    assert {found.name for found in tmp_path.iterdir()} == {"base", "adapter", "out"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_once(dtype, tmp_path):
    """Arithmetic in float32, then one rounding: exactly what the same sum gives by hand."""
    point = tuned_point(tmp_path, dtype="bfloat16")
    merged = merge_point(point, tmp_path / "base", tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in point.parameters():
        base, change = point.parameter(name)
        whole = base if change is None else base + change.dense(base)
        assert found[name].dtype == wanted
        assert torch.equal(found[name], whole.to(wanted))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (merged.dtype, config["dtype"]) == (dtype, dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_the_type_is_the_models_own_unless_another_is_asked_for(tmp_path):
    point = tuned_point(tmp_path, dtype="bfloat16")
    assert merge_point(point, tmp_path / "base", tmp_path / "out").dtype == "bfloat16"
    with pytest.raises(UserError, match="cannot write weights as 'int8'. Known: float32, bfloat16, float16"):
        merge_point(point, tmp_path / "base", tmp_path / "other", dtype="int8")


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.3])
def test_any_point_of_the_path_can_be_merged(factor, tmp_path):
    point = tuned_point(tmp_path).interpolated(factor)
    merged = merge_point(point, tmp_path / "base", tmp_path / "out")
    model = tiny_model()
    point.load_into(model)
    assert difference(logits(reloaded(tmp_path / "out"), tokens()), logits(model, tokens())) < 1e-5
    assert merged.factor == factor
    assert merged.verified.written.max_difference < 1e-5
    assert (merged.verified.written.ratio is None) == (factor == 0)
    assert (merged.verified.point, merged.verified.against) == (None, SAME)


def test_what_is_beside_the_weights_is_kept(tmp_path):
    point = tuned_point(tmp_path)
    base = tmp_path / "base"
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (base / "trainer_state.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("no weights of ours")
    merge_point(point, base, tmp_path / "out", facts={"subject": "mine"})
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    for name in [*kept, "additional_chat_templates/tools.jinja"]:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        [*kept, "additional_chat_templates", "config.json", "merge.json", "model.safetensors"]
    )
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["subject"], record["tokenizer"], record["dtype"], record["factor"]) == ("mine", "base", "float32", 1)
    assert record["verified"]["written"]["ratio"] < record["verified"]["written"]["limit"] == 1e-3
    assert record["verified"]["point"] is None
    assert record["provenance"]["packages"]["torch"] == torch.__version__
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert before == after


def test_a_tokenizer_of_the_checkpoint_goes_before_that_of_the_base(tmp_path):
    point = tuned_point(tmp_path)
    own = tmp_path / "adapter"
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    small_tokenizer(own)
    (own / "chat_template.jinja").write_text("{{ 'mine' }}")
    merge_point(point, tmp_path / "base", tmp_path / "out", tokenizer=own)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'mine' }}"
    assert not (tmp_path / "out" / "added_tokens.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_without_verification_the_record_says_so(tmp_path):
    merged = merge_point(tuned_point(tmp_path), tmp_path / "base", tmp_path / "out", verify=False)
    assert merged.verified is None
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["verified"] is None


def test_a_result_that_is_not_the_tuned_model_is_refused(tmp_path):
    """The model that the method restores is another one than the files' weights: nothing may be kept."""
    point = tuned_point(tmp_path)
    other = peft.PeftModel.from_pretrained(tiny_model(), str(save_adapter(tmp_path / "tuned", lora(), size=0.06)))
    with pytest.raises(UserError, match="not those of the tuned model: before rounding, its logits differ by") as e:
        merge_point(point, tmp_path / "base", tmp_path / "out", tuned=lambda model: other.eval())
    assert "\n" not in str(e.value)
    assert "--dtype" not in str(e.value)
    assert nothing_left(tmp_path)


def test_a_point_that_was_evaluated_rounded_is_written_rounded(tmp_path):
    base = base_in(tmp_path / "base")
    point = effective_weights(base, save_adapter(tmp_path / "adapter", lora())).interpolated(0.02)
    options = {"dtype": "bfloat16", "facts": {}}
    with pytest.raises(UserError, match="in bfloat16 is not the tuned one"):
        merge_point(point, tmp_path / "base", tmp_path / "out", **options)
    merged = merge_point(point, tmp_path / "base", tmp_path / "out", rounded=True, **options)
    assert 0.25 < merged.verified.written.ratio <= merged.verified.limit == 1.0
    assert merged.summary()["verified"]["written"]["limit"] == 1.0


def test_rounding_that_drowns_the_change_is_refused(tmp_path):
    base = base_in(tmp_path / "base")
    point = effective_weights(base, save_adapter(tmp_path / "adapter", lora())).interpolated(1e-3)
    with pytest.raises(UserError, match="in bfloat16 is not the tuned one.*try --dtype float32"):
        merge_point(point, tmp_path / "base", tmp_path / "out", dtype="bfloat16")
    assert nothing_left(tmp_path)
    merge_point(point, tmp_path / "base", tmp_path / "out", dtype="float32")


def test_limits():
    close = {"max_difference": 1.0, "max_change": 9.0, "tokens": 3}
    assert (limit_of(torch.float32), limit_of(torch.bfloat16), limit_of(torch.float16)) == (1e-3, 0.25, 0.25)
    assert Distance(1.0, 9e-4, **close).within(1e-3)
    assert not Distance(1.0, 2e-3, **close).within(1e-3)
    assert Distance(1e-9, 1e-4, **{**close, "max_difference": 9e-5}).within(1e-3)
    assert not Distance(0.0, 2e-4, **{**close, "max_difference": 2e-4}).within(1e-3)
    found = distance(torch.zeros(2, 2), torch.full((2, 2), 2.0), torch.tensor([[2.0, 2.0], [2.0, 4.0]]))
    assert found == Distance(2.0, 1.0, 2.0, 2.0, 2)


def left_out(point, name):
    """Return the point without the change of one parameter."""
    makers = {key: maker for key, maker in point.changes.makers.items() if key != name}
    return EffectiveWeights(point.base_weights, replace(point.changes, makers=makers))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", ["left out", "too short"])
def test_weights_that_are_not_the_tuned_ones_are_refused_in_every_type(wrong, dtype, tmp_path):
    """One matrix without its change, or all of it at 0.99, is far within what 16 bits round away."""
    right = tuned_point(tmp_path, dtype=dtype)
    point = left_out(right, f"{Q}.weight") if wrong == "left out" else right.interpolated(0.99)

    def tuned(model):
        return peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))

    with pytest.raises(UserError, match="the weights are not those of the tuned model: before rounding"):
        merge_point(point, tmp_path / "base", tmp_path / "out", tuned=tuned)
    assert nothing_left(tmp_path)
    merged = merge_point(right, tmp_path / "base", tmp_path / "out", tuned=tuned)
    assert merged.verified.point.ratio < 1e-5


@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight", "lm_head.weight"])
def test_a_written_value_that_is_another_is_refused(name, tmp_path, monkeypatch):
    """One entry of a tensor, a hundredth off, in a tensor that is changed and in two that are not."""
    made = merge_module._parameter

    def wrong(weights, entry):
        for part in made(weights, entry):
            if entry.name == name:
                part = part.clone()
                part.view(-1)[-1] *= 1.01
            yield part

    point = tuned_point(tmp_path, dtype="bfloat16")
    monkeypatch.setattr(merge_module, "_parameter", wrong)
    with pytest.raises(UserError, match=f"{name} read back is another; nothing was kept"):
        merge_point(point, tmp_path / "base", tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("factor", [0.5, 1.3])
def test_a_point_is_held_against_its_own_adapter(factor, tmp_path):
    point = tuned_point(tmp_path, dtype="bfloat16").interpolated(factor)
    seen = []

    def restore(model, directory):
        seen.append(sorted(file.name for file in directory.iterdir()))
        return peft.PeftModel.from_pretrained(model, str(directory))

    merged = merge_point(point, tmp_path / "base", tmp_path / "out", restore=restore)
    assert seen == [["adapter_config.json", "adapter_model.safetensors"]]
    assert merged.verified.point.ratio < 1e-5
    assert merged.verified.against == "the point's own adapter, as its method restores it"
    assert not (tmp_path / "out" / "point").exists()
    with pytest.raises(UserError, match="not those of the tuned model"):
        merge_point(point, tmp_path / "base", tmp_path / "other", restore=lambda model, _: model)


@pytest.mark.parametrize(("kind", "dtype"), [("untied", "float32"), ("tied", "bfloat16")])
def test_logits_of_a_point_are_those_of_a_model_with_its_weights(kind, dtype, tmp_path):
    """And the model is as it was, also where something fails halfway."""
    base = base_in(tmp_path / "base", kind, dtype)
    point = effective_weights(base, save_adapter(tmp_path / "adapter", lora(), kind, dtype=dtype))
    probe, model, tuned = probe_batch(None, 200), base.load(), base.load().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    point.load_into(tuned)

    def values(name):
        pair = point.parameter(name)
        return None if pair.change is None else pair.base + pair.change.dense(pair.base)

    def failing(name):
        if name == Q.replace("layers.0", "layers.1") + ".weight":
            raise UserError("stop")
        return values(name)

    assert torch.equal(probe_logits(model, probe, values), probe_logits(tuned, probe))
    with pytest.raises(UserError, match="stop"):
        probe_logits(model, probe, failing)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


@pytest.mark.parametrize("kind", ["tied", "biased"])
def test_logits_of_a_16_bit_model_are_those_of_float32_arithmetic(kind):
    probe = probe_batch(None, 200)
    held, raised = tiny_model(kind, "bfloat16"), tiny_model(kind, "bfloat16").float()
    assert torch.equal(probe_logits(held, probe), probe_logits(raised, probe))
    assert {p.dtype for p in held.parameters()} == {torch.bfloat16}
    assert torch.equal(held.lm_head.weight, tiny_model(kind, "bfloat16").lm_head.weight)


def test_the_probe_has_prompts_and_random_tokens_that_the_model_knows():
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED["micro"])
    whole = probe_batch(tokenizer, 832)
    assert torch.equal(whole.ids, probe_batch(tokenizer, 832).ids)
    assert len(whole.ids) == 7
    assert len(probe_batch(None, 50).ids) == 3
    assert int(probe_batch(tokenizer, 50).ids.max()) < 50
    tokenizer.chat_template = None
    assert len(probe_batch(tokenizer, 832).ids) == 6


def test_biases_the_architecture_can_have_are_kept(tmp_path):
    """Llama has biases of all attention layers or of none: those that are not trained are zero."""
    point = tuned_point(tmp_path, peft.BeftConfig(target_modules=ATTENTION, task_type="CAUSAL_LM"))
    wrapped = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter")).eval()
    merge_point(point, tmp_path / "base", tmp_path / "out", tuned=lambda model: wrapped)
    assert difference(logits(reloaded(tmp_path / "out"), tokens()), logits(wrapped, tokens())) < 1e-4
    found = model_files(tmp_path / "out")
    assert bool(found.read(f"{Q}.bias").any())
    assert not bool(found.read(f"{Q.replace('q_proj', 'o_proj')}.bias").any())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, False)


@pytest.mark.parametrize("verify", [True, False])
def test_biases_that_loading_would_drop_are_refused(verify, tmp_path):
    """Qwen2 has biases of q, k and v, and no setting for one of the output projection."""
    config = peft.BeftConfig(target_modules=["o_proj"], task_type="CAUSAL_LM")
    point = tuned_point(tmp_path, config, kind="biased")
    with pytest.raises(UserError, match=r"adds 2 biases, e.g. model.layers.0.self_attn.o_proj.bias, and Qwen2"):
        merge_point(point, tmp_path / "base", tmp_path / "out", verify=verify)
    assert nothing_left(tmp_path)


def test_values_that_a_type_cannot_hold_are_refused(tmp_path):
    point = tuned_point(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight has entries that are too large for float16"):
        merge_point(point, tmp_path / "base", tmp_path / "out", dtype="float16")
    assert nothing_left(tmp_path)


def test_a_file_that_breaks_off_leaves_nothing(tmp_path):
    """The pretrained files change while they are read."""
    point = tuned_point(tmp_path, shard="60KB")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))

    def progress(done, what):
        if done > 0.2:
            shards[-1].write_bytes(shards[-1].read_bytes()[:-1000])

    with pytest.raises(UserError, match="cannot be read"):
        merge_point(point, tmp_path / "base", tmp_path / "out", progress=progress)
    assert nothing_left(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    point = tuned_point(tmp_path, shard="60KB")
    lost = sorted((tmp_path / "base").glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} is missing"):
        merge_point(point, tmp_path / "base", tmp_path / "out")
    assert nothing_left(tmp_path)


def test_names_in_the_files_may_be_others_than_the_models(tmp_path):
    """A decoder saved without its output layer: the values are those of the loaded model, under its own names."""
    base = base_in(tmp_path / "base", kind="tied")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    base = base_weights(ModelSpec(name=str(tmp_path / "base")))
    point = effective_weights(base, save_adapter(tmp_path / "adapter", lora(), "tied"))
    merge_point(point, tmp_path / "base", tmp_path / "out", verify=False)
    model = tiny_model("tied")
    point.load_into(model)
    assert difference(logits(reloaded(tmp_path / "out"), tokens()), logits(model, tokens())) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: {**held, "model.extra.weight": torch.zeros(2)}, "would load something else .unexpected keys"),
        (lambda held: {k: v for k, v in held.items() if k != "model.norm.weight"}, "missing keys, e.g. model.norm.w"),
        (lambda held: {**held, "model.norm.weight": torch.zeros(2)}, "cannot be loaded|mismatched keys"),
    ],
)
def test_a_directory_that_loads_as_something_else_is_refused(change, message, tmp_path):
    base = base_in(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    load_back(tmp_path / "out", base, torch.float32)
    file = tmp_path / "out" / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(UserError, match=message) as caught:
        load_back(tmp_path / "out", base, torch.float32)
    assert "\n" not in str(caught.value)
