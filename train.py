"""Train GraFT in two stages (section 4.1) and evaluate it.

python train.py                                                            the embedded data set
torchrun --nproc_per_node=8 train.py --dataset rgbnt100 --data-root DIR    the paper's recipe
"""

import argparse
import math
import os
import platform
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import runtime
from losses import SCHEMES, GraFTLoss
from model import BACKBONES, FUSIONS, GraFTConfig, MultiModalModel, build_model, load_backbone
from runtime import UserError

# --- recipes: the two stages as data


@dataclass(frozen=True)
class Stage:
    """One stage of training. `beta` and `label_smoothing` change between stages; alpha and gamma do not (section 4.2)."""

    frozen: bool  # the backbone
    epochs: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]  # AdamW's
    schedule: str  # of SCHEDULES
    beta: float  # center loss
    label_smoothing: float
    epoch_steps: int = 0  # ends an epoch early; 0: all triplets
    patch_dropout: float = 0.0  # ours


@dataclass(frozen=True)
class Recipe:
    """Defaults of a data set: model, weights, sampling, stages. Any of them can be given on the command line."""

    backbone: str
    backbone_weights: str
    image_size: tuple[int, int]
    positives: int
    warmup_steps: int
    flips: tuple[float, float]  # probabilities: horizontal, vertical
    erase: float  # probability of random erasing
    stages: tuple[Stage, Stage]


PAPER = Recipe(
    backbone="deit-b",  # paper, 3.2
    backbone_weights="deit",
    image_size=(224, 224),  # paper, 5.2
    positives=8,  # paper, 5.2
    warmup_steps=500,  # published code
    flips=(0.5, 0.5),  # paper, 5.2
    erase=0.5,  # published code
    stages=(
        # epochs, decay and betas: published code; the rest: paper, 4.2 and 5.2
        Stage(True, 40, 2.54e-5, 0.05, (0.839, 0.978), "sqrt", beta=0.0, label_smoothing=0.0),
        Stage(False, 60, 5e-6, 0.0013, (0.836, 0.979), "constant", beta=0.0005, label_smoothing=0.1),  # beta: see D2
    ),
)
EMBEDDED = Recipe(  # ours: what reaches most in under five minutes on two CPU cores; chosen on other vehicles, see RESULTS.md
    backbone="small",
    backbone_weights=str(Path(__file__).parent / "weights" / "vit-small-rgb.pth"),
    image_size=(64, 128),
    positives=1,
    warmup_steps=30,
    flips=(0.5, 0.0),  # ours: in so few steps, vehicles upside down and erasing cost more than they give
    erase=0.0,
    stages=(
        Stage(True, 2, 2.5e-3, 0.05, (0.9, 0.98), "sqrt", beta=0.0, label_smoothing=0.0),
        Stage(False, 2, 1.2e-3, 0.05, (0.9, 0.98), "sqrt", beta=0.005, label_smoothing=0.1),  # beta: paper, 5.2
    ),
)


RECIPES = {  # of the data sets; else PAPER
    "synthetic": EMBEDDED,
    "rgbnt201": replace(PAPER, image_size=(256, 128)),  # customary
    "msvr310": replace(PAPER, image_size=(128, 256)),
    "wmveid863": replace(PAPER, image_size=(128, 256)),
}


def lr_factor(step: int, total_steps: int, warmup_steps: int, cooldown: float = 0.1) -> float:
    """What a stage's learning rate is multiplied by at `step` (0 .. total_steps - 1); section 5.2 and published code.

    Linear warm-up to 1 at the end of `warmup_steps`, then sqrt(warmup / step), and over the last `cooldown` of all steps
    linearly from what was reached to 0.
    """
    warmup = max(1, warmup_steps)
    start = total_steps - round(cooldown * total_steps)  # the cool-down's first step
    at = min(step, start)
    factor = (at + 1) / warmup if at < warmup else (warmup / at) ** 0.5
    return factor * (total_steps - step) / (total_steps - start) if step >= start else factor


