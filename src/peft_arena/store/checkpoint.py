"""Checkpoints on disk: a directory that is whole, verified by hashes, or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from peft_arena.core.bounded import MIB, read_text
from peft_arena.core.errors import UserError, first_line
from peft_arena.core.ids import file_hash
from peft_arena.core.parts import unfinished
from peft_arena.core.text import shown

DONE = "DONE"
HASHES = "SHA256"
REMEDY = "move the directory of the run or model it belongs to away to have it made anew"


def write_checkpoint(path: Path, save: Callable[[Path], None]) -> None:
    """Write a checkpoint directory with its hashes; it appears under its name only when it is whole.

    Args:
        path: the directory to create; if a sound one exists, nothing is done, and a damaged one is replaced.
        save: writes the files into the directory it is given.

    Raises:
        UserError: the disk refused the write; nothing is left behind.
    """
    if is_sound(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path, directory=True) as part:
            save(part)
            lines = [f"{file_hash(file)}  {file.relative_to(part)}" for file in _files(part)]
            (part / HASHES).write_text("\n".join(lines) + "\n", encoding="utf-8")
            (part / DONE).write_text("", encoding="utf-8")
            for file in _files(part):
                sync(file)
            if path.exists():
                shutil.rmtree(path)
            part.rename(path)
    except OSError as error:
        raise UserError(f"cannot write checkpoint {path}: {error.strerror or error}; nothing was written") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # how safetensors, not imported here, reports a full disk
            raise
        raise UserError(f"cannot write checkpoint {path}: {first_line(error)}; nothing was written") from error


def verify_checkpoint(path: Path) -> None:
    """Check that a checkpoint is whole and that every file has the hash it was written with.

    Raises:
        UserError: missing, unfinished, a file is missing or its content changed.
    """
    if not path.is_dir():
        raise UserError(f"no checkpoint {path}; {REMEDY}")
    if not (path / DONE).exists():
        raise UserError(f"checkpoint {path} is unfinished: it has no {DONE} file; {REMEDY}")
    if not (path / HASHES).exists():
        raise UserError(f"checkpoint {path} is damaged: {HASHES} is missing; {REMEDY}")
    for line in read_text(path / HASHES, MIB).splitlines():
        expected, _, name = line.partition("  ")
        file = path / name
        if not name or path.resolve() not in (path / name).resolve().parents:
            raise UserError(f"checkpoint {path} is damaged: {HASHES} names '{shown(name)}', no file of it; {REMEDY}")
        if not file.exists():
            raise UserError(f"checkpoint {path} is damaged: {name} is missing; {REMEDY}")
        found = file_hash(file)
        if found != expected:
            raise UserError(
                f"checkpoint {path} is damaged: {name} has sha256 {found[:12]}, expected {expected[:12]}; {REMEDY}"
            )


def is_sound(path: Path) -> bool:
    """Say whether a checkpoint is there, whole and unchanged."""
    try:
        verify_checkpoint(path)
    except UserError:
        return False
    return True


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file())


def sync(file: Path) -> None:
    """Wait until what was written to a file is on the disk.

    Raises:
        OSError: the disk refused it.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
