"""Evaluate a model on tasks: one record per task, with every item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.core.provenance import provenance
from peft_arena.core.specs import OWN, PathSpec
from peft_arena.evaluate.metrics import measures, sampling_refusal
from peft_arena.store.records import DECODING, READING, EvaluationRecord, ItemRecord, Written
from peft_arena.tasks.base import Item, Kind, Score, Task
from peft_arena.tasks.foreign import is_foreign
from peft_arena.tasks.registry import check_version, make_task

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from torch import nn

    from peft_arena.core.specs import EvalSpec
    from peft_arena.evaluate.adapter import Question
    from peft_arena.evaluate.engine import Engine
    from peft_arena.models.load import Loaded

HOW = {
    Kind.GENERATE: "greedy decoding, scored by the task",
    Kind.CHOICE: "log-likelihood of each option after the prompt, scored by the task",
    Kind.TEXT: "log-likelihood of every token of the text",
}

MakeTask = Callable[[str, Mapping[str, Any]], Task]


class Outcome(NamedTuple):
    """What the evaluation of one spec gave."""

    card: dict[str, Any]
    metrics: tuple[Any, ...]
    items: tuple[ItemRecord, ...]
    engine: dict[str, Any]
    written: Written | None = None


def evaluate(
    loaded: Loaded,
    model: nn.Module | LM,
    spec: EvalSpec,
    *,
    run_id: str,
    step: int,
    factor: float,
    batch_size: int | None = None,
    progress: bool = True,
    make: MakeTask | None = None,
) -> EvaluationRecord:
    """Evaluate a model on the items of one task.

    Args:
        loaded: the model's tokenizer and description.
        model: the model to evaluate, which is left as it was: the loaded one, an adapter around it, or an engine of
            lm-eval such as :class:`peft_arena.testing.engine.ScriptedModel`.
        spec: which items of which task; ``lm-eval:NAME`` for a task of lm-eval.
        run_id: the run the weights belong to.
        step: optimizer step of the weights.
        factor: how far along the run's change of weights; 1 is the trained weights.
        batch_size: rows in one forward pass; None chooses by the model's size. Results do not depend on it.
        progress: show progress bars.
        make: gives a task by name and settings; the registered tasks if not given.

    Raises:
        UserError: the task is unknown, its version differs, it has no or too few items, or its data cannot be found.
    """
    (record,) = evaluate_many(
        loaded,
        model,
        [spec],
        run_id=run_id,
        step=step,
        factor=factor,
        batch_size=batch_size,
        progress=progress,
        make=make,
    )
    return record


def evaluate_many(
    loaded: Loaded,
    model: nn.Module | LM,
    specs: Sequence[EvalSpec],
    *,
    run_id: str,
    step: int,
    factor: float,
    path: PathSpec = OWN,
    batch_size: int | None = None,
    progress: bool = True,
    make: MakeTask | None = None,
) -> list[EvaluationRecord]:
    """Evaluate a model on several tasks in one call of lm-eval; see :func:`evaluate`.

    Args:
        loaded: the model's tokenizer and description.
        model: the model to evaluate.
        specs: which items of which tasks.
        run_id: the run the weights belong to.
        step: optimizer step of the weights.
        factor: how far along the path.
        path: along which the factor moves the weights.
        batch_size: rows in one forward pass.
        progress: show progress bars.
        make: gives a task by name and settings.

    Returns:
        One record per spec, in their order.

    Raises:
        UserError: as :func:`evaluate`; nothing is run then. Or two specs are the same.
    """
    if len({spec.id for spec in specs}) < len(specs):
        raise UserError("the same evaluation is asked for twice")
    ours = [spec for spec in specs if not is_foreign(spec.task.name)]
    theirs = [spec for spec in specs if is_foreign(spec.task.name)]
    sampled = next((spec.task.name for spec in theirs if spec.sampling is not None), None)
    if sampled is not None:
        raise UserError(f"sampling cannot be asked of {sampled}: tasks of lm-eval say themselves how they are answered")
    found = _evaluate_ours(loaded, model, ours, batch_size, progress, make) if ours else {}
    if theirs:
        from peft_arena.evaluate.harness import evaluate_harness

        for spec in theirs:
            found[spec.id] = Outcome(*evaluate_harness(loaded, model, spec, batch_size, progress))
    return [
        EvaluationRecord(
            run_id=run_id,
            step=step,
            factor=factor,
            path=path,
            spec=spec,
            provenance=provenance(),
            **found[spec.id]._asdict(),
        )
        for spec in specs
    ]


def _evaluate_ours(
    loaded: Loaded,
    model: nn.Module | LM,
    specs: Sequence[EvalSpec],
    batch_size: int | None,
    progress: bool,
    make: MakeTask | None,
) -> dict[str, Outcome]:
    from lm_eval.evaluator import evaluate as lm_evaluate

    from peft_arena.evaluate.adapter import SCORE, Adapter, Question, prepare
    from peft_arena.evaluate.samples import Samples, item_record, item_score, passk_metrics, with_settled_rates
    from peft_arena.evaluate.session import session

    chosen = [(spec, *_select(spec, make)) for spec in specs]
    with session(loaded, model, batch_size=batch_size, progress=progress) as engine:
        asked = [
            (spec, task, items, [prepare(task, item, loaded.tokenizer, spec.sampling) for item in items])
            for spec, task, items in chosen
        ]
        adapters = {
            spec.id: Adapter(spec.id, task, questions, engine, spec.sampling)
            for spec, task, _, prepared in asked
            if (questions := [found for found in prepared if isinstance(found, Question)])
        }
        # lm-eval's evaluate, not simple_evaluate: the latter seeds the global random generators and inspects the
        # machine in subprocesses for half a second on each call
        results = lm_evaluate(engine, {"tasks": adapters}, bootstrap_iters=0) if adapters else {"samples": {}}
        outcomes: dict[str, Outcome] = {}
        for spec, task, items, prepared in asked:
            answers = iter(sorted(results["samples"].get(spec.id, []), key=lambda sample: sample["doc_id"]))
            one = task.card.kind is Kind.GENERATE and spec.sampling is None
            found: list[Score | Samples] = []
            said: list[str] = []
            for question in prepared:
                if isinstance(question, Score):
                    found.append(question)
                    said.append("")
                    continue
                answer = next(answers)
                found.append(answer[SCORE])
                said.append(str(answer["filtered_resps"][0]) if one else "")
            scores = [item_score(score) for score in found]
            settled = task.settle(items, scores)
            if spec.sampling is not None:
                settled = with_settled_rates(task, items, scores, settled, spec.sampling)
            records = list(map(item_record, items, found, said, settled))
            how = f"lm-eval {engine.describe()['version']}, {_how(spec, task.card.kind)}"
            metrics = (*task.card.metrics, *(passk_metrics(spec.sampling) if spec.sampling else ()))
            numbers = measures(metrics, records, how)
            outcomes[spec.id] = Outcome(
                task.card_as_loaded().model_dump(mode="json"),
                numbers,
                tuple(records),
                described(engine, task.card.kind),
                _written(engine, spec, task, adapters[spec.id].questions if spec.id in adapters else ()),
            )
    return outcomes


def described(engine: Engine, kind: Kind) -> dict[str, Any]:
    """Return an engine's description for a task, without what it says of requests of other kinds."""
    other = READING if kind is Kind.GENERATE else DECODING
    return {name: value for name, value in engine.describe().items() if name != other}


