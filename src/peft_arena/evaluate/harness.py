"""Tasks of lm-eval itself, by name, through the same engine and into the same records."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.task import Task as HarnessTask
from lm_eval.tasks import TaskManager

from peft_arena.core.bounded import user_path
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id
from peft_arena.core.measure import Measure
from peft_arena.core.specs import EvalSpec
from peft_arena.core.text import few
from peft_arena.evaluate.metrics import weighted_mean
from peft_arena.evaluate.session import session
from peft_arena.store.records import ItemRecord, Written
from peft_arena.tasks.base import FRACTION, Kind, Metric, Role, TaskCard
from peft_arena.tasks.foreign import PREFIX, ForeignSettings, check_foreign, packaged_file

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from torch import nn

    from peft_arena.models.load import Loaded

FEWSHOT_SEED = 1234
"""Seeds of lm-eval's command line, so that the few-shot examples are the usual ones."""
RANDOM_SEED = 0
MEMBERS_SHOWN = 20
FRACTIONS = frozenset({"acc", "acc_norm", "acc_mutual_info", "acc_bytes", "exact_match", "f1", "em"})
"""Metrics of lm-eval that are fractions."""
KINDS = {
    "generate_until": Kind.GENERATE,
    "multiple_choice": Kind.CHOICE,
    "loglikelihood": Kind.CHOICE,
    "loglikelihood_rolling": Kind.TEXT,
}


class Chosen(NamedTuple):
    """Keys of the metrics in lm-eval's samples."""

    names: tuple[str, ...]
    """Metric names, the headline first."""
    filter: str


def evaluate_harness(
    loaded: Loaded, model: nn.Module | LM, spec: EvalSpec, batch_size: int | None, progress: bool
) -> tuple[dict[str, Any], tuple[Measure, ...], tuple[ItemRecord, ...], dict[str, Any], Written | None]:
    """Run one task of lm-eval.

    Args:
        loaded: the model's tokenizer and description.
        model: a model, or an engine of lm-eval.
        spec: its task is named ``lm-eval:NAME``; the settings are those of :class:`ForeignSettings`.
        batch_size: rows in one forward pass; None chooses by the model's size.
        progress: show progress bars.

    Returns:
        The card, the measures, the items, the engine's description, and how answers ended where some were written.

    Raises:
        UserError: the name is unknown or a group, a setting does not fit the task, or its data cannot be loaded.
    """
    from lm_eval.evaluator import evaluate as lm_evaluate

    settings = check_foreign(spec.task)
    name = spec.task.name.removeprefix(PREFIX)
    if settings.apply_chat_template and loaded.tokenizer.chat_template is None:
        owner = loaded.tokenizer.name_or_path
        raise UserError(f"the tokenizer of {owner} has no chat template, which {spec.task.name} is to use")
    with _quiet(not progress), _seeded():
        task = _load(name, settings)
        _configure(task, settings, spec)
        chosen = _choose(task, settings.metric, spec.task.name)
        with session(loaded, model, batch_size=batch_size, progress=progress, joint=True) as engine:
            results = lm_evaluate(
                engine,
                {"tasks": {name: task}},
                limit=spec.items,
                bootstrap_iters=0,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.apply_chat_template,
            )
            described = engine.describe() | {"num_fewshot": int(task.get_config("num_fewshot") or 0)}
            samples = [sample for sample in results["samples"][name] if sample["filter"] == chosen.filter]
            reasons = {number: why for (owner, number), why in engine.rejected.items() if owner == name}
            met = sum(count for (owner, number), count in engine.met_limit.items() if number not in reasons)
    card = _card(task, name, chosen, settings)
    items = tuple(_item(sample, chosen, reasons.get(sample["doc_id"])) for sample in samples)
    answered = [sample for sample in samples if sample["doc_id"] not in reasons]
    numbers = tuple(_measure(task, metric, chosen, items, answered) for metric in card.metrics)
    written = None
    if task.OUTPUT_TYPE == "generate_until":
        answers = sum(len(given) for sample in answered for given in sample["resps"])
        written = Written(answers=answers, met_limit=met, limit=settings.max_new_tokens)
    return card.model_dump(mode="json"), numbers, items, described, written


