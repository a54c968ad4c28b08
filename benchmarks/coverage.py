"""How often the analysis is right, on simulated studies whose truth is known.

Every table draws studies, hands their scores to the functions that every report uses, and counts. Answers follow a
threshold model: an item is right if a normal variable, of which 85 % of the variance is the item's and the same for all
models, lies below the quantile of the model's accuracy; two equal models then differ on some 15 % of the items. A
training's accuracy is that of its arm plus a normal deviation, the seed's. With one seed the truth is that run's own
accuracy, since nothing is said of the method, and equal runs have equal accuracies. Clustered items come in passages of
five, which hold half of the item's part. Rates have a Monte Carlo error of sqrt(rate (1 - rate) / studies); a cell is
outside if its 99 % interval (Wilson's) lies wholly outside the promise: coverage 93 to 98 %, false alarms at most 5 %.

    python benchmarks/coverage.py [--quick] [--table NAME] [--studies N] [--processes N]

The whole takes some twenty minutes on two cores; ``--quick`` under one, with a few studies a cell. The tables of
``docs/coverage.md`` are made of what ``python -m scripts.measure coverage`` keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri

from peft_arena.analyze.correlate import fisher_test, spearman
from peft_arena.analyze.estimate import Estimate, Pivot, Term, estimate
from peft_arena.analyze.family import Family, Judgement
from peft_arena.analyze.paired import Contrast, Scores, difference, level, mean_of
from peft_arena.analyze.random_effects import over_independent
from peft_arena.analyze.seed_spread import Pooled, SeedSpread, pooled, wild_arms
from peft_arena.tasks.settle import settle_rates

Cell = dict[str, Any]
SHARED = 0.85
"""Share of the variance behind an answer that is the item's."""
PASSAGE, ALIKE = 5, 0.5
"""Items of a passage, and the share of the item's part that is the passage's."""
ARMS = 5
MARGIN = 0.02
LOW, HIGH, ALARMS = 0.93, 0.98, 0.05
"""What is promised of coverage, at least and at most, and of false alarms."""
Z99 = 2.576
FULL, QUICK = 1000, 20
"""Studies a cell."""
SEEDS, ITEMS = (1, 2, 3, 5, 10), (50, 200, 1000)


class Kind(NamedTuple):
    """Accuracies of the base model and of all arms, and the standard deviation between seeds."""

    base: float
    arms: float
    sd: float
    is_clustered: bool = False


KINDS = {
    "easy": Kind(0.75, 0.85, 0.02),
    "hard": Kind(0.1, 0.3, 0.02),
    "near 0": Kind(0.01, 0.02, 0.005),
    "near 1": Kind(0.98, 0.985, 0.005),
    "clustered": Kind(0.3, 0.6, 0.02, True),
}


class Task:
    """A task's items, and answers of models to them."""

    def __init__(self, rng: np.random.Generator, items: int, sizes: Sequence[int] = ()) -> None:
        self.rng = rng
        self.units = np.repeat(np.arange(len(sizes)), sizes) if sizes else None
        item = rng.normal(size=items)
        if self.units is not None:
            item = np.sqrt(1 - ALIKE) * item + np.sqrt(ALIKE) * rng.normal(size=items)[self.units]
        self.item = np.sqrt(SHARED) * item
        self.ones = np.ones((1, items))

    def answers(self, levels: Sequence[float], seeds: tuple[int | None, ...]) -> Scores:
        """Return the answers of models of these accuracies, one for each seed."""
        own = np.sqrt(1 - SHARED) * self.rng.normal(size=(len(levels), len(self.item)))
        values = (self.item + own < ndtri(np.asarray(levels))[:, None]).astype(float)
        return Scores(seeds, values, np.repeat(self.ones, len(levels), axis=0), self.units)


