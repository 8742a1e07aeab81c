"""Train and evaluate the rows of a table of the paper, and print ours beside the paper's.

python ablate.py --table 5                                                 on the synthetic set
python ablate.py --table 8 --seeds 1 --dry-run                             the commands alone
torchrun --nproc_per_node=8 ablate.py --table 8 --dataset rgbnt100 --data-root DIR

train.py's options may follow, for all rows: --short is one such set. Runs are kept in OUT: an
interrupted call goes on where it stopped, and a row that two tables share is trained once.
"""

import argparse
import functools
import hashlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev, variance
from typing import NamedTuple

import evaluate
import prune
import runtime
import train
from losses import SCHEMES
from model import BACKBONES
from runtime import UserError, whole

SHORT = "--epochs 1 1 --epoch-steps 50 18"  # ours: a smoke test, at most 40 s a run on two cores
FIGURES = ("mAP", "R1", "R5", "R10")


class Row(NamedTuple):
    """`flags` are train.py's, None for a row that is only cited.

    `paper`: its mAP, R1, R5, R10 in percent; `millions`: its parameters. `test`: options of
    evaluate.py, for a row that is another look at a trained model; `prune`: options of prune.py, of
    whose targets `target` is this row's; `slip`: what extras.published does as the authors' code;
    `base`: the label of the row that it is compared with, in a table of differences.
    """

    label: str
    flags: str | None
    paper: tuple[float, ...] = ()
    millions: float = 0
    test: str = ""
    prune: str = ""
    target: str = ""
    slip: str = ""
    base: str = ""


class Table(NamedTuple):
    """`differences`: of mAP to each row's base, else the first, for the paper's figures.

    `deviation`: the paper's standard deviation of mAP over all rows but the first, in percent, to
    be printed beside ours.
    """

    title: str
    rows: tuple[Row, ...]
    differences: bool = False
    deviation: float = 0.0


GRAFT_100 = (76.6, 94.3, 95.3, 96.0)
GRAFT_300 = (75.1, 92.1, 94.5, 95.2)
COMPETITORS_100 = (
    Row("HAMNet", "--fusion hamnet", (65.4, 85.5, 87.9, 88.8), 78),
    Row("DANet (cited)", None, (), 78),
    Row("GAFNet (cited)", None, (74.4, 93.4, 94.5, 95.0), 130),
    Row("Multi-Stream ViT", "--fusion multistream", (74.6, 91.3, 92.8, 93.5), 274),
)
COMPETITORS_300 = (
    Row("HAMNet", "--modalities rgb,nir --fusion hamnet", (61.9, 84.0, 86.0, 87.0), 52),
    Row("DANet (cited)", None, (71.0, 89.9, 90.9, 91.5), 52),
    Row("GAFNet (cited)", None, (72.7, 91.9, 93.6, 94.2), 130),
    Row(
        "Multi-Stream ViT",
        "--modalities rgb,nir --fusion multistream",
        (73.7, 91.9, 94.1, 94.8),
        187,
    ),
)
SUBSETS = [",".join(s) for size in (1, 2, 3) for s in combinations(("rgb", "nir", "tir"), size)]

# Section 5.4. The fractions are those of the paper's parameters: (76 - 17.4) / 84.9 M = 0.69, ...
# Ours, of the synthetic set; the rates were chosen on other vehicles
FINETUNING = "--rounds 1 --epoch-steps 40 --schedule cosine --lr"
MASKS, STRUCTURED = f"{FINETUNING} 3e-4", f"--structured {FINETUNING} 1e-3"
PRUNED_100 = {
    "0.69": ((76.4, 94.0, 94.4, 94.6), 76),
    "0.62": ((75.1, 94.1, 94.9, 95.5), 70),
    "0.50": ((73.3, 92.2, 93.2, 94.2), 60),
    "0.34": ((69.0, 90.2, 91.1, 91.7), 46),
}
PRUNED_300 = {
    "0.80": ((75.1, 91.0, 91.8, 92.4), 80),
    "0.70": ((74.7, 90.7, 91.53, 92.1), 71),
    "0.50": ((74.5, 90.1, 91.1, 91.8), 54),
    "0.39": ((72.48, 88.67, 90.0, 91.0), 45),
    "0.28": ((65.9, 84.4, 84.4, 86.1), 36),
    "0.14": ((56.2, 77.7, 79.2, 80.4), 24),
}
PUBLISHED = " ".join(f"{0.8**i:.3f}" for i in range(1, 10))  # 20% of what is left a round
# As much finetuning, next to no pruning
CONTROL = " ".join(f"{1 - i / 1000:.3f}" for i in range(1, 10))


