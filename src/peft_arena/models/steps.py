"""A batch of rows that a model continues token by token: with its cache, or with a full forward pass at every step.

Both give the same logits where the model's cache is right; :mod:`peft_arena.models.ways` says whether it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from peft_arena.models.modes import accepts, base_of, device_of
from peft_arena.models.rope import forget_lengths

if TYPE_CHECKING:
    from torch import Tensor, nn

CACHES = ("past_key_values", "cache_params")
"""Names under which models take transformers' cache."""
LOGITS_AT_ONCE = 2**27
"""Most logits of one forward pass; a batch with more is split, so that long texts do not fill the memory."""


class Rows(Protocol):
    """The rows of a batch that still run."""

    def read(self) -> Tensor:
        """Run the model on each prompt once; return the logits after it for each row, shape (rows, vocabulary)."""
        ...

    def step(self) -> Tensor:
        """Run the model on what is new; return the logits after the newest tokens, shape (rows, vocabulary)."""
        ...

    def extend(self, tokens: Tensor, keep: list[int] | None) -> None:
        """Append a token to each row, and go on with only the rows of ``keep`` where it is given.

        Args:
            tokens: shape (rows,), of all rows, those included that end here.
            keep: places of the rows to go on with; None for all.
        """
        ...


def cache_name(model: nn.Module) -> str | None:
    """Return the name of the argument in which a model takes transformers' cache; None if it takes none."""
    return next((name for name in CACHES if accepts(model, name)), None)


class CachedRows:
    """Rows with a cache, padded on the left; a prompt that several rows share is read once."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        """Lay out some prompts.

        Args:
            model: takes a cache.
            prompts: tokens; at least one each.

        Raises:
            TypeError: the model takes no cache.
        """
        from transformers import DynamicCache

        name = cache_name(model)
        if name is None:
            raise TypeError("its forward pass takes no cache")
        self.model = model
        self.name = name
        self.keep = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
        self.positioned = accepts(model, "position_ids")
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        longest = max(map(len, places))
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in places]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in places]
        device = device_of(model)
        self.ids = torch.tensor(rows, device=device)
        self.mask = torch.tensor(mask, device=device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.padded = any(len(prompt) < longest for prompt in places)
        self.cache = DynamicCache(config=base_of(model).config)
        self.owners = [places[tuple(prompt)] for prompt in prompts]

    def read(self) -> Tensor:
        """Run the model on each prompt once; return the logits after it for each row, shape (rows, vocabulary)."""
        forget_lengths(self.model)
        logits = self.step()
        if len(self.owners) > len(logits):
            index = torch.tensor(self.owners, device=logits.device)
            logits = logits[index]
            self._select(index)
        return logits

    def step(self) -> Tensor:
        """Run the model on the newest tokens; return the logits after them, shape (rows, vocabulary)."""
        inputs: dict[str, Any] = {"input_ids": self.ids, self.name: self.cache, "use_cache": True}
        if self.padded:
            inputs["attention_mask"] = self.mask
        if self.positioned:
            inputs["position_ids"] = self.positions
        logits: Tensor = self.model(**inputs, **self.keep).logits[:, -1]
        return logits

    def extend(self, tokens: Tensor, keep: list[int] | None) -> None:
        """Append a token to each row, and go on with only the rows of ``keep`` where it is given."""
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        if keep is not None:
            self._select(torch.tensor(keep, device=tokens.device))

    def _select(self, index: Tensor) -> None:
        """Go on with these rows, in this order; a row may be named several times."""
        self.ids, self.mask, self.positions = self.ids[index], self.mask[index], self.positions[index]
        for layer in getattr(self.cache, "layers", ()):
            if hasattr(layer, "conv_states"):  # recurrent layers lack the selection, or inherit attention's alone
                layer.batch_select_indices = layer.reorder_cache
        self.cache.batch_select_indices(index)


class FullRows:
    """Rows without a cache: the whole of each is read again at every step, padded on the right."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], *, together: bool) -> None:
        """Lay out some prompts.

        Args:
            model: a causal language model.
            prompts: tokens; at least one each.
            together: whether rows may share a forward pass; else each has its own.
        """
        self.model = model
        self.rows = [list(prompt) for prompt in prompts]
        self.together = together

    def read(self) -> Tensor:
        """Run the model on each prompt once; return the logits after it for each row, shape (rows, vocabulary)."""
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, self.rows)))}
        logits = last_logits(self.model, list(places), together=self.together)
        return logits[torch.tensor([places[tuple(row)] for row in self.rows], device=logits.device)]

    def step(self) -> Tensor:
        """Run the model on all tokens; return the logits after the newest ones, shape (rows, vocabulary)."""
        return last_logits(self.model, self.rows, together=self.together)

    def extend(self, tokens: Tensor, keep: list[int] | None) -> None:
        """Append a token to each row, and go on with only the rows of ``keep`` where it is given."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        if keep is not None:
            self.rows = [self.rows[place] for place in keep]


def last_logits(model: nn.Module, rows: Sequence[Sequence[int]], *, together: bool) -> Tensor:
    """Return the logits after the last token of each row by full forward passes, shape (rows, vocabulary)."""
    spread = max(map(len, rows)) - min(map(len, rows)) + 1
    at_once = max(1, LOGITS_AT_ONCE // (spread * vocabulary_of(model))) if together else 1
    found: list[Tensor] = []
    for begin in range(0, len(rows), at_once):
        part = rows[begin : begin + at_once]
        kept = max(map(len, part)) - min(map(len, part)) + 1
        logits = full_logits(model, part, kept)
        ends = torch.tensor([len(row) - 1 - max(map(len, part)) for row in part], device=logits.device)
        found.append(logits[torch.arange(len(part), device=logits.device), ends])
    return torch.cat(found)


def full_logits(model: nn.Module, rows: Sequence[Sequence[int]], kept: int) -> Tensor:
    """Return the logits at the last positions of rows that are padded on the right, shape (rows, kept, vocabulary).

    Nothing says which tokens are padding: in a causal model nothing before a token depends on what follows it.

    Args:
        model: a causal language model.
        rows: tokens; at least one each.
        kept: positions, counted from the end of the longest row, at most its length.
    """
    forget_lengths(model)
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    keep = {"logits_to_keep": kept} if accepts(model, "logits_to_keep") else {}
    logits: Tensor = model(input_ids=ids.to(device_of(model)), use_cache=False, **keep).logits[:, -kept:]
    return logits


def vocabulary_of(model: nn.Module) -> int:
    """Return how many tokens a model's configuration says it knows; 50,000 where it does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "vocab_size", 0) or 50_000)
