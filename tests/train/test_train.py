"""Whole trainings of the toy model: same seed same bits, every setting has its effect, mistakes are refused."""

from __future__ import annotations

import errno
import shutil

import pytest
import torch

from peft_arena.core.errors import UserError, unknown
from peft_arena.core.specs import Schedule, TrainSpec
from peft_arena.train.outcome import TrainingFailed
from peft_arena.train.run import finish
from peft_arena.train.sft import train_sft

from .test_loss import expected
from .toy import ToyAttached, ToyTask, load_model, log_of, open_run, run_spec, weights


def train(root, model_dir, *, seed=0, dtype="float32", rate=0.1, task=None, hooks=None, **changes):
    spec = run_spec(model_dir, seed=seed, dtype=dtype, **changes)
    run = open_run(root, spec)
    loaded = load_model(model_dir, dtype)
    attached = ToyAttached(loaded.model, rate=rate)
    outcome = train_sft(run, loaded, attached, task or ToyTask(), progress=False, **(hooks or {}))
    assert run.training() is None
    finish(run, outcome.record)
    return run, outcome, attached


def seen(run, outcome):
    record = outcome.record
    return (
        [weights(run, step) for step in record.save_points],
        log_of(run),
        (record.steps, record.tokens, record.padded_tokens, record.examples, record.dropped, record.save_points),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_same_bits_other_seed_other_weights(tmp_path, model_dir, dtype):
    one, two, other = (
        train(tmp_path / name, model_dir, seed=seed, dtype=dtype) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert seen(*one[:2]) == seen(*two[:2])
    assert weights(one[0], 9) != weights(other[0], 9)


def test_it_learns_and_counts(tmp_path, model_dir):
    settings = {"schedule": Schedule(epochs=8), "log_every": 10, "group_by_length": True}
    run, outcome, attached = train(tmp_path, model_dir, **settings)
    record = outcome.record
    log = record.log
    assert record == run.training()
    assert log[0].step == 0 and log[0].tokens == 0 and log[0].loss is None
    assert log[-1].validation_loss < log[0].validation_loss - 0.2
    assert record.examples == 37 and record.steps == 74 == log[-1].step
    total = sum(len(f"{item.question} : {item.answer}".split()) + 1 for item in ToyTask().items("train"))
    assert record.tokens == 8 * total == log[-1].tokens
    assert record.tokens < record.padded_tokens < 1.25 * record.tokens
    assert outcome.rows == 8 * 37
    assert run.steps() == [37, 74] and not (run.path / "resume").exists()
    assert outcome.seconds > 0
    assert not attached.model.training


EFFECTS = {
    "examples": 8,
    "schedule": Schedule(steps=8),
    "batch_size": 5,
    "micro_batch_size": 2,
    "learning_rate": 2e-2,
    "lr_schedule": "linear",
    "warmup_fraction": 0.5,
    "weight_decay": 0.5,
    "max_grad_norm": 0.1,
    "max_length": 12,
    "overlong": "error",
    "loss_on": "all",
    "packing": True,
    "group_by_length": True,
    "save_points": (0.2, 1.0),
    "validation_items": 3,
    "log_every": 3,
    "validate_every": 0.3,
}


def test_every_field_is_tried():
    assert set(EFFECTS) == set(TrainSpec.model_fields) - {"objective", "task"}


@pytest.mark.parametrize("field", [name for name in EFFECTS if name != "overlong"])
def test_every_field_has_an_effect(tmp_path, model_dir, field):
    plain = train(tmp_path / "plain", model_dir)
    changed = train(tmp_path / "changed", model_dir, **{field: EFFECTS[field]})
    assert seen(*plain[:2]) != seen(*changed[:2])
    if field in {"log_every", "validate_every", "validation_items", "save_points"}:
        assert weights(plain[0], 9) == weights(changed[0], 9), "watching must not change the training"


def test_overlong_examples_are_dropped_or_refused(tmp_path, model_dir):
    _, outcome, _ = train(tmp_path / "drop", model_dir, max_length=12)
    sizes = [len(f"{item.question} : {item.answer}".split()) + 1 for item in ToyTask().items("train")]
    assert outcome.record.dropped == sum(size > 12 for size in sizes) > 0
    assert outcome.record.examples + outcome.record.dropped == 37
    with pytest.raises(UserError, match=r"has \d+ tokens and at most 12 are allowed"):
        train(tmp_path / "error", model_dir, max_length=12, overlong="error")


class NoValidation(ToyTask):
    def items(self, split):
        if split == "validation":
            raise unknown("split", split, ["train", "test"])
        return super().items(split)


class Unreachable(ToyTask):
    def items(self, split):
        if split == "validation":
            raise UserError("the data cannot be had")
        return super().items(split)


@pytest.mark.parametrize(("task", "asked", "used"), [(ToyTask(), 64, 11), (ToyTask(), 6, 6), (NoValidation(), 64, 0)])
def test_the_held_out_loss_is_over_the_validation_items_there_are(tmp_path, model_dir, task, asked, used):
    _, outcome, _ = train(tmp_path, model_dir, task=task, validation_items=asked)
    assert outcome.record.validation_items == used
    assert any(entry.validation_loss is not None for entry in outcome.record.log) is bool(used)


def test_data_that_cannot_be_had_is_no_missing_split(tmp_path, model_dir):
    with pytest.raises(UserError, match="the data cannot be had"):
        train(tmp_path, model_dir, task=Unreachable())


class LongTask(ToyTask):
    def prompt(self, item):
        return "w1 " * 100


class EmptyTask(ToyTask):
    def items(self, split):
        return []


@pytest.mark.parametrize(
    ("task", "message"), [(LongTask(), "no train example .* is left"), (EmptyTask(), "no train items")]
)
def test_nothing_to_train_on_is_refused(tmp_path, model_dir, task, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, model_dir, task=task)


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"packing": True}])
def test_forward_passes_do_not_change_the_gradient(tmp_path, model_dir, change):
    """Answers differ in length, so a mean of means would be another loss."""
    whole = train(tmp_path / "whole", model_dir, rate=0.0, log_every=1)
    parts = train(tmp_path / "parts", model_dir, rate=0.0, log_every=1, **change)
    for left, right in zip(whole[1].record.log, parts[1].record.log, strict=True):
        for field, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("validation_loss", 1e-5)):
            value = getattr(left, field)
            assert getattr(right, field) == (None if value is None else pytest.approx(value, rel=tolerance))
    for name, value in whole[2].state().items():
        torch.testing.assert_close(parts[2].state()[name], value, rtol=1e-3, atol=1e-5)


