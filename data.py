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
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from multiprocessing.pool import ThreadPool
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
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 2**26  # of an image: a larger one is refused before it is decoded
STORE_GB = 20.0  # RGBN300 at 224x224, the largest of the paper's, takes 16.6
STORE_VERSION = 2  # of what reading gives: a part of the names of the store's files
PATIENCE = 10  # seconds to wait for images before looking whether a signal has come
# Left in folders by file managers, network drives and notebooks: passed over without a word
HIDDEN = re.compile(
    r"\..*|__MACOSX|@eaDir|@__thumb|@Recycle|#recycle|#snapshot|\$RECYCLE\.BIN|lost\+found"
    r"|Thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
BESIDE = "no part of the data set"

# --- what is known of each data set


@dataclass(frozen=True)
class Facts:
    """What is known of a data set.

    `layouts`: an example -> one regular expression for the path of a file without its suffix.
    Groups: `train`, `query`, `gallery` or `test` (query and gallery); the modality by its name, or
    `modality` where folders name it; `pid`; `key` (camera or scene); `folder` and `name`, together
    the sample's name. Without a modality a file is a mosaic: tiles of all, twice as wide as high.
    """

    layouts: dict[str, str]
    modalities: tuple[str, ...] = ()  # (): as found
    counts: tuple[int, ...] = ()  # samples of train, query, gallery
    mean_std: dict[str, tuple] = field(default_factory=dict)  # by modality; else ImageNet's
    first_key: int = 1  # in the files' names; ours start at 0
    query_names: str = ""  # folder whose files' names say which `test` samples are queries
    junk: int | None = None  # identity whose files are left out without a word


# fmt: off
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std
_RNT, _MARKET_TREE = ("rgb", "nir", "tir"), "{bounding_box_train,query,bounding_box_test}"
_MARKET = "((?P<train>bounding_box_train)|(?P<query>query)|(?P<gallery>bounding_box_test))"
_NAME = r"(?P<name>(?P<pid>-?\d{1,18})_c(?P<key>\d{1,18}).*)"  # 18 digits fit in 64 bits
_RGBNT100 = {f"rgbir/{_MARKET_TREE}/0501_c0001_000.jpg": f"rgbir/{_MARKET}/{_NAME}"}
_VIS_NI_TH = "((?P<rgb>vis)|(?P<nir>ni)|(?P<tir>th))"

DATASETS = {  # mean and std: published code; NIR's std of rgbnt100: see D13
    "synthetic": Facts(_RGBNT100, _RNT),
    "rgbnt100": Facts(_RGBNT100 | {
        f"reid_set_{{R,N,T}}/{_MARKET_TREE}/0501_c0001_000.jpg":
            f"reid_set_((?P<rgb>R)|(?P<nir>N)|(?P<tir>T))/{_MARKET}/{_NAME}",
        "{train,validate}/{R,N,T}/0501/0501_c0001_000.jpg, queries' names in rgbir/query":
            "((?P<train>train)|(?P<test>validate))/((?P<rgb>R)|(?P<nir>N)|(?P<tir>T))"
            f"/(?P<folder>.+)/{_NAME}",
        }, _RNT, (8675, 1715, 8575), {
            "rgb": ((0.276, 0.271, 0.274), (0.176, 0.176, 0.168)),
            "nir": ((0.346,) * 3, (0.168,) * 3),
            "tir": ((0.761, 0.329, 0.322), (0.257, 0.263, 0.216)),
        }, query_names="rgbir/query"),
    "rgbn300": Facts(_RGBNT100, ("rgb", "nir"), (25200, 4985, 24925), {
        "rgb": ((0.299, 0.294, 0.290), (0.195, 0.195, 0.185)),
        "nir": ((0.371,) * 3, (0.181,) * 3),
        }),
    "rgbnt201": Facts({
        "{train_171,test}/{RGB,NI,TI}/000258_cam1_0_00.jpg":
            "((?P<train>train_171)|(?P<test>test))/((?P<rgb>RGB)|(?P<nir>NI)|(?P<tir>TI))"
            r"/(?P<name>(?P<pid>\d{6})_cam(?P<key>\d).*)",
        }, _RNT, (3951, 836, 836), {
            "rgb": ((0.272, 0.269, 0.272), (0.174, 0.175, 0.167)),
            "nir": ((0.339,) * 3, (0.168,) * 3),
            "tir": ((0.759, 0.325, 0.318), (0.255, 0.258, 0.213)),
        }),
    "msvr310": Facts({  # the key is the scene
        "{bounding_box_train,query3,bounding_box_test}/0002/{vis,ni,th}/0002_s002_v0_000.jpg":
            "((?P<train>bounding_box_train)|(?P<query>query3)|(?P<gallery>bounding_box_test))"
            rf"/(?P<folder>.+)/{_VIS_NI_TH}/(?P<name>(?P<pid>\d{{4}})_s(?P<key>\d{{3}})_.*)",
        }, _RNT, (1032, 591, 1055), first_key=0),
    "wmveid863": Facts({
        "{train,query,test}/0471/{vis,ni,th}/v1_n1_s999_011.jpg":
            r"((?P<train>train)|(?P<query>query)|(?P<gallery>test))"
            rf"/(?P<folder>(?P<pid>\d{{1,18}}))/{_VIS_NI_TH}/(?P<name>v(?P<key>\d).*)",
        }, _RNT),
    # -1 are bad detections; 0000 are distractors, which stay in the gallery
    "market1501": Facts({f"{_MARKET_TREE}/0002_c1s1_000451_03.jpg": f"{_MARKET}/(?P<rgb>){_NAME}"},
                        ("rgb",), (12936, 3368, 15913), junk=-1),
    "folder": Facts({
        "{train,query,gallery}/MODALITY/7_c1_a.jpg":
            f"((?P<train>train)|(?P<query>query)|(?P<gallery>gallery))/(?P<modality>.+)/{_NAME}",
        }),
    "csv": Facts({}),  # see read_table
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

    @cached_property
    def decoded(self) -> dict[str, Tensor] | None:
        """Images of all samples, uint8 (N, 3, H, W), from the store; None where it has no room."""
        return open_store(self)

    def open(self) -> None:
        """Fill the store, or, without room, read each file's head: what is broken shows now.

        All ranks call it together.
        """
        own = self.samples[runtime.rank() :: runtime.world_size()]
        if self.decoded is None:
            list(in_threads(check_heads, own, "opening"))

    def digest(self) -> str:
        """The sha256 of which samples there are: names, identities, cameras, modalities."""
        rows = [f"{s.name} {s.pid} {s.key} {','.join(s.images)}" for s in self.samples]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def read(self, sample: Sample, modalities: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Decode a sample's files, each once, whatever number of tiles is taken from it."""
        wanted = sample.only(modalities or self.modalities).images
        files: dict[Path, dict[str, int | None]] = {}
        for modality, (path, tile) in wanted.items():
            files.setdefault(path, {})[modality] = tile
        images = {}
        for path, tiles in files.items():
            images |= zip(tiles, read_tiles(path, [*tiles.values()], self.image_size), strict=True)
        return {modality: images[modality] for modality in wanted}

    def restricted(self, modalities: tuple[str, ...]) -> "Split":
        """The same samples with these modalities alone; those that have none are left out."""
        own = tuple(name for name in self.modalities if name in modalities)
        samples = [sample.only(own) for sample in self.samples]
        return Split([s for s in samples if s.images], own, self.image_size, self.store_gb)

    def subset(self, samples: list[Sample]) -> "Split":
        return Split(samples, self.modalities, self.image_size, self.store_gb)


# --- reading images


def read_tiles(path: Path, tiles: list[int | None], size: tuple[int, int] | None) -> Tensor:
    """These tiles of a mosaic, or [None] for the whole image: (tiles, 3, H, W), uint8."""
    images = torch.from_numpy(np.array(read_image(path, tiles[-1])))[None]  # (1, H, W, 3)
    if tiles != [None]:
        images = images[0].unflatten(1, (-1, 2 * images.shape[1])).transpose(0, 1)[tiles]
    images = images.permute(0, 3, 1, 2)
    if size and images.shape[2:] != size:
        # As Pillow resizes, within 2 of 255, and several times as fast; see D22
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    return images


def read_image(path: Path, tile: int | None = None) -> Image.Image:
    """An image as RGB, upright; what is transparent becomes black. `tile`: as in `opened`."""
    with opened(path, tile) as image:
        upright = image if tile is not None else ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            black = Image.new("RGBA", upright.size, "black")
            upright = Image.alpha_composite(black, upright.convert("RGBA"))
        return upright.convert("RGB")


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # see MAX_PIXELS


@contextmanager
def opened(path: Path, tile: int | None = None) -> Iterator[Image.Image]:
    """An image file of which only the head has been read; `tile` is the last that is wanted of it.

    Raises UserError, from the block too, for what cannot be read as a viewer would show it.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG", "BMP", "TIFF", "WEBP")) as image:
            W, H = image.size
            if W * H > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{W}x{H} pixels")
            if is_deep(image):
                text = "make a copy of the data set with 8 bits by python -m extras.to_8bit"
                raise UserError(f"{path}: more than 8 bits a channel; {text}")
            if tile is not None and (W % (2 * H) or 2 * H * (tile + 1) > W):
                text = f"expected tiles of {2 * H}x{H}, at least {tile + 1} side by side"
                raise UserError(f"{path}: a mosaic of {W}x{H} pixels; {text}")
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        limit = f"the limit is {MAX_PIXELS / 1e6:.0f} million pixels: downscale the image"
        raise UserError(f"{path}: {error}; {limit}") from None
    except Exception as error:  # Pillow's errors have no common type
        text = f"not an image that can be read ({getattr(error, 'strerror', '') or error})"
        raise UserError(f"{path}: {text}; mend, replace or remove the file") from None


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
    for path, tile in dict(sample.images.values()).items():
        with opened(path, tile):
            pass


def ahead(work: Callable, items: list, threads: int) -> Iterator:
    """work(item) of each item, in order, by threads that are ahead by two items each; 0: by none.

    Threads do: decoding and resizing release Python's lock. A signal ends the wait for an item that
    takes longer than PATIENCE, as from a disk that hangs. Raises runtime.Stopped.
    """
    if not threads:
        yield from map(work, items)
        return
    items, coming, cores = iter(items), deque(), torch.get_num_threads()
    # Its threads are daemons: one that hangs does not keep the program from ending
    with ThreadPool(threads, torch.set_num_threads, (1,)) as pool:
        try:
            coming.extend(pool.apply_async(work, (item,)) for item in islice(items, 2 * threads))
            while coming:
                result = coming.popleft()
                while not result.ready():
                    result.wait(PATIENCE)
                    if not result.ready() and (number := runtime.noted_signal()):
                        raise runtime.Stopped(number, "stopped while waiting for a file")
                coming.extend(pool.apply_async(work, (item,)) for item in islice(items, 1))
                yield result.get()
        finally:
            torch.set_num_threads(cores)  # else later threads, too, would have one core each


def in_threads(work: Callable, items: list, doing: str) -> Iterator:
    """`ahead` by all cores, with a bar; a signal ends it at once. Raises runtime.Stopped."""
    with (
        runtime.deferred_signals(),
        closing(ahead(work, items, runtime.num_cores())) as results,
        tqdm(total=len(items), desc=doing, leave=False, disable=None) as bar,
    ):
        for result in results:
            if number := runtime.noted_signal():
                text = f"stopped while {doing} images: the same command begins anew"
                raise runtime.Stopped(number, text)
            bar.update()
            yield result


# --- the store: each image decoded once, for all epochs, runs and ranks of a machine


def open_store(split: Split) -> dict[str, Tensor] | None:
    """The images of a split, mapped from files of the store, which are made where they are absent.

    All ranks ask together: the first of a machine decodes, and the others map the same pages of
    memory. None where the store has no room.
    """
    if not (split.store_gb and split.image_size and len(split)):
        return None
    files = store_files(split)
    with runtime.rank0_first(of_machine=True):
        missing = {modality: file for modality, file in files.items() if not file.exists()}
        if missing and runtime.local_rank() == 0:
            fill_store(split, missing)
    images = {}
    for modality, file in files.items():
        try:
            # Private pages, of which none is ever written: torch wants an array that could be
            images[modality] = torch.from_numpy(np.load(file, mmap_mode="c"))
        except OSError:  # not made, or deleted since
            return None
        except (ValueError, EOFError) as error:
            raise UserError(f"{file}: damaged ({error}); delete it, it is made anew") from None
    return images


def store_files(split: Split) -> dict[str, Path]:
    """Each modality's file, named after all that it depends on.

    The inodes, too: nothing else tells two files of equal size and time that have swapped names.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    states: dict[Path | None, str] = {None: "absent"}
    files = {}
    for modality in split.modalities:
        digest = hashlib.sha256(repr((STORE_VERSION, split.image_size)).encode())
        for sample in split.samples:
            path, tile = sample.images.get(modality, (None, None))
            if path not in states:
                stat, name = path.stat(), os.fsencode(path.absolute())  # not all names are UTF-8
                states[path] = f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
            digest.update(f"{states[path]} {tile}\n".encode())
        files[modality] = Path(cache, "graft", f"{digest.hexdigest()[:32]}.npy")
    return files


def fill_store(split: Split, files: dict[str, Path]) -> None:
    """Write a split's decoded images, each modality's (N, 3, H, W) to its file, if there is room.

    Black where a sample lacks it. A stop or an error leaves nothing half-made.
    """
    shape = (len(split), 3, *split.image_size)
    size, folder = len(files) * math.prod(shape), next(iter(files.values())).parent
    what = f"the decoded images of {len(split)} samples, {size / 1e9:.2f} GB,"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = sum(file.stat().st_size for file in folder.glob("*.npy"))
        if size > min(split.store_gb * 1e9 - taken, shutil.disk_usage(folder).free / 2):
            limit = f"--store {split.store_gb:g}, of which {taken / 1e9:.2f} are taken, and half of"
            text = f"{what} do not fit in {folder} ({limit} the free space): decoding in each epoch"
            runtime.warn(f"{text}; delete what is old there, or raise --store")
            return
        with tempfile.TemporaryDirectory(dir=folder) as unfinished, ExitStack() as stack:
            paths = {modality: Path(unfinished, file.name) for modality, file in files.items()}
            out = {m: stack.enter_context(open(path, "wb")) for m, path in paths.items()}
            for file in out.values():
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            read, black = partial(split.read, modalities=tuple(files)), bytes(math.prod(shape[1:]))
            # Written, not mapped: on a full disk a write is an error, a mapped page kills us
            for images in stack.enter_context(closing(in_threads(read, split.samples, "decoding"))):
                for m, file in out.items():
                    file.write(images[m].numpy().tobytes() if m in images else black)
            for m, file in out.items():
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.replace(paths[m], files[m])
        runtime.print0(f"{what} are kept in {folder} (--store 0: decode in each epoch)")
    except OSError as error:
        runtime.warn(f"{what} cannot be kept ({error}): decoding in each epoch")


# --- batches


def read_batches(
    split: Split, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The images of batches of sample indices, in order: {modality: uint8 (B, 3, H, W)}.

    On the device; of samples that have the same modalities. Without the store `workers` threads
    decode ahead; on CUDA the next batches are sent while the model works on this one. All ranks
    call it together. Close the iterator when done.
    """
    stored, cuda = split.decoded is not None, device.type == "cuda"
    read = partial(gather, split, pin=cuda) if stored else partial(decode, split)
    side = torch.cuda.Stream(device) if cuda else None  # of the copies to the device

    def send(indices: list[int]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        if not cuda:
            return runtime.to_device(read(indices), device), None
        # A thread's device is the first one, whatever the rank's
        with torch.cuda.device(device), torch.cuda.stream(side):
            return runtime.to_device(read(indices), device), side.record_event()

    def reading() -> Iterator[dict[str, Tensor]]:
        threads = 0 if stored else min(workers, len(batches))
        for images, sent in ahead(send, batches, max(threads, int(cuda))):
            if cuda:
                work = torch.cuda.current_stream(device)
                work.wait_event(sent)
                for image in images.values():
                    image.record_stream(work)  # its memory is not for the next copy before that
            yield images

    return reading()


def decode(split: Split, indices: list[int]) -> dict[str, Tensor]:
    """A batch from its samples' files."""
    samples = [split[i][0] for i in indices]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def gather(split: Split, indices: list[int], pin: bool) -> dict[str, Tensor]:
    """A batch out of the store."""
    order, images = torch.tensor(indices), {}
    for modality in split.samples[indices[0]].images:
        stored = split.decoded[modality]
        out = torch.empty(len(order), *stored.shape[1:], dtype=torch.uint8, pin_memory=pin)
        images[modality] = torch.index_select(stored, 0, order, out=out)
    return images


# --- finding the files


@dataclass(frozen=True)
class Dataset:
    """Splits of a data set; `mean` and `std`: modality -> three channels, of values from 0 to 1."""

    name: str
    modalities: tuple[str, ...]
    train: Split
    query: Split
    gallery: Split
    mean: dict[str, tuple[float, float, float]]
    std: dict[str, tuple[float, float, float]]


class Found(NamedTuple):
    """What one layout finds in a folder."""

    base: Path
    example: str
    modalities: tuple[str, ...]  # in the data set's order
    samples: dict[str, list[Sample]]  # by split
    not_taken: dict[str, str]  # what is no sample, and why

    def describe(self) -> str:
        """How many files of the data set were not taken, and why the first were not; or ""."""
        files = [f"{path} ({why})" for path, why in self.not_taken.items() if why != BESIDE]
        more = "; ... (python -m extras.check lists all)" if len(files) > 3 else ""
        return f"{len(files)} files were not taken: {'; '.join(files[:3])}{more}" if files else ""


def load_dataset(
    name: str, root, modalities=None, image_size=None, store_gb=0.0, need=SPLITS, render=False
) -> Dataset:
    """Find the files of a data set; `root` is its folder, the parent of it, or the file of "csv".

    `modalities` keeps those alone, `image_size` (height, width) resizes, `store_gb` bounds the
    store, splits that are not in `need` may be empty, `render` makes the synthetic set where it is
    absent. Training samples that lack a modality are left out; query and gallery samples stay with
    what they have. Warns of that, of other counts than the known ones, and of files not taken.
    Raises UserError where a split is empty.
    """
    found = find(name, Path(root), render)
    chosen = runtime.in_order(modalities or found.modalities, found.modalities, str(found.base))
    if text := found.describe():
        runtime.warn(f"{found.base}: {text}")
    splits, facts = {}, DATASETS[name]
    for split, known in zip(SPLITS, facts.counts or (0, 0, 0), strict=True):
        # Only an evaluation leaves a split out that is there: it does not look at "train"
        samples = usable(found, split, chosen, split in need or split != "train")
        splits[split] = Split(samples, chosen, image_size, store_gb)
        if split in need and not samples:
            why = f"no usable images in {split}; expected {found.example}"
            if found.samples[split]:
                why = f"no {split} sample has all of {', '.join(chosen)}: the files of one moment"
                why += f" must have the same name, as in {found.example}"
            raise UserError(f"{found.base}: {why}")
        if samples and known not in (0, len(samples)):
            text = f"{split} has {len(samples)} samples, {name} is known to have {known}"
            runtime.warn(f"{found.base}: {text}; going on with what is there")
    mean, std = ({m: facts.mean_std.get(m, IMAGENET)[i] for m in chosen} for i in (0, 1))
    return Dataset(name, chosen, **splits, mean=mean, std=std)


def usable(found: Found, split: str, chosen: tuple[str, ...], say: bool) -> list[Sample]:
    """The samples that a split can use; `say` how many lack a modality, and which."""
    samples = [sample.only(chosen) for sample in found.samples[split]]
    what = "are left out" if split == "train" else "stay, with what they have"
    for lacking, text in (
        ([s for s in samples if not s.images], f"have none of {', '.join(chosen)}; left out"),
        ([s for s in samples if 0 < len(s.images) < len(chosen)], f"lack a modality and {what}"),
    ):
        if lacking and say:
            names = ", ".join([s.name for s in lacking[:3]] + ["..."] * (len(lacking) > 3))
            runtime.warn(f"{len(lacking)} of {len(samples)} {split} samples {text}: {names}")
    least = len(chosen) if split == "train" else 1
    return [sample for sample in samples if len(sample.images) >= least]


def find(name: str, root: Path, render: bool = False) -> Found:
    """The data set in `root` or in the folder of its name there. Raises UserError where none is."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    if name == "csv":
        return read_table(root.absolute())
    if name == "synthetic":
        root = synthetic_folder(root, render)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data-root is the data set's, or its parent")
    facts = DATASETS[name]
    children = [child for child in sorted(root.iterdir()) if child.name.lower() == name]
    bases = [root, *filter(Path.is_dir, children)]
    candidates = [match_layout(base, facts, layout) for base in bases for layout in facts.layouts]
    # The first of those with most splits: rgbir/query alone may be a part of another layout
    found = max(candidates, key=lambda found: sum(map(bool, found.samples.values())))
    if not any(found.samples.values()):
        seen = [f"; {text}" for other in candidates if (text := other.describe())]
        trees = ", or ".join(facts.layouts) + "".join(seen[:1])
        raise UserError(f"{root}: no {name} found there or in {root / name}; expected {trees}")
    return found


def match_layout(base: Path, facts: Facts, example: str) -> Found:
    """All samples below `base` whose paths match one of the data set's layouts."""
    layout, splits = facts.layouts[example], {split: {} for split in SPLITS}
    folders, not_taken = set(), {}
    for path, entry in walk(base, layout.count("/"), layout.split("/")[0]):
        stem, suffix = os.path.splitext(path)
        match = re.fullmatch(layout, stem, re.ASCII)
        groups = {k: v for k, v in match.groupdict().items() if v is not None} if match else {}
        if "modality" in groups:
            folders.add(groups["modality"])
        problems = {
            BESIDE: "/" not in path,
            "a folder, where files are expected": entry.is_dir(),
            f"read are {' '.join(SUFFIXES)}": suffix.lower() not in SUFFIXES,
            "its path or name is not as expected": not match,
            "a link to a file that is not there": not entry.is_file(),
        }
        why = next((text for text, found in problems.items() if found), "")
        if why := why or place(Path(entry), groups, facts, splits):
            not_taken[printable(path)] = why
    for folder in folders:
        check_modality(folder, base)
    if facts.query_names and "<test>" in layout:
        names = {printable(path.stem) for path in (base / facts.query_names).glob("*")}
        queries = splits["query"].items()
        splits["query"] = {key: s for key, s in queries if key.rpartition("/")[2] in names}
    usual = [name for name in _RNT if name in folders]
    modalities = facts.modalities or (*usual, *sorted(folders - {*usual}))
    samples = {
        split: [sample.only(modalities) for _, sample in sorted(found.items())]
        for split, found in splits.items()
    }
    return Found(base, example, modalities, samples, not_taken)


def walk(folder, depth: int, first: str, above: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """Relative paths of what lies `depth` folders below, of which `first` matches the first.

    And of what is not such a folder on the way there. Links are followed, no deeper.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if HIDDEN.fullmatch(entry.name):
            continue
        if depth and entry.is_dir() and re.fullmatch(first, entry.name):
            yield from walk(entry, depth - 1, ".*", f"{above}{entry.name}/")
        else:
            yield above + entry.name, entry


def place(path: Path, groups: dict, facts: Facts, splits: dict[str, dict[str, Sample]]) -> str:
    """Add a file to its sample; returns why not, where another file has its place."""
    pid, key = int(groups["pid"]), int(groups["key"]) - facts.first_key
    if pid == facts.junk:
        return ""
    if "modality" in groups:
        tiles = {groups["modality"]: None}
    else:
        tiles = dict.fromkeys(name for name in facts.modalities if name in groups)
        tiles = tiles or {name: tile for tile, name in enumerate(facts.modalities)}  # a mosaic
    name = printable("/".join(groups[group] for group in ("folder", "name") if group in groups))
    for split in ("query", "gallery") if "test" in groups else splits.keys() & groups.keys():
        images = splits[split].setdefault(name, Sample(name, pid, key, {})).images
        if twins := images.keys() & tiles.keys():
            return f"the same sample as {printable(images[twins.pop()][0].name)}"
        images.update({modality: (path, tile) for modality, tile in tiles.items()})
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
    fixed = ("split", "identity", "camera")
    example = "the columns split, identity, camera, rgb, ... and e.g. train,red bus,gate 2,a.jpg"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); expected {example}") from None
    columns = reader.fieldnames or ()
    modalities = tuple(column for column in columns if column not in fixed)
    if not {*fixed} < {*columns}:
        raise UserError(f"{path}: its columns are {', '.join(columns)}; expected {example}")
    for modality in modalities:
        check_modality(modality, path)
    samples, not_taken = {split: [] for split in SPLITS}, {}
    ids, cameras = {}, {}  # numbers over all splits: query and gallery must agree
    for line, row in rows:
        images = {m: (path.parent / row[m], None) for m in modalities if row[m]}
        if row["split"] not in SPLITS or not row["identity"] or not images or None in row:
            not_taken[f"line {line}"] = f"expected {example}"
            continue
        name = printable(f"{row['identity']}_c{row['camera']}_{line:06d}")
        pid = ids.setdefault(row["identity"], len(ids))
        key = cameras.setdefault(row["camera"], len(cameras))
        samples[row["split"]].append(Sample(name, pid, key, images))
    samples = {split: sorted(own, key=lambda s: s.name) for split, own in samples.items()}
    return Found(path, example, modalities, samples, not_taken)


def synthetic_folder(root: Path, render: bool) -> Path:
    """The synthetic set's folder, ROOT or ROOT/synthetic, which `render` makes where it is absent.

    A child process renders it, which ends with this one.
    """
    from synthetic.render import VERSION  # upward, for this data set alone

    with runtime.rank0_first():
        folder = root if (root / "VERSION").exists() else root / "synthetic"
        if render and not folder.exists():
            runtime.print0(f"rendering the synthetic set into {folder}")
            command = [sys.executable, "-m", "synthetic.render", "--out", str(folder.absolute())]
            here = Path(__file__).parent
            with runtime.deferred_signals(), subprocess.Popen(command, cwd=here) as child:
                try:
                    while child.poll() is None and not runtime.noted_signal():
                        time.sleep(0.1)
                finally:
                    child.terminate()
                if number := runtime.noted_signal():
                    raise runtime.Stopped(number, "stopped while rendering the synthetic set")
            if child.returncode:
                raise UserError(f"{folder}: rendering failed; see above")
    file = folder / "VERSION"
    version = file.read_text().strip() if file.exists() else "none"
    if version != str(VERSION):
        raise UserError(
            f"{folder}: found version {version} of the synthetic set, expected {VERSION}; delete"
            f" the folder if it is there, and run python -m synthetic.render --out {folder}"
        )
    return folder


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
        turns = np.arange(positives) % (n - 1)
        if n <= 1000:
            # Each anchor goes its own way round the other samples of its identity
            offset = rng.permuted(np.tile(np.arange(1, n), (n, 1)), axis=1)[:, turns]
        else:  # n x n numbers would fill the memory: from a random start by steps of one length
            first, step = rng.integers(0, n - 1, (n, 1)), rng.integers(1, n - 1, (n, 1))
            step[np.gcd(step, n - 1) * positives > n - 1] = 1  # one that comes back too early
            offset = 1 + (first + step * turns) % (n - 1)
        positive = start + (np.arange(n)[:, None] + offset) % n
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
        # A copy: torch moves a tensor that is sent to another process
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
                f" ({len(self.pids)} samples, --positives {positives}); lower it"
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
        super().__init__(pids, batch_size, positives, seed)
        self.samples = samples
        self.groups = [np.flatnonzero(self.pids == pid) for pid in np.unique(self.pids)]
        self.num_ids, rest = divmod(3 * batch_size, samples)
        if rest or not 2 <= self.num_ids <= len(self.groups):
            raise UserError(
                f"--triplet hardest: --batch-size {batch_size} makes {3 * batch_size} images,"
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
        self.mean, self.std = (
            {name: 255 * torch.tensor(x, device=device).view(3, 1, 1) for name, x in values.items()}
            for values in (mean, std)
        )

    def __call__(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            modality: (image - self.mean[modality]).div_(self.std[modality])
            for modality, image in images.items()
        }


def add_options(parser, trained: bool = False) -> None:
    """The options of data; `trained`: their defaults are those of a checkpoint's training."""
    add, default = parser.add_argument, " (default: as in training)" if trained else ""
    text = f"train.py renders the synthetic set where it is absent{default}"
    add("--dataset", default=None if trained else "synthetic", choices=DATASETS, help=text)
    text = f"the data set's folder or its parent; of csv, the file{default}"
    add("--data-root", metavar="PATH", default=None if trained else "data", help=text)
    text = f"e.g. rgb,tir (default: {'all that were trained' if trained else 'all there are'})"
    add("--modalities", nargs="+", action=runtime.Names, type=runtime.names, help=text)
    text = "disk space for decoded images (~/.cache/graft); 0: decode each time they are needed"
    add("--store", metavar="GB", type=runtime.real(0), default=STORE_GB, help=text)
