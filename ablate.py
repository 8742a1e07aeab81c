"""Train and evaluate the rows of a table of the paper, and print ours beside the paper's.

python ablate.py --table 5                                                 on the embedded data set
python ablate.py --table 8 --seeds 1 --dry-run                             the commands alone
torchrun --nproc_per_node=8 ablate.py --table 8 --dataset rgbnt100 --data-root DIR

Whatever train.py takes besides may follow, and is for all rows: --short is one such set. Runs are kept in OUT: a call that
was interrupted goes on where it stopped, and a row that two tables share is trained once.
"""

import argparse
import json
import re
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import data
import evaluate
import runtime
import train
from runtime import UserError

SHORT = "--epochs 1 1 --epoch-steps 50 18"  # ours: at most 40 s a run on two CPU cores
FIGURES = ("mAP", "R1", "R5", "R10")


class Row(NamedTuple):
    """`flags` are train.py's, None for a row that is only cited; `paper` its mAP, R1, R5, R10 in the paper, in percent;
    `subset` the modalities to evaluate on, where they are not those of training."""

    label: str
    flags: str | None
    paper: tuple[float, ...] = ()
    subset: str = ""


class Table(NamedTuple):
    title: str
    rows: tuple[Row, ...]


GRAFT_100 = (76.6, 94.3, 95.3, 96.0)
SUBSETS = [",".join(subset) for size in (1, 2, 3) for subset in combinations(("rgb", "nir", "tir"), size)]
TABLES = {
    "1": Table(
        "Table 1, RGBNT100",
        (
            Row("HAMNet (78 M, cited)", None, (65.4, 85.5, 87.9, 88.8)),
            Row("DANet (78 M, cited)", None),
            Row("GAFNet (130 M, cited)", None, (74.4, 93.4, 94.5, 95.0)),
            Row("Multi-Stream ViT", "--fusion multistream", (74.6, 91.3, 92.8, 93.5)),
            Row("GraFT", "", GRAFT_100),
        ),
    ),
    "2": Table(
        "Table 2, RGBN300",
        (
            Row("HAMNet (52 M, cited)", None, (61.9, 84.0, 86.0, 87.0)),
            Row("DANet (52 M, cited)", None, (71.0, 89.9, 90.9, 91.5)),
            Row("GAFNet (130 M, cited)", None, (72.7, 91.9, 93.6, 94.2)),
            Row("Multi-Stream ViT", "--modalities rgb,nir --fusion multistream", (73.7, 91.9, 94.1, 94.8)),
            Row("GraFT", "--modalities rgb,nir", (75.1, 92.1, 94.5, 95.2)),
        ),
    ),
    "5": Table(
        "Table 5, fusion on RGBNT100",
        (
            Row("vanilla, new CLS token (text)", "--fusion cls", (60.3, 82.1, 79.8, 83.2)),
            Row("vanilla, first modality's CLS (published code)", "--fusion first-cls"),
            Row("vanilla, averaged token", "--fusion average", (62.0, 83.9, 85.9, 87.4)),
            Row("vanilla, new CLS token, no triplet loss (not in the paper)", "--fusion cls --alpha 0"),
            Row("vanilla, first modality's CLS, no triplet loss (not in the paper)", "--fusion first-cls --alpha 0"),
            Row("early fusion (not in the paper)", "--fusion early"),
            Row("GraFT, FFF", "--triplet FFF"),
            Row("GraFT, FFD", "", (76.4, 94.0, 94.4, 94.6)),
        ),
    ),
    "6": Table(
        "Table 6, modalities of RGBNT100",
        (
            Row("T", "--modalities tir", (38.6, 63.5, 71.0, 74.7)),
            Row("N", "--modalities nir", (39.6, 60.4, 64.2, 66.5)),
            Row("R", "--modalities rgb", (49.3, 70.3, 75.0, 77.4)),
            Row("R+N", "--modalities rgb,nir", (54.3, 76.4, 79.6, 81.6)),
            Row("N+T", "--modalities nir,tir", (62.7, 86.8, 89.1, 90.3)),
            Row("R+T", "--modalities rgb,tir", (67.0, 89.2, 91.3, 92.7)),
            Row("R+N+T", "", GRAFT_100),
        ),
    ),
    "7": Table(
        "Table 7, modalities of RGBN300",
        (
            Row("N", "--modalities nir", (51.3, 74.1, 77.2, 79.5)),
            Row("R", "--modalities rgb", (60.4, 81.5, 83.9, 86.8)),
            Row("R+N", "--modalities rgb,nir", (75.1, 91.4, 92.3, 92.9)),
        ),
    ),
    "8": Table(
        "Table 8, tokens of anchor, positive and negative, RGBNT100",
        (
            Row("FFD", "", GRAFT_100),
            Row("DDD", "--triplet DDD", (59.0, 85.5, 89.2, 90.4)),
            Row("FFF", "--triplet FFF", (57.5, 81.2, 84.6, 86.2)),
            Row("FDD", "--triplet FDD", (62.2, 80.5, 87.3, 88.9)),
            Row("DFF", "--triplet DFF", (63.6, 86.9, 89.2, 90.0)),
            Row("DFD", "--triplet DFD", (60.6, 85.2, 88.2, 90.0)),
            Row("DDF", "--triplet DDF", (57.6, 83.7, 86.9, 88.6)),
            Row("FDF", "--triplet FDF", (38.2, 60.1, 63.0, 65.0)),
            Row("no triplet loss (not in the paper)", "--alpha 0"),
        ),
    ),
    "data-token": Table(
        "Section 6, index of the data token (the paper: standard deviation 0.0007 mAP)",
        (Row("0", ""), *(Row(index, f"--data-token {index}") for index in ("5", "10", "15", "20", "25"))),
    ),
    "positives": Table(
        "Section 5.1, positives an anchor (at equal steps with --short or --epoch-steps)",
        tuple(Row(count, f"--positives {count}") for count in ("1", "2", "4", "8")),
    ),
    "fusion-tokens": Table(
        "Section 5.2, fusion tokens", (Row("1", ""), *(Row(count, f"--fusion-tokens {count}") for count in ("2", "4")))
    ),
    "stages": Table(
        "Section 4, stages and losses",
        (
            Row("frozen, then unfrozen", ""),
            Row("both stages unfrozen", "--frozen no no"),
            Row("stage 2 alone, for all epochs", "--epochs 0 {total}"),
            Row("both stages frozen", "--frozen yes yes"),
            Row("center loss in stage 1, too", "--beta 0.005 0.005"),
            Row("beta 0.0005 (section 4.2)", "--beta 0 0.0005"),
            Row("beta 0.005 (section 5.2)", "--beta 0 0.005"),
            Row("no center loss", "--beta 0 0"),
            Row("plain distance in Eq. (8)", "--plain-distance"),
            Row("FFF", "--triplet FFF"),
            Row("FFF, plain distance in Eq. (8)", "--triplet FFF --plain-distance"),
            Row("Eq. (9) as printed", "--center-norm"),
        ),
    ),
    "plus": Table(
        "Beyond the paper: our recipe, and what becomes of it without each of its parts",
        (
            Row("the paper's recipe", ""),
            Row("plus", "--recipe plus"),
            Row("without identity-balanced batches", "--recipe plus --sampling triplets"),
            Row("without balanced batches and hard triplets: FFF", "--recipe plus --triplet FFF --sampling triplets"),
            Row(
                "without these and cross-entropy on all: FFD, anchors",
                "--recipe plus --sampling triplets --triplet FFD --cross-entropy anchors",
            ),
            Row("without patch dropout: half as many epochs in stage 2", "--recipe plus --patch-dropout 0 0"),
            Row("without the cosine schedule", "--recipe plus --schedule sqrt sqrt"),
            Row("without label smoothing in stage 1", "--recipe plus --label-smoothing 0 0.1"),
            Row("without BNNeck features", "--recipe plus --no-bnneck-features"),
        ),
    ),
    "missing": Table(
        "Beyond the paper: trained on three sensors, tested on some",
        (
            *(Row(f"{subset}", "", subset=subset) for subset in SUBSETS),
            *(Row(f"{subset}, modality dropout 0.3", "--modality-dropout 0.3", subset=subset) for subset in SUBSETS),
        ),
    ),
}


