"""A fine-tuned point by its files: its weights, or the model itself; also where its training began at another point.

The other point's weights are read as :mod:`peft_arena.weights.effective` reads them, added up in float32 and rounded to
the model's type, in one thread, so that the sums do not depend on how many there are. A hash over the result is in the
training record, and whatever puts the run's own weights on that model checks it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError
from peft_arena.core.foreign import reading
from peft_arena.core.specs import MethodSpec, ModelSpec
from peft_arena.methods.base import no_weights
from peft_arena.methods.files import SETTINGS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from peft_arena.methods.base import Method
    from peft_arena.models.load import Loaded
    from peft_arena.weights.adapter_directory import Maker
    from peft_arena.weights.base import BaseWeights
    from peft_arena.weights.change import Change
    from peft_arena.weights.effective import EffectiveWeights

OwnWeights = Callable[["BaseWeights"], "EffectiveWeights"]
"""From the weights that training began at to those it led to."""
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
    """Hash of that model by the training record, see :func:`put_start`; None: not known."""

    def weights(self) -> EffectiveWeights:
        """Return the weights of this point, whose change is that from the pretrained model in any case.

        Raises:
            UserError: the method has no weights of its own, or the files are missing, damaged or do not fit.
        """
        from peft_arena.weights.base import base_weights
        from peft_arena.weights.effective import effective_weights

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
                put_start(self.start, loaded.model, self.start_sha256)
            return method.restore(loaded.model, self.directory).model.eval()
        if self.factor == 1.0 and (self.directory / SETTINGS).exists():
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


def restored(point: Tuned) -> Callable[[PreTrainedModel], nn.Module]:
    """Return what makes the tuned model, as the method itself restores it, from the pretrained one."""

    def make(model: PreTrainedModel) -> nn.Module:
        from peft_arena.models.load import Loaded

        return point.model(Loaded(point.base, model, None, "path"))  # type: ignore[arg-type]

    return make


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
        table = read_table(directory / SETTINGS)
        kind: Any = str(table["peft_type"])  # any text may stand there
    except (UserError, KeyError):
        return False
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    return tuner is not None and (not hasattr(tuner, "merge_and_unload") or bool(table.get("alora_invocation_tokens")))


def put_start(source: Tuned, model: PreTrainedModel, wanted: str | None) -> str:
    """Merge a point into a model, in place.

    Args:
        source: the point.
        model: the pretrained model, freshly loaded; it is then named after the point.
        wanted: the hash it must have after that; None: not known yet.

    Returns:
        Its hash.

    Raises:
        UserError: the point has no weights or adds parameters, its files are missing or damaged, or the hash is
            another one.
    """
    merged = Merged(source)
    merged.put_into(model)
    tensors = ((name, tensor.detach().cpu()) for name, tensor in _of_model(model))
    found = _hash(tensors, merged.base.dtype)
    _check(source, found, wanted)
    return found


def name_of(source: Tuned) -> str:
    """Return what a model begun at a point is called, also in the checkpoints of what is trained on it."""
    return f"{source.subject}@{source.step}"


class Merged:
    """A point as if it were a pretrained model: one parameter at a time, or loaded."""

    def __init__(self, source: Tuned) -> None:
        """Open the files of a point.

        Raises:
            UserError: it has no weights, its files are missing or damaged, or it adds parameters to the architecture.
        """
        from peft_arena.weights.base import BaseWeights

        with one_thread():
            weights = source.weights()
        if weights.changes.added:
            raise UserError(
                f"no training can begin at {name_of(source)}: it adds {len(weights.changes.added)} parameters to the "
                f"model, e.g. {next(iter(weights.changes.added))}"
            )
        before = weights.base_weights
        self.changed = tuple(weights.changes.makers)
        """Every parameter that the point may change."""
        self.base = BaseWeights(
            before.architecture, before.dtype, partial(_tuned, weights), lambda: self.put_into(before.load())
        )
        """Its parameters, rounded to the model's type."""
        self._name = name_of(source)

    def put_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a pretrained model with the values of the point, in place, and named after it."""
        import torch

        held = dict(model.named_parameters())
        with torch.no_grad():
            for name in self.changed:
                held[name].copy_(self.base.tensor(name))
        model.name_or_path = model.config.name_or_path = self._name
        return model


def _tuned(weights: EffectiveWeights, name: str) -> Tensor:
    with one_thread():
        before, change = weights.parameter(name)
        return before if change is None else before + change.dense(before)


def weights_from(base: BaseWeights, source: Tuned, wanted: str | None, own: OwnWeights) -> EffectiveWeights:
    """Return the weights of a point whose training began at another one, as a change of the pretrained weights.

    The change is W1 - W0 in total: what the other run did, and on top of it what this one did. It is a matrix without
    a structure, and its path the straight one.

    Args:
        base: the pretrained weights.
        source: the point that training began at.
        wanted: the hash of the model it began at; None: not known.
        own: reads the point's own checkpoint on the weights that training began at.

    Raises:
        UserError: files of either are missing or damaged, or the hash is another one.
    """
    from peft_arena.weights.adapter_directory import Changes, changed
    from peft_arena.weights.effective import EffectiveWeights

    merged = Merged(source)
    if wanted is not None:
        _check(source, _hash(_of_base(merged.base), merged.base.dtype), wanted)
    last = own(merged.base).changes

    def total(name: str) -> Change | None:
        after, change = merged.base.tensor(name), last.makers.get(name, lambda: None)()
        return changed(after if change is None else after + change.dense(after), base.tensor(name))

    names = [name for name in base.shapes if name in last.makers or name in merged.changed]
    makers: dict[str, Maker] = {name: partial(total, name) for name in names}
    makers |= {name: last.makers[name] for name in last.added}
    return EffectiveWeights(base, Changes(makers, last.added))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread inside the block."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _of_model(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a model, tied ones once, and every buffer that belongs to its files, by name."""
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    yield from sorted({**dict(model.named_parameters()), **buffers}.items())


def _of_base(base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
    """Yield the same of weights that are read one at a time."""
    names = set(base.architecture.state_dict()) - set(base.aliases)
    buffers = {name: tensor for name, tensor in base.load().state_dict().items() if name in names} if names else {}
    for name in sorted({*base.shapes, *buffers}):
        yield name, buffers[name] if name in buffers else base.tensor(name)


def _hash(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """Return the SHA-256 over name, shape and values, floating-point ones in one type."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        held = tensor.to(dtype) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(held.shape)} {held.dtype}\n".encode())
        digest.update(held.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check(source: Tuned, found: str, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        raise UserError(
            f"{name_of(source)} is no longer what training began at: merged into its base it has sha256 {found[:12]}, "
            f"and the training record says {wanted[:12]}; its checkpoint was made anew, or this machine adds up to "
            "other bits; a run that began at it must be moved away and trained anew"
        )
