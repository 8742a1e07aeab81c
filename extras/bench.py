"""Time this code beside its fastest public peers: in turns, in one run, on the same weights.

python -m extras.bench                          some minutes; --json FILE keeps the figures
python -m extras.bench --rows step,rank         some of the rows
python -m extras.bench --gpu                    the GPU's rows, a minute on an H100

A ratio is the peer's median time by ours: bare times say little on a shared machine. A row whose
two sides give different figures ends the program, as they would not have done the same work.
"""

import os

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")  # before NumPy is loaded, as in evaluate.py

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

import data
import evaluate
import prune
import runtime
import train
from losses import GraFTLoss, triplet_soft_margin
from model import BACKBONES, GraFT, GraFTConfig, ViT
from runtime import UserError

SMALL = {"image_size": (64, 128), **BACKBONES["small"]}  # the synthetic set's model
PAPER = train.parse(["--dataset", "rgbnt100"])
MODALITIES = ("rgb", "nir", "tir")
HALF = dict.fromkeys(MODALITIES, (0.5, 0.5, 0.5))  # mean and std of made-up images

Side = Callable[[], float | None]  # one turn; a figure it returns has to be the other side's, too


class Row(NamedTuple):
    """`sides` are ours and the peer's."""

    what: str
    peer: str
    sides: tuple[Side, Side]


# --- peers, of public parts


def timm_vit(image_size: tuple[int, int], dim: int, depth: int, heads: int) -> nn.Module:
    """timm's distilled ViT; with DeiT-B's sizes it is its deit_base_distilled_patch16_224."""
    try:
        from timm.models.deit import VisionTransformerDistilled
    except ImportError:
        raise UserError(
            "timm, which this row compares with, is not installed: pip install timm"
        ) from None
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads}
    return VisionTransformerDistilled(image_size, 16, **sizes, num_classes=0)


class PublishedStep(nn.Module):
    """The published code's training step: fp32, a pass of its own for each role and modality.

    Called like train.Objective. Parameters are named as in GraFT, whose weights it copies.
    """

    def __init__(self, model: GraFT, stage: train.Stage):
        super().__init__()
        config, self.stage = model.config, stage
        sizes = (config.dim, config.encoder_heads, config.encoder_hidden)
        layer = partial(nn.TransformerEncoderLayer, *sizes, batch_first=True)
        self.backbone = timm_vit(config.image_size, config.dim, config.depth, config.heads)
        self.encoders = nn.ModuleDict({modality: layer() for modality in config.modalities})
        self.fusion_token = nn.Parameter(torch.empty_like(model.fusion_token))
        self.bottleneck = nn.BatchNorm1d(config.dim)
        self.classifier = nn.Linear(config.dim, config.num_ids, bias=False)
        centers = torch.zeros(config.num_ids, config.dim)
        self.register_buffer("centers", centers, persistent=False)
        self.load_state_dict(model.state_dict())
        self.backbone.requires_grad_(not stage.frozen)
        self.bottleneck.bias.requires_grad_(False)

    def embed(self, images: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One role's images {modality: (B, 3, H, W)} -> its fusion and data tokens, (B, D)."""
        fusion, sampled = [], []
        for modality, image in images.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stage.frozen):
                tokens = self.backbone.forward_features(image)  # (B, N, D)
            fusion_token = self.fusion_token.expand(len(tokens), -1, -1)
            encoded = self.encoders[modality](torch.cat([fusion_token, tokens], 1))
            fusion.append(encoded[:, 0])
            sampled.append(encoded[:, 1])
        return torch.stack(fusion).mean(0), torch.stack(sampled).mean(0)

    def forward(self, images: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        roles = [
            {name: image.chunk(3)[role] for name, image in images.items()} for role in range(3)
        ]
        (anchor, _), (positive, _), (_, negative) = (self.embed(role) for role in roles)  # FFD
        logits = self.classifier(self.bottleneck(anchor))
        smoothing = self.stage.label_smoothing
        loss = 0.5 * F.cross_entropy(logits, labels, label_smoothing=smoothing)
        loss = loss + 0.5 * triplet_soft_margin(anchor, positive, negative)
        if self.stage.beta:
            distance = (anchor - self.centers[labels]).square().sum(1)
            loss = loss + self.stage.beta * distance.mean()
        return {"loss": loss}


class PublishedReader(torch.utils.data.Dataset):
    """The published code's reading: Pillow opens, crops and resizes once for each modality."""

    def __init__(self, split: data.Split):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], int, int]:
        sample, images = self.split.samples[i], {}
        size = self.split.image_size[::-1]
        for modality, (path, tile) in sample.images.items():
            image = Image.open(path).convert("RGB")
            width = 2 * image.height
            image = image.crop((width * tile, 0, width * (tile + 1), image.height))
            image = image.resize(size, Image.Resampling.BICUBIC)
            images[modality] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return images, sample.pid, sample.key


