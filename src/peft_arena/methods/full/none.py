"""The base model as a method: nothing is added and nothing trains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.base import Attached, Calibration, Capability, Method, MethodCard
from peft_arena.methods.files import read_table

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

MARKER = "base_model.json"


class BaseAttached(Attached):
    """The pretrained model itself, frozen."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        """Hold a model and freeze it."""
        self.model = model
        model.requires_grad_(False)

    def save(self, directory: Path) -> None:
        """Write the name of the base model; there are no weights to write."""
        directory.mkdir(parents=True, exist_ok=True)
        table = {"method": "none", "base_model_name_or_path": self.model.name_or_path}
        (directory / MARKER).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Give the model as it is."""
        yield self.model

    def delta(self, module: str) -> Tensor | None:
        """Return None for every linear module: none is changed."""
        from torch import nn

        linears = [name for name, found in self.model.named_modules() if isinstance(found, nn.Linear)]
        if module not in linears:
            raise unknown("linear module", module, linears)
        return None

    def merged(self) -> PreTrainedModel:
        """Return the model as it is."""
        return self.model


class NoTraining(Method):
    """The pretrained model, against which gain and loss are measured."""

    card: ClassVar[MethodCard] = MethodCard(
        name="none",
        title="Base model",
        family="base",
        paper="none",
        url="",
        capabilities=frozenset({Capability.LINEAR_DELTA, Capability.MERGEABLE, Capability.IDENTITY_AT_INIT}),
        parameters="0",
        learning_rate=None,
        random_init=False,
        description="The pretrained model without any change.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return zero."""
        return 0

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Freeze the model and leave it as it is."""
        return BaseAttached(model)

    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Give the model as it is, after checking that the directory was written by this method."""
        if read_table(directory / MARKER, self.card.name).get("method") != self.card.name:
            raise UserError(f"{directory / MARKER} is damaged: it does not name method {self.card.name}")
        model.eval()
        return BaseAttached(model)
