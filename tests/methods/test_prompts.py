"""Prompt and prefix methods, LLaMA-Adapter and ShadowPEFT: what they compute, against independent computations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.evaluate.decode import Job, decode
from peft_arena.evaluate.likelihood import Pair, log_likelihoods
from peft_arena.methods.base import Attached, Calibration
from peft_arena.methods.prompts.cpt import make_context
from peft_arena.methods.registry import make_method
from peft_arena.models.load import load
from peft_arena.models.modes import context_length
from peft_arena.models.render import encode_text, render
from peft_arena.tasks.registry import make_task
from peft_arena.testing.methods import EXACT, difference, logits, tiny_model, tokens
from peft_arena.testing.subject import train
from peft_arena.train.batch import IGNORED, Batch
from peft_arena.train.loss import TokenLoss, check_isolation
from tests.methods.settings.prompts import SETTINGS

NAMES = sorted(SETTINGS)
IN_CONTEXT = [name for name in NAMES if name not in ("adaption_prompt", "shadow")]


def examples(count: int) -> Calibration:
    """Return questions of six tokens with answers of two, one to a batch, padded on the right."""
    batches = []
    for number in range(count):
        ids = torch.randint(1, 100, (1, 8), generator=torch.Generator().manual_seed(number))
        labels = torch.cat([torch.full((1, 6), IGNORED), ids[:, 6:]], dim=1)
        mask = torch.ones(1, 8, dtype=torch.long)
        batches.append(
            {
                "input_ids": functional.pad(ids, (0, 2)),
                "labels": functional.pad(labels, (0, 2), value=IGNORED),
                "attention_mask": functional.pad(mask, (0, 2)),
            }
        )
    return Calibration(batches)


def attach(name: str, config: Mapping[str, Any] | None = None, model: Any = None, seed: int = 0) -> Any:
    settings = {**SETTINGS[name].get("config", {}), **(config or {})}
    model = tiny_model() if model is None else model
    return make_method(name, settings).attach(model, seed=seed, calibration=examples(8))


def trained(name: str, config: Mapping[str, Any] | None = None, model: Any = None) -> Any:
    attached: Attached = attach(name, config, model)
    train(attached, SETTINGS[name].get("learning_rate", 5e-3))
    return attached


def batch() -> Batch:
    ids = tokens(seed=11)
    labels = ids.clone()
    labels[:, :5] = IGNORED
    labels[2, 8:] = IGNORED
    flat = labels.flatten()
    where = (flat != IGNORED).nonzero().flatten()
    return Batch(ids, labels, None, where - 1, flat[where], ids.numel())


@pytest.mark.parametrize("name", NAMES)
def test_training_loss_is_that_of_the_outputs(name: str) -> None:
    attached, given = trained(name), batch()
    with TokenLoss(attached.model, autocast=False) as loss:
        found = loss(given)
    scores = logits(attached.model, given.input_ids).flatten(0, 1)[given.places]
    wanted = functional.cross_entropy(scores, given.targets, reduction="sum")
    assert difference(found.nats, wanted) < 1e-3
    found.nats.backward()
    assert all(p.grad is not None for p in attached.trained().values())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_does_not_depend_on_the_batch_and_follows_the_outputs(name: str) -> None:
    loaded = load(ModelSpec(name="micro"))
    attached = attach(name, model=loaded.model)
    model = attached.model
    with torch.no_grad():
        for parameter in attached.trained().values():  # as after training, when nothing is zero
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    task = make_task("micro-sort")
    prompts = [
        encode_text(loaded.tokenizer, render(loaded.tokenizer, task.prompt(item))) for item in task.items("test")[:5]
    ]
    prompts.append(prompts[0])
    jobs = [Job(ids, 5, ()) for ids in prompts]
    pairs = [Pair(ids, [3, 4]) for ids in prompts]
    with torch.inference_mode():
        texts, sums = [], []
        for size in (1, 8):
            texts.append(decode(model, loaded.tokenizer, jobs, batch_size=size, done=lambda _: None))
            sums.append(log_likelihoods(model, pairs, batch_size=size, done=lambda _: None))
        assert texts[0] == texts[1]
        assert any(text.text for text in texts[0])
        assert max(abs(a.total - b.total) for a, b in zip(*sums, strict=True)) < 1e-4
        for ids, text, found in zip(prompts, texts[0], sums[0], strict=True):
            assert text.text == loaded.tokenizer.decode(
                greedy(model, ids, 5, loaded.tokenizer), skip_special_tokens=True
            )
            scores = logits(model, torch.tensor([[*ids, 3]]))[0, -2:].log_softmax(-1)
            assert abs(found.total - float(scores[0, 3] + scores[1, 4])) < 1e-4


def greedy(model: nn.Module, ids: list[int], new: int, tokenizer: Any) -> list[int]:
    """Return new tokens by a full forward pass for each."""
    written: list[int] = []
    for _ in range(new):
        written.append(int(logits(model, torch.tensor([[*ids, *written]]))[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return written


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_virtual_tokens_take_room_in_the_context(name: str, tmp_path: Path) -> None:
    attached = attach(name)
    taken = 4 if name == "cpt" else 6  # of CPT two questions' tokens train, with an answer of two
    attached.save(tmp_path)
    restored = make_method(name, SETTINGS[name]["config"]).restore(tiny_model(), tmp_path)
    assert context_length(attached.model) == context_length(restored.model) == 64 - taken
    method = make_method(name, {**SETTINGS[name]["config"], "num_virtual_tokens": 63})
    for use in (method.count, lambda model: method.attach(model, seed=0, calibration=examples(40))):
        with pytest.raises(UserError, match=r"num_virtual_tokens: 63 .*64 tokens.*allowed: 1 to 62"):
            use(tiny_model())


@pytest.mark.parametrize("name", ["prefix_tuning", "p_tuning_v2", "cartridge"])
def test_prefixes_refuse_gradient_checkpointing(name: str) -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="gradient checkpointing"):
        attach(name, model=model)


@pytest.mark.parametrize(("name", "other"), [("p_tuning", {}), ("p_tuning", {"encoder": "mlp"}), ("prefix_tuning", {})])
def test_checkpoint_holds_the_vectors_and_state_the_network(name: str, other: dict[str, Any], tmp_path: Path) -> None:
    attached = trained(name, other)
    encoder = attached.model.prompt_encoder["default"]
    attached.save(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    rows = encoder.embedding.weight
    if name == "prefix_tuning":
        first, last = encoder.transform[0], encoder.transform[2]
        made = (rows @ first.weight.T + first.bias).tanh() @ last.weight.T + last.bias
        assert made.shape == (6, 2 * 2 * 32)
    else:
        made = encoder.mlp_head(rows if other else encoder.lstm_head(rows[None])[0][0])
        assert made.shape == (6, 64)
    assert list(stored) == ["prompt_embeddings"]
    assert difference(stored["prompt_embeddings"], made) < EXACT
    assert set(attached.state()) == {f"prompt_encoder.default.{n}" for n, _ in encoder.named_parameters()}
    settings = {**SETTINGS[name]["config"], **other}
    restored = make_method(name, settings).restore(tiny_model(), tmp_path)
    assert difference(logits(restored.model, tokens()), logits(attached.model, tokens())) < EXACT


def test_settings_of_the_lstm_need_it() -> None:
    for config in ({"encoder": "mlp", "lstm_layers": 1}, {"encoder": "mlp", "lstm_dropout": 0.1}):
        with pytest.raises(UserError, match="need encoder = lstm"):
            make_method("p_tuning", config)
    with pytest.raises(UserError, match="lstm_layers of at least 2"):
        make_method("p_tuning", {"lstm_layers": 1, "lstm_dropout": 0.1})


def test_multitask_prompt_is_saved_as_a_plain_prompt(tmp_path: Path) -> None:
    attached = trained("multitask_prompt_tuning", {"rank": 3})
    attached.save(tmp_path)
    state = {name.rsplit("default.")[-1]: tensor for name, tensor in attached.state().items()}
    product = state["embedding.weight"] * (state["prefix_task_cols"][0] @ state["prefix_task_rows"][0])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    assert difference(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], product) < 1e-7


@pytest.mark.parametrize("kind", ["untied", "biased"])
def test_cartridge_starts_as_the_corpus_in_the_context(kind: Any) -> None:
    model = tiny_model(kind)
    attached = attach("cartridge", {"num_virtual_tokens": 12}, model)
    found = logits(attached.model, tokens())
    ids = [row["input_ids"][0, :8].tolist() for row in examples(8).batches]
    starts = [torch.tensor([*one, *other[:4]]) for one in ids for other in ids if one != other]
    pretrained = tiny_model(kind)
    gaps = [difference(logits(pretrained, with_start(start))[:, 12:], found) for start in starts]
    assert min(gaps) < EXACT
    frozen = attached.model.prompt_encoder["default"].frozen_embedding.clone()
    train(attached, 2e-2)
    assert torch.equal(frozen, attached.model.prompt_encoder["default"].frozen_embedding)


def with_start(start: Tensor) -> Tensor:
    return torch.cat([start.expand(3, -1), tokens()], dim=1)


def test_cpt_keeps_answers_and_bounds_changes() -> None:
    config = {"num_virtual_tokens": 16, "epsilon": 0.5, "decay": 0.5, "context_loss": 2.0}
    attached = attach("cpt", config)
    encoder: Any = attached.model.prompt_encoder["default"]
    ids, kinds = encoder.context
    assert kinds.tolist() == [2] * 4 + [4] * 2 + [2] * 6 + [8] * 2 + [2] * 6 + [12] * 2
    before = tiny_model().get_input_embeddings()(ids)
    train(attached, 0.5)
    change = encoder(torch.arange(22)) - before
    limit = 0.5 * (64 / 2048) ** 0.5
    assert difference(change[kinds != 2], torch.zeros(6, 64)) == 0
    assert float(change.norm(dim=1).max()) == pytest.approx(limit, rel=1e-4)
    scores = tiny_model()(inputs_embeds=(before + change)[None]).logits[0].log_softmax(-1)
    nats = [[-float(scores[place - 1, ids[place]].detach()) for place in rows] for rows in ((4, 5), (12, 13), (20, 21))]
    wanted = 2.0 * sum(weight * sum(part) for weight, part in zip((0.125, 0.25, 0.5), nats, strict=True)) / 6
    assert float(attached.extra_loss()) == pytest.approx(wanted, rel=1e-5)


def test_context_is_cut_where_it_starts_and_refused_if_too_long() -> None:
    found = [([1, 2, 3, 4], [IGNORED, IGNORED, 3, 4]), ([5, 6, 7, 8], [IGNORED, IGNORED, IGNORED, 8])]
    assert make_context(found, 1) == ([2, 3, 4], [2, 4, 4])
    assert make_context(found, 4) == ([6, 7, 8, 1, 2, 3, 4], [2, 2, 4, 2, 2, 8, 8])
    with pytest.raises(UserError, match="num_virtual_tokens: 6 is above the 5 question tokens"):
        make_context(found, 6)
    with pytest.raises(UserError, match="num_virtual_tokens: 60 is above the 48 question tokens"):
        attach("cpt", {"num_virtual_tokens": 60})
    with pytest.raises(UserError, match="48 tokens are a context of 64, and LlamaForCausalLM has room for 62"):
        attach("cpt", {"num_virtual_tokens": 48})
    with pytest.raises(UserError, match="num_virtual_tokens: 60 is above the 8 tokens"):
        make_method("cartridge", {"num_virtual_tokens": 60}).attach(tiny_model(), seed=0, calibration=examples(1))


def test_adaption_prompt_computes_what_peft_does_on_llama() -> None:
    from peft.tuners.adaption_prompt import AdaptedAttention
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    attached = trained("adaption_prompt", {"top_layers": 1})
    own = logits(attached.model, tokens())
    layers = [module for module in attached.model.modules() if isinstance(module, AdaptedAttention)]
    assert [name for name in attached.trained() if "gate" in name] == [
        "base_model.model.model.layers.1.self_attn.adaption_gate"
    ]
    for layer in layers:
        del layer.forward
    assert difference(logits(attached.model, tokens()), own) < EXACT
    attach("adaption_prompt", model=tiny_model("biased"))
    assert "qwen2" not in TRANSFORMERS_MODEL_CONFIG


def test_shadow_has_the_loss_of_peft_and_freezes_what_is_not_used(tmp_path: Path) -> None:
    from peft import PeftModel

    attached, given = trained("shadow"), batch()
    attached.save(tmp_path)
    with TokenLoss(attached.model, autocast=False) as loss:
        parts = loss(given)
    assert parts.extra is not None
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    wanted = plain(input_ids=given.input_ids, labels=given.labels).loss
    assert float(parts.nats / len(given.targets) + parts.extra) == pytest.approx(float(wanted), abs=1e-5)
    shadow = [name for name, _ in attached.model.named_parameters() if "shadow_" in name]
    idle = [name for name in shadow if name not in attached.trained()]
    assert len(idle) == 8
    assert all(".layers.1.shadow_update_" in name for name in idle)
    with TokenLoss(attached.model, autocast=False) as loss:
        check_isolation(loss)


def test_shadow_keeps_its_own_past_in_the_cache_of_the_caller() -> None:
    from transformers import DynamicCache

    attached = trained("shadow", {"alpha": 1.0, "shadow_layers": 2})
    with torch.no_grad():
        for name, parameter in attached.trained().items():
            if ".shadow_up." in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    model, ids, rows = attached.model, tokens(), torch.tensor([2, 0])
    wanted = logits(model, ids)
    assert difference(wanted, logits(tiny_model(), ids)) > 1
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True).logits
        cache.batch_select_indices(rows)
        second = model(input_ids=ids[rows, 6:9], past_key_values=cache, use_cache=True).logits
        third = model(input_ids=ids[rows, 9:], past_key_values=cache, use_cache=True).logits
    assert difference(first, wanted[:, :6]) < 1e-4
    assert difference(torch.cat([second, third], dim=1), wanted[rows, 6:]) < 1e-4


def test_models_of_another_build_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50))
    for name in ("adaption_prompt", "shadow"):
        with pytest.raises(UserError, match=f"method {name} needs .*GPT2LMHeadModel"):
            make_method(name, {}).count(model)
    with pytest.raises(UserError, match="top_layers: 3 are more than the model has; allowed: 1 to 2"):
        make_method("adaption_prompt", {"top_layers": 3}).count(tiny_model())
    with pytest.raises(UserError, match="rank: 65 is above the width of the model; allowed: 1 to 64"):
        make_method("shadow", {"rank": 65}).count(tiny_model())
