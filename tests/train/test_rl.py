"""Reinforcement learning on the packaged micro model: what is recorded, repeated and resumed."""

from __future__ import annotations

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.specs import MethodSpec, ModelSpec, RLSpec, RunSpec
from peft_arena.methods.registry import make_method
from peft_arena.models.load import load, pin
from peft_arena.store.store import Store
from peft_arena.study.read_study import task_spec
from peft_arena.tasks.registry import task_of
from peft_arena.train import rl_session
from peft_arena.train.run import finish, train_run

MODEL = pin(ModelSpec(name="micro"))
TASK = task_spec("micro-operator", {}, "test")
SMALL = {
    "objective": "grpo",
    "schedule": {"steps": 4},
    "learning_rate": 3e-3,
    "batch_size": 16,
    "group_size": 4,
    "validation_items": 4,
    "rewards": [{"name": "format", "config": {"pattern": "[0-4].*"}}, {"name": "task", "weight": 2.0}],
}


class Killed(Exception):  # noqa: N818
    """Stands for the end of the process."""


def run_spec(method="lora", seed=0, config=None, dtype="float32", **changes):
    made = make_method(method, config or {}, "test")
    spec = RLSpec.model_validate({**SMALL, "task": TASK, **changes})
    model = MODEL.model_copy(update={"dtype": dtype})
    name = MethodSpec(name=method, config=made.config.model_dump(mode="json"))
    return RunSpec(model=model, method=name, train=spec, seed=seed)


def once(root, spec, *, stop=None, resume_every=1, attach_seed=None):
    run = Store(root).run(spec)
    run.create()
    loaded = load(spec.model)
    method = make_method(spec.method.name, spec.method.config, "test")
    attached = method.attach(loaded.model, seed=spec.seed if attach_seed is None else attach_seed)

    def watch(info):
        if info.step == stop:
            raise Killed

    outcome = train_run(run, loaded, attached, task_of(TASK), progress=False, on_step=watch, resume_every=resume_every)
    finish(run, outcome.record)
    return run, outcome.record


def weights(run, step):
    """Return the bytes of the trained weights."""
    return (run.checkpoint(step) / "adapter_model.safetensors").read_bytes()


