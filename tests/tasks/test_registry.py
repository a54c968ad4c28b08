"""Every registered task keeps the contract; wrong names and settings are one-line errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest

from peft_arena.assets.wheel_files import Wheel
from peft_arena.core.errors import UserError
from peft_arena.tasks.arithmetic import ChainSum, GeneratedConfig
from peft_arena.tasks.base import Item, Role, Score, Split, Task
from peft_arena.tasks.benchmarks import BENCHMARK_TASKS
from peft_arena.tasks.registry import TASKS, make_task
from peft_arena.testing.tasks import check_task, need_wheel

NAMES = [name for name in TASKS.names() if name != "custom" and name not in BENCHMARK_TASKS]
SIZES = {
    "asdiv": (1683, 150, 250),
    "basic_arithmetic": (4000, 300, 400),
    "boolq": (None, 400, 2870),
    "chain_sum": (4000, 300, 400),
    "disambiguation_qa": (None, 80, 178),
    "gsm_symbolic": (4000, 300, 400),
    "instruction_following": (None, 60, 200),
    "medmcqa": (3433, 350, 400),
    "nq_open": (None, 400, 3164),
    "openbookqa": (None, 150, 350),
    "piqa": (None, 300, 1200),
    "siqa": (None, 400, 1535),
    "xsum-text": (None, 200, 794),
}


def test_tasks_were_found() -> None:
    assert len(NAMES) >= 24
    assert set(SIZES) <= set(NAMES)
    assert sum(name.startswith("micro-") for name in NAMES) == 11


@pytest.mark.parametrize("name", NAMES)
def test_task_keeps_the_contract(name: str, wheel_for: Callable[[str], None]) -> None:
    wheel_for(name)
    task = make_task(name)
    assert task.card.name == name
    check_task(task)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_split_sizes_do_not_change_by_accident(name: str, wheel_for: Callable[[str], None]) -> None:
    wheel_for(name)
    task = make_task(name)
    for split, size in zip(get_args(Split), SIZES[name], strict=True):
        if size is None:
            with pytest.raises(UserError, match="split"):
                task.items(split)
        else:
            assert len(task.items(split)) == size
    assert (SIZES[name][0] is not None) == (task.card.role is Role.TARGET)


def test_listing_and_making_tasks_imports_neither_torch_nor_other_tasks() -> None:
    code = (
        "import sys; from peft_arena.tasks.registry import TASKS, make_task; TASKS.names(); "
        "held = {'torch', 'transformers', 'datasets', 'reasoning_gym', 'lm_eval'}; assert not held & set(sys.modules);"
        "assert 'peft_arena.tasks.arithmetic' not in sys.modules; make_task('piqa'); make_task('chain_sum');"
        "assert not held & set(sys.modules), held & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("chain_sun", None, ["unknown task 'chain_sun'", "study.yaml line 7", "Did you mean 'chain_sum'"]),
        ("chain_sum", {"digts": [1, 2]}, ["'digts'", "Did you mean 'digits'", "study.yaml line 7", "train_items"]),
        ("chain_sum", {"digits": [3, 1]}, ["digits must be", "[3, 1]", "study.yaml line 7"]),
        ("chain_sum", {"train_items": "many"}, ["train_items", "'many'", "integer"]),
        ("chain_sum", {"a": 1, "b": 2}, ["'a'", "; ", "'b'"]),
        ("piqa", {"source": "web"}, ["source", "'mirror' or 'hub'", "'web'"]),
        ("piqa", {"source": "hub"}, ["'hub' needs 'revision'", "40 hex"]),
        ("piqa", {"source": "hub", "revision": "main"}, ["40 hex", "'main'"]),
        ("piqa", {"revision": "a" * 40}, ["'revision' belongs to source 'hub'"]),
        ("xsum-text", {"characters": 3}, ["characters", "200"]),
        ("custom", None, ["'scorer' is required"]),
        ("custom", {"columns": {"promt": "q"}, "scorer": "numeric"}, ["promt'", "Did you mean 'prompt'", "messages"]),
        (
            "custom",
            {"path": "gone.jsonl", "columns": {"prompt": "q", "response": "a"}, "scorer": "numeric"},
            ["'gone.jsonl' does not exist", "study.yaml line 7"],
        ),
        ("lm-eval:arc_easy", None, ["unknown task"]),
    ],
)
def test_mistakes_are_one_line(name: str, config: dict[str, Any] | None, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_task(name, config, where="study.yaml line 7")
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


class _Overlapping(ChainSum):
    """A broken task: test and train are the same."""

    def items(self, split: Split) -> Sequence[Item]:
        return super().items("train" if split in get_args(Split) else split)


class _Strict(ChainSum):
    """A broken task: it judges the right answer wrong."""

    def score(self, item: Item, completion: str) -> Score:
        return Score(0.0)


class _Fragile(ChainSum):
    """A broken task: it raises on a text without a number."""

    def score(self, item: Item, completion: str) -> Score:
        return Score(float(int(completion) == int(item.answer)))


@pytest.mark.parametrize(
    ("kind", "words"), [(_Overlapping, "in train and"), (_Strict, "right answer"), (_Fragile, "invalid literal")]
)
def test_conformance_can_fail(kind: type[Task], words: str) -> None:
    small = kind.Config.model_validate({"train_items": 20, "validation_items": 20, "test_items": 20})
    assert isinstance(small, GeneratedConfig)
    with pytest.raises((AssertionError, ValueError), match=words):
        check_task(kind(small))


def test_a_missing_wheel_skips_on_a_laptop_and_fails_on_ci(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PEFT_ARENA_WHEELS", str(tmp_path / "missing"))
    absent = Wheel("none", "1", "none-1.whl", "0" * 64)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception):
        need_wheel(absent)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(UserError, match="not a directory"):
        need_wheel(absent)
