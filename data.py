"""Data sets of multi-modal ReID: what is known of each, how files are found and read, triplets.

python data.py --check --dataset rgbnt100 --data-root DIR     read all of it, list what is wrong
    --contact-sheet sheet.jpg                                 and show some of it

Shapes: B samples, H height, W width, T triplets of a step. Images are uint8 RGB, (3, H, W); a
sample maps modality to image.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import runtime
from runtime import UserError

SPLITS = ("train", "query", "gallery")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
MAX_PIXELS = 2**26  # of an image: more is refused before it is decoded
STORE_GB = 20.0  # RGBN300 at 224x224, the largest of the paper's, takes 16.6
ROOT = Path(__file__).parent

Ranges = dict[str, tuple[float, float]]  # modality -> the raw values that become 0 and 255

# --- what is known of each data set


@dataclass(frozen=True)
class Layout:
    """Where files lie: {split} and {modality} stand for the folders named here, * for any.

    Without {modality} a file is a mosaic: the tiles of all modalities side by side, each twice as
    wide as high; or, in a data set of one modality, that one's whole image.
    """

    pattern: str
    splits: tuple[str, str, str]  # folders of train, query, gallery
    modalities: tuple[str, ...] = ()  # folders, in the data set's order; none: as found
    query_names: str = ""  # folder whose file names say which samples of the query folder to take
    whole: bool = False  # one modality, in files of its own without a folder for it

    @property
    def mosaic(self) -> bool:
        return "{modality}" not in self.pattern and not self.whole

    def tree(self) -> str:
        """The tree in one line, for a message."""
        splits = ",".join(dict.fromkeys(self.splits))
        modalities = ",".join(self.modalities)
        modality = f"{{{modalities}}}" if modalities else "MODALITY"
        tree = self.pattern.format(split=f"{{{splits}}}", modality=modality)
        return tree + (f", {self.query_names}/* (names of the queries)" if self.query_names else "")


@dataclass(frozen=True)
class Facts:
    """A data set's facts; `name` finds identity and key (camera or scene) in a file's path."""

    layouts: tuple[Layout, ...]
    modalities: tuple[str, ...] = ()  # none: those found
    name: str = r"(?:^|/)(?P<pid>-?\d+)_c(?P<key>\d+)[^/]*$"
    first_key: int = 1  # in the names; ours start at 0
    junk: tuple[int, ...] = ()  # pids whose files are left out without a word
    counts: tuple[int, int, int] | None = None  # samples of train, query, gallery
    mean: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # else ImageNet's
    std: dict[str, tuple[float, float, float]] = field(default_factory=dict)


_MARKET = ("bounding_box_train", "query", "bounding_box_test")
_RGBNT100 = Layout("rgbir/{split}/*", _MARKET)
_FOLDERS = ("vis", "ni", "th")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    "synthetic": Facts((_RGBNT100,), ("rgb", "nir", "tir")),
    "rgbnt100": Facts(
        (
            _RGBNT100,
            Layout("reid_set_{modality}/{split}/*", _MARKET, ("R", "N", "T")),
            Layout(
                "{split}/{modality}/*/*",
                ("train", "validate", "validate"),
                ("R", "N", "T"),
                query_names="rgbir/query",
            ),
        ),
        ("rgb", "nir", "tir"),
        counts=(8675, 1715, 8575),
        mean={  # published code
            "rgb": (0.276, 0.271, 0.274),
            "nir": (0.346,) * 3,
            "tir": (0.761, 0.329, 0.322),
        },
        std={  # published code; NIR: see D13
            "rgb": (0.176, 0.176, 0.168),
            "nir": (0.168,) * 3,
            "tir": (0.257, 0.263, 0.216),
        },
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
        mean={  # published code
            "rgb": (0.272, 0.269, 0.272),
            "nir": (0.339,) * 3,
            "tir": (0.759, 0.325, 0.318),
        },
        std={"rgb": (0.174, 0.175, 0.167), "nir": (0.168,) * 3, "tir": (0.255, 0.258, 0.213)},
    ),
    "msvr310": Facts(
        (
            Layout(
                "{split}/*/{modality}/*",
                ("bounding_box_train", "query3", "bounding_box_test"),
                _FOLDERS,
            ),
        ),
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
    "market1501": Facts(
        (Layout("{split}/*", _MARKET, whole=True),),
        ("rgb",),
        counts=(12936, 3368, 15913),
        junk=(-1,),  # bad detections; 0000 are distractors, which stay in the gallery
    ),
    "folder": Facts((Layout("{split}/{modality}/*", SPLITS),)),
}


# --- samples and splits


@dataclass(frozen=True)
class Sample:
    """One capture of an object: each modality's file (and tile of a mosaic, or None), pid, key."""

    name: str
    pid: int
    key: int  # camera or scene: gallery samples with the query's pid and key are left out
    images: dict[str, tuple[Path, int | None]]


