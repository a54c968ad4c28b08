"""How long the user's own data is, in tokens of the model: measured for a plan where the tokenizer is at hand.

At hand are the tokenizers of packaged and local models, of models in the hub's cache and of converted wheels; nothing
is fetched. Elsewhere four characters are taken for a token. As a tokenizer takes seconds to import, what was measured
is kept in the cache on disk, under a name that changes with the data, the model and every setting that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena import __version__
from peft_arena.assets.wheel_files import cache_root, keep, kept
from peft_arena.core.bounded import user_path
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id
from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, RLSpec, TrainSpec
from peft_arena.methods.registry import method_of
from peft_arena.models.chat import RENDERING, configure
from peft_arena.models.extend import add_tokens
from peft_arena.models.load import (
    PACKAGED,
    Source,
    config_at_hand,
    is_commit,
    is_pinned_remote,
    load_tokenizer,
    resolve,
)
from peft_arena.models.render import encode_prompt
from peft_arena.models.wheels import CONVERSION, WHEEL_MODELS
from peft_arena.store.checkpoint import DONE
from peft_arena.study.known_data import known_items, task_at_hand
from peft_arena.tasks.base import Item, Prompt, Task
from peft_arena.train.data import Example, read_examples
from peft_arena.train.prompts import read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 1000
"""Items that are looked at, the first of a split; all where a refusal depends on it."""
CHARACTERS = 4.0
"""Characters that are taken for a token where the model's tokenizer is not at hand."""


class Lengths(NamedTuple):
    """Tokens of some items of a task."""

    items: int
    """That were looked at."""
    there: int
    """That there are."""
    prompt: float
    """Mean tokens of a prompt."""
    answer: float
    """Mean tokens of a gold answer, its end included."""
    longest: int
    """Of prompt and answer together."""
    example: float
    """Mean tokens of a training example, padding included; of an evaluation that of prompt and answer."""
    dropped: int
    """Items among these that are too long: left out of training, or without a score."""
    counted: bool
    """Whether the model's tokenizer counted; else characters were."""

    @property
    def how(self) -> str:
        """Say what the numbers are from."""
        by = "" if self.counted else f", {CHARACTERS:g} characters taken for a token"
        which = f"all {self.there:,}" if self.items == self.there else f"{self.items:,} of the {self.there:,}"
        return f"from {which} items of its split{by}"


def context_at_hand(model: ModelSpec, method: MethodSpec | None = None) -> int | None:
    """Return how many tokens prompt and answer may have together, by the model's configuration; None if not known.

    Args:
        model: pinned.
        method: whose virtual tokens take their room from it; None for the model itself.

    Raises:
        UserError: the model's own files cannot be found, or its configuration is damaged.
    """
    limit = _context(model)
    if limit is None or method is None:
        return limit
    return limit - method_of(method).virtual_tokens


