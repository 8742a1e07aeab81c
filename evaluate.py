"""Evaluate a checkpoint (section 5.3): embeddings of query and gallery, then CMC and mAP.

python evaluate.py runs/synthetic

Read it from `evaluate`: it calls rank_features, which calls rank_by, which ranks and computes AP.
As a library: load_embedder("runs/synthetic") turns photos into embeddings, and its
model.similarity compares them.

Shapes: Q queries, G gallery samples, N samples of a split, B of a batch, D width of an embedding.
"""

import argparse
import io
import shlex
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

import data
import runtime
from model import Embeddings, GraFT, MultiModalModel, build_model, stored_config
from runtime import UserError

BATCH_SIZE = 64  # a constant, so that train.py's figures and this program's are the same digits

# --- ranking

MAX_RANK = 50  # of the CMC
BLOCK = 2**24  # similarities that are in memory at once


class RankMetrics(NamedTuple):
    """mAP, CMC and mINP are from 0 to 1, over the queries that have a match."""

    mAP: float
    cmc: Tensor  # (MAX_RANK,), from rank 1 on
    mINP: float
    num_valid: int  # queries that have a match
    ap: Tensor  # average precision of each query, (Q,); NaN without a match
    rank: Tensor  # of each query's first match, (Q,); 0 without one


def rank_metrics(
    query: Tensor,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_keys: Tensor,
    gallery_keys: Tensor,
) -> RankMetrics:
    """Rank the gallery (G, D) for every query (Q, D) by cosine; see rank_by.

    Features need not be normalised; those of extras/weighted.py are not compared by cosine. pids
    and keys (camera or scene) are int64, (Q,) and (G,).
    """
    # The query's norm does not change its order
    query, gallery = query.detach().float(), F.normalize(gallery.detach().float())
    ids = (query_pids, gallery_pids, query_keys, gallery_keys)
    return rank_by(lambda start, end: query[start:end] @ gallery.T, *ids)


