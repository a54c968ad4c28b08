"""What safetensors files say of their tensors before any tensor is read: the one reader of their headers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.core.foreign import reading


class Place(NamedTuple):
    """Where a tensor is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    kind: str
    """Type of its entries as safetensors writes it, for example ``BF16``."""


def read_headers(files: Iterable[Path], directory: Path | None = None) -> dict[str, Place]:
    """Return every tensor of some safetensors files by name; reads no tensor.

    Args:
        files: may be in several directories.
        directory: of the model, for the message that a file is missing; None: the one the file is in.

    Raises:
        UserError: a file is missing or damaged, or two of them have a tensor of the same name.
    """
    from safetensors import safe_open

    found: dict[str, Place] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing: no weights can be read from {directory or file.parent}")
        with reading(f"{file} is damaged"), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is not a mapping
                if name in found:
                    raise UserError(f"{file} holds {name}, which {found[name].file.name} has already")
                part = opened.get_slice(name)
                found[name] = Place(file, tuple(part.get_shape()), str(part.get_dtype()))
    return found
