"""Base weights in files, tuned models in files, and points put into a model."""

import json
import os
import resource
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_arena.core.errors import UserError
from peft_arena.core.specs import MethodSpec, ModelSpec
from peft_arena.methods.base import Capability
from peft_arena.methods.orthogonal.hra import Hra
from peft_arena.methods.registry import make_method
from peft_arena.models.load import Loaded, pin
from peft_arena.testing.subject import difference, logits, tiny_model, tokens, train
from peft_arena.weights.base import BaseWeights, base_weights
from peft_arena.weights.effective import effective_weights
from peft_arena.weights.files import TensorFiles, model_files
from peft_arena.weights.tuned import Tuned
from tests.weights.weight_toys import ATTENTION, LINEAR, save_adapter, set_setting

Q = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens.weight"


def saved(directory: Path, kind="untied", dtype="float32", shard="1GB") -> ModelSpec:
    tiny_model(kind, dtype).save_pretrained(directory, max_shard_size=shard)
    return ModelSpec(name=str(directory))


def nudged(kind="untied", dtype="float32", names=("q_proj", "norm")):
    """Return a model some of whose parameters are changed."""
    model = tiny_model(kind, dtype)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["untied", "tied", "biased", "awkward"])
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_base_weights_are_those_of_the_model(kind, shard, tmp_path):
    spec = saved(tmp_path / "base", kind, shard=shard)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1 or shard == "1GB"
    model = tiny_model(kind)
    base = base_weights(spec)
    assert list(base.shapes) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(base.tensor(name), parameter)
        assert base.shapes[name] == tuple(parameter.shape)
    assert base.linears == tuple(f"model.layers.{i}.{n}" for i in range(len(base.linears) // 7) for n in (
        *(f"self_attn.{leaf}" for leaf in LINEAR[:4]), *(f"mlp.{leaf}" for leaf in LINEAR[4:]),
    ))  # fmt: skip
    assert torch.equal(base.tensor("lm_head.weight"), model.lm_head.weight)
    assert base.tied(EMBEDDING) == (kind == "tied")
    assert (base.canonical("lm_head.weight") == EMBEDDING) == (kind == "tied")


def test_files_of_a_pinned_model_are_checked_once_as_long_as_they_are_the_same(tmp_path):
    spec = pin(saved(tmp_path / "base"))
    base = base_weights(spec)
    assert base_weights(spec) is base
    nudged().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="is at revision"):
        base_weights(spec)


def test_a_module_that_is_not_there_is_named(tmp_path):
    weights = effective_weights(base_weights(saved(tmp_path / "base")), None)
    with pytest.raises(UserError, match="unknown linear module 'model.layers.0.self_attn.q'"):
        weights.pair("model.layers.0.self_attn.q")
    with pytest.raises(UserError, match="unknown parameter"):
        weights.parameter("model.layers.9.mlp.up_proj.weight")
    assert weights.pair("lm_head").change is None


def test_weights_have_the_values_of_the_type_the_model_computes_in(tmp_path):
    spec = saved(tmp_path / "base")
    rounded = base_weights(spec.model_copy(update={"dtype": "bfloat16"})).tensor(f"{Q}.weight")
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, tiny_model().get_parameter(f"{Q}.weight").bfloat16().float())
    stored = base_weights(saved(tmp_path / "short", dtype="bfloat16")).tensor(f"{Q}.weight")
    assert torch.equal(stored, rounded)


def test_parameters_renamed_on_loading_are_read_from_the_loaded_model(tmp_path):
    spec = saved(tmp_path / "base", "tied")
    file = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("model."): one for name, one in load_file(file).items()}, file, {"format": "pt"})
    base = base_weights(spec)
    for name, parameter in tiny_model("tied").named_parameters():
        assert torch.equal(base.tensor(name), parameter)