def published_evaluation(query: Tensor, gallery: Tensor, pids: tuple, keys: tuple) -> float:
    """The ranking of the published GraFT's evaluation, as fast as its form allows: its mAP."""
    query, gallery = F.normalize(query).numpy(), F.normalize(gallery).numpy()
    indices = np.argsort(1 - query @ gallery.T, axis=1)
    (q_pids, g_pids), (q_keys, g_keys) = ([ids.numpy() for ids in pair] for pair in (pids, keys))
    matches = g_pids[indices] == q_pids[:, None]
    precisions, cmc = [], np.zeros(50)
    for i in range(len(query)):
        keep = ~(matches[i] & (g_keys[indices[i]] == q_keys[i]))
        found = matches[i][keep]
        if found.any():
            hits, positions = found.cumsum(), np.flatnonzero(found)
            precisions.append((hits[positions] / (positions + 1)).mean())
            cmc += hits[:50] > 0  # CMC, which it computes as well
    return float(np.mean(precisions))


# --- rows


def step_rows(device: torch.device, triplets: int = 2) -> Iterator[Row]:
    """A training step of DeiT-B at 224x224 on three modalities: images in, weights changed."""
    for stage in PAPER.stages:
        model, config = GraFT(GraFTConfig()), GraFTConfig()
        published = PublishedStep(model, stage).to(device)
        trained = [p for p in published.parameters() if p.requires_grad]
        decay = stage.weight_decay
        optimizer = torch.optim.AdamW(trained, stage.lr, stage.betas, weight_decay=decay)
        peer = on_triplets(published, optimizer, config, triplets, device)
        for precision in ("bf16", "fp32"):
            ours = our_step(model, stage, triplets, device, precision)
            what = f"training step, stage {stage.number}, {precision}"
            yield Row(what, "the published code's way, fp32", (ours, peer))


def our_step(model: GraFT, stage: train.Stage, triplets: int, device, precision="auto") -> Side:
    """train.py's step for a model in a stage."""
    model.freeze_backbone(stage.frozen)
    embedder = evaluate.Embedder(model, HALF, HALF, device, precision)
    criterion = GraFTLoss(model.config.num_ids, model.width).to(device)
    criterion.weights(0.5, stage.beta, 0.5, stage.label_smoothing)
    objective = train.Objective(embedder, criterion)
    optimizer = train.make_optimizer(objective, stage, center_lr=1e-3)
    return on_triplets(objective, optimizer, model.config, triplets, device)


