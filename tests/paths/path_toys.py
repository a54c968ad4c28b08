"""Tuned models of six small blocks, of any form of change, and what they are multiplied out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_arena.methods.base import PathKind
from peft_arena.methods.targets import block_of
from peft_arena.weights.adapter_directory import Changes
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Change, Dense, LowRank
from peft_arena.weights.effective import EffectiveWeights
from peft_arena.weights.rescaled import Decomposed, Rows
from peft_arena.weights.rotation import Rotation

BLOCKS = 6
SIZES = (0.2, 0.5, 0.3, 1.0, 0.1, 0.8)
"""Of the change of each block, relative to each other."""
KINDS = {
    "low-rank": PathKind.LINEAR,
    "dense": PathKind.LINEAR,
    "rotation": PathKind.CAYLEY,
    "rows": PathKind.MULTIPLICATIVE,
    "dora": PathKind.MULTIPLICATIVE,
}
TARGETS = ("self_attn.q_proj", "mlp.up_proj")
NORM = "model.layers.3.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
FINAL = "model.norm.weight"


@cache
def deep_model(layers: int = BLOCKS, tied: bool = False) -> LlamaForCausalLM:
    """Return a random model of small blocks; never to be changed."""
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = LlamaConfig(**sizes, **heads, initializer_range=0.12, tie_word_embeddings=tied)
        return LlamaForCausalLM(config).eval()


def make(form: str, base: Tensor, size: float, seed: int) -> Change:
    """Return a change of a weight, of a size that is about proportional to ``size``."""
    given = torch.Generator().manual_seed(seed)
    out, inner = base.shape
    if form == "dense":
        return Dense(0.1 * size * torch.randn(out, inner, generator=given))
    if form == "rows":
        return Rows(0.5 * size * torch.randn(out, generator=given), (out, inner))
    if form == "rotation":
        skew = 0.4 * size * torch.randn(inner // 8, 8, 8, generator=given)
        return Rotation(skew - skew.transpose(1, 2), None, (out, inner))
    b, a = 0.1 * size * torch.randn(out, 3, generator=given), torch.randn(3, inner, generator=given)
    if form == "low-rank":
        return LowRank(b, a)
    return Decomposed(b, a, base.norm(dim=1) * (1 + 0.3 * size * torch.randn(out, generator=given)))


def tuned(
    form: str,
    sizes: Sequence[float] = SIZES,
    others: Mapping[str, float] | None = None,
    model: LlamaForCausalLM | None = None,
) -> EffectiveWeights:
    """Return tuned weights: two linear layers of every block that has a size above 0, and other parameters.

    Args:
        form: of the changes of linear layers.
        sizes: of each block's.
        others: by parameter, what is added to each of its entries.
        model: the pretrained one.
    """
    model = deep_model() if model is None else model
    base = BaseWeights.of_model(model)
    changes: dict[str, Change] = {}
    for place, name in enumerate(base.linears):
        block = block_of(name)
        if name.endswith(TARGETS) and block is not None and sizes[block]:
            weight = f"{name}.weight"
            changes[weight] = make(form, base.tensor(weight), sizes[block], place)
    for name, value in (others or {}).items():
        changes[name] = Dense(torch.full(base.shapes[name], value))
    makers = {name: (lambda change=change: change) for name, change in changes.items()}
    return EffectiveWeights(base, Changes(makers, kind=KINDS[form]))


def multiplied_out(weights: EffectiveWeights) -> dict[str, Tensor]:
    """Return the change of every parameter of the model at a point, in float64, by putting the point into a model."""
    model = copy.deepcopy(weights.base_weights.architecture)
    before = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    weights.load_into(model)
    return {name: parameter.detach().double() - before[name] for name, parameter in model.named_parameters()}


def weight_of(name: str) -> Tensor:
    """Return a pretrained parameter of the deep model, in float64."""
    return deep_model().get_parameter(name).detach().double()