def test_damaged_files_are_refused_in_a_line(tmp_path):
    spec = saved(tmp_path / "base", shard="60KB")
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged"):
        base_weights(spec)
    shards[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-.* is missing"):
        base_weights(spec)
    index = tmp_path / "base" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    shards[1].write_bytes(content)
    index.write_text(json.dumps(table | {"weight_map": table["weight_map"] | {"stray": shards[0].name}}))
    with pytest.raises(UserError, match=r"lacks 1 tensor \(stray\)"):
        base_weights(spec)
    index.write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        base_weights(spec)
    index.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        base_weights(spec)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    base = base_weights(saved(tmp_path / "base"))
    broken = tiny_model()
    with torch.no_grad():
        broken.get_parameter(f"{Q}.weight")[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "tuned")
    weights = effective_weights(base, tmp_path / "tuned")
    assert weights.pair(LINEAR_NAMES[1]).change is None
    with pytest.raises(UserError, match="not finite numbers"):
        weights.pair(Q)


def test_content_is_told_by_hash(tmp_path):
    spec = saved(tmp_path / "base")
    first, again = BaseWeights.of_model(tiny_model()), BaseWeights.of_model(tiny_model())
    names = list(first.shapes)
    assert len({first.content_hash(name) for name in names if "norm" not in name}) > 10
    assert [first.content_hash(name) for name in names] == [again.content_hash(name) for name in names]
    assert first.content_hash(f"{Q}.weight") == base_weights(spec).content_hash(f"{Q}.weight")
    assert first.content_hash(f"{Q}.weight") != BaseWeights.of_model(nudged()).content_hash(f"{Q}.weight")
    pinned = base_weights(pin(spec))
    assert pinned.content_hash(f"{Q}.weight") != pinned.content_hash("model.layers.1.self_attn.q_proj.weight")
    nudged().save_pretrained(tmp_path / "other")
    other = base_weights(pin(ModelSpec(name=str(tmp_path / "other"))))
    assert pinned.content_hash(f"{Q}.weight") != other.content_hash(f"{Q}.weight")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_walking_a_file_holds_one_tensor_at_a_time(tmp_path):
    def held() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    save_file({f"{number}": torch.ones(2**20) for number in range(30)}, tmp_path / "large.safetensors")  # 120 MB
    files = TensorFiles((tmp_path / "large.safetensors",))
    before = held()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name in files.places:
        assert float(files.read(name).sum()) == 2**20
        assert held() - before < 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - peak < 40


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_a_tuned_model_directory(kind, shard, tmp_path):
    tuned = nudged(kind, names=("q_proj", "norm", "embed"))
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size=shard)
    base = base_weights(saved(tmp_path / "base", kind))
    weights = effective_weights(base, tmp_path / "tuned")
    before = dict(tiny_model(kind).named_parameters())
    for name, parameter in tuned.named_parameters():
        change = weights.parameter(name).change
        assert (change is None) == torch.equal(parameter, before[name])
        if change is not None:
            assert torch.equal(change.dense(before[name]), parameter - before[name])
    assert weights.pair(LINEAR_NAMES[0]).change is not None
    assert weights.pair(LINEAR_NAMES[1]).change is None
    halfway = tiny_model(kind)
    weights.interpolated(0.5).load_into(halfway)
    for name, parameter in halfway.named_parameters():
        torch.testing.assert_close(parameter, (before[name] + dict(tuned.named_parameters())[name]) / 2)


LINEAR_NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")


def test_a_model_merged_with_biases(tmp_path):
    method = make_method("bitfit", {"targets": ["q_proj", "o_proj"]})
    attached = method.attach(tiny_model(), seed=0)
    train(attached, 0.05)
    wanted = logits(attached.model, tokens())
    attached.merged().save_pretrained(tmp_path / "merged")
    weights = effective_weights(BaseWeights.of_model(tiny_model()), tmp_path / "merged")
    assert f"{Q}.bias" in weights.parameters()
    model = tiny_model()
    weights.load_into(model)
    assert difference(logits(model, tokens()), wanted) < 1e-5


