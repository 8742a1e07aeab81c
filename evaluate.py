"""Evaluate a checkpoint (section 5.3): embeddings of query and gallery, then CMC and mAP.

python evaluate.py runs/synthetic/last.pt                 a program, and the ranking library

Shapes: Q queries, G gallery samples, N samples of a split, D width of an embedding.
"""

import os

# Else OpenBLAS's threads wait busily for more after a product, and slow the counting down. It is
# read when NumPy is loaded
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

import argparse
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import runtime
from model import GraFTConfig, MultiModalModel, build_model
from runtime import UserError

BATCH_SIZE = 64  # samples; one number, so that training's own figures equal this program's


# --- ranking

MAX_RANK = 50  # of the CMC
BLOCK = 2**24  # similarities that are in memory at once
PIECE = 511  # NumPy sorts up to 512 floats without a branch, each much faster than in a long row


class RankMetrics(NamedTuple):
    """mAP and mINP from 0 to 1; cmc (max_rank,) from rank 1 on; how many queries had a match; the
    average precision of each query, (Q,), NaN where it had none."""

    mAP: float
    cmc: Tensor
    mINP: float
    num_valid: int
    ap: Tensor


def rank_metrics(
    query: Tensor,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_keys: Tensor,
    gallery_keys: Tensor,
) -> RankMetrics:
    """Rank the gallery (G, D) for every query (Q, D) by cosine; see rank_by.

    Features need not be normalised. pids and keys (camera or scene) are int64, (Q,) and (G,); all
    tensors are on one device.
    """
    query, gallery = query.detach().float(), gallery.detach().float()
    # A query's own norm changes no order
    scale = torch.linalg.vector_norm(gallery, dim=1).clamp(min=1e-12).reciprocal()

    def cosine(start: int, end: int) -> Tensor:
        return product(query[start:end], gallery).mul_(scale)

    return rank_by(cosine, query_pids, gallery_pids, query_keys, gallery_keys)


