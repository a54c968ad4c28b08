"""Methods that are each wrong in one way, to show that the conformance suite finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from peft_arena.methods.adapter import ADAPTER, PeftAttached, tuner_layers
from peft_arena.methods.base import Attached, Capability, MethodCard, MethodConfig, PathKind
from peft_arena.methods.low_rank.lora import Lora, LoraConfig
from peft_arena.methods.low_rank.miss import Miss
from peft_arena.methods.orthogonal.oft import Oft
from peft_arena.methods.prompts.prompt import PromptTuning
from peft_arena.methods.shared.lily import Lily
from peft_arena.methods.shared.vera import Vera, VeraAttached
from peft_arena.methods.state import copy_into


def declaring(card: MethodCard, *more: Capability, **changes: object) -> MethodCard:
    return card.model_copy(update={"capabilities": card.capabilities | set(more), **changes})


class IgnoresAlpha(Lora):
    def peft_config(self, patterns: list[str], seed: int) -> Any:
        config: Any = super().peft_config(patterns, seed)
        config.lora_alpha = 16
        return config


class UsesGlobalSeed(Lora):
    def attach(self, model: Any, *, seed: int, calibration: object = None) -> Attached:
        return super().attach(model, seed=int(torch.randint(0, 1000, ())))


class TrainsHead(Lora):
    def attach(self, model: Any, *, seed: int, calibration: object = None) -> Attached:
        attached = super().attach(model, seed=seed)
        model.lm_head.requires_grad_(True)
        return attached


class LeavesTrainingMode(Lora):
    def attach(self, model: Any, *, seed: int, calibration: object = None) -> Attached:
        attached = super().attach(model, seed=seed)
        attached.model.eval()
        return attached


class SavesNothing(Oft):
    def attach(self, model: Any, *, seed: int, calibration: object = None) -> Attached:
        attached: Any = super().attach(model, seed=seed)
        save = attached.save

        def forgetful(directory: Path) -> None:
            kept = {name: p.detach().clone() for name, p in attached.trained().items()}
            with torch.no_grad():
                for p in attached.trained().values():
                    p.zero_()
                save(directory)
                for name, p in attached.trained().items():
                    p.copy_(kept[name])

        attached.save = forgetful
        return attached


class ClaimsIdentity(PromptTuning):
    card: ClassVar[MethodCard] = declaring(PromptTuning.card, Capability.IDENTITY_AT_INIT)


class ClaimsVectors(Lora):
    card = declaring(Lora.card, Capability.VIRTUAL_TOKENS)


class ForgetsProjection(Vera):
    """Its state has the trained vectors, not the random matrices they work on."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        return PeftAttached(self, model, base)


class Remembers(Lora):
    """What it restores is from the memory of the process that saved."""

    memory: ClassVar[dict[Path, dict[str, Any]]] = {}

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached = super().hold(model, base)
        save = attached.save

        def forgetful(directory: Path) -> None:
            self.memory[directory.resolve()] = {name: p.detach().clone() for name, p in model.named_parameters()}
            save(directory)

        attached.save = forgetful  # type: ignore[method-assign]
        return attached

    def restore(self, model: Any, directory: Path) -> Attached:
        attached = super().restore(model, directory)
        kept = self.memory.get(directory.resolve())
        with torch.no_grad():
            for name, p in attached.model.named_parameters():
                if "lora_B" in name:
                    p.copy_(kept[name] if kept else torch.zeros_like(p))
        return attached


class NamesAnotherBase(Lora):
    def hold(self, model: Any, base: str) -> PeftAttached:
        return super().hold(model, "gpt2")


class CountsSteps(Lora):
    """Its learning rate depends on how many steps this attachment has done, which no state holds."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached: Any = super().hold(model, base)
        attached.steps = 0

        def after_step(step: int, total: int) -> None:
            attached.steps += 1
            with torch.no_grad():
                for p in attached.trained().values():
                    p.mul_(1 - 0.1 * attached.steps)

        attached.after_step = after_step
        return attached


class Climbs(Lora):
    """Its optimizer goes uphill, and only in training mode its logits are so large that every loss there is higher."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached: Any = super().hold(model, base)

        def optimizer(learning_rate: float, weight_decay: float) -> Any:
            return torch.optim.AdamW(attached.parameter_groups(learning_rate, 0.0), lr=learning_rate, maximize=True)

        attached.optimizer = optimizer
        head = model.get_base_model().lm_head
        head.register_forward_pre_hook(lambda module, given: (given[0] * 5,) if module.training else None)
        return attached


class MovesUnderAutocast(Lora):
    """It starts as the pretrained model, except in mixed precision."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        def shift(module: Any, given: Any, output: Any) -> Any:
            return output + 1 if torch.is_autocast_enabled("cpu") else output

        model.get_base_model().lm_head.register_forward_hook(shift)
        return super().hold(model, base)


class BreaksUnderAutocast(Lora):
    """In mixed precision its update is cut off from training."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        def cut(module: Any, given: Any, output: Any) -> Any:
            return output * 0 if torch.is_autocast_enabled("cpu") else output

        for layer in tuner_layers(model).values():
            layer.lora_B["default"].register_forward_hook(cut)
        return super().hold(model, base)


