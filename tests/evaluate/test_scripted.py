"""The whole path from prompt to record without weights."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from evaluate_toys import TASKS, Write, make, spec

from peft_arena.evaluate.run import evaluate
from peft_arena.store.records import EvaluationRecord
from peft_arena.tasks.base import Item, Score
from peft_arena.testing.engine import ScriptedModel, knowing, scripted_loaded, silent, wrong

POINT: dict[str, Any] = {"run_id": "r", "step": 0, "factor": 1.0, "progress": False, "make": make}


@pytest.mark.parametrize("name", ["write", "chat", "choose"])
@pytest.mark.parametrize(("maker", "value"), [(knowing, 1.0), (wrong, 0.0)])
def test_known_answers_score_one_and_wrong_ones_zero(name: str, maker: Any, value: float) -> None:
    class Plain(TASKS[name]):  # type: ignore[name-defined, misc]
        def score(self, item: Item, completion: str) -> Score:
            return Score(float(item.answer.startswith(completion) and bool(completion)))

    task = Plain()
    model = maker(task, task.items("test"))
    record = evaluate(scripted_loaded(), model, spec(name), **{**POINT, "make": lambda *_: task})
    assert [item.value for item in record.items] == [value] * 20
    assert record.metrics[0].value == value and record.metrics[0].stderr == 0.0
    assert record.engine["scripted"]


def test_silence_is_scored_by_the_task() -> None:
    record = evaluate(scripted_loaded(), silent(), spec("write"), **POINT)
    assert {item.output for item in record.items} == {""}
    assert record.metrics[0].value == 0.0


def test_texts_cost_less_when_known() -> None:
    task = TASKS["text"]()
    known = evaluate(scripted_loaded(), knowing(task, task.items("test")), spec("text"), **POINT)
    unknown = evaluate(scripted_loaded(), silent(), spec("text"), **POINT)
    assert (known.metrics[0].value, unknown.metrics[0].value) == (1.0, 10.0)


def test_a_function_can_be_the_script() -> None:
    model = ScriptedModel(lambda prompt: f" {prompt.split()[0]}\nmore")
    record = evaluate(scripted_loaded(), model, spec("write", 3), **POINT)
    assert [item.output for item in record.items] == [" 0", " 1", " 2"]
    assert Write.generation.stop[0] == "\n"


def test_an_item_record_knows_the_group_of_its_item() -> None:
    class Passages(Write):
        def make(self, rng: random.Random, number: int) -> Item:
            return replace(super().make(rng, number), group=f"passage {number // 3}" if number < 6 else "")

    task = Passages()
    record = evaluate(scripted_loaded(), silent(), spec("write"), **{**POINT, "make": lambda *_: task})
    assert [item.group for item in record.items] == ["passage 0"] * 3 + ["passage 1"] * 3 + [""] * 14
    assert record.model_dump_json().count('"group"') == 6, "no group is not written"
    assert EvaluationRecord.model_validate_json(record.model_dump_json()) == record
