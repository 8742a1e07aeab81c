"""Sparse k-reciprocal re-ranking equals the algorithm as it is published, with dense matrices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from extras.rerank import rerank


def rerank_plainly(query, gallery, k1, k2, weight) -> np.ndarray:
    """Zhong et al. 2017, sets and dense matrices, in double precision."""
    x = torch.cat([query, gallery]).numpy().astype(np.float64)
    distance = 2 - 2 * x @ x.T
    distance = (distance / distance.max(0)).T
    ranks = distance.argsort(1)

    def reciprocal(i, k):
        near = ranks[i, : k + 1]
        return near[[i in ranks[j, : k + 1] for j in near]]

    V = np.zeros_like(distance)
    for i in range(len(x)):
        own = near = reciprocal(i, k1)
        for j in own:
            theirs = reciprocal(j, round(k1 / 2))
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                near = np.union1d(near, theirs)
        V[i, near] = np.exp(-distance[i, near]) / np.exp(-distance[i, near]).sum()
    V = V[ranks[:, :k2]].mean(1)
    shared = np.minimum(V[: len(query), None], V[None, len(query) :]).sum(2)
    jaccard = 1 - shared / (2 - shared)
    return weight * distance[: len(query), len(query) :] + (1 - weight) * jaccard


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (20, 1, 0.3), (5, 3, 0.0), (7, 2, 0.5), (3, 1, 0.9)]
)
def test_reranking_equals_the_plain_algorithm(k1, k2, weight):
    torch.manual_seed(k1 + k2)
    pids = torch.randint(12, (95,))
    features = F.normalize(torch.randn(12, 8)[pids] + 0.5 * torch.randn(95, 8))
    expected = -rerank_plainly(features[:15], features[15:], k1, k2, weight)
    for block in (2**24, 300):
        sides = (features[:15], features[15:], lambda a, b: a @ b.T)
        similarities = rerank(*sides, k1, k2, weight, block)
        found = torch.cat([similarities(0, 7), similarities(7, 15)])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
