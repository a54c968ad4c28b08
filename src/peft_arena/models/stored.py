"""Which weight files a model directory has, and what they must hold to be the model and nothing else.

transformers fills what a file lacks with random numbers, leaves out what has no place, and casts numbers of any type.
Here each of these is refused by name. Only safetensors files are read; a pickle can run any program.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError, first_line
from peft_arena.models.headers import read_headers

if TYPE_CHECKING:
    from torch import Tensor
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
        UserError: a file is missing, damaged, cut short, outside of the directory or a pickle; a tensor is in none
            of the files, in two of them, or not in the one that the index says; or the weights are there twice, as one
            file and as shards.
    """
    sharded = named_files(directory)
    if sharded is None and (second := _second_set(directory)):
        raise UserError(
            f"{directory} holds two sets of weights, {SINGLE} and {second}, which {INDEX} names: move one of them away"
        )
    where = read_headers(weight_paths(directory), directory)
    lost = [name for name, file in (sharded or {}).items() if name not in where or where[name].file != file]
    if lost:
        raise UserError(f"{directory} lacks {_names(lost)} where {INDEX} says they are")


def _second_set(directory: Path) -> str:
    """Return a shard that lies beside a file with the whole model; empty if there is none."""
    index = directory / INDEX
    entries = read_table(index).get("weight_map") if index.exists() else None
    shards = sorted({name for name in entries.values() if isinstance(name, str)}) if isinstance(entries, dict) else []
    return next((name for name in shards if name != SINGLE and "\0" not in name and (directory / name).exists()), "")


def check_members(model: PreTrainedModel, directory: Path) -> None:
    """Check stored tensors one by one, which transformers casts and puts together without a word; reads none.

    Args:
        model: the architecture, with weights or without.
        directory: of its files, which must be sound.

    Raises:
        UserError: one is no float where the model has floats, or the numbers of a kind, such as experts, have a gap.
    """
    own = model.state_dict()
    kinds = {name: place.kind for name, place in read_headers(weight_paths(directory)).items()}
    by_end = _by_end(own)
    places = {name: place for name in kinds if (place := _place(name, own, by_end)) is not None}
    _refuse_whole_numbers(model, kinds, {name: own[place] for name, place in places.items()}, directory)
    odd = []
    for kind, members in _numbered(kinds).items():
        wanted = {str(number) for number in range(len(members))}
        beyond = [f"{kind}.{number}" for number in sorted(members, key=_by_number) if number not in wanted]
        if not any(f"{kind}.{number}.{part}" in places for number, parts in members.items() for part in parts):
            odd += beyond
    if odd:
        raise UserError(
            f"{directory} holds {', '.join(odd[:EXAMPLES])}{', ...' * (len(odd) > EXAMPLES)}, and lacks one of a lower "
            "number: the numbers of tensors that are put together must go from 0 up without a gap"
        )


def _refuse_whole_numbers(
    model: PreTrainedModel, kinds: Mapping[str, str], own: Mapping[str, Tensor], directory: Path
) -> None:
    """Refuse stored numbers that are no floats, but for counts and masks that the model itself has or leaves out."""
    odd: dict[str, str] = {}
    for name, kind in kinds.items():
        if kind in FLOATS or (name in own and not own[name].is_floating_point()):
            continue
        if name in own or not _left_out(model, name):
            odd[name] = kind
    if odd and not _packed(directory):
        found = ", ".join(sorted(set(odd.values())))
        raise UserError(
            f"{directory} holds {_names(odd)} as {found}: weights are F64, F32, F16 or BF16, unless config.json says "
            "how they are quantised, in a way that transformers knows"
        )


def _refuse_doubles(model: PreTrainedModel, directory: Path) -> None:
    """Refuse tensors under older names where the files hold all weights under their own: one of both is dropped.

    Args:
        model: loaded, and no tensor had no place.
        directory: of its files.

    Raises:
        UserError: there are such tensors.
    """
    kinds = {name: place.kind for name, place in read_headers(weight_paths(directory)).items()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    there = named & set(kinds)
    there |= {end for pair in tied.items() if there & set(pair) for end in pair}
    state = model.state_dict()
    twice = [name for name in kinds if name not in state and not _left_out(model, name)]
    if there >= named and twice and not _packed(directory):
        raise UserError(
            f"{directory} holds {_names(twice)} under older names, and the same weights under those of today: one of "
            "each two would be dropped"
        )


def _left_out(model: PreTrainedModel, name: str) -> bool:
    """Say whether transformers leaves out a stored tensor that older versions wrote, and says nothing."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return any(re.search(pattern, name) for pattern in patterns)


def _by_end(own: Iterable[str]) -> dict[str, str]:
    """Return a model's names by what is left of them when their first parts are taken away."""
    return {end: name for name in own for end in _ends(name)}


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(1, len(parts))]


