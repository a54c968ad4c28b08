"""One training from its first (or resumed) step to its last. Imported only when a training starts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from peft_arena.core.errors import UserError
from peft_arena.core.specs import TrainBase
from peft_arena.core.text import few
from peft_arena.methods.base import Attached
from peft_arena.methods.boundary import LIBRARY, one_line
from peft_arena.models.load import Loaded
from peft_arena.store.checkpoint import write_checkpoint
from peft_arena.store.records import LogEntry
from peft_arena.store.store import RunDirectory
from peft_arena.train.gradients import GradientWatch
from peft_arena.train.loss import TokenLoss
from peft_arena.train.outcome import OnStep, StepInfo
from peft_arena.train.proof import Proof
from peft_arena.train.quiet import model_kept, seed_step, surface_kept
from peft_arena.train.schedule import rate_factor, save_steps, validation_steps
from peft_arena.train.state import Counters, read_state, write_state

if TYPE_CHECKING:
    from torch import Tensor, nn

C = TypeVar("C", bound=Counters)


class Session(ABC, Generic[C]):
    """A training in progress: the optimizer, what was counted, and what happens after each step."""

    def __init__(
        self,
        run: RunDirectory,
        loaded: Loaded,
        attached: Attached,
        spec: TrainBase,
        total: int,
        counters: C,
        held_out_items: int,
    ) -> None:
        """Build the optimizer and continue the newest resume state, if there is one.

        Args:
            run: where checkpoints and resume states are written.
            loaded: the model with its tokenizer.
            attached: the method in place.
            spec: how it is trained.
            total: optimizer steps of the whole training.
            counters: of a training that begins; a resume state of the same plan takes their place.
            held_out_items: validation items behind the held-out loss or reward; 0: there is none.
        """
        self.run = run
        self.loaded = loaded
        self.attached = attached
        self.total = total
        self.rates = spec
        self.save_at = save_steps(spec, total)
        self.validate_at = validation_steps(spec, total) if held_out_items else frozenset()
        self.held_out_items = held_out_items
        self.optimizer = _optimizer(attached, spec.learning_rate, spec.weight_decay)
        self.buffer: dict[str, Tensor] = {}
        """Tensors of the resume state beyond weights and optimizer."""
        found = read_state(run, counters, attached, self.optimizer, self.save_at)
        self.counters, self.buffer = found if found is not None else (counters, {})
        self.gradients = GradientWatch(attached, total - self.counters.step)
        self.proof: Proof | None = None
        """What the run proves of itself; None: nothing."""
        attached.begin(total)
        self.loss = TokenLoss(attached.model, autocast=loaded.spec.dtype == "bfloat16", added=attached.extra_loss)

    def train(self, watchers: Sequence[OnStep], resume_every: int | None) -> None:
        """Do the steps that are left, and leave the model in evaluation mode.

        Args:
            watchers: called after each step.
            resume_every: write a resume state every so many steps; None for only at the save points.

        Raises:
            TrainingFailed: the loss or a gradient became infinite or not a number.
            UserError: the disk refused a write, a parameter has no gradient, or the first checkpoint cannot be read.
        """
        model = self.attached.model
        if self.proof is not None and self.counters.step == 0:
            self.proof.before_training(self.run, self.attached, min(self.save_at))
        with self.loss, surface_kept(model):
            self.check()
            if self.counters.step == 0 and 0 in self.validate_at:
                with model_kept(model):
                    self.counters.log.append(LogEntry(step=0, tokens=0, **self.held_out()))
            if self.counters.step < self.total:
                model.train()
                follower = Follower(self, watchers, resume_every)
                follower.trainer = self.trainer(follower)
                try:
                    with self._begun(model):
                        follower.trainer.train()
                finally:
                    self.gradients.close()
        if self.gradients.missing:
            left = self.gradients.missing
            self.run.event("parameters_without_gradient", level="warning", count=len(left), first=few(left))
        model.zero_grad(set_to_none=True)
        model.eval()

    @contextmanager
    def _begun(self, model: nn.Module) -> Iterator[None]:
        """Turn what a library refuses before a first step is done into one line.

        Raises:
            UserError: METHOD cannot be trained on TYPE: what the library says.
        """
        try:
            yield
        except LIBRARY:
            if self.counters.step:
                raise
            with one_line(self.run.spec.method.name, "trained on", model):
                raise

    def scheduler(self) -> LambdaLR:
        """Return the learning rate of the steps that are left."""
        first = self.counters.step
        return LambdaLR(self.optimizer, lambda done: rate_factor(self.rates, first + done, self.total))

    def step_done(self, trainer: Any, watchers: Sequence[OnStep], resume_every: int | None) -> None:
        """Count a step, log it, and write what is due after it."""
        counters = self.counters
        counters.step += 1
        info = self.count(trainer)
        step = counters.step
        if self.is_logged(step):
            self._log(trainer.grad_norm, step in self.validate_at)
        if step in self.save_at:
            with model_kept(self.attached.model):
                write_checkpoint(self.run.checkpoint(step), self.attached.save)
            if self.proof is not None and step == min(self.save_at):
                with self.loss.left():
                    self.proof.read_back(self.run, self.run.checkpoint(step), self.attached, f"of step {step}")
        if step in self.save_at or (resume_every is not None and step % resume_every == 0):
            with model_kept(self.attached.model):
                write_state(self.run, counters, self.attached, self.optimizer, self.kept(trainer))
        for watch in watchers:
            watch(info)

    def is_logged(self, step: int) -> bool:
        """Say whether the log has an entry after a step, counted from 1."""
        return step in self.validate_at or step == self.total or step % self.rates.log_every == 0

    def check(self) -> None:
        """Look at the model once before the first step, the loss entered.

        Raises:
            UserError: it cannot be trained as asked.
        """

    @abstractmethod
    def trainer(self, follower: Follower) -> Any:
        """Return TRL's trainer for the steps that are left; it has ``grad_norm``."""

    @abstractmethod
    def count(self, trainer: Any) -> StepInfo:
        """Add what the step just done processed to the counters."""

    @abstractmethod
    def entry(self) -> dict[str, Any]:
        """Return the log entry's fields on what was trained on since the last entry, and begin anew."""

    @abstractmethod
    def held_out(self) -> dict[str, Any]:
        """Return the log entry's field on validation items; the caller keeps the model's modes."""

    def kept(self, trainer: Any) -> dict[str, Tensor]:
        """Return the tensors a resume state needs beyond weights and optimizer."""
        return {}

    def _log(self, grad_norm: float, validate: bool) -> None:
        counters = self.counters
        found: dict[str, Any] = {}
        if validate:
            with model_kept(self.attached.model):
                found = self.held_out()
        entry = LogEntry(
            step=counters.step,
            tokens=counters.tokens,
            learning_rate=self.rates.learning_rate * rate_factor(self.rates, counters.step - 1, self.total),
            grad_norm=grad_norm,
            **self.entry(),
            **found,
        )
        counters.log.append(entry)


class Follower(TrainerCallback):
    """Told by the trainer about each step; passes it on to the session."""

    trainer: Any

    def __init__(self, session: Session[Any], watchers: Sequence[OnStep], resume_every: int | None) -> None:
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

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Look at the gradients of the whole step."""
        self.session.gradients.look()

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
