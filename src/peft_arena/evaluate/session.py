"""From a model to an engine of lm-eval, for the time of one evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from peft_arena.evaluate.engine import ModelEngine
from peft_arena.models.modes import evaluation_mode

if TYPE_CHECKING:
    from torch import nn

    from peft_arena.models.load import Loaded


@contextmanager
def session(
    loaded: Loaded, model: nn.Module | LM, *, batch_size: int | None, progress: bool, joint: bool = False
) -> Iterator[Any]:
    """Give the engine that answers lm-eval's requests inside the block; the model is left as it was.

    Args:
        loaded: the model's tokenizer and description.
        model: a model, or an engine, which is used as it is.
        batch_size: rows in one forward pass; None chooses by the model's size.
        progress: show progress bars.
        joint: how context and continuation are tokenized; see :class:`ModelEngine`.
    """
    if isinstance(model, LM):
        yield model
        return
    with evaluation_mode(model):
        yield ModelEngine(loaded, model, batch_size=batch_size, progress=progress, joint=joint)
