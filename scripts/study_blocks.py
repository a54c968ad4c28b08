"""Blocks of the README and the docs that come from kept studies, each a function from the sources to Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from peft_arena.analyze.compare import Comparison
from peft_arena.analyze.correlate import Correlation
from peft_arena.analyze.costs import PEAK_MEMORY, TRAINABLE
from peft_arena.analyze.effects import ArmEffects
from peft_arena.analyze.estimate import LEVEL
from peft_arena.analyze.family import Judgement
from peft_arena.analyze.study import TargetResult
from peft_arena.report.headline import caveats, headline
from peft_arena.report.numbers import estimate_text, p_text, plain, quantity, rate, signed
from peft_arena.report.paths_text import claim_sentence, factors_text
from peft_arena.report.words import detectable_text, ends_text, judged_text, word_text
from scripts.sources import Sources

Block = Callable[[Sources], str]
BLOCKS: dict[str, Block] = {}
CORRELATED = {
    "angle_mean_general": "angular drift of activations",
    "kl_general": "forward KL from the base model",
    "gram_distortion_general": "Gram distortion",
    "cka_general": "linear CKA",
    "procrustes_residual_general": "Procrustes residual",
    "kl_target": "forward KL, on target prompts",
    "cka_target": "linear CKA, on target prompts",
    "global_l2_relative": "relative L2 norm of the change",
    "drift_relative_general": "relative drift",
    "deviation_mean": "mean deviation in singular directions",
    "stable_rank": "stable rank of the change",
}
"""Quantities that are set beside forgetting, general prompts unless said otherwise."""


def block(function: Block) -> Block:
    """Make a block of a function, by its name."""
    BLOCKS[function.__name__.replace("_", "-")] = function
    return function


def rows(head: Sequence[str], body: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table in Markdown; the first columns are text, the others numbers.

    Args:
        head: titles.
        body: cells of each row.
        texts: how many columns are text.
    """
    line = "|" + "|".join("---" if place < texts else "---:" for place in range(len(head))) + "|"
    return "\n".join([f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in body)])


