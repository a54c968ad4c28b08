"""What reads one setting of ours from an adapter configuration of ``peft``, or refuses it."""

from __future__ import annotations

from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.interop.translation import Harmless, Reader, Theirs


def default_or(field: str, **names: Any) -> Reader:
    """Read a starting distribution: peft's True is our ``default``, other values have our names.

    Args:
        field: their field.
        names: our name to their value.
    """

    def read(theirs: Theirs) -> str:
        value = theirs.config[field]
        known = {True: "default", **{value: name for name, value in names.items()}}
        if not isinstance(value, bool | str) or value not in known:
            raise UserError(f"{field} is {value!r}, which the method has no setting for")
        return str(known[value])

    return read


def lower(field: str) -> Reader:
    """Read a word that peft writes in capitals."""
    return lambda theirs: str(theirs.config[field]).lower()


def only_if(field: str, value: Any, other: str) -> Reader:
    """Read one field if another has a value; None if not."""
    return lambda theirs: theirs.config[other] if theirs.config[field] == value else None


def of_model(field: str, **sizes: str) -> Harmless:
    """Allow a field that repeats a size of the model."""
    (size,) = sizes.values()
    return Harmless("", lambda it: it.config[field] == getattr(it.shape, size))


def share_of_steps(field: str) -> Reader:
    """Read a number of steps as a share of the training."""

    def read(theirs: Theirs) -> float:
        total, steps = theirs.config["total_step"], _whole(theirs, field)
        if total != theirs.steps:
            raise UserError(f"total_step is {total}, but the training has {theirs.steps} steps")
        share = steps / theirs.steps
        if int(share * theirs.steps) != steps:
            raise UserError(f"{field} is {steps}, no share of {theirs.steps} steps gives it back")
        return share

    return read


def block_size(theirs: Theirs) -> int:
    """Read the size of OFT's blocks: given, or the input size over their number."""
    number, size = _whole(theirs, "r"), _whole(theirs, "oft_block_size")
    if bool(number) == bool(size):
        raise UserError(f"r is {number} and oft_block_size {size}: peft takes exactly one of them")
    if size:
        return size
    inputs = theirs.shape.inputs(theirs.config["target_modules"])
    if len(inputs) > 1 or any(side % number for side in inputs):
        sides = ", ".join(map(str, sorted(inputs)))
        raise UserError(f"r is {number} blocks, which gives no one block size on inputs of {sides}")
    return int(inputs.pop()) // int(number)


def bdlora_part(part: str) -> Reader:
    """Read a part of peft's configuration of block-diagonal LoRA."""

    def read(theirs: Theirs) -> Any:
        found = _part(theirs, "use_bdlora", "target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict")
        first, second = found.get("target_modules_bd_a") or [], found.get("target_modules_bd_b") or []
        loose = [name for name in theirs.config["target_modules"] if (name in first) == (name in second)]
        if loose or found.get("match_strict", True) is not True:
            raise UserError(f"use_bdlora: {loose or 'match_strict false'}: ours makes one factor of each target blocks")
        return {"blocks": found.get("nblocks", 1), "row_parallel": tuple(first)}[part]

    return read


def kasa_part(part: str) -> Reader:
    """Read one weight of KaSA's regularisers."""

    def read(theirs: Theirs) -> float:
        value = _part(theirs, "kasa_config", "beta", "gamma").get(part, {"beta": 1e-4, "gamma": 1e-3}[part])
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"kasa_config has '{part}' = {value!r}, no number")
        return float(value)

    return read


def _whole(theirs: Theirs, field: str) -> int:
    value = theirs.config[field]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{field} is {value!r}, no whole number")
    return value


def _part(theirs: Theirs, field: str, *known: str) -> dict[str, Any]:
    """Return a table inside a configuration; refuse what it has beside the known names."""
    found = theirs.config[field]
    if not isinstance(found, dict):
        raise UserError(f"{field} is {found!r}, no mapping of settings")
    odd = sorted(set(found) - set(known))
    if odd:
        raise UserError(f"{field} has '{odd[0]}' = {found[odd[0]]!r}, which the method has no setting for")
    return found
