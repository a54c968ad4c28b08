"""The report's section on PSCP."""

import json
import re
from types import SimpleNamespace

import polars as pl
import pytest

from peft_arena.analyze.pscp import published_pscp
from peft_arena.analyze.study import analyze_study
from peft_arena.cost.pscp import Operations, PscpChoice
from peft_arena.cost.pscp_band import Band
from peft_arena.report.build import build_report
from peft_arena.report.pscp import pscp_sentences, published_pscp_table
from peft_arena.store.published import find_tables
from tests.analyze.synthetic import Truth, build_synthetic
from tests.analyze.synthetic_pscp import TOTAL, with_flops
from tests.analyze.test_pscp import CONSTANTS, EXTRA
from tests.report.test_report import Page


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    truths = [
        Truth("big", gain=0.75, parameters=30_000, memory=2e9, seeds=(0, 1)),
        Truth("small", gain=0.6, parameters=1_000, memory=1e9, seeds=(0, 1)),
        Truth("poor", gain=0.1, parameters=40_000, memory=2.5e9, seeds=(0, 1)),
        Truth("uncounted", gain=0.9, seeds=(0, 1)),
    ]
    plain = build_synthetic(tmp_path_factory.mktemp("pscp"), truths, items=40, corpus=False)
    made = with_flops(plain, EXTRA, PscpChoice(constants=CONSTANTS))
    found = tmp_path_factory.mktemp("report")
    build_report(made.store, made.view, found, draws=200)
    return found


def test_the_section_says_what_depends_on_the_constants(out):
    page = Page((out / "index.html").read_text())
    assert page.open == [] and "pscp-1" in page.ids
    said = "".join(page.text)
    assert (
        "here with C = 50 k parameters, 1 GFLOPs and 4 GB, and exponents 1, 1 and 1." in said
        and "each C times 0.25, 0.5, 1, 2 and 4" in said
    )
    assert "2 of 3 pairs are ordered robustly" in said and "the order depends on the constants: big and small." in said
    assert "P (1 + Mp/Cp)−βp (1 + Mf/Cf)−βf (1 + Mm/Cm)−βm, with" in said
    assert "small has the highest PSCP" in said and "its rank depends on the constants: 1–2 of 3" in said
    assert "No PSCP: uncounted" in said and "not counted: no kernel" in said
    assert "memory of the process and not of an accelerator: measured, peak resident set" in said
    assert (out / "figures" / "pscp-1.png").exists() and "3375 choices" in said


def test_csv_and_summary_have_both_definitions(out):
    frame = pl.read_csv(out / "tables" / "pscp.csv")
    assert frame.height == 4 * 2
    small = frame.filter((pl.col("arm") == "small") & (pl.col("operations") == "extra"))
    assert small["flops"][0] == EXTRA["small"] and small["rank_last"][0] == 2 and small["chosen"][0]
    total = frame.filter((pl.col("arm") == "small") & (pl.col("operations") == "total"))
    assert total["flops"][0] == TOTAL + EXTRA["small"] and total["score"][0] < small["score"][0]
    lacking = frame.filter(pl.col("arm") == "uncounted")
    assert lacking["score"].null_count() == lacking["rank"].null_count() == 2 and lacking["missing"].null_count() == 0
    assert pl.read_csv(out / "tables" / "pscp_pairs.csv")["order"].to_list() == ["depends", "robust", "robust"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["targets"][0]["pscp"]["grid_points"] == 3375


def test_no_score_at_all_leaves_the_reasons(tmp_path):
    plain = build_synthetic(tmp_path / "runs", [Truth("a", seeds=(0,))], items=10, corpus=False)
    made = with_flops(plain, {"a": None}, PscpChoice(operations=Operations.TOTAL))
    build_report(made.store, made.view, tmp_path / "out", draws=50)
    said = "".join(Page((tmp_path / "out" / "index.html").read_text()).text)
    assert "No PSCP: a; the table says what is missing." in said
    assert not (tmp_path / "out" / "figures" / "pscp-1.png").exists()


def test_published_inputs_are_scored_apart():
    (table,) = find_tables("peft-bench/pscp-llama-3-8b")
    said = published_pscp_table(published_pscp(table, PscpChoice()))
    assert "Imported, single runs" in said and "LoRA and LNTuning" in said and "60.19" in said
    assert "no row is comparable with this study" in said


def test_a_first_that_is_not_apart_is_said_to_be_so(tmp_path):
    truths = [Truth("one", seeds=(0,)), Truth("two", seeds=(0,)), Truth("poor", gain=0.05, seeds=(0,))]
    plain = build_synthetic(tmp_path, truths, items=60, corpus=False)
    made = with_flops(plain, dict.fromkeys(("one", "two", "poor"), 0.0), PscpChoice())
    first, *_ = pscp_sentences(analyze_study(made.store, made.view, draws=200).targets[0].pscp)
    other = "two" if first.startswith("This run of one") else "one"
    pattern = f" Undecided against it at the study's constants: {other}; a difference of \\d+\\.\\d would be found\\.$"
    assert re.search(pattern, first)
    assert "; it is first at all 3375 choices of the constants. " in first  # equal costs: the grid says so, no more


def test_equal_scores_have_no_first():
    band = Band("a", 0.0, 0.0, 0.0, 1, 1, 1)
    arms = [SimpleNamespace(label=label) for label in "ab"]
    found = SimpleNamespace(
        ranked=[(arm, band, None) for arm in arms], arms=arms, pairs=(), points=9, unit="%", of=lambda order: []
    )
    assert pscp_sentences(found)[0] == "a and b share the highest PSCP, 0.0 %."
