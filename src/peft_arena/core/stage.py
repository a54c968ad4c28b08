"""The pieces of the work of a run, as its log names them: what failed is told by fields, never by a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from peft_arena.core.specs import EvalSpec

_EARLIER = {
    "train": re.compile(r"train"),
    "cost": re.compile(r"cost of (?P<key>\w+)"),
    "evaluation": re.compile(r"evaluate .* (?P<key>[0-9a-f]+) at step (?P<step>\d+)", re.DOTALL),
    "geometry": re.compile(r"geometry (?P<key>\S+)"),
    "scan": re.compile(r"scan (?P<key>\S+)"),
}
"""How logs that were written before there were fields name a stage, by kind."""


class StageId(NamedTuple):
    """Identifies a stage of a run, in its plan and in its log."""

    kind: str
    key: str = ""
    """Which of its kind: of an evaluation, a measurement of geometry or a scan that of its spec."""
    step: int | None = None
    """Of the training; None where that goes without saying, or is not known yet."""

    def fields(self) -> dict[str, Any]:
        """Return what an event of this stage says of it."""
        return {name: value for name, value in self._asdict().items() if value not in ("", None)}


DESCRIBE = StageId("describe")
TRAIN = StageId("train")
COST_OF_INFERENCE = StageId("cost", "inference")


def evaluation_stage(spec: EvalSpec, step: int | None) -> StageId:
    """Return the stage of an evaluation."""
    return StageId("evaluation", spec.id, step)


def stage_of(event: Mapping[str, Any]) -> StageId | None:
    """Return the stage that an event is of; None if it is of none."""
    kind, step = event.get("kind"), event.get("step")
    if isinstance(kind, str):
        return StageId(kind, str(event.get("key", "")), step if isinstance(step, int) else None)
    text = event.get("stage")
    if not isinstance(text, str):
        return None
    for name, pattern in _EARLIER.items():
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            return StageId(name, found.get("key", ""), int(found["step"]) if "step" in found else None)
    return StageId(text)


def failures(events: Iterable[Mapping[str, Any]]) -> dict[StageId, str]:
    """Return why the last attempt of each stage failed, where it did.

    Args:
        events: of the log of a run, oldest first.
    """
    found: dict[StageId, str] = {}
    for event in events:
        stage, name = stage_of(event), event.get("event")
        if stage is None:
            continue
        if name == "failed":
            found[stage] = str(event.get("reason") or "failed without a reason")
        elif name in ("started", "finished"):
            found.pop(stage, None)
    return found
