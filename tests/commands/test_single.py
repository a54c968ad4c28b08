"""Settings of a single run: what ``--set`` makes of them, before anything is trained."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from peft_arena.commands import single_run as single
from peft_arena.core.errors import UserError
from peft_arena.models.load import PACKAGED
from peft_arena.models.stored import SINGLE
from peft_arena.work import pool as local


def train(tmp_path, *settings):
    return single.train_one("micro", "lora", "micro-reverse", [*settings], tmp_path)


@pytest.fixture
def studied(monkeypatch):
    """What a study would have been made of."""
    found = {}

    def keep(data, find_run):
        found.update(data)
        raise UserError("kept")

    monkeypatch.setattr(single, "study_from", keep)
    return found


def test_settings_become_a_study(tmp_path, studied):
    with pytest.raises(UserError, match="^kept$"):
        train(
            tmp_path, "train.schedule.steps=3", "train.init_from.run=0123", "train.init_from.step=10", "seed=4",
            "config.rank=2", "task.digits=3", "model.dtype=bfloat16",
        )  # fmt: skip
    assert studied["train"] == {"schedule": {"steps": 3}, "init_from": {"run": "0123", "step": 10}}
    assert (studied["seeds"], studied["arms"]) == ([4], [{"method": "lora", "config": {"rank": 2}}])
    assert studied["targets"] == [{"task": "micro-reverse", "config": {"digits": 3}}]
    assert studied["model"] == {"name": "micro", "dtype": "bfloat16"}


def test_without_a_schedule_there_is_one_epoch(tmp_path, studied):
    with pytest.raises(UserError, match="^kept$"):
        train(tmp_path)
    assert studied["train"] == {"schedule": {"epochs": 1}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("train.init_from=RUN", "train.init_from.step=10"),
            "--set train.init_from.step=10: 'train.init_from' is a single value and has no keys",
        ),
        (
            ("train.schedule=5", "train.schedule.steps=3"),
            "--set train.schedule.steps=3: 'train.schedule' is a single value and has no keys",
        ),
        (("train.a=5", "train.a.b.c=3"), "--set train.a.b.c=3: 'b' is inside a single value"),
        (
            ("seed.a=1",),
            "--set takes SECTION.KEY=value with SECTION in config, train, task, model, or seed=N; got 'seed",
        ),
        (("train.x",), "--set takes SECTION.KEY=value"),
        (("objective=grpo",), "--set takes SECTION.KEY=value"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, settings, message):
    with pytest.raises(UserError) as caught:
        train(tmp_path, *settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_start_that_is_no_table_names_what_a_single_run_takes(tmp_path):
    with pytest.raises(UserError, match="or run: RUN for a single run, got 'lora-1'"):
        train(tmp_path, "train.objective=grpo", "train.learning_rate=1e-3", "train.init_from=lora-1")


def test_a_model_that_is_not_whole_is_refused_before_runs_are_made(tmp_path, monkeypatch):
    model = shutil.copytree(PACKAGED["micro"], tmp_path / "model")
    held = load_file(model / SINGLE)
    held.pop("model.norm.weight")
    save_file(held, model / SINGLE, metadata={"format": "pt"})
    monkeypatch.setattr(local, "run_orders", lambda *given: pytest.fail("work was begun"))
    settings = ["train.schedule.steps=2", "train.learning_rate=1e-3"]
    for _ in range(2):
        with pytest.raises(UserError, match=r"model\.norm\.weight") as caught:
            single.train_one(str(model), "lora", "micro-reverse", settings, tmp_path / "out", quiet=True)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
