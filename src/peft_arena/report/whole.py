"""A report directory that is written whole or not at all, and loses no file that no report wrote.

A report is written beside its place and takes it in one step (``renameat2`` with ``RENAME_EXCHANGE``, Linux). A list of
its files, with their hashes, lies in it: what an earlier report wrote and this one does not is gone afterwards, and
everything else in the directory is taken along. Where the step cannot be had (another system, a mount point, the
working directory), the files are replaced one by one, each whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_arena.core.ids import file_hash
from peft_arena.core.parts import SUFFIX, unfinished

WRITTEN = ".written.json"
"""The list of a report's files: relative name to SHA-256."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def written_whole(out: Path, *, swap: bool = True) -> Iterator[Path]:
    """Give a directory to write a report into; if the block ends well it becomes the report, else nothing changed.

    Args:
        out: of the report; made if it does not exist.
        swap: let it take the place of the directory in one step; else its files replace those there one by one, as is
            right for a directory that others work in.

    Yields:
        A directory beside or in it.

    Raises:
        OSError: the disk refused something.
    """
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = not out.exists() or (swap and out.is_dir() and _can_swap(out))
    if not beside:
        out.mkdir(exist_ok=True)  # one that is a file is refused here
    with unfinished(out if beside else out / "report", directory=True) as part:
        yield part
        written = {name: file_hash(part / name) for name in _files(part)}
        _write_list(part, written)
        if not out.exists():
            part.rename(out)
        elif not (beside and _swapped(part, out, written)):
            _replace(part, out, written)


def _can_swap(out: Path) -> bool:
    """Say whether a directory may get another identity: it is no mount point, nor where this process works."""
    here = Path.cwd()
    return os.access(out.parent, os.W_OK | os.X_OK) and not out.is_mount() and out != here and out not in here.parents


def _swapped(part: Path, out: Path, written: dict[str, str]) -> bool:
    """Take along what no report wrote and exchange the two directories; say whether that could be done."""
    try:
        shutil.copymode(out, part)
        for name in _foreign(out, written):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(out / name, part / name, follow_symlinks=False)
        _exchange(part, out)
    except OSError:
        return False
    for name in _foreign(part, written):  # came between the two steps
        if not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).rename(out / name)
    return True


def _exchange(one: Path, other: Path) -> None:
    """Exchange two directories in one step.

    Raises:
        OSError: this system or file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError("no renameat2 here")
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _replace(part: Path, out: Path, written: dict[str, str]) -> None:
    """Put the files in place one by one, then remove what only an earlier report wrote."""
    before = _list(out)
    foreign = set(_foreign(out, written))
    _write_list(out, {**before, **written})  # killed in between: the next report still knows all of them
    for name in written:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).replace(out / name)
    for name in before.keys() - written.keys() - foreign:
        (out / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            (out / name).parent.rmdir()
    _write_list(out, written)


def _foreign(out: Path, written: dict[str, str]) -> list[str]:
    """Return the files of a directory that no report wrote, or that were changed since, but for those just written."""
    known = _list(out)
    names = [name for name in _files(out) if name not in written]
    return [name for name in names if name not in known or file_hash(out / name) != known[name]]


def _files(folder: Path) -> list[str]:
    """Return the files below a directory by their relative names, without the list and what is unfinished."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.endswith(SUFFIX)]
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [str((Path(place) / name).relative_to(folder)) for name in (*names, *links)]
    return sorted(name for name in found if name != WRITTEN and not name.endswith(SUFFIX))


def _list(out: Path) -> dict[str, str]:
    """Return what an earlier report says that it wrote; nothing where there is no such list that can be read."""
    try:
        found: Any = json.loads((out / WRITTEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(name): str(value) for name, value in found.items() if ".." not in Path(name).parts}


def _write_list(out: Path, written: dict[str, str]) -> None:
    with unfinished(out / WRITTEN) as part:
        part.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        part.replace(out / WRITTEN)
