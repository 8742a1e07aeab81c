"""Make a re-identification set of registered pairs of photos that have no labels.

python -m experiments.scenes --pairs RoadScene --out data/scenes --contact-sheet sheet.jpg
    --train 0 99 --test 100 146                    these scenes, not two thirds and one third
python -m experiments.scenes --pairs mine --out data/mine --sensors rgb,nir,tir

Users without a data set train on the real pixels of the public repository hanna-xu/RoadScene: 221
pairs of RGB and thermal street scenes (Xu et al. 2020; experiments/README.md has the commands).
Owners of a rig adapt a backbone to their sensors with pairs of their own: see YOUR_DATA.md.

An identity is a window of a scene. A camera is a random change of view (scale, angle, place) and
of exposure, with a smaller change of its own in each capture. Training and test set share the
cameras, but no scene. Neighbours in a video show the same street, so scenes are split by ranges;
they are numbered from 0 in the order of their names.

By construction, one sensor has what the other lacks. With M sensors, each is blind in 1/(M+1) of
the captures; in the remaining 1/(M+1) all sensors see. A blind sensor shows only noise, in the dark
if it needs light, else on a flat image; the file's name then ends in no_rgb or no_tir. This is no
benchmark: a window is easier to find again than an object that another camera saw.
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

CAMERAS, CAPTURES = 3, 2  # cameras that see a window, captures of it by each
HEIGHT = 96  # pixels of a capture, which is twice as wide
SCENE = 4 * HEIGHT  # a scene is resized to this width, or to half of it in height if it is narrow
SMALLEST = 160  # pixels of that width in the file, at least: less would only show blur
SHARES = (0.42, 0.55)  # width of a window, as a share of the scene's
PAD = HEIGHT  # pixels mirrored at the scene's borders, for views that reach beyond them
# A camera is drawn from plus or minus these: scale (logarithm), angle (radians), place (in widths
# of a window, across and down); exposure (logarithm) and level (1 is white) of each sensor. A
# capture adds JITTER times as much. Untrained features then find a window about as often by RGB as
# by thermal images
GEOMETRY, LIGHT, JITTER = (0.2, 0.15, 0.08, 0.05), (0.2, 0.03), 0.35
NOISE, BLIND_NOISE = 0.01, 0.05  # standard deviations; 1 is white
NEED_LIGHT = ("rgb", "nir")


def find_scenes(folder: Path, sensors: tuple[str, ...]) -> list[dict[str, Path]]:
    """Each scene's file of each sensor, by the name without its suffix."""
    files = {}
    for sensor in sensors:
        data.check_modality(sensor, folder)
        if not (folder / sensor).is_dir():
            text = "no such folder; expected one for each sensor, see --sensors"
            raise UserError(f"--pairs: {folder / sensor}: {text}")
        images = (folder / sensor).glob("[!.]*")
        images = [path for path in images if path.suffix.lower() in data.SUFFIXES]
        files[sensor] = {path.stem: path for path in images}
        if len(files[sensor]) < len(images):
            text = "two files differ in their suffix alone; remove one"
            raise UserError(f"{folder / sensor}: {text}")
    stems = sorted(set().union(*files.values()))
    if len(stems) < 2 or len(sensors) < 2:
        expected = f"two or more, each seen by two sensors or more ({','.join(sensors)})"
        raise UserError(f"--pairs {folder}: {len(stems)} scenes found; expected {expected}")
    for sensor, paths in files.items():
        if absent := [stem for stem in stems if stem not in paths]:
            text = f"{sensor} lacks {len(absent)} of {len(stems)} scenes, such as {absent[0]}"
            raise UserError(f"--pairs {folder}: {text}; add them, or remove them everywhere")
    return [{sensor: paths[stem] for sensor, paths in files.items()} for stem in stems]


