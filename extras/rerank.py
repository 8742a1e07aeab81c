"""k-reciprocal re-ranking (Zhong et al. 2017), sparse: no matrix of the gallery squared.

Shapes: Q queries, G gallery samples, N = Q + G, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def rerank(
    query: Tensor, gallery: Tensor, k1=20, k2=6, weight=0.3, block: int = 2**24
) -> Callable[[int, int], Tensor]:
    """Re-ranked similarities of features (Q, D) and (G, D), as evaluate.rank_metrics takes them.

    The distance is `weight` * Euclidean (squared, of normalised features, each row by its largest)
    + (1 - weight) * Jaccard. At most some `block` distances are in memory at once. On the CPU.
    """
    x = F.normalize(torch.cat([query, gallery]).float())
    k1 = min(k1, len(x) - 1)
    largest, nearest = neighbours(x, k1, block)
    row, column, value = encode(x, largest, nearest, k1, block)
    if k2 > 1:
        row, column, value = expand(row, column, value, nearest[:, :k2])
    return similarities(x, largest, (row, column, value), len(query), weight)


def neighbours(x: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """The largest distance of each row, (N,), and its k + 1 nearest, (N, k + 1), itself first."""
    N = len(x)
    largest, nearest = torch.empty(N), torch.empty(N, k + 1, dtype=torch.int64)
    for rows in torch.arange(N).split(max(1, block // N)):
        distance = 2 - 2 * x[rows] @ x.T
        largest[rows] = distance.amax(1)
        nearest[rows] = distance.topk(k + 1, largest=False).indices
    return largest, nearest


def reciprocal(nearest: Tensor, rows: Tensor, k: int) -> Tensor:
    """Which of the k + 1 nearest of each row have that row among theirs: (rows, k + 1)."""
    theirs = nearest[nearest[rows, : k + 1], : k + 1]  # (rows, k + 1, k + 1)
    return (theirs == rows[:, None, None]).any(2)


def encode(
    x: Tensor, largest: Tensor, nearest: Tensor, k1: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """V, which says how near each row's k-reciprocal neighbours are: row, column and value."""
    N, half = len(x), round(k1 / 2)
    mutual = torch.cat([reciprocal(nearest, rows, half) for rows in torch.arange(N).split(4096)])
    places, values = [], []
    for rows in torch.arange(N).split(max(1, min(256, block // N))):
        near, taken = nearest[rows], reciprocal(nearest, rows, k1)  # (rows, k1 + 1)
        # A neighbour's own neighbours come along where two thirds of them are known already
        theirs, count = nearest[near, : half + 1], mutual[near]  # (rows, k1 + 1, half + 1)
        known = near.masked_fill(~taken, -1)[:, None, None]
        known = (theirs[..., None] == known).any(-1) & count
        accepted = taken & (known.sum(-1) > 2 / 3 * count.sum(-1))
        added = accepted[..., None] & count
        member = torch.zeros(len(rows), N, dtype=torch.bool)
        index = torch.arange(len(rows))
        member[index[:, None].expand_as(near)[taken], near[taken]] = True
        member[index[:, None, None].expand_as(theirs)[added], theirs[added]] = True
        row, column = member.nonzero(as_tuple=True)
        value = (x[rows] @ x.T)[row, column] * 2 - 2
        value = value.div_(largest[rows][row]).exp_()
        total = torch.zeros(len(rows)).index_add_(0, row, value)
        places.append(torch.stack([rows[row], column]))
        values.append(value / total[row])
    row, column = torch.cat(places, 1)
    return row, column, torch.cat(values)


def expand(
    row: Tensor, column: Tensor, value: Tensor, nearest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Local query expansion: each row of V becomes the mean over its k2 nearest, (N, k2)."""
    N, k2 = nearest.shape
    count = row.bincount(minlength=N)
    nearest = nearest.flatten()
    entries = ranges((count.cumsum(0) - count)[nearest], count[nearest])
    target = torch.arange(N).repeat_interleave(k2).repeat_interleave(count[nearest])
    place, where = (target * N + column[entries]).unique(return_inverse=True)
    mean = torch.zeros(len(place)).index_add_(0, where, value[entries] / k2)
    return place // N, place % N, mean


def similarities(
    x: Tensor, largest: Tensor, V: tuple[Tensor, Tensor, Tensor], Q: int, weight: float
) -> Callable[[int, int], Tensor]:
    """A function of (start, end): minus those queries' distances to the gallery, (rows, G)."""
    N, (row, column, value) = len(x), V
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), row.bincount(minlength=N).cumsum(0)])
    # The gallery's entries of V, column by column: who has a neighbour, and how near
    of_gallery = row >= Q
    order = column[of_gallery].argsort(stable=True)
    owner, nearness = row[of_gallery][order] - Q, value[of_gallery][order]
    count = column[of_gallery].bincount(minlength=N)
    first = count.cumsum(0) - count

    def between(start: int, end: int) -> Tensor:
        result = 2 - 2 * x[start:end] @ x[Q:].T
        result.div_(largest[start:end, None]).mul_(-weight)
        for i in range(start, end):
            own, amount = column[starts[i] : starts[i + 1]], value[starts[i] : starts[i + 1]]
            entries = ranges(first[own], count[own])
            least = torch.minimum(nearness[entries], amount.repeat_interleave(count[own]))
            shared = torch.zeros(N - Q).index_add_(0, owner[entries], least)
            result[i - start] -= (1 - weight) * (1 - shared / (2 - shared))
        return result

    return between


def ranges(first: Tensor, count: Tensor) -> Tensor:
    """first[i], ..., first[i] + count[i] - 1 for each i, one after another."""
    ends = count.cumsum(0)
    return torch.arange(int(ends[-1])) + (first - ends + count).repeat_interleave(count)
