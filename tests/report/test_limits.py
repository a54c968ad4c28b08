"""What a report says of answers that met the limit of new tokens: only what its numbers carry."""

from dataclasses import replace

import pytest

from peft_arena.analyze.limits import AtLimit, at_limit
from peft_arena.analyze.study import analyze_study
from peft_arena.report.headline import caveats
from peft_arena.report.limits import limit_caveats, limit_small, limit_title
from peft_arena.report.page_tables import main_table
from peft_arena.store.records import Written
from tests.analyze.synthetic import Truth, build_synthetic


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    study = build_synthetic(tmp_path_factory.mktemp("limits"), [Truth("one"), Truth("two")], items=30, corpus=False)
    return analyze_study(study.store, study.view, draws=50)


def with_shares(result, base, tuned, key=None):
    """Return the result with so many of 100 answers at the limit, of the base model and of each arm."""
    (target,) = result.targets
    key = key or target.spec.id
    limits = replace(
        target.limits,
        base={} if base is None else {key: AtLimit(base, 100, 64)},
        arms={label: {key: AtLimit(met, 100, 64)} for label, met in tuned.items()},
    )
    card = {**target.task.card, "kind": "generate"}
    return replace(result, targets=(replace(target, limits=limits, task=replace(target.task, card=card)),))


def test_records_without_it_say_not_recorded(found):
    (target,) = with_shares(found, None, {}).targets
    assert limit_title(target, "one", target.task) == "answers that met the limit of new tokens: not recorded"
    assert limit_small(target, "one") == "" and limit_caveats(found) == []


def test_a_large_share_of_the_base_models_answers_is_said_at_the_top(found):
    result = with_shares(found, 62, {"one": 3, "two": 10})
    (said,) = limit_caveats(result)
    assert said.startswith("62 % of the base model's answers on operator met the limit of 64 tokens; of the tuned")
    assert "one 3 % and two 10 %" in said and said in caveats(result)
    assert "at the limit 62 % → 3 %" in main_table(result.targets[0])


def test_a_large_share_of_an_arm_alone_names_that_arm(found):
    (said,) = limit_caveats(with_shares(found, 5, {"one": 3, "two": 40}))
    assert "two 40 %" in said and "one" not in said.partition(": ")[2]


@pytest.mark.parametrize(("base", "tuned"), [(10, 10), (0, 0), (None, 5)])
def test_small_shares_are_only_in_the_table(found, base, tuned):
    assert limit_caveats(with_shares(found, base, {"one": tuned})) == []


def test_retention_is_named_only_where_the_share_changed(found):
    key = found.view.retention[0].id
    assert limit_caveats(with_shares(found, 90, {"one": 95}, key)) == []
    (said,) = limit_caveats(with_shares(found, 90, {"one": 20, "two": 85}, key))
    assert "90 % of the base model's, one 20 %" in said and "two" not in said


def test_runs_of_an_arm_are_added_up_and_one_without_a_record_takes_them_all(found):
    record = found.evidence.base.evaluations[found.targets[0].spec.id]
    one, two = (
        record.model_copy(update={"written": Written(answers=10, met_limit=met, limit=limit)})
        for met, limit in ((2, 8), (4, 16))
    )
    assert at_limit([one, one]) == AtLimit(4, 20, 8)
    assert at_limit([one, two]) == AtLimit(6, 20, None)
    assert at_limit([one, record]) is None and at_limit([]) is None
    assert at_limit([one]).text == "2 of 10 (8 tokens)"
