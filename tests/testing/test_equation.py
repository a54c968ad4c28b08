"""Equations of a weight are computed, and nothing else is."""

from __future__ import annotations

import numpy
import pytest

from peft_arena.core.errors import UserError
from peft_arena.testing.equation import compute, names_in


def test_an_equation_is_computed_with_names_for_its_parts() -> None:
    values = {
        "W": numpy.eye(2),
        "B": numpy.array([[1.0], [2.0]]),
        "A": numpy.array([[3.0, 4.0]]),
        "alpha": 4,
        "rank": 2,
    }
    found = compute("V = alpha / rank * B @ A; W + double(-V) ** 1", values, {"double": lambda value: 2 * value})
    assert found.tolist() == [[-11.0, -16.0], [-24.0, -31.0]]
    assert names_in("V = alpha / rank * B @ A; W + double(V)") == ({"alpha", "rank", "B", "A", "W"}, {"double"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("W +", "cannot be read"),
        ("", "is empty"),
        ("W = 1", "the last part is the weight"),
        ("W; W", "names are given values first"),
        ("W.T", "'W.T' cannot be computed"),
        ("W[0]", "cannot be computed"),
        ("__import__('os')", "unknown function"),
        ("double('x')", "cannot be computed"),
        ("W + Z", "unknown name 'Z'"),
    ],
)
def test_anything_else_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        compute(text, {"W": 1.0}, {"double": lambda value: 2 * value})
    assert "\n" not in str(raised.value)
