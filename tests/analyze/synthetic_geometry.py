"""Geometry records of a synthetic study: every quantity follows from one strength per run, so the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import polars as pl

from peft_arena.core.measure import Measure
from peft_arena.core.quantities import quantity_of
from peft_arena.core.specs import RunSpec
from peft_arena.store.records import GeometryRecord, GeometryRow
from tests.analyze.synthetic import PROVENANCE, Synthetic

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SPECTRA = ("stable_rank", "entropy_rank", "deviation_mean", "adaptation_mean", "l2_relative", "spectral_norm_relative")
ACTIVATIONS = ("procrustes_residual", "gram_distortion", "cka", "pca_distance_32")
PARTS = ("spectra", "drift", "activations")
KEYS = {part: f"{part}-0123456789ab" for part in PARTS}


def make_record(
    part: str,
    strength: float,
    *,
    subject: str = "run",
    step: int | None = 200,
    rank: int = 8,
    blocks: int = 4,
    seed: int = 0,
    changed: bool = True,
) -> GeometryRecord:
    """Return a record of one part; ``changed`` False: the weights are the pretrained ones."""
    rng = np.random.default_rng(seed)
    rows = {"spectra": _spectra_rows, "drift": _drift_rows, "activations": _activation_rows}[part](
        strength, rank, blocks, rng
    )
    if not changed:
        reason = "the weight is unchanged"
        rows = [
            row.model_copy(update={"values": dict.fromkeys(row.values), "reasons": dict.fromkeys(row.values, reason)})
            for row in rows
        ]
    return GeometryRecord(
        subject=subject,
        step=step,
        factor=1.0,
        spec={"what": part},
        summary=tuple(_summary(part, rows, strength, changed)),
        rows=tuple(rows),
        provenance=PROVENANCE,
    )


def make_arrays(
    strength: float, *, rank: int = 8, blocks: int = 4, directions: int = 96, seed: int = 0
) -> pl.DataFrame:
    """Return profiles whose deviation and adaptation are ``strength`` times a curve that falls with the direction."""
    rng = np.random.default_rng(seed)
    index = np.arange(directions)
    base = 20.0 * (index + 1.0) ** -0.7
    frames = []
    for block in range(blocks):
        for kind in KINDS:
            tilt = np.exp(-index * rank / (8 * directions)) + 0.05
            noise = np.exp(0.4 * rng.normal(size=(2, directions)))
            deviation = strength * tilt * noise[0] * (1 + 0.2 * block)
            change = np.where(index < rank, strength * 3.0 * 0.8 ** (16 * index / max(rank, 16)), 0.0)
            frames.append(
                pl.DataFrame(
                    {
                        "module": [f"model.layers.{block}.{kind}"] * directions,
                        "block": [block] * directions,
                        "index": index,
                        "singular_value": base,
                        "retention": base + deviation,
                        "deviation": deviation,
                        "adaptation": 2 * strength * (tilt + 0.1) * noise[1],
                        "alignment": pl.Series([None] * directions, dtype=pl.Float64),
                        "change_singular_value": change,
                    }
                )
            )
    return pl.concat(frames)


def add_geometry(
    study: Synthetic,
    strength: Mapping[str, float],
    *,
    weightless: tuple[str, ...] = (),
    missing: tuple[str, ...] = (),
    spread: float = 0.1,
    of_run: Callable[[RunSpec], float] | None = None,
    parts: tuple[str, ...] = PARTS,
) -> Synthetic:
    """Write geometry for the arms named in ``strength``, and return the study with a view that asks for it.

    ``weightless``: arms of methods without weights of their own; ``missing``: arms whose records are not there yet;
    ``of_run``: the strength of a run, instead of its arm's with some spread over seeds.
    """
    wanted: dict[str, tuple[str, ...]] = {}
    for place, arm in enumerate(study.view.arms):
        for run in arm.runs:
            own = tuple(part for part in parts if part == "activations" or arm.label not in weightless)
            wanted[run.run_id] = tuple(KEYS[part] for part in own)
            directory = study.store.run(run)
            training = directory.training()
            if arm.label in missing or arm.label not in strength or training is None:
                continue
            amount = of_run(run) if of_run else strength[arm.label] * (1 + spread * (run.seed - 1))
            rank = (4, 8, 32, 96)[place % 4]
            for part in own:
                record = make_record(part, amount, subject=run.run_id, rank=rank, seed=place * 10 + run.seed)
                arrays = make_arrays(amount, rank=rank, seed=place * 10 + run.seed) if part == "spectra" else None
                directory.write_geometry(directory.point(training.steps), KEYS[part], record, arrays)
    return replace(study, view=replace(study.view, geometry=wanted))


def _row(block: int | None, kind: str, values: Mapping[str, float], prompts: str = "") -> GeometryRow:
    module = kind if block is None else f"model.layers.{block}.{kind}"
    return GeometryRow(module=module, block=block, prompts=prompts, values=dict(values))  # type: ignore[arg-type]


def _spectra_rows(strength: float, rank: int, blocks: int, rng: np.random.Generator) -> list[GeometryRow]:
    rows = []
    for block in range(blocks):
        for place, kind in enumerate(KINDS):
            stable = 1 + (rank - 1) * (0.3 + 0.4 * block / blocks) * float(rng.uniform(0.8, 1.0)) * (1 - 0.08 * place)
            values = [stable, min(rank, 1.3 * stable), strength, 2 * strength, 0.5 * strength, 0.3 * strength]
            rows.append(_row(block, kind, dict(zip(SPECTRA, values, strict=True))))
    return rows


def _drift_rows(strength: float, rank: int, blocks: int, rng: np.random.Generator) -> list[GeometryRow]:
    rows = []
    for block in range(blocks):
        for kind in KINDS:
            general, target = strength**2 * float(rng.uniform(0.5, 1.5)), strength**1.5 * float(rng.uniform(0.5, 1.5))
            for prompts, value in (("general", general), ("target", target), ("ratio", general / target)):
                rows.append(_row(block, kind, {"drift_relative": value, "drift_absolute": 3 * value}, prompts))
    return rows


def _activation_rows(strength: float, rank: int, blocks: int, rng: np.random.Generator) -> list[GeometryRow]:
    rows = []
    for prompts, more in (("general", 1.0), ("target", 1.6)):
        for block in (1, blocks - 1):
            for kind in (KINDS[0], KINDS[1], KINDS[2], KINDS[6]):
                amount = strength * more * float(rng.uniform(0.9, 1.1))
                values = [0.4 * amount, 0.6 * amount, 1 / (1 + amount), 0.2 * amount / (1 + amount)]
                rows.append(_row(block, kind, dict(zip(ACTIVATIONS, values, strict=True)), prompts))
        rows.append(_row(None, "", {"kl": strength**2 * more}, prompts))
    return rows


def _summary(part: str, rows: list[GeometryRow], strength: float, changed: bool) -> list[Measure]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.values.items():
            groups.setdefault(f"{name}_{row.prompts}" if row.prompts else name, []).append(value)  # type: ignore[arg-type]
    if part == "spectra":
        groups |= {"global_l2": [7 * strength if changed else None], "global_l2_relative": [strength]}  # type: ignore[list-item]
    found = []
    for name, values in groups.items():
        known = [value for value in values if value is not None]
        unit = quantity_of("kl").unit if name.startswith("kl") else "1"
        found.append(
            Measure(
                metric=name,
                value=float(np.mean(known)) if known else None,
                unit=unit,
                better="neither",
                how="mean over modules" if known else "the weight is unchanged",
                n=len(known),
                stderr=float(np.std(known, ddof=1) / len(known) ** 0.5) if len(known) > 1 else None,
            )
        )
    return found
