"""The command line: wrong requests are one line and exit code 2; lists and help work."""

import json

import pytest

from tests.running import arena, arena_process

SFT = ["train", "sft", "--model", "micro", "--method", "lora", "--out", "unused"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "mirco"], "unknown study 'mirco'. Did you mean 'micro'"),
        (["run", "nowhere.yaml"], "no study file nowhere.yaml"),
        (["run", "micro", "--set", "arms.0.method=lroa"], "unknown method 'lroa'"),
        (["run", "micro", "--set", "model.name=./nowhere"], "unknown model './nowhere'"),
        (["run", "micro", "--set", "model.name=nobody/nothing"], "cannot find model 'nobody/nothing'"),
        (["show", "nothing"], "no run 'nothing'"),
        (["check", "nowhere"], "cannot check nowhere"),
        (["eval", "micro", "--tasks", "micro-srot"], "unknown task 'micro-srot'"),
        (["eval", "nothing", "--tasks", "micro-sort"], "no run 'nothing'"),
        (["eval", "./nothing", "--tasks", "micro-sort"], "unknown model './nothing'"),
        (["eval", "micro", "--tasks", "micro-sort", "--k", "1,4"], "give --samples too"),
        (["eval", "micro", "--tasks", "micro-sort", "--samples", "4", "--k", "1,8"], "k must increase and not exceed"),
        (["eval", "micro", "--tasks", "micro-facts", "--samples", "4", "--k", "x"], "got 'x'"),
        (["eval", "micro@5", "--tasks", "micro-sort"], "a base model has none"),
        (["train", "sft", "--model", "micro", "--method", "none", "--task", "micro-reverse", "--out", "unused",
          "--set", "train.learning_rate=1"], "nothing can be run: none trains nothing"),
        ([*SFT, "--task", "micro-sort"], "cannot be a target"),
        ([*SFT, "--task", "micro-reverse"], "learning_rate is required"),
        ([*SFT, "--task", "micro-reverse", "--set", "config.rnak=1"], "unknown key 'rnak'"),
        ([*SFT, "--task", "micro-reverse", "--set", "rank=1"], "SECTION.KEY=value"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = (
        arena(*arguments, "--runs", tmp_path) if arguments[0] in {"run", "plan", "show", "eval"} else arena(*arguments)
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_wrong_options_exit_with_2():
    assert arena("run").returncode == 2
    assert arena("ls", "nothing").returncode == 2
    assert arena("frobnicate").returncode == 2


def test_a_process_of_its_own_says_the_same():
    for arguments in (["plan", "mirco"], ["ls", "rewards", "--json"]):
        here, there = arena(*arguments), arena_process(*arguments)
        assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)
    assert arena_process("run").returncode == 2


@pytest.mark.parametrize("what", ["methods", "tasks", "studies", "models", "rules", "rewards"])
def test_lists(what):
    rows = json.loads(arena("ls", what, "--json").stdout)
    assert len(rows) >= 3
    assert all(row["name"] for row in rows)
    assert rows[0]["name"] in arena("ls", what).stdout


def test_doctor():
    rows = json.loads(arena("doctor", "--json").stdout)
    states = {row["check"]: row["state"] for row in rows}
    assert states["torch"] == states["micro model"] == "ok"


def test_one_run_without_a_study(tmp_path):
    command = ["train", "sft", "--model", "micro", "--method", "ia3", "--task", "micro-reverse", "--out", tmp_path]
    settings = ["train.learning_rate=1e-2", "train.schedule.steps=2", "train.batch_size=4", "seed=3"]
    done = arena(*command, *(part for text in settings for part in ("--set", text)), "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert any("ia3-micro-reverse-s3" in name for name in said["runs"])
