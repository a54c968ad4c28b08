"""Chat templates: a date that no clock moves, keywords, the end of a turn, and what stands before an answer."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as templates
from chat_toys import CHATML, DATED, HYBRID, KINDS, NAMED_DATE, TEMPLATES, THINKER, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models.chat import (
    FIXED_DATE,
    RENDERING,
    apply_template,
    check_keywords,
    configure,
    opening,
    turn_end,
    uses_date,
)
from peft_arena.models.load import MICRO, load, pin
from peft_arena.models.render import encode_example, encode_prompt, render
from peft_arena.tasks.base import Message

ASK = (Message("user", "What?"),)
TURNS = [{"role": "user", "content": "What?"}]


def spec(**chat: Any) -> ModelSpec:
    return build(ModelSpec, {"name": "toy", "chat": chat})


def dated(template: str, **chat: Any) -> str:
    """Render a question through a template with settings."""
    return render(configure(toy_tokenizer(template=template), spec(**chat), None), ASK)


@pytest.fixture
def another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers believe that it is long ago."""

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Then:
            return cls(1999, 12, 31, 23, 59, 58)

    monkeypatch.setattr(templates, "datetime", Then)


@pytest.mark.parametrize("template", [DATED, NAMED_DATE])
def test_a_template_is_told_the_same_date_on_every_day(template: str, another_day: None) -> None:
    tokenizer = toy_tokenizer(template=template + "{# another text, so that transformers has not compiled it #}")
    assert "31 Dec 1999" in tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert FIXED_DATE.strftime("%d %b %Y") in render(tokenizer, ASK)
    assert "1999" not in render(tokenizer, ASK)


def test_every_form_of_a_date_is_that_of_strftime() -> None:
    assert "Today: 26 Jul 2024, 00:00:00, 100% 26\n" in dated(DATED)
    assert "Today: 05 Jan 2026, 00:00:00, 100% 5\n" in dated(DATED, date="2026-01-05")


@given(
    st.lists(st.sampled_from(["%Y", "%m", "%d", "%B", "%b", "%A", "%a", "%H:%M:%S", "%-d", "%-m", "%j", "%%", "%y"])),
    st.dates(datetime.date(1971, 1, 1), datetime.date(2200, 1, 1)),
    st.sampled_from([" ", "", "-", "d", "Y"]),
)
def test_the_fixed_clock_speaks_as_strftime_does(codes: list[str], day: datetime.date, between: str) -> None:
    form = between.join(codes)
    template = "{% macro inner(f) %}{{ strftime_now(f) }}{% endmacro %}[{{ inner(" + repr(form) + ") }}]"
    tokenizer = configure(toy_tokenizer(template=template), spec(date=day.isoformat()), None)
    moment = datetime.datetime.combine(day, datetime.time())
    assert apply_template(tokenizer, TURNS) == f"[{moment.strftime(form)}]"


def test_a_line_feed_or_blanks_at_the_head_of_a_dated_template_stay_what_they_are() -> None:
    for head in ("\n", "\n\n", "  {% if true %}x{% endif %}", "  y", "  {%- if true %}x{% endif %}\n"):
        clockless = render(toy_tokenizer(template=head + CHATML), ASK)
        assert render(toy_tokenizer(template=head + CHATML + "{{ strftime_now('') }}"), ASK) == clockless


def test_a_date_of_the_study_is_told_under_the_name_that_the_template_has() -> None:
    assert "Date: 26 Jul 2024\n" in dated(NAMED_DATE)
    assert "Date: 05 Jan 2026\n" in dated(NAMED_DATE, date=datetime.date(2026, 1, 5))
    assert "Date: today\n" in dated(NAMED_DATE, date="2026-01-05", date_string="today")


