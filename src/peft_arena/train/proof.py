"""What a run proves of itself before hours are spent: that it starts at the base, and that its checkpoints can be read.

Before the first step a method that changes no output at the start must give the pretrained model's logits on rows of
the run's own data. What is written of it is read back, once before a long training and once after the first
checkpoint, and must give the tuned model's logits.

Two sets of logits are compared by the root mean square of their difference over that of the logits about their mean.
On the packaged micro model, over all methods, rounding gives at most 1.4e-6 in float32; in bfloat16 nothing or 0.01,
and 0.05 where a weight is split into a rounded residual and two factors. Deeper models round more often.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_arena.core.errors import UserError, first_line
from peft_arena.core.ids import seed_for
from peft_arena.core.parts import unfinished
from peft_arena.core.specs import RunSpec
from peft_arena.cost.memory import unmeasured
from peft_arena.methods.adapter import PREFIX
from peft_arena.methods.base import Attached, Capability, Method
from peft_arena.methods.boundary import one_line
from peft_arena.methods.state import swapped
from peft_arena.models.load import Loaded
from peft_arena.models.modes import context_length
from peft_arena.store.checkpoint import write_checkpoint
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.base import Task
from peft_arena.train.batch import Batch, collate
from peft_arena.train.data import Example, draw_examples
from peft_arena.train.loss import TokenLoss
from peft_arena.train.quiet import model_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, TOKENS = 2, 32
"""Rows of the run's data that are compared, and their tokens at most."""
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest relative difference of logits that is rounding, by the model's type."""
ROUNDED = 0.3
"""The same in bfloat16 for methods that write to the pretrained weights, which are rounded again then."""
SEEN = 64
"""Numbers of each module's output that are kept to find the modules that differ."""
SOON = 10
"""A first checkpoint after more steps than this is tried before the first of them."""
SMALL = 2**30
"""Bytes of trained parameters up to which a checkpoint is tried before training, with the weights moved."""
ROOM = 1.5
"""Free memory that a second model must find, in sizes of the model: its logits and what is read need some too."""
MOVED = 0.02
"""Standard deviation by which trained weights are moved for it, so that what is not read back shows."""


