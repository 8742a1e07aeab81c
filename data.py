"""Data sets of multi-modal ReID: what is known of each, how their files are found and read, triplets, augmentation.

python data.py --check --dataset rgbnt100 --data-root DIR          reads all of it and lists everything that is wrong

Shapes: B samples, H height, W width. Images are uint8 RGB, (3, H, W); a sample maps modality to image.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import runtime
from extras import synthetic
from runtime import UserError

SPLITS = ("train", "query", "gallery")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
MAX_PIXELS = 2**26  # of an image: more is refused before it is decoded
CACHE_BYTES = 2**30  # splits whose decoded images fit are kept in memory


# --- what is known of each data set


@dataclass(frozen=True)
class Layout:
    """Where files lie: {split} and {modality} stand for the folders named here, * for any. Without {modality} a file is
    a mosaic: all modalities' tiles side by side, each twice as wide as high."""

    pattern: str
    splits: tuple[str, str, str]  # folders of train, query, gallery
    modalities: tuple[str, ...] = ()  # folders, in the data set's order; none: as found
    query_names: str = ""  # folder whose file names say which samples of the query folder are queries

    def tree(self) -> str:
        """The tree, in a line, for a message."""
        splits, modalities = ",".join(dict.fromkeys(self.splits)), ",".join(self.modalities or ["MODALITY"])
        tree = self.pattern.format(split=f"{{{splits}}}", modality=f"{{{modalities}}}" if self.modalities else modalities)
        return tree + (f", {self.query_names}/* (the names of the queries)" if self.query_names else "")


@dataclass(frozen=True)
class Facts:
    """A data set's facts; `name` finds identity and filter key (camera or scene) in a file's path without its suffix."""

    layouts: tuple[Layout, ...]
    modalities: tuple[str, ...] = ()  # none: those found
    name: str = r"(?:^|/)(?P<pid>-?\d+)_c(?P<key>\d+)[^/]*$"
    first_key: int = 1  # counted from 0 by us
    counts: tuple[int, int, int] | None = None  # samples of train, query, gallery
    mean: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # per channel; else ImageNet's
    std: dict[str, tuple[float, float, float]] = field(default_factory=dict)


_MARKET = ("bounding_box_train", "query", "bounding_box_test")
_RGBNT100 = Layout("rgbir/{split}/*", _MARKET)
_FOLDERS = ("vis", "ni", "th")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    "synthetic": Facts((_RGBNT100,), ("rgb", "nir", "tir")),
    "rgbnt100": Facts(
        (
            _RGBNT100,
            Layout("reid_set_{modality}/{split}/*", _MARKET, ("R", "N", "T")),
            Layout("{split}/{modality}/*/*", ("train", "validate", "validate"), ("R", "N", "T"), "rgbir/query"),
        ),
        ("rgb", "nir", "tir"),
        counts=(8675, 1715, 8575),
        mean={"rgb": (0.276, 0.271, 0.274), "nir": (0.346,) * 3, "tir": (0.761, 0.329, 0.322)},  # published code
        std={"rgb": (0.176, 0.176, 0.168), "nir": (0.168,) * 3, "tir": (0.257, 0.263, 0.216)},  # NIR: see D13
    ),
    "rgbn300": Facts(
        (_RGBNT100,),
        ("rgb", "nir"),
        counts=(25200, 4985, 24925),
        mean={"rgb": (0.299, 0.294, 0.290), "nir": (0.371,) * 3},  # published code
        std={"rgb": (0.195, 0.195, 0.185), "nir": (0.181,) * 3},
    ),
    "rgbnt201": Facts(
        (Layout("{split}/{modality}/*", ("train_171", "test", "test"), ("RGB", "NI", "TI")),),
        ("rgb", "nir", "tir"),
        name=r"(?:^|/)(?P<pid>\d{6})_cam(?P<key>\d)[^/]*$",
        counts=(3951, 836, 836),
        mean={"rgb": (0.272, 0.269, 0.272), "nir": (0.339,) * 3, "tir": (0.759, 0.325, 0.318)},  # published code
        std={"rgb": (0.174, 0.175, 0.167), "nir": (0.168,) * 3, "tir": (0.255, 0.258, 0.213)},
    ),
    "msvr310": Facts(
        (Layout("{split}/*/{modality}/*", ("bounding_box_train", "query3", "bounding_box_test"), _FOLDERS),),
        ("rgb", "nir", "tir"),
        name=r"/(?P<pid>\d{4})_s(?P<key>\d{3})_[^/]*$",  # the key is the scene
        first_key=0,
        counts=(1032, 591, 1055),
    ),
    "wmveid863": Facts(
        (Layout("{split}/*/{modality}/*", ("train", "query", "test"), _FOLDERS),),
        ("rgb", "nir", "tir"),
        name=r"(?:^|/)(?P<pid>\d+)/v(?P<key>\d)[^/]*$",
    ),
    "folder": Facts((Layout("{split}/{modality}/*", SPLITS),)),
}


