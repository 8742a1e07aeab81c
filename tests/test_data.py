"""Data sets: every layout comes out as the same tiles, identities and cameras, in one order.

What is missing, broken, misnamed or not taken is named; what is read is what a viewer shows; with
the store, threads and without, pixels are the same; triplets and augmentation are as section 5 has
them.
"""

import base64
import contextlib
import os
import pickle
import re
import signal
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import runtime
from runtime import UserError

CPU = torch.device("cpu")
COLOURS = {"rgb": (255, 0, 0), "nir": (0, 255, 0), "tir": (0, 0, 255)}
NAMES = {  # of RGBNT100, not in order
    "bounding_box_train": ["0503_c0008_001", "0501_c0001_010", "0501_c0002_000"],
    "query": ["0502_c0003_000"],
    "bounding_box_test": ["0504_c0001_000", "0502_c0003_000"],
}


def save(path, *colours, size=(32, 16)):
    """One file of tiles of these colours side by side, or of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(zlib.crc32(path.name.encode()))
    tiles = [np.full((size[1], size[0], 3), colour, np.uint8) for colour in colours]
    tiles = tiles or [draw.integers(0, 256, (size[1], size[0], 3), np.uint8)]
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(np.concatenate(tiles, 1)).save(path, **options)
    return path


def write_rgbnt100(root, layout=1, size=(32, 16), tiles=3):
    colours = list(COLOURS.values())[:tiles]
    for split, names in NAMES.items():
        for name in names:
            if layout == 1 or (layout == 3 and split == "query"):
                save(root / f"rgbir/{split}/{name}.jpg", *colours, size=size)
                continue
            part = "train" if split.endswith("train") else "validate"
            for folder, colour in zip("RNT", colours, strict=True):
                places = {2: f"reid_set_{folder}/{split}", 3: f"{part}/{folder}/{name[:4]}"}
                save(root / places[layout] / f"{name}.jpg", colour)
    return root


def write_folder(root, names=("1_c1_0", "1_c2_0", "2_c1_0"), modalities=("rgb", "tir")):
    for split in data.SPLITS:
        for modality in modalities:
            for name in names:
                save(root / split / modality / f"{name}.png")
    return root


def write_noise(root):
    for split, names in NAMES.items():
        for name in names:
            save(root / f"rgbir/{split}/{name}.png", size=(96, 16))
    return root


def load_train(root, store_gb=0.0, modalities=None, size=(12, 20)):
    return data.load_dataset("rgbnt100", root, modalities, size, store_gb).train


def splits_of(dataset):
    return dataset.train, dataset.query, dataset.gallery


def assert_tiles(images, size, names=COLOURS):
    assert list(images) == list(names)
    for modality, image in images.items():
        assert (image.dtype, image.shape) == (torch.uint8, (3, *size))
        difference = image - torch.tensor(COLOURS[modality]).view(3, 1, 1)
        assert difference.abs().max() < 8  # JPEG is not exact


# --- layouts


@pytest.mark.parametrize("below", ["", "RGBNT100"])
@pytest.mark.parametrize("layout", [1, 2, 3])
def test_rgbnt100(tmp_path, layout, below):
    write_rgbnt100(tmp_path / below, layout)
    dataset = data.load_dataset("rgbnt100", tmp_path)
    assert dataset.modalities == ("rgb", "nir", "tir")
    for split, names in zip(splits_of(dataset), NAMES.values(), strict=True):
        assert [s.name.rpartition("/")[2] for s in split.samples] == sorted(names)
        for i, name in enumerate(sorted(names)):
            images, *numbers = split[i]
            assert_tiles(images, (16, 32))
            assert numbers == [int(name[:4]), int(name[6:10]) - 1]
            assert numbers == [split.pids[i], split.keys[i]]


@pytest.mark.parametrize("tiles", [2, 3])
def test_rgbn300_takes_the_first_two_tiles_of_any_size_and_resizes_them_alone(tmp_path, tiles):
    write_rgbnt100(tmp_path, size=(256, 128), tiles=tiles)
    for size in ((128, 256), (24, 40)):
        query = data.load_dataset("rgbn300", tmp_path, image_size=size).query
        assert_tiles(query[0][0], size, ["rgb", "nir"])


OTHERS = {  # folders of a name; of the modalities; then, of each split: folder, name, pid and key
    "rgbnt201": ("{split}/{modality}", ("RGB", "NI", "TI"), [
        ("train_171", "000009_cam3_1_00", 9, 2), ("test", "000258_cam1_0_00", 258, 0),
        ("test", "000258_cam1_0_00", 258, 0),
    ]),
    "msvr310": ("{split}/{name:.4}/{modality}", ("vis", "ni", "th"), [
        ("bounding_box_train", "0001_s002_v4_002", 1, 2), ("query3", "0002_s013_v1_002", 2, 13),
        ("bounding_box_test", "0002_s002_v0_000", 2, 2),
    ]),
    "wmveid863": ("{split}/{pid:04}/{modality}", ("vis", "ni", "th"), [
        ("train", "v1_n1_s999_011", 471, 0), ("query", "v2_n0_s101_001", 472, 1),
        ("test", "v3_n0_s101_002", 472, 2),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_benchmarks(tmp_path, capsys, name):
    pattern, folders, samples = OTHERS[name]
    for split, stem, pid, _ in samples:
        for modality, colour in zip(folders, COLOURS.values(), strict=True):
            folder = tmp_path / pattern.format(split=split, modality=modality, name=stem, pid=pid)
            save(folder / f"{stem}.jpg", colour)
    dataset = data.load_dataset(name, tmp_path, image_size=(16, 32))
    for split, (_, _, pid, key) in zip(splits_of(dataset), samples, strict=True):
        assert_tiles(split[0][0], (16, 32))
        assert [(s.pid, s.key) for s in split.samples] == [(pid, key)]
    dataset.query.samples[0].images["tir"][0].unlink()  # a sensor failed
    assert list(data.load_dataset(name, tmp_path).query[0][0]) == ["rgb", "nir"]
    assert "1 of 1 query samples lack a modality (ranked by" in capsys.readouterr().err


def test_market1501_junk_is_out_and_distractors_are_in(tmp_path, capsys):
    for split, stems in {
        "bounding_box_train": "0002_c1s1_000451_03 0007_c3s3_077419_03 -1_c1s1_000401_03",
        "query": "0003_c1s6_015971_00",
        "bounding_box_test": "0003_c3s6_015971_00 0000_c1s1_000151_02 -1_c2s1_000001_00",
    }.items():
        for stem in stems.split():
            save(tmp_path / split / f"{stem}.jpg", size=(8, 16))
        (tmp_path / split / "Thumbs.db").touch()
    dataset = data.load_dataset("market1501", tmp_path)
    found = [[(s.pid, s.key) for s in split.samples] for split in splits_of(dataset)]
    assert found == [[(2, 0), (7, 2)], [(3, 0)], [(0, 0), (3, 2)]]
    assert dataset.train[0][0]["rgb"].shape == (3, 16, 8)
    assert "not taken" not in capsys.readouterr().err


def test_a_folder_pairs_by_name_whatever_the_suffix(tmp_path):
    root = write_folder(tmp_path, ("7_c1_a", "12_c4_b"), ("heat", "tir", "A-1", "rgb"))
    save(root / "train/tir/7_c1_a.webp", (9, 9, 9)).with_suffix(".png").unlink()
    dataset = data.load_dataset("folder", root)
    assert dataset.modalities == ("rgb", "tir", "A-1", "heat")
    assert (dataset.mean["heat"], dataset.std["heat"]) == data.IMAGENET
    found = [(s.name, s.pid, s.key) for s in dataset.train.samples]
    assert found == [("12_c4_b", 12, 3), ("7_c1_a", 7, 0)]
    assert list(dataset.train[1][0]) == ["rgb", "tir", "A-1", "heat"]
    assert dataset.train[1][0]["tir"].unique().tolist() == [9]


def test_a_csv_names_files_identities_and_cameras_as_it_likes(tmp_path, capsys):
    for name in ("a.jpg", "b.png", "sub/c.webp"):
        save(tmp_path / name)
    table, head = tmp_path / "table.csv", "split,identity,rgb,camera,night-cam\n"
    rows = "train,red bus,a.jpg,gate 2,b.png\nquery,red bus,sub/c.webp,gate 1,\n"
    rows += f"gallery,van,{tmp_path}/a.jpg,gate 2,b.png\ntest,van,a.jpg,,b.png\n"
    table.write_text(head + rows, "utf-8-sig")
    dataset = data.load_dataset("csv", table)
    found = [(s.name, s.pid, s.key) for split in splits_of(dataset) for s in split.samples]
    assert found == [("red bus_cgate 2_000002", 0, 0), ("red bus_cgate 1_000003", 0, 1),
                     ("van_cgate 2_000004", 1, 0)]  # fmt: skip
    assert list(dataset.query[0][0]) == ["rgb"]
    assert list(dataset.train[0][0]) == ["rgb", "night-cam"]
    text = "1 rows were not taken: line 5 (split 'test': expected train, query, gallery)"
    assert text in capsys.readouterr().err
    for content in (
        b"",
        b"split,identity\n",
        b"\xff\xfe",
        head.replace("night-", "type.").encode(),
    ):
        table.write_bytes(content)
        with pytest.raises(UserError, match=str(table)):
            data.load_dataset("csv", table)


@pytest.mark.parametrize("store_gb", [0, 1])
def test_modalities_come_in_the_data_sets_order_however_they_are_typed(tmp_path, store_gb):
    write_rgbnt100(tmp_path)
    dataset = data.load_dataset("rgbnt100", tmp_path, ("tir", "rgb"), (16, 32), store_gb)
    assert dataset.modalities == ("rgb", "tir")
    assert dataset.mean == {"rgb": (0.276, 0.271, 0.274), "tir": (0.761, 0.329, 0.322)}
    (images,) = data.read_batches(dataset.query, [[0]], 0, CPU)
    assert_tiles({name: image[0] for name, image in images.items()}, (16, 32), ["rgb", "tir"])
    assert list(dataset.train.restricted(("tir",))[0][0]) == ["tir"]


# --- what is missing, misnamed or not taken


def test_lacking_modalities_are_counted_and_drop_training_samples_only(tmp_path, capsys):
    root = write_folder(tmp_path)
    for split in data.SPLITS:
        (root / split / "tir/1_c2_0.png").unlink()
    dataset = data.load_dataset("folder", root)
    assert [sample.name for sample in dataset.train.samples] == ["1_c1_0", "2_c1_0"]
    assert [len(dataset.query), len(dataset.gallery)] == [3, 3]
    assert list(dataset.query[1][0]) == ["rgb"]
    train, *others = capsys.readouterr().err.splitlines()
    text = "warning: 1 of 3 {} samples lack a modality ({}): 1_c2_0"
    assert train == text.format("train", "1 of them are left out")
    fate = "ranked by what they have"
    assert others == [text.format(split, fate) for split in ("query", "gallery")]
    alone = data.load_dataset("folder", root, ("tir",))
    assert [len(split) for split in splits_of(alone)] == [2, 2, 2]
    assert capsys.readouterr().err.count("(1 of them are left out): 1_c2_0") == 3


def test_counts_other_than_the_known_ones_warn(tmp_path, capsys):
    data.load_dataset("rgbnt100", write_rgbnt100(tmp_path))
    found = re.findall(r"(\w+) has (\d) samples, .* known to have (\d+)", capsys.readouterr().err)
    assert found == [("train", "3", "8675"), ("query", "1", "1715"), ("gallery", "2", "8575")]


def test_what_systems_leave_in_folders_is_no_data(tmp_path, capsys):
    root = write_folder(tmp_path)
    for name in ("._1_c1_0.png", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "desktop.ini"):
        save(root / "train" / name / "1_c1_0.png")
        (root / "train/rgb" / name).write_bytes(b"Mac OS X")
    dataset = data.load_dataset("folder", root)
    assert dataset.modalities == ("rgb", "tir")
    assert len(dataset.train) == 3
    assert capsys.readouterr().err == ""


def test_everything_else_that_is_not_taken_is_counted_and_named(tmp_path, capsys):
    root, elsewhere = write_folder(tmp_path), save(tmp_path / "elsewhere/any.png")
    for name in ("holiday", "monday/3_c1_0", "../1_c1_0", "20240102030405060708_c1_0"):
        save(root / "train/rgb" / f"{name}.png")  # the last is a number of more than 64 bits
    save(root / "train/rgb/1_c1_0.jpg")
    (root / "train/rgb/3_c1_0.heic").touch()
    (root / "train/rgb/4_c1_0.png").symlink_to(root / "nowhere.png")
    for modality in ("rgb", "tir"):  # as DVC and Hugging Face lay out a cache
        (root / f"train/{modality}/9_c1_0.png").symlink_to(elsewhere)
    found = data.find("folder", root)
    names = [sample.name for sample in found.samples["train"]]
    assert names == ["1_c1_0", "1_c2_0", "2_c1_0", "9_c1_0"]
    assert found.not_taken == {
        "elsewhere": data.BESIDE,
        "train/1_c1_0.png": "its path or name is not as expected",
        "train/rgb/1_c1_0.png": "the same sample as 1_c1_0.jpg",
        "train/rgb/20240102030405060708_c1_0.png": "its path or name is not as expected",
        "train/rgb/3_c1_0.heic": "its name does not end in .jpg .jpeg .png .bmp .tif .tiff .webp",
        "train/rgb/4_c1_0.png": "a link to a file that is not there",
        "train/rgb/holiday.png": "its path or name is not as expected",
        "train/rgb/monday": "a folder, where files are expected",
    }
    data.load_dataset("folder", root)
    assert f"{root}: 7 files were not taken: train/1_c1_0.png (its" in capsys.readouterr().err


@pytest.mark.parametrize("need", [("train",), ("query", "gallery")])
def test_splits_that_are_not_needed_may_be_empty(tmp_path, need):
    for split in need:
        save(tmp_path / split / "rgb/1_c1_0.png")
    dataset = data.load_dataset("folder", tmp_path, need=need)
    assert [len(split) for split in splits_of(dataset)] == [int(s in need) for s in data.SPLITS]
    with pytest.raises(UserError, match="no usable images in .*; expected {train,query"):
        data.load_dataset("folder", tmp_path)


def test_errors_of_finding_are_one_line(tmp_path):
    def refused(*given):
        with pytest.raises(UserError) as error:
            data.load_dataset(*given)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "'rgbnt1000': expected one of" in refused("rgbnt1000", tmp_path)
    assert "nowhere: no such folder; --data-root" in refused("rgbnt100", tmp_path / "nowhere")
    line = refused("rgbnt100", tmp_path)
    for expected in ("rgbir/{bounding_box_train,query,bounding_box_test}/0471_c0001_000.jpg",
                     "{train,validate,validate}/{R,N,T}/0471/0471_c0001_000.jpg"):  # fmt: skip
        assert expected in line
    line = refused("rgbnt100", write_rgbnt100(tmp_path), ("rgb", "xray"))
    assert line.endswith("no modality xray; expected some of rgb,nir,tir")
    save(tmp_path / "odd/train/rgb/portrait.png")
    assert "1 files were not taken: train/rgb/portrait.png" in refused("folder", tmp_path / "odd")
    command = f"run python -m synthetic.render --out {tmp_path}/synthetic"
    assert command in refused("synthetic", tmp_path)  # reading creates nothing
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic/VERSION").write_text("0\n")
    assert "found version 0 of the synthetic set, expected" in refused("synthetic", tmp_path)


@pytest.mark.parametrize(
    "name", ["nir.850", "ir [850nm]", "a,b", "é", "-x", "type", "values", "training", "embedding"]
)
def test_a_sensor_that_cannot_be_named_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="rename it; expected"):
        data.load_dataset("folder", write_folder(tmp_path, modalities=("rgb", name)))


def test_file_names_may_hold_any_bytes(tmp_path):
    root = write_folder(tmp_path)
    for path in root.glob("*/*/1_c1_0.png"):
        os.rename(path, os.fsencode(path.parent) + b"/1_c1_Stra\xdfe\x07.png")
    train = data.load_dataset("folder", root, None, (8, 8), 1).train
    assert train.samples[0].name == r"1_c1_Stra\udcdfe\x07"
    assert train[0][0]["rgb"].equal(train.decoded["rgb"][0])
    assert len(train.digest()) == 64


def test_the_digest_tells_which_samples_there_are(tmp_path):
    root = write_folder(tmp_path)
    before = data.load_dataset("folder", root).train.digest()
    save(root / "train/rgb/1_c1_0.png", (1, 2, 3))  # other pixels are other files, not samples
    assert data.load_dataset("folder", root).train.digest() == before
    assert data.load_dataset("folder", root, ("rgb",)).train.digest() != before
    for modality in ("rgb", "tir"):
        save(root / f"train/{modality}/2_c1_1.png")
    assert data.load_dataset("folder", root).train.digest() != before


# --- reading images


# Two pixels, 4000, 7000, 9500, 65535 and 1, 2, 3, 4, as far as there are channels. Pillow cannot
# write these kinds: 16 bits, chunky and planar, and (the same modulo 256) signed 8 bits
DEEP = {
    "grey alpha.png": "c-rd>@N?(olHy`uVBq!ia0vp^OhC*izyc)sc4s>QDM3#c$B>FS$q(WcWDg!Vae#$^-GNa}tjTQ"
    "yP?EvZ)z4*}Q$iB}{*@4n",
    "colour.png": "c-rd>@N?(olHy`uVBq!ia0vp^OhC*i03x+7n9KuGqMj~}Ar*6yAH*xjF4Q`F;KYF=2Y48G4>D%OUF+"
    "KfRKVcr>gTe~DWM4fk5Lrw",
    "colour alpha.png": "c-rd>@N?(olHy`uVBq!ia0vp^OhC*izy>6jY+8I0NJ)CSIEGZrNq!KoAiGfO^M8A0WoBV!V`"
    "gp!H9zJYMUBaFKt&9mu6{1-oD!M<skIU^",
    "colour.tif": "c-r&y)MDUZU|`^8U|?inU<9(5fS3`=2J?YzW*|Kch?$YZ*^tx=LfOxNSQN?z=@COxFAin%0I>{`cre"
    "ubMGOcafP@*5Fu7m>e}uG*DkIRX%nSh52?ez",
    "planar.tif": "c-r&y)MDUZU|`^8U|?inU<9(5fS3`=2J?YzW*|Kch?$YZ*^tx=Le(q+Vo|6#h%bhuUL2}s9T3YP=?#"
    "X8?_xjz0VMnkh+hHmJ0NC3!i-3m5Lm#^$PgjT#2}-}%m4t{G6?z",
    "signed.tif": "c-r&y)MDUZU|`^8U|?inU<9(5fS3`=2J@k8kSb;*aW*8jAe8+Kh((da#gN$INao8Ri3cNz(+VtL1OV"
    "Zb1A7",
}  # fmt: skip


def write_deep(folder, name):
    (folder / name).write_bytes(zlib.decompress(base64.b85decode(DEEP[name])))
    return folder / name


def test_what_is_read_is_what_a_viewer_shows(tmp_path):
    grey = Image.fromarray(np.full((16, 32), 100, np.uint8))
    for kind in ("L.png", "P.png", "1.png", "LA.png", "RGBA.png", "CMYK.jpg", "RGB.webp", "L.tif"):
        shown = grey.convert(kind.partition(".")[0])
        shown.save(tmp_path / kind, quality=100)
        image = data.read_image(tmp_path / kind)
        assert (image.mode, image.size) == ("RGB", (32, 16))
        assert np.abs(np.asarray(image, int) - np.asarray(shown.convert("RGB"), int)).max() <= 1
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    grey.save(tmp_path / "turned.jpg", exif=turned)
    assert data.read_image(tmp_path / "turned.jpg").size == (16, 32)
    Image.fromarray(np.array([[[9, 8, 7, 255], [9, 8, 7, 0]]], np.uint8)).save(tmp_path / "a.png")
    assert np.asarray(data.read_image(tmp_path / "a.png")).tolist() == [[[9, 8, 7], [0, 0, 0]]]


def test_more_than_8_bits_are_refused_whatever_the_format(tmp_path):
    files = [write_deep(tmp_path, name) for name in DEEP]
    for kind in (np.uint16, np.dtype(">u2"), np.int32, np.float32):
        files.append(tmp_path / f"{np.dtype(kind).str}.tiff")
        Image.fromarray(np.array([[4000, 7000]], kind)).save(files[-1])
    for path in files:
        with pytest.raises(UserError, match=r"more than 8 bits .* python -m extras\.to_8bit") as no:
            data.read_image(path)
        assert str(path) in str(no.value)


def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "other.gif")
    (tmp_path / "other.gif").rename(tmp_path / "gif.png")
    Image.new("1", (12000, 9000)).save(tmp_path / "phone.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    for name, message in {
        "empty.png": "not an image .*; replace or remove", "gif.png": "not an image",
        "gone.png": r"\(No such file or directory\); ", "folder.png": r"\(Is a directory\); ",
        "phone.png": "12000x9000 pixels.*; expected at most 67 million pixels; downscale",
        "bomb.png": "400000000 pixels.*; expected at most 67 million pixels; downscale",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message) as refused:
            data.read_image(tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (16, 48)])
def test_resized_as_pillow_resizes(tmp_path, size):
    path = save(tmp_path / "mosaic.png", size=(160, 40))
    images = {"rgb": (path, 0), "nir": (path, 1)}
    split = data.Split([data.Sample("", 1, 0, images)], ("rgb", "nir"), size)
    for i, found in enumerate(split[0][0].values()):
        tile = Image.open(path).crop((80 * i, 0, 80 * i + 80, 40))
        tile = np.asarray(tile.resize(size[::-1], Image.Resampling.BICUBIC))
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - tile).max() <= 2


@pytest.mark.parametrize("width", [32, 64, 100])
def test_a_broken_file_shows_when_a_split_is_opened(tmp_path, width):
    """Of a mosaic the head tells the wrong width; what is cut shows where it is decoded."""
    path = save(write_rgbnt100(tmp_path) / "rgbir/query/0502_c0003_000.jpg", size=(width, 16))
    with pytest.raises(UserError, match=f"{path}: is {width}x16 pixels; expected a mosaic of"):
        data.load_dataset("rgbnt100", tmp_path).query.open()
    for size, store_gb in ((100, 0), (-9, 1)):
        path.write_bytes(save(path, *COLOURS.values()).read_bytes()[:size])
        with pytest.raises(UserError, match=f"{path}: not an image"):
            data.load_dataset("rgbnt100", tmp_path, None, (8, 8), store_gb).query.open()


# --- the store and batches


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/graft"


def test_from_the_store_by_threads_and_one_by_one_images_are_the_same(tmp_path, store):
    train, stored = load_train(write_noise(tmp_path)), load_train(tmp_path, 1)
    stored.open()
    assert [path.suffix for path in store.iterdir()] == [".npy"] * 3
    assert str(store) in Path("/proc/self/maps").read_text()  # one copy for all ranks
    batches = [[2, 0], [1], [1, 1, 2]]
    ways = [data.read_batches(split, batches, workers, CPU)
            for split, workers in ((train, 2), (train, 0), (stored, 2))]  # fmt: skip
    for batch, *read in zip(batches, *ways, strict=True):
        for modality in train.modalities:
            expected = torch.stack([train[i][0][modality] for i in batch])
            assert all(torch.equal(images[modality], expected) for images in read)


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the files that are decoded."""
    paths, read_image = [], data.read_image

    def noted(path, tile):
        paths.append(path)
        return read_image(path, tile)

    monkeypatch.setattr(data, "read_image", noted)
    return paths


