"""Methods go the whole way on the micro model: planned, trained, saved, evaluated, costed, reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peft_arena.methods.base import Capability, has_weights
from peft_arena.methods.registry import BASE, METHODS
from peft_arena.report.build import build_report
from peft_arena.store.store import Store
from peft_arena.study.model import Study
from peft_arena.study.read_study import find_study, read_study
from peft_arena.study.study_view import view_of
from peft_arena.work.run_study import run_study
from tests.tiers import one_of_each_family

SHORT = (
    "train.schedule.steps=20",
    "train.examples=80",
    "train.batch_size=4",
    "train.validation_items=4",
    'targets=[{"task": "micro-reverse", "items": 4}]',
    'retention=[{"task": "micro-compare", "items": 4}]',
    "geometry.prompts=4",
    "seeds=[0]",
    "execution.jobs=2",
    "execution.threads=1",
    "execution.latency_repeats=2",
)
NEEDS_MORE = {"qalora": "a quantised base model"}
"""Methods that no model of the arena can be given to, with what they need."""


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(find_study("all-methods"), SHORT)


def test_the_study_has_every_method_there_is(study: Study) -> None:
    known = {name for name in METHODS.names() if METHODS.plugin(name) is None} - {BASE}
    assert {arm.method for arm in study.arms} == known
    refused = {arm.method: arm.refused for arm in study.arms if arm.refused}
    assert sorted(refused) == sorted(NEEDS_MORE)
    for name, reason in refused.items():
        assert NEEDS_MORE[name].split()[-2] in reason
    assert len(study.arms) - len(refused) >= 60


def test_most_arms_meet_the_budget_and_none_silently_misses_it(study: Study) -> None:
    spent = [arm.spent for arm in study.arms if arm.spent is not None]
    near = [one for one in spent if abs(one.count / one.wanted - 1) <= 0.05]
    assert len(spent) >= 55 and len(near) >= 40
    for one in spent:
        assert ("nearest" in str(one)) == (abs(one.count / one.wanted - 1) > 0.05)


@pytest.mark.parametrize("deep", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_methods_go_the_whole_way(deep: bool, study: Study, tmp_path: Path) -> None:
    """The test command takes one of each family, the deep tier all others."""
    few = set(one_of_each_family())
    study = replace(study, arms=tuple(arm for arm in study.arms if (arm.method in few) != deep))
    assert len(study.arms) >= 12
    outcome = run_study(study, tmp_path / "runs", quiet=True)
    assert outcome.failed == {}
    assert outcome.complete
    store = Store(tmp_path / "runs")
    for arm in study.arms:
        if arm.refused:
            continue
        run = store.run(arm.runs[0])
        cost = run.cost("training")
        assert cost is not None and len(list(run.evaluations())) == 2, arm.label
        counted = {measure.metric: measure.value for measure in cost.measures}
        if arm.spent is not None:
            assert counted["trained_parameters"] == arm.spent.count, arm.label
        calibrates = Capability.NEEDS_CALIBRATION in METHODS.get(arm.method).card.capabilities
        assert counted["attach_time"] is not None or not calibrates
        measured = {record.what for record, _ in run.geometries()}
        wanted = {"spectra", "drift", "activations"} if has_weights(METHODS.get(arm.method).card) else {"activations"}
        assert measured == wanted, arm.label
    summary = build_report(store, view_of(study), tmp_path / "report", draws=50)
    assert summary["headline"]
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert all(arm.label in page for arm in study.arms)
