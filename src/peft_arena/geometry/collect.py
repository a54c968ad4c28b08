"""One forward pass over a set of prompts, watched at all wanted modules at once.

Prompts go in batches of similar length, the longest first, padded on the right. In a causal model nothing before a
token depends on what follows it, and padding is left out of everything, so a token's rows do not depend on its batch
beyond the rounding of another order of additions. Positions that a tuned model puts before the input are left out too:
of what a module gives, the last positions are the input's. This module imports torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peft_arena.core.errors import UserError
from peft_arena.core.ids import seed_for
from peft_arena.geometry.drift import Energies, squares
from peft_arena.geometry.modules import find_module
from peft_arena.models.modes import base_of, context_length, device_of, evaluation_mode, virtual_tokens

if TYPE_CHECKING:
    from torch import nn

    from peft_arena.geometry.prompts import PromptSet
    from peft_arena.weights.change import Change

TOKENS_AT_ONCE = 2048
"""Most positions of a batch, padding included; a longer prompt goes alone."""
LOGITS_AT_ONCE = 2**26
"""Most logits of a batch; a prompt with more goes alone."""


class Sample(NamedTuple):
    """Tokens drawn from a prompt set: a row for each, in the order of the prompts and of their tokens."""

    positions: tuple[tuple[int, ...], ...]
    """Of each prompt the drawn positions, ascending; may be none."""
    starts: tuple[int, ...]
    """Row of the first token drawn of each prompt."""

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(map(len, self.positions))

    def owners(self) -> Tensor:
        """Return the prompt of each row, shape (size,)."""
        return torch.tensor([prompt for prompt, drawn in enumerate(self.positions) for _ in drawn])

    def within(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return where the tokens drawn stand in a batch, (row, position), shape (n, 2), and their rows, shape (n,)."""
        drawn = [self.positions[prompt] for prompt in batch.prompts]
        places = torch.tensor([(row, place) for row, known in enumerate(drawn) for place in known])
        starts = [self.starts[prompt] for prompt in batch.prompts]
        rows = [start + number for start, known in zip(starts, drawn, strict=True) for number in range(len(known))]
        return places, torch.tensor(rows)


def draw(prompts: PromptSet, tokens: int, seed: int) -> Sample:
    """Draw tokens evenly and without replacement from all tokens of a prompt set; all of them if there are no more.

    Args:
        prompts: the set.
        tokens: most tokens to draw.
        seed: the same gives the same tokens on every machine.
    """
    total = prompts.tokens
    rng = random.Random(seed_for(seed, "geometry", "tokens"))
    chosen = range(total) if tokens >= total else sorted(rng.sample(range(total), tokens))
    positions: list[list[int]] = [[] for _ in prompts.ids]
    places = [(prompt, place) for prompt, ids in enumerate(prompts.ids) for place in range(len(ids))]
    for number in chosen:
        prompt, place = places[number]
        positions[prompt].append(place)
    starts = np.cumsum([0, *(len(drawn) for drawn in positions)])[:-1].tolist()
    return Sample(tuple(map(tuple, positions)), tuple(starts))


class Batch(NamedTuple):
    """Prompts that go through the model together."""

    prompts: tuple[int, ...]
    """Their places in the set."""
    ids: Tensor
    """Shape (prompts, longest), padded on the right."""
    mask: Tensor
    """1 for real tokens, the same shape."""

    @property
    def padded(self) -> bool:
        """Whether there is any padding."""
        return bool((self.mask == 0).any())


def batches(prompts: PromptSet, drawn: Sequence[int] | None = None, vocabulary: int = 1) -> list[Batch]:
    """Return the prompts in batches, the longest first.

    Args:
        prompts: the set.
        drawn: number of tokens of each prompt whose logits are wanted; prompts with none are left out. None: all
            prompts, no logits.
        vocabulary: number of logits of a token.
    """
    lengths = [len(ids) for ids in prompts.ids]
    wanted = [0] * len(lengths) if drawn is None else list(drawn)
    order = sorted((p for p in range(len(lengths)) if drawn is None or wanted[p]), key=lambda p: (-lengths[p], p))
    found: list[Batch] = []
    now: list[int] = []
    logits = 0
    for prompt in order:
        more = wanted[prompt] * vocabulary
        full = now and ((len(now) + 1) * lengths[now[0]] > TOKENS_AT_ONCE or logits + more > LOGITS_AT_ONCE)
        if full:
            found.append(_batch(prompts, now))
            now, logits = [], 0
        now.append(prompt)
        logits += more
    return [*found, _batch(prompts, now)] if now else found


def _batch(prompts: PromptSet, places: Sequence[int]) -> Batch:
    longest = max(len(prompts.ids[place]) for place in places)
    ids, mask = (torch.zeros(len(places), longest, dtype=torch.long) for _ in range(2))
    for row, place in enumerate(places):
        known = prompts.ids[place]
        ids[row, : len(known)] = torch.tensor(known)
        mask[row, : len(known)] = 1
    return Batch(tuple(places), ids, mask)


