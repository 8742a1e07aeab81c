"""Train and evaluate the rows of a table of the paper, and print ours beside the paper's.

python -m experiments.ablate --table 5                                        the synthetic set
python -m experiments.ablate --table 8 --dataset rgbnt100 --data-root DIR --ranks 8
python -m experiments.ablate --rows "mine=--fusion mine" "GraFT="             rows of your own

train.py's options may follow, and then hold for all rows. After an interruption the same command
continues. A model that several rows share is trained once.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev, variance
from threading import Lock

import data
import options
import runtime
from experiments.tables import TABLES, TRIPLETS, WAYS, Options, Row, Table, vanishes
from runtime import UserError, whole

FIGURES = ("mAP", "R1", "R5", "R10")
SEEDS = range(3)  # of the tables in the documents, and of the verdicts
BY_CONSTRUCTION = (
    "By construction: the row only changes what the triplet loss sees, and with the squared"
    " distances of FFD and DDF that loss does nothing. Its difference is noise."
)
writing = Lock()


class Experiment:
    """A row under options for all rows (`common`): its commands, and the figures they give.

    `note` says why the row is not run (as `left_out` does), what it equals, or that it can make no
    difference. `ways` says through what it acts.
    """

    def __init__(self, row: Row, common: list[str]):
        self.row, self.common = row, tuple(common)
        recipe = parsed(self.common)
        flags, base = filled(row.flags or "", recipe), filled(row.base, recipe)
        self.words, self.base = (*common, *flags.split()), (*common, *base.split())
        self.test, self.prune = row.test.split(), filled(row.prune, recipe).split()
        self.look = " ".join([*self.test, *self.prune, row.target]).strip()
        self.changes = set()  # settings that differ from the base's, the slip, test and prune
        self.note = self.left_out = self.unfit(recipe)
        if not self.left_out:
            self.changes = differences(settings(self.words), settings(self.base))
            self.changes |= {row.slip, "test" * bool(self.test), "prune" * bool(self.prune)} - {""}
            if not self.changes and flags != base:
                self.note, self.words = f"equal to {base or 'the default'} here", self.base
            if settings(self.words) == settings(self.common):
                self.words = self.common  # or it would be trained again under another name
        self.name = slug(" ".join([row.slip, *self.words])).strip("-") or "default"
        self.ways = ", ".join(sorted({WAYS.get(name, name) for name in self.changes}))
        self.by_construction = self.ways == TRIPLETS and all(
            vanishes(parsed(words)) for words in (self.words, self.base)
        )
        self.note = self.note or "by construction" * self.by_construction

    def unfit(self, recipe: argparse.Namespace) -> str:
        """Why the row cannot be run with the options for all rows; nothing where it can."""
        if self.row.flags is None:
            return "cited"
        if self.row.backbone not in ("", recipe.backbone):
            return f"for --backbone {self.row.backbone}"
        asked = re.findall(r"--modalities (\S+)", " ".join([*self.words, *self.test]))
        known = recipe.modalities or data.DATASETS[recipe.dataset].modalities
        lacking = {name for names in asked for name in names.split(",")}
        if lacking := lacking - set(known or ("rgb", "nir", "tir")):
            return f"no {' or '.join(sorted(lacking))} here"
        try:
            parsed(self.words), parsed(self.base)
        except UserError as error:
            return str(error)
        return ""

    def commands(self, out: Path, seed: int) -> list[tuple[list[str], Path]]:
        """Training, then another test or pruning; each with the file that it leaves at its end."""
        out = out / self.name / str(seed)
        checkpoint, seeded = str(out / "last.pt"), ["--seed", str(seed), "--resume"]
        device = ["--device", parsed(self.words).device]
        slip = ["-m", "experiments.published", self.row.slip]
        train = [*(slip if self.row.slip else ["train.py"]), *self.words, "--out", str(out)]
        steps = [([*train, *seeded], out / "metrics.json")]
        if self.test:
            path = out / f"metrics{slug(self.row.test)}.json"
            test = ["evaluate.py", checkpoint, *self.test, "--json", str(path), *device]
            steps.append((test, path))
        if self.prune:
            folder = out / f"pruned{slug(' '.join(self.prune))}"
            prune = ["prune.py", checkpoint, *self.prune, "--out", str(folder), *seeded, *device]
            steps.append((prune, folder / "results.json"))
        return steps

    def metrics(self, path: Path) -> dict | None:
        """What a command has left in its file; None before it has."""
        content = json.loads(path.read_text()) if path.exists() else None
        if content and path.name == "results.json":  # of prune.py: one for each target
            return next((row for row in content["rows"] if row["label"] == self.row.target), None)
        return content

    def figures(self, folder: Path, seeds: range) -> list[dict]:
        """The figures of these seeds, as far as `folder` has them."""
        if self.left_out:
            return []
        runs = read_figures(folder / f"{self.name}.json", settings(self.words)).get(self.look, {})
        return [runs[str(seed)] for seed in seeds if str(seed) in runs]

    def keep(self, folder: Path, seed: int, metrics: dict) -> None:
        path, made_by = folder / f"{self.name}.json", settings(self.words)
        with writing:  # another thread may add another seed
            looks = read_figures(path, made_by)
            run = {name: metrics[name] for name in (*FIGURES, "params", "machine")}
            looks.setdefault(self.look, {})[str(seed)] = run
            runtime.make_folder(folder, "--keep")
            content = {"settings": {**made_by, "slip": self.row.slip}, "looks": looks}
            runtime.write_json(path, content)


def filled(flags: Options, recipe: argparse.Namespace) -> str:
    return flags(recipe) if callable(flags) else flags


@functools.cache  # tables share rows, and a parser is slow to make
def parsed(words: tuple[str, ...]) -> argparse.Namespace:
    return options.parse(list(words))


def slug(flags: str) -> str:
    return re.sub(r"[^\w.,]+", "-", flags)


@functools.cache
def settings(words: tuple[str, ...]) -> dict:
    """A model's settings as a file has them, with a digest of the weights it starts from."""
    chosen = options.settings(parsed(words))
    for name in {"seed", *options.FREE}:  # they make no other model
        del chosen[name]
    if (weights := Path(chosen["backbone_weights"])).is_file():
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        chosen["backbone_weights"] = f"{weights.name}, sha256 {digest[:16]}"
    return json.loads(json.dumps(chosen))


