"""Cartridge: a trained cache of keys and values that starts as the cache of the first tokens of the training data.

It is the prefix of P-tuning v2 with another start, and with the first ``frozen_tokens`` rows left as they start, since
models use the first position as an attention sink.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError
from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import ADAPTER, TASK, PeftAttached
from peft_arena.methods.base import Attached, Calibration, CalibrationError, Capability, MethodCard, MethodConfig
from peft_arena.methods.prompts.prefix import Prefix
from peft_arena.methods.prompts.prompt import VIRTUAL, VirtualTokens

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


class CartridgeConfig(MethodConfig):
    """Settings of Cartridge."""

    num_virtual_tokens: int = Field(default=128, ge=2)
    """Tokens of the cache before every input; the context has room for as many tokens less."""
    frozen_tokens: int = Field(default=1, ge=0)
    """Tokens at the start of the cache that do not train."""
    calibration_examples: int = Field(default=64, ge=1)
    """Training examples drawn; joined in random order, their first tokens are what the cache starts from."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        "num_virtual_tokens": 5,
        "frozen_tokens": 2,
        "calibration_examples": 7,
    }

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if self.frozen_tokens >= self.num_virtual_tokens:
            raise ValueError(f"frozen_tokens must be below num_virtual_tokens, {self.num_virtual_tokens}")
        return self


class CartridgeAttached(PeftAttached):
    """Cartridge in place on a model."""

    def frozen(self) -> dict[str, Tensor]:
        """Return the rows of the cache that do not train."""
        encoder: Any = self.model.prompt_encoder[ADAPTER]
        return {} if encoder.frozen_embedding is None else {"frozen": encoder.frozen_embedding.detach()}


class Cartridge(Prefix):
    """Cartridge: a cache of keys and values that starts from the training data and trains."""

    Config: ClassVar[type[MethodConfig]] = CartridgeConfig
    config: CartridgeConfig
    derived_settings: ClassVar[frozenset[str]] = VirtualTokens.derived_settings
    card: ClassVar[MethodCard] = MethodCard(
        name="cartridge",
        title="Cartridge",
        family="prompt",
        paper="Eyuboglu et al., 2025, Cartridges: Lightweight and General-Purpose Long Context Representations via "
        "Self-Study",
        url="https://arxiv.org/abs/2506.06266",
        capabilities=VIRTUAL | {Capability.NEEDS_CALIBRATION, Capability.KEYS_AND_VALUES},
        parameters="(num_virtual_tokens - frozen_tokens) * 2 * layers * key-value heads * head size",
        learning_rate=5e-3,
        micro_learning_rate=0.1,
        random_init=True,
        deviations=(
            "trained by cross-entropy on the task's answers; the paper generates conversations about a corpus and "
            "distils the answers a model gives with the whole corpus in its context",
            "the corpus is a sample of the training examples, in random order",
        ),
        description="Puts a cache of keys and values before the input that starts from training examples and trains.",
    )

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Wrap the model and fill the cache with that of the corpus; see :meth:`Method.attach`."""
        ids = corpus(self.card.name, calibration, self.config.num_virtual_tokens, seed)
        self._targets(model)
        rows = cached(model, ids)
        attached = super().attach(model, seed=seed)
        encoder: Any = attached.model.get_submodule(f"prompt_encoder.{ADAPTER}")
        encoder.load_prompt_embeddings(rows)
        return attached

    def sizes(self, model: PreTrainedModel) -> Sequence[int]:
        """Return the numbers of virtual tokens that leave at least half of the context, and tokens that train."""
        return [tokens for tokens in super().sizes(model) if tokens > self.config.frozen_tokens]

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        self.layers(model)
        return (self.config.num_virtual_tokens - self.config.frozen_tokens) * self.shape(model).row

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's Cartridge configuration."""
        import peft

        return peft.CartridgeConfig(
            task_type=TASK,
            num_virtual_tokens=self.config.num_virtual_tokens,
            num_frozen_tokens=self.config.frozen_tokens,
        )

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment whose state holds the frozen rows too."""
        return CartridgeAttached(self, model, base)


def examples(calibration: Calibration | None, method: str, seed: int) -> list[tuple[list[int], list[int]]]:
    """Return token ids and labels of the calibration examples without padding, in an order drawn from the seed.

    Raises:
        UserError: there are none.
    """
    if calibration is None or not calibration.batches:
        raise UserError(f"method {method} needs calibration examples: it starts from training data")
    found = []
    for batch in calibration.batches:
        rows = zip(
            batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True
        )
        found += [(ids[:length], labels[:length]) for ids, labels, length in rows]
    random.Random(seed_for(seed, method, "order")).shuffle(found)
    return found


def corpus(method: str, calibration: Calibration | None, length: int, seed: int) -> list[int]:
    """Return the first tokens of the calibration examples joined.

    Raises:
        CalibrationError: they are too few.
    """
    ids = [token for row, _ in examples(calibration, method, seed) for token in row]
    if len(ids) < length:
        raise CalibrationError(
            f"num_virtual_tokens: {length} is above the {len(ids)} tokens of the calibration examples; "
            "lower it or raise calibration_examples"
        )
    return ids[:length]


def cached(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Return the keys and values a model has for some tokens, float32, shape (tokens, 2 * layers * width)."""
    import torch
    from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values

    from peft_arena.models.modes import device_of

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids], device=device_of(model)), use_cache=True)
    finally:
        model.train(training)
    rows: Tensor = prompt_embeddings_from_past_key_values(found.past_key_values, num_virtual_tokens=len(ids))
    return rows.float()
