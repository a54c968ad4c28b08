"""Wrapping a model by peft so that the adapter and its settings are those that were asked for.

peft rewrites a configuration in place while it wraps: names of layers become those of the experts' fused parameters
where an architecture's layers were once called so, and long lists of names become shorter ones. What is written into a
checkpoint would then differ from what the same settings give when it is read. Our names are those of the model at
hand, so nothing is to be renamed, and what was stated is put back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from peft_arena.methods.files import is_on

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

CIRCUMSTANCES = frozenset({"base_model_name_or_path", "inference_mode", "revision", "task_type"})
"""What peft fills in about where an adapter is."""


def wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Return a model wrapped by ``peft.get_peft_model`` under a configuration that then says what it said before."""
    from peft import get_peft_model

    given = copy.deepcopy(config)
    with names_kept():
        wrapped: PeftModel = get_peft_model(model, config)
    for held in wrapped.peft_config.values():
        if type(held) is type(given):
            put_back(held, given)
    return wrapped


def put_back(held: PeftConfig, given: PeftConfig) -> None:
    """Give a configuration that peft has worked with the settings that were stated; what it filled in stays."""
    for field in fields(given):
        stated = getattr(given, field.name)
        if field.name not in CIRCUMSTANCES and is_on(stated) and getattr(held, field.name) != stated:
            setattr(held, field.name, stated)


@contextmanager
def names_kept() -> Iterator[None]:
    """Keep peft from taking names of layers for those that the architecture's experts had in older versions."""
    from peft.utils import transformers_weight_conversion as conversion

    module: Any = conversion
    held = module.convert_peft_config_for_transformers
    module.convert_peft_config_for_transformers = _as_it_is
    try:
        yield
    finally:
        module.convert_peft_config_for_transformers = held


def _as_it_is(config: object, *_: object, **__: object) -> None:
    """Stand in for the renaming."""


def renamed_by_peft(config: PeftConfig, model: PreTrainedModel) -> list[str]:
    """Return the targets of a configuration that peft alone would take for fused experts of a model, sorted.

    Args:
        config: of an adapter whose names are those of the model at hand; it is left as it is.
        model: the pretrained model.
    """
    from peft.utils import transformers_weight_conversion as conversion

    given: Any = copy.deepcopy(config)
    named = getattr(given, "target_modules", None)
    if not named:
        return []
    try:
        conversion.convert_peft_config_for_transformers(given, model, None)
    except ValueError:  # only some of what is fused is named
        return sorted([named] if isinstance(named, str) else named)
    if isinstance(named, str):
        return [] if given.target_modules == named else [named]
    return sorted(set(named) - set(given.target_modules or ()))
