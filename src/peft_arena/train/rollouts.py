"""What generates the completions of reinforcement learning: the model itself here, or vLLM through TRL.

The model itself decodes as in evaluation (:mod:`peft_arena.evaluate.decode`): every method works, and a completion
depends on its prompt, its seed and the weights; in bfloat16 also, by rounding, on the rows beside it, which are the
same whenever a rollout is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peft_arena.core.specs import RLSpec
from peft_arena.evaluate.decode import Continuation, Job, Sampler, Stopper, decode, end_tokens
from peft_arena.evaluate.engine import default_batch_size
from peft_arena.models.modes import device_of, evaluation_mode
from peft_arena.models.ways import Way
from peft_arena.store.records import DECODING
from peft_arena.train.outcome import TrainingFailed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class Written(NamedTuple):
    """One completion."""

    ids: list[int]
    """Its tokens, at least one, with the end token or the token that completed a stop string."""
    text: str
    """What it says, up to its end: what is scored."""
    ended: bool
    """Whether it ended by itself, before the limit of tokens."""


class Rollouts:
    """Completes prompts with the model that is trained."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        spec: RLSpec,
        *,
        limit: int,
        stop: tuple[str, ...],
        dtype: str,
    ) -> None:
        """Refer to a model.

        Args:
            model: the model with the method in place; it is left in the mode it is in.
            tokenizer: the model's.
            spec: how tokens are sampled.
            limit: most tokens of a completion.
            stop: strings that end a completion.
            dtype: ``bfloat16`` computes in mixed precision.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.sampler = Sampler(temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k)
        self.limit = limit
        self.stop = stop
        self.dtype = dtype
        self.rows = max(default_batch_size(model), spec.micro_batch_size or 0)
        self.engine = spec.rollouts
        self.notice = ""
        """Why completions were not written with a cache, where they were not."""
        self.stopper = Stopper(tokenizer, stop, end_tokens(model, tokenizer))

    def describe(self) -> dict[str, Any]:
        """Return name, version and settings, for the record."""
        package = "transformers" if self.engine == "transformers" else "vllm"
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        return {
            "engine": self.engine,
            package: version,
            "max_new_tokens": self.limit,
            "stop": list(self.stop),
            **self.sampler._asdict(),
            "batch_size": self.rows,
            "device": str(device_of(self.model)),
            "dtype": self.dtype,
            **({DECODING: self.notice} if self.notice else {}),
        }

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], step: int) -> list[Written]:
        """Sample a completion of each prompt, each from its own stream of random numbers.

        Raises:
            TrainingFailed: the model's logits are not finite.
        """
        jobs = [Job(ids, self.limit, self.stop, seed) for ids, seed in zip(prompts, seeds, strict=True)]
        found = self._decode(jobs, self.sampler)
        if not all(one.finite for one in found):
            raise TrainingFailed(
                f"training failed at step {step + 1}: the logits of {sum(not one.finite for one in found)} of "
                f"{len(found)} completions are not finite; a lower learning_rate may help"
            )
        return [Written(list(one.ids), one.text, one.ended) for one in found]

    def greedy(self, prompts: Sequence[list[int]]) -> list[str | None]:
        """Return the most likely completion of each prompt, as evaluation does; None where logits are not finite."""
        found = self._decode([Job(ids, self.limit, self.stop) for ids in prompts], None)
        return [one.text if one.finite else None for one in found]

    def read(self, ids: Sequence[int], prompt: Sequence[int]) -> Written:
        """Return a completion of a prompt that another engine wrote, cut at its end."""
        kept: list[int] = []
        opened = self.stopper.opened(prompt)
        ended = False
        for token in ids:
            kept.append(int(token))
            if self.stopper.ended([kept], [opened])[0]:
                ended = True
                break
        if not kept:  # an engine may leave out the only token, the end
            kept, ended = [min(self.stopper.end_ids)], True
        return Written(kept, self.stopper.text(kept, opened), ended)

    def _decode(self, jobs: Sequence[Job], sampler: Sampler | None) -> list[Continuation]:
        with evaluation_mode(self.model), self._precision():
            return decode(
                self.model,
                self.tokenizer,
                jobs,
                batch_size=self.rows,
                done=_not_shown,
                sampler=sampler,
                used=self._used,
            )

    def _used(self, way: Way) -> None:
        self.notice = way.notice or self.notice

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(device_of(self.model).type, torch.bfloat16)


def _not_shown(_: int) -> None:
    """Show nothing: a rollout is part of a step."""