def run(row: Row, common: list[str], seed: int, out: Path) -> dict:
    """The figures of one row and seed: read where they are, else trained for, or gone on with."""
    args = train.parse(command(row, common, seed, out))
    metrics = once(args.out / "metrics.json", lambda: train.train(args))
    figures = args.out / f"metrics-{row.subset}.json"
    return once(figures, lambda: on_subset(row, args, figures)) if row.subset else metrics


def once(path: Path, make) -> dict:
    """What the file holds, or what `make()`, which writes it, returns. The ranks decide alike."""
    with runtime.rank0_first():
        done = path.exists()
    return json.loads(path.read_text()) if done else make()


def on_subset(row: Row, args: argparse.Namespace, figures: Path) -> dict:
    """The figures of a trained model on some of its modalities, written to a file, too."""
    device = runtime.start(args.device)
    model, checkpoint = evaluate.load_model(args.out / "last.pt")
    dataset = data.load_dataset(args.dataset, args.data_root, tuple(row.subset.split(",")), model.config.image_size)
    splits = dataset.query, dataset.gallery, checkpoint["mean"], checkpoint["std"]
    metrics = evaluate.evaluate(model.to(device), *splits, device, args.precision, args.workers)
    if runtime.rank() == 0:
        runtime.write_json(figures, metrics)
    return metrics


