"""Methods and tasks of installed plug-ins: found by metadata, loaded by name, refused in one line, part of an id."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.registry import Registry
from peft_arena.core.specs import MethodSpec, TaskSpec
from peft_arena.methods.registry import GROUP, METHODS, method_of, problem_of
from peft_arena.study.read_study import study_from
from peft_arena.tasks.registry import GROUP as TASK_GROUP
from peft_arena.tasks.registry import TASKS, task_of
from peft_arena.testing.methods import CHECKS, run_check
from peft_arena.testing.trial import Trial

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-method"
GOOD = """
from peft_arena.methods.low_rank.lora import Lora
class Mine(Lora):
    card = Lora.card.model_copy(update={"name": "mine"})
class Other(Lora):
    pass
class NoMethod:
    pass
class NoCard(Lora):
    card = "lora"
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Write the metadata of a distribution and its module where they are found, as pip does."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(
        points: dict[str, str], name: str = "foo", version: str = "1.0", group: str = GROUP, code: str = ""
    ) -> None:
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        entries = "\n".join(f"{key} = {target}" for key, target in points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{entries}\n")
        (tmp_path / f"{name}_code.py").write_text(code)
        forget()

    def forget() -> None:
        for registry in (METHODS, TASKS):
            vars(registry).pop("_plugins", None)

    yield write
    monkeypatch.undo()
    forget()
    for module in [module for module in sys.modules if module.endswith("_code")]:
        del sys.modules[module]


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plugin_is_listed_without_being_imported(install: Install) -> None:
    install({"mine": "foo_code:Mine"}, code="raise RuntimeError('imported')")
    assert "mine" in METHODS.names() and "mine" in METHODS and "mine" not in METHODS.own()
    assert METHODS.providers("mine") == ["foo 1.0"] and METHODS.plugin("mine") == "foo 1.0"
    assert METHODS.plugin("lora") is None and METHODS.get("lora").card.name == "lora"
    assert "foo_code" not in sys.modules


def test_a_plugin_is_loaded_by_name(install: Install) -> None:
    install({"mine": "foo_code:Mine [extra]"}, code=GOOD)
    assert METHODS.get("mine").card.name == "mine"


@pytest.mark.parametrize(
    ("target", "code", "reason"),
    [
        ("foo_code:Mine", "import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("foo_code:Mine", "1 / 0", "ZeroDivisionError"),
        ("foo_code:Mine", "raise SystemExit('bye')", "SystemExit: bye"),
        ("gone_code:Mine", "", "No module named 'gone_code'"),
        ("foo_code:Gone", GOOD, "has no attribute 'Gone'"),
        ("foo_code", GOOD, "not a subclass of peft_arena.methods.base.Method"),
        ("foo_code:NoMethod", GOOD, "not a subclass of peft_arena.methods.base.Method"),
        ("foo_code:NoCard", GOOD, "has no card"),
        ("foo_code:Other", GOOD, "its card says the method is called 'lora'"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(install: Install, target: str, code: str, reason: str) -> None:
    install({"mine": target}, code=code)
    said = message(lambda: METHODS.get("mine", "study.yaml line 7"))
    assert reason in said and f"entry point mine = {target} of foo 1.0" in said and "study.yaml line 7" in said


def test_no_name_has_a_silent_winner(install: Install) -> None:
    install({"mine": "foo_code:Mine", "lora": "foo_code:Other"}, code=GOOD)
    install({"mine": "bar_code:Mine"}, name="bar", version="2.1", code=GOOD)
    said = message(lambda: METHODS.get("mine"))
    assert "foo 1.0" in said and "bar 2.1" in said and "uninstall one" in said
    assert "offered by peft-arena and foo 1.0" in message(lambda: METHODS.get("lora"))
    assert METHODS.get("dora").card.name == "dora"


def test_a_refused_name_says_why_and_a_plugin_may_offer_it(install: Install) -> None:
    registry: Registry = Registry("method", {}, refused={"mine": "needs CUDA"}, group=GROUP, problem=problem_of)
    assert registry.names() == []
    said = message(lambda: registry.get("mine", "study.yaml line 7"))
    assert said == "method 'mine' is not offered: needs CUDA (in study.yaml line 7)"
    install({"mine": "foo_code:Mine"}, code=GOOD)
    registry = Registry("method", {}, refused={"mine": "needs CUDA"}, group=GROUP, problem=problem_of)
    assert registry.get("mine").card.name == "mine"


def test_unknown_names_are_compared_with_those_of_plugins(install: Install) -> None:
    install({"my_method": "foo_code:Mine"}, code=GOOD)
    assert "Did you mean 'my_method'?" in message(lambda: METHODS.get("my_metod"))


def test_the_plugin_is_part_of_an_id_and_nothing_else_changes_ids() -> None:
    ours = MethodSpec(name="lora", config={"rank": 8})
    assert "plugin" not in ours.model_dump() and ours.canonical() == '{"config":{"rank":8},"name":"lora"}'
    ids = {MethodSpec(name="lora", config={"rank": 8}, plugin=plugin).id for plugin in (None, "foo 1.0", "foo 1.1")}
    assert len(ids) == 3
    assert MethodSpec.model_validate_json(MethodSpec(name="m", plugin="foo 1.0").canonical()).plugin == "foo 1.0"
    assert TaskSpec(name="t").canonical() == '{"config":{},"name":"t","revision":"","version":1}'


def study(method: str, task: str = "micro-reverse") -> dict[str, object]:
    return {
        "name": "s",
        "title": "s",
        "model": {"name": "micro"},
        "targets": [{"task": task}],
        "train": {"schedule": {"steps": 3}, "learning_rate": 1e-3},
        "arms": [{"method": method}],
        "seeds": [0],
    }


def test_a_run_of_a_plugin_says_whose_code_it_is_and_runs_no_other(install: Install) -> None:
    install({"mine": "foo_code:Mine"}, code=GOOD)
    spec = study_from(study("mine")).arms[0].runs[0].method
    assert spec.plugin == "foo 1.0" and method_of(spec).card.name == "mine"
    said = message(lambda: method_of(spec.model_copy(update={"plugin": "foo 0.9"})))
    assert said == "method mine is from foo 1.0, and was planned with foo 0.9; plan it again"
    assert "planned with foo 1.0" in message(lambda: method_of(MethodSpec(name="lora", plugin="foo 1.0")))
    older = MethodSpec(name="mine", plugin="foo 0.9", config={"gone": 1})
    assert "planned with foo 0.9" in message(lambda: method_of(older))
    assert study_from(study("lora")).arms[0].runs[0].method.plugin is None


def test_tasks_of_plugins(install: Install) -> None:
    code = "from peft_arena.tasks.arithmetic import ChainSum\n"
    code += "class Mine(ChainSum):\n    card = ChainSum.card.model_copy(update={'name': 'my-sum'})\n"
    install({"my-sum": "foo_code:Mine", "my-other": "foo_code:Mine"}, group=TASK_GROUP, code=code)
    spec = study_from(study("lora", task="my-sum")).targets[0].task
    assert spec.plugin == "foo 1.0" and task_of(spec).card.name == "my-sum"
    said = message(lambda: task_of(spec.model_copy(update={"plugin": "foo 0.9"})))
    assert "is from foo 1.0, and was planned with foo 0.9" in said
    assert "called 'my-sum'" in message(lambda: TASKS.get("my-other"))


STUDY = """\
name: gain
title: A method of another package
model: {name: micro}
targets:
  - {task: micro-reverse, items: 8}
train: {schedule: {steps: 3}, batch_size: 4, learning_rate: 2e-2, validation_items: 4}
arms:
  - {method: output_gain}
seeds: [0]
execution: {threads: 1, latency_repeats: 2}
"""


def test_the_example_states_an_equation_that_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    kind = importlib.import_module("arena_output_gain").OutputGain
    assert run_check(Trial(kind, learning_rate=2e-2), "equation").passed


@pytest.mark.slow
def test_the_example_package_installs_conforms_and_runs(tmp_path: Path) -> None:
    package, site = tmp_path / "package", tmp_path / "site"
    shutil.copytree(EXAMPLE, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("pip", "install", "-qq", "--no-deps", "--no-build-isolation", "--no-index", "--target", site, package)
    assert "output_gain: arena-output-gain 0.1.0" in run("peft_arena", "ls", "methods")
    assert (
        json.loads(run("peft_arena", "ls", "methods", "output_gain", "--json"))["plugin"] == "arena-output-gain 0.1.0"
    )
    passed = run("pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", os.devnull, package)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", passed)}
    assert sum(counts.values()) == len(CHECKS) and counts["passed"] >= 20, passed
    (tmp_path / "gain.yaml").write_text(STUDY)
    said = json.loads(run("peft_arena", "run", "gain.yaml", "--json"))
    assert set(said["runs"].values()) == {"done"} and not said["failed"]
    spec = next(tmp_path.glob("runs/*gain*/run.json")).read_text()
    assert '"plugin": "arena-output-gain 0.1.0"' in spec
