"""The report of reinforcement learning: hostile text stays text, what is missing is said, nothing is ambiguous."""

import json
import re

import polars as pl
import pytest

from peft_arena.analyze.study import analyze_study
from peft_arena.report.build import build_report
from peft_arena.report.figures import curves_figure, prominent
from peft_arena.report.headline import caveats, headline
from peft_arena.report.page_tables import main_table
from peft_arena.report.plane import OBJECTIVE_MARKERS, trade_figure
from peft_arena.report.rl import rl_section
from peft_arena.report.rl_figures import rl_figure, write_rl_page
from peft_arena.report.rl_samples import MOST_COMPLETION, RECORDED, cut, visible
from tests.analyze.synthetic import Truth, _run, build_synthetic
from tests.analyze.synthetic_rl import Learning
from tests.report.test_report import Page

HOSTILE = (
    '</pre></td><script>alert("x")</script><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b[0m \x00 \x7f \x9b31m",
    "\u202etxet\u202c \u2066x\u2069 \u200b",
    "long " * 400,
    "",
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    truths = [
        Truth("lora (sft)", gain=0.5, forget=-0.2, setting="l", seeds=(0, 1)),
        Truth("lora (grpo)", gain=0.4, forget=-0.01, setting="l", seeds=(0, 1), rl=Learning(texts=HOSTILE)),
        Truth("oft (sft)", "oft", gain=0.3, setting="o", seeds=(0, 1)),
        Truth("oft (grpo)", "oft", gain=0.3, setting="o", seeds=(0, 1), rl=Learning(kl=None, unscored=0.1)),
    ]
    study = build_synthetic(root / "runs", truths, items=60)
    build_report(study.store, study.view, root / "out", draws=300)
    return root / "out", study


@pytest.fixture(scope="module")
def target(mixed):
    return analyze_study(mixed[1].store, mixed[1].view, draws=50).targets[0]


def analyzed(tmp_path, *truths):
    study = build_synthetic(tmp_path / "runs", list(truths), items=20, corpus=False)
    return study, analyze_study(study.store, study.view, draws=50)


def section(text):
    start = text.index('<h2 id="rl-1">')
    return text[start : text.index("<h2", start + 4)]


def test_the_section_has_pairs_warnings_curves_table_and_samples(mixed):
    text = (mixed[0] / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    found = section(text)
    for expected in (
        "The same method trained in two ways",
        "lora (grpo) against lora (sft): ",
        "Worth a look",
        "More than 1 % of the completions had no score (2 of 2 runs)",
        'href="rl.html"',
        "Reinforcement learning, start → end",
        "Sample rollouts",
        "generated tokens",
        "256 k",
    ):
        assert expected in found, expected


def test_what_a_model_wrote_does_nothing_in_a_page(mixed):
    found = section((mixed[0] / "index.html").read_text())
    assert "<script" not in found
    assert "<img" not in found
    assert "&lt;/pre&gt;&lt;/td&gt;&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in found
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", found)
    for shown in (r"\x1b", r"\x00", r"\x7f", r"\x9b", "U+202E", "U+2066", "U+200B"):
        assert f'<span class="ctl">{shown}</span>' in found
    assert f" … {2000 - MOST_COMPLETION} characters left out … " in found
    assert "(empty)" in found
    assert "met the limit" in found
    assert "no score: no number in the answer" in found


def test_lone_surrogates_are_written_out(tmp_path):
    study, _ = analyzed(tmp_path, Truth("a", seeds=(0,), rl=Learning()))
    path = study.store.run(study.view.arms[0].runs[0]).path / "records" / "training.json"
    found = json.loads(path.read_text())
    found["rollouts"]["samples"][0]["completions"][0]["text"] = "a \ud800 b"
    path.write_text(json.dumps(found))
    text = rl_section(analyze_study(study.store, study.view, draws=50).targets[0], ())
    assert 'a <span class="ctl">U+D800</span> b' in text
    assert text.encode()


def test_text_is_shown_with_its_lines_and_cut_in_the_middle():
    assert visible("a\nb\té<") == 'a\nb<span class="ctl">\\x09</span>é&lt;'
    assert cut("short", 10) == '<pre class="text">short</pre>'
    shown = cut("a" * 60 + "b" * 40, 10)
    assert shown == '<pre class="text">aaaaaa<span class="cut"> … 90 characters left out … </span>bbbb</pre>'


def test_a_text_whose_end_is_not_recorded_is_not_shown_with_an_end():
    shown = cut("a" * RECORDED + " […25 more characters]", 10)
    note = f'<span class="cut"> … {RECORDED - 10 + 25} characters left out, the end among them</span>'
    assert shown == f'<pre class="text">{"a" * 10}{note}</pre>'
    assert "the end among them" not in cut("a" * 20 + " […25 more characters]", 10)


def test_every_log_entry_is_a_row_and_no_policy_loss_is_a_cross_entropy(mixed):
    out, study = mixed
    rl, curves = (pl.read_csv(out / "tables" / f"{name}.csv") for name in ("rl", "curves"))
    arms = {run.run_id: arm.label for arm in study.view.arms for run in arm.runs}
    assert {arms[run_id] for run_id in rl["run_id"]} == {"lora (grpo)", "oft (grpo)"}
    assert {arms[run_id] for run_id in curves["run_id"]} == {"lora (sft)", "oft (sft)"}
    assert rl.height == 4 * 41
    assert rl["reward"].null_count() == 4
    assert json.loads(rl.filter(pl.col("reward").is_not_null())["rewards"][0]).keys() == {"format", "task"}
    runs = pl.read_csv(out / "tables" / "runs.csv")
    assert set(runs["objective"].drop_nulls()) == {"sft", "grpo"}


def test_the_loss_curves_are_those_of_fine_tuning_only(mixed):
    text = (mixed[0] / "figures" / "curves-1.svg").read_text()
    assert "lora (sft)" in text
    assert "grpo" not in text
    assert "Arms of reinforcement learning have no such loss" in (mixed[0] / "index.html").read_text()


def test_the_interactive_page_has_every_arm_and_run(mixed):
    text = (mixed[0] / "rl.html").read_text()
    (chart,) = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)[1])
    names = {style["name"] for style in chart["styles"]}
    assert names == {"lora (grpo)", "oft (grpo)"}
    means, runs = chart["choices"]
    assert len(runs["data"]) == 2 * 8 + 2 * 7
    assert len([trace for trace in means["data"] if "fill" not in trace]) == 8 + 7
    styles = chart["styles"]
    in_legend = [styles[trace["style"]] for trace in means["data"] if "fill" not in trace]
    assert sum(style["showlegend"] for style in in_legend) == 2
    bands = [trace for trace in means["data"] if trace.get("fill") == "toself"]
    assert len(bands) == 8 + 7
    assert bands[0]["fillcolor"] == "rgba(213,94,0,0.14)"
    assert max(bands[0]["y"]) >= max(means["data"][1]["y"])
    assert (mixed[0] / "plotly.min.js").exists()


