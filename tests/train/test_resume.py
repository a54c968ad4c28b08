"""A training that is killed and started again ends bit for bit where an undisturbed one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_arena.train import state
from peft_arena.train.run import finish
from peft_arena.train.sft import train_sft

from .toy import ToyAttached, ToyTask, load_model, log_of, open_run, run_spec, weights


class Killed(Exception):  # noqa: N818
    """Stands for the end of the process."""


def once(root, model_dir, *, stop=None, resume_every=3, **changes):
    run = open_run(root, run_spec(model_dir, **changes))
    loaded = load_model(model_dir, changes.get("dtype", "float32"))

    def watch(info):
        if info.step == stop:
            raise Killed

    attached = ToyAttached(loaded.model)
    hooks = {"progress": False, "on_step": watch}
    outcome = train_sft(run, loaded, attached, ToyTask(), resume_every=resume_every, **hooks)
    finish(run, outcome.record)
    return run, outcome


@pytest.fixture
def undisturbed(tmp_path, model_dir):
    run, _ = once(tmp_path / "undisturbed", model_dir, resume_every=None)
    return run


def same(run, undisturbed) -> bool:
    return [weights(run, step) for step in run.steps()] == [weights(undisturbed, step) for step in undisturbed.steps()]


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 9])
def test_interrupted_at_any_step(tmp_path, model_dir, undisturbed, stop):
    with pytest.raises(Killed):
        once(tmp_path, model_dir, stop=stop)
    run, outcome = once(tmp_path, model_dir)
    last = max((step for step in (3, 4, 6, 9) if step <= stop), default=None)
    assert outcome.record.resumed_at == last
    assert same(run, undisturbed)
    assert log_of(run) == log_of(undisturbed)
    assert outcome.record.tokens == undisturbed.training().tokens
    assert outcome.record.padded_tokens == undisturbed.training().padded_tokens
    assert not (run.path / "resume").exists()
    assert (last is not None) == any(event["event"] == "training_resumed" for event in run.events())


def test_interrupted_again_and_again_in_bfloat16(tmp_path, model_dir):
    whole, _ = once(tmp_path / "whole", model_dir, dtype="bfloat16", micro_batch_size=2)
    for stop in (2, 5, 7):
        with pytest.raises(Killed):
            once(tmp_path / "parts", model_dir, stop=stop, resume_every=1, dtype="bfloat16", micro_batch_size=2)
    run, outcome = once(tmp_path / "parts", model_dir, dtype="bfloat16", micro_batch_size=2)
    assert outcome.record.resumed_at == 7
    assert same(run, whole) and log_of(run) == log_of(whole)


def test_only_the_newest_state_is_kept(tmp_path, model_dir):
    with pytest.raises(Killed):
        once(tmp_path, model_dir, stop=8)
    run = open_run(tmp_path, run_spec(model_dir))
    assert [path.name for path in (run.path / "resume").iterdir()] == ["00000006"]
    assert {path.suffix for path in (run.path / "resume" / "00000006").iterdir()} <= {".json", ".safetensors", ""}


@pytest.mark.parametrize("name", [state.WEIGHTS, state.OPTIMIZER, state.COUNTERS, "SHA256", "DONE"])
def test_damaged_state_is_left_out_with_a_warning(tmp_path, model_dir, undisturbed, name):
    with pytest.raises(Killed):
        once(tmp_path, model_dir, stop=7)
    run = open_run(tmp_path, run_spec(model_dir))
    path = run.path / "resume" / "00000006" / name
    path.write_bytes(path.read_bytes()[:-3]) if name != "DONE" else path.unlink()
    run, outcome = once(tmp_path, model_dir)
    assert outcome.record.resumed_at is None
    assert [event["event"] for event in run.events()] == ["resume_state_ignored"]
    assert same(run, undisturbed) and log_of(run) == log_of(undisturbed)


def test_damaged_newest_state_falls_back_to_the_one_before(tmp_path, model_dir, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(state.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            once(tmp_path, model_dir, stop=7)
    run = open_run(tmp_path, run_spec(model_dir))
    assert (run.path / "resume" / "00000004" / "DONE").exists()
    (run.path / "resume" / "00000006" / state.OPTIMIZER).write_bytes(b"nothing")
    run, outcome = once(tmp_path, model_dir)
    assert outcome.record.resumed_at == 4
    assert same(run, undisturbed) and log_of(run) == log_of(undisturbed)


def test_state_of_other_data_is_not_continued(tmp_path, model_dir, undisturbed, monkeypatch):
    with pytest.raises(Killed):
        once(tmp_path, model_dir, stop=4)
    monkeypatch.setattr(ToyTask, "items", lambda self, split: list(ToyTask.plain(self, split))[::-1], raising=False)
    run, outcome = once(tmp_path, model_dir)
    assert outcome.record.resumed_at is None
    assert "other training data" in run.events()[0]["reason"]


ToyTask.plain = ToyTask.items

SCRIPT = """
import time
from pathlib import Path
from train.toy import ToyAttached, ToyTask, load_model, open_run, run_spec
from peft_arena.train.run import finish
from peft_arena.train.sft import train_sft
import torch
torch.set_num_threads(1)
root, model = Path({root!r}), Path({model!r})
loaded = load_model(model)
run = open_run(root, run_spec(model))
def slow(info):
    (root / "step").write_text(str(info.step))
    time.sleep(0.15)
train_sft(run, loaded, ToyAttached(loaded.model), ToyTask(), resume_every=1, progress=False, on_step=slow)
"""


@pytest.mark.slow
def test_kill_minus_nine(tmp_path, model_dir, undisturbed):
    script = SCRIPT.format(root=str(tmp_path), model=str(model_dir))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "step").exists() or (tmp_path / "step").read_text() not in {"5", "6", "7"}:
            assert process.poll() is None and time.monotonic() < deadline, "the training ended before it was killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run, outcome = once(tmp_path, model_dir)
    assert outcome.record.resumed_at in {5, 6, 7}
    assert same(run, undisturbed) and log_of(run) == log_of(undisturbed)
