"""Any sensors ask, any sensors answer: a table of how well each subset finds each other subset.

python -m extras.pairs CKPT                                          all pairs of subsets
python -m extras.pairs CKPT --query-modalities tir --gallery-modalities rgb

Each row is a subset of modalities that the queries have, each column one that the gallery has; a
cell is mAP / Rank-1 in percent.
"""

import argparse
from itertools import product
from pathlib import Path

import evaluate
import runtime


def parse() -> argparse.Namespace:
    parser = evaluate.make_parser(__doc__, prog="python -m extras.pairs")
    add = parser.add_argument
    text = "modalities of the queries (default: each subset)"
    add("--query-modalities", action=runtime.Names, help=text)
    text = "modalities of the gallery (default: each subset)"
    add("--gallery-modalities", action=runtime.Names, help=text)
    add("--json", type=Path, metavar="FILE", help="write the metrics of each pair")
    return parser.parse_args()


def table(results: dict[str, dict]) -> str:
    """mAP / Rank-1 in percent, in Markdown: a row for each query's modalities."""
    cells: dict[str, dict[str, str]] = {}
    for name, metrics in results.items():
        # Files of older versions have "rgb" for "rgb > rgb"
        query, _, gallery = name.partition(" > ")
        shown = f"{100 * metrics['mAP']:.1f} / {100 * metrics['R1']:.1f}"
        cells.setdefault(query, {})[gallery or query] = shown
    head = ["query, gallery:", *next(iter(cells.values()))]
    return runtime.markdown([head, *([query, *row.values()] for query, row in cells.items())])


@runtime.program
def main() -> None:
    args = parse()
    runtime.check_output(args.json, "--json")
    embedder, dataset = evaluate.open_checkpoint(args)
    sides = {}
    for name in ("query", "gallery"):
        chosen, split = getattr(args, f"{name}_modalities"), getattr(dataset, name)
        subsets = evaluate.subsets(args.modalities)
        if chosen:
            subsets = [runtime.in_order(chosen, embedder.model.config.modalities, "the model")]
        sides[name] = [split.restricted(subset) for subset in subsets]
    for pair in product(*sides.values()):
        evaluate.check_matches(*pair)
    queries, galleries = ([(s, embedder.embed(s)) for s in splits] for splits in sides.values())
    results = {}
    for query, gallery in product(queries, galleries):
        ranking = evaluate.rank_features(embedder.model.similarity, query, gallery)
        metrics = evaluate.metrics_dict(embedder.model, ranking)
        del metrics["queries"]  # they would be most of a file that is kept for its table
        name = f"{','.join(query[0].modalities)} > {','.join(gallery[0].modalities)}"
        results[name] = metrics
    runtime.print0(table(results))
    if args.json and runtime.rank() == 0:
        runtime.write_json(args.json, results)
        print(f"{args.json}: the metrics of each pair")


if __name__ == "__main__":
    main()
