"""A folder of photos is searched as the metric ranks, whatever else lies in it."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, read_json, succeeds
from PIL import Image
from test_export import load, save_model

import data
import runtime
from extras import search

FP32 = ("--precision", "fp32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("run") / "last.pt")


@pytest.fixture
def photos(tiny_data, tmp_path):
    """The gallery as a folder of two-modality photos, some of them without TIR."""
    gallery = data.load_dataset("synthetic", tiny_data, ("rgb", "tir"), (32, 64)).gallery
    for i, sample in enumerate(gallery.samples):
        for modality, image in gallery[i][0].items():
            if modality == "rgb" or i % 4:
                path = tmp_path / "photos" / modality / f"id {sample.pid}" / f"{i:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "photos", gallery


def words(folder, name) -> list[str]:
    return [f"{m}={folder}/{m}/{name}.png" for m in ("tir", "rgb")]


def test_from_photos_to_results(checkpoint, photos, tmp_path):
    folder, gallery = photos
    npz, run = tmp_path / "gallery.npz", checkpoint.parent
    out = succeeds(search, run, "index", folder, "--out", npz, *FP32)
    assert "48 samples (48 with rgb, 0 with nir, 36 with tir)" in out
    arrays = np.load(npz)
    names, expected = arrays["names"].tolist(), load(checkpoint).embed(gallery).numpy()
    assert arrays["features"].dtype == np.float32
    order = [int(name[-3:]) for name in names]  # as the gallery numbers them
    complete = [i for i in range(48) if i % 4]
    of_name = dict(zip(order, arrays["features"], strict=True))
    for i in complete:
        np.testing.assert_allclose(of_name[i], expected[i], atol=1e-5)
    asked = [names[order.index(5)], names[order.index(7)]]
    flags = ("--top", 3, "--json", tmp_path / "x.json", "--picture", tmp_path / "x.png", *FP32)
    queries = [word for name in asked for word in words(folder, name)]
    printed = succeeds(search, run, "query", npz, *queries, *flags, "--threshold", 0.9999)
    found = read_json(tmp_path / "x.json")["queries"]
    assert printed.count("rank  similarity") == 2
    assert Image.open(tmp_path / "x.png").width > 300
    for answer, i, name in zip(found, (5, 7), asked, strict=True):
        best = answer["best"]
        assert best[0]["name"] == name
        assert best[0]["files"]["tir"] == str(folder / "tir" / f"{name}.png")
        similarity = np.sort(arrays["features"] @ expected[i])[::-1]
        assert [x["similarity"] for x in best] == pytest.approx(similarity[:3], abs=1e-5)
        assert answer["matches"] == sum(similarity >= 0.9999)
        assert f"   1       1.000  match  {name}" in printed
        assert [x["match"] for x in best] == [x["similarity"] >= 0.9999 for x in best]


def test_what_lies_among_photos_stops_nothing(checkpoint, tmp_path, capfd):
    """Broken and odd files are named and left out, system's are passed over, names may be any."""
    folder = tmp_path / "album"
    for name in ("rgb/a/1.png", "rgb/a/2.png", "tir/a/1.webp", "nir/b.JPG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(np.random.default_rng(len(name)).integers(256, size=3).tolist())
        Image.new("RGB", (64, 32), colour).save(folder / name)
    shutil.copy(folder / "rgb/a/1.png", folder / "rgb/a/1.tiff")  # a twin
    (folder / "rgb/a/2.png").write_bytes(b"junk")
    (folder / "tir/a/3.png").write_bytes((folder / "rgb/a/1.png").read_bytes()[:60])
    (folder / "tir/4.png").symlink_to("gone.png")
    (folder / "rgb/.ipynb_checkpoints").mkdir()
    for name in ("rgb/._1.png", "rgb/Thumbs.db", "rgb/notes.txt", "uv.png"):
        (folder / name).write_bytes(b"junk")
    strange = os.fsencode(folder) + b"/rgb/Stra\xdfe\n.png"
    shutil.copy(os.fsencode(folder / "rgb/a/1.png"), strange)
    Image.fromarray(np.zeros((32, 64), np.uint16)).save(folder / "rgb" / "deep.png")
    embedder = load(checkpoint)
    samples = search.find_samples(folder, ("rgb", "nir", "tir"))
    kept, features = search.embed(samples, embedder)
    assert list(kept) == ["Stra\\udcdfe\\n", "a/1", "b"]
    assert kept["a/1"].keys() == {"rgb", "tir"}
    assert len(features) == 3
    torch.testing.assert_close(features[2:], embedder({"nir": folder / "nir/b.JPG"}))
    lines = capfd.readouterr().err.splitlines()
    assert "4 files or folders were not taken" in lines[0]
    for line, name in zip(sorted(lines[1:4]), ("rgb/a/2", "rgb/deep", "tir/a/3"), strict=True):
        assert f"{name}.png: " in line
    assert "3 photos could not be read and are left out" in lines[4]
    # Gone since: the result is complete, the picture has a gap
    npz, picture = tmp_path / "g.npz", tmp_path / "x.png"
    succeeds(search, checkpoint, "index", folder, "--out", npz)
    (folder / "nir/b.JPG").unlink()
    query = ("query", npz, f"rgb={folder}/rgb/a/1.png", "--picture", picture, "--top", 9)
    assert "\n   3 " in succeeds(search, checkpoint, *query)
    assert picture.exists()


def test_a_threshold_of_verify_is_found(checkpoint, photos, tmp_path):
    folder, npz = photos[0] / "rgb", tmp_path / "g.npz"
    succeeds(search, checkpoint, "index", photos[0], "--out", npz)
    chosen = {"threshold": 0.5, "modalities": ["rgb", "nir", "tir"]}
    chosen["checkpoint"] = runtime.fingerprint(checkpoint)
    runtime.write_json(search.threshold_file(checkpoint.parent), chosen)
    query = ("query", npz, f"rgb={next(folder.rglob('*.png'))}")
    out = succeeds(search, checkpoint, *query, "--threshold")
    assert "similarity of 0.5000 or more" in out
    assert "the threshold is for samples of rgb, nir, tir; for others" in out
    assert "match" not in succeeds(search, checkpoint, *query)


def test_mistakes_give_one_line(checkpoint, photos, tmp_path):
    folder, npz = photos[0], tmp_path / "gallery.npz"
    (tmp_path / "empty").mkdir()
    image = f"rgb={next((folder / 'rgb').rglob('*.png'))}"
    arrays = {"names": ["a"], "files": [["a"]], "modalities": ["rgb"]}
    own = runtime.fingerprint(checkpoint)
    np.savez(tmp_path / "narrow.npz", features=np.zeros((1, 3)), model=own, **arrays)
    np.savez(tmp_path / "other.npz", features=np.zeros((1, 24)), model="0", **arrays)
    np.savez(tmp_path / "pickle.npz", features=np.array([{}], dtype=object))
    succeeds(search, checkpoint, "index", folder, "--out", npz)
    for argv, message in (
        (("index", tmp_path / "empty"), "no images; expected"),
        (("index", tmp_path / "none"), "no images; expected"),
        (("index", folder, "--out", tmp_path / "x.txt"), "expected a file name that ends in .npz"),
        (("query", tmp_path / "x.npz", image), "x.npz: no such file; make it by"),
        (("query", tmp_path / "narrow.npz", image), "was embedded by another model"),
        (("query", tmp_path / "other.npz", image), "was embedded by another model"),
        (("query", tmp_path / "pickle.npz", image), "not a gallery"),
        (("query", checkpoint, image), "not a gallery"),
        (("query", npz, image, "--top", 0), "expected a whole number of at least 1, not 0"),
        (("query", npz, image, "--picture", tmp_path / "x.xyz"), "ends in .png"),
        (("query", npz, "uv=a.png"), "expected some of rgb=FILE nir=FILE tir=FILE"),
        (("query", npz, image[4:]), "expected some of rgb=FILE"),
        (("query", npz, f"rgb={tmp_path}/none.png"), "none.png"),
    ):
        assert message in fails(search, checkpoint, *argv)
