"""Train GraFT in two stages (section 4.1) and evaluate it.

python train.py                                                            the synthetic set
torchrun --nproc_per_node=8 train.py --dataset rgbnt100 --data-root DIR    the paper's recipe

Defaults are the data set's: `python train.py --dataset rgbnt100 --help` shows the paper's.
"""

import argparse
import inspect
import math
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import runtime
from baselines import FUSIONS, HAMNet
from losses import SCHEMES, GraFTLoss
from model import (
    BACKBONES,
    RESNETS,
    GraFTConfig,
    MultiModalModel,
    build_model,
    load_backbone,
    mean_over_modalities,
)
from runtime import UserError, real, whole

# --- recipes: what they change of the options' own defaults, which are the paper's

WEIGHTS = Path(__file__).parent / "weights"  # of the synthetic set, by extras.pretrain
SYNTHETIC = {  # ours: what reaches most in under five minutes on two CPU cores, see RESULTS.md
    "backbone": "small",
    "backbone_weights": str(WEIGHTS / "vit-small-rgb.pth"),
    "image_size": (64, 128),
    "positives": 1,
    # In so few steps vehicles upside down and erased parts cost more than they give
    "flips": (0.5, 0.0),
    "erase": 0.0,
    "batch_size": 26,  # what one GPU of the paper takes: 123 steps an epoch
    "warmup_steps": 30,
    # Stage 1, stage 2: as many epochs as five minutes allow
    "epochs": (2, 2),
    # Some hundred times the paper's: 492 steps have to do where the paper takes 33,300
    "lr": (2.5e-3, 1.2e-3),
    "weight_decay": (0.05, 0.05),
    "adam_betas": (0.9, 0.98, 0.9, 0.98),
    # A rate as high as this must come down again; the paper's constant one is tiny
    "schedule": ("sqrt", "sqrt"),
    "beta": (0.0, 0.005),  # paper, 5.2; see D2
}
RECIPES = {
    "synthetic": SYNTHETIC,
    "rgbn300": {  # published code's settings for this set; batch and positives: paper, see D19
        "lr": (2e-5, 5e-6),
        "weight_decay": (0.001, 1.58e-4),
        "adam_betas": (0.839, 0.978, 0.759, 0.986),
    },
    "rgbnt201": {"image_size": (256, 128)},  # customary
    "msvr310": {"image_size": (128, 256)},
    "wmveid863": {"image_size": (128, 256)},
    "market1501": {"image_size": (256, 128)},  # customary
}
PLUS = {  # --recipe plus, ours: the field's known means together; ablate.py --table plus
    "sampling": "identities",
    "batch_size": 26,  # 78 images: 13 identities x 6
    "triplet": "hardest",
    "cross_entropy": "all",
    "schedule": ("cosine", "cosine"),
    "label_smoothing": (0.1, 0.1),
    "bnneck_features": True,
    "modality_losses": 1.0,
}
PLUS_SYNTHETIC = {
    # What CLIP is to DeiT: the same ViT, pretrained on four times the vehicles, longer
    "backbone_weights": str(WEIGHTS / "vit-small-rgb-4800.pth"),
    "patch_dropout": (0.0, 0.5),  # with as many more epochs as that makes a step cheaper
    "epochs": (1, 2),
    "epoch_steps": (60, 0),  # frozen for 60 steps; briefly, as on real data
}
# On real data, as TOP-ReID and DeMo train: their rates, sizes, augmentation, some 8,000 steps. Not
# run here, where no such data is at hand
PLUS_REAL = {
    "image_size": (128, 256),  # a mosaic's tiles as they are
    "positives": 1,
    "batch_size": 42,  # 126 images: 21 identities x 6; theirs: 128
    "per_pass": 42,  # or the hardest triplets would be of half a batch
    "flips": (0.5, 0.0),
    "epochs": (5, 35),  # 5 to warm up, as theirs: the new parts, under a frozen backbone
    "warmup_steps": 200,
    "lr": (3.5e-4, 3.5e-4),
    "backbone_lr": (0.0, 1e-5),  # theirs: 5e-6 to 1e-5
    "weight_decay": (1e-4, 1e-4),
    "adam_betas": (0.9, 0.999, 0.9, 0.999),
}
PLUS_OF = {  # data set -> what it changes of PLUS: small sets take more epochs for as many steps
    "synthetic": PLUS_SYNTHETIC,
    "rgbnt100": PLUS_REAL,
    "rgbn300": {**PLUS_REAL, "epochs": (2, 12)},
    "rgbnt201": {  # persons: upright; losses of each sensor cost TOP-ReID 7 points of mAP there
        **PLUS_REAL,
        "image_size": (256, 128),
        "epochs": (10, 75),
        "modality_losses": 0.0,
    },
    "msvr310": {**PLUS_REAL, "epochs": (40, 290)},
    "wmveid863": {**PLUS_REAL, "epochs": (13, 90)},
    "market1501": {
        **PLUS_REAL,
        "image_size": (256, 128),
        "epochs": (3, 24),
        "modality_losses": 0.0,  # there is one
    },
}
HAMNET = {  # --fusion hamnet: its published code's settings, but for what is marked as ours
    "backbone": "resnet50",
    "backbone_weights": "imagenet",
    "image_size": (128, 256),
    "flips": (0.5, 0.0),
    "sampling": "identities",
    "samples": 4,
    "batch_size": 12,  # ours: 36 images, 9 identities x 4; theirs 8 x 4, which no three roles share
    "positives": 1,
    "triplet": "hardest",
    "margin": 0.3,
    "plain_distance": True,
    "cross_entropy": "all",
    "alpha": 1.0,
    "beta": (0.0, 0.0),
    "gamma": 1.0,
    "label_smoothing": (0.0, 0.0),  # theirs has no effect
    # One stage. An epoch shows each sample 3 times, so 40 are their 120 of once
    "epochs": (0, 40),
    "lr": (3.5e-4, 3.5e-4),
    "weight_decay": (5e-4, 5e-4),  # AdamW's, next to none at such a rate; theirs is Adam's
    "adam_betas": (0.9, 0.999, 0.9, 0.999),
    "schedule": ("steps", "steps"),
    "warmup_steps": 2400,  # a twelfth of RGBNT100's steps, as theirs
}
HAMNET_OF = {  # data set -> what it changes of HAMNET
    "synthetic": {  # ours: on as many samples as the default run sees
        "backbone": "resnet18",
        "backbone_weights": str(WEIGHTS / "resnet18-rgb.pth"),
        "image_size": (64, 128),
        "epochs": (0, 4),
        "schedule": ("cosine", "cosine"),  # as for GraFT, the rate must come down in so few steps
        "warmup_steps": 100,
    },
    "rgbnt201": {"image_size": (256, 128)},  # persons: upright
    "market1501": {"image_size": (256, 128)},
}


