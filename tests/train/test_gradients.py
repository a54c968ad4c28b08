"""Every trained parameter has had a gradient within the first steps, or the run ends with its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached
from peft_arena.train.gradients import GradientWatch, element
from peft_arena.train.outcome import TrainingFailed
from peft_arena.train.sft import train_sft

from .toy import ToyAttached, ToyTask, load_model, open_run, run_spec


class Planted(ToyAttached):
    """The toy method with a parameter that nothing uses."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        model.model.layers[1].extra = nn.Parameter(torch.zeros(3))


def test_a_parameter_that_nothing_uses_ends_the_run_by_its_name(tmp_path: Path, model_dir: Path) -> None:
    run, loaded = open_run(tmp_path, run_spec(model_dir)), load_model(model_dir)
    steps: list[int] = []
    with pytest.raises(UserError, match=r"1 of \d+ trained parameters had no gradient in the first 3 steps: .*extra"):
        train_sft(
            run, loaded, Planted(loaded.model), ToyTask(), progress=False, on_step=lambda info: steps.append(info.step)
        )
    assert steps == [1, 2]


def test_a_gradient_that_is_not_finite_ends_the_run_by_its_name(tmp_path: Path, model_dir: Path) -> None:
    run, loaded = open_run(tmp_path, run_spec(model_dir)), load_model(model_dir)
    attached = ToyAttached(loaded.model)
    name = next(name for name in attached.trained() if name.endswith("up"))
    attached.trained()[name].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingFailed, match=f"the gradient is inf in {name}"):
        train_sft(run, loaded, attached, ToyTask(), progress=False)


class Experts(nn.Module):
    """Two experts in each of two blocks; which are run is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for _ in range(2))
        self.route: Callable[[int], list[int]] = lambda step: [0, 0]

    def forward(self, step: int) -> torch.Tensor:
        hidden = torch.ones(1, 2)
        for block, expert in zip(self.blocks, self.route(step), strict=True):
            hidden = block[expert](hidden)  # type: ignore[index]
        return hidden.sum()


class OnlyModel(Attached):
    """A model that trains as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def save(self, directory: Path) -> None:
        raise NotImplementedError


def watch(model: nn.Module, steps: int, route: Callable[[int], list[int]] | None = None) -> GradientWatch:
    found = GradientWatch(OnlyModel(model), steps)
    if route is not None:
        model.route = route  # type: ignore[assignment]
    for step in range(steps):
        model(step).backward()
        found.look()
        model.zero_grad(set_to_none=True)
    return found


def test_experts_without_tokens_are_waited_for() -> None:
    assert watch(Experts(), 3).missing == tuple(
        f"blocks.{block}.1.{part}" for block in range(2) for part in ("weight", "bias")
    )
    assert not watch(Experts(), 3, lambda step: [step % 2, step % 2]).missing
    assert len(watch(Experts(), 6, lambda step: [int(step > 4), 0]).missing) == 2


def test_an_expert_that_is_run_in_vain_is_an_error() -> None:
    model = Experts()
    expert: Any = model.blocks[0][1]  # type: ignore[index]
    expert.forward = lambda hidden: hidden
    with pytest.raises(UserError, match=r"blocks\.0\.1\.weight"):
        watch(model, 3, lambda step: [step % 2, step % 2])


def test_the_innermost_element_of_a_list_is_found() -> None:
    assert element("layers.0.mlp.experts.3.up.weight") == "layers.0.mlp.experts.3"
    assert element("head.weight") == element("values.0") == ""
