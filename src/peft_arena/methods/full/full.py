"""Full fine-tuning: every weight trains, in float32 whatever the base's type.

A checkpoint is a plain model directory in the base's own type. The pretrained weights are put into a temporary file
(under ``tempfile.gettempdir()``) rather than kept in memory, where they would falsify what training is measured to
need.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft_arena.core.errors import UserError, first_line, unknown
from peft_arena.core.parts import scratch
from peft_arena.methods.base import Attached, Calibration, Capability, Method, MethodCard
from peft_arena.methods.files import read_table
from peft_arena.methods.state import copy_into, swapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Pretrained:
    """The weights a model had when this was made, in a temporary file that goes when nobody needs it."""

    def __init__(self, model: PreTrainedModel, names: Collection[str] | None = None) -> None:
        """Write the parameters of the given names; all of them for None.

        Raises:
            UserError: the temporary directory has no room.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        kept = ExitStack()
        weakref.finalize(self, kept.close)
        tensors = {
            name: p.detach().cpu().contiguous()
            for name, p in model.named_parameters()
            if names is None or name in names
        }
        try:
            self._file = kept.enter_context(scratch("pretrained")) / "pretrained.safetensors"
            save_file(tensors, self._file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot keep the pretrained weights among the temporary files: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """Return one parameter as it was."""
        from safetensors import safe_open

        with safe_open(self._file, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found


class FullAttached(Attached):
    """A model all of whose weights are tuned, or some of them."""

    model: PreTrainedModel
    pretrained: Pretrained
    """The weights it started from, in a file."""

    def __init__(self, model: PreTrainedModel, pretrained: Pretrained, dtypes: dict[str, torch.dtype]) -> None:
        """Hold a model.

        Args:
            model: the model with tuned, or still to be tuned, weights.
            pretrained: the weights it started from.
            dtypes: the base's type of every tuned parameter, by name.
        """
        self.model = model
        self.pretrained = pretrained
        self._dtypes = dtypes

    def tuned(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are tuned, by name, whether they train now or not."""
        return {name: p for name, p in self.model.named_parameters() if name in self._dtypes}

    def save(self, directory: Path) -> None:
        """Write a plain model directory in the base's type."""
        parameters = self.tuned()
        with swapped(parameters, {name: p.data.to(self._dtypes[name]) for name, p in parameters.items()}):
            self.model.save_pretrained(directory)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Give the pretrained model's outputs inside the block; its weights are read back from disk."""
        parameters = self.tuned()
        values = {name: self.pretrained.tensor(name).to(p.device) for name, p in parameters.items()}
        with swapped(parameters, values):
            yield self.model

    def delta(self, module: str) -> Tensor | None:
        """Return tuned minus pretrained weight of one linear module, in float32; None where it is not tuned."""
        from torch import nn

        linears = {name: found for name, found in self.model.named_modules() if isinstance(found, nn.Linear)}
        if module not in linears:
            raise unknown("linear module", module, linears)
        weight = linears[module].weight
        name = next(name for name, p in self.model.named_parameters() if p is weight)
        if name not in self._dtypes:
            return None
        return weight.detach().float() - self.pretrained.tensor(name).to(weight.device).float()

    def merged(self) -> PreTrainedModel:
        """Return the model in the base's type."""
        for name, parameter in self.tuned().items():
            parameter.data = parameter.data.to(self._dtypes[name])
        return self.model


class Full(Method):
    """Full fine-tuning: every weight of the model trains."""

    card: ClassVar[MethodCard] = MethodCard(
        name="full",
        title="Full fine-tuning",
        family="full",
        paper="none",
        url="",
        capabilities=frozenset(
            {
                Capability.TRAINS,
                Capability.LINEAR_DELTA,
                Capability.MERGEABLE,
                Capability.IDENTITY_AT_INIT,
                Capability.CHANGES_BASE,
                Capability.ONLINE_RL,
            }
        ),
        parameters="all parameters of the model, tied ones once",
        learning_rate=2e-5,
        micro_learning_rate=1e-3,
        micro_rl_learning_rate=1e-4,
        rl_learning_rate=1e-6,
        random_init=False,
        deviations=(
            "trains float32 weights on every base; a checkpoint is rounded to the base's type",
            "the pretrained weights are kept in a temporary file, not in memory",
        ),
        description="Trains every weight, with float32 master weights.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of parameters of the model."""
        return sum(p.numel() for p in model.parameters())

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Make every weight float32 and trainable; see :meth:`Method.attach`."""
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        pretrained = Pretrained(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        model.requires_grad_(True)
        return FullAttached(model, pretrained, dtypes)

    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Read a model directory over the model, in the base's type; see :meth:`Method.restore`."""
        from safetensors import SafetensorError

        from peft_arena.models.stored import unreported, whole

        read_table(directory / "config.json", self.card.name)
        kind: Any = type(model)
        try:
            with unreported():
                made = kind.from_pretrained(
                    directory,
                    dtype=model.dtype,
                    output_loading_info=True,
                    local_files_only=True,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = first_line(error)
            raise UserError(f"cannot read the model in {directory}: {first}") from error
        loaded = whole(made, f"{directory} is not a checkpoint of this model")
        pretrained = Pretrained(model)
        targets = dict(model.named_parameters())
        dtypes = {name: p.dtype for name, p in targets.items()}
        values = {name: p.detach().to(dtypes.get(name, p.dtype)) for name, p in loaded.named_parameters()}
        copy_into(targets, values, where=str(directory))
        model.requires_grad_(False)
        model.eval()
        return FullAttached(model, pretrained, dtypes)
