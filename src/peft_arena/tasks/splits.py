"""Cutting items into splits by the hash of their content, so that no content is in two splits."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

from peft_arena.tasks.base import Item, Split


class Keyed(NamedTuple):
    """An item and the content that decides its split; items with equal keys stay together and are one group."""

    key: str
    item: Item


_QUOTES = re.compile("[\"'`\u00b4\u2018-\u201f\u2039\u203a\u00ab\u00bb\u2032\u2033]")
_DASHES = re.compile("[\u2010-\u2015\u2212]")
_ACCENTS = re.compile("[\u0300-\u036f]")
_ENDING = re.compile(r"[.,;:!?]+(?=\s|$)")
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_ODD = re.compile(r"[^\t-\r -~]")
"""What is not plain ASCII text."""
_HIDDEN = re.compile(
    "[\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f\\xad\\u034f\\u0600-\\u0605\\u061c\\u06dd\\u070f\\u0890\\u0891\\u08e2\\u115f\\u1160\\u17b4\\u17b5"
    "\\u180b-\\u180f\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u206f\\u2800\\u3164\\ufe00-\\ufe0f\\ufeff\\uffa0\\ufff0-\\ufffb"
    "\\U000110bd\\U000110cd\\U00013430-\\U0001343f\\U0001bca0-\\U0001bca3\\U0001d173-\\U0001d17a\\U000e0000-\\U000e0fff]"
)
"""What shows nothing: Unicode's format characters and default ignorable code points, controls that are no white space,
and blanks that are no space."""


def normal_key(text: str) -> str:
    """Return the canonical form of a text: what counts as the same content.

    Compatibility forms are composed (NFKC), so that full-width letters, no-break spaces and accents written as signs of
    their own are as they are usually written; format characters that show nothing (zero-width spaces and joiners,
    soft hyphens, direction marks, variation selectors) are left out; letters have one case and spaces are single.
    Half surrogate pairs stay. The canonical form of a canonical form is itself.
    """
    if not _ODD.search(text):
        return " ".join(text.casefold().split())
    for _ in range(_ROUNDS):
        text = " ".join(_HIDDEN.sub("", unicodedata.normalize("NFKC", text)).casefold().split())
        if unicodedata.is_normalized("NFKC", text):
            break
    return text


_ROUNDS = 4
"""A fold of letter case may leave what composes anew, and the other way around: two rounds do, four are safe."""


def same_text(text: str) -> str:
    """Return a text as far as a reader can tell: composed (NFC), without what shows nothing, plain spaces, trimmed.

    Unlike :func:`normal_key` it keeps letter case, line ends and signs such as superscripts: texts with the same result
    are one text written in two ways.
    """
    if _ODD.search(text):
        text = _SPACES.sub(" ", _HIDDEN.sub("", unicodedata.normalize("NFC", text)))
    return text.strip()


def near_key(text: str) -> str:
    """Return the canonical form without accents, quotation marks and signs at the end of words, dashes alike.

    Texts with the same key and different canonical forms are near duplicates.
    """
    plain = normal_key(text)
    if not plain.isascii():
        plain = _DASHES.sub("-", _ACCENTS.sub("", unicodedata.normalize("NFKD", plain)))
    return " ".join(_ENDING.sub(" ", _QUOTES.sub("", plain)).split())


def key_hash(text: str) -> int:
    """Return a number that depends on the normalised text only, the same on every machine."""
    return int.from_bytes(hashlib.sha256(normal_key(text).encode("utf-8", "surrogatepass")).digest()[:8], "big")


def grouped(rows: Iterable[Keyed]) -> dict[str, tuple[Item, ...]]:
    """Return the different items of each key, in the order given; those that share a key are marked as one group.

    An item that names a group keeps it.
    """
    found: dict[str, dict[str, Item]] = {}
    for key, item in rows:
        found.setdefault(normal_key(key), {}).setdefault(item.id, item)
    return {key: _marked(f"{key_hash(key):016x}", tuple(items.values())) for key, items in found.items()}


def _marked(name: str, items: tuple[Item, ...]) -> tuple[Item, ...]:
    return items if len(items) < 2 else tuple(replace(item, group=item.group or name) for item in items)


def with_groups(rows: Iterable[Keyed]) -> tuple[Item, ...]:
    """Return the different items in the order given, those that share a key marked as one group."""
    rows = tuple(rows)
    marked = {item.id: item for items in grouped(rows).values() for item in items}
    return tuple(marked[key] for key in dict.fromkeys(row.item.id for row in rows))


def cut(rows: Iterable[Keyed], sizes: Mapping[str, int | None]) -> dict[str, tuple[Item, ...]]:
    """Deal items out to splits in the order of their keys' hashes.

    Splits are filled in the order given, each with at least its size, until the items run out; a size of None takes
    all that is left. Items with one key are dealt out together, and an item that occurs twice is kept once. Within a
    split the order is that of the hashes, so the first n items are a random sample of it.
    """
    groups = grouped(rows)
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
        found[pending[0]].extend(groups[key])
    return {name: tuple(items) for name, items in found.items()}


def _place(split: str) -> tuple[int, str]:
    """Return the place of a split where items are dealt out: that of training, validation, test, then by name."""
    known = get_args(Split)
    return (known.index(split) if split in known else len(known), split)


def cut_by_share(rows: Sequence[Keyed], shares: Mapping[str, float]) -> dict[str, tuple[Item, ...]]:
    """Deal items out by shares of the number of keys; every split gets at least one key if there are enough.

    The order in which the shares are written plays no part: a record may give it back as another.
    """
    groups = grouped(rows)
    keys = sorted(groups, key=lambda key: (key_hash(key), key))
    names = sorted(shares, key=_place)
    total = sum(shares[name] for name in names)
    spare = len(keys) - len(names)
    bounds: list[int] = []
    reached = 0.0
    for place, name in enumerate(names):
        reached += shares[name]
        bound = round(len(keys) * reached / total)
        if spare >= 0:
            bound = min(max(bound, (bounds[-1] if bounds else 0) + 1), spare + place + 1)
        bounds.append(bound)
    starts = [0, *bounds[:-1]]
    return {
        name: tuple(item for key in keys[start:end] for item in groups[key])
        for name, start, end in zip(names, starts, bounds, strict=True)
    }
