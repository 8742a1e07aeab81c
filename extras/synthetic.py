"""Render the synthetic set: vehicles seen by eight cameras through three registered sensors.

A vehicle is a point in the unit cube of ATTRIBUTES. Its faces, in metres and with what each sensor
sees of them, are built once (`vehicle_faces`) and photographed many times (`capture`).
`write_dataset` puts the captures on disk as RGBNT100 does: one JPEG mosaic a sample, RGB, NIR and
TIR tiles side by side, named PID_cCCCCC_FFF.jpg.

Designed in, and therefore no discovery: night blinds RGB; paint, NIR reflectance and heat are drawn
independently of one another; TIR does not depend on light; occluders hide the same place in all
sensors; some markings are on the sides only.
"""

import argparse
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

# Of the picture: raised whenever a pixel changes, as results before and after do not compare
VERSION = 1
CAMERAS = (
    0,
    180,
    90,
    270,
    40,
    140,
    220,
    320,
)  # azimuth of each camera in degrees; 0 looks at the vehicle's front
TILE_HEIGHT = 64  # a tile is twice as wide as high
SUN = np.array([0.3, 0.5, 0.8]) / math.sqrt(0.98)

_COLOUR = {"red": (0.08, 0.95), "green": (0.08, 0.95), "blue": (0.08, 0.95), "nir": (0.1, 0.95)}
_DECALS = 3


def _coat(name: str) -> dict[str, tuple[float, float]]:
    return {f"{name}_{channel}": span for channel, span in _COLOUR.items()}


# Seen by every camera: name -> (value at 0, value at 1).
# Lengths in metres, heat and reflectance from 0 to 1.
BODY = {
    "length": (3.4, 5.4), "width": (1.6, 2.0), "height": (0.65, 1.0), "cabin_height": (0.45, 0.9),
    "cabin_back": (-0.45, -0.1), "cabin_front": (0.15, 0.48),  # of the length, from the middle
    **_coat("paint"), **_coat("roof"), "two_tone": (0, 1),
    "window": (0.05, 0.4), "window_nir": (0.1, 0.7), "wheel": (0.3, 0.42),
    "engine_heat": (0.3, 1.0), "wheel_heat": (0.2, 0.9),
    "body_heat": (0.1, 0.4), "cabin_heat": (0.1, 0.6),
}  # fmt: skip
# Seen by some cameras, or carried by some vehicles only.
# `has_*` and `two_tone` are compared with SHARE.
MARKINGS = {
    "engine_behind": (0, 1), "exhaust": (-0.4, 0.4),
    "has_stripe": (0, 1), **_coat("stripe"), "stripe_low": (0.15, 0.7), "stripe_width": (0.1, 0.25),
    "has_band": (0, 1), **_coat("band"), "band_middle": (-0.25, 0.25), "band_width": (0.1, 0.3),
}  # fmt: skip
for _i in range(_DECALS):
    MARKINGS |= {f"has_decal{_i}": (0, 1), **_coat(f"decal{_i}"), f"decal{_i}_x": (-0.35, 0.35),
                 f"decal{_i}_z": (0.25, 0.75), f"decal{_i}_length": (0.08, 0.3),
                 f"decal{_i}_height": (0.15, 0.4)}  # fmt: skip
ATTRIBUTES = BODY | MARKINGS
SHARE = {"two_tone": 0.4, "engine_behind": 0.2} | {
    name: 0.5 for name in MARKINGS if name.startswith("has_")
}
MIN_DISTANCE = 0.9  # Euclidean, over the BODY axes of the unit cube, between any two vehicles


