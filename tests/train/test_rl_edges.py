"""Rollouts at the edges: each is defined, logged, free of NaN, and moves the weights where there is a reason."""

from __future__ import annotations

import json
import math

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.specs import MethodSpec, ModelSpec, RLSpec, RunSpec, TaskSpec
from peft_arena.methods.registry import make_method
from peft_arena.store.records import TrainingRecord
from peft_arena.tasks.base import Score
from peft_arena.tasks.rewards import Judged
from peft_arena.train import rl_session
from peft_arena.train.outcome import TrainingFailed
from peft_arena.train.run import finish, train_run

from .toy import CONTEXT, ToyTask, load_model, open_run

END = 0
"""The toy tokenizer's end token."""
LIMIT = 6
LOSSES = {
    "grpo": {},
    "bnpo": {"loss": "bnpo"},
    "dr_grpo": {"loss": "dr_grpo"},
    "dapo": {"loss": "dapo"},
    "rloo": {"objective": "rloo"},
}


def length_reward(answer):
    return answer.tokens / 8


def ones(answer):
    return float(answer.completion.count("1"))


class Judge:
    """Gives rewards in this process by a function of the answer; None is unscored."""

    def __init__(self, task, rewards, value):
        self.names = [reward.name for reward in rewards]
        self.value = value

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def judge(self, answers):
        found = [self.value(answer) for answer in answers]
        scores = [Score(value, reason="" if value is not None else "cannot be judged") for value in found]
        return [Judged(score, dict.fromkeys(self.names, score.value or 0.0)) for score in scores]


@pytest.fixture
def run_rl(tmp_path, model_dir, monkeypatch):
    """Return a function that trains the toy model; it gives the record and how far the trained weights moved."""

    def run(value=length_reward, head=None, name="run", method="lora", context=None, config=None, **changes):
        monkeypatch.setattr(rl_session, "Judge", lambda task, rewards: Judge(task, rewards, value))
        settings = {
            "objective": "grpo",
            "task": TaskSpec(name="toy", revision="1"),
            "schedule": {"steps": 2},
            "batch_size": 8,
            "group_size": 4,
            "learning_rate": 1e-2,
            "max_new_tokens": LIMIT,
            "validation_items": 3,
            "warmup_fraction": 0.0,
        }
        made = make_method(method, config or {}, "test")
        spec = RunSpec(
            model=ModelSpec(name=str(model_dir)),
            method=MethodSpec(name=method, config=made.config.model_dump(mode="json")),
            train=RLSpec.model_validate(settings | changes),
        )
        directory = open_run(tmp_path / name, spec)
        loaded = load_model(model_dir)
        if context is not None:
            loaded.model.config.max_position_embeddings = context
        if head is not None:
            loaded.model.get_output_embeddings().register_forward_hook(lambda module, given, output: head(output))
        attached = made.attach(loaded.model, seed=0)
        before = {key: p.detach().clone() for key, p in attached.trained().items()}
        record = train_run(directory, loaded, attached, ToyTask(), progress=False).record
        finish(directory, record)
        moved = max(float((p.detach() - before[key]).abs().max()) for key, p in attached.trained().items())
        check_whole(record, directory.training())
        return record, moved

    return run


def check_whole(record, again):
    """Check that a record holds finite numbers only and is read back as it was written."""

    def walk(found):
        if isinstance(found, dict | list):
            for one in found.values() if isinstance(found, dict) else found:
                walk(one)
        assert not isinstance(found, float) or math.isfinite(found)

    walk(json.loads(record.model_dump_json()))
    assert TrainingRecord.model_validate_json(record.model_dump_json()) == record == again
    entries = [entry for entry in record.log if entry.step]
    assert len(entries) == record.steps
    assert all(entry.rollout is not None and entry.grad_norm is not None for entry in entries)


def never_ending(output):
    output[..., END] -= 1e4
    return output


def at_once(output):
    output[..., END] += 1e4
    return output


def sooner(output):
    output[..., END] += 2.0
    return output


def last(record):
    return record.log[-1].rollout


@pytest.mark.parametrize("loss", LOSSES)
def test_a_reward_that_is_always_0_moves_nothing(run_rl, loss):
    record, moved = run_rl(lambda answer: 0.0, **LOSSES[loss])
    assert moved == 0
    for entry in record.log[1:]:
        assert (entry.rollout.reward, entry.rollout.reward_std, entry.rollout.zero_variance) == (0, 0, 1)
        assert entry.grad_norm == 0
    assert record.log[-1].validation_reward == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_model_that_never_ends_is_left_alone_if_truncated_completions_are_masked(run_rl, loss, kl):
    record, moved = run_rl(ones, never_ending, truncated="mask", kl=kl, **LOSSES[loss])
    assert moved == 0
    for entry in record.log[1:]:
        assert entry.rollout.ended == 0
        assert entry.rollout.length == LIMIT
        assert entry.rollout.reward_std > 0
        assert entry.grad_norm == 0
        assert (entry.rollout.entropy, entry.rollout.clip_low, entry.rollout.clip_high) == (None, None, None)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_model_that_never_ends_is_trained_if_they_are_kept(run_rl, loss):
    record, moved = run_rl(ones, never_ending, **LOSSES[loss])
    assert moved > 0
    assert (last(record).ended, last(record).length) == (0, LIMIT)
    assert record.rollouts.generated_tokens == record.rollouts.completions * LIMIT
    assert not any(one.ended for group in record.rollouts.samples for one in group.completions)


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_completions_do_not_train_and_the_others_do(run_rl, loss):
    kept, moved = run_rl(length_reward, sooner, "kept", truncated="keep", **LOSSES[loss])
    masked, other = run_rl(length_reward, sooner, "masked", truncated="mask", **LOSSES[loss])
    assert 0 < kept.log[1].rollout.ended < 1
    assert kept.log[1].rollout.ended == masked.log[1].rollout.ended
    assert kept.log[1].rollout.reward == masked.log[1].rollout.reward
    assert kept.log[1].grad_norm != masked.log[1].grad_norm
    assert min(moved, other) > 0


