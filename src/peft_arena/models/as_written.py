"""A tokenizer as its file says, where the library's class for the model's type would make another one of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.json"
SAMPLE = "Hi 2+2 = 4, it's two  words.\n- x_1 (\u00e9)"
"""Text with spaces, a line break, digits and marks."""


def as_written(tokenizer: PreTrainedTokenizerBase, location: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Return a tokenizer that keeps the text its file keeps.

    transformers builds the tokenizers of some model types from the vocabulary alone, with rules of its own for how text
    is split and put together again; a file with other rules then loses spaces or characters without a word. Such a
    tokenizer is loaded from its file instead.

    Args:
        tokenizer: as ``AutoTokenizer`` made it.
        location: a directory or the name of a hub model.
        revision: what the hub was asked for.

    Raises:
        UserError: text is lost that the file keeps, however the tokenizer is loaded.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    file: Any = cached_file(
        location, FILE, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    if file is None or not Path(file).is_file():
        return tokenizer
    written = Tokenizer.from_file(str(file))
    if _kept(backend) or not _kept(written):
        return tokenizer
    base: Any = PreTrainedTokenizerFast
    other: PreTrainedTokenizerBase = base.from_pretrained(location, revision=revision)
    if not _kept(other.backend_tokenizer):
        raise UserError(
            f"the tokenizer of {location} cannot be loaded as its {FILE} says: {type(tokenizer).__name__} loses spaces "
            "or characters of a text that the file keeps"
        )
    return other


def _kept(tokenizer: Any) -> bool:
    """Say whether a text comes back from its tokens, without what an unknown character becomes."""
    for text in (SAMPLE, SAMPLE.replace("\u00e9", "e")):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False).strip() == text:
            return True
    return False