# --- samples and splits


@dataclass(frozen=True)
class Sample:
    """One capture of an object: where each modality's image lies (the tile's place in a mosaic, or None), pid and key."""

    name: str
    pid: int
    key: int  # camera or scene: gallery samples with the query's pid and key are left out
    images: dict[str, tuple[Path, int | None]]


class Split(torch.utils.data.Dataset):
    """Samples sorted by name. split[i] -> ({modality: uint8 (3, H, W)}, pid, key); a modality a sample lacks is absent.

    H and W are those of `image_size`, or the file's own without it. Raises UserError for an image that cannot be read.
    """

    def __init__(self, samples: list[Sample], modalities: tuple[str, ...], image_size: tuple[int, int] | None = None):
        self.samples, self.modalities, self.image_size = samples, modalities, image_size
        self.pids = torch.tensor([sample.pid for sample in samples], dtype=torch.int64)
        self.keys = torch.tensor([sample.key for sample in samples], dtype=torch.int64)
        self.cache: list | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], int, int]:
        sample = self.samples[i]
        images = self.cache[i] if self.cache else self._read(sample)
        return images, sample.pid, sample.key

    def _read(self, sample: Sample) -> dict[str, Tensor]:
        files: dict[Path, dict[str, int | None]] = {}
        for modality in self.modalities:
            if modality in sample.images:
                path, tile = sample.images[modality]
                files.setdefault(path, {})[modality] = tile
        return {
            modality: image
            for path, tiles in files.items()
            for modality, image in zip(tiles, self._tiles(path, list(tiles.values())), strict=True)
        }

    def _tiles(self, path: Path, places: list[int | None]) -> Tensor:
        """The tiles at these places of a mosaic, or [None] all of the image: (tiles, 3, H, W)."""
        pixels = torch.from_numpy(np.array(read_image(path)))
        H, W, _ = pixels.shape
        if places == [None]:
            tiles = pixels[None]
        elif W % (2 * H) or 2 * H * (max(places) + 1) > W:
            raise UserError(
                f"{path}: {W}x{H} pixels; a mosaic has tiles twice as wide as high, here {2 * H}x{H},"
                f" at least {max(places) + 1} side by side"
            )
        else:
            tiles = pixels.unflatten(1, (-1, 2 * H)).transpose(0, 1)[places]
        tiles = tiles.permute(0, 3, 1, 2)
        if self.image_size and tiles.shape[2:] != self.image_size:  # as Pillow does, within 2 of 255, and several times as fast
            tiles = F.interpolate(tiles, self.image_size, mode="bicubic", antialias=True)
        return tiles

    def keep_in_memory(self) -> bool:
        """Decode everything once, if it fits in CACHE_BYTES: small sets then need no worker processes."""
        if (
            self.image_size is None
            or len(self) * len(self.modalities) * 3 * self.image_size[0] * self.image_size[1] > CACHE_BYTES
        ):
            return False
        if self.cache is None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release the interpreter's lock
                self.cache = list(pool.map(self._read, self.samples))
        return True

    def subset(self, keep) -> "Split":
        """The samples for which `keep(sample)` holds."""
        return Split([sample for sample in self.samples if keep(sample)], self.modalities, self.image_size)


def read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("JPEG", "PNG", "BMP")) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}: more than 8 bits a channel")
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not an image that can be read ({error}); replace or remove the file") from None


