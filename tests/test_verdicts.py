"""Claims are judged by Student's t test, from kept figures alone; RESULTS.md says what they say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call

import ablate
from extras import results, verdicts

AHEAD = verdicts.Claim("", "", verdicts.row(), verdicts.row())
SAME = AHEAD._replace(same=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_difference_counts_from_278_standard_errors_on(seed):
    """Three runs a side, four degrees of freedom: Student's t at 97.5% is 2.776."""
    rng = np.random.default_rng(seed)
    second = list(rng.normal(60, 1, 3))
    error = ablate.standard_error(second, second)
    for errors, verdict in (
        (2.7, "does not show"),
        (2.8, "holds"),
        (-2.7, "does not show"),
        (-2.8, "the reverse holds"),
    ):
        first = [value + errors * error for value in second]
        found, (difference, found_error), p = verdicts.judge(AHEAD, first, second)
        assert found == verdict and (p < 0.05) == (abs(errors) > 2.776)
        assert (difference, found_error) == pytest.approx((errors * error, error))
    assert verdicts.judge(AHEAD, second[:1], second) == ("-", None, None)


def test_welchs_test_is_heard_where_the_spreads_differ():
    narrow, wide = [66.0, 65.9, 66.1], [58.0, 53.4, 62.6]
    verdict, _, p = verdicts.judge(AHEAD, narrow, wide)
    assert verdict == "holds (by Welch's test: does not show)" and p < 0.05


def test_as_good_needs_the_whole_interval_within_two_points():
    close, far = [60.0, 60.1, 60.2], [50.0, 50.1, 50.2]
    noisy = [58.0, 60.1, 62.2]  # of the same mean: no evidence that it is as good
    for first, verdict in ((close, "holds"), (noisy, "does not show"), (far, "does not hold")):
        found, _, p = verdicts.judge(SAME, first, close)
        assert found == verdict and (p < 0.025) == (verdict == "holds")


def test_pairs_of_one_model_and_claims_of_ten_points():
    dense, pruned = [60.0, 62.0, 64.0], [59.0, 61.1, 62.9]
    assert verdicts.judge(AHEAD, dense, pruned)[0] == "does not show"
    verdict, (difference, error), p = verdicts.judge(AHEAD, dense, pruned, paired=True)
    assert verdict == "holds" and difference == pytest.approx(1) and p < 0.01
    assert error == pytest.approx(0.1 / 3**0.5)  # differences 1, 0.9, 1.1
    collapse = AHEAD._replace(by=10.0)
    assert verdicts.judge(collapse, dense, pruned, paired=True)[0] == "does not show"
    assert verdicts.judge(collapse, dense, [v - 30 for v in dense])[0] == "holds"


