"""A chat template is a program of somebody else's: it is tried where it can do no harm."""

import os

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models import trial as tried
from peft_arena.models.chat import apply_template
from peft_arena.models.load import load
from peft_arena.models.trial import trial
from tests.faults.malformed_kinds import TEMPLATES

ENDS = {"macro of itself", "broken", "no such thing"}
"""These raise by themselves."""


@pytest.fixture(scope="module")
def tokenizer():
    return load(ModelSpec(name="micro")).tokenizer


@pytest.mark.parametrize("kind", sorted(set(TEMPLATES) - ENDS - {"loop of messages"}))
def test_templates_that_do_not_end_or_fill_the_memory_are_refused(kind, monkeypatch):
    monkeypatch.setattr(tried, "SECONDS", 1)
    tried.trial.cache_clear()
    assert trial(TEMPLATES[kind]).startswith("it ")


@pytest.mark.parametrize("kind", sorted(ENDS))
def test_templates_that_raise_are_one_line_when_they_are_used(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[kind])
    with pytest.raises(UserError, match="chat template of .* cannot") as caught:
        apply_template(tokenizer, [{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value)


def test_a_template_that_only_some_conversations_hang_is_interrupted(tokenizer, monkeypatch):
    monkeypatch.setattr("peft_arena.models.chat.SECONDS", 0.2)
    loops = TEMPLATES["loops"]
    template = "{% if messages[0]['content'] == 'hang' %}" + loops + "{% endif %}ok"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert apply_template(tokenizer, [{"role": "user", "content": "x"}]) == "ok"
    with pytest.raises(UserError, match="takes more than"):
        apply_template(tokenizer, [{"role": "user", "content": "hang"}])


def test_a_usual_template_is_tried_once_and_leaves_nothing(monkeypatch):
    trial.cache_clear()
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    assert trial("{% for m in messages %}{{ m['content'] }}{% endfor %}") == ""
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    monkeypatch.setattr(tried, "_fork", lambda: pytest.fail("it is known"))
    assert trial("{% for m in messages %}{{ m['content'] }}{% endfor %}") == ""