def test_an_empty_completion_is_one_end_token(run_rl):
    seen = []
    record, moved = run_rl(lambda answer: seen.append(answer) or 0.5, at_once, kl=0.1)
    assert {answer.completion for answer in seen} == {""}
    sampled = [one for group in record.rollouts.samples for one in group.completions]
    assert {(one.text, one.tokens, one.ended) for one in sampled} == {("", 1, True)}
    assert (last(record).length, last(record).ended, last(record).zero_variance) == (1, 1, 1)
    assert last(record).entropy == 0
    assert moved < 1e-6


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_a_group_of_identical_completions_has_no_variance(run_rl, setting):
    record, moved = run_rl(length_reward, **setting)
    for group in record.rollouts.samples:
        assert len({one.text for one in group.completions}) == 1
        assert {one.advantage for one in group.completions} == {0}
    assert last(record).zero_variance == 1
    assert moved == 0


def test_a_prompt_at_the_context_limit(run_rl):
    sizes = [len(ToyTask().prompt(item).split()) for item in ToyTask().items("train")]
    longest = max(sizes)
    fits, moved = run_rl(head=never_ending, value=ones, name="fits",
                         context=longest + LIMIT, batch_size=40)  # fmt: skip
    assert (fits.dropped, fits.examples) == (0, len(sizes))
    assert moved > 0
    short, _ = run_rl(name="short", context=longest + LIMIT - 1)
    assert short.dropped == sizes.count(longest) > 0
    assert short.examples == len(sizes) - short.dropped
    again, _ = run_rl(name="by length", max_length=longest + LIMIT - 1)
    assert again.dropped == short.dropped
    message = rf"its prompt has {longest} tokens, and 1 to {longest - 1} are allowed \({longest + LIMIT - 1} by"
    with pytest.raises(UserError, match=message):
        run_rl(name="error", max_length=longest + LIMIT - 1, overlong="error")
    run_rl(name="no error", max_length=longest + LIMIT, overlong="error")
    with pytest.raises(UserError, match="no train prompt of task toy is left: the shortest has 4 tokens, and 2 are"):
        run_rl(name="none", max_length=LIMIT + 2)


def test_virtual_tokens_take_their_room_from_the_context(run_rl):
    sizes = [len(ToyTask().prompt(item).split()) for item in ToyTask().items("train")]
    room = CONTEXT - max(sizes) - LIMIT
    for more, dropped in ((0, 0), (1, sizes.count(max(sizes)))):
        config = {"num_virtual_tokens": room + more}
        record, _ = run_rl(name=str(more), method="prompt_tuning", config=config)
        assert record.dropped == dropped


def test_one_new_token(run_rl):
    record, moved = run_rl(lambda answer: float(answer.completion > "w3"), max_new_tokens=1)
    assert moved > 0
    assert last(record).length == 1
    assert record.rollouts.generated_tokens == record.rollouts.completions


def test_unscored_answers_are_counted_and_worth_nothing(run_rl):
    none, moved = run_rl(lambda answer: None, name="none")
    assert (last(none).unscored, last(none).reward, moved) == (1, 0, 0)
    assert none.rollouts.unscored == none.rollouts.completions
    assert none.log[-1].validation_reward is None
    assert {one.reason for group in none.rollouts.samples for one in group.completions} == {"cannot be judged"}
    some, moved = run_rl(lambda answer: None if ones(answer) else answer.tokens, name="some")
    assert 0 < last(some).unscored < 1
    assert moved > 0


def test_weights_of_rewards(run_rl):
    def weighed(weight):
        record, moved = run_rl(length_reward, name=str(weight), rewards=[{"name": "task", "weight": weight}])
        return record.log[1].rollout, record.rollouts.samples[0], moved

    (plain, group, moved), (turned, opposite, back) = weighed(1.0), weighed(-2.0)
    assert moved > 0 and back > 0
    assert plain.rewards == turned.rewards
    assert turned.reward == -2 * plain.reward
    found = [(one.reward, one.advantage) for one in opposite.completions]
    wanted = [(-2 * one.reward, pytest.approx(-one.advantage, rel=1e-2)) for one in group.completions]
    assert found == wanted


@pytest.mark.parametrize("loss", ["grpo", "dapo", "rloo"])
def test_a_group_may_be_larger_than_a_forward_pass(run_rl, loss):
    whole, _ = run_rl(name="whole", group_size=8, **LOSSES[loss])
    parts, _ = run_rl(name="parts", group_size=8, micro_batch_size=2, **LOSSES[loss])
    assert parts.tokens == whole.tokens
    assert parts.log[1].grad_norm == pytest.approx(whole.log[1].grad_norm, rel=1e-4)
    assert parts.log[1].rollout.entropy == pytest.approx(whole.log[1].rollout.entropy, rel=1e-5)
    assert parts.log[1].rollout.reward == whole.log[1].rollout.reward


def test_logits_that_are_not_finite_end_the_training(run_rl):
    with pytest.raises(TrainingFailed, match=r"failed at step 1: the logits of 8 of 8 completions are not finite"):
        run_rl(head=lambda output: output * torch.nan, validation_items=0)


def test_a_method_whose_completions_see_each_other_is_refused(run_rl):
    _, moved = run_rl(name="token", method="lily", config={"rank": 4})
    assert moved > 0
    with pytest.raises(UserError, match="depends on the other completions of its batch"):
        run_rl(name="batch", method="lily", config={"rank": 4, "routing": "batch"})
