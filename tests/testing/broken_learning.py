"""Methods that are each wrong in one way in how they learn, evaluate, compute or share, for the conformance suite."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional

from peft_arena.methods.adapter import ADAPTER, PeftAttached, tuner_layers
from peft_arena.methods.base import Attached, MethodCard
from peft_arena.methods.low_rank.lora import Lora, LoraConfig, LoraPlus, RsLora
from peft_arena.methods.prompts.prompt import PromptTuning


class Held(Lora):
    """Not broken: a place for what the broken ones change in the attachment."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached = super().hold(model, base)
        self.change(attached, model)
        return attached

    def change(self, attached: Any, model: Any) -> None:
        """Break the attachment."""


class DropsInEvaluation(Held):
    """Its dropout, once set, never ends."""

    def change(self, attached: Any, model: Any) -> None:
        rate = self.config.dropout
        for layer in tuner_layers(model).values():
            layer.lora_dropout[ADAPTER].forward = lambda x: functional.dropout(x, rate, training=True)


class NoisyEvaluation(Held):
    def change(self, attached: Any, model: Any) -> None:
        model.get_base_model().lm_head.register_forward_hook(lambda _, __, output: output + torch.rand(()) / 10)


class StuckInTraining(Held):
    """A module of it is put back into training mode whenever the model is to leave it."""

    def change(self, attached: Any, model: Any) -> None:
        layer = next(iter(tuner_layers(model).values())).lora_dropout[ADAPTER]
        layer.train = lambda mode=True: layer
        layer.training = True


class FixedRate(Held):
    def change(self, attached: Any, model: Any) -> None:
        attached.optimizer = lambda rate, decay: torch.optim.AdamW(attached.trained().values(), lr=1e-3)


class PromisesFixedRate(Held):
    def change(self, attached: Any, model: Any) -> None:
        groups = attached.parameter_groups
        attached.parameter_groups = lambda rate, decay: groups(5e-3, decay)


