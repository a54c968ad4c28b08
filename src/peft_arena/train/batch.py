"""One forward pass as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_arena.train.data import Example, layout

IGNORED = -100
"""Label of a position without loss."""


class Batch(NamedTuple):
    """The examples of one forward pass, padded on the right.

    There is no padding mask: no real token attends to a token on its right, and padding has no label. With packing the
    position ids begin anew with each example, which makes the model's own mask keep the examples apart.
    """

    input_ids: Tensor
    """Shape (rows, width)."""
    labels: Tensor
    """Shape (rows, width); :data:`IGNORED` where there is no loss."""
    position_ids: Tensor | None
    """Shape (rows, width); None where each row is one example."""
    places: Tensor
    """Shape (labels,): where, in the flattened (rows * width), the token before each label is."""
    targets: Tensor
    """Shape (labels,): the label after each of those tokens."""
    tokens: int
    """Real input tokens."""

    @property
    def padded_tokens(self) -> int:
        """Tokens processed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        if device.type == "cpu":
            return self
        return self._replace(
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            places=self.places.to(device),
            targets=self.targets.to(device),
        )


def _labels(example: Example) -> list[int]:
    labels = [IGNORED] * example.first_label + example.ids[example.first_label :]
    for begin, end in example.skipped:
        labels[begin:end] = [IGNORED] * (end - begin)
    return labels


def collate(examples: Sequence[Example], *, packing: bool, limit: int, pad: int) -> Batch:
    """Build the tensors of one forward pass.

    Args:
        examples: at least one.
        packing: whether a row may hold several examples.
        limit: most tokens in a packed row.
        pad: id that fills rows; it is never attended to nor predicted.
    """
    rows = layout(examples, packing, limit)
    width = max(sum(len(example.ids) for example in row) for row in rows)
    ids, labels, positions = [], [], []
    for row in rows:
        row_ids = [token for example in row for token in example.ids]
        row_labels = [token for example in row for token in _labels(example)]
        row_positions = [position for example in row for position in range(len(example.ids))]
        missing = width - len(row_ids)
        ids.append(row_ids + [pad] * missing)
        labels.append(row_labels + [IGNORED] * missing)
        positions.append(row_positions + list(range(missing)))
    label_tensor = torch.tensor(labels)
    flat = label_tensor.flatten()
    where = (flat != IGNORED).nonzero().flatten()
    return Batch(
        input_ids=torch.tensor(ids),
        labels=label_tensor,
        position_ids=torch.tensor(positions) if packing else None,
        places=where - 1,
        targets=flat[where],
        tokens=sum(len(example.ids) for example in examples),
    )