class GrowsWithEveryCall(Lora):
    """What a layer gives depends on how often it was asked, so a repeated pass is another one."""

    def attach(self, model: Any, *, seed: int, calibration: object = None) -> Attached:
        attached: Any = super().attach(model, seed=seed)
        calls = {name: 0 for name, _ in attached.model.named_modules()}
        for name, module in attached.model.named_modules():
            if name.endswith("q_proj"):

                def grow(_: Any, __: Any, output: Any, name: str = name) -> Any:
                    calls[name] += 1
                    return output * (1 + calls[name] / 10)

                module.register_forward_hook(grow)
        return attached


class ClaimsKeysAndValues(Lora):
    card = declaring(Lora.card, Capability.KEYS_AND_VALUES)


class OddMoments(Lora):
    """Its optimizer keeps a number that is no tensor."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached: Any = super().hold(model, base)

        def optimizer(learning_rate: float, weight_decay: float) -> Any:
            found = torch.optim.AdamW(attached.parameter_groups(learning_rate, weight_decay), lr=learning_rate)
            found.register_step_post_hook(lambda *_: [state.update(name="x") for state in found.state.values()])
            return found

        attached.optimizer = optimizer
        return attached


class CountsWrongly(Lora):
    def count(self, model: Any) -> int:
        return super().count(model) + 1


class CountsNothing(Lora):
    def count(self, model: Any) -> Any:
        return None


class CountsByWeights(Lora):
    def count(self, model: Any) -> int:
        return super().count(model) + int(next(model.parameters()).device.type == "meta")


class NoSizes(Lora):
    def sizes(self, model: Any) -> list[int]:
        return []


class FallingSizes(Lora):
    def sizes(self, model: Any) -> list[int]:
        return [8, 4, 2]


class ClipsRank(Lora):
    """Takes any rank and silently uses the largest that fits."""

    def linears(self, model: Any) -> Any:
        self.config = self.config.model_copy(update={"rank": min(self.config.rank, 32)})
        return super().linears(model)

    def count(self, model: Any) -> int:
        self.linears(model)
        return super().count(model)


class FreeConfig(LoraConfig):
    rank: int = Field(default=8, multiple_of=1)
    """Not bounded below."""


class TakesAnyRank(Lora):
    Config: ClassVar[type[MethodConfig]] = FreeConfig


class DoraForServers(Lora):
    decomposed: ClassVar[bool] = True
    card: ClassVar[MethodCard] = declaring(Lora.card, Capability.LORA_ADAPTER)


class MissForServers(Miss):
    card: ClassVar[MethodCard] = declaring(Miss.card, Capability.LORA_ADAPTER)


class WrongScaleInFile(Lora):
    card: ClassVar[MethodCard] = declaring(Lora.card, Capability.LORA_ADAPTER)

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached = super().hold(model, base)
        save = attached.save

        def other(directory: Path) -> None:
            save(directory)
            file = directory / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 1.0}))

        attached.save = other  # type: ignore[method-assign]
        return attached


class PatternsForServers(Lora):
    """Not broken: layers of other ranks and scales, which the file says."""

    card: ClassVar[MethodCard] = declaring(Lora.card, Capability.LORA_ADAPTER)

    def peft_config(self, patterns: list[str], seed: int) -> Any:
        config: Any = super().peft_config(patterns, seed)
        config.rank_pattern = {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 5}
        config.alpha_pattern = {"q_proj": 2.0}
        config.use_rslora = True
        return config

    def count(self, model: Any) -> int:
        other = {name: 3 if name.endswith("q_proj") else 8 for name in self.linears(model)}
        other["model.layers.1.mlp.down_proj"] = 5
        return sum(other[name] * (m.in_features + m.out_features) for name, m in self.linears(model).items())


class Undocumented(LoraConfig):
    strength: float = 1.0
    alternatives: ClassVar[Mapping[str, Any]] = {**LoraConfig.alternatives, "strength": 2.0}


class HasUndocumented(Lora):
    Config: ClassVar[type[MethodConfig]] = Undocumented


class NoCalibrationAsked(Lora):
    card: ClassVar[MethodCard] = declaring(Lora.card, Capability.NEEDS_CALIBRATION)


class CalibratedConfig(LoraConfig):
    calibration_examples: int = 4
    """Training examples to look at."""
    alternatives: ClassVar[Mapping[str, Any]] = {**LoraConfig.alternatives, "calibration_examples": 2}


class TakesNoCalibration(Lora):
    Config: ClassVar[type[MethodConfig]] = CalibratedConfig
    card: ClassVar[MethodCard] = declaring(Lora.card, Capability.NEEDS_CALIBRATION)


class NotReallyQuantized(Lora):
    card: ClassVar[MethodCard] = declaring(Lora.card, Capability.QUANTIZED_BASE, Capability.NEEDS_QUANTIZED_BASE)


class KnownToFail(IgnoresAlpha):
    card: ClassVar[MethodCard] = declaring(Lora.card, known_failures={"fields": "alpha is ignored"})


class WronglyKnownToFail(Lora):
    card: ClassVar[MethodCard] = declaring(Lora.card, known_failures={"merge": "we thought so"})


class KnownUnderNoName(Lora):
    card: ClassVar[MethodCard] = declaring(Lora.card, known_failures={"mergin": "no such check"})


class MergesTwice(Lora):
    def hold(self, model: Any, base: str) -> PeftAttached:
        attached = super().hold(model, base)
        merged = attached.merged

        def twice() -> Any:
            for layer in tuner_layers(model).values():
                layer.scaling[ADAPTER] *= 2
            return merged()

        attached.merged = twice  # type: ignore[method-assign]
        return attached


class TakesAnyState(Lora):
    def hold(self, model: Any, base: str) -> PeftAttached:
        attached = super().hold(model, base)

        def load_state(state: Mapping[str, Any]) -> None:
            shared = {name: p for name, p in attached.trained().items() if name in state}
            copy_into(shared, {name: state[name] for name in shared})

        attached.load_state = load_state  # type: ignore[method-assign]
        return attached


class StaysOn(Lora):
    def hold(self, model: Any, base: str) -> PeftAttached:
        attached = super().hold(model, base)
        attached.disabled = lambda: nullcontext(model)  # type: ignore[method-assign,return-value]
        return attached


class AnyProjection(Vera):
    """Draws its random matrices anew in every attachment of a checkpoint, and says they are saved."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        return VeraAttached(self, model, base)

    def restore(self, model: Any, directory: Path) -> Attached:
        attached = super().restore(model, directory)
        tuner: Any = attached.model.base_model
        tuner.vera_A[ADAPTER].data.normal_()
        return attached