def command(row: Row, common: list[str], seed: int, out: Path) -> list[str]:
    """train.py's arguments; the folder is named after them."""
    total = sum(stage.epochs for stage in train.parse(common).stages)
    flags = [*common, *row.flags.format(total=total).split()]
    folder = re.sub(r"[^\w.,]+", "-", " ".join(flags)).strip("-") or "default"
    return [*flags, "--seed", str(seed), "--out", str(out / folder / str(seed)), "--resume"]


def cells(row: Row, results: list[dict]) -> list[str]:
    """A line of the table: label, parameters, ours with standard deviation, the paper's."""
    ours = []
    for name in FIGURES:
        values = [100 * metrics[name] for metrics in results]
        ours.append("-" if not values else f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
    params = f"{results[0]['params'] / 1e6:.2f} M" if results else "-"
    return [row.label, params, *ours, " / ".join(map(str, row.paper)) or "-"]


@runtime.program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=TABLES, nargs="+")
    parser.add_argument("--seeds", type=int, default=3, help="runs a row, seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help=f"a short schedule: {SHORT}")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="default: %(default)s")
    args, common = parser.parse_known_args()
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: expected at least 1")
    common = (SHORT.split() if args.short else []) + common
    if not args.dry_run:
        runtime.start(train.parse(common).device)
    seeds = range(args.seed, args.seed + args.seeds)
    for key in args.table:
        table, lines = TABLES[key], [["", "parameters", *(f"{name} %" for name in FIGURES), "paper: mAP / R1 / R5 / R10"]]
        for row in table.rows:
            results = []
            for seed in seeds if row.flags is not None else ():
                words = " ".join(command(row, common, seed, args.out))
                print(f"python train.py {words}") if args.dry_run else runtime.print0(f"\n{row.label}: python train.py {words}")
                results += [] if args.dry_run else [run(row, common, seed, args.out)]
            lines.append(cells(row, results))
        if not args.dry_run:
            runtime.print0(f"\n{table.title}; {args.seeds} seeds, mean ± standard deviation\n")
            lines.insert(1, ["---"] * len(lines[0]))
            runtime.print0("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
