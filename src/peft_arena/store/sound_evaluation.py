"""What an evaluation's record must say together: items, the numbers taken of them, card, and what was written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft_arena.core.measure import Measure
from peft_arena.core.text import shown
from peft_arena.store.records import EvaluationRecord

FRACTION = "fraction"
ROUNDING = 1e-9
_ERROR_ROUNDING = 1e-6
_OF_ITEMS = "mean over items"
"""How a measure ends that was taken of the items of its record."""
Pair = tuple[float, float]


def of_evaluation(record: EvaluationRecord) -> str:
    """Say what of an evaluation contradicts itself, with the field's name; empty if nothing does."""
    return _of_items(record) or _of_card(record) or _of_written(record) or _of_means(record)


def _of_items(record: EvaluationRecord) -> str:
    """Count the items, and what the measures say of their number."""
    if not record.metrics:
        return "metrics: must hold at least the headline, got none"
    if not record.items:
        return "items: must hold at least one item, got none"
    asked, sampling = record.spec.items, record.spec.sampling
    if asked is not None and len(record.items) != asked:
        return f"items: must be the {asked} that spec.items asks for, got {len(record.items)}"
    for place, measure in enumerate(record.metrics):
        if measure.n + measure.unscored != len(record.items):
            told = f"n {measure.n} and unscored {measure.unscored}"
            return f"metrics.{place}: {told} must add up to the {len(record.items)} items"
        if measure.n == 0 and measure.value is not None:
            return f"metrics.{place}.value: must be null where no item has a value, got {measure.value}"
        if measure.value is not None and measure.unit == FRACTION and not -ROUNDING <= measure.value <= 1 + ROUNDING:
            return f"metrics.{place}.value: must be a fraction from 0 to 1, got {measure.value}"
    samples = 0 if sampling is None else sampling.samples
    for place, item in enumerate(record.items):
        if item.outputs and len(item.outputs) != samples:
            return f"items.{place}.outputs: must be the {samples} answers of spec.sampling, got {len(item.outputs)}"
    return ""


def _of_card(record: EvaluationRecord) -> str:
    """Compare the card with the spec and with the measures."""
    card = record.card
    version, metrics, chance = card.get("version"), card.get("metrics") or [], card.get("chance")
    if version is not None and version != record.spec.task.version:
        return f"card.version: must be {record.spec.task.version} as the spec says, got {shown(repr(version), 60)}"
    if len(metrics) > len(record.metrics):
        return f"metrics: must hold the {len(metrics)} of the card, got {len(record.metrics)}"
    for place, (stated, measure) in enumerate(zip(metrics, record.metrics, strict=False)):
        for field, given in (("metric", measure.metric), ("unit", measure.unit), ("better", measure.better)):
            wanted = stated["name" if field == "metric" else field]
            if given != wanted:
                return f"metrics.{place}.{field}: must be '{shown(wanted)}' as the card says, got '{shown(given)}'"
    if chance is not None and record.metrics[0].unit == FRACTION and not 0 <= chance <= 1:
        return f"card.chance: must be a fraction from 0 to 1, got {chance}"
    return ""


def _of_written(record: EvaluationRecord) -> str:
    """Compare how many answers were written with the items."""
    written, sampling = record.written, record.spec.sampling
    if written is None:
        return ""
    if written.met_limit > written.answers:
        return f"written.met_limit: must be at most the {written.answers} answers, got {written.met_limit}"
    if written.limit == 0 and written.answers:
        return f"written.limit: must be at least 1 token where there are {written.answers} answers, got 0"
    least = sum(item.value is not None for item in record.items) * (1 if sampling is None else sampling.samples)
    if written.answers < least:
        return f"written.answers: must be at least {least}, those of the items with a value, got {written.answers}"
    return ""


def _of_means(record: EvaluationRecord) -> str:
    """Compare every measure that was taken of the items with them; the headline also where it has an error."""
    for place, measure in enumerate(record.metrics):
        taken = measure.how.rsplit("; ", 1)[-1].startswith(_OF_ITEMS)
        if measure.value is None or not (taken or (place == 0 and measure.stderr is not None)):
            continue
        if place == 0:
            parts = [(item.value, item.weight) for item in record.items if item.value is not None]
        else:
            parts = [item.others[measure.metric] for item in record.items if measure.metric in item.others]
        if why := _of_mean(measure, parts, "a value" if place == 0 else f"a value of {shown(measure.metric)}"):
            return f"metrics.{place}.{why}"
    return ""


def _of_mean(measure: Measure, parts: Sequence[Pair], held: str) -> str:
    """Compare one measure with values and weights; the error is that of a ratio of two sums over items."""
    assert measure.value is not None
    n, total = len(parts), math.fsum(weight for _, weight in parts)
    if n != measure.n:
        return f"n: must be the number of items with {held}, {n}, got {measure.n}"
    mean = math.fsum(weight * value for value, weight in parts) / total if total > 0 else math.nan
    scale = max([1.0, *(abs(value) for value, _ in parts)])
    if not abs(mean - measure.value) <= ROUNDING * scale:
        return f"value: must be the mean of the items, {mean:.12g}, got {measure.value:.12g}"
    if n < 2:
        return (
            "" if measure.stderr is None else f"stderr: must be null where one item has a value, got {measure.stderr}"
        )
    error = math.sqrt(n / (n - 1) * math.fsum((weight * (value - mean)) ** 2 for value, weight in parts)) / total
    if measure.stderr is None or not abs(error - measure.stderr) <= ROUNDING * scale + _ERROR_ROUNDING * error:
        given = "null" if measure.stderr is None else f"{measure.stderr:.12g}"
        return f"stderr: must be what the items give, {error:.12g}, got {given}"
    return ""
