"""Finished pieces of a long measurement, kept so that an interrupted call, repeated, does only the missing ones."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.assets.wheel_files import write_atomically
from peft_arena.core.ids import content_id

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)
_FORMAT = "peft-arena part 1"


class Parts:
    """A directory with one safetensors file for each finished piece; without a directory, nothing is kept.

    A piece is read only under the key it was written with. A damaged file counts as missing, and a disk that cannot be
    written to costs only the work of a repetition.
    """

    def __init__(self, directory: Path | None) -> None:
        """Keep pieces in a directory, which need not exist yet; None: nowhere."""
        self.directory = directory
        self._refused = False

    def path(self, key: str) -> Path | None:
        """Return where the piece of a key is kept, None if pieces are not kept."""
        return None if self.directory is None else self.directory / f"{content_id([_FORMAT, key])}.safetensors"

    def get(self, key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Return the scalars and the arrays that were put under a key; None if there are none that are whole.

        Args:
            key: any text; it should name all that the piece depends on: weights by their content, module, settings.
        """
        path = self.path(key)
        if path is None:
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as stored:
                metadata = stored.metadata() or {}
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        text = metadata.get("scalars", "")
        if metadata.get("key") != key or metadata.get("sha256") != _digest(text, arrays):
            return None
        return json.loads(text), arrays

    def put(self, key: str, scalars: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a finished piece; one already there under the key is replaced.

        Args:
            key: see :meth:`get`.
            scalars: JSON values; floats are read back exactly, and must be finite.
            arrays: numpy arrays of any shape, read back exactly.

        Raises:
            ValueError: a scalar is not a JSON value, or not finite.
        """
        text = json.dumps(dict(scalars), allow_nan=False)
        path = self.path(key)
        if path is None or self._refused:
            return
        import numpy as np
        from safetensors.numpy import save

        whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        try:
            write_atomically(path, save(whole, {"key": key, "scalars": text, "sha256": _digest(text, whole)}))
        except OSError as error:
            self._refused = True
            logger.warning("cannot keep finished modules in %s: %s; going on without", self.directory, error)


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Hash what a file holds: a flipped bit must not become a result."""
    state = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        state.update(f"{name} {array.dtype.str} {array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()
