"""aLoRA: LoRA that acts only from an invocation sequence in the input on, so that what precedes it is the base model.

The invocation is usually what the chat template puts before an answer. A row is adapted from the start of the last
invocation in it; a row without one is the base model, except in training, where it is refused: nothing would train.

The layers are ``peft``'s plain LoRA, with a mask over tokens: found anew in each forward pass, and kept with the
key-value cache while a text is generated. peft's own aLoRA counts tokens from the end of the prompt, which is wrong
without a cache, and acts on nothing where a model is called with a cache outside of ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, WEIGHT_ADAPTER, PeftAttached, PeftMethod, stored_tensors, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import Lora, LoraConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Sequence = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
IGNORED = -100


class ALoraConfig(LoraConfig):
    """Settings of aLoRA."""

    invocation: tuple[Sequence, ...] = ()
    """Token id sequences, each of which activates the adapter: how the model's tokenizer writes what stands before an
    answer. One of them must be in every training example; without any, training is refused."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **LoraConfig.alternatives,
        "invocation": ((78,), (61,), (163,)),  # in the conformance suite's training rows
    }


class ALoraAttached(PeftAttached):
    """ALoRA in place on a model."""

    method: ALora

    def __init__(self, method: PeftMethod, model: PeftModel, base: str) -> None:
        """Let the adapter act on the tokens of a mask, which is found before each forward pass of the base model."""
        super().__init__(method, model, base)
        self._mask = Mask(self.method.config.invocation)
        model.get_base_model().register_forward_pre_hook(self._mask.find, with_kwargs=True)
        for layer in tuner_layers(model).values():
            layer.lora_B[ADAPTER].register_forward_hook(self._mask.apply)

    def begin(self, total: int) -> None:
        """Refuse examples without an invocation from now on."""
        self._mask.required = True

    def after_step(self, step: int, total: int) -> None:
        """Let other passes in training mode, of which the cost is measured, be without one."""
        self._mask.required = step < total

    def save(self, directory: Path) -> None:
        """Write the adapter; with one invocation sequence it is peft's aLoRA."""
        adapter: Any = self.model.peft_config[ADAPTER]
        config = self.method.stored_config(sorted(adapter.target_modules))
        self.write(directory, config, stored_tensors(self.model))


