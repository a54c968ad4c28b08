"""Tasks of lm-eval by name (``lm-eval:piqa``): their settings, and what identifies them, without importing lm-eval."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from peft_arena.core.bounded import user_path
from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id
from peft_arena.core.specs import TaskSpec
from peft_arena.tasks.base import TaskConfig

PREFIX = "lm-eval:"


class ForeignSettings(TaskConfig):
    """Settings of a task of lm-eval."""

    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples in the prompt; None for the task's own number."""
    apply_chat_template: bool = False
    """Put the prompt into the tokenizer's chat template, few-shot examples as earlier turns."""
    metric: str | None = None
    """Headline metric as ``name`` or ``name,filter``; None for the task's first."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Limit of generated tokens; None for the task's own, or lm-eval's 256."""
    include_path: str | None = None
    """Folder with further task files; they come before lm-eval's own."""


def is_foreign(name: str) -> bool:
    """Say whether a task name is one of lm-eval's."""
    return name.startswith(PREFIX)


def foreign_spec(name: str, config: Mapping[str, Any], where: str = "") -> TaskSpec:
    """Return the spec of a task of lm-eval: settings checked, defaults written out, version of lm-eval.

    The data behind lm-eval's tasks is what its hub has when it is loaded: lm-eval names no revision of it.

    Raises:
        UserError: unknown or wrong settings, or a folder that is not there.
    """
    place = f"task {name}" + (f", {where}" if where else "")
    settings = build(ForeignSettings, config, where=place)
    return TaskSpec(name=name, revision=_revision(settings, place), config=settings.model_dump(mode="json"))


def check_foreign(spec: TaskSpec) -> ForeignSettings:
    """Return a spec's settings, if lm-eval and the task files are still those it was planned with.

    Raises:
        UserError: another version of lm-eval, or other files.
    """
    settings = build(ForeignSettings, spec.config, where=f"task {spec.name}")
    found = _revision(settings, f"task {spec.name}")
    if spec.revision and found != spec.revision:
        raise UserError(f"task {spec.name} is at {found}, and was planned with {spec.revision}; plan it again")
    return settings


@cache
def packaged_file(name: str) -> Path | None:
    """Return lm-eval's file of a single task that is named like its file, None if there is no such file.

    Args:
        name: the task's name without the prefix.
    """
    import yaml

    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None or not set(name).isdisjoint("*?[]/\\"):
        return None

    class Plain(yaml.SafeLoader):
        """Reads the keys and leaves lm-eval's function tags alone."""

    Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
    for path in sorted((Path(package.origin).parent / "tasks").glob(f"**/{name}.yaml")):
        table = yaml.load(path.read_text(encoding="utf-8"), Loader=Plain)  # noqa: S506 - a SafeLoader
        if isinstance(table, dict) and table.get("task") == name and "group" not in table:
            return path
    return None


def _revision(settings: ForeignSettings, where: str) -> str:
    try:
        version = f"lm_eval {metadata.version('lm_eval')}"
    except metadata.PackageNotFoundError:
        raise UserError(f"{where} needs lm-eval; pip install 'peft-arena[eval]'") from None
    if settings.include_path is None:
        return version
    folder = user_path(settings.include_path)
    if not folder.is_dir():
        raise UserError(f"{where}: include_path {folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in {".yaml", ".py"})
    return f"{version}, files {content_id([[str(p.relative_to(folder)), p.read_text('utf-8')] for p in files])}"
