"""Make a re-identification set of registered pairs of photos that have no labels.

It serves two kinds of users. Those without a data set clone the public repository
hanna-xu/RoadScene (221 pairs of RGB and thermal street scenes; cite Xu et al. 2020), rename
crop_LR_visible to rgb and cropinfrared to tir, and train on real pixels. Owners of a rig make a set
of their own pairs, train on it, and start from that run where labels are few: the backbone has then
adapted to their sensors.

python -m experiments.scenes --pairs RoadScene --out data/scenes --contact-sheet sheet.jpg
    --train 0 146 --test 147 220                   these scenes, not two thirds and one third
python -m experiments.scenes --pairs mine --out data/mine --sensors rgb,nir,tir
python train.py --dataset folder --data-root data/mine --out runs/mine     and see YOUR_DATA.md
    --backbone-weights runs/mine                   in a later training: starts from this run

An identity is a window of a scene. A camera is a drawn view: a change of scale, angle, place and
exposure, with a smaller change of its own in each capture. Training and test set share the cameras,
but no scene. Neighbours in a video show the same street, so they are split by ranges of scenes,
numbered from 0 in the order of their names.

What one sensor lacks the other has, by construction: of M sensors each is blind in 1/(M+1) of the
captures, and in 1/(M+1) none is. A blind sensor shows noise alone, dark if it needs light and flat
if not; the name of the file then ends in no_rgb or no_tir. This is no benchmark: the views are
drawn, so a window is easier to find again than an object that another camera saw.
"""

import io
import math
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import data
import runtime
from extras.check import contact_sheet
from runtime import UserError

CAMERAS, CAPTURES = 3, 2  # of a window, and of it by a camera; a scene has two windows
HEIGHT = 96  # pixels of a capture, which is twice as wide
SCENE = 4 * HEIGHT  # pixels to which the width of a scene, or twice its height, is brought
SMALLEST = 160  # what that is in the file at least: a smaller one would only show blur
SHARES = (0.42, 0.55)  # of that width, the width of a window
PAD = HEIGHT  # pixels mirrored at the scene's borders, for views that reach beyond them
# Half ranges of a camera: scale (logarithm), angle (radians), place (window widths, across and
# down); exposure (logarithm) and level (1 is white) of each sensor. A capture adds JITTER of them.
# So chosen that untrained features find a window about as often by RGB as by thermal images
GEOMETRY, LIGHT, JITTER = (0.2, 0.15, 0.08, 0.05), (0.2, 0.03), 0.35
NOISE, BLIND_NOISE = 0.01, 0.05  # standard deviations; 1 is white
NEED_LIGHT = ("rgb", "nir")


def find_scenes(folder: Path, sensors: tuple[str, ...]) -> list[dict[str, Path]]:
    """Each scene's file of each sensor."""
    files = {}
    for sensor in sensors:
        data.check_modality(sensor, folder)
        if not (folder / sensor).is_dir():
            text = "no such folder; expected one of each sensor, see --sensors"
            raise UserError(f"--pairs: {folder / sensor}: {text}")
        paths = [Path(entry) for _, entry in data.walk(folder / sensor, 0, "")]
        paths = [path for path in paths if path.suffix.lower() in data.SUFFIXES]
        files[sensor] = {path.stem: path for path in paths}
        if len(files[sensor]) < len(paths):
            raise UserError(
                f"{folder / sensor}: two files differ in their suffix alone; remove one"
            )
    stems = sorted(set().union(*files.values()))
    if len(stems) < 2 or len(sensors) < 2:
        expected = f"two or more, each seen by two sensors or more ({','.join(sensors)})"
        raise UserError(f"--pairs {folder}: {len(stems)} scenes found; expected {expected}")
    for sensor, own in files.items():
        if absent := [stem for stem in stems if stem not in own]:
            text = f"{sensor} lacks {len(absent)} of {len(stems)} scenes, e.g. {absent[0]}"
            raise UserError(f"--pairs {folder}: {text}; add them, or remove them everywhere")
    return [{sensor: own[stem] for sensor, own in files.items()} for stem in stems]


