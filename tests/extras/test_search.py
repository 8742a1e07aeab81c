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


def test_from_photos_to_results(checkpoint, photos, tmp_path):
    folder, gallery = photos
    npz, run = tmp_path / "gallery.npz", checkpoint.parent
    out = succeeds(search, run, "index", folder, "--out", npz, *FP32)
    assert "48 samples (48 with rgb, 0 with nir, 36 with tir)" in out
    arrays = np.load(npz)
    names, features = arrays["names"].tolist(), arrays["features"]
    expected = load(checkpoint).embed(gallery).numpy()
    assert features.dtype == np.float32
    index_of = {int(name[-3:]): i for i, name in enumerate(names)}  # as the gallery numbers them
    for number, i in index_of.items():
        if number % 4:  # complete
            np.testing.assert_allclose(features[i], expected[number], atol=1e-5)
    asked = {number: names[index_of[number]] for number in (5, 7)}
    words = [f"{m}={folder}/{m}/{name}.png" for name in asked.values() for m in ("tir", "rgb")]
    flags = ("--top", 3, "--json", tmp_path / "x.json", "--picture", tmp_path / "x.png", *FP32)
    printed = succeeds(search, run, "query", npz, *words, *flags, "--threshold", 0.9999)
    assert Image.open(tmp_path / "x.png").width > 300
    answers = read_json(tmp_path / "x.json")["queries"]
    for answer, (number, name) in zip(answers, asked.items(), strict=True):
        best = answer["best"]
        assert best[0]["name"] == name
        assert best[0]["files"]["tir"] == str(folder / "tir" / f"{name}.png")
        similarity = np.sort(features @ expected[number])[::-1]
        assert [x["similarity"] for x in best] == pytest.approx(similarity[:3], abs=1e-5)
        assert [x["match"] for x in best] == [x["similarity"] >= 0.9999 for x in best]
        assert answer["matches"] == sum(similarity >= 0.9999)
        assert f"   1       1.000  match  {name}" in printed


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
    assert "4 files or folders are left out" in lines[0]
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


@pytest.fixture
def gallery(checkpoint, photos, tmp_path):
    """The query of one RGB photo: `query`, gallery, photo."""
    npz = tmp_path / "gallery.npz"
    succeeds(search, checkpoint, "index", photos[0], "--out", npz)
    return "query", npz, f"rgb={next((photos[0] / 'rgb').rglob('*.png'))}"


def test_a_threshold_of_verify_is_found(checkpoint, gallery):
    chosen = {"threshold": 0.5, "modalities": ["rgb", "nir", "tir"]}
    chosen["checkpoint"] = runtime.fingerprint(checkpoint)
    runtime.write_json(search.threshold_file(checkpoint.parent), chosen)
    out = succeeds(search, checkpoint, *gallery, "--threshold")
    assert "similarity of at least 0.5000" in out
    assert "The threshold is for samples with rgb, nir, tir; here some lack one" in out
    assert "match" not in succeeds(search, checkpoint, *gallery)
    runtime.write_json(search.threshold_file(checkpoint.parent), {**chosen, "threshold": np.nan})
    assert "holds no threshold of this model" in fails(search, checkpoint, *gallery, "--threshold")


def test_mistakes_give_one_line(checkpoint, gallery, photos, tmp_path):
    query, npz, photo = gallery
    (tmp_path / "empty").mkdir()
    arrays = {name: ["a"] for name in ("features", "names", "files", "modalities")}
    np.savez(tmp_path / "other.npz", model="0", **arrays)
    np.savez(tmp_path / "cut.npz", model=runtime.fingerprint(checkpoint), **arrays)
    np.savez(tmp_path / "pickle.npz", features=np.array([{}], dtype=object))
    for argv, message in (
        (("index", tmp_path / "empty"), "has no photos; expected"),
        (("index", tmp_path / "none"), "No such file or directory"),
        (("index", photos[0], "--out", tmp_path / "x.txt"), "a file name that ends in .npz"),
        ((query, tmp_path / "x.npz", photo), "No such file or directory"),
        ((query, tmp_path / "other.npz", photo), "was embedded by another model"),
        ((query, tmp_path / "cut.npz", photo), "its arrays do not fit one another"),
        ((query, tmp_path / "pickle.npz", photo), "expected a file that extras.search index wrote"),
        ((query, checkpoint, photo), "expected a file that extras.search index wrote"),
        ((query, npz, photo, "--top", 0), "expected a whole number of at least 1, not 0"),
        ((query, npz, photo, "--picture", tmp_path / "x.xyz"), "ends in .png"),
        ((query, npz, "uv=a.png"), "expected one of rgb=FILE, nir=FILE, tir=FILE"),
        ((query, npz, photo[4:]), "expected one of rgb=FILE, nir=FILE, tir=FILE"),
        ((query, npz, f"rgb={tmp_path}/none.png"), "none.png"),
    ):
        assert message in fails(search, checkpoint, *argv)