def on_triplets(step: nn.Module, optimizer, config: GraFTConfig, triplets: int, device) -> Side:
    """A whole training step on random images: forward, losses, backward, optimizer."""
    size = (3 * triplets, 3, *config.image_size)
    images = {modality: torch.randn(size, device=device) for modality in config.modalities}
    labels = torch.randint(config.num_ids, (triplets,), device=device)

    def turn() -> None:
        step(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return turn


def vit_rows(device: torch.device) -> Iterator[Row]:
    """All tokens of a ViT, as in testing and with the backward pass; both in one precision."""
    sizes = {
        "DeiT-B, 224x224": (((224, 224), 768, 12, 12), 6),
        "small, 64x128": (((64, 128), 192, 6, 3), 96),
    }
    for name, ((image_size, dim, depth, heads), batch) in sizes.items():
        ours = ViT(image_size, 16, dim, depth, heads).to(device)
        peer = timm_vit(image_size, dim, depth, heads).to(device)
        peer.load_state_dict(ours.state_dict())
        images = torch.randn(batch, 3, *image_size, device=device)
        for training in (False, True):
            for precision in ("bf16", "fp32"):
                turn = partial(vit_turn, images, training, precision)
                sides = partial(turn, ours), partial(turn, peer, peer.forward_features)
                what = f"ViT {name}, forward{' and backward' if training else ''}, {precision}"
                yield Row(what, f"timm, {precision}", sides)


def vit_turn(images: Tensor, training: bool, precision: str, vit: nn.Module, forward=None) -> None:
    vit.train(training)
    with torch.set_grad_enabled(training), runtime.autocast(images.device, precision):
        tokens = (forward or vit)(images)
    if training:
        tokens.float().sum().backward()
        vit.zero_grad()


def rank_rows(device: torch.device) -> Iterator[Row]:
    """mAP of noisy features of width 768: RGBNT100's size and Market-1501's; on the CPU."""
    for sizes in ((1715, 8575, 50, 8), (3368, 19732, 750, 6)):
        query, gallery, pids, keys = features(*sizes)
        ours = partial(our_ranking, query, gallery, pids, keys)
        peer = partial(published_evaluation, query, gallery, pids, keys)
        what = f"ranking {sizes[0]:,} queries, {sizes[1]:,} gallery samples"
        yield Row(what, "the published GraFT's evaluation (NumPy)", (ours, peer))


def our_ranking(query: Tensor, gallery: Tensor, pids: tuple, keys: tuple) -> float:
    return evaluate.rank_metrics(query, gallery, *pids, *keys).mAP


def features(num_query: int, num_gallery: int, num_ids: int, num_keys: int, width=768) -> tuple:
    """Noisy features of query and gallery, their pids and their keys."""
    centers = torch.randn(num_ids, width)
    counts = (num_query, num_gallery)
    pids, keys = (
        tuple(torch.randint(high, (count,)) for count in counts) for high in (num_ids, num_keys)
    )
    query, gallery = (centers[ids] + 4 * torch.randn(len(ids), width) for ids in pids)
    return query, gallery, pids, keys


def mosaics(count: int, folder: str) -> data.Split:
    """Samples as RGBNT100's: smooth random mosaics of 3 tiles of 256x128, to be read at 224x224."""
    samples = []
    noise = torch.randint(256, (count, 16, 96, 3), dtype=torch.uint8).numpy()
    for i, pixels in enumerate(noise):
        path = Path(folder) / f"{i:04d}_c0001_000.jpg"
        Image.fromarray(pixels).resize((768, 128), Image.Resampling.BICUBIC).save(path, quality=90)
        tiles = {modality: (path, tile) for tile, modality in enumerate(MODALITIES)}
        samples.append(data.Sample(path.stem, i, 0, tiles))
    return data.Split(samples, MODALITIES, (224, 224))


def reading_rows(_: torch.device, count: int = 256) -> Iterator[Row]:
    """From mosaics to batches by one process; the figure is the mean of some pixels."""
    with tempfile.TemporaryDirectory() as folder:
        split = mosaics(count, folder)
        order = [list(range(start, start + 64)) for start in range(0, count, 64)]

        def turn(read: Callable, *source) -> float:
            some = [x[..., ::16, ::16] for images in read(*source) for x in images.values()]
            return torch.cat(some).float().mean().item() / 255

        decode = partial(turn, data.stream, split, order, 1, False)
        pillow = partial(turn, data.stream, PublishedReader(split), order, 1, False)
        what = f"reading {count} mosaics, one process"
        yield Row(what, "Pillow, once a modality", (decode, pillow))
        with stored(split, folder) as kept:
            sides = partial(turn, data.read_batches, kept, order, 0, torch.device("cpu")), decode
            yield Row(f"reading {count} mosaics, second epoch", "without the store", sides)


@contextmanager
def stored(split: data.Split, folder: str) -> Iterator[data.Split]:
    """The split, decoded into a store of its own."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = folder
    kept = data.Split(split.samples, split.modalities, split.image_size, store_gb=10)
    if not kept.decoded:
        raise UserError(f"{folder}: no room for the decoded images of this row")
    try:
        yield kept
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        os.environ |= {"XDG_CACHE_HOME": before} if before else {}


def gallery_rows(device: torch.device, count: int = 12) -> Iterator[Row]:
    """From mosaics to embeddings by DeiT-B, nothing decoded before."""
    with tempfile.TemporaryDirectory() as folder:
        split = mosaics(count, folder)
        embedder = evaluate.Embedder(GraFT(GraFTConfig()), HALF, HALF, device, workers=1)
        peer = PublishedStep(embedder.model, PAPER.stages[0]).to(device).eval()

        @torch.no_grad()
        def theirs() -> None:
            for images in data.stream(PublishedReader(split), [list(range(count))], 1, False):
                peer.embed(embedder.normalise(runtime.to_device(images, device)))

        def ours() -> None:
            embedder.embed(split)

        what = f"embedding {count} samples by DeiT-B, files to features"
        yield Row(what, "the published code's way, fp32", (ours, theirs))


def pruned_rows(device: torch.device) -> Iterator[Row]:
    """Embedding with half of the prunable weights, as whole heads and channels, against all."""
    model = GraFT(GraFTConfig(**SMALL)).to(device).eval()
    smaller = prune.shrink(model, prune.prunable(model) // 2).eval()
    images = torch.randn(evaluate.BATCH_SIZE, 3, 64, 128, device=device)
    images = dict.fromkeys(MODALITIES, images)

    def turn(side: nn.Module) -> None:
        with torch.no_grad(), runtime.autocast(device, "auto"):
            side(images)

    sides = partial(turn, smaller), partial(turn, model)
    yield Row("embedding by half of the small model", "all of it", sides)


def export_rows(_: torch.device) -> Iterator[Row]:
    """The small model's embeddings in fp32, by PyTorch and by onnxruntime; on the CPU."""
    from extras import export

    export.need_packages()
    import onnxruntime

    model = GraFT(GraFTConfig(**SMALL)).requires_grad_(False).eval()
    embedder = evaluate.Embedder(model, HALF, HALF, torch.device("cpu"), "fp32", workers=0)
    exported = export.Exported(embedder, MODALITIES, "uint8")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = export.to_onnx(exported, {})
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    images = torch.randint(256, (3, evaluate.BATCH_SIZE, 3, 64, 128), dtype=torch.uint8)
    inputs = {name: image.numpy() for name, image in zip(MODALITIES, images, strict=True)}

    def ours() -> float:
        with torch.no_grad():
            return exported(*images)[:, 0].sum().item()

    def theirs() -> float:
        return float(session.run(["embedding"], inputs)[0][:, 0].sum())

    yield Row(
        f"embedding {len(images[0])} samples by the small model", "onnxruntime", (ours, theirs)
    )


ROWS = {
    "step": step_rows,
    "vit": vit_rows,
    "rank": rank_rows,
    "reading": reading_rows,
    "gallery": gallery_rows,
    "pruned": pruned_rows,
    "export": export_rows,
}


# --- measuring


def seconds_of(side: Side, device: torch.device) -> tuple[float, float | None]:
    began = time.perf_counter()
    figure = side()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, figure


def measure(row: Row, device: torch.device, turns: int) -> tuple[float, float]:
    """Median seconds of both sides, which take turns after a warm-up."""
    figures = [seconds_of(side, device)[1] for side in row.sides]
    if None not in figures and abs(figures[0] - figures[1]) > 1e-4:
        raise RuntimeError(f"{row.what}: the sides give {figures}")
    spent: tuple[list, list] = ([], [])
    while len(spent[0]) < turns or (sum(spent[0]) < 1 and len(spent[0]) < 10 * turns):
        for side, own in zip(row.sides, spent, strict=True):
            own.append(seconds_of(side, device)[0])
    return median(spent[0]), median(spent[1])


def matrix_rate(precision: str, device: torch.device) -> float:
    """Operations a second of torch's own matrix product, the best in two seconds."""
    M, K, N = (3564, 768, 3072) if device.type == "cpu" else (8192, 8192, 8192)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight = torch.randn(N, K, device=device, dtype=dtype)
    spent = []
    while len(spent) < 2 or sum(spent) < 2:
        spent.append(seconds_of(lambda: F.linear(x, weight), device)[0])
    return 2 * M * K * N / min(spent[1:])


# --- the GPU's rows


def gpu_figures(device: torch.device, triplets: int = 26) -> Iterator[tuple[str, float, str]]:
    """A pass of the paper's recipe: share of the matrix rate, the published way, the largest."""
    rate, hours = matrix_rate("bf16", device), 0.0
    for stage, steps in zip(PAPER.stages, (13_320, 19_980), strict=True):  # of RGBNT100
        model = GraFT(GraFTConfig())
        ours = our_step(model, stage, triplets, device, "bf16")
        with FlopCounterMode(display=False) as counter:
            ours()
        step = median(seconds_of(ours, device)[0] for _ in range(10))
        share = counter.get_total_flops() / step / rate
        hours += steps * PAPER.batch_size / triplets * step / 3600
        yield f"stage {stage.number}, {triplets} triplets, bf16", step, "s a step"
        yield f"stage {stage.number}, share of the bf16 matrix rate", share, ""
    yield "all passes of RGBNT100", hours, "hours"
    reading = read_seconds(device, 3 * triplets)
    yield f"reading {3 * triplets} samples from the store", reading / step, "of a step's time"
    published = PublishedStep(model, stage).to(device)
    optimizer = torch.optim.AdamW([p for p in published.parameters() if p.requires_grad])
    peer = on_triplets(published, optimizer, model.config, triplets, device)
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        seconds_of(peer, device)
        theirs = median(seconds_of(peer, device)[0] for _ in range(5))
        name = f"the published way in fp32, TF32 {'on' if allowed else 'off'}"
        yield name, theirs / step, "times our time"
    del model, ours, peer, published, optimizer
    torch.cuda.empty_cache()
    yield "largest --per-pass in 48 GB, --checkpointing", largest_pass(device), "triplets"


def read_seconds(device: torch.device, batch: int) -> float:
    """From the store to the GPU, a batch of random samples."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, stored(mosaics(512, folder), folder) as split:
        order = [rng.choice(512, batch).tolist() for _ in range(40)]
        began = time.perf_counter()
        for _ in data.read_batches(split, order, 0, device):
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / len(order)


def largest_pass(device: torch.device) -> int:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 48e9 / total))
    low, high = 0, 1024
    while high - low > 4:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, device) else (low, middle)
    return low


def fits(triplets: int, device: torch.device) -> bool:
    """Whether memory is enough for a stage-2 step of DeiT-B."""
    model = GraFT(GraFTConfig())
    model.backbone.checkpointing = True
    try:
        our_step(model, PAPER.stages[1], triplets, device, "bf16")()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


# --- command line


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.bench")
    add = parser.add_argument
    text = f"some of {', '.join(ROWS)} (default: all)"
    add("--rows", metavar="NAMES", type=runtime.names, default=tuple(ROWS), help=text)
    add("--gpu", action="store_true", help="the GPU's rows alone; --rows, --turns do not apply")
    add("--turns", type=runtime.whole(1), default=5, help="of each side, at least")
    add("--json", type=Path, metavar="FILE", help="write the figures, anew after each row")
    add("--seed", type=runtime.whole(0), default=0, help="of weights and inputs")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in ROWS]:
        raise UserError(f"--rows: no row {', '.join(unknown)}; expected some of {', '.join(ROWS)}")
    return args


@runtime.program
def main() -> None:
    args = parse()
    device = runtime.start(args.device)
    if args.gpu and device.type != "cuda":
        raise UserError(f"--gpu: the device is {device}; expected a CUDA GPU")
    rates = {precision: matrix_rate(precision, device) for precision in ("bf16", "fp32")}
    if device.type == "cuda":
        rates["tf32"] = rates.pop("fp32")  # which is what runtime.start has torch take
    cores = f"{runtime.machine(device)}, {os.cpu_count()} cores"
    report = {"machine": cores, "torch": torch.__version__}
    report |= {"threads": torch.get_num_threads(), "rates": rates, "rows": []}
    print(f"{report['machine']}; {report['threads']} threads; torch {torch.__version__}")
    shown = "  ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
    print(f"matrix products, GFLOP/s: {shown}")

    def keep(**figures) -> None:
        report["rows"].append(figures)
        if args.json:
            runtime.write_json(args.json, report)

    if args.gpu:
        torch.manual_seed(args.seed)
        for what, value, unit in gpu_figures(device):
            print(f"{what:<52}{value:>10.3f} {unit}", flush=True)
            keep(what=what, value=value, unit=unit)
        return
    print(f"{'what':<58}{'ours':>9}{'peer':>9}{'ratio':>7}  peer")
    for name in args.rows:
        torch.manual_seed(args.seed)
        for row in ROWS[name](device):
            ours, peer = measure(row, device, args.turns)
            print(
                f"{row.what:<58}{ours:>8.3f}s{peer:>8.3f}s{peer / ours:>7.2f}  {row.peer}",
                flush=True,
            )
            keep(what=row.what, peer=row.peer, ours=ours, theirs=peer, ratio=peer / ours)


if __name__ == "__main__":
    main()
