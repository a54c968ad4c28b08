"""Checks of what a method writes: damaged files, adapters that others load, and a new process."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_arena.methods.base import Capability
from peft_arena.testing.fresh import gap_in_new_process
from peft_arena.testing.life_checks import reload_limit
from peft_arena.testing.subject import EXACT, MERGE, ROUNDED, difference, logits, refuses, tokens
from peft_arena.testing.trial import Life, Trial, linear_weights, on_each_model

if TYPE_CHECKING:
    from torch import Tensor

SERVED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
"""Entries of an adapter's configuration that a server computes with."""
CIRCUMSTANTIAL = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "exclude_modules", "lora_dropout", "peft_version", "revision", "task_type"),
}
"""Entries that change nothing of a saved adapter's output."""
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@on_each_model
def check_damage(life: Life) -> None:
    """Check that every missing or shortened file of a checkpoint is refused."""
    fresh, method, saved = life.subject.model(), life.subject.make(), life.saved
    for file in sorted(path for path in saved.rglob("*") if path.is_file()):
        if file.name == "generation_config.json":
            continue
        content = file.read_bytes()
        file.unlink()
        assert refuses(lambda: method.restore(fresh, saved)), f"restored without {file.name}"
        file.write_bytes(content[: len(content) // 2])
        assert refuses(lambda: method.restore(fresh, saved)), f"restored with half of {file.name}"
        file.write_bytes(content)
    assert refuses(lambda: method.restore(fresh, saved / "nowhere")), "restored from no directory"


@on_each_model
def check_peft_adapter(life: Life) -> str | None:
    """Check that peft itself loads a checkpoint on the pretrained model with the same outputs."""
    if not life.subject.has(Capability.PEFT_ADAPTER):
        return "the card does not declare peft_adapter"
    from peft import PeftConfig, PeftModel

    saved = str(life.saved)
    named = PeftConfig.from_pretrained(saved).base_model_name_or_path
    assert named == f"tiny-{life.subject.kind}", f"the adapter names {named} as its base model"
    wrapped = PeftModel.from_pretrained(life.subject.model(), saved)
    limit = EXACT if life.subject.exact else ROUNDED
    gap = difference(logits(wrapped, tokens()), logits(life.reread.model, tokens()))
    assert gap <= limit, f"PeftModel.from_pretrained is {gap} away from restore()"
    return None


@on_each_model
def check_lora_adapter(life: Life) -> str | None:
    """Check that the files alone, read as a LoRA server reads them, give the tuned model."""
    if not life.subject.has(Capability.LORA_ADAPTER):
        return "the card does not declare lora_adapter"
    import torch
    from safetensors.torch import load_file

    table = json.loads((life.saved / "adapter_config.json").read_text(encoding="utf-8"))
    whole = tuple(table.pop("modules_to_save", None) or ())  # of the user's asking; beside them it must be a LoRA
    strange = strange_settings(table)
    assert not strange, f"no plain LoRA: adapter_config.json has {', '.join(strange)}"
    parts: dict[str, dict[str, Tensor]] = {}
    brought: dict[str, Tensor] = {}
    for key, tensor in load_file(life.saved / "adapter_model.safetensors").items():
        place = KEY.fullmatch(key)
        if place is None and any(key.removeprefix("base_model.model.").startswith(f"{name}.") for name in whole):
            brought[key.removeprefix("base_model.model.")] = tensor
            continue
        assert place is not None, f"no plain LoRA: the adapter holds {key}"
        parts.setdefault(place["module"], {})[place["side"]] = tensor.float()
    model = life.subject.model().float()
    weights = linear_weights(model)
    with torch.no_grad():
        for name, tensor in brought.items():
            model.get_parameter(name).copy_(tensor)
        for module, pair in parts.items():
            assert set(pair) == {"A", "B"} and module in weights, f"no plain LoRA: {module} has only {sorted(pair)}"
            rank = _by_pattern(table["rank_pattern"], module, table["r"])
            assert pair["A"].shape[0] == rank, f"A of {module} has rank {pair['A'].shape[0]}, the settings {rank}"
            alpha = _by_pattern(table["alpha_pattern"], module, table["lora_alpha"])
            scaling = alpha / (math.sqrt(rank) if table["use_rslora"] else rank)
            weights[module].add_(scaling * pair["B"] @ pair["A"])
    limit = MERGE if life.subject.exact else 2 * ROUNDED
    gap = difference(logits(model, tokens()), life.tuned)
    assert gap <= limit, f"pretrained weights plus scaling * B A of the files are {gap} away from the tuned model"
    return None


def strange_settings(table: Mapping[str, Any]) -> list[str]:
    """Return the settings of an adapter that make it more than a plain LoRA."""
    import peft

    plain = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=lambda value: getattr(value, "value", None)))
    wrong = {name: value for name, value in table.items() if value != plain.get(name) and (value or plain.get(name))}
    return [f"{name} = {value!r}" for name, value in wrong.items() if name not in SERVED | CIRCUMSTANTIAL]


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: float) -> float:
    """Return the value of the first pattern that names a module, as peft reads it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def check_fresh_process(trial: Trial) -> None:
    """Check that a checkpoint gives the same outputs in a new process, whatever its random state."""
    for name in ("untied", "bfloat16"):
        life = trial.life(name)
        gap = gap_in_new_process(life)
        assert gap <= reload_limit(life.subject), f"on the {name} model: restored in a new process it is {gap} away"
