"""Any sensors ask, any sensors answer: a table of how well each subset finds each other subset.

python -m extras.pairs CKPT                                          all pairs of subsets
python -m extras.pairs CKPT --query-modalities tir --gallery-modalities rgb

A row holds one subset of the queries' modalities, a column one of the gallery's; a cell is mAP /
Rank-1 in percent.
"""

import argparse
from pathlib import Path

import evaluate
import runtime


def parse() -> argparse.Namespace:
    parser = evaluate.make_parser(__doc__, prog="python -m extras.pairs")
    add, names = parser.add_argument, {"metavar": "NAMES", "type": runtime.names}
    add("--query-modalities", **names, help="what the queries have (default: each subset)")
    add("--gallery-modalities", **names, help="what the gallery has (default: each subset)")
    add("--json", type=Path, metavar="FILE", help="write the figures of each pair")
    return parser.parse_args()


def table(results: dict[str, dict]) -> str:
    """mAP / Rank-1 in percent, in Markdown: a row for each query's modalities."""
    cells: dict[str, dict[str, str]] = {}
    for name, metrics in results.items():
        # results kept by older versions say "rgb" for "rgb > rgb"
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
        given, split = getattr(args, f"{name}_modalities"), getattr(dataset, name)
        if given:
            runtime.in_order(given, embedder.model.config.modalities, "the model")
        subsets = [given] if given else evaluate.subsets(args.modalities)
        sides[name] = [split.restricted(subset) for subset in subsets]
    for query in sides["query"]:
        for gallery in sides["gallery"]:
            evaluate.check_matches(query, gallery)
    queries, galleries = ([(s, embedder.embed(s)) for s in splits] for splits in sides.values())
    results = {}
    for query in queries:
        for gallery in galleries:
            ranking = evaluate.rank_features(query, gallery)
            name = f"{','.join(query[0].modalities)} > {','.join(gallery[0].modalities)}"
            metrics = evaluate.metrics_dict(embedder.model, ranking)
            del metrics["queries"]  # they would be most of a file that is kept for its table
            results[name] = metrics
    runtime.print0(table(results))
    if args.json and runtime.rank() == 0:
        runtime.write_json(args.json, results)
        print(f"{args.json}: the figures of each pair")


if __name__ == "__main__":
    main()
