"""Check a data set: read every image, list what is wrong, and count what is there.

python -m extras.check --dataset folder --data-root mine
    --contact-sheet sheet.jpg                              draws some identities by some cameras

Errors prevent training or evaluation; only they make the exit code 2. Warnings cost samples or
accuracy. Notes need no action.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import runtime
from runtime import UserError

# Shapes: N samples, H height, W width

LOOKED_AT = 200  # samples, evenly spread, by which the alignment of the sensors is measured
SIDE = 128  # pixels of their longer side
NEAR = 0.02  # of a side: shifts up to this count as aligned
AGREEING = 0.1  # of the samples must agree on a shift; a random one fits 0.2% of them

Lines = dict[str, list[str]]  # "errors", "warnings", "notes" -> one line for each finding


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m extras.check")
    add = parser.add_argument
    add("--dataset", required=True, choices=data.DATASETS)
    text = "the data set's folder or its parent; of csv, the file"
    add("--data-root", metavar="PATH", type=Path, required=True, help=text)
    text = "e.g. rgb,tir (default: all there are)"
    add("--modalities", action=runtime.Names, help=text)
    text = "picture to draw: a row for each of some identities, a column for each of some cameras"
    add("--contact-sheet", metavar="FILE", type=Path, help=text)
    args = parser.parse_args()
    runtime.check_output(args.contact_sheet, "--contact-sheet", (".jpg", ".jpeg", ".png"))
    found = data.find(args.dataset, args.data_root)
    known = found.modalities
    modalities = runtime.in_order(args.modalities or known, known, str(found.base))
    splits, lines = check(found, args.dataset, modalities)
    if args.contact_sheet:
        contact_sheet(splits["train"], args.contact_sheet)
        print(f"wrote {args.contact_sheet}: some identities of train by some cameras")
    for kind, findings in lines.items():
        print(f"{kind}: {len(findings)}", *findings, sep="\n  ")
    sys.stdout.flush()  # so that a reader that has gone, as `| head`, is noticed here
    if lines["errors"]:
        counts = ", ".join(f"{len(findings)} {kind}" for kind, findings in lines.items())
        raise UserError(f"{found.base}: {counts}; see above")


def check(found: data.Found, name: str, modalities) -> tuple[dict[str, data.Split], Lines]:
    """Print what a data set holds; returns its splits, and the findings."""
    lines: Lines = {"errors": [], "warnings": [], "notes": []}
    for path, why in found.not_taken.items():
        lines["notes" if why == data.BESIDE else "warnings"].append(f"{path}: {why}")
    splits, sizes = {}, Counter()
    for split, known in zip(data.SPLITS, data.DATASETS[name].counts or (0, 0, 0), strict=True):
        samples = [sample.only(modalities) for sample in found.samples[split]]
        for sample in samples:
            if absent := [m for m in modalities if m not in sample.images]:
                lines["warnings"].append(f"{split}: {sample.name} lacks {', '.join(absent)}")
        splits[split] = data.Split([sample for sample in samples if sample.images], modalities)
        if not len(splits[split]):
            lines["errors"].append(f"{split}: no images; expected {found.example}")
        elif known not in (0, len(samples)):
            counts = f"{len(samples)} samples, {name} is known to have {known}"
            lines["warnings"].append(f"{split}: {counts}")
        split_sizes, unreadable = read_all(splits[split], split)
        print(*describe(splits[split], split, split_sizes), sep="\n")
        lines["errors"] += unreadable
        sizes += split_sizes
    for kind, text in consistency(splits):
        lines[kind].append(text)
    if sizes:
        (_, W, H), _ = sizes.most_common(1)[0]
        size = tuple(max(16, round(SIDE * side / max(W, H))) for side in (H, W))
        some = [sample for split in splits.values() for sample in spread(split.samples)]
        print(*alignment_lines(data.Split(spread(some), modalities, size)), sep="\n")
    return splits, lines


def spread(items: list, count: int = LOOKED_AT) -> list:
    """At most `count` of them, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


# --- counts, sizes, identities


def read_all(split: data.Split, name: str) -> tuple[Counter, list[str]]:
    """Decode every image: counts of (modality, width, height), and a line for each bad file."""
    sizes, unreadable = Counter(), {}  # a dict, since all tiles of a mosaic give the same line
    for result in data.in_threads(read_sample, split.samples, f"reading {name}"):
        for modality, value in result.items():
            if isinstance(value, str):
                unreadable[value] = None
            else:
                sizes[modality, *value] += 1
    return sizes, list(unreadable)


def read_sample(sample: data.Sample) -> dict[str, tuple[int, int] | str]:
    """Width and height of each of a sample's images, or why it cannot be read."""
    results = {}
    for path, tile in dict(sample.images.values()).items():  # each file once
        try:
            W, H = data.read_image(path, tile).size
            results[path] = (W if tile is None else 2 * H, H)
        except UserError as error:
            results[path] = str(error)
    return {modality: results[path] for modality, (path, _) in sample.images.items()}