def bullets(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def made(sources: Sources, study: str) -> str:
    """Say which version made the records of a study, when, and on what."""
    trained = [run.training for arm in sources.result(study).evidence.arms for run in arm.runs]
    found = [record.provenance for record in trained if record is not None]
    versions = sorted({f"{one['peft_arena']} (commit {one['git_commit'][:7]})" for one in found})
    machines = sorted({f"{one['cores']} cores of {one['processor']}" for one in found})
    return f"Records of peft-arena {', '.join(versions)}, {', '.join(machines)}, {sources.date(study)}."


def _judged(judged: Judgement) -> str:
    """Return the difference, the interval that says the same as its word, and the word."""
    return f"{judged_text(judged, unit=False)} {word_text(judged)}"


def _cost(target: TargetResult, arm: str, metric: str) -> str:
    cost = target.costs[arm].get(metric)
    if cost is None or cost.value is None:
        return "–"
    return f"{cost.value:,.0f}" if metric == TRAINABLE else quantity(cost.value, cost.unit)


@block
def demo_table(sources: Sources) -> str:
    """What each arm of the demo gained, kept and cost."""
    target = sources.target("demo")
    head = ["arm", "trained parameters", "gain, points", "mean retention, points", "news text, nats/token"]
    head += ["peak training memory", "training speed"]
    body = []
    for arm in target.arms:
        against = target.against_base[arm.label]
        text = next(effect.delta for effect in arm.retention if not effect.task.is_fraction)
        assert text is not None, "every arm was evaluated on the text"
        costs = [_cost(target, arm.label, metric) for metric in (PEAK_MEMORY, "training_speed")]
        words = [_judged(against.gain), _judged(against.retention), estimate_text(text, unit=False)]
        body.append([arm.label, _cost(target, arm.label, TRAINABLE), *words, *costs])
    result = sources.result("demo")
    return f"{rows(head, body)}\n\n{made(sources, 'demo')} {result.family.size} comparisons are corrected together."


@block
def demo_findings(sources: Sources) -> str:
    """What the report of the demo says first."""
    result = sources.result("demo")
    return bullets([*headline(result), *caveats(result)])


def _pair(target: TargetResult, left: str, right: str) -> Comparison:
    for found in target.comparisons:
        if {found.left, found.right} == {left, right}:
            return found if found.left == left else found.turned()
    raise KeyError(f"no comparison of {left} and {right}")


@block
def demo_example(sources: Sources) -> str:
    """One comparison of the demo, number by number."""
    target, family = sources.target("demo"), sources.result("demo").family
    pair = _pair(target, "lora", "full, lr 1e-3")
    judged, near = pair.gain, _pair(target, "lora", "oft").gain
    found, other = judged.estimate, near.estimate
    assert found is not None and other is not None, "both pairs are comparable"
    assert found.stderr is not None and other.stderr is not None, "both have intervals"
    assert judged.level is not None and near.level is not None and other.p is not None, "both have intervals"
    assert judged.word == "better" and near.word == "undecided" and near.margin == 2.0, "what is said below"
    assert near.interval is not None and near.interval[0] < -near.margin, "what is said below"
    alone, corrected = (ends_text(ends, "points") for ends in (found.interval(LEVEL), judged.interval))
    told = (
        f"LoRA minus full fine-tuning at 1e-3 on {found.items} sums, one seed: {signed(found.value)} points, standard "
        f"error {plain(found.stderr)}. Alone, the 95 % interval is {alone}. "
        f"{family.size} comparisons are corrected together: the corrected p is {p_text(judged.p_corrected)}, and the "
        f"interval that says the same, at {100 * judged.level:.2f} %, is {corrected}. It excludes zero: "
        f"this run of LoRA is *{judged.word}*."
    )
    untold = (
        f"LoRA minus OFT: {signed(other.value)} points, standard error {plain(other.stderr)}, p {p_text(other.p)} "
        f"alone and {p_text(near.p_corrected)} corrected; the interval at {100 * near.level:.2f} % is "
        f"{ends_text(near.interval, 'points')}. It holds zero, and it reaches below minus the margin of 2: "
        f"*{near.word}*. A difference of {detectable_text(near)} in four of five such studies; of smaller ones nothing "
        f"is known."
    )
    return bullets([told, untold])


@block
def micro_paths(sources: Sources) -> str:
    """What became of walking back in the micro study, counted."""
    paths = sources.target("micro").paths
    assert paths is not None, "the study scans paths"
    counts = Counter(arm.claim.verdict for arm in paths.arms)
    assert all(len(arm.runs) == 3 and arm.scan.tolerance == 2.0 for arm in paths.arms), "what is said below"
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"Micro study, {len(paths.arms)} arms, three seeds each, margin of 2 points: {told}."


@block
def micro_paths_table(sources: Sources) -> str:
    """The chosen points of the micro study against the tuned models."""
    target = sources.target("micro")
    assert target.paths is not None, "the study scans paths"
    body = []
    for arm in target.paths.arms:
        claim = arm.claim
        numbers = ["–", "–"] if claim.none_chosen else [_judged(claim.target), _judged(claim.retention)]
        body.append([arm.label, factors_text(arm), *numbers, claim.verdict])
    head = ["arm", "factor", "target, points", "mean retention, points", "verdict"]
    return f"{rows(head, body)}\n\n{made(sources, 'micro')}"


@block
def micro_paths_sentences(sources: Sources) -> str:
    """What the report says of each arm's path."""
    target = sources.target("micro")
    assert target.paths is not None, "the study scans paths"
    return bullets([claim_sentence(arm, target.label) for arm in target.paths.arms])


@block
def rl_table(sources: Sources) -> str:
    """Each method of the micro-rl study by fine-tuning beside itself by reinforcement learning."""
    target = sources.target("micro-rl")
    assert target.rl is not None, "the study trains by reinforcement learning"
    head = ["method", "gain by SFT", "gain by GRPO", "GRPO minus SFT, gain", "GRPO minus SFT, mean retention"]
    body = []
    for pair in target.rl.pairs:
        comparison = pair.comparison
        by = {arm.label: arm for arm in target.arms}
        first, second = by[comparison.left], by[comparison.right]
        sft, grpo = (first, second) if first.evidence.arm.objective == "sft" else (second, first)
        turned = comparison if comparison.left == grpo.label else comparison.turned()
        name = f"{grpo.evidence.arm.method}, {rate(grpo.evidence.arm.learning_rate)}"
        body.append([name, _gain(sft), _gain(grpo), _judged(turned.gain), _judged(turned.retention)])
    return f"{rows(head, body)}\n\n{made(sources, 'micro-rl')}"


def _gain(arm: ArmEffects) -> str:
    return "–" if arm.gain is None or arm.gain.delta is None else estimate_text(arm.gain.delta, unit=False)


@block
def rl_findings(sources: Sources) -> str:
    """What the report of the micro-rl study says first."""
    result = sources.result("micro-rl")
    return bullets([*headline(result), *caveats(result)])


@block
def all_methods_findings(sources: Sources) -> str:
    """What the report of the all-methods study says first."""
    result = sources.result("all-methods")
    return f"{bullets([*headline(result), *caveats(result)])}\n\n{made(sources, 'all-methods')}"


@block
def all_methods_table(sources: Sources) -> str:
    """Every arm of the all-methods study, by mean retention."""
    target = sources.target("all-methods")
    kept = {arm.label: arm.mean.value for arm in target.arms if arm.mean is not None}
    body = []
    for arm in sorted((arm for arm in target.arms if arm.label in kept), key=lambda arm: -kept[arm.label]):
        against = target.against_base[arm.label]
        trained = _cost(target, arm.label, TRAINABLE)
        words = [_judged(against.gain), _judged(against.retention)]
        body.append([arm.label, rate(arm.evidence.arm.learning_rate), trained, *words])
    return rows(["arm", "rate", "trained parameters", "gain, points", "mean retention, points"], body)


def _correlations(sources: Sources) -> dict[str, Correlation]:
    geometry = sources.target("all-methods").geometry
    assert geometry is not None, "the study measures geometry"
    return {one.metric: one for one in geometry.correlations if one.outcome == "forgetting"}


@block
def all_methods_correlations(sources: Sources) -> str:
    """What goes with forgetting over all methods."""
    found = _correlations(sources)
    body = []
    for metric, name in CORRELATED.items():
        one = found[metric]
        assert one.value is not None and one.low is not None and one.high is not None, "there are 60 arms and more"
        ends = f"[{plain(one.low, 2)}, {plain(one.high, 2)}]"
        body.append([name, str(one.arms), f"{plain(one.value, 2)} {ends}", p_text(one.p_corrected)])
    head = ["quantity", "methods", "Spearman with forgetting, 95 % interval", "p (Holm)"]
    corrected = sum(one.p is not None for one in found.values())
    return f"{rows(head, body)}\n\np-values are corrected over {corrected} quantities."


@block
def all_methods_geometry(sources: Sources) -> str:
    """The same in a sentence."""
    found = _correlations(sources)

    def told(metric: str) -> str:
        one = found[metric]
        assert one.value is not None and one.low is not None and one.high is not None, "there are 60 arms and more"
        return f"{plain(one.value, 2)} [{plain(one.low, 2)}, {plain(one.high, 2)}]"

    return (
        f"Over {found['kl_general'].arms} methods on the micro model, one run each, how far activations and "
        "predictions on *general* prompts moved goes with forgetting: Spearman "
        f"{told('angle_mean_general')} for angular drift, "
        f"{told('kl_general')} for forward KL, {told('cka_general')} for CKA. The relative norm of the change has "
        f"{told('global_l2_relative')} over the {found['global_l2_relative'].arms} that have one, its stable rank "
        f"{told('stable_rank')}."
    )
