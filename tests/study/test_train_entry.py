"""How arms are trained: settings from all places of a study, objectives, rewards, rates, and where training begins."""

import copy

import pytest
import yaml

from peft_arena.cli.console import show_plan
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec, RLSpec, TrainSpec
from peft_arena.methods.base import Capability
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.store.store import Store
from peft_arena.study.item_checks import check_items
from peft_arena.study.read_study import read_study, study_from
from peft_arena.study.train_entry import documented_rate
from peft_arena.tasks.micro.base import MicroTask
from peft_arena.work.plan import plan

TEXT = """\
name: both
title: SFT and RL in one study
model: {name: micro}
targets:
  - task: micro-reverse
    items: 20
    train: {max_length: 64}
train:
  schedule: {steps: 4}
  batch_size: 4
  learning_rate: documented
rl:
  batch_size: 16
  group_size: 4
  schedule: {steps: 3}
arms:
  - method: lora
    label: sft
    train: {packing: true}
  - method: oft
    label: rl
    train: {objective: grpo, init_from: {arm: sft}}
  - method: lora
    label: plain
    train: {objective: rloo, group_size: 8, schedule: {steps: 2}}
seeds: [0, 1]
"""


def read(tmp_path, *changes, settings=()):
    text = TEXT
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return read_study(path, settings)


def arms(study):
    return {arm.label: arm for arm in study.arms}


def test_each_objective_gets_its_settings(tmp_path):
    found = arms(read(tmp_path))
    sft, rl, plain = (found[label].runs[0].train for label in ("sft", "rl", "plain"))
    assert (type(sft), type(rl), type(plain)) == (TrainSpec, RLSpec, RLSpec)
    assert (sft.batch_size, sft.schedule.steps, sft.packing, sft.max_length) == (4, 4, True, 64)
    assert (rl.objective, rl.batch_size, rl.group_size, rl.schedule.steps, rl.max_length) == ("grpo", 16, 4, 3, 64)
    assert (plain.objective, plain.group_size, plain.schedule.steps, plain.init_from) == ("rloo", 8, 2, None)
    study = read(tmp_path, ("    train: {max_length: 64}", "    train: {max_length: 64}\n    rl: {group_size: 2}"))
    groups = {label: arm.runs[0].train.group_size for label, arm in arms(study).items() if label != "sft"}
    assert groups == {"rl": 2, "plain": 8}, "the target's rl over the study's, the arm's own over both"


def test_a_run_begins_at_the_run_of_the_same_seed(tmp_path):
    study = read(tmp_path)
    found = arms(study)
    for number in (0, 1):
        init = found["rl"].runs[number].train.init_from
        assert (init.run, init.step) == (found["sft"].runs[number], None)
    assert study.sources() == []
    extra = "    train: {max_length: 64}\n  - task: micro-cipher\n    items: 20\n"
    for arm in read(tmp_path, ("    train: {max_length: 64}\n", extra)).arms:
        if arm.label == "rl":
            assert arm.runs[0].train.init_from.run.train.task == arm.target.task, "the arm of the same target"


