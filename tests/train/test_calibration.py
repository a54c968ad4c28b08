"""Calibration data are the run's own training examples, the same every time."""

from __future__ import annotations

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.specs import MethodSpec, ModelSpec, RunSpec, Schedule, TrainSpec
from peft_arena.methods.low_rank.lora import Lora
from peft_arena.models.load import load
from peft_arena.study.read_study import task_spec
from peft_arena.tasks.registry import task_of
from peft_arena.train.calibration import calibration_for
from peft_arena.train.data import read_examples

MODEL = ModelSpec(name="micro")


class Calibrated(Lora):
    wanted = 20

    @property
    def calibration_examples(self) -> int:
        return self.wanted


def spec(seed: int = 0, examples: int | None = 40) -> RunSpec:
    task = task_spec("micro-reverse", {}, "test")
    train = TrainSpec(task=task, schedule=Schedule(steps=2), learning_rate=1e-3, examples=examples)
    return RunSpec(model=MODEL, method=MethodSpec(name="lora"), train=train, seed=seed)


def test_rows_are_training_examples_with_their_mask_and_labels() -> None:
    run, loaded = spec(), load(MODEL)
    assert run.train is not None
    task = task_of(run.train.task)
    found = calibration_for(run, Calibrated(), loaded, task)
    assert found is not None and sum(len(batch["input_ids"]) for batch in found.batches) == 20
    known = {
        tuple(e.ids): e.first_label for e in read_examples(task, "train", 40, loaded.tokenizer, run.train, 999).kept
    }
    seen = set()
    for batch in found.batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            real = tuple(ids[:length].tolist())
            first = known[real]
            assert mask[:length].all() and labels[first:length].tolist() == list(real[first:])
            assert (labels[:first] == -100).all() and (labels[length:] == -100).all()
            seen.add(real)
    assert len(seen) == 20


def test_the_seed_decides_and_nothing_else() -> None:
    loaded = load(MODEL)

    def drawn(seed: int) -> torch.Tensor:
        run = spec(seed)
        assert run.train is not None
        found = calibration_for(run, Calibrated(), loaded, task_of(run.train.task))
        assert found is not None
        return torch.cat([batch["input_ids"].flatten() for batch in found.batches])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_method_that_asks_for_none_gets_none_and_one_that_asks_for_more_gets_all() -> None:
    run, loaded = spec(examples=8), load(MODEL)
    assert run.train is not None
    task = task_of(run.train.task)
    assert calibration_for(run, Lora(), loaded, task) is None
    shown = calibration_for(run, Calibrated(), loaded, task)
    assert shown is not None and sum(len(batch["input_ids"]) for batch in shown.batches) == 8
    short = run.model_copy(update={"train": run.train.model_copy(update={"max_length": 8})})
    with pytest.raises(UserError, match="is 20, and task micro-reverse has no training example that fits"):
        calibration_for(short, Calibrated(), loaded, task)