def differences(first: dict, second: dict) -> set[str]:
    """The names of the settings that make two models differ; a recipe counts as one of them."""
    names = {name for name, value in first.items() if value != second[name]}
    if first["alpha"] == second["alpha"] == 0:
        names -= {"triplet", "plain_distance"}
    if "positives" in names:  # they take fewer epochs for as many steps
        names -= {"epochs"}
    if names and ("recipe" in names or "hamnet" in (first["fusion"], second["fusion"])):
        return names & {"fusion", "modalities"} | {"recipe"}
    return names


def read_figures(path: Path, made_by: dict) -> dict[str, dict[str, dict]]:
    """look -> seed -> figures. Raises UserError for another kind of file, or other settings."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        looks, kept = content["looks"], content["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a file of ablate's figures; name another --keep") from None
    for name in kept.keys() & made_by.keys():  # older versions had settings that are gone
        # A file of weights that is not at hand has no digest to compare
        absent = str(kept[name]).startswith(f"{made_by[name]}, sha256 ")
        if kept[name] != made_by[name] and not absent:
            other = f"its figures are of {name} {kept[name]}, not {made_by[name]}"
            raise UserError(f"{path}: {other}; remove it and its runs, or name another --keep")
    return looks


# --- running


def run_all(rows: list[Experiment], args: argparse.Namespace) -> list[Exception]:
    """Every model once, with all tests of it; returns what ended those that failed."""
    models: dict[tuple[str, int], list[Experiment]] = {}
    for seed in args.seeds:
        for row in rows:
            if not row.left_out:
                models.setdefault((row.name, seed), []).append(row)
    if args.parallel > 1:  # or each would take all cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, runtime.num_cores() // args.parallel)))
    with ThreadPoolExecutor(args.parallel) as pool:
        jobs = [pool.submit(run_model, same, seed, args) for (_, seed), same in models.items()]
        try:
            return [error for job in jobs if (error := job.exception())]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def run_model(rows: list[Experiment], seed: int, args: argparse.Namespace) -> None:
    for row in rows:
        if row.figures(args.keep, range(seed, seed + 1)):
            continue
        for command, path in row.commands(args.out, seed):
            if not row.metrics(path):
                launch(command, path.parent, args)
        row.keep(args.keep, seed, row.metrics(path))


def launch(command: list[str], folder: Path, args: argparse.Namespace) -> None:
    """Run a program; of several side by side the output goes to a file in `folder`."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    print(shown(command), flush=True)
    runtime.make_folder(folder, "--out")
    log = folder / "output.txt" if args.parallel > 1 else None
    # Ctrl-C and a job queue's signals reach the programs themselves, which save where they are
    with open(log, "a") if log else nullcontext() as file:
        launched = [sys.executable, *(ranks if args.ranks > 1 else []), *command]
        code = subprocess.run(launched, stdout=file, stderr=file).returncode
    if code:
        raise UserError(f"{shown(command)}: exit code {code}" + (f"; see {log}" if log else ""))


