"""Every option of train.py once, and the recipes: what they change of the options' defaults.

The defaults are the paper's for RGBNT100. `python train.py --dataset NAME --recipe NAME --help`
shows the values that a recipe takes. A value without an option is a constant of its recipe.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import data
import runtime
from losses import SCHEMES
from model import FUSIONS
from runtime import UserError, real, whole

# --- recipes. Pairs are for stage 1 and stage 2

WEIGHTS = Path(__file__).parent / "weights"  # made by synthetic.pretrain, for the synthetic set
CONSTANTS = {
    "adam_betas": (0.839, 0.978, 0.836, 0.979),  # two of each stage; published code
    "cooldown": 0.1,  # share of the steps at the end of the sqrt schedule; paper, 5.2
    "center_lr": 1e-3,  # rate of the centroids, see D10
    "margin": None,  # of the hardest triplets; None: a soft one, Eq. (8)
    "samples": 6,  # of each identity, with --triplet hardest
}
PAPER = {  # data set -> what the paper's recipe changes for it
    "synthetic": {  # ours: what reaches most in under five minutes on two CPU cores
        "backbone": "small",
        "backbone_weights": str(WEIGHTS / "vit-small-rgb.pth"),
        "image_size": (64, 128),
        "positives": 1,
        # In so few steps, vehicles upside down and erased parts cost more than they give
        "flips": (0.5, 0.0),
        "erase": 0.0,
        "batch_size": 26,  # what one GPU of the paper takes: 123 steps an epoch
        "warmup_steps": 30,
        "epochs": (2, 2),
        # Some hundred times the paper's: 492 steps have to do where the paper takes 33,300
        "lr": (2.5e-3, 1.2e-3),
        "weight_decay": (0.05, 0.05),
        "adam_betas": (0.9, 0.98, 0.9, 0.98),
        # A rate this high must come down again; the paper's constant one is tiny
        "schedule": ("sqrt", "sqrt"),
        "beta": (0.0, 0.005),  # paper, 5.2; see D2
    },
    "rgbn300": {  # published code's settings for this set; batch and positives: paper, see D19
        "lr": (2e-5, 5e-6),
        "weight_decay": (0.001, 1.58e-4),
        "adam_betas": (0.839, 0.978, 0.759, 0.986),
    },
    "rgbnt201": {"image_size": (256, 128)},  # customary, as for all persons
    "msvr310": {"image_size": (128, 256)},
    "wmveid863": {"image_size": (128, 256)},
    "market1501": {"image_size": (256, 128)},
}
PLUS = {  # ours: known re-ID techniques together; experiments.ablate --table plus
    "batch_size": 26,  # 78 images: 13 identities x 6
    "triplet": "hardest",
    "cross_entropy": "all",
    "schedule": ("cosine", "cosine"),
    "label_smoothing": (0.1, 0.1),
    "features": "bnneck",
    "modality_losses": 1.0,
}
PLUS_SYNTHETIC = {
    # The same ViT, pretrained longer on four times the vehicles
    "backbone_weights": str(WEIGHTS / "vit-small-rgb-4800.pth"),
    "patch_dropout": (0.0, 0.5),
    "epochs": (1, 4),
    "epoch_steps": (60, 0),  # frozen for 60 steps, until the new parts have warmed up
}
# On real data, not run here. DeMo's: Adam at 3.5e-4, the backbone at 5e-6, a cosine, images of
# 128x256 (persons 256x128); its and TOP-ReID's: flips, erasing, pad by 10 and crop. Ours: 6 samples
# an identity (theirs 16), triplets by squared distances, features behind the BNNeck
PLUS_REAL = {
    "image_size": (128, 256),
    "positives": 1,
    "batch_size": 42,  # 126 images: 21 identities x 6
    "per_pass": 42,  # or the hardest triplets would be those of half a batch
    "flips": (0.5, 0.0),
    "pad": 10,
    "epochs": (5, 35),
    "warmup_steps": 200,
    "lr": (3.5e-4, 3.5e-4),
    "backbone_lr": (0.0, 1e-5),
    "weight_decay": (1e-4, 1e-4),
    "adam_betas": (0.9, 0.999, 0.9, 0.999),
}
PERSONS = {"image_size": (256, 128), "modality_losses": 0.0}  # they cost TOP-ReID 7 mAP there
PLUS_OF = {  # data set -> what plus changes: small sets take more epochs for as many steps
    "synthetic": PLUS_SYNTHETIC,
    "rgbn300": {**PLUS_REAL, "epochs": (2, 12)},
    "rgbnt201": {**PLUS_REAL, **PERSONS, "epochs": (10, 75)},
    "msvr310": {**PLUS_REAL, "epochs": (40, 290)},
    "wmveid863": {**PLUS_REAL, "epochs": (13, 90)},
    "market1501": {**PLUS_REAL, **PERSONS, "epochs": (3, 24)},
}


def recipe(name: str, dataset: str, fusion: str) -> dict:
    """What a recipe changes of the options' defaults."""
    changes = {**CONSTANTS, **PAPER.get(dataset, {})}
    if name == "plus":
        changes |= {**PLUS, **PLUS_OF.get(dataset, PLUS_REAL)}
    if fusion == "hamnet":
        changes |= runtime.imported("experiments.hamnet.recipe")(dataset)
    if fusion not in OWN_TOKENS:
        changes["modality_losses"] = 0.0
    return changes


