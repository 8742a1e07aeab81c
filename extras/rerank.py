"""k-reciprocal re-ranking (Zhong et al. 2017), sparse: no matrix of the gallery squared.

`python evaluate.py CKPT --rerank` ranks by it. Shapes: Q queries, G gallery samples, N = Q + G, D
width.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def rerank(
    query: Tensor,
    gallery: Tensor,
    similarity: Callable[[Tensor, Tensor], Tensor],
    k1=20,
    k2=6,
    weight=0.3,
    block: int = 2**24,
) -> Callable[[int, int], Tensor]:
    """Re-ranked similarities of embeddings (Q, D) and (G, D), as evaluate.rank_by takes them.

    `similarity` is the model's, from -1 to 1. The distance is `weight` * (2 - 2 * similarity), of
    cosines the squared Euclidean one, each row by its largest, + (1 - weight) * Jaccard. About
    `block` distances are in memory at once. Runs on the CPU.
    """
    x = torch.cat([query, gallery]).float()
    N, k1 = len(x), min(k1, len(x) - 1)
    parts = []
    for rows in x.split(max(1, block // N)):
        distance = 2 - 2 * similarity(rows, x)
        parts.append((distance.amax(1), distance.topk(k1 + 1, largest=False).indices))
    # Of each row: its largest distance (N,), and its k1 + 1 nearest (N, k1 + 1), itself first
    largest, nearest = map(torch.cat, zip(*parts, strict=True))

    def distances(rows: Tensor | slice, first: int = 0) -> Tensor:
        """Of some rows to all rows from `first` on."""
        return (2 - 2 * similarity(x[rows], x[first:])) / largest[rows, None]

    V = encode(distances, nearest, k1, block)
    # Local query expansion: each row of V becomes the mean over its k2 nearest
    rows = torch.arange(N).repeat_interleave(k2)
    indices = torch.stack([rows, nearest[:, :k2].flatten()])
    mean = sparse(indices, torch.full((N * k2,), 1 / k2), N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls parts of its sparse product a beta
        V = torch.sparse.mm(mean, V).coalesce()
    return similarities(distances, V, len(query), weight)


def sparse(indices: Tensor, values: Tensor, N: int) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, (N, N), check_invariants=True)


def reciprocal(nearest: Tensor, rows: Tensor, k: int) -> Tensor:
    """Which of the k + 1 nearest of each row have that row among theirs: (rows, k + 1)."""
    theirs = nearest[nearest[rows, : k + 1], : k + 1]  # (rows, k + 1, k + 1)
    return (theirs == rows[:, None, None]).any(2)


def encode(distances: Callable[..., Tensor], nearest: Tensor, k1: int, block: int) -> Tensor:
    """V, sparse (N, N): how near each row's k-reciprocal neighbours are; rows add up to 1."""
    N, half = len(nearest), round(k1 / 2)
    mutual = torch.cat([reciprocal(nearest, rows, half) for rows in torch.arange(N).split(4096)])
    indices, values = [], []
    for rows in torch.arange(N).split(max(1, min(256, block // N))):
        near, is_mutual = nearest[rows], reciprocal(nearest, rows, k1)  # (rows, k1 + 1)
        # A neighbour's own neighbours are added where two thirds of them are known already
        theirs, count = nearest[near, : half + 1], mutual[near]  # (rows, k1 + 1, half + 1)
        known = near.masked_fill(~is_mutual, -1)[:, None, None]
        known = (theirs[..., None] == known).any(-1) & count
        accepted = is_mutual & (known.sum(-1) > 2 / 3 * count.sum(-1))
        added = accepted[..., None] & count
        member = torch.zeros(len(rows), N, dtype=torch.bool)
        index = torch.arange(len(rows))
        member[index[:, None].expand_as(near)[is_mutual], near[is_mutual]] = True
        member[index[:, None, None].expand_as(theirs)[added], theirs[added]] = True
        nearness = torch.exp(-distances(rows)) * member
        indices.append(member.nonzero().T + torch.tensor([[rows[0]], [0]]))
        values.append((nearness / nearness.sum(1, keepdim=True))[member])
    return sparse(torch.cat(indices, 1), torch.cat(values), N)


def similarities(
    distances: Callable[..., Tensor], V: Tensor, Q: int, weight: float
) -> Callable[[int, int], Tensor]:
    """A function of (start, end): minus those queries' distances to the gallery, (rows, G)."""
    N, (row, column), value = len(V), V.indices(), V.values()
    starts = F.pad(row.bincount(minlength=N).cumsum(0), (1, 0))
    # The gallery's entries of V, column by column: who has a neighbour, and how near
    of_gallery = row >= Q
    order = column[of_gallery].argsort(stable=True)
    owner, nearness = row[of_gallery][order] - Q, value[of_gallery][order]
    count = column[of_gallery].bincount(minlength=N)
    first = count.cumsum(0) - count

    def between(start: int, end: int) -> Tensor:
        result = distances(slice(start, end), Q) * -weight
        for i in range(start, end):
            entries = slice(starts[i], starts[i + 1])
            near, amount = column[entries], value[entries]  # the query's neighbours
            # Jaccard: only gallery samples that share a neighbour with the query can be closer
            ends = count[near].cumsum(0)
            shared_by = torch.arange(int(ends[-1]))
            shared_by += (first[near] - ends + count[near]).repeat_interleave(count[near])
            least = torch.minimum(nearness[shared_by], amount.repeat_interleave(count[near]))
            shared = torch.zeros(N - Q).index_add_(0, owner[shared_by], least)
            result[i - start] -= (1 - weight) * (1 - shared / (2 - shared))
        return result

    return between
