"""The tables as commands: each row changes what it names, runs once, and has its run's figures."""

import json
import re
import shutil
from statistics import mean, stdev

import pytest
from conftest import ROOT, call, fails, read_json, succeeds

import data
import evaluate
import options
import prune
import train
from experiments import ablate, reach, tables
from experiments.ablate import Experiment
from experiments.tables import TABLES, Row, Table

TINY = "--batch-size 8 --image-size 32 64 --backbone-weights none --precision fp32 --device cpu"
QUICK = f"--epochs 1 0 --epoch-steps 1 0 {TINY}".split()


def of_table(key: str, label: str, *common: str) -> Experiment:
    row = next(row for row in TABLES[key].rows if row.label == label)
    return Experiment(row, list(common))


# --- what a row changes


@pytest.mark.parametrize("dataset", data.DATASETS)
def test_each_row_is_another_model_or_look_or_says_why_not_on_every_data_set(dataset, monkeypatch):
    monkeypatch.setattr(tables, "num_samples", lambda *_: 3200)
    lacking = r"cited|for --backbone small|no (rgb|nir|tir)( or \w+)* here|--recipe own: .*|"
    for row in [row for table in TABLES.values() for row in table.rows]:
        shown = Experiment(row, ["--dataset", dataset])
        assert re.fullmatch(lacking, shown.left_out), (row.label, shown.left_out)
        same = shown.note.startswith("equal to ") or shown.words == shown.base
        assert shown.left_out or shown.changes or same, row.label
        assert shown.changes <= {*tables.WAYS, "recipe"}, row.label
        assert len(row.paper) in (0, 4)


def test_no_row_stands_twice_in_a_table():
    for table in TABLES.values():
        rows = [Experiment(row, []) for row in table.rows if row.flags is not None]
        models = [(row.name, row.look) for row in rows if not row.note.startswith("equal")]
        assert len(models) == len(set(models))


@pytest.mark.parametrize(
    "dataset, masks, structured",
    [
        ("synthetic", "--epoch-steps 40 --schedule cosine --lr 0.0003", "--lr 0.001"),
        ("rgbnt100", "--epoch-steps 108 --schedule cosine --lr 1.25e-06", "--lr 4.17e-06"),
    ],
)
def test_pruning_finetunes_by_shares_of_the_data_sets_rate_and_epoch(dataset, masks, structured):
    label, common = "0.50 of the weights", ("--dataset", dataset)
    assert " ".join(of_table("3", label, *common).prune).endswith(masks)
    smaller = " ".join(of_table("3", f"{label}, smaller dense model", *common).prune)
    assert "--structured" in smaller
    assert smaller.endswith(structured)


@pytest.mark.parametrize("dataset", ["synthetic", "rgbnt100"])
def test_rates_and_lengths_are_those_of_the_data_set(dataset):
    def args(key: str, label: str):
        return options.parse([*of_table(key, label, "--dataset", dataset).words])

    base = options.parse(["--dataset", dataset])
    faster = args("choices", "D11: stage 2 at four times its rate")
    assert faster.lr == pytest.approx((base.lr[0], 4 * base.lr[1]))
    assert args("stages", "stage 2 alone, for all epochs").epochs == (0, sum(base.epochs))
    one, four = (args("positives", f"{count}, FFF") for count in (1, 4))
    assert (one.positives, four.positives) == (1, 4)
    assert one.epochs == tuple(4 * n for n in four.epochs)  # as many steps


def test_rows_are_by_construction_where_24_steps_show_no_difference():
    kept = read_json(ROOT / "results" / "reach.json")
    assert {row["constructed"] for row in kept.values()} == {True, False}
    for label, row in kept.items():
        if "positives" in label:  # other anchors come in each step
            continue
        still = row["distance"] is not None and row["distance"] < reach.ROUNDING
        assert row["constructed"] == still, label


def test_reach_of_two_rows(tiny_data, tmp_path, monkeypatch):
    rows = [Row("dead", "--data-token 3"), Row("alive", "--alpha 0", base="--triplet FFF")]
    monkeypatch.setitem(TABLES, "8", Table("", rows))
    monkeypatch.setattr(reach, "STEPS", reach.STEPS.replace("12", "2"))
    file = tmp_path / "reach.json"
    succeeds(reach, "--table", 8, "--json", file, "--data-root", tiny_data, *TINY.split())
    dead, alive = read_json(file).values()
    assert dead["constructed"]
    assert dead["distance"] < reach.ROUNDING
    assert not alive["constructed"]
    assert alive["distance"] > reach.ROUNDING


# --- running


def in_forks(command: list, folder, args) -> None:
    """Instead of ablate.launch: the same programs, without the seconds that imports take."""
    program = {"train.py": train, "evaluate.py": evaluate, "prune.py": prune}[command[0]]
    succeeds(program, *command[1:])


