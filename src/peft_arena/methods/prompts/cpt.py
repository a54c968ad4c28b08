"""Context-aware prompt tuning: training examples before the input, whose question tokens' embeddings train a little.

The context is made of training examples, as for in-context learning. To the embedding of each question token a trained
vector is added, whose length is held to ``epsilon * sqrt(hidden / 2048)`` after each step; answer tokens stay as they
are. The loss is that of the training batch plus ``context_loss`` times the loss of the answers inside the context,
where the answer j examples before the end of the context weighs ``decay ** j`` (j from 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, PeftAttached
from peft_arena.methods.base import Attached, Calibration, CalibrationError, Capability, MethodCard, MethodConfig
from peft_arena.methods.prompts.cartridge import examples
from peft_arena.methods.prompts.prompt import VIRTUAL, VirtualTokens, hidden_size
from peft_arena.methods.state import check_fits, copy_into

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

QUESTION, ANSWER = 2, 4
"""How peft marks tokens that train, and answers: of example k by 4 k + 4."""
IGNORED = -100
REFERENCE_WIDTH = 2048
"""Width of the model for which ``epsilon`` is meant as it is."""


class CptConfig(MethodConfig):
    """Settings of context-aware prompt tuning."""

    num_virtual_tokens: int = Field(default=64, ge=1)
    """Trained tokens of the context. Answers between them take room in the model's context too, but do not train."""
    calibration_examples: int = Field(default=32, ge=1)
    """Training examples drawn; the context is made of as many as the trained tokens need, in random order."""
    epsilon: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Longest change of an embedding, for a model of width 2048; it grows with the square root of the width."""
    context_loss: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the loss of the answers inside the context."""
    decay: float = Field(default=0.95, gt=0, le=1)
    """Factor by which an answer in the context weighs less than that of the example after it."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        "num_virtual_tokens": 1,
        "calibration_examples": 5,
        "epsilon": 1.0,
        "context_loss": 0.25,
        "decay": 0.5,
    }


class Context(NamedTuple):
    """The tokens before the input."""

    ids: list[int]
    kinds: list[int]
    """Of each token :data:`QUESTION`, or 4 k + 4 for the answer of example k."""


class CptAttached(PeftAttached):
    """Context-aware prompt tuning in place on a model, to train."""

    method: Cpt

    def state(self) -> dict[str, Tensor]:
        """Return the trained vectors, the context they belong to, and its embeddings."""
        encoder = self._encoder()
        return {**super().state(), "context": encoder.context, "embeddings": encoder.embedding.weight.detach()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put tensors from :meth:`state` back in place, bit for bit.

        Raises:
            UserError: names or shapes differ from the model's, or the context has other tokens to train.
        """
        encoder = self._encoder()
        own = {**self.trained(), "context": encoder.context, "embeddings": encoder.embedding.weight}
        check_fits(own, state, "the state")
        places = trained_places(state["context"])
        if len(places) != len(encoder.places):
            raise UserError(f"the state's context has {len(places)} tokens that train, not {len(encoder.places)}")
        copy_into(own, state)
        encoder.places.copy_(places)
        config: Any = self.model.peft_config[ADAPTER]
        config.cpt_token_ids, config.cpt_tokens_type_mask = encoder.context.tolist()

    def extra_loss(self) -> Tensor | None:
        """Return the weighted loss of the answers inside the context, which no input after it can change."""
        import torch
        from torch.nn import functional

        config = self.method.config
        if not config.context_loss:
            return None
        base: Any = self.model.get_base_model()
        prompt = self.model.get_prompt(1).to(base.get_input_embeddings().weight.dtype)
        logits = base(inputs_embeds=prompt, use_cache=False).logits[0, :-1].float()
        ids, kinds = self._encoder().context[:, 1:]
        nats = functional.cross_entropy(logits, ids, reduction="none")
        answers = kinds % 4 == 0
        age = kinds[answers].max() // 4 + 1 - kinds[answers] // 4
        return config.context_loss * (nats[answers] * torch.pow(config.decay, age.float())).mean()

    def after_step(self, step: int, total: int) -> None:
        """Shorten every change that has become longer than allowed."""
        import torch

        (delta,) = self.trained().values()
        limit = self.method.config.epsilon * (delta.shape[1] / REFERENCE_WIDTH) ** 0.5
        with torch.no_grad():
            delta.mul_(limit / delta.norm(dim=1, keepdim=True).clamp(min=limit))

    def _encoder(self) -> Any:
        return self.model.get_submodule(f"prompt_encoder.{ADAPTER}")


