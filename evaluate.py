"""Evaluate a checkpoint: embeddings of query and gallery, then CMC and mAP. A program, and the ranking library.

python evaluate.py runs/synthetic/last.pt
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import runtime
from extras import pictures
from model import GraFT, GraFTConfig, MultiModalModel, build_model
from runtime import UserError

BATCH_SIZE = 64  # samples; training's own evaluation and this program's must agree to the last digit


# --- ranking


class RankMetrics(NamedTuple):
    """mAP and mINP from 0 to 1, cmc (max_rank,) from rank 1 on, how many queries had a match, and each query's average
    precision, (Q,), NaN where it had none."""

    mAP: float
    cmc: Tensor
    mINP: float
    num_valid: int
    ap: Tensor


@torch.no_grad()
def rank_metrics(
    query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor, query_keys: Tensor, gallery_keys: Tensor,
    max_rank: int = 50, block: int = 2**24, similarities: Callable[[int, int], Tensor] | None = None,
) -> RankMetrics:  # fmt: skip
    """Rank the gallery (G, D) for every query (Q, D) by cosine; pids and keys (camera or scene) are int64, (Q,) and (G,).

    Gallery samples with the query's pid and key are left out (Zheng et al. 2015); a query without any match left is not
    counted. Ties count against the model: a wrong sample as close as a match ranks before it, so features that collapse to
    a point score lowest, not highest. mINP after Ye et al. 2021. Exact: no ranking is cut off. At most `block`
    similarities are in memory at once. All tensors on one device; features need not be normalised. `similarities(start, end)`
    gives those rows of another similarity, (rows, G), instead of the cosine.
    """
    query, gallery = query.float(), gallery.float()
    scale = torch.linalg.vector_norm(gallery, dim=1).clamp(min=1e-12).reciprocal()  # a query's own norm changes no order
    similarities = similarities or (lambda start, end: (query[start:end] @ gallery.T).mul_(scale))
    first_ranks, inverse, ap = [], [], torch.full((len(query),), torch.nan, dtype=torch.float64)
    rows = max(1, block // max(1, len(gallery)))
    for start in range(0, len(query), rows):
        pid, key = query_pids[start : start + rows], query_keys[start : start + rows]
        similarity = similarities(start, start + len(pid))  # (rows, G)
        same = pid[:, None] == gallery_pids
        match = same & (key[:, None] != gallery_keys)
        count = match.sum(1)
        valid = count > 0
        if not valid.any():
            continue
        # The matches' similarities, best first, in a table (rows, K) filled up with -inf
        row, column = match.nonzero(as_tuple=True)
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        hits = similarity.new_full((len(pid), int(count.max())), -torch.inf)
        hits[row, place] = similarity[row, column]
        hits = hits.sort(1, descending=True).values
        # The rank of the k-th match is k + the wrong samples that are at least as close
        wrong = _sort_rows(similarity.masked_fill_(same, -torch.inf))
        ahead = len(gallery) - torch.searchsorted(wrong, hits)
        k = torch.arange(1, hits.shape[1] + 1, device=hits.device)
        rank = k + ahead
        filled = k <= count[:, None]
        ap[start : start + rows][valid.cpu()] = (((k / rank) * filled).sum(1)[valid].double() / count[valid]).cpu()
        inverse.append((count / rank.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0])[valid].double())
        first_ranks.append(rank[valid, 0])
    if not first_ranks:
        return RankMetrics(0.0, torch.zeros(max_rank), 0.0, 0, ap)
    first = torch.cat(first_ranks).cpu()
    cmc = (torch.bincount(first, minlength=max_rank + 1)[1 : max_rank + 1].cumsum(0) / len(first)).float()
    return RankMetrics(ap.nanmean().item(), cmc, torch.cat(inverse).mean().item(), len(first), ap)


def _sort_rows(x: Tensor) -> Tensor:
    """Sort each row, ascending. On CPUs NumPy's vectorised sort is an order of magnitude ahead of torch's."""
    if x.device.type != "cpu":
        return x.sort(1).values
    x.numpy().sort(1)
    return x


# --- re-ranking


@torch.no_grad()
def rerank(query: Tensor, gallery: Tensor, k1=20, k2=6, weight=0.3, block: int = 2**24) -> Callable[[int, int], Tensor]:
    """k-reciprocal re-ranking (Zhong et al. 2017) of features (Q, D) and (G, D): the `similarities` of rank_metrics.

    The distance is `weight` * Euclidean (squared, of normalised features, each row by its largest) + (1 - weight) * Jaccard.
    What is kept is sparse; at most some `block` distances are in memory at once. On the CPU.
    """
    x = F.normalize(torch.cat([query, gallery]).float())
    N, k1 = len(x), min(k1, len(x) - 1)
    half = round(k1 / 2)
    largest, nearest = torch.empty(N), torch.empty(N, k1 + 1, dtype=torch.int64)
    for rows in torch.arange(N).split(max(1, block // N)):
        distance = 2 - 2 * x[rows] @ x.T
        largest[rows], (_, nearest[rows]) = distance.amax(1), distance.topk(k1 + 1, largest=False)

    def reciprocal(rows: Tensor, k: int) -> Tensor:
        """Of the k + 1 nearest of each row, those that have the row among theirs: (rows, k + 1), true or false."""
        return (nearest[nearest[rows, : k + 1], : k + 1] == rows[:, None, None]).any(2)

    mutual = torch.cat([reciprocal(rows, half) for rows in torch.arange(N).split(4096)])  # (N, half + 1)
    places, weights = [], []  # of the sparse matrix V: who is how near to whom
    for rows in torch.arange(N).split(max(1, min(256, block // N))):
        near, taken = nearest[rows], reciprocal(rows, k1)  # (rows, k1 + 1)
        theirs, count = nearest[near, : half + 1], mutual[near]  # candidates' own neighbours, (rows, k1 + 1, half + 1)
        known = (theirs[..., None] == near.masked_fill(~taken, -1)[:, None, None]).any(-1) & count
        accepted = taken & (known.sum(-1) > 2 / 3 * count.sum(-1))
        member = torch.zeros(len(rows), N, dtype=torch.bool)
        member[torch.arange(len(rows))[:, None].expand_as(near)[taken], near[taken]] = True
        added = accepted[..., None] & count
        member[torch.arange(len(rows))[:, None, None].expand_as(theirs)[added], theirs[added]] = True
        row, column = member.nonzero(as_tuple=True)
        value = ((x[rows] @ x.T)[row, column] * 2 - 2).div_(largest[rows][row]).exp_()
        total = torch.zeros(len(rows)).index_add_(0, row, value)
        places.append(torch.stack([rows[row], column]))
        weights.append(value / total[row])
    (row, column), value = torch.cat(places, 1), torch.cat(weights)
    if k2 > 1:  # local query expansion: the mean of V over the k2 nearest
        count = row.bincount(minlength=N)
        nearest = nearest[:, :k2].flatten()
        entries = _ranges((count.cumsum(0) - count)[nearest], count[nearest])
        place = torch.arange(N).repeat_interleave(k2).repeat_interleave(count[nearest]) * N + column[entries]
        place, where = place.unique(return_inverse=True)
        value = torch.zeros(len(place)).index_add_(0, where, value[entries] / k2)
        row, column = place // N, place % N
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), row.bincount(minlength=N).cumsum(0)])
    Q, of_gallery = len(query), row >= len(query)
    order = column[of_gallery].argsort(stable=True)  # the gallery's entries, column by column
    who, much, count = row[of_gallery][order] - Q, value[of_gallery][order], column[of_gallery].bincount(minlength=N)
    first = count.cumsum(0) - count

    def similarities(start: int, end: int) -> Tensor:
        result = 2 - 2 * x[start:end] @ x[Q:].T
        result.div_(largest[start:end, None]).mul_(-weight)
        for i in range(start, end):
            mine, amount = column[starts[i] : starts[i + 1]], value[starts[i] : starts[i + 1]]
            entries = _ranges(first[mine], count[mine])
            least = torch.minimum(much[entries], amount.repeat_interleave(count[mine]))
            shared = torch.zeros(len(gallery)).index_add_(0, who[entries], least)
            result[i - start] -= (1 - weight) * (1 - shared / (2 - shared))
        return result

    return similarities


def _ranges(first: Tensor, count: Tensor) -> Tensor:
    """first[i], ..., first[i] + count[i] - 1 for each i, one after another."""
    ends = count.cumsum(0)
    return torch.arange(int(ends[-1])) + (first - ends + count).repeat_interleave(count)


# --- embedding


def _batches(split: data.Split, mean: dict, std: dict, device: torch.device, workers: int):
    """This rank's share of a split: sample indices and normalised images. A batch holds samples with the same modalities."""
    groups = defaultdict(list)
    for i, sample in enumerate(split.samples):
        groups[tuple(sample.images)].append(i)
    batches = [group[i : i + BATCH_SIZE] for group in groups.values() for i in range(0, len(group), BATCH_SIZE)]
    mine = batches[runtime.rank() :: runtime.world_size()]
    reader = data.loader(split, mine, workers, device)
    for indices, (images, _, _) in zip(mine, tqdm(reader, "embedding", leave=False, disable=None), strict=True):
        yield indices, data.normalise({m: image.to(device, non_blocking=True) for m, image in images.items()}, mean, std)