def _written(engine: Engine, spec: EvalSpec, task: Task, questions: Sequence[Question]) -> Written | None:
    """Count the answers that met the limit of new tokens; None where nothing was written."""
    if task.card.kind is not Kind.GENERATE:
        return None
    asked = [key for number in range(len(questions)) if (key := (spec.id, number)) not in engine.rejected]
    samples = 1 if spec.sampling is None else spec.sampling.samples
    met = sum(engine.met_limit[key] for key in asked)
    return Written(answers=len(asked) * samples, met_limit=met, limit=task.generation.max_new_tokens)


def _how(spec: EvalSpec, kind: Kind) -> str:
    """Say how answers were obtained."""
    sampling = spec.sampling
    if sampling is None:
        return HOW[kind]
    return f"{sampling.samples} samples of each item at {sampling.words}, seed {sampling.seed}, scored by the task"


def _select(spec: EvalSpec, make: MakeTask | None) -> tuple[Task, list[Item]]:
    """Return the task of a spec and the items that are asked for."""
    task = (make or make_task)(spec.task.name, spec.task.config)
    check_version(task, spec.task)
    if spec.sampling is not None and (why := sampling_refusal(task.card)):
        raise UserError(f"sampling cannot be asked of task {task.card.name}: {why}")
    name = task.card.name
    items = task.items(spec.split)
    if not items:
        raise UserError(f"task {name} has no items in its {spec.split} split")
    if spec.items is not None and spec.items > len(items):
        raise UserError(f"task {name} has {len(items)} items in its {spec.split} split; {spec.items} were asked for")
    return task, list(items[: spec.items])


__all__ = ["Engine", "Outcome", "evaluate", "evaluate_many"]
