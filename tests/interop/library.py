"""Hand-made experiments and result files in the forms of the PEFT library, and where its own are."""

import copy
import json
from pathlib import Path

COMPARISON = Path(__file__).parents[3] / "shared" / "data" / "hf-method-comparison"
DEFAULTS = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "init_kv_cache_prefix": None,
}
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 32, "lora_alpha": 64}


def experiment(root, label="lora/rank32", adapter=LORA, training=None, defaults=DEFAULTS) -> Path:
    """Write one experiment into a tree, with the tree's defaults."""
    (root / "default_training_params.json").write_text(json.dumps(defaults))
    directory = root / "experiments" / label
    directory.mkdir(parents=True)
    if adapter is not None:
        (directory / "adapter_config.json").write_text(json.dumps(adapter))
    if training is not None:
        (directory / "training_params.json").write_text(json.dumps(training))
    return directory


RESULT = {
    "run_info": {
        "created_at": "2026-01-02T03:04:05+00:00",
        "total_time": 100.0,
        "experiment_name": "lora/rank32",
        "peft_branch": "main",
        "train_config": DEFAULTS,
        "peft_config": {**LORA, "init_lora_weights": True, "use_dora": False, "kasa_config": None, "use_bdlora": None},
        "error_msg": "",
    },
    "train_info": {
        "accelerator_memory_reserved_avg": 1000,
        "accelerator_memory_max": 3000,
        "accelerator_memory_reserved_99th": 2000,
        "train_time": 50.0,
        "file_size": 400,
        "num_trainable_params": 10,
        "num_total_params": 1000,
        "status": "success",
        "metrics": [
            {"step": 250, "valid accuracy": 0.5, "train loss": 0.9},
            {
                "step": 5000,
                "test accuracy": 0.25,
                "train loss": 0.6,
                "train samples": 20000,
                "train total tokens": 77,
                "forgetting": 0.05,
            },
        ],
    },
    "meta_info": {
        "model_info": {"sha": "a" * 40, "created_at": None},
        "dataset_info": {},
        "package_info": {"peft-version": "0.19.2", "peft-commit-hash": "b" * 40},
        "system_info": {"accelerator": "some GPU"},
        "pytorch_info": None,
    },
}


def result(**changes):
    """Return a result file's content with values put in at ``section__key``; ``...`` takes a key out."""
    found = copy.deepcopy(RESULT)
    for place, value in changes.items():
        section, _, key = place.partition("__")
        if value is ...:
            del found[section][key]
        else:
            found[section][key] = value
    return found
