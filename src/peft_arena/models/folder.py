"""What a model's files must be for its weights to be the model.

An adapter that lies beside the weights is put on them by transformers without a word, and the model is then another one
than its files: it is refused. A token without a row of the embeddings is refused too, and a head of its own in files
whose configuration says that it is one with the embeddings is said: transformers then loads two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.bounded import opened, read_json, read_table
from peft_arena.core.errors import UserError
from peft_arena.models.stored import weight_paths

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_SETTINGS = "adapter_config.json"
ADAPTER_FILE = re.compile(r"adapter_config\.json|adapter_model[.-].*")
MODEL_FILE = re.compile(r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?")
SETTINGS = frozenset(
    [
        "adapter_config.json",
        "added_tokens.json",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
)
"""Files that hold a JSON object each, where they are there."""
_LONGEST_PATTERN, _TOKENIZER_DEPTH = 10_000, 60
TOKENIZER_TABLES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")


def refuse_adapter(directory: Path, what: str = "model") -> None:
    """Refuse a directory with files of an adapter where a model is asked for.

    Args:
        directory: what a model was named by.
        what: what it was to be, for the message.

    Raises:
        UserError: it holds such files, beside a model's or alone.
    """
    names = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    found = [name for name in names if ADAPTER_FILE.fullmatch(name)]
    if not found:
        return
    if not any(MODEL_FILE.fullmatch(name) for name in names):
        raise UserError(
            f"{directory} is no {what} but an adapter{_of_base(directory)}: it holds {found[0]} and no weights of a "
            f"model; name its pretrained model, or make a model of both with peft-arena merge {directory} --base MODEL"
        )
    raise UserError(
        f"{directory} holds an adapter ({', '.join(found)}) beside the weights of a model, and transformers would put "
        f"it on them: move the adapter's files to a directory of their own to use the {what} without it; peft-arena "
        f"merge ADAPTER --base {directory} then makes a model with it"
    )


def refuse_both(directory: Path) -> None:
    """Refuse a tuned directory that holds an adapter and a model's weights: which of them is meant is not said.

    Raises:
        UserError: it does.
    """
    names = sorted(file.name for file in directory.iterdir())
    model = [name for name in names if MODEL_FILE.fullmatch(name)]
    if ADAPTER_SETTINGS in names and model:
        raise UserError(
            f"{directory} holds an adapter ({ADAPTER_SETTINGS}) and the weights of a model ({model[0]}), and only one "
            "of them can be the tuned model: move the other's files to a directory of their own"
        )


def refuse_hub_adapter(name: str, revision: str | None, *, look: bool = True) -> None:
    """Refuse a repository of the hub with an adapter where a model is asked for.

    Args:
        name: its id.
        revision: commit, branch or tag; None: the default branch.
        look: whether the hub may be asked; if not, only its cache is.

    Raises:
        UserError: it holds one.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(name, ADAPTER_SETTINGS, revision=revision, etag_timeout=5, local_files_only=not look)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return  # it has none, or nothing can be known now
    raise UserError(
        f"model '{name}' holds an adapter ({ADAPTER_SETTINGS}{_of_base(Path(file).parent)}) on the hub, which "
        "transformers would put on the weights: name its pretrained model, or a directory with the weights alone"
    )


def _of_base(directory: Path) -> str:
    """Return what an adapter says it belongs to, in words; empty where it does not say."""
    try:
        named = read_table(directory / ADAPTER_SETTINGS)["base_model_name_or_path"]
    except (UserError, KeyError):
        return ""
    return f" of '{named}'" if named else ""


def check_files(directory: Path) -> None:
    """Refuse files of a model or an adapter that no library should be given: it would wait, or not say what is wrong.

    Raises:
        UserError: one that would be read is a pipe, a device or a directory; one of settings holds no JSON object, is
            too long or nested too deep; or a tokenizer's regular expression is too long.
    """
    files = sorted(file for file in directory.iterdir() if _is_read(file.name))
    _check_files(tuple((file, *_stamp(file)) for file in files))


def _is_read(name: str) -> bool:
    own = MODEL_FILE.fullmatch(name) or ADAPTER_FILE.fullmatch(name)
    return name in SETTINGS or name.endswith((".index.json", ".jinja")) or own is not None


def _stamp(file: Path) -> tuple[int, int]:
    with opened(file) as handle:
        held = os.fstat(handle.fileno())
    return held.st_size, held.st_mtime_ns


@lru_cache(maxsize=64)
def _check_files(files: tuple[tuple[Path, int, int], ...]) -> None:
    for file, _, _ in files:
        if file.name == "tokenizer.json":
            pattern = _longest_pattern(read_json(file, deepest=_TOKENIZER_DEPTH))
            if pattern > _LONGEST_PATTERN:
                raise UserError(
                    f"{file} is damaged: a regular expression in it has {pattern} characters, at most "
                    f"{_LONGEST_PATTERN} are used"
                )
        if file.name in SETTINGS or file.name.endswith(".index.json"):
            read_table(file)


