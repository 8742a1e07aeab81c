"""Every option of train.py once, and the recipes: what they change of the options' defaults.

The defaults are the paper's for RGBNT100. `python train.py --dataset NAME --recipe NAME --help`
shows the values that a recipe takes. A value without an option is a constant of its recipe.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import data
import runtime
from losses import BY_IDENTITY, SCHEMES
from model import FUSIONS
from runtime import UserError, real, whole

# --- recipes. Pairs are for stage 1 and stage 2

WEIGHTS = Path(__file__).parent / "weights"  # made by synthetic.pretrain, for the synthetic set
CONSTANTS = {
    "adam_betas": (0.839, 0.978, 0.836, 0.979),  # two of each stage; published code
    "center_lr": 1e-3,  # rate of the centroids, see D10
    "margin": None,  # of the hardest triplets; None: a soft one, Eq. (8)
    "samples": 6,  # of each identity in a batch, with the losses of BY_IDENTITY
    "dropout": 0.1,  # in the modality encoders; torch's default
    "features": "fusion",  # the embedding that is tested; paper, 3.4
}
PERSONS = {"image_size": (256, 128)}  # customary
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
    "rgbnt201": PERSONS,
    "msvr310": {"image_size": (128, 256)},  # customary
    "wmveid863": {"image_size": (128, 256)},
    "market1501": PERSONS,
}
PLUS = {  # ours: confidences, and known re-ID techniques; experiments.ablate --table plus
    "fusion": "weighted",
    "batch_size": 26,  # 78 images: 13 identities x 6
    "triplet": "contrastive",
    "cross_entropy": "all",
    "schedule": ("cosine", "cosine"),
    "label_smoothing": (0.1, 0.1),
    "features": "bnneck",
}
PLUS_SYNTHETIC = {
    # The same ViT, pretrained longer on four times the vehicles
    "backbone_weights": str(WEIGHTS / "vit-small-rgb-4800.pth"),
    # Patches of 16 pixels that overlap by half; a step sees 21 of the 105
    "stride": 8,
    "patch_dropout": (0.8, 0.8),
    "triplet": "hardest",
    "epochs": (1, 4),
    "epoch_steps": (60, 0),  # frozen for 60 steps, until the new parts have warmed up
}
OWN = {  # ours, for a user's photos without a GPU; chosen on RGB and thermal photos of streets
    "backbone": "timm:vit_small_patch14_dinov2.lvd142m",  # has seen all kinds of real photos
    "image_size": (56, 112),
    "positives": 1,
    "batch_size": 26,
    "warmup_steps": 30,
    "epochs": (2, 1),
    "lr": (1e-3, 5e-5),  # stage 2's is low, so that the backbone keeps what it knows
    # As for the synthetic set, which has as few steps; not compared with the paper's here
    "flips": (0.5, 0.0),
    "erase": 0.0,
}
PLUS_REAL = {  # chosen on the same photos, see experiments.scenes
    **OWN,
    # As on the synthetic set: patches of 14 pixels overlap, and a step sees 32 of the 105
    "stride": 7,
    "patch_dropout": (0.7, 0.7),
    "epochs": (10, 1),
    "weight_decay": (0.05, 0.05),
    "adam_betas": (0.9, 0.98, 0.9, 0.98),
}
# Not run on these: images as large as their authors', in patches of 14, and pad by 10 and crop
BENCHMARK = {"image_size": (126, 252), "pad": 10, "stride": 0, "patch_dropout": (0.0, 0.0)}
PLUS_OF = {
    "synthetic": PLUS_SYNTHETIC,
    **dict.fromkeys(("folder", "csv"), PLUS_REAL),
    **dict.fromkeys(("rgbnt201", "market1501"), PLUS_REAL | BENCHMARK | {"image_size": (252, 126)}),
}


def recipe(name: str, dataset: str, fusion: str) -> dict:
    """What a recipe changes of the options' defaults."""
    changes = {**CONSTANTS, **PAPER.get(dataset, {})}
    if name == "plus":
        changes |= {**PLUS, **PLUS_OF.get(dataset, PLUS_REAL | BENCHMARK)}
    if name == "own":
        changes |= OWN
    if fusion == "hamnet":
        changes |= runtime.imported("experiments.hamnet.recipe")(dataset)
    elif fusion in WEIGHTED:  # which have no other losses and features
        changes |= {"cross_entropy": "all", "beta": (0.0, 0.0), "features": "bnneck"}
        changes["batch_size"] = PLUS["batch_size"]
    elif name == "plus":
        changes["triplet"] = "hardest"  # the same batches
    return changes


# --- choices

