"""plus's model: the similarity view by view, its losses by brute force, and a sensor gone blind."""

import pytest
import torch
import torch.nn.functional as F

from extras import weighted
from losses import GraFTLoss
from model import Embeddings, GraFTConfig, build_model

SIZE = {"image_size": (16, 32), "dim": 24, "depth": 1, "heads": 3, "encoder_hidden": 32}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GraFTConfig(modalities=("rgb", "tir"), num_ids=3, fusion="weighted", **SIZE)
    model = build_model(config)
    for layer in (*model.confidence.values(), *model.classifier.values()):
        torch.nn.init.normal_(layer.weight)
    return model


def tokens(*names: str, count: int = 6) -> Embeddings:
    of = {name: torch.randn(count, 24) for name in names}
    mean = torch.stack(list(of.values())).mean(0)
    return Embeddings(mean, mean, of, of)


def shares(model, embeddings: Embeddings) -> dict:
    own = {**embeddings.fusion_of, "mean": embeddings.fusion}
    squares = {v: (model.confidence[v](x)[:, 0].sigmoid() + 0.01) ** 2 for v, x in own.items()}
    return {view: square / sum(squares.values()) for view, square in squares.items()}


@pytest.mark.parametrize("sides", [(("rgb", "tir"), ("rgb", "tir")), (("rgb", "tir"), ("tir",)),
                                   (("rgb",), ("tir",))])  # fmt: skip
def test_similarity_view_by_view(model, sides):
    query, gallery = tokens(*sides[0], count=4), tokens(*sides[1])
    model.eval()
    found = model.similarity(model.embedding(query, "bnneck"), model.embedding(gallery, "bnneck"))
    assert model.embedding(query, "bnneck").shape == (4, model.embedding_width)
    q, g = shares(model, query), shares(model, gallery)
    for i in range(4):
        for j in range(6):
            above = below = 0
            for view in q.keys() & g.keys():
                a, b = (
                    (e.fusion if view == "mean" else e.fusion_of[view]) for e in (query, gallery)
                )
                a, b = (model.bottleneck[view](x) for x in (a, b))
                both = q[view][i] * g[view][j]
                above = above + both * F.cosine_similarity(a[i], b[j], dim=0)
                below = below + both
            torch.testing.assert_close(found[i, j], above / below)
    itself = model.similarity(*[model.embedding(query, "bnneck")] * 2)
    torch.testing.assert_close(itself.diag(), torch.ones(4))


def test_a_sensor_without_confidence_is_not_heard(model):
    model.eval()
    for view, logit in {"rgb": 10.0, "tir": -30.0, "mean": -30.0}.items():
        torch.nn.init.zeros_(model.confidence[view].weight)
        torch.nn.init.constant_(model.confidence[view].bias, logit)
    embeddings = tokens("rgb", "tir")
    noise = Embeddings(
        *(torch.randn(6, 24),) * 2, embeddings.fusion_of | {"tir": torch.randn(6, 24)}
    )
    a, b = model.embedding(embeddings, "bnneck"), model.embedding(noise, "bnneck")
    torch.testing.assert_close(model.similarity(a, a), model.similarity(a, b), atol=1e-3, rtol=0)


def test_the_contrastive_loss_by_brute_force(model):
    model.eval()
    embeddings, labels = tokens("rgb", "tir"), torch.tensor([0, 0, 1, 1, 1, 2])  # 2 is alone
    vectors = model.embedding(embeddings, "bnneck")
    similarity, share = model.similarity(vectors, vectors), shares(model, embeddings)
    losses = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        log_sum = torch.logsumexp(similarity[i, others] / 0.1, 0)
        positives = [j for j in others if labels[j] == labels[i]]
        weights = [sum(s[i] * s[j] for s in share.values()) for j in positives]
        each = [
            w * (log_sum - similarity[i, j] / 0.1) for w, j in zip(weights, positives, strict=True)
        ]
        losses.append(sum(each) / sum(weights) if each else torch.tensor(0.0))
    torch.testing.assert_close(model.contrastive(vectors, labels), torch.stack(losses).mean())


@pytest.mark.parametrize("scheme", ["contrastive", "hardest"])
def test_the_losses_and_what_the_confidences_learn_from(model, scheme):
    criterion, labels = GraFTLoss(3, 24, scheme), torch.tensor([0, 0, 1, 1, 2, 2])
    criterion.set_weights(alpha=0.3, beta=0.0, gamma=0.7, label_smoothing=0.1)
    embeddings = tokens("rgb", "tir")
    terms = model.train().losses(embeddings, labels, criterion)
    entropy, learned = {}, 0
    for view, token in {**embeddings.fusion_of, "mean": embeddings.fusion}.items():
        classes = model.classifier[view](model.bottleneck[view](token))
        logit = model.confidence[view](token)[:, 0]
        right = classes.softmax(1)[torch.arange(6), labels]
        learned = learned + F.binary_cross_entropy(logit.sigmoid(), right.detach()) / 2
        weight = logit.sigmoid() + weighted.FLOOR
        each = [F.cross_entropy(x[None], y[None], label_smoothing=0.1)
                for x, y in zip(classes, labels, strict=True)]  # fmt: skip
        entropy[view] = (weight * torch.stack(each)).sum() / weight.sum()
    torch.testing.assert_close(terms["cross_entropy"], entropy["mean"])
    total = 0.7 * (entropy["mean"] + (entropy["rgb"] + entropy["tir"]) / 2)
    total = total + 0.3 * terms["contrastive"] + learned
    if scheme == "hardest":
        of = [
            criterion.triplet(x, x, labels, ())
            for x in (embeddings.fusion, *embeddings.fusion_of.values())
        ]
        total = total + 0.3 * (of[0] + (of[1] + of[2]) / 2)
    torch.testing.assert_close(terms["loss"], total)
    terms["contrastive"].backward(retain_graph=True)  # moves no confidence
    assert all(layer.weight.grad is None for layer in model.confidence.values())