def pruned(fractions: dict, flags: str, options: str, label: str = "") -> tuple[Row, ...]:
    """A row for each fraction of the prunable weights that is left, in one run of prune.py."""
    options = f"--keep {' '.join(fractions)} {options}"
    return tuple(
        Row(f"{fraction} of the weights{label}", flags, *paper, prune=options, target=fraction)
        for fraction, paper in fractions.items()
    )


def pruning_table(title: str, fractions: dict, flags: str, dense: Row) -> Table:
    masks = pruned(fractions, flags, MASKS)
    cited_once = {fraction: () for fraction in fractions}
    structured = pruned(cited_once, flags, STRUCTURED, ", smaller dense model")
    published = pruned(
        {fraction: () for fraction in PUBLISHED.split()}, flags, MASKS, ", 20% a round as published"
    )
    control = pruned(
        {fraction: () for fraction in CONTROL.split()}, flags, MASKS, ": finetuning alone"
    )
    return Table(title, (dense, *masks, *structured, *published, *control))


def unless_triplet(label: str, flags: str, paper: tuple = ()) -> tuple[Row, Row]:
    """A baseline with the triplets it can bear, FFF, and without any."""
    return (
        Row(label, flags, paper),
        Row(f"{label}, no triplet loss (not in the paper)", f"{flags} --alpha 0"),
    )


