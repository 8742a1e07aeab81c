"""Train GraFT in two stages (section 4.1) and evaluate it.

python train.py                                                            the synthetic set
torchrun --nproc_per_node=8 train.py --dataset rgbnt100 --data-root DIR    the paper's recipe

Read it from `train`, then `train_stage`, which holds the loop. Options and recipes: options.py.

Shapes: T triplets of a step, B triplets of one pass on one rank, so 3B images of each modality.
"""

import argparse
import inspect
import math
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
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
import options
import runtime
from losses import BY_IDENTITY, GraFTLoss
from model import GraFTConfig, MultiModalModel, build_model, load_backbone
from options import Stage, parse, settings
from runtime import UserError

# --- learning rate (section 5.2)


def lr_factor(step: int, total_steps: int, warmup_steps: int, cooldown: float = 0.1) -> float:
    """What a stage's rate is multiplied by at `step`, from 0 to total_steps - 1; published code.

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


def schedule_factor(stage: Stage, step: int, total_steps: int) -> float:
    if stage.schedule == "constant":
        return 1.0
    schedules = {"sqrt": lr_factor, "cosine": cosine_factor}
    schedule = schedules.get(stage.schedule) or runtime.imported("experiments.hamnet.step_factor")
    return schedule(step, total_steps, stage.warmup_steps)


# --- what is trained


class Objective(nn.Module):
    """From images to losses: all that DistributedDataParallel has to see.

    The criterion is part of it because its centroids train, and DDP reduces the gradients of what
    `forward` has used.
    """

    def __init__(self, embedder: evaluate.Embedder, criterion: GraFTLoss):
        super().__init__()
        self.model, self.criterion, self.autocast = embedder.model, criterion, embedder.autocast

    def forward(
        self, images: dict[str, Tensor], labels: Tensor, rank_sizes: tuple[int, ...] = ()
    ) -> dict[str, Tensor]:
        """images (3B, 3, H, W) of anchors, positives, negatives; labels of the anchors, or of all.

        `rank_sizes` says how many samples each rank has in this pass.
        """
        with self.autocast():
            embeddings = self.model(images)
        return self.model.losses(embeddings, labels, self.criterion, rank_sizes)


def on_all_ranks(objective: Objective) -> nn.Module:
    """The objective, whose gradients become means over the ranks; a step sends nothing else."""
    if runtime.world_size() == 1:
        return objective
    # Buffers need no sending: BatchNorm's are computed from all ranks' samples, and masks never
    # change. torch has renamed the option
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(objective, **{sync: False}, gradient_as_bucket_view=True)


def make_optimizer(objective: Objective, stage: Stage, center_lr: float) -> torch.optim.AdamW:
    """AdamW of what a stage trains: new parts, backbone, and the centroids, which have no decay.

    The schedule scales a group's `peak` rate; the centroids keep theirs.
    """
    model, criterion = objective.model, objective.criterion
    backbone = [p for part in model.backbones for p in part.parameters()]
    centers = list(criterion.center.parameters())
    others = {*backbone, *centers}
    new = [p for p in objective.parameters() if p not in others]
    backbone_lr = stage.lr if stage.backbone_lr is None else stage.backbone_lr
    groups = [
        {"params": new, "peak": stage.lr, "lr": stage.lr},
        {"params": backbone, "peak": backbone_lr, "lr": backbone_lr},
        {"params": centers, "peak": None, "lr": center_lr, "weight_decay": 0.0},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    # One kernel for all parameters instead of five for each
    fused = new[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=stage.betas,
        weight_decay=stage.weight_decay,
        fused=fused,
    )


# --- batches


class Batch(NamedTuple):
    """This rank's share of one pass of a step."""

    images: dict[str, Tensor]  # (3B, 3, H, W), augmented and normalised, on the device
    labels: Tensor  # of the anchors (B,), or of all samples (3B,)
    weight: float  # makes the mean over the ranks' gradients the mean over the step's triplets
    rank_sizes: tuple[int, ...]  # samples of each rank in this pass
    seed: int  # of dropout's draws
    is_last: bool  # pass of the step


