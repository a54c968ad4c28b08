"""Records are written once and whole, checkpoints are whole or absent, damage is named."""

import errno
import json
import multiprocessing
import os

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.measure import Measure
from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, RunSpec, TaskSpec, TrainSpec
from peft_arena.store.checkpoint import verify_checkpoint, write_checkpoint
from peft_arena.store.files import append_line, read_json, read_lines, write_once
from peft_arena.store.records import EvaluationRecord, ItemRecord, TrainingRecord
from peft_arena.store.store import Store

RUN = RunSpec(
    model=ModelSpec(name="micro"),
    method=MethodSpec(name="lora"),
    train=TrainSpec.model_validate({"task": {"name": "t"}, "schedule": {"steps": 4}, "learning_rate": 1e-3}),
)
EVAL = EvalSpec(task=TaskSpec(name="t"))


def evaluation(run_id: str, step: int = 4) -> EvaluationRecord:
    measure = Measure(metric="accuracy", value=1.0, unit="fraction", better="higher", how="test", n=1, unscored=1)
    items = (ItemRecord(id="a", value=1.0), ItemRecord(id="b", value=None, reason="no answer"))
    return EvaluationRecord(
        run_id=run_id, step=step, factor=1.0, spec=EVAL, card={}, metrics=(measure,), items=items, engine={},
        provenance={},
    )  # fmt: skip


def test_write_once_never_replaces(tmp_path):
    write_once(tmp_path / "a.json", {"x": 1})
    with pytest.raises(FileExistsError):
        write_once(tmp_path / "a.json", {"x": 2})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*a.json: No space left on device; nothing was written"):
        write_once(tmp_path / "a.json", {"x": 1})
    with pytest.raises(UserError, match="No space left on device; nothing was written"):
        write_checkpoint(tmp_path / "c", lambda part: (part / "f").write_text("x") and None)
    assert list(tmp_path.iterdir()) == []