def test_no_file_is_decoded_twice_unless_it_has_changed(tmp_path, store, decoded):
    folder = write_noise(tmp_path) / "rgbir/bounding_box_train"

    def load(*modalities):
        decoded.clear()
        return load_train(tmp_path, 1, modalities).decoded, len(decoded)

    first, count = load("rgb", "tir")
    assert count == 3
    again, count = load("tir")
    assert again["tir"].equal(first["tir"])
    assert count == 0
    assert load()[1] == 3  # for nir alone
    one, two, _ = sorted(folder.iterdir())
    for path in (one, two):
        path.write_bytes(path.read_bytes().ljust(6000))
        os.utime(path, (9, 9))
    assert load()[1] == 3
    for path, name in ((one, "spare"), (two, one.name), (folder / "spare", two.name)):
        path.rename(folder / name)  # swapped: neither size nor time tells it
    assert load()[0]["rgb"][0].equal(first["rgb"][1])


def test_a_store_holds_samples_that_lack_a_sensor(tmp_path, store):
    for modality, names in {"rgb": "12", "nir": "2"}.items():
        for split in data.SPLITS:
            for name in names:
                colour = (int(name), 10, len(modality))
                save(tmp_path / split / modality / f"0001_c{name}_0.png", colour)
    query = data.load_dataset("folder", tmp_path, None, (8, 8), 1).query
    one, two = data.read_batches(query, [[0], [1]], 0, CPU)
    assert [list(one), list(two)] == [["rgb"], ["rgb", "nir"]]
    assert one["rgb"].unique().tolist() == [1, 3, 10]
    assert two["nir"].unique().tolist() == [2, 3, 10]


