"""What a run's training begins at: another run's weights merged into the pretrained model, and the proof of it."""

import shutil

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.specs import InitFrom
from peft_arena.methods.base import Capability
from peft_arena.methods.registry import METHODS, make_method, method_of
from peft_arena.models.load import load
from peft_arena.store.checkpoint import HASHES
from peft_arena.store.store import Store
from peft_arena.testing.subject import difference, logits, one_thread, tokens
from peft_arena.weights.base import base_weights
from peft_arena.weights.start import began_at, load_start, note_start, source_of, start_refusal, tuned_run
from tests.made_runs import STEP, made_run, made_spec, trained_run

PAIRS = (("lora", "dora"), ("oft", "lora"), ("full", "hra"), ("ln_tuning", "pissa"), ("lora", "bitfit"))
ROUNDING = 1e-4


def restored(run):
    """Return the tuned model as evaluation makes it."""
    loaded, _ = load_start(run)
    return method_of(run.spec.method).restore(loaded.model, run.checkpoint(STEP)).model


def merged(run):
    """Return the pretrained model with the run's weights put in."""
    model = load(run.spec.model).model
    tuned_run(run, STEP).weights().load_into(model)
    return model


def sft(runs, method, **options):
    return trained_run(runs, method, **options)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_start_is_the_tuned_model_and_the_total_is_both_changes(tmp_path, first, second):
    source = sft(tmp_path, first)
    run = trained_run(tmp_path, second, start=source)
    ids = tokens()
    loaded, start = load_start(run)
    begun = logits(loaded.model, ids)
    assert difference(begun, logits(restored(source), ids)) < ROUNDING
    assert (start.run_id, start.step, start.how) == (source.run_id, STEP, "merged in float32, rounded to float32")
    tuned = logits(restored(run), ids)
    assert difference(tuned, begun) > 0.1
    assert difference(logits(tuned_run(run, STEP).model(load(run.spec.model)), ids), tuned) == 0
    assert difference(logits(merged(run), ids), tuned) < ROUNDING


def test_in_bfloat16_the_start_is_rounded_once(tmp_path):
    source = sft(tmp_path, "lora", dtype="bfloat16")
    run = trained_run(tmp_path, "oft", dtype="bfloat16", start=source)
    loaded, start = load_start(run)
    assert start.how.endswith("rounded to bfloat16")
    weights = tuned_run(source, STEP).weights()
    for name, parameter in loaded.model.named_parameters():
        base, change = weights.parameter(name)
        wanted = base if change is None else base + change.dense(base)
        assert torch.equal(parameter, wanted.to(torch.bfloat16)), name
    held = load(run.spec.model)
    held.model.float()  # what holds the weights in float32 gets the same values
    tuned_run(run, STEP).model(held)
    found = dict(held.model.named_parameters())
    name = "model.layers.0.self_attn.q_proj"
    weight = next(found[key] for key in (f"{name}.weight", f"{name}.base_layer.weight") if key in found)
    assert torch.equal(weight, loaded.model.get_parameter(f"{name}.weight").float())


def test_the_pretrained_model_is_nobody_s_start(tmp_path):
    run = made_run(tmp_path, "lora")
    loaded, start = load_start(run)
    assert (start, source_of(run), tuned_run(run, STEP).start) == (None, None, None)
    assert torch.equal(loaded.model.lm_head.weight, base_weights(run.spec.model).tensor("lm_head.weight"))


def test_the_hash_does_not_depend_on_threads_and_changes_with_a_bit(tmp_path):
    source = sft(tmp_path, "oft")
    run = trained_run(tmp_path, "lora", start=source)
    before = torch.get_num_threads()
    with one_thread():
        alone = load_start(run)[1].sha256
    torch.set_num_threads(2)
    try:
        assert load_start(run)[1].sha256 == alone == run.training().start.sha256
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    other = trained_run(tmp_path, "lora", start=sft(tmp_path, "oft", seed=1, size=0.0301))
    assert other.training().start.sha256 != alone


