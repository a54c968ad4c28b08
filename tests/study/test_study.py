"""Study files: every shipped one is planned, every mistake is one line with its place."""

from pathlib import Path

import pytest

from peft_arena.assets.wheel_files import SMOLLM2
from peft_arena.core.errors import UserError
from peft_arena.store.store import Store
from peft_arena.study.item_checks import check_items
from peft_arena.study.read_study import find_study, read_study, shipped_studies
from peft_arena.study.study_view import view_of
from peft_arena.testing.tasks import need_wheel
from peft_arena.work.plan import plan

STUDIES = shipped_studies()
TEXT = """\
name: small
title: A small study
model: {name: micro}
targets:
  - task: micro-reverse
    items: 20
retention:
  - task: micro-sort
train:
  schedule: {steps: 4}
  batch_size: 4
arms:
  - method: lora
    config: {rank: 4}
    train: {learning_rate: 1e-3}
  - method: full
    train: {learning_rate: 1e-4}
seeds: [0, 1]
"""


def study_file(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = TEXT
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return path


def test_studies_were_found():
    assert {"demo", "laptop", "micro"} <= set(STUDIES)


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_shipped_study_plans(name, tmp_path):
    if "SmolLM2" in STUDIES[name].read_text():
        need_wheel(SMOLLM2)
    study = read_study(STUDIES[name])
    assert study.file.name == name
    plans = plan(study, Store(tmp_path))
    assert len(plans) == 1 + len(study.arms) * len(study.file.seeds)
    wanted = [item for item in plans if item.state == "missing"]
    refused = {item.label for item in plans if item.state == "refused"}
    assert len(wanted) == len(study.runs()) and len(wanted) + len(study.file.seeds) * len(refused) == len(plans)
    assert {label.split()[0] for label in refused} == ({"qalora"} if "qalora" in STUDIES[name].read_text() else set())
    assert view_of(study).base == study.base


def test_a_study_expands_into_runs(tmp_path):
    study = read_study(study_file(tmp_path))
    assert [arm.label for arm in study.arms] == ["lora", "full"]
    assert [run.seed for run in study.arms[0].runs] == [0, 1]
    assert len({run.id for run in study.runs()}) == 5
    lora, full = (arm.runs[0] for arm in study.arms)
    assert lora.method.config["rank"] == 4
    assert lora.method.config["alpha"] == 16.0, "defaults are written out in the spec"
    assert (lora.train.learning_rate, full.train.learning_rate) == (1e-3, 1e-4)
    assert lora.model.revision.startswith("sha256:"), "the model is pinned by its content"
    assert study.evaluations(study.base) == [*study.targets, *study.retention]


def test_two_targets_train_twice_and_are_judged_on_their_own(tmp_path):
    extra = "    items: 20\n  - task: micro-cipher\n    train: {batch_size: 2}\n"
    study = read_study(study_file(tmp_path, ("    items: 20\n", extra)))
    assert len(study.arms) == 4
    first, second = study.arms[0].runs[0], study.arms[2].runs[0]
    assert (first.train.task.name, second.train.task.name) == ("micro-reverse", "micro-cipher")
    assert (first.train.batch_size, second.train.batch_size) == (4, 2)
    assert [spec.task.name for spec in study.evaluations(second)] == ["micro-cipher", "micro-sort"]
    assert [spec.task.name for spec in study.evaluations(study.base)] == ["micro-reverse", "micro-cipher", "micro-sort"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: lora", "method: lroa", r"unknown method 'lroa' \(in .*s.yaml line 13\). Did you mean 'lora'"),
        ("task: micro-sort", "task: micro-srot", r"unknown task 'micro-srot' \(in .*line 8\). Did you mean"),
        ("rank: 4", "rnak: 4", r"unknown key 'rnak' .*line 14.* Did you mean 'rank'"),
        ("rank: 4", "rank: 0", r"rank: .*greater than or equal to 1, got 0"),
        ("batch_size: 4", "batchsize: 4", r"unknown key 'batchsize' \(in train .*line 11\). Did you mean 'batch_size'"),
        ("learning_rate: 1e-4", "learning_rate: fast", r"learning_rate: .*valid number.*got 'fast' \(in .*line 17"),
        ("    train: {learning_rate: 1e-4}\n", "", r"train.learning_rate is required \(in .*line 16\)"),
        ("steps: 4", "steps: 4, epochs: 1", r"exactly one of steps, tokens, epochs; given: steps, epochs"),
        ("seeds: [0, 1]", "seed: [0, 1]", r"unknown key 'seed' .*line 18\). Did you mean 'seeds'"),
        ("seeds: [0, 1]", "seeds: []", r"seeds: .*at least 1 item"),
        ("name: micro}", "name: micor}", r"unknown model 'micor'"),
        ("name: micro}", "name: micro, revision: abc}", r"is at revision sha256:\w+, not abc"),
        ("task: micro-reverse", "task: micro-sort", r"task 'micro-sort' cannot be a target"),
        ("task: micro-reverse", "task: 'lm-eval:piqa'", r"'lm-eval:piqa' cannot be a target"),
        ("method: full", "method: lora\n    config: {rank: 4}", r"two arms are labelled 'lora'"),
        ("method: full\n    train: {learning_rate: 1e-4}",
         "method: lora\n    label: again\n    config: {rank: 4}\n    train: {learning_rate: 1e-3}",
         r"arms 'lora' and 'again' are the same run"),
        ("seeds: [0, 1]", "seeds: [-1]", r"seeds.0: .*greater than or equal to 0, got -1"),
        ("learning_rate: 1e-4", "learning_rate: .inf", r"learning_rate: .*finite number"),
        ("title: A small study", "title: 2020-13-45", r"is not valid YAML"),
        ("task: micro-sort", "task: 'lm-eval:no_such_task_here'", r"unknown lm-eval task 'no_such_task_here'.*line 8"),
        ("task: micro-sort", "task: 'lm-eval:piqa'\n    config: {shots: 1}", r"unknown key 'shots'.*num_fewshot"),
        ("task: micro-sort", "task: micro-reverse", r"task 'micro-reverse' is asked for twice"),
        ("title: A small study", "title: [", r"is not valid YAML"),
        ("title: A small study\n", "title: A\ntitle: B\n", r"line 3: key 'title' is stated twice"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_that_says_where(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message) as caught:
        read_study(study_file(tmp_path, (old, new)))
    assert "\n" not in str(caught.value)


def test_the_base_method_is_refused_as_an_arm_and_shown(tmp_path):
    study = read_study(study_file(tmp_path, ("method: full", "method: none")))
    assert "trains nothing" in study.arms[1].refused
    plans = plan(study, Store(tmp_path))
    assert [item.state for item in plans] == ["missing"] * 3 + ["refused"] * 2
    assert view_of(study).refused[0].label == "none"


def test_more_items_than_there_are(tmp_path):
    for setting, message in [
        ("targets.0.items=1000000", "items is 1000000, and task micro-reverse has 256 items in its test split"),
        ("train.examples=1000000", "train.examples is 1000000, and task micro-reverse has 4000 items in its train"),
        ("train.validation_items=1000000", "train.validation_items is 1000000, and task micro-reverse has 256"),
    ]:
        with pytest.raises(UserError, match=message):
            check_items(read_study(study_file(tmp_path), [setting]))
    check_items(read_study(study_file(tmp_path)))


def test_more_calibration_examples_than_there_are(tmp_path):
    arm = "arms=[{method: eva, config: {calibration_examples: NUMBER}, train: {learning_rate: 1e-3}}]"
    for number, more, message in [
        ("5000", [], "calibration_examples of eva is 5000, and task micro-reverse has 4000 items in its train split"),
        ("50", ["train.examples=40"], "calibration_examples of eva is 50, and train.examples 40"),
    ]:
        with pytest.raises(UserError, match=message):
            check_items(read_study(study_file(tmp_path), [arm.replace("NUMBER", number), *more]))


def test_tasks_of_lm_eval_are_identified_by_settings_and_version(tmp_path):
    def spec(config: str):
        change = ("task: micro-sort", f"task: 'lm-eval:piqa'\n    config: {config}")
        return read_study(study_file(tmp_path, change)).retention[0]

    assert spec("{}").id == spec("{num_fewshot: null}").id
    assert spec("{}").id != spec("{num_fewshot: 2}").id
    assert spec("{}").task.revision.startswith("lm_eval ")


def test_overrides(tmp_path):
    path = study_file(tmp_path)
    settings = ["train.schedule.steps=2", "seeds=[7]", "arms.0.config.rank=2", "execution.jobs=3"]
    study = read_study(path, settings)
    run = study.arms[0].runs[0]
    assert (run.train.schedule.steps, run.seed, run.method.config["rank"], study.file.execution.jobs) == (2, 7, 2, 3)
    for text, message in [
        ("seeds", "takes key=value"),
        ("arms.9.label=x", "no position in a list of 2"),
        ("name.x.y=1", "inside a single value"),
        ("name.x=1", "is a single value and has no keys"),
        ("train.bacth_size=1", "unknown key 'bacth_size'"),
    ]:
        with pytest.raises(UserError, match=message):
            read_study(path, [text])


def test_execution_is_not_part_of_a_run(tmp_path):
    path = study_file(tmp_path)
    changed = read_study(path, ["execution.jobs=2", "execution.eval_batch_size=3", "execution.resume_every=1"])
    assert [run.id for run in changed.runs()] == [run.id for run in read_study(path).runs()]


def test_finding_studies(tmp_path):
    assert find_study("micro") == STUDIES["micro"]
    assert find_study(str(study_file(tmp_path))).name == "s.yaml"
    with pytest.raises(UserError, match="unknown study 'mirco'. Did you mean 'micro'"):
        find_study("mirco")
    with pytest.raises(UserError, match="no study file"):
        find_study("missing.yaml")


SAMPLED = "    items: 20\n    sampling: {samples: 8, temperature: 0.8, k: [1, 4, 8]}\n"


def test_sampling_adds_an_evaluation_and_changes_no_other(tmp_path):
    plain, study = read_study(study_file(tmp_path)), read_study(study_file(tmp_path, ("    items: 20\n", SAMPLED)))
    assert (study.targets, study.retention) == (plain.targets, plain.retention)
    assert [run.id for run in study.runs()] == [run.id for run in plain.runs()]
    for run in study.runs():
        *greedy, sampled = study.evaluations(run)
        assert greedy == plain.evaluations(run)
        assert sampled.model_copy(update={"sampling": None}) == study.targets[0]
        assert (sampled.sampling.samples, sampled.sampling.temperature, sampled.sampling.k) == (8, 0.8, (1, 4, 8))
    view = view_of(study)
    assert [arm.sampled for arm in view.arms] == [sampled, sampled] and view.targets == plain.targets
    assert [arm.sampled for arm in view_of(plain).arms] == [None, None]
    names = [stage.what for stage in plan(study, Store(tmp_path))[0].stages if "evaluate" in stage.what]
    assert names[-1] == f"evaluate micro-reverse (8 samples) {sampled.id} at step 0" and len(set(names)) == 3


def test_a_target_without_sampling_beside_one_with_it(tmp_path):
    more = SAMPLED + "  - task: micro-cipher\n"
    study = read_study(study_file(tmp_path, ("    items: 20\n", more)))
    counts = {run.train.task.name: len(study.evaluations(run)) for run in study.runs() if run.train}
    assert counts == {"micro-reverse": 3, "micro-cipher": 2} and len(study.evaluations(study.base)) == 4
    assert [arm.sampled is None for arm in view_of(study).arms] == [False, False, True, True]


def test_scans_do_not_pick_up_samples(tmp_path):
    paths = ("seeds:", "paths: {grid: '0.5:1.0:0.5', items: 8}\nseeds:")
    plain = read_study(study_file(tmp_path, paths))
    study = read_study(study_file(tmp_path, ("    items: 20\n", SAMPLED), paths))
    run = study.arms[0].runs[0]
    assert study.scans(run) == plain.scans(run) != []


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("{samples: 1}", r"samples: .*greater than or equal to 2, got 1 .*line 6"),
        ("{samples: 4, k: [8]}", r"k must increase and not exceed samples 4, got \[8\]"),
        ("{samples: 4, tmperature: 1}", r"unknown key 'targets.0.sampling.tmperature' .*Did you mean 'temperature'"),
    ],
)
def test_wrong_sampling_is_refused(sampling, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_study(study_file(tmp_path, ("    items: 20\n", f"    sampling: {sampling}\n")))