def find(name: str, settings: ForeignSettings) -> tuple[TaskManager, str]:
    """Find a task of lm-eval, without its index of all tasks where the name is also a file's.

    Returns:
        The manager that knows the task, and what it calls it.

    Raises:
        UserError: the name is unknown or a group.
    """
    managers: list[tuple[Any, str]] = []
    if settings.include_path is not None:
        folder = str(user_path(settings.include_path))
        managers.append((TaskManager(include_path=folder, include_defaults=False), name))
    found = next(((manager, key) for manager, key in managers if key in manager.task_index), None)
    if found is None and (path := packaged_file(name)) is not None:
        found = (TaskManager(include_defaults=False), str(path))
    if found is None:
        manager = _all_tasks()
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f" Nearest: {', '.join(near)}" if near else ""
            raise UserError(f"unknown lm-eval task '{name}'.{hint}")
        found = (manager, name)
    manager, key = found
    _refuse_group(manager, name)
    return manager, key


def _load(name: str, settings: ForeignSettings) -> HarnessTask:
    """Build lm-eval's task object."""
    manager, key = find(name, settings)
    try:
        tasks = manager.load([key])["tasks"]
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise UserError(f"cannot load task {PREFIX}{name}: {type(error).__name__}: {first.strip()}") from error
    return next(iter(tasks.values()))


@functools.cache
def _all_tasks() -> TaskManager:
    """Return lm-eval's manager of all its tasks; building its index takes about eight seconds."""
    return TaskManager()


def _refuse_group(manager: TaskManager, name: str) -> None:
    from lm_eval.tasks._index import Kind as EntryKind

    entry = manager.task_index.get(name)
    if entry is None or entry.kind not in {EntryKind.GROUP, EntryKind.TAG}:
        return
    listed = entry.tags if entry.kind is EntryKind.TAG else (entry.cfg or {}).get("task") or []
    members = sorted(str(m.get("task") or m.get("group")) if isinstance(m, Mapping) else str(m) for m in listed)
    shown = few(members, MEMBERS_SHOWN)
    raise UserError(f"{PREFIX}{name} is a group of lm-eval tasks; name its members one by one: {shown}")


def _configure(task: HarnessTask, settings: ForeignSettings, spec: EvalSpec) -> None:
    """Apply the settings, and refuse what the task cannot do."""
    full = spec.task.name
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"{full} runs code the model has written; this is not supported")
    if getattr(task, "MULTIMODAL", False) or task.OUTPUT_TYPE not in KINDS:
        raise UserError(f"{full} is not a text task")
    if spec.split == "validation" and task.has_test_docs():
        raise UserError(f"{full} is evaluated on its test split; its validation split cannot be asked for")
    own = task.get_config("num_fewshot")
    if settings.num_fewshot is None:
        task.set_config("num_fewshot", own or 0)
    elif own == 0 and settings.num_fewshot > 0:
        raise UserError(f"{full} is defined without few-shot examples; num_fewshot is {settings.num_fewshot}, not 0")
    else:
        task.set_config("num_fewshot", settings.num_fewshot)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    if settings.max_new_tokens is not None:
        if task.OUTPUT_TYPE != "generate_until":
            raise UserError(f"{full} does not generate text; max_new_tokens does not apply")
        task.set_config("generation_kwargs", {"max_gen_toks": settings.max_new_tokens}, update=True)
    available = len(task.eval_docs)
    if not available:
        raise UserError(f"{full} has no items")
    if spec.items is not None and spec.items > available:
        raise UserError(f"{full} has {available} items; {spec.items} were asked for")


def _choose(task: HarnessTask, wanted: str | None, full: str) -> Chosen:
    """Find the headline metric and its filter among what the task reports."""
    names = list(task.aggregation())
    filters = [str(entry["name"]) for entry in task.get_config("filter_list") or []] or ["none"]
    name, _, kept = (wanted or "").partition(",")
    name, kept = name or names[0], kept or filters[0]
    if name not in names or kept not in filters:
        known = ", ".join(f"{one},{other}" for one in names for other in filters)
        raise UserError(f"{full} has no metric '{wanted}'. Known: {known}")
    return Chosen((name, *(other for other in names if other != name)), kept)


