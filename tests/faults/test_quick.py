"""A few faults of the store alone, without a model: the quick share of the injected ones."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_arena.core.errors import is_of_machine
from peft_arena.core.parts import abandoned_below, sweep
from peft_arena.store.checkpoint import verify_checkpoint, write_checkpoint
from peft_arena.store.files import append_line, read_json, read_lines, write_once

from .faulty import REFUSED, at_call, half_written, in_child, killed, killed_after, refused

WHOLE = {"value": 1}


def record(folder: Path) -> None:
    write_once(folder / "record.json", WHOLE)


def checkpoint(folder: Path) -> None:
    write_checkpoint(folder / "steps" / "000001", lambda part: (part / "weights").write_bytes(b"w" * 1000) and None)


@pytest.mark.parametrize(
    ("work", "name", "number", "act"),
    [
        (record, "fsync", 1, killed),
        (record, "link", 1, killed),
        (record, "link", 1, killed_after),
        (record, "fsync", 1, refused(errno.ENOSPC)),
        (record, "link", 1, refused(errno.EDQUOT)),
        (checkpoint, "mkdir", 2, killed_after),
        (checkpoint, "fsync", 2, killed),
        (checkpoint, "rename", 1, killed),
        (checkpoint, "rename", 1, killed_after),
        (checkpoint, "fsync", 3, refused(errno.EIO)),
        (checkpoint, "rename", 1, refused(errno.EROFS)),
    ],
)
def test_what_is_written_is_whole_or_absent(
    work: Callable[[Path], None], name: str, number: int, act: Callable[..., object], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    def disturbed() -> None:
        at_call(os, name, number, act)
        work(folder)

    ended = in_child(disturbed, tmp_path / "said")
    if act in (killed, killed_after):
        assert ended == (-signal.SIGKILL, "")
    else:
        assert ended.code == REFUSED and "nothing was written" in ended.text and len(ended.text.splitlines()) == 1
        assert not abandoned_below(folder) and not list(folder.rglob("*.part"))
    if not (folder / "record.json").exists():
        work(folder)
    sweep(folder)  # as whoever works on a run next does
    assert not list(folder.rglob("*.part"))
    if work is record:
        assert read_json(folder / "record.json") == WHOLE
    else:
        verify_checkpoint(folder / "steps" / "000001")


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    append_line(tmp_path / "log", {"line": 1})

    def disturbed() -> None:
        at_call(os, "write", 1, half_written)
        append_line(tmp_path / "log", {"line": 2})

    assert in_child(disturbed, tmp_path / "said").code == -signal.SIGKILL
    append_line(tmp_path / "log", {"line": 3})
    assert read_lines(tmp_path / "log") == [{"line": 1}, {"line": 3}]


def test_what_is_of_the_machine() -> None:
    assert is_of_machine(MemoryError()) and is_of_machine(OSError(errno.ENOSPC, "full"))
    assert not is_of_machine(FileNotFoundError(errno.ENOENT, "none")) and not is_of_machine(ValueError())