def test_arms_may_stand_in_any_order_and_begin_in_a_chain(tmp_path):
    chain = ("objective: rloo,", "objective: rloo, init_from: {arm: rl, step: 3},")
    study = read(tmp_path, chain)
    last = arms(study)["plain"].runs[1].train.init_from
    assert (last.step, last.run.train.init_from.run.method.name) == (3, "lora")
    data = yaml.safe_load(TEXT)
    turned = study_from({**data, "arms": data["arms"][::-1]})
    assert {run.id for run in turned.runs()} == {run.id for run in read(tmp_path).runs()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{arm: sft}", "{arm: sfr}", r"unknown arm 'sfr' \(in .*s.yaml line 22\). Did you mean 'sft'"),
        ("{arm: sft}", "{arm: rl}", r"arm 'rl' cannot begin at itself \(in .*line 22\)"),
        ("{arm: sft}", "{arm: plain}", "circle"),
        ("{arm: sft}", "{}", r"init_from names either an arm or a run, and exactly one of them \(in .*line 22\)"),
        ("{arm: sft}", "{arm: sft, run: a}", r"init_from names either an arm or a run, and exactly one"),
        ("{arm: sft}", "{amr: sft}", r"unknown key 'amr' \(in init_from .*line 22\). Did you mean 'arm'"),
        ("{arm: sft}", "sft", r"init_from must be a table with arm: LABEL in a study, or run: RUN for a single run, "
         r"got 'sft' \(in .*line 22\)"),
        ("{arm: sft}", "{run: a}", r"init_from.run is for a single run .*a study, init_from names an arm"),
        ("{arm: sft}", "{arm: sft, step: 3}", r"arm 'rl' cannot begin at arm 'sft' .*it saves no step 3. Known: 4"),
        ("{arm: sft}", "{arm: sft, step: 0}", r"step: .*greater than or equal to 1, got 0"),
        ("method: lora\n    label: sft\n    train: {packing: true}", "method: prompt_tuning\n    label: sft",
         r"arm 'rl' cannot begin at arm 'sft' \(in .*\): method prompt_tuning has no weights to merge: it puts"),
        ("method: lora\n    label: sft\n    train: {packing: true}", "method: xlora\n    label: sft",
         r"method xlora has no weights to merge"),
        ("label: plain", "label: rl (rloo)\n  - method: lora\n    label: rl (grpo)\n    train: {objective: grpo}\n"
         "  - method: lora\n    label: other",
         r"arms 'rl' and 'rl \(grpo\)' are both called 'rl \(grpo\)' in the report"),
        ("objective: grpo", "objective: gpro", r"unknown objective 'gpro' \(in .*line 22\). Did you mean 'grpo'. "
         "Known: grpo, rloo, sft"),
        ("objective: grpo, ", "", r"'init_from' is a setting of reinforcement learning \(objective grpo or rloo\), and "
         r"arm 'rl' has objective sft \(in .*line 22\)"),
        ("packing: true", "group_size: 4", r"'group_size' is a setting of reinforcement learning .*, and arm 'sft' has "
         r"objective sft \(in .*line 19\); give it under rl"),
        ("  batch_size: 4", "  packing: true", r"'packing' is a setting of objective sft, and arm 'rl' has objective "
         r"grpo \(in .*line 10\); give it in the train of the arms"),
        ("rl:\n", "rl:\n  objective: rloo\n", r"'objective' is set by train, not by rl \(in .*line 13\)"),
        ("rl:\n", "rl:\n  task: a\n", r"'task' is set by targets, not by rl \(in .*line 13\)"),
        ("  group_size: 4", "  group_sise: 4", r"unknown key 'group_sise' \(in train .*line 14\). Did you mean"),
        ("  group_size: 4", "  group_size: 5", r"group_size 5 does not divide batch_size 16"),
        ("objective: rloo,", "objective: rloo, kl_reference: start,", r"kl_reference 'start' needs init_from"),
        ("objective: rloo,", "objective: rloo, rewards: [tsk],", r"unknown reward 'tsk' \(in .*line 25\). Did you"),
        ("objective: rloo,", "objective: rloo, rewards: task,", r"rewards must be a list of names, .*got 'task'"),
        ("objective: rloo,", "objective: rloo, rewards: [4],", r"a reward is a name, or a table .*got 4"),
        ("objective: rloo,", "objective: rloo, rewards: [{name: task, wight: 2}],", r"unknown key 'wight'"),
        ("objective: rloo,", "objective: rloo, rewards: [{name: length, config: {buffer: 999}}],",
         r"arm 'plain' cannot be trained by rloo: reward length cannot judge task micro-reverse"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_that_says_where(tmp_path, old, new, message):
    changes = [(old, new)]
    if message == "circle":
        back = ("objective: rloo,", "objective: rloo, init_from: {arm: rl},")
        changes = [back, ("{arm: sft}", "{arm: plain}")]
        message = r"arms begin at each other: rl at plain at rl \(in .*line 25\)"
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, *changes)
    assert "\n" not in str(caught.value)


def test_rl_without_an_arm_for_it_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"rl is given \(in .*line 12\), and no arm has objective grpo or rloo"):
        read(tmp_path, settings=["arms=[{method: lora}]"])


def test_a_method_that_does_not_take_sampling_objectives_is_a_refused_arm(tmp_path, monkeypatch):
    oft = METHODS.get("oft")
    less = oft.card.capabilities - {Capability.ONLINE_RL}
    monkeypatch.setattr(oft, "card", oft.card.model_copy(update={"capabilities": less}))
    study = read(tmp_path)
    assert arms(study)["rl"].refused == "oft cannot be trained by grpo: its card does not declare online_rl"
    states = {item.label: item.state for item in plan(study, Store(tmp_path))}
    assert states == {"base": "missing", "sft": "missing", "rl": "refused", "plain": "missing"}
    chain = read(tmp_path, ("objective: rloo,", "objective: rloo, init_from: {arm: rl},"))
    assert arms(chain)["plain"].refused == f"begins at arm 'rl', which is refused: {arms(study)['rl'].refused}"


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("label: sft\n    budget: {parameters: 10}\n", "lora cannot come near 10 parameters"),
        ("label: sft\n    budget: {parameters: 10}\n    config: {rank: 4}\n", "rank is set by the budget"),
    ],
)
def test_an_arm_that_begins_at_a_refused_arm_is_refused_and_the_others_stay(tmp_path, new, reason):
    study = read(tmp_path, ("label: sft\n", new), ("{arm: sft}", "{arm: sft, step: 3}"))
    found = arms(study)
    assert reason in found["sft"].refused
    assert found["rl"].refused == f"begins at arm 'sft', which is refused: {found['sft'].refused}"
    assert "\n" not in found["rl"].refused
    assert [run.id for run in study.runs()] == [study.base.id, *(run.id for run in found["plain"].runs)]
    assert study.sources() == []
    states = {item.label: item.state for item in plan(study, Store(tmp_path))}
    assert states == {"base": "missing", "sft": "refused", "rl": "refused", "plain": "missing"}
    chain = arms(read(tmp_path, ("label: sft\n", new), ("objective: rloo,", "objective: rloo, init_from: {arm: rl},")))
    assert chain["plain"].refused.startswith("begins at arm 'rl', which is refused: begins at arm 'sft', which is re")


