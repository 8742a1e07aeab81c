"""Time this code beside its peers, in the same run and in turns, and print how many times as fast it is.

python bench.py                            all rows, some minutes
python bench.py --rows step1,step2         some of them

A ratio is the peer's median time by ours. Bare times say little on a shared machine: they are shown, never judged.
"""

import argparse
import os
import platform
import re
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import evaluate
import prune
import runtime
import train
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


# --- rows: each makes its two sides, calls without arguments; both may return a figure that has to be the same

Sides = tuple[Callable[[], float | None], Callable[[], float | None]]
VITS = {  # image size, width, depth, heads; images in a batch
    "base": (((224, 224), 768, 12, 12), 6),
    "small": (((64, 128), 192, 6, 3), 96),
}


def step_sides(number: int, precision: str, device: torch.device, triplets: int = 2) -> Sides:
    """A whole training step of DeiT-B at 224x224 on 3 modalities, in stage `number`; the peer's is always in fp32."""
    stage, config = train.PAPER.stages[number - 1], GraFTConfig()
    model = GraFT(config)
    model.freeze_backbone(stage.frozen)
    criterion = GraFTLoss(config.num_ids, config.dim)
    criterion.weights(0.5, stage.beta, 0.5, stage.label_smoothing)
    images = {modality: torch.randn(3 * triplets, 3, *config.image_size, device=device) for modality in config.modalities}
    labels = torch.randint(config.num_ids, (triplets,), device=device)

    def run(step: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        step(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    peer = PublishedStep(model, stage).to(device)
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    peers = torch.optim.AdamW(trained, stage.lr, stage.betas, weight_decay=stage.weight_decay)
    ours = train.TrainingStep(model, criterion, device, precision).to(device)
    return partial(run, ours, train.make_optimizer(model, criterion, stage, 1e-3)), partial(run, peer, peers)


def vit_sides(name: str, training: bool, precision: str, device: torch.device) -> Sides:
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

    return partial(run, ours.train(training), ours), partial(run, peer.train(training), peer.forward_features)


def pruned_sides(device: torch.device) -> Sides:
    """The embedded model with half of its prunable weights, as whole heads and channels, against all of it."""
    model = GraFT(GraFTConfig(image_size=(64, 128), **BACKBONES["small"])).to(device).eval()
    smaller = prune.shrink(model, prune.prunable(model) // 2).eval()
    images = dict.fromkeys(model.config.modalities, torch.randn(evaluate.BATCH_SIZE, 3, 64, 128, device=device))

    def run(side: nn.Module) -> None:
        with torch.no_grad(), runtime.autocast(device, "auto"):
            side(images)

    return partial(run, smaller), partial(run, model)


def rank_sides(num_query: int, num_gallery: int, num_ids: int, num_keys: int, _: torch.device) -> Sides:
    """mAP of noisy features of width 768: on the CPU, where embeddings are ranked."""
    centers = torch.randn(num_ids, 768)
    pids, keys = (tuple(torch.randint(high, (n,)) for n in (num_query, num_gallery)) for high in (num_ids, num_keys))
    query, gallery = (centers[ids] + 4 * torch.randn(len(ids), 768) for ids in pids)
    return (lambda: evaluate.rank_metrics(query, gallery, *pids, *keys).mAP, lambda: loop_mean_ap(query, gallery, pids, keys))


class Row(NamedTuple):
    what: str
    asked: float  # the least ratio
    sides: Callable[[torch.device], Sides]
    peer_once: bool = False  # too slow for a warm-up and more than one turn


ROWS = {
    "step1": Row("training step, stage 1: bf16 by fp32", 3.5, partial(step_sides, 1, "bf16")),
    "step2": Row("training step, stage 2: bf16 by fp32", 3.0, partial(step_sides, 2, "bf16")),
    "step1-fp32": Row("training step, stage 1: both fp32", 1.08, partial(step_sides, 1, "fp32")),
    "step2-fp32": Row("training step, stage 2: both fp32", 0.97, partial(step_sides, 2, "fp32")),
    "base-forward": Row("ViT base, forward: both bf16", 0.97, partial(vit_sides, "base", False, "bf16")),
    "base-training": Row("ViT base, forward and backward: both bf16", 0.97, partial(vit_sides, "base", True, "bf16")),
    "base-forward-fp32": Row("ViT base, forward: both fp32", 0.97, partial(vit_sides, "base", False, "fp32")),
    "base-training-fp32": Row("ViT base, forward and backward: both fp32", 0.97, partial(vit_sides, "base", True, "fp32")),
    "small-forward": Row("ViT small, forward: both bf16", 1.0, partial(vit_sides, "small", False, "bf16")),
    "small-training": Row("ViT small, forward and backward: both bf16", 1.0, partial(vit_sides, "small", True, "bf16")),
    "small-forward-fp32": Row("ViT small, forward: both fp32", 1.0, partial(vit_sides, "small", False, "fp32")),
    "small-training-fp32": Row("ViT small, forward and backward: both fp32", 1.0, partial(vit_sides, "small", True, "fp32")),
    "pruned": Row("embedding: half the weights by all", 1.5, pruned_sides),
    "rank-rgbnt100": Row("ranking, 1,715 by 8,575", 4.0, partial(rank_sides, 1715, 8575, 50, 8)),
    "rank-market": Row("ranking, 3,368 by 19,732", 4.0, partial(rank_sides, 3368, 19732, 750, 6), peer_once=True),
}


def large_ranking(num_query: int = 3000, num_gallery: int = 500_000, width: int = 768) -> str:
    """Time and peak memory of ranking more than usual: noisy features, made part by part so that nothing else is large."""
    centers = torch.randn(5000, width)
    pids, keys = (tuple(torch.randint(high, (n,)) for n in (num_query, num_gallery)) for high in (5000, 6))
    features = [torch.empty(len(ids), width) for ids in pids]
    for part, ids in zip(features, pids, strict=True):
        for rows in torch.arange(len(ids)).split(10_000):
            part[rows] = centers[ids[rows]] + 4 * torch.randn(len(rows), width)
    start = time.perf_counter()
    evaluate.rank_metrics(*features, *pids, *keys)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kB
    size = sum(part.numel() for part in features) * 4
    return (
        f"ranking {num_query:,} by {num_gallery:,}: {seconds:.0f} s, peak resident memory {peak / 1e9:.2f} GB,"
        f" of which {size / 1e9:.2f} GB are the features"
    )


# --- measuring


def measure(row: Row, device: torch.device, repeats: int, seed: int) -> tuple[float, float]:
    """Median seconds of our side and of the peer's, which take turns after a warm-up each; quick rows take more turns.

    Raises RuntimeError where the two sides' figures differ: they would not have done the same work.
    """
    torch.manual_seed(seed)
    sides = row.sides(device)

    def timed(side: Callable[[], float | None]) -> tuple[float, float | None]:
        start = time.perf_counter()
        figure = side()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start, figure

    for side in sides[:1] if row.peer_once else sides:
        timed(side)
    ours, peer = [], []
    while len(ours) < repeats or (sum(ours) < 1 and len(ours) < 10 * repeats):
        seconds, figure = timed(sides[0])
        ours.append(seconds)
        if row.peer_once and peer:
            continue
        seconds, expected = timed(sides[1])
        peer.append(seconds)
        if figure is not None and abs(figure - expected) > 1e-4:
            raise RuntimeError(f"{row.what}: our side gives {figure:.6f}, the peer {expected:.6f}")
    return median(ours), median(peer)


def machine(device: torch.device) -> str:
    """CPU and number of cores, and the GPU if that is what computes."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu


@runtime.program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="KEY,...", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side, at least (default: %(default)s)")
    parser.add_argument("--large", action="store_true", help="only rank 3,000 queries against 500,000 samples, for its memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, anew after each of them")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    args = parser.parse_args()
    chosen = args.rows.split(",")
    if unknown := [key for key in chosen if key not in ROWS]:
        raise UserError(f"--rows: no row {', '.join(unknown)}; expected some of {', '.join(ROWS)}")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: expected at least 1")
    device = runtime.start(args.device)
    bf16 = "fast" if runtime.bf16_is_fast(device) else "emulated"
    report = {"machine": machine(device), "device": str(device), "torch": torch.__version__, "bf16": bf16, "rows": []}
    print("settings:", vars(args))
    print(f"{machine(device)}; {device}, {torch.get_num_threads()} threads; torch {torch.__version__}; bf16 is {bf16} here")
    if args.large:
        return print(large_ranking())
    print(f"{'what':<44}{'ours':>10}{'peer':>10}{'ratio':>8}{'asked':>8}", flush=True)
    progress = tqdm(chosen, disable=None, leave=False)
    for key in progress:
        progress.set_description(key)
        row = ROWS[key]
        ours, peer = measure(row, device, args.repeats, args.seed)
        progress.clear()
        missed = "" if peer / ours >= row.asked else "  missed"
        print(f"{row.what:<44}{ours:>8.3f} s{peer:>8.3f} s{peer / ours:>8.2f}{row.asked:>8.2f}{missed}", flush=True)
        result = {"key": key, "what": row.what, "ours": ours, "peer": peer, "ratio": peer / ours, "asked": row.asked}
        report["rows"].append(result)
        if args.json:
            runtime.write_json(args.json, report)


if __name__ == "__main__":
    main()
