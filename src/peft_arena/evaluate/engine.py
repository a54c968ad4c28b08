"""The model as lm-eval sees it: three request types, answered from a model object and its tokenizer.

lm-eval's own class for this (HFLM) is not used as it is, because it re-ties the model's weights, changes the tokenizer,
cuts long prompts silently, and keeps a batch running until each row has met the same stop string. The numbers agree
(``tests/evaluate/test_harness.py`` compares the two).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from peft_arena.core.errors import UserError
from peft_arena.core.ids import canonical_json, seed_for
from peft_arena.evaluate.decode import Job, Sampler, decode
from peft_arena.evaluate.likelihood import Likelihood, Pair, log_likelihoods
from peft_arena.models.chat import apply_template, date_of, uses_date
from peft_arena.models.modes import UNLIMITED, base_of, context_length, device_of
from peft_arena.models.pieces import encode_pair, encode_text, plain_ids
from peft_arena.store.records import DECODING, READING

if TYPE_CHECKING:
    from torch import nn

    from peft_arena.models.load import Loaded

LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names lm-eval's tasks give the limit of generated tokens."""
DEFAULT_MAX_NEW_TOKENS = 256
"""What lm-eval uses for tasks that give no limit."""

Key = tuple[str, int]
"""A document: name of its lm-eval task and number."""


class Engine(Protocol):
    """What the evaluation asks of an engine beyond lm-eval's own interface."""

    rejected: dict[Key, str]
    """Documents the engine did not answer, with the reason; their responses mean nothing."""

    met_limit: Counter[Key]
    """How many answers to each document went on until the limit of new tokens; of documents that were rejected none."""

    def text_tokens(self, text: str) -> int:
        """Return how many tokens of a text are predicted when its likelihood is asked for."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return engine, version and settings, for the record."""
        ...


