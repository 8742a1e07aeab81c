"""Proves that every layout on disk comes out as the same registered tiles, identities and cameras.

Also that what is missing or broken is named, that triplets and batches hold what section 5.1 asks
for, and that modalities are augmented together.
"""

import contextlib
import multiprocessing
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import runtime
from extras import synthetic
from runtime import UserError

CPU = torch.device("cpu")
TRAIN = "rgbir/bounding_box_train"
COLOURS = {"rgb": (255, 0, 0), "nir": (0, 255, 0), "tir": (0, 0, 255)}
TILES = tuple(COLOURS.values())
MARKET = ("bounding_box_train", "query", "bounding_box_test")
NAMES = {  # not in order
    "bounding_box_train": ["0503_c0008_001", "0501_c0001_010", "0501_c0002_000"],
    "query": ["0502_c0003_000"],
    "bounding_box_test": ["0504_c0001_000", "0502_c0003_000"],
}


def save(path, *colours, height=16):
    """One file of tiles, side by side, each twice as wide as high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles = [np.full((height, 2 * height, 3), colour, np.uint8) for colour in colours]
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(np.concatenate(tiles, 1)).save(path, **options)


def write_rgbnt100(root, layout=1, height=16, colours=TILES):
    for split, names in NAMES.items():
        for name in names:
            if layout == 1:
                save(root / f"rgbir/{split}/{name}.jpg", *colours, height=height)
            elif layout == 3 and split == "query":
                (root / "rgbir/query").mkdir(parents=True)
                (root / f"rgbir/query/{name}.jpg").write_bytes(b"read for its name only")
            else:
                part = "train" if split.endswith("train") else "validate"
                for folder, colour in zip("RNT", colours, strict=True):
                    places = {2: f"reid_set_{folder}/{split}", 3: f"{part}/{folder}/{name[:4]}"}
                    place = places[layout]
                    save(root / place / f"{name}.jpg", colour, height=height)


def write_folder(root, names, modalities=("rgb", "nir")):
    for split in data.SPLITS:
        for modality in modalities:
            for name in names:
                save(root / split / modality / f"{name}.png", COLOURS.get(modality, (9, 9, 9)))


def assert_tiles(images, size, **colours):
    assert list(images) == list(colours)
    for modality, colour in colours.items():
        assert images[modality].dtype == torch.uint8 and images[modality].shape == (3, *size)
        assert (
            images[modality] - torch.tensor(colour).view(3, 1, 1)
        ).abs().max() < 8  # JPEG is not exact


def samples_of(pids_and_keys):
    return [data.Sample(f"{i:03d}", pid, key, {}) for i, (pid, key) in enumerate(pids_and_keys)]


# --- files


@pytest.mark.parametrize("below", ["", "RGBNT100"])
@pytest.mark.parametrize("layout", [1, 2, 3])
def test_rgbnt100(tmp_path, layout, below):
    write_rgbnt100(tmp_path / below, layout)
    (tmp_path / below / "readme.txt").write_text("not an image")
    dataset = data.load_dataset("rgbnt100", tmp_path)
    assert dataset.modalities == ("rgb", "nir", "tir")
    for split, folder in zip((dataset.train, dataset.query, dataset.gallery), MARKET, strict=True):
        names = [sample.name.rpartition("/")[2] for sample in split.samples]
        assert names == sorted(NAMES[folder]) and len(split) == len(names)
        for i, name in enumerate(names):
            images, pid, key = split[i]
            assert_tiles(images, (16, 32), **COLOURS)
            assert (
                (pid, key) == (int(name[:4]), int(name[6:10]) - 1) == (split.pids[i], split.keys[i])
            )


@pytest.mark.parametrize("height", [8, 128])
def test_any_tile_height_native_or_resized(tmp_path, height):
    write_rgbnt100(tmp_path, height=height)
    assert_tiles(
        data.load_dataset("rgbnt100", tmp_path).train[0][0], (height, 2 * height), **COLOURS
    )
    dataset = data.load_dataset("rgbnt100", tmp_path, image_size=(24, 40))
    assert_tiles(
        dataset.train[0][0], (24, 40), **COLOURS
    )  # resizing takes nothing from the tile beside


@pytest.mark.parametrize("colours", [TILES[:2], TILES])
def test_rgbn300_mosaics_of_two_or_three_tiles(tmp_path, colours):
    write_rgbnt100(tmp_path, height=128, colours=colours)
    dataset = data.load_dataset("rgbn300", tmp_path)
    assert_tiles(dataset.query[0][0], (128, 256), rgb=COLOURS["rgb"], nir=COLOURS["nir"])


# File of a modality; its folders; then, of train, query and gallery: split, name, pid and key
OTHERS = {
    "rgbnt201": ("{split}/{modality}/{name}.jpg", ("RGB", "NI", "TI"), [
        ("train_171", "000009_cam3_1_00", 9, 2), ("test", "000258_cam1_0_00", 258, 0),
        ("test", "000258_cam1_0_00", 258, 0),
    ]),
    "msvr310": ("{split}/{name:.4}/{modality}/{name}.jpg", ("vis", "ni", "th"), [
        ("bounding_box_train", "0001_s002_v4_002", 1, 2), ("query3", "0002_s013_v1_002", 2, 13),
        ("bounding_box_test", "0002_s002_v0_000", 2, 2),
    ]),
    "wmveid863": ("{split}/{pid:04}/{modality}/{name}.jpg", ("vis", "ni", "th"), [
        ("train", "v1_n1_s999_011", 471, 0), ("query", "v2_n0_s101_001", 472, 1),
        ("test", "v3_n0_s101_002", 472, 2),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_benchmarks(tmp_path, capsys, name):
    pattern, folders, samples = OTHERS[name]
    for split, stem, pid, _ in samples:
        for modality, colour in zip(folders, TILES, strict=True):
            save(
                tmp_path / pattern.format(split=split, modality=modality, name=stem, pid=pid),
                colour,
            )
    dataset = data.load_dataset(name, tmp_path, image_size=(16, 32))
    for split, (_, _, pid, key) in zip(
        (dataset.train, dataset.query, dataset.gallery), samples, strict=True
    ):
        assert len(split) == 1
        assert_tiles(split[0][0], (16, 32), **COLOURS)
        assert split[0][1:] == (pid, key)
    split, stem, pid, _ = samples[1]  # a sensor failed
    (tmp_path / pattern.format(split=split, modality=folders[2], name=stem, pid=pid)).unlink()
    assert list(data.load_dataset(name, tmp_path).query[0][0]) == ["rgb", "nir"]
    assert (
        "1 of 1 query samples lack a modality and stay, with what they have"
        in capsys.readouterr().err
    )


def test_chosen_modalities_alone_are_read(tmp_path):
    write_rgbnt100(tmp_path)
    dataset = data.load_dataset("rgbnt100", tmp_path, ("tir", "rgb"))
    assert_tiles(dataset.train[0][0], (16, 32), tir=COLOURS["tir"], rgb=COLOURS["rgb"])
    assert dataset.mean == {"tir": (0.761, 0.329, 0.322), "rgb": (0.276, 0.271, 0.274)}
    assert dataset.std == {"tir": (0.257, 0.263, 0.216), "rgb": (0.176, 0.176, 0.168)}


def test_folder_pairs_by_name_whatever_the_suffix(tmp_path):
    write_folder(tmp_path, ["7_c1_a", "12_c4_b"], ("heat", "nir", "rgb"))
    for split in data.SPLITS:
        (tmp_path / split / "nir/7_c1_a.png").unlink()
        save(tmp_path / split / "nir/7_c1_a.jpg", COLOURS["nir"])
    dataset = data.load_dataset("folder", tmp_path)
    assert dataset.mean["heat"] == (0.485, 0.456, 0.406) and dataset.std["heat"] == (
        0.229,
        0.224,
        0.225,
    )  # ImageNet's
    assert [(s.name, s.pid, s.key) for s in dataset.train.samples] == [
        ("12_c4_b", 12, 3),
        ("7_c1_a", 7, 0),
    ]
    for i in (0, 1):
        assert_tiles(
            dataset.train[i][0], (16, 32), rgb=COLOURS["rgb"], nir=COLOURS["nir"], heat=(9, 9, 9)
        )


def test_lacking_modality_drops_training_samples_only(tmp_path, capsys):
    write_folder(tmp_path, ["1_c1_0", "1_c2_0", "2_c1_0"])
    for split in data.SPLITS:
        (tmp_path / split / "nir/1_c2_0.png").unlink()
    dataset = data.load_dataset("folder", tmp_path)
    assert [sample.name for sample in dataset.train.samples] == ["1_c1_0", "2_c1_0"]
    warning, *others = capsys.readouterr().err.splitlines()
    assert warning == "warning: 1 of 3 train samples lack a modality and are left out: 1_c2_0"
    assert len(others) == 2 and all("1 of 3" in other and "stay" in other for other in others)
    for split in (dataset.query, dataset.gallery):
        assert len(split) == 3
        assert_tiles(split[1][0], (16, 32), rgb=COLOURS["rgb"])


def test_samples_without_any_chosen_modality_are_named_and_counted(tmp_path, capsys):
    write_folder(tmp_path, ["1_c1_0", "1_c2_0", "2_c1_0"])
    for split in data.SPLITS:
        (tmp_path / split / "nir/1_c2_0.png").unlink()
    dataset = data.load_dataset("folder", tmp_path, ("nir",))
    assert [len(split) for split in (dataset.train, dataset.query, dataset.gallery)] == [2, 2, 2]
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        f"warning: 1 of 3 {split} samples have none of nir and are left out: 1_c2_0"
        for split in data.SPLITS
    ]
    lines = data.check("folder", tmp_path, ("nir",))
    assert sum("1_c2_0 lacks nir" in line for line in lines) == 3


def test_counts_other_than_the_known_ones_warn(tmp_path, capsys, monkeypatch):
    write_rgbnt100(tmp_path)
    data.load_dataset("rgbnt100", tmp_path)
    warnings = capsys.readouterr().err.splitlines()
    for warning, facts in zip(
        warnings, [("train", 3, 8675), ("query", 1, 1715), ("gallery", 2, 8575)], strict=True
    ):
        assert all(str(fact) in warning for fact in facts)
    monkeypatch.setitem(
        data.DATASETS, "rgbnt100", replace(data.DATASETS["rgbnt100"], counts=(3, 1, 2))
    )
    data.load_dataset("rgbnt100", tmp_path)
    assert capsys.readouterr().err == ""


def test_synthetic_is_read_where_it_is_and_only_in_this_version(tmp_path):
    synthetic.write_dataset(tmp_path / "synthetic", train_ids=2, test_ids=1, captures=1, workers=1)
    for root in (tmp_path, tmp_path / "synthetic"):
        dataset = data.load_dataset("synthetic", root)
        assert [len(split) for split in (dataset.train, dataset.query, dataset.gallery)] == [
            16,
            8,
            8,
        ]
    (tmp_path / "synthetic/VERSION").write_text("0\n")
    with pytest.raises(UserError, match=f"version 0, expected {synthetic.VERSION}; delete"):
        data.load_dataset("synthetic", tmp_path)


# --- errors


def test_errors_of_finding(tmp_path):
    with pytest.raises(UserError, match=r"'rgbnt1000': expected one of .*rgbnt100.*folder"):
        data.load_dataset("rgbnt1000", tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder; --data-root"):
        data.load_dataset("rgbnt100", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no layout of rgbnt100") as error:
        data.load_dataset("rgbnt100", tmp_path)
    market = "{bounding_box_train,query,bounding_box_test}"
    for tree in (
        f"rgbir/{market}/*",
        f"reid_set_{{R,N,T}}/{market}/*",
        "{train,validate}/{R,N,T}/*/*",
    ):
        assert f"\n  {tree}" in str(error.value)
    write_rgbnt100(tmp_path)
    with pytest.raises(
        UserError, match="no modality xray in rgbnt100; expected some of rgb, nir, tir"
    ):
        data.load_dataset("rgbnt100", tmp_path, ("rgb", "xray"))
    (tmp_path / "rgbir/query/0502_c0003_000.jpg").unlink()
    with pytest.raises(
        UserError, match="no usable images in split query; expected files at rgbir/"
    ):
        data.load_dataset("rgbnt100", tmp_path)


@pytest.mark.parametrize("name", ["portrait", "2020-01-05_c1"])
def test_name_without_identity(tmp_path, name):
    write_folder(tmp_path, [name])
    with pytest.raises(UserError, match=f"{name}: no identity"):
        data.load_dataset("folder", tmp_path)


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (16, 48)])
def test_resized_as_pillow_resizes(tmp_path, size):
    pixels = np.random.default_rng(0).integers(256, size=(40, 80, 3), dtype=np.uint8)
    image = Image.fromarray(np.concatenate([pixels, 255 - pixels], 1))
    image.save(path := tmp_path / "mosaic.png")
    split = data.Split(
        [data.Sample("", 1, 0, {"rgb": (path, 0), "nir": (path, 1)})], ("rgb", "nir"), size
    )
    for i, found in enumerate(split[0][0].values()):
        tile = image.crop((80 * i, 0, 80 * i + 80, 40)).resize(size[::-1], Image.Resampling.BICUBIC)
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(tile)).max() <= 2


@pytest.mark.parametrize("width", [32, 64, 100])
def test_mosaic_too_narrow_or_of_odd_width(tmp_path, width):
    write_rgbnt100(tmp_path)
    Image.new("RGB", (width, 16)).save(tmp_path / "rgbir/bounding_box_train/0501_c0001_010.jpg")
    with pytest.raises(
        UserError,
        match=rf"c0001_010.jpg: {width}x16 pixels; a mosaic has tiles .* here 32x16, at least",
    ):
        data.load_dataset("rgbnt100", tmp_path).train[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("store_gb", [0, 1])
def test_truncated_jpeg_is_named_in_one_line(tmp_path, capsys, workers, store_gb):
    write_rgbnt100(tmp_path)
    path = tmp_path / "rgbir/bounding_box_train/0501_c0002_000.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    train = data.load_dataset("rgbnt100", tmp_path, None, (16, 32), store_gb).train
    capsys.readouterr()

    @runtime.program
    def main():
        list(data.read_batches(train, [[0], [1], [2]], workers, CPU))

    with pytest.raises(SystemExit) as stop:
        main()
    assert not multiprocessing.active_children()  # they ended with the reading
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(
        f"error: {path}: not an image that can be read ("
    )


# --- reading


def write_noise(tmp_path) -> None:
    """RGBNT100's names with three training mosaics of noise."""
    noise = np.random.default_rng(0)
    write_rgbnt100(tmp_path)
    for path in (tmp_path / TRAIN).iterdir():
        Image.fromarray(noise.integers(0, 256, (16, 96, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """An empty store of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/graft"


def test_workers_and_store_give_what_reading_gives(tmp_path, store):
    write_noise(tmp_path)
    train = data.load_dataset("rgbnt100", tmp_path, image_size=(12, 20)).train
    read = [train[i][0] for i in range(3)]
    assert not torch.equal(read[0]["rgb"], read[1]["rgb"])
    batches = [[2, 0], [1], [1, 1, 2]]
    by_workers = list(data.read_batches(train, batches, 2, CPU))
    assert not store.exists()
    stored = data.load_dataset("rgbnt100", tmp_path, None, (12, 20), 1).train
    from_store = list(data.read_batches(stored, batches, 2, CPU))
    assert len(list(store.glob("*.npy"))) == 3 and not list(store.glob("tmp*"))
    for batch, one, other in zip(batches, by_workers, from_store, strict=True):
        for modality in train.modalities:
            expected = torch.stack([read[i][modality] for i in batch])
            assert torch.equal(one[modality], expected)
            assert torch.equal(other[modality], expected)


def test_no_file_is_decoded_twice_unless_it_has_changed(tmp_path, store, monkeypatch):
    write_noise(tmp_path)
    decoded, read_tiles = [], data.read_tiles
    noting = lambda path, *given: decoded.append(path.name) or read_tiles(path, *given)  # noqa: E731
    monkeypatch.setattr(data, "read_tiles", noting)

    def load(modalities=None) -> data.Split:
        return data.load_dataset("rgbnt100", tmp_path, modalities, (12, 20), 1).train

    first = load(("rgb", "tir")).decoded
    assert sorted(decoded) == sorted(path.name for path in (tmp_path / TRAIN).iterdir())
    decoded.clear()
    assert load(("tir",)).decoded["tir"].equal(first["tir"]) and not decoded
    assert set(load().decoded) == {"rgb", "nir", "tir"} and len(decoded) == 3  # for nir alone
    decoded.clear()
    assert load().decoded["rgb"].equal(first["rgb"]) and not decoded
    changed = sorted((tmp_path / TRAIN).iterdir())[1]
    pixels = np.array(Image.open(changed))
    Image.fromarray(255 - pixels).save(changed)
    assert not load().decoded["rgb"][1].equal(first["rgb"][1]) and len(decoded) == 3


def test_a_store_holds_samples_that_lack_a_sensor(tmp_path, store):
    for modality, number in (("rgb", 1), ("rgb", 2), ("nir", 2)):
        for split in data.SPLITS:
            folder = tmp_path / split / modality
            folder.mkdir(parents=True, exist_ok=True)
            colour = (number, 10, len(modality))
            Image.new("RGB", (8, 8), colour).save(folder / f"0001_c{number}_0.png")
    query = data.load_dataset("folder", tmp_path, None, (8, 8), 1).query
    one, two = data.read_batches(query, [[0], [1]], 0, CPU)
    assert list(one) == ["rgb"] and list(two) == ["rgb", "nir"]
    assert one["rgb"].unique().tolist() == [1, 3, 10] and two["nir"].unique().tolist() == [2, 3, 10]


def test_what_does_not_fit_is_read_each_time(tmp_path, store, monkeypatch, capsys):
    write_noise(tmp_path)
    gigabyte = 3 * 3 * 3 * 12 * 20 / 1e9  # of a store that just holds the training split

    def load(store_gb: float) -> data.Split:
        train = data.load_dataset("rgbnt100", tmp_path, None, (12, 20), store_gb).train
        capsys.readouterr()
        assert len(list(data.read_batches(train, [[0, 1]], 0, CPU))) == 1
        return train

    assert load(gigabyte * 0.99).decoded is None
    assert "do not fit --store" in capsys.readouterr().err and not list(store.glob("*.npy"))
    monkeypatch.setattr(runtime, "available_memory", lambda: 0)
    assert load(1).decoded is None and "the memory that is free" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load(gigabyte * 1.1).decoded and not capsys.readouterr().err
    kept = {path.name for path in store.glob("*.npy")}
    # Another size: the least recently used ones make room
    other = data.load_dataset("rgbnt100", tmp_path, None, (12, 18), gigabyte * 1.1).train
    assert other.decoded and not kept & {path.name for path in store.glob("*.npy")}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(1).decoded is None and "cannot be kept" in capsys.readouterr().err


def test_a_damaged_store_and_what_a_killed_process_left(tmp_path, store):
    write_noise(tmp_path)
    stored = data.load_dataset("rgbnt100", tmp_path, None, (12, 20), 1).train
    assert stored.decoded
    (store / "tmpold").mkdir()
    (store / "tmpold" / "x.npy").write_bytes(b"x")
    assert data.load_dataset("rgbnt100", tmp_path, None, (12, 18), 1).train.decoded
    assert not list(store.glob("tmp*"))
    file = data.store_files(stored)["nir"]
    file.write_bytes(file.read_bytes()[:-100])
    again = data.load_dataset("rgbnt100", tmp_path, None, (12, 20), 1).train
    with pytest.raises(UserError, match=f"{file}: damaged .*; delete it, it is made anew"):
        again.decoded  # noqa: B018


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_eight_ranks_share_one_copy(tmp_path, store):
    """Proportional set sizes: pages that eight processes map count an eighth in each."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 768, 3), dtype=np.uint8)
    samples = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.fromarray(noise).save(path)
        tiles = {modality: (path, tile) for tile, modality in enumerate(COLOURS)}
        samples.append(data.Sample(str(i), i, 0, tiles))
    splits = [data.Split(samples, tuple(COLOURS), (128, 256), 1) for _ in range(8)]
    assert splits[0].decoded

    def touch(split: data.Split, ready, done) -> None:
        total = sum(images.sum().item() for images in split.decoded.values())
        ready.wait()
        text = Path("/proc/self/smaps").read_text()
        maps = [part for part in text.split("VmFlags") if str(store) in part]
        sizes = [int(re.search(r"Pss:\s+(\d+) kB", part)[1]) for part in maps]
        ready.wait()
        done.put((total, sum(sizes)))

    context = multiprocessing.get_context("fork")
    ready, done = context.Barrier(8), context.SimpleQueue()
    for split in splits:
        context.Process(target=touch, args=(split, ready, done)).start()
    totals, sizes = zip(*(done.get() for _ in splits), strict=True)
    assert len(set(totals)) == 1
    once = 12 * 3 * 3 * 128 * 256 / 1024
    assert 0.9 * once < sum(sizes) < 1.1 * once


def test_the_next_batch_is_read_while_this_one_is_used(monkeypatch):
    """On a pretended GPU: one batch ahead and no more, errors reach the reader, all is closed."""
    events = []

    class Stream:
        def __init__(self, device=None):
            pass

        def record_event(self):
            return "arrived"

        def wait_event(self, event):
            events.append(event)

    class Batch:
        def record_stream(self, stream):
            events.append("kept")

    def batches():
        try:
            for number in range(3):
                events.append(number)
                yield {"rgb": Batch()}
            raise runtime.UserError("unreadable")
        finally:
            events.append("closed")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_device", events.append)
    monkeypatch.setattr(runtime, "to_device", lambda images, device: images)
    reader = data.prefetch(batches(), torch.device("cuda"))
    next(reader)
    while 1 not in events:  # it comes without being asked for
        time.sleep(0.001)
    time.sleep(0.02)
    assert 2 not in events and "arrived" in events and "kept" in events
    next(reader), next(reader)
    with pytest.raises(runtime.UserError, match="unreadable"):
        next(reader)
    assert events[-1] == "closed"
    early = data.prefetch(batches(), torch.device("cuda"))
    next(early)
    early.close()
    assert events[-1] == "closed"


def test_hold_out():
    train = data.Split(
        samples_of([(9, 0), (4, 0), (7, 1), (9, 0), (7, 0), (9, 3), (7, 1), (2, 5)]), ("rgb",)
    )
    rest, query, gallery = data.hold_out(train, 2)
    assert [sample.name for sample in rest.samples] == ["001", "007"]  # identities 4 and 2
    assert [sample.name for sample in query.samples] == ["000", "002", "004", "005"]
    assert [sample.name for sample in gallery.samples] == ["000", "002", "003", "004", "005", "006"]


# --- triplets

PIDS = np.array([5, 7, 5, 3, 9, 5, 3, 7, 5, 3, 5])  # 5: five samples, 3: three, 7: two, 9: one


def test_triplets():
    triplets = data.make_triplets(PIDS, 3, np.random.default_rng(0))
    anchors, positives, negatives = triplets.T
    assert (
        (PIDS[anchors] == PIDS[positives]).all()
        and (anchors != positives).all()
        and (PIDS[anchors] != PIDS[negatives]).all()
    )
    assert Counter(anchors.tolist()) == {i: 3 for i in range(11) if i != 4}
    for anchor in set(anchors.tolist()):
        used = positives[anchors == anchor]
        assert len(set(used.tolist())) == {5: 3, 3: 2, 7: 1}[PIDS[anchor]]
    assert (
        np.diff(anchors) != 0
    ).sum() > 15  # shuffled: unshuffled, 10 anchors of 3 rows change 9 times
    assert np.array_equal(triplets, data.make_triplets(PIDS, 3, np.random.default_rng(0)))
    assert not np.array_equal(triplets, data.make_triplets(PIDS, 3, np.random.default_rng(1)))


def test_positives_and_negatives_are_drawn_from_all_others_evenly():
    drawn = np.concatenate(
        [data.make_triplets(PIDS, 2, np.random.default_rng(seed)) for seed in range(300)]
    )
    for anchor in set(range(11)) - {4}:
        rows = drawn[drawn[:, 0] == anchor]
        same = {i for i in range(11) if PIDS[i] == PIDS[anchor] and i != anchor}
        other = {i for i in range(11) if PIDS[i] != PIDS[anchor]}
        for column, expected in ((1, same), (2, other)):
            counts = Counter(rows[:, column].tolist())
            assert set(counts) == expected
            assert all(0.6 < count * len(expected) / 600 < 1.5 for count in counts.values())


def test_steps_of_triplets():
    sampler = data.TripletSampler(torch.from_numpy(PIDS), 4, 2, seed=3)
    first = sampler.steps(0)
    assert first.shape == (20 // 4, 3, 4) and sampler.num_steps == 5
    anchors, positives, negatives = PIDS[first].transpose(1, 0, 2)
    assert (anchors == positives).all() and (anchors != negatives).all()
    assert Counter(first[:, 0].ravel().tolist()) == {i: 2 for i in range(11) if i != 4}
    assert np.array_equal(first, sampler.steps(0)) and not np.array_equal(first, sampler.steps(1))
    other_seed = data.TripletSampler(torch.from_numpy(PIDS), 4, 2, seed=4)
    assert not np.array_equal(first, other_seed.steps(0))


@pytest.mark.parametrize(
    ("batch_size", "per_pass", "ranks", "expected"),
    [
        (26, 26, 1, [[26]]),
        (26, 26, 8, [[4, 4, 3, 3, 3, 3, 3, 3]]),
        (208, 26, 8, [[26] * 8]),
        (208, 26, 1, [[26]] * 8),
        (208, 26, 3, [[24, 23, 23], [23, 23, 23], [23, 23, 23]]),
        (7, 2, 2, [[2, 2], [2, 1]]),
        (9, 1, 8, [[2, 1, 1, 1, 1, 1, 1, 1]]),  # a second pass would leave seven ranks without any
    ],
)
def test_a_step_is_shared_as_evenly_as_it_goes(batch_size, per_pass, ranks, expected):
    shares = data.share_out(batch_size, per_pass, ranks)
    assert [[part.stop - part.start for part in row] for row in shares] == expected
    covered = [i for row in shares for part in row for i in range(part.start, part.stop)]
    assert covered == list(range(batch_size))


def test_fewer_triplets_than_ranks_are_refused():
    with pytest.raises(UserError, match="--batch-size 3: fewer triplets than the 4 ranks"):
        data.share_out(3, 26, 4)


def test_steps_of_identities():
    pids = torch.arange(8).repeat_interleave(torch.tensor([3, 9, 9, 9, 9, 9, 9, 9]))
    sampler = data.IdentitySampler(pids, 8, 1, seed=0)  # 24 images: 4 identities, 6 of each
    first = sampler.steps(0)
    assert first.shape == (8, 3, 8)  # as many steps as of triplets
    for step in first.reshape(8, 24):
        ids, counts = np.unique(pids[step], return_counts=True)
        assert len(ids) == 4 and (counts == 6).all()
        whole = [step[i : i + 6] for i in range(0, 24, 6) if pids[step[i]] != 0]
        assert all(len(set(group)) == 6 for group in whole)
    assert np.array_equal(sampler.steps(0), first) and not np.array_equal(sampler.steps(1), first)
    for batch_size, found in ((18, "9 identities"), (3, "1.5 identities"), (2, "1 identities")):
        with pytest.raises(UserError, match=f"{found}; expected a whole number of them from 2 to"):
            data.IdentitySampler(pids, batch_size, 1, seed=0)


@pytest.mark.parametrize(
    ("pids", "batch_size", "message"),
    [
        ([4, 4, 4], 1, "identities in the training data is 1: .* at least 2"),
        ([1, 2, 3], 1, "single sample"),
        ([1, 1, 2, 2], 9, "--batch-size 9: an epoch has only 8 triplets .* lower it"),
    ],
)
def test_triplets_that_cannot_be_made(pids, batch_size, message):
    with pytest.raises(UserError, match=message):
        data.TripletSampler(torch.tensor(pids), batch_size, 2, seed=0)


# --- augmentation


def test_flips():
    images = {
        modality: torch.randint(256, (4, 3, 6, 10), dtype=torch.uint8)
        for modality in ("rgb", "nir")
    }
    draws = torch.full((4, 7), 0.99)  # nothing is erased
    draws[:, :2] = torch.tensor([[0.6, 0.6], [0.4, 0.6], [0.6, 0.4], [0.4, 0.4]])
    result = data.augment(images, draws)
    for modality, image in images.items():
        expected = [image[0], image[1].flip(-1), image[2].flip(-2), image[3].flip(-1, -2)]
        assert torch.equal(result[modality], torch.stack(expected))


def test_erased_rectangle_by_hand():
    image = torch.randint(1, 256, (2, 3, 100, 100), dtype=torch.uint8)
    side_40 = [0.14 / 0.31, np.log(1 / 0.3) / np.log(11)]  # 16% of the image, aspect 1
    draws = torch.tensor(
        [[0.9, 0.9, 0.4, *side_40, 0.5, 0.0], [0.9, 0.9, 0.4, *side_40, 0.999, 0.999]]
    )
    expected = image.clone()
    expected[0, :, 30:70, 0:40] = 0  # 61 places for its top: 0.5 takes the 30th
    expected[1, :, 60:, 60:] = 0
    assert torch.equal(data.augment({"rgb": image}, draws)["rgb"], expected)


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (160, 160)])
def test_erasing_is_the_same_in_all_modalities_and_within_its_bounds(size):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(1, 256, (100, 1, *size), dtype=torch.uint8, generator=generator).expand(
        -1, 3, -1, -1
    )
    draws = torch.rand(100, 7, generator=generator)
    draws[:4, 2:7] = torch.cartesian_prod(
        torch.tensor([0.0, 0.9999999]), torch.tensor([0.0, 0.9999999])
    ).repeat(1, 3)[:, :5]
    result = data.augment({"a": image, "b": image.clone(), "c": 255 - image // 2}, draws, erase=1.0)
    assert torch.equal(result["a"], result["b"])
    erased = result["a"] == 0
    assert torch.equal(erased, result["c"] == 0)
    area = erased[:, 0].flatten(1).float().mean(1)
    assert (
        area.min() > 0.018 and area.max() < 0.34 and area.max() > 0.25
    )  # sides are rounded to pixels
    rows, columns = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, erased[:, 0].sum((1, 2)))  # one rectangle each


def test_probabilities():
    image = torch.randint(1, 256, (400, 3, 16, 32), dtype=torch.uint8)
    draws = torch.rand(400, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data.augment({"rgb": image}, draws, (0, 0), erase=0)["rgb"], image)
    erased = (data.augment({"rgb": image}, draws)["rgb"] == 0).flatten(1).any(1)
    assert 0.4 < erased.float().mean() < 0.6


def test_normalise_by_hand():
    images = {
        "rgb": torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1),
        "nir": torch.zeros(1, 3, 1, 1),
    }
    mean, std = (
        {"rgb": (0.5, 0.1, 0.0), "nir": (0.3,) * 3},
        {"rgb": (0.25, 0.5, 2.0), "nir": (0.1,) * 3},
    )
    result = data.Normalise(mean, std, torch.device("cpu"))(images)
    assert result["rgb"].dtype == torch.float32
    torch.testing.assert_close(result["rgb"].ravel(), torch.tensor([-2.0, 0.2, 0.5]))
    torch.testing.assert_close(result["nir"].ravel(), torch.tensor([-3.0] * 3))
