"""Whether an adapter was made for a model of as many tokens as the one it is put on.

An adapter made after tokens were added belongs to embeddings with rows for them. On the model without them it would
have no meaning for these tokens, or not load at all, and a tokenizer written beside such weights would name rows that
are not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError
from peft_arena.models.folder import refuse_lost_tokens, tokens_in

if TYPE_CHECKING:
    from peft_arena.models.headers import Place
    from peft_arena.weights.base import BaseWeights

PREFIX = "base_model.model."
WRAPPERS = frozenset({"base_layer", "original_module", "modules_to_save", "default", "weight", "token_adapter"})
"""Parts of a tensor's name that are no part of its module's."""
SIDES: Mapping[str, int] = {"weight": 0, "lora_B": 0, "lora_embedding_A": 1}
"""Along which side of a tensor tokens lie, by a part of its name."""


def rows_of(base: BaseWeights) -> int:
    """Return how many tokens a model has input embeddings for."""
    embeddings: Any = base.architecture.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def refuse_other_vocabulary(
    base: BaseWeights, directory: Path, table: Mapping[str, Any], places: Mapping[str, Place]
) -> None:
    """Refuse an adapter whose tokens are not those of the base.

    Args:
        base: the pretrained weights.
        directory: the adapter's, which may hold its tokenizer.
        table: its settings.
        places: its tensors by name, with their shapes.

    Raises:
        UserError: it brings embeddings of another size, trains a row that is not there, or its tokenizer has more
            tokens than the base has embeddings; names both sizes.
    """
    rows = rows_of(base)
    for name, found in _sizes(base, places):
        if found != rows:
            raise UserError(
                f"{directory} is an adapter of a model with {found} tokens ({name.removeprefix(PREFIX)} has that many "
                f"rows), and the pretrained model has embeddings for {rows}: --base must be the model whose embeddings "
                f"were resized to {found}"
            )
    trained = [*_indices(table.get("trainable_token_indices")), *_indices(table.get("token_indices"))]
    last = max(trained, default=-1)
    if last >= rows:
        raise UserError(
            f"{directory} trains the row of token {last}, and the pretrained model has embeddings for {rows} tokens "
            f"(ids 0 to {rows - 1}): --base must be the model whose embeddings were resized for it"
        )
    refuse_lost_tokens(tokens_in(directory), rows, f"the adapter in {directory}", "the pretrained model")


def _sizes(base: BaseWeights, places: Mapping[str, Place]) -> Iterator[tuple[str, int]]:
    """Yield every tensor that has a row or a column for each token, with the number of them."""
    model = base.architecture
    ends = {id(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None}
    modules = {name for name, module in model.named_modules() if id(module) in ends}
    for name, place in places.items():
        parts = name.removeprefix(PREFIX).split(".")
        found = [part for part in parts if part in SIDES]
        side = found[0] if found else None  # of lora_B.weight it is lora_B
        if side == "weight" and any(part.startswith("lora_") for part in parts):
            continue
        module = ".".join(part for part in parts if part not in WRAPPERS and part not in SIDES)
        if side is not None and module in modules and len(place.shape) > SIDES[side]:
            yield name, place.shape[SIDES[side]]


def _indices(value: object) -> list[int]:
    """Return the token ids that a setting holds: a list, or lists by module."""
    if isinstance(value, Mapping):
        return [number for held in value.values() for number in _indices(held)]
    return [number for number in value if isinstance(number, int)] if isinstance(value, list | tuple) else []
