"""Time this code beside its fastest public peers, in turns, in one run, on the same weights.

python -m extras.bench --json bench.json        every row: about five minutes on two cores
python -m extras.bench --rows step,rank         these rows only
python -m extras.bench --gpu                    the GPU's rows: a minute on an H100

A ratio is the peer's median time divided by ours; times alone say little on a shared machine. The
ranking and reading rows also compare both sides' figures; the program ends if these differ.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

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
from losses import GraFTLoss
from model import Backbone, Embeddings, GraFT, GraFTConfig, ViT
from runtime import UserError

DEIT_B = GraFTConfig()  # with images of 224x224, as in the paper
SMALL = GraFTConfig(image_size=(64, 128), **options.BACKBONES["small"])  # the synthetic set's
PAPER = options.parse(["--dataset", "rgbnt100"])
HALF = dict.fromkeys(DEIT_B.modalities, (0.5, 0.5, 0.5))  # mean and std of made-up images

Side = Callable[[], float | None]  # one turn; both sides of a row must return the same figure


class Row(NamedTuple):
    what: str
    peer: str
    sides: tuple[Side, Side]  # ours and the peer's


# --- peers, of public parts


class TimmViT(Backbone):
    """timm's distilled ViT, the class of its deit_base_distilled_patch16_224, with our weights."""

    def __init__(self, config: GraFTConfig, ours: ViT):
        super().__init__()
        try:
            from timm.models.deit import VisionTransformerDistilled
        except ImportError:
            raise UserError("this row compares with timm: pip install timm") from None
        sizes = {"embed_dim": config.dim, "depth": config.depth, "num_heads": config.heads}
        self.vit = VisionTransformerDistilled(config.image_size, 16, **sizes, num_classes=0)
        self.vit.load_state_dict(ours.state_dict())

    def forward(self, images: Tensor, patch_dropout: float = 0.0) -> Tensor:
        return self.vit.forward_features(images)


class PublishedGraFT(GraFT):
    """GraFT as the published code computes it: each role and modality in a pass of its own.

    Its encoders compute the outputs of all tokens. It has the weights of the model that is given.
    """

    def __init__(self, model: GraFT):
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.backbone = TimmViT(model.config, model.backbone)

    def forward(self, images: dict[str, Tensor]) -> Embeddings:
        fusion, sampled = [], []
        for role in range(3):
            encoded = []
            for modality, image in images.items():
                tokens = self.backbone(image.chunk(3)[role])  # (B, N, D)
                fusion_token = self.fusion_token.expand(len(tokens), -1, -1)
                tokens = torch.cat([fusion_token, tokens], 1)
                encoded.append(nn.TransformerEncoderLayer.forward(self.encoders[modality], tokens))
            mean = torch.stack(encoded).mean(0)
            fusion.append(mean[:, 0])
            sampled.append(mean[:, 1])
        return Embeddings(torch.cat(fusion), torch.cat(sampled), {}, {})


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


def step_rows(device: torch.device) -> Iterator[Row]:
    """A training step of DeiT-B on two triplets of three modalities."""
    first, second = PAPER.stages
    for stage, precision in ((first, "bf16"), (second, "bf16"), (second, "fp32")):
        model = GraFT(DEIT_B)
        peer = training_step(PublishedGraFT(model), stage, 2, device, "fp32")
        ours = training_step(model, stage, 2, device, precision)
        what = f"training step, stage {stage.number}, {precision}"
        yield Row(what, "the published code's way, fp32", (ours, peer))


def training_step(
    model: GraFT, stage: options.Stage, triplets: int, device, precision: str, alpha=0.5
) -> Side:
    """train.py's step on random images: forward, losses, backward, optimizer."""
    model.freeze_backbone(stage.frozen)
    embedder = evaluate.Embedder(model, HALF, HALF, device, precision)
    criterion = GraFTLoss(model.config.num_ids, model.width).to(device)
    criterion.set_weights(alpha, stage.beta, 0.5, stage.label_smoothing)
    objective = train.Objective(embedder, criterion)
    optimizer = train.make_optimizer(objective, stage, center_lr=1e-3)
    images, labels = random_triplets(model.config, triplets, device)

    def turn() -> None:
        objective(images, labels)["loss"].backward()
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
        sides.append(training_step(model, stage, triplets, device, "fp32", alpha))
    yield Row("training step, FFD's triplets vanished, fp32", "with --alpha 0", tuple(sides))


