"""Claims are judged by Student's t test from kept figures; documents hold what these say."""

import json
import re

import pytest
from conftest import ROOT, fails, succeeds

from experiments import ablate, results, verdicts
from experiments.ablate import Experiment
from experiments.tables import FFF, TABLES, Row
from experiments.verdicts import judge

AHEAD = verdicts.Claim("", "", "", "")
SAME = AHEAD._replace(same=True)
KEPT = ROOT / "results"


def test_a_difference_counts_from_278_standard_errors_on():
    """Three runs a side, four degrees of freedom: Student's t at 97.5% is 2.776."""
    second = [60.0, 61.5, 58.2]
    error = ablate.standard_error(second, second)
    for errors, verdict in (
        (2.7, "does not show"),
        (2.8, "holds"),
        (-2.7, "does not show"),
        (-2.8, "the reverse holds"),
    ):
        found = judge(AHEAD, [value + errors * error for value in second], second)
        assert found.text == verdict
        assert (found.p < 0.05) == (abs(errors) > 2.776)
        assert (found.difference, found.error) == pytest.approx((errors * error, error))
    assert judge(AHEAD, second[:1], second).text == "-"


def test_welchs_test_is_heard_where_the_spreads_differ():
    found = judge(AHEAD, [66.0, 65.9, 66.1], [58.0, 53.4, 62.6])
    assert found.text == "holds (by Welch's test: does not show)"
    assert found.p < 0.05


def test_as_good_needs_the_whole_interval_within_two_points():
    close, far = [60.0, 60.1, 60.2], [50.0, 50.1, 50.2]
    noisy = [58.0, 60.1, 62.2]  # of the same mean: no evidence that it is as good
    for first, verdict in ((close, "holds"), (noisy, "does not show"), (far, "does not hold")):
        found = judge(SAME, first, close)
        assert found.text == verdict
        assert (found.p < 0.025) == (verdict == "holds")


def test_pairs_of_one_model_and_claims_of_ten_points():
    dense, pruned = [60.0, 62.0, 64.0], [59.0, 61.1, 62.9]
    assert judge(AHEAD, dense, pruned).text == "does not show"
    found = judge(AHEAD, dense, pruned, paired=True)
    assert found.text == "holds"
    assert (found.difference, found.error) == pytest.approx((1, 0.1 / 3**0.5))  # 1, 0.9, 1.1
    collapse = AHEAD._replace(by=10.0)
    assert judge(collapse, dense, pruned, paired=True).text == "does not show"
    assert judge(collapse, dense, [v - 30 for v in dense]).text == "holds"


def keep(folder, name: str, *mAPs: float, machine: str = "", **settings) -> None:
    runs = [{**dict.fromkeys(ablate.FIGURES, mAP), "params": 1, "machine": machine} for mAP in mAPs]
    looks = {"": {str(seed): run for seed, run in enumerate(runs)}}
    folder.mkdir(exist_ok=True)
    content = {"settings": settings, "looks": looks}
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_verdicts_of_kept_figures(tmp_path):
    keep(tmp_path, "default", 0.65, 0.66, 0.64)
    keep(tmp_path, "fusion-multistream", 0.55, 0.56, 0.54)
    keep(tmp_path, "alpha-0", 0.45, 0.46, 0.44)
    stdout = succeeds(verdicts, tmp_path)
    shown = "| holds | 65.0 ± 1.0, 55.0 ± 1.0 | +10.0 ± 0.8 | < 0.001 | model, triplet loss |"
    assert f"| GraFT (FFD) is ahead of Multi-Stream ViT (FFF) | Table 1 {shown}" in stdout
    assert "HAMNet | Table 1 | - | 65.0 ± 1.0, - | - | - | model, recipe |" in stdout
    # Whatever the figures: only the triplet loss differs, and it does nothing
    shown = "| by construction | 65.0 ± 1.0, 45.0 ± 1.0 | - | - | triplet loss |"
    assert f"| FFD is ahead because of its triplet term | 4.3 {shown}" in stdout
    assert "nowhere: no such folder" in fails(verdicts, tmp_path / "nowhere")
    # Of another draw of vehicles, only what was judged
    keep(tmp_path, "data-root-second", 0.65, 0.66, 0.64)
    keep(tmp_path, "data-root-second-frozen-yes-yes", 0.45, 0.46, 0.44)
    stdout = succeeds(verdicts, tmp_path, "--data-root", "second")
    text = "frozen, then unfrozen is ahead of frozen in both stages"
    assert f"| {text} | 4.1 | holds |" in stdout
    assert "HAMNet" not in stdout


