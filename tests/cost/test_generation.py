"""The generation benchmark: what is counted, in which order, and what is said where nothing could be measured."""

from __future__ import annotations

import pytest
from cost_toys import Adapter, llama

from peft_arena.core.errors import UserError
from peft_arena.cost import latency
from peft_arena.cost.generation import (
    BASE,
    MERGED,
    OWN,
    GenerationSpec,
    generation_measures,
    memory_measures,
    metric_name,
)
from peft_arena.cost.latency import Timing

NEW = 3


def spec(*lengths: int, repeats: int = 2, batch_size: int = 1) -> GenerationSpec:
    return GenerationSpec(
        prompt_lengths=lengths, new_tokens=NEW, repeats=repeats, batch_size=batch_size, device="test", threads=1
    )


class Clock:
    """Runs slowly at first: every reading of a round that is not counted takes 1000 s, later ones 2 s."""

    def __init__(self, slow: int) -> None:
        self.readings, self.slow, self.now = 0, slow, 0.0

    def __call__(self) -> float:
        self.readings += 1
        self.now += 1000.0 if self.readings <= self.slow else 2.0
        return self.now


def test_warm_up_is_not_counted_and_batches_generate_every_token() -> None:
    variants = {OWN: llama(), BASE: llama()}
    each = len(variants) * 2 * (1 + NEW)  # a reading at the start and at every token
    clock = Clock(slow=each)
    found = {one.metric: one for one in generation_measures(variants, spec(4, 8, batch_size=2), clock=clock)}
    assert clock.readings == 3 * each, "one warm-up and two counted rounds"
    for length in (4, 8):
        for metric, unit in (("time_to_first_token", "seconds"), ("time_per_token", "seconds/token")):
            for variant in (OWN, BASE):
                one = found[metric_name(metric, length, variant)]
                assert (one.value, one.n, one.unit) == (2.0, 2, unit), "no warm-up among them"
                assert found[f"{one.metric}_spread"].value == 0.0
                assert f"prompt of {length} random tokens, 3 new" in one.how and "batch 2" in one.how
            assert found[metric_name(metric, length, OWN, "_ratio")].value == 1.0
    assert not [name for name in found if "base_ratio" in name]


def test_variants_take_turns_and_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {OWN: llama(), MERGED: llama(), BASE: llama()}
    names = {id(model): name for name, model in models.items()}
    order: list[tuple[int, str]] = []
    drift = {OWN: 3.0, MERGED: 1.0, BASE: 1.0}

    def timed(model: object, ids, new_tokens: int, clock: object, **how: object) -> Timing:  # type: ignore[no-untyped-def]
        name = names[id(model)]
        order.append((ids.shape[1], name))
        load = 10.0 ** ((len(order) - 1) // 6)  # the machine gets ten times slower every round
        tokens = ((1, 2, 3),) if name != MERGED else ((1, 2, 4),)
        return Timing(drift[name] * load, drift[name] * load, tokens)

    monkeypatch.setattr(latency, "time_generation", timed)
    found = {one.metric: one for one in generation_measures(models, spec(4, 8, repeats=3))}
    rounds = [order[start : start + 6] for start in range(0, len(order), 6)]
    assert len(rounds) == 4 and all(sorted(one) == sorted(rounds[0]) for one in rounds)
    assert [one[0][1] for one in rounds] == [OWN, MERGED, BASE, OWN], "none is always first"
    assert [length for length, _ in rounds[1]] == [4, 4, 4, 8, 8, 8]
    for metric in ("time_to_first_token", "time_per_token"):
        ratio, spread = found[f"{metric}_p4_ratio"], found[f"{metric}_p4_ratio_spread"]
        assert (ratio.value, spread.value) == (pytest.approx(3.0), pytest.approx(0.0)), "round by round, no drift in it"
    assert found["time_per_token_p4_spread"].value == pytest.approx(3 * (1000 - 10))
    assert found["tokens_in_common_p8_merged"].value == 2.0


def test_lengths_without_room_have_no_times_but_a_reason() -> None:
    model = llama(context=16)
    found = {one.metric: one for one in generation_measures({OWN: model}, spec(4, 14))}
    assert found["time_per_token_p4"].n == 2
    for metric in ("time_to_first_token_p14", "time_per_token_p14"):
        assert found[metric].value is None and "14 + 3 tokens are more than the context of 16" in found[metric].how
    with pytest.raises(UserError, match="no prompt length of 14, 20 leaves room for 3 new tokens: the model takes 16"):
        generation_measures({OWN: model}, spec(14, 20))


def test_memory_is_of_the_longest_prompt_that_fits_and_the_model_is_left_alone() -> None:
    attached = Adapter(llama(context=16))
    before = [(p.requires_grad, attached.model.training) for p in attached.model.parameters()]
    (found,) = [one for one in memory_measures(attached.model, spec(4, 8, 14)) if "reserved" not in one.metric]
    assert found.metric == "peak_memory_generation" and found.how.endswith("one generation of 1 x 8 + 3 tokens")
    assert [(p.requires_grad, attached.model.training) for p in attached.model.parameters()] == before


def test_settings_and_machine_make_the_key() -> None:
    one = spec(4)
    assert one.key == spec(4).key and one.key.startswith("generation-")
    others = [spec(5), spec(4, repeats=3), spec(4, batch_size=2), one.model_copy(update={"device": "other"})]
    assert len({one.key, *(other.key for other in others)}) == 5
