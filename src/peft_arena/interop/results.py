"""Result files of the PEFT library's method comparison as published tables, one row for each file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peft_arena.core.bounded import read_json
from peft_arena.core.errors import UserError, first_problem
from peft_arena.interop.results_schema import (
    AT_END,
    COSTS,
    IMAGES,
    LANGUAGE,
    NO_FILE,
    SECTIONS,
    STATUSES,
    Family,
    Quantity,
    check_keys,
)
from peft_arena.interop.translate import method_named
from peft_arena.interop.translation import ADAMW
from peft_arena.store.published import (
    SUCCESS,
    PublishedColumn,
    PublishedFile,
    PublishedRegime,
    PublishedRow,
    PublishedSource,
    PublishedTable,
    finite,
)

TABLE_ID = "peft-library"
URL = "https://github.com/huggingface/peft/tree/main/method_comparison"
CAVEATS = (
    "all with the same seed; runs of one configuration in other versions of the library differed by 1.1 points on "
    "average and by up to 5.4",
    "most methods were run with one setting, which was not tuned",
    "the forgetting of runs before the metric was corrected is not comparable with later ones; what the file says is "
    "kept",
)


def import_results(paths: Sequence[Path]) -> PublishedFile:
    """Read result files, or all in directories, into one table for each comparison and model.

    Raises:
        UserError: no file, a damaged file, or one of another schema; names file and key.
    """
    found: dict[tuple[str, str], list[tuple[PublishedRow, Mapping[str, Any]]]] = {}
    families = {family.name: family for family in (LANGUAGE, IMAGES)}
    for path in result_files(paths):
        data = read_json(path)
        family, row = read_result(data, path)
        model = str(data["run_info"]["train_config"].get("model_id", ""))
        found.setdefault((family.name, model), []).append((row, data))
    counts = Counter(name for name, _ in found)
    try:
        return PublishedFile(
            tables=tuple(
                _table(families[name], model, rows, alone=counts[name] == 1)
                for (name, model), rows in sorted(found.items())
            )
        )
    except ValidationError as error:
        raise UserError(first_problem(error)) from None


def result_files(paths: Sequence[Path]) -> list[Path]:
    """Return the JSON files given, those of a directory's ``results`` directories, or its own, by name.

    Raises:
        UserError: a path is not there, or a directory has none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"no file or directory {path}")
        files = sorted(file for file in path.rglob("*.json") if file.parent.name == "results") or sorted(
            path.glob("*.json")
        )
        if not files:
            raise UserError(f"no result file in {path}")
        found += files
    return list(dict.fromkeys(found))


def read_result(data: Any, path: Path) -> tuple[Family, PublishedRow]:
    """Return the comparison that a result file belongs to, and its row.

    A run that did not succeed keeps its status and has no numbers.

    Raises:
        UserError: another schema; names file and key.
    """
    check_keys(data, tuple(SECTIONS), "", path)
    for section, keys in SECTIONS.items():
        check_keys(data[section], keys, section, path)
    run, train, meta = (data[section] for section in SECTIONS)
    for name in ("train_config", "package_info", "system_info"):
        holder, where = (run, "run_info") if name == "train_config" else (meta, "meta_info")
        if not isinstance(holder[name], dict):
            raise UserError(f"{path}: {where}.{name} must be a mapping")
    if train["status"] not in STATUSES:
        raise UserError(f"{path}: train_info.status is {train['status']!r}; known: {', '.join(STATUSES)}")
    if not isinstance(train["metrics"], list) or not all(isinstance(one, dict) for one in train["metrics"]):
        raise UserError(f"{path}: train_info.metrics must be a list of mappings")
    family = _family(train["metrics"], run["train_config"], path)
    last = _last(train["metrics"], family)
    values = {
        family.score.column: last.get(family.score_key),
        family.forgetting.column: last.get(family.forgetting_key),
    }
    values |= {quantity.column: train[key] for key, quantity in COSTS.items()}
    values |= {quantity.column: last.get(key, run.get(key)) for key, quantity in family.others.items()}
    if values["file_size"] == NO_FILE:
        values["file_size"] = None
    done = train["status"] == SUCCESS
    row = PublishedRow(
        label=str(run["experiment_name"]),
        method=method_named(run["peft_config"], str(run["train_config"].get("optimizer_type", ADAMW))),
        status=train["status"],
        reason=str(run["error_msg"] or ""),
        settings=_settings(run, meta),
        values={key: finite(value) if done else None for key, value in values.items()},
    )
    return family, row


