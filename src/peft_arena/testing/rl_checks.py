"""Checks of reinforcement learning: updates against a scalar reference, rollouts against the logits, the KL reference.

The reference does one completion at a time, without padding, cache or TRL, and one token at a time in its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.methods.base import Attached, Capability
from peft_arena.testing.subject import EXACT, ROUNDED, STEPS, Subject, difference, tokens
from peft_arena.testing.trial import Life, Trial

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peft_arena.core.specs import RLSpec
    from peft_arena.testing.rl_practice import Done

SAME = 1e-6
"""Largest difference of two ways to compute in float64: of parameters, and of gradients over the largest of them."""
DRAWN = {"float32": 1e-6, "bfloat16": 0.1}
"""Largest distance of a random number from the interval of the token that it drew, which lies in [0, 1]."""
SCALE = 1e-4
"""Added to the standard deviation of a group's rewards."""


class Row(NamedTuple):
    """One completion, of those that were trained on."""

    ids: tuple[int, ...]
    """Prompt and completion."""
    length: int
    """Tokens of the completion."""
    advantage: float
    pretrained: list[float]
    """Log-probabilities of its tokens under the trainer's reference model, nats."""


class Scored(NamedTuple):
    """One completion as the loss sees it: log-probabilities of its tokens, nats."""

    log_probs: Sequence[Tensor]
    """Under the policy that is trained, scalars."""
    old: Sequence[float]
    """Under the policy that sampled it."""
    pretrained: Sequence[float]
    advantage: float


def grpo_loss(completions: Sequence[Scored], spec: RLSpec) -> Tensor:
    """Return the loss of GRPO, to be minimised: Shao et al. 2024, DeepSeekMath, equations 3 and 4.

    The divergence is multiplied by the ratio, as in DeepSeek-AI 2025, DeepSeek-V3.2.
    """
    total: Any = 0.0
    for one in completions:
        inside: Any = 0.0
        for new, old, pretrained in zip(one.log_probs, one.old, one.pretrained, strict=True):
            ratio = (new - old).exp()
            clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
            gain = min(ratio * one.advantage, clipped * one.advantage)
            divergence = (pretrained - new).exp() - (pretrained - new) - 1
            inside = inside - gain + spec.kl * ratio * divergence
        total = total + inside / len(one.log_probs)
    loss: Tensor = total / len(completions)
    return loss


def group_advantages(rewards: Sequence[float], size: int) -> list[float]:
    """Return (r - mean) / (std + 1e-4) in each group, with the unbiased standard deviation."""
    found = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = sum(group) / size
        spread = (sum((one - mean) ** 2 for one in group) / (size - 1)) ** 0.5
        found += [(one - mean) / (spread + SCALE) for one in group]
    return found


def score_row(model: nn.Module, row: Row, temperature: float) -> tuple[list[Tensor], Tensor]:
    """Run a model on one row alone.

    Returns:
        The log-probability of each token of the completion, scalars, and what the model adds to its cross-entropy.
    """
    import torch

    ids = torch.tensor([row.ids])
    labels = ids.clone()
    labels[0, : -row.length] = -100
    output = model(input_ids=ids, labels=labels)
    logits, said = output.logits[0, -row.length - 1 : -1], row.ids[-row.length :]
    plain = [logits[place].log_softmax(-1)[token] for place, token in enumerate(said)]
    log_probs = [(logits[place] / temperature).log_softmax(-1)[token] for place, token in enumerate(said)]
    return log_probs, output.loss + sum(plain[1:], plain[0]) / row.length


def check_online_rl(trial: Trial) -> str | None:
    """Check rollouts, reference model, gradients and updates of a method that takes objectives that sample."""
    if not trial.plain.has(Capability.ONLINE_RL):
        return "the card does not declare online_rl"
    for name, check in (("untied", _check_updates), ("bfloat16", _check_mixed)):
        try:
            check(trial.life(name))
        except AssertionError as error:
            raise AssertionError(f"on the {name} model: {error}") from error
    return None


