"""CorDA: low-rank adaptation that starts from components of each weight as its inputs see them.

With C the covariance of a layer's inputs on training examples, W0 C = U S V^T and hence W0 = U S (V^T C^-1). The
``rank`` largest (instruction-previewed) or smallest (knowledge-preserved) components start B A; the rest is frozen, see
:mod:`split`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.methods.base import Calibration, Capability, MethodCard, MethodConfig
from peft_arena.methods.calibrate import batches_of, input_moments
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.low_rank.split import SPLIT, SPLIT_DEVIATIONS, Factors, SplitMethod, principal, smallest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

DAMPING = 0.01
"""Share of the mean variance that is added to every variance, so that C can be inverted."""
PAPER = (
    "Yang et al., 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
    "Parameter-Efficient Fine-tuning"
)
URL = "https://arxiv.org/abs/2406.05223"
DEVIATIONS = (
    "no dropout: it would drop a part of the pretrained weight",
    "as in peft, an example's inputs are divided by their largest entry before they are added to C",
    "C is damped by 1 % of the mean variance and all is computed in float64; peft doubles the damping until a float32 "
    "inverse is accurate",
    *SPLIT_DEVIATIONS,
)


class CordaConfig(RankConfig):
    """Settings of CorDA."""

    calibration_examples: int = Field(default=256, ge=1)
    """Training examples from which the covariance of the inputs is estimated."""

    alternatives: ClassVar[Mapping[str, Any]] = {**RankConfig.alternatives, "calibration_examples": 6}


class Corda(SplitMethod):
    """What both modes of CorDA share."""

    Config: ClassVar[type[MethodConfig]] = CordaConfig
    config: CordaConfig
    largest: ClassVar[bool]
    """Whether the largest components train, or the smallest."""

    def starts(
        self, model: PreTrainedModel, layers: Mapping[str, nn.Linear], calibration: Calibration | None
    ) -> Iterator[tuple[str, Factors]]:
        """Give the starting factors; see :meth:`SplitMethod.starts`."""
        batches = batches_of(calibration, self.card.name)
        for name, moments in input_moments(model, layers, batches, by_largest):
            yield name, self.oriented(layers[name].weight.detach().float(), moments.square / moments.examples)

    def oriented(self, weight: Tensor, covariance: Tensor) -> Factors:
        """Return the chosen components of a weight.

        Args:
            weight: shape (out, in), float32.
            covariance: of its inputs, shape (in, in), float64.
        """
        import torch

        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        damped = covariance + DAMPING * covariance.diagonal().mean() * identity
        rank = self.config.rank
        seen = weight.double() @ damped
        left, values, right = principal(seen, rank, None) if self.largest else smallest(seen, rank)
        back = torch.linalg.solve(damped, right.T).T
        root = (values / self.scale).sqrt()
        return Factors((root[:, None] * back).float(), (left * root).float())


class CordaIpm(Corda):
    """CorDA, instruction-previewed: trains the components that matter most for the task's inputs."""

    largest: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="corda_ipm",
        title="CorDA, instruction-previewed",
        family="low-rank",
        paper=PAPER,
        url=URL,
        capabilities=SPLIT | {Capability.NEEDS_CALIBRATION},
        parameters="rank * sum over targets of (in + out)",
        equation="R + alpha / rank * lora_B @ lora_A",
        learning_rate=2e-5,
        micro_learning_rate=1e-3,
        deviations=DEVIATIONS,
        description=(
            "Decomposes each target weight in the directions its inputs take on the task's training examples; the "
            "largest components train as B A, the rest is frozen."
        ),
    )


class CordaKpm(Corda):
    """CorDA, knowledge-preserved: trains the components that matter least for the inputs seen."""

    largest: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard(
        name="corda_kpm",
        title="CorDA, knowledge-preserved",
        family="low-rank",
        paper=PAPER,
        url=URL,
        capabilities=SPLIT | {Capability.NEEDS_CALIBRATION},
        parameters="rank * sum over targets of (in + out)",
        equation="R + alpha / rank * lora_B @ lora_A",
        learning_rate=2e-5,
        micro_learning_rate=3e-3,
        deviations=(
            "the covariance is of the run's training examples; in the paper, of questions about the knowledge to keep",
            *DEVIATIONS,
        ),
        description=(
            "Decomposes each target weight in the directions its inputs take on the task's training examples; the "
            "smallest components train as B A, the rest is frozen."
        ),
    )


def by_largest(inputs: Tensor) -> Tensor:
    """Divide the inputs of one example, shape (tokens, in), by the size of their largest entry."""
    return inputs / inputs.max().abs()