def vehicles(count: int, seed: int = 0) -> np.ndarray:
    """The first `count` vehicles of the sequence `seed`: (count, len(ATTRIBUTES)).

    Each is a point of the unit cube.
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


def vehicle_faces(point: np.ndarray) -> list[Face]:
    """Faces of the vehicle at `point` of the unit cube, in painting order.

    What comes later may hide what came before.
    x runs from the back to the front, y from right to left, z upwards; the ground is z = 0.
    """
    value = {
        name: low + u * (high - low)
        for u, (name, (low, high)) in zip(point, ATTRIBUTES.items(), strict=True)
    }
    has = {name: value[name] < share for name, share in SHARE.items()}
    faces: list[Face] = []

    def coat(name: str) -> tuple[np.ndarray, float]:
        return np.array(
            [value[f"{name}_{channel}"] for channel in ("red", "green", "blue")]
        ), value[f"{name}_nir"]

    def grey(level: float, nir: float) -> tuple[np.ndarray, float]:
        return np.full(3, level), nir

    def add(corners, normal, material, heat):
        faces.append(Face(np.asarray(corners, float), normal, *material, heat))

    def across(x, side, y0, y1, z0, z1):  # a rectangle on the front (side 1) or the back (side -1)
        return [(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], (side, 0, 0)

    def along(y, side, x0, x1, z0, z1):  # a rectangle on the left (side 1) or the right (side -1)
        return [(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], (0, side, 0)

    def above(z, x0, x1, y0, y1):  # a rectangle seen from above
        return [(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], (0, 0, 1)

    length, width, floor = value["length"], value["width"], 0.25
    belt = floor + value["height"]  # where the cabin stands on the body
    top = belt + value["cabin_height"]
    paint = coat("paint")
    roof = coat("roof") if has["two_tone"] else paint
    body_heat, engine_heat = value["body_heat"], value["engine_heat"]
    engine = -1 if has["engine_behind"] else 1

    # Body, with the warm bonnet and what is drawn on its sides
    for side in (-1, 1):
        heat = body_heat + (side == engine) * engine_heat / 2
        add(*across(side * length / 2, side, -width / 2, width / 2, floor, belt), paint, heat)
        add(*along(side * width / 2, side, -length / 2, length / 2, floor, belt), paint, body_heat)
    add(*above(belt, -length / 2, length / 2, -width / 2, width / 2), paint, body_heat)
    bonnet = sorted((engine * 0.28 * length, engine * 0.48 * length))
    add(*above(belt, *bonnet, -0.35 * width, 0.35 * width), paint, body_heat + 0.6 * engine_heat)
    band = [
        value["band_middle"] * width + side * value["band_width"] * width / 2 for side in (-1, 1)
    ]
    if has["has_band"]:  # runs lengthwise over bonnet and roof
        add(*above(belt, -length / 2, length / 2, *band), coat("band"), body_heat)
    turn = np.linspace(0, 2 * np.pi, 14)
    for side in (-1, 1):
        y = side * width / 2
        if has["has_stripe"]:
            low = floor + value["stripe_low"] * value["height"]
            high = low + value["stripe_width"] * value["height"]
            add(*along(y, side, -length / 2, length / 2, low, high), coat("stripe"), body_heat)
        for i in range(_DECALS):
            if has[f"has_decal{i}"]:
                x, z = value[f"decal{i}_x"] * length, floor + value[f"decal{i}_z"] * value["height"]
                half, rise = (
                    value[f"decal{i}_length"] * length / 2,
                    value[f"decal{i}_height"] * value["height"] / 2,
                )
                add(
                    *along(y, side, x - half, x + half, z - rise, z + rise),
                    coat(f"decal{i}"),
                    body_heat + 0.05,
                )
        for x in (-0.32 * length, 0.32 * length):
            for share, material, heat in (
                (1.0, grey(0.06, 0.08), 1.0),
                (0.5, grey(0.6, 0.6), 0.7),
            ):  # tyre, hub
                radius = share * value["wheel"]
                ring = np.stack(
                    [
                        x + radius * np.cos(turn),
                        np.full(14, y),
                        value["wheel"] + radius * np.sin(turn),
                    ],
                    1,
                )
                add(ring, (0, side, 0), material, heat * value["wheel_heat"])

    # Lamps and exhaust
    for end, lamp in ((1, np.array([1.0, 1.0, 0.85])), (-1, np.array([0.8, 0.05, 0.05]))):
        for y in (-0.38 * width, 0.38 * width):
            low, high = floor + 0.55 * value["height"], floor + 0.8 * value["height"]
            add(
                *across(end * length / 2, end, y - 0.15, y + 0.15, low, high),
                (lamp, 0.9),
                body_heat + 0.1,
            )
    pipe = value["exhaust"] * width
    add(
        *across(-length / 2, -1, pipe - 0.12, pipe + 0.12, floor, floor + 0.18), grey(0.2, 0.2), 1.0
    )

    # Cabin and its windows
    back, front, half = value["cabin_back"] * length, value["cabin_front"] * length, 0.46 * width
    glass = grey(value["window"], value["window_nir"])
    rim, sill, head = 0.09, belt + 0.09 * (top - belt), top - 0.09 * (top - belt)
    for side in (-1, 1):
        x = front if side == 1 else back
        add(*across(x, side, -half, half, belt, top), roof, 0.8 * value["cabin_heat"])
        add(
            *across(x, side, -half * (1 - 2 * rim), half * (1 - 2 * rim), sill, head),
            glass,
            value["cabin_heat"] + 0.15,
        )
        inset = rim * (front - back)
        add(*along(side * half, side, back, front, belt, top), roof, 0.8 * value["cabin_heat"])
        add(
            *along(side * half, side, back + inset, front - inset, sill, head),
            glass,
            value["cabin_heat"] + 0.15,
        )
    add(*above(top, back, front, -half, half), roof, value["cabin_heat"])
    if has["has_band"]:
        add(*above(top, back, front, *band), coat("band"), value["cabin_heat"])
    return faces


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


FIELD = Conditions(
    azimuth=15, shift=0.06, cast=0.15, zoom=0.45, exposure=0.6, night=0.5, occluded=0.25
)
STUDIO = Conditions(
    azimuth=5.2, shift=0.02, cast=0.088, zoom=0.16, exposure=0.26, night=0, occluded=0
)  # to pretrain on


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
    glare: tuple[float, float, float, float] | None  # x, y, radius, strength
    occluder: tuple[float, float, float] | None  # left edge, width, level

    @staticmethod
    def draw(camera: int, rng: np.random.Generator, conditions: Conditions) -> "Scene":
        day = bool(rng.random() >= conditions.night)
        glare = (
            rng.uniform(0, 1),
            rng.uniform(0.2, 1),
            rng.uniform(0.05, 0.16),
            rng.uniform(0.5, 1.2),
        )
        occluder = (rng.uniform(0, 0.94), rng.uniform(0.03, 0.11), rng.uniform(0.1, 0.5))
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
            nir_gain=rng.uniform(0.65, 1.0)
            if day
            else rng.uniform(0.45, 0.8),  # lit by the camera's own lamp at night
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
    reflectance, nir, heat = _paint(faces, scene, height)
    day_noise, night_noise = 0.015, 0.05
    rgb = reflectance * scene.exposure
    if scene.glare:
        x, y, radius, strength = scene.glare
        rows, columns = np.mgrid[:height, : 2 * height] / height
        rgb += (strength * np.exp(-((columns - 2 * x) ** 2 + (rows - y) ** 2) / (8 * radius**2)))[
            ..., None
        ]
    rgb = rgb * scene.cast + rng.normal(0, day_noise if scene.day else night_noise, rgb.shape)
    nir = nir * scene.nir_gain + rng.normal(0, 0.03, nir.shape)
    heat = np.clip(heat + rng.normal(0, 0.025, heat.shape), 0, 1)
    tir = np.stack(
        [2 * heat, 2 * heat - 0.7, 1 - 2 * heat], -1
    )  # pseudo-colour: blue, violet, red, yellow
    sample = np.clip(np.stack([rgb, np.repeat(nir[..., None], 3, -1), tir]), 0, 1)
    if scene.occluder:
        left, width, level = scene.occluder
        columns = slice(int(left * 2 * height), int((left + width) * 2 * height))
        sample[:, :, columns] = level
        sample[0, :, columns] *= scene.exposure
    return (sample * 255).astype(np.uint8)


def _paint(
    faces: list[Face], scene: Scene, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the three sensors would see without noise.

    Returns reflectance (H, W, 3), NIR (H, W) and heat (H, W).
    """
    width = 2 * height
    ca, sa, ce, se = (
        math.cos(scene.azimuth),
        math.sin(scene.azimuth),
        math.cos(scene.elevation),
        math.sin(scene.elevation),
    )
    towards = np.array([ce * ca, ce * sa, se])  # from the vehicle to the camera
    screen = np.array([[-sa, ca, 0], [se * ca, se * sa, -ce]])  # right and down
    visible = [face for face in faces if np.dot(face.normal, towards) > 0]
    outlines = [face.corners @ screen.T for face in visible]
    extent = np.concatenate(outlines)
    low, high = extent.min(0), extent.max(0)
    scale = scene.zoom * min(0.9 * width / (high[0] - low[0]), 0.88 * height / (high[1] - low[1]))
    origin = np.array([width, height]) * (0.5 + scene.shift) - scale * (low + high) / 2

    def level(value: float) -> int:
        return int(255 * min(max(value, 0.0), 1.0))

    def warm(heat: float) -> int:
        return level(heat * scene.heat_gain + scene.heat_offset)

    canvases = [
        Image.new("RGB", (width, height), tuple(map(level, scene.wall))),
        Image.new("L", (width, height), level(scene.wall_nir)),
        Image.new("L", (width, height), level(scene.wall_heat)),
    ]
    pens = [ImageDraw.Draw(canvas) for canvas in canvases]
    grounds = (
        tuple(map(level, 0.6 * scene.wall)),
        level(scene.ground_nir),
        level(scene.ground_heat),
    )
    for pen, ground in zip(pens, grounds, strict=True):
        pen.rectangle([0, int(0.6 * height), width, height], fill=ground)
    for face, outline in zip(visible, outlines, strict=True):
        shade = 0.45 + 0.55 * max(0.0, float(np.dot(face.normal, SUN)))
        polygon = (scale * outline + origin).ravel().tolist()
        pens[0].polygon(polygon, fill=tuple(map(level, shade * face.rgb)))
        pens[1].polygon(polygon, fill=level((0.6 + 0.4 * shade) * face.nir))
        pens[2].polygon(polygon, fill=warm(face.heat))
    canvases[2] = canvases[2].filter(ImageFilter.GaussianBlur(height / 40))
    reflectance, nir, heat = (np.asarray(canvas, np.float64) / 255 for canvas in canvases)
    return reflectance, nir, heat