def shown(command: list[str]) -> str:
    return f"python {' '.join(command)}"


# --- a table


def text_of(table: Table, rows: list[Experiment], folder: Path, seeds: range) -> str:
    """A table in Markdown. Its title names the machine, a row only where it ran on another."""
    measured = [(row, row.figures(folder, seeds)) for row in rows]
    machines = Counter(machine(runs) for _, runs in measured if runs)
    usual = max(machines, key=machines.get, default="")
    last = ["paper: parameters: mAP / R1 / R5 / R10"]
    if table.differences:
        last = ["mAP against the default or what is named, ± standard error", "acts by"]
    lines = [["", "parameters", *(f"{name} %" for name in FIGURES), *last]]
    for row, runs in measured:
        label, params = row.row.label, f"{runs[0]['params'] / 1e6:.2f} M" if runs else "-"
        notes = [row.note, f"on {machine(runs)}" if runs and machine(runs) != usual else ""]
        label += "".join(f" ({note})" for note in notes if note)
        ours = [spread([100 * metrics[name] for metrics in runs]) for name in FIGURES]
        paper = " / ".join(map(str, row.row.paper)) or "-"
        last = [f"{row.row.millions:g} M: {paper}" if row.row.millions else paper]
        if table.differences:
            last = [against_base(row, folder, seeds), row.ways or "-"]
        lines.append([label, params, *ours, *last])
    title = table.title
    if counts := {len(runs) for _, runs in measured if runs}:
        numbers = " to ".join(map(str, sorted({min(counts), max(counts)})))
        seeds_of = "1 seed" if numbers == "1" else f"{numbers} seeds"
        spread_of = "" if numbers == "1" else ", mean ± standard deviation"
        title += f"; {seeds_of}{spread_of}; {usual}"
    parts = [title, runtime.markdown(lines)]
    if any(row.by_construction for row in rows):
        parts.append(BY_CONSTRUCTION)
    return "\n\n".join(parts)


def machine(runs: list[dict]) -> str:
    return " and ".join(sorted({metrics["machine"] for metrics in runs}))


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def against_base(row: Experiment, folder: Path, seeds: range) -> str:
    if row.by_construction or not row.changes:
        return "by construction" if row.changes else "-"
    base = row.row.base
    pair = (row, Experiment(Row("", base), row.common))
    difference = against(*(one.figures(folder, seeds) for one in pair))
    return f"{difference} ({base})" if base and difference != "-" else difference


def against(runs: list[dict], base: list[dict]) -> str:
    """The difference of mean mAPs in points, and its standard error."""
    if min(len(runs), len(base)) < 2:
        return "-"
    ours, theirs = ([100 * metrics["mAP"] for metrics in some] for some in (runs, base))
    return f"{mean(ours) - mean(theirs):+.1f} ± {standard_error(ours, theirs):.1f}"


def standard_error(first: list[float], second: list[float]) -> float:
    """Of the difference of two means, by the pooled variance of their values, two at least."""
    freedom = len(first) + len(second) - 2
    pooled = (len(first) - 1) * variance(first) + (len(second) - 1) * variance(second)
    return (pooled / freedom * (1 / len(first) + 1 / len(second))) ** 0.5


