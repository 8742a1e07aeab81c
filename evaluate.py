"""Evaluate a checkpoint: embeddings of query and gallery, then CMC and mAP. A program, and the ranking library.

python evaluate.py runs/synthetic/last.pt
"""

import argparse
from collections import defaultdict
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import runtime
from model import GraFTConfig, MultiModalModel, build_model
from runtime import UserError

BATCH_SIZE = 64  # samples; training's own evaluation and this program's must agree to the last digit


# --- ranking


class RankMetrics(NamedTuple):
    """mAP and mINP from 0 to 1, cmc (max_rank,) from rank 1 on, and how many queries had a match."""

    mAP: float
    cmc: Tensor
    mINP: float
    num_valid: int


@torch.no_grad()
def rank_metrics(
    query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor, query_keys: Tensor, gallery_keys: Tensor,
    max_rank: int = 50, block: int = 2**24,
) -> RankMetrics:  # fmt: skip
    """Rank the gallery (G, D) for every query (Q, D) by cosine; pids and keys (camera or scene) are int64, (Q,) and (G,).

    Gallery samples with the query's pid and key are left out (Zheng et al. 2015); a query without any match left is not
    counted. Ties count against the model: a wrong sample as close as a match ranks before it, so features that collapse to
    a point score lowest, not highest. mINP after Ye et al. 2021. Exact: no ranking is cut off. At most `block`
    similarities are in memory at once. All tensors on one device; features need not be normalised.
    """
    query, gallery = query.float(), gallery.float()
    scale = torch.linalg.vector_norm(gallery, dim=1).clamp(min=1e-12).reciprocal()  # a query's own norm changes no order
    first_ranks, precision, inverse = [], [], []
    rows = max(1, block // max(1, len(gallery)))
    for q, pid, key in zip(query.split(rows), query_pids.split(rows), query_keys.split(rows), strict=True):
        similarity = (q @ gallery.T).mul_(scale)  # (rows, G)
        same = pid[:, None] == gallery_pids
        match = same & (key[:, None] != gallery_keys)
        count = match.sum(1)
        valid = count > 0
        if not valid.any():
            continue
        # The matches' similarities, best first, in a table (rows, K) filled up with -inf
        row, column = match.nonzero(as_tuple=True)
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        hits = similarity.new_full((len(q), int(count.max())), -torch.inf)
        hits[row, place] = similarity[row, column]
        hits = hits.sort(1, descending=True).values
        # The rank of the k-th match is k + the wrong samples that are at least as close
        wrong = _sort_rows(similarity.masked_fill_(same, -torch.inf))
        ahead = len(gallery) - torch.searchsorted(wrong, hits)
        k = torch.arange(1, hits.shape[1] + 1, device=hits.device)
        rank = k + ahead
        filled = k <= count[:, None]
        precision.append(((k / rank) * filled).sum(1)[valid].double() / count[valid])
        inverse.append((count / rank.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0])[valid].double())
        first_ranks.append(rank[valid, 0])
    if not first_ranks:
        return RankMetrics(0.0, torch.zeros(max_rank), 0.0, 0)
    first = torch.cat(first_ranks).cpu()
    cmc = (torch.bincount(first, minlength=max_rank + 1)[1 : max_rank + 1].cumsum(0) / len(first)).float()
    return RankMetrics(torch.cat(precision).mean().item(), cmc, torch.cat(inverse).mean().item(), len(first))


def _sort_rows(x: Tensor) -> Tensor:
    """Sort each row, ascending. On CPUs NumPy's vectorised sort is an order of magnitude ahead of torch's."""
    if x.device.type != "cpu":
        return x.sort(1).values
    x.numpy().sort(1)
    return x


# --- embedding


