"""Freezing: only the last transformer blocks train, all their weights, in float32; the rest of the model stays.

Neither the embeddings, nor the normalisation after the last block, nor the output layer train. On a base that is not
float32, each trained block takes its input to float32 and gives its output in the base's type.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached, Calibration, MethodCard, MethodConfig
from peft_arena.methods.files import WEIGHTS, read_table, read_tensors
from peft_arena.methods.full.full import Full, FullAttached, Pretrained
from peft_arena.methods.state import copy_into

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SETTINGS = "freeze.json"


class FreezeConfig(MethodConfig):
    """Settings of freezing."""

    blocks: int = Field(default=2, ge=1)
    """Transformer blocks that train, counted from the top; embeddings, final norm and output layer never do."""

    alternatives: ClassVar[Mapping[str, Any]] = {"blocks": 1}


class FreezeAttached(FullAttached):
    """A model whose last blocks are tuned."""

    def __init__(
        self,
        model: PreTrainedModel,
        pretrained: Pretrained,
        dtypes: dict[str, torch.dtype],
        blocks: int,
        handles: Collection[Any] = (),
    ) -> None:
        """Hold a model.

        Args:
            model: the model with tuned, or still to be tuned, weights.
            pretrained: the weights of the blocks that train, as they were.
            dtypes: the base's type of every parameter that trains, by name.
            blocks: how many blocks train.
            handles: hooks that are to go when the model is merged.
        """
        super().__init__(model, pretrained, dtypes)
        self._blocks = blocks
        self._handles = handles

    def save(self, directory: Path) -> None:
        """Write the tuned weights in the base's type, and how many blocks they are."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        tuned = {name: p.detach().to("cpu", self._dtypes[name]).contiguous() for name, p in self.tuned().items()}
        save_file(tuned, directory / WEIGHTS, metadata={"format": "pt"})
        table = {"method": "freeze", "base_model_name_or_path": self.model.name_or_path, "blocks": self._blocks}
        (directory / SETTINGS).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def merged(self) -> PreTrainedModel:
        """Return the model in the base's type."""
        for handle in self._handles:
            handle.remove()
        return super().merged()


class Freeze(Full):
    """Freezing: full fine-tuning of the last transformer blocks alone."""

    Config: ClassVar[type[MethodConfig]] = FreezeConfig
    config: FreezeConfig
    size: ClassVar[str | None] = "blocks"
    card: ClassVar[MethodCard] = MethodCard(
        name="freeze",
        title="Freeze tuning",
        family="full",
        paper="Lee et al., 2019, What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning",
        url="https://arxiv.org/abs/1911.03090",
        capabilities=Full.card.capabilities,
        parameters="all parameters of the last transformer blocks",
        learning_rate=2e-5,
        micro_learning_rate=3e-3,
        random_init=False,
        deviations=(
            "the output layer and the norm before it stay frozen, where the paper trains a new output layer",
            "trains float32 weights on every base; a checkpoint is rounded to the base's type",
            "the pretrained weights of what trains are kept in a temporary file, not in memory",
        ),
        description="Trains every weight of the last transformer blocks, in float32, and nothing else.",
    )

    def chosen(self, model: PreTrainedModel) -> list[str]:
        """Return the names of the blocks that train, from the first to the last.

        Raises:
            UserError: the model has no such blocks, or not as many.
        """
        known = block_names(model)
        if self.config.blocks > len(known):
            raise UserError(f"blocks: {type(model).__name__} has {len(known)}, {self.config.blocks} were asked for")
        return known[-self.config.blocks :]

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the numbers of blocks from 1 to all."""
        return range(1, len(block_names(model)) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of parameters of the blocks that train."""
        return sum(p.numel() for p in _parameters(model, self.chosen(model)).values())

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Make every weight of the last blocks float32 and trainable, and freeze the rest."""
        blocks = self.chosen(model)
        tuned = _parameters(model, blocks)
        pretrained = Pretrained(model, tuned)
        dtypes = {name: p.dtype for name, p in tuned.items()}
        model.requires_grad_(False)
        for parameter in tuned.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        hooks = [hook for name in blocks for hook in _in_own_type(model.get_submodule(name), model.dtype)]
        return FreezeAttached(model, pretrained, dtypes, self.config.blocks, hooks)

    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Read the tuned blocks over those of the model, in the base's type; see :meth:`Method.restore`."""
        table = read_table(directory / SETTINGS, self.card.name)
        if table.get("blocks") != self.config.blocks:
            raise UserError(f"{directory} has {table.get('blocks')} tuned blocks instead of {self.config.blocks}")
        values = read_tensors(directory / WEIGHTS, self.card.name)
        tuned = _parameters(model, self.chosen(model))
        pretrained = Pretrained(model, tuned)
        copy_into(tuned, values, where=str(directory / WEIGHTS))
        model.requires_grad_(False)
        model.eval()
        return FreezeAttached(model, pretrained, {name: p.dtype for name, p in tuned.items()}, self.config.blocks)


def block_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the transformer blocks, in order: each module whose name first ends in a number.

    Raises:
        UserError: there are none, or several stacks of them.
    """
    names = [name for name, _ in model.named_parameters()]
    parts = [name.split(".") for name in names]
    first = {".".join(part[: at + 1]): None for part in parts for at in range(len(part)) if _is_block(part, at)}
    stacks = {name.rpartition(".")[0] for name in first}
    if len(stacks) != 1:
        found = ", ".join(sorted(stacks)) or "none"
        raise UserError(f"freeze needs one stack of transformer blocks; {type(model).__name__} has: {found}")
    return sorted(first, key=lambda name: int(name.rpartition(".")[2]))


def _is_block(part: list[str], at: int) -> bool:
    return part[at].isdigit() and not any(piece.isdigit() for piece in part[:at])


def _parameters(model: PreTrainedModel, blocks: list[str]) -> dict[str, nn.Parameter]:
    prefixes = tuple(f"{name}." for name in blocks)
    return {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}


def _in_own_type(block: nn.Module, outside: torch.dtype) -> list[Any]:
    """Make a block compute in the type of its weights between others of another type; return the hooks' handles."""
    import torch

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        return tuple(cast(part, dtype) for part in value) if type(value) is tuple else value

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inside = next(module.parameters()).dtype
        return cast(args, inside), {name: cast(value, inside) for name, value in kwargs.items()}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        found: Tensor = cast(output, outside)
        return found

    if next(block.parameters()).dtype == outside:
        return []
    return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
