"""A run of ours in the library's form: what was measured, nothing else, and read back the same."""

import json

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.measure import Measure
from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, RLSpec, RunSpec, Schedule, TaskSpec, TrainSpec
from peft_arena.interop.export_results import export_hf
from peft_arena.interop.results import import_results
from peft_arena.interop.results_schema import ALONG, AT_END, SECTIONS, TRAIN_CONFIG
from peft_arena.methods.registry import make_method
from peft_arena.store.records import CostRecord, EvaluationRecord, ItemRecord, LogEntry, TrainingRecord
from peft_arena.store.store import Store
from tests.interop.library import COMPARISON

MODEL = ModelSpec(name="someone/model", revision="c" * 40, dtype="bfloat16")
TARGET = TaskSpec(name="hf-metamathqa")
WHOLE = EvalSpec(task=TARGET)
WIKIPEDIA = EvalSpec(task=TaskSpec(name="hf-wikipedia"))
PROVENANCE = {"platform": "Linux-6", "processor": "some CPU", "packages": {"peft": "0.21.2", "torch": "2.13.0"}}
MEASURES = {
    "training_time": (12.5, "seconds"),
    "checkpoint_bytes": (640, "bytes"),
    "trained_parameters": (100, "parameters"),
    "total_parameters": (1000, "parameters"),
    "peak_reserved_memory_training": (5000, "bytes"),
}


def measure(metric, value, unit, better="lower"):
    return Measure(metric=metric, value=value, unit=unit, better=better, how="made", n=4)


def evaluated(run, spec, point, metric, value, unit):
    record = EvaluationRecord(
        run_id=run.run_id,
        step=point.step,
        factor=1.0,
        spec=spec,
        card={},
        metrics=(measure(metric, value, unit, "higher" if unit == "fraction" else "lower"),),
        items=tuple(ItemRecord(id=str(number), value=value) for number in range(4)),
        engine={"batch_size": 8},
        provenance={},
    )
    run.write_evaluation(point, record)


def made(
    root,
    name="lora",
    config=None,
    *,
    train=None,
    finished=True,
    target=WHOLE,
    score=0.5,
    forgetting=True,
    measures=MEASURES,
    adapter=None,
):
    """Write the records of a run of eight steps, and return the store and the run."""
    method = make_method(name, config or {"rank": 4, "targets": ["q_proj", "v_proj"]} if config is None else config)
    train = train or TrainSpec(task=TARGET, schedule=Schedule(steps=8), batch_size=4, learning_rate=1e-3)
    spec = MethodSpec(name=name, config=method.config.model_dump(mode="json"))
    store = Store(root / "runs")
    run = store.run(RunSpec(model=MODEL, method=spec, train=train, seed=3))
    run.create()
    if not finished:
        return store, run
    log = (LogEntry(step=4, tokens=40, loss=0.9, validation_loss=1.1), LogEntry(step=8, tokens=80, loss=0.7))
    run.write_training(
        TrainingRecord(
            run_id=run.run_id, steps=8, tokens=80, padded_tokens=90, examples=32, dropped=0, log=log,
            save_points=(8,), provenance=PROVENANCE,
        )
    )  # fmt: skip
    costs = tuple(measure(key, value, unit) for key, (value, unit) in measures.items())
    run.write_cost(CostRecord(run_id=run.run_id, stage="training", measures=costs, provenance={}))
    if target is not None:
        evaluated(run, target, run.point(8), "accuracy", score, "fraction")
    if forgetting:
        base = store.run(RunSpec(model=MODEL, method=MethodSpec(name="none")))
        base.create()
        evaluated(base, WIKIPEDIA, base.point(0), "cross_entropy", 2.0, "nats/token")
        evaluated(run, WIKIPEDIA, run.point(8), "cross_entropy", 2.125, "nats/token")
    table = adapter or {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}
    directory = run.checkpoint(8)
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(
        json.dumps({"use_dora": False, "use_rslora": False, "kasa_config": None, "use_bdlora": None, **table})
    )
    return store, run


def exported(root, *arguments, **named):
    store, run = made(root, *arguments, **named)
    out = root / "out.json"
    return export_hf(run.run_id, store.root, out), json.loads(out.read_text()), run


def test_what_is_read_back_are_the_same_numbers(tmp_path):
    found, data, run = exported(tmp_path)
    ((row,),) = [table.rows for table in import_results([tmp_path / "out.json"]).tables]
    assert (row.label, row.method, row.status) == (f"lora/{run.run_id}", "lora", "success")
    known = {key: value for key, value in row.values.items() if value is not None}
    assert known == {
        "accuracy": 0.5,
        "forgetting": 0.125,
        "train_time": 12.5,
        "memory_max": 5000.0,
        "file_size": 640.0,
        "trainable_parameters": 100.0,
        "total_parameters": 1000.0,
        "train_loss": 0.7,
        "train_tokens": 80.0,
    }
    assert row.settings["seed"] == 3 and row.settings["learning_rate"] == 1e-3
    assert found.notes == ()