def test_damaged_json_is_named_with_its_line(tmp_path):
    (tmp_path / "a.json").write_text('{"x":\n 1')
    with pytest.raises(UserError, match="a.json is damaged: .* at line 2; move it away"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(b'{"x": "\xff"}')
    with pytest.raises(UserError, match="b.json is damaged: not UTF-8"):
        read_json(tmp_path / "b.json")


def test_a_cut_line_of_a_log_is_left_out(tmp_path):
    append_line(tmp_path / "e.jsonl", {"n": 1})
    append_line(tmp_path / "e.jsonl", {"n": 2})
    with (tmp_path / "e.jsonl").open("a") as handle:
        handle.write('{"n": 3')
    assert [line["n"] for line in read_lines(tmp_path / "e.jsonl")] == [1, 2]
    append_line(tmp_path / "e.jsonl", {"n": 4})
    assert [line["n"] for line in read_lines(tmp_path / "e.jsonl")] == [1, 2, 4], "the next line is not lost with it"


def test_checkpoints_are_verified(tmp_path):
    path = tmp_path / "steps" / "000004"
    with pytest.raises(UserError, match="no checkpoint"):
        verify_checkpoint(path)
    write_checkpoint(path, lambda part: (part / "w.bin").write_bytes(b"12345") and None)
    verify_checkpoint(path)
    (path / "w.bin").write_bytes(b"12346")
    with pytest.raises(UserError, match="damaged: w.bin has sha256"):
        verify_checkpoint(path)
    (path / "w.bin").unlink()
    with pytest.raises(UserError, match="damaged: w.bin is missing"):
        verify_checkpoint(path)
    (path / "DONE").unlink()
    with pytest.raises(UserError, match="unfinished"):
        verify_checkpoint(path)


def test_a_crash_while_saving_leaves_no_checkpoint(tmp_path):
    def crash(part):
        (part / "half").write_text("x")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_checkpoint(tmp_path / "steps" / "000004", crash)
    assert list((tmp_path / "steps").iterdir()) == []


def test_an_unfinished_checkpoint_is_written_again(tmp_path):
    path = tmp_path / "000004"
    path.mkdir()
    (path / "half").write_text("x")
    write_checkpoint(path, lambda part: (part / "w").write_text("whole") and None)
    verify_checkpoint(path)
    assert sorted(file.name for file in path.iterdir()) == ["DONE", "SHA256", "w"]


def test_a_damaged_checkpoint_is_written_again(tmp_path):
    path = tmp_path / "000004"
    write_checkpoint(path, lambda part: (part / "w").write_text("whole") and None)
    (path / "w").write_text("damaged")
    write_checkpoint(path, lambda part: (part / "w").write_text("whole") and None)
    verify_checkpoint(path)


def test_one_damaged_run_does_not_hide_the_others(tmp_path):
    store = Store(tmp_path)
    runs = [store.run(RUN.model_copy(update={"seed": seed})) for seed in (0, 1)]
    for run in runs:
        run.create()
    (runs[0].path / "run.json").write_text("{")
    assert store.find(runs[1].run_id).spec.seed == 1
    with pytest.raises(UserError, match="run.json is damaged"):
        store.find(runs[0].run_id)


def test_a_runs_directory_that_cannot_be_made(tmp_path):
    store = Store(tmp_path / "file" / "runs")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make the directory .*file"):
        store.run(RUN).create()
    with pytest.raises(UserError, match="cannot write to .*file"):
        store.check_writable()
    with pytest.raises(UserError, match="file is not a directory"):
        Store(tmp_path / "file")


def test_records_come_back_equal(tmp_path):
    run = Store(tmp_path).run(RUN)
    run.create()
    run.create()
    point = run.point(4)
    assert run.evaluation(point, EVAL) is None
    record = evaluation(run.run_id)
    run.write_evaluation(point, record)
    assert run.evaluation(point, EVAL) == record
    assert list(run.evaluations()) == [record]
    assert [found.run_id for found in Store(tmp_path).runs()] == [run.run_id]
    with pytest.raises(FileExistsError):
        run.write_evaluation(point, record)


def test_a_run_is_judged_by_its_last_step(tmp_path):
    run = Store(tmp_path).run(RUN)
    run.create()
    assert run.final_point() is None
    record = TrainingRecord(
        run_id=run.run_id, steps=4, tokens=1, padded_tokens=1, examples=1, dropped=0, log=(), save_points=(2, 4),
        provenance={},
    )  # fmt: skip
    run.write_training(record)
    assert run.final_point() == run.point(4)
    base = Store(tmp_path).run(RunSpec(model=ModelSpec(name="micro"), method=MethodSpec(name="none")))
    assert base.final_point() == base.point(0)


def test_a_directory_of_another_run_is_refused(tmp_path):
    run = Store(tmp_path).run(RUN)
    run.create()
    data = read_json(run.path / "run.json")
    data["spec"]["seed"] = 5
    (run.path / "run.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="holds run .*-s5-.*, not .*-s0-"):
        run.create()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema_version=2), "schema_version"),
        (lambda data: data.pop("items"), "items"),
        (lambda data: data.update(extra=1), "extra"),
        (lambda data: data["metrics"][0].update(value="x"), "metrics.0.value"),
    ],
)
def test_a_foreign_record_is_refused(tmp_path, change, message):
    run = Store(tmp_path).run(RUN)
    point = run.point(4)
    data = evaluation(run.run_id).model_dump(mode="json")
    change(data)
    write_once(run.record_path(point, f"eval-{EVAL.key}"), data)
    with pytest.raises(UserError, match=f"is not a EvaluationRecord of schema 1: {message}"):
        run.evaluation(point, EVAL)


def test_finding_a_run(tmp_path):
    store = Store(tmp_path)
    runs = [store.run(RUN.model_copy(update={"seed": seed})) for seed in (0, 1)]
    for run in runs:
        run.create()
    assert store.find(runs[1].run_id).spec.seed == 1
    assert store.find(runs[1].spec.id).spec.seed == 1
    with pytest.raises(UserError, match="several runs fit 'micro'"):
        store.find("micro")
    with pytest.raises(UserError, match="no run 'x'.*Known: micro-lora"):
        store.find("x")


def _hold(path, ready, go):
    with Store(path).run(RUN).lock().acquire(timeout=0):
        ready.set()
        go.wait(20)
        os._exit(9)


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, go))
    process.start()
    assert ready.wait(20)
    run = Store(tmp_path).run(RUN)
    assert run.is_locked()
    go.set()
    process.join(20)
    assert process.exitcode == 9
    assert not run.is_locked()
