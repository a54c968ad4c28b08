"""Points as files of the adapter's own type: peft merges them to the point, and they appear whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from peft_arena.core.errors import UserError
from peft_arena.testing.subject import difference, tiny_model
from peft_arena.weights.adapter_files import express, write_adapter
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import LowRank
from peft_arena.weights.effective import effective_weights
from tests.weights.test_forms import CLOSED, LORA, MERGED, PATTERNS
from tests.weights.weight_toys import ATTENTION, edit, peft_changes, save_adapter

Q = "model.layers.0.self_attn.q_proj"
BEFT = peft.BeftConfig(target_modules=["v_proj", "o_proj"])
EXTRA = LowRank(0.1 * torch.randn(64, 2), 0.1 * torch.randn(2, 64))
WIDE = LowRank(0.1 * torch.randn(128, 3), 0.1 * torch.randn(3, 64))


def point(directory, config, kind="untied", dtype="float32"):
    adapter = save_adapter(directory / "adapter", config, kind, dtype=dtype)
    return effective_weights(BaseWeights.of_model(tiny_model(kind, dtype)), adapter)


def is_point(directory, weights, kind="untied", dtype="float32", limit=2e-6):
    """Check an adapter, merged by peft in float64, against the weights of a point."""
    changes = peft_changes(directory, kind, dtype)
    for name, wanted in changes.items():
        pair = weights.parameter(name)
        found = torch.zeros_like(wanted) if pair.change is None else pair.change.dense(pair.base)
        assert difference(found, wanted) < limit, name
    return max(float(one.abs().max()) for one in changes.values())


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.2])
@pytest.mark.parametrize("name", [name for name in CLOSED if name != "coft"])
def test_a_point_is_an_adapter_of_its_own_type(name, factor, tmp_path):
    moved = point(tmp_path, CLOSED[name]).interpolated(factor)
    files = express(moved)
    assert files.directory == tmp_path / "adapter"
    write_adapter(files, tmp_path / "new" / "point")
    size = is_point(tmp_path / "new" / "point", moved)
    assert size < 1e-6 if factor == 0 else size > 1e-3
    assert sorted(file.name for file in (tmp_path / "new" / "point").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["point"]
    settings = [
        json.loads((path / "adapter_config.json").read_text()) for path in (files.directory, tmp_path / "new/point")
    ]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("name", ["dora", "ia3", "boft", "road of 4"])
@pytest.mark.parametrize(("kind", "dtype"), [("biased", "float32"), ("tied", "float32"), ("untied", "bfloat16")])
def test_points_on_other_bases(name, kind, dtype, tmp_path):
    moved = point(tmp_path, CLOSED[name], kind, dtype).interpolated(0.3)
    write_adapter(express(moved), tmp_path / "point")
    is_point(tmp_path / "point", moved, kind, dtype)


def test_biases_where_there_are_none(tmp_path):
    whole = point(tmp_path, BEFT)
    bias = "model.layers.0.self_attn.o_proj.bias"
    moved = whole.interpolated(0.5).scaled({bias: 0.5})
    write_adapter(express(moved), tmp_path / "point")
    found = effective_weights(whole.base_weights, tmp_path / "point")
    assert difference(found.parameter(bias).change.delta, 0.25 * whole.parameter(bias).change.delta) < 1e-8


@pytest.mark.parametrize("name", ["lora", "oft", "ia3", "vera", "norms"])
def test_the_tuned_point_has_the_tensors_of_the_checkpoint(name, tmp_path):
    whole = point(tmp_path, CLOSED[name])
    edit(tmp_path / "adapter", lambda tensors: {key: one.bfloat16() for key, one in tensors.items()})
    whole = effective_weights(whole.base_weights, tmp_path / "adapter")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = express(whole).tensors
    assert set(tensors) == set(before)
    assert all(torch.equal(tensors[key], one) and tensors[key].dtype == torch.bfloat16 for key, one in before.items())
    half = express(whole.interpolated(0.37))
    assert {one.dtype for one in half.tensors.values()} <= {torch.float32, torch.bfloat16}
    write_adapter(half, tmp_path / "half")  # not rounded to bfloat16 again


def test_layers_have_factors_of_their_own(tmp_path):
    whole = point(tmp_path, CLOSED["lora"])
    moved = whole.interpolated(0.5).scaled({f"{Q}.weight": 0.0, "model.layers.1.mlp.up_proj.weight": 3.0})
    write_adapter(express(moved), tmp_path / "point")
    is_point(tmp_path / "point", moved)
    assert moved.pair(Q).change.dense(None).abs().max() == 0


def test_root_and_straight_ways(tmp_path):
    for name in ("oft", "boft"):
        moved = point(tmp_path / name, CLOSED[name]).along("sqrt").interpolated(0.3)
        write_adapter(express(moved), tmp_path / name / "point")
        is_point(tmp_path / name / "point", moved)
    for name in ("lora", "ia3", "miss, bat", "norms"):
        moved = point(tmp_path / name, CLOSED[name]).along("linear").interpolated(0.3)
        write_adapter(express(moved), tmp_path / name / "point")
        is_point(tmp_path / name / "point", moved)
    for name in ("oft", "boft", "dora", "road"):
        straight = point(tmp_path / f"{name} straight", CLOSED[name]).along("linear")
        assert express(straight.interpolated(0.3)) is None
        assert express(straight) is not None and express(straight.interpolated(0.0)) is not None


def test_points_that_the_parameters_do_not_express(tmp_path):
    whole = point(tmp_path / "loha", MERGED["loha"])
    assert express(whole) is None
    tiny_model().save_pretrained(tmp_path / "model")
    assert express(effective_weights(whole.base_weights, tmp_path / "model")) is None
    for name in ("oft", "dora", "miss"):
        weights = point(tmp_path / name, CLOSED[name]).plus({f"{Q}.weight": EXTRA})
        assert express(weights) is None


def test_coft_beyond_its_constraint(tmp_path):
    whole = point(tmp_path, CLOSED["coft"])
    for factor in (0.3, 1.0):
        moved = whole.interpolated(factor)
        write_adapter(express(moved), tmp_path / str(factor))
        is_point(tmp_path / str(factor), moved)
    assert express(whole.interpolated(1.2)) is None
    loose = point(tmp_path / "loose", peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION, coft=True, eps=40.0))
    write_adapter(express(loose.interpolated(1.2)), tmp_path / "beyond")


@pytest.mark.parametrize("name", ["ia3", "road"])
def test_a_bias_goes_with_its_weight(name, tmp_path):
    whole = point(tmp_path, CLOSED[name], "biased")
    weight, bias = (f"model.layers.0.self_attn.k_proj.{part}" for part in ("weight", "bias"))
    assert express(whole.scaled({weight: 0.5})) is None
    moved = whole.scaled({weight: 0.5, bias: 0.5})
    write_adapter(express(moved), tmp_path / "point")
    is_point(tmp_path / "point", moved, "biased")


@pytest.mark.parametrize("more", [{}, PATTERNS, {"use_rslora": True}, {**PATTERNS, "use_rslora": True}], ids=str)
def test_what_is_added_to_a_lora_makes_its_ranks_grow(more, tmp_path):
    whole = point(tmp_path, peft.LoraConfig(**LORA, **more)).interpolated(0.5)
    weights = (f"{Q}.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight")
    moved = whole.plus(dict(zip(weights, (EXTRA, WIDE, EXTRA), strict=True)))
    files = express(moved)
    write_adapter(files, tmp_path / "point")
    is_point(tmp_path / "point", moved)
    rank = 2 if more.get("rank_pattern") else 4
    assert files.tensors[f"base_model.model.{Q}.lora_A.weight"].shape == (rank + 2, 64)
    assert express(whole).settings["rank_pattern"] == more.get("rank_pattern", {})


def test_a_lora_that_grows_everywhere_has_one_rank(tmp_path):
    whole = point(tmp_path, CLOSED["lora"])
    shapes = whole.base_weights.shapes
    extra = {
        name: LowRank(torch.ones(shapes[name][0], 2), torch.ones(2, shapes[name][1])) for name in whole.changes.makers
    }
    files = express(whole.plus(extra))
    assert (files.settings["r"], files.settings["lora_alpha"]) == (6, 18)
    assert files.settings["rank_pattern"] == files.settings["alpha_pattern"] == {}
    write_adapter(files, tmp_path / "point")


def left(directory):
    return sorted(path.name for path in directory.iterdir())


def test_nothing_is_overwritten(tmp_path):
    files = express(point(tmp_path, CLOSED["lora"]))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = left(tmp_path)
    for name in ("adapter", "file", "dangling"):
        with pytest.raises(UserError, match="nothing is replaced"):
            write_adapter(files, tmp_path / name)
    assert left(tmp_path) == before and (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    write_adapter(files, tmp_path / "empty")
    assert left(tmp_path / "empty") == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_leaves_nothing(error, tmp_path, monkeypatch):
    files = express(point(tmp_path, CLOSED["lora"]))

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="cannot write .*No space left") as caught:
        write_adapter(files, tmp_path / "point")
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == ["adapter"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    files = express(point(tmp_path, CLOSED["lora"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/point"):
        write_adapter(files, tmp_path / "file" / "point")


def test_files_that_are_not_the_point_are_refused(tmp_path):
    files = express(point(tmp_path, CLOSED["lora"]).interpolated(0.5))
    name = f"base_model.model.{Q}.lora_B.weight"
    wrong = replace(files, tensors={**files.tensors, name: 1.00001 * files.tensors[name]})
    with pytest.raises(UserError, match=rf"not the point it was made from: {Q}.weight"):
        write_adapter(wrong, tmp_path / "point")
    with pytest.raises(UserError, match="not the point"):
        write_adapter(replace(files, settings={**files.settings, "lora_alpha": 13}), tmp_path / "point")
    with pytest.raises(UserError, match="lacks the tensors"):
        fewer = {key: one for key, one in files.tensors.items() if "layers.1" not in key}
        write_adapter(replace(files, tensors=fewer), tmp_path / "point")
    assert left(tmp_path) == ["adapter"]
