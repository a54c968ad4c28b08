"""ShadowPEFT: a small trained network beside the model, whose state corrects the input of every block.

s0 = shadow(embeddings), the shadow being a new decoder of ``shadow_layers`` blocks. Block l reads
h + alpha * W_up W_down dropout(h - s), and with its output h' the state becomes s (1 - g) + g T(h'), with
g = sigmoid(G(h')), T and G being two-layer networks. To the loss comes ``auxiliary_loss`` times the shadow's own
cross-entropy, from s0 through the model's output layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, PeftMethod
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.prompts.prompt import hidden_size
from peft_arena.methods.sizes import whole_numbers
from peft_arena.methods.state import local_random

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

IGNORED = -100


class ShadowConfig(MethodConfig):
    """Settings of ShadowPEFT."""

    rank: int = Field(default=8, ge=1)
    """Rank of the correction of each block's input."""
    alpha: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Factor of the correction."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Probability with which an entry of h - s is zeroed in training."""
    shadow_layers: int = Field(default=1, ge=1)
    """Blocks of the shadow, each as wide as the model's."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Inner width of the shadow's feed-forward layers; None for the model's own."""
    update_hidden_size: int | None = Field(default=None, ge=1)
    """Inner width of the networks T and G; None for the rank."""
    auxiliary_loss: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Weight of the shadow's own cross-entropy in the loss."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        "rank": 3,
        "alpha": 0.5,
        "dropout": 0.6,
        "shadow_layers": 2,
        "intermediate_size": 48,
        "update_hidden_size": 5,
        "auxiliary_loss": 0.5,
    }


class Shadow(PeftMethod):
    """ShadowPEFT: a trained network beside the model corrects each block's input."""

    Config: ClassVar[type[MethodConfig]] = ShadowConfig
    config: ShadowConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard(
        name="shadow",
        title="ShadowPEFT",
        family="shadow network",
        paper="Li et al., 2026, ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning",
        url="https://arxiv.org/abs/2604.19254",
        capabilities=frozenset(
            {Capability.TRAINS, Capability.IDENTITY_AT_INIT, Capability.ONLINE_RL, Capability.PEFT_ADAPTER}
        ),
        parameters="shadow decoder (blocks and last norm) + blocks * 2 hidden rank "
        "+ (blocks - 1) * 2 (2 hidden u + u + hidden), u = update_hidden_size",
        learning_rate=2e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "the networks T and G of the last block are frozen: the state they make is not used",
            "the shadow starts at random and is as wide as the model; pretrained and narrower shadows are not offered",
            "the shadow's own loss is the mean over the labels of one forward pass, whatever its share of the batch; "
            "in reinforcement learning the labels are the sampled completions, whatever their reward",
        ),
        description="Runs a small trained decoder beside the model and lets its state correct each block's input.",
    )

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the transformer blocks, by name.

        Raises:
            UserError: the model is not built as this method needs it, or the rank is above its width.
        """
        from peft.tuners.shadow.model import _get_backbone, _get_decoder_layers

        config: Any = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        try:
            backbone: Any = _get_backbone(model)
            stack, _ = _get_decoder_layers(backbone)
        except AttributeError:
            backbone = stack = None
        if stack is None or not hasattr(backbone, "embed_tokens") or kinds != {"full_attention"}:
            raise UserError(
                f"method {self.card.name} needs a decoder with embed_tokens, a list of blocks and full attention in "
                f"each, which {type(model).__name__} is not"
            )
        width = hidden_size(model)
        if self.config.rank > width:
            raise UserError(f"rank: {self.config.rank} is above the width of the model; allowed: 1 to {width}")
        wanted = {id(block) for block in stack}
        return {name: module for name, module in model.named_modules() if id(module) in wanted}

    def sizes(self, model: PreTrainedModel) -> Sequence[int]:
        """Return the ranks that fit the model."""
        return whole_numbers(self.config, "rank", model)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        import torch
        from peft.tuners.shadow import ShadowModel

        blocks = len(self.layers(model))
        stand_in: Any = SimpleNamespace(model=model)
        config: Any = self.peft_config([], seed=0)
        with torch.device("meta"), local_random(0):
            decoder = ShadowModel._build_shadow_backbone(stand_in, config)
        own = sum(p.numel() for name, p in decoder.named_parameters() if not name.startswith("embed_tokens."))
        hidden, rank = hidden_size(model), self.config.rank
        inner = self.config.update_hidden_size or rank
        return own + blocks * 2 * hidden * rank + (blocks - 1) * 2 * (2 * hidden * inner + inner + hidden)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's ShadowPEFT configuration."""
        import peft

        return peft.ShadowConfig(
            task_type=TASK,
            target_modules=patterns,
            r=self.config.rank,
            shadow_alpha=self.config.alpha,
            shadow_dropout=self.config.dropout,
            shadow_num_hidden_layers=self.config.shadow_layers,
            shadow_intermediate_size=self.config.intermediate_size,
            update_hidden_size=self.config.update_hidden_size,
            auxiliary_loss_weight=self.config.auxiliary_loss,
        )

    def finish(self, model: PeftModel) -> None:
        """Make the shadow float32 with exact rotary frequencies, and mend its cache, its loss and what trains."""
        tuner: Any = model.base_model
        decoder: Any = tuner.shadow_backbone[ADAPTER]
        for container in (tuner.shadow_backbone, *tuner._boundary_layers):
            for parameter in _shadow_parameters(container, tuner):
                parameter.data = parameter.data.float()
        decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(next(decoder.parameters()).device)
        last = tuner._boundary_layers[-1]
        last.shadow_update_transform.requires_grad_(False)
        last.shadow_update_gate.requires_grad_(False)
        below = int(tuner.model.config.get_text_config().num_hidden_layers)
        for block in decoder.layers:
            block.self_attn.layer_idx += below
        tuner._boundary_hook_handles[0].remove()
        tuner._boundary_hook_handles[0] = tuner.model.register_forward_pre_hook(_Seed(tuner), with_kwargs=True)
        tuner.shadow_auxiliary_loss = _ShadowLoss(tuner)


