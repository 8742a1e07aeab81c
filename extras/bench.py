"""Time this code beside its peers, in the same run and in turns, and print how many times as fast it is.

python -m extras.bench                            the core rows, some minutes
python -m extras.bench --rows step1,step2         some of them
python -m extras.bench --full --plot growth.png   all of them, and how cost grows with batch, modalities, tokens, gallery and ranks

A ratio is the peer's median time by ours. Bare times say little on a shared machine: they are shown, and judged only where
no peer is. Where less than what was asked is reached, the machine's own rate of matrix products says how much could be.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import evaluate
import prune
import runtime
import train
from extras import pictures
from losses import GraFTLoss, triplet_soft_margin
from model import BACKBONES, GraFT, GraFTConfig, ViT
from runtime import UserError

# --- peers, of public parts


def timm_vit(image_size: tuple[int, int], dim: int, depth: int, heads: int) -> nn.Module:
    """timm's way of a distilled ViT; with DeiT-B's sizes it is its deit_base_distilled_patch16_224."""
    try:
        from timm.models.deit import VisionTransformerDistilled
    except ImportError:
        raise UserError(
            "timm is not installed, and is what this row compares with: pip install -r requirements-dev.txt"
        ) from None
    return VisionTransformerDistilled(image_size, 16, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0)


class PublishedStep(nn.Module):
    """The published code's way of a training step: fp32, a pass of its own for each role and each modality.

    Called like train.TrainingStep. Parameters are named as in GraFT, whose weights it copies.
    """

    def __init__(self, model: GraFT, stage: train.Stage):
        super().__init__()
        config, self.stage = model.config, stage
        layer = partial(nn.TransformerEncoderLayer, config.dim, config.encoder_heads, config.encoder_hidden, batch_first=True)
        self.backbone = timm_vit(config.image_size, config.dim, config.depth, config.heads)
        self.encoders = nn.ModuleDict({modality: layer() for modality in config.modalities})
        self.fusion_token = nn.Parameter(torch.empty_like(model.fusion_token))
        self.bottleneck = nn.BatchNorm1d(config.dim)
        self.classifier = nn.Linear(config.dim, config.num_ids, bias=False)
        self.register_buffer("centers", torch.zeros(config.num_ids, config.dim), persistent=False)
        self.load_state_dict(model.state_dict())
        self.backbone.requires_grad_(not stage.frozen)
        self.bottleneck.bias.requires_grad_(False)

    def embed(self, images: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One role's images {modality: (B, 3, H, W)} -> its fusion and data tokens, both (B, D)."""
        fusion, data = [], []
        for modality, image in images.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stage.frozen):
                tokens = self.backbone.forward_features(image)  # (B, N, D)
            encoded = self.encoders[modality](torch.cat([self.fusion_token.expand(len(tokens), -1, -1), tokens], 1))
            fusion.append(encoded[:, 0])
            data.append(encoded[:, 1])
        return torch.stack(fusion).mean(0), torch.stack(data).mean(0)

    def forward(self, images: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        roles = [{modality: image.chunk(3)[role] for modality, image in images.items()} for role in range(3)]
        (anchor, _), (positive, _), (_, negative) = (self.embed(role) for role in roles)  # FFD
        logits = self.classifier(self.bottleneck(anchor))
        entropy = F.cross_entropy(logits, labels, label_smoothing=self.stage.label_smoothing)
        loss = 0.5 * triplet_soft_margin(anchor, positive, negative) + 0.5 * entropy
        if self.stage.beta:
            loss = loss + self.stage.beta * (anchor - self.centers[labels]).square().sum(1).mean()
        return {"loss": loss}


class PublishedReader(torch.utils.data.Dataset):
    """The published code's way of reading: a sample's file is opened, cropped and resized by Pillow once for each modality."""

    def __init__(self, split: data.Split):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], int, int]:
        sample, images = self.split.samples[i], {}
        for modality, (path, tile) in sample.images.items():
            image = Image.open(path).convert("RGB")
            width = 2 * image.height
            image = image.crop((width * tile, 0, width * (tile + 1), image.height))
            image = image.resize(self.split.image_size[::-1], Image.Resampling.BICUBIC)
            images[modality] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return images, sample.pid, sample.key


