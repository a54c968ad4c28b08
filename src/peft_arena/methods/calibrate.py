"""What calibrated methods measure on training examples before they attach: inputs and gradients of linear layers.

Layers are taken in groups, with one pass over the examples for each, so that only a group's sums are in memory at once.
The model is in evaluation mode meanwhile and left as it was: weights, flags, mode, and no gradients on parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError
from peft_arena.methods.base import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from peft_arena.methods.base import Calibration

IGNORED = -100
LIMIT = 2**28
"""Entries of the sums that are held at once, unless one layer alone has more."""
RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding, in float32."""

Batches = Sequence[Mapping[str, "Tensor"]]


def batches_of(calibration: Calibration | None, method: str) -> Batches:
    """Return the batches of calibration data.

    Raises:
        UserError: there is none, or it is empty.
    """
    if calibration is None or not calibration.batches:
        raise UserError(f"method {method} chooses its start by training examples, and none were given")
    return calibration.batches


def gradients(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], batches: Batches, limit: int = LIMIT
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of the mean cross-entropy per label with respect to each layer's weight.

    Args:
        model: the pretrained model.
        layers: some of its linear layers, by name.
        batches: see :class:`Calibration`.
        limit: entries of gradients that may be held at once.

    Yields:
        The name of a layer and its gradient, shape (out, in), float32; in the order given.

    Raises:
        CalibrationError: no token has a label, or a gradient is zero or not finite.
    """
    import torch

    labels = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
    if not sum(labels):
        raise CalibrationError("calibration: none of the training examples has a token with a label")
    for group in _groups(layers, lambda layer: layer.weight.numel(), limit):
        weights = [layers[name].weight for name in group]
        sums = {
            name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in zip(group, weights, strict=True)
        }
        with _undisturbed(model, weights), torch.enable_grad():
            for batch, count in zip(batches, labels, strict=True):
                if count:
                    loss = model(**_inputs(batch), labels=batch["labels"], use_cache=False).loss
                    found = torch.autograd.grad(loss, weights, allow_unused=True)
                    for name, gradient in zip(group, found, strict=True):
                        if gradient is not None:
                            sums[name].add_(gradient.float(), alpha=count / sum(labels))
        for name in group:
            gradient = sums.pop(name)
            _check(name, gradient, "gradient")
            if not bool(gradient.any()):
                raise CalibrationError(f"calibration: the gradient of {name} is zero on the training examples given")
            yield name, gradient


def check_directions(name: str, values: Tensor, largest: float) -> None:
    """Refuse singular directions of a gradient that few examples leave undetermined.

    Args:
        name: of the layer, for messages.
        values: the singular values of the directions wanted, descending.
        largest: the largest singular value of the whole gradient.

    Raises:
        CalibrationError: one of the values is zero but for rounding.
    """
    found = int((values > RANK_TOLERANCE * largest).sum())
    if found < len(values):
        raise CalibrationError(
            f"calibration_examples: the gradient of {name} on them has only {found} of the {len(values)} directions "
            "needed; take more examples or a lower rank"
        )


@dataclass
class Moments:
    """Sums over the inputs of one linear layer; real tokens only."""

    total: Tensor
    """Sum of the inputs, shape (in,), float64."""
    square: Tensor
    """Sum of the outer products of the inputs, shape (in, in), float64."""
    tokens: int = 0
    examples: int = 0

    def add(self, inputs: Tensor) -> None:
        """Add the inputs of one example, shape (tokens, in), float32."""
        exact = inputs.double()
        self.total += exact.sum(dim=0)
        self.square += exact.T @ exact
        self.tokens += len(inputs)
        self.examples += 1


def input_moments(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    batches: Batches,
    transform: Callable[[Tensor], Tensor] = lambda inputs: inputs,
    limit: int = LIMIT,
) -> Iterator[tuple[str, Moments]]:
    """Yield sums over what each layer takes in.

    Args:
        model: the pretrained model.
        layers: some of its linear layers, by name.
        batches: see :class:`Calibration`.
        transform: applied to the inputs of one example, shape (tokens, in), float32, before they are added.
        limit: entries of sums that may be held at once.

    Yields:
        The name of a layer and its sums; in the order given.

    Raises:
        UserError: a layer's input is not one vector per token.
        CalibrationError: it is not finite, or the layer was never used.
    """
    import torch

    for group in _groups(layers, lambda layer: layer.in_features**2, limit):
        found = {}
        for name in group:
            layer = layers[name]
            zeros = torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)
            found[name] = Moments(zeros, zeros.new_zeros(layer.in_features, layer.in_features))
        with _undisturbed(model), torch.no_grad():
            for batch in batches:
                masks = batch["attention_mask"].bool()
                with ExitStack() as hooks:
                    for name in group:
                        hook = partial(_add_inputs, name, found[name], masks, transform)
                        hooks.callback(layers[name].register_forward_pre_hook(hook).remove)
                    model(**_inputs(batch), use_cache=False)
        for name in group:
            moments = found.pop(name)
            _check(name, moments.square, "input")
            if not moments.tokens:
                raise CalibrationError(f"calibration: {name} was never used on the training examples given")
            yield name, moments


def _add_inputs(
    name: str,
    moments: Moments,
    masks: Tensor,
    transform: Callable[[Tensor], Tensor],
    module: nn.Module,
    args: tuple[Any, ...],
) -> None:
    inputs: Tensor = args[0]
    if inputs.ndim != 3 or inputs.shape[:2] != masks.shape:
        raise UserError(
            f"calibration: {name} takes inputs of shape {tuple(inputs.shape)}, not one vector per token; "
            "leave it out of targets"
        )
    for row, mask in zip(inputs, masks.to(inputs.device), strict=True):
        moments.add(transform(row[mask].float()))


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _check(name: str, values: Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise CalibrationError(f"calibration: the {what} of {name} is not finite on the training examples given")


def _groups(layers: Mapping[str, nn.Linear], size: Callable[[nn.Linear], int], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name, layer in layers.items():
        if group and held + size(layer) > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size(layer)
    if group:
        yield group


@contextmanager
def _undisturbed(model: PreTrainedModel, trained: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put a model in evaluation mode, with gradients for some parameters only; undo it afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
