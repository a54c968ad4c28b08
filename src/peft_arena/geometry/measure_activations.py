"""Measures activation geometry and forward KL of tuned points.

The pretrained model goes over each prompt set once, every tuned model once; outputs of all modules at a fixed sample
of tokens go to files, and so do the pretrained model's logits (tokens * vocabulary * 4 bytes for each set). Only one
model is in memory at a time, and of the modules one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.measure import Measure
from peft_arena.core.quantities import quantity_of
from peft_arena.geometry.measured import Measured, Progress
from peft_arena.geometry.parts import Parts
from peft_arena.geometry.prepare import SETS, common_base, identity, part_key, prompt_sets
from peft_arena.geometry.values import Values, mean_measure
from peft_arena.methods.targets import block_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peft_arena.core.geometry import ActivationsSpec
    from peft_arena.geometry.activations import Spread
    from peft_arena.geometry.collect import Rows, Sample
    from peft_arena.geometry.prompts import PromptSet
    from peft_arena.weights.tuned import Tuned

OUTPUT = ""
"""The model's output, among names of modules."""
ROWS_AT_ONCE = 128
"""Most tokens whose logits of both models are compared at the same time."""
LOADING, PASSING = 0.1, 0.7
"""Share of the work on one model that loading it takes, and that it takes until the passes are over; for progress."""


class Piece(NamedTuple):
    """One thing to be measured of one point."""

    which: str
    module: str


@dataclass
class Found:
    """What is known of one point."""

    values: dict[Piece, Values] = field(default_factory=dict)
    stderr: dict[str, float | None] = field(default_factory=dict)
    """Of KL, by prompt set."""


@dataclass
class Work:
    """What is the same for all points of a call."""

    spec: ActivationsSpec
    folder: Path
    sets: dict[str, PromptSet]
    samples: dict[str, Sample]
    shared: bool
    """Whether what is computed of the pretrained model is needed again, for another point."""
    spreads: dict[Piece, Spread | None] = field(default_factory=dict)

    def rows(self, which: str, module: str, side: str) -> Rows:
        """Return where the rows of a module are; its number stands for its name."""
        from peft_arena.core.ids import content_id
        from peft_arena.geometry.collect import Rows

        return Rows(self.folder / f"{side}-{which}-{content_id(module)}.npy", self.samples[which].size)


def measure_activations(
    tuned: Sequence[Tuned], spec: ActivationsSpec, *, parts: Path | None, progress: Progress
) -> list[Measured]:
    """Return activation geometry and forward KL of each tuned point, in the order of the points.

    Finished modules are kept in ``parts``, one by one; a call that is repeated measures only the missing ones.

    Args:
        tuned: points on the same base.
        spec: what is measured.
        parts: where finished modules are kept; None for nowhere.
        progress: called with the fraction that is done.

    Raises:
        UserError: the points have different bases, or a module or a prompt source is not there.
    """
    from peft_arena.geometry.collect import draw
    from peft_arena.models.load import load

    base = common_base(tuned)
    progress(0.0, f"loading {base.name}")
    loaded = load(base)
    modules = wanted_modules(loaded.model, spec)
    sets = prompt_sets(spec, loaded)
    samples = {which: draw(prompts, spec.tokens, spec.seed) for which, prompts in sets.items()}
    kept, found = Parts(parts), [Found() for _ in tuned]
    pieces = [Piece(which, module) for which in SETS for module in (*modules, OUTPUT)]
    keys = [
        {piece: part_key(point, spec, piece.which, sets[piece.which], piece.module) for piece in pieces}
        for point in map(identity, tuned)
    ]
    missing = [_read(kept, own, known) for own, known in zip(keys, found, strict=True)]
    with _folder(parts) as folder:
        work = Work(spec, folder, sets, samples, shared=len(tuned) > 1)
        share = 1 / (1 + len(tuned))
        wanted = [piece for piece in pieces if any(piece in own for own in missing)]
        _collect(work, loaded.model, wanted, "base", lambda part: progress(share * part, "pretrained model"))
        del loaded
        for number, point in enumerate(tuned):
            if missing[number]:

                def done(part: float, first: int = number + 1, subject: str = point.subject) -> None:
                    progress(share * (first + part), subject)

                for piece in _measure(work, point, missing[number], found[number], done):
                    kept.put(keys[number][piece], _plain(found[number], piece), {})
    progress(1.0, "done")
    return [_measured(known, modules, work) for known in found]


def wanted_modules(model: nn.Module, spec: ActivationsSpec) -> tuple[str, ...]:
    """Return the modules that a spec measures, in the model's order.

    Raises:
        UserError: a pattern matches nothing, or the preset does not find its layers.
    """
    from peft_arena.geometry.modules import choose, linear_modules, paper_modules

    names = tuple(linear_modules(model))
    if spec.preset == "paper8":
        return paper_modules(names, type(model).__name__)
    return choose(names, spec.modules, spec.layers)


@contextmanager
def _folder(parts: Path | None) -> Iterator[Path]:
    """Give a folder for rows, beside the finished pieces where there are any, which may be on a larger disk."""
    if parts is not None:
        parts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rows-", dir=parts) as folder:
        yield Path(folder)


def _plain(found: Found, piece: Piece) -> dict[str, Any]:
    values = found.values[piece]
    return {"values": values.values, "reasons": values.reasons, "stderr": found.stderr.get(piece.which)}


