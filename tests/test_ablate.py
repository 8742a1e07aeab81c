"""The tables as commands: every row trains, finished rows are kept, the figures are those of the runs."""

import json
from functools import partial
from statistics import mean, stdev

import pytest
from conftest import run, torchrun

import ablate
import train

QUICK = [
    "--epochs",
    1,
    0,
    "--epoch-steps",
    1,
    0,
    "--batch-size",
    8,
    "--image-size",
    32,
    64,
    "--backbone-weights",
    "none",
    "--precision",
    "fp32",
]


def table(*arguments, launch=run) -> list[list[str]]:
    """Cells of the table that ablate.py prints last."""
    done = launch("ablate.py", *arguments)
    assert done.returncode == 0, done.stderr
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("key", ablate.TABLES)
def test_every_row_is_a_command_of_train(key, tmp_path):
    rows = [row for row in ablate.TABLES[key].rows if row.flags is not None]
    outs = [train.parse(ablate.command(row, [], 0, tmp_path)).out for row in rows]
    assert len(set(zip(outs, [row.subset for row in rows], strict=True))) == len(rows)  # no row twice
    assert all(len(row.paper) in (0, 4) for row in ablate.TABLES[key].rows)


def test_dry_run_prints_the_commands_alone(tmp_path):
    done = run("ablate.py", "--table", 8, "--seeds", 2, "--dry-run", "--out", tmp_path / "out", "--lr", "1e-4", "1e-5")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 18 and not (tmp_path / "out").exists()
    assert all(line.startswith("python train.py --lr 1e-4 1e-5 ") for line in done.stdout.splitlines())


def test_table_5_end_to_end_and_what_is_done_is_kept(tiny_data, tmp_path):
    arguments = ["--table", 5, "--seeds", 2, "--out", tmp_path, "--data-root", tiny_data, *QUICK]
    first = table(*arguments)
    assert [row[0] for row in first[2:]] == [row.label for row in ablate.TABLES["5"].rows]
    folders = sorted(tmp_path.glob("*/[01]"))
    assert len(folders) == 16
    graft = [folder for folder in folders if folder.parent.name.endswith("fp32")]
    values = [100 * json.loads((folder / "metrics.json").read_text())["mAP"] for folder in graft]
    assert first[-1][2] == f"{mean(values):.1f} ± {stdev(values):.1f}" and first[-1][6] == "76.4 / 94.0 / 94.4 / 94.6"
    graft[1].joinpath("metrics.json").unlink()  # as if interrupted before the test
    before = {folder: (folder / "last.pt").stat().st_mtime_ns for folder in folders}
    assert table(*arguments) == first
    assert before == {folder: (folder / "last.pt").stat().st_mtime_ns for folder in folders}  # nothing trained again


def test_one_model_on_every_subset_by_two_processes(tiny_data, tmp_path):
    arguments = ["--table", "missing", "--seeds", 1, "--out", tmp_path, "--data-root", tiny_data, *QUICK]
    lines = table(*arguments, launch=partial(torchrun, 2))
    assert len(lines) == 2 + 14 and len(list(tmp_path.glob("*/0/metrics-*.json"))) == 14
    for folder in tmp_path.glob("*/0"):
        assert (folder / "metrics-rgb,nir,tir.json").read_text() == (folder / "metrics.json").read_text()
