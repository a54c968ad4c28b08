"""What methods are tried on: tiny models, made the same every time, and four steps of training on them."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached, Calibration, Capability, Method
from peft_arena.methods.state import seed_torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

Kind = Literal["untied", "tied", "awkward", "biased"]
EXACT = 1e-5
"""Largest difference of float32 logits (which are about 5 here) that rounding alone explains."""
MERGE = 1e-4
ROUNDED = 0.25
"""The same for bfloat16 logits, where weights or sums were rounded at different places."""
STEPS = 4


@dataclass(frozen=True)
class Subject:
    """A method with settings, and the tiny model it is tried on."""

    method: type[Method]
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "untied"
    dtype: str = "float32"
    learning_rate: float = 5e-3

    def make(self, **settings: object) -> Method:
        """Return the method with its settings, some of them replaced."""
        return self.method(build(self.method.Config, {**self.config, **settings}))

    def model(self) -> PreTrainedModel:
        """Return the pretrained model, the same every time."""
        return tiny_model(self.kind, self.dtype)

    def untouched(self) -> PreTrainedModel:
        """Return the pretrained model to look at only: every caller gets the same one."""
        return shared_model(self.kind, self.dtype)

    def attach(self, seed: int = 0) -> Attached:
        """Return the method in place on a fresh model."""
        return self.put(self.model(), seed)

    def put(self, model: PreTrainedModel, seed: int = 0) -> Attached:
        """Return the method in place on a given model."""
        method = self.make()
        return method.attach(model, seed=seed, calibration=calibration(method.calibration_examples))

    def has(self, capability: Capability) -> bool:
        """Say whether the card declares a capability."""
        return capability in self.method.card.capabilities

    @property
    def exact(self) -> bool:
        """Whether the model computes in float32."""
        return self.dtype == "float32"


def tiny_model(kind: Kind = "untied", dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Return a random Llama of the caller's own, the same for the same arguments, with logits large enough to compare.

    Args:
        kind: ``untied`` or ``tied`` embeddings; ``awkward``: sizes that are no powers of two; ``biased``: a Qwen2,
            whose q, k and v have biases.
        dtype: type of the weights.
        device: ``meta`` for shapes without weights.
    """
    return copy.deepcopy(_template(kind, dtype, device))  # less than half the time of making one


@cache
def shared_model(kind: Kind, dtype: str) -> PreTrainedModel:
    """Return a tiny model that is the same object for all callers, who must not change it."""
    return copy.deepcopy(_template(kind, dtype, "cpu"))


