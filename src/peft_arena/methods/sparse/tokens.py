"""Trained rows of the token embedding: alone (trainable_tokens), or beside LoRA (lora_tokens).

The rows of the given tokens are replaced by trained ones that start at the pretrained values. Where the output layer
is the embedding (tied), it is trained with it. No weight decay: the rows are weights, not changes of weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import (
    ADAPTER,
    TASK,
    WEIGHT_ADAPTER,
    PeftAttached,
    PeftMethod,
    tuner_layers,
)
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import Lora, LoraConfig
from peft_arena.models.extend import NEW_IDS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PATIENCE = 20
"""Steps within which one of the tokens must have been trained; all steps of a shorter training."""


def _distinct(tokens: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(tokens)) < len(tokens):
        raise ValueError("an id is given twice")
    return tokens


Ids = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=100_000), AfterValidator(_distinct)
]
Tokens = Literal["special", "new"] | Ids
"""Token ids; ``special``: the begin, end and padding tokens that the model's configuration names; ``new``: those that
``model.new_tokens`` added."""


class TrainableTokensConfig(MethodConfig):
    """Settings of trained tokens."""

    tokens: Tokens = "special"
    """Ids of the tokens to train; ``special``: begin, end and padding tokens of the model's configuration; ``new``:
    those of ``model.new_tokens``."""

    alternatives: ClassVar[Mapping[str, Any]] = {"tokens": (33, 90)}  # in the suite's training rows


class LoraTokensConfig(LoraConfig):
    """Settings of LoRA with trained tokens."""

    tokens: Tokens = "special"
    """Ids of the tokens to train; ``special``: begin, end and padding tokens of the model's configuration; ``new``:
    those of ``model.new_tokens``."""

    alternatives: ClassVar[Mapping[str, Any]] = {**LoraConfig.alternatives, "tokens": (33, 90)}


class TokensAttached(PeftAttached):
    """Trained embedding rows in place on a model."""

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return one group of everything else and one of the embedding rows, which do not decay."""
        rows = [layer.trainable_tokens_delta[ADAPTER] for layer in self._rows()]
        others = [p for p in self.trained().values() if not any(p is row for row in rows)]
        groups = [
            {"params": others, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": rows, "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def after_step(self, step: int, total: int) -> None:
        """Check that the tokens occur in the training.

        Raises:
            UserError: none of them had a gradient in the first steps.
        """
        if step != min(PATIENCE, total):
            return
        for layer in self._rows():
            if bool((layer.trainable_tokens_delta[ADAPTER] == layer.trainable_tokens_original[ADAPTER]).all()):
                raise UserError(
                    f"tokens: none of the {len(layer.token_indices[ADAPTER])} tokens was trained in the first {step} "
                    "steps: they do not occur in the training data where a label depends on them"
                )

    def delta(self, module: str) -> Tensor | None:
        """Return tuned minus pretrained weight of one linear module; a tied output layer changes with its rows."""
        import torch

        if Capability.LINEAR_DELTA in self.method.card.capabilities:
            layer = tuner_layers(self.model).get(f"{module}.token_adapter")
            if layer is not None:
                weight = layer.get_base_layer().weight
                with torch.no_grad():
                    change = torch.zeros_like(weight, dtype=torch.float32)
                    rows = layer.token_indices[ADAPTER]
                    change[rows] = layer.trainable_tokens_delta[ADAPTER].float() - weight[rows].float()
                return change
        return super().delta(module)

    def merged(self) -> PreTrainedModel:
        """Return the plain model with the tuned weights; see :meth:`Attached.merged`."""
        model = super().merged()
        output = model.get_output_embeddings()
        if output is not None:
            vars(output).pop("forward", None)
        return model

    def _rows(self) -> Iterator[Any]:
        """Yield the layer that holds the rows; a tied output layer only refers to it."""
        for layer in tuner_layers(self.model).values():
            if hasattr(layer, "trainable_tokens_delta") and not layer.tied_adapter:
                yield layer


class TrainableTokens(PeftMethod):
    """Trained tokens: only some rows of the token embedding train."""

    Config: ClassVar[type[MethodConfig]] = TrainableTokensConfig
    config: TrainableTokensConfig
    derived_settings: ClassVar[frozenset[str]] = frozenset({"token_indices"})
    card: ClassVar[MethodCard] = MethodCard(
        name="trainable_tokens",
        title="Trainable tokens",
        family="selective",
        paper="none",
        url="https://huggingface.co/docs/peft/package_reference/trainable_tokens",
        capabilities=WEIGHT_ADAPTER - {Capability.LINEAR_DELTA},
        parameters="tokens * hidden size",
        undecayed="vectors of tokens are changes from the pretrained ones, each a vector of its own",
        learning_rate=2e-2,
        micro_learning_rate=0.1,
        random_init=False,
        deviations=(
            "a training that trains none of the tokens within 20 steps, or to its end if that is earlier, fails",
            "embedding rows do not decay",
        ),
        description=(
            "Trains the embedding rows of given tokens and nothing else; with tied embeddings also the output layer's."
        ),
    )

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the token embedding; peft finds an output layer that is tied to it by itself."""
        token_ids(model, self.config.tokens)
        return dict(list(embedding_layers(model).items())[:1])

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        embedding: Any = model.get_input_embeddings()
        return len(token_ids(model, self.config.tokens)) * int(embedding.weight.shape[1])

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's configuration of trained tokens."""
        import peft

        return peft.TrainableTokensConfig(task_type=TASK, target_modules=patterns, token_indices=[], init_weights=True)

    def finish(self, model: PeftModel) -> None:
        """Put a tied output layer back in its place, computing with the trained rows: TRL refuses an adapter there."""
        base: Any = model.get_base_model()
        rows, output = base.get_input_embeddings(), base.get_output_embeddings()
        if hasattr(output, "trainable_tokens_delta"):
            plain = output.get_base_layer()
            plain.forward = partial(_tied, plain, rows)
            base.set_output_embeddings(plain)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that checks that the tokens occur."""
        return TokensAttached(self, model, base)

    def _wrap(self, model: PreTrainedModel, config: PeftConfig, seed: int, wanted: set[str]) -> PeftModel:
        settings: Any = config
        settings.token_indices = _same(settings.token_indices, token_ids(model, self.config.tokens))
        with tied_quietly():
            return super()._wrap(model, config, seed, set(embedding_layers(model)))


class LoraTokens(Lora):
    """LoRA with trained tokens."""

    Config: ClassVar[type[MethodConfig]] = LoraTokensConfig
    config: LoraTokensConfig
    derived_settings: ClassVar[frozenset[str]] = frozenset({"trainable_token_indices"})
    card: ClassVar[MethodCard] = MethodCard(
        name="lora_tokens",
        title="LoRA with trained tokens",
        family="low-rank",
        paper="Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models; trained tokens of peft",
        url="https://huggingface.co/docs/peft/package_reference/trainable_tokens",
        capabilities=WEIGHT_ADAPTER,
        parameters="rank * sum over targets of (in + out) + tokens * hidden size",
        undecayed="vectors of tokens are changes from the pretrained ones, each a vector of its own",
        learning_rate=2e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "A starts Kaiming-uniform (a = sqrt 5) instead of Gaussian unless init is 'gaussian'",
            "a training that trains none of the tokens within 20 steps, or to its end if that is earlier, fails",
            "embedding rows have LoRA's learning rate and do not decay",
        ),
        description="LoRA, and beside it the embedding rows of given tokens; with tied embeddings also the output's.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing tokens that the model does not have."""
        token_ids(model, self.config.tokens)
        embedding_layers(model)
        return super().linears(model)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        embedding: Any = model.get_input_embeddings()
        return super().count(model) + len(token_ids(model, self.config.tokens)) * int(embedding.weight.shape[1])

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that checks that the tokens occur."""
        return TokensAttached(self, model, base)

    def _wrap(self, model: PreTrainedModel, config: PeftConfig, seed: int, wanted: set[str]) -> PeftModel:
        settings: Any = config
        settings.trainable_token_indices = _same(settings.trainable_token_indices, token_ids(model, self.config.tokens))
        return super()._wrap(
            model, config, seed, wanted | {f"{name}.token_adapter" for name in embedding_layers(model)}
        )


def _tied(output: Any, rows: Any, hidden: Tensor) -> Tensor:
    """Return the logits of an output layer that is the embedding, with the trained rows in it."""
    from torch.nn import functional

    plain = rows.disable_adapters or rows.merged
    return functional.linear(hidden, output.weight if plain else rows.get_merged_weights(rows.active_adapters))


def _same(saved: list[int] | None, own: list[int]) -> list[int]:
    """Return the ids, which must be those of the checkpoint that is read; of none for a new adapter.

    Raises:
        UserError: the checkpoint has other ids.
    """
    if saved and saved != own:
        raise UserError(f"tokens: the checkpoint was made with the ids {saved[:5]} and the method has {own[:5]}")
    return own


def embedding_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the token embedding by name and, where the output layer is tied to it, that too.

    Raises:
        UserError: the output layer is tied and has a bias, which peft would leave out.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {names[id(embedding)]: embedding}
    if output is not None and output.weight is embedding.weight:
        if getattr(output, "bias", None) is not None:
            raise UserError("tokens: the tied output layer has a bias, with which its rows cannot be trained")
        found[names[id(output)]] = output
    return found


@contextmanager
def tied_quietly() -> Iterator[None]:
    """Keep peft from warning of tied layers inside the block: it ties the rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def token_ids(model: PreTrainedModel, tokens: Tokens) -> list[int]:
    """Return the ids a setting names, in its order.

    Raises:
        UserError: an id outside the vocabulary, or a model without special tokens.
    """
    embedding: Any = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    if tokens == "new":
        added = [int(number) for number in getattr(model.config, NEW_IDS, None) or ()]
        if not added:
            raise UserError("tokens: the model has no new tokens: name them in model.new_tokens, or give ids here")
        return added
    if tokens == "special":
        given = (getattr(model.config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad"))
        lists = [value if isinstance(value, list) else [value] for value in given if value is not None]
        ids = list(dict.fromkeys(int(value) for values in lists for value in values if 0 <= int(value) < size))
        if not ids:
            raise UserError("tokens: the model's configuration names no begin, end or padding token; give ids")
        return ids
    for number in tokens:
        if number >= size:
            raise UserError(f"tokens: {number} is outside the model's vocabulary; allowed: 0 to {size - 1}")
    return list(tokens)
