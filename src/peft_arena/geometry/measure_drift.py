"""Measures capability-conditioned drift of tuned points: one pass of the pretrained model for each prompt set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError
from peft_arena.core.quantities import quantity_of
from peft_arena.geometry.measured import Measured, Progress
from peft_arena.geometry.parts import Parts
from peft_arena.geometry.prepare import SETS, common_base, identity, part_key, prompt_sets
from peft_arena.geometry.values import Values, mean_measure, ratios
from peft_arena.methods.targets import block_of

if TYPE_CHECKING:
    from peft_arena.core.geometry import DriftSpec
    from peft_arena.core.measure import Measure
    from peft_arena.geometry.prompts import PromptSet
    from peft_arena.models.load import Loaded
    from peft_arena.store.records import GeometryRow
    from peft_arena.weights.change import Change
    from peft_arena.weights.effective import EffectiveWeights
    from peft_arena.weights.tuned import Tuned

HELD_BYTES = 2**30
"""Most bytes of weight changes that stay in memory between batches; those beyond are read again for each."""


def measure_drift(tuned: Sequence[Tuned], spec: DriftSpec, *, parts: Path | None, progress: Progress) -> list[Measured]:
    """Return the drift of each tuned point at every module, in the order of the points.

    Finished prompt sets are kept in ``parts``: the sums of all modules come out of one pass, and are kept one by one.

    Args:
        tuned: points on the same base.
        spec: what is measured.
        parts: where finished pieces are kept; None for nowhere.
        progress: called with the fraction that is done.

    Raises:
        UserError: a point has no weights of its own, the points have different bases, a module or a prompt source is
            not there.
    """
    from peft_arena.geometry.modules import choose
    from peft_arena.models.load import load

    base = common_base(tuned)
    weights = [_weights(point) for point in tuned]
    modules = choose(weights[0].modules(), spec.modules, spec.layers)
    progress(0.0, f"loading {base.name}")
    loaded = load(base)
    sets = prompt_sets(spec, loaded)
    kept, points = Parts(parts), [identity(point) for point in tuned]
    changes = Changes(weights)
    found: list[dict[tuple[str, str], Values]] = [{} for _ in tuned]
    for number, which in enumerate(SETS):
        keys = {
            (subject, module): part_key(points[subject], spec, which, sets[which], module)
            for subject in range(len(tuned))
            for module in modules
        }
        missing = _read(kept, keys, which, found)
        if missing:

            def done(fraction: float, first: int = number, which: str = which) -> None:
                progress((first + fraction) / len(SETS), f"{which} prompts")

            _measure(loaded, sets[which], missing, changes, done, which, found)
            for key in missing:
                values = found[key[0]][key[1], which]
                kept.put(keys[key], {"values": values.values, "reasons": values.reasons}, {})
    progress(1.0, "done")
    return [_measured(results, modules, sets) for results in found]


def _weights(point: Tuned) -> EffectiveWeights:
    """Return a point's weights; asking for them says why there are none."""
    try:
        return point.weights()
    except UserError as error:
        if point.has_weights():
            raise
        raise UserError(f"drift needs a change of weights, and {point.subject} has none: {error}") from error


def _read(
    kept: Parts, keys: dict[tuple[int, str], str], which: str, found: list[dict[tuple[str, str], Values]]
) -> list[tuple[int, str]]:
    """Enter what is kept already; return which (point, module) are not."""
    missing = []
    for (subject, module), key in keys.items():
        part = kept.get(key)
        if part is None:
            missing.append((subject, module))
        else:
            found[subject][module, which] = Values(part[0]["values"], part[0]["reasons"])
    return missing


def _measure(
    loaded: Loaded,
    prompts: PromptSet,
    missing: Sequence[tuple[int, str]],
    changes: Changes,
    done: Callable[[float], None],
    which: str,
    found: list[dict[tuple[str, str], Values]],
) -> None:
    """Enter the drift of some (point, module) on one prompt set, by one pass."""
    from peft_arena.geometry.collect import collect_energies
    from peft_arena.geometry.drift import drift_values

    modules = list(dict.fromkeys(module for _, module in missing))
    subjects = sorted({subject for subject, _ in missing})
    energies = collect_energies(
        loaded.model, prompts, modules, len(subjects), lambda place, name: changes.get(subjects[place], name), done
    )
    for subject, module in missing:
        sums = energies[module][subjects.index(subject)]
        found[subject][module, which] = drift_values(sums, changes.norm(subject, module))


class Changes:
    """Weight changes of tuned points, the first ones asked for held in memory as far as there is room."""

    def __init__(self, weights: Sequence[EffectiveWeights], limit: int = HELD_BYTES) -> None:
        """Hold nothing yet.

        Args:
            weights: of each point.
            limit: most bytes to hold.
        """
        self._weights = weights
        self._room = limit
        self._held: dict[tuple[int, str], Change | None] = {}
        self._norms: dict[tuple[int, str], float] = {}

    def get(self, subject: int, module: str) -> Change | None:
        """Return the change of a point at a module; None if the weight is unchanged."""
        key = (subject, module)
        if key in self._held:
            return self._held[key]
        pair = self._weights[subject].pair(module)
        if key not in self._norms:
            self._norms[key] = 0.0 if pair.change is None else pair.change.norms(pair.base).l2
        size = _bytes(pair.change)
        if size <= self._room:
            self._room -= size
            self._held[key] = pair.change
        return pair.change

    def norm(self, subject: int, module: str) -> float:
        """Return ||D||_F."""
        if (subject, module) not in self._norms:
            self.get(subject, module)
        return self._norms[subject, module]


def _bytes(held: Any) -> int:
    """Return the memory of the tensors that an object holds, those it has computed and kept among them."""
    if held is None:
        return 0
    values = [part for value in vars(held).values() for part in (value if isinstance(value, tuple) else (value,))]
    return sum(int(part.nbytes) for part in values if hasattr(part, "nbytes"))


def _measured(results: dict[tuple[str, str], Values], modules: Sequence[str], sets: dict[str, PromptSet]) -> Measured:
    """Return rows and means of one point."""
    from peft_arena.store.records import GeometryRow

    rows: list[GeometryRow] = []
    for module in modules:
        both = {which: results[module, which] for which in SETS}
        both["ratio"] = ratios(both["general"].values, both["target"].values)
        for which, found in both.items():
            rows.append(
                GeometryRow(
                    module=module,
                    block=block_of(module),
                    prompts=which,  # type: ignore[arg-type]
                    values=found.values,
                    reasons=found.reasons,
                )
            )
    return Measured(tuple(rows), tuple(_summary(rows, sets)))


def _summary(rows: Sequence[GeometryRow], sets: dict[str, PromptSet]) -> list[Measure]:
    """Return the mean over modules of each quantity on each set, and of their ratios."""
    on = {which: f"on {prompts.describe()}" for which, prompts in sets.items()}
    on["ratio"] = f"general ({on['general']}) over target prompts ({on['target']})"
    found = []
    for which, where in on.items():
        here = [row for row in rows if row.prompts == which]
        for name in here[0].values:
            quantity = quantity_of(name)
            unit = "1" if which == "ratio" else quantity.unit
            how = f"mean over modules of {quantity.formula}, {where}"
            found.append(mean_measure(f"{name}_{which}", [row.values[name] for row in here], unit=unit, how=how))
    return found
