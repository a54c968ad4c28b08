"""Collected rows against one forward pass for each prompt; batches, sampling, and which modules stand for what."""

from __future__ import annotations

import random

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.geometry import collect
from peft_arena.geometry.collect import Rows, batches, collect_energies, collect_outputs, draw, plain_weight
from peft_arena.geometry.modules import choose, find_module, linear_modules, paper_blocks, paper_modules
from peft_arena.geometry.prompts import PromptSet
from peft_arena.methods.registry import make_method
from peft_arena.models.modes import base_of
from peft_arena.testing.subject import tiny_model
from peft_arena.weights.change import Dense, LowRank

LENGTHS = (5, 9, 2, 12, 1, 8)


def prompt_set(lengths=LENGTHS, seed: int = 0) -> PromptSet:
    rng = random.Random(seed)
    return PromptSet(tuple(tuple(rng.randrange(3, 200) for _ in range(n)) for n in lengths), 0, 0, 64)


def attached(name: str, config: dict, kind="untied"):
    """Return the wrapped model with its trained tensors moved."""
    made = make_method(name, config).attach(tiny_model(kind), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.trained().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made.model.eval()


def collected(model, prompts, tokens, modules, folder):
    """Return rows by module and logits of a sample, and the sample."""
    folder.mkdir(exist_ok=True)
    sample = draw(prompts, tokens, seed=1)
    files = {name: Rows(folder / f"{number}.npy", sample.size) for number, name in enumerate(modules)}
    logits = Rows(folder / "logits.npy", sample.size)
    collect_outputs(model, prompts, sample, files, logits.write, lambda part: None)
    return {name: file.read() for name, file in files.items()}, logits.read(), sample


def one_by_one(model, prompts, sample, modules):
    """The same by a forward pass for each prompt, unpadded, whole logits: the last call of each module counts."""
    rows = {name: [] for name in modules}
    logits = []
    for ids, drawn in zip(prompts.ids, sample.positions, strict=True):
        seen = {}
        handles = [
            find_module(base_of(model), name).register_forward_hook(
                lambda module, args, output, name=name, seen=seen: seen.update({name: output})
            )
            for name in modules
        ]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(ids) :]
        for handle in handles:
            handle.remove()
        logits.append(output[list(drawn)])
        for name in modules:
            rows[name].append(seen[name][0, -len(ids) :][list(drawn)])
    return {name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(logits)


WATCHED = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj")


@pytest.mark.parametrize("name", ["none", "lora", "ia3", "prompt_tuning", "prefix_tuning", "adapter_houlsby", "xlora"])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_rows_are_those_of_one_pass_for_each_prompt(name, kind, tmp_path):
    from tests.methods.settings import SETTINGS

    model = attached(name, SETTINGS[name].get("config", {}), kind)
    prompts = prompt_set()
    rows, logits, sample = collected(model, prompts, 20, WATCHED, tmp_path)
    wanted, wanted_logits = one_by_one(model, prompts, sample, WATCHED)
    assert sample.size == 20
    for module in WATCHED:
        torch.testing.assert_close(rows[module], wanted[module], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=2e-5)


def test_a_capped_head_is_capped_at_the_tokens_drawn(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=200,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=0.05,
            initializer_range=0.3,
        )
    ).eval()
    name = "model.layers.1.mlp.down_proj"
    rows, logits, sample = collected(model, prompt_set(), 20, [name], tmp_path)
    wanted, wanted_logits = one_by_one(model, prompt_set(), sample, [name])
    torch.testing.assert_close(rows[name], wanted[name], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=2e-5)
    assert logits.abs().max() <= 0.05


def test_rows_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    model, prompts = tiny_model(), prompt_set()
    together, logits, _ = collected(model, prompts, 20, WATCHED, tmp_path / "a")
    monkeypatch.setattr(collect, "TOKENS_AT_ONCE", 1)
    assert [len(batch.prompts) for batch in batches(prompts)] == [1] * 6
    alone, logits_alone, _ = collected(model, prompts, 20, WATCHED, tmp_path / "b")
    for module in WATCHED:
        torch.testing.assert_close(together[module], alone[module], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, logits_alone, rtol=1e-5, atol=1e-5)


def test_batches_hold_all_tokens_and_keep_to_the_limits(monkeypatch):
    prompts = prompt_set()
    monkeypatch.setattr(collect, "TOKENS_AT_ONCE", 24)
    found = batches(prompts)
    assert [batch.prompts for batch in found] == [(3, 1), (5, 0, 2), (4,)]
    assert all(batch.ids.numel() <= 24 for batch in found)
    for batch in found:
        for row, prompt in enumerate(batch.prompts):
            assert batch.ids[row][batch.mask[row].bool()].tolist() == list(prompts.ids[prompt])
    monkeypatch.setattr(collect, "LOGITS_AT_ONCE", 30)
    assert [batch.prompts for batch in batches(prompts, [1, 2, 0, 2, 3, 0], 10)] == [(3,), (1, 0), (4,)]


