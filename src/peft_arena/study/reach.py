"""Whether the planned items can show what the study's margin asks for.

That a difference lies within a margin takes items: with q the share of items on which two models answer differently,
the difference of two accuracies over n paired items has a variance of about q / n (McNemar's design; Connor 1987,
Biometrics 43), and a one-sided test at 5 % that is to succeed in nine of ten studies needs n = 8.6 q / margin². That is
the least it can take: one question, trainings that end alike. Trainings that lie s apart add s² / seeds to the
variance, which more items do not lower; where a study declares s, the margin that is in reach has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from peft_arena.core.measure import FEWEST_UNITS, POINTS, too_few_units
from peft_arena.core.specs import EvalSpec
from peft_arena.study.known_data import Planned, planned
from peft_arena.study.labels import stated_sizes, task_labels
from peft_arena.study.model import Study
from peft_arena.tasks.registry import difference_unit

FEWEST_DIFFER, MOST_DIFFER = 0.1, 0.2
"""Share of items on which tuned and pretrained model, or two tuned models, answer differently."""
FACTOR = 8.6
"""(z(0.95) + z(0.9))²."""


class Reach(NamedTuple):
    """What the planned items can show at best."""

    what: str
    margin: float
    """Points that the study calls no difference."""
    reach: float
    """Least margin, in points, that the items would show with few answers that differ."""
    items: int
    """Planned, on all its tasks."""
    needed: tuple[int, int]
    """Items that the margin takes, with few and with many answers that differ, in the same proportions."""
    no_interval: str = ""
    """Why there will be no interval at all, and so no word; empty if there will be one."""

    @property
    def is_short(self) -> bool:
        """Whether the items cannot show the margin even where few answers differ."""
        return self.reach > self.margin or bool(self.no_interval)

    def summary(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**self._asdict(), "is_short": self.is_short}

    def __str__(self) -> str:
        """Say what is planned, what is needed, and what the items reach."""
        low, high = self.needed
        if self.no_interval:
            return (
                f"too few items to say anything {self.what}: {self.no_interval}; the margin of {self.margin:g} points "
                f"takes {low:,} to {high:,} at least"
            )
        return (
            f"few items for the margin of {self.margin:g} points {self.what}: {self.items:,} planned, {low:,} to "
            f"{high:,} needed at least, where {FEWEST_DIFFER:.0%} to {MOST_DIFFER:.0%} of answers differ; “no worse” "
            f"is in reach within {self.reach:.1f} at best"
        )


def reaches(study: Study) -> list[Reach]:
    """Return what the items of every target and of mean retention can show; where items are not known, nothing.

    Args:
        study: read and expanded.
    """
    margin, declared = study.margin, study.file.seed_sd
    spreads = (0.0, 0.0) if declared is None else (declared.target, declared.retention)
    on_target, in_retention = (spread / math.sqrt(len(study.file.seeds)) for spread in spreads)
    labels = task_labels(study)
    found = []
    for target in study.targets:
        allowed = margin.on_target(POINTS) if _is_fraction(target) else None
        if allowed is not None:
            found += _reach(study, f"on {labels[target.task.id]}", allowed, [target], on_target)
    averaged = [spec for spec in study.retention if _is_fraction(spec)]
    what = f"of mean retention over {len(averaged)} task{'' if len(averaged) == 1 else 's'}"
    return [*found, *_reach(study, what, margin.retention, averaged, in_retention)]


def _is_fraction(spec: EvalSpec) -> bool:
    return difference_unit(spec.task) == POINTS


def _planned(study: Study, spec: EvalSpec) -> Planned | None:
    """Return what is asked; where the data is not at hand what the study says; None where that is no number."""
    found = planned(spec)
    if found is not None:
        return found
    sizes = stated_sizes(study, spec.task)
    known = [count for count in (spec.items, sizes.items) if count is not None]
    return Planned(min(known), min(known), float(min(known))) if known else None


def _reach(study: Study, what: str, margin: float, specs: Sequence[EvalSpec], spread: float) -> list[Reach]:
    """Return the reach of some tasks' items; ``spread``: error in points that trainings add, whatever the items."""
    found = [_planned(study, spec) for spec in specs]
    known = [one for one in found if one is not None and one.items]
    if not known or len(known) < len(found):
        return []
    total = sum(one.items for one in known)
    share = sum(1.0 / one.items for one in known) / len(known) ** 2
    reach = math.sqrt(FACTOR * (FEWEST_DIFFER * share * 100**2 + spread**2))
    needed = [total * share * FACTOR * differ / (margin / 100) ** 2 for differ in (FEWEST_DIFFER, MOST_DIFFER)]
    why = next((text for one in known if (text := _no_interval(one))), "")
    return [Reach(what, margin, reach, total, (math.ceil(needed[0]), math.ceil(needed[1])), why)]


def _no_interval(found: Planned) -> str:
    """Say why some items cannot have an interval, by the rule of :mod:`peft_arena.analyze.estimate`."""
    few = too_few_units(found.items, found.units, found.alike)
    return f"{few}, and an interval needs {FEWEST_UNITS}" if few else ""
