"""Malformed inputs end in one line, in bounded time and memory, and leave what was there sound."""

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.malformed_cases import CASES, Case
from tests.faults.malformed_world import World, run_command

ENTRIES = sorted({case.entry for case in CASES})
QUICK = [next(case for case in CASES if case.entry == entry) for entry in ENTRIES if entry != "report"]
"""One of each entry point, for the test command; a report's figures take seconds."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Make what the cases break, and import once what their commands need."""

    return World(tmp_path_factory.mktemp("malformed"))


def name_of(case: Case) -> str:
    return f"{case.entry}: {case.kind}".replace("/", "-")


def end(case: Case, world: World, place: Path) -> None:
    """Run a case and see how it ends."""
    ended = run_command(case.prepare(world, place), place)
    assert not ended.problem(case.codes)
    assert case.says in ended.text


def test_there_are_enough_kinds_of_each():
    kinds = Counter(case.kind for case in CASES)
    entries = Counter(case.entry for case in CASES)
    assert len(CASES) >= 250 and len(entries) >= 12
    assert min(entries.values()) >= 10, entries
    assert max(kinds.values()) <= len(CASES) / 10, kinds.most_common(3)
    assert max(Counter((case.entry, case.kind) for case in CASES).values()) <= 3


@pytest.mark.parametrize("case", QUICK, ids=name_of)
def test_one_malformed_input_of_each_entry_point(case, world, tmp_path):
    end(case, world, tmp_path)


@pytest.mark.deep
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_malformed(case, world, tmp_path):
    end(case, world, tmp_path)


@pytest.mark.deep
def test_what_was_there_is_sound(world, tmp_path):
    """Comes after the cases, which were given hard links to these files."""
    for runs in ("kept", "made"):
        ended = run_command(["check", str(world.root / runs)], tmp_path)
        assert ended.code == 0, ended.text