@torch.no_grad()
def vanish(model: GraFT, images: dict[str, Tensor], labels: Tensor) -> float:
    """Scale the encoders' last norms so that Eq. (8) is below exp(-80); returns its value.

    Its gradients, which are shared among many weights, are then denormal numbers.
    """
    embeddings = model.eval()(images)
    anchor, positive, _ = embeddings.fusion.chunk(3)
    _, _, negative = embeddings.data.chunk(3)
    gap = (anchor - negative).square().sum(1) - (anchor - positive).square().sum(1)
    for encoder in model.encoders.values():
        encoder.norm2.weight *= (80 / gap.min()).sqrt()
    embeddings, criterion = model(images), GraFTLoss(model.config.num_ids, model.width)
    model.train()
    return float(criterion.triplet(embeddings.fusion, embeddings.data, labels, ()))


def vit_rows(device: torch.device) -> Iterator[Row]:
    """Forward and backward pass of a ViT for all its tokens, both sides in one precision."""
    for name, config, batch in (("DeiT-B, 224x224", DEIT_B, 6), ("small, 64x128", SMALL, 96)):
        ours = ViT(config.image_size, 16, config.dim, config.depth, config.heads).to(device)
        peer = TimmViT(config, ours).to(device)
        images = torch.randn(batch, 3, *config.image_size, device=device)
        for precision in ("bf16", "fp32"):
            sides = (partial(vit_turn, vit, images, precision) for vit in (ours, peer))
            what = f"ViT {name}, forward and backward, {precision}"
            yield Row(what, f"timm, {precision}", tuple(sides))


def vit_turn(vit: nn.Module, images: Tensor, precision: str) -> None:
    with runtime.autocast(images.device, precision):
        tokens = vit(images)
    tokens.float().sum().backward()
    vit.zero_grad()


def rank_rows(_: torch.device, sizes=(1715, 8575, 50, 8)) -> Iterator[Row]:
    """mAP of noisy features of width 768, in RGBNT100's numbers, on the CPU."""
    query, gallery, pids, keys = features(*sizes)
    ours = lambda: evaluate.rank_metrics(query, gallery, *pids, *keys).mAP  # noqa: E731
    peer = partial(published_evaluation, query, gallery, pids, keys)
    what = f"ranking {sizes[0]:,} queries, {sizes[1]:,} gallery samples"
    yield Row(what, "the published GraFT's evaluation (NumPy)", (ours, peer))


def features(num_query: int, num_gallery: int, num_ids: int, num_keys: int, width=768) -> tuple:
    """Noisy features of query and gallery, their pids and their keys."""
    centers, counts = torch.randn(num_ids, width), (num_query, num_gallery)
    pids, keys = (
        tuple(torch.randint(high, (count,)) for count in counts) for high in (num_ids, num_keys)
    )
    query, gallery = (centers[ids] + 4 * torch.randn(len(ids), width) for ids in pids)
    return query, gallery, pids, keys


def reading_rows(_: torch.device, count: int = 256) -> Iterator[Row]:
    """From mosaics to batches, by one thread; the figure is the mean of some pixels."""

    def mean_pixel(batches: Callable) -> float:
        some = [x[..., ::16, ::16] for images in batches() for x in images.values()]
        return torch.cat(some).float().mean().item() / 255

    with tempfile.TemporaryDirectory() as folder:
        split = mosaics(count, folder)
        order = [batch.tolist() for batch in torch.arange(count).split(64)]
        peer = partial(mean_pixel, lambda: (published_reading(split, batch) for batch in order))
        cpu = torch.device("cpu")
        for epoch, images in (("first epoch", split), ("later epochs", stored(split, folder))):
            ours = partial(mean_pixel, partial(data.read_batches, images, order, 1, cpu))
            what = f"reading {count} mosaics, {epoch}, one thread"
            yield Row(what, "Pillow, once a modality", (ours, peer))