@torch.no_grad()
def embed(
    model: MultiModalModel, split: data.Split, mean: dict, std: dict, device, precision="auto", workers=2, flip=False
) -> Tensor:
    """L2-normalised fusion embeddings of a split in its own order, (N, D) float32 on the CPU; every rank gets all of them.

    `flip` adds those of the mirrored images. Each rank fills in the rows of its batches by sample index, so neither padding
    nor order can mix samples up.
    """
    was_training = model.training
    model.eval()
    features = torch.zeros(len(split), model.width, device=device)
    for indices, images in _batches(split, mean, std, device, workers):
        with runtime.autocast(device, precision):
            fusion = model(images).fusion
            if flip:
                fusion = fusion + model({modality: image.flip(-1) for modality, image in images.items()}).fusion
        features[indices] = F.normalize(model.bottleneck(fusion) if model.config.bnneck_features else fusion)
    model.train(was_training)
    return runtime.all_sum(features).cpu()


def rank(
    model: MultiModalModel, query: data.Split, gallery: data.Split, mean: dict, std: dict, device, precision="auto", workers=2,
    flip=False, reranked=False,
) -> tuple[RankMetrics, Callable[[int, int], Tensor]]:  # fmt: skip
    """Embed query and gallery and rank them; with the similarities that were ranked, of rows start to end - 1, (rows, G).

    Raises UserError where no query has a match.
    """
    q, g = (embed(model, split, mean, std, device, precision, workers, flip) for split in (query, gallery))
    if not torch.isfinite(q).all() or not torch.isfinite(g).all():
        raise UserError("the model's embeddings are not finite: its weights are damaged, or training diverged")
    similarities = rerank(q, g) if reranked else lambda start, end: q[start:end] @ g.T
    metrics = rank_metrics(
        q, g, query.pids, gallery.pids, query.keys, gallery.keys, similarities=similarities if reranked else None
    )
    if not metrics.num_valid:
        raise UserError(f"none of {len(query)} queries has a gallery sample of its identity from another camera or scene")
    return metrics, similarities


