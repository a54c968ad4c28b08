"""What belongs to a model directory besides the weights a method changes, and reading the directory back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError, first_line
from peft_arena.models.extend import NEW_IDS
from peft_arena.models.load import Source, load_tokenizer
from peft_arena.weights.adapter_directory import CONFIG
from peft_arena.weights.adapter_files import FACTS
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.files import model_files
from peft_arena.weights.merging import FOREIGN

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MERGED = "merge.json"
EXPORTED = "export.json"
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
COMPANIONS = frozenset({".json", ".jinja", ".model", ".txt"})
"""Files beside the weights that belong to a model, by their ends."""
TOKENIZER = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
    }
)
"""Files that say how text becomes tokens."""
GENERATION = "generation_config.json"
WEIGHTS_INDEX = ".safetensors.index.json"
TEMPLATES = "additional_chat_templates"
NOT_OURS = (
    "pytorch_model",
    "adapter_",
    "trainer_state",
    "all_results",
    "train_results",
    "eval_results",
    "training_args",
)
"""Beginnings of names of files that belong to an adapter or a training."""


def dtype_named(name: str) -> torch.dtype:
    """Return a type that weights can be written in.

    Raises:
        UserError: there is none of that name.
    """
    if name not in DTYPES:
        raise UserError(f"cannot write weights as '{name}'. Known: {', '.join(DTYPES)}")
    return DTYPES[name]


def persistent_buffers(base: BaseWeights, source: Path) -> dict[str, Tensor]:
    """Return the buffers that belong to the model's files; most architectures have none."""
    names = set(base.architecture.state_dict()) - set(base.aliases)
    if not names:
        return {}
    files = model_files(source)
    if all(name in files for name in names):
        return {name: files.read(name) for name in sorted(names)}
    state = base.load().state_dict()
    return {name: state[name].detach().cpu() for name in sorted(names)}


def copy_companions(source: Path, tokenizer: Path | None, part: Path) -> None:
    """Copy what belongs to a model besides weights and configuration: tokenizer, chat templates, generation.

    Args:
        source: the pretrained model's directory; what is no file in it, such as a link to nothing, is left out.
        tokenizer: directory whose tokenizer goes before; its settings of generation do too, which name its tokens.
        part: where to.
    """
    for file in sorted(source.iterdir()):
        other = file.name in (CONFIG, MERGED, EXPORTED, FACTS) or file.name.startswith(NOT_OURS)
        other |= file.name.endswith(WEIGHTS_INDEX)
        other |= tokenizer is not None and file.name in TOKENIZER
        if file.suffix in COMPANIONS and not other and file.is_file():
            shutil.copyfile(file, part / file.name)
    for file in sorted(tokenizer.iterdir()) if tokenizer is not None else ():
        if file.name in (*TOKENIZER, GENERATION) and file.is_file():
            shutil.copyfile(file, part / file.name)
    templates = (tokenizer or source) / TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, part / TEMPLATES)


def write_config(
    source: Path,
    target: Path,
    dtype: torch.dtype,
    biased: PreTrainedConfig | None,
    tokenizer: Path | None = None,
    *,
    own_head: bool = False,
) -> None:
    """Write the pretrained model's configuration with the type, and settings for biases, of what is written.

    Args:
        source: its ``config.json``.
        target: the file to write.
        dtype: type of the weights.
        biased: settings that make room for biases.
        tokenizer: directory whose tokenizer belongs to the model: where it has a ``config.json``, the numbers of
            special tokens are from there; they are put into ``generation_config.json`` too if that is the base's.
        own_head: whether the output layer is another weight than the embeddings: no library is to tie them.

    Raises:
        UserError: a file is damaged.
    """
    table = _table(source)
    name = str(dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in table or key == "dtype":
            table[key] = name
    if biased is not None:
        table |= {key: True for key, value in biased.to_dict().items() if "bias" in key and value is True}
    table.pop(NEW_IDS, None)
    if own_head:
        table |= _untied(table, always=True)
    special = _special_tokens(tokenizer)
    _write_table(target, table | special)
    generation = target.parent / GENERATION
    if special and generation.is_file() and not (tokenizer is not None and (tokenizer / GENERATION).is_file()):
        _write_table(
            generation, _table(generation) | {key: value for key, value in special.items() if value is not None}
        )


def _untied(table: Mapping[str, Any], *, always: bool = False) -> dict[str, Any]:
    """Return the settings by which the output layer is no longer one with the embeddings, also in nested tables."""
    key = "tie_word_embeddings"
    found: dict[str, Any] = {key: False} if always or key in table else {}
    for name, value in table.items():
        inner = _untied(value) if isinstance(value, dict) else {}
        if inner:
            found[name] = {**value, **inner}
    return found


def _special_tokens(tokenizer: Path | None) -> dict[str, Any]:
    """Return the settings of a model directory that name tokens by number (``eos_token_id``); empty without one."""
    if tokenizer is None or not (tokenizer / CONFIG).is_file():
        return {}
    return {key: value for key, value in _table(tokenizer / CONFIG).items() if key.endswith("_token_id")}


def _table(file: Path) -> dict[str, Any]:
    """Return the table of a JSON file.

    Raises:
        UserError: it is damaged.
    """
    return read_table(file)


def _write_table(file: Path, table: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tokenizer_in(directory: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a directory; None if there is none.

    Raises:
        UserError: its files are damaged.
    """
    if not any((directory / name).exists() for name in TOKENIZER):
        return None
    try:
        return load_tokenizer(Source("path", str(directory), None))
    except FOREIGN as error:
        raise UserError(f"the tokenizer cannot be loaded: {first_line(error)}") from error


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number of tokens a model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def load_back(part: Path, base: BaseWeights, dtype: torch.dtype) -> PreTrainedModel:
    """Load what was written, as anybody does.

    Raises:
        UserError: it does not load, or a tensor has no place.
    """
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM
    try:
        loaded, report = kind.from_pretrained(
            str(part), dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except FOREIGN as error:
        raise UserError(f"what was merged cannot be loaded: {first_line(error)}; nothing was written") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            example = sorted(str(key) for key in report[problem])[0]
            reason = f"{problem.replace('_', ' ')}, e.g. {example}"
            raise UserError(
                f"cannot merge: {type(base.architecture).__name__} would load something else ({reason}); "
                "nothing was written"
            )
    found: PreTrainedModel = loaded
    return found.eval()