# --- choices

# encoder_hidden: as wide to the small ViT as the paper's is to DeiT-B
BACKBONES = {"deit-b": {}, "small": {"dim": 192, "depth": 6, "heads": 3, "encoder_hidden": 512}}
RESNETS = ("resnet18", "resnet50")  # HAMNet's
SCHEDULES = ("sqrt", "cosine", "steps", "constant")
OWN_TOKENS = ("graft", "multistream", "late")  # fusions with tokens of each modality


def backbone(text: str) -> str:
    """An option's type: the name of a backbone."""
    if text not in (*BACKBONES, *RESNETS) and not text.startswith("timm:"):
        expected = ", ".join((*BACKBONES, *RESNETS))
        raise argparse.ArgumentTypeError(f"expected {expected} or timm:NAME, not {text}")
    return text


class Pair(argparse.Action):
    """An option of each stage: two values, or one for both."""

    def __call__(self, parser, namespace, values, option=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, "expected two values, for stage 1 and stage 2")
        setattr(namespace, self.dest, (values[0], values[-1]))


# --- the command line


def make_parser() -> runtime.Parser:
    """Every option once: default, range, meaning, and where the default is from (else: ours)."""
    parser = runtime.Parser(
        "Train GraFT in two stages (section 4.1) and evaluate it. Two values are for stage 1 and"
        " stage 2;\none value is for both. Values of the paper are marked by its section.",
        prog="train.py",
    )
    text = "plus: our own, which combines known re-ID techniques"
    parser.add_argument("--recipe", choices=("paper", "plus"), default="paper", help=text)
    add_data_options(parser.add_argument_group("data"))
    add_model_options(parser.add_argument_group("model"))
    add_loss_options(parser.add_argument_group("losses, Eq. (10)"))
    add_optimisation_options(parser.add_argument_group("optimisation"))
    add_run_options(parser.add_argument_group("run"))
    return parser


def adder(group):
    """Two functions that add an option: of one value or more, and of a value for each stage."""

    def option(name: str, default, kind, text: str, **more) -> None:
        if isinstance(default, tuple):
            more |= {"nargs": len(default), "metavar": more.get("metavar", "P")}
        if callable(kind):
            more |= {"type": kind, "metavar": more.get("metavar", "N")}
        else:
            more["choices"] = kind
        group.add_argument(name, default=default, help=text, **more)

    def pair(name: str, default: tuple, kind, text: str) -> None:
        how = {"type": kind, "metavar": "N"} if callable(kind) else {"choices": kind}
        group.add_argument(name, default=default, action=Pair, nargs="+", help=text, **how)

    return option, pair


def add_data_options(group) -> None:
    option, _ = adder(group)
    data.add_options(group)
    text = "height, width; paper, 5.2"
    option("--image-size", (224, 224), whole(1, 4096), text, metavar=("H", "W"))
    text = "mean and std: the data set's own (published code), or ImageNet's"
    option("--normalise", "dataset", ("dataset", "imagenet"), text)
    option("--positives", 8, whole(1), "positives per anchor and epoch; paper, 5.2")
    text = "probability of a horizontal and of a vertical flip; paper, 5.2, without numbers"
    option("--flips", (0.5, 0.5), real(0, 1), text)
    option("--erase", 0.5, real(0, 1), "probability of random erasing; published code")
    option("--pad", 0, whole(0, 1024), "pad by N pixels, then crop at random")
    text = "hold out this many training identities, and evaluate them after each epoch"
    option("--val-ids", 0, whole(0), text)
    text = "reading threads of a rank (default: its cores, at most 8)"
    option("--workers", None, whole(0), text)


def add_model_options(group) -> None:
    option, pair = adder(group)
    text = "deit-b (paper, 3.2), small, any ViT of timm as timm:NAME; resnet18 or resnet50 (HAMNet)"
    option("--backbone", "deit-b", backbone, text, metavar="NAME")
    text = "FILE, pretrained (download the released weights; paper, 3.2) or none (random)"
    option("--backbone-weights", "pretrained", str, text, metavar="FILE")
    option("--fusion", "graft", tuple(FUSIONS), "GraFT, or a baseline of the paper's tables")
    option("--fusion-tokens", 1, whole(1, 1000), "number of fusion tokens (GraFT); paper, 5.2")
    option("--data-token", 0, whole(0), "index of GraFT's data token, Eq. (11)")
    option("--dropout", 0.1, real(0, 1), "dropout in the modality encoders; torch's default")
    pair("--patch-dropout", (0.0, 0.0), real(0, 0.95), "share of patches that a step leaves out")
    text = "what is tested: what enters the BNNeck (paper), or what leaves it"
    option("--features", "fusion", ("fusion", "bnneck"), text)


