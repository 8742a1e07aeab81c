"""The tables as commands: each row changes what it names, runs once, and has its run's figures."""

import json
import re
import shutil
from argparse import Namespace
from statistics import mean, stdev

import pytest
from conftest import ROOT, call, fails, read_json, succeeds

import data
import evaluate
import options
import prune
import train
from experiments import ablate, reach, tables
from experiments.ablate import Planned
from experiments.tables import TABLES, Row, Table

TINY = "--batch-size 8 --image-size 32 64 --backbone-weights none --precision fp32 --device cpu"
QUICK = f"--epochs 1 0 --epoch-steps 1 0 {TINY}".split()
ROWS = [row for table in TABLES.values() for row in table.rows]


def planned(row: Row, *common: str) -> Planned:
    return Planned(row, list(common))


def of_table(key: str, label: str, *common: str) -> Planned:
    return planned(next(row for row in TABLES[key].rows if row.label == label), *common)


# --- what a row changes


def declared(row: Planned) -> set[str]:
    """The settings that a row's options, slip and looks name, beyond its base's."""
    b = ablate.parsed(tuple(row.base))
    found = [
        dict(re.findall(r"--([\w-]+)((?: (?!--)\S+)*)", tables.filled(flags, b)))
        for flags in (row.row.flags, row.row.base)
    ]
    names = {name.replace("-", "_") for name, _ in found[0].items() ^ found[1].items()}
    names |= {"triplet"} if "fusion" in names else set()  # baselines have no data tokens
    names |= {"recipe"} if "hamnet" in row.words else set()
    return names | {row.row.slip, "test" * bool(row.test), "prune" * bool(row.prune)}


@pytest.mark.parametrize("dataset", data.DATASETS)
def test_each_row_changes_just_what_it_names_on_every_data_set(dataset, monkeypatch):
    known = data.DATASETS[dataset].counts or (3200,)
    monkeypatch.setattr(tables, "num_samples", lambda *_: known[0])
    for row in ROWS:
        found = planned(row, "--dataset", dataset)
        lacking = r"cited|for --backbone small|no (rgb|nir|tir)( or \w+)* here|"
        assert re.fullmatch(lacking, found.left_out), (row.label, found.left_out)
        if not found.left_out:
            assert found.changes <= declared(found), row.label
            equal = found.note.startswith("equal to ") or declared(found) == {""}
            assert bool(found.changes) != equal, row.label
            assert len(row.paper) in (0, 4)


def test_no_row_stands_twice_in_a_table():
    for table in TABLES.values():
        found = [planned(row) for row in table.rows if row.flags is not None]
        models = {(row.name, row.look) for row in found if not row.note.startswith("equal")}
        assert len(models) == len([row for row in found if not row.note.startswith("equal")])


@pytest.mark.parametrize(
    "dataset, masks, structured",
    [
        ("synthetic", "--epoch-steps 40 --schedule cosine --lr 0.0003", "--lr 0.001"),
        ("rgbnt100", "--epoch-steps 108 --schedule cosine --lr 1.25e-06", "--lr 4.17e-06"),
    ],
)
def test_pruning_finetunes_by_shares_of_the_data_sets_rate_and_epoch(dataset, masks, structured):
    common = ("--dataset", dataset)
    found = " ".join(of_table("3", "0.50 of the weights", *common).prune)
    assert found.endswith(masks)
    smaller = of_table("3", "0.50 of the weights, smaller dense model", *common).prune
    assert "--structured" in smaller
    assert " ".join(smaller).endswith(structured)


@pytest.mark.parametrize("dataset", ["synthetic", "rgbnt100"])
def test_rates_and_lengths_are_those_of_the_data_set(dataset):
    common = ("--dataset", dataset)
    base = options.parse(list(common))
    faster = options.parse(
        [*of_table("choices", "D11: stage 2 at four times its rate", *common).words]
    )
    assert faster.lr == pytest.approx((base.lr[0], 4 * base.lr[1]))
    alone = of_table("stages", "stage 2 alone, for all epochs", *common).args
    assert alone.epochs == (0, sum(base.epochs))
    counts = [of_table("positives", n, *common).args for n in "1248"]
    assert [args.positives for args in counts] == [1, 2, 4, 8]
    passes = {tuple(n * args.positives for n in args.epochs) for args in counts}
    assert len(passes) == 1  # each anchor comes as often, in as many steps


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
    rows = ["--rows", "nir=--modalities nir", "both=--modalities rgb,nir", "--seeds", 2]
    common = ["--data-root", tiny_data, *QUICK]
    first = table(*rows, "--out", tmp_path, *common)
    folders = sorted(tmp_path.glob("*/[01]"))
    assert len(folders) == 4
    metrics = [read_json(folder / "metrics.json") for folder in folders]
    values = [100 * m["mAP"] for f, m in zip(folders, metrics, strict=True) if "rgb" in str(f)]
    assert first[3][2] == f"{mean(values):.1f} ± {stdev(values):.1f}"
    assert re.fullmatch(r"[+-]\d+\.\d ± \d+\.\d \(--modalities rgb,nir\)", first[2][6])
    assert first[3][6:] == ["-", "-"]
    (folders[0] / "metrics.json").unlink()  # as if interrupted before the test
    kept = {file: file.read_text() for file in tmp_path.glob("*.json")}
    before = {folder: (folder / "last.pt").stat().st_mtime_ns for folder in folders}
    assert table(*rows, "--out", tmp_path, *common) == first
    assert before == {folder: (folder / "last.pt").stat().st_mtime_ns for folder in folders}
    for folder in folders:  # the small files alone make the table again
        shutil.rmtree(folder)
    assert table(*rows, "--from", tmp_path, *common) == first
    file = next(iter(kept))
    file.write_text('{"looks": {"": {"0": {"mAP": 1}}}}')
    line = fails(ablate, *rows, "--from", tmp_path, *common)
    assert f"{file}: not a file of ablate's figures" in line
    changed = json.loads(kept[file])
    changed["settings"]["alpha"] = 3
    file.write_text(json.dumps(changed))
    assert "its figures are of alpha 3, not 0.5" in fails(
        ablate, *rows, "--from", tmp_path, *common
    )
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
    assert "HAMNet takes resnet18" in of_table("1", "HAMNet", *common).left_out
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
    made_on = {"0": "a GPU", "5": "a GPU", "10": "a CPU", "15": "a GPU"}
    mAPs = {"0": (0.1, 0.2), "5": (0.60, 0.60), "10": (0.62, 0.60), "15": (0.1, 0.9)}

    def figures(self, folder, seeds) -> list[dict]:
        label = self.row.label
        own = {"params": 1e6, "machine": made_on[label]}
        return [{**dict.fromkeys(ablate.FIGURES, mAP), **own} for mAP in mAPs[label]]

    monkeypatch.setattr(Planned, "figures", figures)
    flags = {"0": "", "5": "--fusion-tokens 2", "10": "--fusion-tokens 4", "15": "--data-token 5"}
    rows = [planned(Row(label, own)) for label, own in flags.items()]
    args = Namespace(keep=tmp_path, seeds=range(2), common=[])
    text = ablate.text_of(Table("Index", [], deviation=0.07), rows, args)
    assert text.startswith("Index; 2 seeds, mean ± standard deviation; a GPU\n")
    assert "| 10 (on a CPU) |" in text
    assert "| 15 (by construction) |" in text
    # Of 60 and 62 it is 1.414, of 60 and 60 nothing; what is by construction does not count
    assert text.endswith("mean of the seeds: 0.71 points (the paper: 0.07)")
