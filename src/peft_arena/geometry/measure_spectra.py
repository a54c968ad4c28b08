"""Weight-space spectra of tuned points that share a pretrained model: module by module, each base weight once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.geometry import SpectraSpec
from peft_arena.core.ids import canonical_json
from peft_arena.core.measure import Measure
from peft_arena.core.quantities import QUANTITIES
from peft_arena.geometry.heap import give_back
from peft_arena.geometry.measured import Measured, Progress
from peft_arena.geometry.modules import choose
from peft_arena.geometry.parts import Parts
from peft_arena.geometry.prepare import common_base, identity
from peft_arena.geometry.spectra import NO_BASE, Spectrum, norm_scalars, spectrum
from peft_arena.methods.targets import block_of
from peft_arena.store.records import GeometryRow
from peft_arena.weights.change import Change, Norms, Svd, entry_norms
from peft_arena.weights.svd import SvdCache

if TYPE_CHECKING:
    import polars as pl

    from peft_arena.weights.effective import EffectiveWeights, Pair
    from peft_arena.weights.tuned import Tuned

PIECE = 1
"""Version of what is kept of a finished module; a change of it or of a formula raises it."""
UNCHANGED = "the weight is unchanged"
NOT_FINITE = "the tuned weight has values that are not finite"
NONE_CHANGED = "no linear layer that was asked for is changed"
SCALARS = tuple(name for name, quantity in QUANTITIES.items() if quantity.part in ("spectra", "norms"))
NORMS = tuple(name for name in SCALARS if QUANTITIES[name].part == "norms")
PROFILES = ("singular_value", "retention", "deviation", "adaptation", "alignment", "change_singular_value")
GLOBAL = {
    "l1": "sum |d| over {} parameters of the model",
    "l2": "square root of sum d^2 over {} parameters of the model",
    "l1_relative": "sum |d| / sum |w0| over {} parameters of the model",
    "l2_relative": "||D||_F / ||W0||_F over {} parameters of the model taken as one vector",
}


@dataclass(frozen=True)
class _Piece:
    """What was found at one parameter of one point; ``values`` is empty for one that is no module asked for."""

    norms: Norms | None
    """Of the change; None where it is not finite."""
    changed: bool
    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, np.ndarray] = field(default_factory=dict)


def measure_spectra(
    tuned: Sequence[Tuned], spec: SpectraSpec, *, cache: SvdCache, parts: Path | None, progress: Progress
) -> list[Measured]:
    """Measure the spectra of every point against the pretrained model they share.

    Rows are of the linear layers asked for and, if all of them are, of every other parameter that is changed; the
    global norms are always over all parameters of the model. A pretrained weight is read and decomposed once for all
    points.

    Args:
        tuned: points with the same base.
        spec: what to measure.
        cache: keeps the decompositions of the pretrained weights.
        parts: directory for finished modules, from which an interrupted call, repeated, goes on; None: none are kept.
        progress: told the fraction done and the module.

    Raises:
        UserError: a pattern names no module, the points have different bases, a method has no weights of its own, or
            a pretrained weight is not finite.
    """
    if not tuned:
        return []
    common_base(tuned)
    weights = [point.weights() for point in tuned]
    modules = choose(weights[0].modules(), spec.modules, spec.layers)
    keys = [canonical_json([PIECE, spec.id, identity(point)]) for point in tuned] if parts is not None else []
    call = _Call(weights, spec, cache, Parts(parts), keys)
    names = list(dict.fromkeys(name for one in weights for name in one.parameters()))
    own = {f"{module}.weight": module for module in modules}
    bases: dict[str, Norms] = {}
    found: list[dict[str, _Piece]] = [{} for _ in tuned]
    for place, name in enumerate(names):
        progress(place / len(names), own.get(name, name))
        bases[name], pieces = call.kept(name) or call.measured(name, own.get(name))
        for held, piece in zip(found, pieces, strict=True):
            held[name] = piece
        if name in own:
            give_back()
    progress(1.0, "")
    everything = len(modules) == len(weights[0].modules())
    return [_Result(pieces, bases, own, everything, spec).measured() for pieces in found]


@dataclass(frozen=True)
class _Call:
    """What one call measures with."""

    weights: Sequence[EffectiveWeights]
    spec: SpectraSpec
    cache: SvdCache
    parts: Parts
    keys: Sequence[str]
    """What each point's pieces are kept under; none where they are not kept."""

    def kept(self, name: str) -> tuple[Norms, list[_Piece]] | None:
        """Return the norms of a pretrained parameter and every point's piece, None unless all are kept."""
        stored = [self.parts.get(f"{key} {name}") for key in self.keys]
        read = [_unpacked(*piece) for piece in stored if piece is not None]
        if not self.keys or len(read) < len(self.keys):
            return None
        return read[0][1], [piece for piece, _ in read]

    def measured(self, name: str, module: str | None) -> tuple[Norms, list[_Piece]]:
        """Return the same, made where it is not kept; spectra are kept, norms are quickly had again."""
        worker = _Worker(name, module, self)
        pieces = []
        for place, weights in enumerate(self.weights):
            key = f"{self.keys[place]} {name}" if self.keys else None
            stored = self.parts.get(key) if key is not None else None
            piece = _unpacked(*stored)[0] if stored is not None else worker.piece(weights)
            if key is not None and stored is None and piece.profiles:
                self.parts.put(key, *_packed(piece, worker.norms))
            pieces.append(piece)
        return worker.norms, pieces


