"""Data sets of multi-modal ReID (section 5.1): finding and reading files, triplets, augmentation.

Shapes: B samples, H height, W width, T triplets of a step. Images are uint8 RGB, (3, H, W); a
sample maps modality to image, in the data set's order of modalities.
"""

import csv
import hashlib
import math
import os
import re
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

import runtime
from runtime import UserError

SPLITS = ("train", "query", "gallery")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 2**26  # a larger image is refused before it is decoded
STORE_GB = 20.0  # RGBN300 at 224x224, the largest of the paper's, takes 16.6
STORE_VERSION = 2  # raised when decoding changes: part of the names of the store's files
# Seconds that an image may take after a signal. Not 0: train.py finishes its step, then saves
PATIENCE = 10
# Left in folders by file managers, network drives and notebooks; passed over without a word
HIDDEN = re.compile(
    r"\..*|__MACOSX|@eaDir|@__thumb|@Recycle|#recycle|#snapshot|\$RECYCLE\.BIN|lost\+found"
    r"|Thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
BESIDE = "not part of the data set"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std

# --- the data sets, and where their files lie


class Layout(NamedTuple):
    """Where a data set's files lie; str() gives an example of their paths.

    Without {modality} a file is a mosaic: a tile of each modality, twice as wide as high.
    """

    path: str  # of {split}, {modality}, {identity} and {name}
    splits: tuple[str, ...] = SPLITS  # the folders of train, query and gallery
    modalities: tuple[str, ...] = ()  # the modalities' folders, in the data set's order; (): any
    name: str = r"(?P<pid>-?\d{1,18})_c(?P<key>\d{1,18}).*"  # 18 digits fit in 64 bits
    example: str = "0471_c0001_000.jpg"  # a name
    query_names: str = ""  # folder whose file names say which test samples are queries

    def regex(self) -> str:
        """Regular expression of a path without its suffix, with a group for each part."""
        return self.path.format(
            split=f"(?P<split>{'|'.join(self.splits)})",
            modality=f"(?P<modality>{'|'.join(self.modalities) or '.+'})",
            identity=r"(?P<identity>\d{1,18})",
            name=f"(?P<name>{self.name})",
        )

    def __str__(self) -> str:
        split = "{" + ",".join(self.splits) + "}"
        modality = "{" + ",".join(self.modalities) + "}" if self.modalities else "MODALITY"
        return self.path.format(split=split, modality=modality, identity="0471", name=self.example)


@dataclass(frozen=True)
class Facts:
    """What is known of a data set before its files are seen."""

    layouts: tuple[Layout, ...]  # in which it is found in the wild
    modalities: tuple[str, ...] = ()  # (): as found
    counts: tuple[int, ...] = ()  # samples of train, query, gallery
    mean_std: dict[str, tuple] = field(default_factory=dict)  # by modality; else ImageNet's
    first_key: int = 1  # in file names cameras count from here, in samples from 0
    junk: int | None = None  # identity whose files are left out without a word


RNT, MARKET = ("rgb", "nir", "tir"), ("bounding_box_train", "query", "bounding_box_test")
MOSAICS = Layout("rgbir/{split}/{name}", MARKET)
# fmt: off
DATASETS = {  # mean and std: published code; NIR's std of rgbnt100: see D13
    "synthetic": Facts((MOSAICS,), RNT),
    "rgbnt100": Facts((
        MOSAICS,
        Layout("reid_set_{modality}/{split}/{name}", MARKET, ("R", "N", "T")),
        Layout("{split}/{modality}/{identity}/{name}", ("train", "validate", "validate"),
               ("R", "N", "T"), query_names="rgbir/query"),  # as the published code reads it
    ), RNT, (8675, 1715, 8575), {
        "rgb": ((0.276, 0.271, 0.274), (0.176, 0.176, 0.168)),
        "nir": ((0.346,) * 3, (0.168,) * 3),
        "tir": ((0.761, 0.329, 0.322), (0.257, 0.263, 0.216)),
    }),
    "rgbn300": Facts((MOSAICS,), ("rgb", "nir"), (25200, 4985, 24925), {
        "rgb": ((0.299, 0.294, 0.290), (0.195, 0.195, 0.185)),
        "nir": ((0.371,) * 3, (0.181,) * 3),
    }),
    "rgbnt201": Facts((
        Layout("{split}/{modality}/{name}", ("train_171", "test", "test"), ("RGB", "NI", "TI"),
               r"(?P<pid>\d{6})_cam(?P<key>\d).*", "000471_cam1_0_00.jpg"),
    ), RNT, (3951, 836, 836), {
        "rgb": ((0.272, 0.269, 0.272), (0.174, 0.175, 0.167)),
        "nir": ((0.339,) * 3, (0.168,) * 3),
        "tir": ((0.759, 0.325, 0.318), (0.255, 0.258, 0.213)),
    }),
    "msvr310": Facts((  # the key is the scene
        Layout("{split}/{identity}/{modality}/{name}",
               ("bounding_box_train", "query3", "bounding_box_test"), ("vis", "ni", "th"),
               r"(?P<pid>\d{4})_s(?P<key>\d{3})_.*", "0471_s002_v0_000.jpg"),
    ), RNT, (1032, 591, 1055), first_key=0),
    "wmveid863": Facts((  # the pid is the folder's
        Layout("{split}/{identity}/{modality}/{name}", ("train", "query", "test"),
               ("vis", "ni", "th"), r"v(?P<key>\d).*", "v1_n1_s999_011.jpg"),
    ), RNT),
    # -1 are bad detections; 0000 are distractors, which stay in the gallery
    "market1501": Facts((Layout("{split}/{name}", MARKET),), ("rgb",), (12936, 3368, 15913),
                        junk=-1),
    "folder": Facts((Layout("{split}/{modality}/{name}"),)),
    "csv": Facts(()),  # see read_table
}
# fmt: on

# --- samples and splits


@dataclass(frozen=True)
class Sample:
    """One capture of an object: each modality's file (and tile of a mosaic, or None), pid, key."""

    name: str
    pid: int
    key: int  # camera or scene: gallery samples with the query's pid and key are left out
    images: dict[str, tuple[Path, int | None]]

    def only(self, modalities) -> "Sample":
        """The sample with no others than these modalities, in this order."""
        return replace(self, images={m: self.images[m] for m in modalities if m in self.images})


class Split(torch.utils.data.Dataset):
    """Samples sorted by name. split[i] -> ({modality: uint8 (3, H, W)}, pid, key).

    A modality that a sample lacks is absent. H and W are `image_size`, or the file's own without
    it. `store_gb` bounds the store of decoded images. Raises UserError for an unreadable image.
    """

    def __init__(self, samples: list[Sample], modalities, image_size=None, store_gb: float = 0.0):
        self.samples, self.modalities = samples, tuple(modalities)
        self.image_size, self.store_gb = image_size, store_gb
        self.pids = torch.tensor([sample.pid for sample in samples], dtype=torch.int64)
        self.keys = torch.tensor([sample.key for sample in samples], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], int, int]:
        return self.read(self.samples[i]), self.samples[i].pid, self.samples[i].key

    def read(self, sample: Sample) -> dict[str, Tensor]:
        """Decode a sample's files, a mosaic only once."""
        last_tiles = dict(sample.images.values())  # by path: a later tile replaces an earlier one
        decoded = {path: read_image(path, tile) for path, tile in last_tiles.items()}
        images = {}
        for modality, (path, tile) in sample.images.items():
            image = decoded[path]
            if tile is not None:
                W, H = 2 * image.height, image.height
                image = image.crop((W * tile, 0, W * (tile + 1), H))
            images[modality] = to_tensor(image, self.image_size)
        return images

    @cached_property
    def decoded(self) -> dict[str, Tensor] | None:
        """Images of all samples, uint8 (N, 3, H, W), from the store; None where it has no room.

        All ranks call it together: the first of a machine decodes what is absent, and all map the
        same pages of memory. Raises UserError for a damaged file.
        """
        if not (self.store_gb and self.image_size and self.samples):
            return None
        files, images = store_files(self), {}
        with runtime.rank0_first(of_machine=True):
            absent = {modality: file for modality, file in files.items() if not file.exists()}
            if absent and runtime.local_rank() == 0:
                fill_store(self, absent)
        for modality, file in files.items():
            try:
                # "c": private pages, never written; torch warns of an array that is read-only
                images[modality] = torch.from_numpy(np.load(file, mmap_mode="c"))
            except OSError:  # not made, or deleted since
                return None
            except (ValueError, EOFError) as error:
                text = f"{file}: is damaged ({error}); delete it, and it will be made again"
                raise UserError(text) from None
        return images

    def open(self) -> None:
        """Fill the store, or, without room, read each file's head.

        So a broken file shows before training, and not hours later, when the test comes to it. All
        ranks call it together.
        """
        share = self.samples[runtime.rank() :: runtime.world_size()]
        if self.decoded is None:
            list(in_threads(check_heads, share, "opening"))

    def digest(self) -> str:
        """The sha256 of which samples there are: names, identities, cameras, modalities."""
        lines = [f"{s.name} {s.pid} {s.key} {','.join(s.images)}" for s in self.samples]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def restricted(self, modalities: tuple[str, ...]) -> "Split":
        """The same samples with these modalities alone; those that have none are left out."""
        modalities = tuple(name for name in self.modalities if name in modalities)
        samples = [sample.only(modalities) for sample in self.samples]
        samples = [sample for sample in samples if sample.images]
        return Split(samples, modalities, self.image_size, self.store_gb)

    def subset(self, samples: list[Sample]) -> "Split":
        return Split(samples, self.modalities, self.image_size, self.store_gb)


