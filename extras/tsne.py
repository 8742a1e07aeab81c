"""A map of a test split: t-SNE of the embeddings, and of each sensor's own tokens.

`python evaluate.py CKPT --map map.png` draws it. What is near is alike; how far
apart two groups are says little.

Shapes: N samples, M modalities, D width of an embedding.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import evaluate
from extras import pictures
from runtime import UserError

IDENTITIES, SAMPLES = 20, 800  # that are shown: more colours, or points, cannot be told apart
MARKERS = "o^sDvP*X"


def need_sklearn() -> None:
    """Raises UserError where scikit-learn is absent: before work whose result is to be drawn."""
    pictures.need_matplotlib()
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(
            "--map needs scikit-learn, which is not installed: pip install scikit-learn"
        )


def draw(embedder: evaluate.Embedder, split: data.Split, path: str | Path, seed: int = 0) -> None:
    """Map some identities of a split, a colour each. Raises UserError for too few samples."""
    chosen = some_of(split)
    if len(chosen) < 5:
        raise UserError(f"--map {path}: {len(chosen)} gallery samples, expected at least 5")
    features, own = tokens(embedder, chosen)
    ids = np.unique(chosen.pids.numpy(), return_inverse=True)[1]
    panels = [("embeddings", embed_2d(features, seed), ids, {"": np.ones(len(ids), bool)})]
    if own is not None:
        present = torch.tensor([[m in s.images for m in chosen.modalities] for s in chosen.samples])
        row, column = (x.numpy() for x in present.nonzero(as_tuple=True))
        groups = {name: column == m for m, name in enumerate(chosen.modalities)}
        panels.append(("each sensor's own tokens", embed_2d(own[present], seed), ids[row], groups))
    plot(panels, path)


def some_of(split: data.Split) -> data.Split:
    pids = split.pids.unique()
    kept = pids[torch.linspace(0, len(pids) - 1, min(IDENTITIES, len(pids))).round().long()]
    places = torch.isin(split.pids, kept).nonzero()[:, 0]
    places = places[:: -(-len(places) // SAMPLES)]
    return split.subset([split.samples[i] for i in places.tolist()])


def tokens(embedder: evaluate.Embedder, split: data.Split) -> tuple[Tensor, Tensor | None]:
    """Embeddings (N, D); and each modality's own tokens, (N, M, D), normalised, if there are."""
    if embedder.model.config.fusion not in pictures.OWN_TOKENS or len(split.modalities) == 1:
        return embedder.embed(split), None
    own, present = pictures.own_tokens(embedder, split)
    return pictures.mean_features(embedder, own, present), F.normalize(own, dim=-1)


def embed_2d(x: Tensor, seed: int) -> np.ndarray:
    """(N, D) -> (N, 2): PCA to at most 50 dimensions, then t-SNE (van der Maaten, Hinton 2008)."""
    from sklearn.manifold import TSNE

    x = (x - x.mean(0)).double()
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    x = (U[:, :50] * S[:50]).numpy()
    perplexity = min(30, (len(x) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)


def plot(panels: list[tuple], path: str | Path) -> None:
    """Panels (title, points (N, 2), identity of each, {marker's name: which points})."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6 * len(panels), 6), layout="constrained")
    for axes, (title, points, ids, groups) in zip(
        picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for (name, which), marker in zip(groups.items(), MARKERS * len(groups), strict=False):
            colours = colormaps["tab20"](ids[which] % 20)
            axes.scatter(*points[which].T, s=14, c=colours, marker=marker, linewidths=0, alpha=0.8)
            axes.scatter([], [], c="grey", marker=marker, label=name)
        axes.set(title=f"{title}; colour: identity", xticks=[], yticks=[])
        if len(groups) > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False)
    pictures.save(lambda path: picture.savefig(path, dpi=110), path)
