"""Cutting items into splits by the hash of their content, so that no content is in two splits."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

from peft_arena.tasks.base import Item, Split


class Keyed(NamedTuple):
    """An item and the content that decides its split; items with equal keys stay together and are one group."""

    key: str
    item: Item


_QUOTES = "\"'`\u00b4\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2039\u203a\u00ab\u00bb\u2032\u2033"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_PLAIN_SIGNS = str.maketrans({**dict.fromkeys(_DASHES, "-"), **dict.fromkeys(_QUOTES, "")})
_ENDING = re.compile(r"[.,;:!?]+(?=\s|$)")


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
        found = " ".join(_shown(unicodedata.normalize("NFKC", text)).casefold().split())
        if found == text:
            break
        text = found
    return text


_ROUNDS = 4
"""A fold of letter case may leave what composes anew, and the other way around: two rounds do, four are safe."""


def _shown(text: str) -> str:
    """Leave out the characters that show nothing: format and control characters that are no white space, fillers."""
    return text.translate(_HIDDEN)


class _Signs(dict[int, int | str | None]):
    """A table for ``str.translate`` that is filled in sign by sign: None leaves a sign out."""

    def __init__(self, change: Callable[[str], str | None]) -> None:
        super().__init__()
        self.change = change

    def __missing__(self, code: int) -> int | str | None:
        self[code] = self.change(chr(code))
        return self[code]


def _unless_hidden(sign: str) -> str | None:
    """Leave out what shows nothing: Unicode's default ignorable code points, controls, and blanks that are no space."""
    kind, code = unicodedata.category(sign), ord(sign)
    if kind == "Cf" or (kind == "Cc" and not sign.isspace()) or sign in _BLANK:
        return None
    return None if any(low <= code <= high for low, high in _IGNORABLE) else sign


_BLANK = "\u034f\u115f\u1160\u3164\uffa0\u2800"
_IGNORABLE = (
    (0xFE00, 0xFE0F),
    (0x180B, 0x180F),
    (0x17B4, 0x17B5),
    (0x2065, 0x2065),
    (0xFFF0, 0xFFF8),
    (0xE0000, 0xE0FFF),
)
_HIDDEN = _Signs(_unless_hidden)
_SPACES = _Signs(lambda sign: " " if unicodedata.category(sign) == "Zs" else sign)
_ACCENTS = _Signs(lambda sign: None if unicodedata.combining(sign) else sign)
_ODD = re.compile(r"[^\t-\r -~]")
"""What is not plain ASCII text."""


def same_text(text: str) -> str:
    """Return a text as far as a reader can tell: composed (NFC), without what shows nothing, plain spaces, trimmed.

    Unlike :func:`normal_key` it keeps letter case, line ends and signs such as superscripts: texts with the same result
    are one text written in two ways.
    """
    if _ODD.search(text):
        text = _shown(unicodedata.normalize("NFC", text)).translate(_SPACES)
    return text.strip()


def near_key(text: str) -> str:
    """Return the canonical form without accents, quotation marks and signs at the end of words, dashes alike.

    Texts with the same key and different canonical forms are near duplicates.
    """
    plain = normal_key(text)
    if not plain.isascii():
        parted = unicodedata.normalize("NFKD", plain)
        plain = parted.translate(_ACCENTS)
    return " ".join(_ENDING.sub(" ", plain.translate(_PLAIN_SIGNS)).split())


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