def _longest_pattern(value: object) -> int:
    """Return the length of the longest regular expression in a tokenizer's table."""
    if isinstance(value, dict):
        own = value.get("Regex")
        inner = max((_longest_pattern(held) for key, held in value.items() if key != "vocab"), default=0)
        return max(len(own) if isinstance(own, str) else 0, inner)
    if isinstance(value, list) and not (value and isinstance(value[0], str)):
        return max(map(_longest_pattern, value), default=0)
    return 0


def tokens_in(directory: Path) -> int | None:
    """Return how many tokens the tokenizer in a directory has: its highest id and one, without loading it.

    Returns:
        None where no file of the directory says it; loading may add tokens that the files only name.
    """
    ids: list[int] = []
    for name in TOKENIZER_TABLES:
        try:
            ids += _ids(name, read_table(directory / name))
        except UserError:
            continue  # not there, or damaged, which loading it will say
    return max(ids) + 1 if ids else None


def _ids(name: str, table: Mapping[str, Any]) -> Iterator[int]:
    """Yield ids of a tokenizer's table, at least its highest one; what has another form is passed over."""
    if name == "added_tokens.json":
        yield from (number for number in table.values() if isinstance(number, int))
        return
    if name == "tokenizer_config.json":
        decoder = table.get("added_tokens_decoder")
        yield from (int(key) for key in decoder or () if str(key).isdigit())
        return
    model = table.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from (number for number in vocabulary.values() if isinstance(number, int))
    elif isinstance(vocabulary, list) and vocabulary:
        yield len(vocabulary) - 1
    for token in table.get("added_tokens") or ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield token["id"]


def rows_in(directory: Path) -> int | None:
    """Return how many tokens a model directory has embeddings for, by its configuration; None where it does not say."""
    try:
        table = read_table(directory / "config.json")
    except UserError:
        return None
    inner = table.get("text_config")
    for part in (table, inner):
        found = part.get("vocab_size") if isinstance(part, dict) else None
        if isinstance(found, int):
            return found
    return None


def refuse_lost_tokens(tokens: int | None, rows: int | None, whose: str, where: str) -> None:
    """Refuse a tokenizer with tokens that no embedding is there for; embeddings without a token are usual padding.

    Args:
        tokens: the highest id of the tokenizer and one; None if that is not known.
        rows: of the embeddings; None if that is not known.
        whose: the tokenizer, for the message.
        where: the model, for the message.

    Raises:
        UserError: the tokenizer has more of them.
    """
    if tokens is not None and rows is not None and tokens > rows:
        raise UserError(
            f"the tokenizer of {whose} has {tokens} tokens and {where} has embeddings for {rows}: {tokens - rows} "
            "tokens could not be read; use the model whose embeddings were resized for these tokens, or the tokenizer "
            "without them"
        )


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the highest id of a tokenizer and one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model can read and give: the rows of the smaller of its two embeddings."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(layer, "weight", None) for layer in layers]
    return min(int(weight.shape[0]) for weight in weights if weight is not None)


def settle_ties(model: PreTrainedModel, directory: Path, dtype: str) -> None:
    """Take apart the weights of a skeleton that are one by its configuration and two in the files, as loading does.

    Args:
        model: on the meta device.
        directory: of its safetensors files; where they have other names than the parameters, nothing is known.
        dtype: the type it will be loaded in, in which the weights are compared.
    """
    import torch

    kind = getattr(torch, dtype)
    apart = []
    for target, source in _ties(model).items():
        first, second = (_stored(directory, name) for name in (source, target))
        if first is not None and second is not None and not torch.equal(first.to(kind), second.to(kind)):
            apart.append(target)
    _take_apart(model, apart)


def settle_ties_as(model: PreTrainedModel, loaded: PreTrainedModel) -> None:
    """Take apart the weights of a skeleton that are two in the same model, loaded."""
    held = dict(loaded.named_parameters(remove_duplicate=False))
    _take_apart(model, [target for target, source in _ties(model).items() if held[target] is not held[source]])


def _ties(model: PreTrainedModel) -> dict[str, str]:
    found: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return found


def _take_apart(model: PreTrainedModel, targets: list[str]) -> None:
    import torch
    from torch import nn

    for target in targets:
        module, _, leaf = target.rpartition(".")
        shape = model.get_parameter(target).shape
        setattr(model.get_submodule(module), leaf, nn.Parameter(torch.empty(shape, dtype=model.dtype, device="meta")))
        del _ties(model)[target]
    say_untied(model)


def say_untied(model: PreTrainedModel) -> None:
    """Let a model's configuration say that its head is its own where it is, whatever the files said.

    What is saved of the model is then read back as two weights by every library, and nothing ties them later.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is getattr(embeddings, "weight", None):
        return
    for config in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _stored(directory: Path, name: str) -> Tensor | None:
    """Return a tensor of a model directory; None where no file has it, or it cannot be read, which loading will say."""
    from safetensors import SafetensorError, safe_open

    for file in weight_paths(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118 - it is not a mapping
                    found: Tensor = opened.get_tensor(name)
                    return found
        except (SafetensorError, OSError):
            continue
    return None
