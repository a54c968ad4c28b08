"""Ids, streams, errors, registry, measures, the strict builder and the YAML reader."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from peft_arena.core.build import build
from peft_arena.core.errors import UserError, unknown
from peft_arena.core.ids import canonical_json, content_id, seed_for
from peft_arena.core.measure import Measure
from peft_arena.core.registry import Registry
from peft_arena.core.specs import (
    EvalSpec,
    MethodSpec,
    ModelSpec,
    Point,
    RunSpec,
    Schedule,
    TaskSpec,
    TrainSpec,
)
from peft_arena.core.yamlfile import YamlFile, parse_scalar

TRAIN = {"task": {"name": "t"}, "schedule": {"steps": 4}, "learning_rate": 1e-3}


def run_spec(seed: int = 0, **train: object) -> RunSpec:
    return RunSpec(
        model=ModelSpec(name="micro"),
        method=MethodSpec(name="lora", config={"rank": 8}),
        train=TrainSpec.model_validate({**TRAIN, **train}),
        seed=seed,
    )


def test_content_id_ignores_key_order_and_is_stable():
    assert content_id({"a": 1, "b": [2, 3]}) == content_id({"b": [2, 3], "a": 1})
    assert content_id({"a": 1}) != content_id({"a": 2})
    assert content_id([]) == "4f53cda18c2b"  # sha256 of "[]"


def test_canonical_json_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="Out of range float"):
        canonical_json({"a": float("nan")})


@given(st.integers(0, 2**31), st.text(max_size=5), st.integers(0, 1000))
def test_seed_streams_are_in_range_and_differ_by_name(seed, name, step):
    value = seed_for(seed, name, step)
    assert 0 <= value < 2**31
    assert value == seed_for(seed, name, step)
    assert value != seed_for(seed, name, step, "x")


def test_unknown_gives_the_nearest_name_and_the_place():
    message = str(unknown("method", "lroa", ["lora", "oft"], "study.yaml line 7"))
    assert message == "unknown method 'lroa' (in study.yaml line 7). Did you mean 'lora'? Known: lora, oft"


def test_registry_imports_only_what_is_asked_for():
    registry: Registry = Registry("thing", {"join": "posixpath:join", "broken": "no_such_module:x"})
    import posixpath

    assert registry.get("join") is posixpath.join
    assert registry.names() == ["broken", "join"]
    with pytest.raises(UserError, match="unknown thing 'jion'.*Did you mean 'join'"):
        registry.get("jion")


def test_a_refused_name_is_known_but_not_listed():
    registry: Registry = Registry("thing", {"join": "posixpath:join"}, refused={"split": "it splits"})
    assert registry.names() == registry.own() == ["join"] and "split" not in registry
    assert registry.plugin("join") is None and registry.providers("join") == ["peft-arena"]
    with pytest.raises(UserError, match=r"^thing 'split' is not offered: it splits \(in here\)$"):
        registry.get("split", "here")


@pytest.mark.parametrize("field", ["value", "stderr"])
def test_a_measure_is_finite_or_none(field):
    fields = {"metric": "m", "value": 1.0, "unit": "s", "better": "lower", "how": "clock", "n": 1}
    with pytest.raises(ValueError, match="must be finite or None"):
        Measure(**{**fields, field: float("inf")})
    assert Measure(**{**fields, field: None}).model_dump()[field] is None


def test_run_ids_change_with_every_field():
    base = run_spec()
    assert base.run_id.startswith("micro-lora-t-s0-")
    assert base.run_id == run_spec().run_id
    changes = {
        "learning_rate": 2e-3, "batch_size": 4, "micro_batch_size": 2, "examples": 3, "lr_schedule": "linear",
        "warmup_fraction": 0.2, "weight_decay": 0.1, "max_grad_norm": 2.0, "max_length": 64, "overlong": "error",
        "loss_on": "all", "packing": True, "group_by_length": True, "save_points": (0.5, 1.0), "validation_items": 3,
        "log_every": 2, "validate_every": 0.5, "schedule": {"epochs": 1},
    }  # fmt: skip
    untouched = set(TrainSpec.model_fields) - set(changes) - {"task", "objective"}
    assert not untouched, f"fields without a check: {untouched}"
    ids = {run_spec(**{field: value}).id for field, value in changes.items()} | {base.id, run_spec(seed=1).id}
    assert len(ids) == len(changes) + 2


def test_the_name_in_a_run_id_does_not_identify():
    one = RunSpec(model=ModelSpec(name="a/m"), method=MethodSpec(name="none"))
    two = RunSpec(model=ModelSpec(name="b/m"), method=MethodSpec(name="none"))
    assert one.run_id.rpartition("-")[0] == two.run_id.rpartition("-")[0]
    assert one.run_id != two.run_id
    assert one.is_base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size 3 does not divide batch_size 8"),
        ({"save_points": [0.5]}, "must increase and end in 1.0"),
        ({"save_points": [0.5, 0.25, 1.0]}, "must increase and end in 1.0"),
        ({"schedule": {"steps": 1, "epochs": 1}}, "exactly one of steps, tokens, epochs; given: steps, epochs"),
        ({"schedule": {}}, "exactly one of steps, tokens, epochs; given: none"),
        ({"learning_rate": 0}, "learning_rate: input should be greater than 0, got 0"),
        ({"learnin_rate": 1}, "unknown key 'learnin_rate'.*Did you mean 'learning_rate'"),
        ({"schedule": {"step": 1}}, "unknown key 'schedule.step'.*Did you mean 'steps'.*Known: epochs, steps, tokens"),
    ],
)
def test_a_wrong_training_spec_is_one_readable_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        build(TrainSpec, {**TRAIN, **change}, where="train")
    assert "\n" not in str(caught.value)


def test_build_names_every_problem_at_once():
    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")
        rank: int
        alpha: float = 1.0

    with pytest.raises(UserError) as caught:
        build(Config, {"rank": "x", "aplha": 2}, where="method m")
    assert "rank: input should be a valid integer" in str(caught.value)
    assert "unknown key 'aplha' (in method m). Did you mean 'alpha'?" in str(caught.value)


def test_eval_keys_are_file_names_and_differ_by_content():
    specs = [EvalSpec(task=TaskSpec(name="lm-eval:piqa"), items=n) for n in (1, 2, None)]
    assert len({spec.key for spec in specs}) == 3
    assert all("/" not in spec.key and ":" not in spec.key for spec in specs)


def test_point_keys():
    assert Point(run_id="r", step=200).key == "000200-1"
    assert Point(run_id="r", step=200, factor=0.3).key == "000200-0.3"


def test_schedule_takes_tokens():
    assert Schedule(tokens=10).tokens == 10


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_yaml_remembers_lines_and_reads_short_floats(tmp_path):
    file = YamlFile(write(tmp_path / "s.yaml", "a: 1\nb:\n  - x: 1e-3\n    y: '1e-3'\n"))
    assert file.data == {"a": 1, "b": [{"x": 1e-3, "y": "1e-3"}]}
    assert file.locate(("b", 0, "y")).endswith("s.yaml line 4")
    assert file.locate(("b", 0, "missing")).endswith("s.yaml line 3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "line 2: key 'a' is stated twice"),
        ("a: [1, 2\n", "line 2 is not valid YAML"),
        ("- 1\n", "must hold a mapping of keys to values, got list"),
        ("a: &x [*x]\n", "contains itself"),
        ("", "is empty"),
        ("a: !!python/object:os.system x\n", "is not valid YAML"),
    ],
)
def test_a_wrong_yaml_file_is_one_readable_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        YamlFile(write(tmp_path / "s.yaml", text))
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_yaml_file(tmp_path):
    with pytest.raises(UserError, match="no file"):
        YamlFile(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        YamlFile(tmp_path / "b.yaml")


def test_parse_scalar():
    assert [parse_scalar(text) for text in ("1e-3", "[0, 1]", "null", "x", "true")] == [1e-3, [0, 1], None, "x", True]
    with pytest.raises(UserError, match="is not a value"):
        parse_scalar("[1")


def test_import_is_light():
    code = (
        "import peft_arena, peft_arena.core.specs, peft_arena.store.store, sys;"
        "print([m for m in ('torch', 'transformers', 'polars', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