OWN_TOKENS = ("graft", "multistream")  # fusions with tokens of each modality, for their losses


@dataclass(frozen=True)
class Stage:
    """One of the two stages of section 4.1: what differs between them."""

    number: int  # 1 or 2
    frozen: bool  # the backbone
    epochs: int
    epoch_steps: int  # ends an epoch early; 0: all triplets
    lr: float
    backbone_lr: float | None  # None: lr
    weight_decay: float
    betas: tuple[float, float]  # AdamW's
    schedule: str
    warmup_steps: int
    beta: float  # weight of the center loss
    label_smoothing: float
    patch_dropout: float


# --- learning rate (section 5.2)

SCHEDULES = ("sqrt", "cosine", "steps", "constant")


def lr_factor(step: int, total_steps: int, warmup_steps: int, cooldown: float = 0.1) -> float:
    """What a stage's rate is multiplied by at `step` (0 .. total_steps - 1); published code.

    Linear warm-up to 1 at the end of `warmup_steps`, then sqrt(warmup / step), and over the last
    `cooldown` of all steps linearly from what was reached to 0.
    """
    # The published scheduler decays with the square root of time, so that its length need not be
    # known beforehand; only the cool-down has to know where the end is
    warmup = max(1, warmup_steps)
    cooldown_start = total_steps - round(cooldown * total_steps)
    at = min(step, cooldown_start)
    factor = (at + 1) / warmup if at < warmup else (warmup / at) ** 0.5
    if step < cooldown_start:
        return factor
    return factor * (total_steps - step) / (total_steps - cooldown_start)