def _check_updates(life: Life) -> None:
    """Compare two optimizer steps on one rollout with the reference, in float64."""
    from peft_arena.testing.rl_practice import in_float64, practice_spec, practise, tensors_of

    first, second, base = life.subject.attach(), _attach(life), life.subject.model()
    if life.subject.has(Capability.IDENTITY_AT_INIT):
        _check_start(first)
    first.load_state(life.state())
    first.begin(STEPS)
    for model in (first.model, second.model, base):
        model.double()
    with in_float64():
        spec = practice_spec(**({"micro_batch_size": 1} if _noise_by_row(second) else {}))
        before = tensors_of(first.model)
        done = practise(first, first.optimizer(life.subject.learning_rate, 0.01), spec, "float64", life.directory)
        _check_moved(first, before, done)
        rows = rows_of(done, spec)
        _check_rollout(life.subject, second, done, spec)
        _check_reference(life.subject, base, rows, spec)
        optimizer = second.optimizer(life.subject.learning_rate, 0.01)
        old = [_floats(second.model.eval(), row, spec) for row in rows]
        second.model.train()
        size, losses = spec.batch_size, []
        for step in range(2):
            places = slice(step * size, (step + 1) * size)
            losses.append(_backward(second, rows[places], old[places], spec))
            _check_gradients(second, done, step)
            optimizer.step()
            second.after_step(step + 1, STEPS)
            optimizer.zero_grad()
        gap = abs(done.loss - sum(losses) / 2)
        assert gap <= SAME * max(1.0, abs(done.loss)), f"the loss is {gap} away from that of the reference"
        for name, parameter in second.trained().items():
            gap = difference(first.trained()[name], parameter)
            assert gap <= SAME, f"after two steps, {name} is {gap} away from the reference"


def _check_mixed(life: Life) -> None:
    """Check an optimizer step in bfloat16 mixed precision as far as that is exact, and the divergence at the start."""
    import torch

    from peft_arena.core.specs import Schedule
    from peft_arena.testing.rl_practice import practice_spec, practise, tensors_of

    subject, attached = life.subject, _attach(life)
    spec = practice_spec(schedule=Schedule(steps=1), micro_batch_size=None)
    before = tensors_of(attached.model)
    done = practise(attached, attached.optimizer(subject.learning_rate, 0.01), spec, subject.dtype, life.directory)
    _check_moved(attached, before, done)
    _check_rollout(subject, _attach(life), done, spec)
    _check_reference(subject, subject.untouched(), rows_of(done, spec), spec)
    for gradient in done.gradients[0].values():
        assert bool(torch.isfinite(gradient).all()), "a gradient is not finite"


def _attach(life: Life) -> Attached:
    """Return a new attachment in the state of the trained one, ready to be trained on."""
    attached = life.twin()
    attached.begin(STEPS)
    return attached


def _check_start(attached: Attached) -> None:
    """Check that an attachment that is not trained yet does not diverge from the trainer's reference."""
    import torch

    from peft_arena.train.loss import TokenLoss
    from peft_arena.train.policy import pretrained, scores

    ids = tokens()
    given = (ids, torch.ones_like(ids), ids.shape[1] - 1, 1.0)
    with torch.no_grad():
        with TokenLoss(attached.model, autocast=False) as policy:
            found = scores(policy, *given).log_probs
        with pretrained(attached, autocast=False) as reference:
            gap = difference(found, scores(reference, *given).log_probs)
    assert gap <= 2 * EXACT, f"before training, log-probabilities are {gap} nats away from those of the reference"


def _noise_by_row(attached: Attached) -> bool:
    """Say whether noise in training mode differs from row to row; in evaluation mode rows must be independent."""
    import torch

    from peft_arena.testing.rl_practice import noise_fixed

    ids = tokens()[:2]

    def gap() -> float:
        with torch.no_grad():
            alone = torch.cat([attached.model(input_ids=row[None]).logits for row in ids])
            return difference(attached.model(input_ids=ids).logits, alone)

    with noise_fixed(attached), torch.random.fork_rng():
        attached.model.eval()
        away = gap()
        assert away <= SAME, f"logits of a row depend on the other rows of its batch: they differ by {away}"
        attached.model.train()
        return gap() > SAME


def rows_of(done: Done, spec: RLSpec) -> list[Row]:
    """Return the completions in the order in which they were trained on.

    Raises:
        AssertionError: they are not what was written, each with its advantage in its group.
    """
    from peft_arena.train.rl_trainer import KL_LOG_PROBS

    rows = []
    for batch in done.batches:
        for place, advantage in enumerate(batch["advantages"].tolist()):
            kept = batch["completion_mask"][place].bool()
            prompt = batch["prompt_ids"][place][batch["prompt_mask"][place].bool()].tolist()
            completion = batch["completion_ids"][place][kept].tolist()
            reference = batch[KL_LOG_PROBS][place][kept].tolist()
            rows.append(Row((*prompt, *completion), len(completion), advantage, reference))
    assert len(set(done.rewards)) > 1, "all completions got the same reward: nothing can be checked"
    wanted = zip(_written(done, spec), group_advantages(done.rewards, spec.group_size), strict=True)
    for row, (ids, advantage) in zip(sorted(rows), sorted(wanted), strict=True):
        assert row.ids == ids, "what was trained on is not what was written"
        gap = abs(row.advantage - advantage)
        assert gap <= SAME * max(1.0, abs(advantage)), f"an advantage is {row.advantage}, and should be {advantage}"
    return rows


