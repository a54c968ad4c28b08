"""Conformance suite for fine-tuning methods: what a card declares is tried on tiny models.

``check_method("lora")`` raises AssertionError with a reason, or returns what was measured::

    def test_my_method():
        check_method(MyMethod, {"rank": 4}, directory=tmp_path)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached, Calibration, Capability, Method
from peft_arena.methods.registry import METHODS

if TYPE_CHECKING:
    from torch import Tensor, nn
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

    def make(self) -> Method:
        """Return the method with its settings."""
        return self.method(build(self.method.Config, self.config))

    def model(self) -> PreTrainedModel:
        """Return the pretrained model, the same every time."""
        return tiny_model(self.kind, self.dtype)

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


@dataclass(frozen=True)
class Facts:
    """What was measured on one tiny model; differences are the largest between two logits."""

    parameters: int
    step0_difference: float
    """Attached but untrained, against the pretrained model."""
    disabled_difference: float
    """Trained and switched off, against the pretrained model."""
    reload_difference: float
    """Restored on a fresh model, against the trained one."""
    merge_difference: float | None
    """Merged, against the trained one; None if not mergeable."""
    first_loss: float
    last_loss: float


def tiny_model(kind: Kind = "untied", dtype: str = "float32") -> PreTrainedModel:
    """Return a random Llama, the same for the same arguments, whose logits are large enough to compare.

    Args:
        kind: ``untied`` or ``tied`` embeddings; ``awkward``: sizes that are no powers of two; ``biased``: a Qwen2,
            whose q, k and v have biases.
        dtype: type of the weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    odd = kind == "awkward"
    vocabulary, hidden, inner, layers = (211, 72, 140, 3) if odd else (200, 64, 128, 2)
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.12, "tie_word_embeddings": kind == "tied"}
    sizes |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = Qwen2ForCausalLM(Qwen2Config(**sizes)) if kind == "biased" else LlamaForCausalLM(LlamaConfig(**sizes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.name_or_path = model.config.name_or_path = f"tiny-{kind}"
    for parameter in model.parameters():  # not model.to: that would round the rotary frequencies, as loading does not
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.eval()


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
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :].float()
    model.train(training)
    return found


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference; infinite where one of them is not a number."""
    gap = float((first.detach().float() - second.detach().float()).abs().max())
    return gap if math.isfinite(gap) else math.inf


def train(attached: Attached, learning_rate: float, steps: int = STEPS, seed: int = 0) -> tuple[list[float], set[str]]:
    """Train on one fixed batch with AdamW.

    Returns:
        The loss before each step and after the last, and the names of all parameters that ever had a gradient.
    """
    import torch

    ids, losses, reached = tokens(seed=3), [], set()
    optimizer = attached.optimizer(learning_rate, 0.01)
    attached.begin(steps)
    attached.model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            loss = attached.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            losses.append(float(loss.detach()))
            extra = attached.extra_loss()
            (loss if extra is None else loss + extra).backward()
            for name, parameter in attached.model.named_parameters():
                if parameter.grad is not None and bool((parameter.grad != 0).any()):
                    reached.add(name)
            optimizer.step()
            attached.after_step(step, steps)
            optimizer.zero_grad()
    attached.model.eval()
    with torch.no_grad():
        loss = attached.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    losses.append(float(loss))
    return losses, reached


def check_method(
    method: str | type[Method],
    config: Mapping[str, Any] | None = None,
    *,
    directory: Path,
    learning_rate: float = 5e-3,
    awkward: Mapping[str, Any] | None = None,
) -> dict[str, Facts]:
    """Check a method on tiny models: untied, tied, with awkward sizes, with biases, and in bfloat16.

    Args:
        method: a registered name, or a method class.
        config: settings that fit sizes 64, 32 and 128.
        directory: an empty directory for checkpoints.
        learning_rate: with which the loss falls within four steps.
        awkward: settings for sizes 72, 36 and 140; None: the same.

    Returns:
        What was measured, by model.

    Raises:
        AssertionError: the method does not do what its card and the contract say.
    """
    kind: type[Method] = METHODS.get(method) if isinstance(method, str) else method
    plain = Subject(kind, config or {}, learning_rate=learning_rate)
    subjects = {
        "untied": plain,
        "tied": replace(plain, kind="tied"),
        "awkward": replace(plain, kind="awkward", config=config or {} if awkward is None else awkward),
        "biased": replace(plain, kind="biased"),
        "bfloat16": replace(plain, dtype="bfloat16"),
    }
    check_card(plain)
    facts = {name: check_model(subject, directory / name) for name, subject in subjects.items()}
    check_seeds(plain)
    check_fields(plain)
    if plain.has(Capability.ONLINE_RL):
        check_generation(plain)
    return facts


def check_card(subject: Subject) -> None:
    """Check that a card is complete and does not contradict itself."""
    card, config = subject.method.card, subject.method.Config
    assert card.title and card.paper and card.parameters and card.description, f"{card.name}: an empty card entry"
    trains = subject.has(Capability.TRAINS)
    assert trains == (card.learning_rate is not None), f"{card.name}: a learning rate if and only if it trains"
    assert trains or not config.model_fields, f"{card.name}: settings of a method that does not train do nothing"
    for name in config.model_fields:
        assert name in config.alternatives, f"{card.name}: Config.alternatives has no value for {name}"
    stray = set(config.alternatives) - set(config.model_fields)
    assert not stray, f"{card.name}: Config.alternatives names {stray}, which are no fields"


def check_model(subject: Subject, directory: Path) -> Facts:
    """Run a method through one life on one model: attach, train, save, restore, switch off, merge."""
    ids, exact = tokens(), subject.dtype == "float32"
    pretrained = logits(subject.model(), ids)
    model = subject.model()
    base = list(model.parameters())
    with global_random_untouched():
        attached = subject.put(model)
    check_trained_set(subject, attached, base)
    step0 = difference(logits(attached.model, ids), pretrained)
    if subject.has(Capability.IDENTITY_AT_INIT):
        limit = EXACT if exact else ROUNDED if subject.has(Capability.CHANGES_BASE) else 0.0
        assert step0 <= limit, f"output moved by {step0} before training, but the card declares identity_at_init"
    else:
        assert step0 > MERGE, "output did not move before training; the card should declare identity_at_init"
    losses = check_training(subject, attached) if subject.has(Capability.TRAINS) else [0.0]
    tuned = logits(attached.model, ids)
    if subject.has(Capability.TRAINS):
        fresh = subject.model().parameters()
        moved = any(difference(now, before) > 0 for now, before in zip(base, fresh, strict=True))
        assert moved == subject.has(Capability.CHANGES_BASE), (
            f"weights of the base changed: {moved}; the card disagrees"
        )
        assert difference(tuned, pretrained) > MERGE, "training changed no output"
    check_state(subject, attached, tuned)
    disabled = check_disabled(subject, attached, pretrained, tuned)
    parameters = sum(p.numel() for p in attached.trained().values())
    reload_gap = check_checkpoint(subject, attached, tuned, pretrained, directory)
    merge_gap = check_merge(subject, attached, tuned, directory / "merged")
    return Facts(parameters, step0, disabled, reload_gap, merge_gap, losses[0], losses[-1])


def check_trained_set(subject: Subject, attached: Attached, base: Sequence[nn.Parameter]) -> None:
    """Check which parameters train, their type, their number, and the optimizer groups over them.

    Args:
        subject: what is attached.
        attached: its attachment.
        base: the parameters of the model before it was attached.
    """
    import torch

    trained = attached.trained()
    required = {name: p for name, p in attached.model.named_parameters() if p.requires_grad}
    assert list(trained) == list(required), "trained() is not exactly what has requires_grad"
    wrong = [name for name, p in trained.items() if p.dtype != torch.float32]
    assert not wrong, f"trained parameters that are not float32: {wrong[:3]}"
    assert bool(trained) == subject.has(Capability.TRAINS), f"{len(trained)} trained parameters contradict the card"
    if not subject.has(Capability.CHANGES_BASE):
        touched = [name for name, p in trained.items() if any(p is weight for weight in base)]
        assert not touched, f"weights of the base train: {touched[:3]}"
    counted = sum(p.numel() for p in trained.values())
    declared = subject.make().count(subject.model())
    assert declared is None or declared == counted, f"count() says {declared}, {counted} parameters train"
    grouped = [p for group in attached.parameter_groups(1.0, 0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained.values()}, "optimizer groups are not what trains"
    assert len(grouped) == len(trained), "a parameter is in two optimizer groups"


def check_training(subject: Subject, attached: Attached) -> list[float]:
    """Check that gradients reach exactly the trained parameters, that the loss falls, and the base stays."""
    import torch

    held = {name: p for name, p in attached.model.named_parameters() if not p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in held.items()}
    modes = {module.training for module in attached.model.modules()}
    assert modes == {False}, "attaching left a part of the model in training mode, or put one there"
    losses, reached = train(attached, subject.learning_rate)
    trained = set(attached.trained())
    assert reached <= trained, f"frozen parameters had a gradient: {sorted(reached - trained)[:3]}"
    assert trained <= reached, f"trained parameters never had a gradient: {sorted(trained - reached)[:3]}"
    assert losses[-1] < losses[0], f"loss did not fall: {losses[0]} to {losses[-1]}"
    moved = [name for name, p in held.items() if not torch.equal(p, frozen[name])]
    assert not moved, f"frozen parameters changed in training: {moved[:3]}"
    return losses


def check_state(subject: Subject, attached: Attached, tuned: Tensor) -> None:
    """Check that a state continues exactly on a new attachment, and that one that does not fit is refused."""
    state = {name: tensor.clone() for name, tensor in attached.state().items()}
    other = subject.attach(seed=0)
    other.load_state(state)
    assert difference(logits(other.model, tokens()), tuned) == 0, "load_state(state()) does not give the same outputs"
    if not state:
        return
    first = next(iter(state))
    damaged = [
        {name: tensor for name, tensor in state.items() if name != first},
        {**state, "stray": state[first]},
        {**state, first: state[first].flatten()[:1].repeat(state[first].numel() + 1)},
    ]
    for wrong in damaged:
        assert refuses(partial(other.load_state, wrong)), "load_state took a state that does not fit"
    assert difference(logits(other.model, tokens()), tuned) == 0, "a refused state changed the model"


def check_disabled(subject: Subject, attached: Attached, pretrained: Tensor, tuned: Tensor) -> float:
    """Check that switching off gives the pretrained model, and that everything is back afterwards."""
    flags = [p.requires_grad for p in attached.model.parameters()]
    with attached.disabled() as model:
        gap = difference(logits(model, tokens()), pretrained)
    limit = EXACT if subject.dtype == "float32" else ROUNDED if subject.has(Capability.CHANGES_BASE) else 0.0
    assert gap <= limit, f"disabled() is {gap} away from the pretrained model"
    assert difference(logits(attached.model, tokens()), tuned) == 0, "disabled() changed the tuned model"
    assert flags == [p.requires_grad for p in attached.model.parameters()], "disabled() changed what trains"
    return gap


def check_checkpoint(subject: Subject, attached: Attached, tuned: Tensor, pretrained: Tensor, directory: Path) -> float:
    """Check that a checkpoint gives the same outputs on a fresh model, and that damaged ones are refused."""
    import torch

    saved = directory / "checkpoint"
    attached.save(saved)
    assert difference(logits(attached.model, tokens()), tuned) == 0, "saving changed the model"
    with torch.random.fork_rng():
        torch.manual_seed(99)
        with global_random_untouched():
            restored = subject.make().restore(subject.model(), saved)
    gap = difference(logits(restored.model, tokens()), tuned)
    rounded = subject.dtype != "float32" and subject.has(Capability.CHANGES_BASE)
    limit = ROUNDED if rounded else MERGE if subject.has(Capability.CHANGES_BASE) else EXACT
    assert gap <= limit, f"the restored model is {gap} away from the saved one"
    assert not restored.model.training and not restored.trained(), "a restored model must be frozen and in eval mode"
    check_disabled(subject, restored, pretrained, logits(restored.model, tokens()))
    if subject.has(Capability.PEFT_ADAPTER):
        check_plain_adapter(subject, saved, logits(restored.model, tokens()))
    check_merge(subject, restored, logits(restored.model, tokens()), directory / "merged-restored")
    check_damage(subject, saved)
    return gap


def check_plain_adapter(subject: Subject, saved: Path, restored: Tensor) -> None:
    """Check that peft itself loads a checkpoint on the pretrained model with the same outputs."""
    from peft import PeftConfig, PeftModel

    named = PeftConfig.from_pretrained(str(saved)).base_model_name_or_path
    assert named == f"tiny-{subject.kind}", f"the adapter names {named} as its base model"
    wrapped = PeftModel.from_pretrained(subject.model(), str(saved))
    limit = EXACT if subject.dtype == "float32" else ROUNDED
    gap = difference(logits(wrapped, tokens()), restored)
    assert gap <= limit, f"PeftModel.from_pretrained is {gap} away from restore()"


def check_damage(subject: Subject, saved: Path) -> None:
    """Check that every missing or shortened file of a checkpoint is refused; the checkpoint is lost."""
    fresh = subject.model()
    for file in sorted(saved.iterdir()):
        if file.name == "generation_config.json":
            continue
        content = file.read_bytes()
        file.unlink()
        assert refuses(lambda: subject.make().restore(fresh, saved)), f"restored without {file.name}"
        file.write_bytes(content[: len(content) // 2])
        assert refuses(lambda: subject.make().restore(fresh, saved)), f"restored with half of {file.name}"
        file.write_bytes(content)
    assert refuses(lambda: subject.make().restore(fresh, saved / "nowhere")), "restored from no directory"


def check_merge(subject: Subject, attached: Attached, tuned: Tensor, directory: Path) -> float | None:
    """Check the weight change and the merged model; the attachment is used up."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    before = {name: m.weight for name, m in subject.model().named_modules() if isinstance(m, nn.Linear)}
    deltas: dict[str, Tensor | None] = {}
    if subject.has(Capability.LINEAR_DELTA):
        deltas = {name: attached.delta(name) for name in before}
        assert refuses(lambda: attached.delta("no.such.module")), "delta() of a module that is not there"
    else:
        assert refuses(lambda: attached.delta(next(iter(before)))), "delta() works, the card does not declare it"
    if not subject.has(Capability.MERGEABLE):
        assert refuses(attached.merged), "merged() works, the card does not declare it"
        return None
    try:
        merged = attached.merged()
    except UserError:
        assert subject.kind == "biased", "merged() is refused on a Llama, but the card declares mergeable"
        return None
    assert type(merged) is type(subject.model()), f"merged() gave a {type(merged).__name__}"
    exact = subject.dtype == "float32"
    gap = difference(logits(merged, tokens()), tuned)
    assert gap <= (MERGE if exact else ROUNDED), f"the merged model is {gap} away from the tuned one"
    assert merged.dtype == getattr(torch, subject.dtype), f"merged into {merged.dtype}"
    for name, module in merged.named_modules():
        if name in deltas:
            found = deltas[name]
            change = module.weight.detach().float() - before[name].float()
            wanted = torch.zeros_like(change) if found is None else found
            assert wanted.dtype == torch.float32, f"delta of {name} is {wanted.dtype}"
            limit = EXACT if exact else 0.02
            assert difference(wanted, change) <= limit, f"delta of {name} is not merged minus pretrained"
    merged.save_pretrained(directory)
    again = AutoModelForCausalLM.from_pretrained(directory, dtype=merged.dtype)
    gap_again = difference(logits(again, tokens()), logits(merged, tokens()))
    assert gap_again <= EXACT, f"the merged model read back is {gap_again} away"
    return gap


def check_seeds(subject: Subject) -> None:
    """Check that a seed fixes the start, and that another one changes it exactly where the card says so."""
    import torch

    first, same, other = (subject.attach(seed=seed).state() for seed in (5, 5, 6))
    assert list(first) == list(same) == list(other), "names of the state depend on the seed"
    assert all(torch.equal(first[name], same[name]) for name in first), "the same seed gives another start"
    differs = any(not torch.equal(first[name], other[name]) for name in first)
    assert differs == subject.method.card.random_init, f"another seed changes the start: {differs}; the card disagrees"


def check_fields(subject: Subject) -> None:
    """Check that every setting changes something, and that equal settings change nothing."""
    reference = fingerprint(subject)
    repeated = fingerprint(subject)
    assert not changed(reference, repeated), f"two equal runs differ in {changed(reference, repeated)}"
    for name, value in subject.method.Config.alternatives.items():
        other = replace(subject, config={**subject.config, name: value})
        assert getattr(other.make().config, name) != getattr(subject.make().config, name), f"{name}: same value twice"
        assert changed(reference, fingerprint(other)), f"setting {name} to {value!r} changed nothing"


def fingerprint(subject: Subject) -> dict[str, Any]:
    """Return what a setting can change: start, optimizer groups, losses in training mode, outputs afterwards."""
    attached = subject.attach()
    start = {f"start {name}": tensor.clone() for name, tensor in attached.state().items()}
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in attached.parameter_groups(1.0, 0.1)]
    losses = train(attached, subject.learning_rate, steps=2)[0] if attached.trained() else []
    return {**start, "groups": groups, "losses": losses, "outputs": logits(attached.model, tokens())}


def changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the names under which two fingerprints differ."""
    import torch

    def equal(one: object, two: object) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            return one.shape == two.shape and torch.equal(one, two)
        return bool(one == two)

    return sorted(name for name in {*first, *second} if not equal(first.get(name), second.get(name)))


def check_generation(subject: Subject) -> None:
    """Check that a trained method generates, with and without the cache, what its own logits say."""
    import torch

    attached = subject.attach()
    train(attached, subject.learning_rate, steps=2)
    ids = tokens()
    mask = torch.ones_like(ids)
    wanted = logits(attached.model, ids)[:, -1].argmax(-1)
    for cache in (True, False):
        found: Any = attached.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=cache
        )
        assert found.shape == (3, 13), f"generate gave shape {tuple(found.shape)}"
        assert torch.equal(found[:, 10], wanted), f"generate (cache {cache}) does not follow the logits"


@contextmanager
def global_random_untouched() -> Iterator[None]:
    """Check that the block leaves the random state of Python, numpy and torch as it was."""
    import numpy
    import torch

    before = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    yield
    after = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    assert before == after, "the global random state changed"


def refuses(call: Callable[[], object]) -> bool:
    """Say whether a call ends in a UserError of one line."""
    try:
        call()
    except UserError as error:
        return "\n" not in str(error)
    return False