def add_loss_options(group) -> None:
    option, pair = adder(group)
    text = (
        "tokens of anchor, positive and negative (paper, 4.3; default: FFD, baselines FFF), or"
        " hardest: batch-hard triplets, 6 samples per identity"
    )
    option("--triplet", None, (*SCHEMES, "hardest"), text)
    text = "Euclidean distances in Eq. (8), not squared ones; published code"
    group.add_argument("--plain-distance", action="store_true", help=text)
    text = "Eq. (9) as printed: the norm, not its square"
    group.add_argument("--center-norm", action="store_true", help=text)
    text = "samples that the cross-entropy sees; paper, 3.4"
    option("--cross-entropy", "anchors", ("anchors", "all"), text)
    text = "weight of triplet loss and cross-entropy on each modality's own tokens"
    option("--modality-losses", 0.0, real(0), text)
    option("--alpha", 0.5, real(0), "weight of the triplet loss; paper, 4.2")
    pair("--beta", (0.0, 0.0005), real(0), "weight of the center loss; paper, 4.2, see D2")
    option("--gamma", 0.5, real(0), "weight of the cross-entropy; paper, 4.2")
    pair("--label-smoothing", (0.0, 0.1), real(0, 1), "of the cross-entropy; paper, 5.2")


def add_optimisation_options(group) -> None:
    option, pair = adder(group)
    pair("--frozen", ("yes", "no"), ("yes", "no"), "freeze the backbone; paper, 4.1")
    pair("--epochs", (40, 60), whole(0), "epochs per stage; 0 skips it; published code")
    pair("--epoch-steps", (0, 0), whole(0), "end each epoch after so many steps; 0: all triplets")
    option("--batch-size", 208, whole(1), "triplets of a step, over all ranks; paper, 5.2: 8 x 26")
    text = "triplets that a rank takes at once; a larger share is taken in several passes"
    option("--per-pass", 26, whole(1), text)
    pair("--lr", (2.54e-5, 5e-6), real(0), "AdamW's peak rate; published code, and paper, 5.2")
    text = "the backbone's peak rate (default: as --lr)"
    pair("--backbone-lr", (None, None), real(0), text)
    pair("--weight-decay", (0.05, 0.0013), real(0), "AdamW's; published code")
    text = "sqrt: warm-up, square-root decay, cool-down (paper, 5.2); steps: HAMNet's"
    pair("--schedule", ("sqrt", "constant"), SCHEDULES, text)
    text = "warm-up steps, not used by constant; published code"
    option("--warmup-steps", 500, whole(0), text)


def add_run_options(group) -> None:
    option, _ = adder(group)
    text = "folder to write (default: runs/DATASET)"
    option("--out", None, Path, text, metavar="DIR")
    text = "continue the run in OUT with its settings; start it if OUT is empty"
    group.add_argument("--resume", action="store_true", help=text)
    option("--seed", 0, whole(0), "random seed")
    runtime.add_device_options(group)
    text = "bit-for-bit repeatable on GPUs, too; slower"
    group.add_argument("--deterministic", action="store_true", help=text)


# --- from the command line to settings


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with what is not given as the recipe says; `stages` holds both stages.

    `given` names the options that the command line gave itself, which --resume looks at.
    """
    early = runtime.Parser(add_help=False)  # these say what the others' defaults are
    early.add_argument("--dataset", default="synthetic")
    early.add_argument("--recipe", default="paper")
    early.add_argument("--fusion", default="graft")
    chosen, _ = early.parse_known_args(argv)
    parser = make_parser()
    parser.set_defaults(**recipe(chosen.recipe, chosen.dataset, chosen.fusion))
    args = parser.parse_args(argv)
    args.given = given(argv)
    args.triplet = args.triplet or ("FFD" if args.fusion == "graft" else "FFF")
    args.out = args.out or Path("runs") / args.dataset
    # A checkpoint remembers where its data is, wherever it is evaluated
    args.data_root = str(Path(args.data_root).absolute())
    return complete(args)


def given(argv: list[str] | None) -> tuple[str, ...]:
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return tuple(vars(parser.parse_args(argv)))


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Add `stages` to the options, and refuse those that contradict one another."""
    for name, value in vars(args).items():
        if isinstance(value, list):  # argparse's, where defaults are tuples
            setattr(args, name, tuple(value))
    args.stages = (Stage.of(args, 1), Stage.of(args, 2))
    check_combinations(args)
    return args


