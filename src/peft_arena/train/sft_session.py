"""Supervised fine-tuning in progress. Imported only when a training starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.store.store import RunDirectory
from peft_arena.train.batch import Batch, collate
from peft_arena.train.data import Example
from peft_arena.train.loss import check_isolation, held_out_loss
from peft_arena.train.outcome import StepInfo
from peft_arena.train.session import Follower, Session
from peft_arena.train.state import Counters
from peft_arena.train.trainer import Feed, PlannedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_arena.train.inputs import TrainData


class SftSession(Session[Counters]):
    """Trains on given answers."""

    def __init__(self, run: RunDirectory, loaded: Loaded, attached: Attached, data: TrainData) -> None:
        """Build the optimizer and continue the newest resume state, if there is one."""
        self.data = data
        self.spec = data.spec
        begin = Counters(plan=f"{data.plan.id}-{data.train.id}", threads=torch.get_num_threads())
        super().__init__(run, loaded, attached, data.spec, len(data.plan.steps), begin, len(data.validation))
        self.validation = self._validation_batches()

    def check(self) -> None:
        """Check that packed examples do not see each other; see :meth:`Session.check`."""
        if self.spec.packing:
            check_isolation(self.loss)

    def trainer(self, follower: Follower) -> PlannedTrainer:
        """Return TRL's trainer for the steps that are left."""
        first = self.counters.step
        passes = [batch for step in range(first, self.total) for batch in self.data.plan.micro_batches(step)]
        return PlannedTrainer(
            model=cast("PreTrainedModel", self.attached.model),
            tokenizer=self.loaded.tokenizer,
            feed=Feed(passes, self._build),
            first_step=first,
            passes=self.spec.batch_size // self.data.plan.micro_batch_size,
            steps=self.total - first,
            loss=self.loss,
            trained=list(self.attached.trained().values()),
            max_grad_norm=self.spec.max_grad_norm,
            optimizer=self.optimizer,
            scheduler=self.scheduler(),
            callback=follower,
            directory=self.run.path,
        )

    def count(self, trainer: PlannedTrainer) -> StepInfo:
        """Count tokens and loss of a step."""
        counters = self.counters
        counters.tokens += trainer.step_tokens
        counters.padded_tokens += trainer.step_padded_tokens
        counters.rows += trainer.step_rows
        counters.nats += trainer.step_nats
        counters.labels += trainer.step_labels
        loss = trainer.step_nats / max(trainer.step_labels, 1)
        return StepInfo(counters.step, self.total, f"loss {loss:.3f}", counters.tokens)

    def entry(self) -> dict[str, Any]:
        """Return the mean training loss since the last entry."""
        counters = self.counters
        loss = counters.nats / max(counters.labels, 1)
        counters.nats, counters.labels = 0.0, 0
        return {"loss": loss}

    def held_out(self) -> dict[str, Any]:
        """Return the held-out loss."""
        return {"validation_loss": held_out_loss(self.loss, self.validation)}

    def _build(self, indices: Sequence[int]) -> Batch:
        return self._collate([self.data.train.kept[index] for index in indices])

    def _collate(self, examples: Sequence[Example]) -> Batch:
        pad = self.loaded.tokenizer.pad_token_id
        return collate(examples, packing=self.spec.packing, limit=self.data.limit, pad=0 if pad is None else int(pad))

    def _validation_batches(self) -> list[Batch]:
        examples = sorted(self.data.validation, key=lambda example: len(example.ids))
        size = self.data.plan.micro_batch_size
        return [self._collate(examples[start : start + size]) for start in range(0, len(examples), size)]
