"""Modules that an adapter brings as a whole (``modules_to_save``), as changes beside those of any form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from peft_arena.weights.adapter_directory import PREFIX, Adapter, Changes, Form, Maker, Step, Writer, changed
from peft_arena.weights.change import Change

SETTING = "modules_to_save"


class Read(NamedTuple):
    """What an adapter changes."""

    adapted: Changes
    """By its adapters alone."""
    all: Changes
    """With the modules it brings as a whole."""


def with_whole_modules(adapter: Adapter, form: Form) -> Read | None:
    """Read an adapter without the modules it brings, by its form, and add these as plain differences.

    Their way is the straight one, whatever the way of the adapted layers.

    Returns:
        None where a tensor or a setting is not understood, or where one of the modules' weights is one with another.

    Raises:
        UserError: the adapter does not fit the base.
    """
    found = _brought(adapter)
    if found is None:
        return None
    inner = adapter
    if found:
        table = {name: value for name, value in adapter.table.items() if name != SETTING}
        inner = replace(adapter, table=table, files=adapter.files.without(frozenset(found.values())))
    changes = form(inner)
    if changes is None or not found:
        return None if changes is None else Read(changes, changes)
    for name, stored in found.items():
        adapter.expect(stored, *adapter.base.shapes[name])
    makers: dict[str, Maker] = {
        **changes.makers,
        **{name: partial(_difference, adapter, name, stored) for name, stored in found.items()},
    }
    own = changes.own
    if own is not None:
        writers: Mapping[str, Writer] = {
            **own.writers,
            **{name: partial(_write, adapter, name, stored) for name, stored in found.items()},
        }
        own = replace(own, adapter=adapter, writers=writers)
    return Read(changes, replace(changes, makers=makers, own=own))


def _brought(adapter: Adapter) -> dict[str, str] | None:
    """Return the stored name of each parameter that the adapter brings whole; None where they are not plain."""
    named = adapter.table.get(SETTING) or ()
    if not isinstance(named, list | tuple):
        return None
    base = adapter.base
    ends = tuple(str(end) for end in named)
    found = {name: f"{PREFIX}{name}" for name in base.aliases if _inside(name, ends)}
    plain = all(stored in adapter.files and not base.tied(name) for name, stored in found.items())
    return found if plain and bool(found) == bool(ends) else None


def _inside(parameter: str, ends: tuple[str, ...]) -> bool:
    """Say whether a parameter is of a module that peft takes for one of those named, by the ends of its name."""
    parts = parameter.split(".")
    return bool(ends) and any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts)))


def _difference(adapter: Adapter, name: str, stored: str) -> Change | None:
    return changed(adapter.files.read(stored).float(), adapter.base.tensor(name))


def _write(adapter: Adapter, name: str, stored: str, step: Step) -> dict[str, Tensor]:
    before = adapter.base.tensor(name)
    return {stored: before + step.factor * (adapter.files.read(stored).float() - before)}
