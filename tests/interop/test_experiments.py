"""Experiments of the PEFT library as a study of ours: what they become, and what is refused."""

import json
from collections import Counter

import pytest
import yaml

from peft_arena.core.errors import UserError
from peft_arena.interop.experiments import import_experiments
from peft_arena.interop.training import GENERATION
from peft_arena.methods.registry import make_method
from peft_arena.study.read_study import read_study
from peft_arena.tasks.registry import TASKS
from tests.interop.library import COMPARISON, DEFAULTS, LORA, experiment

needs_comparison = pytest.mark.skipif(not COMPARISON.is_dir(), reason=f"there is no {COMPARISON}")


def imported(root, *arguments, **named):
    return import_experiments(experiment(root, *arguments, **named)).experiments[0]


def why(root, *arguments, **named):
    one = imported(root, *arguments, **named)
    assert one.refused and not one.method
    return one.refused


def adapter(**fields):
    return {**LORA, **fields}


def test_a_plain_lora_becomes_an_arm_and_a_study_that_can_be_read(tmp_path):
    found = import_experiments(experiment(tmp_path, training={"optimizer_kwargs": {"lr": 3e-4, "weight_decay": 0.0}}))
    file = tmp_path / "study.yaml"
    file.write_text(found.text)
    study = read_study(file)
    (arm,) = study.arms
    assert (arm.label, arm.method, arm.refused) == ("lora/rank32", "lora", "")
    (run,) = arm.runs
    config = run.method.config
    assert (config["rank"], config["alpha"], config["targets"]) == (32, 64.0, ["q_proj", "v_proj"])
    train = run.train
    assert (train.schedule.steps, train.batch_size, train.learning_rate, train.weight_decay) == (5000, 4, 3e-4, 0.0)
    assert (train.lr_schedule, train.warmup_fraction, train.max_grad_norm, train.max_length) == ("cosine", 0.1, 1, 768)
    assert (train.loss_on, train.group_by_length, run.seed) == ("all", True, 0)
    assert (run.model.name, run.model.dtype) == ("meta-llama/Llama-3.2-3B", "bfloat16")
    assert run.model.revision == "13afe5124825b4f3751f836b40dafda64c1ed062"
    assert [spec.task.name for spec in (*study.targets, *study.retention)] == ["hf-metamathqa", "hf-wikipedia"]


def test_the_task_asks_and_stops_as_the_experiments_say():
    task = TASKS.get("hf-gsm8k")
    assert task.generation.max_new_tokens == GENERATION["max_new_tokens"] == 300


def test_settings_that_differ_stand_at_the_arm(tmp_path):
    experiment(tmp_path, "lora/a")
    experiment(tmp_path, "lora/b", training={"optimizer_kwargs": {"lr": 1e-3}})
    experiment(tmp_path, "lora/c", adapter=adapter(use_dora=True))
    found = yaml.safe_load(import_experiments(tmp_path).text)
    assert found["train"]["learning_rate"] == 1e-4 and found["train"]["weight_decay"] == 0.1
    arms = {arm["label"]: arm for arm in found["arms"]}
    assert "train" not in arms["lora/a"] and arms["lora/c"]["method"] == "dora"
    assert arms["lora/b"]["train"] == {"learning_rate": 1e-3, "weight_decay": 0.01}, "torch's own, as nothing is named"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 32, "modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], where method lora has None"),
        ({"layers_to_transform": [1, 2]}, "layers_to_transform is [1, 2]"),
        ({"bias": "all"}, "bias is 'all', where method lora has 'none'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
        ({"use_dora": True, "use_rslora": True}, "use_rslora is True, where method dora has False"),
        ({"use_dora": True, "kasa_config": {}}, "kasa_config is {}"),
        ({"kasa_config": {"beta": 1.0, "delta": 2.0}}, "kasa_config has 'delta' = 2.0"),
        ({"init_lora_weights": "eva"}, "init_lora_weights is 'eva'"),
        ({"init_lora_weights": False}, "init_lora_weights is False"),
        ({"target_modules": ".*_proj"}, "target_modules is '.*_proj': patterns are not translated"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
        ({"invented": 3}, "invented is 3: the installed peft has no such field of LORA"),
        ({"inference_mode": True}, "inference_mode is True"),
        ({"peft_type": "POLY", "r": 4}, "lora_alpha is 64: the installed peft has no such field of POLY"),
        ({"peft_type": "LROA"}, "peft_type is 'LROA'"),
    ],
)
def test_a_field_that_cannot_be_had_is_named_with_its_value(tmp_path, fields, said):
    assert said in why(tmp_path, adapter=adapter(**fields))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"peft_type": "C3A", "block_size": 64}, "init_weights is"),
        ({"peft_type": "FOURIERFT"}, "init_weights is False, where method fourierft has True"),
        ({"peft_type": "POLY"}, "peft_type is 'POLY', which there is no translation of"),
        ({"peft_type": "OFT", "r": 5, "oft_block_size": 0}, "r is 5 blocks"),
        ({"peft_type": "ADALORA", "total_step": 100}, "total_step is 100, but the training has 5000 steps"),
        ({"peft_type": "OSF", "rank_pattern": {"q_proj": 9}, "effective_rank": 0.5}, "rank_pattern is {'q_proj': 9}"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "num_layers": 3}, "num_layers is 3"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT"}, "got 'text'"),
        ({"peft_type": "LOKR", "rank_dropout": 0.5}, "rank_dropout_scale is False, where method lokr has True"),
    ],
)
def test_other_kinds_are_refused_by_name_too(tmp_path, table, said):
    assert said in why(tmp_path, adapter=table)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compile": True}, "compile is True"),
        ({"use_amp": True}, "use_amp is True"),
        ({"autocast_adapter_dtype": False}, "autocast_adapter_dtype is False"),
        ({"query_template": "{query}"}, "query_template is '{query}'"),
        ({"init_kv_cache_prefix": "You are"}, "init_kv_cache_prefix is 'You are'"),
        ({"generation_kwargs": {"max_new_tokens": 9}}, "generation_kwargs is {'max_new_tokens': 9}"),
        ({"lr_scheduler": None}, "lr_scheduler is None"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"grad_norm_clip": 0}, "grad_norm_clip is 0"),
        ({"optimizer_type": "SGD"}, "optimizer_type is 'SGD'"),
        ({"optimizer_kwargs": {"lr": 1e-4, "betas": [0.5, 0.9]}}, "optimizer_kwargs.betas is [0.5, 0.9]"),
        ({"optimizer_kwargs": {"weight_decay": 0.1}}, "optimizer_kwargs is {'weight_decay': 0.1}"),
        ({"optimizer_kwargs": {"lr": 0}}, "without a rate above 0"),
        ({"optimizer_kwargs": {"lr": 1e-4, "weight_decay": "x"}}, "or with a weight_decay that is no number from 0"),
        ({"optimizer_type": "lora-fa", "optimizer_kwargs": {"lr": 1e-4, "r": 8}}, "optimizer_kwargs.r is 8, but r of"),
        ({"model_id": "nobody/nothing"}, "model_id 'nobody/nothing': its sizes are not known"),
        ({"packing": True}, "packing is True: an unknown training setting"),
    ],
)
def test_a_training_setting_that_cannot_be_had_is_named_with_its_value(tmp_path, change, said):
    assert said in why(tmp_path, training=change)