def _item(sample: Mapping[str, Any], chosen: Chosen, rejected: str | None) -> ItemRecord:
    """Turn one of lm-eval's samples into a record; metrics that are no number per item have none."""
    name = chosen.names[0]
    value = None if rejected is not None else _number(sample.get(name))
    others = {key: (number, 1.0) for key in chosen.names[1:] if (number := _number(sample.get(key))) is not None}
    reason = "" if value is not None else rejected or f"lm-eval gives no number per item for {name}"
    kept = sample["filtered_resps"][0] if sample["filtered_resps"] else ""
    first = sample["resps"][0][0] if sample["resps"] and sample["resps"][0] else ""
    return ItemRecord(
        id=f"{sample['doc_id']}-{sample['doc_hash'][:12]}",
        value=value,
        others=others if rejected is None else {},
        extracted=kept if isinstance(kept, str) else "",
        reason=reason,
        output=first if isinstance(first, str) else "",
    )


def _measure(
    task: HarnessTask,
    metric: Metric,
    chosen: Chosen,
    items: Sequence[ItemRecord],
    samples: Sequence[Mapping[str, Any]],
) -> Measure:
    """Return lm-eval's own aggregate over the answered items; with an error where it is their plain mean."""
    key = metric.name
    raw = [sample[key] for sample in samples if key in sample]
    how = f"lm-eval {metadata.version('lm_eval')}, metric {key},{chosen.filter}"
    value = _number(task.aggregation()[key](raw)) if raw else None
    headline = key == chosen.names[0]
    mean = weighted_mean([item.value if headline else item.others.get(key, (None, 0.0))[0] for item in items])
    plain = mean.n == len(raw) and value is not None and math.isclose(mean.value or 0.0, value, abs_tol=1e-12)
    kind = "mean over items" if plain else "aggregated by lm-eval's own function"
    return Measure(
        metric=metric.name,
        value=value,
        unit=metric.unit,
        better=metric.better,
        how=f"{how}; {kind}" if value is not None else f"{how}; no value: none of {len(items)} items could be scored",
        n=len(raw) if value is not None else 0,
        stderr=mean.stderr if plain else None,
        unscored=len(items) - len(raw) if value is not None else len(items),
    )


def _card(task: HarnessTask, name: str, chosen: Chosen, settings: ForeignSettings) -> TaskCard:
    """Fill a task card from lm-eval's own description of the task."""
    config = task.get_config
    version = (config("metadata") or {}).get("version", task.VERSION)
    higher = task.higher_is_better()
    split = (config("test_split") if task.has_test_docs() else config("validation_split")) or "its own"
    kwargs = config("dataset_kwargs") or {}
    source = " ".join(str(part) for part in (config("dataset_path"), config("dataset_name")) if part)
    return TaskCard(
        name=f"{PREFIX}{name}",
        title=str(config("task_alias") or name),
        version=1,
        role=Role.RETENTION,
        kind=KINDS[str(task.OUTPUT_TYPE)],
        metrics=tuple(
            Metric(
                name=key,
                unit=FRACTION if key in FRACTIONS else "as defined by lm-eval",
                better="higher" if higher.get(key, True) else "lower",
            )
            for key in chosen.names
        ),
        chance=None,
        source=f"{source or 'defined in code'} ({split} split)",
        revision=(
            f"lm_eval {metadata.version('lm_eval')}, task version {version}, "
            f"data revision {kwargs.get('revision', 'not pinned')}, definition {_definition(task)}"
        ),
        licence="see source",
        citation="see source",
        description=(
            f"lm-eval's task {name} ({task.OUTPUT_TYPE}), filter {chosen.filter}, "
            f"settings {settings.model_dump_json(exclude_none=True)}"
        ),
    )


def _definition(task: HarnessTask) -> str:
    """Return a content id of the task's file, so that an edited file cannot pass for the former one."""
    path = Path(str((task.get_config("metadata") or {}).get("config_source", "")))
    return content_id(path.read_text(encoding="utf-8")) if path.is_file() else "unknown"


def _number(value: Any) -> float | None:
    """Return a finite number, or None for whatever else a task reports."""
    if isinstance(value, (str, bytes, list, tuple, dict)) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators as lm-eval's command line does, and put them back afterwards.

    Some tasks draw from them when their documents are prepared.
    """
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(RANDOM_SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Keep lm-eval's progress bars, which cannot be switched off, from the screen."""
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        yield
