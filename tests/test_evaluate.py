"""Ranking equals a brute-force loop, ties and junk included; embeddings stay with their samples.

What cannot end well is refused before anything is embedded.
"""

import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails, read_json, succeeds
from PIL import Image

import data
import evaluate
from evaluate import Embedder, rank_by, rank_metrics
from model import FUSIONS, GraFTConfig, build_model
from runtime import UserError

CPU = torch.device("cpu")
HALF = {"rgb": (0.5, 0.5, 0.5), "tir": (0.4, 0.4, 0.4)}

# --- ranking


def brute_force(similarity, query_pids, gallery_pids, query_keys, gallery_keys):
    """AP, inverse penalty and first rank of each query that has a match; similarity (Q, G).

    A wrong sample as similar as a match goes before it.
    """
    found = []
    for row, pid, key in zip(similarity.tolist(), query_pids, query_keys, strict=True):
        labels = zip(row, gallery_pids, gallery_keys, strict=True)
        kept = [(-s, bool(p == pid)) for s, p, k in labels if p != pid or k != key]
        ranks = [rank for rank, (_, match) in enumerate(sorted(kept), 1) if match]
        if ranks:
            ap = sum(k / rank for k, rank in enumerate(ranks, 1)) / len(ranks)
            found.append((ap, len(ranks) / ranks[-1], ranks[0]))
    return np.array(found)


@pytest.mark.parametrize("seed", range(8))
def test_ranking_equals_brute_force(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    # Entries of -1 and 1 in 16 dimensions: cosines are exact multiples of 1/8, so ties abound
    query, gallery = 2.0 * integers(2, 20, 16) - 1, 2.0 * integers(2, 60, 16) - 1
    pids = integers(12, 20), integers(9, 60)  # identities 9 to 11 have no match
    ids = (*pids, integers(3, 20), integers(3, 60))
    ap, inverse_penalty, first = brute_force(query @ gallery.T, *ids).T
    for block in (2**24, 150):  # 150: two queries at a time
        monkeypatch.setattr(evaluate, "BLOCK", block)
        metrics = rank_metrics(query, 3 * gallery, *ids)  # norms do not matter
        assert metrics.mAP == pytest.approx(ap.mean())
        assert metrics.cmc.tolist() == pytest.approx([(first <= k).mean() for k in range(1, 51)])
        assert metrics.mINP == pytest.approx(inverse_penalty.mean())
        assert metrics.num_valid == len(ap)
        assert metrics.rank[metrics.rank > 0].tolist() == first.tolist()
        assert metrics.ap[metrics.rank > 0].tolist() == pytest.approx(ap.tolist())


def test_ranking_by_hand():
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[9, 0], [2, 0.2], [1, 1], [0, 3]])
    ids = [torch.tensor(x) for x in ([1], [1, 2, 1, 1], [0], [0, 1, 1, 2])]
    # The first is of the query's own camera; then a wrong one, then both matches
    metrics = rank_metrics(query, gallery, *ids)
    assert metrics.mAP == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics.mINP == pytest.approx(2 / 3)
    assert metrics.cmc[:3].tolist() == [0, 1, 1]
    assert rank_by(lambda start, end: -(query[start:end] @ gallery.T), *ids).mAP == 1
    # Features that collapse score lowest
    assert rank_metrics(query, torch.ones(4, 2), *ids).mAP == pytest.approx((1 / 2 + 2 / 3) / 2)
    # No match at all
    metrics = rank_metrics(query, gallery, torch.tensor([7]), *ids[1:])
    assert (metrics.mAP, metrics.mINP, metrics.num_valid, metrics.cmc.sum()) == (0, 0, 0, 0)


# --- embeddings


@pytest.fixture
def split(tmp_path) -> data.Split:
    """Seven samples, three of them without TIR."""
    samples = []
    for i in range(7):
        images = {}
        for modality in ("rgb", "tir") if i % 3 else ("rgb",):
            images[modality] = (tmp_path / f"{i}_{modality}.png", None)
            picture = Image.new("RGB", (32, 16), (30 * i, 200 - 20 * i, 90))
            picture.save(images[modality][0])
        samples.append(data.Sample(str(i), i, 0, images))
    return data.Split(samples, ("rgb", "tir"), (16, 32))


