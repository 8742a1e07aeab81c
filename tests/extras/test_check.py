"""What a data set holds is said right, by what it costs; deep images are scaled as stated."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import fails, succeeds
from PIL import Image
from test_data import write_deep

import data
from extras import check, pictures, to_8bit


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def folder_set(root, names=("1_c1_0", "1_c2_0", "2_c1_0", "2_c2_0"), tir=None):
    """A data set in the folder layout: RGB of 8 bits, TIR as `tir(number)` says."""
    for split in data.SPLITS:
        for number, name in enumerate(names):
            own = name if split == "train" else f"10{name}"  # nobody is in train and in the gallery
            save(root / split / "rgb" / f"{own}.png", noise(16, 32, 3, seed=number))
            pixels = tir(number) if tir else noise(16, 32, seed=number)
            save(root / split / "tir" / f"{own}.tif", pixels)
    return root


def test_counts_and_sizes_by_hand(tmp_path):
    root = folder_set(tmp_path)
    save(root / "train/rgb/2_c1_0.png", noise(10, 40, 3))
    (root / "query/tir/101_c2_0.tif").unlink()
    shown = succeeds(check, "--dataset", "folder", "--data-root", root).splitlines()
    assert shown[:6] == [
        "train: 4 samples, 2 identities, 2 cameras or scenes",
        "  rgb: 4 images, 32x16 (3), 40x10 (1)",
        "  tir: 4 images, 32x16 (4)",
        "query: 4 samples, 2 identities, 2 cameras or scenes",
        "  rgb: 4 images, 32x16 (4)",
        "  tir: 3 images, 32x16 (3)",
    ]
    assert shown[-4:] == ["errors: 0", "warnings: 1", "  query: 101_c2_0 lacks tir", "notes: 0"]


def test_errors_block_and_warnings_do_not(tmp_path):
    root = folder_set(tmp_path)
    (root / "train/rgb/1_c1_0.png").write_bytes(b"cut")
    (root / "train/rgb/nameless.heic").touch()
    (root / "readme.txt").touch()
    for name in ("rgb/2_c2_0.png", "tir/2_c2_0.tif"):
        (root / "train" / name).rename(root / "gallery" / name)
        (root / "query" / name).write_bytes((root / "gallery" / name).read_bytes())
    found = data.find("folder", root)
    lines = check.check(found, "folder", found.modalities)[1]
    ((broken,), warnings) = lines["errors"], lines["warnings"]
    assert f"{root}/train/rgb/1_c1_0.png: not an image" in broken
    assert lines["notes"] == [f"readme.txt: {data.BESIDE}"]
    for part, line in zip(
        ["nameless.heic: its name", "identity 2 has a single sample", "query: 2_c2_0 has no match",
         "identity 2 is in the training data and in the gallery"], warnings, strict=True,
    ):  # fmt: skip
        assert part in line
    line = fails(check, "--dataset", "folder", "--data-root", root)
    assert line.endswith("1 errors, 4 warnings, 1 notes; see above")
    lost = data.Split([data.Sample("9", 9, 0, {})], found.modalities)
    kinds = [kind for kind, _ in check.consistency(dict.fromkeys(data.SPLITS, lost))]
    assert kinds == ["errors", "errors"]  # a single identity, seen by a single camera


def test_known_counts_are_compared_and_a_reader_may_go(tmp_path):
    for folder, name in {"train_171": "1", "test": "2"}.items():
        for modality in ("RGB", "NI", "TI"):
            save(tmp_path / folder / modality / f"00000{name}_cam1_0_00.jpg", noise(16, 8, 3))
    command = f"{sys.executable} -m extras.check --dataset rgbnt201 --data-root {tmp_path}"
    done = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True)
    assert done.stdout == "train: 1 samples, 1 identities, 1 cameras or scenes\n"
    assert "Broken" not in done.stderr
    found = data.find("rgbnt201", tmp_path)
    warnings = check.check(found, "rgbnt201", found.modalities)[1]["warnings"]
    assert "query: 1 samples, rgbnt201 is known to have 836" in warnings


@pytest.fixture(scope="module")
def tiles(tiny_data):
    gallery = data.load_dataset("synthetic", tiny_data).gallery
    images = [gallery[i][0] for i in range(len(gallery))]
    return {m: torch.stack([x[m] for x in images]).float().mean(1) for m in gallery.modalities}


@pytest.mark.parametrize("pair", [("rgb", "nir"), ("rgb", "tir"), ("nir", "tir")])
def test_alignment_of_registered_and_of_shifted_tiles(tiles, pair):
    a, b = (tiles[modality] for modality in pair)
    H, W = a.shape[1:]
    shift, agreeing = check.alignment(a, b)
    assert max(map(abs, shift)) <= check.NEAR
    assert agreeing > 0.2
    dx, dy = round(0.1 * W), round(0.1 * H)
    rows, columns = (torch.arange(H) - dy).clamp(min=0), (torch.arange(W) + dx).clamp(max=W - 1)
    shift, agreeing = check.alignment(a, b[:, rows][:, :, columns])
    assert shift == pytest.approx((-0.1, 0.1), abs=0.03)
    assert agreeing > 0.2


def test_alignment_of_unrelated_images_is_none():
    a, b = (torch.from_numpy(noise(50, 32, 64, seed=seed)).float() for seed in (1, 2))
    assert check.alignment(a, b)[1] < check.AGREEING
    flat = torch.full((3, 32, 64), 7.0)
    assert check.alignment(flat, flat)[0] == (0, 0)  # and no division by zero


def test_a_contact_sheet_shows_identities_by_cameras(tmp_path, monkeypatch):
    root, drawn = folder_set(tmp_path, ("1_c1_0", "1_c1_1", "1_c3_0", "2_c1_0")), []
    monkeypatch.setattr(pictures, "sheet", lambda *given: drawn.append(given))
    train = data.load_dataset("folder", root).train
    check.contact_sheet(train, tmp_path / "sheet.png")
    ((rows, modalities, path),) = drawn
    assert (modalities, path) == (("rgb", "tir"), tmp_path / "sheet.png")
    titles = [[cell.lines for cell in row] for row in rows]
    assert titles == [[("1, camera 1",), ("1, camera 3",)],
                      [("2, camera 1",), ("2, camera 3: none",)]]  # fmt: skip
    assert torch.equal(rows[0][1].images["tir"], train[2][0]["tir"])
    assert rows[1][1].images == {}


# --- more than 8 bits


@pytest.mark.parametrize("kind", [np.uint16, np.dtype(">u2"), np.int32, np.float32])
def test_raw_values_are_scaled_as_stated(tmp_path, kind):
    """A range of 1000: 0.255 a step, so 1001 becomes 0.255 and 1101 becomes 25.755."""
    raw = np.array([[900, 1000, 1001], [1101, 2000, 30000]], kind)
    root = folder_set(tmp_path / "in", tir=lambda _: raw)
    save(root / "train/rgb/9_c1_0.tif", raw)
    write_deep(root, "colour.png")
    (root / "notes.txt").write_text("stay")
    out, options = tmp_path / "out", ["--low", 1000, "--high", 2000, "--only", "tir"]
    assert "27 files, of which 12 were reduced" in succeeds(to_8bit, root, out, *options)
    reduced = np.asarray(Image.open(out / "gallery/tir/101_c1_0.tif"))
    assert reduced.tolist() == [[0, 0, 0], [26, 255, 255]]
    assert (out / "notes.txt").read_text() == "stay"
    rgb = "query/rgb/101_c2_0.png"
    assert (out / rgb).read_bytes() == (root / rgb).read_bytes()
    succeeds(to_8bit, out, tmp_path / "again", "--low", 4000, "--high", 9500)
    colour = data.read_image(tmp_path / "again/colour.png")
    assert np.asarray(colour).tolist() == [[[0, 139, 255], [0, 0, 0]]]
    suggested = succeeds(to_8bit, root)
    assert "tir: 12 images of more than 8 bits: --low 900 --high " in suggested


def test_mistakes_of_a_range_are_one_line_and_leave_nothing(tmp_path):
    root, out = folder_set(tmp_path / "in"), tmp_path / "out"
    for options in ([out, "--low", 9, "--high", 3], [out, "--low", 9], ["--low", 3, "--high", 9],
                    [root, "--low", 3, "--high", 9], [out]):  # fmt: skip
        assert "expected FOLDER NEW_FOLDER --low LOW --high HIGH" in fails(to_8bit, root, *options)
    (root / "broken.png").write_bytes(b"cut")
    assert "broken.png: cannot be read" in fails(to_8bit, root, out, "--low", 3, "--high", 9)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
