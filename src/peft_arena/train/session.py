"""One training from its first (or resumed) step to its last. Imported only when a training starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.store.checkpoint import write_checkpoint
from peft_arena.store.records import LogEntry
from peft_arena.store.store import RunDirectory
from peft_arena.train.batch import Batch, collate
from peft_arena.train.data import Example
from peft_arena.train.loss import TokenLoss, check_isolation, held_out_loss
from peft_arena.train.outcome import OnStep, StepInfo
from peft_arena.train.quiet import model_kept, seed_step, surface_kept
from peft_arena.train.schedule import rate_factor, save_steps, validation_steps
from peft_arena.train.state import Counters, read_state, write_state
from peft_arena.train.trainer import Feed, PlannedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_arena.train.sft import TrainData


class Session:
    """A training in progress: the optimizer, what was counted, and what happens after each step."""

    def __init__(self, run: RunDirectory, loaded: Loaded, attached: Attached, data: TrainData) -> None:
        """Build the optimizer and continue the newest resume state, if there is one."""
        self.run = run
        self.loaded = loaded
        self.attached = attached
        self.data = data
        self.spec = data.spec
        self.total = len(data.plan.steps)
        self.save_at = save_steps(self.spec, self.total)
        self.validate_at = validation_steps(self.spec, self.total)
        self.optimizer = _optimizer(attached, self.spec.learning_rate, self.spec.weight_decay)
        plan = f"{data.plan.id}-{data.train.id}"
        self.counters = read_state(run, plan, attached, self.optimizer) or Counters(
            plan=plan, threads=torch.get_num_threads()
        )
        attached.begin(self.total)
        self.loss = TokenLoss(attached.model, autocast=loaded.spec.dtype == "bfloat16", added=attached.extra_loss)
        self.validation = self._validation_batches()

    def train(self, watchers: Sequence[OnStep], resume_every: int | None) -> None:
        """Do the steps that are left, and leave the model in evaluation mode.

        Args:
            watchers: called after each step.
            resume_every: write a resume state every so many steps; None for only at the save points.

        Raises:
            TrainingFailed: the loss became infinite or not a number.
            UserError: the disk refused a write.
        """
        first = self.counters.step
        model = self.attached.model
        with self.loss, surface_kept(model):
            if self.spec.packing:
                check_isolation(self.loss)
            if first == 0 and 0 in self.validate_at:
                self.counters.log.append(LogEntry(step=0, tokens=0, validation_loss=self._held_out()))
            if first < self.total:
                model.train()
                self._trainer(first, watchers, resume_every).train()
        model.zero_grad(set_to_none=True)
        model.eval()

    def _trainer(self, first: int, watchers: Sequence[OnStep], resume_every: int | None) -> PlannedTrainer:
        passes = [batch for step in range(first, self.total) for batch in self.data.plan.micro_batches(step)]
        follower = Follower(self, watchers, resume_every)
        trainer = PlannedTrainer(
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
            scheduler=LambdaLR(self.optimizer, lambda done: rate_factor(self.spec, first + done, self.total)),
            callback=follower,
            directory=self.run.path,
        )
        follower.trainer = trainer
        return trainer

    def step_done(self, trainer: PlannedTrainer, watchers: Sequence[OnStep], resume_every: int | None) -> None:
        """Count a step, log it, and write what is due after it."""
        counters = self.counters
        counters.step += 1
        counters.tokens += trainer.step_tokens
        counters.padded_tokens += trainer.step_padded_tokens
        counters.rows += trainer.step_rows
        counters.nats += trainer.step_nats
        counters.labels += trainer.step_labels
        step, last = counters.step, counters.step == self.total
        validate = step in self.validate_at
        if validate or last or step % self.spec.log_every == 0:
            self._log(trainer.grad_norm, validate)
        if step in self.save_at:
            with model_kept(self.attached.model):
                write_checkpoint(self.run.checkpoint(step), self.attached.save)
        if step in self.save_at or (resume_every is not None and step % resume_every == 0):
            with model_kept(self.attached.model):
                write_state(self.run, counters, self.attached, self.optimizer)
        info = StepInfo(step, self.total, trainer.step_nats / max(trainer.step_labels, 1), counters.tokens)
        for watch in watchers:
            watch(info)

    def _log(self, grad_norm: float, validate: bool) -> None:
        counters = self.counters
        entry = LogEntry(
            step=counters.step,
            tokens=counters.tokens,
            loss=counters.nats / max(counters.labels, 1),
            validation_loss=self._held_out() if validate else None,
            learning_rate=self.spec.learning_rate * rate_factor(self.spec, counters.step - 1, self.total),
            grad_norm=grad_norm,
        )
        counters.log.append(entry)
        counters.nats, counters.labels = 0.0, 0

    def _held_out(self) -> float:
        with model_kept(self.attached.model):
            return held_out_loss(self.loss, self.validation)

    def _build(self, indices: Sequence[int]) -> Batch:
        return self._collate([self.data.train.kept[index] for index in indices])

    def _collate(self, examples: Sequence[Example]) -> Batch:
        pad = self.loaded.tokenizer.pad_token_id
        return collate(examples, packing=self.spec.packing, limit=self.data.limit, pad=0 if pad is None else int(pad))

    def _validation_batches(self) -> list[Batch]:
        examples = sorted(self.data.validation, key=lambda example: len(example.ids))
        size = self.data.plan.micro_batch_size
        return [self._collate(examples[start : start + size]) for start in range(0, len(examples), size)]


class Follower(TrainerCallback):
    """Told by the trainer about each step; passes it on to the session."""

    trainer: PlannedTrainer

    def __init__(self, session: Session, watchers: Sequence[OnStep], resume_every: int | None) -> None:
        """Refer to a session."""
        self.session = session
        self.watchers = watchers
        self.resume_every = resume_every

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Start the clocks."""
        self._start()

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Seed the step's random numbers."""
        seed_step(self.session.run.spec.seed, self.session.counters.step)

    def on_optimizer_step(self, *_: object, **__: object) -> None:
        """Let the method do what it needs, while the gradients are still there."""
        self.session.attached.after_step(self.session.counters.step + 1, self.session.total)

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop the clocks, do what is due, start them again."""
        counters = self.session.counters
        counters.seconds += time.perf_counter() - self.began
        counters.cpu_seconds += time.process_time() - self.began_cpu
        self.session.step_done(self.trainer, self.watchers, self.resume_every)
        self._start()

    def _start(self) -> None:
        self.began = time.perf_counter()
        self.began_cpu = time.process_time()


def _optimizer(attached: Attached, learning_rate: float, weight_decay: float) -> Optimizer:
    """Return the method's optimizer over exactly the trained parameters.

    Raises:
        UserError: the method's groups leave out a trained parameter, or have another or one twice.
    """
    optimizer = attached.optimizer(learning_rate, weight_decay)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in attached.trained().values()]
    if sorted(grouped) != sorted(trained):
        raise UserError(
            f"{type(attached).__name__} has {len(trained)} trained parameters, "
            f"and its optimizer groups hold {len(grouped)} ({len(set(grouped) & set(trained))} of them)"
        )
    return optimizer
