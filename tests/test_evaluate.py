"""Ranking equals a brute-force loop, ties and junk included.

Embeddings stay with their samples; bad files are refused.
"""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
from evaluate import Embedder, rank_by, rank_metrics
from extras.rerank import rerank
from model import GraFTConfig, build_model
from runtime import UserError

CPU = torch.device("cpu")


def brute_force(query, gallery, query_pids, gallery_pids, query_keys, gallery_keys, max_rank=50):
    """One query at a time; a wrong sample as close as a match goes before it."""
    average, inverse, first = [], [], []
    for q, pid, key in zip(query, query_pids, query_keys, strict=True):
        kept = []
        for g, gallery_pid, gallery_key in zip(gallery, gallery_pids, gallery_keys, strict=True):
            if not (pid == gallery_pid and key == gallery_key):
                kept.append((-float(q @ g / g.norm()), bool(pid == gallery_pid)))
        ranks = [rank for rank, (_, match) in enumerate(sorted(kept), 1) if match]
        if ranks:
            average.append(sum(k / rank for k, rank in enumerate(ranks, 1)) / len(ranks))
            inverse.append(len(ranks) / ranks[-1])
            first.append(ranks[0])
    cmc = [sum(rank <= r for rank in first) / len(first) for r in range(1, max_rank + 1)]
    return sum(average) / len(average), cmc, sum(inverse) / len(inverse), len(first)


@pytest.mark.parametrize("seed", range(8))
def test_ranking_equals_brute_force(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    # Entries of -1 and 1 in 16 dimensions: cosines are exact multiples of 1/8, so ties abound
    query, gallery = 2.0 * integers(2, 20, 16) - 1, 2.0 * integers(2, 60, 16) - 1
    keys = integers(3, 20), integers(3, 60)
    pids = integers(12, 20), integers(9, 60)  # identities 9 to 11 have no match
    expected = brute_force(query, gallery, *pids, *keys)
    for block in (2**24, 150):  # 150: two queries at a time
        monkeypatch.setattr(evaluate, "BLOCK", block)
        metrics = rank_metrics(query, gallery, *pids, *keys)
        assert metrics.mAP == pytest.approx(expected[0], abs=1e-6)
        assert metrics.cmc.tolist() == pytest.approx(expected[1], abs=1e-6)
        assert metrics.mINP == pytest.approx(expected[2], abs=1e-6)
        assert metrics.num_valid == expected[3]


@pytest.mark.parametrize("num_ids", [3, 40, 900])
def test_rows_longer_than_a_sorted_piece_rank_as_a_plain_sort_does(num_ids, monkeypatch):
    """Galleries of several pieces, with few and with very many matches, full of ties."""
    generator = torch.Generator().manual_seed(num_ids)
    Q, G = 37, 3 * evaluate.PIECE + 100
    similarity = (torch.randn(Q, G, generator=generator) * 16).round() / 16
    pids = [torch.randint(num_ids, (n,), generator=generator) for n in (Q, G)]
    keys = [torch.randint(3, (n,), generator=generator) for n in (Q, G)]
    expected = []
    for row, pid, key in zip(similarity, pids[0], keys[0], strict=True):
        match = (pids[1] == pid) & (keys[1] != key)
        wrong = row[pids[1] != pid]
        ranks = [
            k + int((wrong >= hit).sum())
            for k, hit in enumerate(row[match].sort(descending=True).values, 1)
        ]
        expected.append(
            sum(k / rank for k, rank in enumerate(ranks, 1)) / len(ranks) if ranks else np.nan
        )
    for block in (2**24, 5 * G):
        monkeypatch.setattr(evaluate, "BLOCK", block)
        metrics = rank_by(lambda start, end: similarity[start:end].clone(), *pids, *keys)
        np.testing.assert_allclose(metrics.ap.numpy(), expected, atol=1e-12)
        assert metrics.mAP == pytest.approx(np.nanmean(expected))


def test_ranking_by_hand():
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor(
        [[9.0, 0.0], [2.0, 0.2], [1.0, 1.0], [0.0, 3.0]]
    )  # norms must not matter
    pids, keys = torch.tensor([1, 2, 1, 1]), torch.tensor([0, 1, 1, 2])
    metrics = rank_metrics(query, gallery, torch.tensor([1]), pids, torch.tensor([0]), keys)
    # the first is the query's own camera; then a wrong one, then both matches
    assert metrics.mAP == pytest.approx((1 / 2 + 2 / 3) / 2) and metrics.mINP == pytest.approx(
        2 / 3
    )
    assert metrics.cmc[:3].tolist() == [0, 1, 1] and metrics.num_valid == 1


def rerank_plainly(query, gallery, k1, k2, weight) -> np.ndarray:
    """Zhong et al. 2017, sets and dense matrices, in double precision."""
    x = F.normalize(torch.cat([query, gallery])).numpy().astype(np.float64)
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
    return weight * distance[: len(query), len(query) :] + (1 - weight) * (
        1 - shared / (2 - shared)
    )


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (20, 1, 0.3), (5, 3, 0.0), (7, 2, 0.5), (3, 1, 0.9)]
)
def test_reranking_equals_the_plain_algorithm(k1, k2, weight):
    torch.manual_seed(k1 + k2)
    pids = torch.randint(12, (95,))
    features = torch.randn(12, 8)[pids] + 0.5 * torch.randn(95, 8)
    expected = -rerank_plainly(features[:15], features[15:], k1, k2, weight)
    for block in (2**24, 300):
        similarities = rerank(features[:15], features[15:], k1, k2, weight, block)
        found = torch.cat([similarities(0, 7), similarities(7, 15)])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_ap_of_each_query_and_ranking_by_given_similarities():
    query, gallery = torch.eye(2), torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    ids = (
        torch.tensor([1, 9]),
        torch.tensor([2, 1, 1]),
        torch.tensor([0, 0]),
        torch.tensor([1, 1, 1]),
    )
    metrics = rank_metrics(query, gallery, *ids)
    assert metrics.ap[0].item() == pytest.approx((1 / 2 + 2 / 3) / 2) and metrics.ap[1].isnan()
    backwards = rank_by(lambda start, end: -(query[start:end] @ gallery.T), *ids)
    assert backwards.mAP == pytest.approx(1.0) and metrics.mAP == pytest.approx(
        metrics.ap[0].item()
    )


