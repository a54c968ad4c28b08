"""TRL's GRPO and RLOO trainers, fed with our rollouts, rewards and log-probabilities. Imported only when one starts.

What is TRL's: advantages, the losses with their clipping, divergence and averaging, when a rollout is made and how its
completions are divided among optimizer steps, the loop, vLLM. What is changed, and why:

* completions are decoded and cut as in evaluation, and scored by the task in a process of its own;
* log-probabilities come from :mod:`peft_arena.train.policy`: TRL's own leave out methods that act on the output layer
  or need labels, and terms that a method adds to its loss;
* the reference is the pretrained model whatever the method did when it was attached. TRL switches adapters off or
  copies some of their parameters, which is another model for about half of the methods;
* completions that met the limit of tokens are known by our stop strings, not only by the end token;
* everything that :mod:`peft_arena.train.quiet_trainer` changes.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from peft_arena.core.specs import RLSpec
from peft_arena.train.loss import TokenLoss
from peft_arena.train.outcome import TrainingFailed
from peft_arena.train.policy import Scores, scores
from peft_arena.train.quiet import model_kept, random_kept, surface_kept
from peft_arena.train.quiet_trainer import QuietTrainer, as_it_is, quiet_arguments
from peft_arena.train.rollouts import Rollouts, Written
from peft_arena.train.vllm import check_unchanged, digest, plain_weights, vllm_arguments

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_arena.methods.base import Attached
    from peft_arena.tasks.rewards import Judged

Row = dict[str, str]
"""One completion to make, as TRL hands it on: its prompt by number."""
KL_LOG_PROBS = "kl_log_probs"
REFERENCE = "reference"
"""Stands for the reference model where TRL wants one."""


class Made(NamedTuple):
    """One rollout, in the order in which it was made: all completions of a prompt in a row."""

    prompts: list[int]
    """Number of the prompt of each completion."""
    written: list[Written]
    judged: list[Judged]
    advantages: list[float]


class Updates:
    """What the forward passes of an optimizer step saw, summed over tokens (clipping of RLOO: completions)."""

    def __init__(self) -> None:
        """Begin a step."""
        self.tokens = 0.0
        self.entropy = 0.0
        self.clip_weight = 0.0
        self.clip_low = 0.0
        self.clip_high = 0.0
        self.kl_tokens = 0.0
        self.kl = 0.0
        self.input_tokens = 0
        self.padded_tokens = 0
        self.rows = 0


class Work(NamedTuple):
    """What a trainer is to do, beyond what the spec says."""

    prompts: Sequence[list[int]]
    """Token ids of every prompt."""
    plan: Sequence[Sequence[int]]
    """The prompts of every rollout, by number."""
    first_step: int
    """Optimizer steps done before."""
    steps: int
    """Optimizer steps to do."""
    seeds: Callable[[int, int], list[int]]
    """Gives a seed for each completion from the number of a rollout and of its completions."""
    rollouts: Rollouts
    judge: Callable[[Sequence[int], Sequence[Written]], list[Judged]]
    """Scores completions of prompts."""
    reference: Callable[[], AbstractContextManager[TokenLoss]]
    """Gives the reference model's loss inside the block."""
    measured: Callable[[int], bool]
    """Says whether the divergence from the reference is wanted at a step, counted from 1."""
    loss: TokenLoss
    attached: Attached


