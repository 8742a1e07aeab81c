"""The tables as commands.

Every row trains, finished rows are kept, and the figures are those of the runs.
"""

import json
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import call, torchrun

import ablate
import train
from model import BACKBONES

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


def here(*arguments):
    return call(ablate, *arguments)


def table(*arguments, launch=here) -> list[list[str]]:
    """Cells of the table that ablate.py prints last."""
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("|")
    ]


@pytest.mark.parametrize("key", ablate.TABLES)
def test_every_row_is_a_command_of_train(key, tmp_path):
    rows = [row for row in ablate.TABLES[key].rows if row.flags is not None]
    args = Namespace(out=tmp_path, weights=dict.fromkeys(BACKBONES, "vit.pth"))
    outs = [train.parse(ablate.command(row, [], 0, args)).out for row in rows]
    assert len(
        set(zip(outs, [(row.test, row.prune, row.target) for row in rows], strict=True))
    ) == len(rows)  # no row twice
    assert all(len(row.paper) in (0, 4) for row in ablate.TABLES[key].rows)


def test_hamnets_row_is_left_its_own_backbone(tmp_path):
    args = Namespace(out=tmp_path, weights={})
    common = ["--lr", "1e-3", "1e-4", "--backbone-weights", "vit.pth", "--batch-size", "13"]
    row, graft = ablate.Row("HAMNet", "--fusion hamnet"), ablate.Row("GraFT", "")
    assert ablate.command(row, common, 0, args)[:5] == [*common[:3], "--fusion", "hamnet"]
    assert ablate.command(graft, common, 0, args)[:7] == common


def test_dry_run_prints_the_commands_alone(tmp_path):
    done = call(
        ablate,
        "--table",
        8,
        "--seeds",
        2,
        "--dry-run",
        "--out",
        tmp_path / "out",
        "--lr",
        "1e-4",
        "1e-5",
    )
    assert (
        done.returncode == 0
        and len(done.stdout.splitlines()) == 2 * (25 + 8)
        and not (tmp_path / "out").exists()
    )
    lines = done.stdout.splitlines()
    assert sum(line.startswith("python train.py --lr 1e-4 1e-5 ") for line in lines) == 50
    assert sum(line.endswith("last.pt --test-token data") for line in lines) == 16


def test_table_7_end_to_end_and_what_is_done_is_kept(tiny_data, tmp_path):
    arguments = ["--table", 7, "--seeds", 2, "--out", tmp_path, "--data-root", tiny_data, *QUICK]
    first = table(*arguments)
    assert [row[0] for row in first[2:]] == [row.label for row in ablate.TABLES["7"].rows]
    folders = sorted(tmp_path.glob("*/[01]"))
    assert len(folders) == 6
    graft = [folder for folder in folders if folder.parent.name.endswith("rgb,nir")]
    values = [100 * json.loads((folder / "metrics.json").read_text())["mAP"] for folder in graft]
    assert (
        first[-1][2] == f"{mean(values):.1f} ± {stdev(values):.1f}"
        and first[-1][6] == "75.1 / 91.4 / 92.3 / 92.9"
    )
    graft[1].joinpath("metrics.json").unlink()  # as if interrupted before the test
    before = {folder: (folder / "last.pt").stat().st_mtime_ns for folder in folders}
    assert table(*arguments) == first
    assert before == {
        folder: (folder / "last.pt").stat().st_mtime_ns for folder in folders
    }  # nothing trained again
    # The figures alone make the table again; what they hold is not trained again
    for folder in folders:
        shutil.rmtree(folder)
    words = list(map(str, QUICK))
    assert table("--table", 7, "--data-root", tiny_data, "--from", tmp_path, *words) == first
    assert table(*arguments) == first and not any(map(Path.exists, folders))
    kept = next(tmp_path.glob("*nir.json"))
    kept.write_text('{"looks": {"": {"0": {"mAP": 1}}}}')
    done = call(ablate, "--table", 7, "--from", tmp_path, "--data-root", tiny_data, *words)
    assert done.returncode == 2 and f"{kept}: not a file of ablate.py's figures" in done.stderr
    done = call(ablate, "--table", 7, "--from", tmp_path)
    assert done.returncode == 2 and "holds no figures of these tables and options" in done.stderr


