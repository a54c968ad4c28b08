"""The form of the PEFT library's result files: which keys they have, where, and what each quantity is.

Read off the 94 files of the library's method comparison; reading and writing them share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.core.measure import Better

RUN_INFO = ("created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg")
TRAIN_INFO = (
    "accelerator_memory_reserved_avg",
    "accelerator_memory_max",
    "accelerator_memory_reserved_99th",
    "train_time",
    "file_size",
    "num_trainable_params",
    "num_total_params",
    "status",
    "metrics",
)
META_INFO = ("model_info", "dataset_info", "package_info", "system_info", "pytorch_info")
SECTIONS: Mapping[str, tuple[str, ...]] = {"run_info": RUN_INFO, "train_info": TRAIN_INFO, "meta_info": META_INFO}
TRAIN_CONFIG = (
    "model_id",
    "dtype",
    "max_seq_length",
    "batch_size",
    "batch_size_eval",
    "max_steps",
    "eval_steps",
    "compile",
    "use_gc",
    "query_template",
    "seed",
    "grad_norm_clip",
    "optimizer_type",
    "optimizer_kwargs",
    "lr_scheduler",
    "use_amp",
    "autocast_adapter_dtype",
    "generation_kwargs",
    "attn_implementation",
    "init_kv_cache_prefix",
)
"""Of experiments on language."""
ALONG = (
    "step",
    "valid accuracy",
    "train loss",
    "train samples",
    "train time",
    "eval time",
    "tokens / sec",
    "mem allocated avg",
    "mem reserved avg",
    "elapsed time",
)
"""Of an entry of ``metrics`` during the training."""
AT_END = ("step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting")
"""Of the last entry, after it."""
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
"""Each has a version and a commit in ``package_info``."""
SYSTEM = ("system", "release", "version", "machine", "processor", "accelerator")
STATUSES = ("success", "failed", "canceled", "running")
NO_FILE = 99999999
"""What older files have as size of a file that is not there."""


class Quantity(NamedTuple):
    """One quantity of a result file and the column it becomes."""

    column: str
    title: str
    unit: str
    better: Better
    role: Literal["target", "retention", "cost", "other"]
    how: str


class Family(NamedTuple):
    """One of the library's comparisons."""

    name: str
    title: str
    target: str
    retention: str
    score: Quantity
    score_key: str
    forgetting: Quantity
    forgetting_key: str
    others: Mapping[str, Quantity]
    """Further keys to the columns they become."""


TIME = Quantity("total_time", "whole time", "seconds", "lower", "cost", "wall time of the whole run")
LANGUAGE = Family(
    "MetaMathQA",
    "MetaMathQA to GSM8K",
    "GSM8K test",
    "Wikipedia, 100 rows",
    Quantity("accuracy", "test accuracy", "fraction", "higher", "target", "greedy answers to GSM8K's test items"),
    "test accuracy",
    Quantity(
        "forgetting",
        "forgetting",
        "nats/token",
        "lower",
        "retention",
        "cross-entropy of 100 rows of Wikipedia, tuned minus before training; as the file has it",
    ),
    "forgetting",
    {
        "total_time": TIME,
        "train loss": Quantity("train_loss", "training loss", "nats/token", "lower", "other", "over the last steps"),
        "train total tokens": Quantity("train_tokens", "trained tokens", "tokens", "neither", "other", "not padded"),
    },
)
IMAGES = Family(
    "image-gen",
    "Images of one subject",
    "images of a subject",
    "images of other subjects",
    Quantity("similarity", "test similarity", "cosine", "higher", "target", "DINO features of made and true images"),
    "test dino_similarity",
    Quantity("drift", "drift", "1", "lower", "retention", "as the file has it"),
    "drift",
    {
        "total_time": TIME,
        "train loss": Quantity("train_loss", "training loss", "1", "lower", "other", "over the last steps"),
    },
)
COSTS: Mapping[str, Quantity] = {
    "train_time": Quantity("train_time", "training time", "seconds", "lower", "cost", "wall time without validations"),
    "accelerator_memory_max": Quantity("memory_max", "memory, most", "bytes", "lower", "cost", "as the file has it"),
    "accelerator_memory_reserved_avg": Quantity(
        "memory_avg", "memory, mean", "bytes", "lower", "cost", "reserved, over steps"
    ),
    "accelerator_memory_reserved_99th": Quantity(
        "memory_99th", "memory, 99th percentile", "bytes", "lower", "cost", "reserved, over steps"
    ),
    "file_size": Quantity("file_size", "saved file", "bytes", "lower", "cost", "size of the adapter's file"),
    "num_trainable_params": Quantity(
        "trainable_parameters", "trained parameters", "parameters", "lower", "cost", "counted"
    ),
    "num_total_params": Quantity("total_parameters", "all parameters", "parameters", "neither", "other", "counted"),
}
"""Key of ``train_info`` to the column it becomes."""


def check_keys(found: Any, wanted: Sequence[str], where: str, path: object) -> Mapping[str, Any]:
    """Return a mapping that has exactly the keys of the schema.

    Raises:
        UserError: it is not a mapping, or a key is missing or unknown; names file and key.
    """
    if not isinstance(found, dict):
        raise UserError(f"{path}: {where or 'the file'} must be a mapping, got {type(found).__name__}")
    for key in wanted:
        if key not in found:
            raise UserError(f"{path}: {where + '.' if where else ''}{key} is missing: no result file of the library")
    for key in found:
        if key not in wanted:
            place = f"{where}.{key}" if where else key
            raise UserError(f"{path}: {place} is unknown: another schema of result files")
    return found
