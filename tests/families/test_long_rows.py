"""Rows whose length changes the frequencies of their positions say what each says alone, in every batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_arena.core.specs import RLSpec, Schedule, TaskSpec
from peft_arena.evaluate.decode import Job, decode
from peft_arena.evaluate.likelihood import Pair, log_likelihoods
from peft_arena.models.modes import evaluation_mode
from peft_arena.models.rope import steady_length
from peft_arena.models.ways import Way
from peft_arena.store.records import DECODING
from peft_arena.train.loss import TokenLoss
from peft_arena.train.policy import scores
from peft_arena.train.rollouts import Rollouts

from .zoo import USUAL, plain_tokenizer, tiny

TOKENIZER = plain_tokenizer()
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "original_max_position_embeddings": 32}
KINDS: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **LONGROPE}},
    "llama": {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
    },
}
LENGTHS = (40, 33, 30, 32, 5, 18)
LIMIT = 6
SPEC = RLSpec(objective="grpo", task=TaskSpec(name="t", revision="1"), schedule=Schedule(steps=1), learning_rate=1e-3)


def model_of(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**USUAL, "original_max_position_embeddings": 32, **KINDS[kind]})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 100, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def truth(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the logits of one row by a model that has read nothing before."""
    return copy.deepcopy(model)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def written(model: PreTrainedModel, ids: list[int]) -> list[int]:
    new: list[int] = []
    while len(new) < LIMIT and TOKENIZER.eos_token_id not in new:
        new.append(int(truth(model, ids + new)[-1].argmax()))
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_each_row_alone(kind: str) -> None:
    model = model_of(kind)
    used: list[Way] = []
    with evaluation_mode(model):
        jobs = [Job(ids, LIMIT, ()) for ids in rows()]
        found = decode(model, TOKENIZER, jobs, batch_size=8, done=lambda _: None, used=used.append)
    assert [one.ids for one in found] == [written(model_of(kind), ids) for ids in rows()]
    near, far = used
    assert near.cached and near.together and not (far.cached or far.together)
    assert "rows of more than 32 tokens" in far.notice
    rollouts = Rollouts(model, TOKENIZER, SPEC, limit=LIMIT, stop=(), dtype="float32")  # type: ignore[arg-type]
    assert rollouts.greedy(rows()) == [one.text for one in found]
    assert "rows of more than 32 tokens" in rollouts.describe()[DECODING]


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_each_row_alone(kind: str) -> None:
    model = model_of(kind)
    pairs = [Pair(ids[:-2], ids[-2:]) for ids in rows()]
    said: list[str] = []
    with evaluation_mode(model):
        found = log_likelihoods(model, pairs, batch_size=8, done=lambda _: None, noticed=said.append)
    for pair, one in zip(pairs, found, strict=True):
        logits = truth(model_of(kind), list(pair.fed)).log_softmax(-1)[-2:]
        expected = float(logits.gather(1, torch.tensor(pair.continuation)[:, None]).sum())
        assert one.total == pytest.approx(expected, abs=1e-4)
    assert len(said) == 1 and "rows of more than 32 tokens" in said[0]


@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_scored_by_each_row_alone(kind: str) -> None:
    longest, width = max(LENGTHS), 3
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows()])
    mask = (torch.arange(longest) >= longest - torch.tensor(LENGTHS)[:, None]).long()
    model = model_of(kind)
    with TokenLoss(model, autocast=False) as loss:
        found = scores(loss, ids, mask, width, 1.0).log_probs
    for row, one in zip(rows(), found, strict=True):
        logits = truth(model_of(kind), row).log_softmax(-1)[-width - 1 : -1]
        assert torch.allclose(one, logits.gather(1, torch.tensor(row[-width:])[:, None])[:, 0], atol=1e-4)


def test_these_rows_would_say_something_else_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_arena.evaluate.decode.hangs_on_length", lambda *_: False)
    model = model_of("phi3")
    with evaluation_mode(model):
        found = decode(model, TOKENIZER, [Job(ids, LIMIT, ()) for ids in rows()], batch_size=8, done=lambda _: None)
    assert [one.ids for one in found] != [written(model_of("phi3"), ids) for ids in rows()]


def test_rows_of_other_models_may_be_long() -> None:
    assert steady_length(tiny("llama")) is None and steady_length(tiny("gemma3_text")) is None