class Split(torch.utils.data.Dataset):
    """Samples sorted by name. split[i] -> ({modality: uint8 (3, H, W)}, pid, key).

    A modality that a sample lacks is absent. H and W are `image_size`, or the file's own without
    it. `store_gb` bounds what `decoded` may keep on disk, `ranges` scale images of more than 8
    bits. Raises UserError for an image that cannot be read.
    """

    def __init__(
        self,
        samples: list[Sample],
        modalities: tuple[str, ...],
        image_size: tuple[int, int] | None = None,
        store_gb: float = 0.0,
        ranges: Ranges | None = None,
    ):
        self.samples, self.modalities, self.image_size = samples, modalities, image_size
        self.store_gb, self.ranges = store_gb, ranges or {}
        self.pids = torch.tensor([sample.pid for sample in samples], dtype=torch.int64)
        self.keys = torch.tensor([sample.key for sample in samples], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], int, int]:
        sample = self.samples[i]
        return self.read(sample), sample.pid, sample.key

    @cached_property
    def decoded(self) -> dict[str, Tensor] | None:
        """Images of all samples, uint8 (N, 3, H, W), from the store; None where it has no room."""
        return open_store(self)

    def read(self, sample: Sample, modalities: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Decode a sample's files, each once, whatever number of tiles is taken from it."""
        files: dict[tuple, dict[str, int | None]] = {}
        for modality in modalities or self.modalities:
            if modality in sample.images:
                path, tile = sample.images[modality]
                files.setdefault((path, self.ranges.get(modality)), {})[modality] = tile
        images = {}
        for (path, scaling), tiles in files.items():
            decoded = read_tiles(path, list(tiles.values()), self.image_size, scaling)
            images |= zip(tiles, decoded, strict=True)
        return images

    def restricted(self, modalities: tuple[str, ...]) -> "Split":
        """The same samples with these modalities alone; those that have none are left out."""
        samples = []
        for sample in self.samples:
            images = {name: file for name, file in sample.images.items() if name in modalities}
            samples += [replace(sample, images=images)] if images else []
        own = tuple(name for name in self.modalities if name in modalities)
        return Split(samples, own, self.image_size, self.store_gb, self.ranges)

    def subset(self, samples: list[Sample]) -> "Split":
        return Split(samples, self.modalities, self.image_size, self.store_gb, self.ranges)


def read_tiles(
    path: Path,
    tiles: list[int | None],
    size: tuple[int, int] | None,
    scaling: tuple[float, float] | None = None,
) -> Tensor:
    """These tiles of a mosaic, or [None] for the whole image: (tiles, 3, H, W), uint8."""
    pixels = torch.from_numpy(np.array(read_image(path, scaling)))
    H, W, _ = pixels.shape
    if tiles == [None]:
        images = pixels[None]
    elif W % (2 * H) or 2 * H * (max(tiles) + 1) > W:
        raise UserError(
            f"{path}: {W}x{H} pixels; a mosaic has tiles twice as wide as high, here {2 * H}x{H},"
            f" at least {max(tiles) + 1} side by side"
        )
    else:
        images = pixels.unflatten(1, (-1, 2 * H)).transpose(0, 1)[tiles]
    images = images.permute(0, 3, 1, 2)
    if size and images.shape[2:] != size:
        # As Pillow resizes, within 2 of 255, and several times as fast; see D22
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    return images


def read_image(path: Path, scaling: tuple[float, float] | None = None) -> Image.Image:
    """An image as RGB, upright. `scaling`: raw values, of more than 8 bits, that become 0, 255."""
    try:
        with open_image(path) as image:
            upright = ImageOps.exif_transpose(image)
            if not is_deep(image):
                return upright.convert("RGB")
            raw = np.nan_to_num(np.asarray(upright, np.float32))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: not an image that can be read ({error}); replace or remove the file"
        ) from None
    if not scaling:
        raise UserError(
            f"{path}: more than 8 bits a channel, values {raw.min():g} to {raw.max():g}; say which"
            " become 0 and 255 by --tir-range LOW HIGH, or another sensor's by --range"
            " NAME=LOW,HIGH (python data.py --check suggests them)"
        )
    low, high = scaling
    scaled = np.rint((raw - low) * (255 / (high - low))).clip(0, 255)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def open_image(path: Path) -> Image.Image:
    """An image file, of which only the head has been read."""
    image = Image.open(path, formats=("JPEG", "PNG", "BMP", "TIFF"))
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    return image


def is_deep(image: Image.Image) -> bool:
    """Whether its one channel has more than 8 bits: integers or floats."""
    return image.mode[0] in "IF"


# --- the store: each image decoded once, for all epochs, runs and ranks of a machine

STORE_VERSION = 1  # of what reading gives, a part of the files' names


def open_store(split: Split) -> dict[str, Tensor] | None:
    """The images of a split, mapped from files of the store, which are made where they are absent.

    All ranks ask together: the first of a machine decodes, and the others map the same pages of
    memory. None where the store has no room.
    """
    if not (split.store_gb and split.image_size and len(split)):
        return None
    files = store_files(split)
    with runtime.local_rank0_first():
        missing = [modality for modality, file in files.items() if not file.exists()]
        if missing and runtime.local_rank() == 0:
            fill_store(split, {modality: files[modality] for modality in missing})
    images = {}
    for modality, file in files.items():
        try:
            # Private pages, of which none is ever written: torch wants an array that could be
            images[modality] = torch.from_numpy(np.load(file, mmap_mode="c"))
            with suppress(OSError):  # of another user
                os.utime(file)  # what was used last is removed last
        except OSError:  # not made, or removed by another run since
            return None
        except (ValueError, EOFError) as error:
            raise UserError(f"{file}: damaged ({error}); delete it, it is made anew") from None
    return images