def said(record):
    """Return everything of a record but times."""
    timed = {"rollout_seconds", "update_seconds", "scoring_seconds"}
    log = [entry.model_dump() for entry in record.log]
    for entry in log:
        if entry["rollout"] is not None:
            entry["rollout"] = {key: value for key, value in entry["rollout"].items() if key not in timed}
    return log, record.rollouts.model_dump(exclude=timed), record.tokens, record.padded_tokens


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_same_rollouts_same_adapter(tmp_path, dtype):
    runs = [once(tmp_path / name, run_spec(seed=seed, dtype=dtype)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert weights(runs[0][0], 4) == weights(runs[1][0], 4)
    assert said(runs[0][1]) == said(runs[1][1])
    assert weights(runs[0][0], 4) != weights(runs[2][0], 4)
    texts = [[one.text for group in record.rollouts.samples for one in group.completions] for _, record in runs]
    assert texts[0] == texts[1] != texts[2]


ON_POLICY = {"save_points": [0.5, 1.0]}
SEVERAL = {"prompts_per_rollout": 8, "updates_per_rollout": 2, "schedule": {"steps": 6}, "kl": 0.1}
"""Four optimizer steps on each rollout, so that a resume state in between holds completions."""


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
@pytest.mark.parametrize(("changes", "stops"), [(ON_POLICY, (1, 3)), (SEVERAL, (2, 4))])
def test_resumed_equals_never_stopped(tmp_path, objective, changes, stops):
    spec = run_spec(objective=objective, **changes)
    whole, record = once(tmp_path / "whole", spec)
    for stop in stops:
        with pytest.raises(Killed):
            once(tmp_path / f"stopped-{stop}", spec, stop=stop)
        resumed, again = once(tmp_path / f"stopped-{stop}", spec)
        assert again.resumed_at == stop
        assert [weights(resumed, step) for step in resumed.steps()] == [weights(whole, step) for step in whole.steps()]
        assert said(again) == said(record)


def test_the_record_says_what_was_done(tmp_path):
    run, record = once(tmp_path, run_spec(log_every=2))
    assert [entry.step for entry in record.log] == [0, 1, 2, 3, 4]
    first, last = record.log[0], record.log[-1]
    assert first.rollout is None
    assert first.validation_reward is not None
    assert last.validation_reward is not None
    assert all(entry.loss is None for entry in record.log)
    entry = record.log[1].rollout
    assert entry.completions == 16
    assert set(entry.rewards) == {"format", "task"}
    assert entry.reward == pytest.approx(entry.rewards["format"] + 2 * entry.rewards["task"])
    assert 0 < entry.rewards["format"] < 1
    assert 0 < entry.entropy < 7
    assert entry.kl == pytest.approx(0, abs=1e-6)
    assert last.rollout.kl > 1e-6
    assert 1 <= entry.length <= 16
    made = record.rollouts
    assert (made.completions, made.groups, made.unscored) == (64, 16, 0)
    assert made.generated_tokens == sum(one.rollout.generated_tokens for one in record.log if one.rollout)
    assert made.engine["engine"] == "transformers"
    assert made.engine["max_new_tokens"] == 16
    assert [group.step for group in made.samples] == [0, 0, 2, 2, 3, 3]
    for group in made.samples:
        assert len(group.completions) == 4
        mean = sum(one.reward for one in group.completions) / 4
        for one in group.completions:
            assert (one.advantage > 0) == (one.reward > mean)
            assert one.rewards["format"] == float(one.text.strip()[:1] in set("01234") and one.text.strip() != "")
    assert run.training() is not None


def test_the_reward_rises(tmp_path):
    changes = {"rewards": [{"name": "format", "config": {"pattern": "[0-4].*"}}], "schedule": {"steps": 25}}
    _, record = once(tmp_path, run_spec(learning_rate=5e-3, **changes))
    rewards = [entry.rollout.reward for entry in record.log if entry.rollout]
    assert sum(rewards[:5]) / 5 < 0.8
    assert sum(rewards[-5:]) / 5 > 0.9


def test_a_rising_divergence_is_held_back_by_its_weight(tmp_path):
    changes = {"schedule": {"steps": 12}, "learning_rate": 5e-3}
    _, free = once(tmp_path / "free", run_spec(**changes))
    _, held = once(tmp_path / "held", run_spec(kl=2.0, **changes))
    assert held.log[-1].rollout.kl < 0.5 * free.log[-1].rollout.kl
    assert all(entry.rollout.kl is not None for entry in held.log if entry.rollout)


def test_the_reference_is_the_pretrained_model_not_what_the_method_starts_as(tmp_path, monkeypatch):
    kept = []
    scored = rl_session.RLSession.reference

    def watching(self):
        kept.append(self)
        return scored(self)

    monkeypatch.setattr(rl_session.RLSession, "reference", watching)
    _, record = once(tmp_path, run_spec("prompt_tuning", config={"num_virtual_tokens": 4}, schedule={"steps": 1}))
    assert kept
    assert record.log[1].rollout.kl > 1e-3  # vectors before the prompt change the output before training


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
@pytest.mark.parametrize("method", ["lora", "adalora", "prompt_tuning", "adapter_houlsby", "full"])
def test_the_model_gets_no_part_that_the_method_has_not(tmp_path, objective, method):
    spec = run_spec(method, objective=objective, schedule={"steps": 1}, validation_items=0)
    run = Store(tmp_path).run(spec)
    run.create()
    loaded = load(spec.model)
    attached = make_method(method, {}, "test").attach(loaded.model, seed=0)
    before = [name for name, _ in attached.model.named_parameters()], list(attached.trained())
    train_run(run, loaded, attached, task_of(TASK), progress=False)
    assert ([name for name, _ in attached.model.named_parameters()], list(attached.trained())) == before


@pytest.mark.parametrize(("objective", "group"), [("grpo", 8), ("rloo", 8), ("rloo", 6)])
def test_groups_of_one_reward_move_nothing_whatever_the_reward(tmp_path, objective, group):
    changes = {"objective": objective, "group_size": group, "batch_size": 2 * group, "schedule": {"steps": 2}}
    always = {"name": "format", "weight": 0.7, "config": {"pattern": "(?s).*"}}
    run, record = once(tmp_path, run_spec("full", rewards=[always], learning_rate=1e-2, **changes))
    assert [entry.rollout.zero_variance for entry in record.log if entry.rollout] == [1.0, 1.0]
    assert all(one.advantage == 0 for made in record.rollouts.samples for one in made.completions)
    assert [entry.grad_norm for entry in record.log[1:]] == [0.0, 0.0]
    trained = make_method("full", {}, "t").restore(load(MODEL).model, run.checkpoint(2)).model
    for (name, now), pretrained in zip(trained.named_parameters(), load(MODEL).model.parameters(), strict=True):
        assert torch.equal(now, pretrained), name


def test_a_step_without_a_label_has_gradients_of_zero_for_every_parameter(tmp_path):
    changes = {"truncated": "mask", "max_new_tokens": 1, "top_k": 1, "schedule": {"steps": 3}, "validation_items": 0}
    _, record = once(tmp_path, run_spec("adalora", **changes))
    for entry in record.log:
        assert (entry.rollout.entropy, entry.rollout.clip_low, entry.rollout.kl) == (None, None, None)
        assert entry.rollout.ended == 0


def test_time_of_rollouts_is_that_of_generating_and_scoring(tmp_path, monkeypatch):
    import time

    scored = rl_session.RLSession.reference

    def slow(self):
        time.sleep(1)
        return scored(self)

    monkeypatch.setattr(rl_session.RLSession, "reference", slow)
    _, record = once(tmp_path, run_spec(schedule={"steps": 1}, validation_items=0))
    assert record.rollouts.update_seconds > 1
    assert record.rollouts.rollout_seconds < record.rollouts.update_seconds


def test_the_divergence_is_measured_about_twenty_times_where_the_loss_does_not_need_it(tmp_path):
    changes = {"schedule": {"steps": 24}, "validation_items": 0, "batch_size": 4, "max_new_tokens": 2}
    _, record = once(tmp_path, run_spec(**changes))
    assert [entry.step for entry in record.log if entry.rollout.kl is not None] == list(range(2, 25, 2))


def test_what_cannot_be_done_is_refused(tmp_path):
    def refused(spec, message, **more):
        with pytest.raises(UserError, match=message):
            once(tmp_path, spec, **more)

    refused(run_spec(max_length=20), "no train prompt of task micro-operator is left")
    refused(run_spec(rollouts="vllm_colocate", method="pissa"), "rollouts vllm_colocate cannot be used with method")
    refused(run_spec(rewards=[{"name": "nothing"}]), "nothing")
    refused(run_spec(rollouts="vllm_colocate"), "needs vLLM")
    refused(run_spec(max_new_tokens=5000), "max_new_tokens 5000 leaves no room for a prompt")
    with pytest.raises(ValueError, match="weight 0"):
        run_spec(rewards=[{"name": "task", "weight": 0.0}])
    with pytest.raises(ValueError, match="rloo has its own loss and advantages"):
        run_spec(objective="rloo", advantage_scale="none")
    with pytest.raises(ValueError, match="group_size 4 does not divide batch_size 18"):
        run_spec(batch_size=18)
    with pytest.raises(ValueError, match=r"tokens cannot be used"):
        run_spec(schedule={"tokens": 100})
    with pytest.raises(ValueError, match="batch_size 16 does not divide the 12 completions"):
        run_spec(prompts_per_rollout=3)