def test_the_figure_has_a_panel_for_each_quantity_and_bands(target):
    figure = rl_figure(target.rl, prominent(target), "rl-1")
    panels = [axis for axis in figure.canvas.axes if axis.get_visible()]
    assert len(panels) == 8
    assert len(panels[0].collections) == 2
    kl = next(axis for axis in panels if axis.get_title(loc="left") == "KL from the reference")
    assert len(kl.lines) == 1
    assert "lora (grpo): reward 0." in figure.alt
    assert "bands: range over its runs" in figure.caption


def test_quantities_nobody_measured_are_named(tmp_path):
    _, result = analyzed(tmp_path, Truth("a", seeds=(0,), rl=Learning(kl=None, validation=None)))
    figure = rl_figure(result.targets[0].rl, {"a"}, "rl-1")
    assert figure.caption.startswith("One run per arm.")
    assert figure.caption.endswith("Not measured in any run: validation reward, KL from the reference.")
    assert len([axis for axis in figure.canvas.axes if axis.get_visible()]) == 6


def test_the_plane_has_a_mark_for_each_way_of_training_and_joins_pairs(target):
    figure = trade_figure(target, "tradeoff-1")
    legend = figure.canvas.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["sft", "grpo", "same method and settings"]
    marks = [line.get_marker() for line in figure.canvas.axes[0].lines if line.get_gid()]
    assert marks == [OBJECTIVE_MARKERS[name] for name in ("sft", "grpo", "sft", "grpo")]
    assert "The shape of a mark says how an arm was trained (sft, grpo)." in figure.caption


