"""Losses by hand: small numbers on paper, extremes that must not overflow, centroids that move."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import SCHEMES, CenterLoss, GraFTLoss, triplet_hardest, triplet_soft_margin
from model import Embeddings


def test_triplet_by_hand():
    a, p, n = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert triplet_soft_margin(a, p, n).item() == pytest.approx(math.log(1 + math.exp(1 - 4)))
    plain = triplet_soft_margin(a, p, n, squared=False).item()
    assert plain == pytest.approx(math.log(1 + math.exp(1 - 2)))
    both = triplet_soft_margin(torch.cat([a, a]), torch.cat([p, n]), torch.cat([n, p]))
    expected = (math.log(1 + math.exp(-3)) + math.log(1 + math.exp(3))) / 2
    assert both.item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("squared", [True, False])
def test_triplet_survives_large_and_zero_distances(dtype, squared):
    near = torch.zeros(1, 4, dtype=dtype, requires_grad=True)
    far = torch.full((1, 4), 5e3, dtype=dtype, requires_grad=True)  # 1e4 away, squared 1e8
    loss = triplet_soft_margin(near, far, near, squared)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e8 if squared else 1e4, rel=2e-2)
    loss.backward()
    assert torch.isfinite(near.grad).all()
    assert torch.isfinite(far.grad).all()
    assert far.grad.any()
    assert triplet_soft_margin(near, near, far, squared).item() == 0


def test_center_loss_by_hand():
    features, labels = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1, 0])
    assert CenterLoss(2, 2)(features, labels).item() == pytest.approx((25 + 4) / 2)


def test_centroids_start_at_class_means_and_move_towards_their_identity():
    center = CenterLoss(3, 2)
    features, labels = torch.tensor([[1.0, 1.0], [3.0, 5.0], [7.0, 7.0]]), torch.tensor([0, 0, 2])
    center.start_at_means(features, labels)
    assert center.centers.tolist() == [[2, 3], [0, 0], [7, 7]]
    optimizer = torch.optim.SGD(center.parameters(), lr=0.1)
    center(torch.tensor([[4.0, 3.0]]), torch.tensor([0])).backward()
    optimizer.step()
    assert center.centers[0].tolist() == pytest.approx([2.4, 3.0])
    assert center.centers[1:].tolist() == [[0, 0], [7, 7]]


@pytest.fixture
def embeddings() -> Embeddings:
    """Of two anchors, then two positives, then two negatives."""
    torch.manual_seed(0)
    return Embeddings(torch.randn(6, 4), torch.randn(6, 4))


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="triplet scheme 'FFX': expected one of FFD, "):
        GraFTLoss(3, 4, "FFX")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_picks_its_tokens(scheme, embeddings):
    terms = GraFTLoss(3, 4, scheme)(embeddings, torch.zeros(2, 3), torch.tensor([0, 2]))
    tokens = {"F": embeddings.fusion, "D": embeddings.data}
    a, p, n = tokens[scheme[0]][:2], tokens[scheme[1]][2:4], tokens[scheme[2]][4:]
    expected = torch.log1p(torch.exp((a - p).square().sum(1) - (a - n).square().sum(1))).mean()
    torch.testing.assert_close(terms["triplet"], expected)


def test_total_is_the_weighted_sum(embeddings):
    logits, labels, criterion = torch.randn(2, 3), torch.tensor([1, 1]), GraFTLoss(3, 4)
    terms = criterion(embeddings, logits, labels)
    cross_entropy = F.cross_entropy(logits, labels)
    torch.testing.assert_close(terms["loss"], 0.5 * terms["triplet"] + 0.5 * cross_entropy)
    assert terms["center"] == 0
    assert not criterion.center.centers.requires_grad
    criterion.set_weights(alpha=1.0, beta=0.1, gamma=2.0, label_smoothing=0.1)
    terms = criterion(embeddings, logits, labels)
    center = embeddings.fusion[:2].square().sum(1).mean()
    cross_entropy = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(terms["center"], center)
    torch.testing.assert_close(terms["cross_entropy"], cross_entropy)
    total = terms["triplet"] + 0.1 * center + 2 * cross_entropy
    torch.testing.assert_close(terms["loss"], total)
    assert criterion.center.centers.requires_grad


@pytest.mark.parametrize("squared", [True, False])
def test_hardest_triplets_by_brute_force(squared):
    torch.manual_seed(0)
    features = torch.randn(9, 4, requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])  # 3 has no positive
    expected = []
    for i in range(8):
        distance = [(features[i] - f).norm() ** (2 if squared else 1) for f in features]
        positive = max(d for j, d in enumerate(distance) if labels[j] == labels[i] and j != i)
        negative = min(d for j, d in enumerate(distance) if labels[j] != labels[i])
        expected.append(torch.log(1 + torch.exp(positive - negative)))
    loss = triplet_hardest(features, labels, squared)
    torch.testing.assert_close(loss, sum(expected) / 8)
    loss.backward()
    assert torch.isfinite(features.grad).all()
    assert features.grad.any()
    assert triplet_hardest(features, torch.zeros(9, dtype=torch.int64)) == 0  # no negatives


def test_hardest_triplets_with_a_hard_margin():
    features = torch.tensor([[0.0], [1.0], [3.0]])
    loss = triplet_hardest(features, torch.tensor([0, 0, 1]), squared=False, margin=1.5)
    assert loss.item() == pytest.approx((0 + 0.5) / 2)  # 1 - 3 + 1.5 < 0, 1 - 2 + 1.5
