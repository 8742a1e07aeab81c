"""Time this code beside its fastest public peers: in turns, in one run, on the same weights.

python -m extras.bench                          some minutes; --json FILE keeps the figures
python -m extras.bench --rows step,rank         some of the rows
python -m extras.bench --gpu                    the GPU's rows, a minute on an H100

A ratio is the peer's median time by ours: bare times say little on a shared machine. A row whose
two sides give different figures ends the program, as they would not have done the same work.
"""

import argparse
import os
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
from tqdm import tqdm

import data
import evaluate
import options
import runtime
import train
from losses import GraFTLoss, triplet_soft_margin
from model import GraFT, GraFTConfig, ViT
from runtime import UserError

SMALL = GraFTConfig(image_size=(64, 128), **options.BACKBONES["small"])  # the synthetic set's
PAPER = options.parse(["--dataset", "rgbnt100"])
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
        raise UserError("this row compares with timm: pip install timm") from None
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads}
    return VisionTransformerDistilled(image_size, 16, **sizes, num_classes=0)


class PublishedStep(nn.Module):
    """The published code's training step: fp32, a pass of its own for each role and modality.

    Called like train.Objective. Parameters are named as in GraFT, whose weights it copies.
    """

    def __init__(self, model: GraFT, stage: options.Stage):
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


def published_reading(split: data.Split, indices: list[int]) -> dict[str, Tensor]:
    """The published code's: Pillow opens, crops and resizes once for each modality."""
    images = {}
    for modality in split.modalities:
        arrays = []
        for path, tile in (split.samples[i].images[modality] for i in indices):
            image = Image.open(path).convert("RGB")
            width = 2 * image.height
            image = image.crop((width * tile, 0, width * (tile + 1), image.height))
            image = image.resize(split.image_size[::-1], Image.Resampling.BICUBIC)
            arrays.append(np.asarray(image))
        images[modality] = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return images


def published_evaluation(query: Tensor, gallery: Tensor, pids: tuple, keys: tuple) -> float:
    """mAP as the published GraFT ranks, for one query after the other, in NumPy."""
    query, gallery = (F.normalize(x).numpy() for x in (query, gallery))
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
        model = GraFT(GraFTConfig())
        peer = published_step(model, stage, triplets, device)
        for precision in ("bf16", "fp32"):
            ours = our_step(model, stage, triplets, device, precision)
            what = f"training step, stage {stage.number}, {precision}"
            yield Row(what, "the published code's way, fp32", (ours, peer))


def our_step(
    model: GraFT, stage: options.Stage, triplets: int, device, precision="auto", alpha=0.5
) -> Side:
    """train.py's step for a model in a stage."""
    model.freeze_backbone(stage.frozen)
    embedder = evaluate.Embedder(model, HALF, HALF, device, precision)
    criterion = GraFTLoss(model.config.num_ids, model.width).to(device)
    criterion.weights(alpha, stage.beta, 0.5, stage.label_smoothing)
    objective = train.Objective(embedder, criterion)
    optimizer = train.make_optimizer(objective, stage, center_lr=1e-3)
    return on_triplets(objective, optimizer, model.config, triplets, device)


def published_step(model: GraFT, stage: options.Stage, triplets: int, device) -> Side:
    published = PublishedStep(model, stage).to(device)
    trained = [p for p in published.parameters() if p.requires_grad]
    decay = stage.weight_decay
    optimizer = torch.optim.AdamW(trained, stage.lr, stage.betas, weight_decay=decay)
    return on_triplets(published, optimizer, model.config, triplets, device)