def collate(samples: list) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Samples with the same modalities -> ({modality: uint8 (B, 3, H, W)}, pids (B,), keys (B,))."""
    images, pids, keys = zip(*samples, strict=True)
    stacked = {modality: torch.stack([image[modality] for image in images]) for modality in images[0]}
    return stacked, torch.tensor(pids), torch.tensor(keys)


def loader(split: Split, batches, workers: int, device: torch.device) -> torch.utils.data.DataLoader:
    """Read `batches` (lists of sample indices) of a split: by `workers` processes, or by none where it is in memory."""
    if split.keep_in_memory():
        workers = 0
    return torch.utils.data.DataLoader(
        split, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        worker_init_fn=_leave_ctrl_c,
    )  # fmt: skip


def _leave_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # to the main process, which then ends its workers


# --- finding the files


@dataclass(frozen=True)
class Dataset:
    """Splits and facts of a data set on disk. `mean` and `std`: modality -> three channels, of values 0 to 1."""

    name: str
    modalities: tuple[str, ...]
    train: Split
    query: Split
    gallery: Split
    mean: dict[str, tuple[float, float, float]]
    std: dict[str, tuple[float, float, float]]


def load_dataset(
    name: str, root: str | Path, modalities: tuple[str, ...] | None = None, image_size: tuple[int, int] | None = None
) -> Dataset:
    """Find the files of a data set; `root` is its folder or the parent of it. "synthetic" is rendered where it is absent.

    `modalities` keeps those alone, `image_size` (height, width) resizes. Training samples that lack a modality are left
    out, query and gallery samples stay; both with a warning. Raises UserError, with the trees expected, where nothing matches.
    """
    base, layout, facts, found, chosen = _open(name, Path(root), modalities)
    splits, wrong = {}, []
    for i, split in enumerate(SPLITS):
        samples = _index(base, layout, facts, i, found, chosen, wrong)
        if wrong:
            more = f"; and {len(wrong) - 1} more, python data.py --check lists all" if len(wrong) > 1 else ""
            raise UserError(wrong[0] + more)
        samples = _complete(samples, split, chosen)
        if not samples:
            raise UserError(f"{base}: no usable images in split {split}; expected files at {layout.tree()}")
        splits[split] = Split(samples, chosen, image_size)
        if facts.counts and len(samples) != facts.counts[i]:
            _warn(
                f"{base}: {split} has {len(samples)} samples, {name} is known to have {facts.counts[i]};"
                " going on with what is there"
            )
    mean = {modality: facts.mean.get(modality, _IMAGENET[0]) for modality in chosen}
    std = {modality: facts.std.get(modality, _IMAGENET[1]) for modality in chosen}
    return Dataset(name, chosen, **splits, mean=mean, std=std)


def check(name: str, root: str | Path, modalities: tuple[str, ...] | None = None) -> list[str]:
    """Read every image of a data set; returns a line for each thing that is wrong with it. UserError where none is found."""
    base, layout, facts, found, chosen = _open(name, Path(root), modalities)
    wrong: list[str] = []
    splits = {split: _index(base, layout, facts, i, found, chosen, wrong) for i, split in enumerate(SPLITS)}
    for split, samples in splits.items():
        if not samples:
            wrong.append(f"{base}: no usable images in split {split}; expected files at {layout.tree()}")
        wrong += [
            f"{base}: {split}: {sample.name} lacks {', '.join(lacking)}"
            for sample in samples
            if (lacking := [modality for modality in chosen if modality not in sample.images])
        ]
        reader = Split(samples, chosen)

        def problem(sample: Sample, read=reader._read) -> str | None:
            try:
                read(sample)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = tqdm(pool.map(problem, samples), split, len(samples), leave=False, disable=None)
            wrong += [message for message in results if message]
    counts = Counter(sample.pid for sample in splits["train"])
    wrong += [f"{base}: train: identity {pid} has a single sample, so no positive" for pid, n in counts.items() if n == 1]
    keys: dict[int, set[int]] = {}
    for sample in splits["gallery"]:
        keys.setdefault(sample.pid, set()).add(sample.key)
    wrong += [
        f"{base}: query: {sample.name} has no match in the gallery from another camera or scene"
        for sample in splits["query"]
        if not keys.get(sample.pid, set()) - {sample.key}
    ]
    shared = sorted(counts.keys() & keys.keys())
    return wrong + [f"{base}: identity {pid} is in the training data and in the gallery" for pid in shared]


def _open(name: str, root: Path, modalities: tuple[str, ...] | None) -> tuple:
    """Folder, layout and facts of a data set, the modalities it has and those chosen."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    facts = DATASETS[name]
    if name == "synthetic":
        _render(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data-root expects the folder of {name}, or its parent")
    base, layout = _detect(name, facts, root)
    found = facts.modalities or _modalities(base, layout)
    chosen = tuple(modalities or found)
    if unknown := [modality for modality in chosen if modality not in found]:
        raise UserError(f"{base}: no modality {', '.join(unknown)} in {name}; expected some of {', '.join(found)}")
    return base, layout, facts, found, chosen


def _warn(message: str) -> None:
    if runtime.rank() == 0:
        print(f"warning: {message}", file=sys.stderr)


def _render(root: Path) -> None:
    """Render the embedded data set into ROOT/synthetic unless it is there (or ROOT is such a folder itself)."""
    with runtime.rank0_first():
        folder = root if (root / "VERSION").exists() else root / "synthetic"
        if not folder.exists():
            runtime.print0(f"rendering the embedded data set into {folder}")
            command = [sys.executable, synthetic.__file__, "--out", str(folder)]
            if subprocess.run(command).returncode:
                raise UserError(f"{folder}: rendering failed; see above")
    version = (folder / "VERSION").read_text().strip() if (folder / "VERSION").exists() else "none"
    if version != str(synthetic.VERSION):
        raise UserError(
            f"{folder}: rendered by version {version}, expected {synthetic.VERSION}; delete the folder, it is made anew"
        )


def _detect(name: str, facts: Facts, root: Path) -> tuple[Path, Layout]:
    """The data set's folder, at `root` or below it, and the first layout whose training folder is there."""
    for base in [root, *(child for child in sorted(root.iterdir()) if child.is_dir() and child.name.lower() == name)]:
        for layout in facts.layouts:
            folder = layout.pattern.format(split=layout.splits[0], modality=(*layout.modalities, "*")[0]).rstrip("/*")
            if any(base.glob(folder)):
                return base, layout
    trees = "".join(f"\n  {layout.tree()}" for layout in facts.layouts)
    raise UserError(f"{root}: no layout of {name} found there or in {root / name}; expected one of these trees:{trees}")


def _modalities(base: Path, layout: Layout) -> tuple[str, ...]:
    place = layout.pattern.split("/").index("{modality}")
    pattern = "/".join(layout.pattern.split("/")[: place + 1])
    folders = {
        path.name for split in layout.splits for path in base.glob(pattern.format(split=split, modality="*")) if path.is_dir()
    }
    usual = ("rgb", "nir", "tir")
    return tuple(sorted(folders, key=lambda name: (usual.index(name) if name in usual else len(usual), name)))


def _index(
    base: Path, layout: Layout, facts: Facts, i: int, found: tuple[str, ...], chosen: tuple[str, ...], wrong: list[str]
) -> list[Sample]:
    """Samples of split i, sorted by name; the modalities of one are paired by the path without split, modality, suffix.

    What cannot be a sample is left out, and a line about it added to `wrong`.
    """
    stars = [place for place, part in enumerate(layout.pattern.split("/")) if part == "*"]
    mosaic = "{modality}" not in layout.pattern
    folders = (
        {"": chosen} if mosaic else {f: (m,) for m, f in zip(found, layout.modalities or found, strict=True) if m in chosen}
    )
    files: dict[str, dict[str, tuple[Path, int | None]]] = {}
    real, inside = base.resolve(), set()
    start = len(str(base / "x")) - 1  # of a path below it
    for folder, held in folders.items():
        for path in sorted(base.glob(layout.pattern.format(split=layout.splits[i], modality=folder)), key=str):
            name, suffix = os.path.splitext(path)
            if suffix.lower() in SUFFIXES:
                parent = os.path.dirname(name)
                if (os.path.islink(path) or parent not in inside) and not path.resolve().is_relative_to(real):
                    wrong.append(f"{path}: leads to {path.resolve()}, out of the data set; put a copy in its place")
                    continue
                inside.add(parent)
                places = name[start:].split(os.sep)
                images = files.setdefault("/".join(places[star] for star in stars), {})
                if held[0] in images:
                    wrong.append(f"{path}: the same sample as {images[held[0]][0].name}; remove one of them")
                    continue
                images |= {modality: (path, found.index(modality) if mosaic else None) for modality in held}
    if layout.query_names and SPLITS[i] == "query":
        names = {path.stem for path in (base / layout.query_names).glob("*")}
        files = {name: images for name, images in files.items() if name.rpartition("/")[2] in names}
    samples = []
    for name, images in sorted(files.items()):
        match = re.search(facts.name, name)
        if not match:
            wrong.append(f"{base}: {name}: no identity and camera in the name; expected e.g. 0501_c0001_000 ({facts.name})")
            continue
        samples.append(Sample(name, int(match["pid"]), int(match["key"]) - facts.first_key, images))
    return samples


def _complete(samples: list[Sample], split: str, modalities: tuple[str, ...]) -> list[Sample]:
    """All samples of query and gallery, those with all modalities of train; says how many lack one."""
    lacking = [sample for sample in samples if len(sample.images) < len(modalities)]
    if lacking:
        named = ", ".join(sample.name for sample in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        then = "are left out" if split == "train" else "stay, with what they have"
        _warn(f"{len(lacking)} of {len(samples)} {split} samples lack a modality and {then}: {named}")
    return [sample for sample in samples if split != "train" or len(sample.images) == len(modalities)]


def hold_out(train: Split, num_ids: int) -> tuple[Split, Split, Split]:
    """Take the last `num_ids` identities out of a training split: (rest, query, gallery).

    Every held-out sample is in the gallery; the first of each (pid, key) is a query.
    """
    held = set(sorted(set(train.pids.tolist()))[-num_ids:])
    seen: Counter = Counter()

    def first(sample: Sample) -> bool:
        seen[sample.pid, sample.key] += 1
        return sample.pid in held and seen[sample.pid, sample.key] == 1

    return train.subset(lambda s: s.pid not in held), train.subset(first), train.subset(lambda s: s.pid in held)


# --- triplets (section 5.1)


def make_triplets(pids: np.ndarray, positives: int, rng: np.random.Generator) -> np.ndarray:
    """Rows (anchor, positive, negative) of sample indices, (T, 3), shuffled: `positives` rows for each anchor.

    Every sample is an anchor, unless it is the only one of its identity. Its positives are distinct where the identity
    has that many others, else all of them in turn; each row has a negative of its own.
    """
    order = np.argsort(pids, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(pids[order]) != 0])
    rows = []
    for start, end in zip(starts, [*starts[1:], len(pids)], strict=True):
        n = end - start
        if n > 1:
            others = rng.permuted(np.tile(np.arange(1, n), (n, 1)), axis=1)  # each anchor's way round its identity
            others = others[:, np.arange(positives) % (n - 1)]
            positive = start + (np.arange(n)[:, None] + others) % n
            negative = rng.integers(0, len(pids) - n, (n, positives))
            negative += n * (negative >= start)
            anchor = np.broadcast_to(np.arange(start, end)[:, None], positive.shape)
            rows.append(np.stack([anchor, positive, negative], -1).reshape(-1, 3))
    triplets = order[np.concatenate(rows)]
    return triplets[rng.permutation(len(triplets))]


class TripletBatches:
    """Batch sampler: lists of 3 * batch_size sample indices, anchors, then positives, then negatives.

    The triplets of an epoch depend on (seed, epoch) alone; every rank takes its own part of each step. The last,
    incomplete step is dropped. Raises UserError where no triplet or not one whole step can be made.
    """

    def __init__(self, pids: Tensor, batch_size: int, positives: int, seed: int):
        self.pids, self.batch_size, self.positives, self.seed = pids.numpy(), batch_size, positives, seed
        self.epoch = 0
        ids, counts = np.unique(self.pids, return_counts=True)
        if len(ids) < 2:
            raise UserError(
                f"number of identities in the training data is {len(ids)}: a triplet needs a negative, so at least 2"
            )
        self.num_triplets = int(counts[counts > 1].sum()) * positives
        if not self.num_triplets:
            raise UserError("every training identity has a single sample: a triplet needs a positive, so at least 2")
        if len(self) == 0:
            raise UserError(
                f"batch of {batch_size} triplets on {runtime.world_size()} ranks: the training data gives {self.num_triplets}"
                f" triplets an epoch ({len(self.pids)} samples, --positives {positives}); lower --batch-size"
            )

    def __len__(self) -> int:
        return self.num_triplets // (self.batch_size * runtime.world_size())

    def __iter__(self):
        triplets = make_triplets(self.pids, self.positives, runtime.numpy_rng(self.seed, 2, self.epoch))
        whole = self.batch_size * runtime.world_size()
        for step in range(len(self)):
            first = step * whole + runtime.rank() * self.batch_size
            yield triplets[first : first + self.batch_size].T.ravel().tolist()


class IdentityBatches(TripletBatches):
    """Batch sampler of our own recipe: 3 * batch_size sample indices, `samples` of each of as many identities as that makes.

    Steps an epoch, ranks and draws are as in TripletBatches, so that the two can be compared.
    """

    def __init__(self, pids: Tensor, batch_size: int, positives: int, seed: int, samples: int = 6):
        super().__init__(pids, batch_size, positives, seed)
        self.groups = [np.flatnonzero(self.pids == pid) for pid in np.unique(self.pids)]
        self.samples, self.chosen = samples, 3 * batch_size // samples * runtime.world_size()
        if 3 * batch_size % samples or self.chosen > len(self.groups):
            raise UserError(
                f"--sampling identities: {3 * batch_size} images a rank, {samples} of each identity, need a --batch-size that"
                f" {samples} divides three times, and {self.chosen} identities; the training data has {len(self.groups)}"
            )

    def __iter__(self):
        rng, rank, part = runtime.numpy_rng(self.seed, 3, self.epoch), runtime.rank(), self.chosen // runtime.world_size()
        for _ in range(len(self)):
            batch = [
                rng.choice(self.groups[i], self.samples, replace=len(self.groups[i]) < self.samples)
                for i in rng.choice(len(self.groups), self.chosen, replace=False)
            ]
            yield np.concatenate(batch[rank * part : (rank + 1) * part]).tolist()


# --- from uint8 to the model's input, batched, on the device


def augment(images: dict[str, Tensor], draws: Tensor, flip_x=0.5, flip_y=0.5, erase=0.5) -> dict[str, Tensor]:
    """Horizontal flip, vertical flip and random erasing (Zhong et al. 2020) of uint8 images (B, 3, H, W), each with its
    probability; section 5.2.

    `draws` (B, 7), uniform in [0, 1), decides for each sample: the same for all its modalities, which are registered.
    An erased rectangle covers 2% to 33% of the image, with an aspect of 0.3 to 3.3, and is black (published code).
    """
    H, W = next(iter(images.values())).shape[-2:]
    draws = draws.to(next(iter(images.values())).device)
    area = (0.02 + 0.31 * draws[:, 3]) * H * W
    aspect = 0.3 * (3.3 / 0.3) ** draws[:, 4]
    height, width = (area * aspect).sqrt().clamp(max=H - 1).round(), (area / aspect).sqrt().clamp(max=W - 1).round()
    top, left = (draws[:, 5] * (H - height + 1)).floor(), (draws[:, 6] * (W - width + 1)).floor()
    y, x = torch.arange(H, device=draws.device), torch.arange(W, device=draws.device)
    rows = (y >= top[:, None]) & (y < (top + height)[:, None])  # (B, H)
    columns = (x >= left[:, None]) & (x < (left + width)[:, None])  # (B, W)
    erased = (draws[:, 2] < erase)[:, None, None] & rows[:, :, None] & columns[:, None, :]  # (B, H, W)
    mirrored, upside_down = (draws[:, i].lt(p)[:, None, None, None] for i, p in enumerate((flip_x, flip_y)))
    result = {}
    for modality, image in images.items():
        if flip_x:
            image = torch.where(mirrored, image.flip(-1), image)
        if flip_y:
            image = torch.where(upside_down, image.flip(-2), image)
        result[modality] = image.masked_fill(erased[:, None], 0) if erase else image
    return result


def normalise(images: dict[str, Tensor], mean: dict, std: dict) -> dict[str, Tensor]:
    """uint8 (B, 3, H, W) -> float32, (x / 255 - mean) / std by channel, each modality with its own figures."""
    result = {}
    for modality, image in images.items():
        centre, spread = (255 * torch.tensor(x[modality], device=image.device).view(3, 1, 1) for x in (mean, std))
        result[modality] = (image - centre).div_(spread)
    return result


@runtime.program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", required=True, help="read every image, list everything that is wrong")
    parser.add_argument("--dataset", default="synthetic", choices=DATASETS, help="default: %(default)s")
    parser.add_argument("--data-root", default="data", help="the data set's folder or its parent (default: %(default)s)")
    parser.add_argument("--modalities", type=lambda text: tuple(text.split(",")), help="e.g. rgb,tir (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is drawn")
    args = parser.parse_args()
    wrong = check(args.dataset, args.data_root, args.modalities)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if wrong:
        raise UserError(f"{args.data_root}: {len(wrong)} things are wrong, see above")
    print(f"{args.data_root}: nothing is wrong")


if __name__ == "__main__":
    main()