def cosine_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """As lr_factor: linear warm-up, then half a cosine down to 0. Ours."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 + 0.5 * math.cos(math.pi * done)


def step_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """As lr_factor: linear warm-up, then a tenth from 40/120 of all steps on, and again from 70/120
    on; HAMNet's published code."""
    drops = sum(120 * step >= epoch * total_steps for epoch in (40, 70))
    warmup = max(1, min(warmup_steps, total_steps // 12))  # in short runs, too, before the drops
    return min(1.0, (step + 1) / warmup) * 0.1**drops


# --- what is trained


class Objective(nn.Module):
    """From images to losses: all that DistributedDataParallel has to see."""

    # The criterion is inside, too: its centroids train, and DDP reduces what forward has used.
    # Anchors, positives and negatives of all modalities are one batch: the published code's nine
    # passes of the backbone would give the same tokens for three times the kernel launches.

    def __init__(self, embedder: evaluate.Embedder, criterion: GraFTLoss):
        super().__init__()
        self.model, self.criterion, self.autocast = embedder.model, criterion, embedder.autocast

    def forward(
        self, images: dict[str, Tensor], labels: Tensor, rows: tuple[int, ...] = ()
    ) -> dict[str, Tensor]:
        """images (3B, 3, H, W) of anchors, positives, negatives; labels of the anchors, or of all.

        `rows` says how many samples each rank has in this pass.
        """
        if isinstance(self.model, HAMNet):  # its losses are not those of an embedding
            with self.autocast():
                streams = self.model.streams(images)
            return self.model.losses(streams, self.criterion, labels, rows)
        with self.autocast():
            own = self.model.encode(images)
        embeddings = mean_over_modalities(own)
        # Only what is classified goes through the BNNeck, so its statistics are the anchors' alone,
        # or those of all samples; labels are those of the first samples
        logits = self.model.classify(embeddings.fusion[: len(labels)])
        losses = self.criterion(embeddings, logits, labels, rows)
        if self.criterion.heads:
            named = dict(zip(images, own, strict=True))
            losses["modality"] = self.criterion.of_modalities(named, labels, rows)
            losses["loss"] = losses["loss"] + self.criterion.modality_weight * losses["modality"]
        return losses


def on_all_ranks(objective: Objective, unused: bool = False) -> nn.Module:
    """The objective, whose gradients become means over the ranks; nothing else is sent."""
    if runtime.world_size() == 1:
        return objective
    # Buffers need no sending: BatchNorm's are computed from all ranks' samples, a ResNet's too, and
    # masks never change.
    # torch has renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options = {sync: False, "gradient_as_bucket_view": True, "find_unused_parameters": unused}
    return DistributedDataParallel(objective, **options)


def make_optimizer(objective: Objective, stage: Stage, center_lr: float) -> torch.optim.AdamW:
    """AdamW of what a stage trains: new parts, backbone, and the centroids, which have no decay.

    A group's `peak` is what the schedule scales; the centroids keep their rate.
    """
    model, criterion = objective.model, objective.criterion
    backbone = [p for vit in model.backbones for p in vit.parameters()]
    old, centers = set(backbone), list(criterion.center.parameters())
    new = [p for p in objective.parameters() if p not in old and p not in set(centers)]
    backbone_lr = stage.lr if stage.backbone_lr is None else stage.backbone_lr
    groups = [
        {"params": new, "peak": stage.lr, "lr": stage.lr},
        {"params": backbone, "peak": backbone_lr, "lr": backbone_lr},
        {"params": centers, "peak": None, "lr": center_lr, "weight_decay": 0.0},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    # One kernel for all parameters instead of five for each; Apple's GPUs have none
    fused = new[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=stage.betas,
        weight_decay=stage.weight_decay,
        fused=fused,
    )


def optimizer_state(objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The optimizer's state by parameter name, so that other groups can take it up again."""
    # torch's own state dict goes by position, which changes when stage 2 unfreezes the backbone
    named = objective.named_parameters()
    return {name: optimizer.state[p] for name, p in named if p in optimizer.state}


def restore_optimizer(objective: Objective, optimizer, state: dict[str, dict]) -> None:
    """Give each parameter that still trains its old state; what is new to training has none."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in objective.named_parameters():
        if name in state and id(parameter) in trained:
            own = {key: value.to(parameter.device) for key, value in state[name].items()}
            optimizer.state[parameter] = own


# --- a run


class Batch(NamedTuple):
    """This rank's share of a pass."""

    images: dict[str, Tensor]  # (3B, 3, H, W), normalised
    labels: Tensor  # of the anchors (B,), or of all samples (3B,)
    weight: float  # so that the mean of the ranks' gradients is that of the step's triplets
    rows: tuple[int, ...]  # samples of each rank in this pass
    seed: int  # of dropout's draws
    is_last: bool  # pass of the step


@dataclass
class Progress:
    """What is done of which stage, and the losses since the epoch or the log line began."""

    stage: int = 1
    epoch: int = 0  # whole ones
    step: int = 0  # of the next epoch
    epoch_sums: dict[str, float] = field(default_factory=dict)
    log_sums: dict[str, float] = field(default_factory=dict)
    log_steps: int = 0

    def add(self, values: dict[str, float]) -> None:
        self.step, self.log_steps = self.step + 1, self.log_steps + 1
        for sums in (self.epoch_sums, self.log_sums):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value


class Run:
    """Data, model, losses and files of a run, and where it stands."""

    def __init__(self, args: argparse.Namespace, device: torch.device, splits, model, log_size=0):
        self.args = args
        self.dataset, self.validation = splits
        # Identities are numbers with gaps, cross-entropy wants 0 to C - 1: label i is label_pids[i]
        self.label_pids = self.dataset.train.pids.unique()
        self.embedder = evaluate.Embedder(
            model, self.dataset.mean, self.dataset.std, device, args.precision, args.workers
        )
        distances = (not args.plain_distance, not args.center_norm)
        sizes, heads = (model.config.num_ids, model.width), ()
        if args.modality_losses:
            heads = model.config.modalities
        self.criterion = GraFTLoss(*sizes, args.triplet, *distances, heads).to(device)
        self.criterion.modality_weight, self.criterion.margin = args.modality_losses, args.margin
        self.sampler = make_sampler(args, self.dataset)
        # Only here does the number of ranks matter: everything else is the step's, not a rank's
        self.shares = data.share_out(args.batch_size, args.per_pass, runtime.world_size())
        self.progress, self.stored_optimizer = Progress(), None
        self.checkpoint_path: Path | None = args.out / "last.pt"
        self.after_epoch = lambda: None  # when it is saved; what it raises ends the run
        # All that could be refused has been by now: from here on OUT is this run's
        if runtime.rank() == 0:
            runtime.make_folder(args.out, "--out")
            runtime.write_json(args.out / "config.json", settings(args))
        runtime.note_begun(args.out)
        self.log = runtime.RunLog(args.out / "log.jsonl", log_size)

    @property
    def model(self) -> MultiModalModel:
        return self.embedder.model

    def labels(self, pids: Tensor) -> Tensor:
        return torch.searchsorted(self.label_pids, pids)

    def epoch_steps(self, stage: Stage) -> int:
        return min(self.sampler.num_steps, stage.epoch_steps or self.sampler.num_steps)

    def stage_steps(self, stage: Stage) -> int:
        return stage.epochs * self.epoch_steps(stage)

    def step_indices(self, stage: Stage, epoch: int) -> np.ndarray:
        """Sample indices of an epoch's steps, (steps, 3, T); each stage draws its own."""
        # No stage has a thousand epochs, so no two stages draw the same
        return self.sampler.steps(1000 * stage.number + epoch)[: self.epoch_steps(stage)]

    def steps(self, stage: Stage) -> Iterator[Iterator["Batch"]]:
        """What is left of the epoch: of each step this rank's passes, read in that order."""
        epoch, first, rank = self.progress.epoch, self.progress.step, runtime.rank()
        # Known beforehand, so that reading can run ahead of the model, and a resumed run reads
        # nothing that was used before
        order = [
            step[:, ranks[rank]].ravel().tolist()
            for step in self.step_indices(stage, epoch)[first:]
            for ranks in self.shares
        ]
        embedder = self.embedder
        reading = data.read_batches(self.dataset.train, order, embedder.workers, embedder.device)
        with closing(reading) as images:
            batches = zip(order, images, strict=False)
            for step in range(first, self.epoch_steps(stage)):
                yield self.passes(batches, (self.args.seed, stage.number, epoch, step))

    def passes(self, batches: Iterator, key: tuple[int, ...]) -> Iterator["Batch"]:
        """This rank's passes of a step; `batches`: sample indices, and images on the device."""
        rank, device = runtime.rank(), self.embedder.device
        draws, kept = self.draw(key)
        for part, ranks in enumerate(self.shares):
            indices, images = next(batches)
            images = {name: image for name, image in images.items() if name in kept}
            images = self.prepare(images, draws[:, ranks[rank]].flatten(0, 1))
            pids = self.dataset.train.pids[indices]
            num_triplets = len(pids) // 3
            classified = pids if self.args.cross_entropy == "all" else pids[:num_triplets]
            yield Batch(
                images,
                runtime.to_device(self.labels(classified), device),
                # Losses are means over a pass, and DDP takes the mean over the ranks: with this
                # factor their sum is the mean over the step's triplets, however they are shared
                num_triplets * runtime.world_size() / self.args.batch_size,
                tuple(3 * (share.stop - share.start) for share in ranks),
                runtime.torch_seed(*key, part, 1 + rank),
                part == len(self.shares) - 1,
            )

    def draw(self, key: tuple[int, ...]) -> tuple[Tensor, set[str]]:
        """A step's draws: for augmentation (3, T, 7), and which modalities it keeps, one at least.

        Made for the whole step, so they do not depend on the number of ranks.
        """
        # A generator of its own: the global one is dropout's, and differs by rank
        generator = torch.Generator().manual_seed(runtime.torch_seed(*key, 0, 0))
        draws = torch.rand(3, self.args.batch_size, 7, generator=generator)
        # The same modalities in all passes: DDP reduces a parameter only if the last pass used it
        names = self.dataset.modalities
        keep = torch.rand(len(names), generator=generator) >= self.args.modality_dropout
        keep[torch.randint(len(names), (), generator=generator)] |= not keep.any()
        return draws, {name for name, kept in zip(names, keep.tolist(), strict=True) if kept}

    def prepare(self, images: dict[str, Tensor], draws: Tensor) -> dict[str, Tensor]:
        """Images as read -> augmented, normalised."""
        draws = runtime.to_device(draws, self.embedder.device)
        images = data.augment(images, draws, self.args.flips, self.args.erase)
        return self.embedder.normalise(images)

    def checkpoint_due(self, stage: Stage) -> bool:
        """Whether --checkpoint-every asks for one; the end of an epoch writes its own."""
        every, step = self.args.checkpoint_every, self.progress.step
        return every > 0 and step % every == 0 and step < self.epoch_steps(stage)

    def evaluate(self, query: data.Split, gallery: data.Split) -> dict:
        return evaluate.figures(self.model, evaluate.rank_splits(self.embedder, query, gallery))

    def describe(self) -> dict:
        """What a checkpoint says of the model besides its weights."""
        return {
            "config": asdict(self.model.config),
            "pids": self.label_pids.tolist(),
            "mean": self.dataset.mean,
            "std": self.dataset.std,
            "settings": settings(self.args),
            "criterion": self.criterion.state_dict(),
        }

    def save(self, optimizer_state: dict[str, dict]) -> None:
        """Write OUT/last.pt: all that evaluating or resuming needs. Draws need no state."""
        if self.checkpoint_path is None:
            return
        with runtime.rank0_first():  # no rank goes on before it is written
            if runtime.rank() == 0:  # all ranks hold the same weights, optimizer and centroids
                checkpoint = {
                    **self.describe(),
                    "model": self.model.state_dict(),
                    "optimizer": optimizer_state,
                    "progress": {**asdict(self.progress), "log_size": self.log.size},
                }
                runtime.save_checkpoint(self.checkpoint_path, checkpoint)

    def load(self, checkpoint: dict) -> None:
        """Go on from a checkpoint: weights, centroids, optimizer, place."""
        self.model.load_state_dict(checkpoint["model"])
        self.criterion.load_state_dict(checkpoint["criterion"])
        place = {
            name: value for name, value in checkpoint["progress"].items() if name != "log_size"
        }
        self.progress, self.stored_optimizer = Progress(**place), checkpoint["optimizer"]


def make_sampler(args: argparse.Namespace, dataset: data.Dataset) -> data.TripletSampler:
    common = (dataset.train.pids, args.batch_size, args.positives, args.seed)
    if args.sampling == "identities":
        return data.IdentitySampler(*common, args.samples)
    return data.TripletSampler(*common)


# --- training


def train(args: argparse.Namespace) -> dict:
    """The whole of a run: both stages, then the test. Returns what OUT/metrics.json holds."""
    began = time.perf_counter()
    run = start_run(args)
    announce(run)
    # Stage 1 fits the new parts to the backbone as it is; unfrozen at once, their random gradients
    # would spoil it (section 4.1; measured in RESULTS.md)
    for stage in args.stages:
        train_stage(run, stage)
    if not any(stage.epochs for stage in args.stages):
        run.save({})  # or no epoch's end would have written last.pt
    # The last weights, not the best epoch's: nothing is chosen on the test split
    metrics = run.evaluate(run.dataset.query, run.dataset.gallery)
    run.log.write("test", **metrics)
    if runtime.rank() == 0:
        runtime.write_json(args.out / "metrics.json", metrics)
    runtime.print0(evaluate.summary(metrics))
    seconds = time.perf_counter() - began
    files = "last.pt, log.jsonl, config.json, metrics.json"
    runtime.print0(f"{args.out}: {files}; {seconds:.0f} s in all")
    return metrics


@runtime.deferred_signals()
def train_stage(run: Run, stage: Stage) -> None:
    """Train what is left of a stage after run.progress, and save after each epoch.

    Raises Diverged where a loss or gradient is not finite, before it touches a weight, and Stopped
    on a signal, when the step is finished and saved.
    """
    if stage.number > run.progress.stage:
        # A new stage has a new optimizer, also in a resumed run; see D11
        run.progress, run.stored_optimizer = Progress(stage.number), None
    progress = run.progress
    if progress.stage > stage.number or progress.epoch >= stage.epochs:
        return
    objective, optimizer = begin_stage(run, stage)
    # With modality dropout a step leaves the encoder of a dropped modality out
    parallel = on_all_ranks(objective, unused=run.args.modality_dropout > 0)
    while progress.epoch < stage.epochs:
        began, first = time.perf_counter(), progress.step
        with closing(run.steps(stage)) as steps:
            for batches in progress_bar(steps, run, stage):
                rate = set_rate(optimizer, run, stage)
                sums: dict[str, Tensor] = {}
                for batch in batches:  # on the device already
                    # Dropout differs by rank and step; a resumed run draws the same again
                    torch.manual_seed(batch.seed)
                    with gradients_sent(parallel, batch.is_last):
                        losses = parallel(batch.images, batch.labels, batch.rows)
                        (losses["loss"] * batch.weight).backward()
                    add_losses(sums, losses, batch.weight)
                means, finite, stop = status(sums, optimizer)
                if not finite:
                    raise diverged(run, stage, means)
                optimizer.step()
                optimizer.zero_grad()
                # From here on the step is done, for a checkpoint and for a signal alike
                progress.add(means)
                log_step(run, stage, rate)
                if stop or run.checkpoint_due(stage):
                    run.save(optimizer_state(objective, optimizer))
                if stop:
                    raise stopped(run, stage)
        end_epoch(run, stage, progress.step - first, time.perf_counter() - began)
        run.save(optimizer_state(objective, optimizer))
        # A signal may have come after the last step, and only to some ranks
        if runtime.any_rank(runtime.noted_signal() > 0):
            raise stopped(run, stage)
        run.after_epoch()


def begin_stage(run: Run, stage: Stage) -> tuple[Objective, torch.optim.AdamW]:
    """Set model and losses to a stage; centroids start at the means of what their loss sees."""
    args, model, criterion = run.args, run.model, run.criterion
    # Settings win over what a checkpoint was trained with: a resumed run may have changed them
    model.train()
    model.freeze_backbone(stage.frozen)
    model.patch_dropout = stage.patch_dropout
    for backbone in model.backbones:
        backbone.checkpointing = args.checkpointing
    criterion.weights(args.alpha, stage.beta, args.gamma, stage.label_smoothing)
    # Once only: what the centroids have learned outlives a stage, a resume and a pruning round
    if stage.beta and not criterion.center.started:
        train = run.dataset.train
        criterion.center.start_at_means(run.embedder.fusion_tokens(train), run.labels(train.pids))
    objective = Objective(run.embedder, criterion)
    optimizer = make_optimizer(objective, stage, args.center_lr)
    if run.stored_optimizer:
        restore_optimizer(objective, optimizer, run.stored_optimizer)
        run.stored_optimizer = None
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    steps, left = run.stage_steps(stage), stage.epochs - run.progress.epoch
    runtime.print0(
        f"stage {stage.number}: {steps:,} steps in {stage.epochs} epochs, {left} to go;"
        f" {trained / 1e6:.2f} M parameters train"
    )
    return objective, optimizer


def set_rate(optimizer: torch.optim.Optimizer, run: Run, stage: Stage) -> float:
    """Set the coming step's rates, as the schedule says (section 5.2); returns the new parts'."""
    steps, step = run.epoch_steps(stage), run.progress.step
    step += run.progress.epoch * steps
    factor = schedule_factor(run.args, stage, step, stage.epochs * steps)
    for group in optimizer.param_groups:
        if group["peak"] is not None:
            group["lr"] = factor * group["peak"]
    return factor * stage.lr


def schedule_factor(args: argparse.Namespace, stage: Stage, step: int, total_steps: int) -> float:
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "cosine":
        return cosine_factor(step, total_steps, stage.warmup_steps)
    if stage.schedule == "steps":
        return step_factor(step, total_steps, stage.warmup_steps)
    return lr_factor(step, total_steps, stage.warmup_steps, args.cooldown)


def progress_bar(steps, run: Run, stage: Stage) -> tqdm:
    """The steps that are left of an epoch, shown by rank 0 where there is a terminal."""
    done, total = run.progress.step, run.epoch_steps(stage)
    name = f"stage {stage.number} epoch {run.progress.epoch + 1}"
    hidden = None if runtime.rank() == 0 else True
    return tqdm(steps, name, total, leave=False, initial=done, disable=hidden)


def gradients_sent(parallel: nn.Module, is_last: bool):
    """Context of a pass: of several, only the last sends the gradients, which have added up."""
    if is_last or runtime.world_size() == 1:
        return nullcontext()
    return parallel.no_sync()


def add_losses(sums: dict[str, Tensor], losses: dict[str, Tensor], weight: float) -> None:
    for name, value in losses.items():
        sums[name] = sums.get(name, 0) + value.detach() * weight


def status(sums: dict[str, Tensor], optimizer) -> tuple[dict[str, float], bool, bool]:
    """The step's mean losses and gradient norm, whether all is finite, whether to stop.

    One reduction over the ranks and one wait for the device.
    """
    # On a GPU the host runs ahead of the device; each value that it asks for stops it. So losses,
    # divergence and signals, which all ranks must see alike, cross together
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    # One number says whether all gradients are finite; a non-finite loss makes them so, too
    norm = torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None])
    bad = 1.0 - norm.isfinite().float()
    stop = torch.full_like(norm, float(runtime.noted_signal() > 0))
    values = runtime.read(runtime.all_sum(torch.stack([*sums.values(), norm, bad, stop])))
    *means, bad, stop = (value / runtime.world_size() for value in values)
    means = dict(zip([*sums, "gradient_norm"], means, strict=True))
    return means, bad == 0 and math.isfinite(means["loss"]), stop > 0


def log_step(run: Run, stage: Stage, rate: float) -> None:
    """Every --log-every steps: the means since the last such line, so the log tells a curve."""
    progress, every = run.progress, run.args.log_every
    every = every or max(1, run.stage_steps(stage) // 100)
    step = progress.epoch * run.epoch_steps(stage) + progress.step
    if step % every:
        return
    # The sums are part of a checkpoint, so that a resumed run writes the same lines
    means = {name: value / progress.log_steps for name, value in progress.log_sums.items()}
    run.log.write("step", stage=stage.number, step=step, lr=rate, **means)
    progress.log_sums, progress.log_steps = {}, 0


def end_epoch(run: Run, stage: Stage, steps: int, seconds: float) -> None:
    """Log and print an epoch's means, its speed, and the validation's figures if there are any."""
    progress = run.progress
    means = {name: value / progress.step for name, value in progress.epoch_sums.items()}
    speed = round(steps * run.args.batch_size / seconds, 1)
    # Before the validation, and before the checkpoint, which then resumes with the next epoch
    progress.epoch, progress.step, progress.epoch_sums = progress.epoch + 1, 0, {}
    record = {"stage": stage.number, "epoch": progress.epoch, **means, "triplets_per_second": speed}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
    if run.validation:
        record["validation"] = run.evaluate(*run.validation)
        shown += f"  validation mAP {100 * record['validation']['mAP']:.1f}"
    run.log.write("epoch", **record)
    epochs = f"epoch {progress.epoch}/{stage.epochs}"
    runtime.print0(f"stage {stage.number} {epochs}  {shown}  ({speed} triplets/s)")


class Diverged(UserError):
    """A loss or gradient was not finite: mostly a matter of the settings."""


def diverged(run: Run, stage: Stage, means: dict[str, float]) -> Diverged:
    """What to say of a step that is not finite; the log gets the names of all ranks' samples."""
    progress = run.progress
    # A bad sample is in another rank's share as likely as in this one's
    indices = run.step_indices(stage, progress.epoch)[progress.step].ravel()
    names = [run.dataset.train.samples[i].name for i in indices]
    place = {"stage": stage.number, "epoch": progress.epoch + 1, "step": progress.step + 1}
    run.log.write("not finite", **place, losses=str(means), batch=names)
    where = ", ".join(f"{name} {value}" for name, value in place.items())
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return Diverged(
        f"{where}: loss or gradient is not finite; losses {means}; samples {shown}, all in"
        f" {run.log.path}; the weights are untouched and {run.args.out}/last.pt, if there, is good:"
        " look at the samples, lower --lr, or try --precision fp32"
    )


def stopped(run: Run, stage: Stage) -> runtime.Stopped:
    """The exception that ends a run on a signal, which another rank may have had."""
    progress = run.progress
    place = f"stage {stage.number}, epoch {progress.epoch}"
    if progress.step:
        steps = run.epoch_steps(stage)
        place = f"stage {stage.number}, epoch {progress.epoch + 1}, step {progress.step} of {steps}"
    return runtime.Stopped(
        runtime.noted_signal() or signal.SIGTERM,
        f"stopped after {place}: resume with --resume --out {run.args.out}",
    )


# --- starting and resuming


def start_run(args: argparse.Namespace) -> Run:
    """Data, model and losses as `args` say, or as the checkpoint that is resumed."""
    device, splits, model, checkpoint = prepare(args)
    log_size = checkpoint["progress"]["log_size"] if checkpoint else 0
    # What the log holds beyond the checkpoint is written again by the steps that are done again
    run = Run(args, device, splits, model, log_size)
    if checkpoint:
        run.load(checkpoint)
    return run


def prepare(args: argparse.Namespace) -> tuple:
    """Device, splits, model and, to resume, checkpoint. Refuses mistakes, and writes nothing."""
    device = runtime.start(args.device, args.deterministic)
    # All that can be refused is refused before anything is written: a mistake leaves no trace
    last = refuse_occupied(args)
    torch.manual_seed(args.seed)
    splits = load_splits(args)
    dataset, _ = splits
    args.modalities = dataset.modalities  # as found, where none were chosen: a checkpoint says it
    check_batches(args, dataset)
    model = build_model(model_config(args, dataset))
    checkpoint = runtime.load_checkpoint(last) if last.exists() else None
    if checkpoint:
        check_resumable(checkpoint, args, model.config, dataset)
    elif args.backbone_weights != "none":
        fits = {"deit": args.backbone == "deit-b", "imagenet": args.backbone in RESNETS}
        if not fits.get(args.backbone_weights, True):
            raise UserError(
                f"--backbone-weights {args.backbone_weights}: not for --backbone {args.backbone};"
                " name a FILE, or none"
            )
        dropped = load_backbone(model, args.backbone_weights)
        more = f" and {len(dropped) - 8} more" if len(dropped) > 8 else ""  # CLIP's text tower
        left_out = (", ".join(dropped[:8]) or "nothing") + more
        runtime.print0(f"backbone from {args.backbone_weights}; left out: {left_out}")
    return device, splits, model, checkpoint


def refuse_occupied(args: argparse.Namespace) -> Path:
    """OUT/last.pt, which may exist only with --resume, or where torchrun restarts this very run."""
    last = args.out / "last.pt"
    if last.exists() and not args.resume and not runtime.restarted(args.out):
        raise UserError(
            f"{args.out}: holds a run already; choose another --out, or --resume to go on with it"
        )
    return last


def load_splits(args: argparse.Namespace) -> tuple[data.Dataset, tuple | None]:
    """The data set, and query and gallery of the identities that --val-ids holds out."""
    dataset = data.load_dataset(
        args.dataset,
        args.data_root,
        args.modalities,
        args.image_size,
        args.store,
        ranges=args.range,
    )
    if not args.val_ids:
        return dataset, None
    train, *validation = data.hold_out(dataset.train, args.val_ids)
    return replace(dataset, train=train), tuple(validation)


def check_batches(args: argparse.Namespace, dataset: data.Dataset) -> None:
    """Refuse what cannot be trained on, before anything is written."""
    # Run makes another: OUT exists only when this one could be made
    make_sampler(args, dataset)  # raises where the data has no triplets
    shares = data.share_out(args.batch_size, args.per_pass, runtime.world_size())
    smallest = min(ranks[-1].stop - ranks[0].start for ranks in shares)
    if smallest < 2 and args.cross_entropy == "anchors":
        raise UserError(
            f"--batch-size {args.batch_size} --per-pass {args.per_pass}: BatchNorm cannot train on"
            " the one anchor of a pass; expected at least 2"
        )


def model_config(args: argparse.Namespace, dataset: data.Dataset) -> GraFTConfig:
    own = {field.name: getattr(args, field.name, None) for field in fields(GraFTConfig)}
    own = {name: value for name, value in own.items() if value is not None}
    own["num_ids"] = len(dataset.train.pids.unique())
    return GraFTConfig(**{**backbone_row(args), **own})


def backbone_row(args: argparse.Namespace) -> dict:
    """What --backbone says of the model; --no-distilled matters only to rows that leave it open."""
    return {"distilled": not args.no_distilled, **{**BACKBONES, **RESNETS}[args.backbone]}


# What an epoch's triplets depend on: it cannot change in the middle of one, or the steps that are
# left would not be those that were announced
EPOCH_SETTINGS = ("seed", "sampling", "samples", "batch_size", "positives", "epoch_steps")


def check_resumable(
    checkpoint: dict, args: argparse.Namespace, config: GraFTConfig, dataset: data.Dataset
) -> None:
    """Print which settings differ from the checkpoint's; UserError where it cannot go on."""
    parts = ("config", "model", "criterion", "optimizer", "progress", "pids", "settings")
    lacking = [name for name in parts if name not in checkpoint]
    if lacking or "log_size" not in checkpoint["progress"]:
        what = ", ".join(lacking) or "the present form of its progress"
        raise UserError(
            f"{args.out}/last.pt: lacks {what}; expected a checkpoint of this version's train.py"
        )
    # A checkpoint of an older version may lack some: they are the defaults
    own, stored = asdict(config), {**asdict(GraFTConfig()), **checkpoint["config"]}
    for name in own:
        if own[name] != stored[name]:
            raise UserError(
                f"{args.out}: its model has {name} {stored[name]}, not {own[name]};"
                " choose another --out"
            )
    if checkpoint["pids"] != dataset.train.pids.unique().tolist():
        raise UserError(
            f"{args.out}: was trained on other identities than those in {args.data_root};"
            " choose another --out"
        )
    old, new, step = checkpoint["settings"], settings(args), checkpoint["progress"]["step"]
    if old.get("slip") != new.get("slip"):  # of extras.published
        raise UserError(
            f"{args.out}: was trained with slip {old.get('slip')}, not {new.get('slip')}; choose"
            " another --out"
        )
    for name in sorted(new.keys() - {"resume", "stages"}):
        if name not in old or old[name] == new[name]:
            continue
        option = f"--{name.replace('_', '-')}"
        if name == "modality_losses" and 0 in (old[name], new[name]):
            raise UserError(
                f"{option} {new[name]}: {args.out}/last.pt was trained with {old[name]}, so with"
                " other classifiers; choose another --out"
            )
        if step and name in EPOCH_SETTINGS:
            raise UserError(
                f"{option} {new[name]}: {args.out}/last.pt is {step} steps into an epoch that was"
                f" drawn with {old[name]}; resume it with that"
            )
        runtime.print0(f"resumed with another {option}: {new[name]}, not {old[name]}")


def announce(run: Run) -> None:
    """Print and log what is about to happen."""
    args, ranks = run.args, runtime.world_size()
    # What is needed to run it again, in the log and on the screen
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, np)}
    versions["python"] = platform.python_version()
    runtime.print0("settings:", settings(args))
    device, precision = run.embedder.device, args.precision
    fast = runtime.bf16_is_fast(device)
    precision = precision if precision != "auto" else "bf16" if fast else "fp32 (bf16 is slow here)"
    runtime.print0("versions:", versions)
    runtime.print0(f"device: {device}, {ranks} rank(s), {precision}")
    runtime.print0(
        f"{args.dataset}: {len(run.dataset.train)} training samples of {len(run.label_pids)}"
        f" identities, {len(run.dataset.query)} queries, {len(run.dataset.gallery)} gallery"
        f" samples; {run.model.num_parameters() / 1e6:.2f} M parameters"
    )
    sizes = [[share.stop - share.start for share in ranks] for ranks in run.shares]
    steps = [run.stage_steps(stage) for stage in args.stages]
    passes = "1 pass" if len(sizes) == 1 else f"{len(sizes)} passes, BatchNorm sees one at a time"
    share = " + ".join(map(str, sizes[0])) if ranks <= 16 else f"{sizes[0][0]} a rank"
    runtime.print0(
        f"a step: {args.batch_size} triplets in {passes}, {share} on {ranks} rank(s);"
        f" {steps[0]:,} + {steps[1]:,} steps, {sum(steps) * args.batch_size:,} triplets in all"
    )
    run.log.write("start", settings=settings(args), versions=versions)


# --- command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; what is not given is as the recipe says. `stages` holds both stages."""
    parser = make_parser()
    # Data set and recipe say what the others' defaults are, so they are read first
    early = runtime.Parser(add_help=False)
    early.add_argument("--dataset", default="synthetic")
    early.add_argument("--recipe", default="paper")
    early.add_argument("--fusion")
    early.add_argument("--epochs", nargs=2)
    given, _ = early.parse_known_args(argv)
    parser.set_defaults(**RECIPES.get(given.dataset, {}))
    if given.recipe == "plus":
        parser.set_defaults(**{**PLUS, **PLUS_OF.get(given.dataset, PLUS_REAL)})
        if given.fusion not in (None, *OWN_TOKENS):
            parser.set_defaults(modality_losses=0.0)
    if given.fusion == "hamnet":
        parser.set_defaults(**{**HAMNET, **HAMNET_OF.get(given.dataset, {})})
    if given.epochs:  # of all triplets, unless --epoch-steps says otherwise
        parser.set_defaults(epoch_steps=(0, 0))
    args = parser.parse_args(argv)
    if args.recipe == "plus" and not given.epochs:
        # a step on fewer patches costs that much less
        cheaper = zip(args.epochs, args.patch_dropout, strict=True)
        args.epochs = tuple(round(epochs / (1 - dropped)) for epochs, dropped in cheaper)
    # argparse gives lists where defaults are tuples; a resumed run compares them
    for name, value in vars(args).items():
        if isinstance(value, list):
            setattr(args, name, tuple(value))
    args.triplet = args.triplet or ("FFD" if args.fusion == "graft" else "FFF")
    args.out = args.out or Path("runs") / args.dataset
    args.stages = (make_stage(args, 1), make_stage(args, 2))
    check_combinations(args)
    return args


def make_stage(args: argparse.Namespace, number: int) -> Stage:
    own = {field.name: getattr(args, field.name, None) for field in fields(Stage)}
    own = {name: pair[number - 1] for name, pair in own.items() if isinstance(pair, tuple)}
    own |= {"number": number, "frozen": own["frozen"] == "yes", "warmup_steps": args.warmup_steps}
    return Stage(**own, betas=args.adam_betas[2 * number - 2 : 2 * number])


def check_combinations(args: argparse.Namespace) -> None:
    GraFTConfig(**backbone_row(args), fusion=args.fusion)  # raises for a ResNet in a ViT's place
    if args.fusion == "hamnet":
        for option, given, reason in (
            ("--recipe plus", args.recipe == "plus", "has a recipe of its own"),
            ("--beta", any(args.beta), "has no center loss; expected 0 0"),
            ("--patch-dropout", any(args.patch_dropout), "has no patches"),
            ("--checkpointing", args.checkpointing, "has BatchNorms, which must see a batch once"),
        ):
            if given:
                raise UserError(f"{option}: --fusion hamnet {reason}")
    if args.fusion != "graft":
        for option, given in (
            ("--fusion-tokens", args.fusion_tokens > 1),
            ("--data-token", args.data_token),
        ):
            if given:
                raise UserError(f"{option}: for --fusion graft; --fusion {args.fusion} has none")
    # The hardest pair of a batch is found by the labels of all its samples
    if args.triplet == "hardest" and args.cross_entropy != "all":
        raise UserError("--triplet hardest needs the labels of all samples: --cross-entropy all")
    if args.sampling == "identities" and args.triplet != "hardest":
        raise UserError(
            f"--sampling identities has no anchors, positives and negatives for {args.triplet}:"
            " add --triplet hardest"
        )
    if args.modality_losses and args.fusion not in OWN_TOKENS:
        raise UserError(f"--modality-losses: --fusion {args.fusion} has no tokens of a modality")
    last_data_token = args.data_token + args.fusion_tokens
    drops = args.fusion == "graft" and any(args.patch_dropout)
    row = backbone_row(args)
    if drops and last_data_token > 1 + row["distilled"] + row.get("registers", 0):
        raise UserError(
            f"--patch-dropout: leaves data token {args.data_token} out;"
            " expected one that is no patch's"
        )


def settings(args: argparse.Namespace) -> dict:
    """The resolved options as plain values."""
    plain = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    return {**plain, "stages": [asdict(stage) for stage in args.stages]}


def make_parser() -> runtime.Parser:
    """Every option once: default, range, meaning, and where the default is from (else: ours)."""
    parser = runtime.Parser(__doc__)
    text = "plus: ours, the field's known means together"
    parser.add_argument("--recipe", choices=("paper", "plus"), default="paper", help=text)
    add_data_options(parser.add_argument_group("data"))
    add_model_options(parser.add_argument_group("model"))
    add_loss_options(parser.add_argument_group("losses, Eq. (10)"))
    add_optimisation_options(parser.add_argument_group("optimisation"))
    add_run_options(parser.add_argument_group("run"))
    return parser


# option(NAME, default, type or choices, help). A pair of defaults is for stage 1 and stage 2.


def add_data_options(group) -> None:
    option = runtime.adder(group)
    data.add_options(group)
    option("--image-size", (224, 224), whole(1, 4096), "height, width; paper, 5.2", ("H", "W"))
    option("--positives", 8, whole(1), "triplets an anchor, each with another one; paper, 5.2")
    text = "identities: --samples of each identity, for --triplet hardest"
    option("--sampling", "triplets", ("triplets", "identities"), text)
    option("--samples", 6, whole(2), "of each identity, of --sampling identities")
    text = "probability of a horizontal and a vertical flip; paper, 5.2, the numbers are ours"
    option("--flips", (0.5, 0.5), real(0, 1), text, ("P", "P"))
    option("--erase", 0.5, real(0, 1), "probability of random erasing; published code")
    text = "hold out training identities and evaluate them after each epoch"
    option("--val-ids", 0, whole(0), text)
    data.add_store_option(group)
    text = "reading processes of a rank (default: its cores, at most 8)"
    option("--workers", None, whole(0), text)


def add_model_options(group) -> None:
    option = runtime.adder(group)
    text = "paper, 3.2; resnet50 and resnet18 for --fusion hamnet"
    option("--backbone", "deit-b", (*BACKBONES, *RESNETS), text)
    text = (
        "a file, see YOUR_DATA.md; deit: DeiT-B's, fetched; imagenet: torchvision's ResNet's,"
        " fetched; none: random weights; paper, 3.2"
    )
    option("--backbone-weights", "deit", str, text)
    option("--no-distilled", False, bool, "deit-b or small without the distillation token")
    text = "or a baseline, all else equal; hamnet: a CNN with a recipe and losses of its own"
    option("--fusion", "graft", FUSIONS, text)
    option("--fusion-tokens", 1, whole(1, 1000), "of --fusion graft; paper, 5.2")
    option("--data-token", 0, whole(0), "index of --fusion graft's data token D, Eq. (11)")
    text = "heads of a modality encoder; published code (default: 8)"
    option("--encoder-heads", None, whole(1, 1000), text)
    text = "its feed-forward width; torch's default (default: 2048, narrow backbones: less)"
    option("--encoder-hidden", None, whole(1, 2**19), text)
    option("--dropout", 0.1, real(0, 1), "of the modality encoders; torch's default")
    text = "what is tested: the fusion token, Eq. (7), or the data token, see D23"
    option("--test-token", "fusion", ("fusion", "data"), text)
    text = "test what leaves the BNNeck; the paper: what enters it"
    keep_or_not = argparse.BooleanOptionalAction
    group.add_argument("--bnneck-features", action=keep_or_not, default=False, help=text)
    text = "drop each modality for a step with this probability"
    option("--modality-dropout", 0.0, real(0, 1), text)
    option("--patch-dropout", (0.0, 0.0), real(0, 0.95), "share of patches that a step leaves out")


def add_loss_options(group) -> None:
    option = runtime.adder(group)
    text = "tokens of anchor, positive, negative; paper, 4.3 (default: FFD, baselines FFF)"
    option("--triplet", None, (*SCHEMES, "hardest"), text)
    text = "margin of the hardest triplets (default: a soft one, Eq. (8))"
    option("--margin", None, real(0), text)
    text = "the samples it sees; paper, 3.4 and published code"
    option("--cross-entropy", "anchors", ("anchors", "all"), text)
    text = "Euclidean distances in Eq. (8), not squared ones; published code"
    option("--plain-distance", False, bool, text)
    option("--center-norm", False, bool, "Eq. (9) as printed: the norm, not its square")
    text = "weight of triplet loss and cross-entropy on each modality's own tokens"
    option("--modality-losses", 0.0, real(0), text)
    option("--alpha", 0.5, real(0), "weight of the triplet loss; paper, 4.2")
    option("--beta", (0.0, 0.0005), real(0), "weight of the center loss; paper, 4.2, see D2")
    option("--gamma", 0.5, real(0), "weight of the cross-entropy; paper, 4.2")
    option("--label-smoothing", (0.0, 0.1), real(0, 1), "of the cross-entropy; paper, 5.2")


def add_optimisation_options(group) -> None:
    option = runtime.adder(group)
    option("--frozen", ("yes", "no"), ("yes", "no"), "the backbone; paper, 4.1")
    option("--epochs", (40, 60), whole(0), "0 leaves a stage out; published code")
    option("--epoch-steps", (0, 0), whole(0), "end an epoch early; 0: after all triplets")
    text = "triplets of a step, over all ranks; paper, 5.2: 8 GPUs x 26"
    option("--batch-size", 208, whole(1), text)
    text = "triplets that a rank takes at once; more are taken in several passes"
    option("--per-pass", 26, whole(1), text)
    option("--lr", (2.54e-5, 5e-6), real(0), "AdamW's rate at its peak; published code, paper 5.2")
    option("--backbone-lr", (None, None), real(0), "the backbone's; None: that of --lr")
    option("--weight-decay", (0.05, 0.0013), real(0), "AdamW's; published code")
    text = "AdamW's, two of each stage; published code"
    option("--adam-betas", (0.839, 0.978, 0.836, 0.979), real(0, 0.999999), text, ("B",) * 4)
    text = "sqrt: warm-up, decay, cool-down; paper, 5.2; steps: HAMNet's"
    option("--schedule", ("sqrt", "constant"), SCHEDULES, text)
    option("--warmup-steps", 500, whole(0), "of all schedules but constant; published code")
    text = "share of the steps at the end of the sqrt schedule; paper, 5.2"
    option("--cooldown", 0.1, real(0, 1), text)
    option("--center-lr", 1e-3, real(0), "rate of the centroids, see D10")


def add_run_options(group) -> None:
    option = runtime.adder(group)
    option("--out", None, Path, "folder to write (default: runs/DATASET)")
    option("--resume", False, bool, "go on from OUT/last.pt, if it is there")
    text = "write OUT/last.pt every so many steps, too; 0: after each epoch alone"
    option("--checkpoint-every", 0, whole(0), text)
    text = "write losses, rate and gradient norm to OUT/log.jsonl; 0: some 100 times a stage"
    option("--log-every", 0, whole(0), text)
    option("--seed", 0, whole(0), "of everything that is drawn")
    runtime.add_device_options(group)
    option("--deterministic", False, bool, "the same sums on GPUs, too: slower")
    option("--checkpointing", False, bool, "recompute activations: less memory, more time")


@runtime.program
def main() -> None:
    train(parse())


if __name__ == "__main__":
    main()
