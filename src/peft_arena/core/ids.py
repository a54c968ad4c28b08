"""Content ids and named random streams: the same input gives the same id and seed on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from peft_arena.core.bounded import WEIGHTS_BYTES, opened
from peft_arena.core.errors import UserError
from peft_arena.core.text import shown

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """Render a JSON value with sorted keys and no spaces, so that equal values give equal text.

    Raises:
        ValueError: for NaN or infinity, which JSON cannot say.
    """
    return _CANONICAL.encode(value)


def content_id(value: Any, length: int = 12) -> str:
    """Return the first ``length`` hex digits of the SHA-256 of the value's canonical JSON.

    Text with half of a character, which UTF-8 cannot write, has an id too: it is refused where its place can be said.
    """
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:length]


def file_hash(path: Path, limit: int = WEIGHTS_BYTES) -> str:
    """Return the SHA-256 of a file's content, 64 hex digits.

    Args:
        path: of the file.
        limit: most bytes it may have.

    Raises:
        UserError: nothing is there, it is not a regular file, it is longer, or it cannot be read.
    """
    with opened(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit:
            raise UserError(f"cannot read {shown(path)}: it holds {size} bytes, and at most {limit} are read")
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seed_for(seed: int, *names: str | int) -> int:
    """Derive the seed of a named random stream from a run's seed.

    Returns:
        An integer in [0, 2**31), different for every (seed, names), independent of Python's hash salt.
    """
    digest = hashlib.sha256(canonical_json([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
