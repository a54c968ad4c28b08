"""Name to object, imported only when the name is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from peft_arena.core.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """A closed set of names, each standing for ``module:attribute``.

    Listing the names imports nothing; :meth:`get` imports the one module it needs.
    """

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        """Create a registry of ``kind`` (used in error messages) from name → ``module:attribute``."""
        self.kind = kind
        self._targets = dict(targets)

    def names(self) -> list[str]:
        """Return every name, sorted."""
        return sorted(self._targets)

    def __contains__(self, name: object) -> bool:
        """Say whether the name is known."""
        return name in self._targets

    def get(self, name: str, where: str = "") -> T:
        """Return the object of that name.

        Raises:
            UserError: the name is not known; the message gives the nearest one.
        """
        if name not in self._targets:
            raise unknown(self.kind, name, self._targets, where)
        module, _, attribute = self._targets[name].partition(":")
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found
