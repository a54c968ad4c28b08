"""How far each transformer block of a tuned model is from the pretrained one.

W0 is the pretrained weight of a linear layer, D its change. The strength of a block is the root mean square over its
linear layers, unchanged ones counted as zero, of one of

* ``relative_norm``: ||D||_F / ||W0||_F, for every method;
* ``spectral``: ||D||_2 / ||W0||_2, for every method, which needs the decomposition of W0;
* ``angle``: the root mean square of the angles, in radians, by which a rotation turns the input of the layer. The
  singular values q of a generator Q of a Cayley transform are those of its planes, each turned by 2 arctan q. What a
  method does besides, such as the stretching of rows in BOFT, has no angle.

Layers whose W0 is zero have no relative size and are left out. Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from peft_arena.core.errors import UserError
from peft_arena.methods.targets import block_of
from peft_arena.paths.base import Progress, quiet

if TYPE_CHECKING:
    from peft_arena.weights.change import Change
    from peft_arena.weights.effective import EffectiveWeights
    from peft_arena.weights.rotation import Rotation
    from peft_arena.weights.svd import SvdCache

Kind = Literal["relative_norm", "spectral", "angle"]
"""``relative_norm``: ||D||_F / ||W0||_F; ``spectral``: ||D||_2 / ||W0||_2; ``angle``: of a rotation, in radians."""
NO_LINEAR = "no weight of a linear layer inside a transformer block is changed, so that no block has a strength"


def block_strengths(
    weights: EffectiveWeights,
    kind: Kind = "relative_norm",
    *,
    blocks: Collection[int] | None = None,
    cache: SvdCache | None = None,
    progress: Progress = quiet,
) -> dict[int, float]:
    """Return the strength of each transformer block at a point, by the block's index, ascending.

    Args:
        weights: at any point of a path.
        kind: which measure.
        blocks: only of these; None for all that have linear layers.
        cache: keeps the decompositions of the pretrained weights, for ``spectral``; None: they are not kept.
        progress: told the fraction done and the module.

    Returns:
        At least 0; 0 for a block that is not changed.

    Raises:
        UserError: a change is not finite, or is no rotation where an angle is asked for.
    """
    modules = [(name, block_of(name)) for name in weights.modules()]
    chosen = [(name, block) for name, block in modules if block is not None and (blocks is None or block in blocks)]
    squares: dict[int, list[float]] = {block: [] for block in sorted({block for _, block in chosen})}
    for done, (name, block) in enumerate(chosen):
        progress(done / len(chosen), name)
        found = _of_layer(weights, name, kind, cache)
        if found is not None:
            squares[block].append(found * found)
    progress(1.0, "")
    return {block: math.sqrt(math.fsum(found) / len(found)) if found else 0.0 for block, found in squares.items()}


def refuses(weights: EffectiveWeights, kind: Kind) -> str:
    """Return in one line why blocks of these weights have no strength of this kind; empty if they have."""
    changed = [name for name in weights.modules() if block_of(name) is not None and may_change(weights, name)]
    if not changed:
        return NO_LINEAR
    if kind != "angle":
        return ""
    if weights.way == "linear":
        return "strength angle is that of rotations, which the way linear leaves; use relative_norm or spectral"
    for name in changed:
        change = weights.pair(name).change
        if change is not None and _rotation(change) is None:
            return _no_rotation(name)
    return ""


def may_change(weights: EffectiveWeights, module: str) -> bool:
    """Say whether the checkpoint holds a change of the weight of a linear layer; it may be zero."""
    return weights.base_weights.canonical(f"{module}.weight") in weights.changes.makers


def _no_rotation(name: str) -> str:
    return f"strength angle is for block rotations, which the change of {name} is not; use relative_norm or spectral"


def _of_layer(weights: EffectiveWeights, name: str, kind: Kind, cache: SvdCache | None) -> float | None:
    """Return the strength of one linear layer; None where its pretrained weight is zero."""
    if not may_change(weights, name):
        return 0.0
    base, change = weights.pair(name)
    if change is None:
        return 0.0
    if kind == "angle":
        rotation = _rotation(change)
        if rotation is None:
            raise UserError(_no_rotation(name))
        size, whole = _angle(rotation), 1.0
    elif kind == "spectral":
        import torch

        from peft_arena.weights.svd import SvdCache

        kept = cache if cache is not None else SvdCache(None)
        svd = kept.get(base, weights.base_hash(f"{name}.weight"), torch.float32)
        size, whole = float(change.singular_values(base, svd)[0]), float(svd.values[0])
    else:
        from peft_arena.weights.change import entry_norms

        size, whole = change.norms(base).l2, entry_norms(base).l2
    if not (math.isfinite(size) and math.isfinite(whole)):
        raise UserError(f"the change of {name} has values that are not finite: its block has no strength")
    return size / whole if whole > 0 else None


def _rotation(change: Change) -> Rotation | None:
    """Return the rotation that a change is, or that it is besides a stretching of rows; None if there is none."""
    from peft_arena.weights.rotation import Rotation, StretchedRotation

    if isinstance(change, StretchedRotation):
        return change.rotation
    return change if isinstance(change, Rotation) else None


def _angle(change: Rotation) -> float:
    """Return the root mean square angle of a rotation over the dimensions it turns, in radians.

    The angles are those of the exact Cayley transform also where a series stands for it.
    """
    import torch

    sizes = torch.linalg.svdvals(change.skew.double())  # (blocks, side): the angle of each plane, twice
    return float((2 * torch.atan(sizes)).square().mean().sqrt())