def loop_mean_ap(query: Tensor, gallery: Tensor, pids: tuple, keys: tuple, max_rank: int = 50) -> float:
    """The popular ReID baselines' way of ranking: all distances, a full argsort, then Python over the queries; mAP."""
    query, gallery = F.normalize(query), F.normalize(gallery)
    squares = query.square().sum(1, keepdim=True) + gallery.square().sum(1)
    distances = squares.addmm(query, gallery.T, alpha=-2).numpy()
    (q_pids, g_pids), (q_keys, g_keys) = ([ids.numpy() for ids in pair] for pair in (pids, keys))
    order = np.argsort(distances, axis=1)
    matches = (g_pids[order] == q_pids[:, None]).astype(np.int32)
    curves, precisions = [], []
    for i, ranking in enumerate(order):
        keep = ~((g_pids[ranking] == q_pids[i]) & (g_keys[ranking] == q_keys[i]))
        hits = matches[i][keep]
        if not hits.any():
            continue
        found = hits.cumsum()
        curves.append(np.minimum(found, 1)[:max_rank])
        precision = np.asarray([count / (rank + 1.0) for rank, count in enumerate(found)])
        precisions.append((precision * hits).sum() / hits.sum())
    np.asarray(curves).mean(0)  # CMC, which they compute as well
    return float(np.mean(precisions))


# --- rows: `sides` makes our sides, one for each line, and the peer's: calls that may return a figure, which has to be the same

Side = Callable[[], float | None]
SMALL = {"image_size": (64, 128), **BACKBONES["small"]}  # the embedded data set's model
VITS = {  # image size, width, depth, heads; images in a batch
    "base": (((224, 224), 768, 12, 12), 6),
    "small": (((64, 128), 192, 6, 3), 96),
}


class Line(NamedTuple):
    what: str
    asked: float  # the least ratio; without a peer the most seconds, or GB
    precision: str = ""  # of our side's matrix products, if these are what takes the time


class Row(NamedTuple):
    lines: tuple[Line, ...]
    sides: Callable[[torch.device], list[Side]]
    peer_once: bool = False  # too slow for more than one turn
    full: bool = False  # with --full only


