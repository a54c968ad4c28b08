"""The loss of every method: cross-entropy on the labelled tokens, with logits at those positions only.

The output layer is the dearest part of a small model's step, and most positions (prompt, padding) have no label. While
:class:`TokenLoss` is entered, a hook hands the output layer only the hidden states that predict a label. This works
below any wrapper: adapters, vectors put before the input (the last ``width`` positions are the real ones), trained
output layers. Terms that a model or method adds to its own loss are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_arena.core.errors import UserError
from peft_arena.models.modes import base_of
from peft_arena.train.batch import IGNORED, Batch

SHORT_ROW = 128
"""Tokens up to which unfused attention is faster in bfloat16 on a CPU (measured forward and backward)."""


class LossParts(NamedTuple):
    """The loss of one forward pass."""

    nats: Tensor
    """Cross-entropy summed over the labels, scalar float32."""
    extra: Tensor | None
    """What the model or method adds to its loss on its own (a regulariser), scalar; None if nothing."""


class TokenLoss:
    """Computes the loss of a model, which it changes only between enter and exit."""

    def __init__(self, model: nn.Module, autocast: bool, added: Callable[[], Tensor | None] = lambda: None) -> None:
        """Refer to a model.

        Args:
            model: a PreTrainedModel, or a PeftModel around one.
            autocast: whether the forward pass runs in bfloat16 mixed precision.
            added: asked after each forward pass in training mode for a term that the method adds to the loss.

        Raises:
            UserError: the model has no output layer.
        """
        self.model = model
        self.autocast = autocast
        self._added = added
        base: Any = base_of(model)
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if not isinstance(head, nn.Module):
            raise UserError(f"{type(base).__name__} has no output layer over the vocabulary: it cannot be trained here")
        self._base = base
        self._head = head
        self._batch: Batch | None = None
        self._handle: Any = None
        self.device = next(model.parameters()).device

    def __enter__(self) -> Self:
        """Put the hook on the output layer and switch off the model's own loss."""
        self._previous = self._base.__dict__.get("_loss_function")
        self._handle = self._head.register_forward_pre_hook(self._keep_labelled)
        self._base._loss_function = self._no_loss
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the model as it was."""
        self._handle.remove()
        if self._previous is None:
            del self._base._loss_function
        else:
            self._base._loss_function = self._previous

    @contextmanager
    def left(self) -> Iterator[None]:
        """Leave the model as it is outside, inside the block."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __call__(self, batch: Batch) -> LossParts:
        """Run one forward pass.

        Raises:
            UserError: the model's output layer is not where the logits come from.
        """
        logits, extra = self.logits(batch)
        nats = functional.cross_entropy(logits.float(), batch.targets.to(self.device), reduction="sum")
        return LossParts(nats, extra)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Run one forward pass and return the logits of each label, shape (labels, vocabulary), and the extra loss.

        Raises:
            UserError: the model's output layer is not where the logits come from.
        """
        batch = batch.to(self.device)
        given = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        self._batch = batch
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast), self._attention(batch):
                output = self.model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False, **given)
        finally:
            self._batch = None
        logits = output.logits
        if logits.ndim != 2 or len(logits) != len(batch.targets):
            raise UserError(
                f"{type(self._base).__name__} gave logits of shape {tuple(logits.shape)} for {len(batch.targets)} "
                "labels: its output layer is not used as expected, so its loss cannot be trusted"
            )
        found = [output.loss, self._added() if self.model.training else None]
        terms = [term for term in found if isinstance(term, Tensor) and term.requires_grad]
        return logits, sum(terms[1:], terms[0]) if terms else None

    def _attention(self, batch: Batch) -> AbstractContextManager[None]:
        """Choose the attention kernel: on a CPU, short bfloat16 rows are three times slower in the fused one."""
        if self.autocast and self.device.type == "cpu" and batch.input_ids.shape[1] <= SHORT_ROW:
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def _keep_labelled(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Replace hidden states (rows, any + width, size) by those of the labels, (labels, size)."""
        if self._batch is None:
            return None
        hidden = inputs[0][:, -self._batch.input_ids.shape[1] :]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._batch.places), *inputs[1:])

    def _no_loss(self, logits: Tensor, *_: object, **__: object) -> Tensor:
        """Stand in for the model's own cross-entropy, so that only what is added to it remains."""
        return logits.new_zeros((), dtype=torch.float32)


def held_out_loss(loss: TokenLoss, batches: list[Batch]) -> float:
    """Return the mean cross-entropy, nats per label, without dropout; the model's mode is put back."""
    was_training = loss.model.training
    loss.model.eval()
    try:
        with torch.no_grad():
            total = sum(float(loss(batch).nats) for batch in batches)
    finally:
        loss.model.train(was_training)
    return total / sum(len(batch.targets) for batch in batches)


def check_isolation(loss: TokenLoss) -> None:
    """Check on two packed examples that the second is not influenced by the first.

    Raises:
        UserError: the model lets packed examples see each other, or cannot keep them apart.
    """
    was_training = loss.model.training
    loss.model.eval()
    try:
        with torch.no_grad():
            one, other = (float(loss(_packed_pair(start)).nats) for start in (1, 9))
    finally:
        loss.model.train(was_training)
    if abs(one - other) > 1e-4 * max(abs(one), 1.0):
        raise UserError(
            "packing cannot be used with this model: an example's loss depends on the example packed before it "
            f"({one:.4f} or {other:.4f} nats); set packing = false"
        )


def _packed_pair(start: int) -> Batch:
    """Return two examples of 8 tokens in one row; the labels are the second's, ``start`` changes only the first."""
    ids = torch.tensor([[*range(start, start + 8), *range(2, 10)]])
    labels = torch.full_like(ids, IGNORED)
    labels[0, 9:] = ids[0, 9:]
    positions = torch.arange(8).repeat(2)[None]
    return Batch(ids, labels, positions, torch.arange(8, 15), ids[0, 9:], 16)