def cosine_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """As lr_factor: linear warm-up, then half a cosine down to 0. Ours."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))


SCHEDULES = {"sqrt": lr_factor, "cosine": cosine_factor, "constant": lambda *_: 1.0}
SAMPLING = {"triplets": data.TripletBatches, "identities": data.IdentityBatches}
PLUS = {  # --recipe plus, ours: the field's known means together; ablate.py --table plus takes it apart
    "sampling": "identities",
    "triplet": "hardest",
    "cross_entropy": "all",
    "schedule": ("cosine", "cosine"),
    "label_smoothing": (0.1, 0.1),
    "bnneck_features": True,
    "patch_dropout": (0.0, 0.5),  # with as many more epochs as that makes steps cheaper
}


# --- a run


class TrainingStep(nn.Module):
    """From images to losses: all that DistributedDataParallel has to see."""

    def __init__(self, model: MultiModalModel, criterion: GraFTLoss, device: torch.device, precision: str):
        super().__init__()
        self.model, self.criterion, self.device, self.precision = model, criterion, device, precision

    def forward(self, images: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """images (3B, 3, H, W) of anchors, positives and negatives; labels of the anchors, (B,), or of all, (3B,)."""
        with runtime.autocast(self.device, self.precision):
            embeddings = self.model(images)
        logits = self.model.classify(embeddings.fusion[: len(labels)])
        return self.criterion(embeddings, logits, labels)


def on_all_ranks(step: TrainingStep, unused: bool = False) -> nn.Module:
    """The step, whose gradients become means over the ranks; of what is frozen nothing is sent."""
    if runtime.world_size() == 1:
        return step
    return DistributedDataParallel(step, gradient_as_bucket_view=True, find_unused_parameters=unused)


@dataclass
class Progress:
    """Where a run is: what is done of which stage, and what the unfinished epoch's losses come to so far."""

    stage: int = 1
    epoch: int = 0  # whole ones
    step: int = 0  # of the next epoch
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """What every stage works on."""

    args: argparse.Namespace
    device: torch.device
    dataset: data.Dataset
    validation: tuple[data.Split, data.Split] | None
    model: MultiModalModel
    criterion: GraFTLoss
    log: runtime.RunLog
    saves: bool = True

    @property
    def pids(self) -> Tensor:
        """The training identities, sorted: label i is the identity pids[i]."""
        return self.dataset.train.pids.unique()

    def labels(self, pids: Tensor) -> Tensor:
        return torch.searchsorted(self.pids, pids)

    def save(self, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write OUT/last.pt: everything that evaluation, or going on, needs. Draws depend on (seed, epoch, step) alone."""
        if runtime.rank() == 0 and self.saves:
            checkpoint = {
                **self.about(),
                "model": self.model.state_dict(),
                "criterion": self.criterion.state_dict(),
                "optimizer": optimizer.state_dict(),
                "progress": {**asdict(progress), "log": self.log.size},
            }
            runtime.save_checkpoint(self.args.out / "last.pt", checkpoint)

    def about(self) -> dict:
        """What a checkpoint says of the model besides its weights."""
        return {
            "config": asdict(self.model.config),
            "pids": self.pids.tolist(),
            "mean": self.dataset.mean,
            "std": self.dataset.std,
            "settings": settings(self.args),
        }

    def evaluate(self, query: data.Split, gallery: data.Split) -> dict:
        args, dataset = self.args, self.dataset
        return evaluate.evaluate(
            self.model, query, gallery, dataset.mean, dataset.std, self.device, args.precision, args.workers
        )


def make_optimizer(model: MultiModalModel, criterion: GraFTLoss, stage: Stage, center_lr: float) -> torch.optim.AdamW:
    """AdamW of what a stage trains: the model's part first, then the centroids, which have their own rate and no decay."""
    trained, centers = ([p for p in module.parameters() if p.requires_grad] for module in (model, criterion))
    groups = [{"params": trained, "lr": stage.lr}]
    groups += [{"params": centers, "lr": center_lr, "weight_decay": 0.0}] if centers else []
    fused = trained[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, betas=stage.betas, weight_decay=stage.weight_decay, fused=fused)


def train_stage(run: Run, number: int, stage: Stage, progress: Progress, optimizer_state: dict | None = None) -> None:
    """Train one stage, from `progress` on; saves a checkpoint after each epoch."""
    args, model, criterion = run.args, run.model, run.criterion
    model.train()
    model.freeze_backbone(stage.frozen)
    for backbone in model.backbones:
        backbone.checkpointing = args.checkpointing
    model.patch_dropout = stage.patch_dropout
    criterion.weights(args.alpha, stage.beta, args.gamma, stage.label_smoothing)
    if stage.beta and not optimizer_state:
        features = evaluate.embed(model, run.dataset.train, run.dataset.mean, run.dataset.std, run.device, args.precision)
        criterion.center.start_at_means(features, run.labels(run.dataset.train.pids))
    # with modality dropout a step leaves the encoder of a dropped modality out
    step = on_all_ranks(TrainingStep(model, criterion, run.device, args.precision), unused=args.modality_dropout > 0)
    optimizer = make_optimizer(model, criterion, stage, args.center_lr)
    if optimizer_state:
        fresh = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(optimizer_state)
        for group, options in zip(optimizer.param_groups, fresh, strict=True):
            group.update(options)  # this run's settings, not the stored ones
    batches = SAMPLING[args.sampling](run.dataset.train.pids, args.batch_size, args.positives, args.seed)
    if len(batches) < args.accumulate:
        raise UserError(f"--accumulate {args.accumulate}: an epoch has only {len(batches)} batches")
    trainable = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    runtime.print0(
        f"stage {number}: {steps_per_epoch(args, stage, batches)} steps an epoch, {trainable / 1e6:.2f} M parameters train"
    )
    progress.stage = number
    while progress.epoch < stage.epochs:
        losses = train_epoch(run, stage, progress, step, optimizer, batches)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        record = {"stage": number, "epoch": progress.epoch, **losses}
        if run.validation:
            record["validation"] = run.evaluate(*run.validation)
        run.log.write("epoch", **record)
        run.save(optimizer, progress)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        shown += f"  validation mAP {100 * record['validation']['mAP']:.1f}" if run.validation else ""
        runtime.print0(f"stage {number} epoch {progress.epoch}/{stage.epochs}  {shown}")


def steps_per_epoch(args: argparse.Namespace, stage: Stage, batches: data.TripletBatches) -> int:
    return min(len(batches) // args.accumulate, stage.epoch_steps or len(batches))


def train_epoch(run: Run, stage: Stage, progress: Progress, step, optimizer, batches: data.TripletBatches) -> dict:
    """One epoch, or what is left of it; returns the mean losses, the last learning rate and triplets a second, of all ranks.

    Raises UserError where a loss or gradient is not finite, before it touches a weight, and Stopped on a signal, when the
    step is finished and saved.
    """
    args, number, epoch = run.args, progress.stage, progress.epoch
    batches.epoch = 1000 * number + epoch  # the stages draw different triplets
    first, num_steps = progress.step, steps_per_epoch(args, stage, batches)
    order = list(batches)[first * args.accumulate : num_steps * args.accumulate]
    reader = iter(data.loader(run.dataset.train, order, args.workers, run.device))
    start = time.perf_counter()
    hidden = None if runtime.rank() == 0 else True  # None: unless it is a terminal
    steps = tqdm(range(first, num_steps), f"stage {number} epoch {epoch + 1}", num_steps, False, initial=first, disable=hidden)
    with runtime.deferred_signals() as signalled:
        for i in steps:
            factor = SCHEDULES[stage.schedule](epoch * num_steps + i, stage.epochs * num_steps, args.warmup_steps)
            optimizer.param_groups[0]["lr"] = stage.lr * factor
            sums: dict[str, Tensor] = {}
            for part in range(args.accumulate):
                images, labels = prepare(run, next(reader), (args.seed, number, epoch, i, part))
                last = part == args.accumulate - 1
                with nullcontext() if last or runtime.world_size() == 1 else step.no_sync():
                    losses = step(images, labels)
                    (losses["loss"] / args.accumulate).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach()
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            stop = norm.new_tensor(float(signalled() > 0))
            *values, bad, stop = runtime.all_sum(torch.stack([*sums.values(), 1.0 - norm.isfinite().float(), stop])).tolist()
            if bad:
                places = order[(i - first) * args.accumulate : (i + 1 - first) * args.accumulate]
                raise not_finite(run, progress, i, sums, [place for batch in places for place in batch])
            optimizer.step()
            optimizer.zero_grad()
            progress.step = i + 1
            progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in zip(sums, values, strict=True)}
            if stop or (args.checkpoint_every and progress.step % args.checkpoint_every == 0 and progress.step < num_steps):
                with runtime.rank0_first():  # nobody leaves before it is written
                    run.save(optimizer, progress)
            if stop:
                place = f"stage {number}, epoch {epoch + 1}, step {progress.step} of {num_steps}"
                raise runtime.Stopped(
                    signalled() or signal.SIGTERM, f"stopped after {place}: go on with --resume --out {args.out}"
                )
    seconds = time.perf_counter() - start
    triplets = args.accumulate * args.batch_size * runtime.world_size()
    return {
        **{name: value / (num_steps * args.accumulate * runtime.world_size()) for name, value in progress.sums.items()},
        "lr": optimizer.param_groups[0]["lr"],
        "triplets_per_second": round((num_steps - first) * triplets / seconds, 1),
    }


def not_finite(run: Run, progress: Progress, step: int, sums: dict[str, Tensor], samples: list[int]) -> UserError:
    """What to say of a step whose loss or gradient is not finite; all the batch's file names go into the log."""
    names = [run.dataset.train.samples[i].name for i in samples]
    losses = {name: float(value) for name, value in sums.items()}
    run.log.write("not finite", stage=progress.stage, epoch=progress.epoch + 1, step=step + 1, losses=str(losses), batch=names)
    return UserError(
        f"stage {progress.stage}, epoch {progress.epoch + 1}, step {step + 1}: loss or gradient is not finite; losses {losses};"
        f" samples {', '.join(names)}; the weights are untouched and {run.args.out}/last.pt, if there, is good: look at the"
        " samples, lower --lr, or try --precision fp32"
    )


def prepare(run: Run, batch: tuple, key: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """A batch as read -> augmented, normalised images on the device and the labels of the anchors (or of all).

    Draws are made for the whole step and each rank takes its triplets' part, so they do not depend on the number of
    ranks; dropout's differ by rank.
    """
    args, (images, pids, _) = run.args, batch
    B, world, rank = len(pids) // 3, runtime.world_size(), runtime.rank()
    generator = torch.Generator().manual_seed(runtime.torch_seed(*key, 0))
    draws = torch.rand(3, world * B, 7, generator=generator)[:, rank * B : (rank + 1) * B].flatten(0, 1)
    torch.manual_seed(runtime.torch_seed(*key, 1 + rank))
    kept = torch.rand(len(images), generator=generator) >= args.modality_dropout
    kept[torch.randint(len(images), (), generator=generator)] |= not kept.any()  # one of them at least
    images = {m: image.to(run.device, non_blocking=True) for (m, image), keep in zip(images.items(), kept, strict=True) if keep}
    images = data.augment(images, draws, *args.flips, args.erase)
    classified = pids if args.cross_entropy == "all" else pids[:B]
    return data.normalise(images, run.dataset.mean, run.dataset.std), run.labels(classified).to(run.device)


# --- command line


def _modalities(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments, with what was not given filled in from the data set's recipe; `stages` holds the resolved stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("paper", "plus"), default="paper", help="plus: ours, see PLUS (default: paper)")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", default="synthetic", choices=data.DATASETS, help="synthetic is rendered where absent (default)"
    )
    group.add_argument("--data-root", default="data", help="the data set's folder or its parent (default: %(default)s)")
    group.add_argument("--modalities", type=_modalities, help="e.g. rgb,tir (default: all of the data set)")
    group.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels")
    group.add_argument("--positives", type=int, help="triplets an anchor and epoch, each with another positive")
    group.add_argument("--sampling", choices=SAMPLING, default="triplets", help="or 6 samples of each identity in a batch")
    group.add_argument("--flips", type=float, nargs=2, metavar=("P", "P"), help="probability of a horizontal, a vertical flip")
    group.add_argument("--erase", type=float, help="probability of random erasing")
    group.add_argument("--val-ids", type=int, default=0, help="hold out training identities and evaluate them after each epoch")
    group.add_argument("--workers", type=int, default=2, help="reading processes a rank (default: %(default)s)")
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", choices=BACKBONES)
    group.add_argument("--backbone-weights", metavar="FILE", help='or "deit": the released DeiT-B, fetched; or "none"')
    group.add_argument("--no-distilled", action="store_true", help="a backbone without the distillation token")
    group.add_argument(
        "--fusion", choices=FUSIONS, default="graft", help="or a baseline, all else equal (default: %(default)s)"
    )
    group.add_argument(
        "--modality-dropout", type=float, default=0.0, metavar="P", help="probability that a step lacks a modality"
    )
    group.add_argument(
        "--patch-dropout", type=float, nargs=2, metavar="P", help="share of patches left out of a step in stage 1, 2"
    )
    keep_or_not = argparse.BooleanOptionalAction
    group.add_argument("--bnneck-features", action=keep_or_not, default=False, help="test what leaves the BNNeck")
    group.add_argument("--fusion-tokens", type=int, default=1, help="default: %(default)s")
    group.add_argument("--data-token", type=int, default=0, help="index of D, Eq. (11) (default: %(default)s)")
    group.add_argument("--dropout", type=float, default=0.1, help="of the modality encoders (default: %(default)s)")
    group = parser.add_argument_group("losses, Eq. (10)")
    group.add_argument(
        "--triplet", choices=(*SCHEMES, "hardest"), help="tokens of anchor, positive, negative (default: FFD; baselines: FFF)"
    )
    group.add_argument(
        "--cross-entropy", choices=("anchors", "all"), default="anchors", help="samples it sees (default: anchors)"
    )
    group.add_argument("--plain-distance", action="store_true", help="Euclidean distances in Eq. (8), not squared ones")
    group.add_argument("--center-norm", action="store_true", help="Eq. (9) as printed: the norm, not its square")
    group.add_argument("--alpha", type=float, default=0.5, help="weight of the triplet loss (default: %(default)s)")
    group.add_argument("--beta", type=float, nargs=2, help="weight of the center loss")
    group.add_argument("--gamma", type=float, default=0.5, help="weight of the cross-entropy (default: %(default)s)")
    group.add_argument("--label-smoothing", type=float, nargs=2)
    group = parser.add_argument_group("optimisation (two values: stage 1, stage 2)")
    group.add_argument("--epochs", type=int, nargs=2, help="0 leaves a stage out")
    group.add_argument("--frozen", choices=("yes", "no"), nargs=2, help="the backbone (default: yes no)")
    group.add_argument("--epoch-steps", type=int, nargs=2, help="end an epoch early (default: all triplets)")
    group.add_argument("--batch-size", type=int, default=26, help="triplets a rank (default: %(default)s)")
    group.add_argument("--accumulate", type=int, default=1, help="batches a step (default: %(default)s)")
    group.add_argument("--lr", type=float, nargs=2)
    group.add_argument("--schedule", choices=SCHEDULES, nargs=2, help="sqrt: warm-up, decay, cool-down")
    group.add_argument("--weight-decay", type=float, nargs=2)
    group.add_argument("--center-lr", type=float, default=1e-3, help="of the centroids (default: %(default)s)")
    group.add_argument("--warmup-steps", type=int, help="of the sqrt schedule")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="default: runs/DATASET")
    group.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, if it is there")
    group.add_argument("--checkpoint-every", type=int, default=0, metavar="STEPS", help="default: after each epoch alone")
    group.add_argument("--deterministic", action="store_true", help="on GPUs, too: slower")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    group.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where hardware has it")
    group.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    if parser.parse_known_args(argv)[0].recipe == "plus":
        parser.set_defaults(**PLUS)
    args = parser.parse_args(argv)
    if args.triplet == "hardest" and args.cross_entropy != "all":
        raise UserError("--triplet hardest needs the labels of all samples; add --cross-entropy all")
    if not all(0 <= share <= 0.95 for share in args.patch_dropout or ()):
        raise UserError(f"--patch-dropout {args.patch_dropout}: expected shares from 0 to 0.95")
    recipe = RECIPES.get(args.dataset, PAPER)
    for name in ("backbone", "backbone_weights", "image_size", "positives", "warmup_steps", "flips", "erase"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name))
    given = {field.name: getattr(args, field.name, None) for field in fields(Stage)}
    given["frozen"] = args.frozen and [answer == "yes" for answer in args.frozen]
    stages = [{name: pair[i] for name, pair in given.items() if pair is not None} for i in range(2)]
    args.stages = tuple(replace(stage, **changes) for stage, changes in zip(recipe.stages, stages, strict=True))
    if args.recipe == "plus" and not args.epochs:  # a step on fewer patches costs as much less
        args.stages = tuple(replace(stage, epochs=round(stage.epochs / (1 - stage.patch_dropout))) for stage in args.stages)
    if args.data_token + args.fusion_tokens > 2 - args.no_distilled and any(stage.patch_dropout for stage in args.stages):
        raise UserError(f"--patch-dropout: leaves data token {args.data_token} out; expected one that is no patch's")
    args.triplet = args.triplet or ("FFD" if args.fusion == "graft" else "FFF")
    args.image_size = tuple(args.image_size)
    args.out = args.out or Path("runs") / args.dataset
    least = {"batch_size": 1, "accumulate": 1, "positives": 1, "fusion_tokens": 1, "workers": 0, "val_ids": 0}
    least["checkpoint_every"] = 0
    for name, low in least.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low}")
    for name in ("modality_dropout", "dropout", "erase"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a probability, 0 to 1")
    return args


def settings(args: argparse.Namespace) -> dict:
    """The resolved arguments as plain values."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {**plain, "stages": [asdict(stage) for stage in args.stages]}


def refuse_occupied(args: argparse.Namespace) -> Path:
    """OUT/last.pt, which may be there only where `--resume` was given."""
    last = args.out / "last.pt"
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun --max-restarts
    if last.exists() and not args.resume and not restarted:
        raise UserError(f"{args.out}: holds a run already; choose another --out, or --resume to go on with it")
    return last


def load_data(args: argparse.Namespace) -> tuple[data.Dataset, tuple[data.Split, data.Split] | None]:
    """The data set, and query and gallery of the training identities that `--val-ids` holds out."""
    dataset = data.load_dataset(args.dataset, args.data_root, args.modalities, args.image_size)
    if not args.val_ids:
        return dataset, None
    train, *validation = data.hold_out(dataset.train, args.val_ids)
    return replace(dataset, train=train), validation


def open_run(args: argparse.Namespace, device: torch.device, dataset, validation, model: MultiModalModel, log=0) -> Run:
    """Losses, the folder OUT and its log, of which the first `log` bytes stay, for a model and its data."""
    scheme = args.triplet, not args.plain_distance, not args.center_norm
    criterion = GraFTLoss(model.config.num_ids, model.width, *scheme)
    if runtime.rank() == 0:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be made ({error.strerror})") from None
        runtime.write_json(args.out / "config.json", settings(args))
    run_log = runtime.RunLog(args.out / "log.jsonl", log)
    return Run(args, device, dataset, validation, model.to(device), criterion.to(device), run_log)


def start_run(args: argparse.Namespace) -> tuple[Run, dict | None]:
    """Data, model and losses as `args` say, and the checkpoint to go on from, if any."""
    last = refuse_occupied(args)
    device = runtime.start(args.device, args.deterministic)
    if args.batch_size * runtime.world_size() == 1 and args.cross_entropy == "anchors":
        raise UserError("--batch-size 1: BatchNorm cannot train on one anchor; expected at least 2")
    torch.manual_seed(args.seed)
    dataset, validation = load_data(args)
    args.modalities = dataset.modalities
    SAMPLING[args.sampling](dataset.train.pids, args.batch_size, args.positives, args.seed)  # refuses what cannot be trained on
    config = GraFTConfig(
        modalities=dataset.modalities, num_ids=len(dataset.train.pids.unique()), image_size=args.image_size,
        distilled=not args.no_distilled, dropout=args.dropout, fusion_tokens=args.fusion_tokens, data_token=args.data_token,
        bnneck_features=args.bnneck_features, fusion=args.fusion, **BACKBONES[args.backbone],
    )  # fmt: skip
    model = build_model(config)
    checkpoint = runtime.load_checkpoint(last) if last.exists() else None
    if checkpoint:
        check_resumable(checkpoint, args, model.config, dataset)
        model.load_state_dict(checkpoint["model"])
    elif args.backbone_weights != "none":
        dropped = load_backbone(model, args.backbone_weights)
        runtime.print0(f"backbone from {args.backbone_weights}; left out: {', '.join(dropped) or 'nothing'}")
    run = open_run(args, device, dataset, validation, model, checkpoint["progress"]["log"] if checkpoint else 0)
    if checkpoint:
        run.criterion.load_state_dict(checkpoint["criterion"])
    return run, checkpoint


def check_resumable(checkpoint: dict, args: argparse.Namespace, config: GraFTConfig, dataset: data.Dataset) -> None:
    """Print which settings differ from the checkpoint's; raises UserError for those that it cannot go on with."""
    parts = ("config", "model", "criterion", "optimizer", "progress", "pids", "settings")
    if lacking := [name for name in parts if name not in checkpoint]:
        raise UserError(f"{args.out}/last.pt: lacks {', '.join(lacking)}; expected a checkpoint written by train.py")
    ours, theirs = asdict(config), checkpoint["config"]
    if changed := [name for name in ours if ours[name] != theirs.get(name)]:
        name = changed[0]
        raise UserError(f"{args.out}: its model has {name} {theirs.get(name)}, not {ours[name]}; choose another --out")
    if checkpoint["pids"] != dataset.train.pids.unique().tolist():
        raise UserError(f"{args.out}: was trained on other identities than those in {args.data_root}; choose another --out")
    old, new = checkpoint["settings"], settings(args)
    for name in sorted(new.keys() - {"resume", "stages"}):
        if name in old and old[name] != new[name]:
            runtime.print0(f"resumed with another --{name.replace('_', '-')}: {new[name]}, not {old[name]}")


def train(args: argparse.Namespace) -> dict:
    """The whole of a run: both stages, then the test. Returns the figures that OUT/metrics.json holds."""
    began = time.perf_counter()
    run, checkpoint = start_run(args)
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, np)}
    versions["python"] = platform.python_version()
    runtime.print0("settings:", settings(args))
    runtime.print0("versions:", versions, f"device: {run.device}, {runtime.world_size()} rank(s)")
    runtime.print0(
        f"{args.dataset}: {len(run.dataset.train)} training samples of {len(run.pids)} identities,"
        f" {len(run.dataset.query)} queries, {len(run.dataset.gallery)} gallery samples;"
        f" {run.model.num_parameters() / 1e6:.2f} M parameters"
    )
    run.log.write("start", settings=settings(args), versions=versions)
    progress, optimizer_state = Progress(), None
    if checkpoint:
        progress = Progress(**{name: value for name, value in checkpoint["progress"].items() if name != "log"})
        optimizer_state = checkpoint["optimizer"]
    for number, stage in enumerate(args.stages[progress.stage - 1 :], progress.stage):
        if number > progress.stage:
            progress, optimizer_state = Progress(number), None
        if progress.epoch < stage.epochs:
            train_stage(run, number, stage, progress, optimizer_state)
    metrics = run.evaluate(run.dataset.query, run.dataset.gallery)
    run.log.write("test", **metrics)
    if runtime.rank() == 0:
        runtime.write_json(args.out / "metrics.json", metrics)
    runtime.print0(evaluate.summary(metrics))
    runtime.print0(f"{args.out}: last.pt, log.jsonl, config.json, metrics.json; {time.perf_counter() - began:.0f} s in all")
    return metrics


@runtime.program
def main() -> None:
    train(parse())


if __name__ == "__main__":
    main()