@cache
def _template(kind: Kind, dtype: str, device: str) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    odd = kind == "awkward"
    vocabulary, hidden, inner, layers = (211, 72, 140, 3) if odd else (200, 64, 128, 2)
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.12, "tie_word_embeddings": kind == "tied"}
    sizes |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng(), torch.device(device):
        seed_torch(1234)
        model = Qwen2ForCausalLM(Qwen2Config(**sizes)) if kind == "biased" else LlamaForCausalLM(LlamaConfig(**sizes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.name_or_path = model.config.name_or_path = f"tiny-{kind}"
    for parameter in model.parameters():  # not model.to: that would round the rotary frequencies, as loading does not
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.eval()


def altered_shared_models() -> list[str]:
    """Return the kinds of shared models that are no longer what they were made as, and let them be made anew."""
    import torch

    def same(kind: Kind, dtype: str) -> bool:
        now, before = shared_model(kind, dtype), _template(kind, dtype, "cpu")
        pairs = zip(every_tensor(now).items(), every_tensor(before).items(), strict=False)
        return len(list(now.modules())) == len(list(before.modules())) and all(
            name == other and torch.equal(one, two) for (name, one), (other, two) in pairs
        )

    looked: list[tuple[Kind, str]] = [(kind, "float32") for kind in get_args(Kind)]
    found = [f"{kind} {dtype}" for kind, dtype in [*looked, ("untied", "bfloat16")] if not same(kind, dtype)]
    if found:
        shared_model.cache_clear()
    return found


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name."""
    return dict((*model.named_parameters(), *model.named_buffers()))


def tokens(seed: int = 7) -> Tensor:
    """Return random token ids, shape (3, 10)."""
    import torch

    return torch.randint(1, 200, (3, 10), generator=torch.Generator().manual_seed(seed))


def calibration(examples: int) -> Calibration | None:
    """Return calibration data of random tokens, two rows to a batch; None for no examples."""
    import torch

    rows = [tokens(seed=50 + number)[:2] for number in range((examples + 1) // 2)]
    given = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]
    return Calibration(given) if given else None


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return float32 logits of the real tokens in evaluation mode, shape (batch, tokens, vocabulary)."""
    import torch

    training = model.training
    if training:
        model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :].float()
    if training:
        model.train()
    return found


def under_noise(model: nn.Module, seed: int) -> Tensor:
    """Return :func:`logits` of the same tokens, computed under a random state of its own."""
    import torch

    with torch.random.fork_rng():
        seed_torch(seed)
        return logits(model, tokens())


def surface(model: nn.Module) -> tuple[list[bool], list[bool]]:
    """Return of each module whether it is in training mode, and of each parameter whether it trains."""
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference; infinite where one of them is not a number."""
    gap = float((first.detach().float() - second.detach().float()).abs().max())
    return gap if math.isfinite(gap) else math.inf


def train(
    attached: Attached,
    learning_rate: float,
    steps: int = STEPS,
    seed: int = 0,
    halfway: Callable[[Optimizer], object] | None = None,
) -> tuple[list[float], set[str]]:
    """Train on one fixed batch with the method's optimizer.

    Args:
        attached: what trains.
        learning_rate: of the run.
        steps: of the optimizer.
        seed: of the training.
        halfway: called with the optimizer after half of the steps.

    Returns:
        The loss before each step, in training mode, and after the last, in evaluation mode; and the names of all
        parameters that ever had a gradient.
    """
    optimizer = attached.optimizer(learning_rate, 0.01)
    attached.begin(steps)
    half = steps // 2 if halfway is not None else 0
    losses, reached = advance(attached, optimizer, range(1, half + 1), steps, seed) if half else ([], set())
    if halfway is not None:
        halfway(optimizer)
    more, also = advance(attached, optimizer, range(half + 1, steps + 1), steps, seed)
    return [*losses, *more, loss_of(attached)], reached | also


def advance(
    attached: Attached, optimizer: Optimizer, steps: range, total: int, seed: int = 0
) -> tuple[list[float], set[str]]:
    """Do some optimizer steps of a training that has begun; each step has a random state of its own.

    Args:
        attached: what trains; in evaluation mode afterwards.
        optimizer: over its trained parameters.
        steps: numbers of the steps to do, from 1.
        total: number of all steps of the training.
        seed: of the training.

    Returns:
        The loss before each step, and the names of all parameters that ever had a gradient.
    """
    import torch

    losses, reached = [], set()
    attached.model.train()
    with torch.random.fork_rng():
        for step in steps:
            seed_torch(1000 * seed + step)
            loss = attached.model(**_batch()).loss
            losses.append(float(loss.detach()))
            extra = attached.extra_loss()
            (loss if extra is None else loss + extra).backward()
            for name, parameter in attached.model.named_parameters():
                if name not in reached and parameter.grad is not None and bool((parameter.grad != 0).any()):
                    reached.add(name)
            optimizer.step()
            attached.after_step(step, total)
            optimizer.zero_grad()
    attached.model.eval()
    return losses, reached


def loss_of(attached: Attached) -> float:
    """Return the loss on the batch that is trained on, in evaluation mode."""
    import torch

    if attached.model.training:
        attached.model.eval()
    with torch.no_grad():
        return float(attached.model(**_batch()).loss)


def _batch() -> dict[str, Tensor]:
    import torch

    ids = tokens(seed=3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@contextmanager
def global_random_untouched() -> Iterator[None]:
    """Check that the block leaves the random state of Python, numpy and torch as it was."""
    before = _random_state()
    yield
    assert before == _random_state(), "the global random state changed"


def _random_state() -> tuple[object, ...]:
    import numpy
    import torch

    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside the block: more only wait for each other on models this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuses(call: Callable[[], object]) -> bool:
    """Say whether a call ends in a UserError of one line."""
    try:
        call()
    except UserError as error:
        return "\n" not in str(error)
    return False
