"""What a data set holds is reported right, raw values are scaled as stated, Market-1501 is read."""

import json

import numpy as np
import pytest
import torch
from conftest import call, tiny_arguments
from PIL import Image

import data
import evaluate
import train
from extras import pictures, report, search, verify
from runtime import UserError


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noise(*shape, high=256, kind=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape).astype(kind)


def folder_set(root, names=("1_c1_0", "1_c2_0", "2_c1_0", "2_c2_0"), tir=None):
    """A data set in the folder layout: RGB of 8 bits, TIR as `tir(number)` says."""
    for split in data.SPLITS:
        for number, name in enumerate(names):
            # Nobody is in train and in the gallery
            own = name if split == "train" else f"10{name}"
            save(root / split / "rgb" / f"{own}.png", noise(16, 32, 3, seed=number))
            pixels = tir(number) if tir else noise(16, 32, seed=number)
            save(root / split / "tir" / f"{own}.tif", pixels)
    return root


def thermal(number):
    """16 bits: 7000 to 7990 in steps of 10, but for a dead pixel of 60000."""
    pixels = np.resize(7000 + 10 * np.arange(100, dtype=np.uint16), (16, 32))
    pixels[0, 0] = 60000
    return pixels


# --- the report


def test_counts_and_sizes_by_hand(tmp_path, capsys):
    root = folder_set(tmp_path)
    save(root / "train/rgb/2_c1_0.png", noise(10, 40, 3))
    (root / "query/tir/101_c2_0.tif").unlink()
    lines = data.check("folder", root)
    assert lines == [f"{root}: query: 101_c2_0 lacks tir"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[:6] == [
        "train: 4 samples, 2 identities, 2 cameras or scenes",
        "  rgb: 4 images, 32x16 (3), 40x10 (1)",
        "  tir: 4 images, 32x16 (4)",
        "query: 4 samples, 2 identities, 2 cameras or scenes",
        "  rgb: 4 images, 32x16 (4)",
        "  tir: 3 images, 32x16 (3)",
    ]


@pytest.fixture(scope="module")
def tiles(tiny_data):
    gallery = data.load_dataset("synthetic", tiny_data).gallery
    images = [gallery[i][0] for i in range(len(gallery))]
    return {m: torch.stack([x[m] for x in images]).float().mean(1) for m in gallery.modalities}


@pytest.mark.parametrize("pair", [("rgb", "nir"), ("rgb", "tir"), ("nir", "tir")])
def test_alignment_of_registered_and_of_shifted_tiles(tiles, pair):
    a, b = (tiles[modality] for modality in pair)
    H, W = a.shape[1:]
    share, shift, agreeing = report.alignment(a, b)
    assert max(map(abs, shift)) <= report.NEAR and share > 0.2 and agreeing > 0.2
    dx, dy = round(0.1 * W), round(0.1 * H)
    rows, columns = (torch.arange(H) - dy).clamp(min=0), (torch.arange(W) + dx).clamp(max=W - 1)
    moved = b[:, rows][:, :, columns]
    share, shift, agreeing = report.alignment(a, moved)
    assert shift == pytest.approx((-0.1, 0.1), abs=0.03) and share < 0.1 and agreeing > 0.2


def test_alignment_of_unrelated_images_is_none():
    a, b = (torch.from_numpy(noise(50, 32, 64, seed=seed)).float() for seed in (1, 2))
    share, _, agreeing = report.alignment(a, b)
    assert share < report.SHARED and agreeing < report.SHARED
    flat = torch.full((3, 32, 64), 7.0)
    assert report.alignment(flat, flat)[1] == (0, 0)  # and no division by zero


def test_a_contact_sheet_shows_each_sensor_side_by_side(tmp_path, monkeypatch):
    grey = lambda value: np.full((16, 32), value, np.uint8)  # noqa: E731
    root = folder_set(tmp_path, ("1_c1_0", "1_c1_1", "1_c3_0", "2_c1_0"), lambda i: grey(10 + i))
    split = data.load_dataset("folder", root).train
    drawn = []
    monkeypatch.setattr(pictures, "sheet", lambda rows, names, path: drawn.append(rows))
    report.contact_sheet(split, tmp_path / "sheet.png")
    (first, second), (third, absent) = drawn[0]
    assert [cell.lines for cell in (first, second, third)] == [
        (title, "rgb | tir") for title in ("1, camera 1", "1, camera 3", "2, camera 1")
    ]
    assert absent.images == {} and absent.lines == ("2, camera 3", "no sample")
    image = second.images[""]
    assert image.shape == (3, 16, 64) and (image[:, :, 32:] == 12).all()
    assert torch.equal(image[:, :, :32], split[2][0]["rgb"])


# --- more than 8 bits


@pytest.mark.parametrize(("suffix", "kind"), [
    ("png", np.uint16), ("tif", np.uint16), ("tiff", np.dtype(">u2")), ("tif", np.float32),
    ("tif", np.int32),
])  # fmt: skip
def test_raw_values_are_scaled_as_stated(tmp_path, suffix, kind):
    raw = np.array([[900, 1000, 1001], [1101, 2000, 30000]], kind)
    path = save(tmp_path / f"deep.{suffix}", raw)
    (pixels,) = data.read_tiles(path, [None], None, (1000, 2000))
    # 0.255 a step: 1001 becomes 0.255, 1101 becomes 25.755
    assert pixels[0].tolist() == [[0, 0, 0], [26, 255, 255]] and torch.equal(pixels[0], pixels[2])
    with pytest.raises(UserError) as refused:
        data.read_image(path)
    assert f"{path}: more than 8 bits a channel, values 900 to 30000" in str(refused.value)
    assert "--tir-range LOW HIGH" in str(refused.value) and "\n" not in str(refused.value)


def test_what_a_camera_left_undefined_is_lowest(tmp_path):
    raw = np.array([[np.nan, 20.0, 30.0]], np.float32)
    path = save(tmp_path / "celsius.tif", raw)
    assert data.read_tiles(path, [None], None, (20, 30))[0, 0].tolist() == [[0, 0, 255]]


def test_8_bits_are_untouched_by_a_range(tmp_path):
    for path in (tmp_path / "a.png", tmp_path / "a.tif"):
        pixels = noise(4, 6)
        (read,) = data.read_tiles(save(path, pixels), [None], None, (1000, 2000))
        assert torch.equal(read[1], torch.from_numpy(pixels))


def test_each_tile_of_a_deep_mosaic_has_its_own_range(tmp_path):
    raw = np.concatenate([np.full((2, 4), 500), np.full((2, 4), 500)], 1).astype(np.uint16)
    path = save(tmp_path / "mosaic.png", raw)
    sample = data.Sample("", 1, 0, {"nir": (path, 0), "tir": (path, 1)})
    split = data.Split([sample], ("nir", "tir"), ranges={"nir": (0, 1000), "tir": (0, 500)})
    assert {name: int(image[0, 0, 0]) for name, image in split[0][0].items()} == {
        "nir": 128, "tir": 255
    }  # fmt: skip


def test_the_store_depends_on_the_range(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = folder_set(tmp_path / "set", tir=thermal)

    def load(ranges):
        return data.load_dataset("folder", root, None, (16, 32), 1, ranges).train

    one, other = load({"tir": (7000, 8000)}), load({"tir": (7000, 7510)})
    assert one.decoded["tir"][0, 0, 0, :4].tolist() == [255, 3, 5, 8]  # 10 are 2.55
    assert other.decoded["tir"][0, 0, 0, :4].tolist() == [255, 5, 10, 15]
    files, others = data.store_files(one), data.store_files(other)
    assert files["rgb"] == others["rgb"] and files["tir"] != others["tir"]
    assert one.subset(one.samples[:2]).ranges == one.ranges


def test_check_suggests_percentiles_once(tmp_path, capsys):
    root = folder_set(tmp_path, tir=thermal)
    lines = data.check("folder", root)
    low, high = 7010, 7990  # of 0, 10, ..., 990 above 7000; the dead pixel is one of 512
    assert lines == [
        f"{root}: tir: 12 images hold more than 8 bits a channel; give a range, e.g."
        f" --tir-range {low} {high}"
    ]
    assert data.check("folder", root, ranges={"tir": (7000, 8000)}) == []
    assert f"percentiles 1 and 99 of their values are {low} and {high}" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--tir-range", 9, 3], "expected LOW below HIGH, not 9 and 3"),
    (["--tir-range", 1], "expected 2 arguments"),
    (["--tir-range", "cold", 3], "expected a number"),
    (["--range", "tir"], "expected NAME=LOW,HIGH, e.g. tir=7000,9500, not tir"),
    (["--range", "tir=1,2,3"], "expected NAME=LOW,HIGH"),
    (["--range", "tir=a,2"], "expected a number"),
])  # fmt: skip
def test_mistakes_in_a_range_give_one_line(words, message):
    done = call(data, "--check", *words)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and message in line