class _Worker:
    """One pretrained parameter, its norms and its decomposition, each made once."""

    def __init__(self, name: str, module: str | None, call: _Call) -> None:
        self.name, self.module = name, module
        self.cache, self.alignment = call.cache, call.spec.alignment
        self.dtype: torch.dtype = getattr(torch, call.spec.precision)
        self.holder = next(one for one in call.weights if name in one.parameters())
        self._first: Pair | None = self.holder.parameter(name)
        self.base = self._first.base.to(self.dtype)
        self.norms = entry_norms(self.base)
        if not _finite(self.norms):
            raise UserError(f"the pretrained {name} has values that are not finite: nothing can be measured against it")
        self._svd: Svd | None = None

    def piece(self, weights: EffectiveWeights) -> _Piece:
        """Measure one point."""
        change = self._change(weights)
        if change is None:
            return self._without_spectrum(Norms(0.0, 0.0), UNCHANGED, changed=False)
        change = change.to(self.dtype)
        norms = change.norms(self.base)
        if not _finite(norms):
            return self._without_spectrum(None, NOT_FINITE, changed=True)
        if self.module is None:
            return self._without_spectrum(norms, "", changed=True)
        if self._svd is None:
            self._svd = self.cache.get(self.base, self.holder.base_hash(self.name), self.dtype)
        result = spectrum(self.base, self._svd, change, norms=self.norms, change_norms=norms, alignment=self.alignment)
        return _Piece(norms, True, result.scalars, result.reasons, _profiles(result))

    def _change(self, weights: EffectiveWeights) -> Change | None:
        if weights is self.holder and self._first is not None:  # it came with the pretrained weight
            first, self._first = self._first, None
            return first.change
        return weights.parameter(self.name).change if self.name in weights.parameters() else None

    def _without_spectrum(self, norms: Norms | None, reason: str, changed: bool) -> _Piece:
        """Return what is known where there is no spectrum: the norms, if the change is finite."""
        shown = [name for name in SCALARS if name not in NORMS] if self.module is not None else []
        if self.alignment != "all":
            shown = [name for name in shown if name != "alignment_mean"]
        values: dict[str, float | None] = dict.fromkeys(shown)
        reasons = dict.fromkeys(shown, reason)
        values |= dict.fromkeys(NORMS) if norms is None else norm_scalars(norms, self.norms)
        for name in NORMS:
            if values[name] is None:
                reasons[name] = reason if norms is None else NO_BASE
        return _Piece(norms, changed, values, reasons)


