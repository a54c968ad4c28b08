"""How a model can be decoded, found by trying: with its cache, else with a full forward pass at every step, else not.

The truth is the full forward pass of one row without padding and without a cache. A batch is continued as decoding
does it: prompts of different lengths, one of them twice, rows that end at different times, states that are copied for
rows and dropped with them. Its logits must be those of the truth after every token. A few forward passes of a few
random tokens show it for a model object; what is attached to it, switched on or off since is another case. Logits may
differ by :data:`TOLERANCE` of their spread over the vocabulary. In 16 bits rounding alone makes more (1e-2 was
measured on 66 families), and the same comparison decides in float32 arithmetic.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from peft_arena.core.errors import UserError, first_line
from peft_arena.core.ids import seed_for
from peft_arena.models.arithmetic import HALVES, in_float32
from peft_arena.models.modes import accepts, base_of, context_length, device_of, virtual_tokens
from peft_arena.models.steps import CachedRows, full_logits, last_logits, vocabulary_of

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest RMS difference of two rows of logits, relative to their standard deviation, in float32 arithmetic.

On 66 families the right caches differ by up to 2e-6, and the wrong ones by 0.16 and more.
"""
ROUNDED = 0.3
"""The same of a model's own 16-bit arithmetic, in the middle of all rows and steps: a router may turn in a few."""
IN_USE = 1e-2
"""The same of a model's own float32 arithmetic after many steps."""
PROMPT = 12
"""Tokens of the longest prompt."""
WINDOW = 64
"""Attention windows up to this length are crossed by the longest prompt."""
STEPS = 4
_CACHE = "with its cache"
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""What a model or its cache raises where it was not written for what is asked of it."""


@dataclass(frozen=True)
class Way:
    """How a model is decoded."""

    own: bool
    """By the model's own ``generate``, on prompts of one length."""
    cached: bool
    """With a cache; else each step is a full forward pass."""
    together: bool
    """Rows of different lengths share a batch."""
    why: str = ""
    """Why it is not with a cache."""

    @property
    def notice(self) -> str:
        """What a record has to say about it; empty with a cache."""
        if self.cached:
            return ""
        rows = "" if self.together or self.own else ", one row at a time"
        return f"a full forward pass at every step{rows}: {self.why}"


class _Known:
    """What was found of one model object."""

    def __init__(self) -> None:
        self.signature = 0
        self.uses = 0
        self.ways: dict[str, Way] = {}
        self.seen = False
        """Whether logits of its use were looked at."""
        self.banned = ""
        """Why its cache is not used again, whatever a trial gives: it was seen to be wrong in use."""
        self.said: set[str] = set()
        """Notices that were given."""


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def decoding_way(model: nn.Module, *, own: bool = False) -> Way:
    """Return how to continue prompts with a model.

    It is tried once for a model object and what is attached to it, and again at its second, fourth, eighth, ... use:
    an adapter that is zero before the first step proves nothing about what it is later.

    Args:
        model: a causal language model, in evaluation mode.
        own: whether it must be the model's own ``generate``.

    Raises:
        UserError: the model is not causal, gives other logits each time, cannot be run, or, where its own ``generate``
            is needed, that does not give what a full forward pass gives.
    """
    known = _used(model)
    if not _is_model(model):
        return _unproved(model, own)
    name = "own" if own else "steps"
    if name not in known.ways:
        if known.banned and not own:
            return without_cache(model, known.banned)
        found = _search(model, _OWN if own else _VIRTUAL if virtual_tokens(model) else _STEPS)
        if found is None:
            return _unproved(model, own)
        known.ways[name] = found
        _say(model, known, found)
    return known.ways[name]


def reading_way(model: nn.Module) -> Way:
    """Return how to read whole texts: rows of different lengths together where padding on the right changes nothing.

    Raises:
        UserError: as :func:`decoding_way`.
    """
    return _reading(model, _used(model))


