"""Keep the records of a study in one small file of the repository, and put them back into a runs directory.

A kept study has what every report needs: runs, costs, scores of every item, choices along paths, summaries of geometry
and of training. Left out are weights, the texts that models wrote, and rows and profiles of geometry. What repeats in
many records is held once. What is put back is read by the same strict reader as any other record.

    python -m scripts.kept keep STUDY --runs DIR      # writes results/studies/STUDY.json
    python -m scripts.kept unpack STUDY --runs DIR    # for: peft-arena report STUDY --runs DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from peft_arena.store.store import Store
from peft_arena.study.model import Study
from peft_arena.study.read_study import find_study, read_study

FOLDER = Path(__file__).resolve().parents[1] / "results" / "studies"
SHARED = ("provenance", "card", "spec", "engine", "path", "base", "cost", "start")
"""Fields whose values return in many records."""
MEASURES = ("metrics", "measures", "summary")
"""Fields that hold measures, of which all but the numbers return in many records."""
LOG_ENTRIES = 5
"""Most log entries that are kept of a supervised training."""
Json = dict[str, Any]


class _Shared:
    """Values that are held once, by their JSON text."""

    def __init__(self, values: Sequence[Any] = ()) -> None:
        self.values = list(values)
        self.places = {json.dumps(value, sort_keys=True): place for place, value in enumerate(self.values)}

    def put(self, value: Any) -> int:
        """Return the place of a value, which is added if it is new."""
        text = json.dumps(value, sort_keys=True)
        if text not in self.places:
            self.places[text] = len(self.values)
            self.values.append(value)
        return self.places[text]


def keep(study: Study, runs: Path) -> Json:
    """Return the records of a study's runs as one JSON value.

    Args:
        study: which runs.
        runs: directory they are in.
    """
    store, shared = Store(runs), _Shared()
    records = {}
    for run in study.runs():
        directory = store.run(run).path
        for file in (directory / "run.json", *sorted((directory / "records").rglob("*.json"))):
            records[str(file.relative_to(runs))] = _pack(json.loads(file.read_text(encoding="utf-8")), shared)
    return {"study": study.file.name, "shared": shared.values, "records": records}


def _pack(record: Json, shared: _Shared) -> Json:
    packed = dict(record)
    if "items" in packed and "metrics" in packed:
        packed["items"] = _pack_items(packed["items"], shared)
    if packed.get("kind") == "geometry":
        packed |= {"rows": [], "arrays": None, "arrays_sha256": None}
    if packed.get("rollouts"):
        packed["rollouts"] = {**packed["rollouts"], "samples": []}
    elif "log" in packed:
        step = -(-len(packed["log"]) // LOG_ENTRIES) or 1
        packed["log"] = packed["log"][::-step][::-1]
    for field in MEASURES:
        if isinstance(packed.get(field), list):
            packed[field] = _pack_measures(packed[field], shared)
    for field in SHARED:
        if isinstance(packed.get(field), dict):
            packed[field] = {"shared": shared.put(packed[field])}
    return packed


def _pack_measures(measures: Sequence[Json], shared: _Shared) -> Json:
    """Hold what measures are apart from their numbers."""
    number = (int, float)
    heads = [{key: None if isinstance(value, number) else value for key, value in one.items()} for one in measures]
    numbers = [{key: value for key, value in one.items() if isinstance(value, number)} for one in measures]
    keys = [list(one) for one in numbers]
    return {"heads": shared.put(heads), "keys": shared.put(keys), "numbers": [list(one.values()) for one in numbers]}


def _restored_measures(packed: Json, shared: Sequence[Any]) -> list[Json]:
    parts = zip(shared[packed["heads"]], shared[packed["keys"]], packed["numbers"], strict=True)
    return [{**head, **dict(zip(keys, numbers, strict=True))} for head, keys, numbers in parts]


def _pack_items(items: Sequence[Json], shared: _Shared) -> Json:
    packed: Json = {"ids": shared.put([item["id"] for item in items]), "values": _digits([i["value"] for i in items])}
    if any(item["weight"] != 1 for item in items):
        packed["weights"] = shared.put([item["weight"] for item in items])
    if any(item.get("group") for item in items):
        packed["groups"] = shared.put([item.get("group", "") for item in items])
    names = list(dict.fromkeys(name for item in items for name in item["others"]))
    if names:
        packed["others"] = {name: [item["others"].get(name) for item in items] for name in names}
    reasons = {str(place): item["reason"] for place, item in enumerate(items) if item["reason"]}
    return packed | ({"reasons": reasons} if reasons else {})


def _digits(values: Sequence[float | None]) -> str | list[float | None]:
    """Return values that are all 0, 1 or unknown as one text, for example ``01-1``; others as they are."""
    known = {0.0: "0", 1.0: "1", None: "-"}
    return "".join(known[value] for value in values) if set(values) <= set(known) else list(values)


def unpack(kept: Json, runs: Path) -> None:
    """Write the records of a kept study into a runs directory.

    Args:
        kept: what :func:`keep` returned.
        runs: the directory; made if it is not there.
    """
    for name, record in kept["records"].items():
        file = runs / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_restore(record, kept["shared"])), encoding="utf-8")


def _restore(packed: Json, shared: Sequence[Any]) -> Json:
    record = dict(packed)
    for field in SHARED:
        if isinstance(record.get(field), dict):
            record[field] = shared[record[field]["shared"]]
    for field in MEASURES:
        if isinstance(record.get(field), dict):
            record[field] = _restored_measures(record[field], shared)
    if isinstance(record.get("items"), dict):
        record["items"] = list(_restored_items(record["items"], shared))
    return record


def _restored_items(packed: Mapping[str, Any], shared: Sequence[Any]) -> Iterator[Json]:
    values = packed["values"]
    if isinstance(values, str):
        values = [{"0": 0.0, "1": 1.0, "-": None}[digit] for digit in values]
    for place, (name, value) in enumerate(zip(shared[packed["ids"]], values, strict=True)):
        others = {metric: column[place] for metric, column in packed.get("others", {}).items()}
        item: Json = {
            "id": name,
            "value": value,
            "weight": shared[packed["weights"]][place] if "weights" in packed else 1.0,
            "others": {metric: pair for metric, pair in others.items() if pair is not None},
            "reason": packed.get("reasons", {}).get(str(place), ""),
        }
        group = shared[packed["groups"]][place] if "groups" in packed else ""
        yield item | ({"group": group} if group else {})


def read_kept(name: str) -> Json:
    """Return a kept study."""
    found: Json = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def write_kept(kept: Json, more: Json) -> Path:
    """Write a kept study, a line for each record; return the file.

    Args:
        kept: what :func:`keep` returned.
        more: what else is to be said of it.
    """
    head = {"study": kept["study"], **more}
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()]
    shared = ",\n".join(f"  {json.dumps(value, ensure_ascii=False)}" for value in kept["shared"])
    records = ",\n".join(f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in kept["records"].items())
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{kept['study']}.json"
    text = "\n".join(["{", *lines, f' "shared": [\n{shared}\n ],\n "records": {{\n{records}\n }}\n}}\n'])
    file.write_text(text, encoding="utf-8")
    return file


def main() -> None:
    """Keep or unpack a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("keep", "unpack"))
    parser.add_argument("study", help="name of a shipped study")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument(
        "--date", default=str(date.today()), help="day on which the records were made; today if left out"
    )
    args = parser.parse_args()
    if args.command == "unpack":
        unpack(read_kept(args.study), args.runs)
        return
    kept = keep(read_study(find_study(args.study)), args.runs)
    print(write_kept(kept, {"date": args.date}))  # noqa: T201


if __name__ == "__main__":
    main()
