"""Whether training reaches what it is to train: every parameter has had a gradient within the first steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_arena.core.errors import UserError
from peft_arena.core.text import few
from peft_arena.methods.base import Attached

FIRST_STEPS = 3
"""Optimizer steps after which a parameter without a gradient is an error."""


class GradientWatch:
    """Looks, in the steps of one process, which trained parameters have never had a gradient.

    None is no gradient; zeros are one: a factor beside a factor of zeros has zeros at the first step. What belongs to
    an expert that no token has been sent to yet, or to a block that was skipped, is waited for: its module was not
    called while another one of the same list was trained.
    """

    def __init__(self, attached: Attached, steps: int) -> None:
        """Watch all trained parameters.

        Args:
            attached: what trains.
            steps: optimizer steps that this process is to do.
        """
        self._attached = attached
        self._missing = attached.trained()
        self._reached: set[str] = set()
        self._last = min(FIRST_STEPS, steps)
        self._done = 0
        self._called: set[str] = set()
        self._handles: list[Any] = []

    def look(self) -> None:
        """Look at the gradients of a step, all of its passes done; of no cost once every parameter has had one.

        Raises:
            UserError: names parameters without a gradient in the first steps.
        """
        self._done += 1
        if not self._missing:
            return
        found = [name for name, parameter in self._missing.items() if parameter.grad is not None]
        self._reached.update(found)
        for name in found:
            del self._missing[name]
        if self._done == 1 and self._missing and self._last > 1:
            self._follow()
        if self._done == self._last:
            self.close()
            self._judge()

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of trained parameters that have had no gradient so far."""
        return tuple(self._missing)

    def close(self) -> None:
        """Take off what watches the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _follow(self) -> None:
        """Note from now on which of the modules that could be passed by are called."""
        modules = dict(self._attached.model.named_modules())
        for place in {element(name) for name in self._missing}:
            if place in modules:
                hook = modules[place].register_forward_pre_hook(self._noting(place))
                self._handles.append(hook)

    def _noting(self, place: str) -> Any:
        def note(*_: object) -> None:
            self._called.add(place)

        return note

    def _judge(self) -> None:
        trained = self._attached.trained()
        wrong = [name for name in self._missing if name in trained and not self._passed_by(name)]
        if wrong:
            steps = f"{self._last} step{'s' if self._last > 1 else ''}"
            raise UserError(
                f"{len(wrong)} of {len(trained)} trained parameters had no gradient in the first {steps}: "
                f"{few(wrong)}; they would stay as they are, so leave their modules out of what the method trains"
            )

    def _passed_by(self, name: str) -> bool:
        """Say whether a parameter is in an element of a list of which others were trained and it was not run."""
        place = element(name)
        siblings = place.rpartition(".")[0]
        if not place or place in self._called:
            return False
        inside = any(other.startswith(f"{place}.") for other in self._reached)
        return not inside and any(other.startswith(f"{siblings}.") for other in self._reached)


def element(name: str) -> str:
    """Return the innermost element of a list of modules that a parameter is in: all up to the last number; or ""."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ""


def unsound(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of parameters whose gradient is not finite."""
    return [name for name, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
