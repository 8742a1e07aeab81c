"""How far each row of a table gets from its base in its first 24 steps: can it act at all?

python -m synthetic.render --out few/synthetic --train-ids 20 --test-ids 3 --captures 2
python -m experiments.reach --table choices data-token positives 8 --data-root few

Both train 12 steps of 8 triplets a stage from the same seed, in float32 on a CPU. Where no weight
differs by 1e-4, what the row changes cannot reach the model: the row is "by construction".
train.py's options may follow, for all rows.
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
from experiments.ablate import Planned
from experiments.published import slipped
from experiments.tables import TABLES

STEPS = "--epochs 1 --epoch-steps 12 --batch-size 8 --precision fp32 --device cpu --seed 0"
ROUNDING = 1e-4


@lru_cache(4)  # the rows of a table share few bases
def weights(words: tuple[str, ...], slip: str = "") -> dict[str, torch.Tensor]:
    """A model's weights after the steps. The run is not tested, and leaves no files."""
    with tempfile.TemporaryDirectory() as folder:
        args = options.parse([*words, *STEPS.split(), "--out", f"{folder}/run"])
        with slipped(slip, args) if slip else nullcontext():
            run = train.start_run(args)
            for stage in args.stages:
                train.train_stage(run, stage)
    return run.model.state_dict()


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float | None:
    """The largest difference of any weight; None where the models have other weights."""
    if {n: w.shape for n, w in first.items()} != {n: w.shape for n, w in second.items()}:
        return None
    return max((weight - second[name]).abs().max().item() for name, weight in first.items())


def table(found: dict[str, dict]) -> str:
    """In Markdown, of what --json keeps."""
    lines = [["table: row", "acts by", "largest difference of a weight", ""]]
    for label, row in found.items():
        value = row["distance"]
        shown = "another model" if value is None else f"{value:.1e}" if value else "0"
        lines.append([label, row["ways"], shown, "by construction" if row["constructed"] else ""])
    return runtime.markdown(lines)


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.reach")
    parser.add_argument("--table", choices=TABLES, nargs="+", required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to FILE's")
    args, common = parser.parse_known_args()
    runtime.check_output(args.json, "--json")
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for key in args.table:
        for row in TABLES[key].rows:
            planned, label = Planned(row, common), f"{key}: {row.label}"
            # Neither another look at a model nor another length is another start
            if planned.look or not planned.changes - {"epochs", "epoch_steps"} or label in kept:
                continue
            found = distance(weights(planned.words, row.slip), weights(planned.base))
            constructed = planned.by_construction
            kept[label] = {"ways": planned.ways, "distance": found, "constructed": constructed}
            if args.json:
                runtime.write_json(args.json, kept)
    print(table(kept))


if __name__ == "__main__":
    main()