def test_models_of_another_shape_or_kind_are_refused(tmp_path):
    base = BaseWeights.of_model(tiny_model())
    tiny_model("awkward").save_pretrained(tmp_path / "awkward")
    with pytest.raises(UserError, match="shape"):
        effective_weights(base, tmp_path / "awkward")
    tiny_model("biased").save_pretrained(tmp_path / "biased")
    added = effective_weights(base, tmp_path / "biased")
    assert f"{Q}.bias" in added.parameters()
    with pytest.raises(UserError, match="no tuned version"):
        effective_weights(BaseWeights.of_model(tiny_model("biased")), _saved(tmp_path / "plain"))
    with pytest.raises(UserError, match="no checkpoint"):
        effective_weights(base, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither an adapter"):
        effective_weights(base, tmp_path / "empty")


def _saved(directory):
    tiny_model().save_pretrained(directory)
    return directory


def test_untied_copies_of_tied_weights_are_refused(tmp_path):
    tiny_model("untied").save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match="which are one in the model"):
        effective_weights(BaseWeights.of_model(tiny_model("tied")), tmp_path / "untied")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_points_are_set_in_place_in_any_order(dtype, tmp_path):
    directory = save_adapter(tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=ATTENTION))
    weights = effective_weights(BaseWeights.of_model(tiny_model(dtype=dtype)), directory)
    model = tiny_model(dtype=dtype)
    held = dict(model.named_parameters())
    seen = {}
    for factor in (1.0, 0.3, 0.0, 1.0, 0.3):
        weights.interpolated(factor).load_into(model)
        now = logits(model, tokens())
        assert difference(now, seen.setdefault(factor, now)) == 0
    assert difference(seen[0.0], logits(tiny_model(dtype=dtype), tokens())) == 0
    assert difference(seen[0.3], seen[1.0]) > 1e-3
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert model.dtype == getattr(torch, dtype)


def test_load_into_another_model_is_refused(tmp_path):
    directory = save_adapter(tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=ATTENTION))
    weights = effective_weights(BaseWeights.of_model(tiny_model()), directory)
    with pytest.raises(UserError, match="cannot put"):
        weights.load_into(tiny_model("awkward"))


def run(base, directory, name, config, factor=1.0) -> Tuned:
    return Tuned(base, directory, MethodSpec(name=name, config=config), "run", 4, factor)


def loaded(base) -> Loaded:
    return Loaded(spec=base, model=tiny_model(), tokenizer=None, source="path")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "config"),
    [("lora", {"rank": 4}), ("boft", {"block_size": 4}), ("full", {}), ("freeze", {"blocks": 1}), ("ln_tuning", {})],
)
def test_runs(name, config, tmp_path):
    base = saved(tmp_path / "base")
    attached = make_method(name, config).attach(tiny_model(), seed=0)
    train(attached, 0.01)
    attached.save(tmp_path / "checkpoint")
    wanted, before = logits(attached.model, tokens()), logits(tiny_model(), tokens())
    tuned = run(base, tmp_path / "checkpoint", name, config)
    assert tuned.has_weights()
    assert difference(logits(tuned.model(loaded(base)), tokens()), wanted) < 1e-5
    model = tiny_model()
    tuned.weights().load_into(model)
    assert difference(logits(model, tokens()), wanted) < 1e-4
    half = run(base, tmp_path / "checkpoint", name, config, 0.5)
    assert half.weights().factor == 0.5
    found = logits(half.model(loaded(base)), tokens())
    assert difference(found, wanted) > 1e-4 < difference(found, before)
    start = run(base, tmp_path / "checkpoint", name, config, 0.0)
    assert difference(logits(start.model(loaded(base)), tokens()), before) == 0


def test_the_pretrained_model_is_a_point_too(tmp_path):
    base = saved(tmp_path / "base")
    for tuned in (run(base, None, "none", {}), Tuned(base, None, None, "base", None)):
        assert tuned.has_weights()
        assert all(tuned.weights().pair(name).change is None for name in tuned.weights().modules())
        assert difference(logits(tuned.model(loaded(base)), tokens()), logits(tiny_model(), tokens())) == 0


