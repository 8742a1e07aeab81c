"""A map of a test split: t-SNE of its embeddings, and of those made from one sensor alone.

`python evaluate.py CKPT --map map.png` draws it. Points that are close are similar; how far apart
two groups are means little.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import evaluate
from runtime import UserError

IDENTITIES, SAMPLES = 20, 800  # more colours, or points, cannot be told apart
MARKERS = "o^sDvP*X"


def draw(embedder: evaluate.Embedder, split: data.Split, path: str | Path, seed: int = 0) -> None:
    """Map some identities of a split, a colour each. Raises UserError for too few samples."""
    pids = split.pids.unique()
    evenly = torch.linspace(0, len(pids) - 1, min(IDENTITIES, len(pids))).round().long()
    pids = pids[evenly].tolist()
    samples = [sample for sample in split.samples if sample.pid in pids]
    # Without the store, which would keep these images a second time
    shown = data.Split(samples[:: len(samples) // SAMPLES + 1], split.modalities, split.image_size)
    if len(shown) < 5:
        raise UserError(f"--map {path}: {len(shown)} gallery samples, expected at least 5")
    panels = {"embeddings": [shown]}
    if len(split.modalities) > 1:
        alone = [shown.restricted((name,)) for name in split.modalities]
        panels["embeddings from one sensor alone"] = [part for part in alone if len(part)]
    points_of = {}
    for title, parts in panels.items():
        x = torch.cat([embedder.embed(part) for part in parts])
        points = embed_2d(embedder.model.similarity(x, x), seed)
        ends = np.cumsum([len(part) for part in parts])
        points_of[title] = list(zip(parts, np.split(points, ends[:-1]), strict=True))
    plot(points_of, pids, path)


def embed_2d(similarity: Tensor, seed: int) -> np.ndarray:
    """(N, N) -> (N, 2) by t-SNE (van der Maaten, Hinton 2008)."""
    from sklearn.manifold import TSNE

    distance = (1 - similarity).clamp(min=0).fill_diagonal_(0)
    options = {"metric": "precomputed", "init": "random", "random_state": seed}
    perplexity = min(30, (len(distance) - 1) / 3)
    return TSNE(perplexity=perplexity, **options).fit_transform(distance.numpy())


def plot(panels: dict[str, list], pids: list[int], path: str | Path) -> None:
    """Panels {title: [(split, points (N, 2)), ...]}: a marker for each split."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels) + 1, 6), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    colours = dict(zip(pids, colormaps["tab20"].colors, strict=False))
    for axes, (title, groups) in zip(row, panels.items(), strict=True):
        for marker, (split, points) in zip(MARKERS, groups, strict=False):
            colour = [colours[pid] for pid in split.pids.tolist()]
            axes.scatter(*points.T, s=14, c=colour, marker=marker, linewidths=0, alpha=0.8)
            axes.scatter([], [], c="grey", marker=marker, label=" + ".join(split.modalities))
        axes.set(title=title, xticks=[], yticks=[])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False)
    key = [row[0].scatter([], [], color=[colour], label=pid) for pid, colour in colours.items()]
    figure.legend(handles=key, title="identity", loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)
