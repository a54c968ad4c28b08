"""Numbers as a reader wants them: signs, intervals, and sizes with their units."""

from __future__ import annotations

from collections.abc import Sequence

from peft_arena.analyze.effects import SHARE
from peft_arena.analyze.estimate import Estimate
from peft_arena.core.measure import POINTS

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plain(value: float, digits: int = 1) -> str:
    """Render a number with a true minus sign; a rounded zero has no sign."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float, digits: int = 1) -> str:
    """Render a number with its sign; a rounded zero has none."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def digits_of(unit: str) -> int:
    """Return how many decimals a difference in this unit is shown with."""
    return {POINTS: 1, "%": 1, SHARE: 2}.get(unit, 3)


def in_unit(value: float, unit: str, more: int = 0) -> str:
    """Render a change with its sign, and a share, which is none, without; ``more``: further digits."""
    return (plain if unit == SHARE else signed)(value, digits_of(unit) + more)


def interval(found: Estimate) -> str:
    """Render the 95 % interval, for example ``[−1.2, +0.4]``; says so where there is none."""
    if found.low is None or found.high is None:
        return "[no interval]"
    return f"[{in_unit(found.low, found.unit)}, {in_unit(found.high, found.unit)}]"


def estimate_text(found: Estimate, unit: bool = True) -> str:
    """Render value, unit and interval, for example ``+3.1 points [+1.0, +5.2]``."""
    return f"{in_unit(found.value, found.unit)}{' ' + found.unit if unit else ''} {interval(found)}"


def score(value: float | None, unit: str) -> str:
    """Render a score: fractions in per cent, everything else with three decimals."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}" if unit == "fraction" else plain(value, 3)


def quantity(value: float | None, unit: str) -> str:
    """Render a cost with its unit, for example ``1.21 GiB``, ``3.4 TFLOPs``, ``12.3 k``."""
    if value is None:
        return NONE
    steps = _BINARY if unit == "bytes" else _DECIMAL
    for size, prefix in steps:
        if abs(value) >= size:
            return f"{_three(value / size)} {prefix}{_unit(unit)}"
    return f"{_three(value)}{' ' + _unit(unit, small=True) if _unit(unit, small=True) else ''}"


def _three(value: float) -> str:
    """Render three significant digits without an exponent."""
    if value == 0:
        return "0"
    if value == int(value) and abs(value) < 1000:
        return str(int(value)).replace("-", MINUS)
    magnitude = abs(value)
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    return plain(value, digits)


def _unit(unit: str, small: bool = False) -> str:
    """Return the unit's short form; counts have none, and ``bytes`` are in the prefix already."""
    if unit == "bytes":
        return "B" if small else ""
    if unit in {"parameters", "count", "ratio", "fraction", "tokens", "1", ""}:
        return ""
    return {"seconds": "s", "tokens/second": "tok/s", "tokens/s": "tok/s"}.get(unit, unit)


def p_text(p: float | None) -> str:
    """Render a p-value."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def span_of(counts: Sequence[int]) -> str:
    """Render a count that differs, for example ``8 to 10``."""
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def rate(value: float | None) -> str:
    """Render a learning rate, for example ``1e-3``; the base model has none."""
    if value is None:
        return NONE
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", MINUS)


def listed(names: list[str]) -> str:
    """Join names as in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