class Cpt(VirtualTokens):
    """Context-aware prompt tuning: examples before the input, of which question embeddings train."""

    Config: ClassVar[type[MethodConfig]] = CptConfig
    config: CptConfig
    size: ClassVar[str | None] = None
    derived_settings: ClassVar[frozenset[str]] = VirtualTokens.derived_settings | {
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
        "num_virtual_tokens",
    }
    card: ClassVar[MethodCard] = MethodCard(
        name="cpt",
        title="Context-aware prompt tuning (CPT)",
        family="prompt",
        paper="Blau et al., 2024, Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods",
        url="https://arxiv.org/abs/2410.17222",
        capabilities=VIRTUAL | {Capability.NEEDS_CALIBRATION},
        parameters="num_virtual_tokens * hidden",
        learning_rate=1e-3,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "the context is a random sample of the training examples; the first one is cut at its start so that "
            "exactly num_virtual_tokens tokens train, and training batches may hold examples of the context",
            "words of the prompt's template count as input: one bound for all trained tokens, where the paper has two",
            "the context's loss is the mean over its own answer tokens, weighed by context_loss; the paper takes one "
            "mean over the answer tokens of context and training example together",
            "changes are shortened after each optimizer step (AdamW), the paper's projected gradient descent",
        ),
        description="Puts training examples before every input and trains small changes of their question tokens.",
    )

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Wrap the model with a context of training examples; see :meth:`Method.attach`."""
        self._targets(model)
        context = make_context(examples(calibration, self.card.name, seed), self.config.num_virtual_tokens)
        room = self.room(model)
        if room is not None and len(context.ids) > room:
            raise UserError(
                f"num_virtual_tokens: with the answers between them {self.config.num_virtual_tokens} tokens are a "
                f"context of {len(context.ids)}, and {type(model).__name__} has room for {room}"
            )
        base = str(model.name_or_path or "")
        wrapped = self._wrap(model, self._peft_config(context), seed, set())
        return CptAttached(self, wrapped, base)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        self.layers(model)
        return self.config.num_virtual_tokens * hidden_size(model)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's configuration without a context, which follows from the training data."""
        return self._peft_config(Context([0], [QUESTION]))

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint, which holds the changed embeddings of the whole context."""
        config = self.peft_config(patterns, seed=0)
        config.inference_mode = True
        return config

    def _peft_config(self, context: Context) -> PeftConfig:
        import peft

        return peft.CPTConfig(
            task_type=TASK,
            cpt_token_ids=context.ids,
            cpt_mask=[1] * len(context.ids),
            cpt_tokens_type_mask=context.kinds,
            opt_projection_epsilon=self.config.epsilon,
            opt_projection_format_epsilon=self.config.epsilon,
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=self.config.decay,
        )

    def finish(self, model: PeftModel) -> None:
        """Train question tokens only, and leave the loss to the trainer and :meth:`CptAttached.extra_loss`.

        peft trains a vector for every token, with gradients of answers set to zero, and computes a loss of its own from
        the logits of all positions.
        """
        import torch
        from torch import nn
        from torch.nn import functional

        wrapped: Any = model
        config: Any = model.peft_config[ADAPTER]
        encoder: Any = wrapped.prompt_encoder[ADAPTER]

        def forward(
            input_ids: Tensor | None, inputs_embeds: Tensor | None, _: Any, task_ids: None, rows: int, **rest: Any
        ) -> Any:
            embedded = wrapped.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
            prompt = wrapped.get_prompt(batch_size=rows).to(embedded.dtype)
            labels = rest.pop("labels", None)
            if labels is not None:
                labels = functional.pad(labels, (prompt.shape[1], 0), value=IGNORED)
            return wrapped.base_model(inputs_embeds=torch.cat((prompt, embedded), dim=1), labels=labels, **rest)

        wrapped._cpt_forward = forward
        if config.inference_mode:
            return
        device = encoder.embedding.weight.device
        context = torch.tensor([config.cpt_token_ids, config.cpt_tokens_type_mask], device=device)
        encoder.register_buffer("context", context, persistent=False)
        encoder.register_buffer("places", trained_places(context), persistent=False)
        del encoder.delta_embedding
        encoder.delta = nn.Parameter(torch.zeros(len(encoder.places), config.token_dim, device=device))
        encoder.forward = lambda indices: functional.embedding(
            indices, encoder.embedding.weight.index_add(0, encoder.places, encoder.delta)
        )


def make_context(found: list[tuple[list[int], list[int]]], trained: int) -> Context:
    """Return a context with a given number of tokens that train, made of whole examples but for the start of the first.

    Args:
        found: token ids and labels of examples; the first of them is last in the context.
        trained: how many question tokens there are to be.

    Raises:
        CalibrationError: the examples have fewer.
    """
    chosen: list[list[tuple[int, bool]]] = []
    missing = trained
    for ids, labels in found:
        chosen.insert(0, [(token, place == 0 or labels[place] == IGNORED) for place, token in enumerate(ids)])
        missing -= sum(question for _, question in chosen[0])
        if missing <= 0:
            break
    if missing > 0:
        raise CalibrationError(
            f"num_virtual_tokens: {trained} is above the {trained - missing} question tokens of the calibration "
            "examples; lower it or raise calibration_examples"
        )
    tokens, kinds = [], []
    for number, example in enumerate(chosen):
        for token, question in example:
            if question and missing < 0:
                missing += 1
                continue
            tokens.append(token)
            kinds.append(QUESTION if question else ANSWER * (number + 1))
    return Context(tokens, kinds)


def trained_places(context: Tensor) -> Tensor:
    """Return where in a context, shape (2, tokens), the tokens that train are."""
    return (context[1] == QUESTION).nonzero().flatten()
