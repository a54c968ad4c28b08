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
from peft_arena.assets.wheel_files import cache_root, keep, kept
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id
from peft_arena.core.specs import MethodSpec, ModelSpec
from peft_arena.cost.counts import is_shipped
from peft_arena.methods.adaptable import look_at
from peft_arena.methods.base import Attached, Calibration, CalibrationError, Capability, Method
from peft_arena.models.load import config_at_hand

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SMALL = 4_000_000
"""Parameters of a model that is made with random weights where shapes alone do not tell."""
TRIAL = 4
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

    What a library refuses counts only if the model runs without weights, and a plain model takes the method without
    weights: else it is their lack. So too where the made-up calibration data does not do.

    Args:
        method: with its settings.
        model: to be used up.
    """
    from peft_arena.models.load import usual_skeleton

    bare = copy.deepcopy(model)
    refused, asked = _without_weights(method, model)
    if refused is None:
        return ""
    if asked or isinstance(refused, CalibrationError):
        return None
    if refused.__cause__ is None:
        return str(refused)
    if isinstance(refused.__cause__, NotImplementedError) or not _runs_bare(bare):
        return None
    return str(refused) if _without_weights(method, usual_skeleton())[0] is None else None


def _without_weights(method: Method, model: PreTrainedModel) -> tuple[UserError | None, bool]:
    """Return what a method refuses of a model on the meta device, and whether values were asked for that are not there.

    What attaching asked for does not count once it has succeeded.
    """
    import torch

    from peft_arena.methods.imagined import imagined

    with imagined(model) as mode, torch.device("meta"):
        try:
            attached = _attach(method, model)
            mode.answered = 0
            _run(method.card.name, attached.model)
        except UserError as error:
            return error, mode.answered > 0
    return None, False


def _runs_bare(model: PreTrainedModel) -> bool:
    """Say whether a model on the meta device runs without any method."""
    import torch

    from peft_arena.methods.imagined import imagined

    with imagined(model), torch.device("meta"):
        try:
            _run("", model)
        except UserError:
            return False
    return True


def on_stand_in(method: Method, architecture: PreTrainedModel) -> str:
    """Return why a method cannot be attached to a model of an architecture with random weights; empty if it can.

    A refusal of the calibration data says nothing: the data is made up too.
    """
    import torch

    from peft_arena.methods.state import local_random

    kind: Any = type(architecture)
    try:
        with local_random(0):
            with torch.device("cpu"):
                model = kind._from_config(copy.deepcopy(architecture.config), dtype=architecture.dtype).eval()
            _run(method.card.name, _attach(method, model).model)
    except CalibrationError:
        return ""
    except UserError as error:
        return str(error)
    return ""


def _attach(method: Method, model: PreTrainedModel) -> Attached:
    wanted = method.calibration_examples
    ids = _ids(model, rows=max(ROWS, min(SHOWN, wanted)))
    shown = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape), "labels": ids}
    batches = [shown] * -(-wanted // len(ids))
    return method.attach(model, seed=0, calibration=Calibration(batches) if wanted else None)


def _run(method: str, model: nn.Module) -> None:
    """Run a model in both modes; what a library refuses names the method."""
    import torch

    from peft_arena.methods.boundary import one_line

    ids = _ids(model)
    with torch.no_grad():
        for doing, mode in (("attached to", False), ("trained on", True)):  # models have code that only training runs
            with one_line(method, doing, model):
                model.train(mode)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    model.eval()


def _ids(model: nn.Module, rows: int = ROWS) -> Tensor:
    import torch

    return torch.arange(1, TOKENS + 1, device=next(model.parameters()).device).repeat(rows, 1)
