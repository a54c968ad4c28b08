"""What all methods on the ``peft`` library share: wrapping, saving, restoring, merging and the weight change."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.base import Attached, Calibration, Capability, Method
from peft_arena.methods.files import (
    WEIGHTS,
    check_settings,
    read_settings,
    read_tensors,
    settings_table,
    write_adapter,
)
from peft_arena.methods.state import check_fits, local_random
from peft_arena.methods.targets import check_rank, linear_targets, patterns_for
from peft_arena.methods.whole import prepare_whole, settle_whole, whole_delta, whole_modules, whole_tensors, wrappers
from peft_arena.methods.wrapping import wrap

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ADAPTER = "default"
TASK = "CAUSAL_LM"
PREFIX = "base_model.model."
WEIGHT_ADAPTER = frozenset(
    {
        Capability.TRAINS,
        Capability.LINEAR_DELTA,
        Capability.MERGEABLE,
        Capability.IDENTITY_AT_INIT,
        Capability.ONLINE_RL,
        Capability.PEFT_ADAPTER,
    }
)
"""What most methods can: a change of linear weights that starts at nothing and can be merged."""
EXPECTED_WARNINGS = (
    "Detected that the base layer has no bias term",
    "Unsupported layer type",
    "The PEFT config's `base_model_name_or_path` was renamed",
)
"""What peft says about uses that are meant: biases on models without, norms other than torch's, a renamed model."""


