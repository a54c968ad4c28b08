"""The report's section over all targets: each arm's mean score, gain, retention and cost, and PSCP of the means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_arena.analyze.costs import PEAK_MEMORY, TRAINABLE
from peft_arena.analyze.over_targets import ArmOverTargets, OverTargets
from peft_arena.analyze.pscp import FLOPS, NAMES
from peft_arena.report.markup import Markup, cell, join, table, tag
from peft_arena.report.numbers import NONE, plain, quantity, signed
from peft_arena.report.page_tables import estimate_cell, judged_cell, pair_cells, pair_name

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.analyze.random_effects import OverEffects


def over_targets_section(found: OverTargets) -> Markup:
    """Return a row per arm, those with the highest mean gain first, and every two arms compared over all targets."""
    parts: list[object] = [over_targets_table(found)]
    if found.comparisons:
        parts.append(tag("details", tag("summary", f"All {len(found.comparisons)} pairs"), _pairs(found)))
    return join(parts)


def over_targets_table(found: OverTargets) -> Markup:
    """Return a row per arm, those with the highest mean gain first."""
    operations = None if found.choice is None else found.choice.operations
    flops = () if operations is None else (FLOPS[operations],)
    head: list[object] = ["arm", "mean score (%)", "gain (points)", "gain on a further target", "rank"]
    head += ["mean retention (points)"]
    head += ["trained parameters", *(f"forward FLOPs, {operations}" for _ in flops), "peak training memory"]
    head += [] if operations is None else [f"PSCP, {operations} FLOPs", "rank over constants"]
    arms = sorted(found.arms, key=lambda arm: (arm.gain is None, -(arm.gain.estimate.value if arm.gain else 0.0)))
    rows = [_row(arm, flops, operations is not None) for arm in arms]
    base = NONE if found.base is None else f"{plain(found.base)} %"
    count = len(found.targets)
    note = (
        f"Over {count} targets: {'; '.join(found.targets)}. Scores are unweighted means; the pretrained model's is "
        f"{base}. Correlations count times 100. An arm without a value on one of them has no mean, and the reason. "
        "Gains are random effects over targets (Paule-Mandel, Hartung-Knapp): brackets are 95 % intervals of the mean "
        "over targets like these, and “on a further target” is where the gain on one more would lie with 95 %, which "
        "needs three targets. Retention is of the same items after every training, and its interval counts what the "
        "targets share; its word is against the pretrained model. Ranks hold 95 % of the joint draws of seeds and "
        "items, over these targets. Costs: means over targets."
    )
    if found.choice is not None:
        note += (
            " PSCP is that of the mean score at the mean costs; the ranks are over the grid of constants, see the "
            "sections on PSCP of each target."
        )
    return table("Over all targets", head, rows, "over", note)


def _row(arm: ArmOverTargets, flops: tuple[str, ...], scored: bool) -> list[Markup]:
    title = arm.missing or None
    nothing = cell(tag("span", NONE, class_="none"), title=title)
    further = None if arm.gain is None else arm.gain.prediction
    row = [
        join([arm.label]),
        nothing if arm.score is None else cell(plain(arm.score)),
        nothing if arm.gain is None else estimate_cell(arm.gain.estimate, ""),
        nothing if further is None else cell(f"{signed(further[0])} to {signed(further[1])}"),
        cell(NONE if arm.rank is None else arm.rank),
        judged_cell(arm.judged, "not on every target"),
    ]
    for name in (TRAINABLE, *flops, PEAK_MEMORY):
        unit = {TRAINABLE: "", PEAK_MEMORY: "bytes"}.get(name, "FLOPs")
        value = arm.costs[name]
        row.append(cell(NONE if value is None else quantity(value, unit)))
    if scored:
        band = arm.band
        unscored = cell(
            tag("span", NONE, class_="none"), title=title or _lacking(arm, (TRAINABLE, *flops, PEAK_MEMORY))
        )
        row += [unscored, unscored] if band is None else [cell(plain(band.score)), cell(f"{band.rank} [{band.ranks}]")]
    return row


def _pairs(found: OverTargets) -> Markup:
    head = ["arms", "gain, difference (points)", "p (Holm)", "gain", "retention, difference (points)", "p (Holm)"]
    rows = [
        [pair_name(pair), *pair_cells(pair.gain, pair), *pair_cells(pair.retention, pair)] for pair in found.comparisons
    ]
    note = "Differences on each target, put together; corrected with all other comparisons of the study."
    return table("Left minus right over all targets", [*head, "retention"], rows, "pairs", note, text=(3, 6))


def _lacking(arm: ArmOverTargets, names: tuple[str, ...]) -> str:
    """Say which inputs of PSCP there are not, for an arm with a mean score."""
    values = {NAMES[name]: arm.costs[name] for name in names}
    told = [
        f"{name}: {'not on every target' if value is None else 'negative'}"
        for name, value in values.items()
        if value is None or value < 0
    ]
    return "; ".join(told) or "the mean score is negative"


def over_targets_frame(found: OverTargets) -> pl.DataFrame:
    """Return a row per arm for the CSV file."""
    import polars as pl

    rows = [
        {
            "arm": arm.label,
            "targets": len(found.targets),
            "score": arm.score,
            **_ends("gain", arm.gain),
            "rank_first": None if arm.rank is None else arm.rank.first,
            "rank_last": None if arm.rank is None else arm.rank.last,
            **_ends("retention", arm.retention),
            "retention_words": ", ".join(arm.judged.words),
            **arm.costs,
            "pscp": None if arm.band is None else arm.band.score,
            "missing": arm.missing or None,
        }
        for arm in found.arms
    ]
    text = dict.fromkeys(("arm", "missing", "retention_words"), pl.String)
    counts = dict.fromkeys(("targets", "rank_first", "rank_last"), pl.Int64)
    schema: dict[str, Any] = {name: pl.Float64 for row in rows[:1] for name in row}
    return pl.DataFrame(rows, schema=schema | text | counts, orient="row")


def _ends(name: str, found: OverEffects | None) -> dict[str, float | None]:
    parts = ("value", "low", "high", "stderr")
    values = {f"{name}_{part}": None if found is None else getattr(found.estimate, part) for part in parts}
    low, high = (None, None) if found is None or found.prediction is None else found.prediction
    return {
        **values,
        f"{name}_tau": None if found is None else found.tau,
        f"{name}_further_low": low,
        f"{name}_further_high": high,
    }