def rank_by(
    similarities: Callable[[int, int], Tensor],
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_keys: Tensor,
    gallery_keys: Tensor,
) -> RankMetrics:
    """Rank by `similarities(start, end)`, those of queries start to end - 1, (end - start, G).

    Gallery samples with the query's pid and key are left out (Zheng et al. 2015); a query without
    any other match does not count. Ties count against the model: a wrong sample as similar as a
    match ranks before it, so that features which collapse to a point score lowest, not highest.
    mINP is Ye et al.'s (2021). At most BLOCK similarities are in memory at once.
    """
    ids = (query_pids, gallery_pids, query_keys, gallery_keys)
    query_pids, gallery_pids, query_keys, gallery_keys = (x.cpu().numpy() for x in ids)
    Q, step = len(query_pids), max(1, BLOCK // max(1, len(gallery_pids)))
    ap, inverse_penalty, first = np.full(Q, np.nan), np.zeros(Q), np.zeros(Q, np.int64)
    for start in range(0, Q, step):
        # In NumPy, which sorts a row ten times as fast as torch does on CPUs
        block = similarities(start, min(start + step, Q)).cpu().numpy()
        for q, similarity in enumerate(block, start):
            same = gallery_pids == query_pids[q]
            hits = np.sort(similarity[same & (gallery_keys != query_keys[q])])[::-1]  # best first
            if len(hits) == 0:
                continue
            wrong = np.sort(similarity[~same])
            k = np.arange(1, len(hits) + 1)
            # The k-th match ranks behind all wrong samples that are at least as similar
            rank = k + len(wrong) - np.searchsorted(wrong, hits)
            ap[q] = (k / rank).mean()
            inverse_penalty[q] = len(hits) / rank[-1]
            first[q] = rank[0]
    valid, ranks = first > 0, np.arange(1, MAX_RANK + 1)
    count = int(valid.sum())
    cmc = (first[valid, None] <= ranks).sum(0) / max(1, count)
    mAP, mINP = (float(x[valid].sum()) / max(1, count) for x in (ap, inverse_penalty))
    per_query = torch.from_numpy(ap), torch.from_numpy(first)
    return RankMetrics(mAP, torch.from_numpy(cmc).float(), mINP, count, *per_query)


class Ranking(NamedTuple):
    """Query and gallery, ranked: the metrics, and the similarities of queries start to end - 1."""

    query: data.Split
    gallery: data.Split
    metrics: RankMetrics
    similarities: Callable[[int, int], Tensor]  # (start, end) -> (end - start, G)


def rank_splits(embedder: "Embedder", query: data.Split, gallery: data.Split) -> Ranking:
    """Embed query and gallery, and rank. Raises UserError where no query has a match."""
    check_matches(query, gallery)
    sides = [(split, embedder.embed(split)) for split in (query, gallery)]
    return rank_features(embedder.model.similarity, *sides)


def rank_features(
    similarity: Callable[[Tensor, Tensor], Tensor],
    query: tuple[data.Split, Tensor],
    gallery: tuple[data.Split, Tensor],
    rerank: bool = False,
) -> Ranking:
    """Rank by the model's similarity of both splits' embeddings, (Q, D) and (G, D)."""
    (query, q), (gallery, g) = query, gallery
    if rerank:
        similarities = runtime.imported("extras.rerank.rerank")(q, g, similarity)
    else:
        similarities = lambda start, end: similarity(q[start:end], g)  # noqa: E731
    ids = (query.pids, gallery.pids, query.keys, gallery.keys)
    metrics = runtime.by_rank0(lambda: rank_by(similarities, *ids))
    return Ranking(query, gallery, metrics, similarities)


def check_matches(query: data.Split, gallery: data.Split) -> None:
    """Raise UserError where no query has a match: before hours of work, or minutes of embedding."""
    keys = defaultdict(set)
    for sample in gallery.samples:
        keys[sample.pid].add(sample.key)
    if not any(keys[sample.pid] - {sample.key} for sample in query.samples):
        raise UserError(
            f"none of {len(query)} queries ({', '.join(query.modalities)}) has a gallery sample of"
            " its identity from another camera or scene; nothing can be ranked"
        )


def metrics_dict(model: MultiModalModel, ranking: Ranking) -> dict:
    """What `--json` writes and OUT/metrics.json holds; null stands for a query without a match."""
    metrics, samples = ranking.metrics, ranking.query.samples
    per_query = zip(samples, metrics.ap.tolist(), metrics.rank.tolist(), strict=True)
    return {
        "mAP": metrics.mAP,
        **{f"R{k}": metrics.cmc[k - 1].item() for k in (1, 5, 10)},
        "mINP": metrics.mINP,
        "num_query": len(samples),
        "num_gallery": len(ranking.gallery),
        "num_valid": metrics.num_valid,
        "params": model.num_parameters(),
        "machine": runtime.machine(next(model.parameters()).device),
        "queries": [
            {"name": sample.name, "ap": ap if rank else None, "rank": rank or None}
            for sample, ap, rank in per_query
        ],
    }


def summary(metrics: dict) -> str:
    names = ("mAP", "R1", "R5", "R10", "mINP")
    shown = "  ".join(f"{name} {100 * metrics[name]:.1f}" for name in names)
    valid, total = metrics["num_valid"], metrics["num_query"]
    queries = f"{total} queries" if valid == total else f"{valid} of {total} queries"
    return f"{shown}  ({queries}, {metrics['num_gallery']} gallery samples)"


# --- from images to embeddings

FEATURES = ("fusion", "bnneck", "data")


@dataclass
class Embedder:
    """Turns images into embeddings: a model, its normalisation, where and how it computes.

    `mean` and `std`: modality -> three channels. `features` says what an embedding is: the fusion
    tokens (paper, Eq. (7)), what leaves the BNNeck, or the data tokens (see D23). `settings` are
    those of training, if the model is from a checkpoint.
    """

    model: MultiModalModel
    mean: dict[str, tuple[float, float, float]]
    std: dict[str, tuple[float, float, float]]
    device: torch.device
    precision: str = "auto"
    workers: int | None = None  # reading threads of a rank; None: its cores, at most 8
    features: str = "fusion"
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        fusion = self.model.config.fusion
        if self.features != "bnneck" and hasattr(self.model, "views"):
            text = f"--features {self.features}: --fusion {fusion} compares behind its BNNecks"
            raise UserError(f"{text}; expected bnneck")
        if self.features == "data" and not isinstance(self.model, GraFT):
            raise UserError(f"--features data: a model with --fusion {fusion} has no data tokens")
        if self.features == "bnneck" and fusion == "hamnet":
            raise UserError("--features bnneck: HAMNet has no BNNeck")
        self.model = self.model.to(self.device)
        self.workers = runtime.default_workers() if self.workers is None else self.workers
        self.normalise = data.Normalise(self.mean, self.std, self.device)

    def autocast(self):
        return runtime.autocast(self.device, self.precision)

    @torch.no_grad()
    def __call__(self, photos: dict | list[dict]) -> Tensor:
        """Embeddings (N, D) of photos: {modality: file, PIL image or uint8 tensor (3, H, W)} each.

        `model.similarity` compares them. Photos may lack modalities. Raises UserError for a file
        that is no image, and for a modality that the model does not have.
        """
        photos = [photos] if isinstance(photos, dict) else photos
        photos = [self.model.ordered(photo) for photo in photos]
        size = self.model.config.image_size
        embeddings = torch.zeros(len(photos), self.model.embedding_width)
        self.model.eval()
        for indices in batches_alike(photos):
            images = {
                name: torch.stack([read_photo(photos[i][name], size) for i in indices])
                for name in photos[indices[0]]
            }
            with self.autocast():
                images = self.normalise(runtime.to_device(images, self.device))
                embeddings[indices] = self.features_of(images).float().cpu()
        return finite(embeddings)

    def embed(self, split: data.Split, flip: bool = False) -> Tensor:
        """The features of a split by which it is ranked, (N, D), in its own order."""
        width = self.model.embedding_width
        return self.for_each(split, width, lambda images: self.features_of(images, flip))

    def fusion_tokens(self, split: data.Split) -> Tensor:
        """Fusion tokens as the losses see them, (N, D): not normalised, before the BNNeck."""
        return self.for_each(split, self.model.width, lambda images: self.model(images).fusion)

    def features_of(self, images: dict[str, Tensor], flip: bool = False) -> Tensor:
        """Embeddings (B, D) of normalised images.

        With `flip`, of the mean of the tokens of images and mirror images.
        """
        embeddings = self.model(images)
        if flip:
            mirrored = {modality: image.flip(-1) for modality, image in images.items()}
            embeddings = halfway(embeddings, self.model(mirrored))
        return self.model.embedding(embeddings, self.features)

    @torch.no_grad()
    def for_each(self, split: data.Split, width: int, compute: Callable[[dict], Tensor]) -> Tensor:
        """`compute` of each sample's normalised images, in eval mode: (N, width), float32, CPU.

        Every rank computes its share and gets the whole. Each embedding is stored by its sample's
        index, so neither padding nor order can mix samples up.
        """
        was_training = self.model.training
        self.model.eval()
        embeddings = torch.zeros(len(split), width, device=self.device)
        batches = batches_alike([sample.images for sample in split.samples])
        batches = batches[runtime.rank() :: runtime.world_size()]
        with closing(data.read_batches(split, batches, self.workers, self.device)) as reader:
            progress = runtime.bar(reader, "embedding", len(batches))
            for indices, images in zip(batches, progress, strict=True):
                # On the device already: a list as the index would make the host wait for the GPU
                indices = runtime.to_device(torch.tensor(indices), self.device)
                with self.autocast():
                    embeddings[indices] = compute(self.normalise(images))
        self.model.train(was_training)
        return finite(runtime.all_sum(embeddings).cpu())


def halfway(a: Embeddings, b: Embeddings) -> Embeddings:
    """The mean of two batches of embeddings."""
    fusion_of = {name: (token + b.fusion_of[name]) / 2 for name, token in a.fusion_of.items()}
    return Embeddings((a.fusion + b.fusion) / 2, (a.data + b.data) / 2, fusion_of)


def read_photo(photo: str | Path | Image.Image | Tensor, size: tuple[int, int]) -> Tensor:
    """A photo as the model takes it, (3, H, W), uint8; tensors are of that size already."""
    if isinstance(photo, Tensor):
        return photo
    if isinstance(photo, Image.Image):  # written and read, so that it is treated as a file is
        file = io.BytesIO()
        ImageOps.exif_transpose(photo).save(file, "TIFF")
        photo = file
    return data.to_tensor(data.read_image(photo), size)


def batches_alike(photos: list[dict]) -> list[list[int]]:
    """Indices of photos in batches, of which each has the same modalities throughout."""
    groups = defaultdict(list)
    for i, photo in enumerate(photos):
        groups[tuple(photo)].append(i)
    starts = [(group, i) for group in groups.values() for i in range(0, len(group), BATCH_SIZE)]
    return [group[i : i + BATCH_SIZE] for group, i in starts]


def finite(embeddings: Tensor) -> Tensor:
    if not embeddings.isfinite().all():
        raise UserError(
            "the model's embeddings are not finite: its weights are damaged, or training diverged"
        )
    return embeddings


# --- checkpoints


def load_embedder(path: str | Path, device: str | torch.device = "auto", **options) -> Embedder:
    """The embedder of a checkpoint, or of a run's folder.

    `options` are Embedder's precision, workers and features, by default as in training. Raises
    UserError for a file that is no checkpoint.
    """
    model, checkpoint = load_model(path)
    settings = checkpoint["settings"]
    for name in ("precision", "workers", "features"):
        if options.get(name) is None:
            options[name] = settings.get(name, getattr(Embedder, name))
    device = runtime.start(device) if isinstance(device, str) else device
    mean, std = checkpoint["mean"], checkpoint["std"]
    return Embedder(model, mean, std, device, **options, settings=settings)


def load_model(path: str | Path) -> tuple[MultiModalModel, dict]:
    """The model of a checkpoint of train.py or prune.py, in eval mode, and the whole checkpoint.

    Raises UserError for anything else.
    """
    checkpoint = runtime.load_checkpoint(path)
    for name in ("config", "model", "settings", "mean", "std"):
        if not isinstance(checkpoint.get(name), dict):
            raise UserError(f"{path}: lacks {name}; expected a checkpoint written by train.py")
    try:
        config = stored_config(checkpoint["config"])
        # On the meta device a model takes no memory, however large a stranger's file says it is.
        # timm's hold tensors that no file has, but their sizes are known
        with torch.device("cpu" if config.backbone.startswith("timm:") else "meta"):
            model = build_model(config)
        model.load_state_dict(checkpoint["model"], assign=True)
        for name in ("mean", "std"):
            values = [checkpoint[name][modality] for modality in config.modalities]
            torch.tensor(values).view(-1, 3)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"{path}: its weights and its configuration do not fit this version's model ({reason})"
        ) from None
    stored, settings = checkpoint["config"], checkpoint["settings"]
    if "features" not in settings:  # older versions had it in the model's configuration
        bnneck = "bnneck" if stored.get("bnneck_features") else "fusion"
        settings["features"] = "data" if stored.get("test_token") == "data" else bnneck
    return model.float().eval(), checkpoint  # float: files may hold half precision


