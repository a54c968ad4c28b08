"""What measuring on prompts begins with: the common base, the prompt sets, and what a finished piece depends on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.ids import canonical_json, content_id, file_hash
from peft_arena.geometry.prompts import PromptSet, prompt_set
from peft_arena.models.modes import context_length

if TYPE_CHECKING:
    from peft_arena.core.geometry import PromptedSpec
    from peft_arena.core.specs import ModelSpec
    from peft_arena.models.load import Loaded
    from peft_arena.weights.tuned import Tuned

SETS = ("general", "target")
PIECE = 1
"""Version of what is kept of a finished piece; a change of it or of a formula raises it."""


def common_base(tuned: Sequence[Tuned]) -> ModelSpec:
    """Return the base of some tuned points.

    Raises:
        UserError: there are none, or they are on different bases.
    """
    if not tuned:
        raise UserError("name at least one tuned model to measure")
    base = tuned[0].base
    for other in tuned:
        if other.base != base:
            raise UserError(
                f"{other.subject} is on {other.base.words}, "
                f"{tuned[0].subject} on {base.words}: measure them in two calls"
            )
    return base


def prompt_sets(spec: PromptedSpec, loaded: Loaded) -> dict[str, PromptSet]:
    """Return the general and the target prompts as tokens, cut to what the spec and the model's context allow."""
    limit = context_length(loaded.model, loaded.tokenizer)
    longest = spec.max_length if limit is None else min(spec.max_length, limit)
    return {
        name: prompt_set(sources, loaded.tokenizer, prompts=spec.prompts, max_length=longest)
        for name, sources in zip(SETS, (spec.general, spec.target), strict=True)
    }


def identity(tuned: Tuned) -> str:
    """Return what identifies the weights of a tuned point: what it is called, what it is on, and its files' content.

    Raises:
        UserError: its directory does not exist.
    """
    files = _content(tuned.directory) if tuned.directory is not None else None
    method = None if tuned.method is None else tuned.method.canonical()
    start = [] if tuned.start is None else [identity(tuned.start)]
    return canonical_json([tuned.base.canonical(), method, tuned.subject, tuned.step, tuned.factor, files, *start])


def part_key(point: str, spec: PromptedSpec, which: str, prompts: PromptSet, module: str) -> str:
    """Return the key of a finished piece.

    Args:
        point: identity of the tuned point.
        spec: of the measurement.
        which: name of the prompt set.
        prompts: the set itself, which is part of the key.
        module: name of the module; empty for the model's output.
    """
    return canonical_json([PIECE, spec.key, point, which, prompts.id, module])


def _content(directory: Path) -> str:
    """Hash every file that weights and settings are read from."""
    if not directory.is_dir():
        raise UserError(f"there is no directory '{directory}' to read a tuned model from")
    files = sorted(file for file in directory.iterdir() if file.suffix in {".safetensors", ".json"})
    return content_id([[file.name, file_hash(file)] for file in files])