def test_a_missing_default_is_no_guess(tmp_path):
    directory = experiment(tmp_path, defaults={key: DEFAULTS[key] for key in DEFAULTS if key != "max_steps"})
    assert "max_steps is missing" in import_experiments(directory).experiments[0].refused
    (tmp_path / "default_training_params.json").unlink()
    with pytest.raises(UserError, match=r"no default_training_params\.json in any directory above"):
        import_experiments(directory)


def test_optimizers_of_the_library_are_methods_here(tmp_path):
    settings = {"optimizer_type": "riemannian", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1, "reg": 0.5}}
    one = imported(tmp_path, training=settings)
    assert (one.method, one.config["damping"], one.training.table["weight_decay"]) == ("lora_riemannian", 0.5, 0.1)


def test_images_are_refused(tmp_path):
    assert "image_column" in why(tmp_path, defaults={**DEFAULTS, "image_column": "image"})


def test_a_study_has_one_seed_so_the_others_are_refused(tmp_path):
    experiment(tmp_path, "lora/a")
    experiment(tmp_path, "lora/b", adapter=adapter(r=8))
    experiment(tmp_path, "lora/c", adapter=adapter(r=4), training={"seed": 7})
    found = import_experiments(tmp_path)
    assert [one.refused for one in found.experiments][:2] == ["", ""]
    assert "seed is 7, not 0 as in most experiments" in found.experiments[2].refused


def test_without_an_adapter_all_weights_train(tmp_path):
    one = imported(tmp_path, "full-finetuning/slow", adapter=None, training={"optimizer_kwargs": {"lr": 1e-5}})
    assert (one.method, one.training.table["learning_rate"]) == ("full", 1e-5)
    assert any("float32 here" in note for note in one.notes)


def test_a_directory_without_experiments_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no experiment in"):
        import_experiments(tmp_path)
    with pytest.raises(UserError, match="no directory"):
        import_experiments(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def whole():
    return import_experiments(COMPARISON)


@needs_comparison
def test_every_experiment_of_the_library_plans_or_is_refused(whole, tmp_path):
    states = Counter((one.directory.relative_to(COMPARISON).parts[0], bool(one.refused)) for one in whole.experiments)
    assert states == {("MetaMathQA", False): 66, ("MetaMathQA", True): 5, ("image-gen", True): 33}
    refused = {one.label: one.refused for one in whole.experiments if "MetaMathQA" in one.directory.parts}
    said = {label.partition("/")[0]: reason for label, reason in refused.items() if reason}
    assert set(said) == {"c3a", "fourierft", "osf", "prefixtuning"}
    assert all("init_weights" in said[name] for name in ("c3a", "fourierft"))
    file = tmp_path / "study.yaml"
    file.write_text(whole.text)
    study = read_study(file)
    assert [arm.label for arm in study.arms] == [one.label for one in whole.planned]
    assert not [arm.label for arm in study.arms if arm.refused]


@needs_comparison
def test_every_translated_experiment_trains_as_many_parameters_as_the_library_counted(whole):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from peft_arena.models.known import known_models

    config = dict(known_models()["meta-llama/Llama-3.2-3B"].config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    compared = 0
    for one in whole.planned:
        file = COMPARISON / "MetaMathQA" / "results" / f"{one.label.replace('/', '--')}.json"
        if file.is_file():
            published = json.loads(file.read_text())["train_info"]["num_trainable_params"]
            assert make_method(one.method, one.config).count(model) == published, one.label
            compared += 1
    assert compared == 58
