"""Families times methods on tiny random models: planned, attached, trained, read back, merged and decoded, or refused.

A cell that is in no table goes all the way. What is refused is refused by the plan, in one line, for the reason in the
table; a change of either table is a change for users. The quick share is a part of the test command: all methods on
two families and a cell of each further kind. ``make deep`` runs the rest.
"""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_arena.commands.merge_command import merge
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec, RunSpec
from peft_arena.evaluate.decode import Job, decode
from peft_arena.models.load import load
from peft_arena.models.modes import evaluation_mode
from peft_arena.models.render import encode_text
from peft_arena.store.store import Store
from peft_arena.study.model import Arm
from peft_arena.study.read_study import study_from
from peft_arena.work.order import Order, do, weights_at

from .test_decoding import SLOW
from .zoo import FAMILIES, write

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "oft": {"block_size": 4},
    "ia3": {},
    "full": {},
}
STEPS = 3
THOROUGH = ("llama", "jamba")
"""All methods are tried on these by the test command."""
NO_NAMES = "unknown linear layer to target '(k_proj|down_proj)' \\(in targets\\)"
NAMES_ELSEWHERE = [
    "biogpt",
    "bloom",
    "codegen",
    "deepseek_v2",
    "deepseek_v3",
    "falcon",
    "falcon_mamba",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granitemoe",
    "granitemoehybrid",
    "lfm2",
    "mamba",
    "mamba2",
    "minicpm3",
    "mixtral",
    "mpt",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen3_moe",
    "rwkv",
    "starcoder2",
    "xglm",
    "xlstm",
]
"""Families whose layers have other names than the method's default targets; one's own names can be stated."""
REFUSED: dict[tuple[str, str], str] = {
    **{(family, "ia3"): NO_NAMES for family in NAMES_ELSEWHERE},
    **{
        ("gpt2", method): "targets: GPT2LMHeadModel has no torch linear layers to adapt"
        for method in METHODS
        if method != "full"
    },
    **{
        (family, method): r"rank: 2 is above the smaller side of .*shared_expert_gate \(1 x 32\); allowed: 1 to 1"
        for family in ("qwen2_moe", "qwen3_next")
        for method in ("lora", "dora")
    },
    **{
        (family, "oft"): f"oft cannot be attached to {family}: shape .* is invalid for input of size 0"
        for family in ("minicpm3", "deepseek_v2", "deepseek_v3")  # peft's rotation cannot take keys without tokens
    },
    ("zamba2", "ia3"): "targets: .*k_proj cannot be adapted: its weight stands at more than one place in the model",
}
"""What the plan refuses, and why."""
UNMERGED: dict[tuple[str, str], str] = {}
"""What is trained and read back and cannot be merged, and why."""
CELLS = [(family, method) for family in FAMILIES for method in METHODS]
SPREAD = [
    "gpt2",
    "falcon",
    "bloom",
    "gpt_neox",
    "opt",
    "phi3",
    "gemma3_text",
    "gpt_oss",
    "olmoe",
    "deepseek_v3",
    "llama4_text",
    "lfm2",
    "falcon_h1",
    "mamba",
    "rwkv",
]
"""Families of other kinds: a cell of each, with the methods in turn."""
QUICK = {(family, method) for family in THOROUGH for method in METHODS} | {
    (family, list(METHODS)[place % len(METHODS)]) for place, family in enumerate(SPREAD)
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models and runs are."""
    return tmp_path_factory.mktemp("matrix")


@cache
def planned(family: str, root: Path) -> dict[str, Arm]:
    """Write the model of a family, plan a study with it, and return its arms by method."""
    data = root / "turned.jsonl"
    if not data.exists():
        rows = [{"question": f"{number} turned:", "answer": str(number)[::-1]} for number in range(100, 160)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = study_from(
        {
            "name": family,
            "title": family,
            "seeds": [0],
            "model": {"name": str(write(family, root / family))},
            "targets": [{"task": str(data), "config": {"scorer": "exact_match", "max_new_tokens": 4}, "items": 2}],
            "train": {
                "schedule": {"steps": STEPS},
                "batch_size": 2,
                "validation_items": 0,
                "examples": 8,
                "learning_rate": 1e-2,
            },
            "arms": [{"method": method, "config": config} for method, config in METHODS.items()],
        }
    )
    return {arm.method: arm for arm in study.arms}


def trained(run: RunSpec, root: Path) -> None:
    """Train a run as a worker does, and leave the rest."""
    order = Order(
        root=root / "runs", run=run, evaluations=(), geometry=(), scans=(), at_save_points=False, eval_batch_size=None,
        resume_every=None, recompute=False, latency_repeats=1, threads=1, train_only=True,
    )  # fmt: skip
    do(order)


def jobs(tokenizer: Any) -> list[Job]:
    texts = ("2+2", "a word", "2+2", "x")
    return [Job(encode_text(tokenizer, text), 5, ("e", " ")) for text in texts]


def texts(model: Any, tokenizer: Any) -> list[str]:
    with evaluation_mode(model):
        found = decode(model, tokenizer, jobs(tokenizer), batch_size=4, done=lambda _: None)
    return [one.text for one in found]


@torch.no_grad()
def plain_texts(model: Any, tokenizer: Any) -> list[str]:
    """Decode by full forward passes of one row at a time."""
    found = []
    for job in jobs(tokenizer):
        new: list[int] = []
        text = ""
        while len(new) < job.max_new_tokens and not any(mark in text for mark in job.stop):
            new.append(int(model(input_ids=torch.tensor([job.ids + new]), use_cache=False).logits[0, -1].argmax()))
            if new[-1] == tokenizer.eos_token_id:
                break
            text = tokenizer.decode(new, skip_special_tokens=True)
        found.append(re.split("[e ]", text)[0])
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(20, 40)[None], use_cache=False).logits
    return found


def tried(family: str, method: str, root: Path) -> tuple[str, str]:
    """Take one cell as far as it goes; return why the plan, and why the merge, refused it.

    Raises:
        UserError: what was planned could not be trained, read back or decoded.
    """
    arm = planned(family, root)[method]
    if arm.refused:
        return arm.refused, ""
    trained(arm.runs[0], root)
    run = Store(root / "runs").run(arm.runs[0])
    record = run.training()
    assert record is not None and record.steps == STEPS
    loaded, attached = weights_at(run, STEPS)
    written = plain_texts(attached.model, loaded.tokenizer)
    assert texts(attached.model, loaded.tokenizer) == written
    tuned = logits(attached.model)
    assert not torch.equal(tuned, logits(load(arm.runs[0].model).model)), "nothing was trained"
    out = Path(tempfile.mkdtemp(dir=root)) / "merged"
    try:
        merge(run.run_id, out, runs=root / "runs")
    except UserError as error:
        assert not out.exists()
        return "", str(error)
    merged = load(ModelSpec(name=str(out))).model
    torch.testing.assert_close(logits(merged), tuned, atol=1e-3, rtol=1e-3)
    return "", ""


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.deep, id="-".join(cell)) for cell in CELLS],
)
def test_a_cell_goes_all_the_way_or_is_refused_in_one_line(family: str, method: str, root: Path) -> None:
    refused, unmerged = tried(family, method, root)
    for said, table in ((refused, REFUSED), (unmerged, UNMERGED)):
        expected = table.get((family, method), "$")
        assert re.match(expected, said), said
        assert "\n" not in said


def test_the_matrix_is_large_and_its_tables_are_of_its_cells() -> None:
    assert {*REFUSED, *UNMERGED, *QUICK} <= set(CELLS)
    for method in METHODS:
        whole = [family for family in FAMILIES if not {(family, method)} & {*REFUSED, *UNMERGED}]
        assert len(whole) >= 30, method


def test_the_page_of_the_families_says_what_is_refused_and_slow() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8").split())
    listed = page.split("| family |")[1]
    rows = dict(re.findall(r"\| `(\w+)` \| ([^|]*) \|", listed))
    assert set(rows) == set(FAMILIES)
    for family, said in rows.items():
        refused = ", ".join(method for method in METHODS if (family, method) in REFUSED)
        slow = "slowly" if family in SLOW else ""
        found = "; ".join(filter(None, (slow, f"not {refused}" if refused else "")))
        assert said.strip() == found or (said.strip(), found) == ("all the way", ""), family