class Study:
    """Arms of some true accuracies on one task, and what the analysis makes of it."""

    def __init__(
        self,
        rng: np.random.Generator,
        items: int,
        seeds: int,
        base: float,
        arms: Sequence[float],
        sds: Sequence[float],
        *,
        sizes: Sequence[int] = (),
        declared: SeedSpread | None = None,
    ) -> None:
        self.declared = declared
        numbers = tuple(range(seeds))
        draws = [accuracy + sd * rng.normal(size=seeds) for accuracy, sd in zip(arms, sds, strict=True)]
        self.levels = np.clip(draws, 1e-6, 1 - 1e-6)
        """True accuracy of each run, shape (arms, seeds)."""
        task = Task(rng, items, sizes)
        self.base = task.answers([base], (None,))
        self.arms = [task.answers(levels, numbers) for levels in self.levels]
        self.pool = self.pool_of(range(len(self.arms)))

    def pool_of(self, arms: Sequence[int]) -> Pooled:
        """Return the spread between trainings that some of the arms show."""
        return pooled({str(arm): dict(enumerate(self.arms[arm].means().tolist())) for arm in arms})

    def gain(self, arm: int) -> Estimate:
        """Return an arm against the pretrained model."""
        found = _contrast(self.arms[arm], self.base)
        return estimate(found, "fraction", spread=self.pool.of_run(str(arm)), declared=self.declared)

    def pair(self, left: int, right: int, pool: Pooled | None = None) -> Estimate:
        """Return one arm against another."""
        spread = (pool or self.pool).of_difference(str(left), str(right))
        declared = None if self.declared is None else SeedSpread(2 * self.declared.variance, self.declared.df)
        found = _contrast(self.arms[left], self.arms[right])
        return estimate(found, "fraction", spread=spread, declared=declared)


def _contrast(left: Scores, right: Scores) -> Contrast:
    found = difference(left, right, "task", fraction=True)
    assert found is not None, "all answers are scored"
    return found


def _holds(found: Estimate, truth: float) -> bool:
    ends = found.interval()
    assert ends is not None, "all cells have enough items"
    return ends[0] <= truth <= ends[1]


def _excludes_zero(found: Estimate) -> bool:
    return found.p is not None and found.p < ALARMS


def _is_called(judged: Judgement) -> bool:
    return judged.has("better") or judged.has("worse")


@cache
def _expected(accuracy: float, sd: float) -> float:
    """Return the mean accuracy of an arm's trainings: what lies beyond 0 and 1 is cut off."""
    draws = np.random.default_rng(1).normal(size=200_000)
    return float(np.clip(accuracy + sd * draws, 1e-6, 1 - 1e-6).mean())


def _ask_all(family: Family, gain: Study, kept: Study) -> tuple[list[Judgement], list[Judgement]]:
    """Ask all that a report asks of one target; return the questions whose truth is "no difference", and the gains."""
    pairs = list(combinations(range(len(gain.arms)), 2))
    equal = [family.ask(study.pair(*pair), margin=MARGIN) for study in (gain, kept) for pair in pairs]
    equal += [family.ask(kept.gain(arm), margin=MARGIN, against_base=True) for arm in range(len(kept.arms))]
    real = [family.ask(gain.gain(arm), margin=MARGIN, against_base=True) for arm in range(len(gain.arms))]
    return equal, real