def test_a_method_that_cannot_be_trained_is_refused_with_what_begins_at_it(tmp_path):
    old = "method: lora\n    label: sft\n    train: {packing: true}"
    new = "method: qalora\n    label: sft\n    train: {learning_rate: 1e-3}"
    assert arms(read(tmp_path, (old, new)))["rl"].refused.startswith("begins at arm 'sft', which is refused: qalora ne")


def test_settings_of_reinforcement_learning_can_name_the_start_of_all(tmp_path):
    data = yaml.safe_load(TEXT)
    data["rl"]["init_from"] = {"arm": "sft"}
    data["arms"][1]["train"] = {"objective": "grpo"}
    data["arms"][2]["train"]["init_from"] = None
    found = arms(study_from(data))
    assert found["rl"].runs[0].train.init_from.run == found["sft"].runs[0]
    assert found["plain"].runs[0].train.init_from is None


def test_rewards_are_written_out(tmp_path):
    more = "objective: rloo, rewards: [task, {name: length, weight: 0.5, config: {buffer: 4}}],"
    rewards = arms(read(tmp_path, ("objective: rloo,", more)))["plain"].runs[0].train.rewards
    assert [(one.name, one.weight, one.config) for one in rewards] == [
        ("task", 1.0, {}),
        ("length", 0.5, {"buffer": 4, "limit": None}),
    ]


def test_a_single_run_begins_at_a_run_that_is_found(tmp_path):
    study = read(tmp_path)
    source = arms(study)["sft"].runs[0]
    data = {**yaml.safe_load(TEXT), "seeds": [5]}
    data["arms"] = [{"method": "oft", "train": {"objective": "grpo", "init_from": {"run": "abc"}}}]
    asked = []

    def find(name):
        asked.append(name)
        return source

    found = study_from(data, find_run=find)
    assert asked == ["abc"]
    assert found.arms[0].runs[0].train.init_from.run == source
    assert found.sources() == [source]
    assert [item.label for item in plan(found, Store(tmp_path))] == ["base", "source", "oft"]
    other = copy.deepcopy(data)
    other["model"]["dtype"] = "bfloat16"
    message = rf"cannot begin at run {source.run_id} .*it is of micro \(float32, .*and this is micro \(bfloat16"
    with pytest.raises(UserError, match=message):
        study_from(other, find_run=find)
    with pytest.raises(UserError, match="that is the pretrained model; leave init_from out"):
        study_from(data, find_run=lambda name: study.base)


def test_items_are_checked_for_both_objectives(tmp_path):
    check_items(read(tmp_path))
    with pytest.raises(UserError, match="train.examples is 9999, and task micro-reverse has 4000 items"):
        check_items(read(tmp_path, ("  group_size: 4", "  group_size: 4\n  examples: 9999")))


def test_documented_rates():
    large, micro = ModelSpec(name="a/b"), ModelSpec(name="micro")
    rates = {name: documented_rate(make_method(name), large, "grpo") for name in ("full", "lora", "rslora", "oft")}
    assert rates == {"full": 1e-6, "lora": 1e-5, "rslora": 5e-6, "oft": 2.5e-5}
    assert documented_rate(make_method("lora"), micro, "grpo") == 1e-3, "the card names one"
    assert documented_rate(make_method("lora"), large) == 2e-4
    assert documented_rate(make_method("lora"), micro) == 3e-3
    lora = make_method("lora")
    own = type(lora)(lora.config)
    own.card = lora.card.model_copy(update={"micro_rl_learning_rate": None})
    assert documented_rate(own, micro, "grpo") == 7.5e-4, "a quarter of the usual one"
    own.card = lora.card.model_copy(update={"rl_learning_rate": 3e-5, "micro_rl_learning_rate": 4e-4})
    assert (documented_rate(own, large, "rloo"), documented_rate(own, micro, "rloo")) == (3e-5, 4e-4)
    assert documented_rate(make_method("none"), large, "grpo") is None
    for name in METHODS.own():
        usual, rate = (documented_rate(make_method(name), large, kind) for kind in ("sft", "grpo"))
        assert usual is None or 0 < rate < usual


def test_a_plan_says_how_its_reward_can_be_won_once_and_only_where_it_is_a_reward(tmp_path, monkeypatch, capsys):
    assert "can be won" not in str(check_items(read(tmp_path)))
    monkeypatch.setattr(MicroTask, "reward_caution", lambda self: "any text wins")
    told = "reward task on micro-reverse can be won without being right: any text wins"
    found = read(tmp_path)
    notes = check_items(found)
    assert [note.text for note in notes].count(told) == 1
    assert "can be won" not in str(check_items(read(tmp_path, ("rl:\n", "rl:\n  rewards: [ended]\n"))))
    show_plan(found, plan(found, Store(tmp_path)), False, notes=notes)
    assert capsys.readouterr().out.count(told) == 1