def figures(model: MultiModalModel, query: data.Split, gallery: data.Split, metrics: RankMetrics) -> dict:
    """What `--json` writes."""
    return {
        "mAP": metrics.mAP,
        **{f"R{rank}": metrics.cmc[rank - 1].item() for rank in (1, 5, 10)},
        "mINP": metrics.mINP,
        "num_query": len(query),
        "num_gallery": len(gallery),
        "num_valid": metrics.num_valid,
        "params": model.num_parameters(),
    }


def evaluate(
    model: MultiModalModel, query: data.Split, gallery: data.Split, mean: dict, std: dict, device, precision="auto", workers=2
) -> dict:
    """The figures of a model on query and gallery. Raises UserError where no query has a match."""
    return figures(model, query, gallery, rank(model, query, gallery, mean, std, device, precision, workers)[0])


@torch.no_grad()
def reliance(model: MultiModalModel, split: data.Split, mean: dict, std: dict, device, precision="auto", workers=2) -> dict:
    """By how much an embedding turns when a modality is left out, 1 - cosine, by modality: (N,) each, 0 where it is absent."""
    turned = {modality: torch.zeros(len(split), device=device) for modality in split.modalities}
    model.eval()
    for indices, images in _batches(split, mean, std, device, workers):
        for modality in images if len(images) > 1 else ():
            with runtime.autocast(device, precision):
                whole = model(images).fusion
                rest = model({name: image for name, image in images.items() if name != modality}).fusion
            turned[modality][indices] = 1 - F.cosine_similarity(whole, rest)
    return {modality: runtime.all_sum(values).cpu() for modality, values in turned.items()}


