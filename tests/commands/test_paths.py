"""Paths as a stage of a study and as commands: what is asked for, evaluated, chosen, resumed, refused and written."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from peft_arena.commands.path_command import view_of_scan
from peft_arena.core.errors import UserError
from peft_arena.core.paths import ScanSpec, read_grid
from peft_arena.core.specs import OWN, EvalSpec, PathSpec, Point
from peft_arena.store.checkpoint import DONE
from peft_arena.store.store import Store
from peft_arena.study.read_study import read_study, study_from
from peft_arena.work.plan import plan
from tests.running import TINY, arena

ASKED = {
    "grid": [0, 0.5, 1.0],
    "paths": [{"rule": "uniform"}, {"rule": "safe", "config": {"blocks": 2}}],
    "items": 12,
    "save_points": True,
}


def asked(paths, arms=None):
    data = yaml.safe_load(TINY)
    data["paths"] = paths
    data["arms"] = arms or data["arms"]
    return study_from(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The tiny study with paths and an arm that has no weights, run and reported by the command line."""
    folder = tmp_path_factory.mktemp("paths")
    data = yaml.safe_load(TINY)
    data["train"]["learning_rate"] = 5e-3
    data["arms"].append({"method": "prompt_tuning"})
    (folder / "asked.yaml").write_text(yaml.safe_dump({**data, "paths": ASKED}))
    done = arena("run", folder / "asked.yaml", "--runs", folder / "runs", "--report", folder / "report", "--json")
    assert done.returncode == 0, done.stderr
    return folder


def run_of(folder, method):
    study = read_study(folder / "asked.yaml")
    spec = next(arm.runs[0] for arm in study.arms if arm.method == method)
    return study, Store(folder / "runs").run(spec)


def test_every_path_of_every_run_with_weights_is_walked(finished):
    study, run = run_of(finished, "lora")
    assert {item.state for item in plan(study, Store(finished / "runs"))} == {"done"}
    final = run.final_point()
    uniform, safe = study.scans(run.spec)
    record = run.scan(final, uniform)
    assert [row.factor for row in record.rows] == [0, 0.5, 1.0]
    assert record.expressed == "adapter"
    half = run.point(final.step, 0.5)
    assert run.evaluation(half, uniform.choose_on[0]).factor == 0.5
    other = run.point(final.step, 0.5, safe.path)
    assert run.evaluation(other, safe.choose_on[0]).path == safe.path
    assert half.key == f"{final.step:06d}-0.5"
    assert other.key != half.key
    _, prompts = run_of(finished, "prompt_tuning")
    assert study.scans(prompts.spec) == []
    assert list(prompts.scans()) == []


def test_the_pretrained_model_answers_for_factor_0_and_the_run_for_factor_1(finished):
    study, run = run_of(finished, "full")
    (uniform, *_) = study.scans(run.spec)
    assert run.scan(run.final_point(), uniform).expressed == "weights"
    base = Store(finished / "runs").run(study.base)
    for spec in uniform.choose_on:
        assert base.evaluation(base.point(0), spec) is not None
        assert run.evaluation(run.final_point(), spec) is not None
        assert run.evaluation(run.point(3), spec) is not None, "the save point is evaluated too"
    assert not list(run.path.glob("records/*-0/eval-*")), "factor 0 of a uniform path is no new evaluation"


def test_only_the_chosen_point_and_the_tuned_one_see_test_items(finished):
    study, run = run_of(finished, "lora")
    scans = {record.spec.path.id: record for record in run.scans()}
    for record in run.evaluations():
        if record.spec.split == "test" and (record.factor, record.path) != (1.0, OWN):
            assert record.factor == scans[record.path.id].chosen


def test_no_checkpoint_is_written_for_a_point(finished):
    _, run = run_of(finished, "lora")
    assert sorted(path.parent.name for path in run.path.rglob(DONE)) == ["000003", "000006"]


def test_the_report_shows_the_paths(finished):
    assert (finished / "report" / "tables" / "paths.csv").read_text().count("\n") >= 2 * 2 * 3
    assert "Rewinding" in (finished / "report" / "index.html").read_text()


