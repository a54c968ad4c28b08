"""``peft-arena cost``: what is measured of a run and of a base model, and that it is kept."""

import json

import pytest
from typer.testing import CliRunner

from peft_arena.cli.app import app
from peft_arena.commands import cost_command
from peft_arena.commands.check import check_path
from peft_arena.commands.cost_command import lengths_of, measure_cost, size_rows, time_rows
from peft_arena.core.errors import UserError
from peft_arena.core.measure import Measure
from peft_arena.store.records import CostRecord
from tests.made_runs import STEP, trained_run

SMALL = {"prompt_lengths": [4, 8], "new_tokens": 6, "repeats": 2, "batch_size": 1}


def values(record):
    return {one.metric: one.value for one in record.measures}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    run = trained_run(tmp_path_factory.mktemp("runs"), "lora")
    counted = Measure(metric="trained_parameters", value=321, unit="parameters", better="lower", how="counted", n=1)
    run.write_cost(CostRecord(run_id=run.run_id, stage="training", measures=(counted,), provenance={}))
    return run, measure_cost(run.run_id, run.path.parent, SMALL)


def test_a_run_is_measured_as_it_runs_merged_and_against_its_base(lora):
    run, record = lora
    found = values(record)
    assert (record.stage, record.step, record.settings["prompt_lengths"]) == ("generation", STEP, [4, 8])
    assert found["trained_parameters"] == 321, "what was trained is not what a restored model would train"
    assert found["total_parameters"] is None, "not in the training's record"
    assert found["checkpoint_bytes"] > 0 and found["peak_memory_generation"] is not None
    assert found["extra_forward_flops_512"] > 0 == found["extra_forward_flops_512_merged"]
    for length in (4, 8):
        assert found[f"tokens_in_common_p{length}_merged"] == 6, "merging changes no greedy token in float32"
        for variant in ("", "_merged", "_base"):
            assert found[f"time_per_token_p{length}{variant}"] > 0
    assert {name for name in found if name.startswith("time_per_token_p4") and "spread" not in name} == {
        "time_per_token_p4", "time_per_token_p4_merged", "time_per_token_p4_base",
        "time_per_token_p4_ratio", "time_per_token_p4_merged_ratio",
    }  # fmt: skip


def test_the_same_settings_are_never_measured_twice(lora, monkeypatch):
    run, record = lora
    monkeypatch.setattr(cost_command, "weights_at", lambda run, step: pytest.fail("measured again"))
    assert measure_cost(f"{run.run_id}@{STEP}", run.path.parent, SMALL) == record
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measure_cost(run.run_id, run.path.parent, SMALL | {"new_tokens": 5})
    assert len(list(run.path.glob(f"records/{STEP:06d}-1/cost-generation-*.json"))) == 1
    assert check_path(run.path)["records"] == 4


def test_a_method_that_does_not_merge_says_so(tmp_path):
    run = trained_run(tmp_path, "prompt_tuning")
    record = measure_cost(run.run_id, tmp_path, SMALL | {"prompt_lengths": [4]})
    merged = next(one for one in record.measures if one.metric == "forward_flops_512_merged")
    assert merged.value is None and "prompt_tuning does not merge" in merged.how
    assert not [name for name in values(record) if "p4_merged" in name]
    assert values(record)["trained_parameters"] is None
    assert next(one.how for one in record.measures if one.metric == "trained_parameters").startswith("not known")


def test_a_base_model_by_the_command_line(tmp_path):
    asked = ["cost", "micro", "--runs", str(tmp_path), "--prompt-lengths", "4,512", "--new-tokens", "2"]
    asked += ["--repeats", "2"]
    found = CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False)
    said = json.loads(found.stdout)
    measures = {one["metric"]: one for one in said["measures"]}
    assert said["step"] == 0 and measures["trained_parameters"]["value"] == 0
    assert (
        measures["extra_forward_flops_512"]["value"] == 0 and "pretrained model" in measures["checkpoint_bytes"]["how"]
    )
    assert measures["time_per_token_p512"]["value"] is None
    assert not [name for name in measures if name.endswith(("_ratio", "_base", "_merged"))]
    shown = CliRunner().invoke(app, asked, catch_exceptions=False).stdout
    assert {"runs", "forward", "measured:", "256"} <= set(shown.split()), "cells may be wrapped"


def test_rows_for_people(lora):
    rows = time_rows(lora[1])
    assert [(row["prompt"], row["model"]) for row in rows] == [
        (f"{length} tokens", name) for length in (4, 8) for name in ("as it runs", "merged", "base")
    ]
    assert all("note" not in row for row in rows) and rows[2]["token ÷ base"] is None
    assert "ms (spread" in rows[0]["per token"] and "(spread" in rows[1]["token ÷ base"]
    sizes = {row["quantity"]: row["value"] for row in size_rows(lora[1])}
    assert sizes["trained parameters"] == "321" and sizes["total parameters"] is None
    assert not [name for name in sizes if name.startswith("time")]


@pytest.mark.parametrize("text", ["", "a", "4,0", "4;8"])
def test_lengths_are_numbers(text):
    with pytest.raises(UserError, match="--prompt-lengths takes numbers of tokens"):
        lengths_of(text)
    assert lengths_of(" 16, 128") == [16, 128]