class Proof:
    """Looks at a run's model before a method is attached, and compares what comes after with it."""

    def __init__(
        self,
        spec: RunSpec,
        loaded: Loaded,
        task: Task,
        method: Method,
        fresh: Callable[[], PreTrainedModel],
    ) -> None:
        """Note what the model says.

        Args:
            spec: of the run.
            loaded: the model, nothing attached.
            task: what the run trains on.
            method: what will be attached.
            fresh: loads the model again.
        """
        self.method = method
        self.dtype = loaded.spec.dtype
        self.allowed = ALLOWED[self.dtype]
        self._fresh = fresh
        able = method.card.capabilities
        if self.dtype == "bfloat16" and Capability.CHANGES_BASE in able:
            self.allowed = ROUNDED
        shares = Capability.CHANGES_BASE not in able
        self._twin: PreTrainedModel | None = twin(loaded.model) if shares else None
        self.batch = _batch(spec, loaded, task, method)
        self._before: Tensor | None = None
        self._outputs: dict[str, Tensor] = {}
        if Capability.IDENTITY_AT_INIT in able:
            with _outputs(loaded.model) as self._outputs:
                self._before = self._logits(loaded.model)

    def start(self, attached: Attached) -> None:
        """Check that the model can be run with the method, and that it is the pretrained one where the card says so.

        Raises:
            UserError: it cannot, or it is another; modules whose outputs differ are named.
        """
        with one_line(self.method.card.name, "attached to", attached.model), _outputs(attached.model) as seen:
            now = self._logits(attached.model)
        if self._before is None:
            return
        gap = relative(now, self._before)
        before, self._before = self._before, None
        if gap <= self.allowed:
            return
        if not bool(before.isfinite().all()):
            raise UserError(
                "the pretrained model's own logits are not finite on the run's data: nothing can be trained"
            )
        names = [
            name
            for name, output in seen.items()
            if name in self._outputs and not relative(output, self._outputs[name]) <= self.allowed
        ]
        where = f"; first in {', '.join(names[:3])}" if names else ""
        raise UserError(
            f"{self.method.card.name} would not start at the pretrained model, as its card says: before the first step "
            f"logits differ by {gap:.2g} of their spread, and {self.allowed:g} is allowed in {self.dtype}{where}"
        )

    def before_training(self, run: RunDirectory, attached: Attached, first: int) -> None:
        """Write a checkpoint beside the run and read it back, if the first real one is far away.

        The trained weights are moved for it, so that one that starts at zero is seen to be read.

        Args:
            run: whose training begins.
            attached: in place, before its first step.
            first: step of the first checkpoint.

        Raises:
            UserError: it cannot be read back.
        """
        trained = attached.trained()
        if first <= SOON or sum(p.numel() * p.element_size() for p in trained.values()) > SMALL:
            return
        generator = torch.Generator().manual_seed(0)
        moved = {
            name: p.detach() + MOVED * torch.randn(p.shape, generator=generator).to(p) for name, p in trained.items()
        }
        with unfinished(run.path / "proof", directory=True) as part, swapped(trained, moved):
            write_checkpoint(part / "checkpoint", attached.save)
            self.read_back(run, part / "checkpoint", attached, "written to be tried before the first step")

    def read_back(self, run: RunDirectory, path: Path, attached: Attached, which: str) -> None:
        """Restore a checkpoint of what is in place, on another model, and compare what the two say.

        A run without memory for a second model goes on unread: event ``checkpoint_not_read_back`` says so.

        Args:
            run: whose checkpoint it is.
            path: the checkpoint.
            attached: what was saved, as it was saved.
            which: says in a message which checkpoint it is.

        Raises:
            UserError: it cannot be read, or gives another model.
        """
        if self._twin is None and (lacking := _lacking(attached.model)):
            run.event("checkpoint_not_read_back", level="warning", checkpoint=which, reason=lacking)
            return
        with model_kept(attached.model), unmeasured():
            now = self._logits(attached.model)
            try:
                model = self._fresh() if self._twin is None else twin(self._twin)
                restored = self.method.restore(model, path)
                again = self._logits(restored.model)
            except (MemoryError, torch.OutOfMemoryError) as error:
                run.event("checkpoint_not_read_back", level="warning", checkpoint=which, reason=first_line(error))
                return
            except UserError as error:
                raise UserError(f"{self._said(which)} cannot be read back, so training ends here: {error}") from error
        gap = relative(again, now)
        if not gap <= self.allowed:
            raise UserError(
                f"{self._said(which)} is not the model that was trained, so training ends here: read back, its logits "
                f"differ by {gap:.2g} of their spread, and {self.allowed:g} is allowed in {self.dtype}"
            )

    def _said(self, which: str) -> str:
        return f"the checkpoint of method {self.method.card.name} {which}"

    def _logits(self, model: nn.Module) -> Tensor:
        """Return float32 logits of the compared rows on the CPU, in evaluation mode, shape (tokens, vocabulary)."""
        with model_kept(model), torch.no_grad():
            model.eval()
            with TokenLoss(model, self.dtype == "bfloat16") as loss:
                return loss.logits(self.batch)[0].float().cpu()


def _lacking(model: nn.Module) -> str:
    """Say why there is no memory for the model a second time; empty if there is."""
    import psutil

    needed = int(sum(p.numel() * p.element_size() for p in model.parameters()) * ROOM)
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return f"a second model needs {needed} bytes, {free} are free on {device}" if needed > free else ""


def relative(given: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of a difference over that of the wanted values about their mean; nan if not finite.

    Args:
        given: any shape.
        wanted: of the same shape; another shape differs wholly.
    """
    if given.shape != wanted.shape:
        return float("inf")
    off = (given - wanted).double().square().mean().sqrt()
    spread = wanted.double().std(correction=0)
    return float(off / spread) if float(spread) > 0 else float(off)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that shares its weights' memory, to be adapted and thrown away."""
    held: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    held |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, held)


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the first numbers of what each module with a weight gives inside the block, by its name in the base."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: object, output: object) -> None:
            if isinstance(output, Tensor):
                seen.setdefault(name, output.detach().flatten()[:SEEN].float().cpu())

        return keep

    names = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
    handles = [module.register_forward_hook(note(name)) for name, module in names.items() if _has_weight(module)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _batch(spec: RunSpec, loaded: Loaded, task: Task, method: Method) -> Batch:
    """Return rows of what the run trains on, every token labelled; plain tokens where no row can be had."""
    room = context_length(loaded.model)
    limit = TOKENS if room is None else max(min(TOKENS, room - method.virtual_tokens), 2)
    rows: list[Example] = []
    if spec.train is not None:
        try:
            seed = seed_for(spec.seed, "proof")
            rows = draw_examples(task, ROWS, seed, loaded.tokenizer, spec.train, spec.train.max_length)
        except UserError:
            rows = []  # which the training says in its own words
    cut = [Example(row.ids[:limit], 1) for row in rows if len(row.ids) > 1] or [Example(list(range(1, 9))[:limit], 1)]
    return collate(cut, packing=False, limit=limit, pad=int(loaded.tokenizer.pad_token_id or 0))