TABLES = {
    "1": Table("Table 1, RGBNT100", (*COMPETITORS_100, Row("GraFT", "", GRAFT_100, 101))),
    "2": Table(
        "Table 2, RGBN300", (*COMPETITORS_300, Row("GraFT", "--modalities rgb,nir", GRAFT_300, 97))
    ),
    "3": pruning_table(
        "Table 3, pruning on RGBNT100", PRUNED_100, "", Row("dense", "", GRAFT_100, 101)
    ),
    "4": pruning_table(
        "Table 4, pruning on RGBN300",
        PRUNED_300,
        "--modalities rgb,nir",
        Row("dense", "--modalities rgb,nir", (76.6, 94.3, 95.3, 96.0), 97),
    ),
    "5": Table(
        "Table 5, fusion on RGBNT100",
        (
            *unless_triplet(
                "vanilla, new CLS token (text)", "--fusion cls", (60.3, 82.1, 79.8, 83.2)
            ),
            *unless_triplet("vanilla, first modality's CLS (published code)", "--fusion first-cls"),
            *unless_triplet(
                "vanilla, averaged token", "--fusion average", (62.0, 83.9, 85.9, 87.4)
            ),
            *unless_triplet("early fusion (not in the paper)", "--fusion early"),
            *unless_triplet("Multi-Stream ViT", "--fusion multistream"),
            Row("GraFT, FFF", "--triplet FFF"),
            Row("GraFT, no triplet loss (not in the paper)", "--alpha 0"),
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
            *(
                Row(
                    f"{scheme}, tested on the data token (published code)",
                    f"--triplet {scheme}",
                    test="--test-token data",
                )
                for scheme in SCHEMES
                if scheme.startswith("D")
            ),
            Row("FFD, plain distance (published code)", "--plain-distance"),
            *(
                Row(
                    f"{scheme}, plain distance (published code)",
                    f"--triplet {scheme} --plain-distance",
                )
                for scheme in SCHEMES[1:]
            ),
            *(
                Row(
                    f"{scheme}, plain distance, tested on the data token (published code)",
                    f"--triplet {scheme} --plain-distance",
                    test="--test-token data",
                )
                for scheme in SCHEMES
                if scheme.startswith("D")
            ),
        ),
    ),
    "fig1": Table(
        "Fig. 1, parameters and mAP on RGBN300",
        (
            *COMPETITORS_300,
            Row("GraFT", "--modalities rgb,nir", GRAFT_300, 97),
            *pruned(PRUNED_300, "--modalities rgb,nir", MASKS, ", GraFT"),
        ),
    ),
    "backbone": Table(
        "Section 3.2, pretrained weights: DeiT-B, and what --weights names",
        tuple(
            Row(name, f"--backbone {name} --backbone-weights {{weights[{name}]}}")
            for name in BACKBONES
        ),
    ),
    "data-token": Table(
        "Section 6, index of the data token",
        (Row("0", ""), *(Row(i, f"--data-token {i}") for i in ("5", "10", "15", "20", "25"))),
        deviation=0.07,
    ),
    "positives": Table(
        "Section 5.1, positives an anchor, at equal steps",
        (
            Row("1", ""),
            *(Row(n, f"--positives {n} --epoch-steps 123 123") for n in ("2", "4", "8")),
        ),
    ),
    "fusion-tokens": Table(
        "Section 5.2, fusion tokens",
        (Row("1", ""), *(Row(count, f"--fusion-tokens {count}") for count in ("2", "4"))),
    ),
    "stages": Table(
        "Section 4, stages and losses",
        (
            Row("frozen, then unfrozen", ""),
            Row("both stages unfrozen", "--frozen no no"),
            Row("stage 2 alone, for all epochs", "--epochs 0 {epochs}"),
            Row("both stages frozen", "--frozen yes yes"),
            Row("center loss in stage 1, too", "--beta 0.005 0.005"),
            Row("beta 0.0005 (section 4.2)", "--beta 0 0.0005"),
            Row("beta 0.005 (section 5.2)", "--beta 0 0.005"),
            Row("no center loss", "--beta 0 0"),
            Row("plain distance in Eq. (8)", "--plain-distance"),
            Row("FFF", "--triplet FFF"),
            Row("FFF, plain distance in Eq. (8)", "--triplet FFF --plain-distance"),
            Row("Eq. (9)'s norm, as printed", "--center-norm"),
        ),
    ),
    "test": Table(
        "Beyond the paper: mirrored images, re-ranking",
        (
            Row("as trained", ""),
            Row("--flip", "", test="--flip"),
            Row("--rerank", "", test="--rerank"),
            Row("--rerank --flip", "", test="--rerank --flip"),
            Row("plus", "--recipe plus"),
            Row("plus, --rerank", "--recipe plus", test="--rerank"),
        ),
    ),
    "choices": Table(
        "Where the paper is silent or its code differs (README, D1 to D26), by effect on mAP",
        (
            Row("the default", ""),
            Row("D1: gradients never zeroed", "", slip="unzeroed"),
            Row("D2: beta 0.0005 (4.2)", "--beta 0 0.0005"),
            Row("D3: plain distance in Eq. (8)", "--plain-distance"),
            Row("D4: Eq. (9)'s norm, as printed", "--center-norm"),
            Row("D5: RGB files for all sensors of positives and negatives", "", slip="rgb-files"),
            Row("D6: two positives an identity, four negatives in all", "", slip="few-partners"),
            Row("D7: one anchor an identity and camera", "", slip="few-anchors"),
            Row("D8: horizontal and vertical flips", "--flips 0.5 0.5"),
            Row("D8: no flips", "--flips 0 0"),
            Row("D9: erasing, the same place in all sensors", "--erase 0.5"),
            Row(
                "... each sensor apart, against the same place",
                "--erase 0.5",
                slip="erase-apart",
                base="D9: erasing, the same place in all sensors",
            ),
            Row(
                "D10: centroids drawn from N(0, 1), never trained",
                "--center-lr 0",
                slip="random-centroids",
            ),
            Row("D10: rate of the centroids 0.01", "--center-lr 0.01"),
            Row("D11: stage 2 at four times its rate", "--lr 2.5e-3 4.8e-3"),
            Row("D15: a patch as data token", "--data-token 5"),
            Row("D21: cross-entropy on all", "--cross-entropy all"),
            Row("D25: vanilla fusion", "--fusion cls"),
            Row(
                "... its backbone frozen in both stages, against unfrozen",
                "--fusion cls --frozen yes yes",
                base="D25: vanilla fusion",
            ),
            Row("D26: narrower start of the fusion token", "", slip="narrow-token"),
        ),
        differences=True,
    ),
    "plus": Table(
        "Beyond the paper: our recipe, and what becomes of it without each of its parts",
        (
            Row("the paper's recipe", ""),
            Row("the same, features behind the BNNeck", "", test="--bnneck-features"),
            Row("plus", "--recipe plus"),
            Row("without identity-balanced batches", "--recipe plus --sampling triplets"),
            Row(
                "without balanced batches and hard triplets: FFF",
                "--recipe plus --triplet FFF --sampling triplets",
            ),
            Row(
                "without these and cross-entropy on all: FFD, anchors",
                "--recipe plus --sampling triplets --triplet FFD --cross-entropy anchors",
            ),
            Row(
                "without patch dropout: half as many epochs in stage 2",
                "--recipe plus --patch-dropout 0 0",
            ),
            Row("without the cosine schedule", "--recipe plus --schedule sqrt sqrt"),
            Row("without label smoothing", "--recipe plus --label-smoothing 0 0"),
            Row("without BNNeck features", "--recipe plus", test="--no-bnneck-features"),
            Row("two frozen epochs, not 60 frozen steps", "--recipe plus --epochs 2 4"),
            Row("without losses of each sensor", "--recipe plus --modality-losses 0"),
            Row(
                "with the default's backbone",
                "--recipe plus --backbone-weights weights/vit-small-rgb.pth",
            ),
            Row(
                "the paper's recipe with plus's backbone",
                "--backbone-weights weights/vit-small-rgb-4800.pth",
            ),
        ),
    ),
    "missing": Table(
        "Beyond the paper: trained on three sensors, tested on some",
        (
            *(Row(subset, "", test=f"--modalities {subset}") for subset in SUBSETS),
            *(
                Row(f"{subset}, plus", "--recipe plus", test=f"--modalities {subset}")
                for subset in SUBSETS
            ),
            *(
                Row(
                    f"{subset}, plus without losses of each sensor",
                    "--recipe plus --modality-losses 0",
                    test=f"--modalities {subset}",
                )
                for subset in SUBSETS
            ),
            *(
                Row(
                    f"{subset}, modality dropout 0.3",
                    "--modality-dropout 0.3",
                    test=f"--modalities {subset}",
                )
                for subset in SUBSETS
            ),
        ),
    ),
}


