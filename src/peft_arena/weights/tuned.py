"""A fine-tuned point by its files: its weights, or the model itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError
from peft_arena.core.specs import MethodSpec, ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from peft_arena.methods.base import Method
    from peft_arena.models.load import Loaded
    from peft_arena.weights.effective import EffectiveWeights


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned point: where its files are and what they are put on."""

    base: ModelSpec
    """The pretrained model, pinned."""
    directory: Path | None
    """None: the pretrained model itself."""
    method: MethodSpec | None
    """None: a plain PEFT adapter directory or a plain model directory, told by its files."""
    subject: str
    """Run id, or the path as given."""
    step: int | None
    factor: float = 1.0
    """Where on the way from the pretrained model (0) to the tuned one (1)."""

    def weights(self) -> EffectiveWeights:
        """Return the weights of this point.

        Raises:
            UserError: the method has no weights of its own, or the files are missing, damaged or do not fit.
        """
        from peft_arena.weights.base import base_weights
        from peft_arena.weights.effective import effective_weights, no_weights

        method = self._method()
        if method is not None:
            reason = no_weights(method)
            if reason:
                raise UserError(f"method {method.card.name} has no weights to look at: {reason}")
        elif self.directory is not None and not self.has_weights():
            raise UserError(f"{self.directory} has no weights to look at: adapters of its type cannot be merged")
        found = effective_weights(base_weights(self.base), self.directory, method)
        return found if self.factor == 1.0 else found.interpolated(self.factor)

    def has_weights(self) -> bool:
        """Say whether :meth:`weights` can work, by the method's capabilities or the adapter's type; reads none."""
        from peft_arena.weights.effective import no_weights

        method = self._method()
        if method is not None:
            return not no_weights(method)
        return self.directory is None or not _changes_input(self.directory)

    def model(self, loaded: Loaded) -> nn.Module:
        """Return the tuned model in evaluation mode.

        Args:
            loaded: the pretrained model, freshly loaded; it is changed or wrapped.

        Raises:
            UserError: the files are missing, damaged or do not fit; or the factor is not 1 and the method has no
                weights.
        """
        if self.directory is None:
            return loaded.model.eval()
        method = self._method()
        if self.factor == 1.0 and method is not None:
            return method.restore(loaded.model, self.directory).model.eval()
        if self.factor == 1.0 and (self.directory / "adapter_config.json").exists():
            from peft_arena.weights.base import BaseWeights
            from peft_arena.weights.merging import foreign_adapter

            return foreign_adapter(BaseWeights.of_model(loaded.model), loaded.model, self.directory)
        self.weights().load_into(loaded.model)
        return loaded.model.eval()

    def _method(self) -> Method | None:
        from peft_arena.methods.registry import method_of

        return None if self.method is None else method_of(self.method)


def _changes_input(directory: Path) -> bool:
    """Say whether an adapter is of a type that no change of weights stands for; peft cannot merge those."""
    try:
        table: Any = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        kind = table["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    return tuner is not None and (not hasattr(tuner, "merge_and_unload") or bool(table.get("alora_invocation_tokens")))