def test_where_the_store_has_no_room_images_are_decoded_each_time(
    tmp_path, store, monkeypatch, capsys
):
    write_noise(tmp_path)
    gigabyte = 3 * 3 * 3 * 12 * 20 / 1e9  # what the training split takes

    def warning(store_gb, size=(12, 20)):
        train = load_train(tmp_path, store_gb, None, size)
        capsys.readouterr()
        train.open()
        assert len(list(data.read_batches(train, [[0, 1]], 0, CPU))) == 1
        return capsys.readouterr().err

    assert "do not fit in" in warning(gigabyte * 0.99)
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        assert "half of the free space" in warning(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: os.stat("/full/disk"))
        assert "cannot be kept" in warning(1)
    assert list(store.iterdir()) == []
    assert warning(gigabyte * 1.2) == ""
    assert "delete old files there" in warning(gigabyte * 1.2, (12, 18))
    assert len(list(store.iterdir())) == 3
    file = data.store_files(load_train(tmp_path))["nir"]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file}: is damaged .*; delete it, and it will be"):
        warning(1)


def test_a_signal_while_decoding_leaves_nothing_half_made(tmp_path, store, monkeypatch):
    train, read_image = load_train(write_noise(tmp_path), 1), data.read_image
    once = threading.Lock()

    def signalled(*given):
        if once.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGTERM)
        return read_image(*given)

    monkeypatch.setattr(data, "read_image", signalled)
    with pytest.raises(runtime.Stopped, match="while decoding images: run the same command again"):
        train.open()
    assert list(store.iterdir()) == []