# --- a row


def figures(row: Row, seed: int, common: list[str], args: argparse.Namespace) -> dict | None:
    """The figures of one row and seed: those that are kept, else trained for, or gone on with.

    With --from nothing is trained: None where nothing is kept.
    """
    path = (args.from_ or args.keep or args.out) / f"{folder(row, common, args)}.json"
    look = " ".join([row.test, row.prune, row.target]).strip()
    made_by = provenance(tuple(options(row, common, args)), row.slip)
    looks = runtime.by_rank0(lambda: read_figures(path, made_by))
    done = looks.get(look, {}).get(str(seed))
    if done or args.from_:
        return done
    words = command(row, common, seed, args)
    runtime.print0(f"\n{row.label}: {shown(row, words)}")
    metrics = run(row, words)
    kept = {name: metrics[name] for name in (*FIGURES, "params")}
    kept["machine"] = metrics.get("machine", "")  # a run of an older version does not say it
    if runtime.rank() == 0:
        runtime.make_folder(path.parent, "--keep")
        looks = read_figures(path, made_by)  # another process may have added some
        looks.setdefault(look, {})[str(seed)] = kept
        runtime.write_json(path, {"settings": made_by, "looks": looks})
    return kept


# What of train.py's settings makes no other model, or is no setting of a row
ASIDE = {
    "out", "resume", "seed", "device", "workers", "store", "data_root", "checkpoint_every",
    "log_every", "deterministic", "stages",
}  # fmt: skip


@functools.cache  # tables share rows, and a parser is slow to make
def parsed(words: tuple[str, ...]) -> argparse.Namespace:
    return train.parse(list(words))


