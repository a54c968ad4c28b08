"""Geometry as a stage of a study and as a command: what is asked for, refused, resumed, and written."""

import json
import shutil
from contextlib import nullcontext

import pytest
import yaml
from filelock import FileLock

from peft_arena.commands.geometry_command import geometry_spec, measure_points, shortened
from peft_arena.core.errors import UserError
from peft_arena.core.geometry import ActivationsSpec, SpectraSpec
from peft_arena.core.specs import ModelSpec
from peft_arena.models.load import PACKAGED, Source, load_model
from peft_arena.store.geometry import read_profiles
from peft_arena.store.store import Store
from peft_arena.study.read_study import read_study, study_from
from peft_arena.work.plan import plan
from tests.running import TINY, arena

ASKED = {"spectra": {}, "drift": {}, "activations": {"tokens": 64}, "prompts": 6}


def asked(geometry, arms=None):
    data = yaml.safe_load(TINY)
    data["geometry"] = geometry
    data["arms"] = arms or data["arms"]
    return study_from(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The tiny study with its geometry and an arm that has no weights, run and reported by the command line."""
    folder = tmp_path_factory.mktemp("geometry")
    data = yaml.safe_load(TINY)
    data["arms"].append({"method": "prompt_tuning"})
    (folder / "plain.yaml").write_text(yaml.safe_dump(data))
    first = arena("run", folder / "plain.yaml", "--runs", folder / "runs", "--json")
    assert first.returncode == 0, first.stderr
    (folder / "asked.yaml").write_text(yaml.safe_dump({**data, "geometry": ASKED}))
    second = arena("run", folder / "asked.yaml", "--runs", folder / "runs", "--report", folder / "report", "--json")
    assert second.returncode == 0, second.stderr
    return folder


def keys_of(study, method):
    run = next(arm.runs[0] for arm in study.arms if arm.method == method)
    return run, {spec.what: spec.key for spec in study.geometry(run)}


def test_geometry_is_a_stage_of_a_run_that_was_trained_before(finished):
    study = read_study(finished / "asked.yaml")
    store = Store(finished / "runs")
    assert {item.state for item in plan(study, store)} == {"done"}
    run, keys = keys_of(study, "lora")
    assert set(keys) == {"spectra", "drift", "activations"}
    directory = store.run(run)
    point = directory.final_point()
    events = [event["stage"] for event in directory.events() if event["event"] == "finished"]
    assert events.count("train") == 1
    for what, key in keys.items():
        record = directory.geometry(point, key)
        assert (record.what, record.subject, record.step, record.factor) == (what, run.run_id, 6, 1.0)
        assert record.rows
        assert f"geometry {key}" in events
    path = directory.record_path(point, f"geometry-{keys['spectra']}")
    profiles = read_profiles(path, directory.geometry(point, keys["spectra"]))
    assert set(profiles["module"]) == {row.module for row in directory.geometry(point, keys["spectra"]).rows}
    assert not list((finished / "runs").rglob(".parts-*"))


def test_a_method_without_weights_has_activations_only(finished):
    study = read_study(finished / "asked.yaml")
    run, keys = keys_of(study, "prompt_tuning")
    assert set(keys) == {"activations"}
    directory = Store(finished / "runs").run(run)
    record = directory.geometry(directory.final_point(), keys["activations"])
    kl = next(measure for measure in record.summary if measure.metric == "kl_general")
    assert kl.value > 0


def test_the_report_shows_the_geometry(finished):
    page = (finished / "report" / "index.html").read_text()
    assert "geometry" in page.lower()
    assert (finished / "report" / "geometry.html").exists()
    assert (finished / "report" / "tables" / "geometry.csv").read_text().count("\n") > 50


def test_damaged_profiles_are_found_by_check(finished, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(finished / "runs", copy)
    assert arena("check", copy).returncode == 0
    file = next(copy.rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-10])
    done = arena("check", copy)
    assert done.returncode == 2
    assert file.name in done.stderr


def test_the_command_measures_runs_and_directories_alike(finished, tmp_path):
    study = read_study(finished / "asked.yaml")
    run, keys = keys_of(study, "lora")
    directory = Store(finished / "runs").run(run)
    common = ("--base", "micro", "--runs", finished / "runs", "--json")
    out = tmp_path / "out"
    tuned = ("--tuned", run.run_id, "--tuned", directory.checkpoint(6))
    done = arena("geometry", "spectra", *tuned, *common, "--out", out)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first["rows"] == second["rows"]
    recorded = directory.geometry(directory.final_point(), keys["spectra"])
    assert first["rows"] == json.loads(recorded.model_dump_json())["rows"]
    assert (out / "geometry.html").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / "records").rglob("*.json")}
    again = arena("geometry", "spectra", *tuned, *common, "--out", out)
    assert json.loads(again.stdout) == [first, second]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "records").rglob("*.json")}


def test_the_command_takes_prompts_from_files(finished, tmp_path):
    study = read_study(finished / "asked.yaml")
    run, _ = keys_of(study, "full")
    (tmp_path / "general.txt").write_text("sort: 3 1 2\ncompare: 4 5\n")
    done = arena(
        "geometry", "drift", "--tuned", f"{run.run_id}@3", "--runs", finished / "runs", "--out", tmp_path / "out",
        "--general", tmp_path / "general.txt", "--target", "micro-reverse", "--prompts", 4, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert record["step"] == 3
    assert record["spec"]["general"][0]["sha256"]


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({}, "geometry asks for nothing"),
        ({"spectre": {}}, "spectre"),
        ({"spectra": {"moduls": ["q_proj"]}}, "moduls"),
        ({"activations": {"prompts": 5}}, "set for all parts"),
        ({"drift": {}, "general": [{"file": "nowhere.txt"}]}, "nowhere.txt"),
        ({"drift": {}, "general": [{"task": "micro-sortt"}]}, "micro-sortt"),
        ({"drift": {}, "general": [{"task": "lm-eval:piqa"}]}, "cannot give prompts"),
        ({"drift": {}, "general": [{}]}, "exactly one"),
        ({"activations": {"preset": "paper8", "modules": ["q_proj"]}}, "preset"),
    ],
)
def test_a_wrong_section_is_one_line(geometry, message):
    with pytest.raises(UserError, match=message) as caught:
        asked(geometry)
    assert "\n" not in str(caught.value)


def test_general_prompts_are_the_retention_tasks_unless_given():
    study = asked({"activations": {}})
    (spec,) = study.geometry(study.arms[0].runs[0])
    assert isinstance(spec, ActivationsSpec)
    assert [found.name for found in spec.general] == ["micro-sort"]
    assert [found.name for found in spec.target] == ["micro-reverse"]


def test_a_study_without_geometry_plans_none():
    study = study_from(yaml.safe_load(TINY))
    assert study.geometry(study.arms[0].runs[0]) == []
    assert asked({"spectra": {}}).geometry(study.base) == []


def test_labels_lose_what_they_share():
    names = ["smollm2-lora-s0-1a2b-000060", "smollm2-full-s0-3c4d-000060", "smollm2-lora-s0-1a2b-000060"]
    assert shortened(names) == ["lora-s0-1a2b", "full-s0-3c4d", "lora-s0-1a2b"]
    assert shortened(["a-b", "a-b-c"]) == ["b", "b-c"]
    assert shortened(["a-b"]) == ["a-b"]


def test_settings_of_the_command():
    spec = geometry_spec("spectra", {"modules": ["q_proj"], "layers": None, "precision": "float64"})
    assert spec == SpectraSpec(modules=("q_proj",), precision="float64")
    with pytest.raises(UserError, match="--general"):
        geometry_spec("drift", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tuned", "nothing"), "nothing"),
        (("--tuned", "/"), "neither an adapter"),
        (("--tuned", "DIRECTORY"), "--base"),
        (("--tuned", "DIRECTORY", "--base", "micro", "--modules", "q_prj"), "q_prj"),
        (("--tuned", "DIRECTORY", "--base", "micro", "--layers", "9"), "9"),
        (("--tuned", "DIRECTORY", "--base", "micro", "--layers", "3-1"), "--layers"),
        (("--tuned", "DIRECTORY", "--base", "micro", "--modules", ","), "names no module"),
        (("--tuned", "NAME", "--dtype", "bfloat16"), "was trained in float32"),
        (("--tuned", "DIRECTORY", "--base", "micro", "--factor", "nan"), "--factor"),
        (("--tuned", "DIRECTORY", "--base", "micro", "--out", "RUN/x"), "inside the run"),
        (("--tuned", "DIRECTORY", "--base", "micro", "--out", "/proc/nothing"), "cannot write into"),
    ],
)
def test_a_wrong_request_of_the_command_is_one_line(finished, tmp_path, arguments, message):
    study = read_study(finished / "asked.yaml")
    directory = Store(finished / "runs").run(keys_of(study, "lora")[0]).checkpoint(6)
    run = directory.parent.parent
    assert (run / "run.json").exists()
    given = [
        text.replace("DIRECTORY", str(directory)).replace("RUN", str(run)).replace("NAME", run.name)
        for text in arguments
    ]
    done = arena("geometry", "spectra", "--out", tmp_path / "out", *given, "--runs", finished / "runs")
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def measured(out, *names, **settings):
    choices = {"runs": out / "runs", "base": "micro", "dtype": "float32", "factor": 1.0, "cache": None} | settings
    spec = SpectraSpec(modules=("q_proj",), layers=(0,))
    return measure_points(
        [str(name) for name in names], spec, out, bar=lambda: nullcontext(lambda done, what: None), **choices
    )


def test_a_directory_on_another_base_is_measured_anew(tmp_path):
    """One adapter on two bases: neither record may stand for the other."""
    from safetensors.torch import load_file, save_file

    adapter, other = micro_adapter(tmp_path / "adapter"), tmp_path / "other"
    shutil.copytree(PACKAGED["micro"], other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    (first,) = measured(out, adapter)
    (second,) = measured(out, adapter, base=str(other))
    (third,) = measured(out, adapter, dtype="bfloat16")
    assert [(record.base.name, record.base.dtype) for record in (first, second, third)] == [
        ("micro", "float32"), (str(other), "float32"), ("micro", "bfloat16"),
    ]  # fmt: skip
    relative = [record.rows[0].values["l2_relative"] for record in (first, second)]
    assert relative[0] == pytest.approx(2 * relative[1])
    assert len(list((out / "records").glob("*/geometry-*.json"))) == 3


def test_close_factors_are_measured_apart(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    factors = (0.12345678, 0.12345679)
    records = [measured(tmp_path / "out", adapter, factor=factor)[0] for factor in factors]
    assert [record.factor for record in records] == list(factors)


def test_two_processes_do_not_measure_into_one_directory(tmp_path):
    adapter = micro_adapter(tmp_path / "adapter")
    (tmp_path / "out" / "records").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "records" / ".lock"), pytest.raises(UserError, match="another process"):
        measured(tmp_path / "out", adapter)
    measured(tmp_path / "out", adapter)


def micro_adapter(directory):
    import peft
    import torch

    model = load_model(Source("package", str(PACKAGED["micro"]), None), ModelSpec(name="micro"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    torch.manual_seed(0)
    wrapped.save_pretrained(directory)
    return directory
