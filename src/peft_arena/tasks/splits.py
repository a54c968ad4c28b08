"""Cutting items into splits by the hash of their content, so that no content is in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from peft_arena.tasks.base import Item


class Keyed(NamedTuple):
    """An item and the content that decides its split; items with equal keys stay together."""

    key: str
    item: Item


def normal_key(text: str) -> str:
    """Return the text in one letter case and with single spaces: what counts as the same content."""
    return " ".join(text.casefold().split())


def key_hash(text: str) -> int:
    """Return a number that depends on the normalised text only, the same on every machine."""
    return int.from_bytes(hashlib.sha256(normal_key(text).encode("utf-8", "surrogatepass")).digest()[:8], "big")


def cut(rows: Iterable[Keyed], sizes: Mapping[str, int | None]) -> dict[str, tuple[Item, ...]]:
    """Deal items out to splits in the order of their keys' hashes.

    Splits are filled in the order given, each with at least its size, until the items run out; a size of None takes
    all that is left. Items with one key are dealt out together, and an item that occurs twice is kept once. Within a
    split the order is that of the hashes, so the first n items are a random sample of it.
    """
    groups: dict[str, dict[str, Item]] = {}
    for key, item in rows:
        groups.setdefault(normal_key(key), {}).setdefault(item.id, item)
    ordered = sorted(groups, key=lambda key: (key_hash(key), key))
    found: dict[str, list[Item]] = {name: [] for name in sizes}
    pending = list(sizes)
    for key in ordered:
        while pending:
            size = sizes[pending[0]]
            if size is None or len(found[pending[0]]) < size:
                break
            pending.pop(0)
        if not pending:
            break
        found[pending[0]].extend(groups[key].values())
    return {name: tuple(items) for name, items in found.items()}


def cut_by_share(rows: Sequence[Keyed], shares: Mapping[str, float]) -> dict[str, tuple[Item, ...]]:
    """Deal items out by shares of the number of keys; every split gets at least one key if there are enough."""
    keys = sorted({normal_key(row.key) for row in rows}, key=lambda key: (key_hash(key), key))
    names = list(shares)
    total = sum(shares.values())
    spare = len(keys) - len(names)
    bounds: list[int] = []
    reached = 0.0
    for place, name in enumerate(names):
        reached += shares[name]
        bound = round(len(keys) * reached / total)
        if spare >= 0:
            bound = min(max(bound, (bounds[-1] if bounds else 0) + 1), spare + place + 1)
        bounds.append(bound)
    split_of: dict[str, str] = {}
    start = 0
    for name, end in zip(names, bounds, strict=True):
        split_of.update({key: name for key in keys[start:end]})
        start = end
    place_of = {key: place for place, key in enumerate(keys)}
    found: dict[str, dict[str, Item]] = {name: {} for name in names}
    for row in sorted(rows, key=lambda row: place_of[normal_key(row.key)]):
        found[split_of[normal_key(row.key)]].setdefault(row.item.id, row.item)
    return {name: tuple(items.values()) for name, items in found.items()}
