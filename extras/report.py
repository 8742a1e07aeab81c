"""What a data set holds: counts, sizes, ranges of raw values, alignment; and a contact sheet.

`python data.py --check` prints it. Nothing here changes what is read.

Shapes: N samples, H height, W width.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import runtime
from extras import pictures
from runtime import UserError

LOOKED_AT = 200  # samples, evenly spread: for alignment, and for percentiles of raw values
PIXELS = 4096  # of each image, for the percentiles
SIDE = 128  # pixels of the longer side, for alignment
NEAR = 0.02  # of a side: what counts as aligned
SHARED = 0.1  # of the samples must agree on a shift; a shift drawn at random is right for 0.2%


def report(splits: dict[str, data.Split], sheet: Path | None = None) -> list[str]:
    """Print what the splits hold, and draw the sheet; returns a line for each thing to be done."""
    deep: dict[str, list[Path]] = {}
    for name, split in splits.items():
        print(*split_lines(name, split, deep), sep="\n")
    seen = [sample for split in splits.values() for sample in spread(split.samples)]
    train = splits["train"]
    found = {modality: raw_values(spread(paths)) for modality, paths in deep.items()}
    wanted = []
    for modality, (low, high) in found.items():
        option = (
            "--tir-range {:g} {:g}" if modality == "tir" else f"--range {modality}={{:g}},{{:g}}"
        )
        holds = f"{modality}: {len(deep[modality])} images hold more than 8 bits a channel"
        print(f"{holds}; percentiles 1 and 99 of their values are {low:g} and {high:g}")
        if modality not in train.ranges:
            wanted.append(f"{holds}; give a range, e.g. {option.format(low, high)}")
    ranges = {**found, **train.ranges}
    size = common_size(seen)
    readable = data.Split(spread(seen), train.modalities, size, ranges=ranges)
    print(*alignment_lines(readable), sep="\n")
    if sheet:
        contact_sheet(data.Split(train.samples, train.modalities, ranges=ranges), sheet)
        print(f"{sheet}: some identities of train by some cameras")
    return wanted


def spread(items: list, count: int = LOOKED_AT) -> list:
    """At most `count` of them, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


# --- counts and sizes


def split_lines(name: str, split: data.Split, deep: dict[str, list[Path]]) -> Iterator[str]:
    """A split's counts, and each sensor's images and sizes; adds its images of many bits to `deep`.

    Only the heads of the files are read; what cannot be read is not counted here.
    """
    ids, keys = len(split.pids.unique()), len(split.keys.unique())
    yield f"{name}: {len(split)} samples, {ids} identities, {keys} cameras or scenes"
    with ThreadPoolExecutor(runtime.num_cores()) as pool:
        rows = pool.map(heads, split.samples)
        rows = list(tqdm(rows, f"{name}, sizes", len(split), leave=False, disable=None))
    for modality in split.modalities:
        own = [row[modality] for row in rows if modality in row]
        sizes = Counter(head.size for head in own).most_common()
        shown = ", ".join(f"{W}x{H} ({count})" for (W, H), count in sizes[:3])
        more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
        yield f"  {modality}: {len(own)} images, {shown or 'none'}{more}"
        if several_bits := [head.path for head in own if head.deep]:
            deep.setdefault(modality, []).extend(several_bits)


class Head(NamedTuple):
    """What the head of an image file says: of a mosaic, the size of a tile."""

    path: Path
    size: tuple[int, int]  # width, height
    deep: bool


def heads(sample: data.Sample) -> dict[str, Head]:
    found = {}
    for modality, (path, tile) in sample.images.items():
        try:
            with data.open_image(path) as image:
                W, H = image.size
                found[modality] = Head(
                    path, (W, H) if tile is None else (2 * H, H), data.is_deep(image)
                )
        except (OSError, SyntaxError, ValueError):
            continue  # data.check says so
    return found


def raw_values(paths: list[Path]) -> tuple[float, float]:
    """Percentiles 1 and 99 of these images' values, as they are in the files."""
    values = []
    for path in paths:
        try:
            with data.open_image(path) as image:
                values.append(np.asarray(image, np.float32).ravel())
        except (OSError, SyntaxError, ValueError):
            continue
    drawn = [x[np.linspace(0, len(x) - 1, min(PIXELS, len(x))).astype(int)] for x in values]
    low, high = np.nanpercentile(np.concatenate(drawn or [[0.0, 1.0]]), (1, 99))
    # As short as says enough, and never the same twice
    digits = 0 if high - low >= 100 else 3
    low, high = round(float(low), digits), round(float(high), digits)
    return low, high if high > low else low + 1


# --- alignment


def common_size(samples: list[data.Sample]) -> tuple[int, int]:
    """Height and width to compare at: the first readable image's aspect."""
    sizes = (head.size for sample in samples for head in heads(sample).values())
    W, H = next(sizes, (SIDE, SIDE))
    return tuple(max(16, round(SIDE * side / max(W, H))) for side in (H, W))