class RolloutTrainer(QuietTrainer):
    """What GRPO and RLOO have in common; stands before TRL's class."""

    state: Any
    model: Any
    beta: Any
    ref_model: Any
    vllm_generation: Any
    _metrics: Any
    _step: int
    _buffered_inputs: Any
    current_gradient_accumulation_steps: int
    scale_by_passes = False
    """Whether the loss is still to be divided by the forward passes of a step."""
    gives_log_probs = True
    """Whether TRL's generation also returns log-probabilities, None where it has none."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: RLSpec,
        work: Work,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        callback: TrainerCallback,
        directory: Path,
    ) -> None:
        """Set the trainer up; the model is changed in nothing.

        Args:
            model: the model with the method in place.
            tokenizer: the model's; TRL wants to see it.
            spec: how it is trained.
            work: what it is trained on.
            optimizer: over exactly the trained parameters.
            scheduler: of the optimizer.
            callback: told about the steps.
            directory: an existing directory; nothing is written there.
        """
        self.spec = spec
        self.work = work
        self.made: Made | None = None
        """The rollout that is trained on."""
        self.fresh = False
        """Whether it was made in the step just done."""
        self.updates = Updates()
        self.rollout_seconds = 0.0
        self.scoring_seconds = 0.0
        self._seen: Scores | None = None
        self._reference: Tensor | None = None
        self._asked: list[int] = []
        with surface_kept(model), random_kept(), _untouched(type(self)):
            super().__init__(  # type: ignore[call-arg]
                model=model,
                reward_funcs=[self._reward(reward.name) for reward in spec.rewards],
                args=arguments(spec, work, directory),
                train_dataset=Dataset.from_dict({"prompt": ["0"]}),
                processing_class=tokenizer,
                optimizers=(optimizer, scheduler),
                callbacks=[callback],
            )
        if spec.rollouts != "transformers":
            self.vllm_generation._iter_named_params = lambda: plain_weights(work.attached)
        self.beta = spec.kl
        self.ref_model = REFERENCE if spec.kl else None
        self._step = work.first_step * self.args.gradient_accumulation_steps
        self.settle(work.attached.trained().values())

    def get_train_dataloader(self) -> DataLoader[list[Row]]:
        """Return, for every forward pass that is left, the prompts of the rollout it belongs to."""
        passes = _Passes(self.work, self.spec, self.args.gradient_accumulation_steps)
        return DataLoader(passes, batch_size=None, collate_fn=as_it_is)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Row]], None]:
        """Return the rows of one optimizer step, and begin to count anew."""
        self.updates = Updates()
        self.fresh = False
        self.rollout_seconds = self.scoring_seconds = 0.0
        return [rows for _, rows in zip(range(num_batches), epoch_iterator, strict=False)], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: object = None) -> Tensor:
        """Make a rollout if one is due, and run one forward and backward pass.

        Raises:
            TrainingFailed: the loss, or the model's logits, are not finite.
        """
        trainer: Any = self
        loss: Tensor = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
        if not math.isfinite(float(loss.detach())):
            step = self.work.first_step + self.state.global_step + 1
            raise TrainingFailed(
                f"training failed at step {step}: the loss is {float(loss.detach())}; nothing after the last save "
                "point is kept. A lower learning_rate may help"
            )
        loss.backward()
        self._step += 1
        return loss.detach()

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return TRL's loss with what the method adds, this pass's share of the step's, and count what was seen."""
        self._metrics["train"].clear()
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        if self.scale_by_passes:
            loss = loss / self.current_gradient_accumulation_steps
        seen, mask = self._seen, inputs["completion_mask"]
        assert seen is not None, "TRL asked for no log-probabilities"
        tokens = float(mask.sum())
        updates = self.updates
        updates.tokens += tokens
        updates.entropy += float((seen.entropy * mask).sum())
        seen_by_trl = float(len(mask)) if self.scale_by_passes else tokens  # its means are over these
        updates.clip_weight += float(mask.any(1).sum()) if self.scale_by_passes else tokens
        updates.clip_low += seen_by_trl * float(self._metrics["train"]["clip_ratio/low_mean"][-1])
        updates.clip_high += seen_by_trl * float(self._metrics["train"]["clip_ratio/high_mean"][-1])
        if KL_LOG_PROBS in inputs:
            ratio = inputs[KL_LOG_PROBS] - seen.log_probs.detach()
            updates.kl += float(((ratio.exp() - ratio - 1) * mask).sum())
            updates.kl_tokens += tokens
        if seen.extra is not None:
            loss = loss + seen.extra / self.current_gradient_accumulation_steps
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor, None]:
        """Score completions by the policy (with gradients: in training mode) or by the reference.

        Shapes (rows, places) in and (rows, ``logits_to_keep``) out, nats.
        """
        if torch.is_grad_enabled():
            found = self._score(self.work.loss, input_ids, attention_mask, logits_to_keep)
            self._seen = found
            self.updates.input_tokens += int(attention_mask.sum())
            self.updates.padded_tokens += found.padded_tokens
            self.updates.rows += len(attention_mask)
            return found.log_probs, found.entropy, None
        size = batch_size or len(input_ids)
        with self._scorer(model) as loss:
            scored = [
                self._score(loss, input_ids[row : row + size], attention_mask[row : row + size], logits_to_keep)
                for row in range(0, len(input_ids), size)
            ]
        log_probs = torch.cat([one.log_probs for one in scored])
        if model is REFERENCE:
            self._reference = log_probs
        return log_probs, torch.cat([one.entropy for one in scored]), None

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        self._asked = [int(prompt) for prompt in prompts]
        return [self.work.prompts[prompt] for prompt in self._asked], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: object, fields: dict[str, Any], *more: object, **settings: object
    ) -> Any:
        """Complete the prompts of a rollout and have the completions judged; return what TRL's own method does."""
        started = time.perf_counter()
        step = self.work.first_step + self.state.global_step
        log_probs: list[list[float]] | None = None
        if self.spec.rollouts == "transformers":
            seeds = self.work.seeds(step // self.spec.steps_per_rollout, len(prompt_ids))
            written = self.work.rollouts.sample(prompt_ids, seeds, step)
        else:
            before = digest(self.model)
            found = super()._generate_single_turn(prompt_ids, images, fields, *more, **settings)  # type: ignore[misc]
            check_unchanged(before, self.model)
            ids, log_probs = found if self.gives_log_probs else (found, None)
            written = [self.work.rollouts.read(row, asked) for row, asked in zip(ids, prompt_ids, strict=True)]
            if log_probs is not None:  # of what was cut off there is none, of an end that was put on it is taken as 0
                log_probs = [
                    [*row[: len(one.ids)], *[0.0] * (len(one.ids) - len(row))]
                    for row, one in zip(log_probs, written, strict=True)
                ]
        began = time.perf_counter()
        judged = self.work.judge(self._asked, written)
        now = time.perf_counter()
        self.scoring_seconds += now - began
        self.rollout_seconds += now - started
        self.made = Made(self._asked, written, judged, [])
        made = [one.ids for one in written]
        return (made, log_probs) if self.gives_log_probs else made

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Tensor]:
        """Make a rollout: completions, rewards, advantages, and what the divergence needs."""
        self._reference = None
        output: dict[str, Tensor] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        assert self.made is not None, "TRL made no rollout"
        output["advantages"] = self._without_rounding(output["advantages"], self.made.judged)
        self.made = self.made._replace(advantages=output["advantages"].tolist())
        self.fresh = True
        mask = output["completion_mask"]
        if self._reference is None and self.measures_kl():
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
            with torch.no_grad():
                seen = torch.cat([output["prompt_mask"], mask], 1)
                size = self.args.per_device_train_batch_size
                self._get_per_token_logps_and_entropies(REFERENCE, ids, seen, mask.shape[1], batch_size=size)
        if self._reference is not None:
            output[KL_LOG_PROBS] = self._reference
        if self.spec.truncated == "mask":
            kept = torch.tensor([one.ended for one in self.made.written], device=mask.device)
            output["completion_mask"] = mask * kept[:, None].to(mask.dtype)
            if "old_logps" in output:  # of whole completions (RLOO): those left out say nothing, before and after
                output["old_logps"] = output["old_logps"] * kept
            if "num_items_in_batch" in output:
                output["num_items_in_batch"] = output["completion_mask"].sum()
        return output

    def measures_kl(self) -> bool:
        """Say whether the divergence is wanted of a step on the rollout that is being made."""
        step = self.work.first_step + self.state.global_step
        return any(map(self.work.measured, range(step + 1, step + 1 + self.spec.steps_per_rollout)))

    def _without_rounding(self, advantages: Tensor, judged: Sequence[Judged]) -> Tensor:
        """Give completions of equal reward the advantage 0 that they have.

        The mean of equal float32 numbers need not be the number itself, and what is left, divided by a standard
        deviation of about 0, would move the weights.
        """
        if self.spec.objective == "rloo" and self.spec.kl:
            return advantages  # the divergence is part of the reward there
        totals, size = reward_totals(self.spec, judged), self.spec.group_size
        alike = [max(group) == min(group) for start in range(0, len(totals), size) if (group := totals[start:][:size])]
        return advantages.masked_fill(torch.tensor(alike, device=advantages.device).repeat_interleave(size), 0.0)

    def buffer(self) -> dict[str, Tensor]:
        """Return the rollout that is not yet used up, for a resume state; nothing if the next step makes one."""
        if self._step % (self.args.steps_per_generation * self.spec.updates_per_rollout) == 0:
            return {}
        return {
            f"{number}.{name}": tensor
            for number, batch in enumerate(self._buffered_inputs)
            for name, tensor in batch.items()
            if tensor is not None
        }

    def restore(self, buffer: dict[str, Tensor]) -> None:
        """Go on with a rollout of an earlier process."""
        if not buffer:
            return
        batches: list[dict[str, Tensor]] = [{} for _ in range(self.args.steps_per_generation)]
        for key, tensor in buffer.items():
            number, _, name = key.partition(".")
            batches[int(number)][name] = tensor.to(self.work.loss.device)
        self._buffered_inputs = batches

    def _score(self, loss: TokenLoss, ids: Tensor, mask: Tensor, width: int) -> Scores:
        return scores(loss, ids, mask, width, self.spec.temperature)

    @contextmanager
    def _scorer(self, model: Any) -> Iterator[TokenLoss]:
        """Give the reference, or the policy without dropout."""
        if model is REFERENCE:
            with self.work.reference() as loss:
                yield loss
            return
        with model_kept(self.model):
            self.model.eval()
            yield self.work.loss

    def _reward(self, name: str) -> Callable[..., list[float]]:
        """Return what TRL asks for one reward of the rollout just made."""

        def reward(**_: object) -> list[float]:
            assert self.made is not None, "rewards were asked for before a rollout"
            return [judged.rewards[name] for judged in self.made.judged]

        reward.__name__ = name
        return reward


