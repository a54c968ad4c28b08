"""A hash over everything that loading a model reads from its directory.

Large files are hashed once: their hash is kept in the cache by path, size and times, and not trusted for a file that
was changed within seconds of being hashed, whose times could then be those of another content.
"""

from __future__ import annotations

import time
from pathlib import Path

from peft_arena.assets.wheel_files import cache_root, keep, kept
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id, file_hash
from peft_arena.models.stored import named_files

READ = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
"""Ends of names of the files that are read: weights only from safetensors."""
TOKENIZERS = frozenset({"bpe.codes", "prophetnet.tokenizer"})
"""Files of tokenizers of transformers' with other ends."""
TEMPLATES = "additional_chat_templates"
LARGE = 2**24
"""Bytes from which on a file's hash is kept."""
SETTLED_S = 2.0
"""Seconds a file must have been left alone before its hash is kept: coarser clocks of disks are within it."""


def content_of(directory: Path) -> str:
    """Return a hash over the names and contents of every file of a model directory that loading may read.

    Weight files in folders below it, which an index may name, and further chat templates are among them.

    Raises:
        UserError: the index of the weights is damaged, or names a file outside of the directory.
    """
    near = {file for file in directory.iterdir() if file.suffix in READ or file.name in TOKENIZERS}
    far = set((named_files(directory) or {}).values()) | set((directory / TEMPLATES).glob("*.jinja"))
    files = {file.relative_to(directory).as_posix(): file for file in near | far if file.is_file()}
    try:
        return content_id([[name, kept_hash(files[name])] for name in sorted(files)])
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error}") from error


def kept_hash(file: Path) -> str:
    """Return the SHA-256 of a file, from the cache where the file is large and has not changed since.

    Raises:
        OSError: it cannot be read.
    """
    if file.stat().st_size < LARGE:
        return file_hash(file)
    path, facts = file.resolve(), _facts(file)
    place = cache_root() / "hashes" / f"{content_id([str(path)], 40)}.json"
    held = kept(place)
    if held.get("facts") == facts and isinstance(held.get("sha256"), str):
        return str(held["sha256"])
    found = file_hash(file)
    newest = max(facts[1:3]) / 1e9
    if _facts(file) == facts and time.time() - newest > SETTLED_S:
        keep(place, {"path": str(path), "facts": facts, "sha256": found})
    return found


def _facts(file: Path) -> list[int]:
    """Return size, times of change of content and of inode in ns, inode and device of a file."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
