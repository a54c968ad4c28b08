"""Writing safetensors files tensor by tensor, and directories that are whole or absent.

The safetensors library needs all tensors of a file in memory at once (``serialize_file`` of 0.8.0 takes their
addresses). Here the header goes first, since names, types and shapes are known before any value is, and the values
follow one tensor at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from peft_arena.core.ending import ended_by_signals
from peft_arena.core.errors import UserError
from peft_arena.core.parts import is_unfinished, unfinished
from peft_arena.models.stored import INDEX, SINGLE

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Name of each type in a safetensors header."""
ALIGNED = 8
"""The values begin at a multiple of so many bytes."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SPARE = 2**20
"""Bytes that are to be free beyond those of the weights, for the small files beside them."""
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only writing has."""


class Entry(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


Parts = Callable[[Entry], Iterable[Tensor]]
"""Returns the values of a tensor, as one tensor or as several that follow each other in its flattened order."""


def read_size(text: str) -> int:
    """Return a number of bytes: ``5GB``, ``500MB``, ``2GiB``, or plain digits.

    Raises:
        UserError: it is none, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = 1 if found is None or not found[2] else UNITS.get(found[2].upper(), 0)
    size = int(float(found[1]) * unit) if found is not None else 0
    if size < 1:
        raise UserError(f"a shard size is a number of bytes such as 5GB, 500MB or 2GiB, got '{text}'")
    return size


def write_tensors(file: Path, entries: Sequence[Entry], parts: Parts) -> None:
    """Write one safetensors file; only one part of one tensor is in memory at a time.

    Args:
        file: written anew.
        entries: in any order; wide types go first in the file, so that each tensor is aligned to its type.
        parts: gives the values.

    Raises:
        OSError: the disk refused the write.
        ValueError: a tensor's parts have another type or another number of values than its entry says.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        places = [offset, offset + entry.size]
        table[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": places}
        offset += entry.size
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNED)
    with file.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little"))
        handle.write(header)
        for entry in ordered:
            _write(handle, entry, parts)
        handle.flush()
        os.fsync(handle.fileno())


def _write(handle: BinaryIO, entry: Entry, parts: Parts) -> None:
    written = 0
    for part in parts(entry):
        if part.dtype != entry.dtype:
            raise ValueError(f"{entry.name} is announced as {entry.dtype} and comes as {part.dtype}")
        written += handle.write(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if written != entry.size:
        raise ValueError(f"{entry.name} is announced with {entry.size} bytes and comes with {written}")


def plan_shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Divide tensors, in their order, into files of at most so many bytes of values; a larger one is alone in its."""
    shards: list[list[Entry]] = []
    held = limit
    for entry in entries:
        if held + entry.size > limit or not shards:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.size
    return shards


def write_model(directory: Path, entries: Sequence[Entry], parts: Parts, limit: int) -> list[Path]:
    """Write the weights of a model directory, with the index that transformers reads where there are several files.

    Args:
        directory: exists.
        entries: in the order in which their values are to be asked for.
        parts: gives the values.
        limit: most bytes of values in one file.

    Returns:
        The safetensors files.

    Raises:
        OSError: the disk refused the write.
    """
    shards = plan_shards(entries, limit)
    if len(shards) == 1:
        write_tensors(directory / SINGLE, entries, parts)
        return [directory / SINGLE]
    files = []
    for number, shard in enumerate(shards, 1):
        files.append(directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        write_tensors(files[-1], shard, parts)
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(entry.shape) for entry in entries),
            "total_size": sum(entry.size for entry in entries),
        },
        "weight_map": {
            entry.name: file.name for file, shard in zip(files, shards, strict=True) for entry in shard
        },
    }  # fmt: skip
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


@contextmanager
def new_directory(out: Path, needed: int = 0, source: Path | None = None) -> Iterator[Path]:
    """Give a directory to write into, which becomes another if the block ends well and is gone if it does not.

    So too where the process is told to end (SIGTERM, SIGHUP).

    Args:
        out: the directory to make; it may exist if it is empty.
        needed: bytes that are going to be written.
        source: what errors name instead of the directory that is written into; None: the directory to make.

    Yields:
        A directory beside it.

    Raises:
        UserError: it exists and is not empty, is inside a run, there is not enough room, or the disk refused a write.
    """
    out = out.expanduser().absolute()
    refuse_taken(out)
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    part, done = out, False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed + SPARE:
            raise UserError(
                f"not enough room for {out}: {(needed + SPARE) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
                "nothing was written"
            )
        with ended_by_signals(), unfinished(out, directory=True) as part:
            yield part
            part.rename(out)
            done = True
    except SafetensorError as error:
        raise UserError(f"cannot write {out}: {error}; nothing was written") from error
    except OSError as error:
        reason = f"{error.strerror or error}; nothing was written"
        if error.errno not in REFUSED and _elsewhere(error, out.parent):
            raise UserError(f"cannot read {error.filename}: {reason}") from error
        raise UserError(f"cannot write {out}: {reason}") from error
    except UserError as error:
        if str(part) not in str(error):
            raise
        raise UserError(str(error).replace(str(part), str(source or out))) from error
    finally:
        if not done:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _elsewhere(error: OSError, folder: Path) -> bool:
    """Say whether an error names a file that is not in a folder that is written into, nor one above it."""
    if not isinstance(error.filename, str):
        return False
    place = Path(error.filename).absolute()
    inside = any(map(is_unfinished, place.parts))
    return not inside and place != folder and place not in folder.parents


def refuse_taken(out: Path) -> None:
    """Check that a directory can be made without replacing anything or joining the files of a run.

    Raises:
        UserError: it exists and is not an empty directory, or it is inside a run.
    """
    out = out.expanduser()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} exists and is not a directory; nothing is replaced, choose another one")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; nothing is replaced, choose another one")
    place = out.resolve()
    run = next((folder for folder in (place, *place.parents) if (folder / "run.json").is_file()), None)
    if run is not None:
        raise UserError(f"--out {out} is inside the run {run.name}, which keeps its own files; choose another one")
