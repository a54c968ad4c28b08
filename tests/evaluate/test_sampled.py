"""Several sampled answers to each item: seeds, scores, pass@k, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from evaluate_toys import Write, card, make, spec
from lm_eval.api.instance import Instance

from peft_arena.core.errors import UserError
from peft_arena.core.passk import pass_at_k
from peft_arena.core.specs import EvalSpec, Sampling, TaskSpec
from peft_arena.evaluate.adapter import Question, prepare
from peft_arena.evaluate.engine import ModelEngine
from peft_arena.evaluate.run import evaluate
from peft_arena.evaluate.samples import Samples
from peft_arena.models.load import Loaded
from peft_arena.models.modes import evaluation_mode
from peft_arena.store.records import EvaluationRecord
from peft_arena.tasks.base import ACCURACY, Item, Kind, Metric, Part, Score

SAMPLING = Sampling(samples=4, k=(1, 2, 4))
POINT: dict[str, Any] = {"run_id": "r", "step": 0, "factor": 1.0, "progress": False}


class Marked(Write):
    """Scores depend on what is written: full marks, half, none, or a failure."""

    card = card("marked", Kind.GENERATE, (ACCURACY, Metric(name="length", unit="characters", better="neither")))

    def score(self, item: Item, completion: str) -> Score:
        kind = len(completion) % 4
        if kind == 3:
            raise ZeroDivisionError("oops")
        return Score((0.0, 0.5, 1.0)[kind], others={"length": Part(float(len(completion)))})


def marked(name: str, config: Any) -> Any:
    return Marked() if name == "marked" else make(name, config)


def run(loaded: Loaded, sampling: Sampling | None = SAMPLING, name: str = "marked", **more: Any) -> EvaluationRecord:
    task = TaskSpec(name=name, revision="1")
    return evaluate(loaded, loaded.model, EvalSpec(task=task, sampling=sampling), **{**POINT, "make": marked, **more})


def test_items_hold_every_sample_and_their_scores(loaded: Loaded) -> None:
    record = run(loaded)
    task = Marked()
    lost = 0
    for found in record.items:
        assert found.output == "" and len(found.outputs) == 4
        values = [None if len(text) % 4 == 3 else (0.0, 0.5, 1.0)[len(text) % 4] for text in found.outputs]
        known = [value for value in values if value is not None]
        if not known:
            assert found.value is None and found.others == {}
            continue
        assert found.value == pytest.approx(sum(known) / len(known))
        right = sum(value == 1.0 for value in known)
        for k in SAMPLING.k:
            assert found.others[f"pass@{k}"] == (pytest.approx(pass_at_k(4, right, k)), 1.0)
        lengths = [len(text) for text, value in zip(found.outputs, values, strict=True) if value is not None]
        assert found.others["length"][0] == pytest.approx(sum(lengths) / len(lengths))
        gone = 4 - len(known)
        assert (
            found.reason.startswith(f"{gone} of 4 samples could not be scored: scoring failed")
            if gone
            else (found.reason == "")
        )
        lost += gone
    assert lost and any(len(set(found.outputs)) > 1 for found in record.items)
    assert [item.id for item in record.items] == [item.id for item in task.items("test")]


def test_the_measures_are_means_over_items(loaded: Loaded) -> None:
    record = run(loaded)
    assert [m.metric for m in record.metrics] == ["accuracy", "length", "pass@1", "pass@2", "pass@4"]
    for measure in record.metrics[2:]:
        values = [item.others[measure.metric][0] for item in record.items if item.value is not None]
        assert measure.value == pytest.approx(sum(values) / len(values)) and measure.stderr is not None
        assert (measure.unit, measure.better, measure.n) == ("fraction", "higher", len(values))
        assert "4 samples of each item at temperature 1, seed 0, scored by the task" in measure.how
    assert record.metrics[2].value < record.metrics[4].value
    cut = run(loaded, Sampling(samples=2, temperature=0.5, top_k=9, top_p=0.75, seed=3)).metrics[0].how
    assert "2 samples of each item at temperature 0.5, top_k 9, top_p 0.75, seed 3" in cut


def test_samples_depend_on_seed_and_item_and_nothing_else(loaded: Loaded) -> None:
    first = [item.outputs for item in run(loaded, batch_size=64).items]
    assert [item.outputs for item in run(loaded, batch_size=3).items] == first
    more = [item.outputs[:4] for item in run(loaded, Sampling(samples=6)).items]
    assert more == first, "the first samples of more are the same"
    assert [item.outputs for item in run(loaded, Sampling(samples=4, seed=1)).items] != first


def test_every_item_and_sample_has_a_seed_of_its_own(loaded: Loaded) -> None:
    task = Write()
    asked = [prepare(task, item, loaded.tokenizer, SAMPLING) for item in task.items("test")]
    seeds = [request[1]["seed"] for one in asked if isinstance(one, Question) for request in one.requests]
    assert len(set(seeds)) == len(seeds) == 80


def test_cold_samples_are_the_greedy_answer(loaded: Loaded) -> None:
    greedy = evaluate(loaded, loaded.model, spec("write"), **POINT, make=make)
    cold = run(loaded, Sampling(samples=2, temperature=1e-6), name="write")
    assert [item.outputs for item in cold.items] == [(item.output, item.output) for item in greedy.items]


def test_a_record_without_samples_says_nothing_of_them(loaded: Loaded) -> None:
    greedy, sampled = run(loaded, None).model_dump_json(), run(loaded).model_dump_json()
    assert "outputs" not in greedy and "sampling" not in greedy and "pass@" not in greedy
    assert EvaluationRecord.model_validate_json(greedy).model_dump_json() == greedy
    assert EvaluationRecord.model_validate_json(sampled).model_dump_json() == sampled


def test_samples_of_infinite_logits_are_unscored(loaded: Loaded) -> None:
    loaded.model.model.norm.weight.data.fill_(float("nan"))
    record = run(loaded)
    assert record.metrics[0].value is None
    assert all("not finite" in item.reason and item.value is None for item in record.items)


@pytest.mark.parametrize("name", ["choose", "text"])
def test_only_tasks_that_generate_are_sampled(loaded: Loaded, name: str) -> None:
    with pytest.raises(UserError, match=f"sampling cannot be asked of task {name}: it compares likelihoods"):
        run(loaded, name=name)


def test_tasks_of_lm_eval_and_tasks_without_full_marks_are_refused(loaded: Loaded) -> None:
    with pytest.raises(UserError, match="sampling cannot be asked of lm-eval:gsm8k"):
        run(loaded, name="lm-eval:gsm8k")

    class Unbounded(Write):
        card = card("marked", Kind.GENERATE, (Metric(name="points", unit="points", better="higher"),))

    with pytest.raises(UserError, match="its points is no fraction"):
        run(loaded, make=lambda name, config: Unbounded())


def test_weights_of_partial_scores_are_kept() -> None:
    scores = [Score(1.0, weight=3.0), Score(0.0, weight=1.0), Score(float("nan"), weight=1.0)]
    found = Samples(Sampling(samples=3), scores, ["a", "b", "c"]).score
    assert (found.value, found.weight) == (0.75, 2.0)
    assert found.others["pass@1"].value == pytest.approx(1 / 3)
    assert found.reason == "1 of 3 samples could not be scored: the value is not finite: nan"
    assert Samples(Sampling(samples=2), [Score(None, reason="x")] * 2, ["", ""]).score.value is None


def request(engine: ModelEngine, *settings: dict[str, Any]) -> list[str]:
    made = [
        Instance("generate_until", {}, ("an ant", {"until": [], "max_gen_toks": 8, **one}), 0, ("t", 0, 1))
        for one in settings
    ]
    return engine.generate_until(made)


def test_lm_evals_own_sampling_is_reproducible(loaded: Loaded) -> None:
    with evaluation_mode(loaded.model):
        engine = ModelEngine(loaded, loaded.model, progress=False)
        hot: dict[str, Any] = {"do_sample": True, "temperature": 1.5}
        found = request(engine, hot, hot, {**hot, "top_p": 0.9}, {"do_sample": False})
        assert found == request(engine, hot, hot, {**hot, "top_p": 0.9}, {"do_sample": False})
        assert found[0] != found[1], "the same request, asked again, has a seed of its own"
        assert request(engine, {**hot, "seed": 5}) == request(engine, {"do_sample": False}, {**hot, "seed": 5})[1:]
        assert found[3] == request(engine, {"temperature": 0.0})[0]
        assert found[3] == request(engine, {"do_sample": True, "temperature": 0})[0], "0 is greedy, not 1"
        assert found[3] == request(engine, {"do_sample": True, "temperature": 0.0, "typical_p": 0.9})[0]
        assert found[3] != request(engine, {"do_sample": True})[0], "without a temperature it is 1"
        with pytest.raises(UserError, match="num_beams 10"):
            request(engine, {"num_beams": 10})