def test_prompts_have_a_model_and_no_weights(tmp_path):
    base = saved(tmp_path / "base")
    config = {"num_virtual_tokens": 4}
    attached = make_method("prompt_tuning", config).attach(tiny_model(), seed=0)
    attached.save(tmp_path / "checkpoint")
    tuned = run(base, tmp_path / "checkpoint", "prompt_tuning", config)
    assert not tuned.has_weights()
    with pytest.raises(UserError, match="puts trained vectors into the input"):
        tuned.weights()
    assert difference(logits(tuned.model(loaded(base)), tokens()), logits(attached.model, tokens())) < 1e-5
    foreign = Tuned(base, tmp_path / "checkpoint", None, "path", None)
    assert not foreign.has_weights()
    with pytest.raises(UserError, match="cannot be merged"):
        foreign.weights()
    assert difference(logits(foreign.model(loaded(base)), tokens()), logits(attached.model, tokens())) < 1e-5


@pytest.mark.parametrize(
    "settings", [{"rms_norm_eps": 0.1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}]
)
def test_a_model_that_computes_otherwise_is_not_measured_inside_the_base(settings, tmp_path):
    base = saved(tmp_path / "base")
    nudged().save_pretrained(tmp_path / "tuned")
    tuned = Tuned(base, tmp_path / "tuned", None, "path", None)
    config = tmp_path / "tuned" / "config.json"
    table = json.loads(config.read_text())
    config.write_text(json.dumps(table | {"use_cache": False, "invented": 1, "bos_token_id": 3, "dtype": "bfloat16"}))
    assert difference(logits(tuned.model(loaded(base)), tokens()), logits(nudged(), tokens())) < 1e-5
    assert set(settings) <= set(table)
    config.write_text(json.dumps(table | settings))
    with pytest.raises(UserError, match=f"{next(iter(settings))} is"):
        tuned.model(loaded(base))
    assert tuned.weights().pair(Q).change is not None, "its weights are what they are"


def test_adapters_that_depend_on_the_input_have_no_weights(tmp_path):
    base = saved(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=ATTENTION))
    assert Tuned(base, adapter, None, "path", None).has_weights()
    set_setting(adapter, alora_invocation_tokens=[5])
    assert not Tuned(base, adapter, None, "path", None).has_weights()


class Unmergeable(Hra):
    """A method with changes of linear weights that is not said to merge."""

    card = Hra.card.model_copy(update={"capabilities": Hra.card.capabilities - {Capability.MERGEABLE}})


def test_a_method_that_does_not_merge_is_read_by_its_changes(tmp_path):
    settings = Hra.Config(rank=4)
    attached = Hra(settings).attach(tiny_model(), seed=0)
    train(attached, 0.01)
    attached.save(tmp_path / "checkpoint")
    base = BaseWeights.of_model(tiny_model())
    merging, other = (effective_weights(base, tmp_path / "checkpoint", kind(settings)) for kind in (Hra, Unmergeable))
    for name in base.linears:
        first, second = merging.pair(name).change.delta, other.pair(name).change.delta
        assert difference(first, second) < 1e-6
        assert difference(first, attached.delta(name)) < 1e-6


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_foreign_directories_have_a_model(factor, tmp_path):
    base = saved(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=ATTENTION))
    nudged().save_pretrained(tmp_path / "tuned")
    for directory in (adapter, tmp_path / "tuned"):
        tuned = Tuned(base, directory, None, str(directory), None, factor)
        model = tiny_model()
        tuned.weights().load_into(model)
        found = tuned.model(loaded(base))
        assert not found.training
        assert difference(logits(found, tokens()), logits(model, tokens())) < 1e-5
        assert difference(logits(found, tokens()), logits(tiny_model(), tokens())) > 1e-3


def test_the_packaged_model_reads_by_map():
    base = base_weights(pin(ModelSpec(name="micro")))
    assert len(base.linears) > 10
    assert model_files(Path(base_weights.__code__.co_filename).parents[1] / "models/micro/weights").files