class ALora(Lora):
    """ALoRA: LoRA on the tokens from an invocation on."""

    Config: ClassVar[type[MethodConfig]] = ALoraConfig
    config: ALoraConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="alora",
        title="Activated LoRA",
        family="low-rank",
        paper="Greenewald et al., 2025, Activated LoRA: Fine-tuned LLMs for Intrinsics",
        url="https://arxiv.org/abs/2504.12397",
        capabilities=WEIGHT_ADAPTER - {Capability.LINEAR_DELTA, Capability.MERGEABLE, Capability.PEFT_ADAPTER},
        parameters="rank * sum over targets of (in + out)",
        learning_rate=2e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "several invocation sequences are possible; only with one is the checkpoint an adapter peft can load",
            "the update is computed for all tokens and masked: no key-value cache of the base model is reused",
            "what follows a key-value cache is adapted if what is in the cache was: no invocation is sought in it",
            "A starts Kaiming-uniform (a = sqrt 5) unless init is 'gaussian'",
        ),
        description=(
            "LoRA that acts only on the tokens from the last invocation sequence on; a text without one is the base "
            "model's."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing ids outside the vocabulary."""
        embedding: Any = model.get_input_embeddings()
        size = int(embedding.weight.shape[0])
        for sequence in self.config.invocation:
            if max(sequence) >= size:
                raise UserError(
                    f"invocation: {max(sequence)} is outside the model's vocabulary; allowed: 0 to {size - 1}"
                )
        return super().linears(model)

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint, which names the invocation."""
        config: Any = super().peft_config(patterns, seed=0)
        given = [list(sequence) for sequence in self.config.invocation]
        config.alora_invocation_tokens = given[0] if len(given) == 1 else given
        return config

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that acts from the invocation on."""
        return ALoraAttached(self, model, base)

    def _wrap(self, model: PreTrainedModel, config: PeftConfig, seed: int, wanted: set[str]) -> PeftModel:
        settings: Any = config
        settings.alora_invocation_tokens = None
        return super()._wrap(model, config, seed, wanted)


class Mask:
    """Which tokens of the current forward pass the adapter acts on."""

    def __init__(self, invocation: tuple[tuple[int, ...], ...]) -> None:
        """Take the sequences that activate the adapter."""
        self.invocation = invocation
        self.required = False
        """Whether every example in training must have an invocation."""
        self.current: Tensor | None = None

    def find(self, module: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        """Find the tokens before a forward pass of the base model.

        Raises:
            UserError: an example in training has no invocation, or there are no token ids to look at.
        """
        ids = settings.get("input_ids", arguments[0] if arguments else None)
        if ids is None:
            raise UserError("alora needs token ids to find its invocation in; it was given embeddings")
        cache = settings.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self.current = _kept(cache, ids)
            return
        parts = _parts(ids, settings.get("position_ids"))
        mask = active(ids, parts, self.invocation)
        if module.training and self.required:
            self._check(mask, parts, settings.get("labels"))
        if cache is not None:
            _keep(cache, mask.any(dim=1))
        self.current = mask

    def apply(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output of B where the adapter acts, shape (rows, tokens, out), and zeros elsewhere."""
        assert self.current is not None, "the mask is found before any layer runs"
        return output * self.current[..., None].to(output.dtype)

    def _check(self, mask: Tensor, parts: Tensor, labels: Tensor | None) -> None:
        """Refuse a training example whose labels the adapter does not see."""
        import torch

        wanted = torch.ones_like(mask) if labels is None else labels != IGNORED
        shape = (len(parts), int(parts.max()) + 1)
        labelled, invoked = (
            torch.zeros(shape, device=mask.device).scatter_reduce(1, parts, kind.float(), "amax")
            for kind in (wanted, mask)
        )
        if bool((labelled > invoked).any()):
            raise UserError(
                f"invocation: a training example contains none of {[list(s) for s in self.invocation]}, so nothing "
                "would be trained on it; give the token ids that stand before every answer"
            )


def active(ids: Tensor, parts: Tensor, invocation: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return which tokens are at or after the start of the last invocation in their part of the row.

    Args:
        ids: token ids, shape (rows, tokens).
        parts: number of the example each token belongs to, from 0 and rising, same shape.
        invocation: the sequences to look for.
    """
    import torch

    rows, width = ids.shape
    place = torch.arange(width, device=ids.device).expand(rows, width)
    start = torch.zeros_like(ids, dtype=torch.bool)
    for sequence in invocation:
        length = len(sequence)
        if length > width:
            continue
        windows = ids.unfold(1, length, 1) == torch.tensor(sequence, device=ids.device)
        whole = windows.all(dim=2) & (parts[:, : width - length + 1] == parts[:, length - 1 :])
        start[:, : width - length + 1] |= whole
    last = torch.full((rows, int(parts.max()) + 1), width, device=ids.device)
    last = last.scatter_reduce(1, parts, torch.where(start, place, -1), "amax", include_self=False)
    first = last.gather(1, parts)
    return (first >= 0) & (place >= first)


def _parts(ids: Tensor, positions: Tensor | None) -> Tensor:
    """Return the number of the example each token belongs to: packed examples begin at position 0."""
    import torch

    if positions is None or positions.shape[-1] != ids.shape[1]:
        return torch.zeros_like(ids)
    parts = (positions == 0).long().cumsum(dim=1) - 1
    return parts.clamp(min=0).expand(ids.shape).contiguous()


def _keep(cache: Any, invoked: Tensor) -> None:
    """Remember with a cache which of its rows have been invoked, also when rows are taken out of it."""
    select: Callable[[Tensor], object] = type(cache).batch_select_indices.__get__(cache)

    def selected(indices: Tensor) -> None:
        select(indices)
        cache.invoked = cache.invoked[indices]

    cache.invoked = invoked
    cache.batch_select_indices = selected


def _kept(cache: Any, ids: Tensor) -> Tensor:
    """Return the mask of tokens that follow what is in a cache.

    Raises:
        UserError: the cache was not filled by this model, or its rows were changed.
    """
    invoked = getattr(cache, "invoked", None)
    if invoked is None or len(invoked) != len(ids):
        raise UserError("alora cannot continue this key-value cache: it does not know which rows were invoked")
    mask: Tensor = invoked[:, None].expand(ids.shape)
    return mask
