"""The commands of importing: what they write, print and refuse."""

import json

import pytest
from typer.testing import CliRunner

from peft_arena.cli.app import app
from peft_arena.core.errors import UserError
from peft_arena.study.read_study import read_study
from tests.interop.library import LORA, RESULT, experiment


def arena(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_experiments_become_a_study_file(tmp_path):
    experiment(tmp_path, "lora/a")
    experiment(tmp_path, "lora/b", adapter={**LORA, "bias": "all"})
    out = tmp_path / "study.yaml"
    done = arena("import", "hf-experiment", tmp_path, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["study"] == str(out)
    assert [(row["experiment"], row["state"]) for row in found["experiments"]] == [
        ("lora/a", "planned"),
        ("lora/b", "refused"),
    ]
    assert "bias is 'all'" in found["experiments"][1]["why"]
    assert [arm.label for arm in read_study(out).arms] == ["lora/a"]
    again = arena("import", "hf-experiment", tmp_path, "--out", out)
    assert isinstance(again.exception, UserError) and "exists" in str(again.exception)


def test_nothing_is_written_where_all_is_refused(tmp_path):
    directory = experiment(tmp_path, adapter={"peft_type": "POLY"})
    done = arena("import", "hf-experiment", directory, "--out", tmp_path / "study.yaml")
    assert isinstance(done.exception, UserError) and "every experiment" in str(done.exception)
    assert "0 of 1 experiments run here" in done.stdout and not (tmp_path / "study.yaml").exists()


def test_results_become_a_file_of_tables(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RESULT))
    out = tmp_path / "table.json"
    done = arena("import", "hf-results", tmp_path / "one.json", "--out", out, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout) == json.loads(out.read_text())
    assert "0.25" in arena("import", "hf-results", tmp_path / "one.json").stdout


def test_published_tables_are_listed():
    rows = json.loads(arena("ls", "published", "--json").stdout)
    assert {row["name"].partition("/")[0] for row in rows} == {"peft-arena", "peft-bench", "peft-library"}


def test_a_study_names_published_tables_that_exist(tmp_path):
    text = (
        "name: x\ntitle: x\nmodel: {name: micro}\ntargets: [{task: micro-reverse}]\n"
        "train: {schedule: {steps: 2}, learning_rate: 1e-3}\narms: [{method: lora}]\nseeds: [0]\n"
    )
    file = tmp_path / "study.yaml"
    file.write_text(f"{text}published: [peft-arena, peft-library/metamathqa]\n")
    from peft_arena.study.study_view import view_of

    assert len(view_of(read_study(file)).published) == 9
    file.write_text(f"{text}published:\n  - peft-arena\n  - peft-libary\n")
    with pytest.raises(UserError, match=r"unknown published table 'peft-libary' \(in .*study\.yaml line 10\)"):
        read_study(file)
