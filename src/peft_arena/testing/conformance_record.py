"""What a conformance suite tried of one method or task: every check by name, with its outcome and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

Outcome = Literal["passed", "not tested"]


class Check(BaseModel):
    """The outcome of one check. One that fails raises, so there is no record of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    outcome: Outcome
    why: str = ""
    """Why it was not tested, or what was waived; required where it was not tested."""

    @model_validator(mode="after")
    def _says_why(self) -> Check:
        if self.outcome == "not tested" and not self.why:
            raise ValueError(f"check {self.check} was not tested and does not say why")
        return self


class ConformanceRecord(BaseModel):
    """What a conformance suite tried and found of one method or task; plain values, so that it can be kept as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Of the method or task, as on its card."""
    suite: int
    """Version of the suite; raised when a check is added or says more."""
    checks: tuple[Check, ...]
    """Every check of the suite, in its order."""
    settings: Mapping[str, Any] = {}
    """The settings the method or task was tried with."""

    def outcome(self, check: str) -> Outcome:
        """Return the outcome of a check of this record.

        Raises:
            KeyError: the suite has no check of this name.
        """
        return next(one.outcome for one in self._named(check))

    def why(self, check: str) -> str:
        """Return what the record says of a check besides its outcome; empty if nothing.

        Raises:
            KeyError: the suite has no check of this name.
        """
        return next(one.why for one in self._named(check))

    @property
    def not_tested(self) -> Mapping[str, str]:
        """The checks that were not tested, each with the reason."""
        return {one.check: one.why for one in self.checks if one.outcome == "not tested"}

    def _named(self, check: str) -> list[Check]:
        found = [one for one in self.checks if one.check == check]
        if not found:
            raise KeyError(f"the record of {self.name} has no check '{check}'")
        return found
