"""The section ``pscp`` of a study file: constants for reports, and no part of any run."""

import pytest
import yaml

from peft_arena.core.errors import UserError
from peft_arena.cost.pscp import Operations, PscpChoice
from peft_arena.study.read_study import read_study, study_from
from peft_arena.study.study_view import view_of
from tests.running import TINY


def test_constants_reach_the_analysis_and_no_run(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{TINY}pscp: {{parameters: 5e7, flops: 10e12, beta_memory: 2, operations: total}}\n")
    study, plain = read_study(path), study_from(yaml.safe_load(TINY))
    choice = view_of(study).pscp
    assert (choice.constants.parameters, choice.constants.flops, choice.constants.beta_memory) == (5e7, 1e13, 2.0)
    assert (choice.constants.memory, choice.operations) == (94e9, Operations.TOTAL)
    assert [run.id for run in study.runs()] == [run.id for run in plain.runs()]
    assert view_of(plain).pscp is None
    assert view_of(study_from(yaml.safe_load(TINY) | {"pscp": {}})).pscp == PscpChoice()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"memory": 0}, "memory"),
        ({"beta_flops": -1}, "beta_flops"),
        ({"operations": "both"}, "operations"),
        ({"parameter": 1}, "parameter"),
    ],
)
def test_wrong_constants_are_refused(entry, message):
    with pytest.raises(UserError, match=message):
        study_from(yaml.safe_load(TINY) | {"pscp": entry})
