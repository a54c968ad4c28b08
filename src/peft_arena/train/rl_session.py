"""Reinforcement learning in progress. Imported only when a training starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field

from peft_arena.core.ids import seed_for
from peft_arena.evaluate.metrics import weighted_mean
from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.store.records import RolloutEntry, SampledCompletion, SampledGroup
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.judge import Judge
from peft_arena.tasks.rewards import Answer, Judged
from peft_arena.train.loss import TokenLoss
from peft_arena.train.outcome import StepInfo
from peft_arena.train.policy import check_rows, pretrained
from peft_arena.train.rl_trainer import TRAINERS, Made, RolloutTrainer, Work, reward_totals
from peft_arena.train.rollouts import Rollouts, Written
from peft_arena.train.session import Follower, Session
from peft_arena.train.state import Counters

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_arena.train.inputs import RLData

SAMPLED_GROUPS = 2
"""Groups kept of each rollout that is sampled for the record."""
KL_TIMES = 20
"""So often is the divergence measured where the loss does not have it: each time costs a pass of the reference."""
SAMPLED_CHARACTERS = 4000
"""Of a completion in the record."""


class Window(BaseModel):
    """Sums since the last log entry."""

    model_config = ConfigDict(extra="forbid")

    completions: int = 0
    reward: float = 0.0
    squares: float = 0.0
    rewards: dict[str, float] = Field(default_factory=dict)
    unscored: int = 0
    generated_tokens: int = 0
    ended: int = 0
    groups: int = 0
    alike: int = 0
    tokens: float = 0.0
    entropy: float = 0.0
    clip_weight: float = 0.0
    clip_low: float = 0.0
    clip_high: float = 0.0
    kl_tokens: float = 0.0
    kl: float = 0.0
    rollout_seconds: float = 0.0
    began: float = 0.0
    """Seconds of all steps when the window began."""


class RLCounters(Counters):
    """What reinforcement learning has counted so far."""

    completions: int = 0
    groups: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    unscored: int = 0
    rollout_seconds: float = 0.0
    scoring_seconds: float = 0.0
    window: Window = Field(default_factory=Window)
    last: RolloutEntry | None = None
    """The last log entry with a rollout in it: what later steps on the same rollout are logged with."""
    samples: list[SampledGroup] = Field(default_factory=list)


class RLSession(Session[RLCounters]):
    """Trains on completions that the model makes itself."""

    def __init__(self, run: RunDirectory, loaded: Loaded, attached: Attached, data: RLData) -> None:
        """Build the optimizer and continue the newest resume state, if there is one."""
        self.data = data
        self.spec = data.spec
        begin = RLCounters(plan=f"{data.plan.id}-{data.train.id}", threads=torch.get_num_threads())
        super().__init__(run, loaded, attached, data.spec, data.plan.steps, begin, len(data.validation))
        self.rollouts = Rollouts(
            attached.model,
            loaded.tokenizer,
            data.spec,
            limit=data.limit,
            stop=data.stop,
            dtype=loaded.spec.dtype,
        )
        self._judge = Judge(data.spec.task, data.spec.rewards)
        self._pretrained: TokenLoss | None = None

    def train(self, watchers: Sequence[Any], resume_every: int | None) -> None:
        """Do the steps that are left; see :meth:`Session.train`."""
        with self._judge:
            super().train(watchers, resume_every)

    def check(self) -> None:
        """Check that completions of a batch do not see each other; see :meth:`Session.check`."""
        check_rows(self.loss, self.attached)

    def trainer(self, follower: Follower) -> RolloutTrainer:
        """Return TRL's trainer for the steps that are left."""
        first = self.counters.step
        work = Work(
            prompts=[prompt.ids for prompt in self.data.train.kept],
            plan=self.data.plan.rollouts,
            first_step=first,
            steps=self.total - first,
            seeds=self._seeds,
            rollouts=self.rollouts,
            judge=self.judge,
            reference=self.reference,
            measured=self.measures_kl,
            loss=self.loss,
            attached=self.attached,
        )
        trainer: RolloutTrainer = TRAINERS[self.spec.objective](
            model=cast("PreTrainedModel", self.attached.model),
            tokenizer=self.loaded.tokenizer,
            spec=self.spec,
            work=work,
            optimizer=self.optimizer,
            scheduler=self.scheduler(),
            callback=follower,
            directory=self.run.path,
        )
        trainer.restore(self.buffer)
        return trainer

    def measures_kl(self, step: int) -> bool:
        """Say whether the divergence is measured at a step: at every one where the loss has it, else about 20 times."""
        every = 1 if self.spec.kl else math.ceil(self.total / KL_TIMES)
        return step in self.validate_at or step == self.total or step % every == 0

    def judge(self, prompts: Sequence[int], written: Sequence[Written]) -> list[Judged]:
        """Score completions of prompts, given by number."""
        kept = self.data.train.kept
        return self._judge.judge(
            [
                Answer(kept[prompt].item, one.text, len(one.ids), one.ended, self.data.limit)
                for prompt, one in zip(prompts, written, strict=True)
            ]
        )

    @contextmanager
    def reference(self) -> Iterator[TokenLoss]:
        """Give the loss under the reference model inside the block: the pretrained one, or the one at the start."""
        autocast = self.loss.autocast
        if self.data.pretrained is not None:
            if self._pretrained is None:
                self._pretrained = TokenLoss(self.data.pretrained().eval().requires_grad_(False), autocast)
            with self._pretrained as loss:
                yield loss
            return
        with pretrained(self.attached, autocast) as loss:
            yield loss

    def count(self, trainer: RolloutTrainer) -> StepInfo:
        """Count tokens, rollout and updates of a step."""
        counters, updates, window = self.counters, trainer.updates, self.counters.window
        counters.tokens += updates.input_tokens
        counters.padded_tokens += updates.padded_tokens
        counters.rows += updates.rows
        counters.rollout_seconds += trainer.rollout_seconds
        counters.scoring_seconds += trainer.scoring_seconds
        window.rollout_seconds += trainer.rollout_seconds
        for name in ("tokens", "entropy", "clip_weight", "clip_low", "clip_high", "kl_tokens", "kl"):
            setattr(window, name, getattr(window, name) + getattr(updates, name))
        if trainer.fresh and trainer.made is not None:
            self._count_rollout(trainer.made)
        reward = window.reward / window.completions if window.completions else None
        if reward is None and counters.last is not None:
            reward = counters.last.reward
        return StepInfo(
            counters.step, self.total, f"reward {reward:.3f}" if reward is not None else "", counters.tokens
        )

    def entry(self) -> dict[str, Any]:
        """Return what was rolled out and updated since the last entry."""
        counters, window = self.counters, self.counters.window
        made, last = window.completions, counters.last
        mean = window.reward / made if made else 0.0
        spread = max(window.squares / made - mean**2, 0.0) ** 0.5 if made else 0.0
        found: dict[str, Any] = {
            "entropy": window.entropy / window.tokens if window.tokens else None,
            "clip_low": window.clip_low / window.clip_weight if window.clip_weight else None,
            "clip_high": window.clip_high / window.clip_weight if window.clip_weight else None,
            "kl": window.kl / window.kl_tokens if window.kl_tokens else None,
            "completions": made,
            "generated_tokens": window.generated_tokens,
            "rollout_seconds": window.rollout_seconds,
            "update_seconds": max(counters.seconds - window.began - window.rollout_seconds, 0.0),
        }
        if made:
            entry = RolloutEntry(
                reward=mean,
                reward_std=spread,
                rewards={name: total / made for name, total in window.rewards.items()},
                unscored=window.unscored / made,
                length=window.generated_tokens / made,
                ended=window.ended / made,
                zero_variance=window.alike / window.groups,
                **found,
            )
        else:
            assert last is not None, "the first step of a training makes a rollout"
            entry = last.model_copy(update=found)
        counters.last = entry
        counters.window = Window(began=counters.seconds)
        return {"rollout": entry}

    def held_out(self) -> dict[str, Any]:
        """Return the mean score of greedy answers to the validation prompts; None if none could be scored."""
        prompts = self.data.validation
        said = self.rollouts.greedy([prompt.ids for prompt in prompts])
        judged = self._judge.judge(
            [
                Answer(prompt.item, text or "", 1, True, self.data.limit)
                for prompt, text in zip(prompts, said, strict=True)
            ]
        )
        scores = [one.score if text is not None else None for one, text in zip(judged, said, strict=True)]
        values = [None if score is None else score.value for score in scores]
        weights = [1.0 if score is None else score.weight for score in scores]
        return {"validation_reward": weighted_mean(values, weights).value}

    def kept(self, trainer: RolloutTrainer) -> dict[str, Tensor]:
        """Return the completions that are still to be trained on."""
        return trainer.buffer()

    def _seeds(self, rollout: int, count: int) -> list[int]:
        return [seed_for(self.run.spec.seed, "rollout", rollout, number) for number in range(count)]

    def _count_rollout(self, made: Made) -> None:
        counters, window, size = self.counters, self.counters.window, self.spec.group_size
        totals = reward_totals(self.spec, made.judged)
        tokens = sum(len(one.ids) for one in made.written)
        unscored = sum(one.score.value is None for one in made.judged)
        groups = [totals[start : start + size] for start in range(0, len(totals), size)]
        window.completions += len(totals)
        window.reward += sum(totals)
        window.squares += sum(total**2 for total in totals)
        for reward in self.spec.rewards:
            value = sum(one.rewards[reward.name] for one in made.judged)
            window.rewards[reward.name] = window.rewards.get(reward.name, 0.0) + value
        window.unscored += unscored
        window.generated_tokens += tokens
        window.ended += sum(one.ended for one in made.written)
        window.groups += len(groups)
        window.alike += sum(max(group) == min(group) for group in groups)
        counters.completions += len(totals)
        counters.groups += len(groups)
        counters.unscored += unscored
        counters.generated_tokens += tokens
        counters.prompt_tokens += sum(len(self.data.train.kept[prompt].ids) for prompt in made.prompts)
        number = self.data.plan.rollout_of(counters.step - 1)
        count = len(self.data.plan.rollouts)
        if number in {0, count // 2, count - 1}:
            counters.samples += self._samples(made, totals, groups)

    def _samples(self, made: Made, totals: Sequence[float], groups: Sequence[Sequence[float]]) -> list[SampledGroup]:
        """Return the first groups whose rewards differ, or else the first."""
        size = self.spec.group_size
        chosen = sorted(range(len(groups)), key=lambda place: (max(groups[place]) == min(groups[place]), place))
        found = []
        for group in sorted(chosen[:SAMPLED_GROUPS]):
            places = range(group * size, group * size + size)
            prompt = self.data.train.kept[made.prompts[places[0]]]
            completions = [
                SampledCompletion(
                    text=_cut(made.written[place].text),
                    tokens=len(made.written[place].ids),
                    ended=made.written[place].ended,
                    reward=totals[place],
                    rewards=made.judged[place].rewards,
                    advantage=made.advantages[place],
                    extracted=_cut(made.judged[place].score.extracted),
                    reason=made.judged[place].score.reason,
                )
                for place in places
            ]
            found.append(
                SampledGroup(
                    step=self.counters.step - 1,
                    item=prompt.item.id,
                    prompt=prompt.text,
                    answer=prompt.item.answer,
                    completions=tuple(completions),
                )
            )
        return found


def _cut(text: str) -> str:
    """Return a text for the record, which says how much of it was left out."""
    left = len(text) - SAMPLED_CHARACTERS
    return text if left <= 0 else f"{text[:SAMPLED_CHARACTERS]} […{left} more characters]"
