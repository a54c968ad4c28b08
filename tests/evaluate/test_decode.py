"""Sampled decoding: frequencies, limits and independence of the batch, against independent truth."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_toys import byte_tokenizer, small_llama
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare
from torch import Tensor, nn
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from peft_arena.evaluate.decode import Continuation, Job, Sampler, decode
from peft_arena.evaluate.draw import draw, probabilities, streams
from peft_arena.models.load import Loaded
from peft_arena.models.modes import evaluation_mode
from peft_arena.models.render import encode_text

PROMPTS = ["an ant ran", "the cat in the hat", "a", "an ant ran", "then that"]


def answer(model: Any, jobs: list[Job], sampler: Sampler | None, size: int = 64) -> list[Continuation]:
    with evaluation_mode(model):
        return decode(model, TOKENIZER, jobs, batch_size=size, done=lambda _: None, sampler=sampler)


TOKENIZER = byte_tokenizer()


def jobs_of(limit: int = 8, stop: tuple[str, ...] = (), rows: int = 3) -> list[Job]:
    prompts = [encode_text(TOKENIZER, text) for text in PROMPTS for _ in range(rows)]
    return [Job(ids, limit, stop, seed=place) for place, ids in enumerate(prompts)]


def plain(model: Any, job: Job, sampler: Sampler) -> list[int]:
    """Sampled tokens the slow way: no cache, no batch, transformers' own warpers, a search through the running sum."""
    rng = np.random.Generator(np.random.Philox(job.seed))
    warpers: list[Any] = [TemperatureLogitsWarper(sampler.temperature)]
    warpers += [TopKLogitsWarper(sampler.top_k)] if sampler.top_k else []
    warpers += [TopPLogitsWarper(sampler.top_p)] if sampler.top_p < 1 else []
    new: list[int] = []
    while len(new) < job.max_new_tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([job.ids + new])).logits[:, -1].float()
        for warp in warpers:
            logits = warp(None, logits)
        wanted = rng.random()
        sums = itertools.accumulate(logits[0].double().softmax(-1).tolist())
        new.append(next(token for token, total in enumerate(sums) if total > wanted))
        if new[-1] == TOKENIZER.eos_token_id:
            break
    return new


@pytest.mark.parametrize("size", [5, 129, 400])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.5), Sampler(2.0, top_k=3), Sampler(1.0, 0, 0.6)])
def test_frequencies_are_those_of_transformers_warpers(sampler: Sampler, size: int) -> None:
    logits = 2 * torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    scores = TemperatureLogitsWarper(sampler.temperature)(None, logits)  # type: ignore[arg-type]
    if sampler.top_k:
        scores = TopKLogitsWarper(sampler.top_k)(None, scores)  # type: ignore[arg-type]
    if sampler.top_p < 1:
        scores = TopPLogitsWarper(sampler.top_p)(None, scores)  # type: ignore[arg-type]
    expected = scores.double().softmax(-1)[0].numpy()
    rows = 20_000
    tokens = draw(logits.expand(rows, -1), sampler, streams([7], rows)[0])
    counts = np.bincount(tokens.numpy(), minlength=size)
    assert counts[expected == 0].sum() == 0
    likely = expected * rows >= 5
    seen = [*counts[likely], counts[~likely].sum()]
    wanted = [*expected[likely] * rows, max(expected[~likely].sum() * rows, 1e-9)]
    assert chisquare(seen, np.asarray(wanted) / sum(wanted) * rows).pvalue > 1e-3


def test_a_token_is_the_inverse_of_the_cumulative_distribution() -> None:
    sizes = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(sizes.log().expand(6, -1), Sampler(), uniforms).tolist() == [1, 1, 3, 3, 4, 4]
    many = torch.zeros(1, 300).masked_fill_(torch.arange(300) % 2 == 0, -torch.inf)
    uniforms = (torch.arange(150).double() + 0.5) / 150
    assert draw(many.expand(150, -1), Sampler(), uniforms).tolist() == list(range(1, 300, 2))


def test_top_p_beyond_the_first_sorted_tokens_keeps_what_a_full_sort_keeps() -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1], [3], [9]])
    for top_p in (0.1, 0.9, 0.999):
        kept = probabilities(logits, Sampler(top_p=top_p)) > 0
        assert torch.equal(kept, torch.isfinite(TopPLogitsWarper(top_p)(None, logits)))  # type: ignore[arg-type]


def test_streams_belong_to_their_seeds() -> None:
    found = streams([3, 9, 3], 6)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.equal(streams([9], 3)[0], found[1, :3])
    assert float(found.min()) >= 0 and float(found.max()) < 1


