"""TRL's SFTTrainer, fed with our batches and our loss. Imported only when a training starts.

What is changed, and why:

* batches come ready made, in the plan's order, so that a restart continues at the right one;
* the loss is :class:`~peft_arena.train.loss.TokenLoss`: TRL's scores every position of a batch on a CPU and leaves out
  terms that a method adds to its loss;
* the loss is divided by the labels of the whole optimizer step, whatever the forward passes;
* what the trainer does at every step and nobody reads (entropy, FLOP counts, walks over frozen parameters) is off;
* the patch of the model's forward that TRL needs for its own loss is taken back, and the tokenizer is kept away from
  the model's configuration, so that the trained model differs from the given one in its trained weights only;
* nothing is sent anywhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_arena.train.batch import Batch
from peft_arena.train.loss import TokenLoss
from peft_arena.train.outcome import TrainingFailed
from peft_arena.train.quiet import random_kept, surface_kept
from peft_arena.train.quiet_trainer import QuietTrainer, as_it_is, quiet_arguments

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Feed(torch.utils.data.Dataset[Batch]):
    """The forward passes still to do, in order, each built when it is asked for."""

    def __init__(self, plan: Sequence[Sequence[int]], build: Callable[[Sequence[int]], Batch]) -> None:
        """Take the example indices of each forward pass, and what makes a batch of them."""
        self.plan = plan
        self.build = build

    def __len__(self) -> int:
        """Return the number of forward passes."""
        return len(self.plan)

    def __getitem__(self, position: int) -> Batch:
        """Build one batch."""
        return self.build(self.plan[position])


class PlannedTrainer(QuietTrainer, SFTTrainer):
    """Trains a model on a given sequence of batches with a given optimizer."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        feed: Feed,
        first_step: int,
        passes: int,
        steps: int,
        loss: TokenLoss,
        trained: list[nn.Parameter],
        max_grad_norm: float,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        callback: TrainerCallback,
        directory: Path,
    ) -> None:
        """Set the trainer up; the model is changed in nothing.

        Args:
            model: the model with the method in place.
            tokenizer: the model's; TRL wants to see it.
            feed: the batches.
            first_step: optimizer steps done before, only for messages.
            passes: forward passes in one optimizer step.
            steps: optimizer steps to do.
            loss: computes the loss; entered by the caller.
            trained: every trained parameter.
            max_grad_norm: gradients are scaled down to this norm.
            optimizer: over exactly the trained parameters.
            scheduler: of the optimizer.
            callback: told about the steps.
            directory: an existing directory; nothing is written there.
        """
        arguments = _arguments(directory, steps, passes, max_grad_norm, loss.device.type)
        self.feed = feed
        self.token_loss = loss
        self.rate = lambda: float(scheduler.get_last_lr()[0])
        self.first_step = first_step
        self.step_nats = 0.0
        self.step_labels = 0
        self.step_tokens = 0
        self.step_padded_tokens = 0
        self.step_rows = 0
        with surface_kept(model), random_kept():
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
                data_collator=_never_called,
                processing_class=tokenizer,
                optimizers=(optimizer, scheduler),
                callbacks=[callback],
            )
        self.processing_class = None
        self.settle(trained)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Return the planned batches in their order."""
        return DataLoader(self.feed, batch_size=None, collate_fn=as_it_is)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], int]:
        """Return the batches of one optimizer step and the number of their labels."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.step_nats = 0.0
        self.step_labels = sum(len(batch.targets) for batch in batches)
        self.step_tokens = sum(batch.tokens for batch in batches)
        self.step_padded_tokens = sum(batch.padded_tokens for batch in batches)
        self.step_rows = sum(len(batch.input_ids) for batch in batches)
        return batches, self.step_labels

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, num_items_in_batch: int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; the gradients add up over the passes of a step.

        Raises:
            TrainingFailed: the loss is not a finite number.
        """
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> Tensor:
        """Return this pass's share of the step's mean loss per label, with what the method adds.

        Raises:
            TrainingFailed: the loss is not a finite number.
        """
        parts = self.token_loss(inputs)
        nats = float(parts.nats.detach())
        self.step_nats += nats
        loss = parts.nats / max(num_items_in_batch or 0, 1)
        if parts.extra is not None:
            loss = loss + parts.extra / self.current_gradient_accumulation_steps
        if not math.isfinite(nats) or (parts.extra is not None and not math.isfinite(float(parts.extra.detach()))):
            step = self.first_step + self.state.global_step + 1
            raise TrainingFailed(
                f"training failed at step {step}: the loss is {float(loss.detach())} at learning rate "
                f"{self.rate():.3g}; nothing after the last save point is kept. A lower learning_rate may help"
            )
        return loss


def _never_called(examples: list[Any]) -> dict[str, Any]:
    """Stand in for TRL's collator, which would change the model's configuration."""
    raise NotImplementedError(f"{len(examples)} examples reached the collator: batches come ready made")


def _arguments(directory: Path, steps: int, passes: int, max_grad_norm: float, device: str) -> SFTConfig:
    """Switch off everything in the trainer that is done elsewhere or by nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL sets gradient_checkpointing by its old name, on
        return SFTConfig(
            **quiet_arguments(directory, steps, passes, max_grad_norm, device),
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )
