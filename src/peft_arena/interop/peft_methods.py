"""The table of translations: which adapter configuration of ``peft`` is which method of ours, with which settings.

Fields are those of peft 0.21.2 (its configuration classes); the entries of one kind are tried in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from peft_arena.interop.readers import (
    bdlora_part,
    block_size,
    default_or,
    kasa_part,
    lower,
    of_model,
    only_if,
    share_of_steps,
)
from peft_arena.interop.translation import Harmless, Translation

OWN_SEED = Harmless("random numbers come from the seed of the run, not from a seed of the adapter")
FILE_ONLY = Harmless("what is saved with the adapter, not what is computed")
NO_BIASES = Harmless("acts on biases, which the model's linear layers do not have", lambda it: not it.shape.biased)
UNUSED = Harmless("")


_SPLIT = {"r": "rank", "lora_alpha": "alpha"}
_LORA = {**_SPLIT, "lora_dropout": "dropout"}
_INIT = {"init": default_or("init_lora_weights", gaussian="gaussian")}
_TOKENS = {
    "token_dim": of_model("token_dim", size="hidden"),
    "num_layers": of_model("num_layers", size="layers"),
    "num_attention_heads": of_model("num_attention_heads", size="heads"),
    "num_transformer_submodules": Harmless("", lambda it: it.config["num_transformer_submodules"] in (None, 1)),
}
_NEUMANN = {"neumann_terms": only_if("use_cayley_neumann", True, "num_cayley_neumann_terms")}
_UNUSED_TERMS = {"num_cayley_neumann_terms": Harmless("", lambda it: not it.config["use_cayley_neumann"])}
_OFT_READ = {"block_size": block_size, **_NEUMANN}
_OFT_USED = frozenset({"r", "oft_block_size"})


def _started(name: str, init: str, fields: Mapping[str, str]) -> Translation:
    """Return the entry of a LoRA that differs in how it starts, which our method does itself."""
    used = frozenset({"init_lora_weights"})
    return Translation(name, when={"init_lora_weights": (init,)}, fields=fields, carried=used)


_FRACTIONS = {
    "sparse_rate": "sparse_rate",
    "regularization_alpha": "regularization",
    "frod_dropout": "dropout",
}

TABLE: Mapping[str, tuple[Translation, ...]] = MappingProxyType(
    {
        "LORA": (
            _started("mica", "mica", _LORA),
            _started("pissa", "pissa", _SPLIT),
            _started("olora", "olora", _SPLIT),
            _started("lora_orthogonal", "orthogonal", _LORA),
            Translation("dora", when={"use_dora": (True,)}, fields=_LORA, read=_INIT),
            Translation("rslora", when={"use_rslora": (True,)}, fields=_LORA, read=_INIT),
            Translation(
                "lora_fa",
                when={"kasa_config": (None,), "use_bdlora": (None,)},
                fields=_LORA,
                read=_INIT,
                optimizer="lora-fa",
                optimizer_repeats={"r": "r", "lora_alpha": "lora_alpha"},
                notes=("peft corrects the gradient in bfloat16, ours in float32",),
            ),
            Translation(
                "lora_riemannian",
                when={"kasa_config": (None,), "use_bdlora": (None,)},
                fields=_LORA,
                read=_INIT,
                optimizer="riemannian",
                optimizer_fields={"reg": "damping"},
                notes=("peft inverts by a pseudo-inverse, ours by solving",),
            ),
            Translation(
                "lora",
                when={"kasa_config": (None,), "use_bdlora": (None,), "init_lora_weights": (True, "gaussian")},
                fields=_LORA,
                read=_INIT,
            ),
            Translation(
                "kasa",
                when={"use_bdlora": (None,), "init_lora_weights": (True,)},
                fields=_LORA,
                read={"beta": kasa_part("beta"), "gamma": kasa_part("gamma")},
                carried=frozenset({"kasa_config"}),
                notes=("the library's own training loop adds no regulariser; ours adds it with beta and gamma",),
            ),
            Translation(
                "bdlora",
                when={"kasa_config": (None,), "init_lora_weights": (True,)},
                fields=_LORA,
                read={"blocks": bdlora_part("blocks"), "row_parallel": bdlora_part("row_parallel")},
                carried=frozenset({"use_bdlora"}),
            ),
        ),
        "ADALORA": (
            Translation(
                "adalora",
                fields={
                    "init_r": "initial_rank",
                    "target_r": "target_rank",
                    "lora_alpha": "alpha",
                    "lora_dropout": "dropout",
                    "deltaT": "interval",
                    "beta1": "beta1",
                    "beta2": "beta2",
                    "orth_reg_weight": "orthogonality",
                },
                read={"warmup": share_of_steps("tinit"), "final": share_of_steps("tfinal")},
                carried=frozenset({"tinit", "tfinal", "total_step"}),
            ),
        ),
        "ADAMSS": (
            Translation(
                "adamss",
                fields={"r": "rank", "num_subspaces": "subspaces"},
                harmless={"random_seed": OWN_SEED},
            ),
        ),
        "ADAPTION_PROMPT": (
            Translation(
                "adaption_prompt",
                fields={"adapter_len": "adapter_len", "adapter_layers": "top_layers"},
                carried=frozenset({"adapter_layers"}),
                targets="none",
            ),
        ),
        "BEFT": (Translation("beft"),),
        "BOFT": (Translation("boft", fields={"boft_block_size": "block_size", "boft_dropout": "dropout"}),),
        "C3A": (Translation("c3a", fields={"block_size": "block_size"}),),
        "DEFT": (
            Translation(
                "deft",
                when={"para": (False,)},
                fields={"r": "rank", "decomposition_method": "decomposition"},
                read={"alpha": lambda it: it.config["r"] if it.config["alpha"] is None else it.config["alpha"]},
                harmless={"alpha": Harmless("", lambda it: it.config["alpha"] is None)},
            ),
            Translation("deft_para", when={"para": (True,)}, fields={"r": "rank"}),
        ),
        "DELORA": (Translation("delora", fields={"r": "rank", "delora_lambda": "bound", "module_dropout": "dropout"}),),
        "FOURIERFT": (
            Translation(
                "fourierft",
                fields={"n_frequency": "coefficients", "scaling": "scaling"},
                harmless={"random_loc_seed": OWN_SEED},
            ),
        ),
        "FROD": (
            Translation(
                "frod",
                fields=_FRACTIONS,
                harmless={
                    "projection_prng_key": OWN_SEED,
                    "progressbar": UNUSED,
                    "runtime_offload_base_weight": Harmless("where pretrained weights wait, not what is computed"),
                },
            ),
        ),
        "GLORA": (
            Translation(
                "glora",
                when={"config_A_B": ("lora",)},
                fields={"r": "rank"},
                harmless={"config_C": NO_BIASES, "config_D_E": NO_BIASES},
            ),
            Translation(
                "glora",
                when={"config_A_B": ("vector",)},
                fixed={"rank": None},
                harmless={"r": UNUSED, "config_C": NO_BIASES, "config_D_E": NO_BIASES},
            ),
        ),
        "GRALORA": (
            Translation(
                "gralora",
                fields={
                    "r": "rank",
                    "alpha": "alpha",
                    "gralora_k": "blocks",
                    "hybrid_r": "hybrid_rank",
                    "gralora_dropout": "dropout",
                },
            ),
        ),
        "HIRA": (
            Translation(
                "hira",
                fields={"r": "rank", "hira_dropout": "dropout"},
                read={"init": default_or("init_weights", gaussian="gaussian")},
            ),
        ),
        "HRA": (Translation("hra", fields={"r": "rank"}),),
        "IA3": (Translation("ia3", fields={"feedforward_modules": "feedforward"}),),
        "LILY": (
            Translation(
                "lily",
                fields={"r": "rank", "stride_A": "stride", "num_B": "experts", "scaling": "scaling"},
                fixed={"routing": "batch"},
            ),
        ),
        "LN_TUNING": (Translation("ln_tuning"),),
        "LOHA": (Translation("loha", fields={"r": "rank", "alpha": "alpha", "rank_dropout": "rank_dropout"}),),
        "LOKR": (
            Translation(
                "lokr",
                fields={
                    "r": "rank",
                    "alpha": "alpha",
                    "rank_dropout": "rank_dropout",
                    "decompose_both": "decompose_both",
                },
                read={
                    "decompose_factor": lambda it: (
                        None if it.config["decompose_factor"] == -1 else it.config["decompose_factor"]
                    ),
                    "init": default_or("init_weights", lycoris="lycoris"),
                },
                harmless={"rank_dropout_scale": Harmless("", lambda it: it.config["rank_dropout"] == 0)},
            ),
        ),
        "MISS": (
            Translation("miss_bat", when={"init_weights": ("bat",)}, fields={"r": "rank"}),
            Translation(
                "miss_mini",
                when={"init_weights": ("mini",)},
                fields={"r": "rank", "mini_r": "mini_rank", "miss_dropout": "dropout"},
            ),
            Translation("miss", fields={"r": "rank", "miss_dropout": "dropout"}),
        ),
        "OFT": (
            Translation(
                "coft",
                when={"coft": (True,)},
                fields={"eps": "eps"},
                read=_OFT_READ,
                carried=_OFT_USED,
                harmless=_UNUSED_TERMS,
            ),
            Translation(
                "oft",
                when={"coft": (False,)},
                read=_OFT_READ,
                carried=_OFT_USED,
                harmless={**_UNUSED_TERMS, "eps": UNUSED},
            ),
        ),
        "OSF": (Translation("osf", fields={"effective_rank": "preserved"}),),
        "PEANUT": (
            Translation("peanut", fields={"r": "rank", "depth": "depth", "act_fn": "activation", "scaling": "scaling"}),
        ),
        "PREFIX_TUNING": (
            Translation(
                "p_tuning_v2",
                when={"prefix_projection": (False,)},
                fields={"num_virtual_tokens": "num_virtual_tokens"},
                read={"init": lambda it: it.config["init_weights"] or "random"},
                harmless={**_TOKENS, "encoder_hidden_size": UNUSED},
                targets="none",
            ),
            Translation(
                "prefix_tuning",
                when={"prefix_projection": (True,)},
                fields={"num_virtual_tokens": "num_virtual_tokens", "encoder_hidden_size": "encoder_hidden_size"},
                read={"init": lambda it: it.config["init_weights"] or "random"},
                harmless=_TOKENS,
                targets="none",
            ),
        ),
        "PROMPT_TUNING": (
            Translation(
                "prompt_tuning",
                fields={"num_virtual_tokens": "num_virtual_tokens"},
                read={"init": lower("prompt_tuning_init")},
                harmless=_TOKENS,
                targets="none",
            ),
        ),
        "PSOFT": (
            Translation(
                "psoft",
                fields={
                    "r": "rank",
                    "psoft_dropout": "dropout",
                    "psoft_mag_a": "in_scale",
                    "psoft_mag_b": "out_scale",
                },
                read={**_NEUMANN, "svd_iterations": only_if("psoft_svd", "lowrank", "psoft_svd_lowrank_niter")},
                harmless={
                    **_UNUSED_TERMS,
                    "psoft_svd_lowrank_niter": Harmless("", lambda it: it.config["psoft_svd"] == "full"),
                    "psoft_alpha": Harmless("divides one factor and multiplies the result"),
                    "random_seed": OWN_SEED,
                },
            ),
        ),
        "P_TUNING": (
            Translation(
                "p_tuning",
                fields={
                    "num_virtual_tokens": "num_virtual_tokens",
                    "encoder_hidden_size": "encoder_hidden_size",
                    "encoder_num_layers": "lstm_layers",
                    "encoder_dropout": "lstm_dropout",
                },
                read={"encoder": lower("encoder_reparameterization_type")},
                harmless=_TOKENS,
                targets="none",
            ),
        ),
        "PVERA": (
            Translation(
                "pvera",
                fields={"r": "rank", "d_initial": "d_initial", "pvera_dropout": "dropout"},
                harmless={"projection_prng_key": OWN_SEED, "save_projection": FILE_ONLY},
            ),
        ),
        "RANDLORA": (
            Translation(
                "randlora",
                fields={"r": "rank", "randlora_alpha": "alpha", "randlora_dropout": "dropout"},
                read={
                    "bases": lambda it: (
                        "very_sparse" if it.config["very_sparse"] else "sparse" if it.config["sparse"] else "uniform"
                    )
                },
                harmless={"projection_prng_key": OWN_SEED, "save_projection": FILE_ONLY},
            ),
        ),
        "ROAD": (Translation("road", fields={"variant": "variant", "group_size": "group_size"}),),
        "SHIRA": (
            Translation(
                "shira",
                fields={"r": "rank"},
                harmless={"random_seed": OWN_SEED},
                notes=("each layer has a mask of its own; peft gives all layers of one shape the same",),
            ),
        ),
        "SUPERTUNING": (
            Translation(
                "supertuning",
                when={"r": (None,)},
                fields={"sparsity": "sparsity", "select_top": "largest"},
                harmless={"save_precomputed_indices": FILE_ONLY},
            ),
            Translation(
                "supra",
                fields={
                    "sparsity": "sparsity",
                    "select_top": "largest",
                    "r": "rank",
                    "lora_alpha": "alpha",
                    "lora_dropout": "dropout",
                },
                harmless={"save_precomputed_indices": FILE_ONLY},
            ),
        ),
        "TINYLORA": (
            Translation(
                "tinylora",
                fields={
                    "r": "rank",
                    "u": "vector_length",
                    "weight_tying": "weight_tying",
                    "tinylora_dropout": "dropout",
                },
                harmless={"projection_seed": OWN_SEED, "save_projection": FILE_ONLY},
            ),
        ),
        "TRAINABLE_TOKENS": (
            Translation(
                "trainable_tokens",
                when={"target_modules": (None, "embed_tokens", "model.embed_tokens")},
                fields={"token_indices": "tokens"},
                carried=frozenset({"token_indices"}),
                targets="none",
            ),
        ),
        "UNILORA": (
            Translation(
                "unilora",
                fields={"r": "rank", "theta_d_length": "theta_length", "unilora_dropout": "dropout"},
                harmless={"proj_seed": OWN_SEED, "save_indices": FILE_ONLY},
            ),
        ),
        "VBLORA": (
            Translation(
                "vblora",
                fields={
                    "r": "rank",
                    "num_vectors": "vectors",
                    "vector_length": "vector_length",
                    "topk": "topk",
                    "vblora_dropout": "dropout",
                },
                harmless={"save_only_topk_weights": FILE_ONLY},
            ),
        ),
        "VERA": (
            Translation(
                "vera",
                fields={"r": "rank", "d_initial": "d_initial", "vera_dropout": "dropout"},
                harmless={"projection_prng_key": OWN_SEED, "save_projection": FILE_ONLY},
            ),
        ),
        "WAVEFT": (
            Translation(
                "waveft",
                fields={"n_frequency": "coefficients", "scaling": "scaling", "wavelet_family": "wavelet"},
                harmless={"random_loc_seed": OWN_SEED},
            ),
        ),
    }
)
"""Kind of adapter (``peft_type``) to its translations."""

WEIGHTS = Translation(
    "full",
    targets="none",
    notes=("all weights train in float32 here; the library trains them in the model's type",),
)
"""What an experiment without an adapter configuration is."""