def test_a_signal_ends_the_wait_for_a_batch_that_never_comes(tmp_path, monkeypatch):
    train = load_train(write_noise(tmp_path))
    monkeypatch.setattr(data, "PATIENCE", 0.1)
    monkeypatch.setattr(data, "read_image", lambda *given: time.sleep(100))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(runtime.Stopped, match="waiting for a file"), runtime.deferred_signals():
        list(data.read_batches(train, [[0], [1]], 2, CPU))


def test_reading_leaves_torchs_threads_as_they_were(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    next(data.read_batches(load_train(write_noise(tmp_path)), [[0], [1]], 2, CPU))
    with ThreadPool(1) as pool:
        assert pool.apply(torch.get_num_threads) == torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_split_goes_to_processes_that_are_spawned(tmp_path):
    """As macOS, Windows and Python 3.14 start them; torch moves the tensors that it sends."""
    train = load_train(write_noise(tmp_path))
    sampler = data.TripletSampler(train.pids, 2, 1, 0)
    sent = ForkingPickler.dumps(train)
    assert not np.shares_memory(sampler.pids, train.pids.numpy())
    assert pickle.loads(sent)[0][0]["tir"].equal(train[0][0]["tir"])


def test_the_next_batches_are_sent_while_this_one_is_used(tmp_path, monkeypatch):
    """On a pretended GPU: two batches ahead and no more; errors reach the reader."""
    events = []
    stream = SimpleNamespace(record_event=lambda: "sent", wait_event=events.append)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: events.append("kept"))
    monkeypatch.setattr(runtime, "to_device", lambda images, _: events.append("read") or images)
    train = load_train(write_noise(tmp_path))
    reader = data.read_batches(train, [[0], [1], [2], [0], [1]], 1, torch.device("cuda"))
    assert next(reader)["nir"][0].equal(train[0][0]["nir"])
    deadline = time.monotonic() + 20
    while events.count("read") < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert Counter(events) == {"read": 3, "sent": 1, "kept": 3}
    train.samples[1].images["rgb"][0].write_bytes(b"")
    with pytest.raises(UserError, match="not an image"):
        list(reader)


