"""The table of sensors that ask and sensors that answer: its diagonal is evaluate.py's subsets."""

from conftest import fails, read_json, succeeds

import evaluate
from extras import pairs


def test_the_diagonal_is_what_evaluate_gives_for_the_subset(trained, tmp_path):
    two = ("--modalities", "rgb,tir", "--json")
    printed = succeeds(pairs, trained, *two, tmp_path / "pairs.json")
    succeeds(evaluate, trained, "--all-subsets", *two, tmp_path / "subsets.json")
    found, subsets = read_json(tmp_path / "pairs.json"), read_json(tmp_path / "subsets.json")
    assert len(found) == 9
    for subset, expected in subsets.items():
        del expected["queries"]
        assert found[f"{subset} > {subset}"] == expected
    across = found["tir > rgb,tir"]
    assert across["mAP"] != subsets["rgb,tir"]["mAP"]
    lines = printed.splitlines()
    assert "| query, gallery: | rgb | tir | rgb,tir |" in lines
    (row,) = [line for line in lines if line.startswith("| tir |")]
    assert row.endswith(f"| {100 * across['mAP']:.1f} / {100 * across['R1']:.1f} |")
    sides = ("--query-modalities", "tir", "--gallery-modalities", "tir,rgb")
    succeeds(pairs, trained, *sides, "--json", tmp_path / "one.json")
    assert read_json(tmp_path / "one.json") == {"tir > rgb,tir": across}


def test_mistakes_give_one_line(trained, tmp_path):
    assert "no modality uv" in fails(pairs, trained, "--query-modalities", "uv")
    assert "expected a file in" in fails(pairs, trained, "--json", tmp_path / "no" / "x.json")


def test_older_results_are_printed():
    both = {"mAP": 0.5, "R1": 0.25}
    text = pairs.table({"rgb": both, "rgb > tir": both, "tir > rgb": both, "tir": both})
    assert text.splitlines()[2] == "| rgb | 50.0 / 25.0 | 50.0 / 25.0 |"