def test_a_range_for_a_sensor_that_is_not_there_is_said(tmp_path, capsys):
    root = folder_set(tmp_path)
    data.load_dataset("folder", root, ranges={"heat": (0.0, 9.0)})
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: --range heat: {root} has no such modality, but rgb, tir"


def test_the_range_of_training_goes_with_the_checkpoint(tmp_path):
    """train.py, evaluate.py and search on 16-bit TIR, which only the first is told how to read."""
    root, out = folder_set(tmp_path / "set", tir=thermal), tmp_path / "run"
    tiny = [*tiny_arguments(root, out), "--dataset", "folder", "--backbone", "small"]
    tiny[tiny.index("--batch-size") + 1] = 4
    tiny += ["--epochs", 1, 0, "--positives", 1, "--workers", 0]
    done = call(train, *tiny)
    assert done.returncode == 2 and "values 7000 to 60000" in done.stderr
    done = call(train, *tiny, "--tir-range", 7000, 8000, "--resume")
    assert done.returncode == 0, done.stderr
    own = json.loads((out / "config.json").read_text())["range"]
    assert own == {"tir": [7000, 8000]}
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert checkpoint["settings"]["range"] == {"tir": (7000.0, 8000.0)}
    done = call(evaluate, out / "last.pt", "--json", tmp_path / "again.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(
        (out / "metrics.json").read_text()
    )
    npz = tmp_path / "gallery.npz"
    done = call(search, out / "last.pt", "index", root / "gallery", "--out", npz)
    assert done.returncode == 0, done.stderr
    embedder, _ = evaluate.load_embedder(out / "last.pt", torch.device("cpu"), workers=0)
    gallery = data.load_dataset("folder", root, None, (32, 64), 0, {"tir": (7000, 8000)}).gallery
    np.testing.assert_allclose(np.load(npz)["features"], embedder.embed(gallery), atol=1e-5)
    other = data.load_dataset("folder", root, None, (32, 64), 0, {"tir": (0, 65535)}).gallery
    assert (embedder.embed(other) - embedder.embed(gallery)).abs().max() > 1e-3
    done = call(verify, out / "last.pt", "--workers", 0)
    assert done.returncode == 0 and "equal error rate" in done.stdout, done.stderr