class ModelEngine(TemplateLM):
    """A causal language model that answers lm-eval's requests.

    A request that does not fit the model's context is not cut: its document is put in :attr:`rejected`.
    """

    def __init__(
        self,
        loaded: Loaded,
        model: nn.Module,
        *,
        batch_size: int | None = None,
        progress: bool = True,
        joint: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            loaded: gives the tokenizer and the description of the model.
            model: the model to evaluate; may be an adapter around ``loaded.model``.
            batch_size: rows in one forward pass; None chooses by the model's size.
            progress: show a bar for each request type.
            joint: let a token reach over the boundary of context and continuation, as lm-eval does for its own tasks,
                instead of keeping the context's tokens, as this package does in training.
        """
        super().__init__()
        self.model = model
        self.tokenizer = loaded.tokenizer
        self.rows = batch_size if batch_size is not None else default_batch_size(model)
        self.progress = progress
        self.joint = joint
        self.limit = context_length(model, loaded.tokenizer)
        self.dtype = loaded.spec.dtype
        self.source = loaded.source
        self.rejected: dict[Key, str] = {}
        self.met_limit: Counter[Key] = Counter()
        self.slow: dict[str, str] = {}
        """Which of the above was done slowly so far, and why."""
        self._device = device_of(model)

    def describe(self) -> dict[str, Any]:
        """Return engine, version, batch size, device, dtype, context length, and the date a chat template is told.

        Where the model had to be run slowly, how and why.
        """
        dated = {"chat_date": date_of(self.tokenizer).isoformat()} if uses_date(self.tokenizer) else {}
        return {
            **dated,
            "engine": "lm-eval",
            "version": metadata.version("lm_eval"),
            "batch_size": self.rows,
            "device": str(self._device),
            "dtype": self.dtype,
            "model_source": self.source,
            "context_length": self.limit,
            **self.slow,
        }

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token a text without context is conditioned on: the begin token, or else the end token."""
        found = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            raise UserError(f"the tokenizer of {self.tokenizer.name_or_path} has neither a begin nor an end token")
        return int(found)

    @property
    def max_length(self) -> int:
        """Tokens the model can read at once."""
        return self.limit if self.limit is not None else UNLIMITED

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokenize text; unless told otherwise with the tokenizer's own begin token exactly once."""
        if add_special_tokens is None:
            return encode_text(self.tokenizer, string)
        return encode_text(self.tokenizer, string) if add_special_tokens else plain_ids(self.tokenizer, string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation through the tokenizer's own template."""
        return apply_template(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def text_tokens(self, text: str) -> int:
        """Return how many tokens of a text are predicted when its likelihood is asked for."""
        pair = self._pair("", text)
        return len(pair.continuation) if pair is not None else 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each request's continuation after its context."""
        pairs = [self._pair(*request.args) for request in requests]
        asked = [
            place
            for place, (request, pair) in enumerate(zip(requests, pairs, strict=True))
            if not self._reject(request, pair)
        ]
        found = dict(zip(asked, self._likelihoods([pairs[place] for place in asked]), strict=True))
        missing = Likelihood(0.0, False)
        answers = [found.get(place, missing) for place in range(len(requests))]
        return [(answer.total, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of the model's context where it is longer."""
        owners: list[int] = []
        pairs: list[Pair] = []
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids  # every window of a text has it already
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for window in windows:
                pairs.append(Pair(*make_disjoint_window(window)))
                owners.append(place)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self._likelihoods(pairs), strict=True):
            totals[owner] += found.total
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        found = self._likelihoods([Pair(context, rest) for _, context, rest in requests])
        return [(answer.total, answer.greedy) for answer in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each request's prompt, up to the first stop string."""
        groups: dict[str, list[tuple[int, _Asked]]] = {}
        asked_before: Counter[tuple[str | int, ...]] = Counter()
        for place, request in enumerate(requests):
            prompt, given = request.args
            name = (*_key(request), int(request.idx))
            asked = _asked(self.tok_encode(prompt) or [self.prefix_token_id], given, *name, asked_before[name])
            asked_before[name] += 1
            job = asked.job
            what = f"a prompt of {len(job.ids)} tokens and {job.max_new_tokens} new ones"
            if self._fits(request, len(job.ids) + job.max_new_tokens, what):
                groups.setdefault(asked.group, []).append((place, asked))
        texts = [""] * len(requests)
        for members in groups.values():
            with self._bar(len(members), "generating") as bar:
                found = decode(
                    self.model,
                    self.tokenizer,
                    [asked.job for _, asked in members],
                    batch_size=self.rows,
                    done=bar.update,
                    sampler=members[0][1].sampler,
                    settings=members[0][1].settings,
                    used=lambda way: self._note(DECODING, way.notice),
                )
            for (place, _), result in zip(members, found, strict=True):
                texts[place] = result.text
                if not result.finite:
                    self.rejected.setdefault(_key(requests[place]), "the model's logits are not finite")
                elif not result.ended:
                    self.met_limit[_key(requests[place])] += 1
        return texts

    def _likelihoods(self, pairs: Sequence[Pair | None]) -> list[Likelihood]:
        known = [pair for pair in pairs if pair is not None]
        with self._bar(len(known), "log-likelihoods") as bar:
            note = partial(self._note, READING)
            return log_likelihoods(self.model, known, batch_size=self.rows, done=bar.update, noticed=note)

    def _note(self, what: str, notice: str) -> None:
        if notice:
            self.slow[what] = notice

    def _pair(self, context: str, continuation: str) -> Pair | None:
        """Tokenize a request; None if nothing is left to predict."""
        if self.joint and context:
            pair = Pair(*self._encode_pair(context, continuation))
        else:
            if context:
                head, rest = encode_pair(self.tokenizer, context, continuation)
            else:
                head, rest = [], plain_ids(self.tokenizer, continuation)
            if not head and rest and rest[0] == self.prefix_token_id:
                head, rest = rest[:1], rest[1:]
            pair = Pair(head or [self.prefix_token_id], rest)
        return pair if pair.context and pair.continuation else None

    def _reject(self, request: Instance, pair: Pair | None) -> bool:
        if pair is None:
            self.rejected.setdefault(_key(request), "a continuation has no token of its own")
            return True
        return not self._fits(request, len(pair.fed), f"context and continuation of {len(pair.fed)} tokens")

    def _fits(self, request: Instance, length: int, what: str) -> bool:
        if length <= self.max_length:
            return True
        self.rejected.setdefault(_key(request), f"{what} do not fit the model's context of {self.max_length}")
        return False

    def _bar(self, total: int, what: str) -> tqdm[Any]:
        return tqdm(total=total, desc=what, disable=not self.progress, leave=False)


def default_batch_size(model: nn.Module) -> int:
    """Return a batch size that suits the base model: many rows for a small one, whose time goes between operations."""
    return 64 if sum(p.numel() for p in base_of(model).parameters()) < 20_000_000 else 16


def _key(request: Instance) -> Key:
    return (str(request.task_name), int(request.doc_id or 0))


class _Asked(NamedTuple):
    """A request to generate."""

    job: Job
    sampler: Sampler | None
    settings: dict[str, Any] | None
    """For the model's own ``generate``, where a sampler has not all that was asked for."""

    @property
    def group(self) -> str:
        """Requests with the same group are decoded together."""
        return canonical_json([self.sampler, self.settings])


def _asked(ids: list[int], given: Mapping[str, Any], *names: str | int) -> _Asked:
    """Translate lm-eval's generation settings.

    Args:
        ids: the prompt's tokens.
        given: settings; a ``seed`` among them is that of the answer's own random numbers. A temperature of 0 means
            greedy, whatever ``do_sample`` says.
        names: what the seed is made of where none is given.

    Raises:
        UserError: beam search is asked for.
    """
    left = dict(given)
    until = left.pop("until", None) or ()
    limits = [left.pop(name, None) for name in LIMIT_NAMES]
    limit = next((int(value) for value in limits if value is not None), DEFAULT_MAX_NEW_TOKENS)
    stop = (until,) if isinstance(until, str) else tuple(until)
    stated = left.pop("temperature", None)
    temperature = float(stated or 0.0)
    cold = stated is not None and temperature == 0
    sampled = bool(left.pop("do_sample", temperature > 0)) and not cold
    seed = left.pop("seed", None)
    beams = int(left.pop("num_beams", 1) or 1)
    if beams > 1:
        raise UserError(
            f"a task asks for beam search with num_beams {beams}; only greedy decoding and sampling are known"
        )
    job = Job(ids, limit, stop)
    if not sampled:
        return _Asked(job, None, None)
    job = job._replace(seed=seed_for(0, *names) if seed is None else int(seed))
    if set(left) <= {"top_k", "top_p"}:
        top_k, top_p = int(left.get("top_k") or 0), float(left.get("top_p") or 1.0)
        return _Asked(job, Sampler(temperature or 1.0, max(top_k, 0), top_p), None)
    return _Asked(job, None, {**left, "do_sample": True, "temperature": temperature or 1.0})