def _reading(model: nn.Module, known: _Known) -> Way:
    if not _is_model(model):
        return _READING[0][0]
    if "reading" not in known.ways:
        found = _search(model, _READING)
        if found is None:
            return _READING[0][0]
        known.ways["reading"] = found
    return known.ways["reading"]


def seen_wrong(model: nn.Module, rows: Sequence[Sequence[int]], logits: Tensor) -> str:
    """Say how logits that a cache gave in use differ from those of full forward passes; empty if only by rounding.

    The first rows that are handed in for a model object are looked at, the shortest and the longest of them: real
    prompts are longer than those of the trial, and have tokens that mean something to what is attached.

    Args:
        model: as it decoded.
        rows: all tokens that were read.
        logits: those after the last of them, shape (rows, vocabulary).
    """
    known = _known(model)
    if known.seen or not _is_model(model) or not bool(torch.isfinite(logits).all()):
        return ""
    known.seen = True
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    errors = [
        _error(logits[place], last_logits(model, [rows[place]], together=False)[0])
        for place in dict.fromkeys((order[0], order[-1]))
    ]
    wrong = min(errors) > ROUNDED if _rounds(model) else max(errors) > IN_USE
    return _differ(max(errors), _CACHE) if wrong else ""


def without_cache(model: nn.Module, why: str) -> Way:
    """Go on without the cache of a model whose logits were seen to be wrong in use; return the new way.

    Raises:
        UserError: as :func:`decoding_way`.
    """
    known = _known(model)
    known.banned = why
    found = known.ways["steps"] = replace(_reading(model, known), why=why)
    _say(model, known, found)
    return found


def _say(model: nn.Module, known: _Known, way: Way) -> None:
    """Give a notice once for a model object."""
    if way.notice and way.notice not in known.said:
        known.said.add(way.notice)
        logger.warning("models of type %s are decoded slowly, by %s", _kind(model), way.notice)


def _is_model(model: nn.Module) -> bool:
    """Say whether it is a model of transformers, and no object that stands for one."""
    from transformers import PreTrainedModel

    return isinstance(base_of(model), PreTrainedModel)


def _unproved(model: nn.Module, own: bool) -> Way:
    """Return the way of a model whose logits are not finite: no answer of it counts."""
    own = own or virtual_tokens(model) > 0
    return Way(own, True, not own and accepts(model, "position_ids"))


def _known(model: nn.Module) -> _Known:
    known = _KNOWN.setdefault(model, _Known())
    signature = _signature(model)
    if signature != known.signature:
        known.signature, known.uses, known.ways, known.seen, known.banned = signature, 0, {}, False, ""
    return known


def _used(model: nn.Module) -> _Known:
    """Count a use; at the second, fourth, eighth, ... what was found is tried and looked at again."""
    known = _known(model)
    known.uses += 1
    if known.uses & (known.uses - 1) == 0:
        known.ways.clear()
        known.seen = False
    return known


def _signature(model: nn.Module) -> int:
    """Hash what changes a model's function other than its numbers: modules, hooks, adapters that are on."""
    parts = [
        (type(module), len(module._forward_pre_hooks), len(module._forward_hooks), _switches(module))
        for module in model.modules()
    ]
    return hash((virtual_tokens(model), str(device_of(model)), tuple(parts)))


def _switches(module: nn.Module) -> str:
    state = vars(module)
    return f"{state.get('_disable_adapters', '')}{state.get('_active_adapter', '')}{state.get('active_adapter', '')}"


