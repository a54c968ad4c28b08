"""The section ``geometry`` of a study file: what is measured of each run's final weights, and on which prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from peft_arena.core.build import Locate, build
from peft_arena.core.errors import UserError
from peft_arena.core.geometry import ActivationsSpec, DriftSpec, GeometrySpec, PromptSpec, SpectraSpec
from peft_arena.core.specs import EvalSpec, Name, Spec, Table, TaskSpec
from peft_arena.geometry.prompts import with_hash
from peft_arena.tasks.foreign import is_foreign

MakeTask = Callable[[str, Mapping[str, Any], str], TaskSpec]
"""From a name, settings and a place in a file to a task's spec."""


class PromptEntry(Spec):
    """A source of prompts: a task by name, or a file."""

    task: Name | None = None
    config: Table = Field(default_factory=dict)
    """Settings of the task."""
    split: str = "test"
    file: str | None = None
    """A txt, jsonl or json file, relative to the working directory."""


class GeometryEntry(Spec):
    """The section as it is written; a part that is left out is not measured."""

    spectra: Table | None = None
    """Settings of the spectra; ``{}`` for the defaults."""
    drift: Table | None = None
    activations: Table | None = None
    general: tuple[PromptEntry, ...] = ()
    """Prompts of what the model could before; the study's retention tasks unless given."""
    target: tuple[PromptEntry, ...] = ()
    """Prompts of what it was tuned for; each run's own target unless given."""
    prompts: int = Field(default=300, ge=1)
    """Most prompts of each set."""


class GeometryPlan:
    """From the section of a study file to what is measured of a run."""

    def __init__(
        self, entry: GeometryEntry, retention: Sequence[EvalSpec], make_task: MakeTask, locate: Locate
    ) -> None:
        """Check everything that does not depend on the run.

        Raises:
            UserError: an unknown or impossible setting, no general prompts, a file that cannot be read.
        """
        self.entry = entry
        self._locate = locate
        general = [prompts_of(found, make_task, locate(("geometry", "general"))) for found in entry.general]
        own = [PromptSpec(task=spec.task) for spec in retention if not is_foreign(spec.task.name)]
        self.general = tuple(general or own)
        self.target = tuple(prompts_of(found, make_task, locate(("geometry", "target"))) for found in entry.target)
        if entry.spectra is entry.drift is entry.activations is None:
            raise UserError(
                f"geometry asks for nothing (in {locate(('geometry',))}); give spectra, drift or activations"
            )
        if (entry.drift is not None or entry.activations is not None) and not self.general:
            raise UserError(
                f"geometry.general is required (in {locate(('geometry',))}): no retention task of the study can give "
                "prompts; name tasks or files"
            )

    def specs(self, target: TaskSpec) -> tuple[GeometrySpec, ...]:
        """Return what is measured of a run that was trained on a target.

        Raises:
            UserError: an unknown or impossible setting.
        """
        prompted = {
            "general": [spec.model_dump() for spec in self.general],
            "target": [spec.model_dump() for spec in self.target or (PromptSpec(task=target),)],
            "prompts": self.entry.prompts,
        }
        found: list[GeometrySpec] = []
        if self.entry.spectra is not None:
            found.append(self._spec(SpectraSpec, self.entry.spectra, {}))
        if self.entry.drift is not None:
            found.append(self._spec(DriftSpec, self.entry.drift, prompted))
        if self.entry.activations is not None:
            found.append(self._spec(ActivationsSpec, self.entry.activations, prompted))
        return tuple(found)

    def _spec(self, kind: type[Any], table: Table, shared: Table) -> Any:
        part = kind.model_fields["what"].default
        twice = sorted(set(table) & {*shared, "what"})
        if twice:
            raise UserError(
                f"geometry.{part}.{twice[0]} is not a setting of that part (in {self._locate(('geometry', part))}); "
                "general, target and prompts are set for all parts"
            )
        return build(
            kind,
            {**table, **shared},
            where=f"geometry.{part}",
            locate=lambda path: self._locate(("geometry", part, *path)),
        )


def prompts_of(entry: PromptEntry, make_task: MakeTask, where: str) -> PromptSpec:
    """Return the spec of a source of prompts, its task's settings checked or its file hashed.

    Raises:
        UserError: an unknown task or setting, both or neither of task and file, a file that cannot be read.
    """
    if (entry.task is None) == (entry.file is None):
        raise UserError(f"prompts come from a task or from a file: give exactly one of the two (in {where})")
    if entry.task is not None:
        if is_foreign(entry.task):
            raise UserError(f"'{entry.task}' cannot give prompts (in {where}): only tasks of ours and files can")
        task = make_task(entry.task, entry.config, where)
        return build(PromptSpec, {"task": task.model_dump(), "split": entry.split}, where=where)
    if entry.config:
        raise UserError(f"config belongs to a task, and '{entry.file}' is a file (in {where})")
    return with_hash(PromptSpec(file=entry.file))


def source_of(text: str, make_task: MakeTask) -> PromptSpec:
    """Return the spec of prompts named on the command line: a file if it ends like one, else a task.

    Raises:
        UserError: see :func:`prompts_of`.
    """
    is_file = Path(text).suffix in {".txt", ".jsonl", ".json"}
    entry = PromptEntry(file=text) if is_file else PromptEntry(task=text)
    return prompts_of(entry, make_task, text)