def test_tokens_are_drawn_evenly_and_the_same_every_time():
    prompts = prompt_set((100, 300, 1, 599))
    sample = draw(prompts, 200, seed=0)
    assert sample == draw(prompts, 200, seed=0) != draw(prompts, 200, seed=1)
    counts = [len(drawn) for drawn in sample.positions]
    assert sum(counts) == sample.size == 200
    assert abs(counts[0] - 20) < 12 and abs(counts[1] - 60) < 20  # five standard errors would be 20 and 31
    assert all(list(drawn) == sorted(set(drawn)) for drawn in sample.positions)
    assert sample.owners().tolist() == [p for p, count in enumerate(counts) for _ in range(count)]
    assert draw(prompts, 5000, seed=0).size == 1000


def test_too_long_a_prompt_is_refused_beside_virtual_tokens(tmp_path):
    model = attached("prompt_tuning", {"num_virtual_tokens": 5})
    message = "61 tokens does not fit .* has room for 59 beside 5 virtual tokens; set max_length to at most 59"
    with pytest.raises(UserError, match=message):
        collected(model, prompt_set((61, 4)), 20, WATCHED, tmp_path)


def test_energies_are_sums_over_real_tokens():
    model, prompts = tiny_model("biased"), prompt_set()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    generator = torch.Generator().manual_seed(0)
    shapes = {name: find_module(model, name).weight.shape for name in names}
    dense = {name: Dense(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    low = {
        name: LowRank(torch.randn(out, 2, generator=generator), torch.randn(2, wide, generator=generator))
        for name, (out, wide) in shapes.items()
    }
    found = collect_energies(
        model, prompts, names, 3, lambda subject, name: (dense[name], low[name], None)[subject], lambda part: None
    )
    for name in names:
        inputs = []
        handle = find_module(model, name).register_forward_hook(
            lambda m, args, out, inputs=inputs: inputs.append(args[0][0].double())
        )
        with torch.no_grad():
            for ids in prompts.ids:
                model(input_ids=torch.tensor([ids]))
        handle.remove()
        h, weight = torch.cat(inputs), find_module(model, name).weight.detach().double()
        assert len(h) == sum(LENGTHS)
        for subject, delta in enumerate((dense[name].delta, low[name].b @ low[name].a, torch.zeros(shapes[name]))):
            sums = found[name][subject]
            assert sums.tokens == len(h)
            assert sums.inputs == pytest.approx(float(h.square().sum()), rel=1e-5)
            assert sums.outputs == pytest.approx(float((h @ weight.T).square().sum()), rel=1e-5)
            assert sums.changes == pytest.approx(float((h @ delta.double().T).square().sum()), rel=1e-5)


def test_a_large_bias_does_not_round_the_weight_out_of_bfloat16_outputs():
    model, prompts = tiny_model("biased").bfloat16(), prompt_set()
    name = "model.layers.0.self_attn.q_proj"
    layer = find_module(model, name)
    seen = []
    with torch.no_grad():
        layer.bias.fill_(300.0)
        handle = layer.register_forward_hook(lambda m, args, out: seen.append(args[0][0].double()))
        for ids in prompts.ids:
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    (sums,) = collect_energies(model, prompts, [name], 1, lambda subject, name: None, lambda part: None)[name]
    wanted = float((torch.cat(seen) @ layer.weight.detach().double().T).square().sum())
    assert sums.outputs == pytest.approx(wanted, rel=1e-3)


def test_a_module_that_is_not_passed_is_refused(tmp_path):
    model = tiny_model()
    model.model.layers[0].mlp.spare = torch.nn.Linear(4, 4)
    name = "model.layers.0.mlp.spare"
    with pytest.raises(UserError, match=f"module {name} takes no part in the forward pass"):
        collect_energies(model, prompt_set(), [WATCHED[0], name], 1, lambda subject, name: None, lambda part: None)
    with pytest.raises(UserError, match=f"module {name} takes no part in the forward pass"):
        collected(model, prompt_set(), 20, [WATCHED[0], name], tmp_path)


def test_rows_of_one_module_are_written_before_the_next_gives_its_own(tmp_path, monkeypatch):
    model, events = tiny_model(), []
    first, second = WATCHED[0], WATCHED[1]
    handle = find_module(model, second).register_forward_pre_hook(lambda m, args: events.append("second"))
    write = Rows.write
    monkeypatch.setattr(Rows, "write", lambda self, *args: (events.append(self.path.stem), write(self, *args))[1])
    collected(model, prompt_set(), 20, [first, second], tmp_path)
    handle.remove()
    assert events == ["0", "second", "1", "logits"]


def test_weights_of_transposed_layers_are_turned():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(3, 5)
    assert torch.equal(plain_weight(layer), layer.weight.detach().T)
    assert plain_weight(layer).shape == (3, 5)


def tiny(kind: str):
    """Return a tiny model without weights of one of several architectures, with four blocks."""
    import transformers as t

    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    gated = {**small, "intermediate_size": 32, "num_key_value_heads": 1, "pad_token_id": 0}
    configs = {
        "Llama": lambda: t.LlamaConfig(**gated),
        "Qwen2": lambda: t.Qwen2Config(**gated),
        "Phi3": lambda: t.Phi3Config(**gated),
        "GPT2": lambda: t.GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2),
        "GPTNeoX": lambda: t.GPTNeoXConfig(**small, intermediate_size=32),
        "OPT": lambda: t.OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=16),
        "Phi": lambda: t.PhiConfig(**small, intermediate_size=32),
        "Starcoder2": lambda: t.Starcoder2Config(**gated),
    }
    with torch.device("meta"):
        return t.AutoModelForCausalLM.from_config(configs[kind]())


