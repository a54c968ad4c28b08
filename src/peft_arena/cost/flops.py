"""Floating-point operations, counted by running the model under torch's counter; one multiply-add is two operations.

The counter knows matrix products, convolutions and attention; element-wise operations, norms, Fourier transforms and
factorizations are not counted. What it does not know of products is added by :mod:`peft_arena.cost.products`; where
a product runs whose operations are not known, nothing is counted. A formula to check the counts is
:func:`formula_flops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.ids import seed_for
from peft_arena.core.measure import Measure
from peft_arena.cost.products import UncountedError, products, watched

if TYPE_CHECKING:
    from torch import Tensor, nn

REFERENCE_LENGTH = 512
"""Tokens of the forward pass that methods are compared by (1 sequence of 512 tokens, as in PSCP)."""
HOW = "torch.utils.flop_counter (matrix products and attention; a multiply-add is two)"


class Shape(NamedTuple):
    """What the formula needs to know of a decoder."""

    matrix_parameters: int
    """Weights that multiply every token: all linear layers and the output projection, without the input embedding."""
    layers: int
    attention_width: int
    """Heads times head size."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave a model's mode and gradients, and torch's random generators, as they were before the block."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def sample_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Return random token ids of shape (batch, length), the same for the same shape, on the model's device."""
    import torch

    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(seed_for(0, "cost", batch, length))
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def forward_flops(model: nn.Module, length: int = REFERENCE_LENGTH) -> int:
    """Return the operations of one forward pass over one sequence with the logits of every token.

    Virtual tokens of the method are processed on top of ``length``, and counted.
    """
    import torch

    ids = sample_ids(model, 1, length)

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    with undisturbed(model):
        model.eval()
        return _count(run)


def training_flops_per_token(model: nn.Module, batch: int = 1, length: int = 128) -> float:
    """Return the operations of forward and backward pass per input token, with the model's own trained parameters.

    Frozen weights need no weight gradient, and no gradient at all where nothing before them is trained, so the number
    depends on the method. The optimizer's own operations are not counted. A loss over every token is used.
    """
    ids = sample_ids(model, batch, length)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    with undisturbed(model):
        model.train()
        return _count(run) / ids.numel()


def formula_flops(shape: Shape, length: int) -> int:
    """Return the operations of a forward pass over one sequence of a plain decoder, from its shape.

    2 P n for the matrix products, and 4 L n^2 d for queries times keys and scores times values with every pair of
    positions, causal or not (Kaplan et al. 2020, Scaling Laws, section 2.1, counts the same).
    """
    return 2 * shape.matrix_parameters * length + 4 * shape.layers * length**2 * shape.attention_width


def shape_of(model: nn.Module) -> Shape:
    """Return the shape of a pretrained decoder, from its configuration and its linear layers."""
    from torch import nn as modules

    config: Any = model.config
    config = config.get_text_config()
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, modules.Linear))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(matrices, int(config.num_hidden_layers), int(size * config.num_attention_heads))


def forward_measures(model: nn.Module, base: nn.Module | None, lengths: Mapping[str, int]) -> tuple[Measure, ...]:
    """Return forward operations, and those above the base model, for one sequence of each length.

    Args:
        model: the attached model.
        base: the pretrained model, loaded on its own; None gives no extra operations. A method that is switched off
            would not do: some still compute their adapter then.
        lengths: name of the length in the metric to number of tokens, for example ``{"512": 512}``.
    """
    found: list[Measure] = []
    for name, length in lengths.items():
        how = f"one forward pass of 1 x {length} tokens with all logits; {HOW}"
        total = _attempt(partial(forward_flops, model, length))
        found.append(_measure(f"forward_flops_{name}", total, how))
        plain: float | str = "no base model was given"
        if base is not None:
            plain = _attempt(partial(forward_flops, base, length))
        found.append(_measure(f"extra_forward_flops_{name}", _difference(total, plain), f"{how}; minus the base's"))
    return tuple(found)


def training_measures(model: nn.Module, tokens: int, batch: int = 1, length: int = 128) -> tuple[Measure, ...]:
    """Return the operations of training per token and in total.

    Args:
        model: the attached model, with ``requires_grad`` as in training.
        tokens: tokens the run has processed.
        batch: sequences in the counted step.
        length: tokens of each of its sequences; the run's mean length gives the truest number.
    """
    how = f"forward and backward pass of {batch} x {length} tokens, loss on all, optimizer left out; {HOW}"
    each = _attempt(lambda: training_flops_per_token(model, batch, length))
    total = each if isinstance(each, str) else each * tokens
    return (
        _measure("training_flops_per_token", each, how, unit="FLOPs/token"),
        _measure("training_flops", total, f"per token times {tokens} processed tokens; {how}"),
    )


def rollout_measure(model: nn.Module, completions: int, tokens: int, limit: int | None = None) -> Measure:
    """Return the operations of generating completions, each by one forward pass with a cache of its own.

    Every token, of a prompt or generated, is taken to cost what it costs in one forward pass over a sequence of the
    mean length. Attention then counts every pair of positions, causal or not, as in training.

    Args:
        model: the attached model.
        completions: generated sequences.
        tokens: their tokens, generated and of the prompts, each prompt as often as it was completed.
        limit: longest sequence the model takes.
    """
    if completions < 1 or tokens < 1:
        return _measure("rollout_flops", "nothing was generated", "")
    length = max(round(tokens / completions), 1)
    length = length if limit is None else min(length, limit)
    how = (
        f"{tokens} tokens of prompts and completions times a forward pass of 1 x {length} tokens over {length}; "
        f"sampling, scoring and log-probabilities left out; {HOW}"
    )
    total = _attempt(lambda: forward_flops(model, length) / length * tokens)
    return _measure("rollout_flops", total, how)


def _difference(total: float | str, base: float | str) -> float | str:
    """Return total minus base, or why one of them is missing."""
    if isinstance(total, str):
        return total
    return base if isinstance(base, str) else total - base


def _attempt(count: Callable[[], float]) -> float | str:
    """Return a count, or why there is none."""
    try:
        return count()
    except UncountedError as error:
        return str(error)
    except (RuntimeError, NotImplementedError, IndexError) as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _measure(metric: str, value: float | str, how: str, unit: str = "FLOPs") -> Measure:
    if isinstance(value, str):
        return Measure(metric=metric, value=None, unit=unit, better="lower", how=f"not counted: {value}", n=0)
    return Measure(metric=metric, value=value, unit=unit, better="lower", how=how, n=1)


def _count(run: Callable[[], None]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with watched() as uncounted:
        with FlopCounterMode(display=False, custom_mapping=products()) as counter:
            run()
        known = counter.flop_registry
    if left := sorted({str(operator) for operator in uncounted if operator not in known}):
        raise UncountedError(f"operations of {', '.join(left)} are not known")
    return int(counter.get_total_flops())
