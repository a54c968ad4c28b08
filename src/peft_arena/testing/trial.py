"""One try of a method: a life on each tiny model, made when a check first needs it and shared by all checks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena import __version__
from peft_arena.core.errors import UserError
from peft_arena.core.registry import OURS
from peft_arena.methods.base import Attached, Capability, Method
from peft_arena.methods.registry import METHODS
from peft_arena.store.conformance import Facts
from peft_arena.testing.subject import Subject, difference, global_random_untouched, logits, loss_of, tokens, train

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


OTHER_SEED = 77


class Life:
    """A method attached to one tiny model and trained there, with what was seen on the way."""

    def __init__(self, subject: Subject, directory: Path) -> None:
        """Attach, look, train, look.

        Args:
            subject: the method and the model.
            directory: where its checkpoint goes.
        """
        self.subject = subject
        self.directory = directory
        self.seen: dict[str, float] = {}
        """Differences that checks have measured."""
        ids = tokens()
        self.pretrained: Tensor = logits(subject.untouched(), ids)
        model = subject.model()
        self.base = list(model.parameters())
        """The parameters of the model before it was attached."""
        self.buffers = list(model.buffers())
        with global_random_untouched():
            self.attached: Attached = subject.put(model)
        self.modes = {module.training for module in self.attached.model.modules()}
        self.parameters = sum(p.numel() for p in self.attached.trained().values())
        self.start = self.state()
        """The state before training."""
        self.step0 = difference(logits(self.attached.model, ids), self.pretrained)
        held = {name: p for name, p in self.attached.model.named_parameters() if not p.requires_grad}
        frozen = {name: p.detach().clone() for name, p in held.items()}
        self.first_loss = self.last_loss = loss_of(self.attached)
        self.losses: list[float] = []
        """The loss before each step and after the last."""
        self.reached: set[str] = set()
        if self.attached.trained():
            self.losses, self.reached = train(self.attached, subject.learning_rate, halfway=self._pause)
            self.last_loss = self.losses[-1]
        self.thawed = [name for name, p in held.items() if difference(p, frozen[name]) > 0]
        """Names of frozen parameters that training changed."""
        self.tuned: Tensor = logits(self.attached.model, ids)

    def _pause(self, optimizer: Optimizer) -> None:
        """Keep what an interrupted training would keep."""
        self.halfway = self.state()
        self.moments: dict[int, dict[str, Any]] = copy.deepcopy(optimizer.state_dict()["state"])
        self.stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]

    @cached_property
    def saved(self) -> Path:
        """The checkpoint, written when first asked for."""
        path = self.directory / "checkpoint"
        self.attached.save(path)
        return path

    def restored(self) -> Attached:
        """Return the checkpoint on a fresh model, to be used up."""
        return self.subject.make().restore(self.subject.model(), self.saved)

    @cached_property
    def reread(self) -> Attached:
        """The checkpoint on a model, restored when first asked for; not to be changed."""
        return self.restored()

    @cached_property
    def double(self) -> Attached:
        """A new attachment with the same state, made when first asked for; not to be changed.

        Its seed is another, unless attaching writes to the base: then rounding makes it another model.
        """
        return self.twin(seed=0 if self.subject.has(Capability.CHANGES_BASE) else OTHER_SEED)

    @cached_property
    def deltas(self) -> dict[str, Tensor | None]:
        """What the trained attachment gives as the change of every linear weight."""
        return {name: self.attached.delta(name) for name in linear_weights(self.subject.untouched())}

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the trained state."""
        return {name: tensor.clone() for name, tensor in self.attached.state().items()}

    def twin(self, seed: int = 0) -> Attached:
        """Return a new attachment with the same state, to be used up."""
        other = self.subject.attach(seed=seed)
        other.load_state(self.state())
        return other

    def facts(self) -> Facts:
        """Return what was measured."""
        return Facts(
            parameters=self.parameters,
            step0_difference=self.step0,
            disabled_difference=self.seen.get("disabled"),
            reload_difference=self.seen.get("reload"),
            merge_difference=self.seen.get("merge"),
            first_loss=self.first_loss,
            last_loss=self.last_loss,
        )


class Trial:
    """A method, its settings, and its life on five models: untied, tied, with odd sizes, with biases, in bfloat16."""

    def __init__(
        self,
        method: str | type[Method] | Method,
        config: Mapping[str, Any] | None = None,
        *,
        directory: Path | None = None,
        learning_rate: float = 5e-3,
        awkward: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare a try; see :func:`peft_arena.testing.methods.check_method`."""
        if isinstance(method, Method):
            assert config is None, "a method instance brings its settings; give no config"
            config = method.config.model_dump()
            method = type(method)
        kind: type[Method] = METHODS.get(method) if isinstance(method, str) else method
        self.plain = Subject(kind, dict(config or {}), learning_rate=learning_rate)
        self.odd = replace(self.plain, kind="awkward", config=self.plain.config if awkward is None else awkward)
        self.subjects = {
            "untied": self.plain,
            "tied": replace(self.plain, kind="tied"),
            "awkward": self.odd,
            "biased": replace(self.plain, kind="biased"),
            "bfloat16": replace(self.plain, dtype="bfloat16"),
        }
        self._scratch = tempfile.TemporaryDirectory(prefix="peft-arena-", ignore_cleanup_errors=True)
        self._directory = directory or Path(self._scratch.name)
        self._lives: dict[str, Life] = {}
        self.kept: dict[str, Any] = {}
        """What the method did with each setting changed, see :mod:`peft_arena.testing.alternatives`."""

    @property
    def name(self) -> str:
        """The method's name."""
        return self.plain.method.card.name

    def source(self) -> str:
        """Return the package that the method is from, with its version where that is known."""
        package = self.plain.method.__module__.partition(".")[0]
        if package == __name__.partition(".")[0]:
            return f"{OURS} {__version__}"
        return (METHODS.plugin(self.name) if self.name in METHODS else None) or package

    @property
    def plain_models(self) -> bool:
        """Whether the method takes models with plain weights, which all of these are."""
        return not self.plain.has(Capability.NEEDS_QUANTIZED_BASE)

    def life(self, name: str) -> Life:
        """Return the life on one of the models."""
        if name not in self._lives:
            self._lives[name] = Life(self.subjects[name], Path(tempfile.mkdtemp(dir=self._directory)))
        return self._lives[name]

    def forget(self) -> None:
        """Drop every life: a check that failed may have left it in any state."""
        self._lives.clear()
        self.kept.clear()

    def facts(self) -> dict[str, Facts]:
        """Return what was measured, by model."""
        return {name: life.facts() for name, life in self._lives.items()}


def on_each_model(check: Callable[[Life], str | None]) -> Callable[[Trial], dict[str, str]]:
    """Make a check of one life into one of a trial; a failure names the model.

    Returns:
        A check that returns, by model, why it was not tested there.
    """

    @wraps(check)
    def run(trial: Trial) -> dict[str, str]:
        left: dict[str, str] = {}
        for name in trial.subjects:
            try:
                reason = check(trial.life(name))
            except (AssertionError, UserError) as error:
                raise AssertionError(f"on the {name} model: {error}") from error
            if reason:
                left[name] = reason
        return left

    return run


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every linear module, by the module's name."""
    from torch import nn

    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
