"""Counting parameters and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.measure import Measure

if TYPE_CHECKING:
    from torch import nn

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"})
"""Files of a checkpoint that hold weights; configurations and tokenizers are not counted."""


def parameter_measures(model: nn.Module, trained: dict[str, nn.Parameter] | None = None) -> tuple[Measure, ...]:
    """Return trained and total parameters of a model and the share of the trained ones.

    A parameter used in several places counts once. The total includes the parameters a method has added.

    Args:
        model: the attached model.
        trained: its trained parameters by name; those with ``requires_grad`` if not given.
    """
    every = {id(p): p for p in model.parameters()}
    flagged = [p for p in every.values() if p.requires_grad]
    chosen = {id(p): p for p in (flagged if trained is None else trained.values())}
    total = sum(p.numel() for p in {**every, **chosen}.values())
    count = sum(p.numel() for p in chosen.values())
    how = "counted in the attached model, shared parameters once"
    share = count / total if total else None
    return (
        Measure(metric="trained_parameters", value=count, unit="parameters", better="lower", how=how, n=1),
        Measure(metric="total_parameters", value=total, unit="parameters", better="lower", how=how, n=1),
        Measure(
            metric="trained_share",
            value=share,
            unit="fraction",
            better="lower",
            how="trained over total parameters" if share is not None else "the model has no parameters",
            n=1 if share is not None else 0,
        ),
    )


def checkpoint_measure(directory: Path) -> Measure:
    """Return the size of a saved state: the bytes of the weight files in its directory.

    Raises:
        UserError: the directory does not exist.
    """
    if not directory.is_dir():
        raise UserError(f"no checkpoint directory {directory}")
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix in WEIGHT_SUFFIXES]
    if not files:
        how = f"no weight file ({', '.join(sorted(WEIGHT_SUFFIXES))}) in the checkpoint"
        return Measure(metric="checkpoint_bytes", value=None, unit="bytes", better="lower", how=how, n=0)
    how = f"sizes of {len(files)} weight file{'s' if len(files) > 1 else ''} of the checkpoint added"
    size = sum(path.stat().st_size for path in files)
    return Measure(metric="checkpoint_bytes", value=size, unit="bytes", better="lower", how=how, n=1)
