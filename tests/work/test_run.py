"""Studies run whole: once, again, interrupted, side by side, and with a failing arm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_arena.store.store import Store
from peft_arena.study.read_study import read_study
from tests.running import TINY, results
from tests.running import arena_process as arena


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the tiny study, made once by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    done = arena("run", folder / "tiny.yaml", "--runs", folder / "runs", "--json")
    assert done.returncode == 0, done.stderr
    return folder, {**json.loads(done.stdout), "results": results(folder / "runs")}


def test_a_study_runs_whole(finished):
    folder, said = finished
    assert said["worked"] == 3
    assert set(said["runs"].values()) == {"done"}
    study = read_study(folder / "tiny.yaml")
    store = Store(folder / "runs")
    for run in study.runs():
        directory = store.run(run)
        point = directory.final_point()
        for spec in study.evaluations(run):
            record = directory.evaluation(point, spec)
            assert len(record.items) == 12
            assert record.metrics[0].n + record.metrics[0].unscored == 12
        measures = {
            m.metric: m
            for stage in ("training", "inference")
            if directory.cost(stage)
            for m in directory.cost(stage).measures
        }
        assert measures["peak_memory_evaluation"].value > 0
        if run.train is not None:
            assert directory.steps() == [3, 6]
            assert measures["trained_parameters"].value > 0
            assert measures["training_flops"].value > 0
            assert measures["training_time"].value > 0
            assert measures["peak_memory_training"].value > 0
            assert measures["checkpoint_bytes"].value > 0
            log = directory.training().log
            assert log[-1].step == 6
            assert log[0].validation_loss > 0


def test_running_again_does_nothing_and_says_so(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    done = arena("run", folder / "tiny.yaml", "--runs", folder / "runs")
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")} == before


def test_the_other_commands_read_it(finished):
    folder, said = finished
    runs = ("--runs", folder / "runs")
    status = arena("status", folder / "tiny.yaml", *runs)
    assert (status.returncode, "3 done" in status.stdout) == (0, True), status.stderr
    run_id = next(name for name in said["runs"] if "lora" in name)
    shown = json.loads(arena("show", run_id, *runs, "--json").stdout)
    assert shown["training"]["steps"] == 6
    assert {row["task"] for row in shown["evaluations"]} == {"micro-reverse", "micro-sort"}
    checked = json.loads(arena("check", folder / "runs", "--json").stdout)
    assert checked["checkpoints"] == 4
    report = arena("report", folder / "tiny.yaml", *runs, "--out", folder / "report")
    assert report.returncode == 0, report.stderr
    assert (folder / "report" / "index.html").stat().st_size > 10_000


def test_eval_adds_a_record_and_reads_it_again(finished):
    folder, said = finished
    run_id = next(name for name in said["runs"] if "full" in name)
    command = ("eval", f"{run_id}@3", "--tasks", "micro-sort", "--items", 5, "--runs", folder / "runs", "--json")
    first = arena(*command)
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)
    assert (rows[0]["task"], rows[0]["n"]) == ("micro-sort", 5)
    assert json.loads(arena(*command).stdout) == rows
    base = arena("eval", "micro", "--tasks", "micro-sort", "--items", 5, "--runs", folder / "runs", "--json")
    assert json.loads(base.stdout)[0]["value"] >= 0.8


def test_a_killed_study_resumes_to_the_same_records(finished, tiny, tmp_path):
    _, said = finished
    runs = tmp_path / "runs"
    slow = ["--set", "execution.jobs=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_arena", "run", str(tiny), "--runs", str(runs), *slow],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(runs.glob("*/resume/*")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert list(runs.glob("*/resume/*")), "the study ended before it could be killed"
    done = arena("run", tiny, "--runs", runs)
    assert done.returncode == 0, done.stderr
    assert results(runs) == said["results"]
    assert not list(runs.rglob("*.part"))


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_command(end, tiny, tmp_path):
    runs = tmp_path / "runs"
    long = ["--set", "train.schedule.steps=100000", "--set", "execution.jobs=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_arena", "run", str(tiny), "--runs", str(runs), *long],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(runs.glob("*/resume/*")):
        time.sleep(0.05)
    trained = next(run for run in Store(runs).runs() if not run.spec.is_base)
    assert trained.is_locked()
    process.send_signal(end)
    process.wait(30)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and trained.is_locked():
        time.sleep(0.05)
    assert not trained.is_locked(), "a worker goes on without its command"


def test_two_processes_share_the_work(finished, tiny, tmp_path):
    _, said = finished
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "peft_arena", "run", str(tiny), "--runs", str(runs), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert results(runs) == said["results"]
    for run in Store(runs).runs():
        finished_stages = [event["stage"] for event in run.events() if event["event"] == "finished"]
        assert len(finished_stages) == len(set(finished_stages)), "a stage was done twice"


def test_a_failing_run_is_recorded_and_the_others_go_on(tiny, tmp_path):
    tiny.write_text(tiny.read_text().replace("- {method: lora}", "- {method: lora, train: {learning_rate: 1e30}}"))
    done = arena("run", tiny, "--runs", tmp_path / "runs", "--json")
    assert done.returncode == 1
    said = json.loads(done.stdout)
    ((run_id, reason),) = said["failed"].items()
    assert "lora" in run_id
    assert "training failed" in reason
    assert sorted(said["runs"].values()) == ["done", "done", "failed"]
    status = arena("status", tiny, "--runs", tmp_path / "runs")
    assert status.returncode == 1
    assert "training failed" in status.stdout
    report = arena("report", tiny, "--runs", tmp_path / "runs", "--out", tmp_path / "report")
    assert report.returncode == 0, report.stderr
    assert "training failed" in (tmp_path / "report" / "index.html").read_text()


def test_what_training_would_refuse_is_refused_when_it_is_planned(tiny):
    tiny.write_text(tiny.read_text().replace("- {method: lora}", "- {method: lora, config: {rank: 4000}}"))
    study = read_study(tiny)
    refused = {arm.label: arm.refused for arm in study.arms}
    assert refused["full"] == ""
    assert refused["lora"].startswith("rank: 4000 is above the smaller side of model.layers.0.self_attn.q_proj")


def test_a_damaged_checkpoint_and_record_are_named(finished, tmp_path):
    import shutil

    folder, _ = finished
    runs = tmp_path / "runs"
    shutil.copytree(folder / "runs", runs)
    weights = next(runs.glob("*lora*/steps/000006/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    record = next(runs.glob("*lora*/records/000006-1/eval-micro-sort-*.json"))
    text = record.read_text()
    record.write_text(text[: len(text) // 2])
    done = arena("run", folder / "tiny.yaml", "--runs", runs)
    assert done.returncode == 1
    assert "is damaged" in done.stdout
    assert record.name in done.stdout
    record.rename(tmp_path / "moved")
    done = arena("run", folder / "tiny.yaml", "--runs", runs)
    assert done.returncode == 1
    assert "adapter_model.safetensors has sha256" in done.stdout
    checked = arena("check", runs)
    assert checked.returncode == 2
    assert "1 of" in checked.stderr and "damaged" in checked.stderr