def _shadow_parameters(container: nn.Module, tuner: Any) -> list[Any]:
    return [p for name, p in container.named_parameters() if container is tuner.shadow_backbone or "shadow_" in name]


class _Seed:
    """Runs the shadow before the model; its keys and values are further layers of the model's own cache.

    peft pairs two caches in an object of its own, which callers that keep a cache and pass it again do not know of.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Set the state s0 and return the model's arguments, with a cache where one is asked for."""
        tuner = self.tuner
        tuner._seed_shadow_state = None
        if not tuner._shadow_path_active():
            return args, kwargs
        decoder = tuner.shadow_backbone[ADAPTER]
        cache = self.cache(module, kwargs, len(decoder.layers))
        ids = kwargs.get("input_ids", args[0] if args else None)
        embedded = kwargs.get("inputs_embeds")
        embedded = module.get_input_embeddings()(ids) if embedded is None else embedded
        given = {name: kwargs[name] for name in ("attention_mask", "position_ids") if kwargs.get(name) is not None}
        found = decoder(inputs_embeds=embedded.float(), past_key_values=cache, use_cache=cache is not None, **given)
        tuner._seed_shadow_state = found.last_hidden_state
        return args, kwargs if cache is None else {**kwargs, "past_key_values": cache}

    def cache(self, module: Any, kwargs: dict[str, Any], more: int) -> Any:
        """Return the cache to use, with layers for the shadow after those of the model; None for none."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = kwargs.get("past_key_values")
        wanted = kwargs.get("use_cache")
        if cache is None and (module.config.use_cache if wanted is None else wanted):
            cache = DynamicCache(config=module.config)
        below = int(module.config.get_text_config().num_hidden_layers)
        while cache is not None and len(cache.layers) < below + more:
            cache.layers.append(DynamicLayer())
        return cache


class _ShadowLoss:
    """The shadow's own cross-entropy on the labelled tokens, past any hook on the output layer."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def __call__(self, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the mean in nats per label."""
        from torch.nn import functional

        head = self.tuner.model.get_output_embeddings()
        after = labels[:, 1:]
        hidden = self.tuner._seed_shadow_state[:, :-1][after != IGNORED]
        scores = functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
        return functional.cross_entropy(scores.float(), after[after != IGNORED])