def store_files(split: Split) -> dict[str, Path]:
    """Each modality's file, named after all that it depends on: the images' paths, sizes, times."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    states: dict[Path, str] = {}
    files = {}
    for modality in split.modalities:
        known = (STORE_VERSION, split.image_size, *split.ranges.get(modality, ()))
        digest = hashlib.sha256(repr(known).encode())
        for sample in split.samples:
            path, tile = sample.images.get(modality, (None, None))
            if path and path not in states:
                status = path.stat()
                states[path] = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
            digest.update(f"{states.get(path)} {tile}\n".encode())
        files[modality] = Path(cache, "graft", f"{digest.hexdigest()[:32]}.npy")
    return files


def fill_store(split: Split, files: dict[str, Path]) -> None:
    """Decode a split's images of these modalities into the files, in all threads, if they fit."""
    shape = (len(split), 3, *split.image_size)
    size, folder = len(files) * int(np.prod(shape)), next(iter(files.values())).parent
    what = f"the decoded images of {len(split)} samples, {size / 1e9:.2f} GB"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder), tempfile.TemporaryDirectory(dir=folder) as unfinished:
            if all(file.exists() for file in files.values()):
                return
            if lack := make_room(folder, size, split.store_gb):
                _warn(f"{what}, do not fit {lack}: images are decoded each time they are needed")
                return
            arrays = {}
            for modality, file in files.items():
                path = Path(unfinished, file.name)
                arrays[modality] = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, a crash later
                    with open(path, "r+b") as opened:
                        os.posix_fallocate(opened.fileno(), 0, path.stat().st_size)

            def decode(i: int) -> None:
                for modality, image in split.read(split.samples[i], tuple(files)).items():
                    arrays[modality][i] = image.numpy()

            # Threads, as decoders release the lock
            pool = ThreadPoolExecutor(runtime.num_cores())
            with pool, closing(pool.map(decode, range(len(split)))) as done:
                for _ in tqdm(done, "decoding", len(split), leave=False, disable=None):
                    if number := runtime.noted_signal():
                        text = "stopped while decoding: the same command begins anew"
                        raise runtime.Stopped(number, text)
            for modality, file in files.items():
                arrays[modality].flush()
                os.replace(Path(unfinished, file.name), file)
        runtime.print0(f"{what}, are kept in {folder} (--store 0: decode each time)")
    except OSError as error:
        _warn(f"{what}, cannot be kept ({error}): images are decoded each time they are needed")


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """A second process waits, and then finds what it was about to make."""
    with open(folder / "lock", "a") as file:
        with suppress(OSError, ImportError):  # a system or file system without such locks
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX)
            for unfinished in folder.glob("tmp*"):  # of a process that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
        yield


