"""Checks of a method's life on a model: start, training, state, resuming, switching off, saving, merging."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached, Capability
from peft_arena.methods.state import seed_torch
from peft_arena.testing.subject import (
    EXACT,
    MERGE,
    ROUNDED,
    STEPS,
    Subject,
    advance,
    difference,
    global_random_untouched,
    logits,
    refuses,
    surface,
    tokens,
)
from peft_arena.testing.trial import OTHER_SEED, Life, Trial, linear_weights, on_each_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NOTHING = "the method does not train"
FILED = ("untied", "tied", "biased")
"""Models whose merged form is written to files and read back."""


@on_each_model
def check_start(life: Life) -> None:
    """Check the output before training, the mode of the model, and which parameters train."""
    import torch

    from peft_arena.models.modes import virtual_tokens

    subject, attached = life.subject, life.attached
    if subject.has(Capability.IDENTITY_AT_INIT):
        limit = EXACT if subject.exact else ROUNDED if subject.has(Capability.CHANGES_BASE) else 0.0
        assert life.step0 <= limit, (
            f"output moved by {life.step0} before training, but the card declares identity_at_init"
        )
    else:
        assert life.step0 > MERGE, "output did not move before training; the card should declare identity_at_init"
    vectors = virtual_tokens(attached.model)
    assert bool(vectors) == subject.has(Capability.VIRTUAL_TOKENS), (
        f"{vectors} trained vectors are seen before the input (models.modes.virtual_tokens); the card disagrees"
    )
    assert life.modes == {False}, "attaching left a part of the model in training mode, or put one there"
    trained = attached.trained()
    required = {name: p for name, p in attached.model.named_parameters() if p.requires_grad}
    assert list(trained) == list(required), "trained() is not exactly what has requires_grad"
    wrong = [name for name, p in trained.items() if p.dtype != torch.float32]
    assert not wrong, f"trained parameters that are not float32: {wrong[:3]}"
    assert bool(trained) == subject.has(Capability.TRAINS), f"{len(trained)} trained parameters contradict the card"
    if not subject.has(Capability.CHANGES_BASE):
        touched = [name for name, p in trained.items() if any(p is weight for weight in life.base)]
        assert not touched, f"weights of the base train: {touched[:3]}"
    grouped = [p for group in attached.parameter_groups(1.0, 0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained.values()}, "optimizer groups are not what trains"
    assert len(grouped) == len(trained), "a parameter is in two optimizer groups"


def check_mode(trial: Trial) -> None:
    """Check that a model in training mode stays in it."""
    assert trial.plain.put(trial.plain.model().train()).model.training, "attaching took the model out of training mode"


@on_each_model
def check_training(life: Life) -> str | None:
    """Check that gradients reach exactly the trained parameters, that the loss falls, and what of the base moves."""
    subject = life.subject
    if not subject.has(Capability.TRAINS):
        return NOTHING
    trained = set(life.attached.trained())
    assert life.reached <= trained, f"frozen parameters had a gradient: {sorted(life.reached - trained)[:3]}"
    missed = trained - life.reached
    assert not missed, f"trained parameters never had a gradient: {sorted(missed)[:3]}"
    assert life.last_loss < life.first_loss, f"loss did not fall: {life.first_loss} to {life.last_loss}"
    assert not life.thawed, f"frozen parameters changed in training: {life.thawed[:3]}"
    fresh = subject.untouched().parameters()
    moved = any(difference(now, before) > 0 for now, before in zip(life.base, fresh, strict=True))
    assert moved == subject.has(Capability.CHANGES_BASE), f"weights of the base changed: {moved}; the card disagrees"
    assert difference(life.tuned, life.pretrained) > MERGE, "training changed no output"
    return None


@on_each_model
def check_state(life: Life) -> None:
    """Check that a state continues exactly on a new attachment, and that one that does not fit is refused."""
    state = life.state()
    other = life.double
    gap, limit = difference(logits(other.model, tokens()), life.tuned), 0.0
    if life.subject.has(Capability.CHANGES_BASE):
        assert gap == 0, "load_state(state()) gives other outputs"
        limit = MERGE if life.subject.exact else ROUNDED
        gap = difference(logits(life.twin(seed=OTHER_SEED).model, tokens()), life.tuned)
    assert gap <= limit, (
        f"load_state(state()) gives other outputs, or depends on the seed of the new attachment: they differ by {gap}"
    )
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
    assert difference(logits(other.model, tokens()), life.tuned) == 0, "a refused state changed the model"


def check_resume(trial: Trial) -> str | None:
    """Check that a training that was interrupted in the middle ends bit for bit like one that was not."""
    if not trial.plain.has(Capability.TRAINS):
        return NOTHING
    for name in ("untied", "bfloat16"):
        try:
            _resume(trial.life(name))
        except AssertionError as error:
            raise AssertionError(f"on the {name} model: {error}") from error
    return None


def _resume(life: Life) -> None:
    subject, half = life.subject, STEPS // 2
    _check_moments(life)
    second = subject.attach()
    optimizer = second.optimizer(subject.learning_rate, 0.01)
    second.load_state(life.halfway)
    optimizer.load_state_dict({"state": life.moments, "param_groups": optimizer.state_dict()["param_groups"]})
    second.begin(STEPS)
    losses = advance(second, optimizer, range(half + 1, STEPS + 1), STEPS)[0]
    wanted = life.losses[half:-1]
    assert losses == wanted, f"resumed after step {half}, the losses are {losses}, not {wanted}"
    gap = difference(logits(second.model, tokens()), life.tuned)
    assert gap == 0, f"resumed after step {half}, the trained model is {gap} away from one that was not interrupted"


def _check_moments(life: Life) -> None:
    """Check that the optimizer's state is of tensors, each a scalar or of its parameter's shape."""
    import torch

    trained = {id(p): p for p in life.attached.trained().values()}
    assert sorted(life.stepped) == sorted(trained), "the optimizer's parameters are not what trains"
    for number, entry in life.moments.items():
        shape = trained[life.stepped[number]].shape
        for key, value in entry.items():
            assert isinstance(value, torch.Tensor), f"the optimizer's state {key} is no tensor, and cannot be saved"
            assert not value.ndim or value.shape == shape, (
                f"the optimizer's state {key} is {tuple(value.shape)}, its parameter {tuple(shape)}"
            )


@on_each_model
def check_disabled(life: Life) -> None:
    """Check that switching off gives the pretrained model, and that everything is back afterwards, come what may."""
    life.seen["disabled"] = _switched_off(life, life.attached, life.tuned)


class _ExpectedError(Exception):
    """Raised on purpose."""


def _switched_off(life: Life, attached: Attached, tuned: Tensor) -> float:
    before = surface(attached.model)
    with attached.disabled() as model:
        gap = difference(logits(model, tokens()), life.pretrained)
    changes = life.subject.has(Capability.CHANGES_BASE)
    limit = EXACT if life.subject.exact else ROUNDED if changes else 0.0
    assert gap <= limit, f"disabled() is {gap} away from the pretrained model"
    assert difference(logits(attached.model, tokens()), tuned) == 0, "disabled() changed the tuned model"
    assert before == surface(attached.model), "disabled() changed what trains, or the mode of a module"
    try:
        with attached.disabled():
            raise _ExpectedError
    except _ExpectedError:
        away = difference(logits(attached.model, tokens()), tuned)
    else:
        raise AssertionError("disabled() swallowed an error that was raised inside it")
    assert away == 0, f"disabled() is not undone after an error inside it: the model is {away} away from the tuned one"
    assert before == surface(attached.model), "after an error inside disabled(), other parameters train or modes differ"
    return gap


def reload_limit(subject: Subject) -> float:
    """Return how far a restored model may be from the saved one."""
    if not subject.has(Capability.CHANGES_BASE):
        return EXACT
    return MERGE if subject.exact else ROUNDED


@on_each_model
def check_checkpoint(life: Life) -> None:
    """Check that a checkpoint gives the same outputs on a fresh model, frozen."""
    import torch

    before = surface(life.attached.model)
    with torch.random.fork_rng():
        seed_torch(99)
        with global_random_untouched():
            assert life.saved.is_dir(), "save() wrote no directory"
            restored = life.reread
    assert difference(logits(life.attached.model, tokens()), life.tuned) == 0, "saving changed the model"
    assert before == surface(life.attached.model), "saving changed what trains, or the mode of a module"
    found = logits(restored.model, tokens())
    gap = life.seen["reload"] = difference(found, life.tuned)
    assert gap <= reload_limit(life.subject), f"the restored model is {gap} away from the saved one"
    assert not restored.model.training and not restored.trained(), "a restored model must be frozen and in eval mode"
    _check_same_numbers(life, restored)
    _switched_off(life, restored, found)


def _check_same_numbers(life: Life, restored: Attached) -> None:
    """Check that what trained is read back bit for bit where the restored model has it in the same form."""
    import torch

    if life.subject.has(Capability.CHANGES_BASE) or life.subject.has(Capability.VIRTUAL_TOKENS):
        return  # what is saved is a change of the base, or the vectors that others made
    held = dict(restored.model.named_parameters())
    for name, parameter in life.attached.trained().items():
        if name in held and held[name].shape == parameter.shape:
            assert held[name].dtype == parameter.dtype, f"{name} is restored as {held[name].dtype}"
            gap = difference(held[name], parameter)
            assert torch.equal(held[name], parameter), f"{name} is restored {gap} away from what was saved"


@on_each_model
def check_merge(life: Life) -> str | None:
    """Check the weight change and the merged model, of what was trained and of what was restored."""
    if life.subject.has(Capability.LINEAR_DELTA) and life.subject.kind == "untied":
        _check_repeated(life)
    double, restored = life.__dict__.pop("double", None) or life.twin(), life.__dict__.pop("reread", None)
    gap = _merged(life, double)
    if gap is not None:
        life.seen["merge"] = gap
    restored = restored or life.restored()
    _merged(life, restored, logits(restored.model, tokens()))
    return None if gap is not None else "the card does not declare mergeable, or not with this model"


def _check_repeated(life: Life) -> None:
    """Check that asking for a change changes nothing, and that asking again gives the same."""
    before = surface(life.attached.model)
    for name, delta in life.deltas.items():
        again = life.attached.delta(name)
        same = again is delta if again is None or delta is None else difference(again, delta) == 0
        assert same, f"delta() of {name} is another when asked again"
    assert difference(logits(life.attached.model, tokens()), life.tuned) == 0, "delta() changed the model"
    assert before == surface(life.attached.model), "delta() changed what trains, or the mode of a module"


def _merged(life: Life, attached: Attached, read: Tensor | None = None) -> float | None:
    """Check one attachment, which is used up.

    Args:
        life: of the method.
        attached: in the state of the trained one, or a restored checkpoint of it.
        read: outputs of the restored one; None for the other, whose merged model is written and read back.

    Returns:
        Largest difference of the merged model's outputs; None where it cannot be merged.
    """
    import torch

    subject = life.subject
    before = linear_weights(subject.untouched())
    deltas: dict[str, Tensor | None] = {}
    if subject.has(Capability.LINEAR_DELTA):
        deltas = life.deltas if read is None else {name: attached.delta(name) for name in before}
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
    assert type(merged) is type(subject.untouched()), f"merged() gave a {type(merged).__name__}"
    gap = difference(logits(merged, tokens()), life.tuned if read is None else read)
    assert gap <= (MERGE if subject.exact else ROUNDED), f"the merged model is {gap} away from the tuned one"
    assert merged.dtype == getattr(torch, subject.dtype), f"merged into {merged.dtype}"
    for name, weight in linear_weights(merged).items():
        if name in deltas:
            _check_delta(name, deltas[name], weight.detach().float() - before[name].float(), subject.exact)
    _check_plain(life, merged)
    outputs = logits(merged, tokens())
    if read is None and subject.kind in FILED:
        _check_read_back(life, merged, outputs)
    try:
        twice = attached.merged()
    except Exception:  # noqa: BLE001 - it is used up, and may refuse in any way
        return gap
    assert difference(logits(twice, tokens()), outputs) == 0, "merged() merges again when it is called again"
    return gap


def _check_plain(life: Life, merged: PreTrainedModel) -> None:
    """Check that a merged model has the modules, parameters and settings of the pretrained one, and no hooks."""
    plain = life.subject.untouched()
    kinds, wanted = ({name: type(one) for name, one in model.named_modules()} for model in (merged, plain))
    odd = [name for name in {*kinds, *wanted} if kinds.get(name) is not wanted.get(name)]
    assert not odd, f"the merged model has other modules than the pretrained one: {sorted(odd)[:3]}"
    stray = [name for name in {*merged.state_dict()} ^ {*plain.state_dict()} if not name.endswith(".bias")]
    assert not stray, f"the merged model has other tensors than the pretrained one: {sorted(stray)[:3]}"
    hooked = [name for name, one in merged.named_modules() if one._forward_hooks or one._forward_pre_hooks]
    assert not hooked, f"the merged model has hooks left, on {hooked[:3]}"


def _check_read_back(life: Life, merged: PreTrainedModel, outputs: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    merged.save_pretrained(life.directory / "merged")
    again = AutoModelForCausalLM.from_pretrained(life.directory / "merged", dtype=merged.dtype)
    gap = difference(logits(again, tokens()), outputs)
    assert gap <= EXACT, f"the merged model read back is {gap} away"


def _check_delta(name: str, found: Tensor | None, change: Tensor, exact: bool) -> None:
    import torch

    wanted = torch.zeros_like(change) if found is None else found
    assert wanted.dtype == torch.float32, f"delta of {name} is {wanted.dtype}"
    assert difference(wanted, change) <= (EXACT if exact else 0.02), f"delta of {name} is not merged minus pretrained"


def check_generation(trial: Trial) -> str | None:
    """Check that a trained method generates, with and without the cache, what its own logits say."""
    import torch

    if not trial.plain.has(Capability.ONLINE_RL):
        return "the card does not declare online_rl"
    life = trial.life("untied")
    ids = tokens()
    mask = torch.ones_like(ids)
    wanted = life.tuned[:, -1].argmax(-1)
    for cache in (True, False):
        model: Any = life.attached.model
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=cache)
        assert found.shape == (3, 13), f"generate gave shape {tuple(found.shape)}"
        assert torch.equal(found[:, 10], wanted), f"generate (cache {cache}) does not follow the logits"
    return None
