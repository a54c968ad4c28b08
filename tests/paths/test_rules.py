"""The registry of rules: names, settings, specs, plug-ins."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.specs import OWN, PathSpec, RuleSpec
from peft_arena.paths.base import PRETRAINED, TUNED, Plan, Progress, Rule, RuleCard, RuleConfig
from peft_arena.paths.rules import GROUP, RULES, make_rule, rule_spec
from tests.paths.path_toys import NORM, multiplied_out, tuned

DOC = Path(__file__).parents[2] / "docs" / "rules.md"
IMPORTS = """
from pydantic import Field
from peft_arena.methods.targets import block_of
from peft_arena.paths.base import *
"""
OURS = ["intruder", "lines", "min", "safe", "uniform"]
PLUGIN = """
from pydantic import Field
from peft_arena.paths.base import PRETRAINED, TUNED, LayerRule, RuleCard, RuleConfig, of_blocks
class HalfConfig(RuleConfig):
    block: int = Field(default=3, ge=0)
class Half(LayerRule):
    Config = HalfConfig
    card = RuleCard(name="half", title="Half", paper="none", url="", description="One block is halved.",
                    zero=PRETRAINED, one="half of one block")
    def factors(self, weights, progress):
        return of_blocks(weights, {self.config.block: 0.5})
class Other(Half):
    pass
class NoCard(Half):
    card = None
class NoConfig(Half):
    card = Half.card.model_copy(update={"name": "half"})
    Config = dict
class NoRule:
    pass
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write the metadata of a distribution and its module where they are found, as pip does."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(target, version="1.0", name="half", code=PLUGIN):
        for old in tmp_path.glob("*.dist-info/entry_points.txt"):
            old.unlink()
        info = tmp_path / f"halves-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: halves\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {target}\n")
        (tmp_path / "halves_code.py").write_text(code)
        importlib.invalidate_caches()
        vars(RULES).pop("_plugins", None)

    yield write
    monkeypatch.undo()
    vars(RULES).pop("_plugins", None)
    sys.modules.pop("halves_code", None)


def test_our_rules_are_listed():
    assert RULES.own() == OURS


@pytest.mark.parametrize("name", OURS)
def test_every_rule_is_complete(name):
    rule = make_rule(name)
    card = rule.card
    assert card.name == name and card.title and card.description and card.zero and card.one
    assert card.paper == "none" or card.url.startswith("https://arxiv.org/abs/")
    assert card.from_base == (card.zero == PRETRAINED) and card.to_tuned == (card.one == TUNED)
    for field, info in type(rule.config).model_fields.items():
        assert info.description, f"{name}.{field} is not explained"


def test_importing_rules_imports_no_torch():
    code = (
        "import sys; from peft_arena.paths.rules import RULES, rule_spec;"
        "found = [RULES.get(name).card and rule_spec(name) for name in RULES.names()];"
        "print(len(found), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "5 False"


def test_specs_write_every_default_out():
    assert rule_spec("safe") == RuleSpec(name="safe", config={"blocks": 5, "strength": "relative_norm"})
    assert rule_spec("intruder", {"top": 3}).config == {"top": 3, "threshold": 0.5}
    assert rule_spec("safe").id != rule_spec("safe", {"blocks": 4}).id
    assert PathSpec(rule=rule_spec("uniform")) == OWN


def test_a_spec_makes_the_rule_it_is_of():
    rule = make_rule(rule_spec("safe", {"blocks": 2, "strength": "angle"}))
    assert (rule.card.name, rule.config.blocks, rule.config.strength) == ("safe", 2, "angle")
    with pytest.raises(ValueError, match="a spec holds its settings"):
        make_rule(rule_spec("safe"), {"blocks": 3})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("saef", {}, r"unknown rule 'saef' \(in --rule\)\. Did you mean 'safe'\? Known: intruder, lines, min, safe"),
        ("safe", {"block": 3}, r"unknown key 'block' \(in rule safe, --rule\)\. Did you mean 'blocks'\?"),
        ("safe", {"blocks": 0}, r"blocks: input should be greater than or equal to 1, got 0 \(in rule safe, --rule\)"),
        ("min", {"strength": "norm"}, r"strength: .*'relative_norm', 'spectral' or 'angle', got 'norm'"),
        ("uniform", {"factor": 1}, r"unknown key 'factor' \(in rule uniform, --rule\)\. Known: none"),
        ("lines", {"first": 1.5}, r"first: input should be less than or equal to 1"),
        ("intruder", {"threshold": 0}, r"threshold: input should be greater than 0"),
    ],
)
def test_wrong_requests_are_one_line(name, config, message):
    with pytest.raises(UserError, match=message) as caught:
        rule_spec(name, config, "--rule")
    assert "\n" not in str(caught.value)


