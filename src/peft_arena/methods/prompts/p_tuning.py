"""P-tuning: the vectors in front of the input are what a small trained network makes of trained embeddings.

prompt = MLP(LSTM(E)) or MLP(E), with E of shape (num_virtual_tokens, hidden). A checkpoint holds the prompt alone, as
peft's does; the network is needed only to train on, so it is in the state of a training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peft_arena.methods.adapter import TASK
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.prompts.prompt import VIRTUAL, VirtualTokens, hidden_size

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

LSTM_LAYERS = 2


class PTuningConfig(MethodConfig):
    """Settings of P-tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Vectors in front of every input; the context has room for as many tokens less."""
    encoder: Literal["lstm", "mlp"] = "lstm"
    """Network that makes the vectors: a bidirectional LSTM with two linear layers on it, or three linear layers."""
    encoder_hidden_size: int = Field(default=512, ge=1)
    """Width inside the network; each direction of the LSTM has it."""
    lstm_layers: int = Field(default=LSTM_LAYERS, ge=1)
    """Layers of the LSTM."""
    lstm_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an output of an LSTM layer below the last is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        "num_virtual_tokens": 5,
        "encoder": "mlp",
        "encoder_hidden_size": 24,
        "lstm_layers": 1,
        "lstm_dropout": 0.5,
    }

    @model_validator(mode="after")
    def _lstm_only(self) -> Self:
        if self.encoder == "mlp" and (self.lstm_layers != LSTM_LAYERS or self.lstm_dropout):
            raise ValueError("lstm_layers and lstm_dropout need encoder = lstm")
        if self.lstm_dropout and self.lstm_layers == 1:
            raise ValueError("lstm_dropout acts between the layers of the LSTM, so it needs lstm_layers of at least 2")
        return self


class PTuning(VirtualTokens):
    """P-tuning: an encoder network makes the vectors in front of the input."""

    Config: ClassVar[type[MethodConfig]] = PTuningConfig
    config: PTuningConfig
    size: ClassVar[str | None] = "encoder_hidden_size"
    card: ClassVar[MethodCard] = MethodCard(
        name="p_tuning",
        title="P-tuning",
        family="prompt",
        paper="Liu et al., 2021, GPT Understands, Too",
        url="https://arxiv.org/abs/2103.10385",
        capabilities=VIRTUAL,
        parameters=(
            "num_virtual_tokens * hidden + network; with w = encoder_hidden_size, lstm: 2 * 4w (in + w + 2) for each "
            "layer, in = hidden for the first and 2w above, + 2w (2w + 1) + hidden (2w + 1); "
            "mlp: w (hidden + 1) + w (w + 1) + hidden (w + 1)"
        ),
        learning_rate=1e-3,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "all vectors stand before the input, where the paper places them inside task templates with anchor words",
            "the pretrained model is frozen, where the paper also reports tuning it together with the prompt",
            "a checkpoint holds the final vectors, not the network: it evaluates and serves, but training goes on only "
            "from a resume state",
        ),
        description="Puts vectors in front of every input that a trained network makes of trained embeddings.",
    )

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the widths of the network up to four times the model's."""
        self.layers(model)
        return range(1, 4 * hidden_size(model) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        self.layers(model)
        hidden, width = hidden_size(model), self.config.encoder_hidden_size
        embeddings = self.config.num_virtual_tokens * hidden
        if self.config.encoder == "mlp":
            return embeddings + width * (hidden + 1) + width * (width + 1) + hidden * (width + 1)
        inputs = [hidden, *[2 * width] * (self.config.lstm_layers - 1)]
        lstm = sum(8 * width * (size + width + 2) for size in inputs)
        return embeddings + lstm + 2 * width * (2 * width + 1) + hidden * (2 * width + 1)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's P-tuning configuration."""
        import peft

        return peft.PromptEncoderConfig(
            task_type=TASK,
            num_virtual_tokens=self.config.num_virtual_tokens,
            encoder_reparameterization_type=self.config.encoder.upper(),
            encoder_hidden_size=self.config.encoder_hidden_size,
            encoder_num_layers=self.config.lstm_layers,
            encoder_dropout=self.config.lstm_dropout,
        )

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint: the vectors, without the network that made them."""
        config = self.peft_config(patterns, seed=0)
        config.inference_mode = True
        return config
