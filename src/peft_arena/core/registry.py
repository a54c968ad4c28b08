"""Name to object, imported only when the name is asked for: ours, and those of installed plug-ins."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any, Generic, TypeVar

from peft_arena.core.errors import UserError, first_line, unknown

T = TypeVar("T")
OURS = "peft-arena"
Problem = Callable[[str, Any], str]
"""Says why an object cannot stand for a name; empty if it can."""


@dataclass(frozen=True)
class Plugin:
    """What the metadata of an installed distribution says about one name; nothing of it is imported."""

    distribution: str
    version: str
    name: str
    target: str
    """``module:attribute``."""

    def __str__(self) -> str:
        """Return distribution and version."""
        return f"{self.distribution} {self.version}"


class Registry(Generic[T]):
    """Names, each standing for ``module:attribute``: a closed set of our own, and entry points of plug-ins.

    Listing the names imports nothing; :meth:`get` imports the one module it needs.
    """

    def __init__(
        self,
        kind: str,
        targets: Mapping[str, str],
        *,
        refused: Mapping[str, str] | None = None,
        group: str | None = None,
        problem: Problem = lambda name, found: "",
    ) -> None:
        """Create a registry.

        Args:
            kind: what the names stand for, used in messages.
            targets: our own names, each with its ``module:attribute``.
            refused: names that are known and not offered, with the reason.
            group: entry points of this group are names too.
            problem: says why an object of a plug-in cannot stand for a name.
        """
        self.kind = kind
        self.refused = dict(refused or {})
        self._targets = dict(targets)
        self._group = group
        self._problem = problem

    def names(self) -> list[str]:
        """Return every name, sorted."""
        return sorted({*self._targets, *self._plugins})

    def own(self) -> list[str]:
        """Return the names that do not come from plug-ins, sorted."""
        return sorted(self._targets)

    def __contains__(self, name: object) -> bool:
        """Say whether the name is known."""
        return name in self._targets or name in self._plugins

    def providers(self, name: str) -> list[str]:
        """Return who offers a name, each as distribution and version; ``peft-arena`` for ourselves."""
        ours = [OURS] if name in self._targets else []
        return [*ours, *(str(plugin) for plugin in self._plugins.get(name, ()))]

    def plugin(self, name: str) -> str | None:
        """Return distribution and version of the plug-in a name comes from; None if it is ours.

        Raises:
            UserError: the name is not known, or two offer it.
        """
        found = self._provider(name, "")
        return None if found is None else str(found)

    def check_plugin(self, name: str, planned: str | None) -> None:
        """Check that a name still comes from where it came from when it was planned.

        Args:
            name: of the object.
            planned: what :meth:`plugin` said then.

        Raises:
            UserError: it comes from another plug-in or another version of it, or is not to be had.
        """
        found = self.plugin(name)
        if found != planned:
            ours = "peft-arena itself"
            raise UserError(
                f"{self.kind} {name} is from {found or ours}, and was planned with {planned or ours}; plan it again"
            )

    def get(self, name: str, where: str = "") -> T:
        """Return the object of that name.

        Args:
            name: of the object.
            where: file and line, or the option, the name was read from.

        Raises:
            UserError: the name is not known (the message gives the nearest one), is refused, is offered by two
                distributions, or is that of a plug-in that cannot be used.
        """
        plugin = self._provider(name, where)
        if plugin is None:
            found: T = _resolve(self._targets[name])
            return found
        return self._load(plugin, where)

    def _provider(self, name: str, where: str) -> Plugin | None:
        """Return the one plug-in that offers a name, None where it is ours."""
        plugins = self._plugins.get(name, [])
        if len(plugins) + (name in self._targets) > 1:
            both = " and ".join(self.providers(name))
            extra = plugins[-1].distribution
            raise UserError(f"{self.kind} '{name}' is offered by {both}; uninstall one, e.g. {extra}{_place(where)}")
        if plugins:
            return plugins[0]
        if name in self._targets:
            return None
        if name in self.refused:
            raise UserError(f"{self.kind} '{name}' is not offered: {self.refused[name]}{_place(where)}")
        raise unknown(self.kind, name, self.names(), where)

    def _load(self, plugin: Plugin, where: str) -> T:
        """Import what a plug-in offers and check it."""
        try:
            found: T = _resolve(plugin.target)
            problem = self._problem(plugin.name, found)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever foreign code raises is told in one line
            problem = f"{type(error).__name__}: {first_line(error)}"
        if problem:
            entry = f"entry point {plugin.name} = {plugin.target} of {plugin}"
            raise UserError(f"{self.kind} '{plugin.name}' cannot be used: {entry}: {problem}{_place(where)}")
        return found

    @cached_property
    def _plugins(self) -> dict[str, list[Plugin]]:
        """What is installed, by name; read once."""
        found: dict[str, list[Plugin]] = {}
        if self._group is None:
            return found
        for point in metadata.entry_points(group=self._group):
            if point.dist is not None:
                target = point.value.partition("[")[0].strip()  # what follows names optional dependencies
                plugin = Plugin(point.dist.name, point.dist.version, point.name, target)
                found.setdefault(point.name, []).append(plugin)
        return found


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module.strip())
    for part in filter(None, attribute.strip().split(".")):
        found = getattr(found, part)
    return found


def _place(where: str) -> str:
    return f" (in {where})" if where else ""