def test_differences_to_the_first_row_with_their_standard_error():
    base = [{"mAP": m} for m in (0.60, 0.62, 0.64)]
    ours = [{"mAP": m} for m in (0.65, 0.65, 0.68)]
    # variances 4 and 3 square points: sqrt(3.5 * 2 / 3) = 1.53
    assert ablate.against(ours, base) == "+4.0 ± 1.5"
    assert ablate.against(base, base) == ablate.against(ours[:1], base) == "-"


def test_a_table_names_its_machine_and_the_rows_of_another():
    def runs(machine: str, *values: float) -> list[dict]:
        return [
            {**dict.fromkeys(ablate.FIGURES, mAP), "params": 1e6, "machine": machine}
            for mAP in values
        ]

    table = ablate.Table("Index", (), deviation=0.07)
    measured = [
        (ablate.Row("0", ""), runs("a GPU", 0.1, 0.2)),
        (ablate.Row("5", ""), runs("a GPU", 0.60, 0.60)),
        (ablate.Row("10", ""), runs("a CPU", 0.62, 0.60)),
    ]
    text = ablate.text_of(table, measured)
    assert text.startswith("Index; 2 seeds, mean ± standard deviation; a GPU\n")
    assert "| 10 (on a CPU) |" in text and "| 5 |" in text
    # Of 60 and 62 it is 1.414, of 60 and 60 nothing
    assert text.endswith("mean of the seeds: 0.71 points (the paper: 0.07)")


def test_one_model_on_every_subset_by_two_processes(tiny_data, tmp_path):
    arguments = [
        "--table",
        "missing",
        "--seeds",
        1,
        "--out",
        tmp_path,
        "--data-root",
        tiny_data,
        *QUICK,
    ]
    lines = table(*arguments, launch=partial(torchrun, 2, "ablate.py"))
    assert len(lines) == 2 + 28 and len(list(tmp_path.glob("*/0/metrics-*.json"))) == 28
    for folder in tmp_path.glob("*/0"):
        assert (folder / "metrics-modalities-rgb,nir,tir.json").read_text() == (
            folder / "metrics.json"
        ).read_text()


def test_pruning_tables_and_the_size_chart(tiny_data, tmp_path, monkeypatch):
    """A row of each target of one run of prune.py; what is done is kept."""
    rows = ablate.pruned(
        {"0.8": ((76.4, 94.0, 94.4, 94.6), 76), "0.5": ()}, "", "--rounds 1 --epoch-steps 1"
    )
    monkeypatch.setitem(
        ablate.TABLES, "3", ablate.Table("Table 3", (*ablate.COMPETITORS_100[2:3], *rows))
    )
    arguments = ["--table", 3, "--seeds", 1, "--out", tmp_path, "--data-root", tiny_data, *QUICK]
    done = call(ablate, *arguments, "--chart", tmp_path / "size.png")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")][-3:]
    assert (
        lines[0].endswith("| 130 M: 74.4 / 93.4 / 94.5 / 95.0 |")
        and "76 M: 76.4 / 94.0" in lines[1]
    )
    assert "| 3.33 M |" in lines[1] and "| 2.53 M |" in lines[2]
    assert (tmp_path / "size.png").stat().st_size > 1000
    again = call(ablate, *arguments)
    assert again.returncode == 0 and "stage 3" not in again.stdout and lines[2] in again.stdout


def test_the_backbone_table_has_the_rows_whose_weights_are_named(tmp_path):
    command = ["--table", "backbone", "--dry-run", "--seeds", 1]
    file = tmp_path / "vit.pth"
    for weights, message in [
        ([], "--table backbone: needs --weights NAME=FILE"),
        (["--weights", f"augreg-b16={file}"], "vit.pth: no such file"),
        (["--weights", f"vit={file}"], "expected NAME=FILE, NAME one of deit-b, small, clip-b16"),
    ]:
        done = call(ablate, *command, *weights)
        assert done.returncode == 2 and message in done.stderr
        assert done.stderr.count("\n") == 1
    file.touch()
    done = call(ablate, *command, "--weights", f"augreg-b16={file}", f"dinov2-b14={file}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("python train.py")]
    assert [line.split("--backbone ")[1].split()[:3] for line in lines] == [
        ["deit-b", "--backbone-weights", "deit"],
        ["dinov2-b14", "--backbone-weights", str(file)],
        ["augreg-b16", "--backbone-weights", str(file)],
    ]
