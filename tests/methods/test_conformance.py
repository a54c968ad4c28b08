"""Every registered method passes the public conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_arena.methods.adapter import ADAPTER, PeftMethod
from peft_arena.methods.base import Capability
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.testing.methods import check_method, tiny_model
from tests.methods.settings import SETTINGS
from tests.tiers import deep_but, one_of_each_family

pytestmark = pytest.mark.spread


def test_no_method_is_left_out() -> None:
    assert sorted(SETTINGS) == METHODS.own()
    assert len(METHODS.own()) >= 80


def test_no_method_is_both_offered_and_refused() -> None:
    assert not set(METHODS.own()) & set(METHODS.refused)
    assert all(reason and "\n" not in reason for reason in METHODS.refused.values())


def test_every_method_type_of_peft_has_a_method() -> None:
    from peft import PeftType

    configured = {**{name: SETTINGS[name].get("config", {}) for name in METHODS.own()}, "lily": {"routing": "batch"}}
    methods = [make_method(name, config) for name, config in configured.items()]
    found = {method.peft_config(["q_proj"], 0).peft_type for method in methods if isinstance(method, PeftMethod)}
    mixture: Any = make_method("xlora", configured["xlora"]).attach(tiny_model(), seed=0).model
    assert set(PeftType) - found == {mixture.peft_config[ADAPTER].peft_type}  # its layers are configured as LoRA


@pytest.mark.parametrize("name", deep_but(METHODS.own(), one_of_each_family()))
def test_method_does_what_its_card_says(name: str, tmp_path: Path, record_property: Callable[..., None]) -> None:
    facts = check_method(name, directory=tmp_path, **SETTINGS[name]).models
    plain = Capability.NEEDS_QUANTIZED_BASE not in METHODS.get(name).card.capabilities
    assert set(facts) == ({"untied", "tied", "awkward", "biased", "bfloat16"} if plain else set())
    for kind, found in facts.items():
        record_property(kind, str(found))