class Rows:
    """A matrix on disk, written and read in parts, that takes up memory only while it is touched."""

    def __init__(self, path: Path, count: int) -> None:
        """Prepare a file of ``count`` rows; their width is that of the first written."""
        self.path, self.count = path, count

    def write(self, places: Tensor, values: Tensor) -> None:
        """Put values, shape (n, width), into the rows of the given places, as float32."""
        mode: Any = "r+" if self.path.exists() else "w+"
        shape = (self.count, values.shape[1]) if mode == "w+" else None
        file = np.lib.format.open_memmap(self.path, mode=mode, dtype=np.float32 if shape else None, shape=shape)
        file[places.numpy()] = values.detach().to("cpu", torch.float32).numpy()

    def read(self, places: Tensor | None = None) -> Tensor:
        """Return the rows of the given places, in that order, or all of them: a copy, float32, on the CPU."""
        file = np.lib.format.open_memmap(self.path, mode="r")
        return torch.from_numpy(np.array(file if places is None else file[places.numpy()]))


def check_room(model: nn.Module, prompts: PromptSet) -> None:
    """Check that the longest prompt fits in a model's context beside the positions an adapter takes from it.

    Raises:
        UserError: it does not.
    """
    limit, longest = context_length(model), max(map(len, prompts.ids))
    if limit is not None and longest > limit:
        beside = f" beside {taken} virtual tokens" if (taken := virtual_tokens(model)) else ""
        raise UserError(
            f"a prompt of {longest} tokens does not fit in the context of {type(base_of(model)).__name__}, which has "
            f"room for {limit}{beside}; set max_length to at most {limit}"
        )


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def inputs_of(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return what a causal language model is called with; the mask only where there is padding."""
    given = {"input_ids": batch.ids.to(device), "use_cache": False}
    return {**given, "attention_mask": batch.mask.to(device)} if batch.padded else given


def output_head(model: nn.Module) -> nn.Module:
    """Return the output layer over the vocabulary.

    Raises:
        UserError: the model names none.
    """
    head: nn.Module | None = base_of(model).get_output_embeddings()
    if head is None:
        raise UserError(f"{type(base_of(model)).__name__} names no output layer, so its logits cannot be collected")
    return head


def vocabulary_of(model: nn.Module) -> int:
    """Return the number of logits of a token."""
    config: Any = base_of(model).config.get_text_config()
    return int(config.vocab_size)


LogitsSink = Callable[[Tensor, Tensor], None]
"""Called with row numbers of the sample, shape (n,), and their logits, shape (n, vocabulary), in the model's type."""


def collect_outputs(
    model: nn.Module,
    prompts: PromptSet,
    sample: Sample,
    modules: Mapping[str, Rows],
    logits: LogitsSink | None,
    done: Callable[[float], None],
) -> None:
    """Send the prompts through a model once; keep the drawn tokens' outputs of modules, and hand out their logits.

    Only the drawn positions go through the output layer: the tokens of a batch are cut out before it. Rows are written
    as modules give them, so of all modules those of one are in memory.

    Args:
        model: the pretrained or a tuned model, on its device.
        prompts: the set.
        sample: the tokens drawn from it.
        modules: name of a module in the pretrained model to where its rows go.
        logits: is given the logits; None if they are not wanted.
        done: called with the fraction of batches that went through.

    Raises:
        UserError: a prompt does not fit, or a module does not see a batch of whole sequences.
    """
    check_room(model, prompts)
    base, device = base_of(model), device_of(model)
    every = batches(prompts, [len(drawn) for drawn in sample.positions], vocabulary_of(model) if logits else 1)
    caught: dict[str, int] = {}
    turn = 0  # goes up with each way through the blocks: some adapters go twice, and the last time counts
    picked, rows = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    shape = (0, 0)

    def catch(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if caught.get(name) == turn:
            return  # some adapters use a layer again, on vectors of their own
        caught[name] = turn
        hidden = output[0] if isinstance(output, tuple) else output
        modules[name].write(rows, positions_of(hidden, shape, name)[picked[:, 0], picked[:, 1]])

    def begin(*_: Any) -> None:
        nonlocal turn
        turn += 1

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kept = picked if logits is not None else picked[:1]
        return (positions_of(args[0], shape, "output layer")[kept[:, 0], kept[:, 1]][None], *args[1:]), kwargs

    handles = [find_module(base, name).register_forward_hook(partial(catch, name)) for name in modules]
    handles.append(base.base_model.register_forward_pre_hook(begin))
    handles.append(output_head(model).register_forward_pre_hook(cut, with_kwargs=True))
    with evaluation_mode(model), hooked(handles):
        for number, batch in enumerate(every):
            shape = (batch.ids.shape[0], batch.ids.shape[1])
            picked, rows = sample.within(batch)
            found = model(**inputs_of(batch, device)).logits
            _all_seen(modules, caught)
            caught.clear()
            if logits is not None:
                logits(rows, _checked(found, rows))
            done((number + 1) / len(every))


def _all_seen(modules: Iterable[str], seen: Collection[str]) -> None:
    """Check that the forward pass went through every module."""
    for name in modules:
        if name not in seen:
            raise UserError(f"module {name} takes no part in the forward pass; choose other modules")


def _checked(logits: Tensor, rows: Tensor) -> Tensor:
    """Return the logits as a matrix, if there is one row for each token that was cut out."""
    if logits.ndim != 3 or logits.shape[:2] != (1, len(rows)):
        raise UserError(f"the model gives logits of shape {tuple(logits.shape)} for {len(rows)} positions")
    return logits[0]


def positions_of(hidden: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """Return what stands at the input's positions, shape (rows, tokens, width): the last ones of each row.

    Args:
        hidden: what a module gives or is given, shape (rows, positions, width); some modules join the first two.
        shape: rows and tokens of the input.
        name: of the module, for the message.

    Raises:
        UserError: the shape is not that of a batch of whole sequences.
    """
    rows, tokens = shape
    if hidden.ndim == 2 and hidden.shape[0] % rows == 0:
        hidden = hidden.reshape(rows, -1, hidden.shape[1])
    if hidden.ndim != 3 or hidden.shape[0] != rows or hidden.shape[1] < tokens:
        raise UserError(
            f"module {name} works on a tensor of shape {tuple(hidden.shape)}, not on {rows} whole sequences of at "
            f"least {tokens} tokens; choose other modules"
        )
    return hidden[:, hidden.shape[1] - tokens :]


ChangeOf = Callable[[int, str], "Change | None"]
"""Returns the weight change of a tuned point, by its number, at a module; None where it is unchanged."""


def collect_energies(
    model: nn.Module,
    prompts: PromptSet,
    modules: Sequence[str],
    subjects: int,
    change_of: ChangeOf,
    done: Callable[[float], None],
) -> dict[str, list[Energies]]:
    """Send the prompts through the pretrained model once; sum up what weight changes do to the inputs of modules.

    Args:
        model: the pretrained model, on its device.
        prompts: the set; all of its tokens count.
        modules: names of linear modules.
        subjects: number of tuned points.
        change_of: asked for each batch, so what it returns need not stay in memory.
        done: called with the fraction of batches that went through.

    Returns:
        For each module the sums of each tuned point.

    Raises:
        UserError: a prompt does not fit, or a module does not see a batch of whole sequences.
    """
    check_room(model, prompts)
    every = batches(prompts)
    found = {name: [Energies() for _ in range(subjects)] for name in modules}
    mask = torch.zeros(0, 0, dtype=torch.bool)
    last: list[tuple[Any, Tensor, float]] = []

    def real(hidden: Tensor, name: str) -> Tensor:
        return positions_of(hidden, (mask.shape[0], mask.shape[1]), name)[mask]

    def watch(name: str) -> Callable[..., None]:
        def catch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not last or last[0][0] is not args[0]:  # queries, keys and values have the same input
                inputs = real(args[0], name).float()
                last[:] = [(args[0], inputs, squares(inputs))]
            _, inputs, energy = last[0]
            weight = plain_weight(module)
            outputs = squares(_without_bias(module, inputs, weight, real(output, name)))
            for subject, sums in enumerate(found[name]):
                change = change_of(subject, name)
                sums.tokens += inputs.shape[0]
                sums.inputs += energy
                sums.outputs += outputs
                sums.changes += 0.0 if change is None else squares(change.apply(inputs.cpu(), weight))

        return catch

    handles = [find_module(model, name).register_forward_hook(watch(name)) for name in modules]
    handles.append(output_head(model).register_forward_pre_hook(_first_position))
    with evaluation_mode(model), hooked(handles):
        for number, batch in enumerate(every):
            mask = batch.mask.bool()
            last.clear()
            model(**inputs_of(batch, device_of(model)))
            _all_seen(modules, {name for name, sums in found.items() if all(one.tokens for one in sums)})
            done((number + 1) / len(every))
    return found


def _first_position(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cut what the output layer is given: no logits are wanted."""
    return (args[0][..., :1, :], *args[1:])


def plain_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer, shape (out, in), float32 on the CPU; a view where it can be."""
    from transformers.pytorch_utils import Conv1D

    layer: Any = module
    weight: Tensor = layer.weight.detach().cpu().float()
    return weight.T if isinstance(module, Conv1D) else weight


def _without_bias(module: nn.Module, inputs: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    """Return W0 h, shape (n, out), in float32, from what a plain linear layer gives where that has its digits.

    Biases of queries and keys can be a hundred times as large as W0 h, which rounding of the sum to bfloat16 destroys.
    """
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None:
        return outputs.float()
    return outputs - bias if outputs.dtype == torch.float32 else inputs.cpu() @ weight.T
