"""Claims are judged by Student's t test, from kept figures alone; RESULTS.md says what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call
from scipy import stats

import ablate
from extras import results, verdicts

AHEAD = verdicts.Claim("", "", verdicts.row(), verdicts.row())
SAME = AHEAD._replace(same=True)


@pytest.mark.parametrize("seed", range(20))
def test_a_difference_counts_where_scipys_t_test_has_p_below_5_percent(seed):
    rng = np.random.default_rng(seed)
    first, second = (list(rng.normal(mean, 1, 3)) for mean in (1.5, 0))
    found = stats.ttest_ind(first, second)
    seen = found.pvalue < 0.05
    expected = "holds" if found.statistic > 0 else "does not hold: the reverse"
    assert verdicts.judge(AHEAD, first, second) == (expected if seen else "does not show")
    assert verdicts.judge(SAME, first, second).startswith("does not hold" if seen else "holds")
    error = ablate.standard_error(first, second)
    assert (sum(first) - sum(second)) / 3 / error == pytest.approx(found.statistic)


def test_verdicts_of_kept_figures(tmp_path):
    def keep(name: str, *values: float) -> None:
        seeds = {
            str(seed): {**dict.fromkeys(ablate.FIGURES, mAP), "params": 1}
            for seed, mAP in enumerate(values)
        }
        (tmp_path / f"{name}.json").write_text(json.dumps({"looks": {"": seeds}}))

    keep("default", 0.65, 0.66, 0.64)
    keep("fusion-multistream", 0.55, 0.56, 0.54)
    keep("fusion-cls", 0.65)
    done = call(verdicts, tmp_path)
    assert done.returncode == 0, done.stderr
    line = "| GraFT is ahead of {} | Table {} | {} |"
    shown = "65.0 ± 1.0, 55.0 ± 1.0 | +10.0 ± 0.8 |"
    assert f"{line.format('Multi-Stream ViT', 1, 'holds')} {shown}" in done.stdout
    assert f"{line.format('HAMNet', 1, '-')} 65.0 ± 1.0, - | - |" in done.stdout
    assert "a new CLS token | Table 5 | - | 65.0 ± 1.0, 65.0 | - |" in done.stdout
    done = call(verdicts, tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere: no such folder" in done.stderr


def test_every_claim_is_of_rows_that_the_tables_train():
    args = ablate.argparse.Namespace(out=Path(), weights={}, from_=None, keep=None)

    def look(row: ablate.Row) -> tuple:
        return ablate.kept_file(row, [], args), row.test, row.prune, row.target

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
    file.write_text("<!-- 99 -->\n<!-- end -->")
    done = call(results, tmp_path, file)
    assert done.returncode == 2 and "<!-- 99 -->: no such table; expected" in done.stderr