# --- triplets

PIDS = np.array([5, 7, 5, 3, 9, 5, 3, 7, 5, 3, 5])  # 5: five samples, 3: three, 7: two, 9: one


def test_hold_out():
    rows = [(9, 0), (4, 0), (7, 1), (9, 0), (7, 0), (9, 3), (7, 1), (2, 5)]
    samples = [data.Sample(f"{i}", pid, key, {}) for i, (pid, key) in enumerate(rows)]
    parts = data.hold_out(data.Split(samples, ("rgb",)), 2)
    names = ["".join(sample.name for sample in part.samples) for part in parts]
    assert names == ["17", "0245", "023456"]


def test_triplets():
    triplets = data.make_triplets(PIDS, 3, np.random.default_rng(0))
    anchors, positives, negatives = triplets.T
    assert (PIDS[anchors] == PIDS[positives]).all()
    assert (anchors != positives).all()
    assert (PIDS[anchors] != PIDS[negatives]).all()
    assert Counter(anchors.tolist()) == {i: 3 for i in range(11) if i != 4}
    for anchor in set(anchors.tolist()):
        used = positives[anchors == anchor]
        assert len(set(used.tolist())) == {5: 3, 3: 2, 7: 1}[PIDS[anchor]]
    assert (np.diff(anchors) != 0).sum() > 15  # unshuffled, 10 anchors of 3 rows change 9 times
    large = data.make_triplets(np.repeat([3, 1, 2], [300, 2, 90]), 2, np.random.default_rng(0))
    assert zlib.crc32(large.astype("<i8").tobytes()) == 1016271451  # those of all runs before


