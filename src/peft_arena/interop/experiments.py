"""Experiments of the PEFT library's method comparison as one study of ours: what runs as what, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peft_arena.core.bounded import present
from peft_arena.core.errors import UserError
from peft_arena.interop.shapes import shape_of
from peft_arena.interop.training import COMMON_NOTES, Training, training_of
from peft_arena.interop.translate import Translated, translate
from peft_arena.store.files import read_json

ADAPTER, TRAINING, DEFAULTS = "adapter_config.json", "training_params.json", "default_training_params.json"
TARGET, RETENTION = "hf-metamathqa", "hf-wikipedia"
NOT_LANGUAGE = ("image_column", "num_inference_steps", "dataset_id")
"""Training settings that only experiments on images have."""


@dataclass(frozen=True)
class Imported:
    """One experiment, and what becomes of it."""

    label: str
    """``method/name``, by its directory."""
    directory: Path
    method: str = ""
    config: Mapping[str, Any] | None = None
    training: Training | None = None
    notes: tuple[str, ...] = ()
    refused: str = ""
    """Why it cannot run here; empty if it can."""

    @property
    def row(self) -> dict[str, Any]:
        """What is printed of it."""
        state = "refused" if self.refused else "planned"
        return {
            "experiment": self.label,
            "state": state,
            "method": self.method,
            "config": dict(self.config or {}),
            "train": dict(self.training.table) if self.training else {},
            "why": self.refused or "; ".join(self.notes),
        }


@dataclass(frozen=True)
class ImportedStudy:
    """Experiments and the study file they become."""

    experiments: tuple[Imported, ...]
    text: str
    """Of the study file; empty where every experiment is refused."""

    @property
    def planned(self) -> list[Imported]:
        """Those that run here."""
        return [one for one in self.experiments if not one.refused]


def import_experiments(directory: Path, name: str = "hf-experiments") -> ImportedStudy:
    """Read one experiment or a tree of them, and write the study that runs them here.

    Args:
        directory: of an experiment (``adapter_config.json`` or ``training_params.json``), or above many.
        name: of the study.

    Raises:
        UserError: there is no experiment, or a file is damaged.
    """
    found = experiment_directories(directory)
    experiments = [_read(path) for path in found]
    experiments = _one_setting(experiments)
    planned = [one for one in experiments if not one.refused]
    return ImportedStudy(tuple(experiments), study_text(planned, name) if planned else "")


def experiment_directories(directory: Path) -> list[Path]:
    """Return the directories of experiments at or below one, by name.

    Raises:
        UserError: there are none.
    """
    if not directory.is_dir():
        raise UserError(f"no directory {directory}")
    files = [path for name in (ADAPTER, TRAINING) for path in directory.rglob(name)]
    found = sorted({path.parent for path in files})
    if not found:
        raise UserError(f"no experiment in {directory}: neither {ADAPTER} nor {TRAINING} is in it or below it")
    return found


def _read(directory: Path) -> Imported:
    """Read one experiment; what cannot be had here is a refusal, a damaged file an error."""
    label = f"{directory.resolve().parent.name}/{directory.resolve().name}"
    adapter = _table(directory / ADAPTER) if present(directory / ADAPTER) else None
    settings = _defaults(directory)
    if present(directory / TRAINING):
        settings = {**settings, **_table(directory / TRAINING)}
    strange = [key for key in NOT_LANGUAGE if key in settings]
    if strange:
        return Imported(label, directory, refused=f"{strange[0]} is set: it generates images, no language model")
    try:
        training = training_of(settings)
        found = translate(
            adapter,
            shape_of(training.model),
            steps=training.steps,
            optimizer=training.optimizer,
            optimizer_settings=training.optimizer_settings,
        )
    except UserError as error:
        return Imported(label, directory, refused=str(error))
    return _planned(label, directory, training, found)


def _planned(label: str, directory: Path, training: Training, found: Translated) -> Imported:
    notes = (*found.notes, *training.notes)
    return Imported(label, directory, found.method, found.config, training, notes)


def _defaults(directory: Path) -> dict[str, Any]:
    """Return the default training settings of the nearest directory above that has any.

    Raises:
        UserError: there are none: what an experiment's own file leaves out would be a guess.
    """
    for parent in directory.resolve().parents:
        if (parent / DEFAULTS).is_file():
            return _table(parent / DEFAULTS)
    raise UserError(f"no {DEFAULTS} in any directory above {directory}")


def _table(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a mapping, got {type(found).__name__}")
    return found


def _one_setting(experiments: Sequence[Imported]) -> list[Imported]:
    """Refuse experiments whose model or seed is not that of the most: a study has one model, and the same seeds."""
    keys = [_whole(one.training) for one in experiments if one.training is not None]
    if not keys:
        return list(experiments)
    (most, _), *_ = Counter(keys).most_common(1)
    kept = []
    for one in experiments:
        if one.training is not None and _whole(one.training) != most:
            said = ", ".join(
                f"{name} is {value!r}, not {usual!r}"
                for name, value, usual in zip(("model_id", "dtype", "seed"), _whole(one.training), most, strict=True)
                if value != usual
            )
            one = Imported(one.label, one.directory, refused=f"{said} as in most experiments: import it by itself")
        kept.append(one)
    return kept


def _whole(training: Training) -> tuple[str, str, int]:
    return training.model, training.dtype, training.seed


def study_text(planned: Sequence[Imported], name: str) -> str:
    """Return the study file of experiments of one model and seed, with what is noted as comments.

    Args:
        planned: at least one, none refused.
        name: of the study.
    """
    trainings = [one.training for one in planned if one.training is not None]
    first = trainings[0]
    common = _commonest([dict(one.table) for one in trainings])
    head = {
        "name": name,
        "title": f"Experiments of the PEFT library's method comparison on {first.model}",
        "model": {"name": first.model, "revision": shape_of(first.model).revision, "dtype": first.dtype},
        "targets": [{"task": TARGET}],
        "retention": [{"task": RETENTION}],
        "train": common,
        "seeds": [first.seed],
    }
    lines = [
        "# Written by `peft-arena import hf-experiment`. A comment above an arm says what is not as in the library.",
        *(f"# Everywhere: {note}." for note in COMMON_NOTES),
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120).rstrip(),
        "arms:",
    ]
    for one in planned:
        arm: dict[str, Any] = {"method": one.method, "label": one.label}
        if one.config:
            arm["config"] = dict(one.config)
        table = one.training.table if one.training else {}
        own = {key: value for key, value in table.items() if value != common[key]}
        if own:
            arm["train"] = own
        lines += [f"  # {note}" for note in one.notes]
        lines.append("  - " + yaml.safe_dump(arm, sort_keys=False, default_flow_style=True, width=10**6).strip())
    return "\n".join(lines) + "\n"


def _commonest(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return for every setting the value that most have."""
    chosen = {}
    for key in tables[0]:
        values = [table[key] for table in tables]
        chosen[key] = max(values, key=values.count)
    return chosen