def test_a_damaged_scan_is_found_by_check_and_is_not_done_again(finished, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(finished / "runs", copy)
    file = next(copy.rglob("path-uniform-*.json"))
    file.write_text(file.read_text()[:-20])
    assert file.name in arena("check", copy).stderr
    done = arena("run", finished / "asked.yaml", "--runs", copy, "--json")
    assert done.returncode == 1
    assert file.name in done.stdout


def test_the_command_reads_what_the_study_has_evaluated(finished, tmp_path):
    _, run = run_of(finished, "lora")
    copy = tmp_path / "runs"
    shutil.copytree(finished / "runs", copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("eval-*.json")}
    scan = ("path", "scan", run.run_id, "--runs", copy, "--items", 12, "--json")
    done = arena(*scan, "--grid", "0.5,0.75", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)["record"]
    assert [row["factor"] for row in record["rows"]] == [0.5, 0.75]
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("eval-*.json")}
    assert before.items() <= after.items()
    assert {path.parent.name for path in after.keys() - before.keys()} <= {"000006-0.75"}
    assert (tmp_path / "out" / "paths.html").exists()


def test_a_scan_on_few_test_items_does_not_become_what_later_ones_are_judged_by(finished, tmp_path):
    _, run = run_of(finished, "lora")
    copy = tmp_path / "runs"
    shutil.copytree(finished / "runs", copy)
    scan = ("path", "scan", run.run_id, "--runs", copy, "--items", 6, "--grid", "0.5", "--json")
    assert arena(*scan, "--test-items", 4).returncode == 0
    done = arena(*scan)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [spec["items"] for spec in said["record"]["spec"]["claim_on"]] == [12, 12]
    assert said["targets"][0]["paths"][0]["scan"] == ScanSpec.model_validate(said["record"]["spec"]).id


def test_all_scans_of_a_run_on_the_same_items_are_corrected_together(finished):
    study, run = run_of(finished, "lora")
    first, second = study.scans(run.spec)
    own = Store(finished / "runs").run(run.spec)
    assert view_of_scan(own, second).paths[run.run_id] == (second, first)
    other = first.model_copy(update={"choose_on": tuple(s.model_copy(update={"items": 5}) for s in first.choose_on)})
    assert view_of_scan(own, other).paths[run.run_id] == (other,), "other items make another claim"


def test_a_factor_that_test_items_refute_is_not_written_by_itself(finished, tmp_path, monkeypatch):
    import peft_arena.commands.path_command as command
    import peft_arena.report.paths as report

    _, run = run_of(finished, "lora")
    record = next(run.scans()).model_copy(update={"chosen": 0.5})
    said = {"headline": ["it lost"], "targets": [{"paths": [{"verdict": "target worse"}]}]}
    monkeypatch.setattr(report, "write_paths", lambda *_: said)
    monkeypatch.setattr(command, "_scanned", lambda *_: record)
    options = {"rule": "uniform", "settings": (), "way": "own", "factor": "auto", "weights": False, "dtype": None}
    options |= {"shard_size": "1GB", "verify": True, "bar": None}
    with pytest.raises(UserError, match="target worse: it lost To write it all the same, give --factor 0.5"):
        command.rewind(run.run_id, tmp_path / "x", finished / "runs", **options)
    assert not (tmp_path / "x").exists()
    said["targets"][0]["paths"][0]["verdict"] = "no overshoot shown"
    written = command.rewind(run.run_id, tmp_path / "x", finished / "runs", **options)
    assert written["chosen_by"]["verdict"] == "no overshoot shown"


