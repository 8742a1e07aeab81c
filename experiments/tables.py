"""The rows of every table, as data: ablate.py trains them and prints ours beside the paper's.

A row's options are added to the data set's recipe. Where they depend on it, as "four times its
rate" does, they are a function of the recipe's settings.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial
from itertools import combinations
from math import gcd
from typing import NamedTuple

import data

Options = str | Callable[[Namespace], str]


class Row(NamedTuple):
    """A model, or a test of it under other conditions, and the model that it is compared with."""

    label: str
    flags: Options | None = ""  # of train.py; None: the paper's figures alone
    paper: tuple[float, ...] = ()  # mAP, R1, R5, R10 in percent
    millions: float = 0  # of the paper's parameters
    base: Options = ""  # train.py's options of the model that it is compared with
    slip: str = ""  # of experiments.published
    test: str = ""  # options of evaluate.py
    prune: Options = ""  # options of prune.py ...
    target: str = ""  # ... and which of its targets this row is
    backbone: str = ""  # the only one for which the row makes sense


class Table(NamedTuple):
    title: str
    rows: list[Row]
    differences: bool = False  # print mAP against each row's base instead of the paper's figures


# --- through what a setting, a slip or another test acts on the figures

TRIPLETS = "triplet loss"
REACH = {
    TRIPLETS: "alpha triplet plain_distance data_token positives rgb-files few-partners",
    "model": "fusion fusion_tokens backbone image_size",
    "optimizer": "lr schedule unzeroed",
    "frozen backbone": "frozen",
    "center loss": "beta center-norm random-centroids",
    "cross-entropy": "cross_entropy label_smoothing",
    "images": "flips erase erase-apart",
    "sensors": "modalities",
    "first weights": "backbone_weights narrow-token",
    "anchors": "few-anchors",
    "patches": "patch_dropout stride",
    "length": "epochs epoch_steps",
    "test alone": "test",
    "pruning": "prune",
}
WAYS = {name: way for way, names in REACH.items() for name in names.split()}


def vanishes(settings: Namespace) -> bool:
    """Whether the triplet loss does nothing under these settings (Eq. (8), section 4.3).

    With squared distances, the losses of FFD and DDF are next to 0 from the first step on, because
    fusion and data tokens lie far apart whatever the identity (measured by experiments.ffd). A
    change that only the triplet loss sees then leaves the model as it is (see experiments.reach).
    """
    apart = settings.triplet in ("FFD", "DDF") and not settings.plain_distance
    return settings.alpha == 0 or (apart and settings.fusion == "graft")


# --- rows that are made of others, or depend on the data set


def on(base: str, rows: list[Row], label: str = "") -> list[Row]:
    """The rows with these options, too; each is compared with a model of these options alone."""
    added = []
    for row in rows:
        flags = None if row.flags is None else f"{base} {row.flags}".strip()
        added.append(row._replace(label=row.label + label, flags=flags, base=base))
    return added


def pruned(fractions: dict, base: str, label: str = "", structured: bool = False) -> list[Row]:
    """A row for each fraction of the prunable weights that is left, all by one run of prune.py."""
    # On the synthetic set this is what did best on other vehicles: 40 steps a round, at 3e-4 for
    # masks and at 1e-3 for a smaller dense model
    factor, kind = (5 / 6, "--structured ") if structured else (1 / 4, "")

    def prune(recipe: Namespace) -> str:
        triplets = num_samples(recipe.dataset, recipe.data_root) * recipe.positives
        steps = min(triplets // recipe.batch_size, recipe.epoch_steps[1] or triplets)
        length = f"--rounds 1 --epoch-steps {round(0.325 * steps)} --schedule cosine"
        return f"--keep {' '.join(fractions)} {kind}{length} --lr {factor * recipe.lr[1]:.3g}"

    return [
        Row(f"{left} of the weights{label}", base, *paper, base, prune=prune, target=left)
        for left, paper in fractions.items()
    ]


@cache
def num_samples(dataset: str, root: str) -> int:
    """Training samples of the published data set; of other data sets, of those in `root`."""
    counts = data.DATASETS[dataset].counts or {"synthetic": (3200,)}.get(dataset)
    return counts[0] if counts else len(data.load_dataset(dataset, root, need=("train",)).train)


def positives(count: int, recipe: Namespace) -> str:
    """FFF with `count` positives per anchor and epoch, in fewer epochs: as many steps."""
    passes = [n * recipe.positives for n in recipe.epochs]  # of each anchor
    whole = 4 // gcd(4, *passes)  # so that 4 positives, too, take whole epochs
    first, second = (whole * n // count for n in passes)
    return f"{FFF} --positives {count} --epochs {first} {second}"


# --- Tables 1 to 8

PAIR, PLUS = "--modalities rgb,nir", "--recipe plus"
PLAIN, FFF = "--plain-distance", "--triplet FFF"
NOT_PRINTED, AS_PUBLISHED = " (not in the paper)", " (published code)"
GRAFT_100, GRAFT_300 = (76.6, 94.3, 95.3, 96.0), (75.1, 92.1, 94.5, 95.2)
TABLE_1 = [
    Row("HAMNet", "--fusion hamnet", (65.4, 85.5, 87.9, 88.8), 78),
    Row("DANet", None, (), 78),
    Row("GAFNet", None, (74.4, 93.4, 94.5, 95.0), 130),
    Row("Multi-Stream ViT", "--fusion multistream", (74.6, 91.3, 92.8, 93.5), 274),
    Row("GraFT", "", GRAFT_100, 101),
]
TABLE_2 = [
    Row("HAMNet", "--fusion hamnet", (61.9, 84.0, 86.0, 87.0), 52),
    Row("DANet", None, (71.0, 89.9, 90.9, 91.5), 52),
    Row("GAFNet", None, (72.7, 91.9, 93.6, 94.2), 130),
    Row("Multi-Stream ViT", "--fusion multistream", (73.7, 91.9, 94.1, 94.8), 187),
    Row("GraFT", "", GRAFT_300, 97),
]
# Section 5.4. The fractions are those of the paper's parameters: (76 - 17.4) / 84.9 M = 0.69, ...
TABLE_3 = {
    "0.69": ((76.4, 94.0, 94.4, 94.6), 76),
    "0.62": ((75.1, 94.1, 94.9, 95.5), 70),
    "0.50": ((73.3, 92.2, 93.2, 94.2), 60),
    "0.34": ((69.0, 90.2, 91.1, 91.7), 46),
}
TABLE_4 = {
    "0.80": ((75.1, 91.0, 91.8, 92.4), 80),
    "0.70": ((74.7, 90.7, 91.53, 92.1), 71),
    "0.50": ((74.5, 90.1, 91.1, 91.8), 54),
    "0.39": ((72.48, 88.67, 90.0, 91.0), 45),
    "0.28": ((65.9, 84.4, 84.4, 86.1), 36),
    "0.14": ((56.2, 77.7, 79.2, 80.4), 24),
}
NO_FIGURES = ((), 0)
# 20% of what is left a round; and as much finetuning with next to no pruning
PUBLISHED = {f"{0.8**i:.3f}": NO_FIGURES for i in range(1, 10)}
CONTROL = {f"{1 - i / 1000:.3f}": NO_FIGURES for i in range(1, 10)}


def pruning_rows(base: str, dense: Row, fractions: dict) -> list[Row]:
    rows = on(base, [dense]) + pruned(fractions, base)
    smaller = dict.fromkeys(fractions, NO_FIGURES)
    rows += pruned(smaller, base, ", smaller dense model", structured=True)
    rows += pruned(PUBLISHED, base, ", 20% a round as published")
    return rows + pruned(CONTROL, base, ": finetuning alone")


FUSIONS = [
    Row("vanilla, new CLS token", "--fusion cls", (60.3, 82.1, 79.8, 83.2)),
    Row("vanilla, first modality's CLS" + AS_PUBLISHED, "--fusion first-cls"),
    Row("vanilla, averaged token", "--fusion average", (62.0, 83.9, 85.9, 87.4)),
    Row("early fusion" + NOT_PRINTED, "--fusion early"),
    Row("mean of the sensors' CLS tokens, no encoder" + NOT_PRINTED, "--fusion late"),
    Row("Multi-Stream ViT", "--fusion multistream"),
    Row("GraFT", FFF),
]
TABLE_5 = [Row(f"{label}, FFF", flags, paper) for label, flags, paper, *_ in FUSIONS]
for label, flags, *_ in FUSIONS[:-1]:
    TABLE_5 += on(flags, [Row(f"{label}, no triplet loss", "--alpha 0")])
TABLE_5 += [
    Row("GraFT, no triplet loss" + NOT_PRINTED, "--alpha 0"),
    Row("GraFT, FFD", "", (76.4, 94.0, 94.4, 94.6)),
]
TABLE_6 = [
    Row("T", "--modalities tir", (38.6, 63.5, 71.0, 74.7)),
    Row("N", "--modalities nir", (39.6, 60.4, 64.2, 66.5)),
    Row("R", "--modalities rgb", (49.3, 70.3, 75.0, 77.4)),
    Row("R+N", PAIR, (54.3, 76.4, 79.6, 81.6)),
    Row("N+T", "--modalities nir,tir", (62.7, 86.8, 89.1, 90.3)),
    Row("R+T", "--modalities rgb,tir", (67.0, 89.2, 91.3, 92.7)),
    Row("R+N+T", "", GRAFT_100),
]
TABLE_7 = [
    Row("N", "--modalities nir", (51.3, 74.1, 77.2, 79.5), base=PAIR),
    Row("R", "--modalities rgb", (60.4, 81.5, 83.9, 86.8), base=PAIR),
    Row("R+N", PAIR, (75.1, 91.4, 92.3, 92.9), base=PAIR),
]
TABLE_8 = [
    Row("FFD", "", GRAFT_100),
    Row("DDD", "--triplet DDD", (59.0, 85.5, 89.2, 90.4)),
    Row("FFF", "--triplet FFF", (57.5, 81.2, 84.6, 86.2)),
    Row("FDD", "--triplet FDD", (62.2, 80.5, 87.3, 88.9)),
    Row("DFF", "--triplet DFF", (63.6, 86.9, 89.2, 90.0)),
    Row("DFD", "--triplet DFD", (60.6, 85.2, 88.2, 90.0)),
    Row("DDF", "--triplet DDF", (57.6, 83.7, 86.9, 88.6)),
    Row("FDF", "--triplet FDF", (38.2, 60.1, 63.0, 65.0)),
]
BY_DISTANCE = on(PLAIN, [row._replace(paper=()) for row in TABLE_8], ", plain distance")
TESTED_ON_DATA = [
    row._replace(label=f"{row.label}, tested on the data token", paper=(), test="--features data")
    for row in TABLE_8 + BY_DISTANCE
    if row.label.startswith("D")  # as in the published code
]

# --- where the paper is silent, and beyond it

D5 = Row("D5: RGB files for all sensors of positives and negatives", slip="rgb-files")
D6 = Row("D6: two positives an identity, four negatives in all", slip="few-partners")
D15 = Row("D15: a patch as data token", "--data-token 5")
CHOICES = [
    Row("the default"),
    Row("D1: gradients never zeroed", slip="unzeroed"),
    Row("D2: beta 0.0005 (4.2)", "--beta 0 0.0005"),
    Row("D2: beta 0.005 (5.2)", "--beta 0 0.005"),
    Row("D3: plain distance in Eq. (8)", PLAIN),
    Row("D4: Eq. (9)'s norm, as printed", slip="center-norm"),
    *(D5, D6, D15),
    *on(PLAIN, [D5, D6, D15], ", plain distance"),
    *on(FFF, [D5, D6], ", FFF"),
    Row("D7: one anchor an identity and camera", slip="few-anchors"),
    Row("D8: horizontal and vertical flips", "--flips 0.5 0.5"),
    Row("D8: horizontal flips", "--flips 0.5 0"),
    Row("D8: no flips", "--flips 0 0"),
    Row("D9: no erasing", "--erase 0"),
    Row("D9: erasing, the same place in all sensors", "--erase 0.5"),
    *on("--erase 0.5", [Row("D9: erasing, each sensor apart", slip="erase-apart")]),
    Row("D10: centroids drawn from N(0, 1), never trained", slip="random-centroids"),
    Row("D11: stage 2 at four times its rate", lambda r: f"--lr {r.lr[0]:g} {4 * r.lr[1]:g}"),
    Row("D21: cross-entropy on all", "--cross-entropy all"),
    Row("D25: vanilla fusion", "--fusion cls"),
    *on("--fusion cls", [Row("D25: the same, frozen in both stages", "--frozen yes yes")]),
    Row("D26: narrower start of the fusion token", slip="narrow-token"),
]
STAGES = [
    Row("frozen, then unfrozen"),
    Row("both stages unfrozen", "--frozen no no"),
    Row("stage 2 alone, for all epochs", lambda r: f"--epochs 0 {sum(r.epochs)}"),
    Row("both stages frozen", "--frozen yes yes"),
    Row("center loss in stage 1, too", lambda r: f"--beta {r.beta[1]:g} {r.beta[1]:g}"),
    Row("no center loss", "--beta 0 0"),
]
SMALL_VIT = "--backbone-weights weights/vit-small-rgb"
OVERLAP = "--stride 8 --patch-dropout 0.8"
APART = "--stride 0 --patch-dropout 0.35"  # a step sees as many patches
WITHOUT = [
    Row("Eq. (6) in place of confidences, with center loss", "--fusion graft"),
    Row("without batch-hard triplets", "--triplet contrastive"),
    Row("with patches that do not overlap", APART, backbone="small"),
    Row("with the default's backbone", f"{SMALL_VIT}.pth", backbone="small"),
    Row("without encoders, on the sensors' CLS tokens", "--fusion weighted-late"),
]
PARTS_OF_PLUS = [
    Row("the paper's recipe"),
    Row("the same, features behind the BNNeck", test="--features bnneck"),
    Row("the same with plus's backbone", f"{SMALL_VIT}-4800.pth", backbone="small"),
    Row("and with its patches", f"{SMALL_VIT}-4800.pth {OVERLAP}", backbone="small"),
    Row("plus", PLUS),
    *on(PLUS, WITHOUT),
]
OWN = "--recipe own"  # on DINOv2-S, whose weights --backbone-weights names
SMALL_ON_PHOTOS = f"--backbone small {SMALL_VIT}.pth --image-size 64 128 --lr 2.5e-3 1.2e-3"
FUSED = [row._replace(label=row.label.replace(NOT_PRINTED, ""), paper=()) for row in TABLE_5]
BOTH_AND_EACH = [Row("both"), *(Row(name, test=f"--modalities {name}") for name in ("rgb", "tir"))]
LONG, AS_LONG = f"{OWN} --epochs 10 1", ", in as many steps as plus"
SCENES = [
    *on(OWN, BOTH_AND_EACH, ", GraFT, FFD"),
    *on(OWN, FUSED[:-1]),
    *on(LONG, BOTH_AND_EACH, f", GraFT, FFD{AS_LONG}"),
    *on(LONG, [Row(f"averaged token, no triplet loss{AS_LONG}", "--fusion average --alpha 0")]),
    *on(PLUS, BOTH_AND_EACH, ", plus"),
    *on(PLUS, [WITHOUT[-1]], ", plus"),
    *on(f"{OWN} {SMALL_ON_PHOTOS}", [Row("small ViT, GraFT, FFD")]),
    *on(f"{PLUS} {SMALL_ON_PHOTOS} --stride 0 --patch-dropout 0", [Row("small ViT, plus")]),
]
BRIEF = f"{OWN} --epochs 1 1 --epoch-steps 60 60"
REAL_WEIGHTS = [
    *on(BRIEF, [*FUSED, Row("GraFT, both stages unfrozen", "--frozen no no")]),
    *on(BRIEF, [Row(f"{name} alone", f"--modalities {name}") for name in ("rgb", "nir", "tir")]),
]
ADAPTED = [
    Row("DINOv2-S", f"{OWN} --backbone-weights dinov2-s14.pth"),
    Row("DINOv2-S, trained on the pairs first", f"{OWN} --backbone-weights runs/pairs"),
]
LOOKS = [
    Row("as trained"),
    *(Row(look, test=look) for look in ("--flip", "--rerank", "--rerank --flip")),
    Row("plus", PLUS),
    Row("plus, --rerank", PLUS, base=PLUS, test="--rerank"),
]
SUBSETS = [",".join(s) for size in (1, 2, 3) for s in combinations(("rgb", "nir", "tir"), size)]
ON_SUBSETS = [Row(subset, test=f"--modalities {subset}") for subset in SUBSETS]
MISSING = ON_SUBSETS + on(PLUS, ON_SUBSETS, ", plus")
INDICES = [Row(str(i), f"--data-token {i}" if i else "") for i in range(0, 30, 5)]
INDICES += on(PLAIN, [INDICES[0], INDICES[1], INDICES[-1]], ", plain distance")
FUSION_TOKENS = [Row("1"), Row("2", "--fusion-tokens 2"), Row("4", "--fusion-tokens 4")]
FIG_1 = on(PAIR, TABLE_2) + pruned(TABLE_4, PAIR, ", GraFT")
DATA_TOKEN = (
    "Section 6, index of the data token (in the paper, mAP over the indices 5, 10, ..., 25 has a"
    " standard deviation of 0.07 points)"
)
POSITIVES = [Row(f"{n}, FFF", partial(positives, n), base=partial(positives, 1)) for n in (1, 4)]

SCHEMES = [*TABLE_8, Row("no triplet loss", "--alpha 0"), *BY_DISTANCE, *TESTED_ON_DATA]
DENSE_100, DENSE_300 = Row("dense", "", GRAFT_100, 101), Row("dense", "", GRAFT_100, 97)
TABLES = {
    "1": Table("Table 1, RGBNT100", TABLE_1),
    "2": Table("Table 2, RGBN300", on(PAIR, TABLE_2)),
    "3": Table("Table 3, pruning on RGBNT100", pruning_rows("", DENSE_100, TABLE_3)),
    "4": Table("Table 4, pruning on RGBN300", pruning_rows(PAIR, DENSE_300, TABLE_4)),
    "5": Table("Table 5, fusion on RGBNT100", TABLE_5),
    "6": Table("Table 6, RGBNT100, trained and tested on the sensors named", TABLE_6),
    "7": Table("Table 7, RGBN300, trained and tested on the sensors named", TABLE_7),
    "8": Table("Table 8, tokens of anchor, positive and negative, RGBNT100", SCHEMES),
    "fig1": Table("Fig. 1, parameters and mAP on RGBN300", FIG_1),
    "data-token": Table(DATA_TOKEN, INDICES),
    "positives": Table("Section 5.1, positives per anchor, in the same number of steps", POSITIVES),
    "fusion-tokens": Table("Section 5.2, fusion tokens", FUSION_TOKENS),
    "stages": Table("Section 4, stages and the center loss", STAGES),
    "test": Table("Beyond the paper: mirrored images, re-ranking", LOOKS),
    "choices": Table("Where the paper is silent or its code differs (D1 to D26)", CHOICES, True),
    "plus": Table("Beyond the paper: our recipe, and without some of its parts", PARTS_OF_PLUS),
    "scenes": Table("Beyond the paper: real photos of which a sensor often shows nothing", SCENES),
    "weights": Table("Beyond the paper: the synthetic set, real pretraining", REAL_WEIGHTS),
    "adapted": Table("Beyond the paper: few labelled photos, after pairs without labels", ADAPTED),
    "missing": Table("Beyond the paper: trained on all sensors, tested on those named", MISSING),
}