ATTENTION, SPLIT = "self_attn", ("q_proj", "k_proj", "v_proj")
EXPECTED = {
    "Llama": ("model.layers", [f"{ATTENTION}.{part}" for part in SPLIT] + ["mlp.down_proj"]),
    "Qwen2": ("model.layers", [f"{ATTENTION}.{part}" for part in SPLIT] + ["mlp.down_proj"]),
    "Phi3": ("model.layers", ["mlp.down_proj", "self_attn.qkv_proj"]),
    "GPT2": ("transformer.h", ["attn.c_attn", "mlp.c_proj"]),
    "GPTNeoX": ("gpt_neox.layers", ["attention.query_key_value", "mlp.dense_4h_to_h"]),
    "OPT": ("model.decoder.layers", [f"{ATTENTION}.{part}" for part in SPLIT] + ["fc2"]),
    "Phi": ("model.layers", [f"{ATTENTION}.{part}" for part in SPLIT] + ["mlp.fc2"]),
    "Starcoder2": ("model.layers", [f"{ATTENTION}.{part}" for part in SPLIT] + ["mlp.c_proj"]),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_preset_finds_its_layers(kind):
    blocks, parts = EXPECTED[kind]
    found = paper_modules(linear_modules(tiny(kind)), kind)
    assert sorted(found) == sorted(f"{blocks}.{block}.{part}" for block in (1, 3) for part in parts)


def test_the_preset_names_what_it_found_instead():
    names = [f"layers.{block}.{part}" for block in (0, 1) for part in ("mixer.in", "mixer.out")]
    with pytest.raises(
        UserError, match=r"no layer for the query projection in block 0 of Odd, which has layers.0.mixer"
    ):
        paper_modules(names, "Odd")
    two = [f"h.0.{part}" for part in ("q_proj", "k_proj", "v_proj", "a.down_proj", "b.down_proj")]
    with pytest.raises(UserError, match="2 layers for the down projection"):
        paper_modules(two, "Odd")
    with pytest.raises(UserError, match="no linear layers in numbered blocks"):
        paper_modules(["q_proj"], "Odd")


def test_the_preset_is_at_the_depths_of_the_paper():
    assert paper_blocks(28) == (9, 18)
    known = {1: (0,), 2: (0, 1), 3: (1, 2), 4: (1, 3), 5: (2, 3), 30: (10, 19), 32: (10, 21), 80: (26, 51)}
    assert {count: paper_blocks(count) for count in known} == known
    for count in range(2, 200):
        first, second = paper_blocks(count)
        assert 0 <= first < second < count


def test_modules_are_chosen_by_pattern_and_block():
    names = [f"layers.{block}.{part}" for block in range(3) for part in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")]
    assert choose(names, "all-linear", None) == tuple(names)
    assert choose(names, ("v_proj", "layers.0.attn.q_proj"), None) == tuple(
        name for name in names if name.endswith("v_proj") or name == "layers.0.attn.q_proj"
    )
    assert choose(names, ("attn.q_proj",), (2,)) == ("layers.2.attn.q_proj",)
    with pytest.raises(UserError, match=r"unknown module 'q_porj' \(in modules\). Did you mean 'q_proj'"):
        choose(names, ("q_porj",), None)
    with pytest.raises(UserError, match="layers: 7 holds none of the modules; allowed: 0 to 2"):
        choose(names, "all-linear", (7,))
    with pytest.raises(UserError, match="no linear layers to measure"):
        choose([], "all-linear", None)


def test_a_module_that_is_not_there():
    with pytest.raises(UserError, match=r"model.layers.0.mlp.gone of the pretrained model is not in the tuned Llama"):
        find_module(tiny_model(), "model.layers.0.mlp.gone")