def _read(kept: Parts, keys: dict[Piece, str], found: Found) -> list[Piece]:
    """Enter what is kept already; return what is not."""
    missing = []
    for piece, key in keys.items():
        part = kept.get(key)
        if part is None:
            missing.append(piece)
            continue
        found.values[piece] = Values(part[0]["values"], part[0]["reasons"])
        if piece.module == OUTPUT:
            found.stderr[piece.which] = part[0]["stderr"]
    return missing


def _collect(
    work: Work, model: nn.Module, pieces: Sequence[Piece], side: str, done: Callable[[float], None]
) -> dict[str, Tensor]:
    """Send each prompt set through a model once and keep the rows of modules on disk.

    The pretrained model's logits are kept too; of a tuned model they are compared with those as they come.

    Returns:
        KL of each token for each set where the output is among the pieces; nothing for the pretrained model.
    """
    import torch

    from peft_arena.geometry.collect import collect_outputs

    divergence: dict[str, Tensor] = {}
    sets = [which for which in SETS if any(piece.which == which for piece in pieces)]
    for number, which in enumerate(sets):
        here = [piece.module for piece in pieces if piece.which == which]
        files = {module: work.rows(which, module, side) for module in here if module != OUTPUT}
        sink: Callable[[Tensor, Tensor], None] | None = None
        if OUTPUT in here:
            before = work.rows(which, OUTPUT, "base")
            if side == "base":
                sink = before.write
            else:
                divergence[which] = torch.zeros(work.samples[which].size, dtype=torch.float64)
                sink = _comparer(before, divergence[which])

        def step(part: float, number: int = number) -> None:
            done((number + part) / len(sets))

        collect_outputs(model, work.sets[which], work.samples[which], files, sink, step)
    return divergence


def _comparer(before: Rows, divergence: Tensor) -> Callable[[Tensor, Tensor], None]:
    """Return what takes logits of a tuned model and enters their KL from the pretrained model's."""
    from peft_arena.geometry.activations import forward_kl

    def compare(rows: Tensor, logits: Tensor) -> None:
        for places, tuned in zip(rows.split(ROWS_AT_ONCE), logits.split(ROWS_AT_ONCE), strict=True):
            divergence[places] = forward_kl(before.read(places), tuned.float().cpu())

    return compare


def _measure(
    work: Work, point: Tuned, missing: Sequence[Piece], found: Found, done: Callable[[float], None]
) -> Iterator[Piece]:
    """Measure the missing pieces of one point, and yield each when it is known."""
    from peft_arena.geometry.activations import activation_values, clustered
    from peft_arena.models.load import load

    loaded = load(point.base)
    model = point.model(loaded)
    done(LOADING)
    divergence = _collect(work, model, missing, "tuned", lambda part: done(LOADING + part * (PASSING - LOADING)))
    del model, loaded
    for number, piece in enumerate(missing):
        if piece.module == OUTPUT:
            result = clustered(divergence[piece.which], work.samples[piece.which].owners())
            found.values[piece] = Values()
            found.values[piece].put("kl", result.mean)
            found.stderr[piece.which] = result.stderr if found.values[piece].values["kl"] is not None else None
        else:
            before, after = (work.rows(*piece, side) for side in ("base", "tuned"))
            found.values[piece], spread = activation_values(
                before.read(),
                after.read(),
                gram_tokens=work.spec.gram_tokens,
                pca=work.spec.pca,
                known=work.spreads.get(piece),
            )
            if work.shared:
                work.spreads[piece] = spread
            after.path.unlink()
        yield piece
        done(PASSING + (1 - PASSING) * (number + 1) / len(missing))


def _measured(found: Found, modules: Sequence[str], work: Work) -> Measured:
    """Return rows and means of one point."""
    from peft_arena.store.records import GeometryRow

    rows, summary = [], []
    for which in SETS:
        here = [
            GeometryRow(
                module=module,
                block=block_of(module),
                prompts=which,  # type: ignore[arg-type]
                values=(values := found.values[Piece(which, module)]).values,
                reasons=values.reasons,
            )
            for module in (*modules, OUTPUT)
        ]
        rows += here
        prompts, sample = work.sets[which], work.samples[which]
        where = f"at {sample.size} tokens drawn from {prompts.describe()}"
        for name in here[0].values:
            quantity = quantity_of(name)
            how = f"mean over modules of {quantity.formula}, {where}"
            over = [row.values[name] for row in here[:-1]]
            summary.append(mean_measure(f"{name}_{which}", over, unit=quantity.unit, how=how))
        summary.append(_kl(found, which, where, sample.size))
    return Measured(tuple(rows), tuple(summary))


def _kl(found: Found, which: str, where: str, tokens: int) -> Measure:
    """Return the mean KL over tokens."""
    output, quantity = found.values[Piece(which, OUTPUT)], quantity_of("kl")
    value = output.values["kl"]
    how = f"{quantity.formula}, {where}; standard error over prompts"
    return Measure(
        metric=f"kl_{which}",
        value=value,
        unit=quantity.unit,
        better="lower",
        how=how if value is not None else f"{output.reasons['kl']}; {how}",
        n=tokens,
        stderr=found.stderr[which],
    )