class _Sample:
    """Rows of random tokens, and what a full forward pass of each of them alone gives."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        limit = context_length(model)
        room = limit - STEPS if limit is not None else WINDOW + PROMPT
        self.steps = STEPS if room >= 2 else 1
        self.longest = max(1, min(room, max(PROMPT, _window(model))))
        self.lengths = (self.longest, max(1, self.longest // 2), 1, self.longest, self.longest)
        self.rows = _random_rows(model, [length + self.steps for length in self.lengths])
        self.rows[3][: self.longest] = self.rows[0][: self.longest]  # the prompts of a group are the same
        self.truths: dict[bool, list[Tensor]] = {}
        self.exact = False

    @property
    def truth(self) -> list[Tensor]:
        """Logits of each row, shape (tokens, vocabulary), in the arithmetic that is used now."""
        if self.exact not in self.truths:
            self.truths[self.exact] = [full_logits(self.model, [row], len(row))[0].float() for row in self.rows]
        return self.truths[self.exact]

    def causal(self) -> list[float]:
        """Compare beginnings of a row with the whole of it."""
        row, truth = self.rows[0], self.truth[0]
        found = [full_logits(self.model, [row[:count]], count)[0] for count in (1, self.longest)]
        return [_error(logits[-1], truth[len(logits) - 1]) for logits in found]

    def beside(self) -> list[float]:
        """Compare rows of different lengths in one batch, padded on the right, with each alone."""
        longest = max(map(len, self.rows))
        found = full_logits(self.model, self.rows, longest)
        last = last_logits(self.model, self.rows, together=True)
        errors = [_error(last[place], truth[-1]) for place, truth in enumerate(self.truth)]
        for place, truth in enumerate(self.truth):
            errors += [_error(found[place, token], truth[token]) for token in range(len(truth))]
        return errors

    def cached(self, *, together: bool) -> list[float]:
        """Continue a batch with the cache, its rows ending at different times."""
        running = [0, 1, 2, 3] if together else [0, 3, 4]
        batch = CachedRows(self.model, [self.rows[place][: self.lengths[place]] for place in running])
        logits = batch.read()
        errors: list[float] = []
        for step in range(self.steps):
            for place, row in enumerate(running):
                errors.append(_error(logits[place], self.truth[row][self.lengths[row] + step - 1]))
            tokens = [self.rows[row][self.lengths[row] + step] for row in running]
            keep = {1: list(range(len(running)))[::2], 2: [len(running) - 1]}.get(step)
            batch.extend(torch.tensor(tokens, device=logits.device), keep)
            running = running if keep is None else [running[place] for place in keep]
            logits = batch.step()
        return [*errors, _error(logits[-1], self.truth[running[-1]][-1])]

    def generated(self, *, use_cache: bool) -> list[float]:
        """Compare the logits of the model's own ``generate`` with a full forward pass of what it wrote."""
        from transformers import GenerationConfig

        generate: Any = self.model.generate
        ids = torch.tensor([self.rows[place][: self.longest] for place in (0, 4)], device=device_of(self.model))
        config = GenerationConfig(
            max_new_tokens=self.steps,
            min_new_tokens=self.steps,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        given = {} if use_cache else {"use_cache": False}
        found = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **given)
        errors: list[float] = []
        for place, row in enumerate(found.sequences.tolist()):
            truth = full_logits(self.model, [row], len(row))[0]
            begin = len(row) - self.steps - 1
            errors += [_error(logits[place], truth[begin + step]) for step, logits in enumerate(found.logits)]
        return errors


def _window(model: nn.Module) -> int:
    """Return a prompt length that crosses the model's windows of attention, where they are short; else 0."""
    config = base_of(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(config, name, None) for name in WINDOWS]
    return max((size + STEPS for size in found if isinstance(size, int) and 0 < size <= WINDOW), default=0)


