"""Trained parameters of a method on a model that is not loaded: counted once, exactly, and kept.

Counting builds the model's architecture without weights and needs torch, which takes seconds to import. So counts are
looked up first: among those of the shipped studies (``counts.json`` beside this file, written by
``python benchmarks/counts.py``), then in the cache on disk. What a budget made of a method's size is looked up among
the shipped ones only: it decides what is run, and must not come from a cache that an older version wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena import __version__
from peft_arena.assets.wheel_files import cache_root, keep, kept
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id
from peft_arena.core.specs import MethodSpec, ModelSpec
from peft_arena.models.architecture import architecture_of
from peft_arena.models.extend import NEW_IDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGED = Path(__file__).with_name("counts.json")


class Count(NamedTuple):
    """How many parameters train; None with a reason."""

    trained: int | None
    why: str = ""


def count_key(config: Mapping[str, Any], method: MethodSpec) -> str:
    """Return the name a count is kept under: shapes and special tokens of the model, the method with its settings.

    Raises:
        UserError: the model's shapes are not understood.
    """
    return content_id([_model_key(config), method.model_dump(mode="json")])


def size_key(config: Mapping[str, Any], method: MethodSpec, wanted: int) -> str:
    """Return the name that a method's size for a number of trained parameters is kept under.

    Args:
        config: the model's.
        method: as it is before it is sized.
        wanted: trained parameters.

    Raises:
        UserError: the model's shapes are not understood.
    """
    return content_id([_model_key(config), method.model_dump(mode="json"), wanted])


def _model_key(config: Mapping[str, Any]) -> list[Any]:
    tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    limit = config.get("max_position_embeddings")
    new = [config[NEW_IDS]] if NEW_IDS in config else []
    return [asdict(architecture_of(config)), tokens, limit, *new]


def shipped_size(config: Mapping[str, Any], method: MethodSpec, wanted: int) -> tuple[Any, int] | None:
    """Return the value of a method's size and the count at it, where a shipped study asks for them; else None."""
    found = _packaged().get(size_key(config, method, wanted))
    return None if found is None else (found[0], int(found[1]))


def is_shipped(config: Mapping[str, Any], method: MethodSpec) -> bool:
    """Say whether an arm is one of a shipped study's, all of which are tested; False for shapes not understood."""
    try:
        return count_key(config, method) in _packaged()
    except UserError:
        return False


def trained_parameters(model: ModelSpec, config: Mapping[str, Any], method: MethodSpec) -> Count:
    """Return how many parameters a method trains on a model, looked up or counted.

    Args:
        model: pinned.
        config: its configuration, of shapes that are understood.
        method: with all its settings.

    Raises:
        UserError: the model's shapes are not understood.
    """
    key = count_key(config, method)
    shipped = _packaged().get(key)
    if shipped is not None:
        return Count(shipped)
    file = cache_root() / "counts" / __version__ / f"{key}.json"
    held = kept(file)
    if held.keys() == set(Count._fields):
        return Count(**held)
    found = count(model, method)
    keep(file, found._asdict())
    return found


def count(model: ModelSpec, method: MethodSpec) -> Count:
    """Count on the model's architecture, without weights."""
    from peft_arena.methods.registry import method_of

    try:
        trained = method_of(method).trained_count(_skeleton(model))
    except UserError as error:
        return Count(None, str(error))
    return Count(trained, "" if trained is not None else f"{method.name} does not count its parameters")


@lru_cache(maxsize=2)
def _skeleton(model: ModelSpec) -> PreTrainedModel:
    from peft_arena.models.load import skeleton

    return skeleton(model)


@cache
def _packaged() -> Mapping[str, Any]:
    """Return key to a count, or to the value of a size and the count at it."""
    found: Mapping[str, Any] = json.loads(PACKAGED.read_text(encoding="utf-8"))
    return found