@dataclass(frozen=True)
class _Result:
    """Everything found at one point."""

    pieces: Mapping[str, _Piece]
    bases: Mapping[str, Norms]
    modules: Mapping[str, str]
    """The modules asked for by the names of their weights."""
    everything: bool
    """Whether all modules were asked for: rows of other parameters are then shown too."""
    spec: SpectraSpec

    def measured(self) -> Measured:
        """Return it as rows, summary and profiles."""
        import polars as pl

        return Measured(
            rows=tuple(self._rows()),
            summary=(*self._means(), *self._totals()),
            arrays=self._arrays(pl.Float32 if self.spec.precision == "float32" else pl.Float64),
        )

    def _rows(self) -> Iterator[GeometryRow]:
        for name, piece in self.pieces.items():
            shown = self.modules.get(name)
            if shown is None and self.everything and piece.changed:
                shown = name
            if shown is not None:
                block = block_of(shown)
                yield GeometryRow(module=shown, block=block, values=piece.values, reasons=piece.reasons)

    def _means(self) -> Iterator[Measure]:
        changed = [piece for name, piece in self.pieces.items() if name in self.modules and piece.changed]
        for metric in SCALARS:
            given = [piece.values[metric] for piece in changed if metric in piece.values]
            if not given and metric == "alignment_mean":
                continue
            known = [value for value in given if value is not None]
            how = f"mean over the {len(known)} changed linear layers that have one" if known else NONE_CHANGED
            yield Measure(
                metric=metric,
                value=float(np.mean(known)) if known else None,
                unit=QUANTITIES[metric].unit,
                better="neither",
                how=how if known or not given else "defined at none of the changed linear layers",
                n=len(known),
                stderr=float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None,
                unscored=len(given) - len(known),
            )

    def _totals(self) -> Iterator[Measure]:
        changes = [piece.norms for piece in self.pieces.values()]
        finite = [norms for norms in changes if norms is not None]
        values: dict[str, float | None] = dict.fromkeys(NORMS)
        if len(finite) == len(changes):
            values = norm_scalars(_total(finite), _total(self.bases.values()))
        for metric, value in values.items():
            how = GLOBAL[metric].format(len(changes))
            if value is None:
                how = NO_BASE if len(finite) == len(changes) else NOT_FINITE
            yield Measure(metric=f"global_{metric}", value=value, unit="1", better="neither", how=how, n=len(changes))

    def _arrays(self, kind: type[pl.Float32 | pl.Float64]) -> pl.DataFrame:
        import polars as pl

        found = [(self.modules[name], piece.profiles) for name, piece in self.pieces.items() if piece.profiles]
        sizes = [len(profiles["singular_value"]) for _, profiles in found]
        owner = np.repeat(np.arange(len(found)), sizes)
        columns = {
            "module": pl.Series([module for module, _ in found], dtype=pl.String).gather(owner),
            "block": pl.Series([block_of(module) for module, _ in found], dtype=pl.Int32).gather(owner),
            "index": pl.Series(_joined([np.arange(size, dtype=np.int32) for size in sizes]), dtype=pl.Int32),
        }
        for name in PROFILES:
            columns[name] = pl.Series(_joined([_column(profiles, name) for _, profiles in found]), dtype=kind)
            if name == "alignment":
                absent = np.array([name not in profiles for _, profiles in found], dtype=bool)
                columns[name] = pl.select(
                    pl.when(pl.Series(absent[owner])).then(None).otherwise(columns[name])
                ).to_series()
        return pl.DataFrame(columns)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _column(profiles: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return profiles[name] if name in profiles else np.zeros_like(profiles["singular_value"])


def _total(norms: Iterable[Norms]) -> Norms:
    """Return the norms of several parameters taken as one vector."""
    held = list(norms)
    return Norms(math.fsum(one.l1 for one in held), math.sqrt(math.fsum(one.l2**2 for one in held)))


def _finite(norms: Norms) -> bool:
    """Say whether the parameter itself is finite: a value that is not, is in its norms."""
    return math.isfinite(norms.l1) and math.isfinite(norms.l2)


def _profiles(result: Spectrum) -> dict[str, np.ndarray]:
    found = {name: getattr(result, name) for name in PROFILES}
    return {name: tensor.detach().cpu().numpy() for name, tensor in found.items() if tensor is not None}


def _packed(piece: _Piece, base: Norms) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    scalars = {"norms": piece.norms, "base": base, "values": piece.values, "reasons": piece.reasons}
    return scalars, piece.profiles


def _unpacked(scalars: dict[str, Any], profiles: dict[str, np.ndarray]) -> tuple[_Piece, Norms]:
    piece = _Piece(Norms(*scalars["norms"]), True, scalars["values"], scalars["reasons"], profiles)
    return piece, Norms(*scalars["base"])