def test_first_loss_and_held_out_loss_are_right(tmp_path, model_dir):
    from peft_arena.train.data import read_examples
    from peft_arena.train.plan import make_plan

    run, outcome, _ = train(tmp_path, model_dir, rate=0.0, log_every=1)
    spec = run.spec.train
    loaded = load_model(model_dir)
    held_out = read_examples(ToyTask(), "validation", 6, loaded.tokenizer, spec, 64).kept
    examples = read_examples(ToyTask(), "train", None, loaded.tokenizer, spec, 64).kept
    first = [examples[index] for index in make_plan([len(one.ids) for one in examples], spec, 0).steps[0]]
    for part, found in ((held_out, outcome.record.log[0].validation_loss), (first, outcome.record.log[1].loss)):
        wanted = float(expected(loaded.model, part)) / sum(example.labels for example in part)
        assert found == pytest.approx(wanted, rel=1e-5)


def test_weights_follow_plain_adamw(tmp_path, model_dir):
    """An independent loop over the same plan gives the same weights."""
    from peft_arena.train.data import read_examples
    from peft_arena.train.plan import make_plan
    from peft_arena.train.schedule import rate_factor

    run, _, trained = train(tmp_path, model_dir, rate=0.0, weight_decay=0.1)
    spec, loaded = run.spec.train, load_model(model_dir)
    attached = ToyAttached(loaded.model, rate=0.0)
    examples = read_examples(ToyTask(), "train", None, loaded.tokenizer, spec, 64).kept
    plan = make_plan([len(one.ids) for one in examples], spec, 0)
    optimizer = torch.optim.AdamW(attached.parameter_groups(spec.learning_rate, spec.weight_decay))
    for step, batch in enumerate(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * rate_factor(spec, step, len(plan.steps))
        chosen = [examples[index] for index in batch]
        loss = expected(attached.model, chosen) / sum(example.labels for example in chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(attached.trained().values(), spec.max_grad_norm)
        optimizer.step()
    for name, value in attached.state().items():
        torch.testing.assert_close(trained.state()[name], value, rtol=1e-3, atol=1e-5)


def test_the_given_model_is_left_as_it_was(tmp_path, model_dir):
    fresh = load_model(model_dir).model
    state = torch.get_rng_state()
    _, _, attached = train(tmp_path, model_dir, dtype="bfloat16")
    assert torch.equal(state, torch.get_rng_state())
    model = attached.model
    assert "forward" not in model.__dict__ and "_loss_function" not in model.__dict__
    assert not model.get_output_embeddings()._forward_pre_hooks
    left, right = model.config.to_diff_dict(), fresh.config.to_diff_dict()
    left.pop("dtype", None), right.pop("dtype", None)
    assert left == right
    assert model.generation_config.to_dict() == fresh.generation_config.to_dict()


def test_after_step_comes_with_gradients(tmp_path, model_dir):
    calls = []

    class Watching(ToyAttached):
        def after_step(self, step, total):
            calls.append((step, total, all(p.grad is not None for p in self.trained().values())))

    loaded = load_model(model_dir)
    run = open_run(tmp_path, run_spec(model_dir, micro_batch_size=2))
    train_sft(run, loaded, Watching(loaded.model), ToyTask(), progress=False)
    assert calls == [(step, 9, True) for step in range(1, 10)]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, model_dir):
    loaded = load_model(model_dir)
    attached = ToyAttached(loaded.model)
    run = open_run(tmp_path, run_spec(model_dir, save_points=(0.1, 1.0)))

    def poison(info):
        if info.step == 4:
            with torch.no_grad():
                next(iter(attached.trained().values())).fill_(float("nan"))

    with pytest.raises(TrainingFailed, match=r"at step 5: the loss is nan at learning rate 0\.00"):
        train_sft(run, loaded, attached, ToyTask(), progress=False, on_step=poison)
    assert run.training() is None and run.steps() == [1]


def test_full_disk_leaves_no_half_checkpoint(tmp_path, model_dir):
    class Full(ToyAttached):
        def save(self, directory):
            super().save(directory)
            raise OSError(errno.ENOSPC, "No space left on device")

    loaded = load_model(model_dir)
    run = open_run(tmp_path, run_spec(model_dir))
    with pytest.raises(UserError, match="No space left"):
        train_sft(run, loaded, Full(loaded.model), ToyTask(), progress=False)
    assert run.training() is None and run.steps() == []
    assert [path for path in run.path.rglob("*") if path.name.endswith(("safetensors", ".part"))] == []


def test_hooks_are_called(tmp_path, model_dir):
    events = []
    train(tmp_path, model_dir, hooks={"on_step": lambda info: events.append(info.step)})
    assert events == [*range(1, 10)]


def test_wrong_objects_are_refused(tmp_path, model_dir):
    loaded = load_model(model_dir)
    run = open_run(tmp_path / "a", run_spec(model_dir, dtype="bfloat16"))
    with pytest.raises(UserError, match="was loaded"):
        train_sft(run, loaded, ToyAttached(loaded.model), ToyTask())
    run = open_run(tmp_path / "b", run_spec(model_dir))

    class Forgetful(ToyAttached):
        def parameter_groups(self, learning_rate, weight_decay):
            return super().parameter_groups(learning_rate, weight_decay)[:1]

    with pytest.raises(UserError, match="optimizer groups"):
        train_sft(run, loaded, Forgetful(load_model(model_dir).model), ToyTask())
    frozen = ToyAttached(load_model(model_dir).model)
    frozen.model.requires_grad_(False)
    with pytest.raises(UserError, match="no trained parameter"):
        train_sft(run, loaded, frozen, ToyTask())
    half = ToyAttached(load_model(model_dir).model)
    half.model.bfloat16()
    with pytest.raises(UserError, match="must be float32"):
        train_sft(run, loaded, half, ToyTask())
    done, _, attached = train(tmp_path / "c", model_dir)
    with pytest.raises(UserError, match="already trained"):
        train_sft(done, loaded, attached, ToyTask())
    shutil.rmtree(done.path / "records")


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "full", "oft"])
def test_real_methods_train_and_come_back(tmp_path, model_dir, name):
    from peft_arena.core.specs import MethodSpec
    from peft_arena.methods.registry import make_method

    spec = run_spec(model_dir).model_copy(update={"method": MethodSpec(name=name)})
    method = make_method(name, {})
    run, loaded = open_run(tmp_path, spec), load_model(model_dir)
    attached = method.attach(loaded.model, seed=0)
    before = {key: value.clone() for key, value in attached.state().items()}
    outcome = train_sft(run, loaded, attached, ToyTask(), progress=False)
    changed = [key for key, value in attached.state().items() if not torch.equal(value, before[key])]
    assert changed and outcome.record.log[-1].loss is not None
    ids = torch.arange(5, 15)[None]
    restored = method.restore(load_model(model_dir).model, run.checkpoint(9))
    with torch.no_grad():
        torch.testing.assert_close(restored.model(ids).logits, attached.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_virtual_tokens_take_room_and_cannot_be_packed(tmp_path, model_dir):
    from peft_arena.methods.registry import make_method
    from peft_arena.models.modes import virtual_tokens

    loaded = load_model(model_dir)
    attached = make_method("prompt_tuning", {}).attach(loaded.model, seed=0)
    assert virtual_tokens(attached.model) > 0 == virtual_tokens(load_model(model_dir).model)
    with pytest.raises(UserError, match="packing cannot be used"):
        train_sft(open_run(tmp_path / "a", run_spec(model_dir, packing=True)), loaded, attached, ToyTask())
    loaded.model.config.max_position_embeddings = 20 + virtual_tokens(attached.model)
    outcome = train_sft(open_run(tmp_path / "b", run_spec(model_dir)), loaded, attached, ToyTask(), progress=False)
    sizes = [len(f"{item.question} : {item.answer}".split()) + 1 for item in ToyTask().items("train")]
    assert outcome.record.dropped == sum(size > 20 for size in sizes) > 0