class Batches:
    """The steps of an epoch: sampled, read, augmented, shared among ranks and passes.

    What a step draws depends on seed, stage, epoch and step alone, and is drawn for the whole step:
    neither the number of ranks nor a resumed run changes it.
    """

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, embedder):
        self.args, self.train, self.embedder = args, dataset.train, embedder
        # Identities are numbers with gaps, cross-entropy wants 0 to C - 1: label i is label_pids[i]
        self.label_pids = dataset.train.pids.unique()
        self.sampler = make_sampler(args, dataset)
        self.shares = data.share_out(args.batch_size, args.per_pass, runtime.world_size())
        smallest = min(ranks[-1].stop - ranks[0].start for ranks in self.shares)
        if smallest < 2 and args.cross_entropy == "anchors":
            raise UserError(
                f"--batch-size {args.batch_size} --per-pass {args.per_pass}: leaves a pass with one"
                " anchor, on which BatchNorm cannot train; expected at least 2"
            )
        if len(self.shares) > 1 and args.triplet in BY_IDENTITY:
            text = f"--triplet {args.triplet} compares samples within each of {len(self.shares)}"
            runtime.warn(f"{text} passes of a step alone; raise --per-pass if memory allows")

    def labels(self, pids: Tensor) -> Tensor:
        return torch.searchsorted(self.label_pids, pids)

    def num_steps(self, stage: Stage) -> int:
        """Steps of an epoch."""
        every = self.sampler.num_steps
        return min(stage.epoch_steps, every) if stage.epoch_steps else every

    def indices(self, stage: Stage, epoch: int) -> np.ndarray:
        """Sample indices of an epoch's steps, (steps, 3, T)."""
        # No stage has a thousand epochs, so no two stages draw the same
        return self.sampler.steps(1000 * stage.number + epoch)[: self.num_steps(stage)]

    def steps(self, stage: Stage, epoch: int, first: int) -> Iterator[Iterator[Batch]]:
        """An epoch's steps from `first` on: of each, this rank's passes, to be read in order."""
        # Known beforehand, so that reading can run ahead of the model, and a resumed run reads
        # nothing that was used before
        order = [
            step[:, ranks[runtime.rank()]].ravel().tolist()
            for step in self.indices(stage, epoch)[first:]
            for ranks in self.shares
        ]
        device = self.embedder.device
        reading = data.read_batches(self.train, order, self.embedder.workers, device)
        with closing(reading) as images:
            read = zip(order, images, strict=False)
            for step in range(first, self.num_steps(stage)):
                yield self.passes(read, (self.args.seed, stage.number, epoch, step))

    def passes(self, read: Iterator, key: tuple[int, ...]) -> Iterator[Batch]:
        """This rank's passes of a step; `read` gives indices of samples, and their images."""
        rank, args = runtime.rank(), self.args
        # A generator of its own: the global one is dropout's, and differs by rank
        generator = torch.Generator().manual_seed(runtime.torch_seed(*key, 0, 0))
        draws = [torch.rand(3, args.batch_size, n, generator=generator) for n in (7, 2)]
        draws = torch.cat(draws, -1)  # (3, T, 9), see data.augment
        for number, ranks in enumerate(self.shares):
            indices, images = next(read)
            images = self.prepare(images, draws[:, ranks[rank]].flatten(0, 1))
            pids = self.train.pids[indices]
            num_triplets = len(pids) // 3
            classified = pids if args.cross_entropy == "all" else pids[:num_triplets]
            yield Batch(
                images,
                runtime.to_device(self.labels(classified), self.embedder.device),
                # Losses are means over a pass, and DDP takes the mean over the ranks: with this
                # factor the sum over passes is the step's mean, however it is shared
                num_triplets * runtime.world_size() / args.batch_size,
                tuple(3 * (share.stop - share.start) for share in ranks),
                runtime.torch_seed(*key, number, 1 + rank),
                number == len(self.shares) - 1,
            )

    def prepare(self, images: dict[str, Tensor], draws: Tensor) -> dict[str, Tensor]:
        """Images as read -> augmented, normalised."""
        args, draws = self.args, runtime.to_device(draws, self.embedder.device)
        images = data.augment(images, draws, args.flips, args.erase, args.pad)
        return self.embedder.normalise(images)


def make_sampler(args: argparse.Namespace, dataset: data.Dataset) -> data.TripletSampler:
    common = (dataset.train.pids, args.batch_size, args.positives, args.seed)
    if args.triplet in BY_IDENTITY:
        return data.IdentitySampler(*common, args.samples)
    return data.TripletSampler(*common)


