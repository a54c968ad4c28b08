"""Every registered method passes the public conformance suite, and the suite can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_arena.methods.registry import METHODS
from peft_arena.testing.methods import check_method

SETTINGS: dict[str, dict[str, Any]] = {
    "bitfit": {"learning_rate": 2e-2},
    "dora": {},
    "full": {"learning_rate": 2e-3},
    "ia3": {"learning_rate": 2e-2},
    "ln_tuning": {"learning_rate": 2e-2},
    "lora": {},
    "lora_plus": {"learning_rate": 1e-3},
    "miss": {},
    "none": {},
    "oft": {"config": {"block_size": 8}, "awkward": {"block_size": 4}},
    "pissa": {},
    "prompt_tuning": {"config": {"num_virtual_tokens": 6}, "learning_rate": 5e-2},
    "rslora": {},
    "vera": {"config": {"rank": 8}, "learning_rate": 3e-2},
}


def test_no_method_is_left_out() -> None:
    assert sorted(SETTINGS) == METHODS.names()
    assert len(METHODS.names()) >= 14


@pytest.mark.parametrize("name", METHODS.names())
def test_method_does_what_its_card_says(name: str, tmp_path: Path, record_property: Callable[..., None]) -> None:
    facts = check_method(name, directory=tmp_path, **SETTINGS[name])
    assert set(facts) == {"untied", "tied", "awkward", "biased", "bfloat16"}
    for kind, found in facts.items():
        record_property(kind, str(found))
