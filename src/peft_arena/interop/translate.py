"""From an adapter configuration of ``peft`` to a method of ours, checked by making the configuration back again."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.interop.peft_methods import TABLE, WEIGHTS
from peft_arena.interop.shapes import Shape
from peft_arena.interop.translation import ADAMW, Theirs, Translation
from peft_arena.methods.files import unknown_active
from peft_arena.methods.registry import make_method

ABOUT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Fields that say what a configuration is of, not what is trained."""
CLEARED = ("revision", "inference_mode")
"""Those of them that would change a run if they were set."""
TASKS = (None, "CAUSAL_LM")
"""What an adapter of a language model may be for; others add a head that trains, or read another output."""
NAMES = ("target_modules", "feedforward_modules")
"""Fields that name modules: a list, or one pattern."""


@dataclass(frozen=True)
class Translated:
    """A method of ours that stands for an adapter configuration."""

    method: str
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def method_named(table: Mapping[str, Any] | None, optimizer: str = ADAMW) -> str | None:
    """Return our name of the method an adapter configuration is of, whether or not its settings can be had here.

    Args:
        table: content of ``adapter_config.json``; None where all weights train.
        optimizer: type of the training's optimizer.

    Returns:
        The name; None where we have no such method, or the file leaves out what would tell.
    """
    if table is None:
        return WEIGHTS.method
    for entry in TABLE.get(str(table.get("peft_type")), ()):
        if entry.optimizer == optimizer and all(
            any(_same(_plain(table[key]), one) if key in table else not one for one in values)
            for key, values in entry.when.items()
        ):
            return entry.method
    return None


def translate(
    table: Mapping[str, Any] | None,
    shape: Shape,
    *,
    steps: int,
    optimizer: str = ADAMW,
    optimizer_settings: Mapping[str, Any] | None = None,
) -> Translated:
    """Return the method of ours that an adapter configuration stands for.

    Args:
        table: content of ``adapter_config.json``; None where all weights train.
        shape: of the model.
        steps: of the training.
        optimizer: type of the training's optimizer.
        optimizer_settings: its settings but learning rate and weight decay.

    Raises:
        UserError: the configuration cannot be had here; names the field and its value.
    """
    given = dict(optimizer_settings or {})
    if table is None:
        entry, theirs = WEIGHTS, Theirs({}, shape, steps)
        if optimizer != ADAMW:
            raise UserError(f"optimizer_type is '{optimizer}', which there is no method for here")
    else:
        theirs = Theirs(complete(table, shape.model_type), shape, steps)
        entry = _entry(theirs, str(table["peft_type"]), optimizer)
    settings = _settings(entry, theirs, given)
    if given:
        key, value = next(iter(given.items()))
        raise UserError(f"optimizer_kwargs.{key} is {value!r}, which optimizer '{optimizer}' has no setting for here")
    method: Any = make_method(entry.method, settings, "import")
    notes = list(entry.notes)
    if table is not None:
        named = theirs.config["target_modules"] or ()
        ours = method.peft_config([named] if isinstance(named, str) else list(named), 0)
        notes += compare(theirs, plain_table(ours), entry)
    return Translated(entry.method, settings, tuple(dict.fromkeys(note for note in notes if note)))


def complete(table: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return every field of an adapter configuration, peft's defaults where a file has none.

    Target modules that are left to peft are those of its own tables for the kind of model.

    Raises:
        UserError: no adapter kind, one that peft does not have, or an unknown field that is not empty or off.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    kind = str(table.get("peft_type"))
    if kind not in PeftType.__members__:
        raise UserError(f"peft_type is '{kind}', which the installed peft does not have")
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    known = set(made.__dataclass_fields__)
    odd = unknown_active(table, known)
    if odd:
        raise UserError(f"{odd[0]} is {table[odd[0]]!r}: the installed peft has no such field of {kind}")
    blank = {name: field.default for name, field in made.__dataclass_fields__.items()}
    factories = {name: field.default_factory for name, field in made.__dataclass_fields__.items()}
    full = {
        name: _plain(table[name] if name in table else _default(blank[name], factories[name])) for name in sorted(known)
    }
    for name in CLEARED:
        if full.get(name):
            raise UserError(f"{name} is {full[name]!r}: an adapter that starts trained cannot be imported")
    if full["task_type"] not in TASKS:
        raise UserError(
            f"task_type is {full['task_type']!r}, and only adapters of language models (CAUSAL_LM) run here"
        )
    for name in NAMES:
        if name in full:
            full[name] = _named(full[name], name, kind, model_type)
    full.setdefault("target_modules", None)
    return full


def compare(theirs: Theirs, ours: Mapping[str, Any], entry: Translation) -> list[str]:
    """Compare an adapter configuration with the one that our method makes; return why what differs is harmless.

    Raises:
        UserError: a field differs and nothing says that it may.
    """
    notes = []
    for name, value in theirs.config.items():
        if name in ABOUT or name in entry.carried:
            continue
        made = ours.get(name)
        if name in NAMES:
            found = theirs.config["target_modules"] or ()
            found = [found] if isinstance(found, str) else found
            same = _chosen(value, found) == _chosen(made, found)
        else:
            same = made == value
        if same:
            continue
        allowed = entry.harmless.get(name)
        if allowed is None or not allowed.when(theirs):
            raise UserError(f"{name} is {value!r}, where method {entry.method} has {made!r}")
        if allowed.reason:
            notes.append(f"{name} {value!r}: {allowed.reason}")
    return notes


def _entry(theirs: Theirs, kind: str, optimizer: str) -> Translation:
    entries = TABLE.get(kind)
    if entries is None:
        raise UserError(f"peft_type is '{kind}', which there is no translation of")
    entries = tuple(entry for entry in entries if entry.optimizer == optimizer)
    if not entries:
        raise UserError(f"optimizer_type is '{optimizer}', which there is no method for here with {kind}")
    for entry in entries:
        if all(any(_same(theirs.config[key], one) for one in values) for key, values in entry.when.items()):
            return entry
    fields = sorted({key for entry in entries for key in entry.when})
    said = ", ".join(f"{key} is {theirs.config[key]!r}" for key in fields)
    raise UserError(f"no method here is {kind} where {said}")


def _settings(entry: Translation, theirs: Theirs, given: dict[str, Any]) -> dict[str, Any]:
    """Return our settings; takes what it uses out of the given settings of the optimizer."""
    settings = {ours: theirs.config[name] for name, ours in entry.fields.items()}
    settings |= {ours: read(theirs) for ours, read in entry.read.items()}
    settings |= entry.fixed
    if entry.targets == "linear":
        settings["targets"] = _targets(theirs.config["target_modules"])
    for name, ours in entry.optimizer_fields.items():
        if name in given:
            settings[ours] = given.pop(name)
    for name, field in entry.optimizer_repeats.items():
        value = given.pop(name, theirs.config[field])
        if value != theirs.config[field]:
            raise UserError(
                f"optimizer_kwargs.{name} is {value!r}, but {field} of the adapter {theirs.config[field]!r}"
            )
    return settings


def _targets(found: Any) -> Any:
    if isinstance(found, str) and found != "all-linear":
        raise UserError(f"target_modules is {found!r}, a pattern: patterns are not translated; give a list of names")
    return found if found == "all-linear" else list(found or ())


def _named(value: Any, name: str, kind: str, model_type: str) -> Any:
    """Return module names as a list; those that peft would choose where none are given."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return sorted(value)
    if isinstance(value, str):
        if value == "all-linear" or re.fullmatch(r"[A-Za-z0-9_.]+", value):
            return value
        raise UserError(f"{name} is {value!r}: patterns are not translated; name the modules")
    if value is not None:
        raise UserError(f"{name} is {value!r}, no list of names of modules")
    from peft.utils import constants

    word = {"LN_TUNING": "LNTUNING"}.get(kind, kind)
    what = "FEEDFORWARD_MODULES" if name == "feedforward_modules" else "TARGET_MODULES"
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{word}_{what}_MAPPING", {})
    return sorted(table[model_type]) if model_type in table else None


def _chosen(pattern: Any, names: Collection[str]) -> set[str]:
    """Return which of the names a list names, or a pattern matches."""
    if pattern is None:
        return set()
    if isinstance(pattern, str):
        return {name for name in names if re.fullmatch(pattern, name)}
    return {name for name in names if name in pattern}


def _default(value: Any, factory: Any) -> Any:
    from dataclasses import MISSING

    if value is not MISSING:
        return value
    return None if factory is MISSING else factory()


def plain_table(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration of peft with values that JSON has."""
    return {name: _plain(value) for name, value in config.to_dict().items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, sets in order."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return value


def _same(value: Any, one: Any) -> bool:
    """Compare without taking 1 for True."""
    return type(value) is type(one) and value == one
