"""The report: self-contained, safe, honest about what is missing, and readable back."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from peft_arena.analyze.study import analyze_study
from peft_arena.analyze.view import Refusal
from peft_arena.core.errors import UserError
from peft_arena.report.build import build_report
from peft_arena.report.headline import headline
from peft_arena.report.labels import Box, place_labels
from peft_arena.report.markup import Markup, cell, tag
from peft_arena.report.numbers import listed, plain, quantity, rate, signed
from peft_arena.report.plane import trade_figure
from tests.analyze.synthetic import Truth, build_synthetic

HOSTILE = '<script>alert("x")</script> & $a$ "q"'


class Page(HTMLParser):
    """Collects tags, references and ids; notes elements that are never closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.ids, self.open, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.references += [given[name] for name in ("src", "href", "xlink:href") if given.get(name)]
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    truths = [
        Truth("lora", gain=0.5, forget=-0.12, parameters=50_000),
        Truth("oft", "oft", gain=0.5, forget=-0.01, parameters=20_000, memory=2e9),
        Truth("wrecked", "full", gain=-0.03, forget=-0.97, corpus=3.0),
        Truth(HOSTILE, gain=0.2, failed={1: "out of <memory>"}, seeds=(0, 1)),
    ]
    refused = (Refusal("grpo & co", "needs <sampling>"),)
    study = build_synthetic(root / "runs", truths, items=80, unscored=0.02, refused=refused)
    summary = build_report(study.store, study.view, root / "out", draws=500)
    return root / "out", summary, study