class WritesWhatItNeverReads(Lora):
    def hold(self, model: Any, base: str) -> PeftAttached:
        attached = super().hold(model, base)
        save = attached.save

        def more(directory: Path) -> None:
            save(directory)
            (directory / "notes.txt").write_text("never read")

        attached.save = more  # type: ignore[method-assign]
        return attached


class DeniesItsSeed(Lora):
    card: ClassVar[MethodCard] = declaring(Lora.card, random_init=False)


class GeneratesAnything(Lora):
    def hold(self, model: Any, base: str) -> PeftAttached:
        model.generate = lambda input_ids, **_: torch.nn.functional.pad(input_ids, (0, 3), value=199)
        return super().hold(model, base)


class MixesRows(Lily):
    """With routing 'batch', a token's mixture is averaged over all tokens of the batch."""


class WornBySampling(Lora):
    """Each forward pass in evaluation mode moves a buffer that it works with."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        model.register_buffer("worn", torch.zeros(()))

        def wear(module: Any, _: object) -> None:
            module.worn += 0.0 if module.training else 1.0

        model.register_forward_pre_hook(wear)
        return super().hold(model, base)


class DrawsFromOthers(Lora):
    """Its logits after the first token of a completion are others than those of the whole row."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        def shift(module: Any, given: Any, output: Any) -> Any:
            return output.flip(-1) if output.shape[1] == 1 and not module.training else output

        model.get_base_model().lm_head.register_forward_hook(shift)
        return super().hold(model, base)


class RemembersReference(Lora):
    """Switched off while it is trained it is still itself; before and after training it is the pretrained model."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached: Any = super().hold(model, base)
        attached.total, off = 0, attached.disabled

        def begin(total: int) -> None:
            attached.disabled = lambda: nullcontext(model)

        attached.begin, attached.disabled = begin, off
        return attached


class LearnsLongRowsFaster(Lora):
    """Its gradients are larger in batches of more than one row."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        def grow(module: Any, given: Any, output: Any) -> Any:
            if len(given[0]) > 1 and output.requires_grad:
                output.register_hook(lambda gradient: gradient * 1.5)
            return output

        for layer in tuner_layers(model).values():
            layer.register_forward_hook(grow)
        return super().hold(model, base)


class FreezesByStep(Lora):
    """Its optimizer leaves out what it promised to train."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached: Any = super().hold(model, base)

        def optimizer(learning_rate: float, weight_decay: float) -> Any:
            found = torch.optim.AdamW(attached.parameter_groups(learning_rate, 0.0), lr=learning_rate)
            found.param_groups[0]["params"] = found.param_groups[0]["params"][1:]
            return found

        attached.optimizer = optimizer
        return attached


class SaysRotation(Lora):
    card: ClassVar[MethodCard] = Lora.card.model_copy(update={"path": PathKind.CAYLEY})


class SaysNoPath(Lora):
    card: ClassVar[MethodCard] = Lora.card.model_copy(update={"path": PathKind.NONE})


class TurnsBySeries(Oft):
    """Turns so far that a series is no rotation."""