@lru_cache(maxsize=8)
def _context(model: ModelSpec) -> int | None:
    config = config_at_hand(model) or {}
    sizes = (config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx"))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def training_lengths(model: ModelSpec, train: TrainSpec | RLSpec, room: int | None) -> Lengths | None:
    """Return the tokens of what a run is trained on; None unless it is a file of the user's.

    Args:
        model: pinned.
        train: how the run is trained.
        room: the model's context, less the method's virtual tokens; None if no limit is known.

    Raises:
        UserError: what the training itself would refuse: nothing is left, something is too long and may not be, a
            prompt cannot be rendered, an answer is empty.
    """
    task = task_at_hand(train.task)
    if task is None or not task.reads_files:
        return None
    limit = train.max_length if room is None else max(min(train.max_length, room), 1)
    fields = {"examples", "overlong", "micro_batch_size", "batch_size", "max_new_tokens", "packing", "group_by_length"}
    settings = train.model_dump(mode="json", include={*fields, "objective", "loss_on"})

    def measure(tokenizer: PreTrainedTokenizerBase | None) -> Lengths:
        items = task.items("train")[: train.examples]
        if tokenizer is None:
            return _by_characters(task, items)
        read = _reading(task, train, tokenizer, limit)
        count = min(len(items), SAMPLE)
        try:
            return read(count, len(items))
        except UserError:
            if count == len(items):
                raise
            return read(len(items), len(items))

    return _kept(["train", train.task.id, settings, limit], model, measure)


def evaluation_lengths(model: ModelSpec, spec: EvalSpec, room: int | None) -> Lengths | None:
    """Return the tokens of what an evaluation asks, with the gold answers; None unless it is a file of the user's.

    Args:
        model: pinned.
        spec: which items of which task.
        room: the model's context, in which prompt and longest answer must find place; None if no limit is known.

    Raises:
        UserError: a prompt cannot be rendered.
    """
    task = task_at_hand(spec.task)
    if task is None or not task.reads_files:
        return None

    def measure(tokenizer: PreTrainedTokenizerBase | None) -> Lengths:
        items = (known_items(spec.task, spec.split) or ())[: spec.items]
        if tokenizer is None:
            return _by_characters(task, items)
        longest = task.generation.max_new_tokens
        sizes = []
        for item in items[:SAMPLE]:
            answer = tokenizer.encode(task.target(item), add_special_tokens=False)
            sizes.append((len(encode_prompt(tokenizer, task.prompt(item))), len(answer) + 1))
        outside = sum(room is not None and prompt + longest > room for prompt, _ in sizes)
        return _lengths(sizes, len(items), len(sizes), outside)

    return _kept(["evaluation", spec.task.id, spec.split, spec.items, room], model, measure)


def _reading(
    task: Task, train: TrainSpec | RLSpec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> Callable[[int, int], Lengths]:
    """Return what reads the first so many of all items, as the training itself does."""

    def read(count: int, there: int) -> Lengths:
        if isinstance(train, RLSpec):
            prompts = read_prompts(task, "train", count, tokenizer, train, limit)
            pairs = [(len(one.ids), _answer_tokens(task, one.item, tokenizer)) for one in prompts.kept]
            return _lengths(pairs, there, count, prompts.dropped)
        examples = read_examples(task, "train", count, tokenizer, train, limit)
        sizes = [(len(example.ids) - example.labels, example.labels) for example in examples.kept]
        return _lengths(sizes, there, count, examples.dropped, _padded(examples.kept, train))

    return read


def _answer_tokens(task: Task, item: Item, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.encode(task.target(item), add_special_tokens=False)) + 1


def _padded(examples: Sequence[Example], train: TrainSpec) -> float:
    """Return the mean tokens of an example with the padding of its forward pass."""
    sizes = [len(example.ids) for example in examples]
    if train.packing or train.group_by_length:
        return fmean(sizes)
    rows = train.micro_batch_size or train.batch_size
    passes = [sizes[start : start + rows] for start in range(0, len(sizes), rows)]
    return sum(max(one) * len(one) for one in passes) / len(sizes)


def _lengths(
    sizes: Sequence[tuple[int, int]],
    there: int,
    looked: int,
    dropped: int,
    example: float | None = None,
    counted: bool = True,
) -> Lengths:
    both = [prompt + answer for prompt, answer in sizes]
    return Lengths(
        items=looked,
        there=there,
        prompt=fmean(prompt for prompt, _ in sizes),
        answer=fmean(answer for _, answer in sizes),
        longest=max(both),
        example=fmean(both) if example is None else example,
        dropped=dropped,
        counted=counted,
    )


def _by_characters(task: Task, items: Sequence[Item]) -> Lengths:
    sizes = [
        (max(round(characters_of(task.prompt(item)) / CHARACTERS), 1), round(len(task.target(item)) / CHARACTERS) + 1)
        for item in items[:SAMPLE]
    ]
    return _lengths(sizes, len(items), len(sizes), 0, counted=False)


def characters_of(prompt: Prompt) -> int:
    """Return the characters of a prompt, of all its turns."""
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def _kept(key: list[Any], model: ModelSpec, measure: Callable[[PreTrainedTokenizerBase | None], Lengths]) -> Lengths:
    """Return what was measured before, or measure it."""
    return Lengths(**kept_table([*key, SAMPLE], model, lambda tokenizer: measure(tokenizer)._asdict()))


def kept_table(
    key: list[Any], model: ModelSpec, measure: Callable[[PreTrainedTokenizerBase | None], dict[str, Any]]
) -> dict[str, Any]:
    """Return a table of JSON values that was made before for a model, or make it.

    Args:
        key: JSON values that change with everything the table depends on besides the model.
        model: pinned.
        measure: makes the table with the model's tokenizer; it is not kept where the tokenizer is not at hand.
    """
    name = content_id([*key, model.model_dump(mode="json")])
    file = cache_root() / "lengths" / f"{__version__}-{RENDERING}" / f"{name}.json"
    held = kept(file)
    if held:
        return held
    tokenizer = tokenizer_at_hand(model)
    table = measure(tokenizer)
    if tokenizer is not None:
        keep(file, table)
    return table


def tokenizer_at_hand(model: ModelSpec) -> PreTrainedTokenizerBase | None:
    """Return a model's tokenizer if its files are on this machine; None if they are not, or cannot be read.

    Args:
        model: pinned.
    """
    source = _source_at_hand(model)
    return None if source is None else _loaded(source, model)


@lru_cache(maxsize=4)
def _loaded(source: Source, model: ModelSpec) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = configure(load_tokenizer(source), model, model.rendering)
    except (OSError, ValueError):
        return None
    if model.new_tokens:
        add_tokens(tokenizer, model.new_tokens)
    return tokenizer


def _source_at_hand(model: ModelSpec) -> Source | None:
    """Return where a model's files are, if that is here."""
    if not is_pinned_remote(model):
        local = model.name in PACKAGED or user_path(model.name).is_dir()
        return resolve(model) if local else None
    if is_commit(model.revision):
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(model.name, "tokenizer_config.json", revision=model.revision)
        return Source("path", str(Path(file).parent), None) if isinstance(file, str) else None
    wheel = WHEEL_MODELS[model.name].wheel
    folder = cache_root() / "models" / f"{model.name.rsplit('/', 1)[-1]}-{wheel.sha256[:12]}-v{CONVERSION}"
    return Source("path", str(folder), None) if (folder / DONE).exists() else None