# --- command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Test a checkpoint (section 5.3): mAP, CMC and mINP of its test split.")
    add = parser.add_argument
    add("--all-subsets", action="store_true", help="evaluate every subset of the modalities")
    add("--flip", action="store_true", help="average the embeddings of image and mirror image")
    text = "k-reciprocal re-ranking (Zhong et al. 2017; k1=20, k2=6, lambda=0.3)"
    add("--rerank", action="store_true", help=text)
    text = "write the metrics, and each query's average precision and rank"
    add("--json", type=Path, metavar="FILE", help=text)
    runtime.imported("extras.pictures.add_options")(parser)
    return parser.parse_args(argv)


def make_parser(description: str, tests: bool = True, **more) -> runtime.Parser:
    """The options of programs that read a checkpoint; `tests`: and rank a data set's test split."""
    parser = runtime.Parser(description, **more)
    add = parser.add_argument
    text = "written by train.py or prune.py: a file, or a run's folder for its last.pt"
    add("checkpoint", metavar="CKPT", help=text)
    if tests:
        data.add_options(parser, trained=True)
        text = "fusion tokens (paper), BNNeck's output, or data tokens (default: as in training)"
        add("--features", choices=FEATURES, help=text)
    runtime.add_device_options(parser, precision=None)
    text = "reading threads of a rank (default: as in training, else one per core, at most 8)"
    add("--workers", metavar="N", type=runtime.whole(0), help=text)
    return parser