def remade(run, size=0.05):
    """Train a run anew, to other weights."""
    shutil.rmtree(run.path)
    return trained_run(run.path.parent, run.spec.method.name, size=size)


def test_another_source_under_the_same_name_is_refused_everywhere(tmp_path):
    source = sft(tmp_path, "lora")
    run = trained_run(tmp_path, "oft", start=source)
    tuned_run(run, STEP).weights()
    remade(source)
    message = f"{source.run_id}@{STEP} is no longer what training began at: .* sha256 .*training record says"
    with pytest.raises(UserError, match=message):
        load_start(run)
    with pytest.raises(UserError, match=message):
        tuned_run(run, STEP).weights()
    with pytest.raises(UserError, match=message):
        tuned_run(run, STEP).model(load(run.spec.model))


def test_a_training_goes_on_only_on_what_it_began_at(tmp_path):
    source = sft(tmp_path, "lora")
    run = Store(tmp_path).run(made_spec("oft", start=source))
    run.create()
    assert began_at(run) is None
    _, start = load_start(run)
    note_start(run, start)
    assert began_at(run) == start.sha256
    assert load_start(run)[1] == start
    remade(source)
    with pytest.raises(UserError, match="no longer what training began at"):
        load_start(run)


def test_a_record_that_does_not_name_the_start_is_refused(tmp_path):
    source = sft(tmp_path, "lora")
    run = trained_run(tmp_path, "oft", start=source)
    record = run.training().model_copy(update={"start": None})
    (run.path / "records" / "training.json").unlink()
    run.write_training(record)
    with pytest.raises(UserError, match=f"record of run {run.run_id} does not say what it began at"):
        load_start(run)


def test_a_source_that_is_not_ready_is_refused(tmp_path):
    source = sft(tmp_path, "lora")
    untrained = made_run(tmp_path, "oft")
    for spec, message in [
        (made_spec("dora", start=untrained), f"begins at run {untrained.run_id}, which is not trained in "),
        (made_spec("dora", start=sft(tmp_path, "prompt_tuning")), "has no weights to merge: it puts trained vectors"),
        (
            made_spec("dora", start=source, dtype="bfloat16"),
            r"which is of another model: micro \(float32, .*\), not micro \(bfloat16",
        ),
        (with_step(made_spec("dora", start=source), 1), "at step 1, which it did not save. Known: 2"),
    ]:
        with pytest.raises(UserError, match=message):
            load_start(Store(tmp_path).run(spec))
    file = source.checkpoint(STEP) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(UserError, match="damaged: adapter_model.safetensors has sha256"):
        load_start(Store(tmp_path).run(made_spec("dora", start=source)))
    (source.checkpoint(STEP) / HASHES).unlink()
    with pytest.raises(UserError, match="damaged"):
        source_of(Store(tmp_path).run(made_spec("dora", start=source)))


def with_step(spec, step):
    train = spec.train.model_copy(update={"init_from": InitFrom(run=spec.train.init_from.run, step=step)})
    return spec.model_copy(update={"train": train})


def test_a_source_that_adds_parameters_is_refused_before_training(tmp_path):
    source = sft(tmp_path, "bitfit")
    with pytest.raises(UserError, match=rf"no training can begin at {source.run_id}@2: it adds 35 parameters .*bias"):
        load_start(Store(tmp_path).run(made_spec("lora", start=source)))


def test_what_can_be_begun_at_follows_from_the_card():
    allowed = {name for name in METHODS.own() if not start_refusal(make_method(name))}
    assert {"full", "lora", "oft", "dora", "vera", "ia3", "pissa", "ln_tuning"} <= allowed
    assert not allowed & {"none", "prompt_tuning", "xlora", "lily", "adapter_houlsby"} - {"none"}
    for name in allowed:
        assert Capability.MERGEABLE in METHODS.get(name).card.capabilities
    assert "quantised" in start_refusal(make_method("qalora"))
