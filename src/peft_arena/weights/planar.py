"""RoAd: outputs rotated and scaled in pairs, W1 = P W0 with P of 2 x 2 blocks; a bias goes the same way.

Output i of the first half of a group is paired with the one half a group further, and with its own angle t_i and scale
a_i (and t'_i, a'_i for the partner's share, the same in all but one variant)

    y_i = a_i cos(t_i) x_i -/+ a'_i sin(t'_i) x_partner,    minus in the first half, plus in the second.

Where a pair has one angle and one scale this is a rotation times a scale. The path takes the angles times the factor,
and the scales from one: f t and 1 + f (a - 1), which starts at P = I and stays a scaled rotation where it is one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from peft_arena.methods.base import PathKind
from peft_arena.weights.change import Change


class Planar(Change):
    """D = (P - I) W0, of a weight or of a bias."""

    path: ClassVar[PathKind] = PathKind.MULTIPLICATIVE

    def __init__(self, angles: Tensor, beyond: Tensor, half: int, shape: tuple[int, ...]) -> None:
        """Hold angles and scales.

        Args:
            angles: t and t' in radians, shape (2, out).
            beyond: a - 1 and a' - 1, shape (2, out).
            half: outputs in half a group.
            shape: of the weight, (out, in), or of a bias, (out,).
        """
        self.angles, self.beyond, self.half, self.shape = angles, beyond, half, shape

    def _turned(self, outputs: Tensor) -> Tensor:
        """Return (P - I) x for each column x, or for one; written so that small angles keep their digits.

        Args:
            outputs: shape (out, n) or (out,).
        """
        cut = outputs.reshape(-1, 2, self.half, *outputs.shape[1:])
        partners = torch.stack([-cut[:, 1], cut[:, 0]], dim=1).reshape(outputs.shape)
        own = self.beyond[0] * self.angles[0].cos() - 2 * (self.angles[0] / 2).sin().square()  # a cos(t) - 1
        other = (1 + self.beyond[1]) * self.angles[1].sin()
        if outputs.ndim > 1:
            own, other = own[:, None], other[:, None]
        return own * outputs + other * partners

    def dense(self, base: Tensor) -> Tensor:
        """Return (P - I) W0."""
        return self._turned(base)

    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return (P - I) W0 h for each row h; see :meth:`Change.apply`."""
        return self._turned(base @ inputs.T).T

    def scaled(self, factor: float) -> Change:
        """Return the change with angles times the factor, and scales that far from one."""
        return Planar(factor * self.angles, factor * self.beyond, self.half, self.shape)

    def to(self, dtype: torch.dtype) -> Change:
        """Return the change in another type."""
        return Planar(self.angles.to(dtype), self.beyond.to(dtype), self.half, self.shape)