# --- a run


@dataclass
class Progress:
    """Position in training, and sums of the losses for the epoch's line and for the log's."""

    stage: int = 1
    epoch: int = 0  # epochs that are done
    step: int = 0  # steps that are done of the epoch after them
    epoch_sums: dict[str, float] = field(default_factory=dict)
    log_sums: dict[str, float] = field(default_factory=dict)
    log_steps: int = 0

    def add(self, losses: dict[str, float]) -> None:
        self.step, self.log_steps = self.step + 1, self.log_steps + 1
        for sums in (self.epoch_sums, self.log_sums):
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value


class Run:
    """Settings, data, model, losses, files, and how far training has come."""

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        dataset: data.Dataset,
        model: MultiModalModel,
        validation: tuple[data.Split, data.Split] | None = None,
    ):
        self.args, self.dataset, self.validation = args, dataset, validation
        mean, std = dataset.mean, dataset.std
        demanded = model.backbones[0].mean_std  # by timm's weights
        if args.normalise == "imagenet":
            demanded = demanded or data.IMAGENET
        if demanded:
            mean, std = (dict.fromkeys(dataset.modalities, values) for values in demanded)
        self.embedder = evaluate.Embedder(
            model, mean, std, device, args.precision, args.workers, args.features
        )
        self.batches = Batches(args, dataset, self.embedder)
        self.criterion = GraFTLoss(
            model.config.num_ids, model.width, args.triplet, squared=not args.plain_distance
        ).to(device)
        self.criterion.margin = args.margin
        self.progress, self.stored_optimizer = Progress(), None
        self.shown = time.perf_counter()  # the last line of progress
        self.within_step = False  # some of its passes are done
        self.checkpoint_path: Path | None = args.out / "last.pt"
        self.log = None

    @property
    def model(self) -> MultiModalModel:
        return self.embedder.model

    def steps(self, stage: Stage) -> tuple[int, int]:
        """How many steps of a stage are done, and how many it has."""
        an_epoch = self.batches.num_steps(stage)
        return self.progress.epoch * an_epoch + self.progress.step, stage.epochs * an_epoch

    def open_out(self, log_size: int = 0, resumed: bool = False) -> None:
        """Begin to write to OUT, which no other process may do until this one ends."""
        out = self.args.out
        if runtime.rank() == 0:
            self.lock = runtime.lock_folder(out)
            if (out / "last.pt").exists() and not resumed:  # opening the images takes its time
                raise UserError(f"{out}: another run has just ended there; choose another --out")
            runtime.write_json(out / "config.json", settings(self.args))
        # What the log holds beyond a checkpoint, the steps that are done again write again
        self.log = runtime.RunLog(out / "log.jsonl", log_size)

    def test(self, query: data.Split, gallery: data.Split) -> dict:
        return evaluate.metrics_dict(
            self.model, evaluate.rank_splits(self.embedder, query, gallery)
        )

    def describe(self) -> dict:
        """All that a checkpoint holds but the model's weights and the position in training."""
        return {
            "config": asdict(self.model.config),
            "pids": self.batches.label_pids.tolist(),
            "samples": self.dataset.train.digest(),
            "mean": self.embedder.mean,
            "std": self.embedder.std,
            "settings": settings(self.args),
            "criterion": self.criterion.state_dict(),
        }

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write OUT/last.pt: all that evaluating or resuming needs. Draws need no state."""
        if self.checkpoint_path is None:
            return
        with runtime.rank0_first():  # no rank continues before it is written
            if runtime.rank() == 0:  # all ranks hold the same weights, optimizer and centroids
                checkpoint = {
                    **self.describe(),
                    "model": self.model.state_dict(),
                    "optimizer": optimizer.state_dict() if optimizer else None,
                    "progress": {**asdict(self.progress), "log_size": self.log.size},
                }
                runtime.save_checkpoint(self.checkpoint_path, checkpoint)

    def load(self, checkpoint: dict) -> None:
        """Continue from a checkpoint: weights, centroids, optimizer, position."""
        self.model.load_state_dict(checkpoint["model"])
        self.criterion.load_state_dict(checkpoint["criterion"])
        progress = {n: v for n, v in checkpoint["progress"].items() if n != "log_size"}
        self.progress, self.stored_optimizer = Progress(**progress), checkpoint["optimizer"]


# --- training


def train(args: argparse.Namespace) -> dict:
    """A whole run: both stages, then the test. Returns what OUT/metrics.json holds."""
    began = time.perf_counter()
    run = start_run(args)
    announce(run)
    # Stage 1 fits the new parts to the backbone as it is: from the first step on their random
    # gradients would change it, too (section 4.1; measured in RESULTS.md)
    for stage in run.args.stages:
        train_stage(run, stage)
    if not any(stage.epochs for stage in run.args.stages):
        run.save(None)  # no epoch's end has
    # The last weights, not the best epoch's: nothing is chosen on the test split
    metrics = final_test(run)
    files = "config.json, last.pt, log.jsonl" + (", metrics.json" if metrics else "")
    seconds = time.perf_counter() - began
    runtime.print0(f"{run.args.out}: {files}; {seconds:.0f} s in all")
    return metrics


@runtime.deferred_signals()
def train_stage(run: Run, stage: Stage) -> None:
    """Train what is left of a stage after run.progress, and save after each epoch.

    Raises Diverged where a loss or gradient is not finite, before it touches a weight, and Stopped
    on a signal: when the step is finished and saved, or at once where images do not arrive.
    """
    if stage.number > run.progress.stage:
        # A new stage has a new optimizer, also in a resumed run; see D11
        run.progress, run.stored_optimizer = Progress(stage.number), None
    progress = run.progress
    if progress.stage > stage.number or progress.epoch >= stage.epochs:
        return
    objective, optimizer = begin_stage(run, stage)
    parallel = on_all_ranks(objective)
    while progress.epoch < stage.epochs:
        try:
            train_epoch(run, stage, parallel, optimizer)
        except runtime.Stopped:  # while waiting for images
            # Within a step BatchNorm has moved, and ranks may have done different steps: then the
            # end of the epoch before is what --resume finds
            if runtime.world_size() == 1 and not run.within_step:
                run.save(optimizer)
            raise
        run.save(optimizer)
        # A signal may have come after the last step, and only to some ranks
        if runtime.any_rank(runtime.noted_signal() > 0):
            raise stopped(run, stage)


def train_epoch(run: Run, stage: Stage, parallel: nn.Module, optimizer) -> None:
    """What is left of an epoch, or of it until a signal came."""
    progress, total = run.progress, run.batches.num_steps(stage)
    began, first = time.perf_counter(), progress.step
    name = f"{stage.name}, epoch {progress.epoch + 1} of {stage.epochs}"
    hidden = None if runtime.rank() == 0 else True  # None: where there is no terminal
    with closing(run.batches.steps(stage, progress.epoch, first)) as steps:
        bar = tqdm(steps, name, total, leave=False, initial=first, disable=hidden)
        for passes in bar:
            rate = set_rate(optimizer, run, stage)
            sums: dict[str, Tensor] = {}
            for batch in passes:
                torch.manual_seed(batch.seed)  # dropout differs by rank and step
                # Gradients add up over the passes, and the last pass alone sends them
                alone = batch.is_last or runtime.world_size() == 1
                with nullcontext() if alone else parallel.no_sync():
                    losses = parallel(batch.images, batch.labels, batch.rank_sizes)
                    (losses["loss"] * batch.weight).backward()
                run.within_step = True
                for term, value in losses.items():
                    sums[term] = sums.get(term, 0) + value.detach() * batch.weight
            means, stop = mean_over_ranks(sums, optimizer)
            if not all(map(math.isfinite, means.values())):
                raise diverged(run, stage, means)
            optimizer.step()
            optimizer.zero_grad()
            progress.add(means)
            run.within_step = False
            log_step(run, stage, rate)
            seconds = (time.perf_counter() - began) / (progress.step - first)
            show_step(run, stage, bar, f"{name}, step {progress.step} of {total}", seconds)
            if stop:
                return
    end_epoch(run, stage, progress.step - first, time.perf_counter() - began)


def begin_stage(run: Run, stage: Stage) -> tuple[Objective, torch.optim.AdamW]:
    """Set model and losses to a stage; centroids start at the means of what their loss sees."""
    args, model, criterion = run.args, run.model, run.criterion
    model.train()
    model.freeze_backbone(stage.frozen)
    model.patch_dropout = stage.patch_dropout
    criterion.set_weights(args.alpha, stage.beta, args.gamma, stage.label_smoothing)
    # Once only: what the centroids have learned outlives a stage, a resume and a pruning round
    if stage.beta and not criterion.center.started:
        split = run.dataset.train
        labels = run.batches.labels(split.pids)
        criterion.center.start_at_means(run.embedder.fusion_tokens(split), labels)
    objective = Objective(run.embedder, criterion)
    optimizer = make_optimizer(objective, stage, args.center_lr)
    if run.stored_optimizer:
        optimizer.load_state_dict(run.stored_optimizer)
        run.stored_optimizer = None
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    length = f"{stage.epochs} epochs, {run.steps(stage)[1]:,} steps"
    runtime.print0(f"{stage.name}: {length}; {trained / 1e6:.2f} M parameters train")
    return objective, optimizer


def set_rate(optimizer: torch.optim.Optimizer, run: Run, stage: Stage) -> float:
    """Set the coming step's rates, as the schedule says (section 5.2); returns the new parts'."""
    factor = schedule_factor(stage, *run.steps(stage))
    for group in optimizer.param_groups:
        if group["peak"] is not None:
            group["lr"] = factor * group["peak"]
    return factor * stage.lr


def mean_over_ranks(sums: dict[str, Tensor], optimizer) -> tuple[dict[str, float], bool]:
    """A step's losses and gradient norm, and whether a rank was told to stop.

    One reduction over the ranks and one wait for the device: on a GPU the host runs ahead, and each
    value that it asks for stops it. A NaN or infinity of any rank survives the sum.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None])
    stop = torch.full_like(norm, float(runtime.noted_signal() > 0))
    totals = runtime.all_sum(torch.stack([*sums.values(), norm, stop])).tolist()
    means = [total / runtime.world_size() for total in totals]
    return dict(zip([*sums, "gradient_norm"], means[:-1], strict=True)), means[-1] > 0


