"""What is decoded is what full forward passes say, for every family, and a cache that is wrong is found out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec, RLSpec, Schedule, TaskSpec
from peft_arena.cost.latency import latency_measures
from peft_arena.evaluate.decode import Continuation, Job, decode
from peft_arena.evaluate.engine import ModelEngine
from peft_arena.evaluate.likelihood import Pair, log_likelihoods
from peft_arena.evaluate.run import described
from peft_arena.models.load import Loaded
from peft_arena.models.modes import evaluation_mode
from peft_arena.models.ways import Way, decoding_way, reading_way
from peft_arena.store.records import DECODING, READING
from peft_arena.tasks.base import Kind
from peft_arena.train.rollouts import Rollouts

from .zoo import FAMILIES, plain_tokenizer, tiny

TOKENIZER = plain_tokenizer()
LIMIT = 6
SLOW = {
    "recurrent_gemma": "its cache gives other logits",
    "rwkv": "its state is not transformers' cache",
    "xlstm": "its cache is a class of its own",
}
"""Families that are decoded without a cache in the pinned version of transformers, and why."""
ALIKE = {"bloom", "mpt", "mamba", "mamba2", "falcon_mamba"}
"""Families that take no positions: only prompts of one length share a batch with a cache."""


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 100, (length,), generator=generator).tolist() for length in lengths]


def jobs_of(*lengths: int, limit: int = LIMIT) -> list[Job]:
    """Return jobs, the first one twice, that stop at common characters and so at different times."""
    found = [Job(ids, limit, tuple("eaiou")) for ids in prompts(*lengths)]
    return [*found, found[0]]


JOBS = jobs_of(21, 9, 9, 1)


def answer(model: Any, jobs: list[Job], used: Callable[[Way], object] = lambda way: None) -> list[list[int]]:
    with evaluation_mode(model):
        found: list[Continuation] = decode(model, TOKENIZER, jobs, batch_size=8, done=lambda _: None, used=used)
    return [one.ids for one in found]


@torch.no_grad()
def plain(model: Any, job: Job) -> list[int]:
    """Greedy tokens by a full forward pass of one row at every step."""
    new: list[int] = []
    while len(new) < job.max_new_tokens:
        new.append(int(model(input_ids=torch.tensor([job.ids + new]), use_cache=False).logits[0, -1].argmax()))
        text = TOKENIZER.decode(new, skip_special_tokens=True)
        if new[-1] == TOKENIZER.eos_token_id or any(mark in text for mark in job.stop):
            break
    return new


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_that_of_full_forward_passes(family: str) -> None:
    model = tiny(family)
    used: list[Way] = []
    assert answer(model, JOBS, used.append) == [plain(model, job) for job in JOBS]
    assert used[0].cached == (family not in SLOW)
    assert used[0].together == (family not in ALIKE)


def test_rows_end_at_different_times() -> None:
    lengths = {len(ids) for family in ("jamba", "falcon_h1", "llama") for ids in answer(tiny(family), JOBS)}
    assert len(lengths) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_in_16_bits_is_no_wrong_cache(family: str) -> None:
    model = tiny(family, dtype=torch.bfloat16)
    with evaluation_mode(model):
        assert decoding_way(model).cached == (family not in SLOW)
        assert reading_way(model).together
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters() if parameter.dim() > 1)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "xlstm", "jamba", "recurrent_gemma"])
def test_likelihoods_of_recurrent_models_are_those_of_each_row_alone(family: str) -> None:
    model = tiny(family)
    pairs = [Pair(ids[:-2], ids[-2:]) for ids in prompts(17, 9, 4, 3)]
    with evaluation_mode(model):
        found = log_likelihoods(model, pairs, batch_size=4, done=lambda _: None)
        for pair, one in zip(pairs, found, strict=True):
            logits = model(input_ids=torch.tensor([[*pair.context, *pair.continuation]]), use_cache=False).logits[0]
            expected = logits.log_softmax(-1)[-3:-1].gather(1, torch.tensor(pair.continuation)[:, None]).sum()
            assert one.total == pytest.approx(float(expected), abs=1e-4)


def spoiled(change: Callable[[dict[str, Any]], None] | None = None, after: Any = None, dtype: Any = None) -> nn.Module:
    """Return a tiny model whose inputs or logits are changed."""
    model = tiny("llama", dtype=dtype or torch.float32)
    if change is not None:

        def before(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given = dict(given)
            change(given)
            return args, given

        model.register_forward_pre_hook(before, with_kwargs=True)
    if after is not None:
        model.register_forward_hook(lambda _, args, given, output: after(given, output), with_kwargs=True)
    return model


def read(given: dict[str, Any]) -> int:
    """Return how many tokens are in the cache."""
    cache = given.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0


def shift_positions(given: dict[str, Any], beyond: int = 0) -> None:
    if read(given) > beyond:
        given["position_ids"] = given["position_ids"] + 1


def test_a_wrong_cache_is_not_used_and_this_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = spoiled(shift_positions)
    used: list[Way] = []
    with caplog.at_level(logging.WARNING):
        assert answer(model, JOBS, used.append) == [plain(model, job) for job in JOBS]
        answer(model, JOBS, used.append)
    assert [way.cached for way in used] == [False, False]
    assert "differ from those of a full forward pass by" in used[0].notice
    assert [record.getMessage() for record in caplog.records] == [
        f"models of type llama are decoded slowly, by {used[0].notice}"
    ]


def test_a_cache_that_is_wrong_by_less_than_rounding_in_16_bits_is_found() -> None:
    def little(given: dict[str, Any], output: Any) -> Any:
        if read(given) > given["input_ids"].shape[1]:
            noise = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(0))
            output.logits = output.logits + (0.004 * output.logits.float().std() * noise).to(output.logits.dtype)
        return output

    for dtype in (torch.float32, torch.bfloat16):
        model = spoiled(after=little, dtype=dtype)
        with evaluation_mode(model):
            assert not decoding_way(model).cached, dtype


def test_a_mask_that_is_not_looked_at_leaves_prompts_of_one_length_together() -> None:
    model = spoiled(lambda given: given.pop("attention_mask", None))  # type: ignore[arg-type,return-value]
    used: list[Way] = []
    assert answer(model, JOBS, used.append) == [plain(model, job) for job in JOBS]
    assert used == [Way(False, True, False)] and used[0].notice == ""


def test_rows_that_act_on_each_other_are_run_one_at_a_time() -> None:
    def mixed(given: dict[str, Any], output: Any) -> Any:
        output.logits = output.logits + output.logits.mean(dim=0, keepdim=True).roll(1, dims=-1)
        return output

    model = spoiled(after=mixed)
    used: list[Way] = []
    assert answer(model, JOBS, used.append) == [plain(model, job) for job in JOBS]
    assert not used[0].cached and "one row at a time" in used[0].notice
    notices: list[str] = []
    pairs = [Pair(ids[:-1], ids[-1:]) for ids in prompts(9, 4, 3)]
    with evaluation_mode(model):
        found = log_likelihoods(model, pairs, batch_size=4, done=lambda _: None, noticed=notices.append)
        alone = [log_likelihoods(model, [pair], batch_size=1, done=lambda _: None)[0] for pair in pairs]
    assert found == alone and notices[0].startswith("one row at a time: logits")


def backwards(given: dict[str, Any], output: Any) -> Any:
    output.logits = output.logits + output.logits.flip(1)
    return output


def by_chance(given: dict[str, Any], output: Any) -> Any:
    output.logits = output.logits + torch.randn_like(output.logits)
    return output


@pytest.mark.parametrize("after", [backwards, by_chance])
def test_what_is_not_causal_is_refused(after: Any) -> None:
    model = spoiled(after=after)
    for ask in (decoding_way, reading_way):
        with evaluation_mode(model), pytest.raises(UserError, match="models of type llama cannot be decoded here: its"):
            ask(model)


def test_a_forward_pass_that_fails_is_refused_in_one_line() -> None:
    def fail(given: dict[str, Any]) -> None:
        raise RuntimeError("mat1 and mat2 shapes\ncannot be multiplied")

    with pytest.raises(UserError, match="its forward pass fails: mat1 and mat2 shapes$"):
        answer(spoiled(fail), JOBS)


def test_what_is_attached_later_is_another_case() -> None:
    model = tiny("llama")
    used: list[Way] = []
    answer(model, JOBS, used.append)
    handle = model.register_forward_pre_hook(
        lambda _, args, given: (shift_positions(given), (args, given))[1], with_kwargs=True
    )
    assert answer(model, JOBS, used.append) == [plain(model, job) for job in JOBS]
    handle.remove()
    answer(model, JOBS, used.append)
    assert [way.cached for way in used] == [True, False, True]


def test_what_is_zero_at_its_start_is_tried_again_at_the_second_use() -> None:
    size = torch.zeros(1)

    def added(given: dict[str, Any], output: Any) -> Any:
        if read(given) > given["input_ids"].shape[1]:
            output.logits = output.logits + size * output.logits.roll(1, dims=-1)
        return output

    model = spoiled(after=added)
    used: list[Way] = []
    answer(model, JOBS, used.append)
    size.fill_(1.0)
    assert answer(model, JOBS, used.append) == [plain(model, job) for job in JOBS]
    assert [way.cached for way in used] == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_is_wrong_for_long_prompts_only_is_found_in_use(dtype: torch.dtype) -> None:
    def far(given: dict[str, Any], output: Any) -> Any:
        if read(given) > 40:
            output.logits = output.logits.roll(1, dims=-1)
        return output

    model = spoiled(after=lambda given, output: far(given, output), dtype=dtype)
    jobs = [job._replace(stop=()) for job in jobs_of(60, 50, 47)]
    used: list[Way] = []
    with evaluation_mode(model):
        assert decoding_way(model).cached
    truth = [plain(model, job) for job in jobs]
    for _ in range(5):
        assert answer(model, jobs, used.append) == truth
    assert not any(way.cached for way in used)


def test_switching_an_adapter_is_another_case_and_both_are_right() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)).eval()
    on = answer(model, JOBS)
    assert on == [plain(model, job) for job in JOBS]
    with model.disable_adapter():
        off = answer(model, JOBS)
        assert off == [plain(model, job) for job in JOBS]
    assert on != off


def test_prompts_that_the_models_own_loop_gets_wrong_are_decoded_by_full_passes() -> None:
    torch.manual_seed(0)
    base = tiny("llama")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(std=0.5)
    used: list[Way] = []
    expected = [plain(model, job) for job in JOBS]
    assert answer(model, JOBS, used.append) == expected
    generate = model.generate
    model.generate = lambda *args, **given: _rolled(generate(*args, **given))  # type: ignore[method-assign]
    with evaluation_mode(model):
        decoding_way(model)
    base.register_forward_hook(lambda *_: None)  # another case: it is tried anew
    assert answer(model, JOBS, used.append) == expected
    assert [(way.own, way.cached) for way in used] == [(True, True), (False, False)]


def _rolled(found: Any) -> Any:
    if hasattr(found, "logits"):
        found.logits = tuple(logits.roll(1, dims=-1) for logits in found.logits)
    return found


def test_the_trial_leaves_no_trace() -> None:
    model = tiny("rwkv")
    model.train()
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    with evaluation_mode(model):
        decoding_way(model)
        reading_way(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["rwkv", "llama"])
def test_records_say_how_a_model_had_to_be_run(family: str) -> None:
    model = tiny(family)
    engine = ModelEngine(Loaded(ModelSpec(name="toy"), model, TOKENIZER, "path"), model, batch_size=2, progress=False)  # type: ignore[arg-type]
    requests: list[Any] = [
        SimpleNamespace(args=(text, {"max_gen_toks": 3}), task_name="t", doc_id=place, idx=0)
        for place, text in enumerate(("ab", "b", "abc"))
    ]
    with evaluation_mode(model):
        engine.generate_until(requests)
    told = described(engine, Kind.GENERATE)
    assert (DECODING in told) == (family in SLOW) and READING not in told
    assert DECODING not in described(engine, Kind.CHOICE)
    measures = latency_measures(model, repeats=1, prompt_tokens=4, new_tokens=2)
    assert all(("a full forward pass at every step" in one.how) == (family in SLOW) for one in measures)
    spec = RLSpec(
        objective="grpo", task=TaskSpec(name="t", revision="1"), schedule=Schedule(steps=1), learning_rate=1e-3
    )
    rollouts = Rollouts(model, TOKENIZER, spec, limit=3, stop=(), dtype="float32")  # type: ignore[arg-type]
    assert DECODING not in rollouts.describe()
    rollouts.sample(prompts(5, 3), [1, 2], 0)
    assert (DECODING in rollouts.describe()) == (family in SLOW)


def test_logits_that_are_not_finite_prove_nothing_and_end_their_rows() -> None:
    model = spoiled(after=lambda given, output: SimpleNamespace(logits=output.logits * torch.nan))
    with evaluation_mode(model):
        found = decode(model, TOKENIZER, JOBS, batch_size=8, done=lambda _: None)
    assert not any(one.finite for one in found)