# encoder_hidden: as wide to the small ViT as the paper's is to DeiT-B
BACKBONES = {"deit-b": {}, "small": {"dim": 192, "depth": 6, "heads": 3, "encoder_hidden": 512}}
RESNETS = ("resnet18", "resnet50")  # HAMNet's
SCHEDULES = ("sqrt", "cosine", "steps", "constant")
WEIGHTED = ("weighted", "weighted-late")  # extras/weighted.py


class Pair(argparse.Action):
    """An option of two values, mostly for stage 1 and stage 2. One value stands for both."""

    def __init__(self, *args, **more):
        super().__init__(*args, nargs="+", **more)

    def __call__(self, parser, namespace, values, option=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"expected one or two values, not {len(values)}")
        setattr(namespace, self.dest, (values[0], values[-1]))


# --- the command line


DESCRIPTION = """\
Train GraFT in two stages (section 4.1) and evaluate it. Two values are for stage 1 and stage 2,
unless the text says otherwise; one value is for both. Where an option is from the paper, its help
names the section. The defaults shown are those of the --dataset and --recipe given before --help.
"""


def make_parser() -> runtime.Parser:
    """Every option once: default, range, meaning, and where the default is from (else: ours)."""
    parser = runtime.Parser(DESCRIPTION, prog="train.py")
    text = "plus: our extension, sensors count by confidence; own: for your photos, without a GPU"
    parser.add_argument("--recipe", choices=("paper", "plus", "own"), default="paper", help=text)
    add_data_options(parser.add_argument_group("data"))
    add_model_options(parser.add_argument_group("model"))
    add_loss_options(parser.add_argument_group("losses, Eq. (10)"))
    add_optimisation_options(parser.add_argument_group("optimisation"))
    add_run_options(parser.add_argument_group("run"))
    return parser


def add_data_options(group) -> None:
    add, pair = group.add_argument, partial(group.add_argument, action=Pair)
    data.add_options(group)
    pair("--image-size", type=whole(1, 4096), default=(224, 224), help="height, width; paper, 5.2")
    text = "mean and std: the data set's own (published code), or ImageNet's"
    add("--normalise", choices=("dataset", "imagenet"), default="dataset", help=text)
    add("--positives", type=whole(1), default=8, help="positives per anchor and epoch; paper, 5.2")
    text = "probability of a horizontal and of a vertical flip (paper, 5.2, without numbers)"
    pair("--flips", type=real(0, 1), default=(0.5, 0.5), help=text)
    add("--erase", type=real(0, 1), default=0.5, help="probability of erasing; published code")
    add("--pad", type=whole(0, 1024), default=0, help="pad by N pixels, then crop at random")
    text = "hold out N training identities, and evaluate on them after each epoch"
    add("--val-ids", type=whole(0), default=0, help=text)
    text = "reading threads per process (default: one per core, at most 8)"
    add("--workers", type=whole(0), help=text)


def add_model_options(group) -> None:
    add, pair = group.add_argument, partial(group.add_argument, action=Pair)
    text = "deit-b (paper, 3.2), small, any ViT of timm as timm:NAME; resnet18 or resnet50 (HAMNet)"
    add("--backbone", default="deit-b", metavar="NAME", help=text)
    text = "a file, a run's folder, pretrained (download the release; paper, 3.2) or none (random)"
    add("--backbone-weights", default="pretrained", metavar="FILE", help=text)
    text = "pixels from one patch to the next (0: the patch size); with fewer, patches overlap"
    add("--stride", type=whole(0), default=0, metavar="N", help=text)
    text = "GraFT, a baseline of the tables, or weighted, plus's model"
    add("--fusion", choices=FUSIONS, default="graft", help=text)
    add(
        "--fusion-tokens",
        type=whole(1, 1000),
        default=1,
        help="number of fusion tokens; paper, 5.2",
    )
    add("--data-token", type=whole(0), default=0, help="index of GraFT's data token, Eq. (11)")
    text = "share of the patches that a training step leaves out"
    pair("--patch-dropout", type=real(0, 0.95), default=(0.0, 0.0), help=text)