def test_a_rule_of_a_plugin_works_like_ours(install):
    install("halves_code:Half")
    assert RULES.names() == sorted([*OURS, "half"]) and "halves_code" not in sys.modules
    spec = rule_spec("half", {"block": 3})
    assert spec.plugin == "halves 1.0" and spec.config == {"block": 3}
    weights = tuned("dense", others={NORM: 0.1})
    point = make_rule(spec).apply(weights, 0.5)
    assert point.factor_of(NORM) == 0.25 and point.factor_of("model.layers.2.mlp.up_proj.weight") == 0.5
    assert float(multiplied_out(point)[NORM][0]) == pytest.approx(0.025, rel=1e-4)
    install("halves_code:Half", version="2.0")
    with pytest.raises(UserError, match=r"rule half is from halves 2\.0, and was planned with halves 1\.0"):
        make_rule(spec)


def test_the_rule_of_the_documentation_works(install):
    code = DOC.read_text().split("```python")[1].split("```")[0]
    install("halves_code:TopHalf", name="top_half", code=IMPORTS + code)
    point = make_rule("top_half", {"below": 0.3}).apply(tuned("rotation"), 1.0)
    weights = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(6)]
    assert [point.factor_of(name) for name in weights] == [0.3, 0.3, 0.3, 1.0, 1.0, 1.0]
    assert rule_spec("top_half").config == {"below": 0.5}


def test_the_documentation_names_every_rule_and_setting():
    text = DOC.read_text()
    for name in OURS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        for field, value in make_rule(name).config.model_dump().items():
            default = "" if field == "strength" else f" = {value:g}"
            assert f"`{field}`{default}" in row, (name, field)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("NoRule", "not a subclass of peft_arena.paths.base.Rule"),
        ("NoCard", "it has no card"),
        ("NoConfig", "its Config is not a subclass of RuleConfig"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(install, target, reason):
    install(f"halves_code:{target}")
    with pytest.raises(
        UserError, match=f"rule 'half' cannot be used: entry point half = halves_code:{target}.*{reason}"
    ):
        make_rule("half")


def test_a_plugin_under_another_name_than_its_cards_is_refused(install):
    install("peft_arena.paths.lines:Lines")
    with pytest.raises(UserError, match="its card says the rule is called 'lines'"):
        make_rule("half")


def test_a_rule_that_is_no_layer_rule_returns_any_point():
    class Mirror(Rule):
        """The same factor everywhere, squared."""

        Config = RuleConfig
        card = RuleCard(
            name="mirror", title="Mirror", paper="none", url="", description="d", zero=PRETRAINED, one=TUNED
        )

        def refuses(self, weights):
            return "of its mood" if weights.factor < 1 else ""

        def plan(self, weights, progress: Progress) -> Plan:
            progress(1.0, "nothing")
            return lambda factor: weights.interpolated(factor**2)

    weights, said = tuned("dense"), []
    assert Mirror().apply(weights, 0.5).factor == 0.25
    Mirror().prepare(weights, lambda fraction, what: said.append((fraction, what)))
    assert said == [(1.0, "nothing")]
    with pytest.raises(UserError, match="rule mirror cannot be used here: of its mood"):
        Mirror().apply(weights.interpolated(0.5), 0.5)
