"""A few trained coefficients of each weight's change in another basis: FourierFT and WaveFT.

FourierFT: W0 + scaling * Re(ifft2(S)), S zero but for ``coefficients`` trained entries. A coefficient moves every
weight, by at most scaling / (in * out): the same scaling does the less the larger the layer.
WaveFT: W0 + scaling * idwt2(S), one level of a wavelet. With Haar (db1) a coefficient moves four weights by
scaling / 2, whatever the layer's size.
Which entries train is drawn from the run's seed, alike for layers of one shape, and saved with the adapter.
Left out of WaveFT: ``use_idwt=False`` (that is SHiRA) and a number of coefficients in proportion to the layer's size.

In training the change of every target is kept as a dense matrix for the backward pass, in float32 about as large
as the model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.frozen import FrozenMethod, register
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class SpectralConfig(AdaptedConfig):
    """Settings that both methods have."""

    coefficients: int = Field(default=1000, ge=1)
    """Trained coefficients per layer; at most in * out of every target."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "coefficients": 50}


class FourierftConfig(SpectralConfig):
    """Settings of FourierFT."""

    scaling: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Factor of the change. Its effect falls with in * out: 300 is for models of billions of parameters."""

    alternatives: ClassVar[Mapping[str, Any]] = {**SpectralConfig.alternatives, "scaling": 20.0}


class WaveftConfig(SpectralConfig):
    """Settings of WaveFT."""

    coefficients: int = Field(default=2592, ge=1)
    """Trained coefficients per layer; at most in * out of every target."""
    scaling: float = Field(default=25.0, gt=0, allow_inf_nan=False)
    """Factor of the change; its effect on one weight does not depend on the layer's size."""
    wavelet: Literal["db1", "db2", "sym4", "coif1"] = "db1"
    """Wavelet: Haar (db1), or a longer one, whose coefficients move more weights."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **SpectralConfig.alternatives,
        "scaling": 5.0,
        "wavelet": "db2",
    }


class Spectral(FrozenMethod):
    """What FourierFT and WaveFT share: how many coefficients fit, and that their places are saved."""

    config: SpectralConfig
    size: ClassVar[str | None] = "coefficients"
    derived_settings: ClassVar[frozenset[str]] = frozenset({"random_loc_seed"})
    places: ClassVar[str]
    """The attribute of peft's layer that holds which entries train."""

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing more coefficients than a weight has entries."""
        layers = super().linears(model)
        given = self.config.coefficients
        for name, layer in layers.items():
            limit = layer.in_features * layer.out_features
            if given > limit:
                shape = f"{layer.out_features} x {layer.in_features}"
                raise UserError(f"coefficients: {given} are more than {name} has entries ({shape}); at most {limit}")
        return layers

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the numbers up to the entries of the smallest target."""
        return range(1, min(n.in_features * n.out_features for n in super().linears(model).values()) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return self.config.coefficients * len(self.linears(model))

    def finish(self, model: PeftModel) -> None:
        """Make the places of the coefficients a part of checkpoints; peft draws them again."""
        for layer in tuner_layers(model).values():
            register(layer, self.places)

    @abstractmethod
    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's configuration; its own seed is derived from the run's."""


class Fourierft(Spectral):
    """FourierFT: a few trained Fourier coefficients of each weight's change."""

    Config: ClassVar[type[MethodConfig]] = FourierftConfig
    config: FourierftConfig
    places: ClassVar[str] = "indices"
    card: ClassVar[MethodCard] = MethodCard(
        name="fourierft",
        title="FourierFT",
        family="spectral",
        paper="Gao et al., 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
        url="https://arxiv.org/abs/2405.03003",
        capabilities=WEIGHT_ADAPTER,
        parameters="coefficients * number of targets",
        learning_rate=3e-3,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "coefficients start at zero, so that training starts from the pretrained model; the paper draws them "
            "from a normal distribution",
            "which entries train is drawn once for each shape and saved with the adapter, four times the bytes of what "
            "is trained",
            "no preference for a band of frequencies, which the paper tries beside its default of none",
        ),
        description=(
            "Adds scaling times the real part of an inverse 2-D Fourier transform to each target weight, of which a "
            "few random coefficients train. The effect of scaling falls with in * out."
        ),
    )

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's FourierFT configuration; its own seed is derived from the run's."""
        import peft

        return peft.FourierFTConfig(
            task_type=TASK,
            n_frequency=self.config.coefficients,
            scaling=self.config.scaling,
            init_weights=True,
            random_loc_seed=seed_for(seed, "fourierft", "places"),
            target_modules=patterns,
            bias="none",
        )


class Waveft(Spectral):
    """WaveFT: a few trained wavelet coefficients of each weight's change."""

    Config: ClassVar[type[MethodConfig]] = WaveftConfig
    config: WaveftConfig
    places: ClassVar[str] = "waveft_indices"
    card: ClassVar[MethodCard] = MethodCard(
        name="waveft",
        title="WaveFT",
        family="spectral",
        paper="Bilican et al., 2025, Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets",
        url="https://arxiv.org/abs/2505.12532",
        capabilities=WEIGHT_ADAPTER,
        parameters="coefficients * number of targets",
        learning_rate=1e-4,
        micro_learning_rate=3e-4,
        random_init=True,
        deviations=(
            "every target has the same number of coefficients, whatever its size",
            "with longer wavelets than Haar the result is cut to the weight's shape: coefficients at the edges do less",
            "which entries train is drawn once for each shape and saved with the adapter, four times the bytes of what "
            "is trained",
        ),
        description=(
            "Adds scaling times an inverse 2-D wavelet transform of one level to each target weight, of which a few "
            "random coefficients train. With Haar each of them moves four weights by scaling / 2."
        ),
    )

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's WaveFT configuration; its own seed is derived from the run's."""
        import peft

        return peft.WaveFTConfig(
            task_type=TASK,
            n_frequency=self.config.coefficients,
            scaling=self.config.scaling,
            wavelet_family=self.config.wavelet,
            use_idwt=True,
            init_weights=True,
            random_loc_seed=seed_for(seed, "waveft", "places"),
            target_modules=patterns,
            bias="none",
        )
