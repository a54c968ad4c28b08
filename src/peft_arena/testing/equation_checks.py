"""Checks of a card's equation, computed from settings and the method's own tensors, against what the method does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft_arena.methods.base import Attached, Capability
from peft_arena.testing.alternatives import alternative_value
from peft_arena.testing.equation import compute, names_in
from peft_arena.testing.subject import MERGE, STEPS, Subject, difference, logits, tokens
from peft_arena.testing.trial import Trial, linear_weights

if TYPE_CHECKING:
    from torch import Tensor

NUDGE = 0.05
"""Standard deviation of what is added to every trained number, so that an equation is tried away from the start."""
CLOSE = 1e-3
"""Largest difference of logits; weights that differ by a factor or a transpose differ by 0.1 and more."""
UNSTATED = "the card states no equation"


def column(vector: Tensor) -> Tensor:
    """Return a vector as a column, shape (n, 1), so that it multiplies rows."""
    return vector.flatten()[:, None]


def row_norms(matrix: Tensor) -> Tensor:
    """Return the length of each row, shape (rows, 1)."""
    return matrix.norm(dim=1, keepdim=True)


def cayley(packed: Tensor) -> Tensor:
    """Return the block-diagonal rotation (I - Q)(I + Q)^-1, each block's Q given by its entries below the diagonal.

    Args:
        packed: shape (blocks, n (n - 1) / 2); Q[j, i] for i < j in the order of the rows of its transpose.
    """
    import torch

    entries = packed.shape[1]
    size = int((1 + (1 + 8 * entries) ** 0.5) / 2)
    above = torch.triu_indices(size, size, 1)
    blocks = []
    for values in packed:
        skew = values.new_zeros(size, size)
        skew[above[1], above[0]] = values
        skew = skew - skew.T
        eye = torch.eye(size, dtype=skew.dtype)
        blocks.append((eye - skew) @ torch.linalg.inv(eye + skew))
    return torch.block_diag(*blocks)


def reflections(vectors: Tensor) -> Tensor:
    """Return the product of the Householder reflections I - 2 u u^T / |u|^2 of all columns u, the first leftmost."""
    import torch

    found = torch.eye(len(vectors), dtype=vectors.dtype)
    for one in vectors.T:
        unit = one / one.norm()
        found = found @ (torch.eye(len(vectors), dtype=vectors.dtype) - 2 * torch.outer(unit, unit))
    return found


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "sqrt": lambda number: number**0.5,
    "column": column,
    "row_norms": row_norms,
    "cayley": cayley,
    "reflections": reflections,
    "rows_of": lambda matrix, weight: matrix[: weight.shape[0]],
    "columns_of": lambda matrix, weight: matrix[:, : weight.shape[1]],
}
"""What an equation may call. ``rows_of(M, W)`` are as many first rows of M as W has, ``columns_of`` its columns."""


def check_equation(trial: Trial) -> str | None:
    """Check that the method does what its card's equation says, whatever the numbers that train and the settings."""
    equation = trial.plain.method.card.equation
    if equation is None:
        return UNSTATED
    needed, _ = names_in(equation)
    for name in ("", *(name for name in trial.plain.method.Config.alternatives if name in needed)):
        subject, said = trial.plain, ""
        if name:
            value = alternative_value(subject, name)
            subject, said = replace(subject, config={**subject.config, name: value}), f" with {name} = {value!r}"
        _compare(subject, equation, said)
    return None


def _compare(subject: Subject, equation: str, said: str) -> None:
    import torch

    attached = subject.attach()
    attached.begin(STEPS)
    attached.model.eval()
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(NUDGE * torch.randn(parameter.shape, generator=generator))
    expected = subject.model()
    with torch.no_grad():
        wanted = _tuned_weights(attached, subject, equation)
        for name, weight in linear_weights(expected).items():
            if name in wanted:
                assert wanted[name].shape == weight.shape, f"{equation}: {name} gets shape {tuple(wanted[name].shape)}"
                weight.copy_(wanted[name])
    found, right = logits(attached.model, tokens()), logits(expected, tokens())
    moved = difference(right, logits(subject.untouched(), tokens()))
    assert moved > 10 * CLOSE, f"{equation}: it moves the output by {moved}, too little to tell{said}"
    gap = difference(found, right)
    assert gap <= CLOSE, f"the output is {gap} away from that of the card's equation {equation}{said}"
    if not subject.has(Capability.LINEAR_DELTA):
        return
    for name, before in linear_weights(subject.untouched()).items():
        delta = attached.delta(name)
        change = torch.zeros_like(before) if delta is None else delta
        gap = difference(before + change, wanted.get(name, before))
        assert gap <= MERGE, f"delta of {name} is {gap} away from that of the card's equation {equation}{said}"


def _tuned_weights(attached: Attached, subject: Subject, equation: str) -> dict[str, Tensor]:
    """Return the weights of the adapted linear layers by the equation."""
    needed, _ = names_in(equation)
    settings = {
        name: value
        for name, value in subject.make().config.model_dump().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    own = needed - set(settings) - {"W", "R"}
    held = _by_symbol(attached)
    found: dict[str, Tensor] = {}
    for module, weight in linear_weights(subject.untouched()).items():
        near = {symbol: tensor for (place, symbol), tensor in held.items() if place.endswith(f".{module}.")}
        if own.isdisjoint(near):
            continue
        left = near.get("base_layer", near.get("weight"))
        values = {**settings, "W": weight.detach(), "R": left, **{name: near[name] for name in own if name in near}}
        found[module] = compute(equation, values, FUNCTIONS)
    assert found, f"no linear layer has tensors of the names in the equation {equation}: {', '.join(sorted(own))}"
    return found


def _by_symbol(attached: Attached) -> dict[tuple[str, str], Tensor]:
    """Return every tensor of the attached model by each of its places: the names before, and the next name.

    ``a.b.lora_A.default.weight`` is ``lora_A`` at ``.a.b.``.
    """
    found: dict[tuple[str, str], Tensor] = {}
    model = attached.model
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        parts = name.split(".")
        for place in range(1, len(parts)):
            found.setdefault((f".{'.'.join(parts[:place])}.", parts[place]), tensor.detach())
    return found