def split_scenes(count: int, train, test) -> dict[int, str]:
    """Number of a scene -> "train" or "test", by the first and the last of each."""
    if not train and not test:
        train, test = (0, 2 * count // 3 - 1), (2 * count // 3, count - 1)
    splits = {}
    for split, ends in (("train", train), ("test", test)):
        first, last = ends or (0, -1)
        if ends and not first <= last < count:
            text = f"expected the first and the last of scenes from 0 to {count - 1}"
            raise UserError(f"--{split} {first} {last}: {text}")
        if both := splits.keys() & range(first, last + 1):
            raise UserError(f"--test {first} {last}: scene {min(both)} is in --train, too")
        splits |= dict.fromkeys(range(first, last + 1), split)
    return splits


def read_scene(files: dict[str, Path]) -> dict[str, Image.Image]:
    """Each sensor's image, of one size, with a border of PAD mirrored pixels; grey ones as "L"."""
    images, size = {}, None
    for sensor, path in files.items():
        image = data.read_image(path)
        W, H = image.size
        width = min(W, 2 * H)
        if width < SMALLEST:
            expected = f"at least {SMALLEST}x{SMALLEST // 2}"
            raise UserError(f"{path}: {W}x{H} pixels; expected {expected}")
        size = size or (round(W * SCENE / width), round(H * SCENE / width))
        if abs(math.log(W / H * size[1] / size[0])) > 0.02:
            text = f"another aspect than {next(iter(files.values()))}; register the images first"
            raise UserError(f"{path}: {W}x{H} pixels, {text}")
        pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
        if (pixels == pixels[..., :1]).all():
            pixels = pixels[..., 0]
        border = [(PAD, PAD), (PAD, PAD), (0, 0)][: pixels.ndim]
        images[sensor] = Image.fromarray(np.pad(pixels, border, mode="reflect"))
    return images


def cut(image: Image.Image, window: tuple[float, float, float], geometry) -> np.ndarray:
    """A window as a camera sees it: (HEIGHT, 2 * HEIGHT), with colour (..., 3); 1 is white."""
    left, top, width = window
    scale, angle, across, down = geometry
    step = width * math.exp(scale) / (2 * HEIGHT)  # pixels of the scene for one of the capture
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    x = PAD + left + (0.5 + across) * width - cos * HEIGHT + sin * HEIGHT / 2
    y = PAD + top + (0.25 + down) * width - sin * HEIGHT - cos * HEIGHT / 2
    affine, size = (cos, -sin, x, sin, cos, y), (2 * HEIGHT, HEIGHT)
    view = image.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.asarray(view) / 255


def expose(pixels: np.ndarray, light, sensor: str, is_blind: bool, rng) -> Image.Image:
    """What a sensor makes of a view. It draws as much whether it is blind or not."""
    blank = rng.uniform(0.02, 0.1) if sensor in NEED_LIGHT else rng.uniform(0.3, 0.7)
    exposure, level = light
    seen = np.full_like(pixels, blank) if is_blind else pixels * math.exp(exposure) + level
    seen = seen + rng.normal(0, BLIND_NOISE if is_blind else NOISE, pixels.shape)
    return Image.fromarray(np.rint(255 * seen.clip(0, 1)).astype(np.uint8))


def captures(
    scenes: list, splits: dict[int, str], blind: list[str], seed: int, number: int
) -> dict[str, bytes]:
    """A scene's captures: path in the set -> PNG. `blind`: sensors to deal out, "" for none."""
    files = {}
    images, spread = read_scene(scenes[number]), np.array(GEOMETRY + LIGHT * len(scenes[number]))
    cameras = runtime.numpy_rng(seed, 0).uniform(-spread, spread, (CAMERAS, len(spread)))
    rng, count = runtime.numpy_rng(seed, 1, number), CAMERAS * CAPTURES
    W, H = (side - 2 * PAD for side in next(iter(images.values())).size)
    for half in (0, 1):  # a window in each half of the scene: they share a fifth at most
        width = rng.uniform(*SHARES) * SCENE
        left = rng.uniform(0, max(0, W / 2 - width))
        window = (W - width - left if half else left, rng.uniform(0, H - width / 2), width)
        pid = 2 * number + half + 1
        # Dealt and not drawn, so that each sensor is blind equally often in any range of scenes
        for i, turn in enumerate(rng.permutation(np.arange(count) + pid * count)):
            camera, capture = divmod(i, CAPTURES)
            view = cameras[camera] + JITTER * rng.uniform(-spread, spread)
            lights, dead = view[4:].reshape(-1, 2), blind[turn % len(blind)]
            name = f"{pid:05d}_c{camera + 1}_{capture}{dead and '_no_'}{dead}.png"
            folders = ("gallery",) if capture else ("query", "gallery")
            for (sensor, image), light in zip(images.items(), lights, strict=True):
                pixels = cut(image, window, view[:4])
                png = io.BytesIO()
                expose(pixels, light, sensor, sensor == dead, rng).save(png, "png")
                for folder in ("train",) if splits[number] == "train" else folders:
                    files[f"{folder}/{sensor}/{name}"] = png.getvalue()
    return files


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.scenes")
    add = parser.add_argument
    add("--pairs", metavar="FOLDER", type=Path, required=True, help="holds a folder of each sensor")
    text = "names of these folders (default: rgb,tir)"
    add("--sensors", metavar="NAMES", type=runtime.names, default=("rgb", "tir"), help=text)
    add("--out", metavar="DIR", type=Path, required=True, help="new folder for the set")
    ends = {"metavar": ("FIRST", "LAST"), "type": runtime.whole(0), "nargs": 2}
    add("--train", **ends, help="scenes to train on (default: two thirds, the rest for --test)")
    add("--test", **ends, help="scenes of query and gallery; with --train alone there are none")
    text = "each: as above; first: the first sensor is blind in half of the captures; none"
    add("--failures", choices=("each", "first", "none"), default="each", help=text)
    add("--seed", metavar="N", type=runtime.whole(0), default=0, help="random seed")
    text = "a picture of some identities by each camera, a sample's sensors below one another"
    add("--contact-sheet", metavar="FILE", type=Path, help=text)
    args = parser.parse_args()
    runtime.check_output(args.contact_sheet, "--contact-sheet", (".jpg", ".jpeg", ".png"))
    out, sensors = args.out, args.sensors
    if out.exists():
        raise UserError(f"--out {out}: is there already; delete it, or choose another")
    scenes = find_scenes(args.pairs, sensors)
    splits = split_scenes(len(scenes), args.train, args.test)
    blind = {"each": [*sensors, ""], "first": [sensors[0], ""], "none": [""]}[args.failures]
    runtime.make_folder(out.parent, "--out")
    # A stop or an error leaves nothing half-made: threads, which may outlive it, do not write
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as unfinished:
        root = Path(unfinished, "set")
        work = partial(captures, scenes, splits, blind, args.seed)
        for files in data.in_threads(work, list(splits), "cutting"):
            for path, content in files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(content)
        root.rename(out)
    dataset = data.load_dataset("folder", out, need=())
    sizes = f"{len(dataset.train)} training samples, {len(dataset.query)} queries"
    print(f"{out}: {sizes}, {len(dataset.gallery)} gallery samples of {len(splits)} scenes")
    if args.contact_sheet:
        shown = dataset.train if len(dataset.train) else dataset.gallery
        contact_sheet(shown, args.contact_sheet)
        print(f"{args.contact_sheet}: some identities by each camera")


if __name__ == "__main__":
    main()