def make_embedder(fusion="graft", **config) -> Embedder:
    torch.manual_seed(0)
    sizes = {"encoder_heads": 2, "encoder_hidden": 32, "fusion": fusion, **config}
    model = build_model(GraFTConfig(("rgb", "tir"), 3, (16, 32), 16, 32, 1, 2, **sizes))
    features = "bnneck" if fusion.startswith("weighted") else "fusion"
    return Embedder(model.eval(), HALF, HALF, CPU, "fp32", 0, features)


@pytest.fixture
def embedder() -> Embedder:
    embedder = make_embedder(fusion_tokens=2)
    torch.nn.init.normal_(embedder.model.bottleneck.running_mean)
    return embedder


def test_embeddings_stay_with_their_samples(split, embedder, monkeypatch):
    """In batches of two, each row is what the sample gives alone; so are photos by any name."""
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 2)
    tokens, features = embedder.fusion_tokens(split), {}
    for name in evaluate.FEATURES:
        embedder.features = name
        features[name] = embedder.embed(split)
    for i in range(7):
        images = {m: image[None] for m, image in split[i][0].items()}
        alone = embedder.model(embedder.normalise(images))
        torch.testing.assert_close(tokens[i], alone.fusion[0], atol=1e-5, rtol=1e-5)
        bnneck = embedder.model.bottleneck(alone.fusion)
        for name, x in (("fusion", alone.fusion), ("bnneck", bnneck), ("data", alone.data)):
            torch.testing.assert_close(features[name][i], F.normalize(x)[0], atol=1e-5, rtol=0)
    photos = [{m: path for m, (path, _) in s.images.items()} for s in split.samples]
    opened = [{m: Image.open(path) for m, path in photo.items()} for photo in photos]
    read = [images for images, _, _ in split]
    for given in (photos, opened, read):
        torch.testing.assert_close(embedder(given), features["data"], atol=1e-5, rtol=0)
    torch.testing.assert_close(embedder(photos[1])[0], features["data"][1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="uv"):
        embedder({"uv": photos[0]["rgb"]})


@pytest.mark.parametrize("fusion", FUSIONS)
def test_neither_order_nor_store_changes_an_embedding(fusion, split):
    embedder = make_embedder(fusion, **({"backbone": "resnet18"} if fusion == "hamnet" else {}))
    features = embedder.embed(split)
    stored = data.Split(split.samples, split.modalities, split.image_size, store_gb=1)
    assert embedder.embed(stored).equal(features)
    assert stored.decoded
    turned = [dict(reversed(images.items())) for images, _, _ in split]
    torch.testing.assert_close(embedder(turned), features)


def test_flipped_images_are_averaged(split, embedder):
    images = embedder.normalise({m: image[None] for m, image in split[1][0].items()})
    images = {m: image * torch.linspace(0, 1, 32) for m, image in images.items()}
    both = embedder.model(images).fusion
    both = both + embedder.model({m: image.flip(-1) for m, image in images.items()}).fusion
    torch.testing.assert_close(embedder.features_of(images, flip=True), F.normalize(both))


def test_what_is_not_finite_is_refused(split, embedder):
    torch.nn.init.constant_(embedder.model.fusion_token, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        embedder.embed(split)


# --- checkpoints


@pytest.mark.parametrize(("older", "settings", "features"), [
    ({"test_token": "data"}, {}, "data"),
    ({"bnneck_features": True}, {"precision": "bf16"}, "bnneck"),
    ({}, {"features": "bnneck"}, "bnneck"),
    ({}, {}, "fusion"),
])  # fmt: skip
def test_older_checkpoints_say_in_their_config_what_is_tested(
    embedder, tmp_path, older, settings, features
):
    content = {"model": embedder.model.state_dict(), "mean": HALF, "std": HALF}
    config = asdict(embedder.model.config) | older
    torch.save(content | {"config": config, "settings": settings}, tmp_path / "last.pt")
    loaded = evaluate.load_embedder(tmp_path, "cpu")  # a run's folder
    assert loaded.features == features
    assert loaded.precision == settings.get("precision", "auto")
    assert evaluate.load_embedder(tmp_path, CPU, features="fusion").features == "fusion"


class Evil:
    """Writes a file where it is unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def test_other_files_are_refused_and_run_no_code(embedder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, config = tmp_path / "file.pt", asdict(embedder.model.config)
    good = {"config": config, "settings": {}, "mean": HALF, "std": HALF}
    good["model"] = embedder.model.state_dict()
    torch.save(good, path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content, message in (
        (b"not a checkpoint", "not a checkpoint"),
        (pickle.dumps({"model": Evil()}, 2), "not a checkpoint"),
        (whole[:500], "not a checkpoint"),
        (bytes(damaged), "damaged"),
        ({"model": Evil()}, "not a checkpoint"),
        ([1, 2], "holds a list"),
        ({"model": {}}, "lacks config"),
        ({**good, "model": {}}, "do not fit"),
        ({**good, "mean": {}}, "do not fit"),
        ({**good, "config": {"wings": 2}}, "wings"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=message):
            evaluate.load_model(path)
    assert not (tmp_path / "ran").exists()


# --- the program


def test_evaluate_gives_what_training_gave(trained, tmp_path):
    """All modalities, and all subsets; each query's average precision makes up the mean."""
    expected = read_json(trained / "metrics.json")
    out = succeeds(evaluate, trained, "--json", tmp_path / "all.json")
    found = read_json(tmp_path / "all.json")
    assert found == expected
    assert f"{tmp_path}/all.json: the metrics" in out
    assert f"settings: {trained} --dataset synthetic" in out
    valid = [query["ap"] for query in found["queries"] if query["ap"] is not None]
    assert np.mean(valid) == pytest.approx(found["mAP"])
    assert len(valid) == found["num_valid"]
    assert np.mean([query["rank"] == 1 for query in found["queries"]]) == pytest.approx(found["R1"])
    flags = ("--all-subsets", "--store", 0, "--workers", 0, "--json", tmp_path / "subsets.json")
    succeeds(evaluate, trained / "last.pt", *flags)
    subsets = read_json(tmp_path / "subsets.json")
    assert list(subsets) == ["rgb", "nir", "tir", "rgb,nir", "rgb,tir", "nir,tir", "rgb,nir,tir"]
    assert subsets["rgb,nir,tir"] == expected
    succeeds(evaluate, trained, "--modalities", "tir,rgb", "--json", tmp_path / "two.json")
    assert read_json(tmp_path / "two.json") == subsets["rgb,tir"]  # in whatever order


def test_mistakes_are_refused_before_anything_is_embedded(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Embedder, "embed", lambda *args: pytest.fail("embedded"))
    named = ("--ranked-list", tmp_path / "x.png", "--queries")
    for words, message in (
        (("--json", tmp_path / "no" / "x.json"), "expected a file in an existing"),
        (("--ranked-list", tmp_path / "x.xyz"), "expected a file name that ends in .png"),
        ((*named, "999_c1_0"), "--queries 999_c1_0: no query has this name"),
        (("--modalities", "uv"), "has no modality uv; expected some of rgb,nir,tir"),
        (("--data-root", tmp_path), "synthetic"),
        (("--all-subsets", "--cmc", tmp_path / "x.png"), "draw them without --all-subsets"),
        (("--features", "wings"), "invalid choice"),
    ):
        assert message in fails(evaluate, trained, *words)
    assert not any(tmp_path.iterdir())
    assert "no such file" in fails(evaluate, tmp_path)


def test_query_and_gallery_are_enough_but_not_of_one_camera(trained, tiny_data, tmp_path):
    root = tmp_path / "rgbir"
    for split in ("query", "bounding_box_test"):
        (root / split).mkdir(parents=True)
        for path in (tiny_data / "rgbir" / split).iterdir():
            (root / split / path.name).symlink_to(path)
    (tmp_path / "VERSION").write_text((tiny_data / "VERSION").read_text())
    succeeds(evaluate, trained, "--data-root", tmp_path, "--json", tmp_path / "x.json")
    assert read_json(tmp_path / "x.json") == read_json(trained / "metrics.json")
    for path in root.rglob("*.*"):
        if "_c0001_" not in path.name:
            path.unlink()
    assert "from another camera or scene" in fails(evaluate, trained, "--data-root", tmp_path)