def equal_arms(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """Five equal arms that gain and forget nothing: coverage, and false alarms of the whole family."""
    kind, seeds = KINDS[cell["kind"]], cell["seeds"]
    sd = kind.sd if cell.get("sd") is None else cell["sd"]
    arms, count = cell.get("arms", ARMS), cell["items"]
    declared = _declared(rng, sd, cell["runs"]) if "runs" in cell else None
    sizes = [PASSAGE] * (count // PASSAGE) if kind.is_clustered else []
    options = {"sizes": sizes, "declared": declared}
    known = seeds > 1 or declared is not None
    spread = [sd if known else 0.0] * arms
    gain = Study(rng, count, seeds, kind.base, [kind.arms] * arms, spread, **options)
    kept = Study(rng, count, seeds, kind.arms, [kind.arms] * arms, spread, **options)
    truth = _expected(kind.arms, sd) if known else kind.arms
    family = Family()
    equal, _ = _ask_all(family, gain, kept)
    return {
        "gain": _holds(gain.gain(0), truth - kind.base),
        "pair": _holds(gain.pair(0, 1), 0.0),
        "retention": _holds(kept.gain(0), truth - kind.arms),
        "twin": _excludes_zero(gain.pair(0, 1, gain.pool_of((0, 1)))),
        "family": any(map(_is_called, equal)),
    }


def groups(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """One run against the pretrained model on few passages: passages as units, and items as if they were."""
    large, small = cell["large"], cell["small"]
    sizes = [large[1]] * large[0] + [small[1]] * small[0]
    study = Study(rng, sum(sizes), cell["seeds"], 0.3, [0.6], [0.0], sizes=sizes)
    alone = [Scores(one.seeds, one.values, one.weights) for one in (study.arms[0], study.base)]
    items = estimate(_contrast(*alone), "fraction")
    return {"gain": _holds(study.gain(0), 0.3), "gain, items as units": _holds(items, 0.3)}


def power(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """One of five arms is better by so much: how often its pairs are called so, in the family of the whole study."""
    seeds, items = cell["seeds"], cell["items"]
    sd = 0.02 if seeds > 1 else 0.0
    gain = Study(rng, items, seeds, 0.3, [0.6 + cell["better by"], *[0.6] * (ARMS - 1)], [sd] * ARMS)
    kept = Study(rng, items, seeds, 0.6, [0.6] * ARMS, [sd] * ARMS)
    equal, _ = _ask_all(Family(), gain, kept)
    mine = equal[: ARMS - 1]
    return {"one pair": mine[0].has("better"), "all pairs": all(one.has("better") for one in mine)}


def margin(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """One of five arms against the pretrained model, at a true difference: which words it gets if only it is asked."""
    sd = 0.02 if cell["seeds"] > 1 else 0.0
    study = Study(rng, cell["items"], cell["seeds"], 0.7, [0.7 + cell["truth"]] * ARMS, [sd] * ARMS)
    judged = Family().ask(study.gain(0), margin=MARGIN, against_base=True)
    return {word: judged.has(word) for word in ("no worse", "equivalent", "better", "worse")}


def tokens(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """Cross-entropy per token over documents of unequal length, which a training changes at random."""
    weights = np.exp(cell["sd of log length"] * rng.normal(size=cell["documents"]))
    before = rng.normal(3.0, 1.0, size=cell["documents"])
    after = before + 0.1 * rng.normal(size=cell["documents"])
    tuned, base = (Scores((seed,), row[None], weights[None]) for seed, row in ((0, after), (None, before)))
    found = difference(tuned, base, "task")
    assert found is not None, "all documents are scored"
    change = estimate(found, "nats/token")
    return {"change": not change.known or _holds(change, 0.0), "no interval": not change.known}


def borrowed(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """One of five arms has several seeds, the others one: its spread stands for all."""
    equal, better = (_lonely(rng, cell, more) for more in (0.0, 0.12))
    family = Family()
    judged = [family.ask(equal.pair(*pair), margin=MARGIN) for pair in combinations(range(ARMS), 2)]
    found = Family()
    pairs = [found.ask(better.pair(1, other), margin=MARGIN) for other in range(2, ARMS)]
    return {
        "gain": _holds(equal.gain(1), 0.3),
        "pair": _holds(equal.pair(1, 2), 0.0),
        "family": any(map(_is_called, judged)),
        "12 points found": pairs[0].has("better"),
    }


def _lonely(rng: np.random.Generator, cell: Cell, more: float) -> Study:
    study = Study(rng, cell["items"], cell["seeds"], 0.3, [0.6, 0.6 + more, *[0.6] * (ARMS - 2)], [0.02] * ARMS)
    study.arms[1:] = [arm.take([0]) for arm in study.arms[1:]]
    study.pool = study.pool_of([0])
    return study


def wild(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """One of five equal arms has several times the spread between seeds."""
    seeds = cell["seeds"]
    sds = [0.02 * cell["times"], *[0.02] * (ARMS - 1)]
    gain = Study(rng, cell["items"], seeds, 0.3, [0.6] * ARMS, sds)
    kept = Study(rng, cell["items"], seeds, 0.6, [0.6] * ARMS, sds)
    equal, _ = _ask_all(Family(), gain, kept)
    runs = {str(arm): dict(enumerate(scores.means().tolist())) for arm, scores in enumerate(gain.arms)}
    named = {one.label for one in wild_arms(runs)}
    pairs = equal[: ARMS * (ARMS - 1) // 2]
    truth = _expected(0.6, sds[0])
    return {
        "its gain": _holds(gain.gain(0), truth - 0.3),
        "its pair": _holds(gain.pair(0, 1), truth - 0.6),
        "gain pairs": any(map(_is_called, pairs)),
        "family": any(map(_is_called, equal)),
        "is named": "0" in named,
        "another is named": bool(named - {"0"}),
    }


def mean_of_tasks(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """Mean over four tasks of two equal arms, against the pretrained model and each other."""
    seeds, sd = cell["seeds"], 0.035 if cell["seeds"] > 1 else 0.0
    studies = [Study(rng, cell["items"], seeds, 0.6, [0.6] * ARMS, [sd] * ARMS) for _ in range(4)]
    pool = _pool_of_means(studies)
    against = mean_of([_contrast(study.arms[0], study.base) for study in studies])
    pair = mean_of([_contrast(study.arms[0], study.arms[1]) for study in studies])
    assert against is not None and pair is not None, "all have the same seeds"
    return {
        "retention": _holds(estimate(against, "fraction", spread=pool.of_run("0")), 0.0),
        "pair": _holds(estimate(pair, "fraction", spread=pool.of_difference("0", "1")), 0.0),
    }


def _pool_of_means(studies: Sequence[Study]) -> Pooled:
    """Return the spread between trainings in the mean over tasks."""
    runs = {
        str(arm): dict(enumerate(np.mean([study.arms[arm].means() for study in studies], axis=0).tolist()))
        for arm in range(ARMS)
    }
    return pooled(runs)


def parts(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """The mean over the parts of a benchmark, each of its own difficulty."""
    count, size = cell["parts"], cell["items of each"]
    levels = np.random.default_rng(count).uniform(0.3, 0.9, size=count)
    names = [str(part) for part in range(count) for _ in range(size)]
    answers = (rng.random(count * size) < np.repeat(levels, size)).astype(float)
    settled = np.array(settle_rates(answers.tolist(), names, sorted(set(names))), dtype=np.float64)
    found = level(Scores((0,), settled[None], np.ones((1, len(settled)))), "task")
    assert found is not None, "all answers are scored"
    return {"mean": _holds(estimate(found, "fraction"), float(levels.mean()))}


def paths(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """A chosen point against the tuned model: it keeps more, and its target is worse by so much."""
    seeds, sd = cell["seeds"], 0.01 if cell["seeds"] > 1 else 0.0
    target = Study(rng, cell["items"], seeds, 0.8, [0.8 - cell["target lost"]] * ARMS, [sd] * ARMS)
    kept = [Study(rng, cell["items"], seeds, 0.6, [0.6 + cell["regained"]] * ARMS, [sd] * ARMS) for _ in range(4)]
    family = Family()
    more = mean_of([_contrast(study.arms[0], study.base) for study in kept])
    assert more is not None, "all have the same seeds"
    on_target = family.ask(target.gain(0), margin=MARGIN)
    retention = family.ask(estimate(more, "fraction", spread=_pool_of_means(kept).of_run("0")), margin=MARGIN)
    return {"overshoot": on_target.has("no worse") and retention.has("better")}


def unscored(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """Some answers of the arm could not be scored, and all of them would have been wrong."""
    study = Study(rng, cell["items"], cell["seeds"], 0.6, [0.6], [0.0])
    values = study.arms[0].values.copy()
    for row in values:
        row[rng.choice(np.flatnonzero(row == 0), size=cell["unscored"], replace=False)] = np.nan
    study.arms[0] = Scores(study.arms[0].seeds, values, study.arms[0].weights)
    found = study.gain(0)
    return {"gain": _holds(found, 0.0), "called better": _excludes_zero(found) and found.value > 0}


def correlations(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """Spearman's coefficient over arms of a normal pair; ranks do not see how skewed a quantity is."""
    r, count = cell["correlation"], cell["arms"]
    x = rng.normal(size=count)
    y = r * x + np.sqrt(1 - r * r) * rng.normal(size=count)
    low, high, p = fisher_test(spearman(x, y), count)
    truth = 6 / np.pi * np.arcsin(r / 2)
    return {"coefficient": low <= truth <= high, "not zero": p < ALARMS}


def targets(rng: np.random.Generator, cell: Cell) -> dict[str, bool]:
    """An effect over several targets with errors of one to three points, and the effect on a further target."""
    count, tau = cell["targets"], cell["sd over targets"]
    errors = rng.uniform(1.0, 3.0, size=count)
    values = tau * rng.normal(size=count) + errors * rng.normal(size=count)
    found = over_independent([_normal(*pair) for pair in zip(values.tolist(), errors.tolist(), strict=True)])
    assert found is not None and found.prediction is not None, "there are three targets"
    low, high = found.prediction
    return {"mean": _holds(found.estimate, 0.0), "further target": low <= tau * rng.normal() <= high}


def _normal(value: float, error: float) -> Estimate:
    pivot = Pivot(value, error, (Term(1.0, np.inf),))
    return Estimate(value, "points", 3, 200, 200, pivot, pivot)


class Table(NamedTuple):
    """Cells of one kind, and what is promised of each rate that is counted."""

    draw: Callable[[np.random.Generator, Cell], dict[str, bool]]
    cells: list[Cell]
    promises: dict[str, str]
    """Rate to ``coverage`` or ``alarm``; the others are only counted."""
    quick: int
    """Cells of the quick run."""


def _cells(**axes: Sequence[Any]) -> list[Cell]:
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


_EQUAL = {"gain": "coverage", "pair": "coverage", "retention": "coverage", "twin": "alarm", "family": "alarm"}
TABLES = {
    "equal": Table(equal_arms, _cells(kind=KINDS, seeds=SEEDS, items=ITEMS), _EQUAL, 75),
    "spread": Table(equal_arms, _cells(kind=["hard"], seeds=SEEDS[1:], items=[200], sd=[0.0, 0.04, 0.12]), _EQUAL, 2),
    "arms": Table(equal_arms, _cells(kind=["hard"], seeds=[2, 3], items=[200], arms=[2, 3, 10, 20]), _EQUAL, 2),
    "declared": Table(equal_arms, _cells(kind=["hard"], seeds=[1], items=[200, 1000], runs=[3, 10, None]), _EQUAL, 2),
    "groups": Table(
        groups,
        _cells(large=[[6, 5], [8, 5], [20, 5], [100, 5]], small=[[0, 0]], seeds=[1, 3])
        + _cells(large=[[4, 60]], small=[[8, 20]], seeds=[1, 3])
        + _cells(large=[[5, 40]], small=[[50, 2]], seeds=[1, 3]),
        {"gain": "coverage"},
        2,
    ),
    "tokens": Table(
        tokens, _cells(**{"documents": [20, 50, 200], "sd of log length": [0.5, 1.0, 1.5]}), {"change": "coverage"}, 2
    ),
    "borrowed": Table(
        borrowed,
        _cells(seeds=[2, 3, 5], items=[200, 1000]),
        {"gain": "coverage", "pair": "coverage", "family": "alarm"},
        2,
    ),
    "power": Table(
        power, _cells(**{"better by": [0.04, 0.08, 0.12], "seeds": [1, 2, 3, 5], "items": [200, 1000]}), {}, 2
    ),
    "margin": Table(margin, _cells(truth=[-0.02, 0.0, 0.02], seeds=[1, 3, 10], items=[200, 1000, 4000]), {}, 2),
    "wild": Table(
        wild,
        _cells(times=[2, 4, 10], seeds=[2, 3, 5], items=[200, 1000]),
        {"its gain": "coverage", "its pair": "coverage", "gain pairs": "alarm", "family": "alarm"},
        1,
    ),
    "tasks": Table(
        mean_of_tasks, _cells(seeds=[1, 2, 3, 5], items=[100]), {"retention": "coverage", "pair": "coverage"}, 2
    ),
    "parts": Table(
        parts,
        [{"parts": count, "items of each": size} for count, size in ((57, 2), (27, 4), (14, 7), (57, 10))],
        {"mean": "coverage"},
        1,
    ),
    "paths": Table(
        paths,
        _cells(**{"target lost": [0.02, 0.04, 0.0], "regained": [0.06], "seeds": [1, 3], "items": [200, 1000, 4000]}),
        {},
        2,
    ),
    "unscored": Table(unscored, _cells(unscored=[20], seeds=[1, 3], items=[200]), {"called better": "alarm"}, 1),
    "correlations": Table(
        correlations, _cells(arms=[8, 20, 60], correlation=[0.0, 0.5, 0.9]), {"coefficient": "coverage"}, 2
    ),
    "targets": Table(
        targets,
        _cells(**{"targets": [3, 5, 8, 20], "sd over targets": [0.0, 3.0]}),
        {"mean": "coverage", "further target": "coverage"},
        2,
    ),
}


def count(name: str, place: int, studies: int) -> Cell:
    """Return the rates of a cell, and which of them are outside what is promised."""
    table = TABLES[name]
    cell = dict(table.cells[place])
    rng = np.random.default_rng([zlib.crc32(name.encode()), place])
    drawn = [table.draw(rng, cell) for _ in range(studies)]
    rates = {key: float(np.mean([one[key] for one in drawn])) for key in drawn[0]}
    outside = [key for key, promise in table.promises.items() if _is_outside(rates[key], promise, studies)]
    return {**cell, **rates, "studies": studies, "outside": outside}


def _declared(rng: np.random.Generator, sd: float, runs: int | None) -> SeedSpread:
    """Return a spread as a study declares it, measured on some runs; None: known exactly."""
    if runs is None:
        return SeedSpread(sd**2, np.inf)
    return SeedSpread(sd**2 * float(rng.chisquare(runs - 1)) / (runs - 1), runs - 1.0)


def _is_outside(rate: float, promise: str, studies: int) -> bool:
    middle = (rate + Z99**2 / (2 * studies)) / (1 + Z99**2 / studies)
    half = Z99 * np.sqrt(rate * (1 - rate) / studies + (Z99 / (2 * studies)) ** 2) / (1 + Z99**2 / studies)
    if promise == "alarm":
        return bool(middle - half > ALARMS)
    return bool(middle + half < LOW or middle - half > HIGH)


def _jobs(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    studies = args.studies or (QUICK if args.quick else FULL)
    names = args.table or list(TABLES)
    return [
        (name, place, studies)
        for name in names
        for place in range(TABLES[name].quick if args.quick else len(TABLES[name].cells))
    ]


def main() -> None:
    """Count every cell and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} studies a cell, few cells of most tables")
    parser.add_argument("--table", action="append", choices=TABLES, help="may be given several times; all by default")
    parser.add_argument("--studies", type=int, help=f"a cell; {FULL} by default")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    jobs = _jobs(args)
    with ProcessPoolExecutor(args.processes) as pool:
        for (name, _, _), found in zip(jobs, pool.map(count, *zip(*jobs, strict=True)), strict=True):
            print(json.dumps({"table": name, **found}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