# --- one modality: Market-1501


def market(root):
    """Two identities to train on, two to test, a distractor and a junk box."""
    names = {
        "bounding_box_train": ["0002_c1s1_000451_03", "0002_c2s1_000301_01", "0007_c3s3_077419_03",
                               "0007_c1s6_028546_01", "-1_c1s1_000401_03"],
        "query": ["0003_c1s6_015971_00", "0004_c3s1_001001_00"],
        "bounding_box_test": ["0003_c3s6_015971_00", "0003_c1s6_000001_00", "0004_c6s1_000001_01",
                              "0000_c1s1_000151_02", "-1_c2s1_000001_00"],
    }  # fmt: skip
    for number, (split, stems) in enumerate(names.items()):
        for place, stem in enumerate(stems):
            save(root / split / f"{stem}.jpg", noise(16, 8, 3, seed=10 * number + place))
        (root / split / "Thumbs.db").write_bytes(b"")
    return root


def test_market1501_junk_is_out_and_distractors_are_in(tmp_path):
    dataset = data.load_dataset("market1501", market(tmp_path))
    found = [[(s.pid, s.key) for s in split.samples] for split in (dataset.train, dataset.query)]
    assert found == [[(2, 0), (2, 1), (7, 0), (7, 2)], [(3, 0), (4, 2)]]
    assert [(s.pid, s.key) for s in dataset.gallery.samples] == [(0, 0), (3, 0), (3, 2), (4, 5)]
    assert dataset.modalities == ("rgb",) and dataset.train[0][0]["rgb"].shape == (3, 16, 8)
    assert data.check("market1501", tmp_path) == []


def test_market1501_trains_and_evaluates(tmp_path):
    assert train.parse(["--dataset", "market1501"]).image_size == (256, 128)
    assert train.parse(["--dataset", "market1501", "--recipe", "plus"]).image_size == (256, 128)
    root, out = market(tmp_path / "Market-1501"), tmp_path / "run"
    tiny = [*tiny_arguments(root, out), "--dataset", "market1501", "--backbone", "small"]
    tiny[tiny.index("--image-size") + 1 : tiny.index("--image-size") + 3] = 32, 16
    tiny[tiny.index("--batch-size") + 1] = 4
    done = call(train, *tiny, "--epochs", 1, 1, "--positives", 1, "--workers", 0)
    assert done.returncode == 0 and "2 queries, 4 gallery samples" in done.stdout, done.stderr
    done = call(evaluate, out / "last.pt", "--json", tmp_path / "again.json")
    figures = json.loads((tmp_path / "again.json").read_text())
    assert figures == json.loads((out / "metrics.json").read_text()) and figures["num_valid"] == 2


# Each query has one match from another camera; the distractor and the other identity are wrong
def test_a_distractor_can_be_ranked_first_but_matches_nothing():
    query, gallery = torch.eye(3)[:2], torch.eye(3)[[0, 0, 1]]
    pids = torch.tensor([3, 4]), torch.tensor([0, 3, 4])
    keys = torch.tensor([0, 0]), torch.tensor([1, 1, 1])
    metrics = evaluate.rank_metrics(query, gallery, *pids, *keys)
    assert metrics.ap.tolist() == [0.5, 1] and metrics.num_valid == 2