def open_checkpoint(args: argparse.Namespace) -> tuple[Embedder, data.Dataset]:
    """The embedder, and the data set that tests it; what `args` leave open is as in training."""
    options = {name: getattr(args, name) for name in ("precision", "workers", "features")}
    embedder = load_embedder(args.checkpoint, args.device, **options)
    for name in ("dataset", "data_root", "modalities"):
        if getattr(args, name) is None:
            if name not in embedder.settings:
                option = name.replace("_", "-")
                raise UserError(f"{args.checkpoint}: its settings lack {name}; give --{option}")
            setattr(args, name, embedder.settings[name])
    for name in options:
        setattr(args, name, getattr(embedder, name))
    config = embedder.model.config
    args.modalities = runtime.in_order(args.modalities, config.modalities, "the model")
    runtime.print0(f"settings: {as_typed(args)}")
    source = (args.dataset, args.data_root, args.modalities, config.image_size, args.store)
    return embedder, data.load_dataset(*source, need=("query", "gallery"))


def as_typed(args: argparse.Namespace) -> str:
    """The options as one would type them."""
    words = [str(args.checkpoint)]
    for name, value in vars(args).items():
        if name != "checkpoint" and value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words.append("--" + name.replace("_", "-"))
            words += [",".join(v) if isinstance(v, tuple) else str(v) for v in values]
    return shlex.join(words)


