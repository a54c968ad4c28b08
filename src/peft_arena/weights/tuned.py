"""A fine-tuned point by its files: its weights, or the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError
from peft_arena.core.foreign import reading
from peft_arena.core.specs import MethodSpec, ModelSpec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from peft_arena.methods.base import Method
    from peft_arena.models.load import Loaded
    from peft_arena.weights.effective import EffectiveWeights

CIRCUMSTANCES = frozenset(
    {
        *("architectures", "dtype", "torch_dtype", "transformers_version", "auto_map", "use_cache", "return_dict"),
        *("tie_word_embeddings", "max_position_embeddings", "n_positions", "n_ctx", "max_window_layers"),
        *("initializer_range", "pretraining_tp", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef"),
    }
)
"""Settings of a model that say nothing of how its output comes from its weights, besides those :func:`_computes` names;
weights that are tied are compared themselves."""


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned point: where its files are and what they are put on."""

    base: ModelSpec
    """The pretrained model, pinned."""
    directory: Path | None
    """None: the pretrained model itself."""
    method: MethodSpec | None
    """None: a plain PEFT adapter directory or a plain model directory, told by its files."""
    subject: str
    """Run id, or the path as given."""
    step: int | None
    factor: float = 1.0
    """Where on the way from the pretrained model (0) to the tuned one (1)."""
    start: Tuned | None = None
    """What training began at: its weights are merged into the pretrained model, and the method is put on the result.
    None: the pretrained model itself."""
    start_sha256: str | None = None
    """Hash of that model by the training record, see :mod:`peft_arena.weights.start`; None: not known."""

    def weights(self) -> EffectiveWeights:
        """Return the weights of this point, whose change is that from the pretrained model in any case.

        Raises:
            UserError: the method has no weights of its own, or the files are missing, damaged or do not fit.
        """
        from peft_arena.weights.base import base_weights
        from peft_arena.weights.effective import effective_weights, no_weights
        from peft_arena.weights.start import weights_from

        method = self._method()
        if method is not None:
            reason = no_weights(method)
            if reason:
                raise UserError(f"method {method.card.name} has no weights to look at: {reason}")
        elif self.directory is not None and not self.has_weights():
            raise UserError(f"{self.directory} has no weights to look at: adapters of its type cannot be merged")
        base = base_weights(self.base)
        if self.start is None:
            found = effective_weights(base, self.directory, method)
        else:
            own = partial(effective_weights, directory=self.directory, method=method)
            found = weights_from(base, self.start, self.start_sha256, own)
        return found if self.factor == 1.0 else found.interpolated(self.factor)

    def has_weights(self) -> bool:
        """Say whether :meth:`weights` can work, by the method's capabilities or the adapter's type; reads none."""
        from peft_arena.weights.effective import no_weights

        method = self._method()
        if method is not None:
            return not no_weights(method)
        return self.directory is None or not _changes_input(self.directory)

    def model(self, loaded: Loaded) -> nn.Module:
        """Return the tuned model in evaluation mode.

        Args:
            loaded: the pretrained model, freshly loaded; it is changed or wrapped.

        Raises:
            UserError: the files are missing, damaged or do not fit; or the factor is not 1 and the method has no
                weights.
        """
        if self.directory is None:
            return loaded.model.eval()
        method = self._method()
        if self.factor == 1.0 and method is not None:
            if self.start is not None:
                from peft_arena.weights.start import put_start

                put_start(self.start, loaded.model, self.start_sha256)
            return method.restore(loaded.model, self.directory).model.eval()
        if self.factor == 1.0 and (self.directory / "adapter_config.json").exists():
            from peft_arena.weights.base import BaseWeights
            from peft_arena.weights.merging import foreign_adapter

            return foreign_adapter(BaseWeights.of_model(loaded.model), loaded.model, self.directory)
        if method is None and (self.directory / "config.json").exists():
            check_settings(self.directory, loaded.model.config)
        self.weights().load_into(loaded.model)
        return loaded.model.eval()

    def _method(self) -> Method | None:
        from peft_arena.methods.registry import method_of

        return None if self.method is None else method_of(self.method)


def check_settings(directory: Path, base: PreTrainedConfig) -> None:
    """Check that a model directory computes as the base does: its weights are measured inside the base's model.

    Raises:
        UserError: its configuration cannot be read, or differs in a setting such as the base of its rotary positions.
    """
    from transformers import AutoConfig

    with reading(f"{directory / 'config.json'} is damaged"):
        own = AutoConfig.from_pretrained(str(directory), local_files_only=True).to_dict()
    wanted = base.to_dict()
    for name in sorted(own.keys() & wanted.keys()):  # a name that only one has is read by neither's code
        given, needed = _computes(name, own[name]), _computes(name, wanted[name])
        if given != needed:
            raise UserError(
                f"{directory} is no tuned version of this model: {name} is {given} there and {needed} in the "
                "pretrained model, whose activations would not be its own"
            )


def _computes(name: str, value: Any) -> Any:
    """Return the value of a setting without what says nothing of how a model computes."""
    circumstance = name in CIRCUMSTANCES or name.endswith(("_token_id", "dropout", "drop"))
    if circumstance or name.startswith("_"):
        return None
    return {key: _computes(str(key), held) for key, held in value.items()} if isinstance(value, dict) else value


def _changes_input(directory: Path) -> bool:
    """Say whether an adapter is of a type that no change of weights stands for; peft cannot merge those."""
    try:
        table = read_table(directory / "adapter_config.json")
        kind: Any = str(table["peft_type"])  # any text may stand there
    except (UserError, KeyError):
        return False
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    return tuner is not None and (not hasattr(tuner, "merge_and_unload") or bool(table.get("alora_invocation_tokens")))