def test_claims_are_listed_across_the_settings_that_have_figures(tmp_path):
    keep(tmp_path, "triplet-FFF", 0.65, 0.66, 0.64)
    keep(tmp_path, "fusion-cls", 0.55, 0.56, 0.54)
    real = Experiment(Row("", FFF), verdicts.SETTINGS["rendered vehicles, DINOv2-S"].split())
    keep(tmp_path, real.name, 0.7)
    assert verdicts.across(tmp_path) == [["claim", *verdicts.SETTINGS]]
    keep(tmp_path, real.name.replace("triplet-FFF", "fusion-cls"), 0.5)
    text = "65.0 ± 1.0 and 55.0 ± 1.0: holds"
    row = ["GraFT is ahead of a new CLS token, both by FFF", text, "70.0 and 50.0", "-"]
    assert verdicts.across(tmp_path)[1:] == [row]


def test_every_claim_is_of_rows_that_the_tables_train():
    rows = [Experiment(row, []) for table in TABLES.values() for row in table.rows]
    trained = {(row.name, row.look) for row in rows if not row.left_out}
    for claim in verdicts.CLAIMS:
        sides = verdicts.sides(claim, [])
        assert {(side.name, side.look) for side in sides} <= trained, claim.text


@pytest.mark.parametrize("name", ["results/TABLES.md", "RESULTS.md"])
def test_the_documents_tables_are_those_of_the_kept_figures(name):
    document = (ROOT / name).read_text()
    assert results.filled(document, KEPT) == document
    missing = [key for key in TABLES if f"<!-- {key} " not in document]
    assert not missing or name == "RESULTS.md"


def test_the_effects_of_departures_are_those_of_their_rows_of_the_table_of_choices():
    rows = (KEPT / "TABLES.md").read_text().partition("<!-- choices -->")[2].splitlines()
    text = " ".join((ROOT / "DEPARTURES.md").read_text().split())
    checked = 0
    for entry in text.split("**D")[1:]:
        own = [row for row in rows if row.startswith(f"| D{entry.partition('.')[0]}: ")]
        for effect in re.findall(r"[\d.]+ ± \d+\.\d", entry):
            assert any(effect in row for row in own), (effect, own)
            checked += 1
    assert checked == text.count("±")


def test_blocks_of_documents_are_filled_and_filled_again(tmp_path):
    runs = [{"mAP": m, "R1": 1.0, "R5": 1.0, "R10": 1.0, "mINP": 0.5} for m in (0.5, 0.6)]
    (tmp_path / "ranks.json").write_text(json.dumps({"two ranks": runs}))
    document, end = tmp_path / "a.md", "\n<!-- end -->\n"
    document.write_text(f"<!-- runs ranks -->\nold{end}<!-- machines cpu -->{end}")
    keep(tmp_path, "default", 0.6, 0.6, machine="a GPU")
    keep(tmp_path / "cpu", "default", 0.5, 0.5, machine="a CPU", beta=0)
    keep(tmp_path / "cpu", "other", 0.5)  # the other machine's alone
    for _ in range(2):
        assert "a.md: 2 blocks" in succeeds(results, tmp_path, document)
    text = document.read_text()
    assert "old" not in text
    assert "| two ranks | 2 | 55.0 ± 7.1 | 100.0 ± 0.0 |" in text  # that of 50 and 60 is 7.07
    assert "| default | 2, 2 | 50.0 ± 0.0 | 60.0 ± 0.0 | +10.0 ± 0.0 |" in text
    keep(tmp_path, "default", 0.6, beta=1)
    assert "its figures are of beta 1, not 0" in fails(results, tmp_path, document)
    document.write_text("<!-- 99 -->\n<!-- end -->")
    assert "<!-- 99 -->: no such table; expected" in fails(results, tmp_path, document)
