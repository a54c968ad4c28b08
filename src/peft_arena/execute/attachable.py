"""Whether a method can be put on a study's model, found before any work: on the architecture, without weights.

What training would refuse is refused by a plan in the same words. A method is attached to the model on the meta device
and a forward pass is run, and one as in training. Where that asks for values that are not there, nothing is known from
it; a model that is small is then made with random weights and tried. What was found is kept on disk.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from peft_arena import __version__
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id
from peft_arena.core.specs import MethodSpec, ModelSpec
from peft_arena.cost.counts import is_shipped
from peft_arena.methods.adaptable import look_at
from peft_arena.methods.base import Attached, Calibration, Capability, Method
from peft_arena.models.architecture import config_at_hand
from peft_arena.models.assets import cache_root, keep, kept

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SMALL = 4_000_000
"""Parameters of a model that is made with random weights where shapes alone do not tell."""
DATA = "calibration_examples"
"""The setting that a method names where the calibration data does not do."""
TRIAL = 2
"""Of what is tried; what an older trial found does not count."""
LIBRARIES = ("torch", "transformers", "peft")
ROWS, TOKENS = 2, 8
"""Of the forward pass; calibration gets rows of the same length."""
SHOWN = 64
"""Most rows of a batch of calibration: a method may ask for thousands."""


class Attachable:
    """Tries methods on one model, whose architecture is built when it is first needed."""

    def __init__(self, model: ModelSpec) -> None:
        """Refer to a model, pinned."""
        self.spec = model
        self._found: dict[str, str] = {}

    def refusal(self, method: Method, spec: MethodSpec) -> str:
        """Return why a method cannot be attached to the model; empty if it can, or if that cannot be known here.

        Args:
            method: with all its settings.
            spec: the same as it is written down.
        """
        if self.spec.new_tokens or self._config is None or is_shipped(self._config, spec):
            return ""
        key = content_id([TRIAL, self._config, self.spec.dtype, spec.model_dump(mode="json"), *map(version, LIBRARIES)])
        if key not in self._found:
            file = cache_root() / "attachable" / __version__ / f"{key}.json"
            said = kept(file).get("refused")
            if not isinstance(said, str):
                said = self._quietly_tried(method)
                keep(file, {"refused": said})
            self._found[key] = said
        return self._found[key]

    @cached_property
    def _config(self) -> Mapping[str, Any] | None:
        """The model's configuration, if it is on this disk."""
        try:
            return config_at_hand(self.spec)
        except UserError:
            return None

    @cached_property
    def _architecture(self) -> PreTrainedModel | None:
        import torch

        from peft_arena.models.load import skeleton

        try:
            model: Any = skeleton(self.spec)
        except UserError:
            return None  # which loading it says in its own words
        return model.to(getattr(torch, self.spec.dtype)).eval()

    @cached_property
    def _untouched(self) -> PreTrainedModel | None:
        """A copy of the architecture that nothing is attached to."""
        return copy.deepcopy(self._architecture)

    def _quietly_tried(self, method: Method) -> str:
        from peft_arena.models.stored import unreported

        with unreported():
            return self._tried(method)

    def _tried(self, method: Method) -> str:
        if self._architecture is None or self._untouched is None or Capability.TRAINS not in method.card.capabilities:
            return ""
        model = copy.deepcopy(self._architecture)
        look_at(self._untouched, for_model=model)
        refused = on_shapes(method, model)
        if refused is not None:
            return refused
        if sum(p.numel() for p in self._architecture.parameters()) > SMALL:
            return ""
        return on_stand_in(method, self._architecture)


def on_shapes(method: Method, model: PreTrainedModel) -> str | None:
    """Return why a method cannot be attached to a model on the meta device; empty if it can, None: not known.

    What a library refuses counts only if a plain Llama takes the method without weights: else it is their lack.

    Args:
        method: with its settings.
        model: to be used up.
    """
    refused = _without_weights(method, model)
    if refused is None or refused.__cause__ is None:
        return "" if refused is None else str(refused)
    if isinstance(refused.__cause__, _ValuelessError) or _without_weights(method, _plain_llama()) is not None:
        return None
    return str(refused)


class _ValuelessError(Exception):
    """Something hung on values, and there are none."""


def _without_weights(method: Method, model: PreTrainedModel) -> UserError | None:
    import torch

    from peft_arena.methods.imagined import imagined

    with imagined(model) as mode, torch.device("meta"):
        try:
            attached = _attach(method, model)
            mode.answered = 0  # what a forward pass asks is which tokens count, and no choice of a method's
            _run(method, attached)
        except UserError as error:
            cause = error.__cause__
            if mode.answered or isinstance(cause, NotImplementedError) or "meta" in str(cause or "").lower():
                error.__cause__ = _ValuelessError()
            return error
    return None


def _plain_llama() -> PreTrainedModel:
    """Return a Llama of usual widths and two blocks on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2)).eval()


def on_stand_in(method: Method, architecture: PreTrainedModel) -> str:
    """Return why a method cannot be attached to a model of an architecture with random weights; empty if it can.

    A refusal for the sake of :data:`DATA` says nothing: the data is made up too.
    """
    import torch

    from peft_arena.methods.state import local_random

    kind: Any = type(architecture)
    try:
        with local_random(0):
            with torch.device("cpu"):
                model = kind._from_config(copy.deepcopy(architecture.config), dtype=architecture.dtype).eval()
            _run(method, _attach(method, model))
    except UserError as error:
        return "" if str(error).startswith(DATA) else str(error)
    return ""


def _attach(method: Method, model: PreTrainedModel) -> Attached:
    wanted = method.calibration_examples
    ids = _ids(model, rows=max(ROWS, min(SHOWN, wanted)))
    shown = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape), "labels": ids}
    batches = [shown] * -(-wanted // len(ids))
    return method.attach(model, seed=0, calibration=Calibration(batches) if wanted else None)


def _run(method: Method, attached: Attached) -> None:
    import torch

    from peft_arena.methods.boundary import one_line

    model = attached.model
    ids = _ids(model)
    with torch.no_grad():
        for doing, mode in (("attached to", False), ("trained on", True)):  # models have code that only training runs
            with one_line(method.card.name, doing, model):
                model.train(mode)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    model.eval()


def _ids(model: nn.Module, rows: int = ROWS) -> Tensor:
    import torch

    return torch.arange(1, TOKENS + 1, device=next(model.parameters()).device).repeat(rows, 1)