def test_only_fine_tuning_has_nothing_of_it_and_the_arms_own_marks(tmp_path):
    _, result = analyzed(tmp_path, Truth("a"), Truth("b"))
    found = result.targets[0]
    figure = trade_figure(found, "tradeoff-1")
    assert figure.canvas.legends == []
    assert [line.get_marker() for line in figure.canvas.axes[0].lines if line.get_gid()] == ["o", "s"]
    assert "shape of a mark" not in figure.caption
    assert "einforcement" not in curves_figure(found, "curves-1").caption + " ".join(caveats(result))
    assert "sft" not in main_table(found)


def test_only_reinforcement_learning_with_one_seed(tmp_path):
    truths = (Truth("a", seeds=(0,), rl=Learning()), Truth("b", seeds=(0,), rl=Learning(objective="rloo")))
    (found,) = analyzed(tmp_path, *truths)[1].targets
    text = rl_section(found, ())
    assert re.search(r'title="change \S+, 1 seed: no interval"', text)
    assert "The same method trained in two ways" not in text
    assert "No warning" in text
    assert curves_figure(found, "curves-1") is None
    assert "lora, rloo, lr" in main_table(found)


@pytest.mark.parametrize("truth", [Truth("a", rl=Learning(entries=0)), Truth("a", rl=Learning(), untrained=(0, 1, 2))])
def test_nothing_logged_and_nothing_trained(tmp_path, truth):
    (found,) = analyzed(tmp_path, truth)[1].targets
    assert rl_figure(found.rl, {"a"}, "rl-1") is None
    text = rl_section(found, ())
    assert "rl.html" not in text
    assert 'title="not measured"' in text
    write_rl_page({"t": found.rl}, tmp_path, title="T", named={"t": {"a"}})
    assert not (tmp_path / "rl.html").exists()


def test_the_findings_say_what_pairs_and_checks_say(mixed):
    result = analyze_study(mixed[1].store, mixed[1].view, draws=300)
    (sentence,) = [found for found in headline(result) if "fine-tuning of the same method" in found]
    assert sentence.startswith("Reinforcement learning against fine-tuning of the same method, 2 pairs: gain ")
    assert "mean retention better in 1 and undecided in 1" in sentence
    told = "1 check of reinforcement learning gave a warning (oft (grpo))"
    assert any(found.startswith(told) for found in caveats(result))


def test_where_an_arm_began_is_on_the_page_and_it_is_in_no_pair(tmp_path):
    tuned = Truth("tuned", seeds=(0,), setting="x")
    on_top = Truth("on", seeds=(0,), setting="x", rl=Learning(init_from=(_run(tuned, 0),)))
    _, result = analyzed(tmp_path, tuned, on_top)
    text = rl_section(result.targets[0], ())
    assert "on began at: tuned, the same seed, after 200 steps (merged in float32)." in text
    assert "Gain and retention are against the pretrained model in any case" in text
    assert "The same method trained in two ways" not in text
    assert not any("on against tuned" in found or "fine-tuning of the same" in found for found in headline(result))


def test_the_page_knows_where_records_are_cut():
    from peft_arena.train.rl_session import SAMPLED_CHARACTERS

    assert RECORDED == SAMPLED_CHARACTERS
