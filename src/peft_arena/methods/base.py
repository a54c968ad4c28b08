"""What a fine-tuning method is: a card, a strict config, and how it attaches to a model.

Shared code asks a method's capabilities, never its name. Importing a method's module never imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft_arena.core.errors import UserError
from peft_arena.methods.boundary import guard
from peft_arena.methods.card import (
    Calibration,
    CalibrationError,
    Capability,
    MethodCard,
    MethodConfig,
    PathKind,
    has_weights,
)
from peft_arena.methods.sizes import whole_numbers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


__all__ = [
    "Attached",
    "Calibration",
    "CalibrationError",
    "Capability",
    "Method",
    "MethodCard",
    "MethodConfig",
    "PathKind",
    "has_weights",
    "no_weights",
]


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
        assert self.size is not None, f"{self.card.name} has no size"
        return whole_numbers(self.config, self.size, model)

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


def no_weights(method: Method) -> str:
    """Return why a method's tuned model cannot be said in weights, by its capabilities; empty if it can."""
    able = method.card.capabilities
    if Capability.NEEDS_QUANTIZED_BASE in able:
        return "its pretrained weights are quantised"
    if has_weights(method.card):
        return ""
    if Capability.VIRTUAL_TOKENS in able:
        return "it puts trained vectors into the input and changes no weight"
    return "its card declares neither a change of linear weights nor merging: it adds layers, or depends on the input"