def test_positives_and_negatives_are_drawn_from_all_others_evenly():
    draws = [data.make_triplets(PIDS, 2, np.random.default_rng(seed)) for seed in range(300)]
    drawn = np.concatenate(draws)
    for anchor in set(range(11)) - {4}:
        rows = drawn[drawn[:, 0] == anchor]
        same = {i for i in range(11) if PIDS[i] == PIDS[anchor] and i != anchor}
        other = {i for i in range(11) if PIDS[i] != PIDS[anchor]}
        for column, expected in ((1, same), (2, other)):
            counts = Counter(rows[:, column].tolist())
            assert set(counts) == expected
            assert all(0.6 < count * len(expected) / 600 < 1.5 for count in counts.values())


@pytest.mark.parametrize(("n", "positives"), [(15_000, 1), (15_000, 8), (1050, 1049)])
def test_many_frames_of_one_identity_take_little_memory(n, positives):
    """Not n x n numbers; positives are distinct all the same, and near and far ones as likely."""
    pids = np.r_[np.zeros(n, int), 1, 1]
    tracemalloc.start()
    triplets = data.make_triplets(pids, positives, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    anchors, positive, negative = triplets[triplets[:, 0] < n].T
    assert (np.bincount(anchors) == positives).all()
    assert (pids[positive] == 0).all()
    assert (positive != anchors).all()
    assert len(np.unique(anchors * n + positive)) == n * positives
    assert (pids[negative] == 1).all()
    far = np.bincount((positive - anchors) % n * 10 // n, minlength=10) / len(anchors)
    assert (abs(far - 0.1) < 0.02).all()


def test_steps_of_triplets():
    sampler = data.TripletSampler(torch.from_numpy(PIDS), 4, 2, seed=3)
    first = sampler.steps(0)
    assert first.shape == (sampler.num_steps, 3, 4) == (20 // 4, 3, 4)
    anchors, positives, negatives = PIDS[first].transpose(1, 0, 2)
    assert (anchors == positives).all()
    assert (anchors != negatives).all()
    assert Counter(first[:, 0].ravel().tolist()) == {i: 2 for i in range(11) if i != 4}
    assert np.array_equal(first, sampler.steps(0))
    assert not np.array_equal(first, sampler.steps(1))
    other_seed = data.TripletSampler(torch.from_numpy(PIDS), 4, 2, seed=4)
    assert not np.array_equal(first, other_seed.steps(0))


def test_steps_of_identities():
    pids = torch.arange(8).repeat_interleave(torch.tensor([3, 9, 9, 9, 9, 9, 9, 9]))
    sampler = data.IdentitySampler(pids, 8, 1, seed=0)  # 24 images: 4 identities, 6 of each
    first = sampler.steps(0)
    assert first.shape == (8, 3, 8)  # as many steps as of triplets
    for step in first.reshape(8, 24):
        ids, counts = np.unique(pids[step], return_counts=True)
        assert (len(ids), {*counts.tolist()}) == (4, {6})
        whole = [step[i : i + 6] for i in range(0, 24, 6) if pids[step[i]] != 0]
        assert all(len(set(group)) == 6 for group in whole)
    assert np.array_equal(sampler.steps(0), first)
    assert not np.array_equal(sampler.steps(1), first)
    for batch_size, found in ((18, "9 identities"), (3, "1.5 identities"), (2, "1 identities")):
        with pytest.raises(UserError, match=f"{found}, .*; expected a multiple of 2 from 4 to 16"):
            data.IdentitySampler(pids, batch_size, 1, seed=0)


@pytest.mark.parametrize(("pids", "batch_size", "message"), [
    ([4, 4, 4], 1, "1 identities, 1 of them with more than one sample"),
    ([1, 2, 3], 1, "3 identities, 0 of them with"),
    ([1, 1, 2, 2], 9, "--batch-size 9: an epoch has only 8 triplets .* at most"),
])  # fmt: skip
def test_triplets_that_cannot_be_made(pids, batch_size, message):
    with pytest.raises(UserError, match=message):
        data.TripletSampler(torch.tensor(pids), batch_size, 2, seed=0)


@pytest.mark.parametrize(("batch_size", "per_pass", "ranks", "expected"), [
    (26, 26, 1, [[26]]), (26, 26, 8, [[4, 4, 3, 3, 3, 3, 3, 3]]), (208, 26, 8, [[26] * 8]),
    (208, 26, 1, [[26]] * 8), (208, 26, 3, [[24, 23, 23], [23, 23, 23], [23, 23, 23]]),
    (7, 2, 2, [[2, 2], [2, 1]]),
    (9, 1, 8, [[2, 1, 1, 1, 1, 1, 1, 1]]),  # a second pass would leave seven ranks without any
])  # fmt: skip
def test_a_step_is_shared_as_evenly_as_it_goes(batch_size, per_pass, ranks, expected):
    shares = data.share_out(batch_size, per_pass, ranks)
    assert [[part.stop - part.start for part in row] for row in shares] == expected
    covered = [i for row in shares for part in row for i in range(part.start, part.stop)]
    assert covered == list(range(batch_size))
    with pytest.raises(UserError, match=f"fewer triplets than the {batch_size + 1} ranks"):
        data.share_out(batch_size, per_pass, batch_size + 1)


# --- augmentation


def noise(*shape, low=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, shape, dtype=torch.uint8, generator=generator)


def test_flips():
    images = {"rgb": noise(4, 3, 6, 10), "nir": noise(4, 3, 6, 10, seed=1)}
    draws = torch.full((4, 9), 0.99)  # nothing is erased
    draws[:, :2] = torch.tensor([[0.6, 0.6], [0.4, 0.6], [0.6, 0.4], [0.4, 0.4]])
    result = data.augment(images, draws)
    for modality, image in images.items():
        expected = [image[0], image[1].flip(-1), image[2].flip(-2), image[3].flip(-1, -2)]
        assert torch.equal(result[modality], torch.stack(expected))


def test_pad_and_crop_by_hand_the_same_for_all_sensors():
    images = {"rgb": noise(3, 3, 6, 10), "nir": noise(3, 3, 6, 10, seed=1)}
    draws = torch.full((3, 9), 0.99)
    draws[:, 7:] = torch.tensor([[0.5, 0.5], [0.0, 0.999], [0.999, 0.3]])  # 5 places: 2; 0, 4; 4, 1
    result = data.augment(images, draws, (0, 0), 0, pad=2)
    for modality, image in images.items():
        expected = torch.zeros_like(image)
        expected[0] = image[0]
        expected[1, :, 2:, :-2] = image[1, :, :-2, 2:]
        expected[2, :, :-2, 1:] = image[2, :, 2:, :-1]
        assert torch.equal(result[modality], expected)
    assert data.augment(images, draws, (0, 0), 0)["rgb"].equal(images["rgb"])


def test_erased_rectangle_by_hand():
    image, ends = noise(2, 3, 100, 100), ((0.5, 0.0), (0.999, 0.999))
    side_40 = [0.14 / 0.31, np.log(1 / 0.3) / np.log(11)]  # 16% of the image, aspect 1
    draws = torch.tensor([[0.9, 0.9, 0.4, *side_40, *place, 0, 0] for place in ends])
    expected = image.clone()
    expected[0, :, 30:70, 0:40] = 0  # 61 places for its top: 0.5 takes the 30th
    expected[1, :, 60:, 60:] = 0
    assert torch.equal(data.augment({"rgb": image}, draws)["rgb"], expected)


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (160, 160)])
def test_erasing_is_the_same_in_all_modalities_and_within_its_bounds(size):
    image = noise(100, 1, *size).expand(-1, 3, -1, -1)
    draws = torch.rand(100, 9, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.0, 0.9999999])
    draws[:4, 2:7] = torch.cartesian_prod(ends, ends).repeat(1, 3)[:, :5]
    result = data.augment({"a": image, "b": image.clone(), "c": 255 - image // 2}, draws, erase=1.0)
    assert torch.equal(result["a"], result["b"])
    erased = result["a"] == 0
    assert torch.equal(erased, result["c"] == 0)
    area = erased[:, 0].flatten(1).float().mean(1)
    assert area.min() > 0.018  # sides are rounded to pixels
    assert 0.25 < area.max() < 0.34
    rows, columns = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, erased[:, 0].sum((1, 2)))  # one rectangle each
    half = data.augment({"a": image}, draws, (0, 0))["a"] == 0
    assert 0.4 < half.flatten(1).any(1).float().mean() < 0.6


def test_normalise_by_hand():
    rgb = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean = {"rgb": (0.5, 0.1, 0.0), "nir": (0.3,) * 3}
    std = {"rgb": (0.25, 0.5, 2.0), "nir": (0.1,) * 3}
    result = data.Normalise(mean, std, CPU)({"rgb": rgb, "nir": torch.zeros(1, 3, 1, 1)})
    assert result["rgb"].dtype == torch.float32
    torch.testing.assert_close(result["rgb"].ravel(), torch.tensor([-2.0, 0.2, 0.5]))
    torch.testing.assert_close(result["nir"].ravel(), torch.tensor([-3.0] * 3))