class ForgetsGroups(LoraPlus):
    """Its groups have two rates; its optimizer has one."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached: Any = super().hold(model, base)
        attached.optimizer = lambda rate, decay: torch.optim.AdamW(
            attached.trained().values(), lr=rate, weight_decay=decay
        )
        return attached


class _Inner(torch.optim.AdamW):
    """Steps by rates that it was made with, whatever its groups say later."""

    def step(self, closure: Any = None) -> Any:
        kept = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        super().step(closure)
        for group, rate in zip(self.param_groups, kept, strict=True):
            group["lr"] = rate


class IgnoresSchedule(Held):
    def change(self, attached: Any, model: Any) -> None:
        attached.optimizer = lambda rate, decay: _Inner(
            attached.parameter_groups(rate, decay), lr=rate, weight_decay=decay
        )


class ResetsSchedule(Held):
    """Between two steps it puts the rate back to that of the run."""

    def change(self, attached: Any, model: Any) -> None:
        made = attached.optimizer

        def optimizer(rate: float, decay: float) -> Any:
            found = made(rate, decay)

            def after_step(step: int, total: int) -> None:
                for group in found.param_groups:
                    group["lr"] = rate

            attached.after_step = after_step
            return found

        attached.optimizer = optimizer


class _NoDecay(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        kept = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step(closure)
        for group, decay in zip(self.param_groups, kept, strict=True):
            group["weight_decay"] = decay


class IgnoresDecay(Held):
    def change(self, attached: Any, model: Any) -> None:
        attached.optimizer = lambda rate, decay: _NoDecay(
            attached.parameter_groups(rate, decay), lr=rate, weight_decay=decay
        )


class DecaysTwice(Held):
    """Its weight decay is nearly twice what is asked for."""

    def change(self, attached: Any, model: Any) -> None:
        made = attached.optimizer

        def optimizer(rate: float, decay: float) -> Any:
            found = made(rate, decay)

            def more(*_: Any) -> None:
                with torch.no_grad():
                    for group in found.param_groups:
                        for p in group["params"]:
                            p.mul_(1 - 0.9 * group["lr"] * group["weight_decay"])

            found.register_step_pre_hook(more)
            return found

        attached.optimizer = optimizer


class NegatesAGradient(Held):
    """One matrix of it trains against the loss."""

    def change(self, attached: Any, model: Any) -> None:
        next(iter(attached.trained().values()), torch.zeros(1, requires_grad=True)).register_hook(torch.neg)


class HalvesAGradient(Held):
    def change(self, attached: Any, model: Any) -> None:
        for p in list(attached.trained().values())[1:2]:
            p.register_hook(lambda gradient: gradient / 2)


class SaysOtherGradients(HalvesAGradient):
    """Not found broken: the card says so."""

    card: ClassVar[MethodCard] = Lora.card.model_copy(update={"other_gradients": "so that a test can see it"})


class TrainsDoubles(Held):
    """It is twice as strong in training mode."""

    def change(self, attached: Any, model: Any) -> None:
        for layer in tuner_layers(model).values():
            layer.lora_B[ADAPTER].register_forward_hook(lambda module, _, out: out * 2 if module.training else out)


class MergesByDefault(Held):
    """It merges with the scale that it has by default."""

    def change(self, attached: Any, model: Any) -> None:
        merge = attached.merged

        def merged() -> Any:
            for layer in tuner_layers(model).values():
                layer.scaling[ADAPTER] = LoraConfig().alpha / layer.r[ADAPTER]
            return merge()

        attached.merged = merged


class SaysChangesByDefault(Held):
    """Its changes of weights are those of the scale that it has by default."""

    def change(self, attached: Any, model: Any) -> None:
        delta, alpha = attached.delta, self.config.alpha

        def given(module: str) -> Any:
            found = delta(module)
            return None if found is None else found * LoraConfig().alpha / alpha

        attached.delta = given


class NeverDecays(Held):
    """No group of it has weight decay, and no word says why."""

    def change(self, attached: Any, model: Any) -> None:
        groups = attached.parameter_groups
        attached.parameter_groups = lambda rate, decay: groups(rate, 0.0)


class ExplainsNoDecay(NeverDecays):
    """Not broken: the card says why."""

    card: ClassVar[MethodCard] = Lora.card.model_copy(update={"undecayed": "so that a test can see it"})


class IgnoresClipping(Held):
    """It steps by gradients that it kept for itself, before the trainer clipped them."""

    def change(self, attached: Any, model: Any) -> None:
        made = attached.optimizer

        def optimizer(rate: float, decay: float) -> Any:
            found = made(rate, decay)

            def restore(*_: Any) -> None:
                for p in attached.trained().values():
                    p.grad = torch.ones_like(p)

            found.register_step_pre_hook(restore)
            return found

        attached.optimizer = optimizer


class ForgetsFirstPass(Held):
    """Only the last of several passes counts."""

    def change(self, attached: Any, model: Any) -> None:
        model.register_forward_pre_hook(lambda *_: model.zero_grad(set_to_none=True))


class ExtraByRow(Held):
    """Its term grows with the rows of the batch."""

    def change(self, attached: Any, model: Any) -> None:
        rows = [1]

        def look(module: Any, args: Any, kwargs: Any) -> None:
            rows[0] = len(kwargs["input_ids"])

        model.register_forward_pre_hook(look, with_kwargs=True)
        attached.extra_loss = lambda: rows[0] * sum(p.square().sum() for p in attached.trained().values()) / 100


class StaysOffAfterError(Held):
    def change(self, attached: Any, model: Any) -> None:
        @contextmanager
        def disabled() -> Iterator[Any]:
            model.base_model.disable_adapter_layers()
            yield model
            model.base_model.enable_adapter_layers()

        attached.disabled = disabled


class SwallowsErrors(Held):
    def change(self, attached: Any, model: Any) -> None:
        off = attached.disabled

        @contextmanager
        def disabled() -> Iterator[Any]:
            with off() as found, suppress(Exception):
                yield found

        attached.disabled = disabled


class RestoresDefaults(Lora):
    """It restores with the scale that it has by default."""

    def restore(self, model: Any, directory: Path) -> Attached:
        attached = super().restore(model, directory)
        default = LoraConfig()
        for layer in tuner_layers(attached.model).values():
            layer.scaling[ADAPTER] = default.alpha / layer.r[ADAPTER]
        return attached


class RestoresAnySettings(Lora):
    """It takes what the file says for its own settings."""

    def restore(self, model: Any, directory: Path) -> Attached:
        table = json.loads((directory / "adapter_config.json").read_text())
        saved = self.config.model_copy(update={"rank": table["r"], "alpha": table["lora_alpha"]})
        attached: Attached = Lora(saved).restore(model, directory)
        return attached


class SavesHalf(Lora):
    """What it writes has been rounded."""

    def hold(self, model: Any, base: str) -> PeftAttached:
        attached = super().hold(model, base)
        write = attached.write

        def rounded(directory: Path, config: Any, tensors: Mapping[str, Any]) -> None:
            write(directory, config, {name: tensor.bfloat16().float() for name, tensor in tensors.items()})

        attached.write = rounded  # type: ignore[method-assign]
        return attached


class SeesLaterTokens(Held):
    def change(self, attached: Any, model: Any) -> None:
        layer = tuner_layers(model)["model.layers.0.self_attn.v_proj"]
        layer.register_forward_hook(lambda _, __, output: output + output.mean(1, keepdim=True))


class SeesOtherRows(Held):
    def change(self, attached: Any, model: Any) -> None:
        layer = tuner_layers(model)["model.layers.0.self_attn.v_proj"]
        layer.register_forward_hook(lambda _, __, output: output + output.mean(0, keepdim=True))


class KnowsItsPlace(Held):
    def change(self, attached: Any, model: Any) -> None:
        def shift(_: Any, __: Any, output: Any) -> Any:
            return output + torch.arange(len(output))[:, None, None] / 10

        model.get_base_model().lm_head.register_forward_hook(shift)


class IgnoresTheMask(Held):
    def change(self, attached: Any, model: Any) -> None:
        forward = model.forward
        model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)


class DoublesScale(Lora):
    def peft_config(self, patterns: list[str], seed: int) -> Any:
        config: Any = super().peft_config(patterns, seed)
        config.lora_alpha *= 2
        return config


class ForgetsRank(Lora):
    """Its scale is right for rank 8."""

    def peft_config(self, patterns: list[str], seed: int) -> Any:
        config: Any = super().peft_config(patterns, seed)
        config.lora_alpha = self.config.alpha * self.config.rank / 8
        return config


class SaysRoot(Lora):
    """Its card is that of rsLoRA, and it is LoRA."""

    card: ClassVar[MethodCard] = RsLora.card


class Transposes(Held):
    """On square weights it adds the transpose of what it says."""

    def change(self, attached: Any, model: Any) -> None:
        for layer in tuner_layers(model).values():
            if layer.in_features == layer.out_features:
                layer.get_delta_weight = lambda name, own=layer.get_delta_weight: own(name).T
                layer.forward = lambda x, own=layer: own.base_layer(x) + x @ own.get_delta_weight(ADAPTER).T


class Unstated(DoublesScale):
    """Not found broken: without an equation nobody can say what it should be."""

    card: ClassVar[MethodCard] = Lora.card.model_copy(update={"equation": None})


class NoEquation(Lora):
    card: ClassVar[MethodCard] = Lora.card.model_copy(update={"equation": "W + lora_B lora_A"})


class CallsAnything(Lora):
    card: ClassVar[MethodCard] = Lora.card.model_copy(update={"equation": "W + eval(lora_B)"})


class SharesWeights(Lora):
    """All attachments to models of one size train the same A."""

    cache: ClassVar[dict[Any, Any]] = {}

    def hold(self, model: Any, base: str) -> PeftAttached:
        for name, layer in tuner_layers(model).items():
            own = layer.lora_A[ADAPTER]
            key = (name, tuple(own.weight.shape), layer.get_base_layer().weight.dtype)
            if own.weight.requires_grad and not model.peft_config[ADAPTER].inference_mode:
                own.weight.data = self.cache.setdefault(key, own.weight.data)
        return super().hold(model, base)


class CleansTheBase(Held):
    """It puts the norms of the base to one when it is asked for the number of parameters of the model."""

    def count(self, model: Any) -> int:
        if next(model.parameters()).device.type != "meta":
            model.model.norm.weight.data += 1
        return super().count(model)


class MovesBuffers(Held):
    """Switched off, it turns the rotary frequencies a little, and leaves them so."""

    def change(self, attached: Any, model: Any) -> None:
        save = attached.save

        def saved(directory: Path) -> None:
            save(directory)
            model.get_base_model().model.rotary_emb.original_inv_freq.mul_(1.01)

        attached.save = saved


class LeavesHooks(Held):
    def change(self, attached: Any, model: Any) -> None:
        model.get_base_model().model.norm.register_forward_hook(lambda *_: None)


class ForgetsItsChange(Held):
    """Asked a second time, it gives another change of weights."""

    def change(self, attached: Any, model: Any) -> None:
        delta, asked = attached.delta, set()

        def once(module: str) -> Any:
            found = delta(module)
            if module in asked and found is not None:
                return -found
            asked.add(module)
            return found

        attached.delta = once


class MergesAgain(Held):
    def change(self, attached: Any, model: Any) -> None:
        merge, held = attached.merged, []

        def again() -> Any:
            if not held:
                held.append(merge())
                return held[0]
            held[0].lm_head.weight.data *= 2
            return held[0]

        attached.merged = again


class SavesAndThaws(Held):
    def change(self, attached: Any, model: Any) -> None:
        save = attached.save

        def saved(directory: Path) -> None:
            save(directory)
            model.train()

        attached.save = saved


class PlainPrompt(PromptTuning):
    """Not broken: prompts have no equation, and their rows are never padded on the left."""
