"""What all trainings switch off or replace in TRL's trainers. Imported only when a training starts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PrinterCallback

from peft_arena.core.text import few
from peft_arena.train.gradients import unsound
from peft_arena.train.outcome import TrainingFailed
from peft_arena.train.recompute import checkpointing

T = TypeVar("T")


class QuietTrainer:
    """Stands before a class of TRL's; whoever inherits calls :meth:`settle` after the constructor."""

    _tag_names: list[str] = []  # noqa: RUF012 - declared so by TRL; nothing is written on the model
    args: Any
    optimizer: Any
    trained_parameters: list[nn.Parameter]
    grad_norm: float = 0.0
    """Norm of the gradients of the last step, before they were scaled down."""

    def settle(self, trained: Iterable[nn.Parameter]) -> None:
        """Take off what only costs time.

        Args:
            trained: every trained parameter.
        """
        self.trained_parameters = list(trained)
        trainer: Any = self
        trainer.remove_callback(PrinterCallback)
        trainer.accelerator.free_memory = _nothing_to_free

    def floating_point_ops(self, inputs: object) -> int:
        """Return 0: floating-point operations are counted by the cost module."""
        return 0

    def _prepare_for_training(self, *arguments: object, **settings: object) -> object:
        """Take accelerate's wrapper off the optimizer: in one process it only costs time at each step."""
        prepared = super()._prepare_for_training(*arguments, **settings)  # type: ignore[misc]
        self.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return prepared

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Scale the gradients down to the largest norm.

        Raises:
            TrainingFailed: a gradient is not finite; names the parameters.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.trained_parameters if p.grad is not None])
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm):
            wrong = unsound({name: p for name, p in model.named_parameters() if p.requires_grad})
            raise TrainingFailed(
                f"training failed: the gradient is {self.grad_norm} in {few(wrong) or 'sum'}; nothing after the last "
                "save point is kept. A lower learning_rate may help"
            )
        nn.utils.clip_grads_with_norm_(self.trained_parameters, self.args.max_grad_norm, norm)
        return norm

    def _send_telemetry(self) -> None:
        """Send nothing."""


def quiet_arguments(directory: Path, steps: int, passes: int, max_grad_norm: float, device: str) -> dict[str, Any]:
    """Return the settings of TRL's trainers that switch off what is done elsewhere or by nobody.

    Args:
        directory: an existing directory; nothing is written there.
        steps: optimizer steps to do.
        passes: forward passes in one optimizer step.
        max_grad_norm: gradients are scaled down to this norm.
        device: type of the model's device.
    """
    return {
        "output_dir": str(directory),
        "max_steps": steps,
        "gradient_accumulation_steps": passes,
        "max_grad_norm": max_grad_norm,
        "use_cpu": device == "cpu",
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": checkpointing(),
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def as_it_is(batch: T) -> T:
    """Return a batch that is already one."""
    return batch


def _nothing_to_free(*objects: object) -> list[object]:
    """Stand in for a full garbage collection (half a second) before the first step."""
    return list(objects)
