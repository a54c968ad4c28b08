"""Settings that must divide a side of every target: the refusal, and the values that fit a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd
from typing import TYPE_CHECKING, Literal

from peft_arena.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Side = Literal["input", "output"]


def check_divides(setting: str, value: int, layers: Mapping[str, nn.Linear], *sides: Side) -> None:
    """Refuse a value that does not divide the given sides of every layer.

    Raises:
        UserError: names the first layer that does not fit, and the divisors of its size.
    """
    for name, layer in layers.items():
        for side, size in _sizes(layer, sides):
            if size % value:
                divisors = ", ".join(str(n) for n in range(2, size + 1) if size % n == 0)
                raise UserError(
                    f"{setting}: {value} does not divide the {side} size {size} of {name}; divisors: {divisors}"
                )


def common_divisors(layers: Mapping[str, nn.Linear], *sides: Side) -> list[int]:
    """Return the whole numbers from 2 that divide the given sides of every layer, ascending."""
    common = gcd(*(size for layer in layers.values() for _, size in _sizes(layer, sides)))
    return [number for number in range(2, common + 1) if common % number == 0]


def _sizes(layer: nn.Linear, sides: tuple[Side, ...]) -> Iterator[tuple[Side, int]]:
    for side in sides:
        yield side, layer.in_features if side == "input" else layer.out_features
