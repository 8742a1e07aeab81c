"""Render the synthetic set: vehicles seen by eight cameras through three registered sensors.

python -m synthetic.render --out data/synthetic

A vehicle is a point in the unit cube of ATTRIBUTES. Its faces, in metres and with what each sensor
sees of them, are built once (`vehicle_faces`) and photographed many times (`capture`).
`write_dataset` puts the captures on disk as RGBNT100 does: one JPEG mosaic a sample, RGB, NIR and
TIR tiles side by side, named PID_cCCCCC_FFF.jpg.

Designed in, and therefore no discovery: night blinds RGB; paint, NIR reflectance and heat are drawn
independently of one another; TIR does not depend on light; occluders hide the same place in all
sensors; some markings are on the sides only.
"""

import math
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import runtime
from runtime import UserError, whole

# Of the picture: raised whenever a pixel changes, as results before and after do not compare.
# The order of the draws and of the sums below is a part of the picture, too
VERSION = 1
CAMERAS = (0, 180, 90, 270, 40, 140, 220, 320)  # azimuth in degrees; 0 looks at the front
TILE_HEIGHT = 64  # a tile is twice as wide as high
SUN = np.array([0.3, 0.5, 0.8]) / math.sqrt(0.98)

# --- vehicles

COLOUR = {"red": (0.08, 0.95), "green": (0.08, 0.95), "blue": (0.08, 0.95), "nir": (0.1, 0.95)}
DECALS = 3


def coat(name: str) -> dict[str, tuple[float, float]]:
    return {f"{name}_{channel}": span for channel, span in COLOUR.items()}


# Seen by every camera: name -> (value at 0, value at 1).
# Lengths in metres, heat and reflectance from 0 to 1.
BODY = {
    "length": (3.4, 5.4), "width": (1.6, 2.0), "height": (0.65, 1.0), "cabin_height": (0.45, 0.9),
    "cabin_back": (-0.45, -0.1), "cabin_front": (0.15, 0.48),  # of the length, from the middle
    **coat("paint"), **coat("roof"), "two_tone": (0, 1),
    "window": (0.05, 0.4), "window_nir": (0.1, 0.7), "wheel": (0.3, 0.42),
    "engine_heat": (0.3, 1.0), "wheel_heat": (0.2, 0.9),
    "body_heat": (0.1, 0.4), "cabin_heat": (0.1, 0.6),
}  # fmt: skip
# Seen by some cameras, or carried by some vehicles only.
# `has_*` and `two_tone` are compared with SHARE.
MARKINGS = {
    "engine_behind": (0, 1), "exhaust": (-0.4, 0.4),
    "has_stripe": (0, 1), **coat("stripe"), "stripe_low": (0.15, 0.7), "stripe_width": (0.1, 0.25),
    "has_band": (0, 1), **coat("band"), "band_middle": (-0.25, 0.25), "band_width": (0.1, 0.3),
}  # fmt: skip
for _i in range(DECALS):
    MARKINGS |= {f"has_decal{_i}": (0, 1), **coat(f"decal{_i}"), f"decal{_i}_x": (-0.35, 0.35),
                 f"decal{_i}_z": (0.25, 0.75), f"decal{_i}_length": (0.08, 0.3),
                 f"decal{_i}_height": (0.15, 0.4)}  # fmt: skip
ATTRIBUTES = BODY | MARKINGS
SHARE = {"two_tone": 0.4, "engine_behind": 0.2} | {
    name: 0.5 for name in MARKINGS if name.startswith("has_")
}
MIN_DISTANCE = 0.9  # Euclidean, over the BODY axes of the unit cube, between any two vehicles