def add_loss_options(group) -> None:
    add, pair = group.add_argument, partial(group.add_argument, action=Pair)
    text = (
        "tokens of anchor, positive and negative (paper, 4.3; default: FFD, baselines FFF);"
        " hardest: batch-hard triplets; contrastive: --fusion weighted's loss, without triplets"
    )
    add("--triplet", choices=(*SCHEMES, *BY_IDENTITY), help=text)
    add(
        "--plain-distance",
        action="store_true",
        help="use plain, not squared distances in Eq. (8), as the published code",
    )
    text = "classify the anchors alone (paper, 3.4), or all samples"
    add("--cross-entropy", choices=("anchors", "all"), default="anchors", help=text)
    text = "weight of triplet and contrastive loss; paper, 4.2"
    add("--alpha", type=real(0), default=0.5, help=text)
    pair(
        "--beta", type=real(0), default=(0.0, 0.0005), help="weight of the center loss; paper, 4.2"
    )
    add("--gamma", type=real(0), default=0.5, help="weight of the cross-entropy; paper, 4.2")
    pair(
        "--label-smoothing",
        type=real(0, 1),
        default=(0.0, 0.1),
        help="of the cross-entropy; paper, 5.2",
    )


def add_optimisation_options(group) -> None:
    add, pair = group.add_argument, partial(group.add_argument, action=Pair)
    pair(
        "--frozen",
        choices=("yes", "no"),
        default=("yes", "no"),
        help="freeze the backbone; paper, 4.1",
    )
    pair("--epochs", type=whole(0, 999), default=(40, 60), help="0 skips a stage; published code")
    pair(
        "--epoch-steps",
        type=whole(0),
        default=(0, 0),
        help="end an epoch after N steps; 0: after all triplets",
    )
    text = "triplets of a step, over all ranks; paper, 5.2: 8 x 26"
    add("--batch-size", type=whole(1), default=208, help=text)
    text = (
        "triplets that a GPU takes at once; more are split into passes, and hardest and contrastive"
        " losses then compare samples within a pass alone"
    )
    add("--per-pass", type=whole(1), default=26, help=text)
    pair("--lr", type=real(0), default=(2.54e-5, 5e-6), help="peak learning rate; paper, 5.2")
    pair("--backbone-lr", type=real(0), default=(None, None), help="the backbone's (default: --lr)")
    pair("--weight-decay", type=real(0), default=(0.05, 0.0013), help="AdamW's; published code")
    text = "sqrt: warm-up, square-root decay, cool-down (paper, 5.2); steps: step decay of HAMNet"
    pair("--schedule", choices=SCHEDULES, default=("sqrt", "constant"), help=text)
    text = "steps of warm-up, in all schedules but constant; published code"
    add("--warmup-steps", type=whole(0), default=500, help=text)


def add_run_options(group) -> None:
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help="folder to write (default: runs/DATASET)")
    text = "continue the run in OUT with its settings; start it if OUT is empty"
    add("--resume", action="store_true", help=text)
    add("--seed", type=whole(0), default=0, help="random seed")
    runtime.add_device_options(group)
    add("--deterministic", action="store_true", help="bit for bit repeatable on GPUs, too; slower")


# --- from the command line to settings


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with what is not typed as the recipe says; `stages` holds both stages.

    `typed` names the options that the command line has, which --resume looks at.
    """
    early = runtime.Parser(add_help=False)  # these say what the others' defaults are
    early.add_argument("--dataset", default="synthetic")
    early.add_argument("--recipe", default="paper")
    early.add_argument("--fusion")
    chosen, _ = early.parse_known_args(argv)
    chosen.fusion = chosen.fusion or ("weighted" if chosen.recipe == "plus" else "graft")
    parser = make_parser()
    parser.set_defaults(**recipe(chosen.recipe, chosen.dataset, chosen.fusion))
    defaults = vars(parser.parse_args([]))
    # argparse fills in no default where there is a value already: None marks what is not typed
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    typed = {name: value for name, value in typed.items() if value is not None}
    args = argparse.Namespace(**{**defaults, **typed}, typed=tuple(typed))
    default = "FFD" if args.fusion == "graft" else "FFF"
    args.triplet = args.triplet or ("contrastive" if args.fusion in WEIGHTED else default)
    args.out = args.out or Path("runs") / args.dataset
    # A checkpoint remembers where its data is, wherever it is evaluated
    args.data_root = str(Path(args.data_root).absolute())
    return complete(args)


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Add `stages` to the options, and refuse those that contradict one another."""
    args.stages = (Stage.of(args, 1), Stage.of(args, 2))
    check_combinations(args)
    return args


# What may be given anew when a run is resumed, although another kind of device rounds differently
FREE = {"device", "workers", "store", "data_root", "out", "resume", "deterministic"}


