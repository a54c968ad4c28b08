"""The table of translations: every entry gives back the method whose configuration it is shown."""

import pytest

from peft_arena.core.errors import UserError
from peft_arena.interop.peft_methods import TABLE
from peft_arena.interop.shapes import shape_of
from peft_arena.interop.translate import method_named, plain_table, translate
from peft_arena.methods.registry import METHODS, make_method

SHAPE = shape_of("meta-llama/Llama-3.2-3B")
ENTRIES = [(kind, entry) for kind, entries in TABLE.items() for entry in entries]
TARGETS = ["q_proj", "v_proj"]
GIVEN = {
    "adalora": {"total_step": 100, "tinit": 10, "tfinal": 20},
    "adaption_prompt": {"adapter_layers": 4},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "kasa": {"kasa_config": {"beta": 0.5, "gamma": 0.25}},
    "trainable_tokens": {"token_indices": [1, 2], "target_modules": None},
}
"""Fields that our configuration leaves to the training or the model, by method."""
OWN = {
    "adalora": {"warmup": 0.1, "final": 0.2},
    "adaption_prompt": {"top_layers": 4},
    "bdlora": {"targets": ["down_proj", "q_proj"], "row_parallel": ["down_proj"]},
    "deft": {"alpha": 16.0},
    "glora": {},
    "ia3": {"targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]},
    "kasa": {"beta": 0.5, "gamma": 0.25},
    "ln_tuning": {"targets": ["input_layernorm", "norm", "post_attention_layernorm"]},
    "trainable_tokens": {"tokens": [1, 2]},
}
"""Settings of ours to begin with, by method."""


def shown(entry):
    """Return our settings and the adapter configuration that our method makes of them."""
    fields = METHODS.get(entry.method).Config.model_fields
    settings = {"targets": TARGETS} if "targets" in fields else {}
    settings |= {**OWN.get(entry.method, {}), **entry.fixed}
    method = make_method(entry.method, settings)
    table = plain_table(method.peft_config(list(settings.get("targets", ())), 0))
    table |= {key: values[0] for key, values in entry.when.items() if key in entry.carried and len(values) == 1}
    return method.config.model_dump(mode="json"), {**table, **GIVEN.get(entry.method, {})}


def test_the_table_was_found():
    assert len(ENTRIES) >= 50 and all(entry.method in METHODS for _, entry in ENTRIES)


@pytest.mark.parametrize(("kind", "entry"), ENTRIES, ids=[f"{kind}-{entry.method}" for kind, entry in ENTRIES])
def test_our_own_configuration_is_translated_back(kind, entry):
    settings, table = shown(entry)
    found = translate(table, SHAPE, steps=100, optimizer=entry.optimizer)
    assert found.method == entry.method
    back = make_method(found.method, found.config).config.model_dump(mode="json")
    for given in (settings, back):
        for key in ("targets", "feedforward"):
            if key in given:
                given[key] = sorted(given[key])
    assert back == settings
    assert method_named(table, entry.optimizer) == entry.method


@pytest.mark.parametrize(
    ("table", "method", "settings"),
    [
        ({"peft_type": "OFT", "r": 32, "oft_block_size": 0}, "oft", {"block_size": 96, "neumann_terms": 5}),
        ({"peft_type": "OFT", "r": 8, "oft_block_size": 0, "target_modules": ["o_proj"]}, "oft", {"block_size": 384}),
        ({"peft_type": "OFT", "use_cayley_neumann": False}, "oft", {"block_size": 32, "neumann_terms": None}),
        ({"peft_type": "OFT", "coft": True, "eps": 0.25}, "coft", {"eps": 0.25}),
        ({"peft_type": "GLORA", "config_A_B": "vector"}, "glora", {"rank": None}),
        ({"peft_type": "SUPERTUNING", "r": 4, "lora_alpha": 8}, "supra", {"rank": 4, "alpha": 8}),
        ({"peft_type": "PSOFT", "psoft_svd": "lowrank"}, "psoft", {"svd_iterations": 10, "rank": 32}),
        ({"peft_type": "LOKR", "decompose_factor": 4}, "lokr", {"decompose_factor": 4, "init": "default"}),
        ({"peft_type": "RANDLORA", "sparse": True}, "randlora", {"bases": "sparse"}),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 7, "num_layers": 28, "init_weights": "zero"},
            "p_tuning_v2",
            {"num_virtual_tokens": 7, "init": "zero"},
        ),
        ({"peft_type": "IA3"}, "ia3", {"feedforward": ["down_proj"], "targets": ["down_proj", "k_proj", "v_proj"]}),
        ({"peft_type": "LORA", "target_modules": "all-linear"}, "lora", {"targets": "all-linear"}),
        ({"peft_type": "LORA", "kasa_config": {}}, "kasa", {"beta": 1e-4, "gamma": 1e-3}),
    ],
)  # fmt: skip
def test_defaults_of_peft_are_filled_in(table, method, settings):
    found = translate(table, SHAPE, steps=100)
    assert found.method == method
    assert settings.items() <= dict(found.config).items()


def test_a_seed_of_the_adapter_is_noted():
    found = translate({"peft_type": "VERA", "projection_prng_key": 5}, SHAPE, steps=1)
    assert any(note.startswith("projection_prng_key 5: random numbers come from") for note in found.notes)


def test_block_diagonal_factors_must_cover_the_targets():
    blocks = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    with pytest.raises(UserError, match=r"use_bdlora: \['v_proj'\]"):
        translate({"peft_type": "LORA", "use_bdlora": blocks}, SHAPE, steps=1)


def test_a_method_is_only_named_where_the_file_tells():
    assert method_named(None) == "full"
    assert method_named({"peft_type": "LORA"}) is None, "nothing says how it starts"
    assert method_named({"peft_type": "POLY"}) is None
    full = {"peft_type": "LORA", "init_lora_weights": True, "use_dora": False, "use_rslora": False}
    assert method_named(full) == "lora" and method_named(full, "lora-fa") == "lora_fa"
    assert method_named({**full, "use_dora": True}) == "dora"
    assert method_named({**full, "use_dora": 1}) == "lora", "1 is not True"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', and only adapters of language models"),
        ({"peft_type": "LORA", "target_modules": {"q_proj": 4}}, "target_modules is {'q_proj': 4}, no list of names"),
        ({"peft_type": "LORA", "target_modules": ["q_proj", 1]}, "no list of names of modules"),
        ({"peft_type": "LORA", "kasa_config": 7}, "kasa_config is 7, no mapping of settings"),
        ({"peft_type": "LORA", "kasa_config": {"beta": "x"}}, "kasa_config has 'beta' = 'x', no number"),
        ({"peft_type": "LORA", "use_bdlora": True}, "use_bdlora is True, no mapping of settings"),
        ({"peft_type": "LORA", "use_bdlora": {"odd": 1}}, "use_bdlora has 'odd' = 1, which the method has no setting"),
        ({"peft_type": "HIRA", "init_weights": ["x"]}, r"init_weights is ['x'], which the method has no setting for"),
        ({"peft_type": "LOKR", "init_weights": 1}, "init_weights is 1, which the method has no setting for"),
        ({"peft_type": "OFT", "r": "x"}, "r is 'x', no whole number"),
        ({"peft_type": "ADALORA", "total_step": 9, "tinit": None}, "tinit is None, no whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_refused_in_one_line(table, said):
    with pytest.raises(UserError) as caught:
        translate(table, SHAPE, steps=9)
    assert said in str(caught.value) and "\n" not in str(caught.value)
