"""Capability-conditioned drift of one linear module: what the weight change D does to inputs h that prompts cause.

With h the pretrained model's input of the module, E the mean over all real tokens of a prompt set, W0 the pretrained
weight without its bias, D = W1 - W0:

- ``drift_absolute`` = E||D h||^2
- ``drift_relative`` = E||D h||^2 / E||W0 h||^2
- ``drift_update_norm`` = E||D h||^2 / (||D||_F^2 E||h||^2)

Source: Liu et al., PEFT-Arena, 2026 (arXiv 2605.28819). Where the paper adds 1e-12 to denominators, a value here is
None if its denominator is zero. Nothing is centred. The same follows from the inputs' second moment C = E[h h^T] as
tr(D C D^T); no such matrix is formed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_arena.geometry.values import Values

UNCHANGED = "the weight is unchanged"


def squares(rows: Tensor) -> float:
    """Return the sum of the squared entries, added up in float64.

    Args:
        rows: any shape, float.
    """
    wide = torch.float64 if rows.device.type == "cpu" else rows.dtype
    return float(torch.linalg.vector_norm(rows, dtype=wide)) ** 2


@dataclass
class Energies:
    """Sums over the tokens of a prompt set, at one module."""

    tokens: int = 0
    inputs: float = 0.0
    """Sum of ||h||^2."""
    outputs: float = 0.0
    """Sum of ||W0 h||^2."""
    changes: float = 0.0
    """Sum of ||D h||^2."""


def drift_values(energies: Energies, norm: float) -> Values:
    """Return the three drift quantities of a module on one prompt set.

    Args:
        energies: sums over at least one token.
        norm: ||D||_F; 0 where the weight is unchanged.
    """
    found = Values()
    found.put("drift_absolute", energies.changes / energies.tokens)
    if energies.outputs == 0:
        found.absent("drift_relative", reason="the pretrained weight maps every input to zero")
    else:
        found.put("drift_relative", energies.changes / energies.outputs)
    if norm == 0:
        found.absent("drift_update_norm", reason=UNCHANGED)
    elif energies.inputs == 0:
        found.absent("drift_update_norm", reason="every input is zero")
    else:
        found.put("drift_update_norm", energies.changes / energies.inputs / norm**2)
    return found
