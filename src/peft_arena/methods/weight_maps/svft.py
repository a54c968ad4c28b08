"""SVFT: sparse combinations of the outer products of each weight's own singular vectors.

W = W0 + U M V^T with W0 = U S V^T; M (k, k), k the smaller side, is zero but for entries at fixed places, which train
from zero. All patterns but ``plain`` have as many entries as a band of ``off_diagonals`` diagonals on either side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class SvftConfig(AdaptedConfig):
    """Settings of SVFT."""

    pattern: Literal["plain", "banded", "random", "top_k"] = "banded"
    """Entries of M that train: its diagonal; a band around it; places drawn by the seed; or those where left and right
    singular vector are most alike, which needs square weights."""
    off_diagonals: int = Field(default=16, ge=0)
    """Diagonals on either side of the main one; ``random`` and ``top_k`` train as many entries as such a band has.
    Below the smaller side of every target; 0 with ``plain``, which has the main diagonal alone."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "pattern": "random",
        "off_diagonals": 1,
    }

    @model_validator(mode="after")
    def _plain_has_no_band(self) -> Self:
        if self.pattern == "plain" and self.off_diagonals:
            raise ValueError(f"pattern plain is the diagonal alone: off_diagonals must be 0, not {self.off_diagonals}")
        return self


class SvftAttached(PeftAttached):
    """SVFT in place on a model."""

    def frozen(self) -> dict[str, Tensor]:
        """Return the singular vectors and the places of the trained entries."""
        layers = tuner_layers(self.model).items()
        kinds = ("svft_u", "svft_v", "svft_index")
        return {f"{kind}.{name}": getattr(layer, kind)[ADAPTER] for name, layer in layers for kind in kinds}


class Svft(PeftMethod):
    """SVFT: trained coefficients between frozen singular vectors."""

    Config: ClassVar[type[MethodConfig]] = SvftConfig
    config: SvftConfig
    size: ClassVar[str | None] = "off_diagonals"
    card: ClassVar[MethodCard] = MethodCard(
        name="svft",
        title="SVFT",
        family="spectral",
        paper="Lingam et al., 2024, SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors",
        url="https://arxiv.org/abs/2405.19597",
        capabilities=WEIGHT_ADAPTER - {Capability.PEFT_ADAPTER},
        parameters="sum over targets of k (2 d + 1) - d (d + 1); k = min(in, out), d = off_diagonals",
        learning_rate=5e-3,
        micro_learning_rate=3e-3,
        random_init=False,
        deviations=(
            "coefficients start at zero and have no gate, where the authors' code draws them and gates them",
            "random places are drawn without repetition; the authors' code may draw one twice",
            "top_k goes by the absolute alignment, as the signs of singular vectors are arbitrary, and is refused on "
            "weights that are not square",
            "computes beside the pretrained weight instead of replacing it by its factors",
            "M is a dense (k, k) matrix in each forward pass, where the authors' code has a sparse one",
            "singular vectors are float32 on every base and are saved with the adapter: a checkpoint is about as "
            "large as the target weights in float32, up to twice that for square ones",
        ),
        description=(
            "Adds U M V^T to each target weight: U and V are its singular vectors, and of M a band (or drawn or "
            "chosen places) trains. With pattern 'random' the seed draws the places."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing too wide a band, and ``top_k`` where a weight is not square."""
        layers = super().linears(model)
        for name, layer in layers.items():
            shape = f"{name} ({layer.out_features} x {layer.in_features})"
            limit = min(layer.in_features, layer.out_features) - 1
            if self.config.off_diagonals > limit:
                raise UserError(f"off_diagonals: {self.config.off_diagonals} is above what {shape} has: 0 to {limit}")
            if self.config.pattern == "top_k" and layer.in_features != layer.out_features:
                raise UserError(
                    f"pattern: top_k compares left with right singular vectors, which differ in length in {shape}; "
                    "allowed: square targets (set targets), or another pattern"
                )
        return layers

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the numbers of off-diagonals that the smallest target has; 0 alone for ``plain``."""
        layers = super().linears(model).values()
        sides = [min(layer.in_features, layer.out_features) for layer in layers]
        return range(1 if self.config.pattern == "plain" else min(sides))

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        band = self.config.off_diagonals
        sides = [min(layer.in_features, layer.out_features) for layer in self.linears(model).values()]
        return sum(side * (2 * band + 1) - band * (band + 1) for side in sides)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return the configuration of a new adapter."""
        return self._configure(patterns, new=True)

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a saved adapter: no singular vectors are computed."""
        return self._configure(patterns, new=False)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment whose state holds the singular vectors too."""
        return SvftAttached(self, model, base)

    def _configure(self, patterns: list[str], new: bool) -> PeftConfig:
        from peft_arena.methods.low_rank.own_tuner import SvftLayer, own_config

        settings = {"pattern": self.config.pattern, "off_diagonals": self.config.off_diagonals}
        return own_config(SvftLayer, patterns, settings, new)