def test_a_record_out_of_place_is_refused(finished, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(finished / "runs", copy)
    study, run = run_of(finished, "lora")
    own = Store(copy).run(run.spec)
    (uniform, _) = study.scans(run.spec)
    final = own.final_point()
    half = own.point(final.step, 0.5)
    name = f"eval-{uniform.choose_on[1].key}"
    shutil.copy(own.record_path(final, name), own.record_path(half, name))
    with pytest.raises(UserError, match="out of place: what it holds belongs into records.000006-1"):
        own.evaluation(half, uniform.choose_on[1])


def test_rewinding_writes_what_was_evaluated(finished, tmp_path):
    import torch

    from peft_arena.weights.base import base_weights
    from peft_arena.weights.effective import effective_weights
    from peft_arena.weights.start import tuned_run

    for method, file in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        _, run = run_of(finished, method)
        out = tmp_path / method
        command = ("path", "rewind", run.run_id, "--runs", finished / "runs", "--factor", "0.5", "--out", out)
        done = arena(*command, "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert (out / file).exists()
        assert said["factor"] == 0.5
        beside = "rewind.json" if method == "lora" else "merge.json"
        assert json.loads((out / beside).read_text())["subject"] == run.run_id
        wanted = tuned_run(run, run.final_point().step).weights().interpolated(0.5)
        found = effective_weights(base_weights(run.spec.model), out)
        module = wanted.modules()[3]
        base, change = found.pair(module)
        assert torch.allclose(change.dense(base), wanted.pair(module).change.dense(base), atol=1e-6)
        again = arena(*command)
        assert again.returncode == 2
        assert str(out) in again.stderr


def test_the_factor_of_a_scan_is_taken_or_its_absence_told(finished, tmp_path):
    _, run = run_of(finished, "lora")
    command = ("path", "rewind", run.run_id, "--runs", finished / "runs", "--out", tmp_path / "out", "--json")
    (record,) = [record for record in run.scans() if record.spec.path == OWN]
    done = arena(*command)
    if record.chosen is None:
        assert done.returncode == 2
        assert record.reason in done.stderr
    else:
        assert json.loads(done.stdout)["factor"] == record.chosen
    none = arena(*command, "--rule", "min")
    assert none.returncode == 2
    assert "path scan" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--factor", "much"), "a number from 0, or auto"),
        (("--factor", "-1"), "a number from 0, or auto"),
        (("--rule", "unform"), "uniform"),
        (("--rule", "safe", "--set", "blokcs=3"), "blocks"),
        (("--way", "sqrt"), "sqrt"),
        (("--way", "linear"), "own"),
    ],
)
def test_a_wrong_rewind_is_one_line(finished, tmp_path, arguments, message):
    _, run = run_of(finished, "lora")
    done = arena("path", "rewind", run.run_id, "--runs", finished / "runs", "--out", tmp_path / "x", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_prompts_and_the_pretrained_model_have_no_path(finished, tmp_path):
    study, prompts = run_of(finished, "prompt_tuning")
    for run_id, message in ((prompts.run_id, "no weights of its own"), (study.base.run_id, "pretrained model")):
        done = arena("path", "scan", run_id, "--runs", finished / "runs")
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"grid": "0:1"}, "START:STOP:STEP"),
        ({"grid": [0.5, 0.5]}, "ascend"),
        ({"grid": [0.5, 0.50000000000001]}, "ascend"),
        ({"grid": [-0.5]}, "greater than or equal to 0"),
        ({"paths": [{"rule": "saffe"}]}, "safe"),
        ({"paths": [{"rule": "safe", "config": {"x": 1}}]}, "x"),
        ({"paths": []}, "at least 1"),
        ({"paths": [{}, {"way": "own"}]}, "twice"),
        ({"itens": 3}, "itens"),
    ],
)
def test_a_wrong_section_is_one_line(paths, message):
    with pytest.raises(UserError, match=message) as caught:
        asked(paths)
    assert "\n" not in str(caught.value)


def test_a_path_is_no_part_of_a_run_and_only_asked_of_methods_that_have_it():
    plain, walked = study_from(yaml.safe_load(TINY)), asked({"paths": [{}, {"way": "sqrt"}, {"way": "linear"}]})
    assert [run.run_id for run in plain.runs()] == [run.run_id for run in walked.runs()]
    assert {len(walked.scans(run)) for run in walked.runs()} == {0, 1}
    arms = [{"method": "oft", "config": {"block_size": 16}}]
    rotated = asked({"paths": [{}, {"way": "sqrt"}, {"way": "linear"}, {"rule": "intruder"}]}, arms)
    assert [scan.path.readable for scan in rotated.scans(rotated.arms[0].runs[0])] == [
        "uniform",
        "sqrt-uniform",
        "linear-uniform",
    ]


def test_points_are_chosen_and_judged_on_different_items():
    study = asked({"items": 400})
    (scan,) = study.scans(study.arms[0].runs[0])
    assert [spec.split for spec in scan.choose_on] == ["validation"] * 2
    assert scan.claim_on == (*study.targets, *study.retention)
    assert scan.choose_on[0].items == 256, "as many as there are"
    with pytest.raises(ValueError, match="test items"):
        ScanSpec(grid=(0.5,), choose_on=(EvalSpec(task=scan.claim_on[0].task),), claim_on=scan.claim_on[:1])


def test_a_grid_is_read_as_written():
    assert read_grid("0:1.2:0.4") == (0.0, 0.4, 0.8, 1.2)
    assert read_grid("0.1:0.3:0.1") == (0.1, 0.2, 0.3)
    assert read_grid("1, 0.25") == (0.25, 1.0)
    for wrong in ("", "a", "1:0:0.1", "0:1:0", "0:1", "-1,0", "0:1:1e-8", "1e400"):
        with pytest.raises(ValueError, match="grid"):
            read_grid(wrong)


def test_the_tuned_model_is_one_point_whatever_the_way():
    linear = PathSpec(way="linear")
    study = asked({})
    run = Store(Path("nowhere")).run(study.arms[0].runs[0])
    assert run.point(6, 1.0, linear) == run.point(6)
    assert run.point(6, 0.5, linear) != run.point(6, 0.5)
    assert Point(run_id="r", step=6).key == "000006-1"