def _written(done: Done, spec: RLSpec) -> list[tuple[int, ...]]:
    """Return prompt and completion of what was written, in that order."""
    from peft_arena.testing.rl_practice import prompts

    asked = [prompt for prompt in prompts() for _ in range(spec.group_size)]
    return [(*prompt, *one.ids) for prompt, one in zip(asked, done.written, strict=True)]


def _check_moved(attached: Attached, before: dict[str, Tensor], done: Done) -> None:
    """Check that the optimizer moved every trained parameter that had a gradient, and that nothing else moved."""
    from peft_arena.testing.rl_practice import changed

    reached = {name for step in done.gradients for name, gradient in step.items() if bool((gradient != 0).any())}
    assert reached, "no trained parameter had a gradient"
    assert reached <= done.moved, f"had a gradient and did not move: {sorted(reached - done.moved)[:3]}"
    parameters, trained = {name for name, _ in attached.model.named_parameters()}, set(attached.trained())
    strays = set(changed(attached.model, before)) & parameters - trained
    assert not strays, f"training moved what does not train: {sorted(strays)[:3]}"


def _check_rollout(subject: Subject, policy: Attached, done: Done, spec: RLSpec) -> None:
    """Check that the rollout left the model as it was, and that each token was drawn from the policy's own logits.

    Args:
        subject: what was attached.
        policy: what made the rollout, as it was then.
        done: has the rollout.
        spec: how tokens were sampled.
    """
    import torch

    from peft_arena.evaluate.draw import streams
    from peft_arena.testing.rl_practice import LIMIT, seeds

    assert not done.disturbed, f"a rollout left changed: {done.disturbed}"
    policy.model.eval()
    numbers = streams(seeds(0, len(done.written)), LIMIT).tolist()
    for ids, one, uniform in zip(_written(done, spec), done.written, numbers, strict=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not subject.exact):
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0, -len(one.ids) - 1 : -1]
        upper = (logits.double() / spec.temperature).softmax(-1).cumsum(-1)
        for place, token in enumerate(one.ids):
            low, high = float(upper[place, token - 1]) if token else 0.0, float(upper[place, token])
            drawn = low - DRAWN[subject.dtype] <= uniform[place] <= high + DRAWN[subject.dtype]
            assert drawn, f"token {place + 1} of a completion was not drawn from the policy's own logits"


def _check_reference(subject: Subject, base: nn.Module, rows: Sequence[Row], spec: RLSpec) -> None:
    """Check the log-probabilities of the trainer's reference against those of the untouched pretrained model."""
    import torch

    changes = subject.has(Capability.CHANGES_BASE)
    limit = ((EXACT if changes else SAME) if subject.exact else ROUNDED) / spec.temperature
    with torch.autocast("cpu", torch.bfloat16, enabled=not subject.exact):
        wanted = [_floats(base, row, spec) for row in rows]
    found = [row.pretrained for row in rows]
    gap = max(abs(x - y) for ours, right in zip(found, wanted, strict=True) for x, y in zip(ours, right, strict=True))
    assert gap <= limit, f"the reference is {gap} nats away from the pretrained model"


def _backward(attached: Attached, rows: Sequence[Row], old: Sequence[list[float]], spec: RLSpec) -> float:
    """Add up the gradients of one optimizer step by the reference, and return its loss."""
    import torch

    from peft_arena.testing.rl_practice import noise_fixed

    total, size = 0.0, spec.micro_batch_size or len(rows)
    with noise_fixed(attached), torch.random.fork_rng():
        for start in range(0, len(rows), size):
            scored, added = [], []
            for row, before in zip(rows[start : start + size], old[start : start + size], strict=True):
                log_probs, more = score_row(attached.model, row, spec.temperature)
                own = attached.extra_loss()
                added.append(more if own is None else more + own)
                scored.append(Scored(log_probs, before, row.pretrained, row.advantage))
            loss = (grpo_loss(scored, spec) + sum(added) / size) * size / len(rows)
            loss.backward()
            total += float(loss.detach())
    return total


def _check_gradients(attached: Attached, done: Done, step: int) -> None:
    from peft_arena.testing.rl_practice import gradients

    found, wanted = done.gradients[step], gradients(attached)
    largest = max(float(one.abs().max()) for one in wanted.values())
    for name, gradient in wanted.items():
        gap = difference(found[name] / largest, gradient / largest)
        assert gap <= SAME, f"the gradient of {name} in step {step + 1} is {gap} away, in units of the largest one"


def _floats(model: nn.Module, row: Row, spec: RLSpec) -> list[float]:
    """Return the log-probabilities of one completion, without gradients."""
    import torch

    with torch.no_grad():
        return [float(one) for one in score_row(model, row, spec.temperature)[0]]
