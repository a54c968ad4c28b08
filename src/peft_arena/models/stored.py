"""Which weight files a model directory has, and what they must hold to be the model and nothing else.

transformers fills what a file lacks with random numbers, leaves out what has no place, and casts numbers of any type.
Here each of these is refused by name. Only safetensors files are read; a pickle can run any program.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of stored weights as safetensors writes them; all others are counts, masks, or numbers packed by a library."""
EXAMPLES = 3
"""Tensors that a message names."""


def named_files(directory: Path) -> dict[str, Path] | None:
    """Return by the name of each tensor of a sharded model the file that its index says it is in.

    Returns:
        None where the model is not sharded: it has one file, which goes before an index as it does in transformers.

    Raises:
        UserError: the index is damaged, or names a file outside of the directory.
    """
    index = directory / INDEX
    if (directory / SINGLE).exists() or not index.exists():
        return None
    entries = read_table(index).get("weight_map")
    if not isinstance(entries, dict):
        raise UserError(f"{index} is damaged: weight_map must be an object of names and files")
    found: dict[str, Path] = {}
    for name, shard in entries.items():
        if not isinstance(shard, str) or not shard or "\0" in shard:
            raise UserError(f"{index} is damaged: the file of {name} is {shard!r}, and must be the name of a file")
        found[name] = directory / shard
    if not found:
        raise UserError(f"{index} is damaged: its weight_map is empty")
    for file in sorted(set(found.values())):
        _refuse_outside(directory, file, index)
    return found


def _refuse_outside(directory: Path, file: Path, index: Path) -> None:
    """Refuse a file that is not in a directory, also by a link; the hub's cache links its own files, which may be."""
    shard = PurePosixPath(file.relative_to(directory).as_posix() if file.is_relative_to(directory) else str(file))
    inside = not shard.is_absolute() and ".." not in shard.parts
    if inside:
        try:
            target = file.resolve()
        except (OSError, RuntimeError) as error:
            raise UserError(f"{index} names {shard}, which cannot be found: {first_line(error)}") from error
        home = directory.resolve()
        allowed = [home]
        if home.parent.name == "snapshots":
            allowed.append(home.parent.parent / "blobs")
        inside = any(target.is_relative_to(place) for place in allowed)
    if not inside:
        raise UserError(
            f"{index} names {shard}, which is outside of {directory}: the files of a model must lie in its directory"
        )