def table(*arguments) -> list[list[str]]:
    """Cells of the table that ablate prints last."""
    stdout = succeeds(ablate, *arguments)
    rows = [line.split("|")[1:-1] for line in stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_own_rows_end_to_end_and_what_is_done_is_kept(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "launch", in_forks)
    common = ["--data-root", tiny_data, *QUICK, "--seeds", 2]
    common += ["--rows", "nir=--modalities nir", "both=--modalities rgb,nir"]
    first = table("--out", tmp_path, *common)
    folders = sorted(tmp_path.glob("*/[01]"))
    assert len(folders) == 4
    metrics = {str(folder): read_json(folder / "metrics.json") for folder in folders}
    values = [100 * found["mAP"] for name, found in metrics.items() if "rgb" in name]
    assert first[3][2] == f"{mean(values):.1f} ± {stdev(values):.1f}"
    assert re.fullmatch(r"[+-]\d+\.\d ± \d+\.\d \(--modalities rgb,nir\)", first[2][6])
    assert first[3][6:] == ["-", "-"]
    for folder in folders:  # the small files alone make the table again
        shutil.rmtree(folder)
    assert table("--out", tmp_path, *common) == first
    assert table("--from", tmp_path, *common) == first
    assert not list(tmp_path.glob("*/[01]"))
    file = next(tmp_path.glob("*.json"))
    changed = read_json(file)
    changed["settings"]["alpha"] = 3
    file.write_text(json.dumps(changed))
    assert "its figures are of alpha 3, not 0.5" in fails(ablate, "--from", tmp_path, *common)
    file.write_text("{}")
    line = fails(ablate, "--from", tmp_path, *common)
    assert f"{file}: not a file of ablate's figures" in line
    assert "holds no figures" in fails(ablate, "--table", 7, "--from", tmp_path)


def test_looks_at_one_model_by_evaluate_and_prune_and_the_size_chart(
    tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(ablate, "launch", in_forks)
    fractions = {"0.8": ((76.4, 94.0, 94.4, 94.6), 76), "0.5": ((), 0)}
    rows = [*TABLES["1"].rows[2:3], Row("rgb", test="--modalities rgb")]
    rows += tables.pruned(fractions, "")
    monkeypatch.setitem(TABLES, "3", Table("Table 3", rows))
    arguments = ["--table", 3, "--seeds", 1, "--out", tmp_path, "--data-root", tiny_data, *QUICK]
    cited, one, *pruned = table(*arguments, "--chart", tmp_path / "size.png")[2:]
    assert cited[6] == "130 M: 74.4 / 93.4 / 94.5 / 95.0"
    assert len(list(tmp_path.glob("*/0"))) == 1
    metrics = read_json(next(tmp_path.glob("*/0/metrics-modalities-rgb.json")))
    assert one[2] == f"{100 * metrics['mAP']:.1f}"
    assert pruned[0][6] == "76 M: 76.4 / 94.0 / 94.4 / 94.6"
    assert [row[1] for row in pruned] == ["3.33 M", "2.53 M"]
    assert (tmp_path / "size.png").stat().st_size > 1000


def test_models_side_by_side_as_programs_and_one_that_fails(tiny_data, tmp_path):
    rows = ["--rows", "a=", "b=--batch-size 4000", "--seeds", 1, "--parallel", 2]
    line = call(ablate, *rows, "--out", tmp_path, "--data-root", tiny_data, *QUICK)
    assert line.returncode == 2
    assert "1 models failed; the first: python train.py" in line.stderr
    (log,) = re.findall(r"see (\S+)", line.stderr)
    assert "--batch-size 4000: " in (tmp_path / log).read_text()
    (done,) = tmp_path.glob("*/0/metrics.json")
    assert "mAP" in (done.parent / "output.txt").read_text()


def test_dry_run_prints_the_commands_alone(tmp_path):
    out, lr = tmp_path / "out", ["--lr", "1e-4", "1e-5"]
    stdout = succeeds(ablate, "--table", 8, "--seeds", 2, "--dry-run", "--out", out, *lr)
    assert not out.exists()
    lines = [line for line in stdout.splitlines() if not line.startswith("#")]
    assert sum(line.startswith("python train.py --lr 1e-4 1e-5 ") for line in lines) == 50
    looks = [line for line in lines if line.startswith("python evaluate.py")]
    assert len(looks) == 16
    assert f"{out}/lr-1e-4-1e-5-triplet-DDF/1/last.pt --features data" in looks[7]


def test_a_row_that_the_options_for_all_do_not_fit_says_why():
    common = ("--backbone", "deit-b", "--modalities", "rgb,nir")
    assert "takes resnet18" in of_table("1", "HAMNet", *common).left_out
    assert of_table("6", "R+T", *common).left_out == "no tir here"
    assert fails(ablate, "--seeds", 1).startswith("error: expected --table or --rows")


# --- tables


def test_differences_to_the_base_with_their_standard_error():
    base = [{"mAP": m} for m in (0.60, 0.62, 0.64)]
    ours = [{"mAP": m} for m in (0.65, 0.65, 0.68)]
    # variances 4 and 3 square points: sqrt(3.5 * 2 / 3) = 1.53
    assert ablate.against(ours, base) == "+4.0 ± 1.5"
    assert ablate.against(ours[:1], base) == "-"


def test_a_table_names_its_machine_the_rows_of_another_and_what_is_by_construction(
    tmp_path, monkeypatch
):
    def figures(self, folder, seeds) -> list[dict]:
        own = {"params": 1e6, "machine": "a CPU" if self.row.label == "two" else "a GPU"}
        return [{**dict.fromkeys(ablate.FIGURES, mAP), **own} for mAP in (0.6, 0.62)]

    monkeypatch.setattr(Experiment, "figures", figures)
    flags = {"default": "", "two": "--fusion-tokens 2", "fifth": "--data-token 5"}
    rows = [Experiment(Row(label, own), []) for label, own in flags.items()]
    text = ablate.text_of(Table("Tokens", []), rows, tmp_path, range(2))
    assert text.startswith("Tokens; 2 seeds, mean ± standard deviation; a GPU\n")
    assert "| two (on a CPU) |" in text
    assert "| fifth (by construction) |" in text
    assert text.endswith(ablate.BY_CONSTRUCTION)