def mosaics(count: int, folder: str) -> data.Split:
    """Samples as RGBNT100's: smooth random mosaics of 3 tiles of 256x128, to be read at 224x224."""
    samples = []
    noise = torch.randint(256, (count, 16, 96, 3), dtype=torch.uint8).numpy()
    for i, pixels in enumerate(noise):
        path = Path(folder) / f"{i:04d}_c0001_000.jpg"
        Image.fromarray(pixels).resize((768, 128), Image.Resampling.BICUBIC).save(path, quality=90)
        tiles = {modality: (path, tile) for tile, modality in enumerate(HALF)}
        samples.append(data.Sample(path.stem, i, 0, tiles))
    return data.Split(samples, HALF, (224, 224))


def stored(split: data.Split, folder: str) -> data.Split:
    """The split, decoded into a store in this folder."""
    split = data.Split(split.samples, split.modalities, split.image_size, store_gb=10)
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        if not split.decoded:
            raise UserError(f"{folder}: has no room for the decoded images of this row")
    return split


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
    spent: list[list[float]] = []
    for turn in tqdm(range(10 * turns), row.what, leave=False, disable=None):
        (ours, figure), (theirs, other) = (seconds_of(side, device) for side in row.sides)
        if turn == 0:
            if figure is not None and abs(figure - other) > 1e-4:
                raise RuntimeError(f"{row.what}: the sides give {figure} and {other}")
            continue
        spent.append([ours, theirs])
        if turn >= turns and sum(seconds for seconds, _ in spent) > 1:
            break
    return tuple(np.median(spent, 0).tolist())


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
        model = GraFT(DEIT_B)
        peer = training_step(PublishedGraFT(model), stage, triplets, device, "fp32")
        ours = training_step(model, stage, triplets, device, "bf16")
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
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        seconds_of(peer, device)
        theirs = median(seconds_of(peer, device)[0] for _ in range(5))
        name = f"the published way in fp32, TF32 {'on' if allowed else 'off'}"
        yield name, theirs / step, "times our time"


def read_seconds(device: torch.device, batch: int) -> float:
    """From the store to the GPU, a batch of random samples."""
    order = np.random.default_rng(0).integers(512, size=(40, batch)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        batches = data.read_batches(stored(mosaics(512, folder), folder), order, 0, device)
        began = time.perf_counter()
        for _ in batches:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / len(order)


# --- command line


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.bench")
    add = parser.add_argument
    text = f"rows to measure, of {', '.join(ROWS)} (default: all)"
    add("--rows", action=runtime.Names, default=tuple(ROWS), help=text)
    text = "measure the GPU's rows instead, without --rows and --turns"
    add("--gpu", action="store_true", help=text)
    text = "least number of turns of each side"
    add("--turns", type=runtime.whole(1), default=3, help=text)
    text = "write the figures to FILE after each row"
    add("--json", type=Path, metavar="FILE", help=text)
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
        rates["tf32"] = rates.pop("fp32")  # which runtime.start makes of fp32
    shown = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
    rule = "bf16" if runtime.bf16_is_fast(device) else "fp32"
    print(f"matrix products, GFLOP/s: {shown}; --precision auto is {rule}", flush=True)
    report |= {"auto": rule, "rows": []}

    def add(line: str, **figures) -> None:
        print(line, flush=True)
        report["rows"].append(figures)
        if args.json:
            runtime.write_json(args.json, report)

    torch.manual_seed(0)
    if args.gpu:
        for what, value, unit in gpu_figures(device):
            add(f"{what:<48}{value:>10.3f} {unit}", what=what, value=value, unit=unit)
    else:
        print(f"{'what':<52}{'ours':>9}{'peer':>9}{'ratio':>7}  peer")
        for name in args.rows:
            for row in ROWS[name](device):
                ours, peer = measure(row, device, args.turns)
                line = f"{row.what:<52}{ours:>8.3f}s{peer:>8.3f}s{peer / ours:>7.2f}  {row.peer}"
                figures = {"what": row.what, "peer": row.peer, "ours": ours, "theirs": peer}
                add(line, **figures, ratio=peer / ours)
    if args.json:
        print(f"{args.json}: these figures")


if __name__ == "__main__":
    main()
