"""Every task by name, and the one way to make one from a study's settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.measure import POINTS
from peft_arena.core.registry import Registry
from peft_arena.core.specs import TaskSpec
from peft_arena.tasks.base import Task, TaskCard, TaskConfig
from peft_arena.tasks.benchmarks import BENCHMARK_TASKS
from peft_arena.tasks.data_files import SUFFIXES
from peft_arena.tasks.foreign import is_foreign
from peft_arena.tasks.micro import MICRO_TASKS

OWN_DATA = "custom"
"""The task of a file."""
GROUP = "peft_arena.tasks"
"""Entry points of this group are tasks of installed plug-ins."""


def problem_of(name: str, found: object) -> str:
    """Say why an object cannot be the task of a name; empty if it can."""
    if not (isinstance(found, type) and issubclass(found, Task)):
        return "it is not a subclass of peft_arena.tasks.base.Task"
    card, config = getattr(found, "card", None), getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, TaskConfig)):
        return "its Config is not a subclass of TaskConfig"
    if isinstance(card, TaskCard) and card.name != name:
        return f"its card says the task is called '{card.name}'"
    return ""


TASKS: Registry[type[Task]] = Registry(
    "task",
    {
        "asdiv": "peft_arena.tasks.asdiv:Asdiv",
        "basic_arithmetic": "peft_arena.tasks.arithmetic:BasicArithmetic",
        "boolq": "peft_arena.tasks.commonsense:BoolQ",
        "chain_sum": "peft_arena.tasks.arithmetic:ChainSum",
        "custom": "peft_arena.tasks.custom:Custom",
        "disambiguation_qa": "peft_arena.tasks.commonsense:DisambiguationQA",
        "gsm_symbolic": "peft_arena.tasks.arithmetic:GsmSymbolic",
        "instruction_following": "peft_arena.tasks.instruction_following:InstructionFollowing",
        "medmcqa": "peft_arena.tasks.medmcqa:MedMCQA",
        "nq_open": "peft_arena.tasks.nq_open:NqOpen",
        "openbookqa": "peft_arena.tasks.commonsense:OpenBookQA",
        "piqa": "peft_arena.tasks.commonsense:Piqa",
        "siqa": "peft_arena.tasks.commonsense:Siqa",
        "xsum-text": "peft_arena.tasks.corpus:XsumText",
        **BENCHMARK_TASKS,
        **MICRO_TASKS,
    },
    group=GROUP,
    problem=problem_of,
)
"""Name to task class. Listing the names imports no task."""


def registered(name: str, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the registered name and the settings that a name stands for: a file's is the user's own data in it."""
    return (OWN_DATA, {"path": name, **config}) if is_file(name) else (name, config)


def is_file(name: str) -> bool:
    """Say whether the name of a task is that of a data file."""
    return Path(name).suffix in SUFFIXES and name not in TASKS


def make_task(name: str, config: Mapping[str, Any] | None = None, where: str = "") -> Task:
    """Make a task from its name and settings.

    Args:
        name: a name in :data:`TASKS`.
        config: the task's settings as plain values; None for the defaults.
        where: file and line, or the option, the settings were read from.

    Raises:
        UserError: the name is unknown, or a setting is, and the message gives the nearest one and all that are
            allowed; or the user's own data cannot be used.
    """
    kind = TASKS.get(name, where)
    place = f"task {name}" + (f", {where}" if where else "")
    settings = build(kind.Config, config or {}, where=place)
    try:
        return kind(settings)
    except UserError as error:
        raise UserError(f"{error} (in {place})" if where else str(error)) from error


def task_of(spec: TaskSpec) -> Task:
    """Make the task a spec describes, and only that one.

    Raises:
        UserError: the task's code or data is not of the version that the spec names.
    """
    TASKS.check_plugin(spec.name, spec.plugin)
    task = make_task(spec.name, spec.config)
    check_version(task, spec)
    return task


def made_task(spec: TaskSpec) -> Task:
    """Return the task of a spec, made once for all who ask in this process: its items take time.

    Raises:
        UserError: the task's code or data is not of the version that the spec names.
    """
    return _made(spec.canonical())


@lru_cache(maxsize=64)
def _made(canonical: str) -> Task:
    return task_of(TaskSpec.model_validate_json(canonical))


def display_name(spec: TaskSpec) -> str:
    """Return what people call a task: the name on its card, which for data of their own is not the registered one.

    Where the task cannot be made, because its data is gone, the name that its settings give, or else the registered
    one.
    """
    if is_foreign(spec.name) or spec.name not in TASKS:
        return spec.name
    card = getattr(TASKS.get(spec.name), "card", None)
    return card.name if isinstance(card, TaskCard) else _name_on_card(spec.canonical())


@lru_cache(maxsize=256)
def _name_on_card(canonical: str) -> str:
    spec = TaskSpec.model_validate_json(canonical)
    if isinstance(stated := spec.config.get("name"), str) and stated:
        return stated
    try:
        return make_task(spec.name, spec.config).card.name
    except UserError:
        return spec.name


def difference_unit(spec: TaskSpec) -> str:
    """Return the unit that differences of a task's headline are given in: ``points`` for fractions, else its own.

    Tasks of lm-eval are taken to measure fractions.
    """
    if is_foreign(spec.name):
        return POINTS
    unit = task_of(spec).card.headline.unit
    return POINTS if unit == "fraction" else unit


def check_version(task: Task, spec: TaskSpec) -> None:
    """Check that a task is the one a spec was planned with.

    Raises:
        UserError: the task's code or data is of another version, or comes from another plug-in or version of it.
    """
    if spec.name in TASKS or spec.plugin is not None:
        TASKS.check_plugin(spec.name, spec.plugin)
    for what, found, wanted in (
        ("version", task.card.version, spec.version),
        ("data", task.card.revision, spec.revision),
    ):
        if found != wanted:
            raise UserError(f"task {spec.name} has {what} {found}, and was planned with {wanted}; plan it again")
