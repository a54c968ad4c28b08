"""MonteCLoRA: LoRA whose A is drawn around its mean in training, from a learned mixture.

In training each forward pass uses A + sum_i p_i N_i, with noise N_i of a learned scale and learned mixture weights p;
a regulariser keeps both near their priors. Evaluation, checkpoints and merging use the mean alone: a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.methods.adapter import ADAPTER, WEIGHT_ADAPTER, PeftAttached, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import Lora, LoraConfig
from peft_arena.methods.low_rank.velora import save_plain_lora

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


class MonteCLoraConfig(LoraConfig):
    """Settings of MonteCLoRA."""

    samples: int = Field(default=8, ge=2)
    """Draws of A that a forward pass averages."""
    noise: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Factor on the noise added to A."""
    kl_weight: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
    """Weight of the divergence from the priors in the loss."""
    dirichlet_prior: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Concentration of the prior over mixture weights; larger values make them more alike."""
    entropy: bool = False
    """Whether the sum of squared mixture weights is added to the loss."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **LoraConfig.alternatives,
        "samples": 3,
        "noise": 0.05,
        "kl_weight": 0.5,
        "dirichlet_prior": 3.0,
        "entropy": True,
    }


class MonteCLoraAttached(PeftAttached):
    """MonteCLoRA in place on a model; its checkpoint is a plain LoRA, which gives the same outputs."""

    method: MonteCLora

    def begin(self, total: int) -> None:
        """Make every forward pass draw anew, so that a resumed training draws what it would have drawn."""
        for sampler in self._samplers():
            sampler.sampler.index = sampler.sampler.buffer_size

    def extra_loss(self) -> Tensor | None:
        """Return the regulariser of the forward pass just done: the mean over the layers."""
        tuner: Any = self.model.base_model
        loss: Tensor = tuner._get_monteclora_loss()
        return loss

    def after_step(self, step: int, total: int) -> None:
        """Let go of the last forward pass, whose tensors peft keeps: a model that holds them cannot be copied."""
        self._settle()

    def delta(self, module: str) -> Tensor | None:
        """Return tuned minus pretrained weight of one linear module; see :meth:`Attached.delta`."""
        self._settle()
        return super().delta(module)

    def save(self, directory: Path) -> None:
        """Write the means of the factors as a plain LoRA adapter."""
        save_plain_lora(self, directory)

    def _settle(self) -> None:
        for sampler in self._samplers():
            sampler.gaussian_var_prior = sampler.gaussian_var_prior.detach()
            sampler.expert_weights = sampler.expert_weights.detach()

    def _samplers(self) -> list[Any]:
        layers = tuner_layers(self.model).values()
        return [layer.lora_monteclora_sampler[ADAPTER] for layer in layers if hasattr(layer, "lora_monteclora_sampler")]


class MonteCLora(Lora):
    """MonteCLoRA: LoRA with learned noise on A."""

    Config: ClassVar[type[MethodConfig]] = MonteCLoraConfig
    config: MonteCLoraConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="monteclora",
        title="MonteCLoRA",
        family="low-rank",
        paper=(
            "Seth et al., 2024, Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of "
            "Low-Rank Adaptation"
        ),
        url="https://arxiv.org/abs/2411.04358",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="sum over targets of (rank * (in + out) + rank + samples)",
        learning_rate=2e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "evaluation and checkpoints use the mean of A, without the learned noise",
            "each forward pass draws anew, where peft cycles through a buffer drawn ahead",
            "the regulariser is the mean over layers, as peft computes it",
            "the mixture weights' divergence from their prior is torch's; a term of peft's has the wrong sign, and is "
            "infinite with many samples",
            "A starts Kaiming-uniform (a = sqrt 5) unless init is 'gaussian'",
        ),
        description=(
            "LoRA whose A is perturbed in training by noise of learned scale and mixture, with a regulariser in the "
            "loss. What is kept is a plain LoRA."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return super().count(model) + len(self.linears(model)) * (self.config.rank + self.config.samples)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's LoRA configuration with MonteCLoRA switched on."""
        from peft.tuners.lora import MontecloraConfig

        config: Any = super().peft_config(patterns, seed)
        config.monteclora_config = MontecloraConfig(
            num_samples=self.config.samples,
            use_entropy=self.config.entropy,
            dirichlet_prior=self.config.dirichlet_prior,
            sample_scaler=self.config.noise,
            kl_loss_weight=self.config.kl_weight,
            buffer_size=1,
        )
        return config

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of the plain LoRA that a checkpoint is."""
        return super().peft_config(patterns, seed=0)

    def finish(self, model: PeftModel) -> None:
        """Put the divergence of the mixture weights in the place of peft's, which is none: it can be negative."""
        for layer in tuner_layers(model).values():
            if hasattr(layer, "lora_monteclora_sampler"):
                layer.lora_monteclora_sampler[ADAPTER].dirichlet_kl = partial(divergence, self.config.dirichlet_prior)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that adds the regulariser."""
        return MonteCLoraAttached(self, model, base)


def divergence(prior: float, concentration: Tensor) -> Tensor:
    """Return how far a Dirichlet distribution is from a symmetric one (Kullback-Leibler), a scalar, in nats.

    Args:
        prior: concentration of each entry of the symmetric one.
        concentration: of the other, shape (samples,).
    """
    import torch
    from torch.distributions import Dirichlet, kl_divergence

    there = torch.full_like(concentration, prior)
    found: Tensor = kl_divergence(Dirichlet(concentration, validate_args=False), Dirichlet(there, validate_args=False))
    return found
