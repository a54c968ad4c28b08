"""Unfinished files go with their writer, and what another process writes is left alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from peft_arena.core.parts import abandoned, abandoned_below, scratch, sweep, unfinished

WRITER = """
import sys, time
from pathlib import Path
from peft_arena.core.parts import unfinished
with unfinished(Path(sys.argv[1]), directory=sys.argv[2] == "directory") as part:
    (part / "file" if part.is_dir() else part).write_text("half")
    print(part, flush=True)
    time.sleep(100)
"""


def writer(path: Path, kind: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, path, kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_killed_writer_left_is_removed_and_what_is_being_written_is_not(kind: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "steps").mkdir(parents=True)
    path = tmp_path / "run" / "steps" / "made.json"
    process, part = writer(path, kind)
    try:
        assert part.exists() and part.parent == path.parent
        assert abandoned_below(tmp_path) == [] and sweep(tmp_path) == [] and part.exists()
        with unfinished(path):
            assert part.exists(), "of the same path, and its writer lives"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert abandoned_below(tmp_path) == [part]
    assert abandoned(path.parent, "other.json") == []
    assert sweep(tmp_path) == [part] and not part.exists()


def test_the_next_writer_of_a_path_removes_what_was_left_of_it(tmp_path: Path) -> None:
    process, part = writer(tmp_path / "made", "directory")
    process.kill()
    process.wait()
    with unfinished(tmp_path / "other"):
        assert part.exists()
    with unfinished(tmp_path / "made"):
        assert not part.exists()
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_no_parts(tmp_path: Path) -> None:
    names = [".made.part", "made.12345678.part", ".made.12345678.partial", ".12345678.part", "film.part"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".link.12345678.part").symlink_to(tmp_path / "film.part")
    assert sweep(tmp_path) == [] and len(list(tmp_path.iterdir())) == len(names) + 1


def test_a_part_is_gone_or_was_moved(tmp_path: Path) -> None:
    with unfinished(tmp_path / "made", directory=True) as part:
        (part / "file").touch()
        part.rename(tmp_path / "made")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "file"]
    with pytest.raises(KeyError), unfinished(tmp_path / "lost"):
        raise KeyError
    assert len(list(tmp_path.iterdir())) == 1


def test_temporary_directories_are_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch("kind") as one, scratch("kind") as other:
        assert one != other and one.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


def test_what_a_forked_child_drops_stays_the_parents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = ExitStack()
    folder = kept.enter_context(scratch("kind"))
    Finalize(None, kept.close, exitpriority=0)  # children of multiprocessing drop such, and with them the block's copy
    del kept
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    assert child.exitcode == 0 and folder.is_dir() and abandoned(tmp_path) == []