class PlannedGRPO(RolloutTrainer, GRPOTrainer):  # type: ignore[misc]
    """Group relative policy optimization."""


class PlannedRLOO(RolloutTrainer, RLOOTrainer):  # type: ignore[misc]
    """REINFORCE leave-one-out."""

    scale_by_passes = True
    gives_log_probs = False


TRAINERS: dict[str, type[Any]] = {"grpo": PlannedGRPO, "rloo": PlannedRLOO}


class _Passes(torch.utils.data.Dataset[list[Row]]):
    """For every forward pass that is left, the prompts of the rollout it belongs to, each once per completion."""

    def __init__(self, work: Work, spec: RLSpec, passes: int) -> None:
        self.work = work
        self.spec = spec
        self.passes = passes

    def __len__(self) -> int:
        return self.work.steps * self.passes

    def __getitem__(self, place: int) -> list[Row]:
        if not 0 <= place < len(self):
            raise IndexError(place)
        step = self.work.first_step + place // self.passes
        prompts = self.work.plan[step // self.spec.steps_per_rollout]
        return [{"prompt": str(prompt)} for prompt in prompts for _ in range(self.spec.group_size)]


def reward_totals(spec: RLSpec, judged: Sequence[Judged]) -> list[float]:
    """Return the weighted sum of all rewards of each completion."""
    return [sum(reward.weight * one.rewards[reward.name] for reward in spec.rewards) for one in judged]


@contextmanager
def _untouched(trainer: type) -> Iterator[None]:
    """Keep the constructors of TRL's trainers from changing the model inside the block.

    They give a PEFT model a second adapter (RLOO), refuse one on the output layer, and put an output layer of their own
    over the model's. All of this serves reference and log-probabilities, which are ours.
    """
    module = sys.modules[next(kind for kind in trainer.__mro__ if kind in (GRPOTrainer, RLOOTrainer)).__module__]
    kept = {name: getattr(module, name) for name in ("is_peft_model", "add_fused_lm_head")}
    vars(module).update(is_peft_model=lambda model: False, add_fused_lm_head=lambda *model, **settings: None)
    try:
        yield
    finally:
        vars(module).update(kept)


def arguments(spec: RLSpec, work: Work, directory: Path) -> GRPOConfig | RLOOConfig:
    """Return TRL's configuration; what is done elsewhere or by nobody is switched off."""
    size = spec.micro_batch_size or spec.batch_size
    common: dict[str, Any] = {
        **quiet_arguments(directory, work.steps, spec.batch_size // size, spec.max_grad_norm, work.loss.device.type),
        "per_device_train_batch_size": size,
        "steps_per_generation": spec.rollout_size // size,
        "num_generations": spec.group_size,
        "num_iterations": spec.updates_per_rollout,
        "max_completion_length": work.rollouts.limit,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": spec.top_k,
        "beta": 0.0,  # set afterwards: with it, TRL would build a reference of its own
        "epsilon": spec.clip_low,
        "epsilon_high": spec.clip_high,
        "reward_weights": [reward.weight for reward in spec.rewards],
        "disable_dropout": False,
        "mask_truncated_completions": False,
        **vllm_arguments(spec, work.rollouts.stop),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL sets gradient_checkpointing by its old name
        if spec.objective == "rloo":
            return RLOOConfig(**common)
        return GRPOConfig(
            **common,
            loss_type=spec.loss,
            scale_rewards=spec.advantage_scale,
            use_bias_correction_kl=True,  # the divergence times the ratio, so that its gradient is that of the KL
        )