def summary(metrics: dict) -> str:
    figures = "  ".join(f"{name} {100 * metrics[name]:.1f}" for name in ("mAP", "R1", "R5", "R10", "mINP"))
    return f"{figures}  ({metrics['num_valid']} queries, {metrics['num_gallery']} gallery samples)"


# --- checkpoints


def load_model(path: str | Path) -> tuple[MultiModalModel, dict]:
    """The model of a checkpoint written by train.py or prune.py, in eval mode, and the whole checkpoint. Raises UserError.

    No memory is taken for a model before its weights are known to be there.
    """
    checkpoint = runtime.load_checkpoint(path)
    for name, kind in {"config": dict, "model": dict, "settings": dict, "mean": dict, "std": dict}.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: lacks {name}; expected a checkpoint written by train.py")
    state = checkpoint["model"]
    try:
        with torch.device("meta"):
            model = build_model(GraFTConfig(**checkpoint["config"]))
        for name, weight in model.state_dict().items():
            if not isinstance(state.get(name), Tensor) or state[name].shape != weight.shape:
                found = tuple(state[name].shape) if isinstance(state.get(name), Tensor) else "nothing"
                raise ValueError(f"{name}: {found}, expected {tuple(weight.shape)}")
        model = model.to_empty(device="cpu")
        model.load_state_dict(state)
        for name in ("mean", "std"):
            torch.tensor([checkpoint[name][modality] for modality in model.config.modalities]).view(-1, 3)
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights and its configuration do not fit this version's model ({reason})") from None
    return model.eval(), checkpoint


# --- command line


def choose(words: list[str], query: data.Split, ap: Tensor, seed: int) -> list[tuple[int, str]]:
    """Queries to draw, each with the reason: "random", "best" and "worst" are two each, anything else is a query's name."""
    by_ap = [i for i in ap.argsort().tolist() if not ap[i].isnan()]
    shuffled = torch.randperm(len(query), generator=torch.Generator().manual_seed(seed)).tolist()
    lists = {"random": shuffled[:2], "best": by_ap[::-1][:2], "worst": by_ap[:2]}
    names = {sample.name: i for i, sample in enumerate(query.samples)}
    if unknown := [word for word in words if word not in lists and word not in names]:
        raise UserError(
            f"--queries {unknown[0]}: no query has this name; expected random, best, worst or e.g. {next(iter(names))}"
        )
    return [(i, word if word in lists else "named") for word in words for i in lists.get(word, [names.get(word)])]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="written by train.py, e.g. runs/synthetic/last.pt")
    parser.add_argument("--dataset", choices=data.DATASETS, help="default: the one trained on")
    parser.add_argument("--data-root", help="the data set's folder or its parent (default: as in training)")
    parser.add_argument("--modalities", type=lambda text: tuple(text.split(",")), help="e.g. rgb,tir (default: all trained)")
    parser.add_argument("--all-subsets", action="store_true", help="evaluate on every subset of the modalities")
    parser.add_argument("--flip", action="store_true", help="add the embeddings of the mirrored images")
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking (20, 6, 0.3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, as fractions")
    group = parser.add_argument_group("pictures (of all modalities chosen; not with --all-subsets)")
    group.add_argument("--ranked-list", type=Path, metavar="FILE", help="draw queries with their ten best, right and wrong")
    group.add_argument("--failures", type=Path, metavar="FILE", help="draw the worst queries and what they were taken for")
    group.add_argument("--attention", type=Path, metavar="FILE", help="draw where the fusion token looks (GraFT)")
    group.add_argument("--cmc", type=Path, metavar="FILE", help="draw the CMC curve (matplotlib)")
    words = ["random", "best", "worst"]
    group.add_argument("--queries", nargs="+", default=words, metavar="Q", help="random, best, worst (two each) or names")
    group = parser.add_argument_group("run")
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    group.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="default: as in training")
    group.add_argument("--workers", type=int, help="reading processes a rank (default: as in training)")
    group.add_argument("--seed", type=int, default=0, help="of the random queries that are drawn (default: %(default)s)")
    return parser.parse_args()