def _place(name: str, own: Mapping[str, Tensor], by_end: Mapping[str, str]) -> str | None:
    """Return a model's name of a stored tensor, which may lack its first parts or have more; None if it has none."""
    if name in own:
        return name
    return by_end.get(name) or next((end for end in _ends(name) if end in own), None)


def _numbered(names: Iterable[str]) -> dict[str, dict[str, set[str]]]:
    """Return by each kind of numbered tensors inside of a block, such as experts, the parts that each number has."""
    kinds: dict[str, dict[str, set[str]]] = {}
    for name in names:
        numbered = re.fullmatch(r"(.*\.\d+\..+)\.(\d+)\.(.+)", name)
        if numbered:
            kinds.setdefault(numbered[1], {}).setdefault(numbered[2], set()).add(numbered[3])
    return kinds


def _by_number(text: str) -> tuple[int, str]:
    return int(text), text


def lost_among_many(directory: Path) -> str:
    """Say which tensors of a numbered kind, such as experts, lack what others of the kind have; empty if none does.

    transformers puts such tensors together, and what it then says of one that is missing does not name it.
    """
    lost = []
    for kind, members in _numbered(read_headers(weight_paths(directory))).items():
        parts = set().union(*members.values())
        lost += [f"{kind}.{number}.{part}" for number, held in members.items() for part in sorted(parts - held)]
    return f"its files lack {_names(sorted(lost))}, which others of the kind have" if lost else ""


def _packed(directory: Path) -> bool:
    """Say whether a model's configuration names a quantisation that transformers applies; a damaged one names none."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    try:
        table = read_table(directory / "config.json")
    except UserError:
        return False
    inner = table.get("text_config")
    found = table.get("quantization_config") or (isinstance(inner, dict) and inner.get("quantization_config"))
    if not isinstance(found, dict):
        return False
    if found.get("load_in_8bit") or found.get("load_in_4bit"):
        return True
    named = found.get("quant_method")
    return isinstance(named, str) and named in AUTO_QUANTIZATION_CONFIG_MAPPING


def whole(
    made: tuple[PreTrainedModel, Mapping[str, Any]], where: str, directory: Path | None = None
) -> PreTrainedModel:
    """Return a model that transformers has loaded with ``output_loading_info``, if all of it is from its files.

    What transformers itself counts as harmless (tied weights, buffers of older versions) is.

    Args:
        made: what ``from_pretrained`` returned, with ``ignore_mismatched_sizes``: shapes are in the report then.
        where: names the files in messages.
        directory: of the files, to look at what transformers casts and puts together; None: not at hand.

    Raises:
        UserError: a tensor is missing, has no place, another shape or another type, or holds an entry that is no finite
            number.
    """
    model, report = made
    if directory is not None:
        check_members(model, directory)
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
    if directory is not None:
        _refuse_doubles(model, directory)
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
        UserError: a tensor is missing, has no place, another shape or another type.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_members(model, directory)
    shapes = {name: place.shape for name, place in read_headers(weight_paths(directory)).items()}
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
    """Keep transformers from printing bars, notes and tables of tensors inside the block: ours is one line."""
    from transformers.utils import logging as notes

    loggers = [logging.getLogger(name) for name in ("transformers", "transformers.modeling_utils")]
    levels, bars = [logger.level for logger in loggers], notes.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    notes.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            notes.enable_progress_bar()


def _names(names: Iterable[str]) -> str:
    """Return how many tensors there are, with the first of them."""
    every = list(names)
    shown = ", ".join(every[:EXAMPLES])
    rest = ", ..." if len(every) > EXAMPLES else ""
    return f"{len(every)} tensor{'s' * (len(every) > 1)} ({shown}{rest})"