def on_triplets(step: nn.Module, optimizer, config: GraFTConfig, triplets: int, device) -> Side:
    """A whole training step on random images: forward, losses, backward, optimizer."""
    images, labels = random_triplets(config, triplets, device)

    def turn() -> None:
        step(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return turn


def random_triplets(config: GraFTConfig, triplets: int, device) -> tuple[dict, Tensor]:
    size = (3 * triplets, 3, *config.image_size)
    images = {modality: torch.randn(size, device=device) for modality in config.modalities}
    return images, torch.randint(config.num_ids, (triplets,), device=device)


def ffd_rows(device: torch.device, triplets: int = 8) -> Iterator[Row]:
    """FFD's step once its triplet loss has vanished, as it does in training, beside alpha 0.

    Where denormal numbers are slow and not flushed (Intel's CPUs), the ratio is far below 1.
    """
    stage = PAPER.stages[1]
    sides = []
    for alpha in (0.5, 0.0):
        torch.manual_seed(0)
        model = GraFT(SMALL)
        vanish(model, *random_triplets(SMALL, triplets, "cpu"))
        sides.append(our_step(model, stage, triplets, device, "fp32", alpha))
    yield Row("training step, FFD's triplets vanished, fp32", "with --alpha 0", tuple(sides))


@torch.no_grad()
def vanish(model: GraFT, images: dict[str, Tensor], labels: Tensor) -> float:
    """Scale the encoders' last norms so that Eq. (8) is below exp(-80); returns its value.

    Its gradients, which are shared among many weights, are then denormal numbers.
    """
    criterion, roles = GraFTLoss(model.config.num_ids, model.width), model.eval()(images)
    anchor, positive, _ = roles.fusion.chunk(3)
    negative = roles.data.chunk(3)[2]
    gap = (anchor - negative).square().sum(1) - (anchor - positive).square().sum(1)
    for encoder in model.encoders.values():
        encoder.norm2.weight *= (80 / gap.min()).sqrt()
    out = model(images)
    model.train()
    return float(criterion.triplet(out.fusion, out.data, labels, ()))


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
                sides = partial(turn, ours, ours), partial(turn, peer, peer.forward_features)
                what = f"ViT {name}, forward{' and backward' if training else ''}, {precision}"
                yield Row(what, f"timm, {precision}", sides)


def vit_turn(images: Tensor, training: bool, precision: str, vit: nn.Module, forward) -> None:
    vit.train(training)
    with torch.set_grad_enabled(training), runtime.autocast(images.device, precision):
        tokens = forward(images)
    if training:
        tokens.float().sum().backward()
        vit.zero_grad()


def rank_rows(device: torch.device) -> Iterator[Row]:
    """mAP of noisy features of width 768: RGBNT100's size and Market-1501's; on the CPU."""
    for sizes in ((1715, 8575, 50, 8), (3368, 19732, 750, 6)):
        query, gallery, pids, keys = features(*sizes)
        ours = partial(evaluate.rank_metrics, query, gallery, *pids, *keys)
        peer = partial(published_evaluation, query, gallery, pids, keys)
        what = f"ranking {sizes[0]:,} queries, {sizes[1]:,} gallery samples"
        sides = (lambda ours=ours: ours().mAP), peer
        yield Row(what, "the published GraFT's evaluation (NumPy)", sides)


def features(num_query: int, num_gallery: int, num_ids: int, num_keys: int, width=768) -> tuple:
    """Noisy features of query and gallery, their pids and their keys."""
    centers, counts = torch.randn(num_ids, width), (num_query, num_gallery)
    pids, keys = (
        tuple(torch.randint(high, (count,)) for count in counts) for high in (num_ids, num_keys)
    )
    query, gallery = (centers[ids] + 4 * torch.randn(len(ids), width) for ids in pids)
    return query, gallery, pids, keys


def reading_rows(_: torch.device, count: int = 256) -> Iterator[Row]:
    """From mosaics to batches by one thread; the figure is the mean of some pixels."""
    with tempfile.TemporaryDirectory() as folder:
        split = mosaics(count, folder)
        order = [list(range(start, start + 64)) for start in range(0, count, 64)]
        cpu = torch.device("cpu")

        def turn(batches: Callable) -> float:
            some = [x[..., ::16, ::16] for images in batches() for x in images.values()]
            return torch.cat(some).float().mean().item() / 255

        decode = partial(turn, partial(data.read_batches, split, order, 1, cpu))
        pillow = partial(turn, lambda: (published_reading(split, indices) for indices in order))
        what = f"reading {count} mosaics, first epoch, one thread"
        yield Row(what, "Pillow, once a modality", (decode, pillow))
        with stored(split, folder) as kept:
            store = partial(turn, partial(data.read_batches, kept, order, 0, cpu))
            what = f"reading {count} mosaics, later epochs, one thread"
            yield Row(what, "without the store", (store, decode))


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


ROWS = {
    "step": step_rows,
    "ffd": ffd_rows,
    "vit": vit_rows,
    "rank": rank_rows,
    "reading": reading_rows,
}


# --- measuring


def seconds_of(side: Side, device: torch.device) -> tuple[float, float | None]:
    began = time.perf_counter()
    figure = side()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, figure


def measure(row: Row, device: torch.device, turns: int) -> tuple[float, float]:
    """Median seconds of both sides, which take turns after a warm-up, for a second at least."""
    spent: tuple[list, list] = ([], [])
    # Shown only of a row that takes more than ten seconds
    for turn in tqdm(range(10 * turns), row.what, leave=False, delay=10, disable=None):
        results = [seconds_of(side, device) for side in row.sides]
        if turn == 0:
            figures = [figure for _, figure in results]
            if None not in figures and abs(figures[0] - figures[1]) > 1e-4:
                raise RuntimeError(f"{row.what}: the sides give {figures}")
            continue
        for own, (seconds, _) in zip(spent, results, strict=True):
            own.append(seconds)
        if turn >= turns and sum(spent[0]) > 1:
            break
    return median(spent[0]), median(spent[1])


def matrix_rate(precision: str, device: torch.device) -> float:
    """Operations a second of torch's own matrix product, the best in two seconds."""
    # On a CPU the sizes on which the rule of runtime.cpu_multiplies_bf16_fast was judged
    M, K, N = (2048, 3072, 3072) if device.type == "cpu" else (8192, 8192, 8192)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight = torch.randn(N, K, device=device, dtype=dtype)
    spent = []
    while len(spent) < 2 or sum(spent) < 2:
        spent.append(seconds_of(lambda: F.linear(x, weight), device)[0])
    return 2 * M * K * N / min(spent[1:])


# --- the GPU's rows


def gpu_figures(device: torch.device, triplets: int = 26) -> Iterator[tuple[str, float, str]]:
    """A pass of the paper's recipe: its share of the matrix rate, and the published way."""
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
    peer = published_step(model, stage, triplets, device)
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        seconds_of(peer, device)
        theirs = median(seconds_of(peer, device)[0] for _ in range(5))
        name = f"the published way in fp32, TF32 {'on' if allowed else 'off'}"
        yield name, theirs / step, "times our time"


def read_seconds(device: torch.device, batch: int) -> float:
    """From the store to the GPU, a batch of random samples."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, stored(mosaics(512, folder), folder) as split:
        order = [rng.choice(512, batch).tolist() for _ in range(40)]
        began = time.perf_counter()
        for _ in data.read_batches(split, order, 0, device):
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / len(order)


# --- command line


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.bench")
    add = parser.add_argument
    text = f"some of {', '.join(ROWS)} (default: all)"
    add("--rows", metavar="NAMES", type=runtime.names, default=tuple(ROWS), help=text)
    add("--gpu", action="store_true", help="the GPU's rows alone; --rows, --turns do not apply")
    add("--turns", type=runtime.whole(1), default=5, metavar="N", help="of each side, at least")
    add("--json", type=Path, metavar="FILE", help="write the figures, anew after each row")
    text = "random seed of weights and inputs"
    add("--seed", type=runtime.whole(0), default=0, metavar="N", help=text)
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in ROWS]:
        raise UserError(f"--rows: no row {', '.join(unknown)}; expected some of {', '.join(ROWS)}")
    runtime.check_output(args.json, "--json", (".json",))
    return args


@runtime.program
def main() -> None:
    args = parse()
    device = runtime.start(args.device)
    if args.gpu and device.type != "cuda":
        raise UserError(f"--gpu: the device is {device}; expected a CUDA GPU")
    machine = f"{runtime.machine(device)}, {os.cpu_count()} cores"
    report = {"machine": machine, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"{machine}; {report['threads']} threads; torch {report['torch']}")
    report["rates"] = rates = {name: matrix_rate(name, device) for name in ("bf16", "fp32")}
    if device.type == "cuda":
        rates["tf32"] = rates.pop("fp32")  # which is what runtime.start has torch take
    shown = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
    rule = "bf16" if runtime.bf16_is_fast(device) else "fp32"
    print(f"matrix products, GFLOP/s: {shown}; --precision auto takes {rule}", flush=True)
    report |= {"auto": rule, "rows": []}

    def keep(line: str, **figures) -> None:
        print(line, flush=True)
        report["rows"].append({**figures, "machine": machine})
        if args.json:
            runtime.write_json(args.json, report)

    torch.manual_seed(args.seed)
    if args.gpu:
        for what, value, unit in gpu_figures(device):
            line = f"{what:<48}{value:>10.3f} {unit:<17} {machine}"
            keep(line, what=what, value=value, unit=unit)
        return
    print(f"{'what':<50}{'ours':>9}{'peer':>9}{'ratio':>7}  peer; processor")
    for name in args.rows:
        torch.manual_seed(args.seed)
        for row in ROWS[name](device):
            ours, peer = measure(row, device, args.turns)
            line = f"{row.what:<50}{ours:>8.3f}s{peer:>8.3f}s{peer / ours:>7.2f}  {row.peer}"
            figures = {"what": row.what, "peer": row.peer, "ours": ours, "theirs": peer}
            keep(f"{line}; {machine}", **figures, ratio=peer / ours)


if __name__ == "__main__":
    main()
