"""Fill the tables of documents from kept figures.

python -m experiments.results results results/TABLES.md RESULTS.md

`<!-- 8 -->` and `<!-- end -->` enclose Table 8 of ablate, made of the files in DIR. train.py's
options for all rows may follow its name (`<!-- 8 --data-root second -->`); then only the rows that
have runs are listed. Other blocks are
    verdicts, across                         the paper's claims, judged; in several settings
    ffd, reach, speed, gpu, pairs            each from its own file in DIR
    machines OTHER                           the models that are both in DIR and in DIR/OTHER
    runs NAME, rows NAME                     DIR/NAME.json: label -> its runs; a list of rows
"""

import json
import re
from pathlib import Path

import runtime
from experiments import ablate, ffd, reach, verdicts
from experiments.tables import TABLES
from extras import pairs
from runtime import UserError, markdown

BLOCK = re.compile(r"(<!-- (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def speed(content: dict) -> str:
    lines = [["what", "ours", "peer's", "ratio", "peer"]]
    for row in content["rows"]:
        times = [f"{row[name]:.3f} s" for name in ("ours", "theirs")]
        lines.append([row["what"], *times, f"{row['ratio']:.2f}", row["peer"]])
    return markdown(lines)


def gpu(content: dict) -> str:
    rows = [[row["what"], f"{row['value']:.3g} {row['unit']}"] for row in content["rows"]]
    return markdown([["what", "measured"], *rows])


def runs(content: dict) -> str:
    """Means and standard deviations of each label's runs, in percent."""
    names = (*ablate.FIGURES, "mINP")
    lines = [["run", "runs", *(f"{name} %" for name in names)]]
    for label, runs in content.items():
        values = ([100 * metrics[name] for metrics in runs] for name in names)
        lines.append([label, str(len(runs)), *map(ablate.spread, values)])
    return markdown(lines)


def rows(content: list) -> str:
    return markdown([[*content[0]], *([str(v) for v in row.values()] for row in content)])


def machines(folder: Path, other: str) -> str:
    """mAP of the models that both folders have, and the difference with its standard error."""
    lines, names = [], ["", ""]  # of the machines
    for path in sorted((folder / other).glob("*.json")):
        if not (folder / path.name).exists():
            continue
        content = json.loads(path.read_text())
        looks = ablate.read_figures(folder / path.name, content["settings"])
        pair = [list(of[""].values()) for of in (content["looks"], looks)]
        names = [ablate.machine(runs) for runs in pair]
        counts = ", ".join(str(len(runs)) for runs in pair)
        means = [ablate.spread([100 * run["mAP"] for run in runs]) for runs in pair]
        lines.append([path.stem, counts, *means, ablate.against(pair[1], pair[0])])
    return markdown([["model", "runs", *names, "difference ± error"], *lines])


KINDS = {  # block -> its file, if it does not name one, and what makes a table of the file
    "ffd": ("ffd", ffd.table),
    "speed": ("bench", speed),
    "gpu": ("bench-gpu", gpu),
    "pairs": ("pairs", pairs.table),
    "reach": ("reach", reach.table),
    "runs": ("", runs),
    "rows": ("", rows),
}


def block(text: str, folder: Path) -> str:
    """The content of a block; raises UserError where there is none of that name."""
    key, *common = text.split()
    if key == "machines":
        return machines(folder, *common)
    if key == "verdicts":
        note = f"{verdicts.STATISTICS}\n\n" if not common else ""
        return note + markdown(verdicts.table_of(common, folder))
    if key == "across":
        return markdown(verdicts.across(folder))
    if key in TABLES:
        rows = [ablate.Experiment(row, common) for row in TABLES[key].rows]
        if common:  # e.g. another draw of vehicles, on which not all rows were run
            rows = [row for row in rows if row.figures(folder, ablate.SEEDS)]
        text = ablate.text_of(TABLES[key], rows, folder, ablate.SEEDS)
        title, rest = text.split("\n\n", 1)
        return f"**{title}**\n\n{rest}"
    if key not in KINDS:
        expected = ", ".join([*TABLES, "verdicts", "across", "machines", *KINDS])
        raise UserError(f"<!-- {text} -->: no such table; expected one of {expected}")
    name, table_of = KINDS[key]
    return table_of(json.loads((folder / f"{name or common[0]}.json").read_text()))


def filled(document: str, folder: Path) -> str:
    return BLOCK.sub(lambda m: f"{m[1]}\n{block(m[2], folder)}\n\n{m[3]}", document)


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.results")
    add = parser.add_argument
    add("results", type=ablate.kept_folder, metavar="DIR", help="filled by ablate --keep")
    add("documents", type=Path, nargs="+", metavar="FILE", help="in Markdown, with blocks")
    args = parser.parse_args()
    for document in args.documents:
        text = filled(document.read_text(), args.results)
        runtime.write_atomically(document, lambda path, text=text: path.write_text(text))
        print(f"{document}: {len(BLOCK.findall(text))} blocks")


if __name__ == "__main__":
    main()