def describe(split: data.Split, name: str, sizes: Counter) -> Iterator[str]:
    """A split's counts, and each sensor's images and sizes."""
    ids, keys = len(split.pids.unique()), len(split.keys.unique())
    yield f"{name}: {len(split)} samples, {ids} identities, {keys} cameras or scenes"
    for modality in split.modalities:
        found = [(W, H, n) for (m, W, H), n in sizes.most_common() if m == modality]
        shown = ", ".join(f"{W}x{H} ({n})" for W, H, n in found[:3]) or "none that can be read"
        more = f" and {len(found) - 3} other sizes" if len(found) > 3 else ""
        yield f"  {modality}: {sum(n for _, _, n in found)} images, {shown}{more}"


def consistency(splits: dict[str, data.Split]) -> Iterator[tuple[str, str]]:
    """Identities that cannot be trained on, queries that cannot be found, leaks: (kind, line)."""
    train, query, gallery = (splits[name] for name in data.SPLITS)
    whole = [s for s in train.samples if len(s.images) == len(train.modalities)]
    counts = Counter(sample.pid for sample in whole)
    try:
        if len(train):
            data.TripletSampler(train.subset(whole).pids, 1, 1, 0)
    except UserError as error:
        yield "errors", f"train: {error}"
    for pid, count in counts.items():
        if count == 1:
            yield "warnings", f"train: identity {pid} has a single sample, so no positive"
    keys = defaultdict(set)
    for sample in gallery.samples:
        keys[sample.pid].add(sample.key)
    lost = [s.name for s in query.samples if not keys[s.pid] - {s.key}]
    if lost and len(lost) == len(query):
        yield "errors", "query: none has a match in the gallery from another camera or scene"
    else:
        for name in lost:
            yield "warnings", f"query: {name} has no match from another camera or scene"
    for pid in sorted({sample.pid for sample in gallery.samples} & counts.keys()):
        yield "warnings", f"identity {pid} is in the training data and in the gallery"


# --- alignment


def alignment_lines(split: data.Split) -> Iterator[str]:
    """Of each pair of sensors, whether they show the same place at the same pixel."""
    greys = {modality: [] for modality in split.modalities}
    for sample in split.samples if len(split.modalities) > 1 else ():
        try:
            images = split.read(sample)
        except UserError:
            continue  # listed among the errors
        if len(images) == len(split.modalities):
            for modality, image in images.items():
                greys[modality].append(image.float().mean(0))
    for a, b in combinations(split.modalities, 2):
        if not greys[a]:
            yield f"{a} and {b}: no sample has all sensors, so their alignment is unknown"
            continue
        (across, down), agreeing = alignment(torch.stack(greys[a]), torch.stack(greys[b]))
        text = f"shifted by {100 * across:+.0f}% across and {100 * down:+.0f}% down"
        if max(abs(across), abs(down)) <= NEAR:
            text = "aligned"
        if agreeing < AGREEING:
            text = "no common alignment"
        yield f"{a} and {b}: {text} ({100 * agreeing:.0f}% of {len(greys[a])} samples agree)"


def alignment(a: Tensor, b: Tensor) -> tuple[tuple[float, float], float]:
    """How far b's images (N, H, W) are shifted against a's.

    Returns the shift (across, down) that fits all samples together best, as a share of the sides,
    and the share of samples whose best shift by themselves is near it. One sample alone may
    mislead: by night RGB shows little of what TIR shows.
    """
    H, W = a.shape[1:]
    cross = torch.fft.rfft2(edges(a)).conj() * torch.fft.rfft2(edges(b))
    # Half way to phase correlation, whose flat spectrum lets noise decide across sensors
    surface = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-9).sqrt(), s=(H, W))
    surface = surface / surface.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None]

    def to_shift(peak: Tensor) -> Tensor:
        """Flat index -> shift across and down, in shares of the sides: (..., 2)."""
        x, y = peak % W, peak // W
        return torch.stack([(x - W * (x > W // 2)) / W, (y - H * (y > H // 2)) / H], -1)

    each, common = to_shift(surface.flatten(1).argmax(1)), to_shift(surface.sum(0).argmax())
    # A peak lies between pixels, so on a short side 1.5 of them are near
    near = torch.tensor([max(NEAR, 1.5 / W), max(NEAR, 1.5 / H)])
    agreeing = ((each - common).abs() <= near).all(1).float().mean().item()
    return tuple(common.tolist()), agreeing


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
    from extras import pictures

    samples = {}
    for sample in split.samples:
        samples.setdefault((sample.pid, sample.key), sample)
    keys = sorted(key for key, _ in Counter(key for _, key in samples).most_common(cameras))
    rows = []
    for pid in spread(sorted({pid for pid, key in samples if key in keys}), ids):
        rows.append([])
        for key in keys:
            images, title = {}, f"{pid}, camera {key + 1}"
            try:
                images = split.read(samples[pid, key])
            except (KeyError, UserError):
                title += ": none"
            rows[-1].append(pictures.Cell(images, (title,)))
    if not any(cell.images for row in rows for cell in row):
        raise UserError(f"--contact-sheet {path}: train has no readable image to draw")
    pictures.sheet(rows, split.modalities, path)


if __name__ == "__main__":
    main()
