"""Sets of registered pairs: repeatable, split by scenes, each sensor blind as often as said."""

from collections import Counter

import numpy as np
import pytest
from conftest import fails, succeeds
from PIL import Image

import data
from experiments import scenes

SIZES = {"rgb": (400, 200), "tir": (200, 100), "small": (100, 50), "square": (300, 300)}


def draw(folder, sensors):
    """Six scenes of coarse random patches, which all sensors see alike."""
    for i in range(6):
        patches = np.random.default_rng(i).integers(0, 256, (12, 24, 3), np.uint8)
        for sensor in sensors:
            (folder / sensor).mkdir(exist_ok=True, parents=True)
            image = Image.fromarray(patches).convert("RGB" if sensor == "rgb" else "L")
            image.resize(SIZES.get(sensor, (300, 150))).save(folder / sensor / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pairs, and the sets that --failures each and none make of them."""
    root = tmp_path_factory.mktemp("made")
    draw(root / "pairs", ("rgb", "tir"))
    for kind in ("each", "none"):
        succeeds(scenes, "--pairs", root / "pairs", "--out", root / kind, "--failures", kind)
    return root


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_seed_decides_every_byte(made, tmp_path):
    for seed in "01":
        succeeds(scenes, "--pairs", made / "pairs", "--out", tmp_path / seed, "--seed", seed)
    assert contents(tmp_path / "0") == contents(made / "each")
    assert not {*contents(tmp_path / "1").values()} & {*contents(made / "each").values()}


def test_training_and_test_identities_are_of_different_scenes(made):
    dataset = data.load_dataset("folder", made / "each")
    splits = (dataset.train, dataset.query, dataset.gallery)
    assert [len(split) for split in splits] == [48, 12, 24]
    numbers = [{(pid - 1) // 2 for pid in split.pids.tolist()} for split in splits]
    assert numbers == [{0, 1, 2, 3}, {4, 5}, {4, 5}]
    _, query, _ = data.hold_out(dataset.gallery, 4)
    assert [s.name for s in query.samples] == [s.name for s in dataset.query.samples]


def coarse(path):
    """Grey values of 8x8 blocks, in which noise averages out."""
    return np.asarray(Image.open(path).convert("L"), float).reshape(12, 8, 24, 8).mean((1, 3))


@pytest.mark.parametrize(("split", "captures"), [("train", 48), ("gallery", 24)])
def test_each_sensor_is_blind_in_a_third_of_the_captures(made, split, captures):
    counts = Counter()
    for path in (made / "each" / split / "rgb").iterdir():
        name, _, blind = path.stem.partition("_no_")
        counts[blind] += 1
        clean = {m: made / "none" / split / m / f"{name}.png" for m in ("rgb", "tir")}
        assert np.corrcoef(*(coarse(file).ravel() for file in clean.values()))[0, 1] > 0.9
        for sensor, file in clean.items():
            own = made / "each" / split / sensor / path.name
            if sensor == blind:
                assert coarse(own).std() < 3
                assert coarse(file).std() > 10
            else:
                assert own.read_bytes() == file.read_bytes()
    assert counts == dict.fromkeys(("rgb", "tir", ""), captures / 3)


def test_of_three_sensors_each_is_blind_in_a_quarter(tmp_path):
    pairs, sheet = draw(tmp_path / "pairs", ("nir", "rgb", "tir")), tmp_path / "sheet.png"
    options = f"--out {tmp_path}/out --sensors nir,rgb,tir --train 0 4 --contact-sheet {sheet}"
    assert "60 training samples, 0 queries" in succeeds(scenes, "--pairs", pairs, *options.split())
    counts = Counter(path.stem.partition("_no_")[2] for path in tmp_path.glob("out/train/tir/*"))
    assert counts == dict.fromkeys(("nir", "rgb", "tir", ""), 15)
    assert Image.open(sheet).height > 100


REFUSALS = {
    "--sensors rgb,swir": "swir: no such folder; expected one for each sensor",
    "--sensors rgb": "6 scenes found; expected two or more, each seen by two sensors",
    "--sensors rgb,empty": "empty lacks 6 of 6 scenes, such as 0",
    "--train 0 3 --test 3 5": "--test 3 5: scene 3 is in --train, too",
    "--train 4 6": "--train 4 6: expected the numbers of a first and a last scene, from 0 to 5",
    "--sensors rgb,small": "100x50 pixels; expected at least 160x80",
    "--sensors rgb,square": "300x300 pixels, another aspect ratio than",
    "--sensors rgb,torn": "not an image that can be read",
}


def test_refusals_leave_nothing(tmp_path):
    pairs = draw(tmp_path / "pairs", ("rgb", "tir", "small", "square", "torn"))
    (pairs / "empty").mkdir()
    (pairs / "torn/5.png").write_bytes(b"torn")
    common = ("--pairs", pairs, "--out", tmp_path / "o/set")
    for options, message in REFUSALS.items():
        assert message in fails(scenes, *common, *options.split())
        assert not [*tmp_path.glob("o/*"), *tmp_path.glob("o/.*")], options
