"""Unfinished files: written under a name of their own beside their place, locked for as long as their writer lives.

The lock is the system's (flock): it is freed when the writer ends, however it ends, so what a killed writer left can
be told from what another process is writing now, on this machine or another. Where a file system has no such locks,
nothing is taken for left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".part"
_TRIES = 100
_NAME = re.compile(r"\.(?P<whole>.+)\.[0-9a-z_]{8}\.part", re.DOTALL)


@contextlib.contextmanager
def unfinished(path: Path, *, directory: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Give a new file or directory beside a path; it is gone at the end of the block, unless it was moved away.

    What killed writers left of the same path is removed before. A process that is forked inside the block leaves it to
    this one, however it ends.

    Args:
        path: what is going to be made; the directory it is in must exist.
        directory: make a directory; else an empty file.
        mode: permissions, before the umask.

    Yields:
        ``.NAME.8 letters, digits or underscores.part`` in the same directory.

    Raises:
        OSError: it cannot be made.
    """
    for old in abandoned(path.parent, path.name):
        _remove(old)
    maker = os.getpid()
    handle, part = _made(path, directory, mode)
    try:
        yield part
    finally:
        if os.getpid() == maker:  # a forked child has a copy of this block, and ends it when it drops what it inherited
            _delete(part)
        os.close(handle)


@contextlib.contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """Give a directory of one's own among the system's temporary files, gone at the end of the block.

    Those of killed processes are removed before.

    Args:
        kind: what for, one word; part of the name.

    Raises:
        OSError: it cannot be made.
    """
    with unfinished(Path(tempfile.gettempdir()) / f"peft-arena-{kind}", directory=True, mode=0o700) as folder:
        yield folder


def is_unfinished(name: str) -> bool:
    """Say whether a name is one that :func:`unfinished` gives."""
    return _NAME.fullmatch(name) is not None


def abandoned(folder: Path, name: str | None = None) -> list[Path]:
    """Return the unfinished files and directories in a directory whose writer is gone, sorted; removes nothing.

    Args:
        folder: where to look, not below it; one that cannot be read holds nothing.
        name: only what was to become this; None for all.
    """
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []
    found = [(one, _NAME.fullmatch(one)) for one in sorted(names) if one.endswith(SUFFIX)]
    fitting = [folder / one for one, match in found if match and name in (None, match["whole"])]
    return [part for part in fitting if _is_free(part)]


def abandoned_below(folder: Path) -> list[Path]:
    """Return the same of a directory and all below it, sorted."""
    found = []
    for place, folders, _ in os.walk(folder):
        found += abandoned(Path(place))
        folders[:] = sorted(name for name in folders if not name.endswith(SUFFIX))
    return sorted(found)


def sweep(folder: Path) -> list[Path]:
    """Remove what killed writers left in a directory and all below it; return what was removed."""
    return [part for part in abandoned_below(folder) if _remove(part)]


def _made(path: Path, directory: bool, mode: int) -> tuple[int, Path]:
    """Make and lock; once more where a sweeping process was between the two."""
    for _ in range(_TRIES):
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{SUFFIX}")
        if directory:
            part.mkdir(mode=mode)
            try:
                handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
        else:
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode & 0o666)
        with contextlib.suppress(OSError):  # no such locks here: then nobody takes the part for left either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _is_same(handle, part):
            return handle, part
        os.close(handle)
    raise OSError(f"cannot keep an unfinished file beside {path}: it is removed again and again")


def _is_free(part: Path) -> bool:
    with _taken(part) as free:
        return free


def _remove(part: Path) -> bool:
    with _taken(part) as free:
        if free:
            _delete(part)
        return free


@contextlib.contextmanager
def _taken(part: Path) -> Iterator[bool]:
    """Take the lock of a part and say whether that could be done: nobody writes it."""
    try:
        handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is_same(handle, part)
        except OSError:
            free = False
        yield free
    finally:
        os.close(handle)


def _is_same(handle: int, part: Path) -> bool:
    """Say whether what is open still has the name."""
    try:
        return os.path.samestat(os.fstat(handle), part.lstat())
    except OSError:
        return False


def _delete(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
