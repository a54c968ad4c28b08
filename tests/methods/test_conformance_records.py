"""The shipped records of the conformance suite are there for every method, are of this suite, and are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_arena.core.errors import UserError
from peft_arena.methods.pages import method_page
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.store.conformance import PACKAGED, SUITE, conformance_of, read_conformance, shipped_conformance
from peft_arena.testing.methods import CHECKS
from tests.methods.settings import SETTINGS

NAMES = METHODS.own()


def test_every_shipped_method_has_a_record_and_no_other() -> None:
    assert sorted(shipped_conformance()) == sorted(NAMES), "run `make conformance`"


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_of_this_suite_and_these_settings(name: str) -> None:
    record = conformance_of(name)
    assert record is not None and record.name == METHODS.get(name).card.name
    assert record.suite == SUITE, "run `make conformance`"
    said = {*record.passed, *record.known_failures, *(place.partition(" on ")[0] for place in record.not_tested)}
    assert said == set(CHECKS), "run `make conformance`"
    assert dict(record.known_failures) == dict(METHODS.get(name).card.known_failures)
    assert record.config == make_method(name, SETTINGS[name].get("config")).config.model_dump(mode="json")


def test_the_equation_was_tried_exactly_where_a_card_states_one() -> None:
    stated = {name for name in NAMES if METHODS.get(name).card.equation}
    tried = {name for name, record in shipped_conformance().items() if "equation" in record.passed}
    assert stated == tried and len(stated) >= 20


def test_a_page_says_what_was_tried_and_what_was_not() -> None:
    page = method_page("prompt_tuning", METHODS.get("prompt_tuning")).partition("## What was tried")[2]
    assert f"version {SUITE}" in page and "`equation`: the card states no equation" in page
    assert "transformers " in page and "GPUs" in page


def test_a_method_without_a_record_has_none() -> None:
    assert conformance_of("somebody-elses") is None


def test_a_damaged_file_of_records_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "conformance.json"
    file.write_text(PACKAGED[1].read_text(encoding="utf-8").replace('"suite": ', '"suit": ', 1), encoding="utf-8")
    with pytest.raises(UserError, match="not a file of conformance records") as raised:
        read_conformance(file)
    assert "\n" not in str(raised.value)