# --- reading images


def to_tensor(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    """An RGB image as uint8 (3, H, W), resized to `size` (H, W) if given."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if size and pixels.shape[1:] != size:
        # As Pillow resizes, within 2 of 255, and several times as fast; see D22
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    return pixels


def read_image(path: Path, tile: int | None = None) -> Image.Image:
    """An image as RGB, upright; what is transparent becomes black. `tile`: as in open_image."""
    with open_image(path, tile) as image:
        upright = image if tile is not None else ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            black = Image.new("RGBA", upright.size, "black")
            upright = Image.alpha_composite(black, upright.convert("RGBA"))
        return upright.convert("RGB")


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # see MAX_PIXELS


@contextmanager
def open_image(path: Path, tile: int | None = None) -> Iterator[Image.Image]:
    """An image file of which only the head has been read. `tile`: the last wanted of a mosaic.

    Raises UserError, also for errors in the block, for what cannot be read as a viewer shows it.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG", "BMP", "TIFF", "WEBP")) as image:
            W, H = image.size
            if W * H > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{W}x{H} pixels")
            if is_deep(image):
                raise UserError(
                    f"{path}: has more than 8 bits a channel; make a copy of the data set with 8"
                    " bits by python -m extras.to_8bit"
                )
            if tile is not None and (W % (2 * H) or 2 * H * (tile + 1) > W):
                raise UserError(
                    f"{path}: is {W}x{H} pixels; expected a mosaic of at least {tile + 1} tiles of"
                    f" {2 * H}x{H} side by side"
                )
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's errors have no common type
        reason, advice = getattr(error, "strerror", "") or error, "replace or remove the file"
        if isinstance(error, Image.DecompressionBombError):
            advice = f"expected at most {MAX_PIXELS / 1e6:.0f} million pixels; downscale the image"
        raise UserError(f"{path}: not an image that can be read ({reason}); {advice}") from None


def is_deep(image: Image.Image) -> bool:
    """Whether the file holds more than 8 bits a channel, or other than whole numbers from 0.

    The mode says so of grey images alone: Pillow reduces 16-bit colour to 8 bits without a word,
    and takes the two bytes of a planar TIFF's values for two pixels.
    """
    tags = getattr(image, "tag_v2", {})
    bits, kinds = tags.get(258, (8,)), tags.get(339, (1,))  # TIFF's BitsPerSample, SampleFormat
    deep_png = ";16" in str(image.tile)  # what the decoder is told of the file's bits
    return image.mode[0] in "IF" or deep_png or max(bits) > 8 or max(kinds) > 1


def check_heads(sample: Sample) -> None:
    """Raise UserError where the head of one of the sample's files says that it cannot be read."""
    last_tiles = dict(sample.images.values())
    for path, tile in last_tiles.items():
        with open_image(path, tile):
            pass


def ahead(work: Callable, items: list, threads: int) -> Iterator:
    """work(item) of each item, in order, by threads, two items ahead each; with 0, in this one.

    A signal ends the wait for an item that takes longer than PATIENCE, as from a disk that hangs.
    Raises runtime.Stopped.
    """
    if not threads:
        yield from map(work, items)
        return
    cores = torch.get_num_threads()
    # Threads suffice, since decoding and resizing release Python's lock. These are daemons, unlike
    # concurrent.futures's, so that one that hangs does not keep the program from ending
    with ThreadPool(threads, torch.set_num_threads, (1,)) as pool:
        try:
            started = (pool.apply_async(work, (item,)) for item in items)
            running = deque(islice(started, 2 * threads))
            while running:
                result = running.popleft()
                while not result.ready():
                    result.wait(PATIENCE)
                    if not result.ready() and (number := runtime.noted_signal()):
                        raise runtime.Stopped(number, "stopped while waiting for a file")
                running.extend(islice(started, 1))
                yield result.get()
        finally:
            torch.set_num_threads(cores)  # else threads of later, too, would have one core each


def in_threads(work: Callable, items: list, doing: str) -> Iterator:
    """`ahead` on all cores, with a bar; a signal ends it at once. Raises runtime.Stopped."""
    results = ahead(work, items, runtime.num_cores())
    with runtime.deferred_signals(), closing(results):
        for result in runtime.bar(results, doing, len(items)):
            if number := runtime.noted_signal():
                raise runtime.Stopped(
                    number, f"stopped while {doing} images: run the same command again"
                )
            yield result


# --- the store: each image decoded once, for all epochs, runs and ranks of a machine


def store_files(split: Split) -> dict[str, Path]:
    """Each modality's file, named by a digest of all that its content depends on."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    states: dict[Path | None, str] = {None: "absent"}
    files = {}
    for modality in split.modalities:
        digest = hashlib.sha256(repr((STORE_VERSION, split.image_size)).encode())
        for sample in split.samples:
            path, tile = sample.images.get(modality, (None, None))
            if path not in states:
                stat, name = path.stat(), os.fsencode(path.absolute())  # not all names are UTF-8
                # The inode, since files of equal size and time may have swapped their names
                states[path] = f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
            digest.update(f"{states[path]} {tile}\n".encode())
        files[modality] = Path(cache, "graft", f"{digest.hexdigest()[:32]}.npy")
    return files


def fill_store(split: Split, files: dict[str, Path]) -> None:
    """Decode a split into these files, one a modality, (N, 3, H, W) each, if there is room.

    Black where a sample lacks the modality. A stop or an error leaves nothing half-made.
    """
    shape = (len(split), 3, *split.image_size)
    size, folder = len(files) * math.prod(shape), next(iter(files.values())).parent
    black = bytes(math.prod(shape[1:]))
    samples = [sample.only(files) for sample in split.samples]
    what = f"{size / 1e9:.2f} GB of decoded images ({len(split)} samples)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = sum(file.stat().st_size for file in folder.glob("*.npy"))
        room = min(split.store_gb * 1e9 - taken, shutil.disk_usage(folder).free / 2)
        if size > room:
            left = (
                f"--store {split.store_gb:g} and half of the free space leave {room / 1e9:.2f} GB"
            )
            text = "decoding in each epoch; delete old files there, or raise --store"
            return runtime.warn(f"{what} do not fit in {folder} ({left}): {text}")
        with tempfile.TemporaryDirectory(dir=folder) as unfinished, ExitStack() as stack:
            out = {m: open(Path(unfinished, m), "wb") for m in files}  # noqa: SIM115
            for file in out.values():
                stack.enter_context(file)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            # Written, not mapped: on a full disk a write is an error, a mapped page kills us
            for images in stack.enter_context(closing(in_threads(split.read, samples, "decoding"))):
                for modality, file in out.items():
                    image = images.get(modality)
                    file.write(black if image is None else image.numpy().tobytes())
            for modality, file in out.items():
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.replace(file.name, files[modality])
        runtime.print0(f"{what} are kept in {folder} (--store 0: decode in each epoch)")
    except OSError as error:
        runtime.warn(f"{what} cannot be kept in {folder} ({error}): decoding in each epoch")


# --- batches


def read_batches(
    split: Split, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The images of batches of sample indices, in order: {modality: uint8 (B, 3, H, W)}.

    On the device; of samples that have the same modalities. Without the store `workers` threads
    decode ahead; on CUDA the next batches are sent while the model works on this one. All ranks
    call it together. Close the iterator when done.
    """
    cuda, threads = device.type == "cuda", 0 if split.decoded else min(workers, len(batches))
    copies = torch.cuda.Stream(device) if cuda else None

    def send(indices: list[int]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        images = read_batch(split, indices, pin=cuda)
        if not cuda:
            return runtime.to_device(images, device), None
        # A thread's device is the first one, whatever the rank's
        with torch.cuda.device(device), torch.cuda.stream(copies):
            return runtime.to_device(images, device), copies.record_event()

    def receive() -> Iterator[dict[str, Tensor]]:
        for images, sent in ahead(send, batches, max(threads, int(cuda))):
            if cuda:
                work = torch.cuda.current_stream(device)
                work.wait_event(sent)
                for image in images.values():
                    image.record_stream(work)  # its memory is not for the next copy before that
            yield images

    return receive()  # not a generator itself: the store is opened now, by all ranks


def read_batch(split: Split, indices: list[int], pin: bool) -> dict[str, Tensor]:
    """The images of these samples, from the store (into pinned memory) or from their files."""
    modalities = split.samples[indices[0]].images
    if not split.decoded:
        images = [split.read(split.samples[i]) for i in indices]
        return {name: torch.stack([image[name] for image in images]) for name in modalities}
    order, batch = torch.tensor(indices), {}
    for modality in modalities:
        stored = split.decoded[modality]
        out = torch.empty(len(order), *stored.shape[1:], dtype=torch.uint8, pin_memory=pin)
        batch[modality] = torch.index_select(stored, 0, order, out=out)
    return batch


# --- finding the files


@dataclass(frozen=True)
class Dataset:
    """Splits of a data set; `mean` and `std`: modality -> three channels, of values from 0 to 1."""

    modalities: tuple[str, ...]
    train: Split
    query: Split
    gallery: Split
    mean: dict[str, tuple[float, float, float]]
    std: dict[str, tuple[float, float, float]]


class Found(NamedTuple):
    """What is found in a folder by one layout."""

    base: Path
    example: str  # of the paths of files, for messages
    modalities: tuple[str, ...]  # in the data set's order
    samples: dict[str, list[Sample]]  # by split
    not_taken: dict[str, str]  # path -> why it is no sample

    def describe(self) -> str:
        """How many files of the data set were not taken, and why the first were not; or ""."""
        files = [f"{path} ({why})" for path, why in self.not_taken.items() if why != BESIDE]
        more = "; ... (python -m extras.check lists all)" if len(files) > 3 else ""
        noun = "rows" if self.base.is_file() else "files"
        return f"{len(files)} {noun} were not taken: {'; '.join(files[:3])}{more}" if files else ""


def load_dataset(
    name: str, root, modalities=None, image_size=None, store_gb=0.0, need=SPLITS
) -> Dataset:
    """Find the files of a data set; `root` is its folder, the parent of it, or the file of "csv".

    `modalities` keeps those alone, `image_size` (height, width) resizes, `store_gb` bounds the
    store, splits that are not in `need` may be empty. Training samples that lack a modality are
    left out; query and gallery samples stay with what they have. Warns of that, of other counts
    than the known ones, and of files not taken. Raises UserError where a split is empty.
    """
    found = find(name, Path(root))
    chosen = runtime.in_order(modalities or found.modalities, found.modalities, str(found.base))
    if text := found.describe():
        runtime.warn(f"{found.base}: {text}")
    splits, facts = {}, DATASETS[name]
    for split, known in zip(SPLITS, facts.counts or (0, 0, 0), strict=True):
        # Training compares all modalities; a test sample may have lost one, as a sensor fails
        everything = [sample.only(chosen) for sample in found.samples[split]]
        least = len(chosen) if split == "train" else 1
        samples = [sample for sample in everything if len(sample.images) >= least]
        splits[split] = Split(samples, chosen, image_size, store_gb)
        if split in need and not samples:
            text = f"no usable images in {split}; expected {found.example}"
            if everything:
                wanted = f"{'all' if split == 'train' else 'any'} of {', '.join(chosen)}"
                text = f"no {split} sample has {wanted}; the files of one moment must have the same"
                text += f" name, as in {found.example}"
            raise UserError(f"{found.base}: {text}")
        lacking = [sample.name for sample in everything if len(sample.images) < len(chosen)]
        # An evaluation needs no "train", so what that lacks is no news to it
        if lacking and (split in need or split != "train"):
            text = f"{len(lacking)} of {len(everything)} {split} samples lack a modality"
            names = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            left_out = len(everything) - len(samples)
            fate = f"{left_out} of them are left out" if left_out else "ranked by what they have"
            runtime.warn(f"{text} ({fate}): {names}")
        if samples and known not in (0, len(samples)):
            text = f"{split} has {len(samples)} samples, {name} is known to have {known}"
            runtime.warn(f"{found.base}: {text}; continuing with these")
    mean, std = ({m: facts.mean_std.get(m, IMAGENET)[i] for m in chosen} for i in (0, 1))
    return Dataset(chosen, **splits, mean=mean, std=std)


def find(name: str, root: Path) -> Found:
    """The data set in `root` or in the folder of its name there. Raises UserError where none is."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    if name == "csv":
        return read_table(root.absolute())
    if name == "synthetic":
        root = runtime.imported("synthetic.render.find_folder")(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data-root is the data set's, or its parent")
    facts = DATASETS[name]
    children = [child for child in sorted(root.iterdir()) if child.name.lower() == name]
    bases = [root, *filter(Path.is_dir, children)]
    candidates = [match_layout(base, facts, layout) for base in bases for layout in facts.layouts]
    # The first of those with most splits: rgbir/query alone may be a part of another layout
    found = max(candidates, key=lambda found: sum(map(bool, found.samples.values())))
    if not any(found.samples.values()):
        paths = ", or ".join(map(str, facts.layouts))
        text = f"{root}: no {name} found there or in {root / name}; expected {paths}"
        seen = [candidate.describe() for candidate in candidates]
        raise UserError("; ".join([text, *filter(None, seen)]))
    return found


def match_layout(base: Path, facts: Facts, layout: Layout) -> Found:
    """All samples below `base` whose paths are as the layout says."""
    regex, splits, folders, not_taken = layout.regex(), {s: {} for s in SPLITS}, set(), {}
    # Only folders that can hold the data set are entered: beside it there may be anything
    for path, entry in walk(base, regex.count("/"), regex.split("/")[0]):
        stem, suffix = os.path.splitext(path)
        match = re.fullmatch(regex, stem, re.ASCII)
        parts = match.groupdict() if match else {}
        if "modality" in parts:
            folders.add(parts["modality"])
        if "/" not in path:
            why = BESIDE
        elif entry.is_dir():
            why = "a folder, where files are expected"
        elif suffix.lower() not in SUFFIXES:
            why = f"its name does not end in {' '.join(SUFFIXES)}"
        elif not match:
            why = "its path or name is not as expected"
        elif not entry.is_file():
            why = "a link to a file that is not there"
        else:
            why = add_file(Path(entry), parts, facts, layout, splits)
        if why:
            not_taken[printable(path)] = why
    if layout.query_names:
        names = {printable(path.stem) for path in (base / layout.query_names).glob("*")}
        queries = splits["query"].items()
        splits["query"] = {name: s for name, s in queries if name.rpartition("/")[2] in names}
    modalities = facts.modalities
    if not modalities:
        for folder in sorted(folders):
            check_modality(folder, base)
        usual = [name for name in RNT if name in folders]
        modalities = (*usual, *sorted(folders - {*usual}))
    samples = {
        split: [sample.only(modalities) for _, sample in sorted(by_name.items())]
        for split, by_name in splits.items()
    }
    return Found(base, str(layout), modalities, samples, not_taken)


def walk(folder, depth: int, first: str, above: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """Relative path and entry of all that lies `depth` folders below `folder`, sorted.

    `first` is a regular expression for the first of these folders. What stands on the way and is
    no such folder is given, too, so that it can be named as not taken. Links are followed.
    """
    # Sorted: the order of a folder depends on the file system, and a run shall not
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if HIDDEN.fullmatch(entry.name):
            continue
        if depth and entry.is_dir() and re.fullmatch(first, entry.name):
            yield from walk(entry, depth - 1, ".*", f"{above}{entry.name}/")
        else:
            yield above + entry.name, entry


def add_file(path: Path, parts: dict, facts: Facts, layout: Layout, splits: dict) -> str:
    """Add a file to its sample in `splits`, {split: {name: Sample}}; returns "", or why not.

    `parts`: the groups of the layout's regular expression.
    """
    pid, key = int(parts.get("pid") or parts["identity"]), int(parts["key"]) - facts.first_key
    if pid == facts.junk:
        return ""
    if "modality" in parts:
        folders = layout.modalities or facts.modalities
        names = dict(zip(folders, facts.modalities, strict=True))
        tiles = {names.get(parts["modality"], parts["modality"]): None}
    elif len(facts.modalities) > 1:  # a mosaic
        tiles = {modality: tile for tile, modality in enumerate(facts.modalities)}
    else:
        tiles = {facts.modalities[0]: None}
    name = printable("/".join(parts[part] for part in ("identity", "name") if part in parts))
    # One folder may hold two splits, as where every test sample is a query, too
    for split, folder in zip(SPLITS, layout.splits, strict=True):
        if folder != parts["split"]:
            continue
        images = splits[split].setdefault(name, Sample(name, pid, key, {})).images
        for modality, tile in tiles.items():
            if modality in images:
                return f"the same sample as {printable(images[modality][0].name)}"
            images[modality] = (path, tile)
    return ""


def printable(text: str) -> str:
    """A name as it can be printed, drawn and stored: file names may hold any bytes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def check_modality(name: str, where: Path) -> None:
    """Raise UserError for a sensor's name that cannot be typed, or be the name of a module."""
    taken = hasattr(torch.nn.ModuleDict(), name) or name == "embedding"  # an export's output
    if taken or not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        wanted = "another word" if taken else "letters, digits, _ and -, as in nir-850"
        raise UserError(f"{where}: modality {printable(name)!r}: rename it; expected {wanted}")


def read_table(path: Path) -> Found:
    """A data set listed in a CSV: split, identity, camera (any text), and a file a modality.

    Files are relative to the CSV's folder; an empty cell is a modality that the sample lacks.
    """
    example = "the columns split, identity, camera, rgb, ... and e.g. train,red bus,gate 2,a.jpg"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            columns, fixed = reader.fieldnames or (), ("split", "identity", "camera")
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as CSV ({reason}); expected {example}") from None
    modalities = tuple(column for column in columns if column not in fixed)
    if not modalities or not {*fixed} <= {*columns}:
        listed = ", ".join(columns) or "none"
        raise UserError(f"{path}: its columns are {listed}; expected {example}")
    for modality in modalities:
        check_modality(modality, path)
    samples, not_taken, ids, cameras = {split: [] for split in SPLITS}, {}, {}, {}
    for line, row in rows:
        images = {m: (path.parent / row[m], None) for m in modalities if row[m]}
        if row["split"] not in SPLITS:
            not_taken[f"line {line}"] = f"split {row['split']!r}: expected {', '.join(SPLITS)}"
            continue
        if not row["identity"] or not images or None in row:
            not_taken[f"line {line}"] = "expected an identity, a photo, a cell for each column"
            continue
        # Numbered over all splits, so that query and gallery agree on who is who
        pid = ids.setdefault(row["identity"], len(ids))
        key = cameras.setdefault(row["camera"], len(cameras))
        name = printable(f"{row['identity']}_c{row['camera']}_{line:06d}")
        samples[row["split"]].append(Sample(name, pid, key, images))
    for listed in samples.values():
        listed.sort(key=lambda sample: sample.name)
    return Found(path, example, modalities, samples, not_taken)


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
    order = np.argsort(pids, kind="stable")  # one identity after the other
    starts = np.flatnonzero(np.r_[True, np.diff(pids[order]) != 0])
    rows = []
    for start, end in zip(starts, [*starts[1:], len(pids)], strict=True):
        n = end - start
        if n == 1:
            continue
        turns = np.arange(positives) % (n - 1)
        if n <= 1000:
            # Each anchor goes its own way round the other samples of its identity
            offset = rng.permuted(np.tile(np.arange(1, n), (n, 1)), axis=1)[:, turns]
        else:
            # n permutations would fill the memory: each anchor goes round in steps of one length,
            # or of 1 where it would be back at its start before it has all its positives
            first, step = rng.integers(0, n - 1, (n, 1)), rng.integers(1, n - 1, (n, 1))
            period = (n - 1) // np.gcd(step, n - 1)
            step = np.where(period < positives, 1, step)
            offset = 1 + (first + step * turns) % (n - 1)
        positive = start + (np.arange(n)[:, None] + offset) % n
        # Drawn from the len(pids) - n samples of the others, which lie before and after these n
        negative = rng.integers(0, len(pids) - n, (n, positives))
        negative += n * (negative >= start)
        anchor = np.broadcast_to(np.arange(start, end)[:, None], positive.shape)
        rows.append(np.stack([anchor, positive, negative], -1).reshape(-1, 3))
    triplets = order[np.concatenate(rows)]
    return triplets[rng.permutation(len(triplets))]


class TripletSampler:
    """The steps of an epoch: `steps(epoch)` -> indices (steps, 3, T): anchor, positive, negative.

    They depend on (seed, epoch) alone, not on the ranks or on where a run was resumed. The last,
    incomplete step is dropped. Raises UserError where not one whole step can be made.
    """

    def __init__(self, pids: Tensor, batch_size: int, positives: int, seed: int):
        # A copy: torch moves a tensor that it sends to a process, such as one of a user's
        # DataLoader, and a view would read the memory that this frees
        self.pids = pids.numpy().copy()
        self.batch_size, self.positives, self.seed = batch_size, positives, seed
        ids, counts = np.unique(self.pids, return_counts=True)
        num_triplets = int(counts[counts > 1].sum()) * positives
        if len(ids) < 2 or not num_triplets:
            raise UserError(
                f"the training data has {len(ids)} identities, {(counts > 1).sum()} of them with"
                " more than one sample; a triplet needs two identities, one with two samples"
            )
        self.num_steps = num_triplets // batch_size
        if not self.num_steps:
            raise UserError(
                f"--batch-size {batch_size}: an epoch has only {num_triplets} triplets"
                f" ({len(self.pids)} samples, --positives {positives}); expected at most as many"
            )

    def steps(self, epoch: int) -> np.ndarray:
        rng = runtime.numpy_rng(self.seed, 2, epoch)
        triplets = make_triplets(self.pids, self.positives, rng)[: self.num_steps * self.batch_size]
        return triplets.reshape(self.num_steps, self.batch_size, 3).transpose(0, 2, 1)


class IdentitySampler(TripletSampler):
    """Our own recipe's steps: `samples` of each of 3 * T / samples identities, in any row.

    As many and of the same shape as TripletSampler gives, so that the two can be compared.
    """

    def __init__(self, pids: Tensor, batch_size: int, positives: int, seed: int, samples: int = 6):
        self.samples, (ids, groups) = samples, np.unique(pids, return_inverse=True)
        self.groups = [np.flatnonzero(groups == i) for i in range(len(ids))]
        self.num_ids, rest = divmod(3 * batch_size, samples)
        if len(ids) > 1 and (rest or not 2 <= self.num_ids <= len(ids)):
            every = samples // math.gcd(3, samples)  # triplets, so that identities are whole
            raise UserError(
                f"--batch-size {batch_size}: makes {3 * batch_size} images, {samples} of each of"
                f" {3 * batch_size / samples:g} identities, of which the training data has"
                f" {len(ids)}; expected a multiple of {every} from {2 * samples // 3} to"
                f" {len(ids) * samples // 3 // every * every}"
            )
        super().__init__(pids, batch_size, positives, seed)

    def steps(self, epoch: int) -> np.ndarray:
        rng = runtime.numpy_rng(self.seed, 3, epoch)
        images = []
        for _ in range(self.num_steps):
            for identity in rng.choice(len(self.groups), self.num_ids, replace=False):
                group = self.groups[identity]
                images.append(rng.choice(group, self.samples, replace=len(group) < self.samples))
        return np.stack(images).reshape(self.num_steps, 3, self.batch_size)


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
    shares = [np.array_split(part, ranks) for part in np.array_split(np.arange(batch_size), passes)]
    return [[slice(int(own[0]), int(own[-1]) + 1) for own in part] for part in shares]


# --- from uint8 to the model's input, batched, on the device


def augment(
    images: dict[str, Tensor],
    draws: Tensor,
    flips: tuple[float, float] = (0.5, 0.5),
    erase: float = 0.5,
    pad: int = 0,
) -> dict[str, Tensor]:
    """Flips and random erasing (Zhong et al. 2020; section 5.2); pad-and-crop, as the field does.

    Images are uint8 (B, 3, H, W), on the device of `draws`, (B, 9), uniform in [0, 1), which decide
    for each sample: the same for all its modalities, which are registered. `flips`: how likely a
    horizontal and a vertical one are. `pad`: pixels of black put around, of which a part of the
    image's size is taken. An erased rectangle covers 2% to 33% of the image, with an aspect of 0.3
    to 3.3, and is black (published code).
    """
    H, W = next(iter(images.values())).shape[-2:]
    mirrored, upside_down = draws[:, 0] < flips[0], draws[:, 1] < flips[1]  # (B,)
    hidden = rectangles(draws[:, 3:7], H, W) & (draws[:, 2] < erase)[:, None, None]  # (B, H, W)
    augmented = {}
    for modality, image in images.items():
        if flips[0]:
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        if flips[1]:
            image = torch.where(upside_down[:, None, None, None], image.flip(-2), image)
        if pad:
            top, left = (draws[:, 7:9] * (2 * pad + 1)).long().unbind(1)  # (B,)
            rows = top[:, None] + torch.arange(H, device=draws.device)  # (B, H)
            columns = left[:, None] + torch.arange(W, device=draws.device)  # (B, W)
            sample = torch.arange(len(image), device=draws.device)[:, None, None]
            padded = F.pad(image, (pad,) * 4).permute(0, 2, 3, 1)  # (B, H + 2 pad, W + 2 pad, 3)
            image = padded[sample, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
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
        def on_device(values: dict) -> dict[str, Tensor]:
            channels = {name: torch.tensor(x, device=device) for name, x in values.items()}
            return {name: 255 * x.view(3, 1, 1) for name, x in channels.items()}

        self.mean, self.std = on_device(mean), on_device(std)

    def __call__(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            modality: (image - self.mean[modality]).div_(self.std[modality])
            for modality, image in images.items()
        }


def add_options(parser, trained: bool = False) -> None:
    """The options of data; `trained`: their defaults are those of a checkpoint's training."""
    add, default = parser.add_argument, " (default: as in training)" if trained else ""
    text = f"data set{default or '; train.py renders the synthetic one if it is absent'}"
    add("--dataset", default=None if trained else "synthetic", choices=DATASETS, help=text)
    text = f"the data set's folder or its parent; of csv, the file{default}"
    add("--data-root", metavar="PATH", default=None if trained else "data", help=text)
    text = f"e.g. rgb,tir (default: {'all that were trained' if trained else 'all there are'})"
    add("--modalities", action=runtime.Names, help=text)
    text = "disk space for decoded images (~/.cache/graft); 0: decode each time they are needed"
    add("--store", metavar="GB", type=runtime.real(0), default=STORE_GB, help=text)
