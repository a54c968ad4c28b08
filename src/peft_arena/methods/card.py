"""What is known of a fine-tuning method without putting it on a model: its capabilities, its card, its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from peft_arena.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Capability(StrEnum):
    """What a method can do or needs. The planner, the tests and the reports go by these."""

    TRAINS = "trains"
    """Has trainable parameters; everything but the base model."""
    LINEAR_DELTA = "linear_delta"
    """The tuned weight is the pretrained weight plus a change that does not depend on the input."""
    MERGEABLE = "mergeable"
    """The tuned model can be written as plain weights of the pretrained architecture."""
    IDENTITY_AT_INIT = "identity_at_init"
    """Attaching changes no output before training."""
    NEEDS_CALIBRATION = "needs_calibration"
    """Attaching needs examples of the training data, see :class:`Calibration`."""
    CHANGES_BASE = "changes_base"
    """Attaching, training or restoring writes to the pretrained weights in memory."""
    ONLINE_RL = "online_rl"
    """Works with objectives that sample from the policy."""
    QUANTIZED_BASE = "quantized_base"
    """Works on a quantised base model."""
    NEEDS_QUANTIZED_BASE = "needs_quantized_base"
    """Works on nothing else: attaching to a model with plain weights is refused."""
    VIRTUAL_TOKENS = "virtual_tokens"
    """Puts trained vectors into the input sequence, so the context has less room."""
    KEYS_AND_VALUES = "keys_and_values"
    """Puts trained keys and values into every layer through the cache, so activations cannot be recomputed."""
    PEFT_ADAPTER = "peft_adapter"
    """A checkpoint is a plain PEFT adapter directory, loadable with PeftModel.from_pretrained."""
    LORA_ADAPTER = "lora_adapter"
    """The adapter directory is a plain LoRA, which every LoRA server can load beside the pretrained model."""


class PathKind(StrEnum):
    """How a method's linear weights go from the pretrained model (factor 0) to the tuned one (1) on its own path."""

    LINEAR = "linear"
    """Straight: W0 + f D."""
    CAYLEY = "cayley"
    """The skew-symmetric generator of a rotation is scaled, so that every point is a rotation."""
    MULTIPLICATIVE = "multiplicative"
    """Factors, lengths or angles of rows or columns go from those of W0 to the tuned ones."""
    NONE = "none"
    """The tuned model cannot be said in weights: there is no path."""


class CalibrationError(UserError):
    """The examples that a method was given to choose its start by do not do; other examples may."""


@dataclass(frozen=True)
class Calibration:
    """Examples of the training data for methods that choose their start by it; the same for the same run."""

    batches: Sequence[Mapping[str, Tensor]]
    """Each batch has ``input_ids``, ``attention_mask`` and ``labels`` of shape (rows, tokens), on the model's device;
    labels are -100 where no loss is taken. Rows are padded on the right."""


class MethodCard(BaseModel):
    """What a reader must know about a method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    family: str
    paper: str
    """Authors, year, title; or ``none``."""
    url: str
    capabilities: frozenset[Capability]
    path: PathKind = Field(default_factory=lambda given: _usual_path(given.get("capabilities", frozenset())))
    """Of its linear weights; unless given, linear for methods that have weights."""
    parameters: str
    """Formula of the trainable parameter count."""
    equation: str | None = None
    """The tuned weight of an adapted linear layer, see :mod:`peft_arena.testing.equation`: of the pretrained weight
    ``W``, the number settings, and the layer's tensors by the first part of their names; ``R`` is the weight that the
    method left in the layer's place. The conformance suite computes it. None: not stated."""
    learning_rate: float | None
    """A rate from which a search may start on models of billions of parameters; None for the base model."""
    micro_learning_rate: float | None = None
    """A rate that learns on the packaged micro model, found by a search there; None: not yet known."""
    rl_learning_rate: float | None = None
    """The same as ``learning_rate`` for reinforcement learning; None: a twentieth of ``learning_rate``."""
    micro_rl_learning_rate: float | None = None
    """The same on the packaged micro model; None: a quarter of ``micro_learning_rate``."""
    random_init: bool = False
    """Whether the seed changes where training starts; if not, it only orders the data and draws dropout."""
    deviations: tuple[str, ...] = ()
    """Where this implementation differs from the paper."""
    undecayed: str = ""
    """Why trained matrices get no weight decay, where that is so."""
    other_gradients: str = ""
    """Why gradients are not those of the loss, where that is so: parts held constant, projections, approximations."""
    known_failures: Mapping[str, str] = {}
    """Conformance checks that fail, by name, with the reason; one that passes is an error, so the list stays true."""
    description: str


def has_weights(card: MethodCard) -> bool:
    """Say whether what a method does can be written as weights of the pretrained architecture, or changes of them.

    Methods for quantised models have none: what they change are codes, which stand for weights.
    """
    return _weighty(card.capabilities)


def _weighty(able: frozenset[Capability]) -> bool:
    return Capability.NEEDS_QUANTIZED_BASE not in able and bool(able & {Capability.LINEAR_DELTA, Capability.MERGEABLE})


def _usual_path(able: frozenset[Capability]) -> PathKind:
    return PathKind.LINEAR if _weighty(able) else PathKind.NONE


class MethodConfig(BaseModel):
    """Settings of a method; each method subclasses it. Unknown keys are errors, every key changes something.

    The docstring below a field is its description in the documentation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    alternatives: ClassVar[Mapping[str, Any]] = {}
    """For each field a value unlike its default; the conformance suite checks that it changes the run."""
