"""Fill the tables of documents from kept figures.

python -m experiments.results results/ results/TABLES.md RESULTS.md

Between `<!-- 8 -->` and `<!-- end -->` comes Table 8 of ablate, from DIR's files. Options for all
rows may follow its name (`<!-- 8 --data-root second -->`): then only rows and claims that have runs
are listed. Other blocks: `verdicts`, `ffd`, `speed`, `gpu`, `pairs` and `reach`, of DIR's files of
that kind; `machines OTHER`, the models that both DIR and DIR/OTHER have; `runs NAME` and `rows
NAME`, of DIR/NAME.json: label -> figures of its runs, and a list of rows as they are.
"""

import argparse
import json
import re
from pathlib import Path

import runtime
from experiments import ablate, ffd, reach, verdicts
from experiments.tables import TABLES
from runtime import UserError, markdown

BLOCK = re.compile(r"(<!-- (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def speed(content: dict) -> str:
    lines = [["what", "ours", "peer", "ratio", "peer"]]
    for row in content["rows"]:
        times = [f"{row[name]:.3f} s" for name in ("ours", "theirs")]
        lines.append([row["what"], *times, f"{row['ratio']:.2f}", row["peer"]])
    return markdown(lines)


def gpu(content: dict) -> str:
    rows = [[row["what"], f"{row['value']:.3g} {row['unit']}"] for row in content["rows"]]
    return markdown([["what", "measured"], *rows])


def pairs(content: dict) -> str:
    """mAP / Rank-1 of "query > gallery", or of one name for both: a row for the query's sensors."""
    cells: dict[str, dict[str, str]] = {}
    for name, metrics in content.items():
        asking, _, answering = name.partition(" > ")
        shown = f"{100 * metrics['mAP']:.1f} / {100 * metrics['R1']:.1f}"
        cells.setdefault(asking, {})[answering or asking] = shown
    head = ["query, gallery:", *next(iter(cells.values()))]
    return markdown([head, *([asking, *row.values()] for asking, row in cells.items())])


def runs(content: dict) -> str:
    """Means and standard deviations of each label's runs, in percent."""
    names = ("mAP", "R1", "R5", "R10", "mINP")
    lines = [["run", "runs", *(f"{name} %" for name in names)]]
    for label, found in content.items():
        values = ([100 * metrics[name] for metrics in found] for name in names)
        lines.append([label, str(len(found)), *map(ablate.spread, values)])
    return markdown(lines)


def rows(content: list) -> str:
    return markdown([[*content[0]], *([str(v) for v in row.values()] for row in content)])


def machines(folder: Path, other: str) -> str:
    """mAP of the models that both folders have, and the difference with its standard error."""
    lines, names = [], ["", ""]
    for path in sorted((folder / other).glob("*.json")):
        if not (folder / path.name).exists():
            continue
        found = json.loads(path.read_text())
        looks = ablate.read_figures(folder / path.name, found["settings"])
        first, second = (list(own[""].values()) for own in (found["looks"], looks))
        names = [ablate.machine(runs) for runs in (first, second)]
        means = [ablate.spread([100 * run["mAP"] for run in runs]) for runs in (first, second)]
        counts = f"{len(first)}, {len(second)}"
        lines.append([path.stem, counts, *means, ablate.against(second, first)])
    return markdown([["model", "runs", *names, "difference ± error"], *lines])


KINDS = {  # block -> its file, if it does not name one, and what makes a table of the file
    "ffd": ("ffd", ffd.table),
    "speed": ("bench", speed),
    "gpu": ("bench-gpu", gpu),
    "pairs": ("pairs", pairs),
    "reach": ("reach", reach.table),
    "runs": ("", runs),
    "rows": ("", rows),
}


def block(text: str, folder: Path, seeds: range) -> str:
    """The content of a block; raises UserError where there is none of that name."""
    key, *common = text.split()
    if key == "machines":
        return machines(folder, *common)
    if key == "verdicts":
        note = f"{verdicts.STATISTICS}\n\n" if not common else ""
        return note + markdown(verdicts.lines(common, folder, seeds))
    if key in TABLES:
        args = argparse.Namespace(keep=folder, seeds=seeds, common=common)
        planned = [ablate.Planned(row, common) for row in TABLES[key].rows]
        if common:  # e.g. another draw of vehicles, on which not all rows were run
            planned = [row for row in planned if row.figures(folder, seeds)]
        title, *rest = ablate.text_of(TABLES[key], planned, args).split("\n\n")
        return "\n\n".join([f"**{title}**", *rest])
    if key not in KINDS:
        expected = ", ".join([*TABLES, "verdicts", "machines", *KINDS])
        raise UserError(f"<!-- {text} -->: no such table; expected one of {expected}")
    name, table_of = KINDS[key]
    return table_of(json.loads((folder / f"{name or common[0]}.json").read_text()))


def filled(document: str, folder: Path, seeds: range) -> str:
    return BLOCK.sub(lambda m: f"{m[1]}\n{block(m[2], folder, seeds)}\n\n{m[3]}", document)


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.results")
    add = parser.add_argument
    add("results", type=ablate.kept_folder, metavar="DIR", help="of ablate's --keep")
    add("documents", type=Path, nargs="+", metavar="FILE", help="in Markdown, with blocks")
    add("--seeds", type=runtime.whole(1), default=3)
    args = parser.parse_args()
    for document in args.documents:
        text = filled(document.read_text(), args.results, range(args.seeds))
        runtime.write_atomically(document, lambda path, text=text: path.write_text(text))
        print(f"{document}: {len(BLOCK.findall(text))} blocks")


if __name__ == "__main__":
    main()
