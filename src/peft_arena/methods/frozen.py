"""What methods share that work on tensors which never train: random bases, places in a matrix, singular vectors.

Such tensors are part of every checkpoint and of the state of a training, so that neither ever depends on drawing or
decomposing them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_arena.methods.adapter import PeftAttached, PeftMethod, stored_tensors

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


class FrozenAttached(PeftAttached):
    """A method in place on a model whose state holds every tensor of a checkpoint, trained or not."""

    def frozen(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint that do not train, by name."""
        trained = {parameter.data_ptr() for parameter in self.trained().values()}
        stored = stored_tensors(self.model)
        return {f"frozen.{name}": tensor for name, tensor in stored.items() if tensor.data_ptr() not in trained}


class FrozenMethod(PeftMethod):
    """A method of the peft library whose trained parameters work on frozen tensors."""

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment whose state holds the frozen tensors too."""
        return FrozenAttached(self, model, base)


def register(layer: nn.Module, attribute: str) -> None:
    """Turn a plain dictionary of tensors on an adapter layer into buffers, so that checkpoints hold them."""
    from peft.tuners._buffer_dict import BufferDict

    plain = dict(getattr(layer, attribute))
    setattr(layer, attribute, BufferDict(plain, persistent=True))