def test_verdicts_of_kept_figures(tmp_path):
    def keep(name: str, *values: float) -> None:
        seeds = {
            str(seed): {**dict.fromkeys(ablate.FIGURES, mAP), "params": 1}
            for seed, mAP in enumerate(values)
        }
        content = {"settings": {}, "looks": {"": seeds}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    keep("default", 0.65, 0.66, 0.64)
    keep("fusion-multistream", 0.55, 0.56, 0.54)
    keep("fusion-cls", 0.65)
    done = call(verdicts, tmp_path)
    assert done.returncode == 0, done.stderr
    line = "| GraFT is ahead of {} | Table {} | {} |"
    shown = "65.0 ± 1.0, 55.0 ± 1.0 | +10.0 ± 0.8 | < 0.001 |"
    assert f"{line.format('Multi-Stream ViT', 1, 'holds')} {shown}" in done.stdout
    assert f"{line.format('HAMNet', 1, '-')} 65.0 ± 1.0, - | - | - |" in done.stdout
    assert "a new CLS token | Table 5 | - | 65.0 ± 1.0, 65.0 | - | - |" in done.stdout
    done = call(verdicts, tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere: no such folder" in done.stderr
    # Of another draw only what was judged, and a sentence that goes on begins anew
    keep("data-root-second", 0.65, 0.66, 0.64)
    keep("data-root-second-frozen-yes-yes", 0.45, 0.46, 0.44)
    done = call(verdicts, tmp_path, "--data-root", "second")
    (line,) = done.stdout.splitlines()[2:]
    text = "frozen, then unfrozen is ahead of unfrozen ... and of frozen throughout"
    assert line.startswith(f"| {text} | 4.1 | holds |")


def test_every_claim_is_of_rows_that_the_tables_train():
    args = ablate.argparse.Namespace(out=Path(), weights={}, from_=None, keep=None)

    def look(row: ablate.Row) -> tuple:
        return ablate.folder(row, [], args), row.test, row.prune, row.target

    rows = [row for key in ablate.TABLES if key != "backbone" for row in ablate.TABLES[key].rows]
    trained = {look(row) for row in rows if row.flags is not None}
    for claim in verdicts.CLAIMS:
        assert {look(claim.first), look(claim.second)} <= trained, claim.text


def test_the_documents_tables_are_those_of_the_kept_figures():
    document = (ROOT / "RESULTS.md").read_text()
    assert results.filled(document, ROOT / "results") == document
    done = call(ablate, "--table", "all", "--from", ROOT / "results")
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert done.returncode == 0 and len(lines) > 20
    assert not [line for line in lines if line not in document]


def test_two_draws_of_vehicles_agree_as_the_document_says():
    """In all claims that both were judged by, but one; Welch's test aside."""
    kept, differ, count = ROOT / "results", [], 0
    args = ablate.argparse.Namespace(from_=kept, keep=None, out=kept, weights={})
    for claim in verdicts.CLAIMS:
        found = []
        for common in ([], ["--data-root", "second"]):
            rows = (claim.first, claim.second)
            sides = [[ablate.figures(row, s, common, args) for s in range(3)] for row in rows]
            if all(map(all, sides)):
                sides = [[100 * run[claim.metric] for run in runs] for runs in sides]
                paired = len({ablate.folder(row, common, args) for row in rows}) == 1
                found.append(verdicts.judge(claim, *sides, paired)[0].split(" (")[0])
        count += len(found) == 2
        differ += [claim.text] if len(set(found)) == 2 else []
    assert count >= 20 and differ == ["0.39 of the backbone's weights are as good as all"]


def test_what_the_readme_found_is_in_the_results():
    """Figures with a decimal of its section of findings; those of the model and paper are not."""
    found = (ROOT / "README.md").read_text().split("## What we found")[1].split("\n## ")[0]
    document = (ROOT / "RESULTS.md").read_text()
    assert not [figure for figure in re.findall(r"\d+\.\d+", found) if figure not in document]


def test_blocks_of_a_document_are_filled_and_filled_again(tmp_path):
    runs = [{"mAP": m, "R1": 1.0, "R5": 1.0, "R10": 1.0, "mINP": 0.5} for m in (0.5, 0.6)]
    (tmp_path / "ranks.json").write_text(json.dumps({"two ranks": runs}))
    (tmp_path / "record.json").write_text('[{"recipe": "plus", "mAP": 75}]')
    file = tmp_path / "document.md"
    file.write_text(
        "a\n<!-- runs ranks -->\nold\n<!-- end -->\nb\n<!-- rows record -->\n<!-- end -->"
    )
    for _ in range(2):
        done = call(results, tmp_path, file)
        assert done.returncode == 0 and "2 blocks" in done.stdout, done.stderr
    text = file.read_text()
    assert "old" not in text and "| plus | 75 |" in text and text.startswith("a\n")
    # the standard deviation of 50 and 60 is 7.07
    assert "| two ranks | 2 | 55.0 ± 7.1 | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 |" in text
    for folder, mAP, machine in ((tmp_path, 0.6, "a GPU"), (tmp_path / "cpu", 0.5, "a CPU")):
        folder.mkdir(exist_ok=True)
        run = {**dict.fromkeys(ablate.FIGURES, mAP), "params": 1, "machine": machine}
        content = {"settings": {}, "looks": {"": {"0": run, "1": run}}}
        (folder / "default.json").write_text(json.dumps(content))
    (tmp_path / "cpu" / "other.json").write_text("{}")  # the other machine's alone
    file.write_text("<!-- machines cpu -->\n<!-- end -->")
    assert call(results, tmp_path, file).returncode == 0
    assert "| default | 2, 2 | 50.0 ± 0.0 | 60.0 ± 0.0 | +10.0 ± 0.0 |" in file.read_text()
    (tmp_path / "default.json").write_text('{"settings": {"seed": 1}, "looks": {}}')
    done = call(results, tmp_path, file)
    assert done.returncode == 2 and "are of other settings" in done.stderr
    file.write_text("<!-- 99 -->\n<!-- end -->")
    done = call(results, tmp_path, file)
    assert done.returncode == 2 and "<!-- 99 -->: no such table; expected" in done.stderr