def chart(rows: list[Experiment], args: argparse.Namespace) -> None:
    """Fig. 1: mAP over parameters, the paper's figures beside ours."""
    from extras import pictures

    paper, measured = {}, {}  # label -> (millions of parameters), (mAPs)
    for row in rows:
        label = "GraFT" if "GraFT" in row.row.label else row.row.label
        points = [(paper, row.row.millions, row.row.paper[0])] if row.row.paper else []
        if runs := row.figures(args.keep, args.seeds):
            mAP = 100 * mean(metrics["mAP"] for metrics in runs)
            points.append((measured, runs[0]["params"] / 1e6, mAP))
        for lines, x, y in points:
            xs, ys = lines.setdefault(label, ([], []))
            xs.append(x)
            ys.append(y)
    axes = {"xlabel": "non-zero parameters (millions)", "ylabel": "mAP (%)"}
    panels = [{"title": "the paper", "lines": paper}, {"title": "measured", "lines": measured}]
    pictures.chart([{**panel, **axes} for panel in panels], args.chart)


# --- command line


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m experiments.ablate")
    add = parser.add_argument
    tables = (*TABLES, "all")
    add("--table", metavar="TABLE", choices=tables, nargs="+", default=[], help=", ".join(tables))
    text = "rows of your own, each a label and train.py's options; all are compared with the last"
    add("--rows", metavar="LABEL=OPTIONS", nargs="+", default=[], help=text)
    add("--seeds", metavar="N", type=whole(1), default=len(SEEDS), help="take seeds 0 to N - 1")
    add("--dry-run", action="store_true", help="only print the commands")
    add("--out", type=Path, metavar="DIR", default=Path("runs/ablate"), help="folder of the runs")
    text = "keep the figures in DIR (default: OUT); what it holds is not trained again"
    add("--keep", type=Path, metavar="DIR", help=text)
    text = "only print the tables of the figures kept in DIR"
    add("--from", type=kept_folder, metavar="DIR", dest="from_", help=text)
    text = "run N models side by side, their output in files: for small models on a large GPU"
    add("--parallel", metavar="N", type=whole(1), default=1, help=text)
    add("--ranks", metavar="N", type=whole(1), default=1, help="run each program on N GPUs")
    text = "draw mAP over parameters of a table's rows, as Fig. 1 does (matplotlib)"
    add("--chart", type=Path, metavar="FILE", help=text)
    args, args.common = parser.parse_known_args()
    runtime.check_output(args.chart, "--chart", (".png", ".pdf", ".svg"))
    if not args.table + args.rows:
        parser.error("expected --table or --rows")
    args.seeds = range(args.seeds)
    args.keep = args.from_ or args.keep or args.out
    parsed(tuple(args.common))  # refuses train.py's mistakes before anything is trained
    return args


def kept_folder(text: str) -> Path:
    """An option's type: a folder that ablate has kept figures in."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder; expected one of ablate --keep")
    return Path(text)


def chosen_tables(args: argparse.Namespace) -> list[tuple[Table, list[Experiment]]]:
    tables = [TABLES[key] for key in (TABLES if "all" in args.table else args.table)]
    if args.rows:
        pairs = [text.partition("=")[::2] for text in args.rows]
        rows = [Row(label, flags, base=pairs[-1][1]) for label, flags in pairs]
        tables.append(Table("Own rows", rows, differences=True))
    return [(table, [Experiment(row, args.common) for row in table.rows]) for table in tables]


@runtime.program
def main() -> None:
    args = parse()
    tables = chosen_tables(args)
    rows = [row for _, rows in tables for row in rows]
    if args.dry_run:
        for row in rows:
            print(f"# {row.row.label}" + (f" ({row.note})" if row.note else ""))
            for seed in args.seeds if not row.left_out else ():
                print(*(shown(command) for command, _ in row.commands(args.out, seed)), sep="\n")
        return
    failed = [] if args.from_ else run_all(rows, args)
    empty = True
    for table, rows in tables:
        if not any(row.figures(args.keep, args.seeds) for row in rows):
            continue
        empty = False
        print(f"\n{text_of(table, rows, args.keep, args.seeds)}")
        if args.chart:
            chart(rows, args)
    if failed:
        raise UserError(f"{len(failed)} models failed; the first: {failed[0]}")
    if empty:
        raise UserError(f"{args.keep}: holds no figures of these tables and options")


if __name__ == "__main__":
    main()