def subsets(modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    sizes = range(1, len(modalities) + 1)
    return [subset for size in sizes for subset in combinations(modalities, size)]


def evaluate(args: argparse.Namespace) -> None:
    """Print the metrics of a checkpoint, for every subset of its modalities if asked to."""
    runtime.check_output(args.json, "--json")
    pictures = runtime.imported("extras.pictures")
    pictures.check(args)
    embedder, dataset = open_checkpoint(args)
    pictures.check_subjects(args, embedder, dataset.query)
    chosen = subsets(args.modalities) if args.all_subsets else [args.modalities]
    splits = {s: (dataset.query.restricted(s), dataset.gallery.restricted(s)) for s in chosen}
    for pair in splits.values():
        check_matches(*pair)
    results = {}
    for subset, (query, gallery) in splits.items():
        q, g = embedder.embed(query, args.flip), embedder.embed(gallery, args.flip)
        ranking = rank_features(embedder.model.similarity, (query, q), (gallery, g), args.rerank)
        metrics = results[",".join(subset)] = metrics_dict(embedder.model, ranking)
        name = f"{','.join(subset):<16}" if args.all_subsets else ""
        runtime.print0(name + summary(metrics))
    if len({metrics["num_valid"] for metrics in results.values()}) > 1:
        runtime.print0("the rows rank different queries, because some samples lack a sensor")
    if args.json and runtime.rank() == 0:
        runtime.write_json(args.json, results if args.all_subsets else metrics)
        print(f"{args.json}: the metrics, and each query's average precision and rank")
    pictures.draw(args, embedder, ranking)


@runtime.program
def main() -> None:
    evaluate(parse())


if __name__ == "__main__":
    main()
