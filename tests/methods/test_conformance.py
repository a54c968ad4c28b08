"""Every registered method passes the public conformance suite, and the suite can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_arena.methods.registry import METHODS
from peft_arena.testing.methods import check_method
from tests.methods.settings import SETTINGS


def test_no_method_is_left_out() -> None:
    assert sorted(SETTINGS) == METHODS.names()
    assert len(METHODS.names()) >= 14


@pytest.mark.parametrize("name", METHODS.names())
def test_method_does_what_its_card_says(name: str, tmp_path: Path, record_property: Callable[..., None]) -> None:
    facts = check_method(name, directory=tmp_path, **SETTINGS[name])
    assert set(facts) == {"untied", "tied", "awkward", "biased", "bfloat16"}
    for kind, found in facts.items():
        record_property(kind, str(found))