class PeftAttached(Attached):
    """A method of the peft library in place on a model."""

    model: PeftModel

    def __init__(self, method: PeftMethod, model: PeftModel, base: str) -> None:
        """Hold a wrapped model.

        Args:
            method: what was attached.
            model: the wrapped model.
            base: name or path of the pretrained model, written into checkpoints.
        """
        self.method = method
        self.model = model
        self.base = base

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups; parameters that are vectors in all but shape get no weight decay either."""
        if not self.method.trains_vectors:
            return super().parameter_groups(learning_rate, weight_decay)
        return [{"params": list(self.trained().values()), "lr": learning_rate, "weight_decay": 0.0}]

    def save(self, directory: Path) -> None:
        """Write a plain adapter directory."""
        self.write(directory, self.model.peft_config[ADAPTER], stored_tensors(self.model))

    def write(self, directory: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        """Write an adapter directory with the modules that train as a whole.

        Args:
            directory: created if it does not exist.
            config: the adapter's settings.
            tensors: the adapter's own weights by their names in a peft checkpoint.
        """
        whole: Any = config
        if wrappers(self.model):
            whole = copy.copy(config)
            whole.modules_to_save = sorted(wrappers(self.model))
        write_adapter(directory, whole, self.base, {**tensors, **whole_tensors(self.model)})

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Give the pretrained model's outputs inside the block."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield self.model
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def delta(self, module: str) -> Tensor | None:
        """Return tuned minus pretrained weight of one linear module in float32; None where it is unchanged."""
        import torch

        if Capability.LINEAR_DELTA not in self.method.card.capabilities:
            return super().delta(module)
        layer = self.adapted(module)
        if layer is None:
            return whole_delta(self.model, module)
        with torch.no_grad():
            tuned: Any = copy.deepcopy(layer)
            tuned.float()
            before = tuned.get_base_layer().weight.clone()
            tuned.merge()
            change: Tensor = tuned.get_base_layer().weight - before
        return change

    def adapted(self, module: str) -> BaseTunerLayer | None:
        """Return the adapter layer in place of a linear module of the base model; None if it has none.

        Raises:
            UserError: the base model has no linear module of that name.
        """
        from torch import nn

        layers = tuner_layers(self.model)
        if module in layers:
            return layers[module]
        linears = [name for name, found in self.model.get_base_model().named_modules() if isinstance(found, nn.Linear)]
        if module not in linears and whole_delta(self.model, module) is None:
            raise unknown("linear module", module, {*layers, *linears})
        return None

    def merged(self) -> PreTrainedModel:
        """Return the plain model with the tuned weights: merged in float32, then in the type the base has."""
        import torch

        if Capability.MERGEABLE not in self.method.card.capabilities:
            return super().merged()
        settle_whole(self.model)
        with torch.no_grad():
            for layer in tuner_layers(self.model).values():
                dtype = layer.get_base_layer().weight.dtype
                layer.float()
                layer.merge()
                layer.get_base_layer().to(dtype)
            tuner: Any = self.model.base_model
            model: PreTrainedModel = tuner.unload()
        return model

    def _unsupported(self, what: str) -> Exception:
        return UserError(f"method {self.method.card.name} cannot {what}: its card does not declare it")


class PeftMethod(Method):
    """A method of the peft library: subclasses say which layers it adapts and with which peft configuration."""

    limited_by_rank: ClassVar[bool] = False
    """Whether the setting ``rank`` may not exceed the smaller side of a target."""
    trains_vectors: ClassVar[bool] = False
    """Whether the trained parameters are scales or biases, which get no weight decay whatever their shape."""
    derived_settings: ClassVar[frozenset[str]] = frozenset()
    """Entries of the peft configuration that follow from the seed or the model; a checkpoint's own values are used."""

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the modules to adapt, by name: by default the linear ones of :meth:`linears`.

        Raises:
            UserError: a setting does not fit the model.
        """
        return dict(self.linears(model))

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the linear layers that the settings ``targets`` and ``layers`` name.

        Raises:
            UserError: a setting does not fit the model.
        """
        settings: Any = self.config
        found = linear_targets(model, settings.targets, settings.layers)
        if self.limited_by_rank:
            check_rank(settings.rank, found)
        return found

    @abstractmethod
    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return the peft configuration that stands for the settings.

        Args:
            patterns: names or last parts of names of the modules to adapt.
            seed: of the run.
        """

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the peft configuration of a checkpoint; the same, except where saving changes the adapter's form."""
        return self.peft_config(patterns, seed=0)

    def finish(self, model: PeftModel) -> None:
        """Mend what peft leaves undone on a freshly wrapped model, before any tensor is loaded; usually nothing."""

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment around a wrapped model."""
        return PeftAttached(self, model, base)

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Wrap the model with a new adapter; see :meth:`Method.attach`."""
        layers = self._targets(model)
        base = str(model.name_or_path or "")
        wrapped = self._wrap(model, self.peft_config(patterns_for(model, layers), seed), seed, set(layers))
        return self.hold(wrapped, base)

    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Put a saved adapter on a freshly loaded model, frozen and in evaluation mode; see :meth:`Method.restore`."""
        from peft import set_peft_model_state_dict

        name = self.card.name
        saved = read_settings(directory, name)
        tensors = read_tensors(directory / WEIGHTS, name)
        layers = self._targets(model)
        config: Any = self.stored_config(patterns_for(model, layers))
        self._name_whole(model, config, layers)
        check_settings(saved, settings_table(config), self.derived_settings, name, directory)
        for setting in self.derived_settings:
            setattr(config, setting, saved[setting])
        base = str(model.name_or_path or "")
        wrapped = self._wrap(model, config, 0, set(layers))
        where = str(directory / WEIGHTS)
        check_fits(stored_tensors(wrapped), tensors, where)
        set_peft_model_state_dict(wrapped, tensors)
        loaded = stored_tensors(wrapped)
        if any(not bool((loaded[key] == tensors[key].to(loaded[key].device)).all()) for key in tensors):
            raise UserError(f"{where} could not be put on the model: the values read back differ (not a number?)")
        wrapped.requires_grad_(False)
        wrapped.eval()
        return self.hold(wrapped, base)

    def _targets(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the modules to adapt, refusing a model that has been adapted before."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UserError(f"cannot attach {self.card.name}: the model already has an adapter")
        return self.layers(model)

    def whole(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the modules that train as a whole beside the adapter, by name; by the setting ``modules_to_save``.

        Raises:
            UserError: a setting does not fit the model.
        """
        patterns: tuple[str, ...] = getattr(self.config, "modules_to_save", ())
        return whole_modules(model, patterns, self.layers(model)) if patterns else {}

    def trained_count(self, model: PreTrainedModel) -> int | None:
        """Return :meth:`count` with the modules that train as a whole; see :meth:`Method.trained_count`."""
        own = self.count(model)
        if own is None:
            return None
        return own + sum(p.numel() for module in self.whole(model).values() for p in module.parameters())

    def _name_whole(self, model: PreTrainedModel, config: Any, adapted: Collection[str]) -> list[str]:
        """Write the names of the modules that train as a whole into a peft configuration, and return them."""
        patterns: tuple[str, ...] = getattr(self.config, "modules_to_save", ())
        names = sorted(whole_modules(model, patterns, adapted)) if patterns else []
        if names:
            config.modules_to_save = names
        return names

    def _wrap(self, model: PreTrainedModel, config: PeftConfig, seed: int, wanted: set[str]) -> PeftModel:
        training = model.training
        whole = self._name_whole(model, config, wanted)
        with local_random(seed), warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            wrapped = wrap(model, config)
        adapted = set(tuner_layers(wrapped))
        if adapted != wanted:
            wrong = ", ".join(sorted(adapted ^ wanted)[:3])
            counts = f"{len(adapted)} layers instead of {len(wanted)}"
            raise UserError(f"method {self.card.name} would adapt {counts}; they differ in {wrong}")
        prepare_whole(wrapped, whole)
        self.finish(wrapped)
        wrapped.train(training)
        return wrapped


def tuner_layers(model: PeftModel) -> dict[str, Any]:
    """Return peft's adapter layers by the name of the base module each stands for."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.removeprefix(PREFIX): module for name, module in layers.items()}


def stored_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by the names peft gives them in files."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors
