"""Settings under which each method is tried on tiny models: a module per family, each with a ``SETTINGS`` table."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def collect() -> dict[str, dict[str, Any]]:
    """Return the arguments of ``check_method`` by method name, from every module beside this one."""
    found: dict[str, dict[str, Any]] = {}
    for module in pkgutil.iter_modules(__path__):
        table = importlib.import_module(f"{__name__}.{module.name}").SETTINGS
        assert not set(found) & set(table), f"two modules have settings for {set(found) & set(table)}"
        found |= table
    return found


SETTINGS = collect()