def _write_vehicle(
    job: tuple[int, np.ndarray, bool],
    root: Path,
    captures: int,
    seed: int,
    height: int,
    conditions: Conditions,
) -> int:
    number, point, train = job
    faces = vehicle_faces(point)
    for camera in range(len(CAMERAS)):
        for frame in range(captures):
            tiles = capture(faces, (seed, number, camera, frame), height, conditions)
            name = f"{number + 1:04d}_c{camera + 1:04d}_{frame:03d}.jpg"
            path = root / ("bounding_box_train" if train else "bounding_box_test") / name
            Image.fromarray(np.concatenate(tiles, 1)).save(path, quality=95, subsampling=0)
            if not train and frame == 0:  # RGBNT100's queries are copies of gallery samples, too
                shutil.copyfile(path, root / "query" / name)
    return captures * len(CAMERAS)


def write_dataset(
    out: Path,
    train_ids=100,
    test_ids=50,
    captures=4,
    seed=0,
    first_id=1,
    height=TILE_HEIGHT,
    conditions=FIELD,
    workers=0,
) -> int:
    """Write a data set in RGBNT100's layout; returns the number of samples rendered.

    Writes OUT/rgbir/{bounding_box_train,query,bounding_box_test}.
    Vehicles `first_id`, `first_id` + 1, ... of the sequence `seed`: the first `train_ids` for
    training, the rest for testing. The folder appears only when it is complete. Raises
    FileExistsError where OUT is there already.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: delete it, or choose another folder")
    partial_out = out.with_name(f"{out.name}.partial{os.getpid()}")
    root = partial_out / "rgbir"
    try:
        for split in ("bounding_box_train", "query", "bounding_box_test"):
            (root / split).mkdir(parents=True)
        points = vehicles(first_id - 1 + train_ids + test_ids, seed)
        jobs = [
            (number, points[number], number < first_id - 1 + train_ids)
            for number in range(first_id - 1, len(points))
        ]
        write = partial(
            _write_vehicle,
            root=root,
            captures=captures,
            seed=seed,
            height=height,
            conditions=conditions,
        )
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            total = sum(
                tqdm(
                    pool.map(write, jobs),
                    desc="rendering",
                    total=len(jobs),
                    unit="vehicle",
                    disable=None,
                )
            )
        (partial_out / "VERSION").write_text(f"{VERSION}\n")
        partial_out.rename(out)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    numbers = {  # flag: default, least value, help
        "--train-ids": (100, 1, "training identities"),
        "--test-ids": (50, 1, "test identities"),
        "--captures": (4, 1, "samples of each identity by each camera"),
        "--first-id": (1, 1, "number of the first vehicle: another range, other vehicles"),
        "--seed": (0, 0, "of the vehicles and of their captures"),
        "--tile-height": (TILE_HEIGHT, 8, "pixels; tiles are twice as wide"),
        "--workers": (0, 0, "processes; 0: one a core"),
    }
    for flag, (default, _, text) in numbers.items():
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--studio", action="store_true", help="clean daylight captures, to pretrain on"
    )
    args = parser.parse_args()
    for flag, (_, least, _) in numbers.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if value < least:
            parser.error(f"{flag} {value}: expected at least {least}")
    counts = (
        args.train_ids,
        args.test_ids,
        args.captures,
        args.seed,
        args.first_id,
        args.tile_height,
    )
    try:
        total = write_dataset(args.out, *counts, STUDIO if args.studio else FIELD, args.workers)
    except OSError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted: {args.out} was not made\n")
    print(f"{args.out}: {total} samples of {args.train_ids + args.test_ids} vehicles")


if __name__ == "__main__":
    main()