def test_the_page_refers_to_nothing_outside(full):
    page = Page((full[0] / "index.html").read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert page.references, "no reference found: is the parser right?"
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    text = (full[0] / "index.html").read_text()
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(text) < 2_000_000


def test_text_is_escaped_everywhere(full):
    text = (full[0] / "index.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "out of &lt;memory&gt;" in text
    assert "needs &lt;sampling&gt;" in text
    assert "<script" not in "".join(path.read_text() for path in (full[0] / "figures").glob("*.svg"))


def test_figures_have_an_accessible_name_and_hover_texts(full):
    text = (full[0] / "index.html").read_text()
    assert text.count('role="img"') == 3
    assert all(len(found) > 40 for found in re.findall(r'role="img" aria-label="([^"]*)"', text))
    assert "<title>oft: gain" in text
    assert 'scope="row"' in text
    for suffix in ("svg", "png"):
        assert len(list((full[0] / "figures").glob(f"*.{suffix}"))) == 3


def test_the_findings_are_the_truth(full):
    findings = " ".join(full[1]["headline"])
    assert "Best in gain on operator: one of lora, oft and " in findings
    assert "worse than the highest: wrecked." in findings
    assert "2 of 4 arms forget (mean retention worse than the pretrained model's): lora and wrecked" in findings
    assert re.search(r"the lowest wrecked at \N{MINUS SIGN}8\d\.\d points \[", findings)
    assert "undecided: oft and " in findings
    assert "trains the fewest parameters" in findings
    assert "1 of 11 runs is missing" not in findings
    assert "1 of 11 runs are missing or failed" in findings
    assert "Answers on operator that could not be scored" in findings


def test_what_is_missing_is_on_the_page(full):
    text = (full[0] / "index.html").read_text()
    for expected in (
        "1 failed",
        "1 refused",
        "no answer in the output",
        "Test CPU",
        "0123456789abcdef",
    ):
        assert expected in text


def test_the_summary_is_the_file_and_says_what_intervals_cover(full):
    out, summary, _ = full
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    arms = {arm["label"]: arm for arm in summary["targets"][0]["arms"]}
    assert arms["lora"]["gain"]["delta"]["covers"] == "seeds and items"
    assert arms[HOSTILE]["gain"]["delta"]["covers"] == "items, and the seed spread of other arms"
    judged = arms[HOSTILE]["gain_judged"]
    assert (judged["verdict"], judged["about"]) == ("undecided", "the method")
    assert arms["lora"]["costs"]["training_speed"]["value"] == pytest.approx(2500)
    assert arms["lora"]["costs"]["latency_ratio"]["value"] == pytest.approx(1.05)
    assert arms["oft"]["retention_mean"]["low"] < arms["oft"]["retention_mean"]["value"]


def test_the_tables_parse_back(full):
    out, summary, study = full
    frames = {path.stem: pl.read_csv(path) for path in (out / "tables").glob("*.csv")}
    assert set(frames) == {
        "runs",
        "items",
        "metrics",
        "costs",
        "curves",
        "rl",
        "effects",
        "comparisons",
        "gaps",
        "along",
    }
    effects = frames["effects"].filter((pl.col("arm") == "lora") & (pl.col("role") == "mean retention"))
    assert effects["value"][0] == pytest.approx(summary["targets"][0]["arms"][0]["retention_mean"]["value"])
    assert frames["comparisons"].height == 2 * 6
    assert HOSTILE in frames["runs"]["arm"].to_list()
    assert frames["items"]["run_id"].n_unique() == 11
    assert frames["gaps"].height == len(summary["gaps"])


def test_nothing_trained_yet(tmp_path):
    truths = [Truth("a", untrained=(0, 1, 2)), Truth("b", untrained=(0, 1, 2))]
    study = build_synthetic(tmp_path / "runs", truths, items=10, with_base=False)
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    assert summary["headline"][0] == "No arm can be compared yet: none of 2 has a gain over a base score."
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert page.open == []
    assert "svg" not in page.tags
    assert pl.read_csv(tmp_path / "out" / "tables" / "items.csv").height == 0
    assert len(summary["gaps"]) == 6 + 7


def test_one_arm_without_costs_and_a_damaged_run(tmp_path):
    study = build_synthetic(tmp_path / "runs", [Truth("a"), Truth("b")], items=20, corpus=False)
    for path in (tmp_path / "runs").glob("*/records/cost-*.json"):
        path.unlink()
    damaged = study.store.run(study.view.arms[1].runs[0])
    (damaged.path / "records" / "training.json").write_text("{}")
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    assert "damaged" in {gap["kind"] for gap in summary["gaps"]}
    assert "Not measured in any run" in (tmp_path / "out" / "index.html").read_text()


def test_several_targets_are_told_apart(tmp_path):
    truths = [Truth("a"), Truth("b"), Truth("a", target="cipher"), Truth("b", target="cipher")]
    study = build_synthetic(tmp_path / "runs", truths, items=20)
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    assert [target["target"] for target in summary["targets"]] == ["operator", "cipher"]
    assert len(list((tmp_path / "out" / "figures").glob("tradeoff-*.svg"))) == 2
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert len(page.ids) == len(set(page.ids))


def test_an_output_that_cannot_be_written_is_a_user_error(tmp_path):
    study = build_synthetic(tmp_path / "runs", [Truth("a", untrained=(0, 1, 2))], items=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        build_report(study.store, study.view, tmp_path / "file" / "out", draws=20)


def test_equal_arms_are_undecided_with_what_would_have_been_found(tmp_path):
    study = build_synthetic(tmp_path / "runs", [Truth(name, forget=0.0) for name in "abc"], items=100)
    found = headline(analyze_study(study.store, study.view, draws=300))
    assert found[0].startswith("a, b and c are undecided against each other in gain on operator (")
    assert re.search(r"; a difference of [\d.]+ would be found\)", found[0])
    assert not any("worse than the pretrained model's" in text for text in found)


def test_one_seed_is_one_run(tmp_path):
    truths = [Truth("a", gain=0.5, seeds=(0,)), Truth("b", gain=0.0, forget=-0.5, seeds=(0,))]
    study = build_synthetic(tmp_path / "runs", truths, items=200, corpus=False)
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    gain, forget, keeps, *_ = summary["headline"]
    assert gain.startswith("Best in gain on operator: this run of a (+")
    assert forget.startswith("In these runs, 1 of 2 arms forget")
    assert keeps.startswith("Best in mean retention: this run of a (")
    arms = summary["targets"][0]["arms"]
    assert {arm["gain"]["delta"]["covers"] for arm in arms} == {"items only"}
    assert {arm["gain_judged"]["about"] for arm in arms} == {"this run"}
    assert "1 seed: this run" in (tmp_path / "out" / "index.html").read_text()


def test_labels_do_not_cover_each_other_or_the_marks():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.uniform(200, 330, size=(9, 2))]
    marks = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    sizes = [(70.0, 13.0)] * len(points)
    places = place_labels(points, sizes, Box(0, 0, 700, 500), marks, [])
    boxes = [Box(place.x, place.y, place.x + 70, place.y + 13) for place in places]
    for index, box in enumerate(boxes):
        assert all(box.overlap(other) == 0 for other in boxes[:index])
        assert all(box.overlap(mark) == 0 for mark in marks)


def test_numbers_as_text():
    assert signed(-0.04) == "0.0"
    assert signed(3.25) == "+3.2"
    assert plain(-2.0) == "\N{MINUS SIGN}2.0"
    assert quantity(1_500_000_000, "bytes") == "1.40 GiB"
    assert quantity(512, "bytes") == "512 B"
    assert quantity(36_864, "parameters") == "36.9 k"
    assert quantity(3.1e13, "FLOPs") == "31 TFLOPs"
    assert quantity(1.05, "ratio") == "1.05"
    assert quantity(None, "bytes") == "\N{EN DASH}"
    assert rate(2e-4) == "2e\N{MINUS SIGN}4"
    assert listed(["a", "b", "c"]) == "a, b and c"


def test_markup_escapes_what_is_not_markup():
    assert tag("p", "<b>", Markup("<i>"), title='"x"', class_="a", aria_label="b", style=None) == (
        '<p title="&quot;x&quot;" class="a" aria-label="b">&lt;b&gt;<i></p>'
    )
    assert cell("a & b") == '<td class="num">a &amp; b</td>'


def test_importing_the_report_is_light():
    code = (
        "import sys, peft_arena.report.build, peft_arena.analyze.study;"
        "print({'torch', 'matplotlib', 'polars', 'plotly', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_other_studies_and_damaged_records_do_not_stop_a_report(tmp_path):
    study = build_synthetic(tmp_path / "runs", [Truth("a", seeds=(0,)), Truth("b", seeds=(0,))], items=20)
    one, two = (study.store.run(arm.runs[0]) for arm in study.view.arms)
    (one.path / "records" / "000200-1" / "eval-other-0123456789ab.json").write_text('{"schema_version": 2}')
    damaged = next((two.path / "records" / "000200-1").glob("eval-facts-*"))
    damaged.write_text("{")
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    assert [(gap["who"], gap["what"], gap["kind"]) for gap in summary["gaps"]] == [("b, seed 0", "facts", "damaged")]
    items = pl.read_csv(tmp_path / "out" / "tables" / "items.csv")
    assert items.filter(pl.col("run_id") == two.run_id)["task"].n_unique() == 6
    assert items.filter(pl.col("run_id") == one.run_id)["task"].n_unique() == 7


def test_one_item_per_task_has_no_intervals_and_a_page(tmp_path):
    study = build_synthetic(tmp_path / "runs", [Truth("a"), Truth("b")], items=1, seed=3)
    result = analyze_study(study.store, study.view, draws=50)
    kept = [effect.kept for arm in result.targets[0].arms for effect in arm.retention if effect.kept]
    assert kept, "no share kept without an interval: does this test still test anything?"
    assert all(found.low is None for found in kept)
    build_report(study.store, study.view, tmp_path / "out", draws=50)
    assert "score above chance kept: 1.00 [no interval]" in (tmp_path / "out" / "index.html").read_text()


def test_the_share_kept_has_no_sign(full):
    shares = re.findall(r"above chance kept: ([^;]*);", (full[0] / "index.html").read_text())
    assert shares
    assert all(re.fullmatch(r"\N{MINUS SIGN}?\d\.\d\d \[.*\d\.\d\d\]", share) and "+" not in share for share in shares)


def test_the_speed_of_a_resumed_training_is_left_out_and_says_why(tmp_path):
    truths = [Truth("a", seeds=(0, 1), resumed=(0,)), Truth("b", seeds=(0,), resumed=(0,))]
    study = build_synthetic(tmp_path / "runs", truths, items=10)
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    first, second = (arm["costs"]["training_speed"] for arm in summary["targets"][0]["arms"])
    assert (first["value"], first["runs"]) == (2500, 1)
    assert (second["value"], second["how"]) == (None, "the training was interrupted")
    text = (tmp_path / "out" / "index.html").read_text()
    assert 'title="the training was interrupted"' in text
    main = text[text.index('<table class="main">') :].partition("</table>")[0]
    assert "training speed" in main
    assert "2.50 ktok/s" in main


def test_the_way_along_the_training_is_shown(tmp_path):
    truths = [
        Truth("a", gain=0.6, forget=-0.2, save_points=(50, 100)),
        Truth("b", gain=0.5, forget=-0.05, save_points=(50, 100)),
        Truth("plain"),
    ]
    study = build_synthetic(tmp_path / "runs", truths, items=40)
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Along the training" in text
    assert "<title>a, step 50: gain +" in text
    assert "1 of 3 arms have nothing to draw here" in text
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert (tmp_path / "out" / "figures" / "along-1.svg").exists()
    along = pl.read_csv(tmp_path / "out" / "tables" / "along.csv")
    mean = along.filter((pl.col("arm") == "a") & (pl.col("role") == "mean retention")).sort("step")
    assert mean["step"].to_list() == [50, 100, 200]
    assert mean["value"][2] == pytest.approx(summary["targets"][0]["arms"][0]["retention_mean"]["value"])
    assert [point["step"] for point in summary["targets"][0]["arms"][0]["along"]] == [50, 100, 200]
    assert summary["targets"][0]["arms"][2]["along"] == []


def test_without_save_points_nothing_is_said_about_them(full):
    assert "Along the training" not in (full[0] / "index.html").read_text()
    assert pl.read_csv(full[0] / "tables" / "along.csv").height == 0


def test_custom_tasks_are_called_what_their_cards_say(tmp_path):
    names = {"operator": "my sums", "facts": "my facts", "format": "my format"}
    study = build_synthetic(tmp_path / "runs", [Truth("a"), Truth("b")], items=10, names=names, corpus=False)
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    assert summary["targets"][0]["target"] == "my sums"
    assert {"my facts", "my format"} <= set(summary["targets"][0]["arms"][0]["retention"])
    tables = {name: pl.read_csv(tmp_path / "out" / "tables" / f"{name}.csv") for name in ("runs", "items", "effects")}
    assert {"my sums", "my facts", "my format"} <= set(tables["items"]["task"]) & set(tables["effects"]["task"])
    assert set(tables["runs"]["target"].drop_nulls()) == {"my sums"}


def test_a_notice_about_batch_sizes_is_on_the_page_and_is_no_failure(tmp_path):
    truths = [Truth("a", seeds=(0,)), Truth("b", seeds=(0,), batch_size=8)]
    study = build_synthetic(tmp_path / "runs", truths, items=10, dtype="bfloat16", corpus=False)
    build_report(study.store, study.view, tmp_path / "out", draws=50)
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Every planned run is trained and evaluated." in text
    assert "1 run was evaluated at another batch size than the base model: in bfloat16" in text
    assert "evaluated at batch size 8, the base model at 16" in text
    assert "(the records differ)" in text


def test_the_enlarged_panel_shows_every_arm_that_lies_in_its_box(tmp_path):
    truths = [Truth(f"a{place}", gain=0.5, forget=-0.04 * place) for place in range(8)]
    truths += [Truth("far", "full", gain=0.4, forget=-0.6)]
    made = build_synthetic(tmp_path, truths, items=60)
    figure = trade_figure(analyze_study(made.store, made.view, draws=50).targets[0], "tradeoff-1")
    whole, panel = figure.canvas.axes
    at = {line.get_gid()[-1]: (line.get_xdata()[0], line.get_ydata()[0]) for line in whole.lines if line.get_gid()}
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    inside = {place for place, (x, y) in at.items() if left <= x <= right and low <= y <= high}
    drawn = {line.get_gid()[-1] for line in panel.lines if line.get_gid()}
    assert drawn == inside
    assert 1 < len(inside) < len(truths)