def alignment_lines(split: data.Split) -> list[str]:
    """Of each pair of sensors, whether they show the same place at the same pixel."""
    features = {modality: [] for modality in split.modalities}
    for sample in split.samples if len(split.modalities) > 1 else ():
        try:
            images = split.read(sample)
        except UserError:
            continue  # data.check says so
        if len(images) == len(split.modalities):
            for modality, image in images.items():
                features[modality].append(image.float().mean(0))
    lines = []
    for a, b in combinations(split.modalities, 2):
        if not features[a]:
            lines.append(f"{a} and {b}: no sample has all sensors, so alignment is not known")
            continue
        share, shift, agreeing = alignment(torch.stack(features[a]), torch.stack(features[b]))
        across, down = (f"{100 * x:+.0f}%" for x in shift)
        text = "no common alignment"
        if agreeing >= SHARED:
            text = "aligned" if max(map(abs, shift)) <= NEAR else f"shifted by {across}, {down}"
        lines.append(
            f"{a} and {b}: {text} (all samples together fit best at {across} across, {down} down;"
            f" by itself each fits within {100 * NEAR:g}% of the side in {100 * share:.0f}% of"
            f" {len(features[a])})"
        )
    return lines


def alignment(a: Tensor, b: Tensor) -> tuple[float, tuple[float, float], float]:
    """How far b's images (N, H, W) are shifted against a's.

    Returns the share of samples whose own best shift is within NEAR of none, the shift (across,
    down) that fits all together best, as a share of the sides, and how many samples agree with it.
    One sample alone may mislead: by night RGB shows little of what TIR shows.
    """
    H, W = a.shape[1:]
    cross = torch.fft.rfft2(edges(a)).conj() * torch.fft.rfft2(edges(b))
    # Half way to phase correlation, whose flat spectrum lets noise decide across sensors
    surface = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-9).sqrt(), s=(H, W))
    surface = surface / surface.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None]

    def place(peak: Tensor) -> Tensor:
        """Flat index -> shift across and down, in shares of the sides: (..., 2)."""
        x, y = peak % W, peak // W
        return torch.stack([(x - W * (x > W // 2)) / W, (y - H * (y > H // 2)) / H], -1)

    own = place(surface.flatten(1).argmax(1))  # (N, 2)
    common = place(surface.sum(0).argmax())
    # Half a pixel more, where the side is short
    near = torch.tensor([max(NEAR, 1.5 / W), max(NEAR, 1.5 / H)])
    share = (own.abs() <= near).all(1).float().mean().item()
    agreeing = ((own - common).abs() <= near).all(1).float().mean().item()
    return share, tuple(common.tolist()), agreeing


def edges(x: Tensor) -> Tensor:
    """Log of the gradient's magnitude of (N, H, W), fading out to the borders.

    Where it changes is common to the sensors; whether it grows or falls there is not.
    """
    x = F.avg_pool2d(x[:, None], 3, 1, 1, count_include_pad=False)
    across = F.pad(x[..., 2:] - x[..., :-2], (1, 1))
    down = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
    magnitude = torch.log1p((across**2 + down**2).sqrt())[:, 0]
    H, W = magnitude.shape[1:]
    window = torch.hann_window(H, False)[:, None] * torch.hann_window(W, False)
    mean = (magnitude * window).sum((1, 2), keepdim=True) / window.sum()
    return (magnitude - mean) * window


# --- contact sheet


def contact_sheet(split: data.Split, path: Path, ids: int = 6, cameras: int = 4) -> None:
    """A row for each of some identities, a column for each of some cameras."""
    samples = {}
    for sample in split.samples:
        samples.setdefault((sample.pid, sample.key), sample)
    often = Counter(key for _, key in samples).most_common(cameras)
    keys = sorted(key for key, _ in often)
    chosen = spread(sorted({pid for pid, key in samples if key in keys}), ids)
    make = partial(contact, split)
    rows = [[make(samples.get((pid, key)), pid, key) for key in keys] for pid in chosen]
    if not any(cell.images for row in rows for cell in row):
        raise UserError(f"--contact-sheet {path}: no image of train can be read, so none is drawn")
    pictures.sheet(rows, ("",), path)


def contact(split: data.Split, sample: data.Sample | None, pid: int, key: int) -> pictures.Cell:
    """A sample's sensors side by side in one image; grey where one is absent."""
    names = " | ".join(split.modalities)
    title = f"{pid}, camera {key + 1}"
    if sample is None:
        return pictures.Cell({}, (title, "no sample"))
    try:
        images = split.read(sample)
    except UserError:
        return pictures.Cell({}, (title, "cannot be read"))
    H = max(image.shape[1] for image in images.values())
    W = round(max(image.shape[2] / image.shape[1] for image in images.values()) * H)
    parts = []
    for modality in split.modalities:
        part = torch.full((3, H, W), 215, dtype=torch.uint8)
        if modality in images:
            image = images[modality][None]
            width = round(H * image.shape[3] / image.shape[2])
            left = (W - width) // 2
            resized = F.interpolate(image, (H, width), mode="bicubic", antialias=True)
            part[:, :, left : left + width] = resized[0]
        parts.append(part)
    return pictures.Cell({"": torch.cat(parts, 2)}, (title, names))