@pytest.mark.parametrize("sampler", [Sampler(1e-45), Sampler(1e-3), Sampler(top_k=1), Sampler(top_p=1e-9)])
def test_the_limits_of_sampling_are_greedy(loaded: Loaded, sampler: Sampler) -> None:
    jobs = jobs_of()
    assert answer(loaded.model, jobs, sampler) == answer(loaded.model, jobs, None)


def test_samples_do_not_depend_on_the_batch(loaded: Loaded) -> None:
    jobs = jobs_of(rows=4)
    first = answer(loaded.model, jobs, Sampler(), size=64)
    for size in (1, 3, 7):
        assert answer(loaded.model, jobs, Sampler(), size=size) == first
    assert answer(loaded.model, jobs[::-1], Sampler())[::-1] == first
    assert len({found.text for found in first[:4]}) > 1  # rows of one prompt have seeds of their own


def test_rows_that_leave_their_batch_take_no_numbers_with_them(loaded: Loaded) -> None:
    jobs = jobs_of(12, stop=("e", "a", "t", "0"), rows=4)
    alone = answer(loaded.model, jobs, Sampler(), size=1)
    assert answer(loaded.model, jobs, Sampler()) == alone
    lengths = [len(found.ids) for found in alone if found.ended]
    assert len(set(lengths)) > 2 and min(lengths) < 8, "the batch shrinks while others go on"


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.7, 5, 0.8)])
def test_samples_are_those_of_a_plain_loop(loaded: Loaded, sampler: Sampler) -> None:
    jobs = jobs_of()
    for job, found in zip(jobs, answer(loaded.model, jobs, sampler), strict=True):
        assert found.ids == plain(loaded.model, job, sampler)
        assert found.ended == (found.ids[-1] == TOKENIZER.eos_token_id)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_sampled_like_a_plain_loop(loaded: Loaded, config: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(loaded.model, config(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    sampler = Sampler(0.7, 20, 0.9)
    jobs = jobs_of(5)
    found = answer(model, jobs, sampler)
    assert [one.ids for one in found] == [plain(model, job, sampler) for job in jobs]
    assert [one.ids for one in answer(model, jobs, sampler, size=2)] == [one.ids for one in found]
    assert len({one.text for one in found[:3]}) > 1


class Scripted(nn.Module):
    """Gives each row the logits of its own script, whose number is its prompt's first token."""

    def __init__(self, scripts: list[list[int | None]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scripts = scripts
        self.config = small_llama(TOKENIZER).config
        self.read: list[int] = []

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        """The cache holds the script's number and the place in it."""
        if past_key_values.get_seq_length() == 0:
            self.read.append(len(input_ids))
            number = input_ids[:, :1]
            step = 0
        else:
            number = past_key_values.layers[0].keys[:, 0, :1, 0].long()
            step = past_key_values.get_seq_length()
        keys = number[:, None, :, None].float()
        past_key_values.update(keys, keys, 0)
        logits = torch.zeros(len(number), 1, len(TOKENIZER))
        for row, script in enumerate(number[:, 0].tolist()):
            token = self.scripts[script][step]
            logits[row] = (
                torch.nan if token is None else torch.zeros(len(TOKENIZER)).index_fill_(0, torch.tensor([token]), 100.0)
            )
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("sampler", [None, Sampler()])
def test_ids_and_ending_of_every_kind_of_row(sampler: Sampler | None) -> None:
    a, b, c = (TOKENIZER.encode(text)[0] for text in "abc")
    end = TOKENIZER.eos_token_id
    model = Scripted([[a, end, b, b], [a, b, a, b], [a, None, b, b], [None, b, b, b], [a, b, c, a], [end, a, a, a]])
    jobs = [Job([number], 4, ("bc",), seed=number) for number in (0, 1, 2, 3, 4, 5, 0)]
    found = answer(model, jobs, sampler)
    assert found == [
        Continuation("a", [a, end], True),
        Continuation("abab", [a, b, a, b], False),
        Continuation("a", [a], False, False),
        Continuation("", [], False, False),
        Continuation("a", [a, b, c], True),
        Continuation("", [end], True),
        Continuation("a", [a, end], True),
    ]
    assert sum(model.read) == 6  # the shared prompt is read once


def test_prompts_of_a_group_are_read_once(loaded: Loaded) -> None:
    seen: list[tuple[int, ...]] = []
    loaded.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    ids = encode_text(TOKENIZER, "an ant ran")
    answer(loaded.model, [Job(ids, 2, (), seed=seed) for seed in range(8)], Sampler())
    begin = seen.index((1, len(ids)))  # the trial before has prompts of other lengths
    assert seen.count((1, len(ids))) == 1 and seen[begin + 1] == (8, 1)


def test_sampling_without_seeds_or_with_other_settings_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="a seed for each job"):
        answer(loaded.model, [Job([1], 2, ())], Sampler())