@functools.cache
def provenance(words: tuple[str, ...], slip: str) -> dict:
    """All settings of a model, as a file has them, and a digest of the weights it starts from."""
    args = parsed(words)
    made_by = {name: value for name, value in vars(args).items() if name not in ASIDE}
    weights = Path(args.backbone_weights)
    if weights.is_file():
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        made_by["backbone_weights"] = f"{weights.name}, sha256 {digest[:16]}"
    return json.loads(json.dumps({**made_by, "slip": slip}, default=str))


def read_figures(path: Path, made_by: dict) -> dict[str, dict[str, dict]]:
    """look -> seed -> figures, of a model with these settings.

    Raises UserError for another kind of file, or a model with others.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        looks, settings = content["looks"], dict(content["settings"])
        for seeds in looks.values():
            assert all(metrics.keys() >= {*FIGURES, "params"} for metrics in seeds.values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path}: not a file of ablate.py's figures ({error!r}); name the folder of --keep"
        ) from None
    for name in settings.keys() & made_by.keys():
        if settings[name] != made_by[name]:
            raise UserError(
                f"{path}: its figures are of {name} {settings[name]}, not {made_by[name]}: remove"
                " it, and what was trained so, or name another --keep"
            )
    return looks


def run(row: Row, words: list[str]) -> dict:
    """Train, test and prune what of a row is not done; returns its figures."""
    args = train.parse(words)
    metrics = kept(args.out / "metrics.json", lambda: train_as(row.slip, args))
    if row.test:
        path = args.out / f"metrics{slug(row.test)}.json"
        again = [str(args.out / "last.pt"), *row.test.split(), "--json", str(path)]
        again += ["--device", args.device, "--store", str(args.store)]
        return kept(path, lambda: evaluate.evaluate(evaluate.parse(again)))
    if row.prune:
        done = {line["label"]: line for line in prune_rows(row, args)}
        return done[row.target]
    return metrics


def train_as(slip: str, args: argparse.Namespace) -> dict:
    """Train as we do, or as the published code does in the respect that `slip` names."""
    if not slip:
        return train.train(args)
    from extras.published import slipped

    with slipped(slip, args):
        return train.train(args)


def kept(path: Path, make) -> dict:
    """What the file holds, or what `make()`, which writes it, returns. The ranks decide alike."""
    with runtime.rank0_first():
        done = path.exists()
    return json.loads(path.read_text()) if done else make()


def prune_rows(row: Row, args: argparse.Namespace) -> list[dict]:
    """The rows of the run of prune.py that this row is one of."""
    folder = args.out / f"pruned{slug(row.prune)}"
    options = [*row.prune.split(), "--out", str(folder), "--resume", "--seed", str(args.seed)]
    options += ["--device", args.device]
    wanted = prune.parse([str(args.out / "last.pt"), *options])
    with runtime.rank0_first():
        results = folder / "results.json"
        rows = json.loads(results.read_text())["rows"] if results.exists() else []
    done = {line["label"] for line in rows}
    return rows if set(wanted.keep) <= done else prune.prune_model(wanted)


def command(row: Row, common: list[str], seed: int, args: argparse.Namespace) -> list[str]:
    """train.py's arguments."""
    out = args.out / folder(row, common, args) / str(seed)
    return [*options(row, common, args), "--seed", str(seed), "--out", str(out), "--resume"]


def options(row: Row, common: list[str], args: argparse.Namespace) -> list[str]:
    """train.py's options that make a row, but for seed and place."""
    epochs = sum(stage.epochs for stage in parsed(tuple(common)).stages)
    own = [word.format(epochs=epochs, weights=args.weights) for word in row.flags.split()]
    return [*(without_backbone(common) if "hamnet" in own else common), *own]


def folder(row: Row, common: list[str], args: argparse.Namespace) -> str:
    """The name of a row's runs and figures."""
    return slug(" ".join([row.slip, *options(row, common, args)])).strip("-") or "default"


def without_backbone(common: list[str]) -> list[str]:
    """Options for all rows, as HAMNet takes them: it has no ViT, and batches of its own."""
    own = list(common)
    for option in ("--backbone", "--backbone-weights", "--batch-size"):
        while option in own:
            at = own.index(option)
            del own[at : at + 2]
    return own