def vehicles(count: int, seed: int = 0) -> np.ndarray:
    """The first `count` vehicles of the sequence `seed`, points: (count, len(ATTRIBUTES)).

    A candidate nearer than MIN_DISTANCE to an earlier vehicle is passed over, so any two vehicles
    of a sequence differ in what every camera sees. Vehicle i does not depend on `count`.
    """
    rng = np.random.default_rng([seed, 0])
    chosen = np.empty((count, len(ATTRIBUTES)))
    found = 0
    while found < count:
        candidate = rng.random(len(ATTRIBUTES))
        gap = (chosen[:found] - candidate)[:, : len(BODY)]
        if (np.square(gap).sum(1) >= MIN_DISTANCE**2).all():
            chosen[found] = candidate
            found += 1
    return chosen


@dataclass(frozen=True)
class Face:
    """A flat polygon of a vehicle, and what each sensor sees of it.

    Corners are (n, 3) in metres; the outward normal is (3,).
    """

    corners: np.ndarray
    normal: tuple[int, int, int]
    rgb: np.ndarray  # reflectance (3,)
    nir: float  # reflectance
    heat: float


# Rectangles: corners and outward normal. x runs from the back to the front, y from right to left,
# z upwards; the ground is z = 0
def across(x, side, y0, y1, z0, z1):
    """On the front (side 1) or the back (side -1)."""
    return [(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], (side, 0, 0)


def along(y, side, x0, x1, z0, z1):
    """On the left (side 1) or the right (side -1)."""
    return [(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], (0, side, 0)


def above(z, x0, x1, y0, y1):
    """Seen from above."""
    return [(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], (0, 0, 1)


def grey(level: float, nir: float) -> tuple[np.ndarray, float]:
    """A material, as `Vehicle.material` gives it."""
    return np.full(3, level), nir


FLOOR = 0.25  # metres from the ground to the body


def vehicle_faces(point: np.ndarray) -> list[Face]:
    """Faces of the vehicle at `point` of the unit cube; a later one may hide an earlier one."""
    vehicle = Vehicle(point)
    vehicle.add_body()
    vehicle.add_side(-1)
    vehicle.add_side(1)
    vehicle.add_lamps_and_exhaust()
    vehicle.add_cabin()
    return vehicle.faces


class Vehicle:
    """A vehicle under construction: its attributes, and its faces in painting order."""

    def __init__(self, point: np.ndarray):
        self.value = {
            name: low + u * (high - low)
            for u, (name, (low, high)) in zip(point, ATTRIBUTES.items(), strict=True)
        }
        self.has = {name: self.value[name] < share for name, share in SHARE.items()}
        self.faces: list[Face] = []
        self.length, self.width = self.value["length"], self.value["width"]
        self.height, self.heat = self.value["height"], self.value["body_heat"]
        self.belt = FLOOR + self.height  # where the cabin stands on the body

    def add(self, rectangle: tuple, material: tuple, heat: float) -> None:
        corners, normal = rectangle
        self.faces.append(Face(np.asarray(corners, float), normal, *material, heat))

    def material(self, name: str) -> tuple[np.ndarray, float]:
        """RGB and NIR reflectance."""
        rgb = [self.value[f"{name}_{channel}"] for channel in ("red", "green", "blue")]
        return np.array(rgb), self.value[f"{name}_nir"]

    def add_body(self) -> None:
        length, width, belt, heat = self.length, self.width, self.belt, self.heat
        paint, engine_heat = self.material("paint"), self.value["engine_heat"]
        engine = -1 if self.has["engine_behind"] else 1
        for side in (-1, 1):
            warm = heat + (side == engine) * engine_heat / 2
            end = across(side * length / 2, side, -width / 2, width / 2, FLOOR, belt)
            self.add(end, paint, warm)
            flank = along(side * width / 2, side, -length / 2, length / 2, FLOOR, belt)
            self.add(flank, paint, heat)
        self.add(above(belt, -length / 2, length / 2, -width / 2, width / 2), paint, heat)
        bonnet = sorted((engine * 0.28 * length, engine * 0.48 * length))
        bonnet = above(belt, *bonnet, -0.35 * width, 0.35 * width)
        self.add(bonnet, paint, heat + 0.6 * engine_heat)
        if self.has["has_band"]:  # runs lengthwise over bonnet and roof
            band = above(belt, -length / 2, length / 2, *self.band())
            self.add(band, self.material("band"), heat)

    def band(self) -> list[float]:
        middle, width = self.value["band_middle"] * self.width, self.value["band_width"]
        return [middle + side * width * self.width / 2 for side in (-1, 1)]

    def add_side(self, side: int) -> None:
        """Stripe, decals and wheels."""
        value, length, height = self.value, self.length, self.height
        y = side * self.width / 2
        if self.has["has_stripe"]:
            low = FLOOR + value["stripe_low"] * height
            high = low + value["stripe_width"] * height
            stripe = along(y, side, -length / 2, length / 2, low, high)
            self.add(stripe, self.material("stripe"), self.heat)
        for i in range(DECALS):
            if self.has[f"has_decal{i}"]:
                x, z = value[f"decal{i}_x"] * length, FLOOR + value[f"decal{i}_z"] * height
                half = value[f"decal{i}_length"] * length / 2
                rise = value[f"decal{i}_height"] * height / 2
                decal = along(y, side, x - half, x + half, z - rise, z + rise)
                self.add(decal, self.material(f"decal{i}"), self.heat + 0.05)
        turn, (tyre, hub) = np.linspace(0, 2 * np.pi, 14), (grey(0.06, 0.08), grey(0.6, 0.6))
        for middle in (-0.32 * length, 0.32 * length):
            for share, material, heat in ((1.0, tyre, 1.0), (0.5, hub, 0.7)):
                radius = share * value["wheel"]
                x, z = middle + radius * np.cos(turn), value["wheel"] + radius * np.sin(turn)
                ring = np.stack([x, np.full(14, y), z], 1), (0, side, 0)
                self.add(ring, material, heat * value["wheel_heat"])

    def add_lamps_and_exhaust(self) -> None:
        length, width, height = self.length, self.width, self.height
        low, high = FLOOR + 0.55 * height, FLOOR + 0.8 * height
        for end, lamp in ((1, np.array([1.0, 1.0, 0.85])), (-1, np.array([0.8, 0.05, 0.05]))):
            for y in (-0.38 * width, 0.38 * width):
                place = across(end * length / 2, end, y - 0.15, y + 0.15, low, high)
                self.add(place, (lamp, 0.9), self.heat + 0.1)
        pipe = self.value["exhaust"] * width
        place = across(-length / 2, -1, pipe - 0.12, pipe + 0.12, FLOOR, FLOOR + 0.18)
        self.add(place, grey(0.2, 0.2), 1.0)

    def add_cabin(self) -> None:
        """Cabin, windows and roof."""
        value, belt, heat = self.value, self.belt, self.value["cabin_heat"]
        top = belt + value["cabin_height"]
        back, front = value["cabin_back"] * self.length, value["cabin_front"] * self.length
        half, rim = 0.46 * self.width, 0.09
        roof = self.material("roof" if self.has["two_tone"] else "paint")
        glass = grey(value["window"], value["window_nir"])
        sill, head = belt + rim * (top - belt), top - rim * (top - belt)
        inset, pane = rim * (front - back), half * (1 - 2 * rim)
        for side in (-1, 1):
            x = front if side == 1 else back
            self.add(across(x, side, -half, half, belt, top), roof, 0.8 * heat)
            self.add(across(x, side, -pane, pane, sill, head), glass, heat + 0.15)
            self.add(along(side * half, side, back, front, belt, top), roof, 0.8 * heat)
            window = along(side * half, side, back + inset, front - inset, sill, head)
            self.add(window, glass, heat + 0.15)
        self.add(above(top, back, front, -half, half), roof, heat)
        if self.has["has_band"]:
            self.add(above(top, back, front, *self.band()), self.material("band"), heat)


# --- captures


@dataclass(frozen=True)
class Conditions:
    """How far captures stray.

    Standard deviations of azimuth (degrees), position (tiles) and white balance (logarithm);
    ranges of zoom and exposure below 1; shares of captures by night and behind an occluder.
    """

    azimuth: float
    shift: float
    cast: float
    zoom: float
    exposure: float
    night: float
    occluded: float


FIELD = Conditions(15, 0.06, 0.15, 0.45, 0.6, night=0.5, occluded=0.25)
STUDIO = Conditions(5.2, 0.02, 0.088, 0.16, 0.26, night=0, occluded=0)  # to pretrain on


@dataclass(frozen=True)
class Scene:
    """Everything a capture draws besides sensor noise.

    Angles in radians, positions in tiles, levels from 0 to 1.
    """

    azimuth: float
    elevation: float
    zoom: float
    shift: np.ndarray  # (2,)
    day: bool
    wall: np.ndarray  # (3,) RGB of the background; the ground is darker
    wall_nir: float
    ground_nir: float
    wall_heat: float
    ground_heat: float
    exposure: float
    cast: np.ndarray  # (3,) white balance
    nir_gain: float
    heat_gain: float
    heat_offset: float
    glare: tuple[float, ...] | None  # x, y, radius, strength
    occluder: tuple[float, ...] | None  # left edge, width, level

    @staticmethod
    def draw(camera: int, rng: np.random.Generator, conditions: Conditions) -> "Scene":
        day = bool(rng.random() >= conditions.night)
        glare = tuple(rng.uniform(*span) for span in ((0, 1), (0.2, 1), (0.05, 0.16), (0.5, 1.2)))
        occluder = tuple(rng.uniform(*span) for span in ((0, 0.94), (0.03, 0.11), (0.1, 0.5)))
        return Scene(
            azimuth=math.radians(CAMERAS[camera] + conditions.azimuth * rng.normal()),
            elevation=math.radians(rng.uniform(10, 26)),
            zoom=1 - conditions.zoom * rng.random(),
            shift=conditions.shift * rng.normal(size=2),
            day=day,
            wall=np.clip(rng.uniform(0.25, 0.65) + rng.normal(0, 0.05, 3), 0, 1),
            wall_nir=rng.uniform(0.2, 0.6),
            ground_nir=rng.uniform(0.1, 0.4),
            wall_heat=rng.uniform(0, 0.35),
            ground_heat=rng.uniform(0, 0.3),
            exposure=1 - conditions.exposure * rng.random() if day else rng.uniform(0.05, 0.25),
            cast=np.exp(conditions.cast * rng.normal(size=3)),
            # Lit by the camera's own lamp at night
            nir_gain=rng.uniform(0.65, 1.0) if day else rng.uniform(0.45, 0.8),
            heat_gain=rng.uniform(0.65, 1.0),
            heat_offset=0.05 + rng.normal(0, 0.05),
            glare=glare if not day and rng.random() < 0.6 else None,
            occluder=occluder if rng.random() < conditions.occluded else None,
        )


def capture(
    faces: list[Face], key: tuple[int, int, int, int], height: int = TILE_HEIGHT, conditions=FIELD
) -> np.ndarray:
    """One sample: uint8 (3 modalities, height, 2 * height, 3), RGB, NIR, TIR.

    `key` is (seed, number of the vehicle, camera, frame): the same key and faces give the same
    pixels.
    """
    seed, number, camera, frame = key
    rng = np.random.default_rng([seed, 1, number, camera, frame])
    scene = Scene.draw(camera, rng, conditions)
    reflectance, nir, heat = paint(faces, scene, height)
    rgb = reflectance * scene.exposure
    if scene.glare:
        x, y, radius, strength = scene.glare
        rows, columns = np.mgrid[:height, : 2 * height] / height
        distance = (columns - 2 * x) ** 2 + (rows - y) ** 2
        rgb += (strength * np.exp(-distance / (8 * radius**2)))[..., None]
    rgb = rgb * scene.cast + rng.normal(0, 0.015 if scene.day else 0.05, rgb.shape)
    nir = nir * scene.nir_gain + rng.normal(0, 0.03, nir.shape)
    heat = np.clip(heat + rng.normal(0, 0.025, heat.shape), 0, 1)
    # Pseudo-colour: blue, violet, red, yellow
    tir = np.stack([2 * heat, 2 * heat - 0.7, 1 - 2 * heat], -1)
    sample = np.clip(np.stack([rgb, np.repeat(nir[..., None], 3, -1), tir]), 0, 1)
    if scene.occluder:
        left, width, level = scene.occluder
        columns = slice(int(left * 2 * height), int((left + width) * 2 * height))
        sample[:, :, columns] = level
        sample[0, :, columns] *= scene.exposure
    return (sample * 255).astype(np.uint8)


def paint(faces: list[Face], scene: Scene, height: int) -> list[np.ndarray]:
    """What the sensors would see without noise.

    Reflectance (H, W, 3), NIR (H, W) and heat (H, W), from 0 to 1.
    """
    width = 2 * height
    ca, sa = math.cos(scene.azimuth), math.sin(scene.azimuth)
    ce, se = math.cos(scene.elevation), math.sin(scene.elevation)
    towards = np.array([ce * ca, ce * sa, se])  # from the vehicle to the camera
    screen = np.array([[-sa, ca, 0], [se * ca, se * sa, -ce]])  # right and down
    visible = [face for face in faces if np.dot(face.normal, towards) > 0]
    outlines = [face.corners @ screen.T for face in visible]
    extent = np.concatenate(outlines)
    low, high = extent.min(0), extent.max(0)
    scale = scene.zoom * min(0.9 * width / (high[0] - low[0]), 0.88 * height / (high[1] - low[1]))
    origin = np.array([width, height]) * (0.5 + scene.shift) - scale * (low + high) / 2
    colours, nir, heat = (
        Image.new("RGB", (width, height), tuple(map(level, scene.wall))),
        Image.new("L", (width, height), level(scene.wall_nir)),
        Image.new("L", (width, height), level(scene.wall_heat)),
    )
    pens = [ImageDraw.Draw(canvas) for canvas in (colours, nir, heat)]
    ground = tuple(map(level, 0.6 * scene.wall)), level(scene.ground_nir), level(scene.ground_heat)
    for pen, fill in zip(pens, ground, strict=True):
        pen.rectangle([0, int(0.6 * height), width, height], fill=fill)
    for face, outline in zip(visible, outlines, strict=True):
        shade = 0.45 + 0.55 * max(0.0, float(np.dot(face.normal, SUN)))
        polygon = (scale * outline + origin).ravel().tolist()
        pens[0].polygon(polygon, fill=tuple(map(level, shade * face.rgb)))
        pens[1].polygon(polygon, fill=level((0.6 + 0.4 * shade) * face.nir))
        pens[2].polygon(polygon, fill=level(face.heat * scene.heat_gain + scene.heat_offset))
    heat = heat.filter(ImageFilter.GaussianBlur(height / 40))
    return [np.asarray(canvas, np.float64) / 255 for canvas in (colours, nir, heat)]


def level(value: float) -> int:
    return int(255 * min(max(value, 0.0), 1.0))


# --- the data set


@dataclass(frozen=True)
class Plan:
    """Vehicles `first_id`, `first_id` + 1, ... of the sequence `seed`.

    The first `train_ids` are for training, the others for testing.
    """

    train_ids: int = 100
    test_ids: int = 50
    captures: int = 4  # of each vehicle by each camera
    seed: int = 0
    first_id: int = 1
    tile_height: int = TILE_HEIGHT
    studio: bool = False  # clean daylight captures, to pretrain on

    def vehicles(self) -> list[tuple[int, np.ndarray]]:
        """Numbers, from 0 on, and points."""
        count = self.first_id - 1 + self.train_ids + self.test_ids
        return [*enumerate(vehicles(count, self.seed))][self.first_id - 1 :]

    def is_training(self, number: int) -> bool:
        return number < self.first_id - 1 + self.train_ids


def write_dataset(out: Path, plan: Plan, workers: int = 0) -> int:
    """Write OUT/rgbir/{bounding_box_train,query,bounding_box_test}; returns the number of samples.

    The folder appears only when it is complete, and `workers` (0: one a core) end with this
    process. Raises UserError where OUT is there already, runtime.Stopped on a signal.
    """
    if out.exists():
        raise UserError(f"{out} exists: delete it, or choose another folder")
    partial_out = out.with_name(f"{out.name}.partial{os.getpid()}")
    root, jobs = partial_out / "rgbir", plan.vehicles()
    pool = ProcessPoolExecutor(workers or runtime.num_cores(), initializer=end_with_parent)
    try:
        for split in ("bounding_box_train", "query", "bounding_box_test"):
            (root / split).mkdir(parents=True)
        with runtime.deferred_signals():
            done = pool.map(partial(write_vehicle, root, plan), jobs)
            for _ in runtime.bar(done, "rendering vehicles", len(jobs)):
                if number := runtime.noted_signal():
                    raise runtime.Stopped(number, f"stopped: {out} was not made")
        (partial_out / "VERSION").write_text(f"{VERSION}\n")
        partial_out.rename(out)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(partial_out, ignore_errors=True)
    return len(jobs) * plan.captures * len(CAMERAS)


def find_folder(root: Path, render: bool = False) -> Path:
    """The synthetic set's folder, ROOT or ROOT/synthetic; `render` makes it where it is absent.

    All ranks call it together. Raises UserError for a set of another version, or for none.
    """
    with runtime.rank0_first():
        folder = root if (root / "VERSION").exists() else root / "synthetic"
        if render and not folder.exists():
            runtime.print0(f"rendering the synthetic set into {folder}")
            write_dataset(folder, Plan())
    file = folder / "VERSION"
    version = file.read_text().strip() if file.exists() else "none"
    if version != str(VERSION):
        raise UserError(
            f"{folder}: found version {version} of the synthetic set, expected {VERSION}; delete"
            f" the folder if it is there, and run python -m synthetic.render --out {folder}"
        )
    return folder


def end_with_parent() -> None:
    """For a rendering process: signals are its parent's affair, and it does not outlive it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def write_vehicle(root: Path, plan: Plan, vehicle: tuple[int, np.ndarray]) -> None:
    number, point = vehicle
    faces, is_training = vehicle_faces(point), plan.is_training(number)
    folder = root / ("bounding_box_train" if is_training else "bounding_box_test")
    conditions = STUDIO if plan.studio else FIELD
    for camera in range(len(CAMERAS)):
        for frame in range(plan.captures):
            key = (plan.seed, number, camera, frame)
            tiles = capture(faces, key, plan.tile_height, conditions)
            path = folder / f"{number + 1:04d}_c{camera + 1:04d}_{frame:03d}.jpg"
            Image.fromarray(np.concatenate(tiles, 1)).save(path, quality=95, subsampling=0)
            if not is_training and frame == 0:  # RGBNT100's queries are copies, too
                shutil.copyfile(path, root / "query" / path.name)


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m synthetic.render")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make; must not exist")
    add("--train-ids", type=whole(1), default=100, metavar="N", help="training identities")
    add("--test-ids", type=whole(1), default=50, metavar="N", help="test identities")
    text = "samples of each identity by each camera"
    add("--captures", type=whole(1), default=4, metavar="N", help=text)
    text = "number of the first vehicle: another range, other vehicles"
    add("--first-id", type=whole(1), default=1, metavar="N", help=text)
    text = "of the vehicles and of their captures"
    add("--seed", type=whole(0), default=0, metavar="N", help=text)
    text = "pixels; tiles are twice as wide"
    add("--tile-height", type=whole(8), default=TILE_HEIGHT, metavar="N", help=text)
    add("--workers", type=whole(0), default=0, metavar="N", help="processes; 0: one a core")
    add("--studio", action="store_true", help="clean daylight captures, to pretrain on")
    settings = vars(parser.parse_args())
    out, workers = settings.pop("out"), settings.pop("workers")
    plan = Plan(**settings)
    total = write_dataset(out, plan, workers)
    print(f"{out}: {total} samples of {plan.train_ids + plan.test_ids} vehicles")


if __name__ == "__main__":
    main()
