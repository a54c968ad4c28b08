"""The loss against an independent computation on full logits, below every kind of wrapper."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from peft_arena.core.errors import UserError
from peft_arena.methods.registry import make_method
from peft_arena.train.batch import collate
from peft_arena.train.data import Example
from peft_arena.train.loss import TokenLoss, check_isolation, held_out_loss

from .toy import ToyAttached, load_model

EXAMPLES = [
    Example([5, 9, 11, 4, 30, 0], 3),
    Example([7, 8, 0], 2),
    Example([21, 22, 23, 24, 25, 26, 27, 28, 40, 41, 0], 8),
    Example([50, 0], 1),
]


def attach(kind: str, model):
    if kind == "toy":
        return ToyAttached(model, rate=0.0)
    config = {"prompt_tuning": {}, "lora": {"rank": 4}}.get(kind, {})
    return make_method(kind, config).attach(model, seed=0)


def expected(model, examples) -> torch.Tensor:
    """Full logits of a right-padded batch with its mask; virtual tokens stand in front."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        mask[row, :size] = 1
        labels[row, example.first_label : size] = ids[row, example.first_label : size]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -width:]
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("kind", ["toy", "lora", "full", "prompt_tuning", "ia3", "bitfit"])
def test_loss_and_gradients_are_those_of_full_logits(kind, model_dir):
    attached = attach(kind, load_model(model_dir).model)
    model = attached.model.eval()
    before = expected(model, EXAMPLES)
    wanted = torch.autograd.grad(before, list(attached.trained().values()), allow_unused=True)
    with TokenLoss(model, autocast=False) as loss:
        parts = loss(collate(EXAMPLES, packing=False, limit=64, pad=0))
    assert parts.extra is None
    torch.testing.assert_close(parts.nats, before, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(parts.nats, list(attached.trained().values()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found)
    for left, right in zip(found, wanted, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected(model, EXAMPLES), before)  # nothing is left behind on the model


def test_bfloat16_loss_is_near(model_dir):
    loaded = load_model(model_dir, "bfloat16")
    model = ToyAttached(loaded.model, rate=0.0).model.eval()
    with TokenLoss(model, autocast=True) as loss:
        found = loss(collate(EXAMPLES, packing=False, limit=64, pad=0)).nats
    assert found.dtype == torch.float32
    exact = expected(ToyAttached(load_model(model_dir).model, rate=0.0).model.eval(), EXAMPLES)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)


def test_packed_loss_is_unpacked_loss(model_dir):
    model = ToyAttached(load_model(model_dir).model, rate=0.0).model.eval()
    packed = collate(EXAMPLES, packing=True, limit=18, pad=0)
    assert len(packed.input_ids) < len(EXAMPLES) and packed.tokens == sum(len(one.ids) for one in EXAMPLES)
    for examples in (EXAMPLES, [example._replace(first_label=1) for example in EXAMPLES]):
        with TokenLoss(model, autocast=False) as loss:
            check_isolation(loss)
            found = loss(collate(examples, packing=True, limit=18, pad=0)).nats
        torch.testing.assert_close(found, expected(model, examples), rtol=1e-5, atol=1e-5)


def test_packing_is_refused_where_examples_see_each_other(model_dir):
    model = load_model(model_dir).model.eval()
    inner = model.forward
    model.forward = lambda *args, position_ids=None, **kwargs: inner(*args, **kwargs)
    with TokenLoss(model, autocast=False) as loss, pytest.raises(UserError, match="packed before it"):
        check_isolation(loss)


def test_terms_a_method_adds_are_kept(model_dir):
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, init_r=4, target_r=2, orth_reg_weight=0.5)
    config.target_modules = ["q_proj"]
    model = peft.get_peft_model(load_model(model_dir).model, config).eval()
    with TokenLoss(model, autocast=False) as loss:
        parts = loss(collate(EXAMPLES, packing=False, limit=64, pad=0))
    torch.testing.assert_close(parts.nats, expected(model, EXAMPLES), rtol=1e-5, atol=1e-5)
    pairs = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in pairs]
    wanted = 0.5 * sum(torch.linalg.norm(gram - torch.eye(len(gram))) for gram in grams) / len(grams)
    torch.testing.assert_close(parts.extra, wanted)


def test_held_out_loss_is_per_label_and_without_dropout(model_dir):
    model = ToyAttached(load_model(model_dir).model, rate=0.9).model.train()
    torch.nn.init.ones_(model.model.layers[0].self_attn.q_proj.up)
    with TokenLoss(model, autocast=False) as loss:
        parts = [
            collate(EXAMPLES[:1], packing=False, limit=64, pad=0),
            collate(EXAMPLES[1:], packing=False, limit=64, pad=0),
        ]
        found = held_out_loss(loss, parts)
    assert model.training
    labels = sum(example.labels for example in EXAMPLES)
    assert found == pytest.approx(float(expected(model.eval(), EXAMPLES)) / labels, rel=1e-5)
