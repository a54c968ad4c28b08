"""The packaged micro model is small, loads without a network, knows its skills, and can be built again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from peft_arena.core.errors import UserError  # noqa: E402
from peft_arena.models.load import PACKAGED  # noqa: E402
from peft_arena.tasks.base import Role  # noqa: E402
from scripts.micro.answers import accuracy, greedy_answers, prompt_text  # noqa: E402
from scripts.micro.build import (  # noqa: E402
    BuildSettings,
    build,
    collate,
    encode,
    learning_rate_at,
    load_tasks,
    main,
    make_model,
)
from scripts.micro.tokenizer import END  # noqa: E402

ITEMS = 60
MEGABYTE = 10**6


@pytest.fixture(scope="module", autouse=True)
def offline_on_one_thread() -> Iterator[None]:
    """Refuse the network and use one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    """The packaged tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(PACKAGED["micro"])


@pytest.fixture(scope="module")
def model():
    """The packaged model."""
    return transformers.AutoModelForCausalLM.from_pretrained(PACKAGED["micro"])


def mean_accuracy(model, tokenizer, role: Role, count: int) -> dict[str, float]:
    """Return the accuracy on the first test items of each task of a role."""
    return {
        name: accuracy(model, tokenizer, task, task.items("test")[:count]) for name, task in load_tasks(role).items()
    }


def test_the_package_is_small_and_plain() -> None:
    files = [path for path in PACKAGED["micro"].rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.json", "model.safetensors", "tokenizer.json", "build_log.jsonl"}
    assert sum(path.stat().st_size for path in files) < 6 * MEGABYTE
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_model_is_a_small_llama_with_grouped_query_attention(model) -> None:
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert type(model) is transformers.LlamaForCausalLM
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.shape != attention.q_proj.weight.shape
    assert model.config.tie_word_embeddings


def test_the_model_loads_in_float32_unless_asked_otherwise(model) -> None:
    assert model.dtype == torch.float32


def test_the_tokenizer_fits_the_model(model, tokenizer) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    "text", ["Sort the letters: a b", "Ünïcode ☃ 123", "  two  spaces\n\nand lines", "def f(x):\n\treturn x"]
)
def test_the_tokenizer_writes_any_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_marks_what_the_assistant_says(tokenizer) -> None:
    chat = [{"role": "user", "content": "Sort the letters: b a"}, {"role": "assistant", "content": "a b"}]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "a b" + END
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    opening = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(opening)


def test_training_examples_are_what_the_chat_template_gives(tokenizer) -> None:
    """Tokens of question and answer taken apart are those of the whole conversation."""
    task = load_tasks(Role.RETENTION)["micro-format"]
    for item, example in zip(task.items("train")[:50], encode(task, tokenizer, 50), strict=True):
        chat = [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}]
        whole = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert whole["input_ids"][: len(example.ids)] == example.ids
        assert whole["assistant_masks"].index(1) == example.question_tokens


def test_the_model_knows_the_retention_tasks(model, tokenizer) -> None:
    scores = mean_accuracy(model, tokenizer, Role.RETENTION, ITEMS)
    assert len(scores) >= 5
    assert sum(scores.values()) / len(scores) >= 0.85, scores


def test_the_model_knows_them_in_bfloat16_too(tokenizer) -> None:
    half = transformers.AutoModelForCausalLM.from_pretrained(PACKAGED["micro"], dtype=torch.bfloat16)
    scores = mean_accuracy(half, tokenizer, Role.RETENTION, ITEMS // 2)
    assert sum(scores.values()) / len(scores) >= 0.85, scores


def test_the_model_does_not_know_the_targets(model, tokenizer) -> None:
    scores = mean_accuracy(model, tokenizer, Role.TARGET, ITEMS)
    assert len(scores) >= 2
    assert max(scores.values()) <= 0.25, scores


def test_sampled_answers_to_the_months_are_right_sometimes(model, tokenizer) -> None:
    """A policy gradient needs groups of answers with right and wrong ones; of the other targets there are none."""

    def chances(name: str) -> torch.Tensor:
        """Probability of writing exactly the answer to each train item at temperature 1."""
        examples = encode(load_tasks(Role.TARGET)[name], tokenizer, ITEMS)
        ids, weights = collate(examples, tokenizer.pad_token_id, 0.0)
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
        return (logs.gather(2, ids[:, 1:, None])[:, :, 0] * weights[:, 1:]).sum(1).exp()

    def mixed(chance: torch.Tensor, group: int = 8) -> float:
        """Expected share of groups that have both right and wrong answers."""
        return float((1 - chance**group - (1 - chance) ** group).mean())

    months = chances("micro-months")
    assert 0.05 <= float(months.mean()) <= 0.25
    assert mixed(months) >= 0.1
    assert mixed(chances("micro-reverse")) <= 0.001


def test_answers_do_not_depend_on_the_padding(model, tokenizer) -> None:
    tasks = load_tasks(Role.RETENTION)
    prompts = [prompt_text(task, task.items("test")[0], tokenizer) for task in tasks.values()]
    together = greedy_answers(model, tokenizer, prompts, 16)
    alone = [greedy_answers(model, tokenizer, [prompt], 16)[0] for prompt in prompts]
    assert together == alone


def test_the_log_describes_the_packaged_weights(model) -> None:
    lines = [
        json.loads(line) for line in (PACKAGED["micro"] / "build_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    head, *steps = lines
    assert head["settings"]["layers"] == model.config.num_hidden_layers
    assert head["parameters"] == model.num_parameters()
    assert steps[-1]["step"] == head["settings"]["steps"]
    assert set(steps[-1]["accuracy"]) == set(load_tasks(Role.RETENTION))


def test_the_same_seed_builds_the_same_weights(tmp_path: Path) -> None:
    settings = BuildSettings(steps=2, batch_items=8, train_items=20, evaluate_every=2, evaluate_items=2)
    for name in ("one", "two"):
        build(tmp_path / name, settings)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "build_log.jsonl"}
        for name in ("one", "two")
    )
    assert one == two
    different = {name for name in one if one[name] != (PACKAGED["micro"] / name).read_bytes()}
    assert different == {"model.safetensors"}, "configuration and tokenizer of the package are not what build makes"


def test_another_seed_starts_from_other_weights(tokenizer) -> None:
    first, again, other = (make_model(BuildSettings(seed=seed), tokenizer).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_build_refuses_a_folder_with_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty"):
        build(tmp_path, BuildSettings(steps=1))


def test_the_command_reports_a_user_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["--out", str(tmp_path), "--steps", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_learning_rate_rises_then_falls() -> None:
    settings = BuildSettings(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=0.001)


def test_padding_has_no_weight() -> None:
    ids, weights = collate(encode_stub(), pad=0, question_weight=0.5)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert weights.tolist() == [[0.5, 0.5, 1.0], [0.5, 1.0, 0.0]]


def encode_stub():
    """Two examples of different lengths."""
    from scripts.micro.build import Example

    return [Example([5, 6, 7], 2), Example([8, 9], 1)]