def resumed(args: argparse.Namespace, stored: dict) -> argparse.Namespace:
    """The settings of a stored run, with what `args` may change of them.

    Raises UserError where the command line gives another value than the run has.
    """
    stored = vars(from_checkpoint(stored))  # an option that is newer than the run has its default
    for name in args.typed:
        value, before = getattr(args, name), stored[name]
        same = value == before
        if name == "modalities":  # always in the data set's order, however they are typed
            same = set(value) == set(before)
        if name not in FREE and not same:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the run in {args.out} has {before}; leave"
                " the option out to continue it, or choose another --out"
            )
    if stored.get("slip") != getattr(args, "slip", None):  # of experiments.published
        raise UserError(f"{args.out}: the run was trained with another slip; choose another --out")
    changed = {name: getattr(args, name) for name in FREE if name in args.typed}
    settings = {**stored, **changed, "out": args.out}
    return complete(argparse.Namespace(**settings))


def settings(args: argparse.Namespace) -> dict:
    """The options as plain values, for files and for the screen."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("typed", "stages")
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
        pairs = "epochs epoch_steps lr backbone_lr weight_decay schedule beta label_smoothing"
        return cls(
            number=number,
            name=f"stage {number}",
            frozen=args.frozen[i] == "yes",
            betas=args.adam_betas[2 * i : 2 * i + 2],
            warmup_steps=args.warmup_steps,
            patch_dropout=args.patch_dropout[i],
            **{name: getattr(args, name)[i] for name in pairs.split()},
        )


def check_combinations(args: argparse.Namespace) -> None:
    """Raise UserError for options that contradict one another."""
    fusion, hamnet = args.fusion, args.fusion == "hamnet"
    before_patches = 2 if args.backbone in BACKBONES else 1  # CLS and distillation token
    first_patch = args.data_token + args.fusion_tokens > before_patches  # is among the tokens
    if args.backbone not in (*BACKBONES, *RESNETS) and not args.backbone.startswith("timm:"):
        known = ", ".join((*BACKBONES, *RESNETS))
        raise UserError(f"--backbone {args.backbone}: expected {known} or timm:NAME")
    if hamnet != (args.backbone in RESNETS):
        fitting = "resnet18 or resnet50" if hamnet else "another; ResNets are for --fusion hamnet"
        raise UserError(f"--backbone {args.backbone}: --fusion {fusion} takes {fitting}")
    if hamnet and args.recipe != "paper":
        raise UserError(f"--recipe {args.recipe}: HAMNet has a recipe of its own")
    if hamnet and any((args.stride, *args.beta, *args.patch_dropout)):
        text = (
            "--beta, --stride, --patch-dropout: HAMNet has no centroids and no patches; expected 0"
        )
        raise UserError(text)
    if fusion not in ("graft", "weighted") and args.fusion_tokens > 1:
        raise UserError(f"--fusion-tokens: --fusion {fusion} has none; leave it out")
    if fusion != "graft" and args.data_token > 0:
        raise UserError(f"--data-token: --fusion {fusion} uses none; leave it out")
    if args.recipe == "own" and args.dataset not in ("folder", "csv", "synthetic"):
        expected = "--dataset folder, csv and synthetic"
        raise UserError(f"--recipe own: is for {expected}, not {args.dataset}")
    if args.triplet == "contrastive" and args.plain_distance:
        raise UserError("--plain-distance: --triplet contrastive has no distances; leave it out")
    if args.triplet in BY_IDENTITY and args.cross_entropy != "all":
        text = f"--triplet {args.triplet}: needs labels of all samples; add --cross-entropy all"
        raise UserError(text)
    if fusion in WEIGHTED and args.triplet not in BY_IDENTITY:
        raise UserError(f"--triplet {args.triplet}: --fusion {fusion} takes contrastive or hardest")
    if fusion not in WEIGHTED and args.triplet == "contrastive":
        names = " and ".join(WEIGHTED)
        raise UserError(f"--triplet contrastive: is for --fusion {names}, not {fusion}")
    if fusion in WEIGHTED and any(args.beta):
        raise UserError(f"--beta: --fusion {fusion} has no centroids; expected 0")
    if fusion == "graft" and any(args.patch_dropout) and first_patch:
        raise UserError(f"--data-token {args.data_token}: --patch-dropout may leave that patch out")


def from_checkpoint(stored: dict) -> argparse.Namespace:
    """Settings in a checkpoint as `parse` gives them; what an older version lacked is default."""
    chosen = {"dataset": "synthetic", "recipe": "paper", "fusion": "graft"}
    words = [[f"--{name}", stored.get(name, default)] for name, default in chosen.items()]
    if stored.get("modality_losses"):
        raise UserError(
            "a run of an older --recipe plus: it can be evaluated; to go on, train anew"
        )
    newest = parse([word for pair in words for word in pair])
    stored = {"stride": 0, **stored}  # before this option no patches overlapped, in plus neither
    return complete(argparse.Namespace(**{**vars(newest), **stored}))
