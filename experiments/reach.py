"""Can the change that a row of a table makes affect the trained weights at all?

python -m synthetic.render --out few/synthetic --train-ids 20 --test-ids 3 --captures 2
python -m experiments.reach --table choices data-token positives 8 --data-root few

The row's model and the one that it is compared with train from the same seed, 12 steps of 8
triplets in each stage, in float32 on a CPU, and the largest difference of any weight is printed.
It tests the rows that tables call "by construction": theirs must be below 1e-4. train.py's options
may follow, and then hold for all rows.
"""

import json
import tempfile
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch

import options
import runtime
import train
from experiments.ablate import Experiment
from experiments.published import slipped
from experiments.tables import TABLES

STEPS = "--epochs 1 --epoch-steps 12 --batch-size 8 --precision fp32 --device cpu --seed 0"
ROUNDING = 1e-4


@lru_cache(4)  # the rows of a table are compared with few models
def weights(words: tuple[str, ...], slip: str = "") -> dict[str, torch.Tensor]:
    """A model's weights after these steps. The run is not tested, and leaves no files."""
    with tempfile.TemporaryDirectory() as folder:
        args = options.parse([*words, *STEPS.split(), "--out", f"{folder}/run"])
        with slipped(slip, args) if slip else nullcontext():
            run = train.start_run(args)
            for stage in args.stages:
                train.train_stage(run, stage)
    return run.model.state_dict()


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float | None:
    """The largest difference of any weight; None where the models' weights do not correspond."""
    if {n: w.shape for n, w in first.items()} != {n: w.shape for n, w in second.items()}:
        return None
    return max((weight - second[name]).abs().max().item() for name, weight in first.items())


def table(rows: dict[str, dict]) -> str:
    """In Markdown, of what --json keeps."""
    lines = [["table: row", "acts by", "largest difference of a weight after 24 steps", ""]]
    for label, row in rows.items():
        value = row["distance"]
        shown = "another model" if value is None else f"{value:.1e}" if value else "0"
        lines.append([label, row["ways"], shown, "by construction" if row["constructed"] else ""])
    return runtime.markdown(lines)


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.reach")
    parser.add_argument("--table", choices=TABLES, nargs="+", required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to those in FILE")
    args, common = parser.parse_known_args()
    runtime.check_output(args.json, "--json")
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for key in args.table:
        for row in TABLES[key].rows:
            experiment, label = Experiment(row, common), f"{key}: {row.label}"
            # Another test, or other numbers of epochs, leave the first steps as they are
            changes = experiment.changes - {"epochs", "epoch_steps"}
            if experiment.look or not changes or label in kept:
                continue
            kept[label] = {
                "ways": experiment.ways,
                "distance": distance(weights(experiment.words, row.slip), weights(experiment.base)),
                "constructed": experiment.by_construction,
            }
            if args.json:
                runtime.write_json(args.json, kept)
    print(table(kept))


if __name__ == "__main__":
    main()