def our_step(model: GraFT, stage: train.Stage, precision: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """train.py's step and optimizer for a model in that stage."""
    model.to(device).freeze_backbone(stage.frozen)
    criterion = GraFTLoss(model.config.num_ids, model.width).to(device)
    criterion.weights(0.5, stage.beta, 0.5, stage.label_smoothing)
    step = train.on_all_ranks(train.TrainingStep(model, criterion, device, precision))
    return step, train.make_optimizer(model, criterion, stage, 1e-3)


def on_triplets(step: nn.Module, optimizer: torch.optim.Optimizer, config: GraFTConfig, triplets: int, device) -> Side:
    """A whole training step on random images: forward, losses, backward, optimizer."""
    images = {modality: torch.randn(3 * triplets, 3, *config.image_size, device=device) for modality in config.modalities}
    labels = torch.randint(config.num_ids, (triplets,), device=device)

    def run() -> None:
        step(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def step_sides(number: int, device: torch.device, triplets: int = 2, precisions=("bf16", "fp32")) -> list[Side]:
    """A training step of DeiT-B at 224x224 on 3 modalities, in stage `number`; the peer's is in fp32."""
    stage, config = train.PAPER.stages[number - 1], GraFTConfig()
    model = GraFT(config)
    peer = PublishedStep(model, stage).to(device)
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, stage.lr, stage.betas, weight_decay=stage.weight_decay)
    steps = [our_step(model, stage, precision, device) for precision in precisions] + [(peer, optimizer)]
    return [on_triplets(*step, config, triplets, device) for step in steps]


def vit_sides(name: str, training: bool, precision: str, device: torch.device) -> list[Side]:
    """All tokens of a ViT, as in testing or with the backward pass; both sides in the same precision, on the same weights."""
    (image_size, dim, depth, heads), batch = VITS[name]
    ours = ViT(image_size, 16, dim, depth, heads).to(device)
    peer = timm_vit(image_size, dim, depth, heads).to(device)
    peer.load_state_dict(ours.state_dict())
    images = torch.randn(batch, 3, *image_size, device=device)
    gradient = torch.randn(batch, ours.pos_embed.shape[1], dim, device=device)

    def run(vit: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        with torch.set_grad_enabled(training), runtime.autocast(device, precision):
            tokens = forward(images)
        if training:
            tokens.float().backward(gradient)
            vit.zero_grad()

    return [partial(run, ours.train(training), ours), partial(run, peer.train(training), peer.forward_features)]


def pruned_sides(device: torch.device) -> list[Side]:
    """The embedded model with half of its prunable weights, as whole heads and channels, against all of it."""
    model = GraFT(GraFTConfig(**SMALL)).to(device).eval()
    smaller = prune.shrink(model, prune.prunable(model) // 2).eval()
    images = dict.fromkeys(model.config.modalities, torch.randn(evaluate.BATCH_SIZE, 3, 64, 128, device=device))

    def run(side: nn.Module) -> None:
        with torch.no_grad(), runtime.autocast(device, "auto"):
            side(images)

    return [partial(run, smaller), partial(run, model)]


def mosaics(count: int, folder: str) -> data.Split:
    """Samples as RGBNT100's: smooth random mosaics of 3 tiles of 256x128, to be read at 224x224."""
    modalities, samples = ("rgb", "nir", "tir"), []
    for i, pixels in enumerate(torch.randint(256, (count, 16, 96, 3), dtype=torch.uint8).numpy()):
        path = Path(folder) / f"{i:04d}_c0001_000.jpg"
        Image.fromarray(pixels).resize((768, 128), Image.Resampling.BICUBIC).save(path, quality=90)
        samples.append(data.Sample(path.stem, i, 0, {modality: (path, tile) for tile, modality in enumerate(modalities)}))
    return data.Split(samples, modalities, (224, 224))


def read(reader: torch.utils.data.Dataset) -> torch.utils.data.DataLoader:
    """Batches by one worker."""
    return torch.utils.data.DataLoader(reader, evaluate.BATCH_SIZE, collate_fn=data.collate, num_workers=1)


def reading_sides(_: torch.device, count: int = 256) -> list[Side]:
    """From mosaics to batches; the figure is the mean pixel."""
    folder = tempfile.TemporaryDirectory()
    split = mosaics(count, folder.name)

    def run(reader: torch.utils.data.Dataset, _=folder) -> float:
        total = sum(image.sum().item() for images, _, _ in read(reader) for image in images.values())
        return total / (count * 3 * 3 * 224**2 * 255)

    return [partial(run, split), partial(run, PublishedReader(split))]


def gallery_sides(device: torch.device, count: int = 12) -> list[Side]:
    """From mosaics to embeddings by DeiT-B."""
    folder = tempfile.TemporaryDirectory()
    samples = mosaics(count, folder.name)
    mean, std = ({modality: (0.5,) * 3 for modality in samples.modalities} for _ in range(2))
    model = GraFT(GraFTConfig()).to(device).eval()
    peer = PublishedStep(model, train.PAPER.stages[0]).to(device).eval()

    def ours(_=folder) -> None:
        split = data.Split(samples.samples, samples.modalities, samples.image_size)  # nothing in memory yet
        evaluate.embed(model, split, mean, std, device, workers=1)

    @torch.no_grad()
    def peers() -> None:
        for images, _, _ in read(PublishedReader(samples)):
            peer.embed(data.normalise({modality: image.to(device) for modality, image in images.items()}, mean, std))

    return [ours, peers]


def rank_sides(num_query: int, num_gallery: int, num_ids: int, num_keys: int, _: torch.device) -> list[Side]:
    """mAP of noisy features of width 768: on the CPU, where embeddings are ranked."""
    query, gallery, pids, keys = features(num_query, num_gallery, num_ids, num_keys)
    return [lambda: evaluate.rank_metrics(query, gallery, *pids, *keys).mAP, lambda: loop_mean_ap(query, gallery, pids, keys)]


def features(num_query: int, num_gallery: int, num_ids: int, num_keys: int, width: int = 768) -> tuple:
    """Query and gallery, noisy; pids; keys. Made part by part, so that nothing else is large."""
    centers = torch.randn(num_ids, width)
    pids, keys = (tuple(torch.randint(high, (n,)) for n in (num_query, num_gallery)) for high in (num_ids, num_keys))
    made = [torch.empty(len(ids), width) for ids in pids]
    for part, ids in zip(made, pids, strict=True):
        for rows in torch.arange(len(ids)).split(10_000):
            part[rows] = centers[ids[rows]] + 4 * torch.randn(len(rows), width)
    return *made, pids, keys


def triplet_list(_: torch.device) -> list[Side]:
    pids = np.repeat(np.arange(150), 168)  # RGBN300's 25,200
    return [lambda: data.make_triplets(pids, 8, np.random.default_rng(0)) is None]


def file_index(_: torch.device) -> list[Side]:
    """A tree of RGBNT100's counts and names, of empty files."""
    folder = tempfile.TemporaryDirectory()
    for name, count in zip(("bounding_box_train", "query", "bounding_box_test"), data.DATASETS["rgbnt100"].counts, strict=True):
        part = Path(folder.name) / "rgbir" / name
        part.mkdir(parents=True)
        for i in range(count):
            (part / f"{i % 50:04d}_c{i // 50 % 8 + 1:04d}_{i // 400:03d}.jpg").touch()

    def run(_=folder) -> None:
        data.load_dataset("rgbnt100", folder.name)

    return [run]


def one(what: str, asked: float, sides, precision: str = "", **options) -> Row:
    return Row((Line(what, asked, precision),), sides, **options)


def rank_row(what: str, *sizes: int, **options) -> Row:
    return one(f"ranking, {what}", 4.0, partial(rank_sides, *sizes), peer_once=True, **options)


def step_row(number: int, bf16: float, fp32: float) -> Row:
    what = f"training step, stage {number}"
    lines = Line(f"{what}: bf16 by fp32", bf16, "bf16"), Line(f"{what}: both fp32", fp32, "fp32")
    return Row(lines, partial(step_sides, number))


def vit_row(name: str, training: bool, precision: str, asked: float) -> Row:
    what = f"ViT {name}, forward{' and backward' if training else ''}: both {precision}"
    return one(what, asked, partial(vit_sides, name, training, precision), precision)


ROWS = {
    "step1": step_row(1, 3.5, 1.08),
    "step2": step_row(2, 3.0, 0.97),
    "base-forward": vit_row("base", False, "bf16", 0.97),
    "base-training": vit_row("base", True, "bf16", 0.97),
    "base-forward-fp32": vit_row("base", False, "fp32", 0.97),
    "base-training-fp32": vit_row("base", True, "fp32", 0.97),
    "small-forward": vit_row("small", False, "bf16", 1.0),
    "small-training": vit_row("small", True, "bf16", 1.0),
    "small-forward-fp32": vit_row("small", False, "fp32", 1.0),
    "small-training-fp32": vit_row("small", True, "fp32", 1.0),
    "gallery": one("embedding a gallery, files to features: bf16 by fp32", 3.3, gallery_sides, "bf16"),
    "pruned": one("embedding: half the weights by all", 1.5, pruned_sides),
    "reading": one("reading mosaics, one worker", 1.5, reading_sides),
    "rank-rgbnt100": rank_row("1,715 by 8,575", 1715, 8575, 50, 8),
    "rank-market": rank_row("a quarter of 3,368 by 19,732", 842, 19732, 750, 6),
    "rank-market-full": rank_row("3,368 by 19,732", 3368, 19732, 750, 6, full=True),
    "triplets": one("triplet list of 25,200 images, seconds", 0.3, triplet_list),
    "index": one("finding RGBNT100's 18,965 samples, seconds", 1.0, file_index),
}


# --- measuring


def timed(side: Side, device: torch.device) -> tuple[float, float | None]:
    start = time.perf_counter()
    figure = side()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, figure


def measure(row: Row, device: torch.device, repeats: int) -> tuple[list[float], list[int]]:
    """Median seconds of each side, and the operations of its matrix products.

    The sides take turns. The first turn is a warm-up, but a call of more than 2 s counts; quick rows take more turns, those
    of more than a minute two. Raises RuntimeError where the sides' figures differ: they would not have done the same work.
    """
    sides, seconds, operations, figures = row.sides(device), [], [], []
    for side in sides:
        with FlopCounterMode(display=False) as counter:
            spent, figure = timed(side, device)
        seconds.append([spent] if spent > 2 else [])
        operations.append(counter.get_total_flops())
        figures.append(figure)
    seconds[-1] = seconds[-1] or [spent] * row.peer_once
    turning = list(zip(sides, seconds, strict=True))[: len(row.lines) if row.peer_once else None]
    while True:
        turns, total = min(len(mine) for _, mine in turning), sum(map(sum, seconds))
        if (turns >= 2 and total > 60) or (turns >= repeats and (sum(seconds[0]) > 1 or turns >= 10 * repeats)):
            break
        for side, mine in turning:
            mine.append(timed(side, device)[0])
    if None not in figures and max(figures) - min(figures) > 1e-4:
        raise RuntimeError(f"{row.lines[0].what}: the sides give {figures}")
    return [median(spent) for spent in seconds], operations


def matrix_rate(precision: str, device: torch.device) -> float:
    """Operations a second of torch's own matrix product, the best in two seconds: of a DeiT-B step's sizes; on GPUs larger."""
    M, K, N = (3564, 768, 3072) if device.type == "cpu" else (8192, 8192, 8192)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.randn(M, K, device=device, dtype=dtype), torch.randn(N, K, device=device, dtype=dtype)
    spent = [timed(lambda: F.linear(x, weight), device)[0]]
    while sum(spent) < 2:
        spent.append(timed(lambda: F.linear(x, weight), device)[0])
    return 2 * M * K * N / min(spent)


def machine(device: torch.device) -> str:
    """CPU and number of cores, and the GPU if that is what computes."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu


class Report:
    """The table on the screen, and the same in a file, anew after each line."""

    def __init__(self, facts: dict, path: Path | None):
        self.content, self.path = {**facts, "rows": []}, path
        print(f"{'what':<54}{'ours':>10}{'peer':>10}{'reached':>9}{'asked':>16}", flush=True)

    def add(self, what: str, reached: float, asked: float, times=(), most=False, limit: float | None = None, note="") -> None:
        """A line: `asked` is the least that is to be reached, or the `most`; `times` are our seconds and the peer's."""
        missed = reached > asked if most else reached < asked
        verdict = ("  missed" + (f": matrix products alone allow {limit:.2f}" if limit else "")) if missed else ""
        shown = "".join(f"{seconds:>8.3f} s" for seconds in times) or " " * 20
        print(f"{what:<54}{shown}{reached:>9.2f}{'at most ' if most else '':>10}{asked:>6.2f}{verdict}{note}", flush=True)
        row = {"what": what, "reached": reached, "asked": asked, "most": most, "seconds": times, "limit": limit}
        self.write(rows=[*self.content["rows"], row])

    def write(self, **values) -> None:
        self.content |= values
        if self.path:
            runtime.write_json(self.path, self.content)


# --- what has no peer


def default_run(report: Report, folder: Path) -> None:
    """Wall time of the embedded data set's default run, from its own log."""
    log = folder / "log.jsonl"
    if not log.is_file():
        return print(f"the default run's time: no {log}; python train.py writes it")
    last = json.loads(log.read_text().splitlines()[-1])
    if last["event"] == "test":
        report.add(f"the default run, seconds ({folder})", last["seconds"], 300, most=True)


def some_seconds(side: Side, device: torch.device) -> float:
    """Median of at least three calls and a second, after a warm-up."""
    timed(side, device)
    spent: list[float] = []
    while len(spent) < 3 or sum(spent) < 1:
        spent.append(timed(side, device)[0])
    return median(spent)


def small_step(device: torch.device, number=2, triplets=8, modalities=3, image_size=(64, 128)) -> Side:
    """A training step of the embedded data set's model, as train.py takes it in stage `number`."""
    config = GraFTConfig(tuple(f"m{i}" for i in range(modalities)), **{**SMALL, "image_size": image_size})
    return on_triplets(*our_step(GraFT(config), train.EMBEDDED.stages[number - 1], "auto", device), config, triplets, device)


def memory(field: str) -> float:
    """GB of this process: resident now ("VmRSS") or at most ("VmHWM"). Linux counts so."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def large_ranking(report: Report, device: torch.device, num_query: int = 3000, num_gallery: int = 500_000) -> dict[str, dict]:
    """Seconds over the size of the gallery, for a tenth of the queries; of the largest with all of them the memory, too."""
    query, gallery, pids, keys = features(num_query, num_gallery, 5000, 6)

    def rank(queries: int, samples: int) -> None:
        ids = (part[:n] for pair in (pids, keys) for part, n in zip(pair, (queries, samples), strict=True))
        evaluate.rank_metrics(query[:queries], gallery[:samples], *ids)

    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = memory("VmRSS")
    seconds, _ = timed(partial(rank, num_query, num_gallery), device)
    what = f"ranking {num_query:,} by {num_gallery:,}, GB over the features"
    report.add(what, memory("VmHWM") - before, 1.0, most=True, note=f"  ({seconds:.0f} s)")
    few, samples = num_query // 10, [num_gallery // n for n in (100, 50, 20, 10, 5, 2, 1)]
    return {f"ranking {few} queries over gallery samples": {n: timed(partial(rank, few, n), device)[0] for n in samples}}


def growth(device: torch.device) -> dict[str, dict]:
    """Seconds of a training step over what makes it dear."""
    sizes = ((32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
    curves = {
        "a step over its triplets": {n: small_step(device, triplets=n) for n in (2, 4, 8, 16, 32)},
        "a step of 8 triplets over modalities": {n: small_step(device, modalities=n) for n in range(1, 7)},
        "a step of 8 triplets over an image's tokens": {
            H * W // 256 + 2: small_step(device, image_size=(H, W)) for H, W in sizes
        },
    }
    return {name: {x: some_seconds(side, device) for x, side in sides.items()} for name, sides in curves.items()}


def ranks(device: torch.device, triplets: int = 26) -> list[dict]:
    """What each of the ranks of one step of `triplets` takes, stage by stage; rank 0 knows what went over the wire."""
    result = []
    for number in (1, 2):
        side = small_step(device, number, triplets // runtime.world_size())
        timed(side, device)
        timed(side, device)  # the second step makes DistributedDataParallel's buckets anew
        before, count = sent(), 5
        seconds = median(timed(side, device)[0] for _ in range(count))
        result.append({"seconds": seconds, "bytes": (sent() - before) / count / runtime.world_size()})
    return result


def sent() -> int:
    """Bytes that went over the loopback interface so far. Linux counts so."""
    return int(re.search(r"lo:\s*(\d+)", Path("/proc/net/dev").read_text())[1])


def two_ranks(device: torch.device) -> dict:
    """A step by two processes with half of the threads each, against one process; what each sends."""
    threads = max(1, torch.get_num_threads() // 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "extras.bench"]
    command += ["--device", device.type]
    child = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"two ranks: {child.stderr[-2000:]}")
    result = {"one": ranks(device), "two": json.loads(child.stdout.splitlines()[-1])}
    for number, (one, two) in enumerate(zip(*result.values(), strict=True), 1):
        model = GraFT(GraFTConfig(**SMALL))
        model.freeze_backbone(train.EMBEDDED.stages[number - 1].frozen)
        gradients = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(
            f"stage {number}, a step of 26 triplets: two ranks {two['seconds']:.3f} s, one {one['seconds']:.3f} s;"
            f" sent by each of two {two['bytes'] / 1e6:.2f} MB, gradients {gradients / 1e6:.2f} MB"
        )
    return result


# --- GPU


def gpu(report: Report, device: torch.device, triplets: int = 26) -> None:
    """The paper's stage-2 step: against the GPU's own rate, against the published way, and the largest batch in 48 GB."""
    *ours, peer = step_sides(2, device, triplets, ("bf16",))
    with FlopCounterMode(display=False) as counter:
        ours[0]()
    rate, seconds = matrix_rate("bf16", device), some_seconds(ours[0], device)
    what = f"GPU step, stage 2, {triplets} triplets"
    report.add(f"{what}: share of the bf16 matrix rate", counter.get_total_flops() / seconds / rate, 0.35)
    for name, allowed, asked in (("off", False, 6.0), ("on", True, 1.6)):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        theirs = some_seconds(peer, device)
        report.add(f"{what}: bf16 by fp32, TF32 {name}", theirs / seconds, asked, (seconds, theirs))
    del ours, peer
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 48e9 / torch.cuda.get_device_properties(device).total_memory))
    low, high = 0, 512
    while high - low > 4:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, device) else (low, middle)
    report.add("GPU: most triplets a step in 48 GB, checkpointing", low, 100)


def fits(triplets: int, device: torch.device) -> bool:
    """Whether the GPU's memory is enough for a stage-2 step of DeiT-B."""
    model = GraFT(GraFTConfig())
    model.backbone.checkpointing = True
    try:
        on_triplets(*our_step(model, train.PAPER.stages[1], "bf16", device), model.config, triplets, device)()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


# --- command line


@runtime.program
def main() -> None:
    core = [key for key, row in ROWS.items() if not row.full]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="KEY,...", help=f"some of {', '.join(ROWS)} (default: the core ones)")
    parser.add_argument("--full", action="store_true", help="all rows, 500,000 gallery samples, growth, two ranks; on Linux")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --full: draw how cost grows (matplotlib)")
    parser.add_argument("--run", type=Path, default="runs/synthetic", help="the default run's folder (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, anew after each row")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    args = parser.parse_args()
    chosen = args.rows.split(",") if args.rows else list(ROWS) if args.full else core
    if unknown := [key for key in chosen if key not in ROWS]:
        raise UserError(f"--rows: no row {', '.join(unknown)}; expected some of {', '.join(ROWS)}")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: expected at least 1")
    if args.full and not sys.platform.startswith("linux"):
        raise UserError(f"--full reads memory and traffic where Linux counts them, this is {sys.platform}; leave it out")
    if args.plot:
        if not args.full:
            raise UserError("--plot draws what --full measures: give both")
        pictures.need_matplotlib()
    device = runtime.start(args.device)
    torch.manual_seed(args.seed)
    if runtime.world_size() > 1:  # as two_ranks starts it
        return runtime.print0(json.dumps(ranks(device)))
    bf16 = "fast" if runtime.bf16_is_fast(device) else "emulated"
    print("settings:", vars(args))
    print(f"{machine(device)}; {device}, {torch.get_num_threads()} threads; torch {torch.__version__}; bf16 is {bf16} here")
    rates = {precision: matrix_rate(precision, device) for precision in ("bf16", "fp32")}
    print("matrix products, GFLOP/s:", "  ".join(f"{precision} {rate / 1e9:.0f}" for precision, rate in rates.items()))
    facts = {"machine": machine(device), "device": str(device), "torch": torch.__version__, "bf16": bf16, "rates": rates}
    report = Report(facts, args.json)
    curves = large_ranking(report, device) if args.full else {}
    progress = tqdm(chosen, disable=None, leave=False)
    for key in progress:
        progress.set_description(key)
        torch.manual_seed(args.seed)
        row = ROWS[key]
        seconds, operations = measure(row, device, args.repeats)
        progress.clear()
        for line, ours, count in zip(row.lines, seconds, operations, strict=False):
            if len(seconds) == len(row.lines):  # no peer
                report.add(line.what, ours, line.asked, most=True)
                continue
            limit = seconds[-1] * rates[line.precision] / count if line.precision else None
            report.add(line.what, seconds[-1] / ours, line.asked, (ours, seconds[-1]), limit=limit)
    if not args.rows:
        default_run(report, args.run)
    if device.type == "cuda":
        gpu(report, device)
    if args.full:
        curves |= growth(device)
        for name, values in curves.items():
            print(f"{name}: " + "  ".join(f"{x:,}: {seconds:.3f} s" for x, seconds in values.items()), flush=True)
        report.write(growth=curves, ranks=two_ranks(device))
    if args.plot:
        panels = []
        for name, values in curves.items():
            x, y = list(values), list(values.values())
            lines = {"measured": (x, y), "in proportion": (x, [y[-1] * size / x[-1] for size in x])}
            panels.append({"lines": lines, "xlabel": name, "ylabel": "seconds", "ylim": (0, None)})
        pictures.chart(panels, args.plot)


if __name__ == "__main__":
    main()
