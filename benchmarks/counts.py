"""Count the trained parameters of every arm of the shipped studies, so that planning them needs no torch.

Writes ``src/peft_arena/cost/counts.json``; a test says when it is out of date. Usage: ``python benchmarks/counts.py``.
"""

from __future__ import annotations

import json
from typing import Any

from peft_arena.core.specs import MethodSpec
from peft_arena.cost import counts
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.models.load import config_at_hand
from peft_arena.study.model import Study
from peft_arena.study.read_study import read_study, shipped_studies


def counts_of(study: Study) -> dict[str, Any]:
    """Return the count of every arm that is not refused, and the size of every arm with a budget, by key.

    Raises:
        UserError: the shapes of the study's model are not understood.
    """
    config = config_at_hand(study.base.model)
    assert config is not None, f"add the shapes of {study.base.model.name} to peft_arena.models.known"
    entries = {entry.label or entry.method: entry for entry in study.file.arms}
    found: dict[str, Any] = {}
    for arm in study.arms:
        if arm.refused:
            continue
        key = counts.count_key(config, arm.runs[0].method)
        counted = None if key in found else counts.count(study.base.model, arm.runs[0].method).trained
        if counted is not None:
            found[key] = counted
        if arm.spent is not None:
            entry = entries[arm.label]
            settings = make_method(entry.method, entry.config).config.model_dump(mode="json")
            unsized = MethodSpec(name=entry.method, config=settings, plugin=METHODS.plugin(entry.method))
            found[counts.size_key(config, unsized, arm.spent.wanted)] = [arm.spent.value, arm.spent.count]
    return found


def main() -> None:
    """Forget what is packaged, count again and write it."""
    counts.PACKAGED.write_text("{}\n", encoding="utf-8")
    found: dict[str, Any] = {}
    for path in shipped_studies().values():
        found |= counts_of(read_study(path))
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(found.items()))
    counts.PACKAGED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(found)} entries in {counts.PACKAGED}")  # noqa: T201


if __name__ == "__main__":
    main()