def shown(row: Row, words: list[str]) -> str:
    """The command lines of a row."""
    program = f"-m extras.published {row.slip}" if row.slip else "train.py"
    lines = [f"python {program} {' '.join(words)}"]
    checkpoint = Path(words[words.index("--out") + 1]) / "last.pt"
    if row.test:
        lines.append(f"python evaluate.py {checkpoint} {row.test}")
    if row.prune:
        lines.append(f"python prune.py {checkpoint} {row.prune}")
    return "\n".join(lines)


def slug(flags: str) -> str:
    return re.sub(r"[^\w.,]+", "-", flags)


# --- a table


def measure(key: str, common: list[str], args: argparse.Namespace) -> list[tuple[Row, list[dict]]]:
    """A table's rows and the figures of their seeds, trained for or, with --from, those kept."""
    measured = []
    for row in rows_of(key, args):
        results = [figures(row, seed, common, args) for seed in seeds_of(row, args)]
        measured.append((row, [metrics for metrics in results if metrics]))
    return measured


def text_of(table: Table, measured: list[tuple[Row, list[dict]]]) -> str:
    """A table in Markdown; its title names the machine, and a row where it ran on another."""
    head = ["", "parameters", *(f"{name} %" for name in FIGURES)]
    lines = [cells(row, results) for row, results in measured]
    places = [
        " and ".join(sorted({m.get("machine", "") for m in results})) for _, results in measured
    ]
    (most, _), *_ = Counter(filter(None, places)).most_common(1) or [("", 0)]
    for line, place in zip(lines, places, strict=True):
        line[0] += f" (on {place})" if place not in ("", most) else ""
    if table.differences:
        head.append("mAP against the first row or the one named, ± standard error")
        by_label = {row.label: results for row, results in measured}
        for line, (row, results) in zip(lines, measured, strict=True):
            line[-1] = against(results, by_label.get(row.base or table.rows[0].label, []))
    else:
        head.append("paper: parameters: mAP / R1 / R5 / R10")
    counts = sorted({len(results) for _, results in measured if results}) or [0]
    count = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    title = f"{table.title}; {count} seeds, mean ± standard deviation" + (most and f"; {most}")
    if counts == [0]:
        title = f"{table.title}; not run yet"
    text = f"{title}\n\n{runtime.markdown([head, *lines])}"
    by_seed = list(zip(*(results for _, results in measured[1:]), strict=False))
    if table.deviation and by_seed and len(measured) > 2:
        spread = mean(stdev(100 * metrics["mAP"] for metrics in runs) for runs in by_seed)
        text += "\n\nStandard deviation of mAP over all rows but the first, mean of the seeds:"
        text += f" {spread:.2f} points (the paper: {table.deviation})"
    return text


