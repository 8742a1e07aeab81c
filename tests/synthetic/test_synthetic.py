"""Proves that the synthetic set's pixels stay what results were measured on.

Also that no two vehicles are alike, that the sensors tell what the module says they tell, and that
the command writes a complete RGBNT100 tree or nothing.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, fails, succeeds
from PIL import Image

from model import load_backbone
from synthetic import pretrain, render
from synthetic.render import ATTRIBUTES, BODY, FIELD, Scene, capture, vehicle_faces, vehicles

AXES = list(ATTRIBUTES)
COLOUR = ("_red", "_green", "_blue", "window")


def axes(*endings) -> list[int]:
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
)  # raise render.VERSION with any of these
def test_pixels_are_pinned(number, camera, frame, digest):
    pixels = capture(vehicle_faces(vehicles(number + 1)[number]), (0, number, camera, frame))
    assert render.VERSION == 1
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == digest


def test_capture_depends_on_its_key_alone():
    faces = vehicle_faces(vehicles(1)[0])
    pixels = capture(faces, (0, 0, 1, 0))
    assert pixels.shape == (3, render.TILE_HEIGHT, 2 * render.TILE_HEIGHT, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, capture(vehicle_faces(vehicles(3)[0]), (0, 0, 1, 0)))
    for other in ((1, 0, 1, 0), (0, 1, 1, 0), (0, 0, 2, 0), (0, 0, 1, 1)):
        assert not np.array_equal(pixels, capture(faces, other))
    assert capture(faces, (0, 0, 1, 0), height=20).shape == (3, 20, 40, 3)


def test_vehicles_are_apart_also_from_those_of_pretraining():
    points = vehicles(2201)
    assert points.shape == (2201, len(ATTRIBUTES))
    assert 0 <= points.min() < points.max() <= 1
    assert np.array_equal(points[:10], vehicles(10))
    assert not np.array_equal(points[:10], vehicles(10, seed=1))
    assert AXES[: len(BODY)] == list(BODY)
    body = points[:, : len(BODY)]
    for i in range(150):
        others = np.r_[0:i, i + 1 : 150, 1000:2201]
        assert np.sqrt(((body[others] - body[i]) ** 2).sum(1)).min() >= render.MIN_DISTANCE


# --- what each sensor tells


def test_paint_does_not_predict_reflectance_or_heat():
    colour, nir, heat = axes(*COLOUR), axes("_nir"), axes("_heat")
    assert (len(colour), len(nir), len(heat)) == (22, 8, 4)
    correlation = np.corrcoef(vehicles(1601).T)
    for a, b in ((colour, nir), (colour, heat), (nir, heat)):
        # Chance alone gives about 0.08 for so many pairs
        assert np.abs(correlation[np.ix_(a, b)]).max() < 0.12


@pytest.mark.parametrize(
    ("changed", "sensor"), [(axes(*COLOUR), 0), (axes("_nir"), 1), (axes("_heat"), 2)]
)
def test_each_attribute_is_seen_by_its_own_sensor_only(changed, sensor):
    point = vehicles(1)[0]
    other = point.copy()
    other[changed] = 1 - other[changed]
    before, after = (capture(vehicle_faces(p), (0, 0, 4, 0)) for p in (point, other))
    same = [np.array_equal(*tiles) for tiles in zip(before, after, strict=True)]
    assert same == [i != sensor for i in range(3)]


def test_heat_does_not_depend_on_light(monkeypatch):
    faces = vehicle_faces(vehicles(1)[0])
    scene = Scene.draw(2, np.random.default_rng(0), FIELD)
    tiles = []
    for day, exposure, glare in ((True, 0.9, None), (False, 0.1, (0.5, 0.5, 0.1, 1.0))):
        lit = replace(scene, day=day, exposure=exposure, glare=glare)
        monkeypatch.setattr(Scene, "draw", staticmethod(lambda *_, lit=lit: lit))
        tiles.append(capture(faces, (0, 0, 2, 0)))
    day, night = tiles
    assert np.array_equal(day[2], night[2])
    assert not np.array_equal(day[0], night[0])


def test_an_occluder_hides_the_same_columns_of_all_sensors():
    faces = vehicle_faces(vehicles(1)[0])
    number = 0
    for frame in range(60):
        scene = Scene.draw(2, np.random.default_rng([0, 1, 0, 2, frame]), FIELD)
        left, width, _ = scene.occluder or (0, 0, 0)
        hidden = {*range(int(left * 128), min(128, int((left + width) * 128)))}
        number += scene.occluder is not None
        for tile in capture(faces, (0, 0, 2, frame)):
            flat = np.ptp(tile, axis=0).max(-1) == 0  # the same colour from top to bottom
            assert {*np.flatnonzero(flat)} == hidden, frame
    assert 0 < number < 60


def test_the_studio_has_neither_night_nor_occluder():
    scenes = [Scene.draw(2, np.random.default_rng(i), render.STUDIO) for i in range(100)]
    assert all(scene.day for scene in scenes)
    assert not any(scene.occluder or scene.glare for scene in scenes)
    assert min(scene.exposure for scene in scenes) >= 0.74


# --- the command

FEW = ["--train-ids", 3, "--test-ids", 2, "--captures", 2]


def contents(folder) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_command_writes_the_tree_of_rgbnt100(tmp_path):
    succeeds(render, "--out", tmp_path / "a", *FEW)
    succeeds(render, "--out", tmp_path / "b", *FEW, "--workers", 1)
    files = contents(tmp_path / "a")
    assert files == contents(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]  # nothing half-written
    assert files.pop("VERSION").decode() == f"{render.VERSION}\n"

    def names(split: str, pids, frames: int) -> set[str]:
        return {
            f"rgbir/{split}/{pid:04d}_c{camera:04d}_{frame:03d}.jpg"
            for pid in pids for camera in range(1, 9) for frame in range(frames)
        }  # fmt: skip

    query = names("query", (4, 5), 1)
    train, test = names("bounding_box_train", (1, 2, 3), 2), names("bounding_box_test", (4, 5), 2)
    assert set(files) == train | query | test
    for name in query:
        assert files[name] == files[name.replace("query", "bounding_box_test")]
    with Image.open(tmp_path / "a/rgbir/bounding_box_train/0002_c0003_001.jpg") as mosaic:
        assert (mosaic.size, mosaic.mode) == ((384, 64), "RGB")
        shown = np.asarray(mosaic, float)
    tiles = capture(vehicle_faces(vehicles(2)[1]), (0, 1, 2, 1))
    assert np.abs(shown - np.concatenate(tiles, 1)).mean() < 4  # of 255: JPEG


def test_another_range_of_the_same_sequence(tmp_path):
    plan = render.Plan(train_ids=2, test_ids=1, captures=1)
    render.write_dataset(tmp_path / "a", plan, workers=1)
    render.write_dataset(tmp_path / "b", replace(plan, train_ids=1, first_id=2), workers=1)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert b == {name: a[name] for name in a if "/0001_" not in name}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_neither_processes_nor_a_folder(tmp_path, number):
    """train.py renders as the command does: in processes that end with it."""
    command = [sys.executable, "train.py", "--data-root", tmp_path, "--out", tmp_path / "run"]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as program:
        end = time.monotonic() + 60
        while not [*tmp_path.rglob("*.jpg")] and time.monotonic() < end:
            time.sleep(0.05)
        # Ctrl-C goes to all processes of a terminal
        (os.killpg if number == signal.SIGINT else os.kill)(program.pid, number)
        text = program.communicate(timeout=60)[1]  # ends when the last process has closed it
    if number == signal.SIGKILL:
        return
    assert program.returncode == 128 + number
    assert text.splitlines()[-1] == f"stopped: {tmp_path}/synthetic was not made"
    assert os.listdir(tmp_path) == []


def test_mistakes_leave_everything_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert f"{tmp_path}/out exists: delete it" in fails(render, "--out", tmp_path / "out")
    for mistake in ("--train-ids 0", "--captures 0", "--seed -1", "--tile-height 0"):
        text = fails(render, "--out", tmp_path / "new", *mistake.split())
        assert mistake.split()[0] in text
    assert contents(tmp_path) == {"out/mine.txt": b"mine"}


@pytest.mark.parametrize("backbone", ["small", "resnet18"])
def test_pretraining_writes_weights_that_load(tiny_data, tmp_path, backbone):
    options = ["--epochs", 1, "--batch-size", 16, "--device", "cpu", "--backbone", backbone]
    file = tmp_path / "weights.pth"
    text = succeeds(pretrain, "--data-root", tiny_data, "--out", file, *options)
    assert "epoch 1 of 1: loss" in text
    module, _ = pretrain.make_backbone(backbone)
    assert load_backbone(module, file) == []
    assert all(weight.isfinite().all() for weight in module.state_dict().values())
