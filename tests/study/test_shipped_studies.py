"""Every shipped study is read, planned and estimated in this process without network, and its counts are packaged."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from peft_arena.cli import console
from peft_arena.cost import counts
from peft_arena.models.load import config_at_hand
from peft_arena.store.store import Store
from peft_arena.study.model import Study
from peft_arena.study.read_study import read_study, shipped_studies
from peft_arena.study.study_cost import estimate
from peft_arena.study.study_view import view_of
from peft_arena.work.plan import plan

STUDIES = shipped_studies()
SIZED = [name for name, path in STUDIES.items() if "\nbudget:" in path.read_text()]
BIG = {name: path for name, path in STUDIES.items() if name.startswith(("peft-", "metamathqa"))}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("peft_arena.models.wheels.converted", refuse)


@pytest.fixture(scope="module")
def read() -> dict[str, Study]:
    return {}


def study(name: str, read: dict[str, Study]) -> Study:
    if name not in read:
        read[name] = read_study(STUDIES[name])
    return read[name]


def test_studies_were_found() -> None:
    assert len(STUDIES) >= 6, "no study files found: is the search path right?"


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_plans_without_network(
    name: str, read: dict[str, Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = study(name, read)
    plans = plan(found, Store(tmp_path))
    assert {item.state for item in plans} <= {"missing", "refused"}
    estimates = estimate(found)
    assert not estimates.note, f"{estimates.note}: add its shapes to peft_arena.models.known"
    arms = [arm for arm in found.arms if not arm.refused]
    assert [(one.label, one.target) for one in estimates.arms[1:]] == [(a.label, a.target.task.id) for a in arms]
    console.show_plan(found, plans, False, estimates)
    shown = capsys.readouterr().out
    assert "GPU hours" in shown and shown.count("\n") < 4 * len(found.file.arms) + 80, "a line for each arm"
    console.show_plan(found, plans, True, estimates)
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert len(said["runs"]) == len(plans)
    assert len(said["estimates"]["arms"]) == len(arms) + 1
    assert said["estimates"]["totals"]["runs"] == sum(item.state != "refused" for item in plans)


@pytest.mark.parametrize("name", STUDIES)
def test_counts_of_shipped_studies_are_packaged(name: str, read: dict[str, Study]) -> None:
    """So that a first plan needs no torch; a count that cannot be made is one whose reason the plan tells."""
    found = study(name, read)
    config = config_at_hand(found.base.model)
    assert config is not None
    packaged = json.loads(counts.PACKAGED.read_text())
    for arm in found.arms:
        if not arm.refused:
            counted = counts.count(found.base.model, arm.runs[0].method).trained
            kept = packaged.get(counts.count_key(config, arm.runs[0].method))
            assert kept == counted, f"{arm.label}: run python benchmarks/counts.py"


@pytest.mark.parametrize("name", SIZED)
def test_packaged_sizes_are_what_budgets_come_to(
    name: str, read: dict[str, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = study(name, read)
    assert any(arm.spent for arm in found.arms)
    monkeypatch.setattr(counts, "_packaged", dict)
    fresh = read_study(STUDIES[name])
    assert {a.label: (a.spent, a.runs) for a in fresh.arms} == {a.label: (a.spent, a.runs) for a in found.arms}
    monkeypatch.undo()

    def refuse(*_: object) -> None:
        raise AssertionError("sized on the model: run python benchmarks/counts.py")

    monkeypatch.setattr("peft_arena.methods.size_to_budget.fit", refuse)
    assert len(read_study(STUDIES[name]).arms) == len(found.arms)


@pytest.mark.parametrize("name", BIG)
def test_studies_for_gpus_are_estimated_whole(name: str, read: dict[str, Study]) -> None:
    """Every run of them has operations, memory and hours: what a plan is for."""
    found = estimate(study(name, read))
    unknown = [one.label for one in found.arms[1:] if one.hours is None or one.peak is None]
    assert unknown == []


@pytest.mark.parametrize("name", ["peft-bench-llama-3-8b", "metamathqa-llama-3.2-3b"])
def test_arms_train_as_many_parameters_as_was_published(name: str, read: dict[str, Study]) -> None:
    """The settings of a study are those of the runs whose numbers stand beside its own."""
    found = study(name, read)
    config = config_at_hand(found.base.model)
    packaged = json.loads(counts.PACKAGED.read_text())
    ours: dict[str, set[int]] = {}
    for arm in found.arms:
        count = packaged[counts.count_key(config, arm.runs[0].method)]
        ours.setdefault(arm.label, set()).add(count)
        ours.setdefault(arm.method, set()).add(count)
    column = "trainable_parameters"
    (table,) = [table for table in view_of(found).published if any(one.name == column for one in table.columns)]
    compared = 0
    for row in table.rows:
        mine = ours.get(row.label) or (ours.get(row.method) if row.method and name.startswith("peft-bench") else None)
        if mine and row.values[column] is not None:
            assert mine == {row.values[column]}, row.label
            compared += 1
    assert compared >= (7 if name.startswith("peft-bench") else 50)