def make_room(folder: Path, size: int, store_gb: float) -> str:
    """Remove what was used longest ago, until `size` bytes fit; if they can't, says into what."""
    limit = store_gb * 1e9
    if size > limit:
        return f"--store {store_gb:g}"
    if size > runtime.available_memory():  # pages that do not stay are read from disk each time
        return "the memory that is free"
    free, removed = shutil.disk_usage(folder).free, []
    kept = [(file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*.npy")]
    kept.sort(reverse=True)
    total = sum(file_size for _, file_size, _ in kept)
    while total + size > limit or size > free / 2:
        if not kept:  # nothing is removed in vain
            return f"the disk of {folder}"
        _, file_size, file = kept.pop()
        total, free = total - file_size, free + file_size
        removed.append(file)
    for file in removed:
        file.unlink(missing_ok=True)  # a run that has mapped it keeps its pages
    return ""


# --- batches


def read_batches(
    split: Split, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The images of batches of sample indices, in order: {modality: uint8 (B, 3, H, W)}.

    On the device; of samples that have the same modalities. All ranks call it together. Close the
    iterator when done.
    """
    pin = device.type == "cuda"
    if split.decoded:
        reading = (gather(split, indices, pin) for indices in batches)
    else:
        reading = stream(split, batches, workers, pin)
    return prefetch(reading, device)


def gather(split: Split, indices: list[int], pin: bool) -> dict[str, Tensor]:
    """Copy samples out of the store."""
    order, images = torch.tensor(indices), {}
    for modality in split.samples[indices[0]].images:
        stored = split.decoded[modality]
        out = torch.empty(len(order), *stored.shape[1:], dtype=torch.uint8, pin_memory=pin)
        images[modality] = torch.index_select(stored, 0, order, out=out)
    return images


def stream(
    split: Split, batches: list[list[int]], workers: int, pin: bool
) -> Iterator[dict[str, Tensor]]:
    """Decode batches by `workers` processes, which ignore signals: they end with this one alone."""
    loader = torch.utils.data.DataLoader(
        split,
        batch_sampler=batches,
        num_workers=max(0, min(workers, len(batches) - 1)),  # none for a single batch
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=runtime.ignore_signals,
    )
    reader = iter(loader)
    try:
        while (batch := next(reader, None)) is not None:
            yield batch
    finally:
        # torch ends them when the last reference goes, which an error's traceback may hold for long
        if hasattr(reader, "_shutdown_workers"):
            reader._shutdown_workers()


def collate(samples: list[tuple[dict[str, Tensor], int, int]]) -> dict[str, Tensor]:
    """Samples with the same modalities -> {modality: (B, 3, H, W)}."""
    images = [images for images, _, _ in samples]
    return {name: torch.stack([image[name] for image in images]) for name in images[0]}


def prefetch(
    batches: Iterator[dict[str, Tensor]], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches on the device; on CUDA the next one is read and sent while the model works on this.

    A thread reads into pinned memory, and a stream of its own copies. Closes `batches`, too.
    """

    def send() -> tuple | None:
        images = next(batches, None)
        if images is None:
            return None
        with torch.cuda.stream(side):
            return runtime.to_device(images, device), side.record_event()

    with closing(batches):
        if device.type != "cuda":
            for images in batches:
                yield runtime.to_device(images, device)
            return
        side = torch.cuda.Stream(device)
        # A new thread's device is the first one, whatever the rank's
        with ThreadPoolExecutor(1, "", torch.cuda.set_device, (device,)) as pool:
            coming = pool.submit(send)
            while (sent := coming.result()) is not None:
                images, arrived = sent
                coming = pool.submit(send)
                work = torch.cuda.current_stream(device)
                work.wait_event(arrived)
                for image in images.values():
                    image.record_stream(work)  # its memory is not for the next copy before that
                yield images


# --- finding the files


@dataclass(frozen=True)
class Dataset:
    """Splits and facts of a data set on disk.

    `mean` and `std`: modality -> three channels, of values from 0 to 1.
    """

    name: str
    modalities: tuple[str, ...]
    train: Split
    query: Split
    gallery: Split
    mean: dict[str, tuple[float, float, float]]
    std: dict[str, tuple[float, float, float]]


class Index(NamedTuple):
    """What a split's folders hold: `absent` have no chosen modality, `problems` are no samples."""

    samples: list[Sample]
    absent: list[str]
    problems: list[str]


def load_dataset(
    name: str,
    root: str | Path,
    modalities: tuple[str, ...] | None = None,
    image_size: tuple[int, int] | None = None,
    store_gb: float = 0.0,
    ranges: Ranges | None = None,
) -> Dataset:
    """Find the files of a data set; `root` is its folder or the parent of it.

    "synthetic" is rendered where it is absent. `modalities` keeps those alone, `image_size`
    (height, width) resizes, `store_gb` bounds the store of decoded images, `ranges` scale those of
    more than 8 bits. Training samples that lack a modality are left out; query and gallery samples
    stay with what they have; what has none is left out. Each is said in a warning. Raises
    UserError, with the trees expected, where nothing matches.
    """
    source = find_source(name, Path(root), modalities)
    if unknown := [modality for modality in ranges or {} if modality not in source.found]:
        found = ", ".join(source.found)
        _warn(f"--range {', '.join(unknown)}: {source.base} has no such modality, but {found}")
    splits = {}
    for number, split in enumerate(SPLITS):
        index = source.index(number)
        if index.problems:
            count = len(index.problems) - 1
            more = f"; and {count} more, python data.py --check lists all" if count else ""
            raise UserError(index.problems[0] + more)
        samples = _usable(index, split, source.modalities)
        if not samples:
            raise UserError(source.nothing_in(split))
        splits[split] = Split(samples, source.modalities, image_size, store_gb, ranges)
        known = source.facts.counts
        if known and len(samples) != known[number]:
            _warn(
                f"{source.base}: {split} has {len(samples)} samples, {name} is known to have"
                f" {known[number]}; going on with what is there"
            )
    facts, chosen = source.facts, source.modalities
    mean = {modality: facts.mean.get(modality, _IMAGENET_MEAN) for modality in chosen}
    std = {modality: facts.std.get(modality, _IMAGENET_STD) for modality in chosen}
    return Dataset(name, chosen, **splits, mean=mean, std=std)


def _usable(index: Index, split: str, modalities: tuple[str, ...]) -> list[Sample]:
    """The samples that a split can use; says how many lack something, and which."""
    total = len(index.samples) + len(index.absent)
    if index.absent:
        _warn(
            f"{len(index.absent)} of {total} {split} samples have none of {', '.join(modalities)}"
            f" and are left out: {_first(index.absent)}"
        )
    lacking = [sample.name for sample in index.samples if len(sample.images) < len(modalities)]
    if lacking:
        what = "are left out" if split == "train" else "stay, with what they have"
        _warn(
            f"{len(lacking)} of {total} {split} samples lack a modality and {what}:"
            f" {_first(lacking)}"
        )
    if split != "train":
        return index.samples
    return [sample for sample in index.samples if len(sample.images) == len(modalities)]


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _warn(message: str) -> None:
    runtime.print0(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Source:
    """A data set found on disk: folder, layout, the modalities it has and those chosen."""

    base: Path
    layout: Layout
    facts: Facts
    found: tuple[str, ...]
    modalities: tuple[str, ...]

    def nothing_in(self, split: str) -> str:
        tree = self.layout.tree()
        return f"{self.base}: no usable images in split {split}; expected files at {tree}"

    def files(self, number: int, folder: str) -> Iterator[tuple[str, Path]]:
        """Image files of split `number` in a modality's folder, sorted, with their sample's name.

        That is the path without split, modality and suffix: the same for all modalities.
        """
        parts = self.layout.pattern.split("/")
        stars = [place for place, part in enumerate(parts) if part == "*"]
        pattern = self.layout.pattern.format(split=self.layout.splits[number], modality=folder)
        start = len(str(self.base / "x")) - 1
        for path in sorted(self.base.glob(pattern), key=str):
            stem, suffix = os.path.splitext(path)
            if suffix.lower() in SUFFIXES:
                places = stem[start:].split(os.sep)
                yield "/".join(places[star] for star in stars), path

    def index(self, number: int) -> Index:
        """Samples of split `number`, sorted by name."""
        files: dict[str, dict[str, tuple[Path, int | None]]] = {}
        problems: list[str] = []
        others: set[str] = set()  # names that a modality has which was not chosen
        inside = _Inside(self.base)
        for folder, modalities in self.folders().items():
            for name, path in self.files(number, folder):
                if not modalities:
                    others.add(name)
                elif outside := inside.leaves(path):
                    problems.append(f"{path}: {outside}")
                elif modalities[0] in files.setdefault(name, {}):
                    twin = files[name][modalities[0]][0].name
                    problems.append(f"{path}: the same sample as {twin}; remove one of them")
                else:
                    for modality in modalities:
                        tile = self.found.index(modality) if self.layout.mosaic else None
                        files[name][modality] = (path, tile)
        if self.layout.query_names and SPLITS[number] == "query":
            queries = {path.stem for path in (self.base / self.layout.query_names).glob("*")}
            files = {name: f for name, f in files.items() if name.rpartition("/")[2] in queries}
            others = {name for name in others if name.rpartition("/")[2] in queries}
        samples = []
        for name, images in sorted(files.items()):
            if images and (sample := self.sample(name, images)):
                samples += [sample] if sample.pid not in self.facts.junk else []
            elif images:
                problems.append(
                    f"{self.base}: {name}: no identity and camera in the name;"
                    f" expected e.g. 0501_c0001_000 ({self.facts.name})"
                )
        return Index(samples, sorted(others - files.keys()), problems)

    def folders(self) -> dict[str, tuple[str, ...]]:
        """Folders to look in, and which of the chosen modalities a file there holds."""
        if self.layout.mosaic or self.layout.whole:
            return {"": self.modalities}
        named = zip(self.layout.modalities or self.found, self.found, strict=True)
        return {folder: (name,) if name in self.modalities else () for folder, name in named}

    def sample(self, name: str, images: dict) -> Sample | None:
        match = re.search(self.facts.name, name)
        if not match:
            return None
        return Sample(name, int(match["pid"]), int(match["key"]) - self.facts.first_key, images)


class _Inside:
    """Finds links that lead out of a data set; each folder is resolved once."""

    def __init__(self, base: Path):
        self.base, self.folders = base.resolve(), set()

    def leaves(self, path: Path) -> str:
        folder = os.path.dirname(path)
        if folder in self.folders and not os.path.islink(path):
            return ""
        target = path.resolve()
        if not target.is_relative_to(self.base):
            return f"leads to {target}, out of the data set; put a copy in its place"
        if not os.path.islink(path):
            self.folders.add(folder)
        return ""


def find_source(name: str, root: Path, modalities: tuple[str, ...] | None) -> Source:
    """The data set at `root` or below it. Raises UserError where it or a modality is absent."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    if name == "synthetic":
        _render(root)
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; --data-root expects the folder of {name}, or its parent"
        )
    facts = DATASETS[name]
    base, layout = _detect(name, facts, root)
    found = facts.modalities or _modality_folders(base, layout)
    chosen = tuple(modalities or found)
    if unknown := [modality for modality in chosen if modality not in found]:
        raise UserError(
            f"{base}: no modality {', '.join(unknown)} in {name}; expected some of"
            f" {', '.join(found)}"
        )
    return Source(base, layout, facts, found, chosen)


def _render(root: Path) -> None:
    """Render the synthetic set into ROOT/synthetic, unless it (or ROOT itself) is one."""
    from extras import synthetic

    with runtime.rank0_first():
        folder = root if (root / "VERSION").exists() else root / "synthetic"
        if not folder.exists():
            runtime.print0(f"rendering the synthetic set into {folder}")
            command = [sys.executable, "-m", "extras.synthetic", "--out", str(folder.absolute())]
            if subprocess.run(command, cwd=ROOT).returncode:
                raise UserError(f"{folder}: rendering failed; see above")
    file = folder / "VERSION"
    version = file.read_text().strip() if file.exists() else "none"
    if version != str(synthetic.VERSION):
        raise UserError(
            f"{folder}: rendered by version {version}, expected {synthetic.VERSION};"
            " delete the folder, it is made anew"
        )


def _detect(name: str, facts: Facts, root: Path) -> tuple[Path, Layout]:
    """The data set's folder, and the first layout whose training folder is there."""
    below = [child for child in sorted(root.iterdir()) if child.name.lower() == name]
    for base in [root, *filter(Path.is_dir, below)]:
        for layout in facts.layouts:
            modality = (*layout.modalities, "*")[0]
            folder = layout.pattern.format(split=layout.splits[0], modality=modality)
            if any(base.glob(folder.rstrip("/*"))):
                return base, layout
    trees = "".join(f"\n  {layout.tree()}" for layout in facts.layouts)
    raise UserError(
        f"{root}: no layout of {name} found there or in {root / name};"
        f" expected one of these trees:{trees}"
    )


def _modality_folders(base: Path, layout: Layout) -> tuple[str, ...]:
    """The names of the modalities' folders: rgb, nir, tir first, then by alphabet."""
    parts = layout.pattern.split("/")
    pattern = "/".join(parts[: parts.index("{modality}") + 1])
    folders = set()
    for split in layout.splits:
        for path in base.glob(pattern.format(split=split, modality="*")):
            if path.is_dir():
                folders.add(path.name)
    usual = ("rgb", "nir", "tir")
    known = [name for name in usual if name in folders]
    return (*known, *sorted(folders - set(usual)))


# --- checking all of it


def check(
    name: str,
    root: str | Path,
    modalities: tuple[str, ...] | None = None,
    ranges: Ranges | None = None,
    sheet: Path | None = None,
) -> list[str]:
    """Read every image of a data set; a line for each thing that is wrong with it.

    Prints what it holds, and draws a contact sheet of it.
    """
    from extras import report

    source = find_source(name, Path(root), modalities)
    splits, lines = {}, []
    for number, split in enumerate(SPLITS):
        index = source.index(number)
        splits[split] = Split(index.samples, source.modalities, ranges=ranges)
        lines += index.problems
        if not index.samples:
            lines.append(source.nothing_in(split))
        lacking = {name: source.modalities for name in index.absent}
        for sample in index.samples:
            if absent := [m for m in source.modalities if m not in sample.images]:
                lacking[sample.name] = absent
        lines += [
            f"{source.base}: {split}: {name} lacks {', '.join(absent)}"
            for name, absent in lacking.items()
        ]
        lines += _unreadable(splits[split], split)
    lines += [f"{source.base}: {line}" for line in _inconsistent(splits)]
    return lines + [f"{source.base}: {line}" for line in report.report(splits, sheet)]


def _unreadable(split: Split, name: str) -> list[str]:
    any_range = dict.fromkeys(split.modalities, (0.0, 1.0))  # the lack of one is said once for all
    split = Split(split.samples, split.modalities, ranges={**any_range, **split.ranges})

    def problem(sample: Sample) -> str | None:
        try:
            split.read(sample)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(problem, split.samples)
        return [line for line in tqdm(results, name, len(split), leave=False, disable=None) if line]


def _inconsistent(splits: dict[str, Split]) -> list[str]:
    """Identities that cannot be trained on, queries that cannot be found, leaks."""
    counts = Counter(sample.pid for sample in splits["train"].samples)
    keys: dict[int, set[int]] = {}
    for sample in splits["gallery"].samples:
        keys.setdefault(sample.pid, set()).add(sample.key)
    lines = [
        f"train: identity {pid} has a single sample, so no positive"
        for pid, count in counts.items()
        if count == 1
    ]
    lines += [
        f"query: {sample.name} has no match in the gallery from another camera or scene"
        for sample in splits["query"].samples
        if not keys.get(sample.pid, set()) - {sample.key}
    ]
    lines += [
        f"identity {pid} is in the training data and in the gallery"
        for pid in sorted(counts.keys() & keys.keys())
    ]
    return lines


def hold_out(train: Split, num_ids: int) -> tuple[Split, Split, Split]:
    """Take the last `num_ids` identities out of a training split: (rest, query, gallery).

    Every held-out sample is in the gallery; the first of each (pid, key) is a query.
    """
    held_out = set(train.pids.unique().tolist()[-num_ids:])
    gallery = [sample for sample in train.samples if sample.pid in held_out]
    first = {}
    for sample in gallery:
        first.setdefault((sample.pid, sample.key), sample)
    rest = [sample for sample in train.samples if sample.pid not in held_out]
    return train.subset(rest), train.subset(list(first.values())), train.subset(gallery)


# --- triplets (section 5.1)


def make_triplets(pids: np.ndarray, positives: int, rng: np.random.Generator) -> np.ndarray:
    """Rows (anchor, positive, negative) of sample indices, (triplets, 3), shuffled.

    `positives` rows for each anchor; every sample is an anchor, unless it is the only one of its
    identity. Its positives are distinct where the identity has that many others, else all of them
    in turn; each row has a negative of its own.
    """
    order = np.argsort(pids, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(pids[order]) != 0])
    rows = []
    for start, end in zip(starts, [*starts[1:], len(pids)], strict=True):
        n = end - start
        if n == 1:
            continue
        # Each anchor goes its own way round the other samples of its identity
        offset = rng.permuted(np.tile(np.arange(1, n), (n, 1)), axis=1)
        offset = offset[:, np.arange(positives) % (n - 1)]
        positive = start + (np.arange(n)[:, None] + offset) % n
        negative = rng.integers(0, len(pids) - n, (n, positives))
        negative += n * (negative >= start)
        anchor = np.broadcast_to(np.arange(start, end)[:, None], positive.shape)
        rows.append(np.stack([anchor, positive, negative], -1).reshape(-1, 3))
    triplets = order[np.concatenate(rows)]
    return triplets[rng.permutation(len(triplets))]


class TripletSampler:
    """The steps of an epoch: `steps(epoch)` -> sample indices (steps, 3, T).

    Rows are anchors, positives, negatives. They depend on (seed, epoch) alone, so neither on the
    number of ranks nor on where a run was resumed. The last, incomplete step is dropped. Raises
    UserError where no triplet, or not one whole step, can be made.
    """

    def __init__(self, pids: Tensor, batch_size: int, positives: int, seed: int):
        self.pids, self.batch_size, self.positives = pids.numpy(), batch_size, positives
        self.seed = seed
        ids, counts = np.unique(self.pids, return_counts=True)
        if len(ids) < 2:
            raise UserError(
                f"number of identities in the training data is {len(ids)}: a triplet needs a"
                " negative, so at least 2"
            )
        num_triplets = int(counts[counts > 1].sum()) * positives
        if not num_triplets:
            raise UserError(
                "every training identity has a single sample: a triplet needs a positive, so at"
                " least 2"
            )
        self.num_steps = num_triplets // batch_size
        if not self.num_steps:
            raise UserError(
                f"--batch-size {batch_size}: an epoch has only {num_triplets} triplets"
                f" ({len(self.pids)} samples, --positives {positives}); lower it"
            )

    def steps(self, epoch: int) -> np.ndarray:
        rng = runtime.numpy_rng(self.seed, 2, epoch)
        triplets = make_triplets(self.pids, self.positives, rng)[: self.num_steps * self.batch_size]
        return triplets.reshape(self.num_steps, self.batch_size, 3).transpose(0, 2, 1)


class IdentitySampler(TripletSampler):
    """Our own recipe's steps, of the same shape: `samples` of each of 3 * T / samples identities.

    There are as many steps as TripletSampler gives, so that the two can be compared. Rows are no
    roles here.
    """

    def __init__(self, pids: Tensor, batch_size: int, positives: int, seed: int, samples: int = 6):
        super().__init__(pids, batch_size, positives, seed)
        self.samples = samples
        self.groups = [np.flatnonzero(self.pids == pid) for pid in np.unique(self.pids)]
        self.num_ids, rest = divmod(3 * batch_size, samples)
        if rest or not 2 <= self.num_ids <= len(self.groups):
            raise UserError(
                f"--sampling identities: --batch-size {batch_size} makes {3 * batch_size} images,"
                f" {samples} of each of {3 * batch_size / samples:g} identities; expected a whole"
                f" number of them from 2 to the training data's {len(self.groups)}"
            )

    def steps(self, epoch: int) -> np.ndarray:
        rng = runtime.numpy_rng(self.seed, 3, epoch)
        steps = np.empty((self.num_steps, self.num_ids, self.samples), dtype=np.int64)
        for step in steps:
            identities = rng.choice(len(self.groups), self.num_ids, replace=False)
            for row, identity in zip(step, identities, strict=True):
                group = self.groups[identity]
                row[:] = rng.choice(group, self.samples, replace=len(group) < self.samples)
        return steps.reshape(self.num_steps, 3, self.batch_size)


def share_out(batch_size: int, per_pass: int, ranks: int) -> list[list[slice]]:
    """How the triplets of a step are shared: [pass][rank] -> its slice of them.

    As even as it goes: 26 on 8 ranks are 4, 4, 3, ... No rank takes more than `per_pass` at a
    time, except where that would leave another without any. Raises UserError for fewer triplets
    than ranks.
    """
    if batch_size < ranks:
        raise UserError(
            f"--batch-size {batch_size}: fewer triplets than the {ranks} ranks; raise it, or start"
            " fewer ranks"
        )
    passes = min(-(-batch_size // (ranks * per_pass)), batch_size // ranks)
    return [even_slices(part, ranks) for part in even_slices(slice(0, batch_size), passes)]


def even_slices(whole: slice, parts: int) -> list[slice]:
    """A slice cut into parts whose lengths differ by one at most, longer ones first."""
    length, rest = divmod(whole.stop - whole.start, parts)
    ends = [whole.start + (i + 1) * length + min(i + 1, rest) for i in range(parts)]
    return [slice(a, b) for a, b in pairwise([whole.start, *ends])]


# --- from uint8 to the model's input, batched, on the device


def augment(
    images: dict[str, Tensor],
    draws: Tensor,
    flips: tuple[float, float] = (0.5, 0.5),
    erase: float = 0.5,
) -> dict[str, Tensor]:
    """Horizontal and vertical flips and random erasing (Zhong et al. 2020); section 5.2.

    Images are uint8 (B, 3, H, W), on the device of `draws`, (B, 7), uniform in [0, 1), which decide
    for each sample: the same for all its modalities, which are registered. An erased rectangle
    covers 2% to 33% of the image, with an aspect of 0.3 to 3.3, and is black (published code).
    """
    height, width = next(iter(images.values())).shape[-2:]
    mirrored, upside_down = draws[:, 0] < flips[0], draws[:, 1] < flips[1]  # (B,)
    hidden = rectangles(draws[:, 3:], height, width)  # (B, H, W)
    hidden = hidden & (draws[:, 2] < erase)[:, None, None]
    augmented = {}
    for modality, image in images.items():
        if flips[0]:
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        if flips[1]:
            image = torch.where(upside_down[:, None, None, None], image.flip(-2), image)
        augmented[modality] = image.masked_fill(hidden[:, None], 0) if erase else image
    return augmented


def rectangles(draws: Tensor, H: int, W: int) -> Tensor:
    """A random rectangle of each image as a mask (B, H, W); draws (B, 4): area, aspect, place."""
    area = (0.02 + 0.31 * draws[:, 0]) * H * W
    aspect = 0.3 * (3.3 / 0.3) ** draws[:, 1]
    height = (area * aspect).sqrt().clamp(max=H - 1).round()
    width = (area / aspect).sqrt().clamp(max=W - 1).round()
    top = (draws[:, 2] * (H - height + 1)).floor()[:, None]
    left = (draws[:, 3] * (W - width + 1)).floor()[:, None]
    y, x = torch.arange(H, device=draws.device), torch.arange(W, device=draws.device)
    rows = (y >= top) & (y < top + height[:, None])  # (B, H)
    columns = (x >= left) & (x < left + width[:, None])  # (B, W)
    return rows[:, :, None] & columns[:, None, :]


class Normalise:
    """uint8 images (B, 3, H, W) -> float32, (x / 255 - mean) / std, each modality with its own.

    `mean` and `std`: modality -> three channels. They are put on the device once.
    """

    def __init__(self, mean: dict, std: dict, device: torch.device):
        def constants(values: dict) -> dict[str, Tensor]:
            return {
                modality: 255 * torch.tensor(channels, device=device).view(3, 1, 1)
                for modality, channels in values.items()
            }

        self.mean, self.std = constants(mean), constants(std)

    def __call__(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            modality: (image - self.mean[modality]).div_(self.std[modality])
            for modality, image in images.items()
        }


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__)
    text = "read every image, list everything that is wrong"
    parser.add_argument("--check", action="store_true", required=True, help=text)
    add_options(parser)
    text = "draw some identities by some cameras, all sensors of a sample side by side"
    parser.add_argument("--contact-sheet", metavar="FILE", type=Path, help=text)
    text = "accepted by every program; nothing is drawn here"
    parser.add_argument("--seed", type=runtime.whole(0), default=0, help=text)
    args = parser.parse_args()
    sheet = args.contact_sheet
    if sheet and not (sheet.absolute().parent.is_dir() and sheet.suffix.lower() in SUFFIXES):
        raise UserError(
            f"--contact-sheet {sheet}: expected a picture's name in a folder that is there"
        )
    lines = check(
        args.dataset, args.data_root, args.modalities, args.range, sheet=args.contact_sheet
    )
    print(*lines, sep="\n", end="\n" if lines else "")
    if lines:
        raise UserError(f"{args.data_root}: {len(lines)} things are wrong, see above")
    print(f"{args.data_root}: nothing is wrong")


def add_options(parser, trained: bool = False) -> None:
    """--dataset, --data-root and --modalities; `trained`: their defaults are a checkpoint's."""
    default = " (default: as in training)" if trained else ""
    text = f"synthetic is rendered where it is absent{default}"
    fallback = None if trained else "synthetic"
    parser.add_argument("--dataset", default=fallback, choices=DATASETS, help=text)
    text = f"the data set's folder or its parent{default}"
    fallback = None if trained else "data"
    parser.add_argument("--data-root", metavar="DIR", default=fallback, help=text)
    text = f"e.g. rgb,tir (default: {'all that were trained' if trained else 'all there are'})"
    parser.add_argument("--modalities", metavar="NAMES", type=runtime.names, help=text)
    text = f"raw values of TIR that become 0 and 255, in images of more than 8 bits{default}"
    option = {"action": _RangeOption, "dest": "range", "type": runtime.real()}
    parser.add_argument("--tir-range", nargs=2, metavar=("LOW", "HIGH"), help=text, **option)
    option["type"] = _named_range
    text = "the same of any sensors, by name"
    parser.add_argument("--range", nargs="+", metavar="NAME=LOW,HIGH", help=text, **option)


class _RangeOption(argparse.Action):
    """--tir-range and --range fill one dictionary; see Ranges."""

    def __call__(self, parser, args, values, option=None):
        named = [("tir", tuple(values))] if option == "--tir-range" else values
        for _, (low, high) in named:
            if not low < high:
                raise argparse.ArgumentError(
                    self, f"expected LOW below HIGH, not {low:g} and {high:g}"
                )
        args.range = {**(args.range or {}), **dict(named)}


def _named_range(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, pair = text.partition("=")
    values = pair.split(",")
    if not name or len(values) != 2:
        raise argparse.ArgumentTypeError(f"expected NAME=LOW,HIGH, e.g. tir=7000,9500, not {text}")
    return name, tuple(map(runtime.real(), values))


def add_store_option(parser) -> None:
    text = "disk space for decoded images (~/.cache/graft); 0: decode each time they are needed"
    parser.add_argument("--store", metavar="GB", type=runtime.real(0), default=STORE_GB, help=text)


if __name__ == "__main__":
    main()