def _random_rows(model: nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Return rows of random tokens, without those that the configuration gives a meaning."""
    config: Any = base_of(model).config
    names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index"))]
    meant = {getattr(config, name) for name in names if isinstance(getattr(config, name), int)}
    known = [token for token in range(vocabulary_of(model)) if token not in meant] or [0]
    generator = torch.Generator().manual_seed(seed_for(0, "decoding"))
    return [[known[place] for place in torch.randint(len(known), (length,), generator=generator)] for length in lengths]


def _error(found: Tensor, truth: Tensor) -> float:
    """Return the RMS difference of two rows of logits over the standard deviation of the second; infinity for NaN."""
    found, truth = found.float(), truth.float()
    difference = float((found - truth).square().mean().sqrt())
    if difference != difference:
        return float("inf")
    return difference / max(float(truth.std()), 1e-30) if difference else 0.0


def _search(model: nn.Module, candidates: Sequence[tuple[Way, Callable[[_Sample], list[float]]]]) -> Way | None:
    """Return the first way that gives what a full forward pass gives; None where that gives no finite logits.

    Raises:
        UserError: there is none.
    """
    with _undisturbed(model):
        sample = _Sample(model)
        try:
            finite = all(bool(torch.isfinite(truth).all()) for truth in sample.truth)
            why = _differs(sample, _Sample.causal, "of a beginning alone") if finite else ""
        except FAULTS as error:
            _no_memory(error)
            raise _refused(model, f"its forward pass fails: {first_line(error)}") from error
        if not finite:
            return None
        if why:
            raise _refused(model, f"its logits after a token depend on what follows it, or on chance ({why})")
        reasons: list[str] = []
        for way, run in candidates:
            if way.together and way.cached and not accepts(model, "position_ids"):
                continue
            why = _differs(
                sample, run, _CACHE if way.cached else "of its own steps" if way.own else "in a padded batch"
            )
            if not why:
                return replace(way, why="" if way.cached else reasons[0] if reasons else "")
            reasons.append(why)
    raise _refused(model, reasons[0])


def _kind(model: nn.Module) -> str:
    return getattr(getattr(base_of(model), "config", None), "model_type", "") or type(base_of(model)).__name__


def _refused(model: nn.Module, why: str) -> UserError:
    return UserError(f"models of type {_kind(model)} cannot be decoded here: {why}")


def _differs(sample: _Sample, run: Callable[[_Sample], list[float]], what: str) -> str:
    """Say how a way, whose logits ``what`` names, differs from full forward passes; empty if only by rounding."""
    try:
        errors = run(sample)
        if max(errors) > TOLERANCE and _rounds(sample.model) and statistics.median(errors) <= ROUNDED:
            with _exactly(sample):
                errors = run(sample)
    except (*FAULTS, UserError) as error:
        _no_memory(error)
        return f"{type(error).__name__} for logits {what}: {first_line(error)}"
    worst = max(errors)
    return "" if worst <= TOLERANCE else _differ(worst, what)


def _differ(worst: float, what: str) -> str:
    return f"logits {what} differ from those of a full forward pass by {worst:.2g} of their spread"


def _no_memory(error: Exception) -> None:
    """Raise an error again that only says that the memory is full."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error


def _rounds(model: nn.Module) -> bool:
    """Say whether a model computes in 16 bits."""
    return torch.is_autocast_enabled(device_of(model).type) or any(p.dtype in HALVES for p in model.parameters())


@contextmanager
def _exactly(sample: _Sample) -> Iterator[None]:
    """Compute in float32 inside the ``with`` block."""
    sample.exact = True
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device_of(sample.model).type, enabled=False),
            in_float32(sample.model),
        ):
            yield
    finally:
        sample.exact = False


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave random numbers as they were; no gradients inside."""
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        yield


_TOGETHER = (Way(False, True, True), lambda sample: sample.cached(together=True))
_ALIKE = (Way(False, True, False), lambda sample: sample.cached(together=False))
_FULL = (Way(False, False, True), _Sample.beside)
_ALONE = (Way(False, False, False), lambda sample: [0.0])
_STEPS = (_TOGETHER, _ALIKE, _FULL, _ALONE)
_VIRTUAL = ((Way(True, True, False), lambda sample: sample.generated(use_cache=True)), _FULL, _ALONE)
_OWN = (_VIRTUAL[0], (Way(True, False, False), lambda sample: sample.generated(use_cache=False)))
_READING = (_FULL, _ALONE)
"""Ways in the order in which they are tried; one row at a time is the truth itself."""