def split_scenes(count: int, train, test) -> dict[int, str]:
    """Number of a scene -> "train" or "test"; of each the first and last scene, or None."""
    if not train and not test:
        train, test = (0, 2 * count // 3 - 1), (2 * count // 3, count - 1)
    splits = {}
    for split, ends in (("train", train), ("test", test)):
        first, last = ends or (0, -1)
        if ends and not first <= last < count:
            text = f"expected the numbers of a first and a last scene, from 0 to {count - 1}"
            raise UserError(f"--{split} {first} {last}: {text}")
        if both := splits.keys() & range(first, last + 1):
            raise UserError(f"--test {first} {last}: scene {min(both)} is in --train, too")
        splits |= dict.fromkeys(range(first, last + 1), split)
    return splits


def read_scene(files: dict[str, Path]) -> dict[str, Image.Image]:
    """Each sensor's image, all of one size, in mode L if it is grey; with a mirrored border."""
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
            text = f"another aspect ratio than {next(iter(files.values()))}"
            raise UserError(f"{path}: {W}x{H} pixels, {text}; register the images first")
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
    """What a sensor makes of a view. Blind or not, it draws as many random numbers."""
    blank = rng.uniform(0.02, 0.1) if sensor in NEED_LIGHT else rng.uniform(0.3, 0.7)
    exposure, level = light
    seen = np.full_like(pixels, blank) if is_blind else pixels * math.exp(exposure) + level
    seen = seen + rng.normal(0, BLIND_NOISE if is_blind else NOISE, pixels.shape)
    return Image.fromarray(np.rint(255 * seen.clip(0, 1)).astype(np.uint8))


def captures(
    scenes: list, splits: dict[int, str], blind: list[str], seed: int, number: int
) -> dict[str, bytes]:
    """A scene's captures: path in the set -> PNG. `blind`: who is blind in turn, "" for none."""
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
            lights, failed = view[4:].reshape(-1, 2), blind[turn % len(blind)]
            name = f"{pid:05d}_c{camera + 1}_{capture}{failed and '_no_'}{failed}.png"
            folders = ("gallery",) if capture else ("query", "gallery")
            for (sensor, image), light in zip(images.items(), lights, strict=True):
                pixels = cut(image, window, view[:4])
                png = io.BytesIO()
                expose(pixels, light, sensor, sensor == failed, rng).save(png, "png")
                for folder in ("train",) if splits[number] == "train" else folders:
                    files[f"{folder}/{sensor}/{name}"] = png.getvalue()
    return files


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.scenes")
    add = parser.add_argument
    add("--pairs", metavar="FOLDER", type=Path, required=True, help="holds a folder of each sensor")
    text = "names of these folders"
    add("--sensors", action=runtime.Names, default=("rgb", "tir"), help=text)
    add("--out", metavar="DIR", type=Path, required=True, help="new folder for the set")
    ends = {"metavar": ("FIRST", "LAST"), "type": runtime.whole(0), "nargs": 2}
    add("--train", **ends, help="scenes to train on (default: two thirds, the rest for --test)")
    add("--test", **ends, help="scenes of query and gallery; with --train alone there are none")
    text = "sensors that are blind in turn: each, the first (in half of the captures), or none"
    add("--failures", choices=("each", "first", "none"), default="each", help=text)
    add("--seed", metavar="N", type=runtime.whole(0), default=0, help="random seed")
    text = "write a picture of some identities as each camera saw them, sensors below one another"
    add("--contact-sheet", metavar="FILE", type=Path, help=text)
    args = parser.parse_args()
    runtime.check_output(args.contact_sheet, "--contact-sheet", (".jpg", ".jpeg", ".png"))
    out, sensors = args.out, args.sensors
    if out.exists():
        raise UserError(f"--out {out}: exists already; delete it, or choose another")
    scenes = find_scenes(args.pairs, sensors)
    splits = split_scenes(len(scenes), args.train, args.test)
    blind = {"each": [*sensors, ""], "first": [sensors[0], ""], "none": [""]}[args.failures]
    runtime.make_folder(out.parent, "--out")
    # A stop or an error leaves nothing half-made: the threads, which may outlive it, do not write
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