# What may be given anew when a run is resumed. Another kind of device rounds differently
FREE = {"device", "workers", "store", "data_root", "out", "resume", "deterministic"}


def resumed(args: argparse.Namespace, stored: dict) -> argparse.Namespace:
    """The settings of a stored run, with what `args` may change of them.

    Raises UserError where the command line gives another value than the run has.
    """
    for name in args.given:
        option, value = f"--{name.replace('_', '-')}", getattr(args, name)
        # Sensors are always in the data set's order, however they are typed
        same = (
            set(value) == set(stored[name]) if name == "modalities" else value == stored.get(name)
        )
        if name not in FREE and name in stored and not same:
            raise UserError(
                f"{option} {value}: the run in {args.out} has {stored[name]}; leave"
                " the option out to continue it, or choose another --out"
            )
    if stored.get("slip") != getattr(args, "slip", None):  # of experiments.published
        raise UserError(f"{args.out}: the run was trained with another slip; choose another --out")
    changed = {name: getattr(args, name) for name in FREE if name in args.given}
    settings = {**stored, **changed, "given": args.given, "out": args.out}
    return complete(argparse.Namespace(**settings))


def settings(args: argparse.Namespace) -> dict:
    """The options as plain values, for files and for the screen."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("given", "stages")
    }


@dataclass(frozen=True)
class Stage:
    """One of the two stages of section 4.1: what differs between them."""

    number: int  # 1 or 2; prune.py numbers its rounds from 3 on
    name: str
    frozen: bool  # the backbone
    epochs: int
    epoch_steps: int  # ends each epoch early; 0: all triplets
    lr: float
    backbone_lr: float | None  # None: lr
    weight_decay: float
    betas: tuple[float, float]  # AdamW's
    schedule: str
    warmup_steps: int
    beta: float  # weight of the center loss
    label_smoothing: float
    patch_dropout: float

    @classmethod
    def of(cls, args: argparse.Namespace, number: int) -> "Stage":
        i = number - 1
        return cls(
            number=number,
            name=f"stage {number}",
            frozen=args.frozen[i] == "yes",
            epochs=args.epochs[i],
            epoch_steps=args.epoch_steps[i],
            lr=args.lr[i],
            backbone_lr=args.backbone_lr[i],
            weight_decay=args.weight_decay[i],
            betas=args.adam_betas[2 * i : 2 * i + 2],
            schedule=args.schedule[i],
            warmup_steps=args.warmup_steps,
            beta=args.beta[i],
            label_smoothing=args.label_smoothing[i],
            patch_dropout=args.patch_dropout[i],
        )


def check_combinations(args: argparse.Namespace) -> None:
    """Raise UserError for options that contradict one another."""
    fusion, hamnet, graft = args.fusion, args.fusion == "hamnet", args.fusion == "graft"
    is_resnet = args.backbone in RESNETS
    before_patches = 2 if args.backbone in BACKBONES else 1  # CLS and distillation token
    first_patch = args.data_token + args.fusion_tokens > before_patches
    for contradicts, message in (
        (
            hamnet and not is_resnet,
            f"--backbone {args.backbone}: HAMNet takes resnet18 or resnet50",
        ),
        (is_resnet and not hamnet, f"--backbone {args.backbone}: is for --fusion hamnet alone"),
        (hamnet and args.recipe == "plus", "--recipe plus: HAMNet has a recipe of its own"),
        (hamnet and any(args.beta), "--beta: HAMNet has no center loss; expected 0"),
        (hamnet and any(args.patch_dropout), "--patch-dropout: HAMNet has no patches"),
        (hamnet and args.features == "bnneck", "--features bnneck: HAMNet has no BNNeck"),
        (not graft and args.fusion_tokens > 1, f"--fusion-tokens: --fusion {fusion} has none"),
        (not graft and args.data_token > 0, f"--data-token: --fusion {fusion} has none"),
        (
            args.triplet == "hardest" and args.cross_entropy != "all",
            "--triplet hardest: needs the labels of all samples; add --cross-entropy all",
        ),
        (
            args.modality_losses and fusion not in OWN_TOKENS,
            f"--modality-losses: --fusion {fusion} has no tokens of each modality",
        ),
        (
            graft and any(args.patch_dropout) and first_patch,
            f"--data-token {args.data_token}: --patch-dropout may leave that patch out",
        ),
    ):
        if contradicts:
            raise UserError(message)


def from_checkpoint(stored: dict) -> argparse.Namespace:
    """Settings in a checkpoint as `parse` gives them; what an older version lacked is default."""
    newest = parse(["--dataset", stored.get("dataset", "synthetic")])
    return complete(argparse.Namespace(**{**vars(newest), **stored}))
