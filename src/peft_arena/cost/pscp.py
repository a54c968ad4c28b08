"""PSCP, a score of performance discounted by parameters, operations and memory.

The source is given in the project's reference notes. The order of close methods changes with the constants, so a
band over several constants says more than one number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

TERA = 1e12
GIGA = 1e9


class Operations(StrEnum):
    """Which operations count as M_f; the two are in use under the same name."""

    EXTRA = "extra"
    """Forward operations of 1 x 512 tokens above the base model: the paper's definition."""
    TOTAL = "total"
    """All forward operations of 1 x 512 tokens."""


@dataclass(frozen=True, kw_only=True)
class PscpConstants:
    """Scale and exponent of each discount."""

    parameters: float = 5e8
    """C_p, trained parameters."""
    flops: float = 10 * TERA
    """C_f, floating-point operations."""
    memory: float = 94 * GIGA
    """C_m, bytes; 94 gigabytes is one accelerator."""
    beta_parameters: float = 1.0
    beta_flops: float = 1.0
    beta_memory: float = 1.0


DEFAULT = PscpConstants()


def pscp(
    performance: float, parameters: float, flops: float, memory: float, constants: PscpConstants = DEFAULT
) -> float:
    """Return P (1 + M_p/C_p)^-b_p (1 + M_f/C_f)^-b_f (1 + M_m/C_m)^-b_m.

    Args:
        performance: P, in whatever unit; the result has the same.
        parameters: M_p, trained parameters.
        flops: M_f, operations of a forward pass of 1 x 512 tokens; see :class:`Operations` for which.
        memory: M_m, peak bytes of training.
        constants: scales and exponents.

    Raises:
        ValueError: a cost is negative or not finite.
    """
    costs = {"parameters": parameters, "flops": flops, "memory": memory}
    for name, value in costs.items():
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    return float(
        performance
        * (1 + parameters / constants.parameters) ** -constants.beta_parameters
        * (1 + flops / constants.flops) ** -constants.beta_flops
        * (1 + memory / constants.memory) ** -constants.beta_memory
    )


@dataclass(frozen=True, kw_only=True)
class PscpChoice:
    """What a study asks of PSCP."""

    constants: PscpConstants = DEFAULT
    operations: Operations = Operations.EXTRA
    """Which operations arms are ordered by; scores by the others stand beside them."""