def test_a_collapsed_model_scores_lowest():
    same = torch.ones(10, 4)
    pids = torch.arange(10) % 5
    metrics = rank_metrics(
        same,
        same,
        pids,
        pids,
        torch.zeros(10, dtype=torch.int64),
        torch.ones(10, dtype=torch.int64),
    )
    assert metrics.cmc[0] == 0 and metrics.mAP < 0.2


def test_no_match_at_all():
    one = torch.ones(1, 4)
    metrics = rank_metrics(
        one, one, torch.tensor([1]), torch.tensor([2]), torch.tensor([0]), torch.tensor([1])
    )
    assert (metrics.mAP, metrics.mINP, metrics.num_valid) == (0, 0, 0)


def small_model():
    torch.manual_seed(0)
    config = GraFTConfig(
        ("rgb", "tir"), 3, (16, 32), 16, 32, 1, 2, encoder_heads=2, encoder_hidden=32
    )
    return build_model(config).eval()


def test_embeddings_stay_with_their_samples(tmp_path, monkeypatch):
    """Samples with and without TIR, in batches of two: each row is what the sample alone gives."""
    for i in range(7):
        for modality in ("rgb", "tir"):
            if modality == "rgb" or i % 3:
                path = tmp_path / modality / f"{i}_c1.png"
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (32, 16), (30 * i, 200 - 20 * i, 90)).save(path)
    samples = [
        data.Sample(
            str(i),
            i,
            0,
            {
                m: (tmp_path / m / f"{i}_c1.png", None)
                for m in (["rgb", "tir"] if i % 3 else ["rgb"])
            },
        )
        for i in range(7)
    ]
    split = data.Split(samples, ("rgb", "tir"), (16, 32))
    facts = {m: (0.5, 0.5, 0.5) for m in ("rgb", "tir")}
    model = small_model()
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 2)
    embedder = Embedder(model, facts, facts, CPU, "fp32", 0)
    features, raw = embedder.embed(split), embedder.fusion_tokens(split)
    for i in range(7):
        images = {m: image[None] for m, image in split[i][0].items()}
        alone = model(embedder.normalise(images)).fusion[0]
        torch.testing.assert_close(raw[i], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features[i], alone / alone.norm(), atol=1e-5, rtol=0)


def test_checkpoints_that_are_none(tmp_path):
    path = tmp_path / "file.pt"

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    def refused(match):
        with pytest.raises(UserError, match=match):
            evaluate.load_model(path)

    refused("no such file")
    path.write_bytes(b"not a checkpoint")
    refused("not a checkpoint")
    path.write_bytes(pickle.dumps({"model": Evil()}))
    refused("not a checkpoint")
    torch.save({"model": Evil()}, path)
    refused("not a checkpoint")
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], path)
    refused("holds a list")
    torch.save({"model": {}}, path)
    refused("lacks config")
    good = {
        "config": {"modalities": ("rgb",), "dim": 32, "heads": 2},
        "model": {},
        "settings": {},
        "mean": {},
        "std": {},
    }
    torch.save(good, path)
    refused("do not fit")
    torch.save({**good, "config": {"wings": 2}}, path)
    refused("wings")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a checkpoint")


def test_a_damaged_record_is_found(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"model": torch.arange(10000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        evaluate.load_model(path)
