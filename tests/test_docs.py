"""What the docs show can be read."""

import re

import pytest
import yaml

from peft_arena.core.build import build
from peft_arena.study.study_file import StudyFile
from scripts.numbers import ROOT, pages

YAML = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
EXAMPLES = [(page, text) for page in pages() for text in YAML.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=lambda value: getattr(value, "name", ""))
def test_every_example_of_a_file_is_yaml(page, text):
    assert yaml.safe_load(text), page


def test_the_study_file_with_every_key_is_one():
    text = YAML.findall((ROOT / "docs" / "studies.md").read_text(encoding="utf-8"))[0]
    found = build(StudyFile, yaml.safe_load(text), where="docs/studies.md")
    assert found.arms[1].seeds == (0, 1, 2, 3, 4)
    left_out = {"rl", "published"}
    assert set(StudyFile.model_fields) - set(yaml.safe_load(text)) == left_out
