"""What a fine-tuning method is: a card, a strict config, and how it attaches to a model.

Shared code asks a method's capabilities, never its name. Importing a method's module never imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from peft_arena.core.errors import UserError
from peft_arena.methods.boundary import guard

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


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

    Not where those are quantised: a change of codes is none of weights.
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


class Attached(ABC):
    """A method in place on a model, ready to train, evaluate and save."""

    model: nn.Module
    """The callable model: a PreTrainedModel or a PeftModel around one."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Let what a library refuses reach the user as one line."""
        super().__init_subclass__(**settings)
        guard(cls, {"save": "saved on", "merged": "merged into"}, _what_is_attached)

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups over exactly the trained parameters.

        Biases, norms and other one-dimensional parameters get no weight decay.
        """
        decayed = [p for p in self.trained().values() if p.ndim > 1]
        plain = [p for p in self.trained().values() if p.ndim <= 1]
        groups = [
            {"params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": plain, "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def trained(self) -> dict[str, nn.Parameter]:
        """Return every trained parameter by name, each once, in a fixed order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def optimizer(self, learning_rate: float, weight_decay: float) -> Optimizer:
        """Return the optimizer over :meth:`parameter_groups`: AdamW unless the method is one.

        Its state must be tensors per parameter: scalars, or of the parameter's shape.
        """
        from torch.optim import AdamW

        groups = self.parameter_groups(learning_rate, weight_decay)
        return AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)

    def begin(self, total: int) -> None:  # noqa: B027 - most methods need nothing
        """Prepare for a training of ``total`` optimizer steps; also before one that is resumed, after load_state."""

    def extra_loss(self) -> Tensor | None:
        """Return what the method adds to the loss of the forward pass just done, a scalar; most add nothing.

        Terms that the wrapped model's own forward adds to ``output.loss`` are kept without this.
        """
        return None

    def after_step(self, step: int, total: int) -> None:  # noqa: B027 - most methods need nothing
        """Do what the method needs after optimizer step ``step`` (from 1) of ``total``; gradients are still there."""

    def frozen(self) -> dict[str, Tensor]:
        """Return by name the tensors that do not train and that training needs exactly as they are; mostly none.

        Random matrices, singular vectors, places in a matrix: what must not be drawn or decomposed again.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return all tensors needed to continue training exactly, by name; see :meth:`load_state`."""
        return {**{name: p.detach() for name, p in self.trained().items()}, **self.frozen()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put tensors from :meth:`state` back in place, bit for bit.

        Raises:
            UserError: names or shapes differ from the model's.
        """
        from peft_arena.methods.state import copy_into

        copy_into({**self.trained(), **self.frozen()}, state)

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the tuned weights so that :meth:`Method.restore` gives the same outputs in a new process."""

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Give the pretrained model's outputs inside the block.

        Raises:
            UserError: the method cannot be switched off.
        """
        raise self._unsupported("be switched off")
        yield self.model

    def delta(self, module: str) -> Tensor | None:
        """Return tuned minus pretrained weight of one linear module, shape (out, in); None where it is unchanged.

        Raises:
            UserError: the method has no such weight change.
        """
        raise self._unsupported("be expressed as a change of weights")

    def merged(self) -> PreTrainedModel:
        """Return a plain pretrained-architecture model with the tuned weights, merged in float32.

        The attached model must not be used afterwards.

        Raises:
            UserError: the method is not mergeable.
        """
        raise self._unsupported("be merged")

    def _unsupported(self, what: str) -> Exception:
        return UserError(f"{type(self).__name__} cannot {what}: its card does not declare it")


def _what_is_attached(attached: Attached, given: tuple[Any, ...]) -> tuple[str, object]:
    method: Method | None = getattr(attached, "method", None)
    return (type(attached).__name__ if method is None else method.card.name), attached.model


def _what_is_put(method: Method, given: tuple[Any, ...]) -> tuple[str, object]:
    return method.card.name, given[0] if given else None


class Method(ABC):
    """One fine-tuning method with its settings."""

    card: ClassVar[MethodCard]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    size: ClassVar[str | None] = None
    """The setting that sets the number of trained parameters, which a budget may choose; None if there is none."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Let what a library refuses reach the user as one line."""
        super().__init_subclass__(**settings)
        guard(cls, {"attach": "attached to", "restore": "restored on"}, _what_is_put)

    def __init__(self, config: MethodConfig | None = None) -> None:
        """Create the method with its settings; the defaults where none are given."""
        self.config = config if config is not None else self.Config()

    def count(self, model: PreTrainedModel) -> int | None:
        """Return the number of trained parameters by the card's formula, without attaching; None if not offered.

        Raises:
            UserError: a setting does not fit the model.
        """
        return None

    def trained_count(self, model: PreTrainedModel) -> int | None:
        """Return :meth:`count` with whatever trains beside what the card's formula counts; None if not offered.

        Raises:
            UserError: a setting does not fit the model.
        """
        return self.count(model)

    def sizes(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the values of the setting :attr:`size` that fit a model, so ordered that the count grows.

        By default the whole numbers that the setting may be, up to the smaller side of every target.

        Args:
            model: its shapes are used, never its weights, which may be on the meta device.
        """
        from peft_arena.methods.sizes import whole_numbers

        return whole_numbers(self, model)

    @property
    def calibration_examples(self) -> int:
        """How many training examples :meth:`attach` is to be given; 0 unless the method needs calibration."""
        return int(getattr(self.config, "calibration_examples", 0))

    @property
    def virtual_tokens(self) -> int:
        """How many trained vectors take room of the model's context; 0 unless the card says that some do."""
        return (
            int(getattr(self.config, "num_virtual_tokens", 0))
            if Capability.VIRTUAL_TOKENS in self.card.capabilities
            else 0
        )

    @abstractmethod
    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Put the method on a freshly loaded model, which it may change; all randomness comes from ``seed``.

        Trained parameters are float32 whatever the base's type, and exactly they have ``requires_grad``.

        Raises:
            UserError: a setting does not fit the model, for example a rank above a layer's size.
        """

    @abstractmethod
    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Put a saved state on a freshly loaded model, for evaluation and cost (not for training on).

        Raises:
            UserError: the directory is missing, damaged or of another method.
        """