LOG_LINES = 100  # of a stage, so that the log tells a curve whatever the stage's length


def log_step(run: Run, stage: Stage, rate: float) -> None:
    """Write the means since the last line to OUT/log.jsonl, some LOG_LINES times a stage."""
    progress, (step, total) = run.progress, run.steps(stage)
    if step % max(1, total // LOG_LINES):
        return
    # The sums are part of a checkpoint, so that a resumed run writes the same lines
    means = {name: value / progress.log_steps for name, value in progress.log_sums.items()}
    run.log.write("step", stage=stage.number, step=step, lr=rate, **means)
    progress.log_sums, progress.log_steps = {}, 0


LINE_SECONDS = 60  # between lines where there is no terminal


def show_step(run: Run, stage: Stage, bar: tqdm, name: str, seconds: float) -> None:
    """The epoch's mean loss so far and the time left: on the bar, or in a line about once a minute.

    `seconds` is what a step takes.
    """
    mean = run.progress.epoch_sums["loss"] / run.progress.step
    text = f"loss {mean:.3f}{time_left(run, stage, seconds)}"
    bar.set_postfix_str(text, refresh=False)
    if bar.disable and time.perf_counter() - run.shown >= LINE_SECONDS:
        run.shown = time.perf_counter()
        runtime.print0(f"{name}: {text}")


def time_left(run: Run, stage: Stage, seconds: float) -> str:
    """What the rest of the run takes, by the time of a step; "" for less than two minutes."""
    done, total = run.steps(stage)
    left = seconds * (total - done)
    for later in run.args.stages[stage.number :]:
        # No backward pass goes through a frozen backbone, so a step takes about a third
        factor = 3.0 ** (stage.frozen - later.frozen)
        left += factor * seconds * later.epochs * run.batches.num_steps(later)
    minutes = round(left / 60)
    if minutes < 2:
        return ""
    return f", about {minutes} min left" if minutes < 120 else f", about {minutes // 60} h left"


def end_epoch(run: Run, stage: Stage, steps: int, seconds: float) -> None:
    """Log and print an epoch's means, its speed, and the validation's figures if there are any."""
    progress = run.progress
    means = {name: value / progress.step for name, value in progress.epoch_sums.items()}
    speed = round(steps * run.args.batch_size / seconds, 1)
    progress.epoch, progress.step, progress.epoch_sums = progress.epoch + 1, 0, {}
    record = {"stage": stage.number, "epoch": progress.epoch, **means, "triplets_per_second": speed}
    text = f"loss {means['loss']:.3f}, cross-entropy {means['cross_entropy']:.3f}"
    if run.validation:
        metrics = run.test(*run.validation)
        record["validation"] = {k: v for k, v in metrics.items() if k != "queries"}
        text += f", validation mAP {100 * metrics['mAP']:.1f}"
    run.log.write("epoch", **record)
    name = f"{stage.name}, epoch {progress.epoch} of {stage.epochs}"
    left = time_left(run, stage, seconds / max(1, steps))
    runtime.print0(f"{name}: {text} ({speed} triplets/s{left})")


class Diverged(UserError):
    """A loss or gradient was not finite, mostly because of the settings."""


def diverged(run: Run, stage: Stage, means: dict[str, float]) -> Diverged:
    """What to say of a step that is not finite; the log gets the names of all ranks' samples."""
    epoch, step = run.progress.epoch, run.progress.step
    indices = run.batches.indices(stage, epoch)[step].ravel()
    names = [run.dataset.train.samples[i].name for i in indices]
    place = {"stage": stage.number, "epoch": epoch + 1, "step": step + 1}
    run.log.write("not finite", **place, losses=str(means), batch=names)
    where = ", ".join(f"{name} {number}" for name, number in place.items())
    return Diverged(
        f"{where}: loss or gradient is not finite ({means}); samples {', '.join(names[:3])}, ...,"
        f" all in {run.log.path}. The weights are unchanged and {run.args.out}/last.pt, if it"
        " exists, is good: look at the samples, lower --lr, or try --precision fp32"
    )


def stopped(run: Run, stage: Stage) -> runtime.Stopped:
    """The exception that ends a run on a signal, which another rank may have had."""
    step, steps = run.progress.step, run.batches.num_steps(stage)
    where = f"{stage.name}, epoch {run.progress.epoch}"
    if step:
        where = f"{stage.name}, epoch {run.progress.epoch + 1}, step {step} of {steps}"
    text = f"stopped after {where}: continue with --resume --out {run.args.out}"
    return runtime.Stopped(runtime.noted_signal() or signal.SIGTERM, text)


def final_test(run: Run) -> dict:
    """Evaluate on the test split and write OUT/metrics.json; {} where there is none."""
    query, gallery = run.dataset.query, run.dataset.gallery
    if not len(query) or not len(gallery):
        runtime.print0(f"not tested: {run.args.data_root} has no query and gallery samples")
        return {}
    metrics = run.test(query, gallery)
    run.log.write("test", **{k: v for k, v in metrics.items() if k != "queries"})
    if runtime.rank() == 0:
        runtime.write_json(run.args.out / "metrics.json", metrics)
    runtime.print0(evaluate.summary(metrics))
    return metrics


# --- starting and resuming


def start_run(args: argparse.Namespace) -> Run:
    """Data, model and losses as `args` say, or as the run in OUT that is resumed.

    All that can be refused is refused, and every image has been opened, before OUT is touched.
    """
    args, checkpoint = stored_run(args)
    weights = args.backbone_weights
    known = weights in ("pretrained", "none") or runtime.checkpoint_file(weights).is_file()
    if not checkpoint and not known:
        text = "expected a file, a run's folder, pretrained or none"
        raise UserError(f"--backbone-weights {weights}: no such file; {text}")
    device = runtime.start(args.device, args.deterministic)
    torch.manual_seed(args.seed)
    dataset, validation = load_splits(args)
    args.modalities = dataset.modalities  # as found, where none were chosen
    model = build_model(model_config(args, dataset))
    if checkpoint:
        check_same_samples(args, checkpoint, dataset)
    elif args.backbone_weights != "none":
        dropped = load_backbone(model, args.backbone_weights)
        left_out = f"; not used: {', '.join(dropped)}" if 0 < len(dropped) < 9 else ""
        runtime.print0(f"backbone from {args.backbone_weights}{left_out}")
    run = Run(args, device, dataset, model, validation)
    for split in (dataset.train, dataset.query, dataset.gallery, *(validation or ())):
        split.open()
    if checkpoint:
        run.load(checkpoint)
    run.open_out(checkpoint["progress"]["log_size"] if checkpoint else 0, bool(checkpoint))
    return run


def stored_run(args: argparse.Namespace) -> tuple[argparse.Namespace, dict | None]:
    """With --resume, the settings and the checkpoint of the run in OUT, if it holds one."""
    last = args.out / "last.pt"
    if not last.exists():
        return args, None
    if not args.resume:
        raise UserError(
            f"{args.out}: holds a run already; choose another --out, or continue it with --resume"
        )
    checkpoint = runtime.load_checkpoint(last)
    parts = ("config", "model", "criterion", "optimizer", "progress", "settings", "samples")
    if lacking := [name for name in parts if name not in checkpoint]:
        raise UserError(
            f"{last}: lacks {', '.join(lacking)}, so it can be evaluated but not continued; choose"
            " another --out"
        )
    return options.resumed(args, checkpoint["settings"]), checkpoint


def check_same_samples(args: argparse.Namespace, checkpoint: dict, dataset: data.Dataset) -> None:
    """Refuse to continue on other training samples: the triplets that are left would be others."""
    if checkpoint["samples"] != dataset.train.digest():
        raise UserError(
            f"{args.data_root}: its training samples are not those of the run in {args.out};"
            " restore them, or choose another --out"
        )


def load_splits(
    args: argparse.Namespace, need: tuple[str, ...] = ("train",), render: bool = True
) -> tuple[data.Dataset, tuple | None]:
    """The data set, and query and gallery of the identities that --val-ids holds out."""
    if render and args.dataset == "synthetic":
        runtime.imported("synthetic.render.find_folder")(Path(args.data_root), render=True)
    dataset = data.load_dataset(
        args.dataset, args.data_root, args.modalities, args.image_size, args.store, need
    )
    if len(dataset.query) and len(dataset.gallery):
        evaluate.check_matches(dataset.query, dataset.gallery)
    if not args.val_ids:
        return dataset, None
    num_ids = len(dataset.train.pids.unique())
    if args.val_ids > num_ids - 2:
        raise UserError(
            f"--val-ids {args.val_ids}: leaves too few of the {num_ids} training identities;"
            " triplets need two"
        )
    train, *validation = data.hold_out(dataset.train, args.val_ids)
    evaluate.check_matches(*validation)
    return replace(dataset, train=train), tuple(validation)


def model_config(args: argparse.Namespace, dataset: data.Dataset) -> GraFTConfig:
    """What the options, the backbone and the data set say of the model."""
    chosen = ("image_size", "stride", "dropout", "fusion_tokens", "data_token", "fusion")
    values = {name: getattr(args, name) for name in chosen}
    if args.backbone.startswith("timm:"):
        config_of = runtime.imported("extras.timm_backbone.config_of")
        values |= config_of(args.backbone.removeprefix("timm:"))
    if args.backbone in options.BACKBONES:
        values |= options.BACKBONES[args.backbone]
    else:
        values["backbone"] = args.backbone
    num_ids = len(dataset.train.pids.unique())
    return GraFTConfig(modalities=dataset.modalities, num_ids=num_ids, **values)


def announce(run: Run) -> None:
    """Print and log what is about to happen, and what is needed to do it again."""
    args, device, dataset = run.args, run.embedder.device, run.dataset
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, np)}
    versions["python"] = platform.python_version()
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if runtime.bf16_is_fast(device) else "fp32"
    for name, values in (("settings", settings(args)), ("versions", versions)):
        runtime.print0(f"{name}:", " ".join(f"{key}={value}" for key, value in values.items()))
    runtime.print0(
        f"{runtime.machine(device)} ({device}), {runtime.world_size()} rank(s), {precision};"
        f" {len(dataset.train)} training samples of {run.model.config.num_ids} identities,"
        f" {len(dataset.query)} queries, {len(dataset.gallery)} gallery samples;"
        f" {run.model.num_parameters() / 1e6:.2f} M parameters"
    )
    run.log.write("start", settings=settings(args), versions=versions)


@runtime.program
def main() -> None:
    train(parse())


if __name__ == "__main__":
    main()
