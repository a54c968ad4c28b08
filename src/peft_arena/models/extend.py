"""Tokens that a model did not have: a tokenizer with them, and embeddings with a row for each, made once.

The extended model is a directory in the cache, written from the pretrained files, so that everything that reads a
model (training, evaluation, geometry, merging) reads the same one. Each new row is the mean of the rows of the tokens
that were there, in float64, rounded to the type of the file: no random number is drawn, and all new rows are equal
until they are trained. Rows of padding that the embeddings have already are taken first, and set to the same mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from peft_arena.assets.wheel_files import cache_root
from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id
from peft_arena.models.folder import count_tokens
from peft_arena.store.checkpoint import write_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTENSION = 1
"""Raised when the rows are made another way, so that an older cached directory is not taken for it."""
NEW_IDS = "new_token_ids"
"""Entry of an extended model's configuration: the ids of its new tokens."""
COPIED = frozenset({".json", ".jinja", ".model", ".txt"})


def extended(
    source: Path,
    tokens: Sequence[str],
    revision: str,
    *,
    tokenizer_of: Callable[[Path], PreTrainedTokenizerBase],
    skeleton_of: Callable[[Path], PreTrainedModel],
) -> Path:
    """Return the directory of a model with more tokens, made first if need be.

    Args:
        source: of the pretrained model's files.
        tokens: the new tokens, in the order of their ids.
        revision: identifies the pretrained files.
        tokenizer_of: loads the tokenizer of a directory.
        skeleton_of: makes the model of a directory without its weights.

    Raises:
        UserError: the tokenizer has one of the tokens already or does not keep it whole, the files have other names
            than the model's parameters, or the disk refuses.
    """
    target = cache_root() / "models" / f"extended-{content_id([EXTENSION, revision, list(tokens)])}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        write_checkpoint(target, lambda part: _extend(source, tokens, part, tokenizer_of, skeleton_of))
    return target


def _extend(
    source: Path,
    tokens: Sequence[str],
    out: Path,
    tokenizer_of: Callable[[Path], PreTrainedTokenizerBase],
    skeleton_of: Callable[[Path], PreTrainedModel],
) -> None:
    tokenizer = tokenizer_of(source)
    before = count_tokens(tokenizer)
    ids = add_tokens(tokenizer, tokens)
    for file in sorted(source.iterdir()):
        if file.suffix in COPIED and file.is_file():
            shutil.copyfile(file, out / file.name)
    rows = _write_rows(source, out, before, ids, _embeddings(skeleton_of(source)))
    table: dict[str, Any] = read_table(source / "config.json")
    for part in (table, table.get("text_config")):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = rows
    table[NEW_IDS] = ids
    (out / "config.json").write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)
    again = tokenizer_of(out)
    if again.convert_tokens_to_ids(list(tokens)) != ids:
        raise UserError(f"new_tokens: the tokenizer of {source} does not keep {list(tokens)} when it is saved")


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a tokenizer, in place, and return their ids; they stay in what is decoded.

    Raises:
        UserError: it has one of them already, one is given twice, or one is not read as one token.
    """
    from tokenizers import AddedToken

    if len(set(tokens)) < len(tokens):
        raise UserError(f"new_tokens: a token is given twice in {list(tokens)}")
    there = sorted(set(tokens) & set(tokenizer.get_vocab()))
    if there:
        raise UserError(f"new_tokens: the tokenizer has '{there[0]}' already; name only tokens that it does not have")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    found: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    ids = [int(number) for number in found]
    for token, number in zip(tokens, ids, strict=True):
        if tokenizer.encode(token, add_special_tokens=False) != [number]:
            raise UserError(f"new_tokens: the tokenizer does not read '{token}' as one token")
    return ids


def _write_rows(source: Path, out: Path, before: int, ids: Sequence[int], names: set[str]) -> int:
    """Write the weights with rows for the new tokens, file by file, and return how many rows there are.

    Raises:
        UserError: the embeddings are not in the files under their names, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from peft_arena.models.stored import weight_paths

    found: dict[str, int] = {}
    for file in weight_paths(source):
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {error}") from error
        for name in sorted(names & set(tensors)):
            tensors[name] = _with_rows(tensors[name], before, ids)
            found[name] = len(tensors[name])
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    if not found:
        raise UserError(
            f"new_tokens: the files in {source} have other names than {', '.join(sorted(names))}: their rows cannot be "
            "told"
        )
    return max(found.values())


def _embeddings(model: PreTrainedModel) -> set[str]:
    """Return the names of all parameters with a row for each token, tied ones under each of their names."""
    ends = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    held = {id(parameter) for layer in ends for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in held}


def _with_rows(tensor: Tensor, before: int, ids: Sequence[int]) -> Tensor:
    """Return embeddings, or biases, with a mean in the place of each new id; there may be rows for them already."""
    import torch

    mean = tensor[:before].double().mean(dim=0, keepdim=True).to(tensor.dtype)
    lacking = max(0, max(ids) + 1 - len(tensor))
    longer = torch.cat([tensor, mean.expand(lacking, *tensor.shape[1:])]) if lacking else tensor.clone()
    longer[list(ids)] = mean
    return longer.contiguous()