def weight_paths(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files that a model directory's weights are in.

    Raises:
        UserError: there are none, or the index is damaged or names a file outside of the directory.
    """
    sharded = named_files(directory)
    if sharded is not None:
        return tuple(sorted(set(sharded.values())))
    if (directory / SINGLE).exists():
        return (directory / SINGLE,)
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory} holds its weights as {pickles[0]}, a pickle, which can run any program and is not read: "
            f"convert it to {SINGLE}"
        )
    raise UserError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX} is there")


def is_bare(directory: Path) -> bool:
    """Say whether a directory holds no weights of any kind."""
    return not any(any(directory.glob(pattern)) for pattern in (SINGLE, INDEX, *PICKLES))


def check_weight_files(directory: Path) -> None:
    """Check the weight files of a model directory by their headers; no tensor is read.

    Raises:
        UserError: a file is missing, damaged, cut short, outside of the directory or a pickle; a tensor is in none of
            the files, in two of them, or not in the one that the index says; or it holds whole numbers under a name
            of weights.
    """
    from safetensors import SafetensorError, safe_open

    sharded = named_files(directory)
    where: dict[str, Path] = {}
    odd: dict[str, str] = {}
    for file in weight_paths(directory):
        if not file.is_file():
            raise UserError(f"{file} is missing: no weights can be read from {directory}")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    if name in where:
                        raise UserError(f"{file} holds {name}, which {where[name].name} has already")
                    where[name] = file
                    kind = str(opened.get_slice(name).get_dtype())
                    if kind not in FLOATS and name.endswith((".weight", ".bias")):
                        odd[name] = kind
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {first_line(error)}") from error
    lost = [name for name, file in (sharded or {}).items() if where.get(name) != file]
    if lost:
        raise UserError(f"{directory} lacks {_names(lost)} where {INDEX} says they are")
    if odd and not _packed(directory):
        kinds = ", ".join(sorted(set(odd.values())))
        raise UserError(
            f"{directory} holds {_names(odd)} as {kinds}: weights are F64, F32, F16 or BF16, unless config.json says "
            "how they are quantised"
        )


def lost_among_many(directory: Path) -> str:
    """Say which tensors of a numbered kind, such as experts, lack what others of the kind have; empty if none does.

    transformers puts such tensors together, and what it then says of one that is missing does not name it.
    """
    every = stored_shapes(directory)
    kinds: dict[str, dict[str, set[str]]] = {}
    for name in every:
        numbered = re.fullmatch(r"(.*\.\d+\..+)\.(\d+)\.(.+)", name)
        if numbered:
            kinds.setdefault(numbered[1], {}).setdefault(numbered[2], set()).add(numbered[3])
    lost = []
    for kind, members in kinds.items():
        parts = set().union(*members.values())
        lost += [f"{kind}.{number}.{part}" for number, held in members.items() for part in sorted(parts - held)]
    return f"its files lack {_names(sorted(lost))}, which others of the kind have" if lost else ""


def _packed(directory: Path) -> bool:
    """Say whether a model's configuration says that its weights are quantised; one that is damaged says nothing."""
    try:
        table = read_table(directory / "config.json")
    except UserError:
        return False
    return bool(table.get("quantization_config") or table.get("compression_config"))


def whole(
    made: tuple[PreTrainedModel, Mapping[str, Any]], where: str, directory: Path | None = None
) -> PreTrainedModel:
    """Return a model that transformers has loaded with ``output_loading_info``, if all of it is from its files.

    What transformers itself counts as harmless (tied weights, buffers of older versions) is.

    Args:
        made: what ``from_pretrained`` returned, with ``ignore_mismatched_sizes``: shapes are in the report then.
        where: names the files in messages.
        directory: of the files, to say which of many tensors that are put together is missing; None: not at hand.

    Raises:
        UserError: a tensor is missing, has no place or another shape, or holds an entry that is no finite number.
    """
    model, report = made
    mismatched = sorted(report.get("mismatched_keys") or ())
    if mismatched:
        lost = "" if directory is None else lost_among_many(directory)
        if lost:
            raise UserError(f"{where}: {lost}")
        name, given, wanted = mismatched[0]
        more = f", and {len(mismatched) - 1} more tensors have another shape" if len(mismatched) > 1 else ""
        raise UserError(
            f"{where}: its files hold {name} as {tuple(given)}, its configuration says {tuple(wanted)}{more}"
        )
    said = []
    missing, stray = (sorted(map(str, report.get(key) or ())) for key in ("missing_keys", "unexpected_keys"))
    if missing:
        said.append(f"lack {_names(missing)}, which would be random numbers")
    if stray:
        said.append(f"hold {_names(stray)}, for which {type(model).__name__} has no place")
    if said:
        raise UserError(f"{where}: its files {' and '.join(said)}")
    if report.get("error_msgs"):
        raise UserError(f"{where}: {str(report['error_msgs'][0]).splitlines()[0]}")
    refuse_not_finite(model, where)
    return model


def check_names(model: PreTrainedModel, directory: Path) -> None:
    """Check that a model directory has a tensor for every weight of an architecture and no other, reading none.

    Names that are not the model's own are left to transformers, which renames what older versions wrote; it is asked
    on the meta device.

    Args:
        model: on the meta device; it stays as it is.
        directory: of its files.

    Raises:
        UserError: a tensor is missing, has no place or another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    shapes = stored_shapes(directory)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if all(name in shapes or tied.get(name) in shapes for name in state) and shapes.items() <= state.items():
        return
    try:
        with unreported():
            made: Any = AutoModelForCausalLM.from_pretrained(
                str(directory),
                device_map="meta",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        lost = lost_among_many(directory)
        raise UserError(f"{directory}: {lost}" if lost else f"cannot load {directory}: {first_line(error)}") from error
    whole(made, str(directory), directory)


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a model directory's files, which must be sound, by name; reads none."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in weight_paths(directory):
        with safe_open(file, framework="pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def refuse_not_finite(model: PreTrainedModel, where: str) -> None:
    """Refuse a model with weights that are no numbers.

    Raises:
        UserError: an entry of a parameter, or of a buffer that belongs to its files, is infinite or not a number.
    """
    import math

    found = []
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta or tensor.element_size() == 1:
            continue
        if not math.isfinite(float(tensor.sum())) and not bool(tensor.isfinite().all()):
            found.append(name)
    if found:
        kind = str(model.dtype).removeprefix("torch.")
        raise UserError(f"{where}: its files hold {_names(found)} with entries that are no finite numbers in {kind}")


@contextmanager
def unreported() -> Iterator[None]:
    """Keep transformers from printing its table of missing tensors inside the block: ours is one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _names(names: Iterable[str]) -> str:
    """Return how many tensors there are, with the first of them."""
    every = list(names)
    shown = ", ".join(every[:EXAMPLES])
    rest = ", ..." if len(every) > EXAMPLES else ""
    return f"{len(every)} tensor{'s' * (len(every) > 1)} ({shown}{rest})"
