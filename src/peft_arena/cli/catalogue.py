"""Rows about what exists: methods, tasks, studies, models, runs, and the state of this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.core.provenance import PACKAGES, provenance
from peft_arena.core.registry import OURS
from peft_arena.store.store import RunDirectory

Row = dict[str, Any]
FREE_BYTES = 4 * 2**30
"""Below this much free disk, ``doctor`` warns."""


def listing(what: str) -> list[Row]:
    """Return the rows of ``methods``, ``tasks``, ``studies``, ``models``, ``rules`` or ``rewards``."""
    makers: dict[str, Callable[[], list[Row]]] = {
        "methods": _methods,
        "tasks": _tasks,
        "studies": _studies,
        "models": _models,
        "rules": _rules,
        "rewards": _rewards,
        "groups": _groups,
        "published": _published,
    }
    return makers[what]()


def run_summary(run: RunDirectory) -> Row:
    """Return what is known of one run: spec, training, costs, evaluations, last events."""
    training = run.training()
    costs = [cost for stage in ("training", "inference") if (cost := run.cost(stage)) is not None]
    return {
        "run": run.run_id,
        "directory": str(run.path),
        "spec": run.spec.model_dump(mode="json"),
        "checkpoints": run.steps(),
        "training": None
        if training is None
        else {
            "steps": training.steps,
            "tokens": training.tokens,
            "examples": training.examples,
            "dropped": training.dropped,
            "start": None if training.start is None else training.start.model_dump(),
            "last_loss": next((e.loss for e in reversed(training.log) if e.loss is not None and not e.rollout), None),
            "last_reward": next((e.rollout.reward for e in reversed(training.log) if e.rollout is not None), None),
        },
        "costs": [
            {"stage": cost.stage, **measure.model_dump(include={"metric", "value", "unit", "stderr", "how"})}
            for cost in costs
            for measure in cost.measures
        ],
        "evaluations": [
            {
                "point": run.point(record.step, record.factor, record.path).key,
                "task": record.called,
                "split": record.spec.split,
            }
            | ({"samples": record.spec.sampling.samples} if record.spec.sampling else {})
            | measure.model_dump(include={"metric", "value", "unit", "n", "stderr", "unscored"})
            for record in run.evaluations()
            for measure in record.metrics
        ],
        "geometry": [
            {"point": f"{record.step}-{record.factor:g}", "what": record.what}
            | measure.model_dump(include={"metric", "value", "unit", "n", "stderr"})
            for record, _ in run.geometries()
            for measure in record.summary
        ],
        "paths": [
            {"rule": record.spec.path.readable, "chosen": record.chosen, "reason": record.reason}
            for record in run.scans()
        ],
        "events": [{key: event[key] for key in event if key != "traceback"} for event in run.events()[-8:]],
    }


def doctor() -> list[Row]:
    """Return one row per check of this machine: state ``ok``, ``note`` or ``failed``, and what was seen."""
    seen = provenance()
    rows = [_row("python", "ok" if sys.version_info >= (3, 11) else "failed", seen["python"])]
    rows += [_package(name) for name in PACKAGES]
    rows.append(_row("processor", "ok", f"{seen['processor']}, {seen['cores']} cores"))
    rows.append(_devices())
    free = shutil.disk_usage(Path.cwd()).free
    rows.append(_row("disk", "ok" if free > FREE_BYTES else "note", f"{free / 2**30:.1f} GiB free in {Path.cwd()}"))
    rows.append(_memory())
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    rows.append(_row("hub", "ok", "off (HF_HUB_OFFLINE)" if offline else "on: models and data are looked up there"))
    rows.append(_micro())
    rows.append(_cache())
    return rows


def _row(check: str, state: str, seen: str) -> Row:
    return {"check": check, "state": state, "seen": seen}


def _package(name: str) -> Row:
    try:
        return _row(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return _row(name, "failed", "not installed; pip install 'peft-arena[train,eval]'")


def _devices() -> Row:
    try:
        import torch
    except ImportError as error:
        return _row("device", "failed", f"torch does not import: {error}")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return _row("device", "ok", f"cuda: {names}")
    fast = "amx_bf16" in _cpu_flags()
    speed = "bfloat16 is fast here (AMX)" if fast else "no AMX: bfloat16 may be slower than float32"
    return _row("device", "ok" if fast else "note", f"cpu, {torch.get_num_threads()} threads; {speed}")


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _memory() -> Row:
    import psutil

    memory = psutil.virtual_memory()
    return _row("memory", "ok", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available")


def _micro() -> Row:
    from peft_arena.core.specs import ModelSpec
    from peft_arena.models.load import MICRO, pin

    try:
        return _row("micro model", "ok", str(pin(ModelSpec(name=MICRO)).revision))
    except (UserError, OSError) as error:
        return _row("micro model", "failed", str(error))


def _cache() -> Row:
    from peft_arena.assets.wheel_files import cache_root

    root = cache_root()
    parent = next(path for path in (root, *root.parents) if path.exists())
    writable = os.access(parent, os.W_OK)
    return _row("cache", "ok" if writable else "failed", f"{root}{'' if writable else ' cannot be written'}")


MARKS = {
    "merges": "mergeable",
    "identity": "identity_at_init",
    "calibration": "needs_calibration",
    "quantised": "quantized_base",
    "grpo": "online_rl",
    "serves": "lora_adapter",
}
"""Columns of the list of methods that are a capability: the column to the capability."""


def method_row(name: str) -> Row:
    """Return everything a method's card says, the defaults of its settings, and which plug-in it is from.

    Raises:
        UserError: the name is unknown or refused, or its plug-in cannot be used.
    """
    from peft_arena.methods.registry import METHODS

    kind = METHODS.get(name)
    card = kind.card
    row: Row = {"name": name, "plugin": METHODS.plugin(name), "refused": ""}
    row |= {key: value for key, value in card.model_dump(mode="json").items() if key not in {"name", "capabilities"}}
    row |= {column: capability in card.capabilities for column, capability in MARKS.items()}
    defaults = {
        key: "required" if field.is_required() else field.get_default(call_default_factory=True)
        for key, field in kind.Config.model_fields.items()
    }
    return row | {"size": kind.size, "config": defaults, "capabilities": sorted(card.capabilities)}


def stated(row: Row) -> Row:
    """Return a row without the entries that state nothing."""
    return {key: value for key, value in row.items() if value is not None and value not in ("", (), [], {})}


def _methods() -> list[Row]:
    """Our methods with their cards; plug-ins by name and distribution, not imported; refused ones with the reason."""
    from peft_arena.methods.registry import METHODS

    rows = [method_row(name) for name in METHODS.own() if len(METHODS.providers(name)) == 1]
    blank = dict.fromkeys(rows[0]) if rows else {}
    told = {row["name"] for row in rows}
    for name in METHODS.names():
        if name not in told:
            rows.append({**blank, "name": name, "plugin": " and ".join(METHODS.providers(name)), "refused": ""})
    refused = {name: reason for name, reason in METHODS.refused.items() if name not in METHODS}
    return rows + [{**blank, "name": name, "refused": reason} for name, reason in sorted(refused.items())]


def task_row(name: str) -> Row:
    """Return everything a task's card says and the defaults of its settings.

    Raises:
        UserError: the name is unknown, or its plug-in cannot be used.
    """
    from peft_arena.tasks.groups import GROUPS
    from peft_arena.tasks.registry import TASKS

    kind = TASKS.get(name)
    card = getattr(kind, "card", None)
    row: Row = {"name": name, "plugin": TASKS.plugin(name)}
    if card is not None:
        row |= card.model_dump(mode="json")
    defaults = {
        key: "required" if field.is_required() else field.get_default(call_default_factory=True)
        for key, field in kind.Config.model_fields.items()
    }
    return row | {"groups": [group for group, members in GROUPS.items() if name in members], "config": defaults}


def _tasks() -> list[Row]:
    from peft_arena.tasks.registry import TASKS

    rows = []
    for name in TASKS.names():
        plugin = " and ".join(TASKS.providers(name)) if TASKS.providers(name) != [OURS] else ""
        card = None if plugin else getattr(TASKS.get(name), "card", None)
        if card is None:
            empty = {"name": name, "role": "", "kind": "", "metric": "", "chance": None, "licence": ""}
            rows.append({**empty, "title": f"from {plugin}" if plugin else "", "source": "", "protocol": ""})
            continue
        rows.append(
            {
                "name": name,
                "role": card.role.value,
                "kind": card.kind.value,
                "metric": f"{card.headline.name} [{card.headline.unit}]",
                "chance": card.chance,
                "licence": card.licence,
                "title": card.title,
                "source": card.source,
                "protocol": card.description,
            }
        )
    return rows


def _groups() -> list[Row]:
    from peft_arena.tasks.groups import GROUPS

    return [{"name": name, "tasks": ", ".join(members)} for name, members in GROUPS.items()]


def _studies() -> list[Row]:
    from peft_arena.study.read_study import shipped_studies

    rows = []
    for name, path in shipped_studies().items():
        from peft_arena.core.yamlfile import YamlFile

        data = YamlFile(path).data
        rows.append(
            {
                "name": name,
                "title": data.get("title", ""),
                "model": data.get("model", {}).get("name", ""),
                "arms": len(data.get("arms", [])),
                "seeds": len(data.get("seeds", [])),
            }
        )
    return rows


def _rules() -> list[Row]:
    from peft_arena.paths.rules import RULES

    return [
        {
            "name": name,
            "title": card.title,
            "factor 0": card.zero,
            "factor 1": card.one,
            "for": ", ".join(sorted(card.needs)) or "every method with weights",
            "description": card.description,
        }
        for name in RULES.names()
        for card in [RULES.get(name).card]
    ]


def _rewards() -> list[Row]:
    from peft_arena.tasks.rewards import REWARDS

    rows = []
    for name in REWARDS.names():
        kind = REWARDS.get(name)
        least, most = ("no bound" if bound is None else f"{bound:g}" for bound in kind.card.range)
        row = {
            "name": name,
            "title": kind.card.title,
            "from": least,
            "to": most,
            "settings": ", ".join(kind.Config.model_fields) or "none",
            "description": kind.card.description,
        }
        rows.append(row)
    return rows


def _published() -> list[Row]:
    from peft_arena.store.published import shipped_tables

    return [
        {
            "name": name,
            "title": table.title,
            "model": table.ran.model,
            "rows": len(table.rows),
            "seeds": "not said" if table.seeds is None else ", ".join(map(str, table.seeds)),
            "source": f"{table.source.text} ({table.source.date})",
        }
        for name, table in shipped_tables().items()
    ]


def _models() -> list[Row]:
    from peft_arena.models.load import PACKAGED
    from peft_arena.models.wheels import WHEEL_MODELS

    rows: list[Row] = [{"name": name, "source": "packaged with peft-arena"} for name in PACKAGED]
    for name, model in WHEEL_MODELS.items():
        rows.append({"name": name, "source": f"hub, or PyPI wheel {model.wheel.package} {model.wheel.version}"})
    rows.append({"name": "owner/name", "source": "any causal language model of the hub; give a revision"})
    rows.append({"name": "a directory", "source": "any causal language model saved by transformers"})
    return rows
