"""Proves that the synthetic set's pixels stay what results were measured on.

Also that no two vehicles are alike, that the sensors tell what the module says they tell, and that
the command writes a complete RGBNT100 tree or nothing.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from extras import synthetic
from extras.synthetic import (
    ATTRIBUTES,
    BODY,
    FIELD,
    MIN_DISTANCE,
    STUDIO,
    Scene,
    capture,
    vehicle_faces,
    vehicles,
)

AXES = list(ATTRIBUTES)


def axes(*endings):
    return [i for i, name in enumerate(AXES) if name.endswith(endings)]


# --- vehicles and pixels


@pytest.mark.parametrize(
    ("number", "camera", "frame", "digest"),
    [
        (0, 0, 0, "cc3b9d857c5ce4f2d5dec678c2f25a396338a2f1c7e75c249916a0fa289c8b87"),
        (0, 0, 6, "7ec29c62aef9eabbf58a6a7926508859d21f7c6f2006169ac1065fdb6853da54"),
        (7, 3, 1, "5d01812dafe7895e42d9a65460b298ef6505b133fafbc8f765b6fe75333d70fd"),
        (149, 5, 3, "5bc0ce2ff70d6c2b0cff9edac5c4424c10dcb681fc779fc3782bb4ecd610533a"),
        (1000, 7, 0, "e8d1f1c7cad4c58f1272ff985f0437e47341b432c0d99461826009286677c4df"),
    ],
)  # raise synthetic.VERSION with any of these
def test_pixels_are_pinned(number, camera, frame, digest):
    pixels = capture(vehicle_faces(vehicles(number + 1)[number]), (0, number, camera, frame))
    assert synthetic.VERSION == 1
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == digest


def test_capture_depends_on_its_key_alone():
    faces = vehicle_faces(vehicles(1)[0])
    pixels = capture(faces, (0, 0, 1, 0))
    assert (
        pixels.shape == (3, synthetic.TILE_HEIGHT, 2 * synthetic.TILE_HEIGHT, 3)
        and pixels.dtype == np.uint8
    )
    assert np.array_equal(pixels, capture(vehicle_faces(vehicles(3)[0]), (0, 0, 1, 0)))
    for other in ((1, 0, 1, 0), (0, 1, 1, 0), (0, 0, 2, 0), (0, 0, 1, 1)):
        assert not np.array_equal(pixels, capture(faces, other))
    assert capture(faces, (0, 0, 1, 0), height=20).shape == (3, 20, 40, 3)


def test_vehicles_are_apart_also_from_those_of_pretraining():
    points = vehicles(2201)
    assert points.shape == (2201, len(ATTRIBUTES)) and points.min() >= 0 and points.max() <= 1
    assert np.array_equal(points[:10], vehicles(10)) and not np.array_equal(
        points[:10], vehicles(10, seed=1)
    )
    assert AXES[: len(BODY)] == list(BODY)
    body = points[:, : len(BODY)]
    for i in range(150):
        others = np.r_[0:i, i + 1 : 150, 1000:2201]
        assert np.sqrt(((body[others] - body[i]) ** 2).sum(1)).min() >= MIN_DISTANCE


# --- what each sensor tells


def test_paint_does_not_predict_reflectance_or_heat():
    colour, nir, heat = axes("_red", "_green", "_blue", "window"), axes("_nir"), axes("_heat")
    assert len(colour) == 22 and len(nir) == 8 and len(heat) == 4
    correlation = np.corrcoef(vehicles(1601).T)
    for a, b in ((colour, nir), (colour, heat), (nir, heat)):
        assert (
            np.abs(correlation[np.ix_(a, b)]).max() < 0.12
        )  # chance alone gives about 0.08 for so many pairs


@pytest.mark.parametrize(
    ("changed", "sensor"),
    [(axes("_red", "_green", "_blue", "window"), 0), (axes("_nir"), 1), (axes("_heat"), 2)],
)
def test_each_attribute_is_seen_by_its_own_sensor_only(changed, sensor):
    point = vehicles(1)[0]
    other = point.copy()
    other[changed] = 1 - other[changed]
    before, after = (capture(vehicle_faces(p), (0, 0, 4, 0)) for p in (point, other))
    assert [np.array_equal(*tiles) for tiles in zip(before, after, strict=True)] == [
        i != sensor for i in range(3)
    ]


def test_heat_does_not_depend_on_light(monkeypatch):
    faces = vehicle_faces(vehicles(1)[0])
    scene = Scene.draw(2, np.random.default_rng(0), FIELD)
    lights = [
        {"day": True, "exposure": 0.9, "glare": None},
        {"day": False, "exposure": 0.1, "glare": (0.5, 0.5, 0.1, 1.0)},
    ]
    tiles = []
    for light in lights:
        lit = replace(scene, **light)
        monkeypatch.setattr(Scene, "draw", staticmethod(lambda *_, lit=lit: lit))
        tiles.append(capture(faces, (0, 0, 2, 0)))
    day, night = tiles
    assert np.array_equal(day[2], night[2])
    assert not np.array_equal(day[0], night[0])


def test_occluder_hides_the_same_columns_of_all_sensors():
    keys = [(0, 0, 2, frame) for frame in range(60)]
    scenes = [
        Scene.draw(2, np.random.default_rng([0, 1, 0, 2, frame]), FIELD) for frame in range(60)
    ]
    assert any(scene.occluder for scene in scenes) and not all(scene.occluder for scene in scenes)
    faces = vehicle_faces(vehicles(1)[0])
    for key, scene in zip(keys, scenes, strict=True):
        flat = [
            set(
                np.flatnonzero(
                    (tile == tile[0, 0, 0]).all((0, 2)) | (np.ptp(tile, axis=(0, 2)) == 0)
                )
            )
            for tile in capture(faces, key)
        ]
        left, width, _ = scene.occluder or (0, 0, 0)
        assert flat == [set(range(int(left * 128), min(128, int((left + width) * 128))))] * 3


def test_the_studio_has_neither_night_nor_occluder():
    scenes = [Scene.draw(2, np.random.default_rng(i), STUDIO) for i in range(100)]
    assert all(
        scene.day and not scene.occluder and not scene.glare and scene.exposure >= 0.74
        for scene in scenes
    )
    assert not all(Scene.draw(2, np.random.default_rng(i), FIELD).day for i in range(100))


# --- the command


def run(out, *arguments):
    command = [
        sys.executable,
        synthetic.__file__,
        "--out",
        str(out),
        "--train-ids",
        "3",
        "--test-ids",
        "2",
        "--captures",
        "2",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_command_writes_the_tree_of_rgbnt100(tmp_path):
    assert (
        run(tmp_path / "a").returncode == 0
        and run(tmp_path / "b", "--workers", "1").returncode == 0
    )
    files = contents(tmp_path / "a")
    assert files == contents(tmp_path / "b")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b"]  # nothing half-written
    assert files.pop("VERSION").decode() == f"{synthetic.VERSION}\n"

    def names(pids, frames):
        return {
            f"{pid:04d}_c{camera:04d}_{frame:03d}.jpg"
            for pid in pids
            for camera in range(1, 9)
            for frame in range(frames)
        }

    splits = {
        "bounding_box_train": names((1, 2, 3), 2),
        "query": names((4, 5), 1),
        "bounding_box_test": names((4, 5), 2),
    }
    assert set(files) == {f"rgbir/{split}/{name}" for split in splits for name in splits[split]}
    for name in splits["query"]:
        assert files[f"rgbir/query/{name}"] == files[f"rgbir/bounding_box_test/{name}"]
    with Image.open(tmp_path / "a/rgbir/bounding_box_train/0002_c0003_001.jpg") as mosaic:
        assert mosaic.size == (384, 64) and mosaic.mode == "RGB"
        error = np.asarray(mosaic, float) - np.concatenate(
            capture(vehicle_faces(vehicles(2)[1]), (0, 1, 2, 1)), 1
        )
    assert np.abs(error).mean() < 4  # of 255: JPEG


def test_other_range_of_the_same_sequence(tmp_path):
    synthetic.write_dataset(tmp_path / "a", train_ids=2, test_ids=1, captures=1, workers=1)
    synthetic.write_dataset(
        tmp_path / "b", train_ids=1, test_ids=1, captures=1, first_id=2, workers=1
    )
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert b == {name: a[name] for name in a if "/0001_" not in name}


def test_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        assert [path.name.split(".")[:2] for path in tmp_path.iterdir()] == [
            ["out", f"partial{os.getpid()}"]
        ]
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_dataset(tmp_path / "out", train_ids=1, test_ids=1, captures=1, workers=1)
    assert list(tmp_path.iterdir()) == []


def assert_refused(result):
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if "error:" in line]) == 1


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    result = run(tmp_path / "out")
    assert_refused(result)
    assert f"{tmp_path / 'out'} exists: delete it" in result.stderr
    assert contents(tmp_path) == {"out/mine.txt": b"mine"}


@pytest.mark.parametrize(
    "arguments",
    [
        "--train-ids 0",
        "--captures 0",
        "--first-id 0",
        "--seed -1",
        "--tile-height 0",
        "--workers -1",
    ],
)
def test_wrong_numbers_are_refused_and_leave_nothing(tmp_path, arguments):
    result = run(tmp_path / "out", *arguments.split())
    assert_refused(result)
    assert arguments.split()[0] in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