def cells(row: Row, results: list[dict]) -> list[str]:
    """A line of the table: label, parameters, ours with standard deviation, the paper's."""
    ours = []
    for name in FIGURES:
        values = [100 * metrics[name] for metrics in results]
        shown = f"{mean(values):.1f}" if values else "-"
        ours.append(shown + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
    params = f"{results[0]['params'] / 1e6:.2f} M" if results else "-"
    paper = " / ".join(map(str, row.paper)) or "-"
    return [row.label, params, *ours, f"{row.millions:g} M: {paper}" if row.millions else paper]


def against(results: list[dict], base: list[dict]) -> str:
    """The difference of mean mAPs in points, and its standard error."""
    if min(len(results), len(base)) < 2 or results is base:
        return "-"
    ours, theirs = ([100 * metrics["mAP"] for metrics in runs] for runs in (results, base))
    return f"{mean(ours) - mean(theirs):+.1f} ± {standard_error(ours, theirs):.1f}"


def standard_error(first: list[float], second: list[float]) -> float:
    """Of the difference of two means, by the pooled variance of their values, two at least."""
    freedom = len(first) + len(second) - 2
    pooled = (len(first) - 1) * variance(first) + (len(second) - 1) * variance(second)
    return (pooled / freedom * (1 / len(first) + 1 / len(second))) ** 0.5


def chart(rows: list[tuple[Row, list[dict]]], path: Path) -> None:
    """Fig. 1: mAP over parameters, the paper's figures beside ours."""
    from extras import pictures

    panels = []
    for title, points in (
        ("the paper", [(row.label, row.millions, row.paper[0]) for row, _ in rows if row.paper]),
        ("measured", [
            (row.label, results[0]["params"] / 1e6, 100 * mean(m["mAP"] for m in results))
            for row, results in rows if results
        ]),
    ):  # fmt: skip
        lines: dict[str, tuple[list, list]] = {}
        for label, millions, mAP in points:
            x, y = lines.setdefault("GraFT" if "GraFT" in label else label, ([], []))
            x.append(millions)
            y.append(mAP)
        axes = {"xlabel": "non-zero parameters (millions)", "ylabel": "mAP (%)", "title": title}
        panels.append({"lines": lines, **axes})
    pictures.chart(panels, path)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--table", required=True, choices=(*TABLES, "all"), nargs="+")
    add("--seeds", metavar="N", type=whole(1), default=3, help="runs a row, seeds 0, 1, ...")
    add("--seed", type=whole(0), default=0, help="the first seed")
    add("--short", action="store_true", help=f"a smoke test: {SHORT}")
    add("--dry-run", action="store_true", help="print the commands alone")
    add("--out", type=Path, metavar="DIR", default=Path("runs/ablate"))
    text = (
        "keep the figures in DIR, a small file for each model; what it holds is not trained again"
    )
    add("--keep", type=Path, metavar="DIR", help=text)
    text = "print the tables of the figures kept in DIR, train nothing"
    add("--from", type=Path, metavar="DIR", dest="from_", help=text)
    text = "draw mAP over parameters of the tables' rows, as Fig. 1 does (matplotlib)"
    add("--chart", type=Path, metavar="FILE", help=text)
    text = "rows of the backbone table, e.g. augreg-b16=vit.pth (deit-b: by default fetched)"
    add("--weights", metavar="NAME=FILE", nargs="+", default=[], help=text)
    args, common = parser.parse_known_args()
    if "all" in args.table:  # without the backbones, unless their weights are named
        args.table = [key for key in TABLES if key != "backbone" or args.weights]
    if args.from_ and not args.from_.is_dir():
        raise UserError(f"--from {args.from_}: no such folder; expected one of --keep")
    if "backbone" in args.table and not args.weights:
        raise UserError("--table backbone: needs --weights NAME=FILE, e.g. augreg-b16=vit.pth")
    args.weights = {"deit-b": "deit", **dict(map(read_weights, args.weights))}
    return args, [*(SHORT.split() if args.short else []), *common]


def read_weights(text: str) -> tuple[str, str]:
    """NAME=FILE; raises UserError where there is no such backbone or file."""
    name, _, file = text.partition("=")
    if name not in BACKBONES:
        raise UserError(f"--weights {text}: expected NAME=FILE, NAME one of {', '.join(BACKBONES)}")
    if not Path(file).is_file():
        raise UserError(f"--weights {text}: no such file")
    return name, file


def rows_of(key: str, args: argparse.Namespace) -> list[Row]:
    """The rows of a table; of the backbones those whose weights were named."""
    rows = TABLES[key].rows
    return [row for row in rows if key != "backbone" or args.weights.get(row.label)]


def seeds_of(row: Row, args: argparse.Namespace) -> range:
    """The seeds of a row's runs; none of a row that is only cited."""
    return range(args.seed, args.seed + (0 if row.flags is None else args.seeds))


@runtime.program
def main() -> None:
    args, common = parse()
    device = train.parse(common).device  # refuses train.py's mistakes before anything is trained
    if args.dry_run:
        for key in args.table:
            for row in rows_of(key, args):
                for seed in seeds_of(row, args):
                    print(shown(row, command(row, common, seed, args)))
        return
    if not args.from_:
        runtime.start(device)
    printed = False
    for key in args.table:
        measured = measure(key, common, args)
        if not any(results for _, results in measured):
            continue
        runtime.print0(f"\n{text_of(TABLES[key], measured)}")
        printed = True
        if args.chart and runtime.rank() == 0:
            chart(measured, args.chart)
    if not printed:
        raise UserError(f"--from {args.from_}: holds no figures of these tables and options")


if __name__ == "__main__":
    main()
