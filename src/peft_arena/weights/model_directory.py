"""What belongs to a model directory besides the weights a method changes, and reading the directory back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_arena.core.errors import UserError
from peft_arena.models.load import Source, load_tokenizer
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.files import INDEX, model_files
from peft_arena.weights.forms import CONFIG
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
TEMPLATES = "additional_chat_templates"
NOT_OURS = ("adapter_", "trainer_state", "all_results", "train_results", "eval_results", "training_args")
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
    """Copy what belongs to a model besides weights and configuration: tokenizer, chat templates, generation."""
    for file in sorted(source.iterdir()):
        other = file.name in (CONFIG, INDEX, MERGED, EXPORTED) or file.name.startswith(NOT_OURS)
        other |= tokenizer is not None and file.name in TOKENIZER
        if file.suffix in COMPANIONS and not other:
            shutil.copyfile(file, part / file.name)
    for file in sorted(tokenizer.iterdir()) if tokenizer is not None else ():
        if file.name in TOKENIZER:
            shutil.copyfile(file, part / file.name)
    templates = (tokenizer or source) / TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, part / TEMPLATES)


def write_config(source: Path, target: Path, dtype: torch.dtype, biased: PreTrainedConfig | None) -> None:
    """Write the pretrained model's configuration with the type, and settings for biases, of what is written."""
    table = json.loads(source.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in table or key == "dtype":
            table[key] = name
    if biased is not None:
        table |= {key: True for key, value in biased.to_dict().items() if "bias" in key and value is True}
    target.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the tokenizer cannot be loaded: {first}") from error


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
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"what was merged cannot be loaded: {first}; nothing was written") from error
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