def draw(args: argparse.Namespace, model: MultiModalModel, dataset: data.Dataset, facts: tuple, ranked: tuple, device) -> None:
    """The pictures that were asked for; `ranked` is what `rank` returned."""
    metrics, similarities = ranked
    chosen = choose(args.queries, dataset.query, metrics.ap, args.seed)
    if args.ranked_list:
        pictures.ranked_list(dataset.query, dataset.gallery, similarities, metrics.ap, chosen, args.ranked_list)
    if args.failures:
        worst = [(i, "worst") for i in metrics.ap.argsort().tolist() if not metrics.ap[i].isnan()][:6]
        pictures.failures(dataset.query, dataset.gallery, similarities, metrics.ap, worst, args.failures)
    if args.cmc:
        pictures.cmc_chart(metrics.cmc, args.cmc)
    if args.attention:
        if not isinstance(model, GraFT):
            raise UserError(f"--attention: a model with --fusion {model.config.fusion} has no fusion tokens")

        def look(images: dict[str, Tensor]) -> dict[str, Tensor]:
            batch = data.normalise({modality: image[None].to(device) for modality, image in images.items()}, *facts)
            return {modality: weights[0].cpu() for modality, weights in model.attention(batch).items()}

        pictures.attention(dataset.query, look, chosen, args.attention)
        turned = reliance(model, dataset.query, *facts, device, args.precision, args.workers)
        light = torch.stack([next(iter(dataset.query[i][0].values())).float().mean() for i in range(len(dataset.query))])
        for name, half in (("darker", light <= light.median()), ("brighter", light > light.median())):
            shares = "  ".join(f"{modality} {values[half].mean():.3f}" for modality, values in turned.items())
            print(f"{name} half of the queries: without it, an embedding turns by (1 - cosine)  {shares}")


@runtime.program
def main() -> None:
    args = _parse()
    device = runtime.start(args.device)
    drawn = [name for name in ("ranked_list", "failures", "attention", "cmc") if getattr(args, name)]
    if drawn and (args.all_subsets or runtime.world_size() > 1):
        raise UserError(f"--{drawn[0].replace('_', '-')}: draws one set of --modalities, in one process")
    if args.cmc:
        pictures.need_matplotlib()
    model, checkpoint = load_model(args.checkpoint)
    for name in ("dataset", "data_root", "modalities", "precision", "workers"):
        if getattr(args, name) is None:
            if name not in checkpoint["settings"]:
                raise UserError(f"{args.checkpoint}: its settings lack {name}; give --{name.replace('_', '-')}")
            setattr(args, name, checkpoint["settings"][name])
    runtime.print0("settings:", vars(args))
    if unknown := [modality for modality in args.modalities if modality not in model.config.modalities]:
        raise UserError(f"--modalities {','.join(unknown)}: the model was trained on {','.join(model.config.modalities)}")
    sizes = range(1, len(args.modalities) + 1) if args.all_subsets else (len(args.modalities),)
    model, facts, results = model.to(device), (checkpoint["mean"], checkpoint["std"]), {}
    for subset in chain.from_iterable(combinations(args.modalities, size) for size in sizes):
        dataset = data.load_dataset(args.dataset, args.data_root, subset, model.config.image_size)
        splits = dataset.query, dataset.gallery
        ranked = rank(model, *splits, *facts, device, args.precision, args.workers, args.flip, args.rerank)
        metrics = results[",".join(subset)] = figures(model, *splits, ranked[0])
        runtime.print0((f"{','.join(subset):<16}" if args.all_subsets else "") + summary(metrics))
    if args.json and runtime.rank() == 0:
        runtime.write_json(args.json, results if args.all_subsets else metrics)
    if drawn:
        draw(args, model, dataset, facts, ranked, device)


if __name__ == "__main__":
    main()
