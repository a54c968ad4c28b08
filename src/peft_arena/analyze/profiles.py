"""Profiles over singular directions as figures want them: by kind of module, smoothed, few enough points to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl

Array = NDArray[np.float64]
COLUMNS = ("deviation", "adaptation", "change_singular_value", "singular_value")
"""Columns of the arrays of a record that are shown over the singular directions as they are."""
MISALIGNMENT = "misalignment"
"""1 - alignment: alignments are so near to one that only what is missing can be seen."""
SMALLEST_WINDOW = 5


@dataclass(frozen=True, eq=False)
class Profile:
    """What one module, or the mean over some modules, has in the singular directions of its pretrained weight."""

    index: NDArray[np.intp]
    """Which directions, 0 the one of the largest singular value; shape (points,)."""
    values: Mapping[str, Array]
    """Column (see :data:`COLUMNS` and :data:`MISALIGNMENT`) to values, shape (points,)."""
    modules: int
    """Modules behind each value."""
    directions: int
    """How many directions the weight has; more than there are points where the profile was thinned."""

    def smoothed(self, window: int) -> Profile:
        """Return the profile's moving average."""
        return replace(self, values={name: moving_average(found, window) for name, found in self.values.items()})

    def thinned(self, most: int) -> Profile:
        """Return at most so many evenly spread points of the profile."""
        kept = places(len(self.index), most)
        return replace(self, index=self.index[kept], values={name: found[kept] for name, found in self.values.items()})


def kind_of(module: str) -> str:
    """Return what kind of module a name is: what is left of it inside its transformer block.

    ``model.layers.3.self_attn.q_proj`` is a ``self_attn.q_proj``; further numbers, as of experts, become ``*``.
    """
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return module
    return ".".join("*" if part.isdigit() else part for part in parts[numbers[0] + 1 :]) or module


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """Return the shortest end of each kind's name that no other kind shares."""
    every = list(dict.fromkeys(kinds))
    found = {}
    for kind in every:
        parts = kind.split(".")
        ends = [".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1)]
        lonely = [end for end in ends if sum(other == end or other.endswith(f".{end}") for other in every) == 1]
        found[kind] = lonely[0] if lonely else kind
    return found


def window_of(directions: int) -> int:
    """Return the width of the moving average that a profile is shown with: 2 % of it, at least 5, and odd."""
    return max(SMALLEST_WINDOW, round(directions / 50) // 2 * 2 + 1)


def moving_average(values: Sequence[float] | Array, window: int) -> Array:
    """Return the centred moving average of a profile, its ends padded by reflection.

    Args:
        values: shape (directions,).
        window: odd width; where the profile is too short to be padded, the widest that fits is used.
    """
    given = np.asarray(values, dtype=np.float64)
    half = min(window // 2, len(given) - 1)
    if half < 1:
        return given
    padded = np.pad(given, half, mode="reflect")
    return np.convolve(padded, np.full(2 * half + 1, 1.0 / (2 * half + 1)), mode="valid")


def places(count: int, most: int) -> NDArray[np.intp]:
    """Return at most ``most`` evenly spread positions of ``count``, the first and the last among them."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(np.intp))


def module_profiles(arrays: pl.DataFrame) -> dict[str, Profile]:
    """Return the profile of every module, in the order of the arrays; columns without any value are left out.

    Args:
        arrays: long table of a spectra record: a row for each singular direction of each module.
    """
    columns = [name for name in COLUMNS if name in arrays.columns]
    found = {}
    for (module,), part in arrays.group_by(["module"], maintain_order=True):
        ordered = part.sort("index")
        values = {name: ordered[name].cast(float).to_numpy() for name in columns if not ordered[name].is_null().any()}
        if "alignment" in ordered.columns and not ordered["alignment"].is_null().any():
            values[MISALIGNMENT] = np.maximum(1.0 - ordered["alignment"].cast(float).to_numpy(), 0.0)
        index = ordered["index"].cast(int).to_numpy().astype(np.intp)
        found[str(module)] = Profile(index, values, 1, len(index))
    return found


def by_kind(profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    """Return the mean profile of every kind of module, over all modules of the kind that have as many directions."""
    groups: dict[str, list[Profile]] = {}
    for module, profile in profiles.items():
        groups.setdefault(kind_of(module), []).append(profile)
    return {kind: mean_profile(found) for kind, found in groups.items()}


def mean_profile(profiles: Sequence[Profile]) -> Profile:
    """Return the mean over profiles, direction by direction; those of another length than most are left out."""
    lengths = [len(profile.index) for profile in profiles]
    usual = max(sorted(set(lengths)), key=lengths.count)
    used = [profile for profile in profiles if len(profile.index) == usual]
    names = [name for name in used[0].values if all(name in profile.values for profile in used)]
    values = {name: np.mean([profile.values[name] for profile in used], axis=0) for name in names}
    return Profile(used[0].index, values, sum(profile.modules for profile in used), used[0].directions)
