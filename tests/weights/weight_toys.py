"""Base models in files, PEFT adapters with random values, and what peft itself makes of the two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from peft_arena.models.load import PACKAGED
from peft_arena.testing.subject import tiny_model

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(
    directory: Path, config: Any, kind: str = "untied", size: float = 0.05, dtype: str = "float32"
) -> Path:
    """Write a PEFT adapter with random values in all that it trains."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(tiny_model(kind, dtype), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, dtype=torch.float32))
    wrapped.save_pretrained(directory)
    return directory


def peft_changes(directory: Path, kind: str = "untied", dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Return tuned minus pretrained parameters in float64, by peft's own merge."""
    before = {name: p.detach().double() for name, p in tiny_model(kind, dtype).named_parameters()}
    wrapped: Any = peft.PeftModel.from_pretrained(tiny_model(kind, dtype), str(directory)).double()
    merged = dict(wrapped.merge_and_unload().named_parameters())
    return {name: merged[name].detach() - weight for name, weight in before.items()}


def edit(directory: Path, change: Any) -> None:
    """Rewrite the tensors of an adapter: ``change`` maps the table of them to another."""
    file = directory / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)


def set_setting(directory: Path, **settings: Any) -> None:
    """Overwrite settings of an adapter."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def small_tokenizer(directory: Path, size: int = 199) -> None:
    """Write the micro model's tokenizer, cut to its first tokens, fewer than the tiny models have embeddings for."""
    table = json.loads((PACKAGED["micro"] / "tokenizer.json").read_text(encoding="utf-8"))
    model = table["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= set(model["vocab"])]
    (directory / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    shutil.copyfile(PACKAGED["micro"] / "tokenizer_config.json", directory / "tokenizer_config.json")
