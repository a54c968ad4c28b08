"""Every method by name; nothing is imported until a name is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_arena.core.build import build
from peft_arena.core.registry import Registry
from peft_arena.core.specs import MethodSpec
from peft_arena.methods.base import Method, MethodCard, MethodConfig
from peft_arena.methods.refused import REFUSED

GROUP = "peft_arena.methods"
"""Entry points of this group are methods of installed plug-ins."""


def problem_of(name: str, found: object) -> str:
    """Say why an object cannot be the method of a name; empty if it can."""
    if not (isinstance(found, type) and issubclass(found, Method)):
        return "it is not a subclass of peft_arena.methods.base.Method"
    card, config = getattr(found, "card", None), getattr(found, "Config", None)
    if not isinstance(card, MethodCard):
        return "it has no card"
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        return "its Config is not a subclass of MethodConfig"
    return "" if card.name == name else f"its card says the method is called '{card.name}'"


METHODS: Registry[type[Method]] = Registry(
    "method",
    {
        "adalora": "peft_arena.methods.low_rank.adalora:AdaLora",
        "adamss": "peft_arena.methods.low_rank.adamss:Adamss",
        "adamss_asa": "peft_arena.methods.low_rank.adamss:AdamssAsa",
        "adapter_houlsby": "peft_arena.methods.adapters.bottleneck:Houlsby",
        "adapter_parallel": "peft_arena.methods.adapters.bottleneck:Parallel",
        "adapter_pfeiffer": "peft_arena.methods.adapters.bottleneck:Pfeiffer",
        "adaption_prompt": "peft_arena.methods.prompts.adaption_prompt:AdaptionPrompt",
        "alora": "peft_arena.methods.low_rank.alora:ALora",
        "bdlora": "peft_arena.methods.low_rank.bdlora:BdLora",
        "beft": "peft_arena.methods.sparse.bitfit:Beft",
        "bitfit": "peft_arena.methods.sparse.bitfit:BitFit",
        "boft": "peft_arena.methods.orthogonal.boft:Boft",
        "c3a": "peft_arena.methods.weight_maps.c3a:C3a",
        "cartridge": "peft_arena.methods.prompts.cartridge:Cartridge",
        "coft": "peft_arena.methods.orthogonal.oft:Coft",
        "corda_ipm": "peft_arena.methods.low_rank.corda:CordaIpm",
        "corda_kpm": "peft_arena.methods.low_rank.corda:CordaKpm",
        "cpt": "peft_arena.methods.prompts.cpt:Cpt",
        "deft": "peft_arena.methods.weight_maps.deft:Deft",
        "deft_para": "peft_arena.methods.weight_maps.deft:DeftPara",
        "delora": "peft_arena.methods.low_rank.granular:Delora",
        "dora": "peft_arena.methods.low_rank.lora:Dora",
        "eva": "peft_arena.methods.low_rank.eva:Eva",
        "fourierft": "peft_arena.methods.weight_maps.spectral:Fourierft",
        "freeze": "peft_arena.methods.sparse.freeze:Freeze",
        "frod": "peft_arena.methods.shared.frod:Frod",
        "full": "peft_arena.methods.full.full:Full",
        "glora": "peft_arena.methods.low_rank.glora:Glora",
        "gralora": "peft_arena.methods.low_rank.granular:Gralora",
        "hira": "peft_arena.methods.low_rank.products:Hira",
        "hra": "peft_arena.methods.orthogonal.hra:Hra",
        "ia3": "peft_arena.methods.adapters.ia3:IA3",
        "kasa": "peft_arena.methods.low_rank.kasa:Kasa",
        "keeplora": "peft_arena.methods.low_rank.keeplora:KeepLora",
        "lily": "peft_arena.methods.shared.lily:Lily",
        "ln_tuning": "peft_arena.methods.sparse.norms:LNTuning",
        "loha": "peft_arena.methods.low_rank.products:Loha",
        "lokr": "peft_arena.methods.low_rank.products:Lokr",
        "lora": "peft_arena.methods.low_rank.lora:Lora",
        "lora_fa": "peft_arena.methods.low_rank.preconditioned:LoraFa",
        "lora_ga": "peft_arena.methods.low_rank.lora_ga:LoraGa",
        "lora_orthogonal": "peft_arena.methods.low_rank.lora_inits:LoraOrthogonal",
        "lora_plus": "peft_arena.methods.low_rank.lora:LoraPlus",
        "lora_riemannian": "peft_arena.methods.low_rank.preconditioned:RiemannianLora",
        "lora_tokens": "peft_arena.methods.sparse.tokens:LoraTokens",
        "mica": "peft_arena.methods.low_rank.lora_inits:Mica",
        "milora": "peft_arena.methods.low_rank.milora:Milora",
        "miss": "peft_arena.methods.low_rank.miss:Miss",
        "miss_bat": "peft_arena.methods.low_rank.miss:MissBat",
        "miss_mini": "peft_arena.methods.low_rank.miss:MissMini",
        "monteclora": "peft_arena.methods.low_rank.monteclora:MonteCLora",
        "multitask_prompt_tuning": "peft_arena.methods.prompts.multitask_prompt:MultitaskPromptTuning",
        "none": "peft_arena.methods.full.none:NoTraining",
        "oft": "peft_arena.methods.orthogonal.oft:Oft",
        "olora": "peft_arena.methods.low_rank.olora:Olora",
        "osf": "peft_arena.methods.weight_maps.osf:Osf",
        "p_tuning": "peft_arena.methods.prompts.p_tuning:PTuning",
        "p_tuning_v2": "peft_arena.methods.prompts.prefix:PTuningV2",
        "peanut": "peft_arena.methods.weight_maps.peanut:Peanut",
        "pissa": "peft_arena.methods.low_rank.pissa:Pissa",
        "poly": "peft_arena.methods.mixtures.poly:Poly",
        "prefix_tuning": "peft_arena.methods.prompts.prefix:PrefixTuning",
        "prompt_tuning": "peft_arena.methods.prompts.prompt:PromptTuning",
        "psoft": "peft_arena.methods.orthogonal.psoft:Psoft",
        "pvera": "peft_arena.methods.shared.shared_bases:Pvera",
        "qalora": "peft_arena.methods.low_rank.qalora:QaLora",
        "randlora": "peft_arena.methods.shared.shared_bases:Randlora",
        "road": "peft_arena.methods.orthogonal.road:Road",
        "rslora": "peft_arena.methods.low_rank.lora:RsLora",
        "shadow": "peft_arena.methods.adapters.shadow:Shadow",
        "shira": "peft_arena.methods.sparse.shira:Shira",
        "supertuning": "peft_arena.methods.sparse.supertuning:Supertuning",
        "supra": "peft_arena.methods.sparse.supertuning:Supra",
        "svft": "peft_arena.methods.weight_maps.svft:Svft",
        "tinylora": "peft_arena.methods.shared.tinylora:Tinylora",
        "trainable_tokens": "peft_arena.methods.sparse.tokens:TrainableTokens",
        "unilora": "peft_arena.methods.shared.banks:Unilora",
        "vblora": "peft_arena.methods.shared.banks:Vblora",
        "velora": "peft_arena.methods.low_rank.velora:Velora",
        "vera": "peft_arena.methods.shared.vera:Vera",
        "waveft": "peft_arena.methods.weight_maps.spectral:Waveft",
        "xlora": "peft_arena.methods.mixtures.xlora:XLora",
    },
    refused=REFUSED,
    group=GROUP,
    problem=problem_of,
)
"""Name to method class. Listing the names imports no method."""

BASE = "none"
"""The base model itself, a run like any other."""


def make_method(name: str, config: Mapping[str, Any] | None = None, where: str = "") -> Method:
    """Return a method with its settings checked.

    Args:
        name: one of ``METHODS.names()``.
        config: the method's own settings; what is not given takes its default.
        where: file and line the request was read from, for messages.

    Raises:
        UserError: unknown name, unknown key or forbidden value.
    """
    kind = METHODS.get(name, where)
    place = f"method {name}" + (f", {where}" if where else "")
    return kind(build(kind.Config, config or {}, where=place))


def method_of(spec: MethodSpec) -> Method:
    """Return the method a spec describes, and only that one.

    Raises:
        UserError: the method now comes from another plug-in, or version of it, than the spec names.
    """
    METHODS.check_plugin(spec.name, spec.plugin)
    return make_method(spec.name, spec.config)