def test_keywords_reach_the_template() -> None:
    assert render(toy_tokenizer(template=HYBRID), ASK).endswith("assistant\n")
    assert dated(HYBRID, quick=True).endswith("<think>\n\n</think>\n\n")
    assert dated(HYBRID, quick=False).endswith("assistant\n")


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (HYBRID, {"qick": True}, "has no such keyword. Known: quick"),
        (CHATML, {"quick": True}, "Known: none"),
        (CHATML, {"date": "2026-01-01"}, "uses no date"),
        (None, {"quick": True}, "has no chat template"),
    ],
)
def test_what_a_template_does_not_read_is_refused(template: str | None, chat: dict[str, Any], message: str) -> None:
    asked = spec(**chat)
    assert asked.chat is not None
    with pytest.raises(UserError, match=re.escape(message)):
        check_keywords(toy_tokenizer(template=template), asked.chat, "toy")


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ({"tools": []}, "'tools' is given to every template"),
        ({"add_generation_prompt": True}, "'add_generation_prompt' is given"),
        ({"date": 20260101}, "must be a day"),
        ({"date": "soon"}, "chat.date: "),
        ({"since": datetime.date(2026, 1, 1)}, "'since' must be a JSON value"),
        ({"share": float("nan")}, "'share' must be a JSON value"),
    ],
)
def test_what_no_template_can_be_given_is_refused(chat: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        spec(**chat)


def test_chat_settings_are_part_of_the_identity_and_nothing_else_changed() -> None:
    plain = ModelSpec(name="toy", revision="1")
    assert plain.model_dump(mode="json") == {"name": "toy", "revision": "1", "dtype": "float32"}
    assert build(ModelSpec, {"name": "toy", "revision": "1", "chat": {}}) == plain
    specs = [spec(), spec(date="2026-01-05"), spec(quick=True), spec(quick=False), spec(levels={"deep": [1, None]})]
    assert len({one.id for one in specs}) == len(set(specs)) == len(specs)
    for one in specs:
        assert ModelSpec.model_validate_json(one.model_dump_json()) == one


def test_a_template_that_refuses_a_conversation_is_named() -> None:
    tokenizer = toy_tokenizer(template="{{ raise_exception('no system turns') }}")
    with pytest.raises(
        UserError, match="the chat template of toy cannot render a conversation of system, user: no system"
    ):
        render(tokenizer, (Message("system", "Be brief."), *ASK))
    assert turn_end(tokenizer) is None and opening(tokenizer) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_turn_is_the_token_behind_an_answer(kind: str) -> None:
    ends = {name: turn_end(toy_tokenizer(kind, template)) for name, template in TEMPLATES.items()}
    tokenizer = toy_tokenizer(kind)
    close, end = tokenizer.convert_tokens_to_ids(["<|close|>", "</s>"])
    assert ends.pop("bare") is None and ends.pop("brackets") == end
    assert set(ends.values()) == {close}
    assert turn_end(toy_tokenizer(kind, None)) is None


def test_what_stands_before_an_answer() -> None:
    assert opening(toy_tokenizer(template=CHATML)) == ""
    assert opening(toy_tokenizer(template=HYBRID)) == "<think>\n\n</think>\n\n"
    assert opening(toy_tokenizer(template=THINKER)) == "\n</think>\n\n"
    assert opening(configure(toy_tokenizer(template=HYBRID), spec(quick=True), None)) == ""


def test_only_templates_that_write_a_date_are_said_to() -> None:
    found = {name for name, template in TEMPLATES.items() if uses_date(toy_tokenizer(template=template))}
    assert found == {"dated", "named date"}
    assert not uses_date(toy_tokenizer(template=None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model directory with a hybrid's template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = toy_tokenizer(template=HYBRID)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_pinned_model_states_how_it_is_rendered(folder: Path) -> None:
    assert pin(ModelSpec(name=MICRO)).rendering is None
    pinned = pin(build(ModelSpec, {"name": str(folder), "chat": {"quick": True}}))
    assert pinned.rendering == RENDERING
    assert render(load(pinned).tokenizer, ASK).endswith("</think>\n\n")
    assert pin(ModelSpec(name="owner/name", revision="a" * 40)).rendering == RENDERING
    with pytest.raises(UserError, match=r"model\.chat\.slow: .* has no such keyword\. Known: quick"):
        pin(build(ModelSpec, {"name": str(folder), "chat": {"slow": True}}))


def test_an_old_run_of_another_model_is_read_and_not_asked_anew(folder: Path) -> None:
    old = pin(ModelSpec(name=str(folder))).model_copy(update={"rendering": None})
    assert ModelSpec.model_validate(old.model_dump(mode="json")) == old
    tokenizer = load(old).tokenizer
    for ask in (lambda: encode_prompt(tokenizer, "a"), lambda: encode_example(tokenizer, ASK, "b")):
        with pytest.raises(UserError, match="from before prompts and answers were rendered as they are now"):
            ask()
