"""Tensors in safetensors files, read one at a time by memory map."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_arena.core.errors import UserError
from peft_arena.models.headers import Place, read_headers
from peft_arena.models.stored import INDEX, named_files, weight_paths

KEPT_OPEN = 2**25
"""Files of at most so many bytes stay open: an adapter of hundreds of small tensors is read several times faster."""


class TensorFiles:
    """Tensors by name over one or several safetensors files.

    A large file is opened for each tensor and closed again, so that pages of the map go when the tensor does.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Read the headers of the files; no tensor is read.

        Raises:
            UserError: a file is missing or damaged, or two of them have a tensor of the same name.
        """
        self.files = files
        self.places: dict[str, Place] = read_headers(files)
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        """Say whether there is a tensor of that name."""
        return name in self.places

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: place.shape for name, place in self.places.items()}

    def without(self, names: frozenset[str]) -> TensorFiles:
        """Return the same files without some of their tensors."""
        found = copy.copy(self)
        found.places = {name: place for name, place in self.places.items() if name not in names}
        return found

    def read(self, name: str) -> Tensor:
        """Return a tensor in the type it is stored in; it may be a view of the map and must not be written to.

        Raises:
            UserError: the file has become unreadable, or an entry of the tensor is infinite or not a number.
        """
        found = self._read(name)
        if not math.isfinite(float(found.sum())) and not bool(found.isfinite().all()):
            raise UserError(f"{self.places[name].file} holds {name} with entries that are not finite numbers")
        return found

    def _read(self, name: str) -> Tensor:
        file = self.places[name].file
        try:
            if file not in self._open and file.stat().st_size <= KEPT_OPEN:
                self._open[file] = safe_open(file, framework="pt")
            if file in self._open:
                kept: Tensor = self._open[file].get_tensor(name)
                return kept
            with safe_open(file, framework="pt") as opened:
                found: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        return found


def model_files(directory: Path) -> TensorFiles:
    """Return the tensors of a model directory, which may be sharded.

    Raises:
        UserError: there are no safetensors files, a shard is missing or outside of the directory, or a file is damaged.
    """
    found = TensorFiles(weight_paths(directory))
    absent = sorted(set(named_files(directory) or ()) - set(found.places))
    if absent:
        raise UserError(f"{directory} lacks {len(absent)} tensors that {INDEX} lists, the first: {absent[0]}")
    return found
