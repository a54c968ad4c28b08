"""Runs that began at another run: every command puts their weights on the model they were trained on."""

import json
import shutil
from contextlib import nullcontext

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_arena.evaluate.run as evaluating
from peft_arena.cli.catalogue import run_summary
from peft_arena.commands.check import check_path
from peft_arena.commands.export_command import export
from peft_arena.commands.geometry_command import geometry_spec, measure_points, point_named
from peft_arena.commands.merge_command import merge
from peft_arena.commands.path_command import path_for, rewind, scan_run
from peft_arena.commands.single_run import evaluate_point
from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec, PathSpec, TaskSpec
from peft_arena.models.load import PACKAGED, load
from peft_arena.store.store import Store
from peft_arena.testing.subject import difference, logits, tokens
from peft_arena.weights.adapter_files import express
from peft_arena.weights.start import init_of, tuned_run
from tests.made_runs import STEP, trained_run

ROUNDING = 1e-4
"""Most that float32 sums in another order move logits."""


def by_peft(*runs):
    """Return the model that peft makes of adapters merged one after the other into the pretrained model."""
    model = load(runs[0].spec.model).model
    for run in runs:
        model = peft.PeftModel.from_pretrained(model, str(run.checkpoint(STEP))).merge_and_unload()
    return model.eval()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Runs directory, a LoRA run, an OFT run that began at it, and its logits by peft alone."""
    runs = tmp_path_factory.mktemp("begun")
    source = trained_run(runs, "lora")
    run = trained_run(runs, "oft", start=source)
    wanted = logits(by_peft(source, run), tokens())
    alone = logits(by_peft(run), tokens())
    assert difference(alone, wanted) > 1, "the adapter on the pretrained model is another model"
    return runs, source, run, wanted


def name_of(run):
    return f"{run.run_id}@{STEP}"


def watched(monkeypatch, name, seen):
    """Let an evaluation tell the logits of the model it is given."""
    original = getattr(evaluating, name)

    def evaluate(loaded, model, *arguments, **options):
        seen.append((options.get("factor"), logits(model, tokens())))
        return original(loaded, model, *arguments, **options)

    monkeypatch.setattr(evaluating, name, evaluate)


def test_evaluation_is_of_both_trainings(begun, monkeypatch):
    runs, _, run, wanted = begun
    seen = []
    watched(monkeypatch, "evaluate", seen)
    evaluate_point(run.run_id, ["micro-sort"], runs, items=2, split="test", dtype="float32", batch_size=None)
    ((_, found),) = seen
    assert difference(found, wanted) < ROUNDING


def test_merging_writes_both_trainings(begun, tmp_path):
    runs, source, run, wanted = begun
    merged = merge(name_of(run), tmp_path / "out", runs=runs)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(logits(found, tokens()), wanted) < ROUNDING
    assert merged.verified.point.ratio < 1e-3, "the weights were held against what the method restores"
    said = json.loads((tmp_path / "out" / "merge.json").read_text())["start"]
    assert said == {"run": source.run_id, "step": STEP, "sha256": run.training().start.sha256}
    half = merge(str(run.checkpoint(STEP)), tmp_path / "half", factor=0.5)
    assert half.verified.against.startswith("the written weights"), "no adapter expresses the point"
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).state_dict()
    _halfway(weights, by_peft(*begun[1:3]).state_dict(), load(run.spec.model).model.state_dict())


def _halfway(found, tuned, pretrained):
    changed = [name for name in pretrained if not torch.equal(tuned[name], pretrained[name])]
    assert len(changed) > 30
    for name in changed:
        torch.testing.assert_close(found[name], (tuned[name] + pretrained[name]) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("to", "rank"), [("adapter", None), ("lora", "4")])
def test_an_adapter_is_not_exported(begun, tmp_path, to, rank):
    runs, source, run, _ = begun
    for name in (name_of(run), str(run.checkpoint(STEP))):
        message = f"run {run.run_id} began at {name_of(source)}.*belongs to that model, not to micro: peft-arena merge"
        with pytest.raises(UserError, match=message):
            export(name, tmp_path / "out", to, base="micro", runs=runs, rank=rank)
    assert not (tmp_path / "out").exists()
    export(name_of(source), tmp_path / "out", "adapter", runs=runs)


def test_geometry_is_of_the_change_from_the_pretrained_model(begun, tmp_path):
    runs, source, run, _ = begun
    tuned, pretrained = by_peft(source, run).state_dict(), load(run.spec.model).model.state_dict()
    spec = geometry_spec("spectra", {"modules": ["q_proj"]})
    options = {"base": "micro", "dtype": None, "factor": 1.0, "cache": None, "bar": lambda: nullcontext(_quiet)}
    (record,) = measure_points([run.run_id], spec, tmp_path / "out", runs=runs, **options)
    rows = {row.module: row.values["l2"] for row in record.rows}
    assert len(rows) == 5
    for module, value in rows.items():
        change = tuned[f"{module}.weight"] - pretrained[f"{module}.weight"]
        assert value == pytest.approx(float(change.norm()), rel=1e-4)


def test_a_checkpoint_in_its_run_is_the_runs(begun):
    runs, source, run, _ = begun
    assert point_named(str(run.checkpoint(STEP)), runs, "micro", None) == tuned_run(run, STEP)
    assert point_named(str(source.checkpoint(STEP)), runs, "micro", None).method is None
    assert tuned_run(run, STEP).start == tuned_run(source, STEP)


def _quiet(fraction, what):
    pass


def test_activations_are_of_both_trainings(begun, tmp_path):
    runs, source, run, _ = begun
    settings = {"modules": ["q_proj"], "preset": "none", "tokens": 32, "prompts": 4}
    spec = geometry_spec("activations", settings, ["micro-sort"], ["micro-reverse"])
    options = {"base": None, "dtype": None, "factor": 1.0, "cache": None, "bar": lambda: nullcontext(_quiet)}
    merged = tmp_path / "merged"
    by_peft(source, run).save_pretrained(merged)
    load(run.spec.model).tokenizer.save_pretrained(merged)
    (record,) = measure_points([run.run_id], spec, tmp_path / "a", runs=runs, **options)
    (other,) = measure_points([str(merged)], spec, tmp_path / "b", runs=runs, **{**options, "base": "micro"})
    found, wanted = ({one.metric: one.value for one in each.summary} for each in (record, other))
    assert found["kl_target"] > 0.1
    assert found.keys() == wanted.keys()
    for name in ("kl_general", "kl_target", *(name for name in wanted if name.startswith("cka"))):
        assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name


def test_a_path_is_straight_from_the_pretrained_model(begun, monkeypatch):
    runs, source, run, _ = begun
    seen = []
    watched(monkeypatch, "evaluate_many", seen)
    plain = {"rule": "uniform", "settings": (), "way": "own", "tasks": ["micro-reverse"], "items": 2, "test_items": 2}
    plain |= {"margin": 2.0, "save_points": False, "batch_size": None, "bar": lambda: nullcontext(_quiet)}
    _, record, _ = scan_run(run.run_id, runs, grid="0.5,1", **plain)
    found = dict(seen)[0.5]
    tuned, pretrained = by_peft(source, run).state_dict(), load(run.spec.model).model
    held = dict(pretrained.named_parameters())
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_((tuned[name] + parameter) / 2)
    assert difference(found, logits(pretrained, tokens())) < ROUNDING
    assert record.expressed == "weights"
    assert record.orthogonality is None, "the total is no rotation"


def test_rewinding_writes_weights(begun, tmp_path):
    runs, source, run, _ = begun
    options = {"rule": "uniform", "settings": (), "way": "own", "factor": "0.5", "weights": False, "dtype": None}
    bar = {"shard_size": "1GB", "verify": True, "bar": lambda: nullcontext(_quiet)}
    said = rewind(run.run_id, tmp_path / "out", runs, **options, **bar)
    assert (said["written"], said["start"]["run"]) == ("weights", source.run_id)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    _halfway(found, by_peft(source, run).state_dict(), load(run.spec.model).model.state_dict())


def test_there_is_no_other_way_than_the_straight_one(begun):
    runs, source, run, _ = begun
    alone = trained_run(runs, "oft", seed=1)
    assert path_for(alone, "uniform", (), "sqrt") == PathSpec(way="sqrt")
    with pytest.raises(UserError, match=f"run {run.run_id} has no such path: oft scales no generator"):
        path_for(run, "uniform", (), "sqrt")
    weights = tuned_run(run, STEP).weights()
    with pytest.raises(UserError, match="way sqrt is for rotations"):
        weights.along("sqrt")
    assert express(weights) is None
    assert express(tuned_run(alone, STEP).weights()) is not None


def test_a_checkpoint_that_was_copied_is_not_taken_for_an_adapter_of_the_pretrained_model(begun, tmp_path):
    runs, source, run, _ = begun
    shutil.copytree(run.checkpoint(STEP), tmp_path / "copy")
    settings = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == name_of(source)
    with pytest.raises(UserError, match=f"holds an adapter on the weights of run {name_of(source)}, not on micro"):
        point_named(str(tmp_path / "copy"), runs, "micro", None)
    with pytest.raises(UserError, match="holds an adapter on the weights of run"):
        merge(str(tmp_path / "copy"), tmp_path / "out", base=str(PACKAGED["micro"]))
    copied = shutil.copytree(source.checkpoint(STEP), tmp_path / "plain")
    assert point_named(str(copied), runs, "micro", None).start is None


def test_show_and_check_say_what_a_run_began_at(begun, tmp_path):
    runs, source, run, _ = begun
    assert run_summary(run)["training"]["start"]["run_id"] == source.run_id
    assert check_path(run.checkpoint(STEP))["begins_at"] == name_of(source)
    assert "begins_at" not in check_path(source.checkpoint(STEP))
    assert check_path(runs)["checkpoints"] >= 2
    shutil.copytree(run.path, tmp_path / "alone" / run.run_id)
    with pytest.raises(UserError, match=f"1 of .* damaged: .*begins at run {source.run_id}, which is not trained in"):
        check_path(tmp_path / "alone")


def test_a_run_may_begin_at_one_that_began_elsewhere(begun, monkeypatch, tmp_path):
    runs, source, run, _ = begun
    third = trained_run(runs, "lora", {"rank": 4}, start=run)
    wanted = logits(by_peft(source, run, third), tokens())
    seen = []
    watched(monkeypatch, "evaluate", seen)
    evaluate_point(third.run_id, ["micro-sort"], runs, items=2, split="test", dtype="float32", batch_size=None)
    assert difference(seen[0][1], wanted) < ROUNDING
    merge(third.run_id, tmp_path / "out", runs=runs)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(logits(found, tokens()), wanted) < ROUNDING


def test_evaluations_of_the_base_are_those_of_the_pretrained_model(begun):
    from peft_arena.paths.scan import base_of

    runs, source, run, _ = begun
    assert base_of(run).run_id == base_of(source).run_id
    assert init_of(base_of(run).spec) is None
    assert Store(runs).run(run.spec).evaluation(run.point(STEP), EvalSpec(task=TaskSpec(name="none"))) is None


@pytest.mark.parametrize(("first", "second"), [("oft", "dora"), ("full", "ia3")])
def test_merging_in_bfloat16_is_of_the_rounded_start(tmp_path, first, second):
    source = trained_run(tmp_path, first, dtype="bfloat16")
    run = trained_run(tmp_path, second, dtype="bfloat16", start=source)
    merged = merge(run.run_id, tmp_path / "out", runs=tmp_path)
    assert (merged.dtype, merged.verified.against[:15]) == ("bfloat16", "the tuned model")
    assert merged.verified.point.ratio < 1e-3