@torch.no_grad()
def embed(
    model: MultiModalModel, split: data.Split, mean: dict, std: dict, device: torch.device, precision="auto", workers=2
) -> Tensor:
    """L2-normalised fusion embeddings of a split in its own order, (N, D) float32 on the CPU; every rank gets all of them.

    A batch holds samples with the same modalities. Each rank fills in the rows of its batches by sample index, so neither
    padding nor order can mix samples up.
    """
    groups = defaultdict(list)
    for i, sample in enumerate(split.samples):
        groups[tuple(sample.images)].append(i)
    batches = [group[i : i + BATCH_SIZE] for group in groups.values() for i in range(0, len(group), BATCH_SIZE)]
    mine = batches[runtime.rank() :: runtime.world_size()]
    was_training = model.training
    model.eval()
    features = torch.zeros(len(split), model.width, device=device)
    reader = data.loader(split, mine, workers, device)
    for indices, (images, _, _) in zip(mine, tqdm(reader, "embedding", leave=False, disable=None), strict=True):
        images = {modality: image.to(device, non_blocking=True) for modality, image in images.items()}
        with runtime.autocast(device, precision):
            fusion = model(data.normalise(images, mean, std)).fusion
        features[indices] = F.normalize(model.bottleneck(fusion) if model.config.bnneck_features else fusion)
    model.train(was_training)
    return runtime.all_sum(features).cpu()


def evaluate(
    model: MultiModalModel, query: data.Split, gallery: data.Split, mean: dict, std: dict, device, precision="auto", workers=2
) -> dict:
    """Embed query and gallery and rank them: the figures that `--json` writes. Raises UserError where no query has a match."""
    q, g = (embed(model, split, mean, std, device, precision, workers) for split in (query, gallery))
    if not torch.isfinite(q).all() or not torch.isfinite(g).all():
        raise UserError("the model's embeddings are not finite: its weights are damaged, or training diverged")
    metrics = rank_metrics(q, g, query.pids, gallery.pids, query.keys, gallery.keys)
    if not metrics.num_valid:
        raise UserError(f"none of {len(query)} queries has a gallery sample of its identity from another camera or scene")
    return {
        "mAP": metrics.mAP,
        **{f"R{rank}": metrics.cmc[rank - 1].item() for rank in (1, 5, 10)},
        "mINP": metrics.mINP,
        "num_query": len(query),
        "num_gallery": len(gallery),
        "num_valid": metrics.num_valid,
        "params": model.num_parameters(),
    }


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


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="written by train.py, e.g. runs/synthetic/last.pt")
    parser.add_argument("--dataset", choices=data.DATASETS, help="default: the one trained on")
    parser.add_argument("--data-root", help="the data set's folder or its parent (default: as in training)")
    parser.add_argument("--modalities", type=lambda text: tuple(text.split(",")), help="e.g. rgb,tir (default: all trained)")
    parser.add_argument("--all-subsets", action="store_true", help="evaluate on every subset of the modalities")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, as fractions")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="default: as in training")
    parser.add_argument("--workers", type=int, help="reading processes a rank (default: as in training)")
    parser.add_argument("--seed", type=int, default=0, help="unused: evaluation draws nothing")
    return parser.parse_args()


@runtime.program
def main() -> None:
    args = _parse()
    device = runtime.start(args.device)
    model, checkpoint = load_model(args.checkpoint)
    for name in ("dataset", "data_root", "modalities", "precision", "workers"):
        if getattr(args, name) is None:
            setattr(args, name, checkpoint["settings"][name])
    runtime.print0("settings:", vars(args))
    if unknown := [modality for modality in args.modalities if modality not in model.config.modalities]:
        raise UserError(f"--modalities {','.join(unknown)}: the model was trained on {','.join(model.config.modalities)}")
    sizes = range(1, len(args.modalities) + 1) if args.all_subsets else (len(args.modalities),)
    model, mean, std, results = model.to(device), checkpoint["mean"], checkpoint["std"], {}
    for subset in chain.from_iterable(combinations(args.modalities, size) for size in sizes):
        dataset = data.load_dataset(args.dataset, args.data_root, subset, model.config.image_size)
        metrics = evaluate(model, dataset.query, dataset.gallery, mean, std, device, args.precision, args.workers)
        results[",".join(subset)] = metrics
        runtime.print0((f"{','.join(subset):<16}" if args.all_subsets else "") + summary(metrics))
    metrics = results if args.all_subsets else metrics
    if args.json and runtime.rank() == 0:
        runtime.write_json(args.json, metrics)


if __name__ == "__main__":
    main()
