"""Memory, latency, PSCP and the cost records."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cost_toys import PUBLISHED, Adapter, Whole, llama

from peft_arena.core.measure import Measure
from peft_arena.cost import memory
from peft_arena.cost.flops import forward_flops
from peft_arena.cost.latency import latency_measures, median_measure, time_generation
from peft_arena.cost.memory import PeakMemory
from peft_arena.cost.pscp import PscpConstants, pscp
from peft_arena.cost.record import inference_cost, training_cost
from peft_arena.store.records import CostRecord, Rollouts

MEGA = 1_000_000
BLOCK = 200 * MEGA


@pytest.mark.parametrize("resettable", [True, False])
def test_peak_memory_sees_a_block_that_is_gone_at_the_end(resettable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resettable:
        monkeypatch.setattr(memory, "CLEAR_REFS", Path("/nowhere/clear_refs"))
    elif not memory._reset_peak():
        pytest.skip("the kernel's high-water mark cannot be reset here")
    with PeakMemory("test", cuda=False) as peak:
        block = np.ones(BLOCK, dtype=np.uint8)
        time.sleep(0.1)
        del block
    (found,) = peak.measures
    assert found.metric == "peak_memory_test" and found.unit == "bytes"
    assert found.value == pytest.approx(BLOCK, rel=0.1)
    assert ("VmHWM" in found.how) == resettable


def test_peak_memory_starts_anew_each_time() -> None:
    with PeakMemory("first", cuda=False):
        np.ones(BLOCK, dtype=np.uint8)
    with PeakMemory("second", cuda=False) as peak:
        pass
    assert peak.measures[0].value is not None and peak.measures[0].value < BLOCK / 10


def test_a_block_inside_another_takes_nothing_from_it() -> None:
    with PeakMemory("outer", cuda=False) as outer:
        np.ones(BLOCK, dtype=np.uint8)
        with PeakMemory("inner", cuda=False) as inner:
            np.ones(BLOCK // 4, dtype=np.uint8)
    assert outer.measures[0].value == pytest.approx(BLOCK, rel=0.1)
    assert inner.measures[0].value == pytest.approx(BLOCK // 4, rel=0.2)


def test_peak_memory_is_known_only_after_the_block() -> None:
    with PeakMemory("test", cuda=False) as peak, pytest.raises(RuntimeError, match="after the block"):
        _ = peak.measures


def test_latency_with_and_without_the_adapter() -> None:
    attached = Adapter(llama())
    base = llama()
    state = torch.get_rng_state()
    start = time.perf_counter()
    found = {m.metric: m for m in latency_measures(attached.model, base, repeats=3, new_tokens=6)}
    assert time.perf_counter() - start < 20
    assert set(found) == {"time_to_first_token", "time_per_token", "time_to_first_token_base", "time_per_token_base"}
    for measure in found.values():
        assert measure.value is not None and 0 < measure.value < 2 and measure.n == 3 and measure.stderr is not None
    assert "without the method" in found["time_per_token_base"].how
    assert torch.equal(state, torch.get_rng_state())


def test_a_generation_takes_its_first_and_its_further_tokens() -> None:
    model = llama()
    ids = torch.randint(2, 800, (1, 64))
    start = time.perf_counter()
    found = time_generation(model, ids, 8)
    total = time.perf_counter() - start
    assert found.first_s + 7 * found.token_s <= total
    assert found.first_s + 7 * found.token_s > 0.5 * total
    expected = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, 64:]
    assert found.tokens == tuple(tuple(row) for row in expected.tolist())


def test_median_and_its_error() -> None:
    found = median_measure("m", [1.0, 2.0, 9.0], "seconds", "how")
    assert found.value == 2.0
    assert found.stderr == pytest.approx(1.2533 * float(np.std([1, 2, 9], ddof=1)) / 3**0.5)
    assert median_measure("m", [1.0], "seconds", "how").stderr is None


@pytest.mark.parametrize(("performance", "parameters", "tera", "giga", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_pscp_gives_the_published_values(
    performance: float, parameters: int, tera: float, giga: float, expected: float
) -> None:
    assert pscp(performance, parameters, tera * 1e12, giga * 1e9) == pytest.approx(expected, abs=0.01)


def test_pscp_exponents() -> None:
    twice = PscpConstants(beta_parameters=2, beta_flops=2, beta_memory=2)
    assert pscp(1.0, 5e8, 10e12, 94e9) == pytest.approx(1 / 8)
    assert pscp(1.0, 5e8, 10e12, 94e9, twice) == pytest.approx(1 / 64)
    with pytest.raises(ValueError, match="memory must be finite"):
        pscp(1.0, 0, 0, -1)


def test_training_record(tmp_path: Path) -> None:
    attached = Adapter(llama())
    attached.save(tmp_path)
    with PeakMemory("training", cuda=False) as peak:
        pass
    record = training_cost(
        attached,
        run_id="r",
        tokens=500,
        mean_length=20,
        seconds=1.5,
        real_tokens=300,
        memory=peak.measures,
        checkpoint=tmp_path,
    )
    names = [m.metric for m in record.measures]
    assert names == [
        "trained_parameters", "total_parameters", "trained_share", "training_flops_per_token", "training_flops",
        "peak_memory_training", "training_time", "training_speed", "checkpoint_bytes",
    ]  # fmt: skip
    assert record.stage == "training" and all(m.how for m in record.measures)
    assert CostRecord.model_validate_json(record.model_dump_json()) == record


def test_rollouts_stand_beside_the_updates() -> None:
    attached = Adapter(llama(context=64))
    rollouts = Rollouts(
        engine={}, completions=10, groups=5, prompt_tokens=120, generated_tokens=80, unscored=0, rollout_seconds=5.0,
        scoring_seconds=1.0, update_seconds=3.0, samples=(),
    )  # fmt: skip

    def measured(made: Rollouts | None) -> dict[str, Measure]:
        record = training_cost(attached, run_id="r", tokens=500, mean_length=20, seconds=9.0, rollouts=made)
        return {found.metric: found for found in record.measures}

    without, found = measured(None), measured(rollouts)
    assert list(found)[: len(without)] == list(without)
    assert all(found[name].value == without[name].value for name in without)
    added = {name: (found[name].value, found[name].unit) for name in found if name not in without}
    assert list(added.items())[:-1] == [
        ("rollout_time", (5.0, "seconds")), ("scoring_time", (1.0, "seconds")), ("update_time", (3.0, "seconds")),
        ("generated_tokens", (80, "tokens")), ("rollout_speed", (20.0, "tokens/second")),
    ]  # fmt: skip
    operations = found["rollout_flops"]
    assert operations.value == pytest.approx(forward_flops(attached.model, 20) * 10)
    assert "200 tokens of prompts and completions" in operations.how and "1 x 20 tokens" in operations.how

    long = measured(rollouts.model_copy(update={"completions": 1}))["rollout_flops"]
    assert long.value == pytest.approx(forward_flops(attached.model, 64) / 64 * 200), "no sequence is over the context"
    none = measured(
        rollouts.model_copy(
            update=dict.fromkeys(("completions", "prompt_tokens", "generated_tokens", "rollout_seconds"), 0)
        )
    )
    assert none["rollout_flops"].value is None and "nothing was generated" in none["rollout_flops"].how
    assert "rollout_speed" not in none


def test_inference_record_with_and_without_a_base() -> None:
    attached = Adapter(llama())
    flags = [p.requires_grad for p in attached.model.parameters()]
    record = inference_cost(attached, run_id="r", base=llama(), repeats=2, new_tokens=3)
    assert [p.requires_grad for p in attached.model.parameters()] == flags
    found = {m.metric: m.value for m in record.measures}
    assert found["extra_forward_flops_512"] == pytest.approx(2 * 5 * 8 * 448 * 512)
    assert "time_per_token_base" in found
    whole = inference_cost(Whole(llama()), run_id="r", repeats=2, new_tokens=3)
    found = {m.metric: m.value for m in whole.measures}
    assert found["extra_forward_flops_512"] is None and "time_per_token_base" not in found