def test_the_keys_are_those_of_the_library(tmp_path):
    _, data, _ = exported(tmp_path)
    assert list(data) == sorted(SECTIONS)
    assert all(set(data[name]) == set(keys) for name, keys in SECTIONS.items())
    assert set(data["run_info"]["train_config"]) == set(TRAIN_CONFIG)
    along, last = data["train_info"]["metrics"]
    assert set(along) == set(ALONG) and set(last) == set(AT_END)
    assert (along["step"], along["train loss"], along["valid accuracy"], last["train samples"]) == (4, 0.9, None, 32)


@pytest.mark.skipif(not COMPARISON.is_dir(), reason=f"there is no {COMPARISON}")
def test_the_keys_are_those_of_a_file_of_the_library(tmp_path):
    _, data, _ = exported(tmp_path)
    theirs = json.loads((COMPARISON / "MetaMathQA/results/lora--llama-3.2-3B-rank32.json").read_text())
    nested = ("model_info", "dataset_info", "package_info", "system_info")
    for section, wanted in theirs.items():
        assert set(data[section]) == set(wanted)
    for name in nested:
        assert set(data["meta_info"][name]) == set(theirs["meta_info"][name]), name
    assert set(data["run_info"]["train_config"]) == set(theirs["run_info"]["train_config"])
    assert set(data["train_info"]["metrics"][-1]) == set(theirs["train_info"]["metrics"][-1])


def test_what_was_not_measured_is_null(tmp_path):
    found, data, _ = exported(tmp_path, forgetting=False, measures={"another": (1, "seconds")})
    train = data["train_info"]
    assert {key for key, value in train.items() if value is None} == {
        "accelerator_memory_reserved_avg",
        "accelerator_memory_max",
        "accelerator_memory_reserved_99th",
        "train_time",
        "file_size",
        "num_trainable_params",
        "num_total_params",
    }
    assert train["metrics"][-1]["forgetting"] is None and train["metrics"][-1]["test accuracy"] == 0.5
    assert data["run_info"]["total_time"] is None and data["meta_info"]["pytorch_info"] is None
    assert any("forgetting is null" in note for note in found.notes)


def test_an_adapter_that_says_less_than_the_method_is_completed(tmp_path):
    _, data, _ = exported(tmp_path, "mica")
    assert data["run_info"]["peft_config"]["init_lora_weights"] == "mica"


def test_the_configuration_is_of_what_was_trained_not_of_the_file(tmp_path):
    _, data, _ = exported(tmp_path, "psoft", {"rank": 4, "targets": ["q_proj"]})
    assert (data["run_info"]["peft_config"]["peft_type"], data["run_info"]["peft_config"]["r"]) == ("PSOFT", 4)


def test_an_optimizer_of_the_library_is_named(tmp_path):
    _, data, _ = exported(tmp_path, "lora_riemannian", {"damping": 0.5})
    config = data["run_info"]["train_config"]
    assert config["optimizer_type"] == "riemannian" and config["optimizer_kwargs"]["reg"] == 0.5


def test_full_fine_tuning_has_no_adapter(tmp_path):
    _, data, _ = exported(tmp_path, "full", {})
    assert data["run_info"]["peft_config"] is None


RL = RLSpec(objective="grpo", task=TARGET, schedule=Schedule(steps=8), learning_rate=1e-3)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"train": RL}, "is trained by grpo"),
        ({"finished": False}, "has not finished its training"),
        ({"target": None}, "was not evaluated on its target hf-metamathqa"),
        ({"target": EvalSpec(task=TARGET, items=4)}, "on all of its test items"),
        ({"target": EvalSpec(task=TARGET, split="validation")}, "was not evaluated on its target"),
        ({"score": None}, "has no score between 0 and 1"),
        ({"name": "svft", "config": {}}, "method 'svft' is none of the PEFT library's"),
        ({"name": "lora_plus"}, "method 'lora_plus' is none of the PEFT library's"),
        ({"name": "kasa"}, "method 'kasa' cannot be told in the library's form: it would say lora"),
    ],
)
def test_what_the_form_cannot_say_is_refused(tmp_path, named, said):
    store, run = made(tmp_path, **named)
    with pytest.raises(UserError, match=said):
        export_hf(run.run_id, store.root, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_checkpoint_without_its_adapter_is_not_full_fine_tuning(tmp_path):
    store, run = made(tmp_path)
    (run.checkpoint(8) / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="would take the run for full fine-tuning"):
        export_hf(run.run_id, store.root, tmp_path / "out.json")


def test_nothing_is_replaced(tmp_path):
    store, run = made(tmp_path)
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        export_hf(run.run_id, store.root, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "mine"
