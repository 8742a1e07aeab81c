"""Fill a document's tables from kept figures.

python -m extras.results results/ RESULTS.md

A line `<!-- 8 -->` begins a block, `<!-- end -->` ends it; between them comes Table 8 of ablate.py,
from DIR's files. Options for all rows may follow its name (`<!-- 8 --data-root second -->`): rows
and claims without runs are left out then. Other blocks: verdicts (extras.verdicts); ffd, speed, gpu
and pairs (DIR/ffd.json of extras.ffd, DIR/bench.json and bench-gpu.json of extras.bench,
DIR/pairs.json of evaluate.py --all-pairs); `machines OTHER` (the models that DIR and DIR/OTHER both
have); `runs NAME` and `rows NAME` (DIR/NAME.json: label -> figures of its runs, and a list of rows
as they are).
"""

import argparse
import json
import re
from pathlib import Path

import ablate
import evaluate
import runtime
from extras import ffd, verdicts
from runtime import UserError

BLOCK = re.compile(r"(<!-- (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def speed(path: Path) -> str:
    rows = [["what", "ours", "peer", "ratio", "peer"]]
    for row in json.loads(path.read_text())["rows"]:
        times = [f"{row[name]:.3f} s" for name in ("ours", "theirs")]
        rows.append([row["what"], *times, f"{row['ratio']:.2f}", row["peer"]])
    return runtime.markdown(rows)


def gpu(path: Path) -> str:
    rows = json.loads(path.read_text())["rows"]
    return runtime.markdown(
        [
            ["what", "measured"],
            *([row["what"], f"{row['value']:.3g} {row['unit']}"] for row in rows),
        ]
    )


def machines(folder: Path, other: str) -> str:
    """mAP of the models that both folders have, and the difference with its standard error."""
    lines, names = [], ["", ""]
    for path in sorted((folder / other).glob("*.json")):
        if not (folder / path.name).exists():
            continue
        both = [json.loads(file.read_text()) for file in (path, folder / path.name)]
        if both[0]["settings"] != both[1]["settings"]:
            raise ValueError(f"{path} and {folder / path.name} are of other settings")
        first, second = (list(content["looks"][""].values()) for content in both)
        names = [runs[0]["machine"] for runs in (first, second)]
        means = [verdicts.spread([100 * run["mAP"] for run in runs]) for runs in (first, second)]
        counts = f"{len(first)}, {len(second)}"
        lines.append([path.stem, counts, *means, ablate.against(second, first)])
    return runtime.markdown([["model", "runs", *names, "difference ± error"], *lines])


def runs(path: Path) -> str:
    """Means and standard deviations of each label's runs, in percent."""
    names = ("mAP", "R1", "R5", "R10", "mINP")
    lines = [["run", "runs", *(f"{name} %" for name in names)]]
    for label, found in json.loads(path.read_text()).items():
        values = ([100 * metrics[name] for metrics in found] for name in names)
        lines.append([label, str(len(found)), *map(verdicts.spread, values)])
    return runtime.markdown(lines)


def rows(path: Path) -> str:
    lines = json.loads(path.read_text())
    return runtime.markdown([[*lines[0]], *([str(v) for v in line.values()] for line in lines)])


OTHERS = {  # block -> its file, and what makes a table of it
    "ffd": ("ffd", lambda path: ffd.table(ffd.read(path))),
    "speed": ("bench", speed),
    "gpu": ("bench-gpu", gpu),
    "pairs": ("pairs", lambda path: evaluate.pairs_table(json.loads(path.read_text()))),
    "machines": ("", machines),
    "runs": ("", runs),
    "rows": ("", rows),
}


def block(block_name: str, folder: Path, seeds: int) -> str:
    """The content of a block; raises UserError where there is none of that name."""
    key, *common = block_name.split()
    args = argparse.Namespace(from_=folder, keep=None, out=folder, weights={}, seed=0, seeds=seeds)
    if key == "verdicts":
        return runtime.markdown(verdicts.lines(common, args))
    if key in OTHERS:
        name, table_of = OTHERS[key]
        path = folder / f"{name or ' '.join(common)}.json"
        try:
            return machines(folder, *common) if key == "machines" else table_of(path)
        except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise UserError(
                f"<!-- {block_name} -->: {path} holds no such table ({error!r})"
            ) from None
    if key not in ablate.TABLES:
        expected = ", ".join([*ablate.TABLES, "verdicts", *OTHERS])
        raise UserError(f"<!-- {key} -->: no such table; expected one of {expected}")
    measured = ablate.measure(key, common, args)
    if common:  # another draw of the data, say, on which not all rows were run
        measured = [(row, found) for row, found in measured if found]
    title, *rest = ablate.text_of(ablate.TABLES[key], measured).split("\n\n")
    return "\n\n".join([f"**{title}**", *rest])


def filled(document: str, folder: Path, seeds: int = 3) -> str:
    return BLOCK.sub(lambda m: f"{m[1]}\n{block(m[2], folder, seeds)}\n\n{m[3]}", document)


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m extras.results")
    parser.add_argument("results", type=Path, metavar="DIR", help="of ablate.py's --keep")
    parser.add_argument("document", type=Path, metavar="FILE", help="in Markdown, with blocks")
    parser.add_argument("--seeds", type=runtime.whole(1), default=3)
    args = parser.parse_args()
    if not args.results.is_dir():
        raise UserError(f"{args.results}: no such folder; expected one of ablate.py --keep")
    if not args.document.is_file():
        raise UserError(f"{args.document}: no such file; expected a document with blocks")
    text = args.document.read_text()
    text = filled(text, args.results, args.seeds)
    runtime.write_atomically(args.document, lambda temporary: temporary.write_text(text))
    print(f"{args.document}: {len(BLOCK.findall(text))} blocks")


if __name__ == "__main__":
    main()