@torch.no_grad()
def rank_by(
    similarities: Callable[[int, int], Tensor],
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_keys: Tensor,
    gallery_keys: Tensor,
) -> RankMetrics:
    """Rank by `similarities(start, end)` of those queries to the gallery, (end - start, G).

    Gallery samples with the query's pid and key are left out (Zheng et al. 2015); a query without
    any match left is not counted. Ties count against the model: a wrong sample as close as a match
    ranks before it, so features that collapse to a point score lowest, not highest. mINP after Ye
    et al. 2021. Exact: no ranking is cut off. At most BLOCK similarities are in memory at once.
    """
    Q, G = len(query_pids), len(gallery_pids)
    # In the order of pids the samples of a query's pid are those from `first` to `last` - 1
    pids, order = gallery_pids.sort()
    first = torch.searchsorted(pids, query_pids)[:, None]  # (Q, 1)
    last = torch.searchsorted(pids, query_pids, right=True)[:, None]
    sizes = (last - first).cpu()
    shape = (3, Q)  # of each query: average precision, inverse penalty, rank of the first match
    found = torch.full(shape, torch.nan, dtype=torch.float64, device=query_pids.device)
    step = max(1, BLOCK // max(1, G))
    for start in range(0, Q, step):
        rows = slice(start, min(start + step, Q))
        K = int(sizes[rows].max())
        if K == 0:
            continue
        similarity = similarities(rows.start, rows.stop)  # (rows, G)
        # The samples of each query's pid in a table (rows, K); past its end the last of them again
        k = torch.arange(1, K + 1, device=query_pids.device)
        position = first[rows] + k - 1
        column = order[torch.minimum(position, last[rows] - 1)]
        match = (position < last[rows]) & (query_keys[rows, None] != gallery_keys[column])
        hits = similarity.gather(1, column).masked_fill_(~match, -torch.inf)
        hits = sort_rows(hits).flip(1)  # best first
        # The rank of the k-th match is k + the wrong samples that are at least as close
        negatives = similarity.scatter_(1, column, -torch.inf)
        rank = k + count_ahead(negatives, hits)
        count = match.sum(1)
        filled = k <= count[:, None]
        found[0, rows] = (filled * k / rank.double()).sum(1) / count  # NaN without a match
        found[1, rows] = count / (filled * rank).amax(1).double()
        found[2, rows] = rank[:, 0].double()
    ap, inverse, first_rank = found.cpu()
    valid = ~ap.isnan()
    num_valid = int(valid.sum())
    if num_valid == 0:
        return RankMetrics(0.0, torch.zeros(MAX_RANK), 0.0, 0, ap)
    counts = first_rank[valid].long().bincount(minlength=MAX_RANK + 1)[1 : MAX_RANK + 1]
    cmc = (counts.cumsum(0) / num_valid).float()
    return RankMetrics(ap.nanmean().item(), cmc, inverse[valid].mean().item(), num_valid, ap)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T. On CPUs by NumPy, whose OpenBLAS is ahead of torch's MKL on other makers' CPUs."""
    return x @ y.T if x.device.type != "cpu" else torch.from_numpy(x.numpy() @ y.numpy().T)


def sort_rows(x: Tensor) -> Tensor:
    """Sort each row, ascending. On CPUs NumPy's vectorised sort is ten times as fast as torch's."""
    if x.device.type != "cpu":
        return x.sort(1).values
    x.numpy().sort(1)
    return x


def count_ahead(negatives: Tensor, hits: Tensor) -> Tensor:
    """How many `negatives` (rows, G) are at least as large as each of a row's `hits` (rows, K).

    On CPUs in all threads, by sorted pieces of a row instead of the sorted row, where K is small.
    """
    if negatives.device.type != "cpu" or hits.shape[1] > PIECE:
        return negatives.shape[1] - torch.searchsorted(sort_rows(negatives), hits)
    threads = torch.get_num_threads()
    # A large part each: between its loops NumPy runs one thread only
    arrays = ([part.numpy() for part in x.chunk(threads)] for x in (negatives, hits))
    with ThreadPoolExecutor(threads) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(count_by_pieces, *arrays))))


def count_by_pieces(negatives: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """count_ahead of one thread's rows: each piece is sorted, every hit is searched in all."""
    ahead, real = np.full(hits.shape, negatives.shape[1]), hits > -np.inf
    row, hits = real.nonzero()[0], hits[real]
    pieces = max(1, 256 // len(negatives))  # of each row at a time: few enough to stay in the cache
    width = pieces * PIECE
    part = np.empty((len(negatives), width), negatives.dtype)
    base = row * width + np.arange(0, width, PIECE)[:, None]  # (pieces, hits): places in part
    larger = np.zeros(len(hits), np.int64)
    for start in range(0, negatives.shape[1], width):
        rest = negatives[:, start : start + width]
        part[:, : rest.shape[1]] = rest
        part[:, rest.shape[1] :] = -np.inf
        part.reshape(-1, PIECE).sort(1)
        position = base.copy()
        for step in (256, 128, 64, 32, 16, 8, 4, 2, 1):  # a binary search, of all hits at once
            position += step * (part.take(position + (step - 1)) < hits)
        larger += (base + PIECE - position).sum(0)
    ahead[real] = larger
    return ahead


# --- from images to embeddings


@dataclass
class Embedder:
    """Turns images into embeddings: a model, its normalisation, where and how it computes.

    Made once, by training or from a checkpoint. `mean` and `std`: modality -> three channels.
    """

    model: MultiModalModel
    mean: dict[str, tuple[float, float, float]]
    std: dict[str, tuple[float, float, float]]
    device: torch.device
    precision: str = "auto"
    workers: int | None = None  # reading processes of a rank; None: its cores, at most 8

    def __post_init__(self):
        self.model = self.model.to(self.device)
        if self.workers is None:
            self.workers = runtime.default_workers()
        self.normalise = data.Normalise(self.mean, self.std, self.device)

    def autocast(self):
        return runtime.autocast(self.device, self.precision)

    def embed(self, split: data.Split, flip: bool = False) -> Tensor:
        """What is ranked: the features of a split, (N, D), in its own order."""
        width = self.model.width
        return self.for_each(split, lambda images: self.features(images, flip), width)

    def features(self, images: dict[str, Tensor], flip: bool = False) -> Tensor:
        """L2-normalised embeddings (B, D) of normalised images.

        The fusion or data token, before or behind the BNNeck, as the model's config says. `flip`:
        the mean of the tokens of the images and of their mirror images.
        """
        config = self.model.config
        tokens = getattr(self.model(images), config.test_token)
        if flip:
            mirrored = {modality: image.flip(-1) for modality, image in images.items()}
            tokens = (tokens + getattr(self.model(mirrored), config.test_token)) / 2
        return F.normalize(self.model.bottleneck(tokens) if config.bnneck_features else tokens)

    def fusion_tokens(self, split: data.Split) -> Tensor:
        """Fusion tokens as the losses see them, (N, D): not normalised, before the BNNeck."""
        return self.for_each(split, lambda images: self.model(images).fusion, self.model.width)

    @torch.no_grad()
    def for_each(self, split: data.Split, compute: Callable[[dict], Tensor], width: int) -> Tensor:
        """`compute` of each sample's images, in eval mode: (N, width) float32 on the CPU.

        Every rank computes its share and gets all rows. They are filled in by sample index, so
        neither padding nor order can mix samples up.
        """
        was_training = self.model.training
        self.model.eval()
        rows = torch.zeros(len(split), width, device=self.device)
        with closing(self.batches(split)) as batches:
            for indices, images in batches:
                with self.autocast():
                    rows[indices] = compute(images)
        self.model.train(was_training)
        return runtime.all_sum(rows).cpu()

    def batches(self, split: data.Split) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """This rank's share of a split: sample indices and normalised images.

        A batch holds samples with the same modalities.
        """
        groups = defaultdict(list)
        for i, sample in enumerate(split.samples):
            groups[tuple(sample.images)].append(i)
        batches = []
        for group in groups.values():
            batches += [group[i : i + BATCH_SIZE] for i in range(0, len(group), BATCH_SIZE)]
        own = batches[runtime.rank() :: runtime.world_size()]
        with closing(data.read_batches(split, own, self.workers, self.device)) as reader:
            progress = tqdm(reader, "embedding", len(own), leave=False, disable=None)
            for indices, images in zip(own, progress, strict=True):
                yield indices, self.normalise(images)


class Ranking(NamedTuple):
    """Query and gallery, ranked: the metrics, and the similarities of queries start to end - 1."""

    query: data.Split
    gallery: data.Split
    metrics: RankMetrics
    similarities: Callable[[int, int], Tensor]  # (start, end) -> (end - start, G)


def rank_splits(embedder: Embedder, query: data.Split, gallery: data.Split) -> Ranking:
    """Embed query and gallery, and rank. Raises UserError where no query has a match."""
    return rank_features((query, embedder.embed(query)), (gallery, embedder.embed(gallery)))


def rank_features(
    query: tuple[data.Split, Tensor], gallery: tuple[data.Split, Tensor], rerank: bool = False
) -> Ranking:
    """Rank by the features of both splits, (Q, D) and (G, D), L2-normalised."""
    (query, q), (gallery, g) = query, gallery
    if not torch.isfinite(q).all() or not torch.isfinite(g).all():
        raise UserError(
            "the model's embeddings are not finite: its weights are damaged, or training diverged"
        )
    if rerank:
        from extras import rerank as k_reciprocal

        similarities = k_reciprocal.rerank(q, g)
    else:
        similarities = lambda start, end: product(q[start:end], g)  # noqa: E731
    ids = (query.pids, gallery.pids, query.keys, gallery.keys)
    metrics = runtime.by_rank0(lambda: rank_by(similarities, *ids))
    if not metrics.num_valid:
        raise UserError(
            f"none of {len(query)} queries has a gallery sample of its identity from another camera"
            " or scene"
        )
    return Ranking(query, gallery, metrics, similarities)


def figures(model: MultiModalModel, ranking: Ranking) -> dict:
    """What `--json` writes and OUT/metrics.json holds."""
    metrics = ranking.metrics
    return {
        "mAP": metrics.mAP,
        **{f"R{k}": metrics.cmc[k - 1].item() for k in (1, 5, 10)},
        "mINP": metrics.mINP,
        "num_query": len(ranking.query),
        "num_gallery": len(ranking.gallery),
        "num_valid": metrics.num_valid,
        "params": model.num_parameters(),
        "machine": runtime.machine(next(model.parameters()).device),
    }


def summary(metrics: dict) -> str:
    names = ("mAP", "R1", "R5", "R10", "mINP")
    shown = "  ".join(f"{name} {100 * metrics[name]:.1f}" for name in names)
    valid, total = metrics["num_valid"], metrics["num_query"]
    queries = f"{total} queries" if valid == total else f"{valid} of {total} queries"
    return f"{shown}  ({queries}, {metrics['num_gallery']} gallery samples)"


def pairs_table(results: dict[str, dict]) -> str:
    """mAP / Rank-1 in percent of "query > gallery": a row for each query's modalities."""
    cells: dict[str, dict[str, str]] = {}
    for name, metrics in results.items():
        asking, _, answering = name.partition(" > ")
        shown = f"{100 * metrics['mAP']:.1f} / {100 * metrics['R1']:.1f}"
        cells.setdefault(asking, {})[answering or asking] = shown
    head = ["query, gallery:", *next(iter(cells.values()))]
    return runtime.markdown([head, *([asking, *row.values()] for asking, row in cells.items())])


# --- checkpoints


def load_model(path: str | Path) -> tuple[MultiModalModel, dict]:
    """The model of a checkpoint of train.py or prune.py, in eval mode, and the whole checkpoint.

    Raises UserError for anything else; no memory is taken before the weights are known to be there.
    """
    checkpoint = runtime.load_checkpoint(path)
    for name in ("config", "model", "settings", "mean", "std"):
        if not isinstance(checkpoint.get(name), dict):
            raise UserError(f"{path}: lacks {name}; expected a checkpoint written by train.py")
    try:
        model = _fill(GraFTConfig(**checkpoint["config"]), checkpoint["model"])
        for name in ("mean", "std"):
            values = [checkpoint[name][modality] for modality in model.config.modalities]
            torch.tensor(values).view(-1, 3)
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: its weights and its configuration do not fit this version's model ({reason})"
        ) from None
    return model.eval(), checkpoint


def _fill(config: GraFTConfig, state: dict) -> MultiModalModel:
    """A model with these weights. Raises ValueError where one is missing or of another shape."""
    with torch.device("meta"):
        model = build_model(config)
    for name, weight in model.state_dict().items():
        given = state.get(name)
        if not isinstance(given, Tensor) or given.shape != weight.shape:
            found = tuple(given.shape) if isinstance(given, Tensor) else "nothing"
            raise ValueError(f"{name}: {found}, expected {tuple(weight.shape)}")
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def load_embedder(path: str | Path, device: torch.device, **options) -> tuple[Embedder, dict]:
    """The embedder of a checkpoint, and the whole checkpoint; `options` are Embedder's."""
    model, checkpoint = load_model(path)
    return Embedder(model, checkpoint["mean"], checkpoint["std"], device, **options), checkpoint


# --- command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = runtime.Parser(__doc__)
    text = "written by train.py or prune.py, e.g. runs/synthetic/last.pt"
    parser.add_argument("checkpoint", metavar="CKPT", help=text)
    data.add_options(parser, trained=True)
    add = parser.add_argument
    text = "what the queries have, where the gallery has other modalities (default: --modalities)"
    add("--query-modalities", metavar="NAMES", type=runtime.names, help=text)
    text = "what the gallery has (default: --modalities)"
    add("--gallery-modalities", metavar="NAMES", type=runtime.names, help=text)
    add("--all-subsets", action="store_true", help="evaluate every subset of the modalities")
    text = "any subset asks, any subset answers: a table of mAP / Rank-1"
    add("--all-pairs", action="store_true", help=text)
    text = "what is ranked (default: as in training)"
    add("--test-token", choices=("fusion", "data"), help=text)
    text = "rank what leaves the BNNeck, not what enters it (default: as in training)"
    add("--bnneck-features", action=argparse.BooleanOptionalAction, help=text)
    add("--flip", action="store_true", help="mean of the embeddings of images and mirror images")
    add("--rerank", action="store_true", help="k-reciprocal re-ranking (k1 20, k2 6, 0.3)")
    add("--json", type=Path, metavar="FILE", help="write the figures, as fractions")
    group = parser.add_argument_group("pictures, of one set of modalities, by one process")
    add = group.add_argument
    add("--ranked-list", type=Path, metavar="FILE", help="queries with their ten best")
    text = "the worst queries and what they were taken for"
    add("--failures", type=Path, metavar="FILE", help=text)
    add("--attention", type=Path, metavar="FILE", help="where the fusion token attends (GraFT)")
    add("--cmc", type=Path, metavar="FILE", help="the CMC curve (needs matplotlib)")
    text = "t-SNE of gallery samples, a colour an identity (needs scikit-learn, matplotlib)"
    add("--map", type=Path, metavar="FILE", help=text)
    words = ["random", "best", "worst"]
    text = "which to draw: random, best, worst (two each), or names"
    add("--queries", nargs="+", default=words, metavar="Q", help=text)
    group = parser.add_argument_group("run")
    runtime.add_device_options(group, precision=None)
    text = "reading processes of a rank (default: as in training, else its cores)"
    group.add_argument("--workers", type=runtime.whole(0), help=text)
    data.add_store_option(group)
    text = "of the random queries that are drawn"
    group.add_argument("--seed", type=runtime.whole(0), default=0, help=text)
    args = parser.parse_args(argv)
    drawn = (args.ranked_list, args.failures, args.attention, args.cmc, args.map)
    args.pictures = any(drawn)
    crossed = args.query_modalities or args.gallery_modalities
    if (args.all_subsets or args.all_pairs) and (args.pictures or crossed):
        raise UserError(
            "pictures, --query-modalities and --gallery-modalities are of one pair of subsets:"
            " leave out --all-subsets and --all-pairs"
        )
    return args


def chosen_pairs(args: argparse.Namespace) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The modalities of query and gallery, of each ranking that was asked for."""
    sizes = range(1, len(args.modalities) + 1)
    subsets = [subset for size in sizes for subset in combinations(args.modalities, size)]
    if args.all_pairs:
        return [(query, gallery) for query in subsets for gallery in subsets]
    if args.all_subsets:
        return [(subset, subset) for subset in subsets]
    all_of_them = tuple(args.modalities)
    return [(args.query_modalities or all_of_them, args.gallery_modalities or all_of_them)]


def fill_from_training(args: argparse.Namespace, settings: dict) -> None:
    """What the command line leaves open is as it was in training."""
    for name in ("dataset", "data_root", "modalities", "precision", "workers"):
        if getattr(args, name) is None:
            if name not in settings:
                option = name.replace("_", "-")
                raise UserError(f"{args.checkpoint}: its settings lack {name}; give --{option}")
            setattr(args, name, settings[name])
    # absent from older checkpoints
    args.range = {**(settings.get("range") or {}), **(args.range or {})} or None


def load_chosen(args: argparse.Namespace, config: GraFTConfig, pairs: list) -> data.Dataset:
    """The data set with all modalities of these pairs, in the model's order."""
    needed = {name for pair in pairs for subset in pair for name in subset}
    modalities = tuple(name for name in config.modalities if name in needed)
    source = (args.dataset, args.data_root, modalities, config.image_size, args.store)
    return data.load_dataset(*source, ranges=args.range)


def restrict(dataset: data.Dataset, name: str, modalities: tuple[str, ...]) -> data.Split:
    """Query or gallery with these modalities; says how many samples have none of them."""
    whole = getattr(dataset, name)
    split = whole.restricted(modalities)
    lacking = [sample.name for sample in whole.samples if not set(sample.images) & set(modalities)]
    what = f"{len(lacking)} of {len(whole)} {name} samples have none of {', '.join(modalities)}"
    if not split.samples:
        raise UserError(f"{what}: nothing to rank; choose other modalities")
    if lacking:
        more = ", ..." if len(lacking) > 3 else ""
        runtime.print0(
            f"warning: {what} and are left out: {', '.join(lacking[:3])}{more}", file=sys.stderr
        )
    return split


def evaluate(args: argparse.Namespace) -> dict:
    """All that was asked of a checkpoint; the figures, by pair of subsets if there are several."""
    device = runtime.start(args.device)
    if args.pictures and runtime.world_size() > 1:
        raise UserError("pictures are drawn by one process: leave torchrun out")
    if args.cmc:
        from extras.pictures import need_matplotlib

        need_matplotlib()
    if args.map:
        from extras.tsne import need_sklearn

        need_sklearn()
    model, checkpoint = load_model(args.checkpoint)
    fill_from_training(args, checkpoint["settings"])
    runtime.print0("settings:", vars(args))
    trained, pairs = model.config.modalities, chosen_pairs(args)
    for option in ("modalities", "query_modalities", "gallery_modalities"):
        if unknown := [name for name in getattr(args, option) or () if name not in trained]:
            raise UserError(
                f"--{option.replace('_', '-')} {','.join(unknown)}: the model was trained on"
                f" {','.join(trained)}"
            )
    if args.attention and model.config.fusion != "graft":
        fusion = model.config.fusion
        raise UserError(f"--attention: a model with --fusion {fusion} has no fusion tokens")
    tested = {name: getattr(args, name) for name in ("test_token", "bnneck_features")}
    given = {name: value for name, value in tested.items() if value is not None}
    model.config = replace(model.config, **given)
    normalisation = (checkpoint["mean"], checkpoint["std"])
    embedder = Embedder(model, *normalisation, device, args.precision, args.workers)
    dataset = load_chosen(args, model.config, pairs)

    @functools.cache
    def embedded(name: str, subset: tuple[str, ...]) -> tuple[data.Split, Tensor]:
        split = restrict(dataset, name, subset)
        return split, embedder.embed(split, args.flip)

    results = {}
    for asking, answering in pairs:
        query, gallery = embedded("query", asking), embedded("gallery", answering)
        ranking = rank_features(query, gallery, args.rerank)
        name = " > ".join(dict.fromkeys((",".join(asking), ",".join(answering))))
        metrics = results[name] = figures(model, ranking)
        if not args.all_pairs:
            runtime.print0((f"{name:<16}" if len(pairs) > 1 else "") + summary(metrics))
    if args.all_pairs:
        runtime.print0(pairs_table(results))
    if len({metrics["num_valid"] for metrics in results.values()}) > 1:
        runtime.print0("the rows rank different queries: some samples lack a sensor")
    found = results if len(pairs) > 1 else metrics
    if args.json and runtime.rank() == 0:
        runtime.write_json(args.json, found)
    if args.pictures:
        from extras.pictures import draw

        draw(args, embedder, ranking)
    return found


@runtime.program
def main() -> None:
    evaluate(parse())


if __name__ == "__main__":
    main()