def _family(metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any], path: Path) -> Family:
    """Tell the comparison by what was measured; where nothing was, by what was asked."""
    for family in (LANGUAGE, IMAGES):
        if any(family.score_key in entry for entry in metrics):
            unknown = [
                key for entry in metrics if family.score_key in entry for key in entry if key not in _end(family)
            ]
            if unknown:
                raise UserError(f"{path}: train_info.metrics has '{unknown[0]}': another schema of result files")
            return family
    if "query_template" in config:
        return LANGUAGE
    if "instance_prompts" in config:
        return IMAGES
    raise UserError(f"{path}: train_info.metrics has no '{LANGUAGE.score_key}' or '{IMAGES.score_key}'")


def _end(family: Family) -> set[str]:
    return {*AT_END, family.score_key, family.forgetting_key}


def _last(metrics: Iterable[Mapping[str, Any]], family: Family) -> Mapping[str, Any]:
    """Return the entry made after the training; empty if there is none."""
    found = [entry for entry in metrics if family.score_key in entry]
    return found[-1] if found else {}


def _settings(run: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, str | int | float | bool | None]:
    """Return what a reader needs to place a row: how it was trained, with what, where and when."""
    config, packages, system = run["train_config"], meta["package_info"], meta["system_info"]
    optimizer = config.get("optimizer_kwargs") or {}
    found = {
        "seed": config.get("seed"),
        "steps": config.get("max_steps"),
        "batch_size": config.get("batch_size"),
        "optimizer": config.get("optimizer_type"),
        "learning_rate": optimizer.get("lr"),
        "weight_decay": optimizer.get("weight_decay"),
        "peft": packages.get("peft-version"),
        "peft_commit": packages.get("peft-commit-hash"),
        "transformers": packages.get("transformers-version"),
        "torch": packages.get("torch-version"),
        "accelerator": system.get("accelerator"),
        "created": run["created_at"],
        "branch": run["peft_branch"],
    }
    return {key: value for key, value in found.items() if value is None or isinstance(value, str | int | float)}


def _table(
    family: Family, model: str, rows: Sequence[tuple[PublishedRow, Mapping[str, Any]]], *, alone: bool
) -> PublishedTable:
    """Return the table of one comparison on one model; the model is in its id unless it is the only one."""
    quantities = [family.score, family.forgetting, *COSTS.values(), *family.others.values()]
    parts = [TABLE_ID, family.name.lower(), *([] if alone else [model.rsplit("/", 1)[-1].lower()])]
    data = [one for _, one in rows]
    revisions = {str((one["meta_info"]["model_info"] or {}).get("sha")) for one in data}
    seeds = {one["run_info"]["train_config"].get("seed") for one in data}
    dates = sorted(str(one["run_info"]["created_at"])[:10] for one in data)
    return PublishedTable(
        id="/".join(parts),
        title=f"PEFT library, method comparison: {family.title}, {model}",
        source=PublishedSource(
            text="Result files of the method comparison in the repository of the PEFT library (Hugging Face)",
            url=f"{URL}/{family.name}",
            date=dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
            licence="Apache-2.0",
        ),
        ran=PublishedRegime(
            model=model,
            revision=revisions.pop() if len(revisions) == 1 else None,
            regime=_regime([one["run_info"]["train_config"] for one in data]),
            target=family.target,
            retention=family.retention,
        ),
        seeds=tuple(sorted(int(seed) for seed in seeds)) if all(isinstance(seed, int) for seed in seeds) else None,
        caveats=CAVEATS,
        columns=tuple(_column(quantity) for quantity in quantities),
        rows=tuple(sorted((row for row, _ in rows), key=lambda row: row.label)),
    )


def _regime(configs: Sequence[Mapping[str, Any]]) -> str:
    """Say what all runs of a table have in common of their training."""
    names = {"max_steps": "steps", "batch_size": "examples in a batch", "dtype": "", "lr_scheduler": "schedule"}
    said = ["supervised fine-tuning"]
    for key, word in names.items():
        values = {str(config.get(key)) for config in configs}
        if len(values) == 1 and (value := values.pop()) != "None":
            said.append(f"{value} {word}".strip())
    return ", ".join(said)


def _column(quantity: Quantity) -> PublishedColumn:
    return PublishedColumn(
        name=quantity.column,
        title=quantity.title,
        unit=quantity.unit,
        better=quantity.better,
        role=quantity.role,
        how=quantity.how,
    )
