"""What cannot be done is refused in one line that says what was given and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_arena.core.errors import UserError
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.testing.methods import tiny_model

RANKED = ("lora", "rslora", "dora", "lora_plus", "pissa", "miss")
TARGETED = ("lora", "rslora", "dora", "lora_plus", "pissa", "miss", "oft", "vera", "bitfit", "ia3", "ln_tuning")


def message(name: str, config: dict[str, Any], attach: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        method = make_method(name, config, where="study.yaml line 7")
        if attach:
            method.attach(tiny_model(), seed=0)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_unknown_method_names_the_nearest() -> None:
    text = message("lroa", {})
    assert "unknown method 'lroa'" in text and "study.yaml line 7" in text and "Did you mean 'lora'?" in text


@pytest.mark.parametrize("name", METHODS.names())
def test_unknown_setting_is_refused_everywhere(name: str) -> None:
    text = message(name, {"lora_rank": 12})
    assert "unknown key 'lora_rank'" in text and f"method {name}" in text


def test_unknown_setting_names_the_nearest() -> None:
    assert "Did you mean 'rank'?" in message("lora", {"rnk": 4})


@pytest.mark.parametrize("name", RANKED)
def test_rank_above_a_layer_is_refused_and_named(name: str) -> None:
    text = message(name, {"rank": 34}, attach=True)  # k and v have 32 outputs
    assert "34" in text and "k_proj" in text and "1 to 32" in text


@pytest.mark.parametrize("name", RANKED)
def test_rank_that_fits_the_targets_is_taken(name: str) -> None:
    attached = make_method(name, {"rank": 34, "targets": ["q_proj"]}).attach(tiny_model(), seed=0)
    assert all(34 in p.shape for p in attached.trained().values() if p.ndim > 1)


@pytest.mark.parametrize("name", TARGETED)
def test_targets_that_match_nothing_are_refused(name: str) -> None:
    config: dict[str, Any] = {"targets": ["q_proj" if name != "ln_tuning" else "norm", "qproj"]}
    text = message(name, config | ({"feedforward": []} if name == "ia3" else {}), attach=True)
    assert "'qproj'" in text and "Known:" in text


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens", "self_attn", "proj", "model"])
def test_only_linear_layers_inside_the_model_are_targets(pattern: str) -> None:
    assert f"'{pattern}'" in message("lora", {"targets": [pattern]}, attach=True)


@pytest.mark.parametrize(
    ("name", "config", "part"),
    [
        ("lora", {"rank": 0}, "rank"),
        ("lora", {"rank": "eight"}, "rank"),
        ("lora", {"alpha": 0}, "alpha"),
        ("lora", {"alpha": float("inf")}, "alpha"),
        ("lora", {"dropout": 1.0}, "dropout"),
        ("lora", {"init": "pissa"}, "init"),
        ("lora", {"targets": []}, "targets"),
        ("lora", {"targets": "everything"}, "targets"),
        ("lora", {"lr_ratio": 4}, "lr_ratio"),
        ("lora_plus", {"lr_ratio": 1}, "lr_ratio"),
        ("pissa", {"dropout": 0.1}, "dropout"),
        ("pissa", {"svd_iterations": 0}, "svd_iterations"),
        ("oft", {"block_size": 1}, "block_size"),
        ("oft", {"dropout": 0.1}, "dropout"),
        ("oft", {"neumann_terms": 3}, "neumann_terms"),
        ("miss", {"rank": 7}, "rank"),
        ("ia3", {"targets": ["k_proj"]}, "down_proj"),
        ("full", {"targets": "all-linear"}, "targets"),
        ("none", {"rank": 8}, "rank"),
        ("prompt_tuning", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ("prompt_tuning", {"init": "text"}, "init"),
        ("vera", {"d_initial": 0}, "d_initial"),
    ],
)
def test_forbidden_values_are_refused_before_a_model_is_needed(name: str, config: dict[str, Any], part: str) -> None:
    assert part in message(name, config)


def test_block_size_that_does_not_divide_is_refused_with_the_divisors() -> None:
    text = message("oft", {"block_size": 24}, attach=True)
    assert "24" in text and "64" in text and "2, 4, 8, 16, 32, 64" in text


def test_a_model_takes_one_adapter() -> None:
    model = tiny_model()
    make_method("lora").attach(model, seed=0)
    with pytest.raises(UserError, match="already has an adapter"):
        make_method("oft").attach(model, seed=0)


@pytest.mark.parametrize(
    ("saved", "read", "part"),
    [
        (("lora", {"rank": 4}), ("lora", {}), "r = 4 instead of 8"),
        (("lora", {"alpha": 4.0}), ("lora", {}), "lora_alpha = 4.0 instead of 16.0"),
        (("lora", {"targets": ["q_proj"]}), ("lora", {}), "target_modules"),
        (("lora", {}), ("rslora", {}), "use_rslora"),
        (("lora", {}), ("dora", {}), "use_dora"),
        (("lora", {}), ("oft", {}), "LORA adapter, method oft needs OFT"),
        (("pissa", {}), ("lora", {}), "r = 16 instead of 8"),
        (("oft", {"neumann_terms": 5}), ("oft", {}), "use_cayley_neumann"),
        (("prompt_tuning", {"num_virtual_tokens": 5}), ("prompt_tuning", {}), "num_virtual_tokens"),
        (("lora", {}), ("full", {}), "config.json is missing"),
        (("full", {}), ("lora", {}), "adapter_config.json is missing"),
        (("none", {}), ("lora", {}), "adapter_config.json is missing"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    saved: tuple[str, dict[str, Any]], read: tuple[str, dict[str, Any]], part: str, tmp_path: Path
) -> None:
    make_method(*saved).attach(tiny_model(), seed=0).save(tmp_path)
    with pytest.raises(UserError) as caught:
        make_method(*read).restore(tiny_model(), tmp_path)
    assert part in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    for name in ("lora", "full"):
        make_method(name).attach(tiny_model("awkward"), seed=0).save(tmp_path / name)
        with pytest.raises(UserError):
            make_method(name).restore(tiny_model(), tmp_path / name)


def test_importing_methods_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom peft_arena.methods.registry import METHODS\nassert METHODS.names()\n"
        "for name in METHODS.names(): METHODS.get(name).card\n"
        "import peft_arena.testing.methods\n"
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
